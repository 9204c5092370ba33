"""Transforms: what they do to points and volumes, and their files in SimpleITK's hands."""

from __future__ import annotations

import dataclasses
import gzip
import struct
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from scenes import as_image, header, physical_grid, scene

from jaxreg.registration import Registration, Transform, resample
from regkernels import (
    AffineMap,
    DisplacementField,
    Grid,
    Volume,
    move_points,
    read_transform,
    write_affine,
    write_displacement,
    write_transform,
)

# --- transforms ---------------------------------------------------------------------------------


def affine(dim: int, seed: int = 0) -> AffineMap:
    """A turn, a shear and a shift."""
    rng = np.random.default_rng(seed)
    matrix = np.eye(dim + 1)
    matrix[:-1] += rng.uniform(-1, 1, (dim, dim + 1)) * [*[0.15] * dim, 4]
    return AffineMap(matrix)


def volume(dim: int, turn: float = 20.0) -> Volume:
    """A scene that fills an oblique grid."""
    empty = header((11, 12, 10)[-dim:], (3.0, 2.5, 3.5)[:dim], turn=turn)
    return empty.with_array(scene(physical_grid(empty) * 3))


def waves(grid: Grid, amplitude: float = 2.0) -> np.ndarray:
    """A smooth displacement in millimetres that does not vanish at the border."""
    points = physical_grid(Volume.on_grid(grid, np.zeros(grid.shape)))
    return amplitude * np.cos(points / 9 + np.arange(grid.ndim)) * [1, -0.7, 0.4][: grid.ndim]


def deformation(dim: int) -> tuple[Transform, Volume, Volume]:
    """A transform with an inverse, found by iteration, and volumes of its two spaces."""
    fixed, moving = volume(dim), volume(dim, turn=-35.0)
    matrix = affine(dim)
    there = DisplacementField(fixed.grid, waves(fixed.grid))
    points = physical_grid(fixed)
    back = points.copy()
    for _ in range(30):
        back += points - move_points(back, (there,))
    transform = Transform.from_parts(fixed.grid, (there, matrix))
    inverse = Transform.from_parts(
        fixed.grid, (DisplacementField(fixed.grid, back - points),)
    ).displacement
    return dataclasses.replace(transform, inverse_displacement=inverse), fixed, moving


def itk_affine(part: AffineMap) -> sitk.AffineTransform:
    transform = sitk.AffineTransform(part.ndim)
    transform.SetMatrix(part.matrix[:-1, :-1].ravel().tolist())
    transform.SetTranslation(part.matrix[:-1, -1].tolist())
    return transform


def itk_field(field: DisplacementField) -> sitk.DisplacementFieldTransform:
    image = sitk.GetImageFromArray(np.asarray(field.vectors, np.float64), isVector=True)
    empty = as_image(Volume.on_grid(field.grid, np.zeros(field.grid.shape)))
    image.CopyInformation(empty)
    return sitk.DisplacementFieldTransform(image)


def itk_composite(*in_the_order_of_points: Any) -> sitk.CompositeTransform:
    return sitk.CompositeTransform(list(reversed(in_the_order_of_points)))


def inside(reference: Volume, moving: Volume, parts: tuple[Any, ...]) -> np.ndarray:
    """Where all that is sampled lies in the volume: SimpleITK extends one by half a voxel."""
    return resample(moving.with_array(np.ones(moving.shape)), reference, parts).array > 1 - 1e-4


def assert_same_as_itk(
    ours: Volume, moving: Volume, transform: Any, where: np.ndarray, interpolator: int
) -> None:
    reference = as_image(ours)
    theirs = sitk.Resample(as_image(moving), reference, transform, interpolator, 0.0)
    assert where.mean() > 0.3
    difference = np.abs(ours.array - sitk.GetArrayFromImage(theirs))[where]
    assert difference.max() < 2e-5


