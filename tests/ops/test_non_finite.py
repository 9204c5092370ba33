"""NaN and infinities stay where they are: they reach what touches them, and nothing else.

A voxel that is not finite reaches the samples in which its weight is not 0, or for a gradient the
derivative of its weight. A coordinate that is not finite lies outside and gives no gradient.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import reference
from backends import Backend
from examples import FIELD_LOSSES
from inputs import (
    TOLERANCE,
    assert_same,
    coordinates_of,
    random_affine,
    random_array,
    small_displacement,
)

# The reference computes with them, and NumPy tells of every one.
pytestmark = pytest.mark.filterwarnings("ignore:.*(invalid value|divide by zero):RuntimeWarning")

NAN, INFINITY = np.nan, np.inf
PADDINGS = ["zeros", "border", "reflection"]

# Half extents that are powers of two, so that positions can be integers exactly.
SHAPES = {
    (2, True): (3, 9),
    (3, True): (3, 5, 9),
    (2, False): (4, 8),
    (3, False): (2, 4, 8),
}


def assert_alike(actual: np.ndarray, expected: np.ndarray, dtype: object) -> None:
    """NaN and infinities in the same places, and elsewhere the same values up to rounding."""
    assert actual.dtype == np.dtype(dtype)
    assert actual.shape == expected.shape
    for kind in (np.isnan, np.isposinf, np.isneginf):
        np.testing.assert_array_equal(kind(actual), kind(expected))
    finite = np.isfinite(expected)
    assert finite.any()
    error = np.abs(actual[finite] - expected[finite]).max()
    assert error <= TOLERANCE[np.dtype(dtype)] * max(1, np.abs(expected[finite]).max())


def spoilt_images(shape: tuple[int, ...]) -> np.ndarray:
    """Images of two channels, spoilt in a way of their own: one voxel, or every other one."""
    images = random_array(0, 7, 2, *shape)
    middle = tuple(n // 2 for n in shape)
    for n, value in enumerate([NAN, INFINITY, -INFINITY]):
        images[n, 0][middle] = value
        images[n, 1][(0,) * len(shape)] = value
        images[n, 1][(-1,) * len(shape)] = value
    images[3, :, ::2] = NAN
    images[4, :, ..., 1::2] = INFINITY
    return images


def spoilt_displacement(shape: tuple[int, ...], align_corners: bool, seed: int = 1) -> np.ndarray:
    """To voxels, between voxels and to the outside; the last two items also lead nowhere."""
    rng = np.random.default_rng(seed)
    size = (7, *shape, len(shape))
    target = rng.integers(-2, np.array(shape[::-1]) + 2, size).astype(np.float64)
    target += np.where(rng.random((7, *shape, 1)) < 0.5, 0, rng.choice([0, 0.25, 0.6], size))
    u = coordinates_of(target, shape, align_corners)
    u -= reference.normalised_coordinates(shape, align_corners)
    nowhere = rng.choice([NAN, INFINITY, -INFINITY], size[1:])
    u[5] = np.where(rng.random(size[1:]) < 0.2, nowhere, u[5])
    u[6] = np.where(rng.random((*shape, 1)) < 0.3, nowhere, u[6])
    return u


PLACEMENTS: dict[str, dict[str, Any]] = {
    "displacement": {},
    "coordinates": {"is_displacement": False},
    "affine": {},
    "affine first": {"affine_last": False},
    "affine last": {"affine_last": True},
}


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("padding_mode", PADDINGS)
@pytest.mark.parametrize(
    "dim,align_corners,mode,dtype",
    [
        (2, True, "bilinear", np.float64),
        (3, True, "bilinear", np.float32),
        (3, False, "bilinear", np.float64),
        (2, False, "nearest", np.float32),
        (3, True, "nearest", np.float64),
        (2, True, "cubic", np.float64),
        (3, False, "cubic", np.float64),
        (2, False, "b-spline", np.float64),
        (3, True, "b-spline", np.float64),
    ],
)
def test_interpolate_spreads_them_as_the_reference_does(
    backend: Backend,
    dim: int,
    align_corners: bool,
    mode: str,
    dtype: object,
    padding_mode: str,
    placement: str,
) -> None:
    shape = SHAPES[dim, align_corners]
    image = spoilt_images(shape).astype(dtype)
    grid = affine = None
    if placement != "affine":
        grid = spoilt_displacement(shape, align_corners).astype(dtype)
    if placement.startswith("affine"):
        affine = random_affine(2, 7, dim, dtype)
        affine[::2] = np.eye(dim, dim + 1)  # positions stay integers
        affine[6, 1, -1] = NAN
    options = {
        **PLACEMENTS[placement],
        "mode": mode,
        "prefilter": False,  # one coefficient that is not finite would be all of its line
        "padding_mode": padding_mode,
        "align_corners": align_corners,
    }
    args = (image, affine, grid)
    expected = reference.interpolate(*args, **options)
    cotangent = random_array(3, *expected.shape, dtype=dtype)
    wrt = [k for k, operand in enumerate(args) if operand is not None]
    value, gradients = backend.value_and_vjp("interpolate", args, cotangent, wrt, **options)
    assert_alike(value, expected, dtype)
    expected_gradients = reference.interpolate_vjp(cotangent, *args, **options)
    for k, gradient in zip(wrt, gradients, strict=True):
        assert_alike(gradient, expected_gradients[k], dtype)


@pytest.mark.parametrize("padding_mode", PADDINGS)
@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("mode", ["bilinear", "cubic"])
def test_a_cotangent_that_is_not_finite_reaches_the_voxels_that_its_sample_touches(
    backend: Backend, mode: str, dim: int, padding_mode: str
) -> None:
    shape = SHAPES[dim, True]
    args = (random_array(0, 7, 2, *shape), None, spoilt_displacement(shape, True))
    cotangent = spoilt_images(shape)
    options = {"padding_mode": padding_mode, "mode": mode}
    (gradient,) = backend.vjp("interpolate", args, cotangent, (0,), **options)
    expected, _, _ = reference.interpolate_vjp(cotangent, *args, **options)
    assert_alike(gradient, expected, np.float64)


@pytest.mark.parametrize("with_affine", [False, True])
@pytest.mark.parametrize("padding_mode", PADDINGS)
@pytest.mark.parametrize("dim,align_corners", [(2, True), (3, False)])
def test_compose_spreads_them_as_the_reference_does(
    backend: Backend, dim: int, align_corners: bool, padding_mode: str, with_affine: bool
) -> None:
    shape = SHAPES[dim, align_corners]
    u = spoilt_displacement(shape, align_corners, seed=4)
    v = spoilt_displacement(shape, align_corners)
    affine = random_affine(2, 7, dim) if with_affine else None
    options = {"padding_mode": padding_mode, "align_corners": align_corners}
    expected = reference.compose(u, v, affine, **options)
    cotangent = random_array(3, *expected.shape)
    wrt = [0, 1, 2] if with_affine else [0, 1]
    value, gradients = backend.value_and_vjp("compose", (u, v, affine), cotangent, wrt, **options)
    assert_alike(value, expected, np.float64)
    expected_gradients = reference.compose_vjp(cotangent, u, v, affine, **options)
    for k, gradient in zip(wrt, gradients, strict=True):
        assert_alike(gradient, expected_gradients[k], np.float64)


@pytest.mark.parametrize("padding_mode", PADDINGS)
def test_an_axis_of_millions_of_voxels_has_the_same_rules(
    backend: Backend, padding_mode: str
) -> None:
    """Its positions pass 2**22, from where on the kernels find them in another way."""
    size = 2**22 + 1
    image = random_array(0, 1, 1, 1, size)
    image[..., -3] = NAN
    grid = np.zeros((1, 1, 12, 2))
    position = np.array([-1, -0.5, 0, 0.5, 7, size - 5.5, size - 4, size - 3.5, size - 1, size])
    grid[0, 0, :, 0] = [*(position / (size // 2) - 1), NAN, -INFINITY]
    options = {"is_displacement": False, "padding_mode": padding_mode}
    expected = reference.interpolate(image, None, grid, **options)
    cotangent = random_array(1, *expected.shape)
    value, gradients = backend.value_and_vjp(
        "interpolate", (image, None, grid), cotangent, (0, 2), **options
    )
    assert_alike(value, expected, np.float64)
    to_image, _, to_grid = reference.interpolate_vjp(cotangent, image, None, grid, **options)
    assert_alike(gradients[0], to_image, np.float64)
    assert_alike(gradients[1], to_grid, np.float64)


def test_a_nan_voxel_reaches_the_samples_beside_it_and_no_other(backend: Backend) -> None:
    image = np.arange(6, dtype=np.float32).reshape(1, 1, 1, 6)
    image[..., 3] = NAN
    position = np.array([1.5, 2, 2.25, 3, 3.75, 4, 4.5], np.float32)
    grid = np.zeros((1, 1, 7, 2), np.float32)
    grid[..., 0] = (position - 2.5) / 3
    options = {"is_displacement": False, "align_corners": False}
    args, cotangent = (image, None, grid), np.ones((1, 1, 1, 7), np.float32)
    value = backend.call("interpolate", *args, **options)[0, 0, 0]
    assert_same(value, np.array([1.5, 2, NAN, NAN, NAN, 4, 4.5], np.float32))
    # The slope at a voxel is the one to its right.
    (to_grid,) = backend.vjp("interpolate", args, cotangent, (2,), **options)
    assert_same(to_grid[0, 0, :, 0], np.array([3, NAN, NAN, NAN, NAN, 3, 3], np.float32))
    (to_image,) = backend.vjp("interpolate", args, cotangent, (0,), **options)
    assert_same(to_image[0, 0, 0], np.array([0, 0.5, 2.25, 1.5, 2.25, 0.5], np.float32))


@pytest.mark.parametrize("padding_mode", PADDINGS)
@pytest.mark.parametrize("value", [NAN, INFINITY, -INFINITY])
@pytest.mark.parametrize("affine_last", [False, True])
def test_a_displacement_to_nowhere_does_not_reach_the_gradient_of_the_affine(
    backend: Backend, affine_last: bool, value: float, padding_mode: str
) -> None:
    """It is that of all other voxels."""
    shape = (4, 5, 6)
    image, affine = random_array(0, 1, 1, *shape), random_affine(1, 1, 3)
    u, cotangent = small_displacement(2, 1, shape), random_array(3, 1, 1, *shape)
    options = {"affine_last": affine_last, "padding_mode": padding_mode}
    silenced = cotangent.copy()
    silenced[0, 0, 1, 2, 3] = 0
    (expected,) = backend.vjp("interpolate", (image, affine, u), silenced, (1,), **options)
    u[0, 1, 2, 3] = value
    (actual,) = backend.vjp("interpolate", (image, affine, u), cotangent, (1,), **options)
    assert np.isfinite(actual).all()
    np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("padding_mode", PADDINGS)
@pytest.mark.parametrize("mode", ["bilinear", "nearest", "cubic"])
@pytest.mark.parametrize("value", [NAN, INFINITY])
def test_an_axis_of_one_voxel_ignores_any_displacement_along_it(
    backend: Backend, value: float, mode: str, padding_mode: str
) -> None:
    image, zero = random_array(0, 1, 2, 1, 5, 6), np.zeros((1, 1, 5, 6, 3))
    affine, cotangent = np.eye(3, 4)[None], random_array(1, 1, 2, 1, 5, 6)
    u = zero.copy()
    u[..., 2] = value
    for affine_last in (False, True):
        options = {"mode": mode, "padding_mode": padding_mode, "affine_last": affine_last}
        for with_affine in (None, affine):
            args, plain = (image, with_affine, u), (image, with_affine, zero)
            assert_same(backend.call("interpolate", *args, **options), image)
            wrt = (0, 2) if with_affine is None else (0, 1, 2)
            for actual, expected in zip(
                backend.vjp("interpolate", args, cotangent, wrt, **options),
                backend.vjp("interpolate", plain, cotangent, wrt, **options),
                strict=True,
            ):
                assert_same(actual, expected)


def test_a_determinant_ignores_displacements_along_an_axis_of_one_voxel(backend: Backend) -> None:
    u, spoilt = small_displacement(0, 1, (1, 5, 6)), small_displacement(0, 1, (1, 5, 6))
    spoilt[..., 2] = random_array(1, 1, 1, 5, 6) * INFINITY
    u[..., 2] = 0
    expected = backend.call("jacobian_determinant", u)
    (expected_gradient,) = backend.vjp("jacobian_determinant", (u,), expected, (0,))
    value, (gradient,) = backend.value_and_vjp("jacobian_determinant", (spoilt,), expected, (0,))
    assert_same(value, expected)
    assert_same(gradient, expected_gradient)


@pytest.mark.parametrize("name", FIELD_LOSSES)
def test_a_penalty_ignores_displacements_along_an_axis_of_one_voxel(
    backend: Backend, name: str
) -> None:
    u, spoilt = small_displacement(0, 1, (1, 5, 6)), small_displacement(0, 1, (1, 5, 6))
    spoilt[..., 2] = random_array(1, 1, 1, 5, 6) * INFINITY
    u[..., 2] = 0
    one = np.ones(())
    expected, (expected_gradient,) = backend.value_and_vjp(name, (u,), one, (0,))
    value, (gradient,) = backend.value_and_vjp(name, (spoilt,), one, (0,))
    assert_same(value, expected)
    assert_same(gradient, expected_gradient)


@pytest.mark.parametrize("dim", [2, 3])
def test_the_other_ops_spread_nan_as_the_reference_does(backend: Backend, dim: int) -> None:
    shape = SHAPES[dim, True]
    field = small_displacement(0, 2, shape)
    field[(0, *(n // 2 for n in shape), 1)] = NAN
    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
        ("affine_warp", (random_affine(1, 1, dim), field), {}),
        ("jacobian_determinant", (field,), {}),
        ("convert_displacement", (field, "normalised", "voxel"), {"target_channels": "first"}),
        ("gaussian_smooth", (field, 0.4), {"channel_last": True, "truncate": 2.0}),
        ("scaling_and_squaring", (field, 2), {}),
        *[(name, (field,), {"reduction": "none"}) for name in FIELD_LOSSES],
    ]
    for name, args, options in calls:
        expected = getattr(reference, name)(*args, **options)
        assert np.isnan(expected).any()
        assert_alike(backend.call(name, *args, **options), expected, np.float64)
