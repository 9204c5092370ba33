"""Where the voxels of a file lie: nibabel is the judge, and headers written by hand."""

from __future__ import annotations

import gzip
import struct
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from numpy.typing import NDArray

from regkernels import (
    Grid,
    Volume,
    move_points,
    read_grid,
    read_transform,
    read_volume,
    write_displacement,
    write_volume,
)

LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
VOXEL = np.array([4, 3, 2, 1])  # x, y, z
SHAPE = (5, 6, 7)  # x, y, z


def _turned(degrees: float = 20) -> NDArray[Any]:
    """Return a left-handed, oblique and anisotropic place, RAS."""
    c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    turn = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ np.array(
        [[1, 0, 0], [0, c, -s], [0, s, c]]
    )
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag([-1.2, 0.8, 2.5])
    affine[:3, 3] = [31, -17, 9]
    return affine


SHEARED = _turned() @ np.array([[1, 0, 0.4, 0], [0, 1, 0.1, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
VALUES = np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE)


def _image(
    qform: Any = None, sform: Any = None, codes: tuple[int, int] = (1, 1), kind: Any = None
) -> Any:
    image = (kind or nibabel.Nifti1Image)(VALUES, None)
    image.header.set_zooms((1.2, 0.8, 2.5))
    if qform is not None:
        image.header.set_qform(qform, codes[0], strip_shears=True)
    if sform is not None:
        image.header.set_sform(sform, codes[1])
    return image


def _saved(image: Any, path: Path) -> Path:
    # nibabel.save() puts an affine of the image's own into the header.
    header = image.header
    header.set_data_shape(image.shape)
    data = np.asarray(image.dataobj).tobytes(order="F")
    single = header.single_vox_offset
    header["vox_offset"], header["magic"] = single, header.single_magic
    whole = header.binaryblock + bytes(single - len(header.binaryblock)) + data
    path.write_bytes(gzip.compress(whole) if path.suffix == ".gz" else whole)
    return path


def _is_where_nibabel_has_it(path: Path) -> None:
    judge = nibabel.load(path)
    volume = read_volume(path)
    there = (LPS @ judge.header.get_best_affine() @ VOXEL)[:3]
    np.testing.assert_allclose((volume.grid.voxel_to_physical() @ VOXEL)[:3], there, atol=1e-4)
    np.testing.assert_allclose((read_grid(path).voxel_to_physical() @ VOXEL)[:3], there, atol=1e-4)
    expected = np.asarray(judge.dataobj)
    np.testing.assert_allclose(np.asarray(volume.array).T, expected, rtol=1e-6)


@pytest.mark.parametrize("name", ["v.nii", "v.nii.gz"])
@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
def test_voxels_lie_where_the_sform_says_and_a_qform_elsewhere_is_told(
    tmp_path: Path, name: str, kind: Any
) -> None:
    qform = _turned()
    sform = _turned(-15)
    path = _saved(_image(qform, sform, (1, 2), kind), tmp_path / name)
    with pytest.warns(UserWarning, match=rf"{name}: its sform and its qform .* the sform is used"):
        _is_where_nibabel_has_it(path)


def test_a_sform_with_another_offset_than_the_qform_is_told(tmp_path: Path) -> None:
    sform = _turned()
    sform[:3, 3] += [0, -126, -72]
    path = _saved(_image(_turned(), sform, (2, 2)), tmp_path / "v.nii")
    with pytest.warns(UserWarning, match="up to 145 mm apart"):
        _is_where_nibabel_has_it(path)


@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
@pytest.mark.parametrize("codes", [(1, 0), (1, 1), (0, 1), (4, 2)])
def test_forms_that_agree_are_read_without_a_word(
    tmp_path: Path, kind: Any, codes: tuple[int, int]
) -> None:
    path = _saved(_image(_turned(), _turned(), codes, kind), tmp_path / "v.nii")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _is_where_nibabel_has_it(path)


@pytest.mark.parametrize("codes", [(0, 1), (1, 1)])
def test_a_sheared_sform_is_read_as_it_is(
    tmp_path: Path, codes: tuple[int, int], capfd: pytest.CaptureFixture[str]
) -> None:
    path = _saved(_image(_turned(), SHEARED, codes), tmp_path / "v.nii")
    said = "place voxels up to" if codes[0] else "are not at right angles"
    with pytest.warns(UserWarning, match=said):
        _is_where_nibabel_has_it(path)
    assert capfd.readouterr().err == ""


def test_a_scaled_sform_is_read_as_it_is(tmp_path: Path) -> None:
    scaled = _turned() @ np.diag([1.1, 1, 1, 1])
    path = _saved(_image(None, scaled), tmp_path / "v.nii")
    with pytest.warns(UserWarning, match="are 1.32 x 0.8 x 2.5 mm large, those of its pixdim 1.2"):
        _is_where_nibabel_has_it(path)


def test_without_any_form_x_runs_to_the_left_as_in_nibabel(tmp_path: Path) -> None:
    path = _saved(_image(), tmp_path / "v.nii")
    with pytest.warns(UserWarning, match="neither sform nor qform"):
        _is_where_nibabel_has_it(path)


def test_micrometres_become_millimetres_with_the_origin(tmp_path: Path) -> None:
    image = _image(_turned(), _turned())
    image.header.set_xyzt_units("micron")
    path = _saved(image, tmp_path / "v.nii")
    matrix = read_grid(path).voxel_to_physical()
    np.testing.assert_allclose(1000 * (matrix @ VOXEL)[:3], (LPS @ _turned() @ VOXEL)[:3], 1e-5)


def test_how_far_forms_are_apart_is_told_in_millimetres(tmp_path: Path) -> None:
    sform = _turned()
    sform[:3, 3] += [0, -126, -72]
    image = _image(_turned(), sform, (2, 2))
    image.header.set_xyzt_units("micron")
    with pytest.warns(UserWarning, match=r"up to 0\.145 mm apart"):
        read_grid(_saved(image, tmp_path / "v.nii"))


@pytest.mark.parametrize(
    ("slope", "intercept"), [(0, 5), (0, 0), (1, 0), (2, 0), (0.5, -3), (1, 7), (np.nan, 5)]
)
@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
def test_values_are_scaled_as_nibabel_scales_them(
    tmp_path: Path, slope: float, intercept: float, kind: Any
) -> None:
    image = _image(_turned(), _turned(), kind=kind)
    image.header["scl_slope"], image.header["scl_inter"] = slope, intercept
    path = _saved(image, tmp_path / "v.nii")
    _is_where_nibabel_has_it(path)
    if slope == 0:
        np.testing.assert_array_equal(np.asarray(read_volume(path).array).T, VALUES)
        assert read_volume(path).array.dtype == np.int16


@pytest.mark.parametrize("order", ["<", ">"])
def test_both_byte_orders_are_read(tmp_path: Path, order: str) -> None:
    image = nibabel.Nifti1Image(VALUES.astype(f"{order}f8"), _turned())
    header = nibabel.Nifti1Header(endianness=order)
    header.set_data_dtype(f"{order}f8")
    nibabel.save(nibabel.Nifti1Image(image.dataobj, _turned(), header), tmp_path / "v.nii")
    _is_where_nibabel_has_it(tmp_path / "v.nii")


@pytest.mark.parametrize("name", ["v.nrrd", "v.nhdr", "v.mha", "v.mhd"])
@pytest.mark.parametrize("channels", [(), (2,)])
def test_a_sheared_grid_comes_back_from_files_that_hold_it(
    tmp_path: Path, name: str, channels: tuple[int, ...]
) -> None:
    volume = _sheared(channels)
    write_volume(volume, tmp_path / name)
    again = read_volume(tmp_path / name)
    for grid in (again.grid, read_grid(tmp_path / name)):
        np.testing.assert_allclose(
            grid.voxel_to_physical() @ VOXEL, LPS @ SHEARED @ VOXEL, atol=1e-4
        )
    field = np.random.default_rng(0).normal(size=(*volume.shape, 3)).astype(np.float32)
    write_displacement(field, volume, tmp_path / name)
    (part,) = read_transform(tmp_path / name)
    np.testing.assert_allclose(
        part.grid.voxel_to_physical() @ VOXEL, LPS @ SHEARED @ VOXEL, atol=1e-4
    )


def _sheared(channels: tuple[int, ...] = ()) -> Volume:
    matrix = LPS @ SHEARED
    spacing = np.linalg.norm(matrix[:3, :3], axis=0)
    grid = Grid(SHAPE[::-1], spacing, matrix[:3, 3], matrix[:3, :3] / spacing)
    values = np.zeros((*channels, *grid.shape), np.float32)
    values[..., 2, 3, 4] = 1
    return Volume.create(values, grid.spacing, grid.origin, grid.direction)


@pytest.mark.parametrize("name", ["v.nii", "v.nii.gz", "v.hdr", "v.img"])
def test_a_sheared_grid_is_not_written_to_nifti(tmp_path: Path, name: str) -> None:
    volume = _sheared()
    for write in (
        lambda: write_volume(volume, tmp_path / name),
        lambda: write_displacement(np.zeros((*volume.shape, 3)), volume, tmp_path / name),
    ):
        with pytest.raises(ValueError, match=rf"{name}: .*right angles.*write \.nrrd or \.mha"):
            write()
    assert not list(tmp_path.iterdir())


def test_one_slice_in_space_with_channels_is_not_written_to_nifti(tmp_path: Path) -> None:
    volume = Volume.create(np.zeros((2, 1, 4, 5), np.float32), (1, 1, 5), (0, 0, 30))
    with pytest.raises(ValueError, match=r"v\.nii: .*one slice in space.*write \.nrrd or \.mha"):
        write_volume(volume, tmp_path / "v.nii")
    write_volume(volume, tmp_path / "v.nrrd")
    grid = read_volume(tmp_path / "v.nrrd").grid
    assert (grid.shape, grid.origin[2]) == ((1, 4, 5), 30)


def _command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "jaxreg", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


def test_commands_refuse_a_sheared_grid_before_any_work(tmp_path: Path) -> None:
    volume = _sheared()
    write_volume(volume, tmp_path / "v.nrrd")
    write_displacement(np.zeros((*volume.shape, 3)), volume, tmp_path / "warp.mha")
    for arguments, name in (
        (("register", "v.nrrd", "v.nrrd", "-o", "out"), "FIXED"),
        (("apply", "v.nrrd", "-r", "v.nrrd", "-o", "out.nii.gz"), "--output"),
        (("invert", "warp.mha", "-o", "out.nii.gz"), "--output"),
    ):
        done = _command(tmp_path, *arguments)
        assert done.returncode == 2, done.stderr
        assert done.stderr.startswith(f"jaxreg: error: {name}: "), done.stderr
        assert "not at right angles" in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"v.nrrd", "warp.mha"}


def test_the_command_line_tells_once_which_form_it_uses(tmp_path: Path) -> None:
    _saved(_image(_turned(), _turned(-15)), tmp_path / "v.nii")
    done = _command(tmp_path, "apply", "v.nii", "-r", "v.nii", "-o", "out.nrrd")
    assert done.returncode == 0, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("jaxreg: warning: v.nii: its sform and its qform place voxels")
    grid = read_grid(tmp_path / "out.nrrd")
    there = LPS @ _turned(-15) @ VOXEL
    np.testing.assert_allclose(grid.voxel_to_physical() @ VOXEL, there, atol=1e-4)


@pytest.mark.parametrize("kind", [nibabel.AnalyzeImage, nibabel.Spm99AnalyzeImage])
@pytest.mark.parametrize("name", ["v.hdr", "v.img"])
def test_analyze_images_are_refused(tmp_path: Path, kind: Any, name: str) -> None:
    nibabel.save(kind(VALUES, np.diag([2.0, 2, 2, 1])), tmp_path / "v.img")
    for read in (read_volume, read_grid, read_transform):
        with pytest.raises(ValueError, match=rf"{name}: an Analyze 7\.5 .*convert it to NIfTI"):
            read(tmp_path / name)


def _vectors(values: NDArray[Any], affine: Any, code: int, name: str, p1: float = 0) -> Any:
    image = nibabel.Nifti1Image(values[:, :, :, None, :].astype(np.float32), affine)
    image.header.set_intent(code, (), name, allow_unknown=True)
    image.header["intent_code"], image.header["intent_p1"] = code, p1
    return image


def _positions() -> NDArray[Any]:
    index = np.moveaxis(np.indices(SHAPE), 0, -1)
    return index @ _turned()[:3, :3].T + _turned()[:3, 3]


SHIFT = np.array([3.0, 5.0, 7.0])  # RAS


@pytest.mark.parametrize("size", [SHAPE, (5, 6, 1)])
@pytest.mark.parametrize(
    ("code", "name", "p1", "vectors"),
    [
        (1007, "Mapping", 0, "positions"),
        (1007, "MAPPING", 0, "positions"),
        (1007, "NREG_TRANS", 0, "positions"),
        (1007, "NREG_TRANS", 1, "RAS"),
        (1006, "", 0, "RAS"),
        (1007, "", 0, "LPS"),
        (1007, "other", 0, "LPS"),
    ],
)
def test_vectors_are_what_their_intent_says(
    tmp_path: Path, size: tuple[int, ...], code: int, name: str, p1: float, vectors: str
) -> None:
    values = {
        "positions": _positions() + SHIFT,
        "RAS": np.broadcast_to(SHIFT, (*SHAPE, 3)),
        "LPS": np.broadcast_to(SHIFT * [-1, -1, 1], (*SHAPE, 3)),
    }[vectors]
    values = values[:, :, : size[2]]
    nibabel.save(_vectors(values, _turned(), code, name, p1), tmp_path / "y.nii")
    parts = read_transform(tmp_path / "y.nii")
    voxel = [2, 3, min(2, size[2] - 1), 1]
    point = (LPS @ _turned() @ voxel)[:3]
    np.testing.assert_allclose(move_points(point, parts) - point, SHIFT * [-1, -1, 1], atol=1e-4)


def test_other_transforms_of_niftyreg_are_refused(tmp_path: Path) -> None:
    for kind in (2, 3, 4, 5):
        image = _vectors(_positions(), _turned(), 1007, "NREG_TRANS", kind)
        nibabel.save(image, tmp_path / "v.nii")
        with pytest.raises(ValueError, match=r"v\.nii: .*NiftyReg.*reg_transform -def"):
            read_transform(tmp_path / "v.nii")


def test_a_plane_out_of_x_and_y_is_no_2d_image(tmp_path: Path) -> None:
    header = nibabel.Nifti1Header()
    header.set_data_shape((5, 6))
    image = nibabel.Nifti1Image(VALUES[:, :, 0], _turned(), header)
    nibabel.save(image, tmp_path / "v.nii")
    raw = bytearray((tmp_path / "v.nii").read_bytes())
    assert struct.unpack_from("<h", raw, 40) == (2,)
    with pytest.raises(ValueError, match="store it as a 3-D image of one slice"):
        read_volume(tmp_path / "v.nii")


@pytest.mark.parametrize("name", ["v.nii.gz", "v.hdr", "v.mha", "v.mhd", "v.nrrd", "v.nhdr"])
@pytest.mark.parametrize("ndim", [2, 3])
def test_what_is_written_lies_where_it_was(tmp_path: Path, name: str, ndim: int) -> None:
    matrix = (LPS @ _turned())[:3, :3]
    if ndim == 2:
        matrix = np.array([[0.9, -0.5], [0.6, 0.75]]) * [1, -1]
        matrix[:, 1] = [matrix[1, 0], -matrix[0, 0]]
    spacing = np.linalg.norm(matrix, axis=0)
    values = np.zeros(SHAPE[::-1][-ndim:], np.float32)
    values[(2, 3, 4)[-ndim:]] = 1
    volume = Volume.create(values, spacing, (31, -17, 9)[:ndim], matrix / spacing)
    write_volume(volume, tmp_path / name)
    again = read_volume(tmp_path / name)
    voxel = [*np.argwhere(np.asarray(again.array) == 1)[0][::-1], 1]
    np.testing.assert_allclose(
        again.grid.voxel_to_physical() @ voxel,
        volume.grid.voxel_to_physical() @ [*(4, 3, 2)[:ndim], 1],
        atol=1e-4,
    )
    if name == "v.nii.gz":
        affine = nibabel.load(tmp_path / name).affine
        there = (LPS @ affine @ [4, 3, 2 * (ndim == 3), 1])[:ndim]
        np.testing.assert_allclose((again.grid.voxel_to_physical() @ voxel)[:ndim], there, 1e-4)