# --- points and volumes -------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [2, 3])
def test_points_go_where_simpleitk_sends_them(dim: int) -> None:
    transform, fixed, _ = deformation(dim)
    warp, linear = transform.parts
    points = 1.4 * physical_grid(fixed).reshape(-1, dim)[::7] + 0.3  # some outside of the grid
    expected = itk_composite(itk_field(warp), itk_affine(linear))
    np.testing.assert_allclose(
        transform.transform_points(points),
        [expected.TransformPoint(point) for point in points.tolist()],
        atol=1e-4,
    )
    outside = np.full((2, dim), 1e4)
    np.testing.assert_allclose(transform.transform_points(outside), linear.move(outside))


@pytest.mark.parametrize("dim", [2, 3])
def test_points_come_back_through_the_inverse(dim: int) -> None:
    transform, fixed, _ = deformation(dim)
    points = 0.5 * physical_grid(fixed)
    there = transform.transform_points(points)
    assert there.shape == points.shape
    assert np.abs(there - points).max() > 1
    # Between voxels the inverse of a linear interpolant is not the interpolated inverse.
    np.testing.assert_allclose(transform.inverse_transform_points(there), points, atol=0.1)


@pytest.mark.parametrize("dim", [2, 3])
def test_the_residual_of_an_inverse_is_where_points_come_back_to(dim: int) -> None:
    transform, _, _ = deformation(dim)
    found = transform.with_inverse().inverse_residual()
    assert found.shape == transform.grid.shape
    assert found.mean() < 0.01

    shift = np.zeros(dim)
    shift[0] = 2 / (transform.grid.shape[-1] - 1)  # a voxel, in normalised coordinates
    still = np.zeros((1, *transform.grid.shape, dim), np.float32)
    for back, length in ((still, 1), (still - shift, 0), (still - 3 * shift, 2)):
        pushed = dataclasses.replace(
            transform, displacement=still + shift, inverse_displacement=back
        )
        np.testing.assert_allclose(pushed.inverse_residual(), length, atol=1e-5)
    with pytest.raises(ValueError, match="inverse_displacement: expected a field"):
        dataclasses.replace(transform, inverse_displacement=None).inverse_residual()


def test_without_a_deformation_a_transform_is_its_matrix() -> None:
    _, fixed, moving = deformation(2)
    transform = Transform(fixed.grid, affine(2).matrix)
    assert transform.with_inverse() is transform
    np.testing.assert_array_equal(transform.inverse_residual(), np.zeros(fixed.shape))
    np.testing.assert_array_equal(transform.displacement_field(), 0)
    np.testing.assert_array_equal(transform.inverse_displacement_field(), 0)
    whole = DisplacementField(fixed.grid, transform.displacement_field(with_affine=True))
    points = 0.5 * physical_grid(fixed)
    there = transform.transform_points(points)
    np.testing.assert_allclose(there, move_points(points, (affine(2),)))
    np.testing.assert_allclose(there, move_points(points, (whole,)), atol=1e-4)
    np.testing.assert_allclose(transform.inverse_transform_points(there), points)
    result = Registration(fixed, moving, transform, ())
    np.testing.assert_array_equal(result.jacobian, np.ones(fixed.shape))
    assert result.folds == (0, 1, 1)
    assert result.inverse_residual == (0, 0, 0)
    assert (result.moved.shape, result.fixed_moved.shape) == (fixed.shape, moving.shape)


def test_a_field_is_linear_between_its_voxels_and_ends_half_a_voxel_outside() -> None:
    grid = Grid((1, 3), np.array([2.0, 1.0]), np.array([10.0, 0.0]), np.eye(2))
    field = DisplacementField(grid, np.array([[(1, 0), (2, 0), (4, 8)]]))
    at = {9.1: (1, 0), 8.9: (0, 0), 11: (1.5, 0), 13.5: (3.5, 6), 14.9: (4, 8), 15.1: (0, 0)}
    for x, expected in at.items():
        moved = move_points([(x, 0.4), (x, 0.6)], (field,))
        np.testing.assert_allclose(moved - [(x, 0.4), (x, 0.6)], [expected, (0, 0)], atol=1e-5)


