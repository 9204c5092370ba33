"""Images and transforms of other programs: SimpleITK, nibabel, FreeSurfer, FSL and AFNI."""

from __future__ import annotations

import importlib.resources
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel
import nitransforms.linear
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from numpy.typing import NDArray

from regkernels import (
    AffineMap,
    DisplacementField,
    Grid,
    Volume,
    from_nibabel,
    from_simpleitk,
    move_points,
    read_transform,
    read_volume,
    to_nibabel,
    to_simpleitk,
    write_composite,
    write_volume,
)
from regkernels.files.formats.reading import FileWarning

DATA = Path(str(importlib.resources.files("nitransforms"))) / "tests" / "data"
TURN = np.array([[0.8, -0.6, 0], [0.6, 0.8, 0], [0, 0, -1.0]])


def volume(channels: int = 0, dtype: Any = np.float32) -> Volume:
    shape = (*[channels] * bool(channels), 4, 5, 6)
    values = np.random.default_rng(0).integers(-9, 9, shape).astype(dtype)
    return Volume.create(values, (1.0, 1.5, 2.0), (-30.0, 20.0, 7.0), TURN)


def assert_equal(one: Volume, other: Volume) -> None:
    assert one.array.dtype == other.array.dtype
    np.testing.assert_array_equal(one.array, other.array)
    assert one.grid.voxels_apart(other.grid) < 1e-5


# --- In memory ------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [0, 3])
@pytest.mark.parametrize("dtype", [np.float32, np.int16, np.uint8])
def test_volumes_go_through_simpleitk_and_nibabel(channels: int, dtype: Any) -> None:
    given = volume(channels, dtype)
    assert_equal(from_simpleitk(to_simpleitk(given)), given)
    assert_equal(from_nibabel(to_nibabel(given)), given)


def test_images_in_2d_go_through_simpleitk_and_nibabel() -> None:
    given = Volume.create(np.arange(20, dtype=np.float32).reshape(4, 5), (0.5, 2.0), (3.0, -4.0))
    assert_equal(from_simpleitk(to_simpleitk(given)), given)
    assert_equal(from_nibabel(to_nibabel(given)), given)


def test_places_are_those_of_the_other_library() -> None:
    given = volume()
    image = to_simpleitk(given)
    point = given.grid.voxel_to_physical() @ [5, 2, 1, 1]
    np.testing.assert_allclose(image.TransformIndexToPhysicalPoint((5, 2, 1)), point[:3])
    assert image[5, 2, 1] == given.array[1, 2, 5]
    nifti = to_nibabel(given)
    np.testing.assert_allclose((nifti.affine @ [5, 2, 1, 1])[:3], point[:3] * [-1, -1, 1])
    assert nifti.get_fdata()[5, 2, 1] == given.array[1, 2, 5]


def test_a_file_is_the_same_through_nibabel(tmp_path: Path) -> None:
    given = volume(dtype=np.int16)
    write_volume(given, tmp_path / "v.nii.gz")
    assert_equal(from_nibabel(nibabel.load(tmp_path / "v.nii.gz")), given)
    nibabel.save(to_nibabel(given), tmp_path / "w.nii.gz")
    assert_equal(read_volume(tmp_path / "w.nii.gz"), given)


def test_vectors_of_nifti_become_channels() -> None:
    values = np.random.default_rng(1).random((6, 5, 4, 1, 3), dtype=np.float32)
    found = from_nibabel(nibabel.Nifti1Image(values, np.eye(4)))
    np.testing.assert_array_equal(found.array, values[:, :, :, 0].T)


def test_images_that_have_no_place_here_are_refused() -> None:
    with pytest.raises(ValueError, match="image: expected 2 to 4 axes"):
        from_nibabel(nibabel.Nifti1Image(np.zeros((2, 2, 2, 2, 2), np.float32), np.eye(4)))
    tilted = np.eye(4)[[0, 2, 1, 3]]
    with pytest.raises(ValueError, match="image: expected a 2-D image in the plane"):
        from_nibabel(nibabel.Nifti1Image(np.zeros((2, 2), np.float32), tilted))
    with pytest.raises(ValueError, match="image: expected finite axes"):
        from_nibabel(nibabel.spatialimages.SpatialImage(np.zeros((2, 2, 2)), np.zeros((4, 4))))
    several = Volume.create(np.zeros((3, 4, 5), np.float32), (1.0, 1.0))
    with pytest.raises(ValueError, match="volume: expected 1 channel in 2-D, got 3"):
        to_nibabel(several)


