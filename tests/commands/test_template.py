"""``jaxreg template``: files in, a folder with a template and the transforms out."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import run
from scenes import header, physical_grid, scene, similarity

from jaxreg.registration import TemplateProgress, ncc
from regkernels import Volume, read_volume, write_volume

template_command = importlib.import_module("jaxreg.commands.template")

SHIFTS = [(6, 1), (-2, -5), (-4, 4)]
OPTIONS = ["--stages", "translation,greedy", "--preset", "fast", "--rounds", "1", "--device", "cpu"]
OF_IMAGE = ["affine.tfm", "inverse_warp.nii.gz", "labels.nii.gz", "moved.nii.gz", "warp.nii.gz"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three images of one scene, shifted, labels of each, and one in space."""
    folder = tmp_path_factory.mktemp("images")
    empty = header((30, 32), (3, 3))
    for name, shift in zip("abc", SHIFTS, strict=True):
        values = scene(physical_grid(empty) - np.asarray(shift))
        write_volume(empty.with_array(values), folder / f"{name}.nii.gz")
        labels = empty.with_array((values > 0.4).astype(np.uint8) * 7)
        write_volume(labels, folder / f"{name}_labels.nii.gz")
    write_volume(Volume.create(np.random.default_rng(0).normal(size=(5, 6, 7))), folder / "d.nrrd")
    write_volume(empty.with_array(np.random.default_rng(0).normal(size=(30, 32))), folder / "e.mha")
    return folder


def files(folder: Path, kind: str = "") -> list[Path]:
    return [folder / f"{name}{kind}.nii.gz" for name in "abc"]


@pytest.fixture(scope="module")
def built(folder: Path) -> Path:
    out = folder / "out"
    arguments = [*files(folder), "-o", out, *OPTIONS, "--labels", *files(folder, "_labels")]
    assert run("template", *arguments) == 0
    return out


def test_it_writes_its_files_and_a_folder_for_each_image(built: Path) -> None:
    names = ["001_a", "002_b", "003_c", "coverage.nii.gz", "labels.nii.gz"]
    assert sorted(path.name for path in built.iterdir()) == [
        *names,
        "template.json",
        "template.nii.gz",
    ]
    for name in names[:3]:
        assert sorted(path.name for path in (built / name).iterdir()) == OF_IMAGE


def test_the_template_lies_in_the_middle_and_all_images_come_to_it(built: Path) -> None:
    template = read_volume(built / "template.nii.gz")
    expected = template.with_array(scene(physical_grid(template)))
    assert similarity(template, expected) > 0.995
    for number, name in enumerate("abc", 1):
        moved = read_volume(built / f"{number:03d}_{name}" / "moved.nii.gz")
        assert float(ncc(moved.batched(), template.batched())[0, 0]) > 0.995
    labels = np.asarray(read_volume(built / "labels.nii.gz").array)
    assert labels.dtype == np.uint8
    truth = np.asarray(expected.array) > 0.4
    assert 2 * ((labels == 7) & truth).sum() > 0.9 * ((labels == 7).sum() + truth.sum())


def test_apply_gets_the_moved_image_from_the_files(
    folder: Path, built: Path, tmp_path: Path
) -> None:
    record = json.loads((built / "template.json").read_text())
    told = record["images"][1]
    assert told["image"] == str(folder / "b.nii.gz") and told["folder"] == "002_b"
    parts = [word for name in told["template to image"] for word in ("-t", built / "002_b" / name)]
    out = tmp_path / "moved.nii.gz"
    options = ["-r", built / "template.nii.gz", "-o", out]
    assert run("apply", folder / "b.nii.gz", *options, *parts) == 0
    moved = read_volume(built / "002_b" / "moved.nii.gz")
    np.testing.assert_allclose(read_volume(out).array, moved.array, atol=1e-5)


def test_the_record_tells_rounds_settings_and_versions(built: Path) -> None:
    record = json.loads((built / "template.json").read_text())
    assert [turn["stages"] for turn in record["rounds"]] == [
        ["translation"],
        ["translation", "greedy"],
    ]
    assert record["settings"]["start"] == "centres"
    assert [stage["name"] for stage in record["stages"]] == ["translation", "greedy"]
    assert "regkernels" in record["versions"]
    assert 50 < record["peak memory (MB)"]["host"] < 1e6
    assert 0 < record["seconds"]["compilation"] < record["seconds"]["total"]
    assert all(isinstance(image["doubts"], list) for image in record["images"])


def test_an_interrupted_command_goes_on_and_ends_with_the_same_bytes(
    folder: Path,
    built: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    place = template_command._place
    told: list[TemplateProgress] = []

    def interrupt(progress: TemplateProgress) -> Any:
        told.append(progress)
        if len(told) == 4:
            raise KeyboardInterrupt
        return place(progress)

    monkeypatch.setattr(template_command, "_place", interrupt)
    out = tmp_path / "out"
    arguments = ["template", *files(folder), "-o", out, *OPTIONS]
    arguments += ["--labels", *files(folder, "_labels")]
    assert run(*arguments) == 130
    assert f"{out / 'unfinished'} keeps what is done" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["unfinished"]

    assert run(*arguments, "--start", "headers") == 2
    message = capsys.readouterr().err
    assert message.startswith("jaxreg: error: --output: ")
    assert "unfinished has that of one with another: start;" in message

    monkeypatch.setattr(template_command, "_place", place)
    assert run(*arguments) == 0
    assert not (out / "unfinished").exists()
    for path in sorted(built.rglob("*.*")):
        if path.suffix != ".json" and path.is_file():
            assert (out / path.relative_to(built)).read_bytes() == path.read_bytes(), path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.nii.gz"], "IMAGES: expected two or more, got 1"),
        (["a.nii.gz", "missing.nii.gz"], "IMAGES: missing.nii.gz: no such file"),
        (["a.nii.gz", "d.nrrd"], "IMAGES: d.nrrd: expected a 2-D image, got 3-D"),
        (["a.nii.gz", "b.nii.gz", "-r", "d.nrrd"], "--reference: d.nrrd: expected a 2-D image"),
        (
            ["a.nii.gz", "b.nii.gz", "--labels", "a_labels.nii.gz"],
            "--labels: expected 2 label maps, one for each image, got 1",
        ),
        (["a.nii.gz", "b.nii.gz", "--labels"], "--labels: expected label maps after it"),
        (
            ["a.nii.gz", "b.nii.gz", "--labels", "a_labels.nii.gz", "e.mha"],
            "--labels: e.mha: expected integers, got fractions",
        ),
        (["a.nii.gz", "b.nii.gz", "--spacing", "wide"], "--spacing: expected millimetres"),
        (["a.nii.gz", "b.nii.gz", "--spacing", "0"], "--spacing: expected positive numbers"),
        (["a.nii.gz", "b.nii.gz", "--clip", "2"], "--clip: expected outliers"),
        (["a.nii.gz", "b.nii.gz", "--stages", "bend"], "--stages: stage: expected one of"),
    ],
)
def test_bad_input_is_one_line_that_names_the_argument(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(folder)
    assert run("template", *arguments, "-o", "bad") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"jaxreg: error: {message}") and error.count("\n") == 1


def test_an_image_is_never_overwritten(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    earlier = tmp_path / "template.nii.gz"
    earlier.write_bytes((folder / "a.nii.gz").read_bytes())
    assert run("template", earlier, folder / "b.nii.gz", "-o", tmp_path) == 2
    assert f"IMAGES: {earlier} would be overwritten" in capsys.readouterr().err