def test_a_matrix_stands_for_the_affine_map_that_it_is(tmp_path: Path) -> None:
    fixed, part = volume(2), affine(2)
    points = physical_grid(fixed)
    np.testing.assert_array_equal(move_points(points, [part.matrix]), part.move(points))
    by_matrix, by_part = (resample(fixed, fixed, [p]).array for p in (part.matrix, part))
    np.testing.assert_array_equal(by_matrix, by_part)
    np.testing.assert_array_equal(np.asarray(part), part.matrix)
    write_transform(part.matrix, tmp_path / "affine.tfm")
    np.testing.assert_array_equal(read_transform(tmp_path / "affine.tfm")[0], part.matrix)
    with pytest.raises(ValueError, match=r"parts: expected a matrix .*, got shape \(2, 3\)"):
        move_points(points, [part.matrix[:2]])
    with pytest.raises(TypeError, match="parts: expected affine maps, .* got str"):
        resample(fixed, fixed, ["affine.tfm"])  # type: ignore[list-item]


@pytest.mark.parametrize("dim", [2, 3])
def test_any_chain_resamples_as_in_simpleitk(dim: int) -> None:
    reference, moving = volume(dim), volume(dim, turn=-35.0)
    other = header((7, 8, 9)[-dim:], (4.0, 5.0, 3.0)[:dim], turn=50).grid
    first, second = (
        DisplacementField(grid, waves(grid, size))
        for grid, size in ((other, 3.0), (reference.grid, 1.5))
    )
    one, two = affine(dim), affine(dim, seed=1)
    for parts in [(), (one,), (first,), (one, second), (second, one, first, two)]:
        itk = itk_composite(
            *(
                itk_field(part) if isinstance(part, DisplacementField) else itk_affine(part)
                for part in parts
            ),
            sitk.TranslationTransform(dim),
        )
        where = inside(reference, moving, parts)
        ours = resample(moving, reference, parts)
        assert_same_as_itk(ours, moving, itk, where, sitk.sitkLinear)
        collapsed = Transform.from_parts(reference.grid, parts).apply(moving)
        np.testing.assert_allclose(collapsed.array, ours.array, atol=2e-5)


def test_a_slice_is_a_slice_and_no_column() -> None:
    thin = Volume.create(np.full((1, 4, 5), 7.0), spacing=(1, 1, 2))
    thick = Volume.create(np.zeros((5, 4, 5)), origin=(0, 0, -2))
    found = resample(thin, thick).array
    np.testing.assert_allclose(found[:, 2, 2], [0, 3.5, 7, 3.5, 0])
    # Out of the plane of a slice, too.
    whole = Volume.create(np.broadcast_to(np.arange(5.0)[:, None, None], (5, 4, 5)))
    up = DisplacementField(thin.grid, np.broadcast_to([0, 0, 1.25], (1, 4, 5, 3)))
    np.testing.assert_allclose(resample(whole, thin, (up,)).array, 1.25)


def test_nothing_is_lost_where_nothing_happens() -> None:
    still = volume(3)
    np.testing.assert_array_equal(resample(still, still).array, still.array)
    labels = np.arange(still.array.size).reshape(still.shape) + 2**60
    kept = resample(still.with_array(labels), still, (), "nearest")
    assert kept.array.dtype == np.int64
    np.testing.assert_array_equal(kept.array, labels)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int64, np.uint32, np.float32])
