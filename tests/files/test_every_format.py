"""Where one voxel is in every format that is read or written, by nibabel or by its header.

A format that is added has to be added here: the judges, which read headers by the definitions of
the formats and not by the library, tell where its voxels are.
"""

from __future__ import annotations

import gzip
import re
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import nibabel
import numpy as np
import pytest
import scipy.io
import SimpleITK as sitk  # noqa: N813
from dicom_files import ENHANCED_CT, frames_at, write_dicom
from numpy.typing import NDArray

from regkernels import (
    Grid,
    Volume,
    move_points,
    read_grid,
    read_transform,
    read_volume,
    write_affine,
    write_displacement,
    write_volume,
)
from regkernels.files.formats import IMAGE_FORMATS, TRANSFORM_FORMATS
from regkernels.files.images import WRITTEN_SUFFIXES
from regkernels.files.transforms import TRANSFORM_SUFFIXES

RAS_LPS = np.diag([-1.0, -1, 1, 1])
SHAPE = (4, 6, 7)
MARKED = (5, 1, 2)  # x, y, z: left and right, front and back, above and below differ


def _turn(axis: int, degrees: float) -> NDArray[Any]:
    c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    turn = np.eye(3)
    turn[np.ix_([axis - 1, axis - 2], [axis - 1, axis - 2])] = [[c, -s], [s, c]]
    return turn


def _oblique() -> Volume:
    """Return an oblique, left-handed and anisotropic volume in which one voxel is marked."""
    direction = _turn(0, 20) @ _turn(1, -35) @ _turn(2, 50) @ np.diag([1, 1, -1])
    return _marked(direction)


def _straight() -> Volume:
    return _marked(np.eye(3))


def _marked(direction: NDArray[Any]) -> Volume:
    values = np.random.default_rng(0).integers(0, 50, SHAPE).astype(np.int16)
    values[MARKED[::-1]] = 100
    return Volume.create(values, (1.25, 0.75, 2.5), (31, -17, 9), direction)


def _place(matrix: NDArray[Any]) -> NDArray[Any]:
    there: NDArray[Any] = (matrix @ [*MARKED[: len(matrix) - 1], 1])[:-1]
    return there


# The judges return the matrix from voxels to millimetres, LPS.


def _by_nibabel(path: Path) -> NDArray[Any]:
    return RAS_LPS @ nibabel.load(path).affine


def _lines(path: Path, separator: str) -> dict[str, str]:
    text = path.read_bytes().decode("latin-1")
    pairs = (line.split(separator, 1) for line in text.splitlines()[:30] if separator in line)
    return {name.strip(): value.strip() for name, value in pairs}


def _matrix(columns: Any, origin: Any) -> NDArray[Any]:
    matrix = np.eye(len(origin) + 1)
    matrix[:-1, :-1], matrix[:-1, -1] = np.transpose(columns), origin
    return matrix


def _by_nrrd(path: Path) -> NDArray[Any]:
    fields = _lines(path, ": ")
    assert fields["space"] == "left-posterior-superior"
    vectors = re.findall(r"\(([^)]*)\)", fields["space directions"] + fields["space origin"])
    *columns, origin = ([float(number) for number in vector.split(",")] for vector in vectors)
    return _matrix(columns, origin)


def _by_meta(path: Path) -> NDArray[Any]:
    fields = _lines(path, " = ")
    rows, spacing, origin = (
        np.array(fields[name].split(), float)
        for name in ("TransformMatrix", "ElementSpacing", "Offset")
    )
    return _matrix(rows.reshape(3, 3) * spacing[:, None], origin)


def _by_gipl(path: Path) -> NDArray[Any]:
    header = path.read_bytes()
    header = gzip.decompress(header) if path.suffix == ".gz" else header
    spacing, origin = struct.unpack_from(">3f", header, 10), struct.unpack_from(">3d", header, 204)
    return _matrix(np.diag(spacing), origin)


def _doubles(numbers: Any) -> bytes:
    return np.ravel(numbers).astype("<f8").tobytes()


