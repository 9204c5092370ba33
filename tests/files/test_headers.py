"""What headers say of the place and of the values that ITK overlooks: used, told or refused."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from png_files import write_png

from regkernels import Grid, read_grid, read_transform, read_volume, write_displacement

VALUES = np.arange(60, dtype="<i2").reshape(3, 4, 5)
DIRECTIONS = "space directions: (1.2,0,0) (0,0.8,0) (0,0,2.5)\nspace origin: (1,2,3)\n"


def _nrrd(path: Path, fields: str, values: Any = VALUES) -> Path:
    sizes = " ".join(map(str, values.shape[::-1]))
    kind = {"i2": "short", "f4": "float"}[values.dtype.str[1:]]
    path.write_bytes(
        f"NRRD0004\ntype: {kind}\ndimension: {values.ndim}\nsizes: {sizes}\nendian: little\n"
        f"encoding: raw\n{fields}\n".encode()
        + values.tobytes()
    )
    return path


def _meta(path: Path, fields: str, matrix: str = "1 0 0 0 1 0 0 0 1") -> Path:
    path.write_bytes(
        f"ObjectType = Image\nNDims = 3\nTransformMatrix = {matrix}\nOffset = 1 2 3\n"
        f"ElementSpacing = 1.2 0.8 2.5\n{fields}DimSize = 5 4 3\nElementType = MET_SHORT\n"
        "ElementDataFile = LOCAL\n".encode()
        + VALUES.tobytes()
    )
    return path


def _place(path: Path) -> list[float]:
    """Return where the voxel 4, 3, 2 lies; no warning is given."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        grids = read_grid(path), read_volume(path).grid
    assert grids[0].same_place(grids[1], 1e-9)
    return (grids[0].voxel_to_physical() @ [4, 3, 2, 1])[:3].tolist()


HERE = np.array([1, 2, 3]) + np.array([4, 3, 2]) * [1.2, 0.8, 2.5]


@pytest.mark.parametrize(
    ("space", "signs"),
    [
        ("left-posterior-superior", (1, 1, 1)),
        ("LPS", (1, 1, 1)),
        ("right-anterior-superior", (-1, -1, 1)),
        ("RAS", (-1, -1, 1)),
        ("left-anterior-superior", (1, -1, 1)),
        ("LAS", (1, -1, 1)),
    ],
)
def test_the_spaces_of_nrrd_become_lps(tmp_path: Path, space: str, signs: tuple[int, ...]) -> None:
    path = _nrrd(tmp_path / "v.nrrd", f"space: {space}\n{DIRECTIONS}")
    np.testing.assert_allclose(_place(path), HERE * signs)