def test_nearest_keeps_values_and_dtype_of_every_channel(dtype: type) -> None:
    moving = volume(3)
    rng = np.random.default_rng(0)
    channels = rng.integers(0, 120, (2, *moving.shape)).astype(dtype)
    if dtype in (np.int64, np.uint32):
        channels[channels > 60] += 2**31  # beyond float32
    reference = volume(3, turn=0)
    ours = resample(moving.with_array(channels), reference, (affine(3),), "nearest")
    assert ours.array.dtype == dtype
    for k in range(2):
        one = resample(moving.with_array(channels[k]), reference, (affine(3),), "nearest")
        np.testing.assert_array_equal(ours.array[k], one.array)
        theirs = sitk.Resample(
            as_image(moving.with_array(channels[k])),
            as_image(reference),
            itk_affine(affine(3)),
            sitk.sitkNearestNeighbor,
        )
        # A position halfway between two voxels may be rounded to either.
        assert (sitk.GetArrayFromImage(theirs) == one.array).mean() > 0.99


@pytest.mark.parametrize("dim", [2, 3])
def test_the_inverse_transform_is_the_way_back(dim: int) -> None:
    transform, fixed, moving = deformation(dim)
    back = transform.inverse(moving.grid)
    points = 0.25 * physical_grid(moving)
    np.testing.assert_allclose(
        back.transform_points(points), transform.inverse_transform_points(points), atol=0.1
    )
    np.testing.assert_allclose(
        back.inverse_transform_points(points), transform.transform_points(points), atol=0.1
    )
    ours, other = back.apply(fixed), transform.apply_inverse(fixed, moving)
    np.testing.assert_allclose(ours.array, other.array, atol=1e-4)
    assert ours.shape == moving.shape
    only_affine = Transform(fixed.grid, affine(dim).matrix).inverse(moving.grid)
    np.testing.assert_allclose(only_affine.matrix @ affine(dim).matrix, np.eye(dim + 1), atol=1e-12)
    assert only_affine.displacement is only_affine.inverse_displacement is None


def test_the_whole_transform_is_one_field_if_wanted() -> None:
    transform, fixed, moving = deformation(3)
    whole = DisplacementField(fixed.grid, transform.displacement_field(with_affine=True))
    np.testing.assert_allclose(
        resample(moving, fixed, (whole,)).array, transform.apply(moving).array, atol=1e-4
    )
    no_field = Transform(fixed.grid, np.eye(4)).displacement_field()
    np.testing.assert_array_equal(no_field, np.zeros((*fixed.shape, 3)))


def test_a_transform_is_a_pytree() -> None:
    transform, *_ = deformation(2)
    doubled = jax.jit(lambda t: jax.tree.map(lambda leaf: 2 * leaf, t))(transform)
    np.testing.assert_allclose(doubled.displacement, 2 * transform.displacement)
    assert doubled.grid.shape == transform.grid.shape


def test_what_cannot_be_transformed_is_refused() -> None:
    transform, fixed, _ = deformation(2)
    with pytest.raises(ValueError, match=r"points: expected shape \(\.\.\., 2\), got \(4, 3\)"):
        transform.transform_points(np.zeros((4, 3)))
    with pytest.raises(ValueError, match="points: expected finite"):
        transform.transform_points([np.nan, 0])
    with pytest.raises(ValueError, match="reference: expected 2 dimensions as volume, got 3"):
        transform.apply(fixed, volume(3))
    one_way = dataclasses.replace(transform, inverse_displacement=None)
    with pytest.raises(ValueError, match="inverse_displacement: expected a field"):
        one_way.inverse(fixed.grid)


# --- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [2, 3])
def test_simpleitk_resamples_through_our_files(tmp_path: Path, dim: int) -> None:
    transform, fixed, moving = deformation(dim)
    write_affine(transform.matrix, tmp_path / "affine.tfm")
    write_displacement(transform.displacement_field(), fixed, tmp_path / "warp.nii.gz")
    inverse = tmp_path / "inverse_warp.nii.gz"
    write_displacement(transform.inverse_displacement_field(), fixed, inverse)

    def itk_warp(path: Path) -> Any:
        return sitk.DisplacementFieldTransform(sitk.ReadImage(str(path), sitk.sitkVectorFloat64))

    linear = sitk.ReadTransform(str(tmp_path / "affine.tfm"))
    there = itk_composite(itk_warp(tmp_path / "warp.nii.gz"), linear)
    where = inside(fixed, moving, transform.parts)
    assert_same_as_itk(transform.apply(moving), moving, there, where, sitk.sitkLinear)
    back = itk_composite(linear.GetInverse(), itk_warp(inverse))
    where = inside(moving, fixed, transform.inverse_parts)
    moved = transform.apply_inverse(fixed, moving)
    assert_same_as_itk(moved, fixed, back, where, sitk.sitkLinear)


