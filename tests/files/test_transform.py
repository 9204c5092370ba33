"""Transforms: what they do to points and volumes, beside SimpleITK."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import scipy.ndimage
import SimpleITK as sitk  # noqa: N813
from scenes import as_image, header, physical_grid
from transforms import (
    affine,
    assert_same_as_itk,
    deformation,
    inside,
    itk_affine,
    itk_composite,
    itk_field,
    volume,
    waves,
)

from jaxreg.registration import Registration, Transform, outside_values, resample
from regkernels import (
    DisplacementField,
    Grid,
    Volume,
    move_points,
    read_transform,
    write_transform,
)


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
    with pytest.raises(TypeError, match=r"parts: expected affine maps, .* got str"):
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


def ball(background: float, shape: tuple[int, ...] = (18, 20), noise: float = 0) -> Volume:
    """An object of 10 to 90 above the background, or below it, in the middle of a volume."""
    index = np.indices(shape)
    distance = sum((axis - (n - 1) / 2) ** 2 for axis, n in zip(index, shape, strict=True))
    sign = 1 if background < 100 else -1
    inside = background + sign * (50 + 40 * np.sin(index[-1] * 0.8 + index[0]))
    rng = np.random.default_rng(0)
    return Volume.create(
        np.where(distance < 36, inside, background + noise * rng.normal(size=shape))
    )


def away(dim: int, shift: float = 9.25) -> np.ndarray:
    """A shift along x by a part of a voxel, too."""
    matrix = np.eye(dim + 1)
    matrix[0, -1] = shift
    return matrix


@pytest.mark.parametrize("shape", [(18, 20), (18, 20, 22)])
@pytest.mark.parametrize("background", [-1024, 0, 245])
def test_outside_of_an_image_is_its_own_background(
    background: float, shape: tuple[int, ...]
) -> None:
    image = ball(background, shape)
    exact = image.with_array(np.round(image.array).astype(np.int16))
    cases = [(image, "linear"), (image, "cubic"), (image, "b-spline"), (exact, "linear")]
    for moving, interpolation in (*cases, (exact, "nearest")):
        moved = resample(moving, moving, [away(len(shape))], interpolation).array
        np.testing.assert_allclose(moved[..., -8:], background, atol=1e-4)
    assert moved.dtype == np.int16
    np.testing.assert_array_equal(outside_values(exact, interpolation="nearest"), [background])
    transform = Transform(image.grid, away(len(shape)))
    there, back = transform.apply(image), transform.apply_inverse(image, image)
    np.testing.assert_allclose(there.array[..., -8:], background, atol=1e-4)
    np.testing.assert_allclose(back.array[..., :8], background, atol=1e-4)


def test_the_background_of_a_noisy_image_is_a_median_and_nearest_makes_up_no_value() -> None:
    image = ball(-1000, noise=2)
    (linear,), (nearest,) = outside_values(image), outside_values(image, interpolation="nearest")
    assert abs(linear + 1000) < 0.5
    assert nearest in image.array
    steps = image.with_array(10 * np.round(image.array / 10).astype(np.int16))
    steps.array[:, 0] = steps.array[:, -1] = -1010  # so that the median may lie between two values
    moved = resample(steps, steps, [away(2)], "nearest").array
    assert moved.dtype == np.int16
    assert set(np.unique(moved)) <= set(np.unique(steps.array))


def test_every_channel_has_a_background_of_its_own() -> None:
    slide = ball(245)
    channels = slide.with_array(np.stack([slide.array, slide.array - 40, ball(0).array]))
    for interpolation in ("linear", "nearest"):
        moved = resample(channels, channels, [away(2)], interpolation).array
        for channel, background in zip(moved, (245, 205, 0), strict=True):
            np.testing.assert_allclose(channel[:, -8:], background, atol=1e-4)
    # A colour is not mixed of backgrounds and of zeros.
    full = np.random.default_rng(0).uniform(0, 200, slide.shape)
    unclear = channels.with_array(np.stack([slide.array, full]))
    np.testing.assert_array_equal(outside_values(unclear), [0, 0])


def test_where_no_background_is_clear_there_is_0_outside() -> None:
    rng = np.random.default_rng(0)
    image = ball(-1024)
    brain = image.array > -1024
    cut = brain[6:12, 7:13]  # a mask that reaches the border everywhere
    cases = (
        rng.uniform(50, 100, image.shape),
        np.full(image.shape, 7.0),
        ~brain,
        (~brain).astype(np.float32),
        cut,
        np.where(brain, 2**31, 2**30),  # labels
    )
    for array in cases:
        volume = Volume.create(array)
        for interpolation in ("linear", "nearest"):
            np.testing.assert_array_equal(outside_values(volume, None, interpolation), 0)
            moved = resample(volume, volume, [away(2, volume.shape[1] + 1)], interpolation)
            np.testing.assert_array_equal(moved.array, 0)


def test_labels_have_0_outside_unless_another_label_is_asked_for() -> None:
    labels = Volume.create(np.round(ball(245).array).astype(np.int16))
    shift = [away(2)]
    assert (resample(labels, labels, shift, "labels").array[:, -8:] == 0).all()
    other = resample(labels, labels, shift, "labels", outside=-3).array
    assert other.dtype == np.int16
    assert (other[:, -8:] == -3).all()
    assert (resample(labels, labels, shift, "labels", "background").array[:, -8:] == 245).all()
    two = labels.with_array(np.stack([labels.array, labels.array + 1]))
    assert [c[0, -1] for c in resample(two, two, shift, "labels", (4, 5)).array] == [4, 5]
    large = labels.with_array(labels.array.astype(np.int64))
    assert resample(large, large, shift, "labels", 2**60 + 1).array[0, -1] == 2**60 + 1


@pytest.mark.parametrize("interpolation", ["cubic", "b-spline"])
def test_cubic_interpolation_continues_an_image_by_what_is_outside(interpolation: str) -> None:
    """As if that were subtracted first and added in the end."""
    image, parts = ball(-1024), (affine(2), away(2, 4.4))
    less = image.with_array(image.array + 1024)
    moved = resample(image, image, parts, interpolation)
    assert moved.array.dtype == np.float32
    expected = resample(less, less, parts, interpolation, outside=0).array - 1024
    np.testing.assert_allclose(moved.array, expected, atol=2e-3)
    with_zeros = resample(image, image, parts, interpolation, outside=0).array
    assert np.abs(moved.array - with_zeros).max() > 1000


@pytest.mark.parametrize("interpolation", ["cubic", "b-spline"])
def test_cubic_interpolation_is_closer_than_linear(interpolation: str) -> None:
    """There and back again, by halves of a voxel."""
    image = volume(3)
    smooth = image.with_array(scipy.ndimage.gaussian_filter(np.asarray(image.array), 1.0))
    shift = np.eye(4)
    shift[:3, 3] = 0.5

    def error(kind: str) -> float:
        there = resample(smooth, smooth, (shift,), kind)
        back = resample(there, smooth, (np.linalg.inv(shift),), kind).array
        inner = (slice(3, -3),) * 3
        return float(np.abs(back - smooth.array)[inner].mean())

    assert error(interpolation) < 0.5 * error("linear")


@pytest.mark.parametrize("dim", [2, 3])
def test_inside_of_an_image_the_outside_changes_no_bit(dim: int) -> None:
    image, parts = volume(dim, turn=20.0), (affine(dim),)
    np.testing.assert_array_equal(resample(image, image, (), outside=-1024).array, image.array)
    where = inside(image, image, parts)
    for interpolation in ("linear", "nearest"):
        one, other = (
            resample(image, image, parts, interpolation, outside=value).array
            for value in (0, -1024)
        )
        np.testing.assert_array_equal(one[where], other[where])
        assert not np.array_equal(one, other)


def test_linear_interpolation_gets_to_what_is_outside_over_one_voxel() -> None:
    image = Volume.create([[4.0, 2.0, 6.0], [4.0, 2.0, 6.0]])
    wide = Volume.create(np.zeros((4, 8)), (0.5, 0.5), (0.5, -0.5))
    found = resample(image, wide, outside=10).array
    np.testing.assert_allclose(found[1], [3, 2, 4, 6, 8, 10, 10, 10])
    np.testing.assert_allclose(found[0], [6.5, 6, 7, 8, 9, 10, 10, 10])  # half a voxel above
    np.testing.assert_allclose(found[3], found[1])
    channels = image.with_array(np.stack([image.array, -image.array]))
    found = resample(channels, wide, outside=(10, 20)).array
    np.testing.assert_allclose(found[:, 1, 3:], [[6, 8, 10, 10, 10], [-6, 7, 20, 20, 20]])


@pytest.mark.parametrize(
    ("outside", "options", "message"),
    [
        ("air", {}, "expected 'background' or numbers, got 'air'"),
        (True, {}, "expected 'background' or numbers, got True"),
        ([1, "2"], {}, "expected 'background' or numbers"),
        ([1, 2, 3], {}, "expected 1 number, or 2 as channels, got 3"),
        ((), {}, "expected 1 number, or 2 as channels, got 0"),
        (np.nan, {}, "expected a finite number that float32 holds, got nan"),
        (1e39, {}, "expected a finite number that float32 holds, got 1e.39"),
        (10**400, {}, "expected a finite number that float32 holds, got 1000"),
        (0.5, {"interpolation": "nearest"}, "expected an integer that int16 holds, got 0.5"),
        (40000, {"interpolation": "nearest"}, "an integer that int16 holds, got 40000"),
        (0.5, {"interpolation": "labels"}, "expected an integer that int16 holds, got 0.5"),
    ],
)
def test_what_cannot_be_outside_is_refused(outside: Any, options: Any, message: str) -> None:
    image = Volume.create(np.zeros((2, 4, 5), np.int16), (1, 1))
    with pytest.raises((TypeError, ValueError), match=f"^outside: .*{message}"):
        resample(image, image, outside=outside, **options)


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