# --- Affines --------------------------------------------------------------------------------------

REGRESSIONS = ("fsnative_to-bold", "scanner_to-bold", "fsnative_to-scanner", "scanner_to-fsnative")


def matrix(path: Path, **images: Any) -> NDArray[np.float64]:
    (part,) = read_transform(path, **images)
    return np.asarray(part.matrix)


def geometries(path: Path) -> tuple[Grid, Grid]:
    """Of the destination and the source, as FreeSurfer writes them into an affine."""
    grids = []
    for part in re.split("^(?:src|dst) volume info$", path.read_text(), flags=re.MULTILINE)[1:]:
        lines = [line.split("=") for line in part.splitlines() if "=" in line]
        said = {key.strip(): text.split("#")[0].split() for key, text in lines}
        size = np.array(said["volume"], int)
        spacing = np.array(said["voxelsize"], float)
        axes = np.array([said[f"{axis}ras"] for axis in "xyz"], float).T
        # The centre is that of the voxel at half the size.
        origin = np.array(said["cras"], float) - axes @ (spacing * size / 2)
        to_lps = np.diag([-1.0, -1.0, 1.0])
        grids.append(Grid(tuple(size[::-1].tolist()), spacing, to_lps @ origin, to_lps @ axes))
    source, destination = grids
    return destination, source


@pytest.mark.parametrize("name", REGRESSIONS)
def test_affines_of_freesurfer_and_fsl_are_those_that_itk_has(name: str) -> None:
    folder, file = DATA / "regressions", f"from-{name}_mode-image"
    expected = matrix(folder / f"{file}.tfm")
    np.testing.assert_allclose(matrix(folder / f"{file}.lta"), expected, atol=2e-5)
    fixed, moving = geometries(folder / f"{file}.lta")
    found = matrix(folder / f"{file}.fsl", fixed=fixed, moving=moving)
    np.testing.assert_allclose(found, expected, atol=2e-3)  # FSL writes few digits


def test_an_affine_of_fsl_may_have_the_ending_of_flirt(tmp_path: Path) -> None:
    given = DATA / "regressions" / "from-scanner_to-bold_mode-image"
    (tmp_path / "flirt.mat").write_bytes(given.with_suffix(".fsl").read_bytes())
    fixed, moving = geometries(given.with_suffix(".lta"))
    images = {"fixed": fixed, "moving": Volume.on_grid(moving, np.zeros(moving.shape, np.uint8))}
    found = matrix(tmp_path / "flirt.mat", **images)
    np.testing.assert_allclose(found, matrix(given.with_suffix(".tfm")), atol=2e-3)
    with pytest.raises(ValueError, match=r"flirt\.mat: expected the images that this affine"):
        read_transform(tmp_path / "flirt.mat")
    flat = Volume.create(np.zeros((3, 4), np.float32))
    with pytest.raises(ValueError, match="fixed: expected 3 dimensions for an affine of FSL"):
        read_transform(tmp_path / "flirt.mat", fixed=flat, moving=flat)


@pytest.mark.parametrize("name", ["affine-RAS.fs.v2v.lta", "bold-to-t1w.v2v.lta"])
def test_an_affine_between_voxels_is_that_between_places(name: str) -> None:
    other = name.replace(".v2v", "")
    np.testing.assert_allclose(matrix(DATA / name), matrix(DATA / other), atol=1e-4)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("no.lta", "nothing"),
        ("cut.lta", None),
        ("no.fsl", "1 0 0 0"),
        ("flat.fsl", "1 0 0 0\n0 1 0 0\n0 0 0 0\n0 0 0 1\n"),
    ],
)
def test_what_is_no_affine_is_refused(tmp_path: Path, name: str, text: str | None) -> None:
    text = (DATA / "affine-RAS.fs.lta").read_text()[:300] if text is None else text
    (tmp_path / name).write_text(text)
    grid = volume().grid
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        read_transform(tmp_path / name, fixed=grid, moving=grid)


# Of AFNI, whose coordinates are LPS unless an image is turned from the axes of the scanner.

UPRIGHT = Grid((6, 5, 4), (2.0, 2.0, 3.0), (5.0, -3.0, 8.0), np.diag([-1.0, 1, 1])[[0, 2, 1]])
AFNI = {"fixed": UPRIGHT, "moving": UPRIGHT}