def _has(whole: bytes, number: float) -> bool:
    with np.errstate(invalid="ignore"):
        return any(
            (abs(np.frombuffer(whole, "<f8", len(whole) // 8 - 1, at) - number) < 1e-9).any()
            for at in range(8)
        )


def _by_hdf5(path: Path) -> NDArray[Any]:
    grid, whole = _oblique().grid, path.read_bytes()
    # The rows of the data set Directions are the axes.
    for numbers in (grid.spacing, grid.origin, grid.direction.T):
        assert _doubles(numbers) in whole
    return _matrix(grid.direction.T * grid.spacing[:, None], grid.origin)


def _by_minc(path: Path) -> NDArray[Any]:
    grid, whole = _oblique().grid, path.read_bytes()
    # A voxel lies at the sum of (start + step * index) * direction_cosines of all axes, in RAS.
    starts = np.linalg.solve(grid.direction, grid.origin)
    for start, axis in zip(starts, grid.direction.T, strict=True):
        assert _doubles(axis) in whole
        assert _has(whole, start)
    assert b"X increases from patient left to right" in whole
    return RAS_LPS @ _matrix(grid.direction.T * grid.spacing[:, None], grid.origin)


def _by_position(path: Path) -> NDArray[Any]:
    """Return the place by ImagePositionPatient and ImageOrientationPatient, in LPS."""
    whole = path.read_bytes()

    def numbers(tag: bytes) -> list[list[float]]:
        found = re.finditer(re.escape(tag) + rb"DS(..)", whole, re.DOTALL)
        texts = (whole[f.end() :][: struct.unpack("<H", f[1])[0]].decode() for f in found)
        return [[float(number) for number in text.split("\\")] for text in texts]

    positions = np.array(numbers(b"\x20\0\x32\0"))
    axes, (rows, columns) = np.array(numbers(b"\x20\0\x37\0")[0]), numbers(b"\x28\0\x30\0")[0]
    step = positions[1] - positions[0]
    return _matrix([columns * axes[:3], rows * axes[3:], step], positions[0])


def _by_png(path: Path) -> NDArray[Any]:
    assert b"sCAL\x01" + b"1.25\0.75" in path.read_bytes()
    return np.diag([1.25, 0.75, 1])


# The writers know nothing of the library.


def _by_itk(volume: Volume, path: Path) -> None:
    image = sitk.GetImageFromArray(volume.array)
    image.SetSpacing(volume.grid.spacing.tolist())
    image.SetOrigin(volume.grid.origin.tolist())
    image.SetDirection(np.ravel(volume.grid.direction).tolist())
    sitk.WriteImage(image, str(path))


def _save_by_nibabel(volume: Volume, path: Path) -> None:
    affine = RAS_LPS @ volume.grid.voxel_to_physical()
    kind = nibabel.Nifti1Image if ".nii" in path.name else nibabel.Nifti1Pair
    nibabel.save(kind(np.asarray(volume.array).T, affine), path)


def _save_dicom(volume: Volume, path: Path) -> None:
    matrix = volume.grid.voxel_to_physical()
    positions = [(matrix @ [0, 0, k, 1])[:3] for k in range(volume.shape[0])]
    axes = np.ravel(volume.grid.direction[:, :2].T)
    fields = frames_at(np.array(positions), axes, (1.25, 0.75))
    write_dicom(path, np.asarray(volume.array), fields, kind=ENHANCED_CT)


def _save_png(volume: Volume, path: Path) -> None:
    plane = sitk.GetImageFromArray(np.asarray(volume.array[MARKED[2]]).astype(np.uint8))
    plane.SetSpacing((1.25, 0.75))
    sitk.WriteImage(plane, str(path))


class Format(NamedTuple):
    """A format as this table knows it; ITK's name, who writes a file, and who judges one."""

    itk: str
    save: Callable[[Volume, Path], None]
    judge: Callable[[Path], NDArray[Any]]
    volume: Callable[[], Volume] = _oblique
    told: str = ""


_NIFTI = Format("NiftiImageIO", _save_by_nibabel, _by_nibabel)
_NRRD = Format("NrrdImageIO", _by_itk, _by_nrrd)
_META = Format("MetaImageIO", _by_itk, _by_meta)
_GIPL = Format("GiplImageIO", _by_itk, _by_gipl, _straight, "GIPL does not say which way")

IMAGES = {
    **dict.fromkeys((".nii", ".nii.gz", ".hdr", ".img", ".hdr.gz", ".img.gz"), _NIFTI),
    **dict.fromkeys((".nrrd", ".nhdr"), _NRRD),
    **dict.fromkeys((".mha", ".mhd"), _META),
    **dict.fromkeys((".gipl", ".gipl.gz"), _GIPL),
    ".mnc": Format("MINCImageIO", _by_itk, _by_minc),
    ".h5": Format("HDF5ImageIO", _by_itk, _by_hdf5),
    ".dcm": Format("GDCMImageIO", _save_dicom, _by_position),
    ".png": Format("PNGImageIO", _save_png, _by_png, _straight, "its pixels have a size"),
}


def test_the_tables_have_every_format() -> None:
    assert {known.itk for known in IMAGES.values()} == set(IMAGE_FORMATS)
    assert set(WRITTEN_SUFFIXES) <= set(IMAGES)
    assert set(AFFINES) == set(TRANSFORM_SUFFIXES) == set(TRANSFORM_FORMATS)
    assert set(FIELDS) == set(WRITTEN_SUFFIXES)


@pytest.mark.parametrize("ending", IMAGES)
def test_a_marked_voxel_lies_where_its_file_says(tmp_path: Path, ending: str) -> None:
    known = IMAGES[ending]
    path = tmp_path / f"v{ending}"
    known.save(known.volume(), path)
    there = _place(known.judge(path))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        volume, grid = read_volume(path), read_grid(path)
    assert {known.told in str(one.message) for one in told} == ({True} if known.told else set())
    (index,) = np.argwhere(volume.array == 100)
    assert index[::-1].tolist() == list(MARKED[: volume.ndim])
    for found in (volume.grid, grid):
        np.testing.assert_allclose(_place(found.voxel_to_physical()), there, atol=1e-4)


@pytest.mark.parametrize("ending", IMAGES)
def test_a_marked_voxel_is_written_where_it_lies_or_not_at_all(tmp_path: Path, ending: str) -> None:
    volume, path = _oblique(), tmp_path / f"v{ending}"
    if ending not in WRITTEN_SUFFIXES:
        with pytest.raises(ValueError, match=rf"v{re.escape(ending)}: cannot write it: expected"):
            write_volume(volume, path)
        assert not list(tmp_path.iterdir())
        return
    write_volume(volume, path)
    there = _place(volume.grid.voxel_to_physical())
    np.testing.assert_allclose(_place(IMAGES[ending].judge(path)), there, atol=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = read_volume(path)
    np.testing.assert_array_equal(again.array, volume.array)
    np.testing.assert_allclose(_place(again.grid.voxel_to_physical()), there, atol=1e-4)


MATRIX = np.array([[0.9, -0.4, 0.1, 11], [0.3, 1.1, -0.2, -7], [0.05, 0.25, 0.8, 5], [0, 0, 0, 1]])
POINT = np.array([3.0, -4, 5])


def _of_parameters(numbers: Any, centre: Any) -> NDArray[Any]:
    """Return the matrix of ITK's ``M (x - c) + c + t``."""
    numbers, centre = np.array(numbers, float), np.array(centre, float)
    linear = numbers[:9].reshape(3, 3)
    return _matrix(linear.T, numbers[9:] + centre - linear @ centre)


def _by_text(path: Path) -> NDArray[Any]:
    fields = _lines(path, ": ")
    return _of_parameters(fields["Parameters"].split(), fields["FixedParameters"].split())


def _by_matlab(path: Path) -> NDArray[Any]:
    found = scipy.io.loadmat(path)
    return _of_parameters(found["AffineTransform_double_3_3"].ravel(), found["fixed"].ravel())


def _by_hdf5_transform(path: Path) -> NDArray[Any]:
    whole = path.read_bytes()
    ours, itks = _parameters(MATRIX), _parameters(MATRIX, CENTRE)
    if _doubles(itks) in whole:
        assert _doubles(CENTRE) in whole
        return _of_parameters(itks, CENTRE)
    assert _doubles(ours) in whole
    return _of_parameters(ours, (0, 0, 0))


def _by_xfm(path: Path) -> NDArray[Any]:
    numbers = re.search(r"Linear_Transform =([^;]*);", path.read_text())
    assert numbers is not None
    matrix = np.eye(4)
    matrix[:3] = np.reshape(numbers[1].split(), (3, 4)).astype(float)
    return RAS_LPS @ matrix @ RAS_LPS


CENTRE = (5.5, -6.25, 7.125)


def _parameters(matrix: NDArray[Any], centre: Any = (0, 0, 0)) -> NDArray[Any]:
    linear = matrix[:3, :3]
    return np.array([*linear.ravel(), *(matrix[:3, 3] + linear @ centre - centre)])


def _save_affine(path: Path) -> None:
    transform = sitk.AffineTransform(3)
    transform.SetFixedParameters(CENTRE)
    transform.SetParameters(_parameters(MATRIX, CENTRE).tolist())
    sitk.WriteTransform(transform, str(path))


def _save_xfm(path: Path) -> None:
    rows = "\n ".join(" ".join(map(repr, row)) for row in (RAS_LPS @ MATRIX @ RAS_LPS)[:3].tolist())
    path.write_text(
        f"MNI Transform File\n\nTransform_Type = Linear;\nLinear_Transform =\n {rows};\n"
    )


AFFINES = {
    ".tfm": (_save_affine, _by_text),
    ".txt": (_save_affine, _by_text),
    ".mat": (_save_affine, _by_matlab),
    ".h5": (_save_affine, _by_hdf5_transform),
    ".hdf5": (_save_affine, _by_hdf5_transform),
    ".xfm": (_save_xfm, _by_xfm),
}


@pytest.mark.parametrize("ending", AFFINES)
def test_a_point_goes_where_the_file_of_an_affine_sends_it(tmp_path: Path, ending: str) -> None:
    save, judge = AFFINES[ending]
    path = tmp_path / f"affine{ending}"
    there = (MATRIX @ [*POINT, 1])[:3]
    save(path)
    np.testing.assert_allclose(judge(path), MATRIX, atol=1e-9)
    np.testing.assert_allclose(move_points(POINT, read_transform(path)), there, atol=1e-6)
    write_affine(MATRIX, path)
    np.testing.assert_allclose(judge(path), MATRIX, atol=1e-9)
    np.testing.assert_allclose(move_points(POINT, read_transform(path)), there, atol=1e-6)


def _stored_nifti(path: Path) -> NDArray[Any]:
    image = nibabel.load(path)
    assert image.header["intent_code"] == 1007
    assert image.shape == (*SHAPE[::-1], 1, 3)
    return np.asarray(image.dataobj)[:, :, :, 0].transpose(2, 1, 0, 3)


def _stored_after(path: Path, end: bytes, name: str, separator: str) -> bytes:
    whole = path.read_bytes()
    data = _lines(path, separator).get(name, "LOCAL")
    if data != "LOCAL":
        return (path.parent / data).read_bytes()
    return whole[whole.index(end) + len(end) :]


def _stored_nrrd(path: Path) -> NDArray[Any]:
    fields = _lines(path, ": ")
    assert fields["kinds"] == "vector domain domain domain"
    raw = gzip.decompress(_stored_after(path, b"\n\n", "data file", ": "))
    return np.frombuffer(raw, "<f4").reshape(*SHAPE, 3)


def _stored_meta(path: Path) -> NDArray[Any]:
    assert _lines(path, " = ")["ElementNumberOfChannels"] == "3"
    raw = zlib.decompress(_stored_after(path, b"= LOCAL\n", "ElementDataFile", " = "))
    return np.frombuffer(raw, "<f4").reshape(*SHAPE, 3)


FIELDS = {
    **dict.fromkeys((".nii", ".nii.gz", ".hdr", ".img", ".hdr.gz", ".img.gz"), _stored_nifti),
    **dict.fromkeys((".nrrd", ".nhdr"), _stored_nrrd),
    **dict.fromkeys((".mha", ".mhd"), _stored_meta),
}


@pytest.mark.parametrize("ending", FIELDS)
def test_displacements_are_stored_in_lps_where_their_voxels_lie(
    tmp_path: Path, ending: str
) -> None:
    grid: Grid = _oblique().grid
    vectors = np.zeros((*SHAPE, 3), np.float32)
    vectors[MARKED[::-1]] = 3, -4, 5
    path = tmp_path / f"warp{ending}"
    write_displacement(vectors, grid, path)
    there = _place(grid.voxel_to_physical())
    np.testing.assert_array_equal(FIELDS[ending](path), vectors)
    np.testing.assert_allclose(_place(IMAGES[ending].judge(path)), there, atol=1e-4)
    moved = move_points(there, read_transform(path))
    np.testing.assert_allclose(moved - there, [3, -4, 5], atol=1e-3)


def test_a_composite_sends_points_through_what_was_added_last_first(tmp_path: Path) -> None:
    double = "Parameters: 2 0 0 0 2 0 0 0 2 0 0 0\nFixedParameters: 1 1 1\n"
    shift = "Parameters: 1 0 0 0 1 0 0 0 1 1 2 3\nFixedParameters: 0 0 0\n"
    name = "Transform: AffineTransform_double_3_3\n"
    path = tmp_path / "both.tfm"
    path.write_text(
        "#Insight Transform File V1.0\n#Transform 0\nTransform: CompositeTransform_double_3_3\n"
        "Parameters:\nFixedParameters:\n"
        f"#Transform 1\n{name}{shift}#Transform 2\n{name}{double}"
    )
    # First 2 (x - 1) + 1, then the shift.
    moved = move_points(POINT, read_transform(path))
    np.testing.assert_allclose(moved, 2 * (POINT - 1) + 1 + [1, 2, 3])
