"""``mutual_information_loss`` and ``joint_histogram``: how much one image tells about another."""

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

import jaxreg
import torchreg

Array = np.ndarray

LOSS = "mutual_information_loss"
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
DTYPES = pytest.mark.parametrize("dtype", [np.float32, np.float64])
KERNELS = pytest.mark.parametrize("kernel", ["gaussian", "b-spline"])
REDUCTIONS = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])

# Intensities outside of these count as at their ends.
NARROW = ((-0.6, 0.7), (-0.9, 0.8))


def images(
    *shape: int, batches: tuple[int, int] = (2, 2), channels: int = 1, dtype: object = np.float64
) -> tuple[Array, Array]:
    """A pair that has something to do with each other."""
    pred = random_array(0, batches[0], channels, *shape)
    target = 0.5 * pred[: batches[1]] + random_array(1, batches[1], channels, *shape)
    return pred.astype(dtype), target.astype(dtype)


def entropy(p: Array) -> float:
    return -float(np.sum(p[p > 0] * np.log(p[p > 0])))


def check(backend: Backend, pred: Array, target: Array, **options: Any) -> None:
    """Values and gradients: to both images at once and, but for compilation, to each alone."""
    dtype = pred.dtype
    loss = reference.mutual_information_loss(pred, target, **options)
    cotangent = random_array(9, *loss.shape, dtype=dtype)
    expected = reference.mutual_information_loss_vjp(cotangent, pred, target, **options)
    # An intensity is rounded once it is between 0 and 1: the narrower a window, the more it shows.
    windows = options.get("num_bins", 32) / options.get("sigma_ratio", 1.0)
    slack = max(1, windows / 16) if dtype == np.float32 else 1
    for wrt in [(0, 1), (0,), (1,)] if backend.framework == "torch" else [(0, 1)]:
        value, gradients = backend.value_and_vjp(LOSS, (pred, target), cotangent, wrt, **options)
        assert_close(value, loss, dtype)
        for k, gradient in zip(wrt, gradients, strict=True):
            # A mean over many voxels has small gradients: they are measured by the largest.
            scale = slack * np.abs(expected[k]).max()
            assert_close((gradient / scale).astype(dtype), expected[k] / scale, dtype)


def check_histogram(backend: Backend, pred: Array, target: Array, **options: Any) -> None:
    expected = reference.joint_histogram(pred, target, **options)
    actual = backend.call("joint_histogram", pred, target, **options)
    assert_close(actual, expected, pred.dtype)


# ------------------------------------------------------------------------------ values, gradients


@pytest.mark.parametrize("num_bins", [2, 5, 16, 32, 33, 36, 37, 64, 100, 256])
@KERNELS
@pytest.mark.parametrize(("dim", "dtype"), [(2, np.float64), (3, np.float32)])
def test_any_number_of_bins(
    backend: Backend, dim: int, dtype: object, kernel: str, num_bins: int
) -> None:
    pred, target = images(*SHAPES[dim], dtype=dtype)
    check(backend, pred, target, kernel=kernel, num_bins=num_bins)


@DTYPES
@pytest.mark.parametrize("sigma_ratio", [0.25, 0.7, 1, 1.05, 2.5, 4])
def test_gaussians_of_any_width(backend: Backend, sigma_ratio: float, dtype: object) -> None:
    """From an eighth of a bin, which hardly reaches the next one, to two bins."""
    pred, target = images(5, 6, 7, dtype=dtype)
    check(backend, pred, target, num_bins=20, sigma_ratio=sigma_ratio)
    check_histogram(backend, pred, target, num_bins=20, sigma_ratio=sigma_ratio)


@pytest.mark.parametrize("kernel", ["b-spline", "delta"])
def test_only_the_gaussian_has_a_width_to_choose(backend: Backend, kernel: str) -> None:
    pred, target = images(5, 6)
    narrow, wide = (
        backend.call("joint_histogram", pred, target, kernel=kernel, sigma_ratio=ratio)
        for ratio in (0.25, 4.0)
    )
    assert_same(narrow, wide)


@REDUCTIONS
@pytest.mark.parametrize("batches", [(3, 3), (3, 1), (1, 3), (1, 1)])
def test_either_image_may_serve_all_items(
    backend: Backend, batches: tuple[int, int], reduction: str
) -> None:
    """Its gradient is then the sum over them."""
    pred = random_array(0, batches[0], 2, 4, 5)
    target = random_array(1, batches[1], 2, 4, 5)
    check(backend, pred, target, num_bins=8, reduction=reduction)
    check_histogram(backend, pred, target, num_bins=8)


def test_channels_are_counted_by_themselves(backend: Backend) -> None:
    """Each has a gradient of its own, and a range."""
    pred, target = images(4, 5, 6, channels=3)
    pred, target = pred * np.reshape([1, 10, 0.1], (3, 1, 1, 1)), target + 5
    check(backend, pred, target, reduction="none")
    whole = backend.call(LOSS, pred, target, reduction="none")
    for c in range(3):
        part = [x[:, c : c + 1] for x in (pred, target)]
        assert_same(backend.call(LOSS, *part, reduction="none"), whole[:, c : c + 1])


@pytest.mark.parametrize("shape", [(1, 6), (6, 1, 1), (1, 1), (1, 1, 1)])
def test_axes_of_one_voxel(backend: Backend, shape: tuple[int, ...]) -> None:
    """One voxel alone is a constant image, and tells nothing by any range."""
    pred, target = images(*shape)
    if np.prod(shape) > 1:
        check(backend, pred, target, num_bins=4)
        return
    for value_range in (None, ((-1, 1), (-2, 2))):
        options = {"num_bins": 4, "value_range": value_range}
        value = backend.call(LOSS, pred, target, **options)
        np.testing.assert_allclose(value, 0, atol=1e-6)
        for gradient in backend.vjp(LOSS, (pred, target), np.ones(()), (0, 1), **options):
            np.testing.assert_allclose(gradient, 0, atol=1e-6)


@pytest.mark.parametrize(("smooth_nr", "smooth_dr"), [(0.0, 1e-10), (1e-3, 1e-7), (0.1, 0.3)])
def test_smoothing_constants(backend: Backend, smooth_nr: float, smooth_dr: float) -> None:
    check(backend, *images(5, 6), num_bins=8, smooth_nr=smooth_nr, smooth_dr=smooth_dr)


