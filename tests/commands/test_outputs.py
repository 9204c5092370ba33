"""``jaxreg register --outputs``: the files that are wanted, and no others."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from command import run
from numpy.typing import NDArray
from scenes import header, write_shifted_pair

from regkernels import (
    Volume,
    move_points,
    read_transform,
    read_volume,
    write_affine,
    write_volume,
)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_shifted_pair(tmp_path_factory.mktemp("images"))


def written(images: list[Path], out: Path, *options: object) -> dict[str, bytes]:
    arguments = ["--stages", "translation,greedy", "--preset", "fast", "--device", "cpu"]
    assert run("register", *images, *arguments, "-o", out, *options) == 0
    return {path.name: path.read_bytes() for path in out.iterdir()}


@pytest.mark.parametrize(
    ("outputs", "names"),
    [
        ("transform", {"affine.tfm", "warp.nii.gz"}),
        ("inverse", {"affine.tfm", "inverse_warp.nii.gz"}),
        ("moved, record", {"moved.nii.gz", "registration.json"}),
        ("fixed_moved,report", {"fixed_moved.nii.gz", "report.html"}),
    ],
)
def test_what_is_named_is_written_as_ever_and_nothing_else(
    images: list[Path], tmp_path: Path, outputs: str, names: set[str]
) -> None:
    everything = written(images, tmp_path / "all", "--report")
    # In a folder with all of them, which belong to another registration.
    found = written(images, tmp_path / "all", "--outputs", outputs)
    assert found.keys() == names
    for name in names - {"registration.json", "report.html"}:
        assert found[name] == everything[name]


def test_the_report_may_be_asked_for_either_way(images: list[Path], tmp_path: Path) -> None:
    found = written(images, tmp_path / "out", "--outputs", "moved", "--report")
    assert found.keys() == {"moved.nii.gz", "report.html"}


def test_composites_hold_the_whole_transform_for_itk(images: list[Path], tmp_path: Path) -> None:
    found = written(images, tmp_path / "out", "--composite")
    assert {"composite.h5", "inverse_composite.h5", "total_warp.nii.gz", "warp.nii.gz"} < set(found)
    there, back, chain = (
        [part for name in names for part in read_transform(tmp_path / "out" / name)]
        for names in (
            ["composite.h5"],
            ["inverse_composite.h5"],
            ["warp.nii.gz", "affine.tfm"],
        )
    )
    point = (read_volume(images[0]).grid.voxel_to_physical() @ [12, 9, 1])[:2].tolist()
    expected = move_points(point, chain)
    np.testing.assert_allclose(move_points(point, there), expected, atol=1e-5)
    np.testing.assert_allclose(move_points(expected, back), point, atol=0.1)
    total = read_transform(tmp_path / "out" / "total_warp.nii.gz")
    np.testing.assert_allclose(move_points(point, total), expected, atol=1e-4)
    of_itk = sitk.ReadTransform(str(tmp_path / "out" / "composite.h5"))
    np.testing.assert_allclose(of_itk.TransformPoint(point), expected, atol=1e-5)


def test_affines_of_fsl_are_between_the_images_of_the_command(tmp_path: Path) -> None:
    """FLIRT has the matrix in millimetres from a corner of each image, x from the left."""
    fixed, moving = header((10, 12, 14), (2.0, 2.0, 3.0)), header((11, 9, 8), (2.5, 3.0, 2.0))
    image = np.random.default_rng(0).random(moving.shape, np.float32)
    write_volume(fixed.with_array(np.zeros(fixed.shape, np.float32)), tmp_path / "fixed.nii.gz")
    write_volume(moving.with_array(image), tmp_path / "moving.nii.gz")

    def scaled(volume: Volume) -> NDArray[np.float64]:
        matrix = np.diag([*volume.grid.spacing, 1.0])
        to_lps = volume.grid.voxel_to_physical()
        if np.linalg.det(np.diag([-1.0, -1, 1, 1]) @ to_lps) > 0:
            flip = np.eye(4)
            flip[0, 0], flip[0, 3] = -1, volume.shape[-1] - 1
            matrix = matrix @ flip
        return matrix @ np.linalg.inv(to_lps)

    affine = np.eye(4)
    affine[:3, 3] = 3.0, -2.0, 1.0
    flirt = scaled(fixed) @ np.linalg.inv(affine) @ np.linalg.inv(scaled(moving))
    (tmp_path / "flirt.mat").write_text("\n".join(" ".join(map(str, row)) for row in flirt))
    write_affine(affine, tmp_path / "affine.tfm")
    moved = []
    for name in ("flirt.mat", "affine.tfm"):
        arguments = ["-r", tmp_path / "fixed.nii.gz", "-t", tmp_path / name]
        out = tmp_path / f"{name}.nii.gz"
        assert run("apply", tmp_path / "moving.nii.gz", *arguments, "-o", out) == 0
        moved.append(read_volume(out).array)
    assert np.ptp(moved[0]) > 0.5
    np.testing.assert_allclose(*moved, atol=1e-5)


def test_the_record_names_the_files_that_are_there_and_where_the_time_went(
    images: list[Path], tmp_path: Path
) -> None:
    found = written(images, tmp_path / "out", "--outputs", "transform,record")
    record = json.loads(found["registration.json"])
    assert record["transform"]["fixed to moving"] == ["warp.nii.gz", "affine.tfm"]
    assert record["transform"]["moving to fixed"] == []
    seconds = record["seconds"]
    assert list(seconds) == ["reading", "stages", "results", "writing", "compilation", "total"]
    total = seconds.pop("total")
    assert min(seconds.values()) >= 0
    assert 0.5 * total < sum(seconds.values()) < 1.01 * total + 0.01


@pytest.mark.parametrize("outputs", ["magic", "moved,magic", "", "moved,"])
def test_an_output_that_there_is_not_is_refused(
    images: list[Path], tmp_path: Path, outputs: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("register", *images, "-o", tmp_path / "out", "--outputs", outputs) == 2
    assert "--outputs: expected some of transform, inverse, moved" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