@pytest.mark.parametrize(
    "fields",
    [
        f"space: scanner-xyz\n{DIRECTIONS}",
        f"space: 3D-left-handed\n{DIRECTIONS}",
        f"space dimension: 3\n{DIRECTIONS}",
        "space: LPS\nspace origin: (1,2,3)\n",
        "spacings: 1.2 0.8 2.5\n",
    ],
)
def test_an_nrrd_that_does_not_tell_left_from_right_is_told(tmp_path: Path, fields: str) -> None:
    path = _nrrd(tmp_path / "v.nrrd", fields)
    for read in (read_grid, read_volume):
        with pytest.warns(UserWarning, match=r"v\.nrrd: its .*nothing tells left from right; x is"):
            read(path)
    plane = _nrrd(tmp_path / "plane.nrrd", "spacings: 1.2 0.8\n", VALUES[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_volume(plane).grid.spacing.tolist() == [1.2, 0.8]


def test_an_nrrd_without_a_size_of_voxels_is_told(tmp_path: Path) -> None:
    path = _nrrd(tmp_path / "v.nrrd", "")
    with pytest.warns(UserWarning, match=r"names no space and no size of its voxels, .* 1 mm is"):
        assert read_grid(path).spacing.tolist() == [1, 1, 1]


def test_the_command_line_tells_it_in_one_line(tmp_path: Path) -> None:
    _nrrd(tmp_path / "v.nrrd", "spacings: 1.2 0.8 2.5\n")
    done = subprocess.run(
        [sys.executable, "-m", "jaxreg", "apply", "v.nrrd", "-r", "v.nrrd", "-o", "out.nrrd"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("jaxreg: warning: v.nrrd: its header names no space, so nothing tells")


def test_an_axis_of_nrrd_without_a_direction_is_refused(tmp_path: Path) -> None:
    fields = "space: LPS\nspace directions: (1,0,0) (0,1,0) none\nkinds: domain domain domain\n"
    with pytest.raises(ValueError, match=r"v\.nrrd: expected a direction of every axis"):
        read_volume(_nrrd(tmp_path / "v.nrrd", fields))


@pytest.mark.parametrize(
    ("unit", "size"),
    [
        *(("mm", 1), ("millimeters", 1), ("", 1), ("cm", 10), ("m", 1e3), ("metre", 1e3)),
        *((name, 1e-3) for name in ("um", "µm", "micrometer", "microns")),
        ("nm", 1e-6),
    ],
)
def test_units_of_nrrd_become_millimetres_with_the_origin(
    tmp_path: Path, unit: str, size: float
) -> None:
    units = " ".join([f'"{unit}"'] * 3)
    path = _nrrd(tmp_path / "v.nrrd", f"space: LPS\n{DIRECTIONS}space units: {units}\n")
    np.testing.assert_allclose(_place(path), size * HERE)


@pytest.mark.parametrize("units", ['"mm" "mm" "s"', '"pixel" "pixel" "pixel"', '"mm" "mm" "um"'])
def test_units_of_nrrd_that_are_not_one_length_are_refused(tmp_path: Path, units: str) -> None:
    path = _nrrd(tmp_path / "v.nrrd", f"spacings: 1.2 0.8 2.5\nunits: {units}\n")
    with pytest.raises(ValueError, match=r"v\.nrrd: units: expected one "):
        read_volume(path)


@pytest.mark.parametrize(
    ("space", "frame", "message"),
    [
        ("LPS", "", None),
        ("LPS", "(1,0,0) (0,1,0) (0,0,1)", None),
        ("LPS", "(0,1,0) (1,0,0) (0,0,1)", "another measurement frame"),
        ("RAS", "(-1,0,0) (0,-1,0) (0,0,1)", None),
        ("RAS", "(1,0,0) (0,1,0) (0,0,1)", "another measurement frame"),
        ("RAS", "", "the space ras"),
    ],
)
def test_displacements_of_nrrd_are_in_lps_or_refused(
    tmp_path: Path, space: str, frame: str, message: str | None
) -> None:
    fields = f"space: {space}\n{DIRECTIONS.replace(': (', ': none (', 1)}"
    fields += "kinds: vector domain domain domain\n"
    fields += f"measurement frame: {frame}\n" if frame else ""
    path = _nrrd(tmp_path / "v.nrrd", fields, np.ones((3, 4, 5, 3), "<f4"))
    if message is None:
        (part,) = read_transform(path)
        np.testing.assert_array_equal(part.vectors, 1)
        return
    with pytest.raises(
        ValueError, match=rf"v\.nrrd: expected displacements in milli.* in {message}"
    ):
        read_transform(path)
    assert read_volume(path).channels == 3


@pytest.mark.parametrize(("unit", "size"), [("mm", 1), ("?", 1), ("um", 1e-3), ("cm", 10)])
def test_units_of_metaimage_become_millimetres_with_the_origin(
    tmp_path: Path, unit: str, size: float
) -> None:
    path = _meta(tmp_path / "v.mha", f"DistanceUnits = {unit}\n")
    np.testing.assert_allclose(_place(path), size * HERE)
    with pytest.raises(ValueError, match=r"v\.mha: DistanceUnits: expected one of nm, um, mm"):
        read_grid(_meta(path, "DistanceUnits = inch\n"))


@pytest.mark.parametrize(
    "twice",
    [
        "Position = 4 5 6\n",
        "Offset = 4 5 6\n",
        "Orientation = 0 1 0 1 0 0 0 0 1\n",
        "ElementSpacing = 1 1 1\n",
        "BinaryDataByteOrderMSB = False\nElementByteOrderMSB = True\n",
    ],
)
def test_a_metaimage_that_says_the_same_twice_is_refused(tmp_path: Path, twice: str) -> None:
    with pytest.raises(ValueError, match=r"v\.mha: expected one .* in its header, got "):
        read_grid(_meta(tmp_path / "v.mha", twice))


def test_a_metaimage_without_a_size_of_voxels_is_told(tmp_path: Path) -> None:
    path = _meta(tmp_path / "v.mha", "")
    path.write_bytes(path.read_bytes().replace(b"ElementSpacing", b"elementspacing"))
    with pytest.warns(UserWarning, match=r"v\.mha: its header does not say how large voxels are"):
        assert read_grid(path).spacing.tolist() == [1, 1, 1]


def test_vectors_in_a_file_of_another_unit_are_refused(tmp_path: Path) -> None:
    vectors = np.ones((5, 4, 3, 1, 3), np.float32)
    image = nibabel.Nifti1Image(vectors, np.eye(4))
    image.header["intent_code"] = 1007
    nibabel.save(image, tmp_path / "v.nii")
    assert len(read_transform(tmp_path / "v.nii")) == 1
    image.header.set_xyzt_units("micron")
    nibabel.save(image, tmp_path / "v.nii")
    fields = f"space: LPS\n{DIRECTIONS.replace(': (', ': none (', 1)}"
    fields += 'kinds: vector domain domain domain\nspace units: "um" "um" "um"\n'
    _nrrd(tmp_path / "v.nrrd", fields, np.ones((3, 4, 5, 3), "<f4"))
    for name in ("v.nii", "v.nrrd"):
        with pytest.raises(ValueError, match=rf"{name}: expected displacements in millimetres"):
            read_transform(tmp_path / name)


def test_a_slope_and_an_offset_of_metaimage_make_its_values(tmp_path: Path) -> None:
    slope = "ElementToIntensityFunctionSlope = 2\nElementToIntensityFunctionOffset = -5\n"
    np.testing.assert_array_equal(
        read_volume(_meta(tmp_path / "v.mha", slope)).array, 2 * VALUES - 5.0
    )
    none = "ElementToIntensityFunctionSlope = 1\n"
    assert read_volume(_meta(tmp_path / "v.mha", none)).array.dtype == np.int16


@pytest.mark.parametrize(
    ("letters", "matrix", "agrees"),
    [
        ("RAI", "1 0 0 0 1 0 0 0 1", True),
        ("???", "1 0 0 0 1 0 0 0 1", True),
        ("LPI", "-1 0 0 0 -1 0 0 0 1", True),
        ("PRI", "0 -1 0 1 0 0 0 0 1", True),  # the first axis runs to the front
        ("RAI", "0.8 0.6 0 -0.6 0.8 0 0 0 1", True),
        ("LPS", "1 0 0 0 1 0 0 0 1", False),
        ("LAI", "1 0 0 0 1 0 0 0 1", False),
        ("RAI", "-1 0 0 0 1 0 0 0 1", False),
        ("RAI", "0 1 0 1 0 0 0 0 1", False),
    ],
)
def test_an_anatomical_orientation_that_contradicts_the_matrix_is_told(
    tmp_path: Path, letters: str, matrix: str, agrees: bool
) -> None:
    path = _meta(tmp_path / "v.mha", f"AnatomicalOrientation = {letters}\n", matrix)
    rows = np.reshape(matrix.split(), (3, 3)).astype(float)
    there = np.array([1, 2, 3]) + (HERE - [1, 2, 3]) @ rows
    if agrees:
        np.testing.assert_allclose(_place(path), there)
        return
    with pytest.warns(UserWarning, match=rf"v\.mha: its AnatomicalOrientation {letters} is not"):
        grid = read_grid(path)
    np.testing.assert_allclose((grid.voxel_to_physical() @ [4, 3, 2, 1])[:3], there)


def test_a_centre_of_rotation_of_metaimage_is_told(tmp_path: Path) -> None:
    fields = "CenterOfRotation = 5 6 7\n"
    np.testing.assert_allclose(_place(_meta(tmp_path / "v.mha", fields)), HERE)
    with pytest.warns(UserWarning, match=r"v\.mha: .* CenterOfRotation that is not 0"):
        read_grid(_meta(tmp_path / "v.mha", fields, "0.8 0.6 0 -0.6 0.8 0 0 0 1"))


def test_the_size_of_pixels_of_png_is_told(tmp_path: Path) -> None:
    path = tmp_path / "v.png"
    write_png(path, [bytes(5)] * 2, sCAL=b"\x010.25\x000.5")
    with pytest.warns(UserWarning, match=r"v\.png: its pixels have a size of 0\.25 x 0\.5 metres"):
        assert read_grid(path).spacing.tolist() == [0.25, 0.5]
    write_png(path, [bytes(5)] * 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_grid(path).spacing.tolist() == [1, 1]


def _nifti(path: Path, **fields: Any) -> Path:
    affine = np.diag([-1.2, 0.8, 2.5, 1])
    nibabel.save(nibabel.Nifti1Image(VALUES.T, affine), path)
    header = nibabel.load(path).header.copy()
    for name, value in fields.items():
        header[name] = value
    whole = bytearray(path.read_bytes())
    whole[:348] = header.binaryblock
    path.write_bytes(whole)
    return path


@pytest.mark.parametrize(("code", "size"), [(0, 1), (2, 1), (3, 1e-3), (1, 1e3), (8 + 2, 1)])
def test_units_of_nifti_become_millimetres(tmp_path: Path, code: int, size: float) -> None:
    path = _nifti(tmp_path / "v.nii", xyzt_units=code)
    np.testing.assert_allclose(_place(path), size * np.array([4.8, -2.4, 5]), rtol=1e-6)


def test_a_unit_of_nifti_that_nobody_knows_is_told(tmp_path: Path) -> None:
    with pytest.warns(
        UserWarning, match=r"v\.nii: its unit of length has the code 5, .* for milli"
    ):
        read_grid(_nifti(tmp_path / "v.nii", xyzt_units=5))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dim": [3, -5, 4, 3, 1, 1, 1, 1]}, "expected sizes of axes that are not negative"),
        ({"magic": b"ni1"}, "expected its voxels in another file, as its magic says"),
        (
            {"sform_code": 0, "qform_code": 1, "quatern_b": 0.9, "quatern_c": 0.9},
            "expected the quaternion of a rotation",
        ),
    ],
)
def test_a_header_of_nifti_that_contradicts_itself_is_refused(
    tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=rf"v\.nii: {message}"):
        read_grid(_nifti(tmp_path / "v.nii", **fields))


@pytest.mark.parametrize("part", [0.9, np.nan])
def test_a_qform_that_is_no_rotation_is_told_where_the_sform_holds(
    tmp_path: Path, part: float
) -> None:
    path = _nifti(tmp_path / "v.nii", qform_code=1, quatern_b=part, quatern_c=part)
    with pytest.warns(UserWarning, match=r"v\.nii: its qform is no rotation; the sform is used"):
        grid = read_grid(path)
    place = grid.voxel_to_physical() @ [4, 3, 2, 1]
    np.testing.assert_allclose(place[:3], [4.8, -2.4, 5], rtol=1e-6)


def test_a_field_in_lps_of_nrrd_comes_back_without_a_word(tmp_path: Path) -> None:
    grid = Grid((3, 4, 5), np.array([1.2, 0.8, 2.5]), np.array([1.0, 2, 3]), np.eye(3))
    write_displacement(np.ones((3, 4, 5, 3)), grid, tmp_path / "v.nrrd")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (part,) = read_transform(tmp_path / "v.nrrd")
    assert part.grid.same_place(grid)