@KERNELS
@pytest.mark.parametrize("kind", ["noise", "smooth", "half background"])
def test_volumes_larger_than_a_block_of_work(backend: Backend, kind: str, kernel: str) -> None:
    """Voxels that follow each other fall into many bins, into few, and half of them into one."""
    shape = (23, 29, 31) if kind == "noise" else (9, 16, 31)
    pred, target = images(*shape, batches=(1, 1), dtype=np.float32)
    if kind == "smooth":
        pred, target = np.sort(pred, axis=-1), np.sort(target, axis=-1)
    elif kind == "half background":
        pred[..., :8, :], target[..., :8, :] = -1, -1.5
    check(backend, pred, target, kernel=kernel)
    check_histogram(backend, pred, target, kernel=kernel)


@pytest.mark.parametrize("num_bins", [32, 64, 100])
@pytest.mark.parametrize("ends", [(-1, -1), (-1, 1), (1, -1), (1, 1)])
def test_a_background_leaves_the_gradient_of_the_rest_as_exact(
    backend: Backend, ends: tuple[int, int], num_bins: int
) -> None:
    """Half a million voxels alike: what is rounded of each adds up."""
    pred = np.tanh(random_array(0, 1, 1, 100, 100, 100))
    target = np.tanh(random_array(1, 1, 1, 100, 100, 100) + pred)
    pred[..., :50, :], target[..., :50, :] = ends
    options = {"num_bins": num_bins, "value_range": ((-1, 1), (-1, 1))}
    one = np.ones(())
    exact = backend.vjp(LOSS, (pred, target), one, (0, 1), **options)
    images = pred.astype(np.float32), target.astype(np.float32)
    gradients = backend.vjp(LOSS, images, one.astype(np.float32), (0, 1), **options)
    for gradient, expected in zip(gradients, exact, strict=True):
        error = np.abs(gradient - expected).max()
        assert error < 2e-5 * np.abs(expected).max()


# ------------------------------------------------------------------------------------ normalised


@DTYPES
@KERNELS
@REDUCTIONS
@pytest.mark.parametrize("num_bins", [2, 20, 33, 64])
def test_the_normalised_loss_is_that_of_its_entropies(
    backend: Backend, num_bins: int, reduction: str, kernel: str, dtype: object
) -> None:
    pred, target = images(4, 5, 6, channels=2, dtype=dtype)
    mask = abs(random_array(5, 2, 1, 4, 5, 6)).astype(dtype)
    options = {"num_bins": num_bins, "kernel": kernel, "reduction": reduction}
    check(backend, pred, target, normalised=True, mask=mask, **options)


@pytest.mark.parametrize("sigma_ratio", [0.25, 0.7, 4])
@pytest.mark.parametrize("value_range", [None, "joint", NARROW])
@pytest.mark.parametrize("batches", [(3, 1), (1, 3)])
def test_the_normalised_loss_takes_every_range_width_and_batch(
    backend: Backend, batches: tuple[int, int], value_range: Any, sigma_ratio: float
) -> None:
    pred, target = random_array(0, batches[0], 1, 5, 6), random_array(1, batches[1], 1, 5, 6)
    options = {"num_bins": 16, "sigma_ratio": sigma_ratio, "value_range": value_range}
    check(backend, pred, target, normalised=True, **options)


def test_the_normalised_loss_goes_from_independence_to_identity(backend: Backend) -> None:
    """With hard bins from -1 to -2, and with any it is that of the histogram's entropies."""
    image, other = (random_array(seed, 1, 1, 40, 40, 40) for seed in range(2))
    options = {"num_bins": 8, "normalised": True}
    same = backend.call(LOSS, image, -3 * image + 1, kernel="delta", **options)
    np.testing.assert_allclose(same, -2, rtol=1e-6)
    unlike = backend.call(LOSS, image, other, kernel="delta", **options)
    assert -1.001 < unlike < -1
    joint = backend.call("joint_histogram", image, image + other, num_bins=8)[0, 0]
    expected = (entropy(joint.sum(axis=0)) + entropy(joint.sum(axis=1))) / entropy(joint)
    value = backend.call(LOSS, image, image + other, **options)
    np.testing.assert_allclose(-value, expected, rtol=1e-6)


@pytest.mark.parametrize("kernel", ["gaussian", "b-spline", "delta"])
@DTYPES
def test_constant_images_are_as_independent_ones(
    backend: Backend, dtype: object, kernel: str
) -> None:
    """Also in the middle of a given range, where a narrow window leaves them in one bin."""
    image = random_array(0, 1, 1, 4, 5, dtype=dtype)
    flat = np.full_like(image, 0.25)
    options: dict[str, Any] = {"num_bins": 4, "kernel": kernel, "normalised": True}
    for pair in ((flat, flat), (flat, image), (image, flat)):
        for own in ({}, {"value_range": ((-1, 1), (-1, 1)), "sigma_ratio": 0.25}):
            np.testing.assert_allclose(backend.call(LOSS, *pair, **options, **own), -1, rtol=1e-5)
    if kernel == "delta":
        return
    for gradient in backend.vjp(LOSS, (flat, flat), np.ones((), dtype), (0, 1), **options):
        np.testing.assert_array_equal(gradient, 0)
    mask = np.zeros_like(image)
    value = backend.call(LOSS, image, image, mask=mask, **options)
    np.testing.assert_array_equal(value, -1)
    one = np.ones((), dtype)
    for gradient in backend.vjp(LOSS, (image, image), one, (0, 1), mask=mask, **options):
        np.testing.assert_array_equal(gradient, 0)


def test_what_is_not_a_number_makes_the_normalised_loss_none(backend: Backend) -> None:
    pred, target = images(4, 5)
    pred[0, 0, 1, 2] = np.nan
    value = backend.call(LOSS, pred, target, normalised=True, reduction="none")
    assert np.isnan(value[0, 0])
    assert np.isfinite(value[1, 0])


# ---------------------------------------------------------------------------------- value_range

