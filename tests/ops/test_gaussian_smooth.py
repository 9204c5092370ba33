"""``gaussian_smooth``: separable smoothing with a sampled, normalised Gaussian and zero padding."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import reference
import scipy.ndimage
from backends import BACKENDS, Backend
from inputs import SHAPES, assert_close, assert_same, random_array

from regkernels import _core


def check_values_and_gradient(
    backend: Backend, x: np.ndarray, sigma: Any, dtype: object, **options: Any
) -> None:
    smooth = reference.gaussian_smooth(x, sigma, **options)
    cotangent = random_array(99, *x.shape, dtype=dtype)
    value, (gradient,) = backend.value_and_vjp(
        "gaussian_smooth", (x, sigma), cotangent, (0,), **options
    )
    assert_close(value, smooth, dtype)
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


@pytest.mark.parametrize("sigma", [1.0, 1.1, 4.0])
def test_values_near_the_largest_of_their_type_stay_finite(backend: Backend, sigma: float) -> None:
    x = np.full((1, 3, 9, 40, 2), 3e38, np.float32)
    smooth = np.asarray(backend.call("gaussian_smooth", x, sigma, channel_last=True))
    expected = reference.gaussian_smooth(x.astype(np.float64), sigma, channel_last=True)
    np.testing.assert_allclose(smooth, expected, rtol=1e-5)


# One for each radius that has a kernel of its own, and others. Together with the axes below, which
# are longer than a block's tile of 32 rows and 96 columns, they lead across its edges.
SIGMAS = [0.2, 0.5, 0.6, 1.0, 1.25, 1.5, 2.0, 3.0]
FIELD, IMAGE = (1, 17, 35, 33, 3), (1, 2, 17, 35, 97)


@pytest.mark.parametrize("sigma", SIGMAS)
def test_volumes_larger_than_a_block_of_work(backend: Backend, sigma: float) -> None:
    field, image = (random_array(0, *shape, dtype=np.float32) for shape in (FIELD, IMAGE))
    check_values_and_gradient(backend, field, sigma, np.float32, channel_last=True)
    check_values_and_gradient(backend, image, sigma, np.float32)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize("sigma", [(0.5, 3.0, 1.0), (0, 1.0, 2.0), (2.0, 0.5, 0)])
def test_axes_of_their_own_sigma_in_large_volumes(
    backend: Backend, sigma: tuple[float, ...], dtype: object
) -> None:
    field = random_array(0, *FIELD, dtype=dtype)
    check_values_and_gradient(backend, field, sigma, dtype, channel_last=True)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize(
    ("shape", "sigma"), [((1, 5, 20, 18, 2), 4.0), ((1, 20, 18, 2), 4.0), ((2, 5, 6, 7, 4), 1.0)]
)
def test_wide_gaussians_and_many_channels(
    backend: Backend, shape: tuple[int, ...], sigma: float, dtype: object
) -> None:
    """Which CUDA smooths along one axis after the other."""
    x = random_array(0, *shape, dtype=dtype)
    check_values_and_gradient(backend, x, sigma, dtype, channel_last=True)


@pytest.mark.parametrize("shape", [(3, 1, 70, 5, 6), (90, 2, 5, 6), (2, 1, 300, 3)])
def test_many_small_volumes(backend: Backend, shape: tuple[int, ...]) -> None:
    """More than there are blocks, each of which takes parts of several."""
    x = random_array(0, *shape, dtype=np.float32)
    check_values_and_gradient(backend, x, 1.0, np.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("kibibytes", [99, 163])
@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_gpus_with_less_shared_memory_compute_the_same(
    dtype: object, sigma: float, kibibytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In smaller tiles: 99 KiB are those of consumer GPUs, 163 those of an A100."""
    monkeypatch.setenv("REGKERNELS_SHARED_MEMORY", str(kibibytes * 1024))
    field = random_array(0, *FIELD, dtype=dtype)
    check_values_and_gradient(BACKENDS["torch", "cuda"], field, sigma, dtype, channel_last=True)


@pytest.mark.parametrize("sigma", [(0.5, 1.0, 0.6), 0.6, 1.0])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_spreads_no_further_than_the_gaussian(
    backend: Backend, value: float, sigma: Any
) -> None:
    field = random_array(0, 1, 12, 13, 14, 3, dtype=np.float32)
    field[0, 5, 6, 7, 1] = value
    smooth = backend.call("gaussian_smooth", field, sigma, channel_last=True)
    radii = np.ceil(4 * np.broadcast_to(sigma, 3)).astype(int)
    reached = np.zeros(field.shape, bool)
    reached[(0, *(slice(c - r, c + r + 1) for c, r in zip((5, 6, 7), radii, strict=True)), 1)] = (
        True
    )
    np.testing.assert_array_equal(~np.isfinite(smooth), reached)


@pytest.mark.parametrize(
    ("dtype", "shape", "sigma", "volumes"),
    [
        ("float32", FIELD, 3.0, 0),
        ("float64", FIELD, 2.0, 0),
        ("float32", (1, 40, 50, 2), 2.0, 0),
        ("float16", FIELD, 1.0, 1),
        ("float32", FIELD, 4.0, 1),
        ("float16", FIELD, 4.0, 2),
        ("float32", (1, 9, 9, 9, 4), 1.0, 1),
        ("float32", FIELD, (9.0, 0, 0), 0),
    ],
)
def test_narrow_gaussians_need_no_memory_beside_the_result(
    dtype: str, shape: tuple[int, ...], sigma: Any, volumes: int
) -> None:
    attributes = {
        "sigma": (sigma,) if np.isscalar(sigma) else sigma,
        "truncate": 4.0,
        "channel_last": True,
    }
    outputs = _core.infer("gaussian_smooth", [(dtype, (1, *shape))], attributes, 1)
    scratch = outputs[
        [name for name, _ in _core.ops()["gaussian_smooth"]["outputs"]].index("scratch")
    ]
    assert (0 if scratch is None else np.prod(scratch[1])) == volumes * np.prod(shape)


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
    cotangent = random_array(1, *x.shape, dtype=np.float32)
    value, (gradient,) = backend.value_and_vjp("gaussian_smooth", (x, sigma), cotangent, (0,))
    assert_same(value, x)
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
    value, (gradient,) = backend.value_and_vjp("gaussian_smooth", (x, 1.0), x, (0,))
    assert_same(value, x)
    assert_same(gradient, x)
