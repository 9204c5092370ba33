"""The shipped brains and ``jaxreg demo``."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from command import run

from jaxreg.commands import multimodal
from jaxreg.registration import dice, ncc, resample
from jaxreg.registration.report.pictures import View, draw_contours
from regkernels import AffineMap, Volume, read_volume
from regkernels.data import copyright_notice, load_multimodal_paths, load_pair_paths


def test_the_brains_ship_with_the_package() -> None:
    paths = load_pair_paths()
    assert sum(path.stat().st_size for path in paths) < 600_000
    for path in paths:
        image = sitk.ReadImage(str(path))
        assert image.GetPixelID() == sitk.sitkUInt8
        volume = read_volume(path)
        np.testing.assert_allclose(volume.grid.spacing, 2.0)
        assert volume.array.max() > 100
        # The origin of MNI space, the anterior commissure, is inside the brain.
        inside = image.TransformPhysicalPointToIndex((0.0, 0.0, 0.0))
        assert image[inside] > 0
        # Brain only: the outermost voxels are empty.
        assert all(not volume.array.take((0, -1), axis).any() for axis in range(3))
    assert "provided that the above copyright\nnotice appear in all copies" in copyright_notice()


def test_a_head_and_a_ct_ship_with_the_package() -> None:
    paths = load_multimodal_paths()
    assert sum(path.stat().st_size for path in paths[0].parent.glob("*.*")) < 1_600_000
    head, ct = (sitk.ReadImage(str(path)) for path in paths[:2])
    for image in (head, ct):
        assert image.GetPixelID() == sitk.sitkUInt8
        np.testing.assert_allclose(image.GetSpacing(), 2.0)
    # White matter has 25 to 35 HU.
    centrum_semiovale = (25.0, 20.0, 30.0)
    there = sitk.ReadTransform(str(paths.reference)).TransformPoint(centrum_semiovale)
    assert 50 <= ct[ct.TransformPhysicalPointToIndex(there)] <= 70
    notice = copyright_notice()
    for path in paths:
        assert path.name in notice
    assert "TotalSegmentator" in notice
    assert "Apache License, Version 2.0" in notice


def test_the_reference_puts_ventricles_on_ventricles() -> None:
    paths = load_multimodal_paths()
    head, ct = (sitk.ReadImage(str(path)) for path in paths[:2])
    brain = sitk.Resample(sitk.ReadImage(str(load_pair_paths().moving)), head) > 5
    deep = sitk.BinaryErode(sitk.BinaryFillhole(brain), [6] * 3)
    fluid = sitk.GetArrayFromImage(sitk.And(head < 45, deep))

    def overlap(transform: sitk.Transform) -> float:
        low = sitk.And(sitk.Resample(ct, head, transform) < 40, deep)
        return dice(fluid, sitk.GetArrayFromImage(low))[1]

    reference = sitk.ReadTransform(str(paths.reference))
    assert overlap(reference) > 0.55
    # 5 mm in any direction, and it shows.
    for shift in 5 * np.vstack([np.eye(3), -np.eye(3)]):
        shifted = sitk.TranslationTransform(3, shift.tolist())
        assert overlap(sitk.CompositeTransform([reference, shifted])) < 0.5


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a quick demo writes, into a folder that it makes."""
    folder = tmp_path_factory.mktemp("demo") / "new" / "folder"
    assert run("demo", "--quick", "--device", "cpu", "--output-dir", folder) == 0
    return folder


def test_the_demo_writes_its_three_files_and_nothing_else(output: Path) -> None:
    names = sorted(path.name for path in output.iterdir())
    assert names == ["displacement.nii.gz", "moved.nii.gz", "report.png"]
    assert (output / "report.png").read_bytes().startswith(b"\x89PNG")


def test_the_demo_aligns_the_brains(output: Path) -> None:
    fixed = read_volume(load_pair_paths().fixed)
    moved = read_volume(output / "moved.nii.gz")
    assert moved.shape == fixed.shape
    np.testing.assert_allclose(
        moved.grid.voxel_to_physical(), fixed.grid.voxel_to_physical(), atol=1e-4
    )
    assert float(ncc(moved.batched(), fixed.batched())[0, 0]) > 0.97


def test_simpleitk_moves_the_brain_through_the_demos_field(output: Path) -> None:
    from jaxreg.commands.demo import load

    _, moving = load(rotation=15.0, shift=20.0)
    image = sitk.GetImageFromArray(np.asarray(moving.array, np.float32))
    image.SetSpacing(moving.grid.spacing.tolist())
    image.SetOrigin(moving.grid.origin.tolist())
    image.SetDirection(moving.grid.direction.ravel().tolist())
    field = sitk.ReadImage(str(output / "displacement.nii.gz"), sitk.sitkVectorFloat64)
    ours = sitk.ReadImage(str(output / "moved.nii.gz"))
    theirs = sitk.Resample(
        image, ours, sitk.DisplacementFieldTransform(field), sitk.sitkLinear, 0.0
    )
    difference = sitk.GetArrayFromImage(theirs) - sitk.GetArrayFromImage(ours)
    assert np.abs(difference).max() < 1e-3 * moving.array.max()