@pytest.mark.parametrize("dim", [2, 3])
def test_we_resample_through_simpleitks_files(tmp_path: Path, dim: int) -> None:
    reference, moving = volume(dim), volume(dim, turn=-35.0)
    euler = sitk.Euler2DTransform() if dim == 2 else sitk.Euler3DTransform()
    euler.SetCenter([5.0, -3.0, 8.0][:dim])
    euler.SetParameters([0.2, 0.1, -0.3][: 2 * dim - 3] + [1.5, -2.0, 0.5][:dim])
    field = itk_field(DisplacementField(reference.grid, waves(reference.grid)))
    linear = itk_affine(affine(dim))
    linear.SetCenter([1.0, 2.0, 3.0][:dim])
    composite = sitk.CompositeTransform([euler, linear, field])
    transforms = {
        "affine.mat": linear,
        "affine.txt": linear,
        "euler.tfm": euler,
        "shift.tfm": sitk.TranslationTransform(dim, [3.0, -2.0, 1.0][:dim]),
        "field.h5": field,
        "composite.h5": composite,
        "composite.tfm": composite,
    }
    for name, transform in transforms.items():
        sitk.WriteTransform(transform, str(tmp_path / name))
    image = field.GetDisplacementField()
    for name in ("field.nii.gz", "field.mha", "field.nrrd"):
        sitk.WriteImage(image, str(tmp_path / name))
        transforms[name] = field
    for name, transform in transforms.items():
        parts = read_transform(tmp_path / name)
        where = inside(reference, moving, parts)
        ours = resample(moving, reference, parts)
        assert_same_as_itk(ours, moving, transform, where, sitk.sitkLinear)


def test_displacement_images_are_as_ants_writes_them(tmp_path: Path) -> None:
    grid = volume(3).grid
    write_displacement(waves(grid), grid, tmp_path / "warp.nii.gz")
    content = gzip.decompress((tmp_path / "warp.nii.gz").read_bytes())
    assert struct.unpack("<6h", content[40:52]) == (5, *grid.shape[::-1], 1, 3)
    assert struct.unpack("<h", content[68:70]) == (1007,)  # NIFTI_INTENT_VECTOR
    start = int(struct.unpack("<f", content[108:112])[0])
    stored = np.frombuffer(content[start:], "<f4").reshape(3, *grid.shape)
    # LPS as it is, although the header's own coordinates are RAS.
    np.testing.assert_array_equal(stored, np.moveaxis(waves(grid), -1, 0).astype(np.float32))


@pytest.mark.parametrize("suffix", [".tfm", ".txt", ".mat", ".h5", ".hdf5"])
@pytest.mark.parametrize("dim", [2, 3])
def test_an_affine_comes_back_to_the_last_bit(tmp_path: Path, suffix: str, dim: int) -> None:
    write_transform(affine(dim), tmp_path / f"affine{suffix}")
    (found,) = read_transform(tmp_path / f"affine{suffix}")
    np.testing.assert_array_equal(found.matrix, affine(dim).matrix)


def test_a_field_comes_back(tmp_path: Path) -> None:
    field = DisplacementField(volume(2).grid, waves(volume(2).grid).astype(np.float32))
    write_transform(field, tmp_path / "warp.nrrd")
    (found,) = read_transform(tmp_path / "warp.nrrd")
    np.testing.assert_array_equal(found.vectors, field.vectors)
    np.testing.assert_allclose(found.grid.direction, field.grid.direction)