@pytest.mark.parametrize("name", ["affine-LAS", "affine-LPS", "affine-RAS"])
def test_affines_of_afni_are_those_that_itk_has(name: str) -> None:
    found = matrix(DATA / f"{name}.afni", **AFNI)
    np.testing.assert_allclose(found, matrix(DATA / f"{name}.itk.tfm"), atol=1e-6)


def test_an_affine_that_nitransforms_writes_for_afni_is_what_it_writes_for_itk(
    tmp_path: Path,
) -> None:
    given = np.eye(4)
    given[:3] += 0.2 * np.random.default_rng(0).normal(size=(3, 4)) * [1, 1, 1, 30]
    image = nibabel.Nifti1Image(np.zeros((5, 6, 7), np.uint8), np.diag([-2, 2, 3, 1]))
    affine = nitransforms.linear.Affine(given, reference=image)
    affine.to_filename(str(tmp_path / "a.aff12.1D"), fmt="afni", moving=image)
    affine.to_filename(str(tmp_path / "a.tfm"), fmt="itk")
    found = matrix(tmp_path / "a.aff12.1D", **AFNI)
    np.testing.assert_allclose(found, matrix(tmp_path / "a.tfm"), atol=1e-4)
    rows = [" ".join(map(str, row)) for row in found[:3]]
    (tmp_path / "cat_matvec.1D").write_text("\n".join(rows))
    np.testing.assert_array_equal(matrix(tmp_path / "cat_matvec.1D", **AFNI), found)


def test_between_oblique_images_an_affine_of_afni_is_refused() -> None:
    path = DATA / "affine-oblique.afni"
    oblique = volume().grid
    for name in ("fixed", "moving"):
        with pytest.raises(ValueError, match=f"affine-oblique.*the {name} image is oblique"):
            read_transform(path, **{**AFNI, name: oblique})
    flat = Volume.create(np.zeros((3, 4), np.float32))
    with pytest.raises(ValueError, match="moving: expected 3 dimensions for an affine of AFNI"):
        read_transform(path, fixed=UPRIGHT, moving=flat)
    with pytest.warns(FileWarning, match="for oblique ones AFNI has other places"):
        read_transform(path)


ROW = " ".join(map(str, np.eye(4)[:3].ravel()))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.1D", ROW, "got rows of .12."),  # of a regressor, say
        ("a.aff12.1D", "1 0 0 0", "got rows of .4."),
        ("a.1D", "", "got rows of .."),
        ("a.aff12.1D", "one", "expected a matrix of AFNI as text"),
        ("a.aff12.1D", ROW.replace("1.0", "0.0"), "expected a transform with an inverse"),
        ("a.param.1D", ROW, "got parameters"),
        ("a.aff12.1D", f"# 3dAllineate parameters:\n#  x-shift  y-shift\n{ROW}", "got parameters"),
        ("a.aff12.1D", f"{ROW}\n{ROW}", "expected one affine, got 2"),
        ("a.1D", f"# 3dvolreg matrices (DICOM-to-DICOM, row-by-row):\n{ROW}\n{ROW}", "got 2"),
    ],
)
def test_what_is_no_affine_of_afni_is_refused(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        read_transform(tmp_path / name, **AFNI)
    assert str(error.value).startswith(str(tmp_path / name))


def test_several_affines_of_afni_are_refused() -> None:
    for path in sorted(DATA.glob("*.afni-array")):
        with pytest.raises(ValueError, match="expected one affine, got 2"):
            read_transform(path, **AFNI)


# --- Warps ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (2006, "got a warp field of FSL.*wb_command -convert-warpfield -from-fnirt"),
        *((code, "got spline coefficients of FSL.*convertwarp") for code in (2007, 2008, 2009)),
        *((code, "got a field of FSL's topup") for code in (2016, 2017, 2018)),
        (0, r"expected displacements along the fifth axis.*got three images one after the other"),
    ],
)
@pytest.mark.parametrize("shape", [(4, 5, 6, 3), (4, 5, 6, 1, 3)])
def test_warps_of_fsl_and_afni_are_refused_with_a_word_what_converts_them(
    tmp_path: Path, code: int, message: str, shape: tuple[int, ...]
) -> None:
    if code == 0 and len(shape) == 5:
        message = "expected a 2-D or 3-D image, got 5-D"
    image = nibabel.Nifti1Image(np.ones(shape, np.float32), np.diag([2, 2, 2, 1]))
    image.header["intent_code"] = code
    nibabel.save(image, tmp_path / "warp.nii.gz")
    with pytest.raises(ValueError, match=f"warp.nii.gz: .*{message}"):
        read_transform(tmp_path / "warp.nii.gz")


