"""``lncc_loss``: local normalised cross-correlation over a window about every voxel."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import torch
from backends import BACKENDS, Backend
from inputs import HALVES, SHAPES, assert_close, assert_same, random_array
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from scipy.ndimage import gaussian_filter

import jaxreg
import torchreg

Array = np.ndarray

DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
REDUCTIONS = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
WINDOWS = pytest.mark.parametrize("window", ["rectangular", "gaussian"])


def images(
    *shape: int, batches: tuple[int, int] = (2, 2), channels: int = 1, dtype: object = np.float64
) -> tuple[Array, Array]:
    """A pair that has something to do with each other."""
    pred = random_array(0, batches[0], channels, *shape)
    target = 0.5 * pred[: batches[1]] + random_array(1, batches[1], channels, *shape)
    return pred.astype(dtype), target.astype(dtype)


def check(backend: Backend, pred: Array, target: Array, **options: Any) -> None:
    """Values and gradients: to both images at once and, but for compilation, to each alone."""
    dtype = pred.dtype
    loss = reference.lncc_loss(pred, target, **options)
    cotangent = random_array(9, *loss.shape, dtype=dtype)
    expected = reference.lncc_loss_vjp(cotangent, pred, target, **options)
    for wrt in [(0, 1), (0,), (1,)] if backend.framework == "torch" else [(0, 1)]:
        value, gradients = backend.value_and_vjp(
            "lncc_loss", (pred, target), cotangent, wrt, **options
        )
        assert_close(value, loss, dtype)
        for k, gradient in zip(wrt, gradients, strict=True):
            # A mean over many voxels has small gradients: they are measured by the largest.
            scale = np.abs(expected[k]).max()
            assert_close((gradient / scale).astype(dtype), expected[k] / scale, dtype)


# ------------------------------------------------------------------------------ values, gradients


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kernel_size", [3, 5, 7, 9, 11, 31])
@WINDOWS
@pytest.mark.parametrize("dim", [2, 3])
def test_windows_of_any_size(
    backend: Backend, dim: int, window: str, kernel_size: int, dtype: object
) -> None:
    """Most of them larger than the volume."""
    pred, target = images(*SHAPES[dim], dtype=dtype)
    check(backend, pred, target, window=window, kernel_size=kernel_size)


@pytest.mark.parametrize("kernel_size", [3, 7, 9, 11])
@pytest.mark.parametrize("shape", [(3, 37, 70), (42, 5, 4), (75, 41)])
def test_volumes_larger_than_a_block_of_work(
    backend: Backend, shape: tuple[int, ...], kernel_size: int
) -> None:
    """Whose tiles, slabs and columns meet inside the volume."""
    pred, target = images(*shape, batches=(1, 1), dtype=np.float32)
    check(backend, pred, target, kernel_size=kernel_size)


@pytest.mark.gpu
@pytest.mark.parametrize("bytes_per_block", [99 * 1024, 163 * 1024])
@pytest.mark.parametrize(
    ("dtype", "kernel_size"),
    [(np.float32, 3), (np.float32, 5), (np.float32, 7), (np.float32, 9), (np.float64, 31)],
)
@WINDOWS
@pytest.mark.parametrize("shape", [(11, 37, 35), (37, 35)])
def test_gpus_with_less_shared_memory_compute_the_same(
    shape: tuple[int, ...],
    window: str,
    dtype: object,
    kernel_size: int,
    bytes_per_block: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In smaller tiles: 99 KiB are those of consumer GPUs, 163 those of an A100."""
    monkeypatch.setenv("REGKERNELS_SHARED_MEMORY", str(bytes_per_block))
    pred, target = images(*shape, batches=(1, 1), dtype=dtype)
    check(BACKENDS["torch", "cuda"], pred, target, window=window, kernel_size=kernel_size)


@pytest.mark.parametrize("sigma", [None, 0.5, 2, 40.0])
def test_sigma_is_a_third_of_the_window_unless_given(backend: Backend, sigma: Any) -> None:
    check(backend, *images(5, 6, 7), window="gaussian", kernel_size=5, sigma=sigma)


@pytest.mark.parametrize("shape", [(1, 6), (1, 1, 5), (6, 1, 1), (1, 1), (1, 1, 1)])
def test_axes_of_one_voxel(backend: Backend, shape: tuple[int, ...]) -> None:
    check(backend, *images(*shape), kernel_size=3, smooth_dr=2.0)