RANGES: dict[str, Any] = {
    "of each image": None,
    "of both": "joint",
    "beyond all values": ((-1.5, 1.25), (-2, 3)),
    "within the values": NARROW,
    "empty": ((0.5, 0.5), (-1, 1)),
}


@DTYPES
@pytest.mark.parametrize("value_range", RANGES.values(), ids=RANGES.keys())
def test_a_range_of_intensities_is_mapped_to_the_bins(
    backend: Backend, value_range: Any, dtype: object
) -> None:
    pred, target = images(5, 6, 7, dtype=dtype)
    check_histogram(backend, pred, target, value_range=value_range)
    if value_range != RANGES["empty"]:
        check(backend, pred, target, value_range=value_range)
        return
    value = backend.call(LOSS, pred, target, value_range=value_range)
    np.testing.assert_allclose(value, 0, atol=1e-6)
    gradients = backend.vjp(LOSS, (pred, target), value, (0, 1), value_range=value_range)
    np.testing.assert_array_equal(gradients[0], 0)


def test_beyond_the_range_there_is_no_gradient_and_at_its_ends_there_is(backend: Backend) -> None:
    """At an end it is that of the side inside."""
    pred, target = images(5, 6, 7)
    (low, high), _ = NARROW
    pred[..., 0], pred[..., 1] = low, high
    check(backend, pred, target, value_range=NARROW)
    gradient, _ = backend.vjp(LOSS, (pred, target), np.ones(()), (0, 1), value_range=NARROW)
    outside = (pred < low) | (pred > high)
    np.testing.assert_array_equal(gradient[outside], 0)
    assert np.all(gradient[~outside])


@pytest.mark.parametrize("kind", ["numbers", "one for all items", "one for each item"])
def test_bounds_may_be_arrays(backend: Backend, kind: str) -> None:
    """Of no axes, or of one with one bound for all items or one for each."""
    pred, target = images(5, 6, dtype=np.float32)
    low, high = {
        "numbers": (np.float32(-0.5), np.array(0.75)),
        "one for all items": (np.array([-0.5]), np.array(0.75)),
        "one for each item": (np.array([-0.5, -0.25]), np.array([0.75])),
    }[kind]
    expected = reference.joint_histogram(
        pred, target, num_bins=8, value_range=((low, high), (-1, 1))
    )
    given = ((backend.array(low), backend.array(high)), (-1, 1))
    options = {"num_bins": 8, "value_range": given}
    assert_close(backend.call("joint_histogram", pred, target, **options), expected, np.float32)


def test_arrays_of_bounds_that_do_not_fit_are_refused(backend: Backend) -> None:
    pred, target = images(5, 6, dtype=np.float32)
    bad = [np.zeros(3), np.zeros((2, 1)), np.zeros(2, np.complex64)]
    for low in map(backend.array, bad):
        with pytest.raises(ValueError, match=r"value_range: expected"):
            backend.call(LOSS, pred, target, value_range=((low, 1), (0, 1)))
    two, three = backend.array(np.zeros(2)), backend.array(np.ones(3))
    with pytest.raises(ValueError, match=r"value_range: expected .*for each"):
        backend.call(LOSS, pred, target, value_range=((two, three), (0, 1)))


def test_a_range_does_not_raise_the_precision(backend: Backend) -> None:
    """That of the images decides, also where a bound is float64."""
    for dtype in (np.float32, np.float64):
        pred, target = images(5, 6, dtype=dtype)
        low = backend.array(np.array(-0.125, np.float64))
        expected = reference.mutual_information_loss(
            pred, target, value_range=((-0.125, 1), (0, 1))
        )
        for value_range in (((-0.125, 1), (0, 1)), ((low, 1), (0, 1))):
            value = backend.call(LOSS, pred, target, value_range=value_range)
            assert_close(value, expected, dtype)


def test_jax_traces_ranges_and_holds_them_fixed() -> None:
    """Under ``jit``, ``vmap`` and ``grad``."""
    pred, target = (x.astype(np.float32) for x in images(5, 6, batches=(3, 3)))
    lows = np.array([-0.9, -0.5, -0.1], np.float32)

    def loss(pred: Any, target: Any, low: Any) -> Any:
        return jaxreg.mutual_information_loss(
            pred, target, num_bins=8, value_range=((low, 2 * low + 2), (-1, 1))
        )

    each = jax.jit(jax.vmap(jax.value_and_grad(loss, (0, 2))))
    values, (to_pred, to_low) = each(pred[:, None], target[:, None], lows)
    np.testing.assert_array_equal(to_low, 0)
    for i, low in enumerate(lows):
        options = {"num_bins": 8, "value_range": ((low, 2 * low + 2), (-1, 1))}
        pair = (pred[i, None], target[i, None])
        expected = reference.mutual_information_loss(*pair, **options)
        assert_close(np.asarray(values[i]), expected, np.float32)
        slopes = reference.mutual_information_loss_vjp(np.ones(()), *pair, **options)
        assert_close(np.asarray(to_pred[i]), slopes[0], np.float32)


@DEVICES
def test_torch_takes_ranges_as_tensors_and_holds_them_fixed(device: str) -> None:
    pred, target = (torch.tensor(x, device=device, requires_grad=True) for x in images(5, 6))
    low = pred.min()
    assert low.requires_grad
    free, fixed = (
        torchreg.mutual_information_loss(pred, target, value_range=((bound, 1), (-1, 1)))
        for bound in (low, low.detach())
    )
    assert torch.equal(free, fixed)
    gradients = [torch.autograd.grad(value, (pred, target)) for value in (free, fixed)]
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


@pytest.mark.gpu
@pytest.mark.parametrize("value_range", ["tensors", ((-1, 1), (-2, 2)), "joint", None])
def test_torch_does_not_wait_for_the_device(value_range: Any) -> None:
    """A range is not read, and numbers are not copied: it can all be captured in a graph."""
    pred, target = (torch.tensor(x, device="cuda", requires_grad=True) for x in images(5, 6))
    given = value_range
    if value_range == "tensors":
        # Here and below without a history: it would tie the images to this stream, which a capture
        # may not wait for.
        low, other_low, high = pred.detach().amin(), target.detach().amin(), target.detach().amax()
        given = ((low, 1), (other_low, high))

    def call() -> tuple[torch.Tensor, ...]:
        value = torchreg.mutual_information_loss(pred, target, value_range=given)
        return value.detach(), *torch.autograd.grad(value, (pred, target))

    expected = call()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        call()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    graph.replay()
    for a, e in zip(captured, expected, strict=True):
        assert torch.equal(a, e)


