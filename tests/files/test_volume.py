"""Volumes: where their voxels lie, and what they may hold."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from scenes import as_image, header, physical_grid, random_header, scene

from jaxreg.registration import resample
from regkernels import (
    AffineMap,
    Volume,
    centre_of_mass,
    normalised_affine,
    rigid_motion,
    write_volume,
)
from regkernels.files.images import read_grid


def test_voxels_are_where_simpleitk_puts_them() -> None:
    volume = random_header(np.random.default_rng(2))
    image = as_image(volume)
    grid = physical_grid(volume)
    for x, y, z in [(0, 0, 0), (7, 8, 6), (3, 1, 5)]:
        np.testing.assert_allclose(image.TransformIndexToPhysicalPoint((x, y, z)), grid[z, y, x])
    corner = volume.grid.normalised_to_physical() @ [1, 1, 1, 1]
    np.testing.assert_allclose(corner[:3], grid[-1, -1, -1])


def test_a_normalised_affine_is_the_transform_between_the_two_grids() -> None:
    rng = np.random.default_rng(3)
    fixed, moving = random_header(rng), header((5, 1, 11), (2, 3, 1), turn=-70)
    transform = np.eye(4)
    transform[:3] += rng.normal(size=(3, 4)) * [0.2, 0.2, 0.2, 10]
    affine = normalised_affine(transform, fixed, moving)[0]
    point = np.array([0.3, -0.8, 0.6, 1.0])
    expected = transform @ fixed.grid.normalised_to_physical() @ point
    np.testing.assert_allclose(
        moving.grid.normalised_to_physical() @ [*(affine @ point), 1.0], expected, atol=1e-12
    )


def test_moving_a_header_moves_the_voxels_and_nothing_else() -> None:
    volume = random_header(np.random.default_rng(4))
    motion = rigid_motion(30, (1, 1, 0), (5, -6, 7), volume.grid.centre())
    moved = volume.moved_by(motion)
    expected = physical_grid(volume) @ motion[:3, :3].T + motion[:3, 3]
    np.testing.assert_allclose(physical_grid(moved), expected)
    np.testing.assert_allclose(moved.grid.centre(), volume.grid.centre() + np.array([5, -6, 7]))


def test_resampling_between_headers_agrees_with_simpleitk() -> None:
    fixed = header((18, 20, 22), (3, 2.5, 2), turn=20)
    moving = header((30, 28, 26), (2, 2.2, 2.4), turn=-35)
    moving = moving.with_array(scene(physical_grid(moving) * 2))
    transform = rigid_motion(10, (1, 2, 3), (3, -2, 1), (0, 0, 0))
    itk_transform = sitk.AffineTransform(3)
    itk_transform.SetMatrix(transform[:3, :3].ravel().tolist())
    itk_transform.SetTranslation(transform[:3, 3].tolist())
    expected = sitk.Resample(as_image(moving), as_image(fixed), itk_transform, sitk.sitkLinear, 0.0)
    ours = resample(moving, fixed, (AffineMap(transform),)).array
    # SimpleITK extends a volume by half a voxel; zeros padding fades it out there instead.
    ones = moving.with_array(np.ones(moving.shape))
    inside = resample(ones, fixed, (AffineMap(transform),)).array > 1 - 1e-5
    assert inside.mean() > 0.5
    assert np.abs(ours - sitk.GetArrayFromImage(expected))[inside].max() < 1e-5


def test_the_centre_of_mass_is_in_millimetres() -> None:
    volume = random_header(np.random.default_rng(5))
    array = np.full(volume.shape, 2.0)
    array[4, 2, 6] += 3
    array[2, 2, 6] += 3
    grid = physical_grid(volume)
    expected = (grid[4, 2, 6] + grid[2, 2, 6]) / 2
    np.testing.assert_allclose(centre_of_mass(volume.with_array(array)), expected)
    np.testing.assert_allclose(centre_of_mass(volume), volume.grid.centre())


@pytest.mark.parametrize("size", [1.0, 4e-4])
def test_grids_are_compared_in_voxels(size: float) -> None:
    grid = header((64, 48), (size, size)).grid
    assert grid.same_place(grid)
    assert grid.voxels_apart(grid) < 1e-12
    shifted = dataclasses.replace(grid, origin=grid.origin + np.array([0, 0.02 * size]))
    np.testing.assert_allclose(shifted.voxels_apart(grid), 0.02)
    assert not shifted.same_place(grid)
    assert shifted.same_place(grid, 0.03)
    for change in (
        {"spacing": np.array([2 * size, 2 * size])},
        {"direction": np.array([[0.0, 1.0], [-1.0, 0.0]])},
        {"shape": (64, 47)},
    ):
        assert not dataclasses.replace(grid, **change).same_place(grid)


def test_the_thickness_of_a_single_slice_is_compared() -> None:
    grid = header((1, 32, 32), (1, 1, 5)).grid
    thinner = dataclasses.replace(grid, spacing=np.array([1.0, 1, 4]))
    np.testing.assert_allclose(thinner.voxels_apart(grid), 0.1)


@pytest.mark.parametrize("spacing", [(1.0, 1, 1), (0.1, 0.2, 0.7)])
@pytest.mark.parametrize("angle", [3, 77, 179.99])
def test_a_header_rounded_to_float32_is_the_same_place(
    spacing: tuple[float, ...], angle: float, tmp_path: Path
) -> None:
    direction = rigid_motion(angle, (1, -2, 2), (0, 0, 0), (0, 0, 0))[:3, :3]
    volume = Volume.create(
        np.zeros((256, 256, 256), np.uint8), spacing, (-987.6, 1003.21, 1001.1), direction
    )
    write_volume(volume, tmp_path / "large.nii.gz")
    read = read_grid(tmp_path / "large.nii.gz")
    assert 0 < read.voxels_apart(volume.grid) < 0.003
    assert read.same_place(volume.grid)
    assert volume.grid.same_place(read)


def test_voxel_values_are_integers_or_float32() -> None:
    for given, kept in [(bool, np.uint8), (np.int64, np.int64), (float, np.float32)]:
        assert Volume.create(np.ones((2, 2), given)).array.dtype == kept
    assert Volume.create(np.ones((2, 2))).with_array([[1, 2], [3, 4]]).array.dtype == np.int64


@pytest.mark.parametrize(
    ("largest", "dtype"),
    [(614454278, np.int32), (-(2**24) - 1, np.int32), (2**53, np.int64), (2**64 - 2048, np.uint64)],
)
def test_whole_numbers_that_float32_would_round_become_integers(largest: int, dtype: type) -> None:
    ids = np.array([[0, largest], [2**24 + 1, 7]], np.float64)
    for volume in (Volume.create(ids), Volume.create(np.ones((2, 2))).with_array(ids)):
        assert volume.array.dtype == dtype
        assert volume.array.tolist() == ids.astype(dtype).tolist()
    assert volume.batched().dtype == np.float32


@pytest.mark.parametrize("value", [2.0**24, 2.0**25, 2.0**24 + 1.5, 1e30, 0.1])
def test_other_floats_stay_float32(value: float) -> None:
    assert Volume.create(np.full((2, 2), value)).array.dtype == np.float32


def test_channels_are_what_the_spacing_leaves() -> None:
    array = np.arange(24.0).reshape(2, 3, 4)
    assert Volume.create(array).channels == 1
    plane = Volume.create(array, spacing=(1, 2))
    assert (plane.ndim, plane.channels, plane.shape) == (2, 2, (3, 4))
    np.testing.assert_array_equal(plane.batched(), array[None])
    assert plane.with_array(array[0]).channels == 1
    with pytest.raises(ValueError, match=r"array: expected shape \(3, 4\), got \(4, 3\)"):
        plane.with_array(np.zeros((4, 3)))


def test_a_volume_is_a_pytree() -> None:
    volume = random_header(np.random.default_rng(9))
    doubled = jax.jit(lambda v: dataclasses.replace(v, array=v.batched()[0, 0] * 2 + 1))(volume)
    assert doubled.shape == volume.shape
    np.testing.assert_array_equal(doubled.array, np.ones(volume.shape))


@pytest.mark.parametrize(
    ("array", "options", "message"),
    [
        (np.zeros(3), {}, "array: expected 2 or 3 dimensions"),
        (np.zeros((0, 3)), {}, "array: expected voxels"),
        (np.full((2, 2), np.nan), {}, "array: expected finite"),
        (np.zeros((2, 2)), {"spacing": (1, 0)}, "spacing: expected positive"),
        (np.zeros((2, 2)), {"spacing": (1, 1, 1)}, "array: expected 3 dimensions as spacing"),
        (np.zeros((2, 2, 2, 2)), {}, "array: expected 2 or 3 dimensions, got 4"),
        (np.zeros((2, 2)), {"origin": (1, 1, 1)}, r"origin: expected \(2,\)"),
        (np.zeros((2, 2)), {"origin": (np.inf, 0)}, "origin: expected"),
        (np.zeros((2, 2)), {"direction": np.ones((2, 2))}, "direction: expected independent"),
    ],
)
def test_a_volume_that_cannot_be_is_refused(array: np.ndarray, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Volume.create(array, **options)