@REDUCTIONS
@pytest.mark.parametrize("batches", [(3, 3), (3, 1), (1, 3), (1, 1)])
def test_either_image_may_serve_all_items(
    backend: Backend, batches: tuple[int, int], reduction: str
) -> None:
    """Its gradient is then the sum over them."""
    pred = random_array(0, batches[0], 3, 4, 5)
    target = random_array(1, batches[1], 3, 4, 5)
    check(backend, pred, target, kernel_size=3, reduction=reduction)


@pytest.mark.parametrize("kernel_size", [5, 11])
def test_channels_are_windowed_by_themselves(backend: Backend, kernel_size: int) -> None:
    pred, target = images(4, 5, 6, channels=3)
    check(backend, pred, target, kernel_size=kernel_size)
    whole = backend.call("lncc_loss", pred, target, kernel_size=kernel_size, reduction="none")
    for c in range(3):
        part = [x[:, c : c + 1] for x in (pred, target)]
        one = backend.call("lncc_loss", *part, kernel_size=kernel_size, reduction="none")
        assert_close(one, whole[:, c : c + 1], np.float64)


@REDUCTIONS
@pytest.mark.parametrize("smooth_nr", [0.0, 0.3])
@pytest.mark.parametrize("smooth_dr", [1e-18, 1.7, 100.0])
def test_smoothing_constants(
    backend: Backend, smooth_dr: float, smooth_nr: float, reduction: str
) -> None:
    """Variances below ``smooth_dr``, which it replaces: none, some and all."""
    options = {"smooth_nr": smooth_nr, "smooth_dr": smooth_dr, "reduction": reduction}
    check(backend, *images(5, 6), kernel_size=3, **options)


def test_an_image_correlates_with_itself_and_its_negative(backend: Backend) -> None:
    image = random_array(0, 1, 1, 5, 6, 7)
    for other in (image, -image, 3 * image):
        value = backend.call("lncc_loss", image, other, reduction="none")
        assert_close(value, np.full_like(image, -1), np.float64)


AXES = [(3, 5, 9), (9, 1, 3), (1, 1, 7), (5, 11, 3), (31, 3, 1)]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("window", ["rectangular", "gaussian", "triangular"])
@pytest.mark.parametrize("sizes", [*AXES, (3, 7), (9, 1), (1, 13)])
def test_a_window_may_have_a_size_for_each_axis(
    backend: Backend, sizes: tuple[int, ...], window: str, dtype: object
) -> None:
    """In the order of the axes, z, y, x."""
    pred, target = images(*(9, 10, 37)[-len(sizes) :], dtype=dtype)
    check(backend, pred, target, kernel_size=sizes, window=window)


def test_equal_sizes_are_one_size(backend: Backend) -> None:
    pred, target = images(8, 9, 10, dtype=np.float32)
    expected = backend.call("lncc_loss", pred, target, kernel_size=5)
    assert_same(backend.call("lncc_loss", pred, target, kernel_size=(5, 5, 5)), expected)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kernel_size", [5, 7, 9, 13])
@pytest.mark.parametrize("dim", [2, 3])
def test_triangular_windows(backend: Backend, dim: int, kernel_size: int, dtype: object) -> None:
    pred, target = images(*(7, 9, 20)[-dim:], dtype=dtype)
    check(backend, pred, target, kernel_size=kernel_size, window="triangular")


def test_a_triangle_of_three_is_a_voxel_which_has_no_variance(backend: Backend) -> None:
    """Two of its weights are 0, in MONAI, too."""
    pred, target = images(7, 9, dtype=np.float32)
    options = {"kernel_size": 3, "window": "triangular"}
    assert backend.call("lncc_loss", pred, target, **options) == 0
    for gradient in backend.vjp(
        "lncc_loss", (pred, target), np.ones((), np.float32), (0, 1), **options
    ):
        assert_same(gradient, np.zeros_like(gradient))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    "options",
    [
        {"smooth_product": 1e-5, "smooth_dr": 1e-18},
        {"smooth_product": 30.0},
        {"smooth_product": 2.0, "smooth_dr": 5.0, "smooth_nr": 0.3},
        {"smooth_product": 2.0, "common_variance": 0.2},
        {"smooth_product": 2.0, "kernel_size": (3, 5, 9), "window": "gaussian"},
        {"smooth_product": 2.0, "reduction": "none"},
        {"smooth_product": 2.0, "kernel_size": 11, "reduction": "sum"},
    ],
)
def test_a_number_may_be_added_to_the_product_of_the_variances(
    backend: Backend, options: dict[str, Any], dtype: object
) -> None:
    pred, target = images(8, 9, 20, dtype=dtype)
    check(backend, pred, target, **options)
    mask = abs(random_array(5, 2, 1, 8, 9, 20)).astype(dtype)
    check(backend, pred, target, mask=mask, **options)