# ------------------------------------------------------------------------------------------ masks

MASKS = {
    "for each item": (3, 2, 4, 5),
    "for all items": (1, 2, 4, 5),
    "for all channels": (3, 1, 4, 5),
    "for all rows": (1, 1, 1, 5),
    "for everything": (1, 1, 1, 1),
}


@pytest.mark.parametrize("shape", MASKS.values(), ids=MASKS.keys())
def test_a_mask_weighs_the_voxels(backend: Backend, shape: tuple[int, ...]) -> None:
    mask = abs(random_array(5, *shape))
    pred, target = images(4, 5, batches=(3, 1), channels=2)
    check(backend, pred, target, num_bins=8, mask=mask, reduction="none")
    check_histogram(backend, pred, target, num_bins=8, mask=mask)


def test_a_mask_may_have_more_items_than_the_images(backend: Backend) -> None:
    mask = abs(random_array(5, 3, 1, 4, 5))
    for reduction in ("mean", "none"):
        pred, target = images(4, 5, batches=(1, 1))
        check(backend, pred, target, num_bins=8, mask=mask, reduction=reduction)


@pytest.mark.parametrize("dtype", [bool, np.float16, np.float32])
def test_a_mask_of_zeros_and_ones_selects(backend: Backend, dtype: object) -> None:
    """As if there were no other voxels, where the range is not found among them."""
    pred, target = images(5, 6, 7, batches=(1, 1), dtype=np.float32)
    mask = random_array(5, 1, 1, 5, 6, 7) > 0.3
    given = mask.astype(dtype)
    check(backend, pred, target, mask=given)
    selected = [x[mask].reshape(1, 1, 1, -1) for x in (pred, target)]
    whole = backend.call(LOSS, pred, target, mask=given, value_range=NARROW)
    alone = backend.call(LOSS, *selected, value_range=NARROW)
    assert_close(whole, alone, np.float32)


def test_the_size_of_weights_does_not_matter(backend: Backend) -> None:
    """To the value and to the gradient, even where their sum or inverse is no longer a number."""
    pred, target = images(5, 6, dtype=np.float32)
    mask = abs(random_array(5, 2, 1, 5, 6, dtype=np.float32))
    mask = np.float32(3.4e38) * (mask / mask.max())
    one = np.ones((), np.float32)

    def results(mask: Array) -> list[Array]:
        return [
            backend.call("joint_histogram", pred, target, mask=mask),
            *backend.vjp(LOSS, (pred, target), one, (0, 1), mask=mask),
        ]

    expected = results(mask)
    assert all(np.abs(x).max() > 1e-4 for x in expected)
    for exponent in (-60, -120, -240):
        for scaled, wanted in zip(results(np.ldexp(mask, exponent)), expected, strict=True):
            assert_close(scaled, wanted, np.float32)


@REDUCTIONS
def test_an_empty_mask_leaves_nothing(backend: Backend, reduction: str) -> None:
    """Of one item here, and of all."""
    pred, target = images(4, 5, 6)
    mask = abs(random_array(5, 2, 1, 4, 5, 6))
    mask[0] = 0
    check(backend, pred, target, mask=mask, reduction=reduction)
    options = {"mask": np.zeros(pred.shape), "reduction": reduction}
    value = backend.call(LOSS, pred, target, **options)
    np.testing.assert_array_equal(value, np.zeros((2, 1) if reduction == "none" else ()))
    for gradient in backend.vjp(LOSS, (pred, target), np.ones_like(value), (0, 1), **options):
        np.testing.assert_array_equal(gradient, np.zeros(pred.shape))
    histogram = backend.call("joint_histogram", pred, target, mask=options["mask"])
    np.testing.assert_array_equal(histogram, np.zeros((2, 1, 32, 32)))


def test_a_mask_that_needs_a_gradient_is_refused() -> None:
    pred, target = images(4, 5)
    mask = np.ones((1, 1, 4, 5))
    tensors = [torch.tensor(x) for x in (pred, target)]
    with pytest.raises(ValueError, match=rf"{LOSS}: mask: .*requires no gradient"):
        torchreg.mutual_information_loss(*tensors, mask=torch.tensor(mask, requires_grad=True))
    with pytest.raises(TypeError, match=rf"{LOSS}: mask: .*stop_gradient"):
        jax.grad(lambda m: jaxreg.mutual_information_loss(pred, target, mask=m))(jnp.asarray(mask))


# ------------------------------------------------------------------------------------- properties


@pytest.mark.parametrize("kernel", ["gaussian", "b-spline", "delta"])
def test_it_is_symmetric(backend: Backend, kernel: str) -> None:
    pred, target = images(5, 6, 7)
    there, back = (
        backend.call("joint_histogram", *pair, kernel=kernel)
        for pair in ((pred, target), (target, pred))
    )
    assert_close(there, np.swapaxes(back, 2, 3), np.float64)
    there, back = (
        backend.call(LOSS, *pair, kernel=kernel) for pair in ((pred, target), (target, pred))
    )
    assert_close(there, back, np.float64)


@pytest.mark.parametrize("kernel", ["gaussian", "b-spline", "delta"])
def test_noises_tell_little_about_each_other(backend: Backend, kernel: str) -> None:
    """The less, the more of them there is: (num_bins - 1)^2 / (2 voxels) with hard bins."""
    values = []
    for side in (10, 40):
        noises = [random_array(seed, 1, 1, side, side, side) for seed in range(2)]
        values.append(backend.call(LOSS, *noises, num_bins=8, kernel=kernel))
    assert 0 < -values[1] < 49 / 40**3
    assert -values[0] > 20 * -values[1]
    assert -backend.call(LOSS, noises[0], -noises[0], num_bins=8, kernel=kernel) > 0.9


