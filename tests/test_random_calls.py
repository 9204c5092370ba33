"""Calls drawn at random from all that is allowed together agree with the reference.

The other files walk along one option at a time; this one meets them in combination. It runs
through ``torchreg``, whose calls need no compilation; ``test_parity`` ties ``jaxreg`` to it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import reference
from backends import BACKENDS
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import assert_close, off_grid_displacement, random_affine, random_array

ON_EACH_DEVICE = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
)
SOME = settings(max_examples=120, deadline=None, derandomize=True, database=None)

DIMS = st.sampled_from([2, 3])
SEEDS = st.integers(0, 2**32 - 1)
FLAGS = st.booleans()
PADDINGS = st.sampled_from(["zeros", "border", "reflection"])


def shapes(dim: int) -> st.SearchStrategy[tuple[int, ...]]:
    return st.tuples(*[st.integers(1, 7)] * dim)


def batches(count: int) -> st.SearchStrategy[tuple[int, ...]]:
    """Batch sizes that go together."""
    return st.integers(1, 3).flatmap(lambda n: st.tuples(*[st.sampled_from([1, n])] * count))


@st.composite
def interpolations(draw: st.DrawFn) -> tuple[tuple[Any, ...], dict[str, Any]]:
    dim, seed = draw(DIMS), draw(SEEDS)
    shape, out, sizes = draw(shapes(dim)), draw(shapes(dim)), draw(batches(3))
    options = {
        "affine_last": draw(FLAGS),
        "is_displacement": True,
        "mode": draw(st.sampled_from(["bilinear", "nearest"])),
        "padding_mode": draw(PADDINGS),
        "align_corners": draw(FLAGS),
    }
    image = random_array(seed, sizes[0], draw(st.integers(1, 4)), *shape)
    affine = random_affine(seed + 1, sizes[1], dim) if draw(FLAGS) else None
    if draw(FLAGS):
        grid = off_grid_displacement(
            seed + 2, sizes[2], shape, out, align_corners=options["align_corners"], reach=4
        )
        options["is_displacement"] = draw(FLAGS)
        return (image, affine, grid), options
    if affine is None:
        affine = random_affine(seed + 1, sizes[1], dim)
    return (image, affine, None), {**options, "out_shape": out}


@ON_EACH_DEVICE
@SOME
@given(interpolations())
def test_interpolate(device: str, call: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
    args, options = call
    backend = BACKENDS["torch", device]
    expected = reference.interpolate(*args, **options)
    assert_close(backend.call("interpolate", *args, **options), expected, np.float64)
    cotangent = random_array(0, *expected.shape)
    wrt = [k for k, operand in enumerate(args) if operand is not None]
    gradients = backend.vjp("interpolate", args, cotangent, wrt, **options)
    expected_gradients = reference.interpolate_vjp(cotangent, *args, **options)
    for k, gradient in zip(wrt, gradients, strict=True):
        assert_close(gradient, expected_gradients[k], np.float64)


@st.composite
def compositions(draw: st.DrawFn) -> tuple[tuple[Any, ...], dict[str, Any]]:
    dim, seed = draw(DIMS), draw(SEEDS)
    shape, out, sizes = draw(shapes(dim)), draw(shapes(dim)), draw(batches(3))
    options = {"add": draw(FLAGS), "padding_mode": draw(PADDINGS), "align_corners": draw(FLAGS)}
    u = random_array(seed, sizes[0], *shape, dim)
    v = off_grid_displacement(
        seed + 1, sizes[1], shape, out, align_corners=options["align_corners"], reach=4
    )
    affine = random_affine(seed + 2, sizes[2], dim) if draw(FLAGS) else None
    return (u, v, affine), options


@ON_EACH_DEVICE
@SOME
@given(compositions())
def test_compose(device: str, call: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
    args, options = call
    backend = BACKENDS["torch", device]
    expected = reference.compose(*args, **options)
    assert_close(backend.call("compose", *args, **options), expected, np.float64)
    cotangent = random_array(0, *expected.shape)
    wrt = [k for k, operand in enumerate(args) if operand is not None]
    gradients = backend.vjp("compose", args, cotangent, wrt, **options)
    expected_gradients = reference.compose_vjp(cotangent, *args, **options)
    for k, gradient in zip(wrt, gradients, strict=True):
        assert_close(gradient, expected_gradients[k], np.float64)


@st.composite
def smoothings(draw: st.DrawFn) -> tuple[np.ndarray, Any, dict[str, Any]]:
    dim = draw(DIMS)
    shape, batch, channels = draw(shapes(dim)), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    channel_last = draw(FLAGS)
    x = random_array(
        draw(SEEDS), batch, *((*shape, channels) if channel_last else (channels, *shape))
    )
    sigma = st.one_of(st.just(0.0), st.floats(0.1, 4))
    options = {"channel_last": channel_last, "truncate": draw(st.floats(0.5, 5))}
    return x, draw(st.one_of(sigma, st.tuples(*[sigma] * dim))), options


@ON_EACH_DEVICE
@SOME
@given(smoothings())
def test_gaussian_smooth(device: str, call: tuple[np.ndarray, Any, dict[str, Any]]) -> None:
    x, sigma, options = call
    backend = BACKENDS["torch", device]
    expected = reference.gaussian_smooth(x, sigma, **options)
    assert_close(backend.call("gaussian_smooth", x, sigma, **options), expected, np.float64)
    (gradient,) = backend.vjp("gaussian_smooth", (x, sigma), x, (0,), **options)
    assert_close(gradient, expected, np.float64)


@st.composite
def losses(draw: st.DrawFn) -> tuple[tuple[np.ndarray, ...], dict[str, Any]]:
    dim, seed = draw(DIMS), draw(SEEDS)
    shape, sizes, channels = draw(shapes(dim)), draw(batches(3)), draw(st.integers(1, 3))
    options = {
        "kernel_size": draw(st.sampled_from([3, 5, 7, 9, 11, 15])),
        "window": draw(st.sampled_from(["rectangular", "gaussian"])),
        "sigma": draw(st.one_of(st.none(), st.floats(0.5, 4))),
        "smooth_nr": draw(st.sampled_from([0.0, 0.1])),
        "smooth_dr": draw(st.sampled_from([1e-5, 0.1])),
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
    }
    if draw(FLAGS):
        one = draw(st.sampled_from([1, channels]))
        kept = [n if draw(FLAGS) else 1 for n in shape]
        options["mask"] = abs(random_array(seed + 2, sizes[2], one, *kept))
    operands = tuple(random_array(seed + k, sizes[k], channels, *shape) for k in range(2))
    return operands, options


@ON_EACH_DEVICE
@SOME
@given(losses())
def test_lncc_loss(device: str, call: tuple[tuple[np.ndarray, ...], dict[str, Any]]) -> None:
    operands, options = call
    backend = BACKENDS["torch", device]
    expected = reference.lncc_loss(*operands, **options)
    assert_close(backend.call("lncc_loss", *operands, **options), expected, np.float64)
    cotangent = random_array(0, *expected.shape)
    gradients = backend.vjp("lncc_loss", operands, cotangent, (0, 1), **options)
    expected_gradients = reference.lncc_loss_vjp(cotangent, *operands, **options)
    for gradient, expected in zip(gradients, expected_gradients, strict=True):
        assert_close(gradient, expected, np.float64)
