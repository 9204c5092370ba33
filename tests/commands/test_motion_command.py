"""``jaxreg motion``: a series in time, from file to file."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from command import run
from scenes import header, physical_grid, scene

from jaxreg.registration import programs
from regkernels import (
    AffineMap,
    Series,
    read_series,
    read_transform,
    read_volume,
    rigid_motion,
    write_series,
    write_volume,
)

Captured = pytest.CaptureFixture[str]

HEAD = header((28, 30, 29), (2.5, 2.5, 2.5), turn=5)
AXIS = np.array((2.0, 1.0, -2.0)) / 3
MOTIONS = [
    rigid_motion(0.8 * n, AXIS, (0.9 * n, -0.4 * n, 0.7 * n), HEAD.grid.centre()) for n in range(4)
]


def write_frames(path: Path, motions: list[np.ndarray]) -> Path:
    points = physical_grid(HEAD)
    frames = []
    for motion in motions:
        back = np.linalg.inv(motion)
        frames.append(1000 * scene(points @ back[:3, :3].T + back[:3, 3]))
    write_series(Series(np.asarray(frames).astype(np.int16), HEAD.grid, 1.5), path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("series")
    write_frames(folder / "bold.nii.gz", MOTIONS)
    write_frames(folder / "still.nii.gz", [np.eye(4)] * 3)
    mask = HEAD.with_array(np.ones(HEAD.shape, np.uint8))
    write_volume(mask, folder / "mask.nii.gz")
    return folder


def table(out: Path) -> dict[str, np.ndarray]:
    with (out / "motion.tsv").open(newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    return {name: np.array([float(row[name]) for row in rows]) for name in rows[0]}


def test_known_motions_are_told_and_undone(folder: Path, tmp_path: Path, capsys: Captured) -> None:
    out = tmp_path / "out"
    command = ("motion", folder / "bold.nii.gz", "-o", out, "--reference", "0")
    options = ("--transforms", "--mask", folder / "mask.nii.gz", "--device", "cpu")
    assert run(*command, *options) == 0
    told = capsys.readouterr().out
    assert "aligned 4 of 4 frames" in told and str(out / "motion.tsv") in told
    found = table(out)
    steps = np.arange(4)
    for name, step in zip("xyz", (0.9, -0.4, 0.7), strict=True):
        np.testing.assert_allclose(found[f"trans_{name}_mm"], step * steps, atol=0.25)
    for name, part in zip("xyz", AXIS, strict=True):
        angle = np.deg2rad(0.8) * part * steps
        np.testing.assert_allclose(found[f"rot_{name}_rad"], angle, atol=0.006)
    expected = 2.0 + 50 * np.deg2rad(0.8) * np.abs(AXIS).sum()
    np.testing.assert_allclose(
        found["framewise_displacement_mm"], [0, *[expected] * 3], atol=0.3 * expected
    )
    aligned = read_series(out / "aligned.nii.gz")
    assert aligned.frames.shape == (4, *HEAD.shape)
    assert aligned.time_step == pytest.approx(1.5)
    inside = (slice(None), *[slice(4, -4)] * 3)
    before = read_series(folder / "bold.nii.gz").frames[inside].std(axis=0).mean()
    assert aligned.frames[inside].std(axis=0).mean() < 0.25 * before
    mean = read_volume(out / "mean.nii.gz")
    expected = aligned.frames.mean(axis=0)[inside[1:]]
    np.testing.assert_allclose(np.asarray(mean.array)[inside[1:]], expected, rtol=1e-4, atol=1e-2)
    corner = HEAD.grid.centre() + np.array((30, -30, 30))
    for number, motion in enumerate(MOTIONS):
        (part,) = read_transform(out / "transforms" / f"{number:04d}.tfm")
        assert isinstance(part, AffineMap)
        there = (np.asarray(part.matrix) @ [*corner, 1])[:3]
        assert np.linalg.norm(there - (motion @ [*corner, 1])[:3]) < 0.25
    record = json.loads((out / "motion.json").read_text())
    assert record["reference"] == 0
    assert record["time step (s)"] == pytest.approx(1.5)
    assert record["framewise displacement (mm)"]["maximum"] == pytest.approx(
        found["framewise_displacement_mm"].max(), abs=1e-5
    )


def test_a_second_run_finds_its_programs_without_tracing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["motion", folder / "bold.nii.gz", "--cache", tmp_path / "cache", "-o"]
    assert run(*command, tmp_path / "first") == 0
    (kept,) = (tmp_path / "cache").glob("*-registration")
    written = kept.read_bytes()
    jax.clear_caches()
    monkeypatch.setattr(programs._Call, "lowered", lambda _: pytest.fail("traced again"))
    assert run(*command, tmp_path / "second") == 0
    assert kept.read_bytes() == written
    names = ("aligned.nii.gz", "mean.nii.gz", "motion.tsv")
    first, second = (
        [(tmp_path / out / n).read_bytes() for n in names] for out in ("first", "second")
    )
    assert first == second


def test_a_still_series_is_told_to_be_still(folder: Path, tmp_path: Path, capsys: Captured) -> None:
    out = tmp_path / "out"
    assert run("motion", folder / "still.nii.gz", "-o", out, "--device", "cpu", "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert record["reference"] == "mean"
    assert record["framewise displacement (mm)"]["maximum"] < 1e-3
    for name, values in table(out).items():
        np.testing.assert_allclose(values, 0, atol=1e-3, err_msg=name)


def test_stages_and_the_radius_are_those_asked_for(folder: Path, tmp_path: Path) -> None:
    shifted = [rigid_motion(0, AXIS, (2.0 * n, 0, 0), (0, 0, 0)) for n in range(3)]
    series = write_frames(tmp_path / "shifted.nii", shifted)
    stage = "translation scales=2 iterations=40 metric=MSE"
    command = ("motion", series, "--reference", "1", "--stage", stage, "--radius", "80")
    assert run(*command, "--block", "2", "-o", tmp_path / "out", "--quiet") == 0
    found = table(tmp_path / "out")
    np.testing.assert_allclose(found["trans_x_mm"], (-2, 0, 2), atol=0.25)
    np.testing.assert_array_equal(found["rot_x_rad"], 0)
    record = json.loads((tmp_path / "out" / "motion.json").read_text())
    assert record["stages"][0]["settings"]["metric"] == "MSE"
    assert record["radius (mm)"] == 80


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("mask.nii.gz", "SERIES: mask.nii.gz: expected a series of 3-D images, two frames"),
        ("missing.nii.gz", "SERIES: missing.nii.gz: no such file"),
        ("bold.nii.gz --reference 4", "--reference: expected mean, or a frame from 0 to 3, got 4"),
        ("bold.nii.gz --reference -1", "--reference: expected mean, or the number of a frame"),
        ("bold.nii.gz --reference first", "--reference: expected mean, or the number of a frame"),
        ("bold.nii.gz --stage greedy", "--stage: expected stages that are linear, got greedy"),
        ("bold.nii.gz --stage rigid --metric mi", "--stage: expected no --metric beside it"),
        ("bold.nii.gz --metric magic", "--metric: expected one of"),
        ("bold.nii.gz --mask bold.nii.gz", "--mask: bold.nii.gz: expected a 2-D or 3-D image"),
        ("bold.nii.gz --radius 0", "--radius: expected a positive number, got 0"),
        ("bold.nii.gz --clip 3", "--clip: expected outliers, none, or two quantiles"),
    ],
)
def test_a_bad_argument_is_named(
    arguments: str,
    message: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Captured,
) -> None:
    monkeypatch.chdir(folder)
    assert run("motion", *arguments.split(), "-o", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert message in error
    assert not list(tmp_path.iterdir())