@pytest.mark.parametrize("num_bins", [2, 32, 100])
def test_with_hard_bins_an_image_tells_its_entropy_about_itself(
    backend: Backend, num_bins: int
) -> None:
    image = random_array(0, 1, 1, 20, 21, 22) ** 3
    value_range = ((-1, 1), (-1, 1))
    counts, _ = np.histogram(image, num_bins, (-1, 1))
    options = {"kernel": "delta", "num_bins": num_bins, "value_range": value_range}
    options |= {"smooth_nr": 0.0, "smooth_dr": 1e-12}
    value = backend.call(LOSS, image, image, **options)
    np.testing.assert_allclose(-value, entropy(counts / image.size), rtol=1e-6)


@DTYPES
@pytest.mark.parametrize("num_bins", [2, 33, 256])
def test_hard_bins_are_those_of_numpy(backend: Backend, num_bins: int, dtype: object) -> None:
    """Half open but for the last one; in float32 bounds and intensities of 8 bits are exact."""
    rng = np.random.default_rng(0)
    pred, target = (rng.integers(-10, 300, (1, 1, 20, 21)).astype(dtype) for _ in range(2))
    options = {"kernel": "delta", "num_bins": num_bins, "value_range": ((0, 256), (0, 256))}
    if num_bins == 33:
        options["value_range"] = ((0, 264), (0, 264))
    clipped = [np.clip(x, *options["value_range"][0]).ravel() for x in (pred, target)]
    counts, _, _ = np.histogram2d(*clipped, num_bins, options["value_range"])
    actual = backend.call("joint_histogram", pred, target, **options)
    assert_close(actual[0, 0], counts / counts.sum(), dtype)
    expected = reference.mutual_information_loss(pred, target, **options)
    assert_close(backend.call(LOSS, pred, target, **options), expected, dtype)


def test_hard_bins_have_no_gradient() -> None:
    pred, target = images(4, 5)
    with pytest.raises(ValueError, match=rf"{LOSS}: kernel: expected .*gradient.*'delta'"):
        jax.grad(lambda x: jaxreg.mutual_information_loss(x, target, kernel="delta"))(pred)
    leaf = torch.tensor(pred, requires_grad=True)
    with pytest.raises(ValueError, match=rf"{LOSS}: kernel: expected .*gradient.*'delta'"):
        torchreg.mutual_information_loss(leaf, torch.tensor(target), kernel="delta")


def test_a_joint_histogram_has_no_gradient() -> None:
    pred, target = images(4, 5)
    with pytest.raises(TypeError, match=r"joint_histogram: pred: .*stop_gradient"):
        jax.grad(lambda x: jaxreg.joint_histogram(x, target).sum())(pred)
    with pytest.raises(ValueError, match=r"joint_histogram: target: .*requires no gradient"):
        torchreg.joint_histogram(torch.tensor(pred), torch.tensor(target, requires_grad=True))
    value = torch.tensor(pred)
    with pytest.raises(NotImplementedError, match="joint_histogram: forward mode"):
        torch.func.jvp(
            lambda x: torchreg.joint_histogram(x, torch.tensor(target)), (value,), (value,)
        )
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(value, value)
        with pytest.raises(NotImplementedError, match="joint_histogram: forward mode"):
            torchreg.joint_histogram(dual, torch.tensor(target))


@pytest.mark.parametrize("num_bins", [7, 32])
@REDUCTIONS
def test_with_gaussians_it_is_the_loss_of_monai(
    backend: Backend, reduction: str, num_bins: int
) -> None:
    """Which puts centres at the ends of [0, 1] and counts a sigma in bins: see the docstring.

    It takes channels together. Its centres are rounded to float32.
    """
    from monai.losses import GlobalMutualInformationLoss

    pred, target = ((x + 1.5) / 3 for x in images(6, 7, 8))
    ratio = 0.6
    theirs = GlobalMutualInformationLoss("gaussian", num_bins, ratio, reduction, 1e-5, 1e-4)
    leaves = [torch.tensor(x, requires_grad=True) for x in (pred, target)]
    value = theirs(*leaves)
    gradients = torch.autograd.grad(value.sum(), leaves)

    half = 0.5 / (num_bins - 1)
    options = {
        "num_bins": num_bins,
        "sigma_ratio": 2 * ratio,
        "value_range": ((-half, 1 + half),) * 2,
        "reduction": reduction,
        "smooth_nr": 1e-5,
        "smooth_dr": 1e-4,
    }
    ours = backend.call(LOSS, pred, target, **options)
    np.testing.assert_allclose(ours.ravel(), value.detach().numpy().ravel(), rtol=1e-5)
    own = backend.vjp(LOSS, (pred, target), np.ones_like(ours), (0, 1), **options)
    for gradient, wanted in zip(own, gradients, strict=True):
        atol = 1e-5 * np.abs(gradient).max()
        np.testing.assert_allclose(gradient, wanted.numpy(), rtol=0, atol=atol)


def test_beyond_its_range_it_is_the_loss_of_monai_for_clamped_images(backend: Backend) -> None:
    from monai.losses import GlobalMutualInformationLoss

    pred, target = (x.astype(np.float64) for x in images(6, 7, 8))
    assert min(pred.min(), target.min()) < 0
    assert max(pred.max(), target.max()) > 1
    num_bins, half = 23, 0.5 / 22
    theirs = GlobalMutualInformationLoss("gaussian", num_bins, 0.5)
    theirs.bin_centers = theirs.bin_centers.double()
    options = {"num_bins": num_bins, "sigma_ratio": 1.0, "value_range": ((-half, 1 + half),) * 2}
    clamped = (np.clip(x, 0, 1) for x in (pred, target))
    wanted = theirs(torch.tensor(pred), torch.tensor(target)).item()
    np.testing.assert_allclose(backend.call(LOSS, *clamped, **options), wanted, rtol=1e-5)
    assert abs(backend.call(LOSS, pred, target, **options) - wanted) > 1e-3