def test_constant_windows_have_no_gradient_with_a_number_beside_the_product(
    backend: Backend,
) -> None:
    image = random_array(0, 1, 1, 9, 20, dtype=np.float32)
    image[..., 10:] = 0.25
    options = {"smooth_product": 1e-5, "smooth_dr": 1e-18, "kernel_size": 3}
    flat = np.full_like(image, 3.0)
    one = np.ones((), np.float32)
    for pair in ((image, flat), (flat, image), (flat, flat)):
        inner = backend.call("lncc_loss", *pair, reduction="none", **options)[..., 1:-1, 1:-1]
        assert_same(inner, np.zeros_like(inner))
    gradients = backend.vjp("lncc_loss", (image, image), one, (0, 1), **options)
    for gradient in gradients:
        assert np.isfinite(gradient).all()
        assert_same(gradient[..., 2:-2, 13:-2], np.zeros_like(gradient[..., 2:-2, 13:-2]))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((4, 5, 5), "an odd number from 1 to 31"),
        ((5, 5), "one number, or one for each of 3 axes"),
        ((1, 1, 1), "3 or more along some axis"),
        ((5, 33, 5), "an odd number from 1 to 31"),
        (1, "an odd number from 3 to 31"),
    ],
)
def test_sizes_that_are_none_are_refused(backend: Backend, sizes: Any, message: str) -> None:
    pred, target = images(5, 6, 7, dtype=np.float32)
    with pytest.raises(ValueError, match=f"kernel_size: expected {message}"):
        backend.call("lncc_loss", pred, target, kernel_size=sizes)


