"""``jaxreg register``, ``apply``, ``invert`` and ``info``: files in, files out."""

from __future__ import annotations

import gc
import html
import importlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import scipy.ndimage
import SimpleITK as sitk  # noqa: N813
from command import run
from rich.console import Console
from scenes import header, physical_grid, placed, scene

import jaxreg_cli
from jaxreg.commands import progress_bars
from jaxreg.registration import Affine, Progress, Registration, Transform, ncc
from jaxreg.registration.stages import spread
from regkernels import (
    DisplacementField,
    Volume,
    move_points,
    read_transform,
    read_volume,
    rigid_motion,
    write_affine,
    write_displacement,
    write_volume,
)
from regkernels.info import describe

# The package's attribute of this name is the function in it.
register_command = importlib.import_module("jaxreg.commands.register")

FILES = ["affine.tfm", "fixed_moved.nii.gz", "inverse_warp.nii.gz", "moved.nii.gz"]
FILES += ["registration.json", "report.html", "warp.nii.gz"]


def rotation(degrees: float, shift: tuple[float, float]) -> np.ndarray:
    motion = rigid_motion(degrees, (0, 0, 1), (*shift, 0), (0, 0, 0))
    return motion[np.ix_([0, 1, 3], [0, 1, 3])]


MOTION = rotation(8, (5, -4))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two images in the plane, of one scene, masks, labels and an affine."""
    folder = tmp_path_factory.mktemp("pair")
    fixed = header((36, 40), (2.5, 2.5))
    moving = header((38, 34), (2.6, 2.7), turn=20)
    points = physical_grid(moving) @ np.linalg.inv(MOTION)[:2, :2].T
    points = points + np.linalg.inv(MOTION)[:2, 2]
    bent = points + 1.5 * np.sin(points[..., ::-1] / 12)
    moving = moving.with_array((1000 * scene(bent)).astype(np.int16))
    fixed = fixed.with_array(scene(physical_grid(fixed)))
    write_volume(fixed, folder / "fixed.nii.gz")
    write_volume(moving, folder / "moving.mha")
    write_volume(moving.with_array(np.ones(moving.shape, np.uint8)), folder / "mask.nrrd")
    write_volume(moving.with_array(scene(points) > 0.4), folder / "labels.nii.gz")
    write_affine(MOTION, folder / "motion.tfm")
    return folder


@pytest.fixture(scope="module")
def registered(pair: Path) -> Path:
    """What `jaxreg register` makes of them."""
    out = pair / "new" / "folder"
    assert run(*registration(pair), "-o", out, "--report") == 0
    return out


def registration(pair: Path) -> list[object]:
    options = ["--stages", "affine, greedy", "--preset", "fast", "--device", "cpu"]
    return ["register", pair / "fixed.nii.gz", pair / "moving.mha", *options]


# --- register -----------------------------------------------------------------------------------


def test_register_writes_its_files_and_nothing_else(registered: Path) -> None:
    assert sorted(path.name for path in registered.iterdir()) == FILES
    assert not [path for path in registered.parent.iterdir() if path != registered]


def test_register_aligns_the_images_both_ways(pair: Path, registered: Path) -> None:
    for still, moved in (("fixed.nii.gz", "moved.nii.gz"), ("moving.mha", "fixed_moved.nii.gz")):
        target, found = read_volume(pair / still), read_volume(registered / moved)
        np.testing.assert_allclose(
            found.grid.voxel_to_physical(), target.grid.voxel_to_physical(), atol=1e-4
        )
        assert float(ncc(found.batched(), target.batched())[0, 0]) > 0.99


@pytest.mark.parametrize("way", ["there", "back"])
def test_simpleitk_and_apply_get_the_moved_images_from_the_files(
    pair: Path, registered: Path, tmp_path: Path, way: str
) -> None:
    affine = registered / "affine.tfm"
    linear: Any = sitk.ReadTransform(str(affine))
    if way == "there":
        still, other, moved = "fixed.nii.gz", "moving.mha", "moved.nii.gz"
        warp = registered / "warp.nii.gz"
        options = ["-t", warp, "-t", affine]
    else:
        still, other, moved = "moving.mha", "fixed.nii.gz", "fixed_moved.nii.gz"
        warp = registered / "inverse_warp.nii.gz"
        options = ["-t", f"{affine}:inverse", "-t", warp]
        linear = linear.GetInverse()
    field = sitk.DisplacementFieldTransform(sitk.ReadImage(str(warp), sitk.sitkVectorFloat64))
    # The transform that is added last is the first that a point goes through.
    chain = sitk.CompositeTransform([linear, field] if way == "there" else [field, linear])
    image, reference = (
        sitk.ReadImage(str(pair / name), sitk.sitkFloat32) for name in (other, still)
    )
    ours = sitk.GetArrayFromImage(sitk.ReadImage(str(registered / moved)))
    theirs = sitk.GetArrayFromImage(sitk.Resample(image, reference, chain, sitk.sitkLinear, 0.0))
    # SimpleITK extends an image by half a voxel, where ours fades out.
    ones = read_volume(pair / other)
    write_volume(ones.with_array(np.ones(ones.shape)), tmp_path / "ones.nrrd")
    out = tmp_path / "out.nrrd"
    assert run("apply", tmp_path / "ones.nrrd", "-r", pair / still, *options, "-o", out) == 0
    inside = read_volume(out).array > 1 - 1e-4
    assert inside.mean() > 0.5
    scale = np.abs(theirs).max()
    assert np.abs(ours - theirs)[inside].max() < 1e-4 * scale

    assert run("apply", pair / other, "-r", pair / still, *options, "-o", out) == 0
    np.testing.assert_allclose(read_volume(out).array, ours, atol=1e-4 * scale)


def test_the_warps_undo_each_other(registered: Path) -> None:
    (there,), (back,) = (
        read_transform(registered / name) for name in ("warp.nii.gz", "inverse_warp.nii.gz")
    )
    assert isinstance(there, DisplacementField)
    points = 0.8 * physical_grid(Volume.on_grid(there.grid, np.zeros(there.grid.shape)))
    moved = move_points(points, (there, back))
    voxels = np.linalg.norm(moved - points, axis=-1) / 2.5
    assert np.abs(move_points(points, (there,)) - points).max() > 0.5
    assert voxels.mean() < 0.1
    assert voxels.max() < 1


def test_the_record_tells_settings_versions_and_losses(pair: Path, registered: Path) -> None:
    record = json.loads((registered / "registration.json").read_text())
    assert record["inputs"]["FIXED"] == str(pair / "fixed.nii.gz")
    assert record["transform"]["fixed to moving"] == ["warp.nii.gz", "affine.tfm"]
    (part,) = read_transform(registered / "affine.tfm")
    np.testing.assert_array_equal(record["transform"]["matrix"], part.matrix)
    assert [stage["name"] for stage in record["stages"]] == ["affine", "greedy"]
    assert record["stages"][1]["settings"]["metric"] == "LNCC(kernel_size=7, common_variance=0.5)"
    for stage in record["stages"]:
        finest = stage["levels"][-1]["losses"]
        assert finest[-1] < finest[0]
    assert record["jacobian"]["share"] == 0
    residual = record["inverse residual (voxels)"]
    assert residual["share"] == 0
    assert 0 < residual["mean"] < residual["maximum"] < 0.011
    assert {"jax", "python", "device"} <= set(record["versions"])
    assert record["clip"] == "outliers"
    assert list(record["outside"]) == ["moved.nii.gz", "fixed_moved.nii.gz"]


def test_the_report_is_one_file_with_everything(pair: Path, registered: Path) -> None:
    page = (registered / "report.html").read_text()
    assert page.count("data:image/png;base64,iVBOR") == 5  # slices, losses, three of the sliders
    assert not re.search(r'(src|href)="(?!data:)', page)
    words = ("moving.mha registered to fixed.nii.gz", "learning_rate", "jaxlib", "greedy")
    for word in (
        *words,
        "metric = LNCC(kernel_size=7, common_variance=0.5)",
        "regularisation = Elasticity(weight=0.2, mu=1.0, lam=1.0)",
        "residual of the inverse",
        str(pair / "fixed.nii.gz"),
    ):
        assert word in page


def test_the_same_command_gives_the_same_bits(
    pair: Path, registered: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Also into a folder with the leftovers of another registration, and what belongs to others.
    for name in ("report.html", "warp.nii.gz", "notes.txt"):
        (tmp_path / name).write_text("old")
    assert run(*registration(pair), "-o", tmp_path) == 0
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == sorted({*FILES, "notes.txt"} - {"report.html"})
    for name in set(FILES) - {"registration.json", "report.html"}:
        assert (tmp_path / name).read_bytes() == (registered / name).read_bytes(), name
    told = capsys.readouterr().out
    lines = [line for line in told.splitlines() if line.startswith(("affine: ", "greedy: "))]
    assert len(lines) == 4  # of two scales each
    told = r"greedy: 1/2 resolution, LNCC 0\.\d{4} with penalty, iteration (\d+) of \1"
    assert re.fullmatch(told, lines[-1])


def test_without_a_deformation_everything_but_the_warps_is_there(
    pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fixed, moving, out = pair / "fixed.nii.gz", pair / "moving.mha", tmp_path / "out"
    out.mkdir()
    for name in ("warp.nii.gz", "inverse_warp.nii.gz"):  # of another registration
        (out / name).write_text("old")
    arguments = ["--stages", "moments,affine", "--report", "--device", "cpu", "-o", out]
    assert run("register", fixed, moving, *arguments) == 0
    assert "inverse" not in capsys.readouterr().out.lower()
    warps = {"warp.nii.gz", "inverse_warp.nii.gz"}
    assert sorted(path.name for path in out.iterdir()) == sorted(set(FILES) - warps)
    record = json.loads((out / "registration.json").read_text())
    assert record["transform"]["fixed to moving"] == ["affine.tfm"]
    assert record["transform"]["moving to fixed"] == ["affine.tfm:inverse"]
    assert record["jacobian"] == {"share": 0, "minimum": 1, "maximum": 1}
    assert record["inverse residual (voxels)"] == {"share": 0, "mean": 0, "maximum": 0}
    assert (out / "report.html").read_text().count("data:image/png;base64,iVBOR") == 5

    assert run("info", out / "affine.tfm") == 0
    assert run("invert", out / "affine.tfm", "-o", tmp_path / "back.tfm") == 0
    for image, grid, transform, moved in (
        (moving, fixed, out / "affine.tfm", "moved.nii.gz"),
        (fixed, moving, f"{out / 'affine.tfm'}:inverse", "fixed_moved.nii.gz"),
        (fixed, moving, tmp_path / "back.tfm", "fixed_moved.nii.gz"),
    ):
        found = tmp_path / "found.nii.gz"
        assert run("apply", image, "-r", grid, "-t", transform, "-o", found) == 0
        expected = read_volume(out / moved).array
        scale = np.abs(expected).max()
        np.testing.assert_allclose(read_volume(found).array, expected, atol=1e-4 * scale)
        assert float(ncc(read_volume(found).batched(), read_volume(grid).batched())[0, 0]) > 0.97


@pytest.mark.parametrize(("least", "planes"), [(1000, "some"), (10**6, "all")])
def test_a_registration_on_several_devices_writes_the_same(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    least: int,
    planes: str,
) -> None:
    """And says what ran where: levels that are small are on every device."""
    monkeypatch.setattr(spread, "LEAST_VOXELS", least)
    rng = np.random.default_rng(0)
    image = scipy.ndimage.gaussian_filter(rng.normal(size=(20, 22, 21)), 2).astype(np.float32)
    paths = [tmp_path / name for name in ("fixed.nii.gz", "moving.nii.gz")]
    for path, array in zip(paths, (image, np.roll(image, 1, 1)), strict=True):
        write_volume(Volume.create(array), path)
    options = ["--stages", "affine,greedy", "--preset", "fast", "--device", "cpu"]
    for count in ("1", "2"):
        folder = tmp_path / count
        assert run("register", *paths, *options, "--devices", count, "-o", folder) == 0
    out = capsys.readouterr().out
    assert f"2 of CPU, with {planes} planes on each" in out
    record = json.loads((tmp_path / "2" / "registration.json").read_text())
    assert record["versions"]["device"] == f"2 of CPU, with {planes} planes on each"
    levels = [(stage["name"], level) for stage in record["stages"] for level in stage["levels"]]
    for name, level in levels:
        shared = np.prod(level["shape"]) >= least
        assert level["devices"] == (2 if shared else 1)
        where = " on 2 devices" if shared else ""
        assert f"{name}: 1/{level['scale']:g} resolution{where}, " in out
    assert any(level["devices"] == 2 for _, level in levels) == (planes == "some")
    one, two = (read_volume(tmp_path / count / "moved.nii.gz").array for count in ("1", "2"))
    np.testing.assert_allclose(two, one, atol=1e-3 * np.abs(one).max())


@pytest.mark.parametrize("count", ["0", "many", "1000"])
def test_devices_that_are_not_there_are_refused(
    pair: Path, tmp_path: Path, count: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--device", "cpu", "--devices", count, "-o", tmp_path / "out"]
    assert run("register", pair / "fixed.nii.gz", pair / "moving.mha", *arguments) == 2
    assert "--devices: expected a number from 1 to" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_why_a_result_may_be_wrong_is_told_on_stderr_in_the_record_and_in_the_report(
    pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Voxels half as wide as they are: the affine has to double them.
    volume = read_volume(pair / "fixed.nii.gz")
    wrong = placed(volume, spacing=volume.grid.spacing / 2, origin=volume.grid.origin / 2)
    write_volume(wrong, tmp_path / "wrong.nii.gz")
    arguments = ["--stages", "moments,similarity", "--device", "cpu", "--report"]
    out = tmp_path / "out"
    command = ["register", pair / "fixed.nii.gz", tmp_path / "wrong.nii.gz", *arguments, "-o", out]
    assert run(*command) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("jaxreg: warning: the affine multiplies lengths by 0.5")
    (doubt,) = json.loads((out / "registration.json").read_text())["doubts"]
    assert doubt == {"code": "scale", "text": line.removeprefix("jaxreg: warning: ")}
    page = (out / "report.html").read_text()
    assert html.escape(doubt["text"]) in page[: page.index("<img")]


def test_of_a_plausible_result_there_are_no_doubts(pair: Path, registered: Path) -> None:
    assert json.loads((registered / "registration.json").read_text())["doubts"] == []
    assert "may be wrong" not in (registered / "report.html").read_text()


@pytest.mark.parametrize("given", [[], ["--stages", "affine,syn"]])
def test_descriptors_deform_what_mutual_information_has_placed(
    pair: Path, tmp_path: Path, given: list[str]
) -> None:
    out = tmp_path / "out"
    options = ["-o", out, "--metric", "mind", "--preset", "fast", "--device", "cpu", *given]
    assert run("register", pair / "fixed.nii.gz", pair / "moving.mha", *options) == 0
    stages = json.loads((out / "registration.json").read_text())["stages"]
    names = given[1].split(",") if given else ["moments", "rigid", "greedy"]
    assert [stage["name"] for stage in stages] == names
    *placing, deforming = (stage["settings"] for stage in stages)
    assert {settings["metric"] for settings in placing} == {"MI(num_bins=32)"}
    assert deforming["metric"] == "MIND(radius=2, dilation=2)"
    assert (deforming["gradient_sigma"], deforming["field_sigma"]) == (3, 2)


def test_masks_metric_and_a_start_are_used(pair: Path, tmp_path: Path) -> None:
    arguments = ["register", pair / "fixed.nii.gz", pair / "moving.mha", "-o", tmp_path]
    arguments += ["--stages", "translation", "--metric", "ncc", "--device", "cpu"]
    arguments += ["--moving-mask", pair / "mask.nrrd", "--initial", pair / "motion.tfm"]
    assert run(*arguments) == 0
    record = json.loads((tmp_path / "registration.json").read_text())
    assert record["inputs"]["--moving-mask"] == str(pair / "mask.nrrd")
    (stage,) = record["stages"]
    assert stage["settings"]["metric"] == "NCC"
    matrix = read_transform(tmp_path / "affine.tfm")[0].matrix
    np.testing.assert_allclose(matrix[:2, :2], MOTION[:2, :2], atol=1e-6)
    assert np.abs(matrix[:2, 2] - MOTION[:2, 2]).max() < 1.5
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "affine.tfm",
        "fixed_moved.nii.gz",
        "moved.nii.gz",
        "registration.json",
    ]


def test_a_deformation_to_start_from_stays_with_its_inverse(pair: Path, tmp_path: Path) -> None:
    fixed = read_volume(pair / "fixed.nii.gz")
    vectors = 2 * np.sin(physical_grid(fixed) / 11)
    write_displacement(vectors, fixed, tmp_path / "start.nii.gz")
    arguments = ["register", pair / "fixed.nii.gz", pair / "moving.mha", "-o", tmp_path / "out"]
    arguments += ["--stages", "translation", "--metric", "ncc", "--device", "cpu"]
    arguments += ["--initial", tmp_path / "start.nii.gz", "--initial", pair / "motion.tfm"]
    assert run(*arguments) == 0
    (warp,), (inverse,) = (
        read_transform(tmp_path / "out" / name) for name in ("warp.nii.gz", "inverse_warp.nii.gz")
    )
    np.testing.assert_allclose(warp.vectors, vectors, atol=1e-4)
    points = 0.7 * physical_grid(fixed)
    np.testing.assert_allclose(move_points(points, (warp, inverse)), points, atol=0.1)


def test_a_terminal_gets_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    def register(*_: object, callback: Any, **__: object) -> str:
        callback(Progress("affine", 2.0, 10, 20, np.array([-0.5, -0.75])))
        callback(Progress("affine", 1.0, 20, 20, np.array([-0.75, -0.875])))
        return "result"

    monkeypatch.setattr(progress_bars, "register", register)
    for terminal in (True, False):
        text = io.StringIO()
        console = Console(file=text, force_terminal=terminal, width=100)
        volume = Volume.create(np.zeros((3, 4)))
        assert progress_bars.register_watched(volume, volume, (Affine(),), console) == "result"
        assert "NCC 0.8750" in text.getvalue()
        assert ("━" in text.getvalue()) == terminal


# --- apply --------------------------------------------------------------------------------------


def test_apply_moves_labels_as_labels(pair: Path, tmp_path: Path) -> None:
    arguments = ["apply", pair / "labels.nii.gz", "-r", pair / "fixed.nii.gz"]
    arguments += ["-t", pair / "motion.tfm"]
    assert run(*arguments, "-o", tmp_path / "labels.nii.gz", "--labels") == 0
    assert run(*arguments, "-o", tmp_path / "linear.nii.gz") == 0
    labels = read_volume(tmp_path / "labels.nii.gz").array
    linear = read_volume(tmp_path / "linear.nii.gz").array
    assert labels.dtype == np.uint8
    assert linear.dtype == np.float32
    assert np.unique(labels).tolist() == [0, 1]
    clear = np.abs(linear - 0.5) > 1e-4  # two labels: the one with more than half of the weight
    assert clear.mean() > 0.99
    np.testing.assert_array_equal(labels[clear], linear[clear] > 0.5)


@pytest.mark.parametrize("dtype", [np.int16, np.int64, np.uint64, np.float32])
def test_apply_keeps_the_type_and_the_value_of_any_label(tmp_path: Path, dtype: type) -> None:
    labels = np.zeros((6, 8), dtype)
    labels[2:5, 2:7] = labels[3, 3] = 30001
    if dtype == np.int64:
        labels[:2] = 2**53 + 1
    write_volume(Volume.create(labels), tmp_path / "labels.nrrd")
    for how in ("--labels", "--interpolation=nearest"):
        out = tmp_path / "out.nrrd"
        image = tmp_path / "labels.nrrd"
        assert run("apply", image, "-r", image, "-o", out, how) == 0
        kept = read_volume(out).array
        assert kept.dtype == dtype
        np.testing.assert_array_equal(kept, labels)


@pytest.fixture
def ct(tmp_path: Path) -> Path:
    """A folder with two CTs in air at -1024, a transform that leads beyond them, and labels."""
    volume = header((30, 32), (2.5, 2.5))
    points = physical_grid(volume)
    for name, p in (("fixed", points), ("moving", points + 4)):
        image = np.where(scene(p) > 0.4, 1000 * scene(p) - 500, -1024).astype(np.int16)
        write_volume(volume.with_array(image), tmp_path / f"{name}.nii.gz")
    write_volume(volume.with_array((image > 0).astype(np.uint8)), tmp_path / "labels.nii.gz")
    write_affine(rotation(0, (40, 0)), tmp_path / "away.tfm")
    return tmp_path


def test_register_says_what_is_outside_and_what_is_clipped(
    ct: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["register", ct / "fixed.nii.gz", ct / "moving.nii.gz", "--stages", "translation"]
    start = ["--initial", ct / "away.tfm", "-o", ct / "out"]

    def outside(*options: object) -> tuple[Any, np.ndarray, np.ndarray, str]:
        assert run(*command, *start, *options) == 0
        record = json.loads((ct / "out" / "registration.json").read_text())
        moved = read_volume(ct / "out" / "moved.nii.gz").array
        fixed_moved = read_volume(ct / "out" / "fixed_moved.nii.gz").array
        return record, moved, fixed_moved, capsys.readouterr().out

    record, moved, fixed_moved, told = outside()
    assert (moved.min(), fixed_moved.min()) == (-1024, -1024)
    assert record["outside"] == {"moved.nii.gz": [-1024], "fixed_moved.nii.gz": [-1024]}
    for name in ("moved", "fixed_moved"):
        assert f"Outside of the image in {name}.nii.gz is -1024.\n" in told
    record, moved, _, told = outside("--outside", "-3000", "--clip", "0.01,0.99")
    assert moved.min() == -3000
    assert record["outside"]["moved.nii.gz"] == [-3000]
    assert record["clip"] == [0.01, 0.99]
    record, moved, fixed_moved, told = outside("--outside", 0, "--clip", "none")
    assert record["outside"] == {"moved.nii.gz": [0], "fixed_moved.nii.gz": [0]}
    assert record["clip"] is None
    assert "Outside" not in told


def test_apply_says_what_is_outside(ct: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ct / "out.nii.gz"

    def applied(name: str, *options: object) -> tuple[np.ndarray, str]:
        reference = ["-r", ct / "fixed.nii.gz", "-t", ct / "away.tfm", "-o", out]
        assert run("apply", ct / f"{name}.nii.gz", *reference, *options) == 0
        return read_volume(out).array, capsys.readouterr().out

    kinds = {"linear": np.float32, "nearest": np.int16, "cubic": np.float32, "b-spline": np.float32}
    for kind, dtype in kinds.items():
        options = ("--interpolation", kind)
        # The weights of 64 voxels add up to 1 but for rounding.
        rounding = 1e-6 if kind in ("cubic", "b-spline") else 0
        moved, told = applied("moving", *options)
        assert moved.dtype == dtype
        np.testing.assert_allclose(moved[:, -10:], -1024, rtol=rounding)
        assert told == "Outside of IMAGE is -1024.\n"
        for name in ("--outside", "--default-value"):  # the latter as ANTs calls it
            moved, told = applied("moving", *options, f"{name}=-7")
            np.testing.assert_allclose(moved[:, -10:], -7, rtol=rounding)
            assert told == "Outside of IMAGE is -7.\n"
    for options in ((), ("--labels",), ("--interpolation", "nearest")):
        moved, told = applied("labels", *options)
        assert (moved[:, -10:] == 0).all()
        assert told == ""
    moved, _ = applied("labels", "--labels", "--outside", 5)
    assert moved.dtype == np.uint8
    assert (moved[:, -10:] == 5).all()


def test_apply_takes_a_transform_that_simpleitk_made(pair: Path, tmp_path: Path) -> None:
    fixed = sitk.ReadImage(str(pair / "fixed.nii.gz"))
    moving = sitk.ReadImage(str(pair / "moving.mha"), sitk.sitkFloat32)
    euler = sitk.Euler2DTransform([3.0, -2.0], 0.3, [1.0, 2.0])
    vectors = np.sin(physical_grid(read_volume(pair / "fixed.nii.gz")) / 10)
    image = sitk.GetImageFromArray(vectors, isVector=True)
    image.CopyInformation(fixed)
    field = sitk.DisplacementFieldTransform(image)
    chain = sitk.CompositeTransform([euler, field])
    sitk.WriteTransform(chain, str(tmp_path / "chain.h5"))
    out = tmp_path / "out.nrrd"
    arguments = ["-r", pair / "fixed.nii.gz", "-t", tmp_path / "chain.h5", "-o", out]
    assert run("apply", pair / "moving.mha", *arguments) == 0
    theirs = sitk.GetArrayFromImage(sitk.Resample(moving, fixed, chain, sitk.sitkLinear, 0.0))
    ours = read_volume(out).array
    write_volume(read_volume(pair / "mask.nrrd"), tmp_path / "ones.nrrd")
    assert run("apply", tmp_path / "ones.nrrd", *arguments) == 0
    inside = read_volume(out).array > 1 - 1e-4
    assert inside.mean() > 0.5
    assert np.abs(ours - theirs)[inside].max() < 1e-4 * theirs.max()


# --- invert, info -------------------------------------------------------------------------------


def test_invert_writes_the_inverse_of_either_kind(
    pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("invert", pair / "motion.tfm", "-o", tmp_path / "back.mat") == 0
    matrix = read_transform(tmp_path / "back.mat")[0].matrix
    np.testing.assert_allclose(matrix @ MOTION, np.eye(3), atol=1e-12)

    fixed = read_volume(pair / "fixed.nii.gz")
    field = DisplacementField(fixed.grid, 3 * np.sin(physical_grid(fixed) / 11))
    write_displacement(field.vectors, fixed, tmp_path / "warp.nii.gz")
    assert run("invert", tmp_path / "warp.nii.gz", "-o", tmp_path / "back.nii.gz") == 0
    (back,) = read_transform(tmp_path / "back.nii.gz")
    points = 0.8 * physical_grid(fixed)
    np.testing.assert_allclose(move_points(points, (back, field)), points, atol=0.1)
    assert capsys.readouterr().err == ""

    folded = 30 * np.sin(physical_grid(fixed) / 11)
    write_displacement(folded, fixed, tmp_path / "folded.nii.gz")
    assert run("invert", tmp_path / "folded.nii.gz", "-o", tmp_path / "back.nii.gz") == 0
    warning = capsys.readouterr().err
    assert re.search(r"warning: .*folded\.nii\.gz: no inverse .* for \d+(\.\d+)? % of", warning)


def test_info_describes_files_and_the_installation(
    pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(*arguments: object) -> str:
        assert run("info", *arguments) == 0
        return re.sub(" +", " ", capsys.readouterr().out)

    image = told(pair / "moving.mha")
    for fact in ("kind image\n", "size (x first) 34 x 38\n", "spacing (mm) 2.6 2.7\n", "int16\n"):
        assert fact in image
    affine = told(pair / "motion.tfm")
    assert "kind affine\n" in affine
    assert "translation (mm) 5 -4\n" in affine
    assert "determinant 1\n" in affine
    fixed = read_volume(pair / "fixed.nii.gz")
    write_displacement(np.full((*fixed.shape, 2), 3.0), fixed, tmp_path / "warp.nii.gz")
    assert "length of vectors mean 4.243, at most 4.243\n" in told(tmp_path / "warp.nii.gz")
    assert "jaxlib " in told()


@pytest.mark.parametrize("flags", [[], ["-u"]])  # of the interpreter: when does it write?
def test_who_reads_no_further_ends_it_quietly(pair: Path, flags: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer) as stdout:
        ended = subprocess.run(
            [sys.executable, *flags, "-m", "jaxreg", "info", pair / "motion.tfm"],
            cwd=pair,  # and not the sources, which have no extension
            stdout=stdout,
            stderr=subprocess.PIPE,
            check=False,
        )
    assert (ended.returncode, ended.stderr) == (1, b"")


def test_the_version_is_that_of_the_installation(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out == f"{describe()['regkernels']}\n"


# --- bad input ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bad(pair: Path) -> Path:
    """A folder of the pair and of what is no good."""
    volume = Volume.create(np.arange(120).reshape(4, 5, 6))
    write_volume(volume, pair / "space.nrrd")
    write_affine(np.eye(4), pair / "space.tfm")
    fixed = read_volume(pair / "fixed.nii.gz")
    write_volume(fixed.with_array(np.zeros(fixed.shape)), pair / "empty.nrrd")
    holes = sitk.Image(6, 5, sitk.sitkFloat32)
    holes[2, 3] = np.nan
    sitk.WriteImage(holes, str(pair / "holes.nrrd"))
    sitk.WriteImage(holes, str(pair / "holes.nii.gz"))
    write_volume(fixed, pair / "two.hdr")
    write_displacement(np.zeros((*fixed.shape, 2)), fixed, pair / "field.nrrd")
    (pair / "text.nii.gz").write_text("no image")
    (pair / "text.tfm").write_text("no transform")
    write_volume(fixed.with_array(1e16 * fixed.array), pair / "bright.nrrd")
    (pair / "taken" / "moved.nii.gz").mkdir(parents=True)
    sitk.WriteImage(holes, str(pair / "plane.vtk"))
    sitk.WriteImage(holes, str(pair / "cut.mhd"))
    (pair / "cut.raw").write_bytes(bytes(10))
    (pair / "cut.nii.gz").write_bytes((pair / "fixed.nii.gz").read_bytes()[:-100])
    return pair


REGISTER = "register fixed.nii.gz moving.mha"
APPLY = "apply moving.mha -r fixed.nii.gz -o out.nrrd"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("register missing.nii moving.mha -o out", "FIXED: missing.nii: no such file"),
        ("register fixed.nii.gz text.nii.gz -o out", "MOVING: text.nii.gz: not an image"),
        ("register fixed.nii.gz space.nrrd -o out", "error: MOVING: expected 2 dimensions"),
        ("register cut.nii.gz moving.mha -o out", "FIXED: cut.nii.gz: cut short or damaged: "),
        ("register fixed.nii.gz cut.mhd -o out", "MOVING: cut.mhd: cut short or damaged: expected"),
        ("register plane.vtk moving.mha -o out", "FIXED: plane.vtk: not an image that can be read"),
        (
            "register empty.nrrd moving.mha -o out",
            "FIXED: expected different intensities, got 0",
        ),
        ("register fixed.nii.gz bright.nrrd -o out", "error: MOVING: expected intensities within"),
        ("register . moving.mha -o out", "FIXED: .: expected a file, or a folder with"),
        (f"{REGISTER} -o taken", "--output: taken/moved.nii.gz: expected a file or nothing, got"),
        ("register holes.nrrd moving.mha -o out", "FIXED: holes.nrrd: array: expected finite"),
        ("register fixed.nii.gz holes.nii.gz -o out", "MOVING: holes.nii.gz: expected finite"),
        ("register fixed.nii.gz -o out", "MOVING"),
        (f"{REGISTER} -o out --fixed-mask empty.nrrd", "error: --fixed-mask: expected a voxel"),
        (f"{REGISTER} -o out --fixed-mask mask.nrrd", "error: --fixed-mask: expected shape (36"),
        (f"{REGISTER} -o out --moving-mask no", "--moving-mask: no: no such file"),
        (f"{REGISTER} -o out --stages affine,magic", "--stages: stage: expected one of moments"),
        (f"{REGISTER} -o out --stages=", "--stages: stage: expected one of moments"),
        (f"{REGISTER} -o out --metric magic", "error: --metric: expected one of"),
        (f"{REGISTER} -o out --preset magic", "--preset"),
        (f"{REGISTER} -o out --clip magic", "error: --clip: expected outliers, none, or two"),
        (f"{REGISTER} -o out --clip .9,.1", "error: --clip: expected outliers, none, or two"),
        (f"{REGISTER} -o out --outside air", "error: --outside: expected background, or a number"),
        (f"{REGISTER} -o out --outside 1,2", "error: --outside: expected 1 number"),
        (f"{REGISTER} -o out --outside nan", "error: --outside: expected a finite number"),
        (f"{REGISTER} -o out --device abacus", "--device"),
        (f"{REGISTER} -o out --initial text.tfm", "--initial: text.tfm: not a transform"),
        (f"{REGISTER} -o out --initial space.tfm", "space.tfm: expected a 2-D transform, got 3"),
        (f"{REGISTER} -o out --cache text.tfm", "--cache: text.tfm: cannot write there"),
        (f"{REGISTER} -o text.tfm", "--output: text.tfm: cannot write there"),
        (f"{REGISTER} -o text.tfm/below", "--output: text.tfm/below: cannot write there"),
        (REGISTER, "--output"),
        ("register out/moved.nii.gz moving.mha -o out", "FIXED: out/moved.nii.gz would be over"),
        (f"{APPLY} -o moving.mha", "IMAGE: moving.mha would be overwritten"),
        (f"{APPLY} -o fixed.nii.gz", "--reference: fixed.nii.gz would be overwritten"),
        ("apply two.img -r fixed.nii.gz -o two.hdr", "IMAGE: two.img would be overwritten"),
        ("apply z.img.gz -r fixed.nii.gz -o z.hdr.gz", "IMAGE: z.img.gz would be overwritten"),
        (f"{APPLY} -t out.nrrd:inverse", "--transform: out.nrrd would be overwritten"),
        (f"{APPLY} -t space.tfm", "--transform: space.tfm: expected a 2-D transform, got 3-D"),
        (f"{APPLY} -t fixed.nii.gz", "--transform: fixed.nii.gz: expected displacements, 2"),
        (f"{APPLY} -r space.nrrd", "--reference: space.nrrd: expected a 2-D image, got 3-D"),
        (f"{APPLY} --interpolation magic", "--interpolation"),
        (f"{APPLY} --outside air", "error: --outside/--default-value: expected background, or a"),
        (
            f"{APPLY} --outside 1,2",
            "error: --outside/--default-value: expected 1 number, or 1 as channels, got 2",
        ),
        (
            f"{APPLY} --outside .5 --labels",
            "error: --outside/--default-value: expected an integer that int16 holds",
        ),
        (f"{APPLY} --labels --interpolation nearest", "--labels: expected no --interpolation"),
        ("apply fixed.nii.gz -r moving.mha --labels -o out.nrrd", "IMAGE: fixed.nii.gz: expected"),
        (f"{APPLY} -o out.magic", "--output: out.magic: cannot write it: expected one of .nii, "),
        (f"{APPLY} -o out.png -t no.tfm", "--output: out.png: cannot write it: expected one of"),
        (f"{APPLY} -o no/out.nrrd", "--output: no/out.nrrd: cannot write there"),
        ("invert motion.tfm -o motion.tfm", "TRANSFORM: motion.tfm would be overwritten"),
        ("invert field.nrrd -o out.tif", "--output: out.tif: cannot write it: expected one of"),
        ("invert motion.tfm -o out.nrrd", "--output: out.nrrd: expected an ending of"),
        ("invert text.tfm -o out.tfm", "TRANSFORM: text.tfm: not a transform"),
        ("info text.nii.gz", "FILE: text.nii.gz: not an image"),
        ("info missing.tfm", "FILE: missing.tfm: no such file"),
    ],
)
def test_bad_input_is_one_line_exit_status_2_and_no_file(
    command: str,
    message: str,
    bad: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(bad)
    before = sorted(path for path in bad.rglob("*"))
    assert run(*command.split()) == 2
    error = capfd.readouterr().err
    assert error.startswith("jaxreg: error: ")
    assert error.count("\n") == 1
    assert message in error
    assert sorted(path for path in bad.rglob("*")) == before


def test_images_are_read_while_a_device_starts(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []
    read_image, process_index = register_command.read_image, jax.process_index

    def reading(path: Path) -> Volume:
        read.append(path)
        image: Volume = read_image(path)
        return image

    def waiting(*arguments: Any) -> int:
        assert read, "JAX knows the number of a process once a device has started"
        return process_index(*arguments)

    fixed, moving = read_volume(pair / "fixed.nii.gz"), read_volume(pair / "moving.mha")
    result = Registration(fixed, moving, Transform(fixed.grid, MOTION), ())
    monkeypatch.setattr(register_command, "register_watched", lambda *_, **__: result)
    monkeypatch.setattr(register_command, "read_image", reading)
    monkeypatch.setattr(jax, "process_index", waiting)
    assert run(*registration(pair), "-o", tmp_path / "out") == 0
    assert len(read) == 2


def test_what_fails_late_leaves_nothing_either(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    fixed, moving = read_volume(pair / "fixed.nii.gz"), read_volume(pair / "moving.mha")
    result = Registration(fixed, moving, Transform(fixed.grid, MOTION), ())
    monkeypatch.setattr(register_command, "register_watched", lambda *_, **__: result)
    monkeypatch.setattr(register_command, "write_report", full)
    assert run(*registration(pair), "-o", tmp_path / "out", "--report") == 2
    assert "No space left" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError("Unable to allocate 2 TiB"), 1, "out of memory: Unable to allocate 2 TiB"),
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nallocating 9 bytes."),
            1,
            "out of memory: RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.",
        ),
        (TypeError("initial: expected numbers, got a string"), 2, "--initial: expected numbers, "),
    ],
)
def test_what_may_happen_in_a_run_is_one_line_and_no_file(
    error: BaseException,
    status: int,
    told: str,
    pair: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(register_command, "register_watched", fail)
    assert run(*registration(pair), "-o", tmp_path / "out") == status
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"jaxreg: error: {told}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("number", "status", "told"),
    [(signal.SIGTERM, 143, "terminated"), (signal.SIGHUP, 129, "hangup")],
)
def test_signals_that_end_a_run_leave_no_file(
    number: signal.Signals,
    status: int,
    told: str,
    pair: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    default_signals: None,
) -> None:
    def signalled(*_: object, **__: object) -> None:
        assert len(list(tmp_path.iterdir())) == 1
        signal.raise_signal(number)

    monkeypatch.setattr(register_command, "register_watched", signalled)
    before = signal.getsignal(number)
    assert run(*registration(pair), "-o", tmp_path / "out") == status
    assert capfd.readouterr().err == f"jaxreg: error: {told}\n"
    assert not list(tmp_path.iterdir())
    assert signal.getsignal(number) == before

    def interrupted(*_: object, **__: object) -> None:
        signal.raise_signal(number)
        raise KeyboardInterrupt

    monkeypatch.setattr(register_command, "register_watched", interrupted)
    signal.signal(number, signal.SIG_IGN)  # as nohup does
    try:
        assert run(*registration(pair), "-o", tmp_path / "out") == 130
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize(
    ("number", "status", "told"),
    [
        (signal.SIGINT, 130, "interrupted"),
        (signal.SIGTERM, 143, "terminated"),
        (signal.SIGHUP, 129, "hangup"),
    ],
)
@pytest.mark.parametrize("error", [ValueError("not an image"), SystemError("no exception set")])
def test_what_a_library_makes_of_a_signal_is_taken_for_the_end(
    number: signal.Signals,
    status: int,
    told: str,
    error: Exception,
    pair: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    default_signals: None,
) -> None:
    """An extension that is imported, say, or one that calls Python."""

    def signalled(*_: object, **__: object) -> None:
        try:
            signal.raise_signal(number)
        except BaseException:
            raise error from None

    monkeypatch.setattr(register_command, "register_watched", signalled)
    before = signal.getsignal(number)
    assert run(*registration(pair), "-o", tmp_path / "out") == status
    assert capfd.readouterr().err == f"jaxreg: error: {told}\n"
    assert not list(tmp_path.iterdir())
    assert signal.getsignal(number) == before


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)]
)
def test_a_signal_that_comes_during_garbage_collection_ends_the_run_all_the_same(
    number: signal.Signals,
    status: int,
    pair: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    default_signals: None,
) -> None:
    """What is raised in a callback of the collector, and JAX has one, is swallowed by Python."""

    def collecting(*_: object, **__: object) -> None:
        def callback(phase: str, _: object) -> None:
            if phase == "stop":
                signal.raise_signal(number)

        gc.callbacks.append(callback)
        try:
            gc.collect()
        finally:
            gc.callbacks.remove(callback)
        time.sleep(10)
        raise AssertionError("the signal was lost")

    monkeypatch.setattr(register_command, "register_watched", collecting)
    before = sys.unraisablehook
    assert run(*registration(pair), "-o", tmp_path / "out") == status
    assert sys.unraisablehook is before
    assert not list(tmp_path.iterdir())


def test_a_process_that_is_terminated_leaves_no_file(pair: Path, tmp_path: Path) -> None:
    arguments = (*registration(pair), "-o", tmp_path / "out")
    process = subprocess.Popen(
        [sys.executable, "-m", "jaxreg", *map(str, arguments)],
        cwd=pair,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        while not list(tmp_path.iterdir()):
            assert process.poll() is None
            time.sleep(0.01)
        process.terminate()
        _, error = process.communicate(timeout=60)
    assert process.returncode == 143
    assert error == "jaxreg: error: terminated\n"
    assert not list(tmp_path.iterdir())


def test_an_interrupted_process_does_not_wait_for_programs_that_are_compiled(
    tmp_path: Path,
) -> None:
    code = """
import importlib, signal, sys, threading, time
main = importlib.import_module("jaxreg_cli.running")

# What a shell runs in the background ignores this signal, and so would this process.
signal.signal(signal.SIGINT, signal.default_int_handler)

def interrupted(**_):
    threading.Thread(target=time.sleep, args=(300,), name="compiler_0").start()
    signal.raise_signal(int(sys.argv[1]))

main._app = lambda arguments: interrupted
main.main()
"""
    for number, status, told in (
        (signal.SIGINT, 130, "interrupted"),
        (signal.SIGTERM, 143, "terminated"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", code, str(int(number))],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert (done.returncode, done.stderr) == (status, f"jaxreg: error: {told}\n")


@pytest.mark.parametrize("bug", [TypeError("unsupported operand"), KeyError("fixed")])
def test_a_bug_is_not_taken_for_bad_input(
    bug: Exception, pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise bug

    monkeypatch.setattr(register_command, "register_watched", fail)
    with pytest.raises(type(bug)):
        jaxreg_cli.main(
            [str(argument) for argument in (*registration(pair), "-o", tmp_path / "out")]
        )
    assert not list(tmp_path.iterdir())