def test_b_splines_are_those_of_monai(backend: Backend) -> None:
    """Their histograms, that is: its loss takes hard bins for the target.

    The range is that of an image, with two bins more on either side. What would fall into the bin
    before these at the upper end is moved down by one there, so it is here beforehand.
    """
    from monai.losses import GlobalMutualInformationLoss

    num_bins = 11
    theirs = GlobalMutualInformationLoss("b-spline", num_bins)
    windows, moved, value_range = [], [], []
    for image in images(6, 7, 8, batches=(1, 1)):
        window, _ = theirs.parzen_windowing_b_spline(torch.tensor(image), order=3)
        windows.append(window[0].numpy())
        width = (image.max() - image.min()) / (num_bins - 4)
        moved.append(np.minimum(image, image.min() + (num_bins - 5) * width))
        low = image.min() - 2.5 * width
        value_range.append((low, low + num_bins * width))
    expected = windows[0].T @ windows[1] / len(windows[0])
    actual = backend.call(
        "joint_histogram", *moved, num_bins=num_bins, kernel="b-spline", value_range=value_range
    )
    np.testing.assert_allclose(actual[0, 0], expected, atol=1e-7)


# -------------------------------------------------------------------- images that are hard to count


@pytest.mark.parametrize("offset", [100.0, -1e4])
@KERNELS
def test_an_offset_costs_no_precision(backend: Backend, kernel: str, offset: float) -> None:
    """Of ten thousand deviations."""
    pred, target = (
        (offset * x.std() + x).astype(np.float32) for x in images(12, 13, 14, batches=(1, 1))
    )
    check(backend, pred, target, kernel=kernel)


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e6, 1e30])
def test_the_unit_of_intensities_does_not_matter(backend: Backend, scale: float) -> None:
    pred, target = images(5, 6, 7, dtype=np.float32)
    expected = backend.call(LOSS, pred, target)
    scaled = (np.float32(scale) * pred, np.float32(1 / scale) * target)
    assert_close(backend.call(LOSS, *scaled), expected, np.float32)
    slopes = backend.vjp(LOSS, (pred, target), np.ones((), np.float32), (0, 1))
    of_scaled = backend.vjp(LOSS, scaled, np.ones((), np.float32), (0, 1))
    for slope, gradient, unit in zip(slopes, of_scaled, (scale, 1 / scale), strict=True):
        top = np.abs(slope).max()
        assert_close(gradient * np.float32(unit) / top, slope / top, np.float32)


@DTYPES
@pytest.mark.parametrize("level", [0.0, 0.1, -1234.567])
def test_a_constant_image_tells_nothing(backend: Backend, level: float, dtype: object) -> None:
    """And has no gradient."""
    constant = np.full((1, 1, 8, 9), level, dtype)
    varying = random_array(0, 1, 1, 8, 9, dtype=dtype)
    for pair in ((constant, varying), (varying, constant), (constant, constant)):
        value = backend.call(LOSS, *pair)
        np.testing.assert_allclose(value, 0, atol=1e-6)
        gradients = backend.vjp(LOSS, pair, np.ones((), dtype), (0, 1))
        for image, gradient in zip(pair, gradients, strict=True):
            if image is constant:
                np.testing.assert_array_equal(gradient, 0)
            else:
                np.testing.assert_allclose(gradient, 0, atol=1e-6)


def test_one_bin_may_hold_more_voxels_than_float32_can_count(backend: Backend) -> None:
    """Of 20 million, all but three are background."""
    pred = np.zeros((1, 1, 4000, 5000), np.float32)
    pred[0, 0, 0, :3] = 1
    options = {"kernel": "delta", "num_bins": 2}
    histogram = backend.call("joint_histogram", pred, pred, **options)[0, 0].astype(np.float64)
    np.testing.assert_allclose(histogram[1, 1] * pred.size, 3, rtol=1e-6)
    np.testing.assert_allclose(histogram[0, 0] * pred.size, pred.size - 3, rtol=1e-7)
    assert histogram[0, 1] == histogram[1, 0] == 0


def test_nearly_all_voxels_may_be_in_one_bin_of_a_narrow_window(backend: Backend) -> None:
    """Of which it has all but 1e-28, so that sums are as large as they may be."""
    pred = np.zeros((1, 1, 4000, 5000), np.float32)
    pred[0, 0, 0, :3] = 1
    options = {"sigma_ratio": 0.25, "num_bins": 8}
    histogram = backend.call("joint_histogram", pred, pred, **options)[0, 0].astype(np.float64)
    np.testing.assert_allclose(histogram[7, 7] * pred.size, 3, rtol=1e-5)
    np.testing.assert_allclose(histogram[0, 0] * pred.size, pred.size - 3, rtol=1e-7)