@pytest.mark.parametrize("window", ["rectangular", "gaussian", "triangular"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_it_is_the_loss_of_monai(backend: Backend, reduction: str, window: str) -> None:
    """Whose Gaussian weights are those of float32."""
    from monai.losses import LocalNormalizedCrossCorrelationLoss

    pred, target = images(6, 7, 8, channels=2)
    options = {"smooth_nr": 0.1, "smooth_dr": 1.0, "reduction": reduction}
    theirs = LocalNormalizedCrossCorrelationLoss(3, 5, window, **options)
    leaves = [torch.tensor(x, requires_grad=True) for x in (pred, target)]
    value = theirs(*leaves)
    cotangent = random_array(9, *value.shape)
    gradients = torch.autograd.grad(value, leaves, torch.tensor(cotangent))

    options |= {"kernel_size": 5, "window": window}
    ours = backend.call("lncc_loss", pred, target, **options)
    rtol = 1e-10 if window == "rectangular" else 1e-6
    np.testing.assert_allclose(ours, value.detach().numpy(), rtol=rtol)
    own_gradients = backend.vjp("lncc_loss", (pred, target), cotangent, (0, 1), **options)
    for own, gradient in zip(own_gradients, gradients, strict=True):
        atol = rtol * np.abs(own).max()
        np.testing.assert_allclose(own, gradient.numpy(), rtol=0, atol=atol)


# ------------------------------------------------------------------------------------------ masks

MASKS = {
    "for each item": (3, 2, 4, 5),
    "for all items": (1, 2, 4, 5),
    "for all channels": (3, 1, 4, 5),
    "for all rows": (1, 1, 1, 5),
    "for everything": (1, 1, 1, 1),
}


@REDUCTIONS
@pytest.mark.parametrize("shape", MASKS.values(), ids=MASKS.keys())
def test_a_mask_weighs_the_correlations(
    backend: Backend, shape: tuple[int, ...], reduction: str
) -> None:
    mask = abs(random_array(5, *shape))
    pred, target = images(4, 5, batches=(3, 1), channels=2)
    check(backend, pred, target, kernel_size=3, mask=mask, reduction=reduction)


def test_a_mask_may_have_more_items_than_the_images(backend: Backend) -> None:
    mask = abs(random_array(5, 3, 1, 4, 5))
    for reduction in ("mean", "none"):
        pred, target = images(4, 5, batches=(1, 1))
        check(backend, pred, target, kernel_size=3, mask=mask, reduction=reduction)


@pytest.mark.parametrize("dtype", [bool, np.float16, np.float32])
@pytest.mark.parametrize("kernel_size", [3, 11])
def test_a_mask_of_zeros_and_ones_selects(
    backend: Backend, kernel_size: int, dtype: object
) -> None:
    """Correlations, that is: voxels outside the mask count in windows about those inside."""
    pred, target = images(5, 6, 7, dtype=np.float32)
    mask = random_array(5, 2, 1, 5, 6, 7) > 0.3
    given = mask.astype(dtype)
    check(backend, pred, target, kernel_size=kernel_size, mask=given)
    each = reference.lncc_loss(pred, target, kernel_size=kernel_size, reduction="none")
    mean = backend.call("lncc_loss", pred, target, kernel_size=kernel_size, mask=given)
    assert_close(mean, np.mean(each[mask]), np.float32)


@pytest.mark.parametrize("kernel_size", [3, 11])
@REDUCTIONS
def test_an_empty_mask_leaves_nothing(backend: Backend, reduction: str, kernel_size: int) -> None:
    pred, target = images(4, 5, 6)
    options = {"kernel_size": kernel_size, "mask": np.zeros(pred.shape), "reduction": reduction}
    value = backend.call("lncc_loss", pred, target, **options)
    np.testing.assert_array_equal(value, np.zeros(pred.shape if reduction == "none" else ()))
    for gradient in backend.vjp(
        "lncc_loss", (pred, target), np.ones_like(value), (0, 1), **options
    ):
        np.testing.assert_array_equal(gradient, np.zeros(pred.shape))


def test_a_mask_that_needs_a_gradient_is_refused() -> None:
    """In PyTorch; in JAX, too."""
    pred, target = images(4, 5)
    mask = np.ones((1, 1, 4, 5))
    tensors = [torch.tensor(x) for x in (pred, target)]
    with pytest.raises(ValueError, match=r"lncc_loss: mask: .*requires no gradient"):
        torchreg.lncc_loss(*tensors, mask=torch.tensor(mask, requires_grad=True))
    with pytest.raises(TypeError, match=r"lncc_loss: mask: .*stop_gradient"):
        jax.grad(lambda m: jaxreg.lncc_loss(pred, target, mask=m))(jnp.asarray(mask))


# ----------------------------------------------------------------------------------------- dtypes


@pytest.mark.parametrize("dtype", HALVES, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("other", [np.float32, np.float64])
def test_a_loss_is_computed_and_returned_in_full_precision(
    backend: Backend, dtype: object, other: object
) -> None:
    """A gradient has the dtype of its image."""
    pred, target = images(4, 5, 6)
    pred, target = pred.astype(dtype), target.astype(other)
    value = reference.lncc_loss(pred, target, kernel_size=5)
    assert_close(backend.call("lncc_loss", pred, target, kernel_size=5), value, other)
    cotangent = np.full((), 100, other)
    gradients = backend.vjp("lncc_loss", (pred, target), cotangent, (0, 1), kernel_size=5)
    expected = reference.lncc_loss_vjp(cotangent, pred, target, kernel_size=5)
    assert_close(gradients[0], expected[0], dtype)
    assert_close(gradients[1], expected[1], other)


# --------------------------------------------------------------------- images that are hard to sum


def check_roughly(
    backend: Backend, pred: Array, target: Array, tolerance: float = 1e-4, **options: Any
) -> None:
    """The map and the gradients in float32, to within a share of the largest."""
    expected = reference.lncc_loss(pred, target, **options, reduction="none")
    value = backend.call("lncc_loss", pred, target, **options, reduction="none")
    assert np.abs(value - expected).max() < tolerance * np.abs(expected).max()
    cotangent = np.ones((), np.float32)
    expected_gradients = reference.lncc_loss_vjp(cotangent, pred, target, **options)
    gradients = backend.vjp("lncc_loss", (pred, target), cotangent, (0, 1), **options)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        assert np.abs(gradient - wanted).max() < tolerance * np.abs(wanted).max()


@pytest.mark.parametrize("kernel_size", [7, 11])
@pytest.mark.parametrize("offset", [10.0, -1000.0])
@pytest.mark.parametrize("window", ["rectangular", "gaussian"])
def test_an_offset_costs_no_precision(
    backend: Backend, window: str, offset: float, kernel_size: int
) -> None:
    """Of a thousand local deviations; the border, where images end in zeros, included."""
    pred, target = (
        (offset * x.std() + x).astype(np.float32) for x in images(12, 13, 14, batches=(1, 1))
    )
    check_roughly(backend, pred, target, kernel_size=kernel_size, window=window)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kernel_size", [3, 11])
@pytest.mark.parametrize("level", [0.0, 1.0, 0.1, 1234.567])
def test_constant_images_have_no_correlation_inside(
    backend: Backend, level: float, kernel_size: int, dtype: object
) -> None:
    """And no gradient where no window reaches the border, whatever the rounding of the level."""
    constant = np.full((1, 1, 25, 25), level, dtype)
    varying = random_array(0, 1, 1, 25, 25, dtype=dtype)
    reach = kernel_size // 2
    inside = (..., slice(reach, -reach), slice(reach, -reach))
    untouched = (..., slice(2 * reach, -2 * reach), slice(2 * reach, -2 * reach))
    for pair in ((constant, varying), (varying, constant), (constant, constant)):
        value = backend.call("lncc_loss", *pair, kernel_size=kernel_size, reduction="none")
        assert np.isfinite(value).all()
        np.testing.assert_array_equal(value[inside], 0)
        cotangent = np.ones_like(value)
        gradients = backend.vjp(
            "lncc_loss", pair, cotangent, (0, 1), kernel_size=kernel_size, reduction="none"
        )
        for gradient in gradients:
            assert np.isfinite(gradient).all()
            np.testing.assert_array_equal(gradient[untouched], 0)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kernel_size", [3, 5, 11])
@pytest.mark.parametrize("both_flat", [0.0, 0.25, 1.0])
def test_windows_that_are_flat_in_both_images_correlate_as_told(
    backend: Backend, both_flat: float, kernel_size: int, dtype: object
) -> None:
    """Those that are flat in one image do not correlate, whatever is told."""
    pred, target = images(9, 26, 27, batches=(1, 1), dtype=dtype)
    pred[..., :14] = 0
    target[..., 3:, :] = 0
    options = {"kernel_size": kernel_size, "both_flat": both_flat}
    check(backend, pred, target, reduction="none", **options)
    check(backend, pred, target, **options)
    value = backend.call("lncc_loss", pred, target, reduction="none", **options)
    reach = kernel_size // 2
    both = (..., slice(3 + reach, None), slice(None, 14 - reach))
    one = (..., slice(0, 3), slice(None, 14 - reach))
    np.testing.assert_array_equal(value[both], -both_flat)
    np.testing.assert_array_equal(value[one], 0)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kernel_size", [3, 7, 11])
@WINDOWS
@pytest.mark.parametrize("dim", [2, 3])
def test_images_may_have_a_variance_in_common(
    backend: Backend, dim: int, window: str, kernel_size: int, dtype: object
) -> None:
    """Also where one of them, or both, are flat."""
    shape = (9, 26, 27)[-dim:]
    pred, target = images(*shape, batches=(1, 1), dtype=dtype)
    pred[..., :14] = 0.5
    target[..., 3:, :] = 0
    options = {"window": window, "kernel_size": kernel_size, "common_variance": 0.3}
    check(backend, pred, target, reduction="none", **options)
    check(backend, pred, target, **options)


def test_windows_with_less_contrast_than_what_is_common_are_alike(backend: Backend) -> None:
    pred, target = (random_array(k, 1, 1, 12, 13) for k in (0, 1))
    faint = 1e-3 * pred, 1e-3 * target
    options = {"kernel_size": 5, "common_variance": 1.0}
    assert backend.call("lncc_loss", *faint, **options) < -0.99999
    # What stands out in one image alone is not.
    assert backend.call("lncc_loss", 1e3 * pred, faint[1], **options) > -1e-3


@pytest.mark.parametrize("common_variance", [0.0, 0.1, 10.0])
def test_an_image_is_like_itself_whatever_is_common(
    backend: Backend, common_variance: float
) -> None:
    """And nothing pulls at it: its gradient is zero."""
    image = random_array(0, 1, 1, 9, 10, 11)
    options = {"kernel_size": 5, "common_variance": common_variance}
    value, gradients = backend.value_and_vjp(
        "lncc_loss", (image, image), np.ones(()), (0,), **options
    )
    np.testing.assert_allclose(value, -1, rtol=1e-12)
    np.testing.assert_allclose(gradients[0], 0, atol=1e-14)


def test_an_image_with_an_empty_background_is_like_itself_everywhere(backend: Backend) -> None:
    image, _ = images(12, 13, 14, batches=(1, 1), dtype=np.float32)
    image[..., :7] = 0
    loss = backend.call("lncc_loss", image, image, kernel_size=5, both_flat=1.0)
    np.testing.assert_allclose(loss, -1, rtol=1e-6)


def test_constant_regions_do_not_disturb_the_others(backend: Backend) -> None:
    """As the background of a brain is.

    Where most of a window is constant, rounding counts for more the further the pivot is off.
    """
    pred, target = images(12, 13, 14, batches=(1, 1), dtype=np.float32)
    pred[..., :7], target[..., :7, :] = 0.1, 0
    check_roughly(backend, pred, target, kernel_size=5, tolerance=1e-5)


@pytest.mark.parametrize("kernel_size", [3, 11])
@pytest.mark.parametrize("scale", [1e-6, 1e6, 1e12, 1e17])
def test_numbers_of_any_size_correlate_alike(
    backend: Backend, scale: float, kernel_size: int
) -> None:
    """Except where the variance of small ones is below ``smooth_dr``."""
    pred, target = (np.float32(scale) * x for x in images(5, 6, 7, dtype=np.float32))
    check(backend, pred, target, kernel_size=kernel_size, smooth_dr=1e-14)


@pytest.mark.parametrize("kernel_size", [3, 11])
@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-18, 1e18, 1e19, 1e20, 1e30, 1e35])
def test_finite_numbers_give_no_nan(backend: Backend, scale: float, kernel_size: int) -> None:
    """Windows whose sums of squares are beyond the range of float32 count as constant."""
    pred, target = (
        np.float32(scale) * random_array(seed, 2, 1, 5, 6, 7, dtype=np.float32) for seed in range(2)
    )
    for pair in ((pred, target), (pred, target / np.float32(scale))):
        value = backend.call("lncc_loss", *pair, kernel_size=kernel_size, reduction="none")
        gradients = backend.vjp(
            "lncc_loss",
            pair,
            np.ones_like(value),
            (0, 1),
            kernel_size=kernel_size,
            reduction="none",
        )
        for array in (value, *gradients):
            assert np.isfinite(array).all()
        if scale < 1e-17 or scale > 1e21:
            np.testing.assert_allclose(value, np.zeros_like(value), atol=1e-6)


@pytest.mark.parametrize("smooth_nr", [0.0, 1.0])
@pytest.mark.parametrize("kernel_size", [3, 11])
@pytest.mark.parametrize(("window", "sigma"), [("rectangular", None), ("gaussian", 0.1)])
def test_the_largest_numbers_give_no_nan(
    backend: Backend, window: str, sigma: float | None, kernel_size: int, smooth_nr: float
) -> None:
    """Of either sign, in both images or in one, everywhere or here and there."""
    largest = np.finfo(np.float32).max
    noise = random_array(0, 1, 1, 5, 6, 7, dtype=np.float32)
    alternating = np.where(noise > 0, largest, -largest)
    mostly_one_sign = np.where(noise > -1, largest, -largest)
    sparse = np.where(noise > 1, -largest, noise)
    options: dict[str, Any] = {"kernel_size": kernel_size, "window": window, "sigma": sigma}
    options["smooth_nr"] = smooth_nr
    for pred, target in (
        (alternating, mostly_one_sign),
        (mostly_one_sign, noise),
        (noise, sparse),
        (sparse, alternating),
    ):
        value = backend.call("lncc_loss", pred, target, reduction="none", **options)
        cotangent = np.ones_like(value)
        gradients = backend.vjp(
            "lncc_loss", (pred, target), cotangent, (0, 1), reduction="none", **options
        )
        for array in (value, *gradients):
            assert np.isfinite(array).all()


@pytest.mark.parametrize("kernel_size", [3, 11])
@pytest.mark.parametrize("dim", [2, 3])
def test_a_voxel_that_is_no_number_spoils_the_windows_that_hold_it(
    backend: Backend, dim: int, kernel_size: int
) -> None:
    """And the gradients of the voxels in these."""
    shape = (25, 26) if dim == 2 else (24, 25, 26)
    pred, target = images(*shape, batches=(1, 1), dtype=np.float32)
    at = tuple(n // 2 for n in shape)
    pred[(0, 0, *at)] = np.nan
    distance = np.max(np.abs(np.indices(shape) - np.reshape(at, (-1, *[1] * dim))), axis=0)
    options = {"kernel_size": kernel_size, "reduction": "none"}
    reach = kernel_size // 2
    value = backend.call("lncc_loss", pred, target, **options)
    np.testing.assert_array_equal(np.isnan(value[0, 0]), distance <= reach)
    gradients = backend.vjp("lncc_loss", (pred, target), np.ones_like(value), (0, 1), **options)
    for gradient in gradients:
        np.testing.assert_array_equal(np.isnan(gradient[0, 0]), distance <= 2 * reach)


def test_an_empty_batch_has_an_empty_map_and_no_sum(backend: Backend) -> None:
    empty = np.zeros((0, 2, 4, 5), np.float32)
    assert_same(backend.call("lncc_loss", empty, empty, reduction="none"), empty)
    assert_same(backend.call("lncc_loss", empty, empty, reduction="sum"), np.zeros((), np.float32))
    one = np.ones((1, 2, 4, 5), np.float32)
    cotangent = np.ones((), np.float32)
    gradients = backend.vjp("lncc_loss", (empty, one), cotangent, (0, 1), reduction="sum")
    assert_same(gradients[0], empty)
    assert_same(gradients[1], np.zeros_like(one))


# --------------------------------------------------------------------------------------- the calls


@pytest.mark.parametrize("kernel_size", [5, 11])
@REDUCTIONS
def test_the_same_bits_come_out_every_time(
    backend: Backend, reduction: str, kernel_size: int
) -> None:
    """A target for all items included, whose gradient is a sum over them."""
    pred, target = images(20, 21, 22, batches=(3, 1), dtype=np.float32)
    options = {"kernel_size": kernel_size, "reduction": reduction}

    def results() -> tuple[Array, ...]:
        value = backend.call("lncc_loss", pred, target, **options)
        cotangent = np.ones_like(value)
        gradients = backend.vjp("lncc_loss", (pred, target), cotangent, (0, 1), **options)
        return value, *gradients

    first = results()
    for _ in range(2):
        for again, once in zip(results(), first, strict=True):
            assert_same(again, once)


@DEVICES
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("chosen", [0, 1])
def test_only_the_gradient_that_is_asked_for_is_kept(
    chosen: int, reduction: str, device: str
) -> None:
    """A scalar loss holds that gradient alone for its backward pass, and no image."""
    operands = [torch.tensor(x, device=device) for x in images(4, 5, 6)]
    operands[chosen].requires_grad_()
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        value = torchreg.lncc_loss(*operands, kernel_size=3, reduction=reduction)
    value.sum().backward()
    assert operands[1 - chosen].grad is None
    held = [x for x in saved if x.data_ptr() not in [op.data_ptr() for op in operands]]
    assert [x.shape for x in held] == ([operands[0].shape] if reduction == "mean" else [])


def test_no_gradient_is_computed_for_a_value_alone() -> None:
    pred, target = (torch.tensor(x, requires_grad=True) for x in images(4, 5))
    with torch.no_grad():
        assert not torchreg.lncc_loss(pred, target).requires_grad


@pytest.mark.parametrize("kernel_size", [3, 11])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_transforms_of_jax_agree_with_the_reference(reduction: str, kernel_size: int) -> None:
    """``jit`` of ``shard_map``, ``scan`` and ``vmap`` of ``value_and_grad``, masks included."""
    mask = abs(random_array(7, 4, 1, 1, 4, 5))
    pred, target = (x[:, None] for x in images(4, 5, batches=(4, 4)))
    options: dict[str, Any] = {"kernel_size": kernel_size, "reduction": reduction}

    def loss(pred: Any, target: Any, mask: Any) -> Any:
        return jnp.sum(jaxreg.lncc_loss(pred, target, mask=mask, **options))

    each = jax.value_and_grad(loss, (0, 1))

    def scanned(*operands: Any) -> Any:
        return jax.lax.scan(lambda carry, x: (carry, each(*x)), 0, operands)[1]

    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        mesh = Mesh(np.array(jax.devices("cpu")[:2]), ("batch",))
        spread = jax.shard_map(jax.vmap(each), mesh=mesh, in_specs=P("batch"), out_specs=P("batch"))
        operands = [jnp.asarray(x) for x in (pred, target, mask)]
        for transformed in (jax.vmap(each), scanned, spread):
            value, gradients = jax.jit(transformed)(*operands)
            for i in range(4):
                here = {**options, "mask": mask[i]}
                expected = np.sum(reference.lncc_loss(pred[i], target[i], **here))
                assert_close(np.asarray(value[i]), expected, np.float64)
                slopes = reference.lncc_loss_vjp(np.ones(()), pred[i], target[i], **here)
                for gradient, slope in zip(gradients, slopes, strict=True):
                    assert_close(np.asarray(gradient[i]), slope, np.float64)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_transforms_of_torch_take_a_mask(reduction: str) -> None:
    """``vmap`` of ``grad``, and ``torch.compile`` of the call."""
    mask = torch.tensor(abs(random_array(7, 3, 1, 1, 4, 5)))
    pred, target = (torch.tensor(x[:, None]) for x in images(4, 5, batches=(3, 3)))
    options = {"kernel_size": 3, "reduction": reduction}

    def loss(pred: torch.Tensor, target: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return torchreg.lncc_loss(pred, target, mask=mask, **options).sum()

    slopes = torch.func.vmap(torch.func.grad(loss, (0, 1)))(pred, target, mask)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for i in range(3):
        leaves = [x[i].clone().requires_grad_() for x in (pred, target)]
        value = compiled(*leaves, mask[i])
        expected = loss(*leaves, mask[i])
        assert torch.equal(value, expected)
        gradients = torch.autograd.grad(expected, leaves)
        for k, of_compiled in enumerate(torch.autograd.grad(value, leaves)):
            assert torch.equal(of_compiled, gradients[k])
            assert_close(slopes[k][i].numpy(), gradients[k].numpy(), np.float64)


# -------------------------------------------------------------------------------------- LNCCLoss

OPTIONS: list[dict[str, Any]] = [
    {},
    {"kernel_size": 9, "window": "gaussian", "sigma": 2.0, "reduction": "sum"},
    {"kernel_size": 3, "smooth_nr": 0.1, "smooth_dr": 0.5, "reduction": "none"},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_the_module_is_the_function_and_stays_so_when_copied(options: dict[str, Any]) -> None:
    module = torchreg.LNCCLoss(**options)
    pred, target = (torch.tensor(x) for x in images(6, 7))
    mask = torch.rand(1, 1, 6, 7)
    for other in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(pred, target), torchreg.lncc_loss(pred, target, **options))
        masked = torchreg.lncc_loss(pred, target, mask=mask, **options)
        assert torch.equal(other(pred, target, mask), masked)


def test_the_module_shows_its_options_and_has_no_state() -> None:
    module = torchreg.LNCCLoss(9, window="gaussian")
    assert repr(module) == (
        "LNCCLoss(kernel_size=9, window='gaussian', sigma=None, smooth_nr=0.0, "
        "smooth_dr=1e-05, smooth_product=0.0, common_variance=0.0, both_flat=None, "
        "reduction='mean')"
    )
    assert not module.state_dict()


def test_the_loss_falls_along_its_negative_gradient() -> None:
    pred, target = (torch.tensor(x) for x in images(8, 9, 10, batches=(1, 1)))
    pred.requires_grad_()
    loss = torchreg.LNCCLoss(5)
    optimiser = torch.optim.Adam([pred], 0.05)
    values = []
    for _ in range(30):
        optimiser.zero_grad()
        value = loss(pred, target)
        value.backward()
        optimiser.step()
        values.append(value.item())
    assert values[-1] < values[0] - 0.3


def faded(seed: int, shape: tuple[int, ...], faint: float) -> np.ndarray:
    """An object whose edge fades into what is exactly 0, or into faint values before that."""
    axes = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
    radius = np.sqrt(sum(x**2 for x in axes))
    texture = gaussian_filter(np.random.default_rng(seed).standard_normal(shape), 2)
    texture /= texture.std()
    around = np.where(radius < 0.9, faint * (3 + texture), 0)
    image = np.where(radius < 0.6, 1 + 0.2 * texture, around)
    if faint == 0:
        image = gaussian_filter(image, 1.5, truncate=3)
    return image[None, None].astype(np.float32)


@pytest.mark.parametrize("faint", [0.0, 1e-3])
@pytest.mark.parametrize("kernel_size", [5, 7, 11])
@pytest.mark.parametrize("shape", [(45, 60), (24, 36, 40)])
def test_faint_windows_beside_exact_zeros_keep_their_gradients(
    backend: Backend, shape: tuple[int, ...], kernel_size: int, faint: float
) -> None:
    """They vary by little about nearly 0, and have the largest gradients of all."""
    pair = faded(1, shape, faint), faded(2, shape, faint)
    options = {"kernel_size": kernel_size}
    cotangent = np.ones((), np.float32)
    expected = reference.lncc_loss_vjp(cotangent, *pair, **options)
    loss, gradients = backend.value_and_vjp("lncc_loss", pair, cotangent, (0, 1), **options)
    assert loss == pytest.approx(reference.lncc_loss(*pair, **options), rel=1e-4)
    for gradient, wanted in zip(gradients, expected, strict=True):
        assert np.abs(gradient - wanted).max() < 1e-4 * np.abs(wanted).max()
