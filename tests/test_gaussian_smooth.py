"""``gaussian_smooth``: separable smoothing with a sampled, normalised Gaussian and zero padding."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import reference
import scipy.ndimage
from backends import Backend
from inputs import SHAPES, assert_close, assert_same, random_array


def check_values_and_gradient(
    backend: Backend, x: np.ndarray, sigma: Any, dtype: object, **options: Any
) -> None:
    smooth = reference.gaussian_smooth(x, sigma, **options)
    assert_close(backend.call("gaussian_smooth", x, sigma, **options), smooth, dtype)
    cotangent = random_array(99, *x.shape, dtype=dtype)
    (gradient,) = backend.vjp("gaussian_smooth", (x, sigma), cotangent, (0,), **options)
    # The smoothing matrix is symmetric.
    assert_close(gradient, reference.gaussian_smooth(cotangent, sigma, **options), dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("channel_last", [True, False])
@pytest.mark.parametrize("dim", [2, 3])
def test_one_sigma_per_axis_smooths_each_axis_by_its_own(
    backend: Backend, dim: int, channel_last: bool, dtype: object
) -> None:
    shape = (2, *SHAPES[dim], 3) if channel_last else (2, 3, *SHAPES[dim])
    sigma = (0.7, 1.9, 0.4)[-dim:]
    x = random_array(0, *shape, dtype=dtype)
    check_values_and_gradient(backend, x, sigma, dtype, channel_last=channel_last)


@pytest.mark.parametrize("sigma", [0.3, 1, 1.25, 6.0])
@pytest.mark.parametrize("channel_last", [True, False])
def test_one_sigma_serves_all_axes(backend: Backend, channel_last: bool, sigma: float) -> None:
    """Even where the Gaussian reaches further than the volume."""
    x = random_array(0, 1, 5, 6, 7, 2)
    check_values_and_gradient(backend, x, sigma, np.float64, channel_last=channel_last)


@pytest.mark.parametrize("truncate", [0.5, 1.0, 2.7, 4.0])
def test_truncate_sets_the_radius_in_sigmas(backend: Backend, truncate: float) -> None:
    impulse = np.zeros((1, 1, 31, 31))
    impulse[0, 0, 15, 15] = 1
    sigma = 1.5
    smooth = backend.call("gaussian_smooth", impulse, sigma, truncate=truncate)
    radius = int(np.ceil(truncate * sigma))
    assert (smooth[0, 0, 15] > 0).sum() == 2 * radius + 1
    check_values_and_gradient(backend, impulse, sigma, np.float64, truncate=truncate)


@pytest.mark.parametrize("sigma", [0, 0.0, (0, 0.0, 0)])
def test_a_sigma_of_zero_is_the_identity_bit_for_bit(backend: Backend, sigma: Any) -> None:
    x = random_array(0, 2, 1, 5, 6, 7, dtype=np.float32)
    assert_same(backend.call("gaussian_smooth", x, sigma), x)
    cotangent = random_array(1, *x.shape, dtype=np.float32)
    (gradient,) = backend.vjp("gaussian_smooth", (x, sigma), cotangent, (0,))
    assert_same(gradient, cotangent)


def test_a_sigma_of_zero_leaves_its_axis_alone(backend: Backend) -> None:
    x = random_array(0, 1, 2, 5, 6, 7)
    check_values_and_gradient(backend, x, (1.0, 0, 0.6), np.float64)


@pytest.mark.parametrize("shape", [(1, 6), (2, 1), (1, 1, 1), (1, 6, 2)])
def test_axes_of_one_and_two_voxels(backend: Backend, shape: tuple[int, ...]) -> None:
    check_values_and_gradient(backend, random_array(0, 1, 2, *shape), 1.1, np.float64)


def test_it_is_scipys_gaussian_filter_with_zeros_outside(backend: Backend) -> None:
    x, sigma = random_array(0, 1, 1, 9, 8, 7), 1.25
    expected = scipy.ndimage.gaussian_filter(x[0, 0], sigma, mode="constant", radius=5)
    assert_close(backend.call("gaussian_smooth", x, sigma)[0, 0], expected, np.float64)


def test_a_constant_stays_constant_away_from_the_border(backend: Backend) -> None:
    x = np.full((1, 1, 20, 20), 2.5)
    smooth = backend.call("gaussian_smooth", x, 1.0)
    assert_close(smooth[..., 4:-4, 4:-4], x[..., 4:-4, 4:-4], np.float64)
    assert (smooth[..., 0, :] < 2).all()


def test_an_empty_batch_gives_an_empty_result(backend: Backend) -> None:
    x = np.zeros((0, 3, 4, 5), np.float32)
    assert_same(backend.call("gaussian_smooth", x, 1.0), x)
    (gradient,) = backend.vjp("gaussian_smooth", (x, 1.0), x, (0,))
    assert_same(gradient, x)
