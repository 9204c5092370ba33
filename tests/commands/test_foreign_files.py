"""Files of scanners and of other programs, given to the commands as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from command import run
from dicom_files import CT, decimals, write_dicom
from numpy.typing import NDArray
from scenes import header, physical_grid, scene

from regkernels import (
    Volume,
    read_transform,
    read_volume,
    rigid_motion,
    write_affine,
    write_volume,
)

TO_RAS = np.diag([-1.0, -1, 1, 1])


def write_slices(folder: Path, volume: Volume) -> None:
    """Write each plane of a volume as a slice of one series, the last one first."""
    grid = volume.grid
    direction, spacing = np.asarray(grid.direction), np.asarray(grid.spacing)
    folder.mkdir()
    for number, plane in enumerate(np.asarray(volume.array)):
        fields = {
            0x00080018: ("UI", f"1.2.3.{number + 1}"),
            0x0020000E: ("UI", "1.2.3"),
            0x00200032: decimals(*(grid.origin + number * spacing[2] * direction[:, 2])),
            0x00200037: decimals(*direction[:, 0], *direction[:, 1]),
            0x00280030: decimals(spacing[1], spacing[0]),
        }
        write_dicom(folder / f"{len(volume.array) - number:03d}.dcm", plane, fields, kind=CT)


def test_a_folder_of_dicom_is_registered_to_as_the_image_that_it_holds(tmp_path: Path) -> None:
    fixed = header((18, 20, 22), (2.6, 2.8, 3.1), turn=12)
    fixed = fixed.with_array((1000 * scene(physical_grid(fixed))).astype(np.int16))
    write_slices(tmp_path / "series", fixed)
    write_volume(fixed, tmp_path / "fixed.nii.gz")
    moving, shift = header((19, 18, 20), (3.0, 3.0, 3.0)), np.array([3.0, -2.0, 1.5])
    values = (1000 * scene(physical_grid(moving) - shift)).astype(np.int16)
    write_volume(moving.with_array(values), tmp_path / "moving.nii.gz")
    found = {}
    for name in ("series", "fixed.nii.gz"):
        out = tmp_path / f"{name} out"
        arguments = ["--stages", "translation", "--device", "cpu", "-o", out]
        assert run("register", tmp_path / name, tmp_path / "moving.nii.gz", *arguments) == 0
        record = json.loads((out / "registration.json").read_text())
        assert record["inputs"]["FIXED"] == str(tmp_path / name)
        (affine,) = read_transform(out / "affine.tfm")
        found[name] = np.asarray(affine.matrix), read_volume(out / "moved.nii.gz")
    matrix, moved = found["series"]
    np.testing.assert_allclose(matrix[:3, 3], shift, atol=0.2)
    np.testing.assert_allclose(matrix, found["fixed.nii.gz"][0], atol=1e-3)
    assert moved.grid.voxels_apart(fixed.grid) < 1e-4
    np.testing.assert_allclose(moved.array, found["fixed.nii.gz"][1].array, atol=0.5)


def freesurfer_affine(matrix: NDArray[np.float64], fixed: Volume, moving: Volume) -> str:
    """A map of the moving image's places to the fixed one's, in RAS, as FreeSurfer writes it."""
    to_fixed = TO_RAS @ np.linalg.inv(matrix) @ TO_RAS
    rows = [" ".join(f"{x:.15e}" for x in row) for row in to_fixed]
    lines = ["type      = 1", "nxforms   = 1", "mean      = 0 0 0", "sigma     = 1", "1 4 4", *rows]
    for name, volume in (("src", moving), ("dst", fixed)):
        to_ras = TO_RAS @ volume.grid.voxel_to_physical()
        spacing = np.asarray(volume.grid.spacing)
        size = np.array(volume.shape[::-1])
        lines += [f"{name} volume info", "valid = 1  # volume info valid", "filename = image.nii"]
        lines += ["volume = " + " ".join(map(str, size))]
        lines += ["voxelsize = " + " ".join(f"{x:.15e}" for x in spacing)]
        for axis, column, step in zip("xyz", to_ras[:3, :3].T, spacing, strict=True):
            lines += [f"{axis}ras   = " + " ".join(f"{x:.15e}" for x in column / step)]
        centre = to_ras @ [*(size / 2), 1]
        lines += ["cras   = " + " ".join(f"{x:.15e}" for x in centre[:3])]
    return "\n".join([*lines, "subject ", "fscale 0.1", ""])


@pytest.mark.parametrize("ending", ["", ":inverse"])
def test_an_affine_of_freesurfer_moves_an_image_as_that_of_itk(tmp_path: Path, ending: str) -> None:
    fixed = header((10, 12, 14), (2.0, 2.0, 3.0), turn=8)
    moving = header((11, 12, 10), (2.5, 2.0, 3.0), turn=-5)
    write_volume(fixed.with_array(np.zeros(fixed.shape, np.float32)), tmp_path / "fixed.nii.gz")
    image = np.random.default_rng(0).random(moving.shape, np.float32)
    write_volume(moving.with_array(image), tmp_path / "moving.nii.gz")
    matrix = rigid_motion(9, (1, 2, -2), (3, -2, 1), (4, 0, -3))
    matrix[:3, :3] *= 1.1
    write_affine(matrix, tmp_path / "affine.tfm")
    (tmp_path / "affine.lta").write_text(freesurfer_affine(matrix, fixed, moving))
    moved = []
    for name in ("affine.lta", "affine.tfm"):
        out = tmp_path / f"{name}.nii.gz"
        options = ["-r", tmp_path / "fixed.nii.gz", "-t", f"{tmp_path / name}{ending}"]
        options += ["--device", "cpu", "-o", out]
        assert run("apply", tmp_path / "moving.nii.gz", *options) == 0
        moved.append(read_volume(out).array)
    assert np.ptp(moved[0]) > 0.5
    np.testing.assert_allclose(*moved, atol=1e-5)


@pytest.fixture
def upright(tmp_path: Path) -> tuple[Path, NDArray[np.float64]]:
    """Two images along the axes, on grids that differ in all else, and an affine between them."""
    rng = np.random.default_rng(0)
    for name, shape, spacing, origin in (
        ("fixed", (10, 12, 14), (2.0, 2.0, 3.0), (-9.0, -8.0, -12.0)),
        ("moving", (11, 9, 10), (2.5, 2.0, 3.0), (-14.0, -3.0, -20.0)),
    ):
        image = rng.random(shape, np.float32)
        write_volume(Volume.create(image, spacing, origin), tmp_path / f"{name}.nii.gz")
    matrix = rigid_motion(9, (1, 2, -2), (3, -2, 1), (4, 0, -3))
    matrix[:3, :3] *= 1.1
    write_affine(matrix, tmp_path / "affine.tfm")
    return tmp_path, matrix


def fsl_affine(matrix: NDArray[np.float64], fixed: Volume, moving: Volume) -> str:
    """A map of the moving image's scaled voxels to the fixed one's, as FLIRT writes it.

    FSL turns x of an image round whose axes are not mirrored, which these in RAS are.
    """

    def scaled(volume: Volume) -> NDArray[np.float64]:
        to_ras = TO_RAS @ volume.grid.voxel_to_physical()
        scale = np.diag([*np.asarray(volume.grid.spacing), 1.0])
        if np.linalg.det(to_ras) > 0:
            flip = np.diag([-1.0, 1, 1, 1])
            flip[0, 3] = volume.shape[-1] - 1
            scale = scale @ flip
        return scale @ np.linalg.inv(volume.grid.voxel_to_physical())

    rows = scaled(fixed) @ np.linalg.inv(matrix) @ np.linalg.inv(scaled(moving))
    return "\n".join(" ".join(f"{x:.12f}" for x in row) for row in rows)


def afni_affine(matrix: NDArray[np.float64], fixed: Volume, moving: Volume) -> str:
    numbers = " ".join(f"{x:.12f}" for x in matrix[:3].ravel())
    return f"# 3dAllineate matrices (DICOM-to-DICOM, row-by-row):\n{numbers}\n"


@pytest.mark.parametrize(
    ("name", "write"), [("flirt.mat", fsl_affine), ("affine.aff12.1D", afni_affine)]
)
@pytest.mark.parametrize("ending", ["", ":inverse"])
def test_affines_of_fsl_and_afni_move_images_both_ways_as_that_of_itk(
    upright: tuple[Path, NDArray[np.float64]], name: str, write: Any, ending: str
) -> None:
    folder, matrix = upright
    fixed, moving = (read_volume(folder / f"{name}.nii.gz") for name in ("fixed", "moving"))
    (folder / name).write_text(write(matrix, fixed, moving))
    image, reference = ("fixed", "moving") if ending else ("moving", "fixed")
    moved = []
    for file in (name, "affine.tfm"):
        out = folder / f"{file}.nii.gz"
        options = ["-r", folder / f"{reference}.nii.gz", "-t", f"{folder / file}{ending}"]
        options += ["--device", "cpu", "-o", out]
        assert run("apply", folder / f"{image}.nii.gz", *options) == 0
        moved.append(np.asarray(read_volume(out).array))
    assert np.ptp(moved[0]) > 0.5
    np.testing.assert_allclose(*moved, atol=1e-4)


def test_a_registration_starts_from_an_affine_of_afni(
    upright: tuple[Path, NDArray[np.float64]],
) -> None:
    folder, matrix = upright
    images = folder / "fixed.nii.gz", folder / "moving.nii.gz"
    (folder / "a.aff12.1D").write_text(afni_affine(matrix, *map(read_volume, images)))
    for name in ("a.aff12.1D", "affine.tfm"):
        options = ["--initial", folder / name, "-o", folder / f"{name} out", "--device", "cpu"]
        options += ["--stage", "translation scales=1 iterations=1"]
        assert run("register", *images, *options) == 0
    of_afni, of_itk = (
        np.asarray(read_transform(folder / f"{name} out" / "affine.tfm")[0].matrix)
        for name in ("a.aff12.1D", "affine.tfm")
    )
    np.testing.assert_allclose(of_afni, of_itk, atol=1e-5)


@pytest.mark.parametrize(
    "command",
    [
        "apply moving.nii.gz -r fixed.nii.gz -t warp.nii.gz -o out.nii.gz",
        "apply-points points.csv -t warp.nii.gz -o out.csv",
        "invert warp.nii.gz -o out.nii.gz",
        "register fixed.nii.gz moving.nii.gz --initial warp.nii.gz -o out",
    ],
)
def test_a_warp_of_fsl_is_refused_in_one_line_that_says_what_converts_it(
    upright: tuple[Path, NDArray[np.float64]],
    command: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, _ = upright
    monkeypatch.chdir(folder)
    warp = nibabel.Nifti1Image(np.zeros((14, 12, 10, 3), np.float32), np.diag([2, 2, 3, 1]))
    warp.header["intent_code"] = 2006
    nibabel.save(warp, "warp.nii.gz")
    Path("points.csv").write_text("x,y,z\n1,2,3\n")
    assert run(*command.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    option = next((x for x in ("--initial", "--transform") if x in line), "TRANSFORM")
    assert line.startswith(f"jaxreg: error: {option}: warp.nii.gz: ")
    assert "got a warp field of FSL" in line
    assert "wb_command -convert-warpfield -from-fnirt" in line
