"""``jacobian_determinant``: how a displacement changes volume, and where it folds."""

from __future__ import annotations

import numpy as np
import pytest
import reference
from backends import Backend
from inputs import SHAPES, assert_close, assert_same, random_array, small_displacement


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("shape", [(4, 5), (3, 4, 5)])
def test_determinants_have_the_reference_values_and_gradient(
    backend: Backend, shape: tuple[int, ...], align_corners: bool, dtype: object
) -> None:
    u = small_displacement(0, 2, shape, 0.3, dtype)
    options = {"align_corners": align_corners}
    expected = reference.jacobian_determinant(u, **options)
    cotangent = random_array(1, *expected.shape, dtype=dtype)
    value, (gradient,) = backend.value_and_vjp(
        "jacobian_determinant", (u,), cotangent, (0,), **options
    )
    assert_close(value, expected, dtype)
    (expected_gradient,) = reference.vjp_by_central_differences(
        lambda field: reference.jacobian_determinant(field, **options),
        (u,),
        cotangent,
        (0,),
        step=1.0,  # affine in any one number of the field: a large step is exact
    )
    assert_close(gradient, expected_gradient, dtype)


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("shape", [(1, 6), (2, 1), (1, 6, 2), (2, 2, 1), (1, 1, 1)])
def test_axes_of_one_and_two_voxels(
    backend: Backend, shape: tuple[int, ...], align_corners: bool
) -> None:
    u = random_array(0, 1, *shape, len(shape))
    options = {"align_corners": align_corners}
    expected = reference.jacobian_determinant(u, **options)
    cotangent = random_array(1, *expected.shape)
    value, (gradient,) = backend.value_and_vjp(
        "jacobian_determinant", (u,), cotangent, (0,), **options
    )
    assert_close(value, expected, np.float64)
    (expected_gradient,) = reference.vjp_by_central_differences(
        lambda field: reference.jacobian_determinant(field, **options), (u,), cotangent, (0,), 1.0
    )
    assert_close(gradient, expected_gradient, np.float64)


@pytest.mark.parametrize("dim", [2, 3])
def test_no_displacement_keeps_every_volume(backend: Backend, dim: int) -> None:
    zero = np.zeros((2, *SHAPES[dim], dim), np.float32)
    ones = np.ones((2, *SHAPES[dim]), np.float32)
    assert_same(backend.call("jacobian_determinant", zero), ones)


def test_a_linear_map_has_its_own_determinant_everywhere(backend: Backend) -> None:
    shape = (5, 6, 7)
    x = reference.normalised_coordinates(shape)
    determinant = backend.call("jacobian_determinant", (x * [0.5, -0.2, 0.1])[None])
    assert_close(determinant, np.full((1, *shape), 1.5 * 0.8 * 1.1), np.float64)


def test_a_fold_has_a_negative_determinant(backend: Backend) -> None:
    u = np.zeros((1, 3, 7, 2), np.float32)
    u[0, :, 3, 0] = -3.0  # nine voxels back, past its neighbours
    determinant = backend.call("jacobian_determinant", u)
    assert (determinant[0, :, 2] < 0).all()
    assert (determinant[0, :, 4] > 1).all()


def test_an_empty_batch_gives_an_empty_result(backend: Backend) -> None:
    u = np.zeros((0, 3, 4, 5, 3), np.float32)
    determinant = backend.call("jacobian_determinant", u)
    assert_same(determinant, np.zeros((0, 3, 4, 5), np.float32))
    (gradient,) = backend.vjp("jacobian_determinant", (u,), determinant, (0,))
    assert_same(gradient, u)