@pytest.mark.gpu
@pytest.mark.parametrize("num_bins", [32, 36, 64, 256])
@pytest.mark.parametrize("bytes_per_block", [48 * 1024, 99 * 1024, 163 * 1024])
def test_gpus_with_less_shared_memory_return_the_same_bits(
    bytes_per_block: int, num_bins: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With fewer copies of the bins and the table in it."""
    backend = BACKENDS["torch", "cuda"]
    pred, target = images(60, 61, 62, batches=(1, 1), dtype=np.float32)

    def results() -> list[Array]:
        one = np.ones((), np.float32)
        return [
            backend.call("joint_histogram", pred, target, num_bins=num_bins),
            *backend.vjp(LOSS, (pred, target), one, (0, 1), num_bins=num_bins),
        ]

    expected = results()
    monkeypatch.setenv("REGKERNELS_SHARED_MEMORY", str(bytes_per_block))
    for actual, wanted in zip(results(), expected, strict=True):
        assert_same(actual, wanted)


@pytest.mark.parametrize("kernel", ["gaussian", "delta"])
def test_what_is_not_finite_stays_in_its_item_and_channel(backend: Backend, kernel: str) -> None:
    """NaN makes it NaN; an infinity counts as at that end of what is finite."""
    pred, target = images(5, 6, batches=(3, 3), channels=2, dtype=np.float32)
    clean = backend.call("joint_histogram", pred, target, kernel=kernel, num_bins=8)
    pred[0, 1, 2, 3] = np.nan
    target[1, 0, 2, 3], pred[1, 0, 2, 4] = np.inf, -np.inf
    options = {"kernel": kernel, "num_bins": 8}
    histogram = backend.call("joint_histogram", pred, target, **options)
    value = backend.call(LOSS, pred, target, **options, reduction="none")
    for n, c in np.ndindex(3, 2):
        if (n, c) == (0, 1):
            assert np.isnan(histogram[n, c]).all() and np.isnan(value[n, c])
        elif (n, c) == (1, 0):
            pair = [x[n : n + 1, c : c + 1] for x in (pred, target)]
            expected = reference.joint_histogram(*pair, **options)
            assert_close(histogram[n : n + 1, c : c + 1], expected, np.float32)
        else:
            assert_same(histogram[n, c], clean[n, c])
    if kernel == "gaussian":
        cotangent = np.ones((3, 2), np.float32)
        gradients = backend.vjp(
            LOSS, (pred, target), cotangent, (0, 1), **options, reduction="none"
        )
        for image, gradient in zip((pred, target), gradients, strict=True):
            spoilt = np.isnan(gradient)
            assert spoilt[0, 1].all() and not spoilt[1:].any() and not spoilt[0, 0].any()
            np.testing.assert_array_equal(gradient[np.isinf(image)], 0)


def test_voxels_without_weight_may_be_anything(backend: Backend) -> None:
    pred, target = images(5, 6, dtype=np.float32)
    mask = np.ones((1, 1, 5, 6), np.float32)
    mask[..., 0] = 0
    options = {"mask": mask, "value_range": NARROW}
    expected = backend.vjp(LOSS, (pred, target), np.ones((), np.float32), (0, 1), **options)
    spoilt = pred.copy()
    spoilt[..., 0] = [np.nan, np.inf, -np.inf, 1e38, -1e38]
    assert_same(
        backend.call(LOSS, spoilt, target, **options), backend.call(LOSS, pred, target, **options)
    )
    gradients = backend.vjp(LOSS, (spoilt, target), np.ones((), np.float32), (0, 1), **options)
    for gradient, wanted in zip(gradients, expected, strict=True):
        assert_same(gradient, wanted)


@pytest.mark.parametrize("others", [0.0, 1.0, np.nan])
@pytest.mark.parametrize("weight", [np.nan, np.inf])
def test_a_weight_that_is_not_finite_shows(backend: Backend, weight: float, others: float) -> None:
    """Also where no other weighs anything, which looks like an empty mask; in its item alone."""
    pred, target = images(5, 6, dtype=np.float32)
    mask = np.ones((2, 1, 5, 6), np.float32)
    mask[0] = others
    mask[0, 0, 2, 3] = weight
    options = {"mask": mask, "reduction": "none"}
    value = backend.call(LOSS, pred, target, **options)
    np.testing.assert_array_equal(np.isnan(value), [[True], [False]])
    for gradient in backend.vjp(LOSS, (pred, target), np.ones_like(value), (0, 1), **options):
        assert np.isnan(gradient[0]).any() and not np.isnan(gradient[1]).any()


@pytest.mark.parametrize("bound", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("end", [0, 1])
def test_a_bound_on_the_device_that_is_not_finite_shows(
    backend: Backend, end: int, bound: float
) -> None:
    """It cannot be refused, as it is not read."""
    pred, target = images(5, 6, dtype=np.float32)
    pair = [-1.0, 1.0]
    pair[end] = backend.array(np.full(1, bound, np.float32))
    value = backend.call(LOSS, pred, target, value_range=(pair, (-1, 1)))
    assert np.isnan(value)


def test_an_empty_batch_has_no_values_and_no_sum(backend: Backend) -> None:
    empty = np.zeros((0, 2, 4, 5), np.float32)
    value = backend.call(LOSS, empty, empty, reduction="none")
    assert_same(value, np.zeros((0, 2), np.float32))
    assert_same(backend.call(LOSS, empty, empty, reduction="sum"), np.zeros((), np.float32))
    histogram = backend.call("joint_histogram", empty, empty, num_bins=3)
    assert_same(histogram, np.zeros((0, 2, 3, 3), np.float32))
    one = np.ones((1, 2, 4, 5), np.float32)
    cotangent = np.ones((), np.float32)
    gradients = backend.vjp(LOSS, (empty, one), cotangent, (0, 1), reduction="sum")
    assert_same(gradients[0], empty)
    assert_same(gradients[1], np.zeros_like(one))


# --------------------------------------------------------------------------------------- the calls


@pytest.mark.parametrize("dtype", HALVES, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("other", [np.float32, np.float64])
def test_a_loss_is_computed_and_returned_in_full_precision(
    backend: Backend, dtype: object, other: object
) -> None:
    """A gradient has the dtype of its image."""
    pred, target = images(4, 5, 6)
    pred, target = pred.astype(dtype), target.astype(other)
    value = reference.mutual_information_loss(pred, target)
    assert_close(backend.call(LOSS, pred, target), value, other)
    cotangent = np.full((), 100, other)
    gradients = backend.vjp(LOSS, (pred, target), cotangent, (0, 1))
    expected = reference.mutual_information_loss_vjp(cotangent, pred, target)
    assert_close(gradients[0], expected[0], dtype)
    assert_close(gradients[1], expected[1], other)


@REDUCTIONS
def test_the_same_bits_come_out_every_time(backend: Backend, reduction: str) -> None:
    """A target for all items included, whose gradient is a sum over them."""
    pred, target = images(20, 21, 22, batches=(3, 1), dtype=np.float32)

    def results() -> tuple[Array, ...]:
        value = backend.call(LOSS, pred, target, reduction=reduction)
        cotangent = np.ones_like(value)
        gradients = backend.vjp(LOSS, (pred, target), cotangent, (0, 1), reduction=reduction)
        return value, backend.call("joint_histogram", pred, target), *gradients

    first = results()
    for _ in range(2):
        for again, once in zip(results(), first, strict=True):
            assert_same(again, once)


@DEVICES
def test_no_gradient_is_prepared_for_a_value_alone(device: str) -> None:
    """What is kept for one is the images and a few tables."""
    operands = [torch.tensor(x, device=device) for x in images(9, 10, 11)]
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        torchreg.mutual_information_loss(*operands, num_bins=8)
        assert not kept
        operands[1].requires_grad_()
        torchreg.mutual_information_loss(*operands, num_bins=8)
    own = [x for x in kept if x.data_ptr() not in [op.data_ptr() for op in operands]]
    assert 0 < sum(x.numel() for x in own) < operands[0].numel()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_transforms_of_jax_agree_with_the_reference(reduction: str) -> None:
    """``jit`` of ``shard_map``, ``scan`` and ``vmap`` of ``value_and_grad``; masks and ranges."""
    mask = abs(random_array(7, 4, 1, 1, 4, 5))
    pred, target = (x[:, None] for x in images(4, 5, batches=(4, 4)))
    lows = np.linspace(-0.9, -0.3, 4)

    def loss(pred: Any, target: Any, mask: Any, low: Any) -> Any:
        value_range = ((low, 0.8), (-1, -2 * low))
        value = jaxreg.mutual_information_loss(
            pred, target, num_bins=9, mask=mask, value_range=value_range, reduction=reduction
        )
        return jnp.sum(value)

    each = jax.value_and_grad(loss, (0, 1))

    def scanned(*operands: Any) -> Any:
        return jax.lax.scan(lambda carry, x: (carry, each(*x)), 0, operands)[1]

    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        mesh = Mesh(np.array(jax.devices("cpu")[:2]), ("batch",))
        spread = jax.shard_map(jax.vmap(each), mesh=mesh, in_specs=P("batch"), out_specs=P("batch"))
        operands = [jnp.asarray(x) for x in (pred, target, mask, lows)]
        for transformed in (jax.vmap(each), scanned, spread):
            value, gradients = jax.jit(transformed)(*operands)
            for i, low in enumerate(lows):
                here = {"num_bins": 9, "mask": mask[i], "value_range": ((low, 0.8), (-1, -2 * low))}
                expected = np.sum(reference.mutual_information_loss(pred[i], target[i], **here))
                assert_close(np.asarray(value[i]), expected, np.float64)
                slopes = reference.mutual_information_loss_vjp(
                    np.ones(()), pred[i], target[i], **here
                )
                for gradient, slope in zip(gradients, slopes, strict=True):
                    assert_close(np.asarray(gradient[i]), slope, np.float64)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_transforms_of_torch_take_masks_and_ranges(reduction: str) -> None:
    """``vmap`` of ``grad``, and ``torch.compile`` of the call."""
    mask = torch.tensor(abs(random_array(7, 3, 1, 1, 4, 5)))
    pred, target = (torch.tensor(x[:, None]) for x in images(4, 5, batches=(3, 3)))
    lows = torch.linspace(-0.9, -0.3, 3)

    def loss(
        pred: torch.Tensor, target: torch.Tensor, mask: torch.Tensor, low: torch.Tensor
    ) -> torch.Tensor:
        return torchreg.mutual_information_loss(
            pred, target, value_range=((low, 0.8), (-1, 1)), mask=mask, reduction=reduction
        ).sum()

    slopes = torch.func.vmap(torch.func.grad(loss, (0, 1)))(pred, target, mask, lows)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for i in range(3):
        leaves = [x[i].clone().requires_grad_() for x in (pred, target)]
        value = compiled(*leaves, mask[i], lows[i])
        expected = loss(*leaves, mask[i], lows[i])
        assert torch.equal(value, expected)
        gradients = torch.autograd.grad(expected, leaves)
        for k, of_compiled in enumerate(torch.autograd.grad(value, leaves)):
            assert torch.equal(of_compiled, gradients[k])
            assert_close(slopes[k][i].numpy(), gradients[k].numpy(), np.float64)


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_a_joint_histogram_can_be_mapped_and_compiled(framework: str) -> None:
    pred, target = (x[:, None] for x in images(4, 5, batches=(3, 3), dtype=np.float32))
    backend = BACKENDS[framework, "cpu"]
    function = backend.function("joint_histogram")
    pairs = [backend.array(pred), backend.array(target)]
    if framework == "jax":
        mapped = jax.jit(jax.vmap(function))(*pairs)
    else:
        mapped = torch.compile(torch.func.vmap(function), backend="aot_eager")(*pairs)
    for i in range(3):
        assert_same(np.asarray(mapped[i]), np.asarray(function(*[x[i] for x in pairs])))


# --------------------------------------------------------------------------- MutualInformationLoss

OPTIONS: list[dict[str, Any]] = [
    {},
    {"kernel": "b-spline", "value_range": "joint", "reduction": "sum"},
    {"num_bins": 8, "sigma_ratio": 2.0, "value_range": NARROW, "reduction": "none"},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_the_module_is_the_function_and_stays_so_when_copied(options: dict[str, Any]) -> None:
    module = torchreg.MutualInformationLoss(**options)
    pred, target = (torch.tensor(x) for x in images(6, 7))
    mask = torch.rand(1, 1, 6, 7)
    for other in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        value = torchreg.mutual_information_loss(pred, target, **options)
        assert torch.equal(other(pred, target), value)
        masked = torchreg.mutual_information_loss(pred, target, mask=mask, **options)
        assert torch.equal(other(pred, target, mask), masked)


def test_the_module_shows_its_options_and_has_no_state() -> None:
    module = torchreg.MutualInformationLoss(64, kernel="b-spline")
    assert repr(module) == (
        "MutualInformationLoss(num_bins=64, kernel='b-spline', sigma_ratio=1.0, "
        "value_range=None, normalised=False, reduction='mean', smooth_nr=1e-07, smooth_dr=1e-07)"
    )
    assert not module.state_dict()


@KERNELS
def test_the_loss_falls_along_its_negative_gradient(kernel: str) -> None:
    """Towards images that tell about each other, though not by being alike."""
    pred, target = (torch.tensor(x) for x in images(8, 9, 10, batches=(1, 1)))
    target = (3 * target).cos()
    pred.requires_grad_()
    loss = torchreg.MutualInformationLoss(16, kernel=kernel, value_range=((-1, 1), (-1, 1)))
    optimiser = torch.optim.Adam([pred], 0.02)
    values = []
    for _ in range(30):
        optimiser.zero_grad()
        value = loss(pred, target)
        value.backward()
        optimiser.step()
        values.append(value.item())
    assert values[-1] < values[0] - 0.3
