"""Random inputs for the tests, and what it means for a result to be right."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import reference
from ml_dtypes import bfloat16, finfo

Array = np.ndarray

SHAPES = {2: (6, 7), 3: (5, 6, 7)}

# Errors are measured against the largest value expected. What is left is rounding: of positions of
# a few voxels, and of sums over a few hundred of them. Half precision is computed with as float32.
TOLERANCE = {
    np.dtype(np.float16): 2e-5,
    np.dtype(bfloat16): 2e-5,
    np.dtype(np.float32): 2e-5,
    np.dtype(np.float64): 1e-12,
}
HALVES = (np.float16, bfloat16)


def random_array(seed: int, *shape: int, dtype: object = np.float64) -> Array:
    """Values between -1 and 1."""
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(dtype)


def off_grid_positions(
    seed: int, batch: int, in_shape: Sequence[int], out_shape: Sequence[int], reach: int = 2
) -> Array:
    """Voxel positions ``(batch, *out_shape, D)`` inside and up to ``reach`` voxels outside.

    None is within a tenth of a voxel of where an interpolation or its derivative jumps (integers
    and half-integers), so that rounding does not decide anything.
    """
    rng = np.random.default_rng(seed)
    size = (batch, *out_shape)
    whole = [rng.integers(-reach, n + reach, size) for n in reversed(in_shape)]
    part = rng.uniform(0.1, 0.4, (*size, len(in_shape))) + 0.5 * rng.integers(
        0, 2, (*size, len(in_shape))
    )
    return np.stack(whole, axis=-1) + part


def coordinates_of(position: Array, shape: Sequence[int], align_corners: bool = True) -> Array:
    """Normalised coordinates of voxel positions; 0 along an axis without extent."""
    return reference.divide_or_zero(
        position - reference.centre(shape), reference.half_extent(shape, align_corners)
    )


def off_grid_displacement(
    seed: int,
    batch: int,
    in_shape: Sequence[int],
    out_shape: Sequence[int] | None = None,
    *,
    align_corners: bool = True,
    reach: int = 2,
    dtype: object = np.float64,
) -> Array:
    """Displacements that lead from every output voxel to one of ``off_grid_positions``."""
    out_shape = in_shape if out_shape is None else out_shape
    target = coordinates_of(
        off_grid_positions(seed, batch, in_shape, out_shape, reach), in_shape, align_corners
    )
    return (target - reference.normalised_coordinates(out_shape, align_corners)).astype(dtype)


def small_displacement(
    seed: int, batch: int, shape: Sequence[int], size: float = 0.1, dtype: object = np.float64
) -> Array:
    return (size * random_array(seed, batch, *shape, len(shape))).astype(dtype)


def random_affine(seed: int, batch: int, dim: int, dtype: object = np.float64) -> Array:
    """Affines that turn, scale and shift by about a tenth."""
    return (np.eye(dim, dim + 1) + 0.12 * random_array(seed, batch, dim, dim + 1)).astype(dtype)


def assert_close(actual: Array, expected: Array, dtype: object) -> None:
    """The same shape, the wanted dtype, and values equal up to that dtype's rounding.

    In half precision that is the rounding of float32, and then one to the nearest value that can
    be stored (of both sides, where what is expected is stored so as well). Integers are equal.
    """
    assert actual.dtype == np.dtype(dtype)
    assert actual.shape == expected.shape
    if actual.dtype.kind in "biu":
        np.testing.assert_array_equal(actual, expected)
        return
    assert np.isfinite(actual).all()
    if expected.size:
        step = float(finfo(dtype).eps) if dtype in HALVES else 0
        rounding = step if expected.dtype == actual.dtype else step / 2
        wide = expected.astype(np.float64)
        scale = max(1, np.abs(wide).max())
        excess = np.abs(actual.astype(np.float64) - wide) - rounding * np.abs(wide)
        error = excess.max() / scale
        assert error <= TOLERANCE[np.dtype(dtype)], f"off by {error:.2e}"


def assert_same(actual: Array, expected: Array) -> None:
    """Equal to the last bit, NaN included."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    np.testing.assert_array_equal(actual, expected)