def test_what_is_no_transform_is_refused_by_name(tmp_path: Path) -> None:
    def write(name: str, transform: Any) -> None:
        sitk.WriteTransform(transform, str(tmp_path / name))

    (tmp_path / "text.tfm").write_text("no transform")
    write("spline.tfm", sitk.BSplineTransform(3))
    write("flat.tfm", sitk.AffineTransform([1, 0, 0, 0, 1, 0, 0, 0, 0], [0, 0, 0]))
    scalar = volume(3)
    sitk.WriteImage(as_image(scalar), str(tmp_path / "scalar.nrrd"))
    for value, name in ((np.nan, "nan.nrrd"), (np.inf, "infinite.nrrd")):
        field = DisplacementField(scalar.grid, np.full((*scalar.shape, 3), value))
        write_transform(field, tmp_path / name)
    for name, message in {
        "missing.tfm": "no such file",
        "missing.nii": "no such file",
        "text.tfm": "not a transform",
        "spline.tfm": "expected linear transforms and displacement fields, got a BSpline",
        "flat.tfm": "expected a transform with an inverse",
        "scalar.nrrd": "expected displacements, 3 values per voxel, got 1",
        "nan.nrrd": "expected finite displacements",
        "infinite.nrrd": "expected finite displacements",
    }.items():
        with pytest.raises((ValueError, FileNotFoundError), match=f"{name}: {message}"):
            read_transform(tmp_path / name)


@pytest.mark.parametrize("lines", [3, 4])
def test_a_text_without_its_last_lines_is_refused(tmp_path: Path, lines: int) -> None:
    path = tmp_path / "affine.tfm"
    write_affine(np.diag([2.0, 3, 4, 1]), path)
    path.write_text("\n".join(path.read_text().splitlines()[:lines]))
    # To ITK it is the identity.
    assert sitk.ReadTransform(str(path)).TransformPoint((1.0, 1, 1)) == (1, 1, 1)
    with pytest.raises(ValueError, match=r"affine\.tfm: cut short .* of 1 transforms, got .* 0"):
        read_transform(path)


@pytest.mark.parametrize("ending", ["tfm", "mat", "h5", "xfm"])
def test_a_transform_that_is_cut_short_is_refused(
    ending: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / f"affine.{ending}"
    transform = sitk.AffineTransform(3)
    transform.SetTranslation((1.5, 2.25, 3.125))
    transform.SetCenter((10.5, 20.25, 30.125))
    sitk.WriteTransform(transform, str(path))
    whole = path.read_bytes()
    for missing in range(2, len(whole), 1 + len(whole) // 40):
        path.write_bytes(whole[:-missing])
        with pytest.raises(ValueError, match=rf"affine\.{ending}: (cut short|not a transform)"):
            read_transform(path)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("rows", [2**31 - 1, 2**16])
def test_a_matrix_larger_than_its_file_is_refused(tmp_path: Path, rows: int) -> None:
    path = tmp_path / "affine.mat"
    path.write_bytes(struct.pack("<5i", 0, rows, rows, 0, 5) + b"name\0")
    with pytest.raises(ValueError, match=rf"affine\.mat: cut short .* {5 + 8 * rows**2} bytes"):
        read_transform(path)


def test_a_transform_goes_to_a_file_of_its_kind_or_to_none(tmp_path: Path) -> None:
    field = DisplacementField(volume(2).grid, waves(volume(2).grid))
    with pytest.raises(ValueError, match=r"warp\.tfm: expected the ending of an image"):
        write_transform(field, tmp_path / "warp.tfm")
    with pytest.raises(ValueError, match=r"affine\.nii: expected an ending of \.tfm"):
        write_transform(affine(2), tmp_path / "affine.nii")
    assert not list(tmp_path.iterdir())