def test_the_demo_says_what_it_found(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    # The stages are compiled for these shapes already.
    assert run("demo", "--quick", "--device", "cpu", "--output-dir", tmp_path, "--shift", 5) == 0
    text = capsys.readouterr().out
    for words in ("before", "affine", "deformable", "determinant", "CPU"):
        assert words in text
    for measure in ("NCC", "LNCC in the brain", "Overlap of the brains (Dice)"):
        (row,) = (line for line in text.splitlines() if line.startswith(f"│ {measure} "))
        before, affine, deformable = map(float, re.findall(r"\d\.\d{4}", row))
        assert before < affine < deformable <= 1
    assert str(tmp_path / "moved.nii.gz") in text


def test_mutual_information_aligns_what_the_other_metrics_do_not(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = ("--quick", "--device", "cpu", "--output-dir", tmp_path)
    assert run("demo", "--multimodal", *arguments) == 0
    text = capsys.readouterr().out
    rows = [
        [float(number) for number in re.findall(r"\d+\.\d", line)]
        for line in text.splitlines()
        if re.match(r"│ (\d+°, \d+ mm|Median) ", line)
    ]
    assert len(rows) == len(multimodal.STARTS) + 1
    for start, squares, correlation, information in rows:
        assert start > 14
        assert information < 4
        assert min(squares, correlation) > 2 * information
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["moved.nii.gz", "multimodal.png"]
    assert (tmp_path / "multimodal.png").read_bytes().startswith(b"\x89PNG")

    # The CT is written where mutual information puts it.
    scene = multimodal.load()
    moved = read_volume(tmp_path / "moved.nii.gz")
    assert moved.shape == scene.fixed.shape
    expected = resample(scene.moving, scene.fixed, [AffineMap(scene.reference)])
    surfaces = (20.0, scene.surface)  # Hounsfield units, and what the scene has
    brains = (
        (np.asarray(volume.array) > surface).astype(int)
        for volume, surface in zip((moved, expected), surfaces, strict=True)
    )
    assert dice(*brains)[1] > 0.95


def test_the_starts_are_off_by_what_they_say() -> None:
    scene = multimodal.load()
    assert scene.error(scene.reference) == 0
    for start in multimodal.STARTS:
        motion = start.motion(np.zeros(3))
        assert np.linalg.norm(motion[:3, 3]) == pytest.approx(start.millimetres)
        cosine = (np.trace(motion[:3, :3]) - 1) / 2
        assert np.degrees(np.arccos(cosine)) == pytest.approx(start.degrees)
        shift = np.eye(4)
        shift[:3, 3] = scene.reference[:3, :3] @ motion[:3, 3]
        expected = np.linalg.norm(shift[:3, 3])
        assert scene.error(shift @ scene.reference) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--multimodal", "--shift", "3"], "--shift: expected none with --multimodal"),
        (["demo", "--output-dir", "{file}"], "--output-dir: {file}: cannot write there"),
        (["demo", "--output-dir", "{file}/below"], "cannot write there"),
        (["demo", "--rotation", "nan"], "--rotation: expected a finite number"),
        (["demo", "--shift", "far"], "--shift"),
        (["demo", "--device", "abacus"], "--device"),
        (["demo", "--unheard-of"], "--unheard-of"),
        (["undo"], "undo"),
    ],
)
def test_bad_input_is_one_line_on_stderr_and_exit_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.touch()
    assert run(*(argument.format(file=file) for argument in arguments)) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("jaxreg: error: ")
    assert captured.err.count("\n") == 1
    assert message.format(file=file) in captured.err
    assert captured.out == ""


def test_a_missing_package_is_named_with_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "typer" else find(name)
    )
    assert run("demo") == 2
    error = capsys.readouterr().err
    assert "needs typer: pip install 'regkernels[jax,cli]'" in error


def test_the_package_runs_as_a_module(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "jaxreg", "demo", "--help"]
    completed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "--output-dir" in completed.stdout


@pytest.mark.parametrize("signs", [(1, 1, 1), (-1, -1, 1), (1, -1, -1)])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 0, 2)])
def test_the_report_shows_every_orientation_the_same_way(
    order: tuple[int, int, int], signs: tuple[int, int, int]
) -> None:
    direction = np.zeros((3, 3))
    for physical, (axis, sign) in enumerate(zip(order, signs, strict=True)):
        direction[physical, axis] = sign
    volume = Volume.create(np.zeros((4, 5, 6)), (1, 2, 3), (7, 8, 9), direction)
    view = View.of(volume)
    index = np.stack(np.indices(volume.shape)[::-1], axis=-1)
    matrix = volume.grid.voxel_to_physical()
    physical = view.arrange(index @ matrix[:3, :3].T + matrix[:3, 3])
    # Along the axes superior, posterior, left of the turned array these coordinates grow.
    for axis, component in ((0, 2), (1, 1), (2, 0)):
        steps = np.diff(physical[..., component], axis=axis)
        np.testing.assert_allclose(steps, view.spacing[component])

    # A displacement is shown along the direction in which it points in the world.
    voxels = np.zeros((4, 5, 6, 3), np.float32)
    for axis in range(3):
        size = volume.shape[::-1][axis]
        voxels[..., axis] = (axis + 1) * 2 / (size - 1)  # axis + 1 voxels, normalised
    shown = view.deformed_points(voxels) - view.deformed_points(0 * voxels)
    expected = matrix[:3, :3] @ [1, 2, 3]
    np.testing.assert_allclose(shown, np.broadcast_to(expected, shown.shape), rtol=1e-5)


def test_contours_lie_where_the_volume_has_their_level() -> None:
    ramp = np.broadcast_to(np.arange(12.0), (8, 10, 12))
    fixed, placed, reference = (
        Volume.create(array, (2, 2, 2)) for array in (np.ones_like(ramp), ramp, ramp + 3)
    )
    figure = draw_contours(fixed, {"One": placed}, reference, level=7.25, title="Ramps")
    axial, coronal, _ = figure.axes
    for ax in (axial, coronal):
        beneath, above = (set.get_paths()[0].vertices[:, 0] for set in ax.collections)
        np.testing.assert_allclose(beneath, 2 * 4.25)
        np.testing.assert_allclose(above, 2 * 7.25)
