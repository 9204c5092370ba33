"""``scaling_and_squaring``: the displacement that a stationary velocity reaches in unit time."""

from __future__ import annotations

import numpy as np
import pytest
import reference
from backends import Backend
from inputs import SHAPES, assert_close, assert_same, random_array, small_displacement


def smooth_velocity(shape: tuple[int, ...], size: float) -> np.ndarray:
    """A velocity that turns around the centre and comes to rest at the border."""
    x = reference.normalised_coordinates(shape)
    rest = np.prod(np.cos(np.pi / 2 * x), axis=-1, keepdims=True)
    turn = np.zeros_like(x)
    turn[..., 0], turn[..., 1] = -x[..., 1], x[..., 0]
    return (size * rest * turn)[None]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("num_steps", [1, 4])
def test_integrals_have_the_reference_values_and_gradient(
    backend: Backend, num_steps: int, dim: int, dtype: object
) -> None:
    velocity = small_displacement(0, 2, SHAPES[dim], 0.5, dtype)
    expected = reference.scaling_and_squaring(velocity, num_steps)
    cotangent = random_array(1, *velocity.shape, dtype=dtype)
    value, (gradient,) = backend.value_and_vjp(
        "scaling_and_squaring", (velocity, num_steps), cotangent, (0,)
    )
    assert_close(value, expected, dtype)
    expected_gradient = reference.scaling_and_squaring_vjp(cotangent, velocity, num_steps)
    assert_close(gradient, expected_gradient, dtype)


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("padding_mode", ["zeros", "border", "reflection"])
def test_every_padding_has_the_reference_values_and_gradient(
    backend: Backend, padding_mode: str, align_corners: bool
) -> None:
    velocity = small_displacement(0, 1, (4, 5, 1), 0.8)
    options = {"num_steps": 2, "padding_mode": padding_mode, "align_corners": align_corners}
    expected = reference.scaling_and_squaring(velocity, **options)
    cotangent = random_array(1, *velocity.shape)
    value, (gradient,) = backend.value_and_vjp(
        "scaling_and_squaring", (velocity,), cotangent, (0,), **options
    )
    assert_close(value, expected, np.float64)
    expected_gradient = reference.scaling_and_squaring_vjp(cotangent, velocity, **options)
    assert_close(gradient, expected_gradient, np.float64)


def test_six_steps_are_the_default(backend: Backend) -> None:
    velocity = small_displacement(0, 1, (5, 6), dtype=np.float32)
    assert_same(
        backend.call("scaling_and_squaring", velocity),
        backend.call("scaling_and_squaring", velocity, 6),
    )


def test_no_steps_return_the_velocity(backend: Backend) -> None:
    velocity = small_displacement(0, 1, (5, 6), dtype=np.float32)
    cotangent = random_array(1, *velocity.shape, dtype=np.float32)
    value, (gradient,) = backend.value_and_vjp(
        "scaling_and_squaring", (velocity, 0), cotangent, (0,)
    )
    assert_same(value, velocity)
    assert_same(gradient, cotangent)


def test_a_constant_velocity_is_a_translation_by_itself(backend: Backend) -> None:
    velocity = np.full((1, 4, 5, 6, 3), 0.375, np.float32)
    assert_same(backend.call("scaling_and_squaring", velocity), velocity)


def test_the_negative_velocity_goes_back(backend: Backend) -> None:
    velocity = smooth_velocity((40, 40), 0.3)
    there = backend.call("scaling_and_squaring", velocity)
    back = backend.call("scaling_and_squaring", -velocity)
    left_over = backend.call("compose", there, back)
    assert np.abs(there).max() > 0.05
    assert np.abs(left_over).max() < 0.02 * np.abs(there).max()


def test_a_large_smooth_velocity_does_not_fold(backend: Backend) -> None:
    velocity = smooth_velocity((24, 24, 24), 2.0)
    displacement = backend.call("scaling_and_squaring", velocity)
    assert backend.call("jacobian_determinant", displacement).min() > 0


def test_an_empty_batch_gives_an_empty_result(backend: Backend) -> None:
    velocity = np.zeros((0, 4, 5, 2), np.float32)
    value, (gradient,) = backend.value_and_vjp("scaling_and_squaring", (velocity,), velocity, (0,))
    assert_same(value, velocity)
    assert_same(gradient, velocity)