def test_a_warp_of_fsl_in_the_tests_of_nitransforms_is_refused() -> None:
    with pytest.raises(ValueError, match="got a warp field of FSL"):
        read_transform(DATA / "ds-005_sub-01_from-OASIS_to-T1_warp_fsl.nii.gz")


# --- ITK ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [*sorted(path.name for path in DATA.glob("*.tfm")), "affine-antsComposite.h5"]
)
def test_files_of_itk_in_the_tests_of_nitransforms_are_read_or_refused_with_a_word(
    name: str,
) -> None:
    several = name in ("hmc-itk.tfm", "itktflist.tfm", "itktflist2.tfm")
    if several:
        with pytest.raises(ValueError, match="expected one transform or a composite, got several"):
            read_transform(DATA / name)
        return
    point = [12.0, -7, 30]
    expected = sitk.ReadTransform(str(DATA / name)).TransformPoint(point)
    np.testing.assert_allclose(move_points(point, read_transform(DATA / name)), expected)


# --- Composites -----------------------------------------------------------------------------------

PARTS = (
    AffineMap(np.array([[1.1, 0.1, 0, 3], [-0.1, 0.9, 0, -2], [0, 0.2, 1, 1], [0, 0, 0, 1]])),
    DisplacementField(
        volume().grid, np.random.default_rng(3).normal(size=(4, 5, 6, 3)).astype(np.float32)
    ),
    AffineMap(np.array([[0.9, 0, 0.2, 1], [0, 1, 0.1, 2], [0, 0, 1, -4], [0, 0, 0, 1.0]])),
)


@pytest.mark.parametrize(
    ("name", "parts"), [("c.h5", PARTS), ("c.hdf5", PARTS[1:]), ("c.tfm", PARTS[::2])]
)
def test_a_chain_is_one_transform_for_itk(tmp_path: Path, name: str, parts: Any) -> None:
    write_composite(parts, tmp_path / name)
    grid = volume().grid
    voxel = np.array([[2.0, 2.0, 1.0, 1.0], [3.0, 1.0, 2.0, 1.0]])
    # Points that the first affine, if there is one, takes to voxels of the field.
    there = voxel @ grid.voxel_to_physical().T
    points = (
        there[:, :3] if parts[0] is PARTS[1] else (there @ np.linalg.inv(PARTS[0].matrix).T)[:, :3]
    )
    expected = move_points(points, parts)
    of_itk = sitk.ReadTransform(str(tmp_path / name))
    found = [of_itk.TransformPoint(point.tolist()) for point in points]
    np.testing.assert_allclose(found, expected, atol=1e-4)
    again = read_transform(tmp_path / name)
    assert [type(part) for part in again] == [type(part) for part in parts]
    np.testing.assert_allclose(move_points(points, again), expected, atol=1e-4)


def test_threads_write_transforms_at_once(tmp_path: Path) -> None:
    # HDF5 ended the process, or refused a file now and then.
    code = """
from concurrent.futures import ThreadPoolExecutor
import numpy as np
from regkernels import read_transform, write_composite
files = {f"{scale}.h5": np.diag([1.0, 1.0, scale, 1.0]) for scale in range(1, 65)}
with ThreadPoolExecutor(8) as pool:
    list(pool.map(lambda name: write_composite([files[name]], name), files))
print(all(np.array_equal(read_transform(name)[0].matrix, files[name]) for name in files))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


def test_a_composite_that_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"c\.tfm: expected an ending of \.h5, \.hdf5"):
        write_composite(PARTS, tmp_path / "c.tfm")
    with pytest.raises(ValueError, match="parts: expected some of one dimension, got"):
        write_composite([], tmp_path / "c.h5")
    with pytest.raises(ValueError, match=r"parts: expected some of one dimension, got \[2, 3\]"):
        write_composite([np.eye(3), np.eye(4)], tmp_path / "c.h5")
    assert not list(tmp_path.iterdir())
