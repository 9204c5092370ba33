"""``step_gradient``: the gradient with respect to a step that a warp is composed with."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
import reference
import torch
from backends import Backend
from inputs import SHAPES, assert_close, assert_same, random_array

import jaxreg
import torchreg
from jaxreg._shared_planes import overwriting

Array = np.ndarray


def operands(
    shape: tuple[int, ...], channels: int = 1, batch: int = 2, dtype: object = np.float32
) -> tuple[Array, ...]:
    """Images, a pull, and a displacement."""
    images = [random_array(k, batch, channels, *shape, dtype=dtype) for k in (1, 2)]
    fields = [random_array(k, batch, *shape, len(shape), dtype=dtype) for k in (3, 4)]
    return (*images, *fields)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dim", [2, 3])
def test_gradients_have_the_reference_values(
    backend: Backend, dim: int, channels: int, dtype: type
) -> None:
    given = operands(SHAPES[dim], channels, dtype=dtype)
    cases = [
        (some, {"sigma": sigma})
        for some in (given, given[:3], given[:2])
        for sigma in (0.0, 0.7, (0.0, 1.3, 0.5)[:dim], 4.0)
    ]
    scales = {"slope_scale": 0.7, "pull_scale": np.asarray([3.0, -0.25], dtype)}
    cases += [(some, {"sigma": 0.7, **scales}) for some in (given, given[:3])]
    wide = [x.astype(np.float64) for x in given]
    calls = [
        (some, {k: backend.array(x) if k == "pull_scale" else x for k, x in options.items()})
        for some, options in cases
    ]
    for (some, options), found in zip(cases, backend.calls("step_gradient", *calls), strict=True):
        assert found.dtype == (np.float64 if dtype == np.float64 else np.float32)
        assert_close(found, reference.step_gradient(*wide[: len(some)], **options), found.dtype)


@pytest.mark.parametrize("sigma", [1.0, 1.25, 1.5, 2.0])
def test_volumes_of_many_tiles_have_the_reference_values(backend: Backend, sigma: float) -> None:
    """Those are the Gaussians for which there are kernels of their own on CUDA."""
    given = operands((37, 70, 45))
    wide = [x.astype(np.float64) for x in given]
    for some in (given, given[:3], given[:2]):
        scales = {"slope_scale": -0.7, "pull_scale": 2.5} if len(some) > 2 else {}
        for options in ({"sigma": sigma}, {"sigma": sigma, **scales}):
            found = backend.call("step_gradient", *some, **options)
            expected = reference.step_gradient(*wide[: len(some)], **options)
            assert_close(found, expected, np.float32)


@pytest.mark.parametrize("shape", [(1, 6), (6, 1), (1, 6, 2), (2, 2, 1), (1, 1, 1), (9, 1, 40)])
def test_the_image_does_not_change_along_an_axis_of_one_voxel(
    backend: Backend, shape: tuple[int, ...]
) -> None:
    given = operands(shape, 2, dtype=np.float64)
    given[0][0, 0].flat[0] = np.inf  # nor is it looked at there
    found = backend.call("step_gradient", *given)
    without = backend.call("step_gradient", *given[:3])
    with np.errstate(invalid="ignore"):
        expected = reference.step_gradient(*given)
    for component, size in enumerate(reversed(shape)):
        if size == 1:
            assert_same(found[..., component], given[2][..., component])
            assert_same(found[..., component], without[..., component])
    assert_close(found[1], expected[1], np.float64)


@pytest.mark.parametrize("sigma", [0.0, 0.8, 5.0])
def test_operands_of_batch_one_serve_all_items(backend: Backend, sigma: float) -> None:
    given = operands((5, 6, 7), 2, batch=3, dtype=np.float64)
    one = [x[:1] for x in given]
    whole = [np.repeat(x, 3, axis=0) for x in one]
    for k in range(4):
        mixed = [*one[:k], given[k], *one[k + 1 :]]
        expected = [*whole[:k], given[k], *whole[k + 1 :]]
        options = {"sigma": sigma}
        assert_same(
            backend.call("step_gradient", *mixed, **options),
            backend.call("step_gradient", *expected, **options),
        )


def test_scales_are_those_of_slope_and_pull_multiplied_before(
    backend: Backend,
) -> None:
    moved, slope, pull, displacement = operands((5, 6, 7), 2, dtype=np.float64)
    # Powers of two: their products are exact.
    scales = {"slope_scale": backend.array(np.array([0.5, 4.0])), "pull_scale": 0.125}
    for sigma in (0.0, 0.8, 5.0):
        for some in ((pull, displacement), (pull,)):
            scaled = (0.125 * some[0], *some[1:])
            by_item = slope * np.array([0.5, 4.0]).reshape(2, 1, 1, 1, 1)
            assert_same(
                backend.call("step_gradient", moved, slope, *some, sigma=sigma, **scales),
                backend.call("step_gradient", moved, by_item, *scaled, sigma=sigma),
            )


def test_a_scale_of_the_pull_asks_for_a_pull(backend: Backend) -> None:
    moved, slope, *_ = operands((5, 6, 7))
    with pytest.raises(TypeError, match=r"step_gradient: pull: expected .* got None"):
        backend.call("step_gradient", moved, slope, pull_scale=2.0)


@pytest.mark.parametrize("sigma", [0.0, 0.8, 5.0])
def test_an_empty_batch_gives_an_empty_result(backend: Backend, sigma: float) -> None:
    given = operands((5, 6, 7), batch=0)
    assert backend.call("step_gradient", *given, sigma=sigma).shape == (0, 5, 6, 7, 3)


def test_without_channels_what_is_added_is_smoothed(backend: Backend) -> None:
    moved, slope, pull, _ = operands((5, 6, 7), channels=0)
    found = backend.call("step_gradient", moved, slope, pull, sigma=0.8)
    smooth = backend.call("gaussian_smooth", pull, 0.8, channel_last=True)
    assert_close(found, smooth, np.float32)
    assert not backend.call("step_gradient", moved, slope).any()


def test_the_same_bits_come_out_every_time(backend: Backend) -> None:
    given = operands((20, 30, 41))
    first = backend.call("step_gradient", *given, sigma=1.25)
    for _ in range(3):
        assert_same(backend.call("step_gradient", *given, sigma=1.25), first)


def test_it_says_that_it_cannot_be_differentiated() -> None:
    given = operands((5, 6))

    def total(moved: Any) -> Any:
        return jaxreg.step_gradient(moved, *given[1:]).sum()

    with pytest.raises(TypeError, match=r"step_gradient: moved: expected .*differentiated"):
        jax.grad(total)(given[0])
    tensors = [torch.tensor(x, requires_grad=k == 1) for k, x in enumerate(given)]
    with pytest.raises(ValueError, match=r"step_gradient: slope: expected"):
        torchreg.step_gradient(*tensors)


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("shape", [(5, 40), (9, 10, 41)])
def test_a_pull_that_nobody_needs_may_be_overwritten(
    backend: Backend, shape: tuple[int, ...], channels: int
) -> None:
    if backend.framework != "jax":
        pytest.skip("PyTorch has memory for each result")
    given = [backend.array(x) for x in operands(shape, channels)]
    scales = {"slope_scale": 0.7, "pull_scale": 3.0}

    def apart(*given: Any) -> Any:
        return jaxreg.step_gradient(*given, **scales)

    def in_place(*given: Any) -> Any:
        with overwriting():
            return jaxreg.step_gradient(*given, **scales)

    compiled = [
        jax.jit(call, donate_argnums=2).lower(*given).compile() for call in (apart, in_place)
    ]
    needed = [x.memory_analysis().temp_size_in_bytes for x in compiled]
    assert needed[1] <= needed[0]
    assert "output_to_operand_aliasing" in compiled[1].as_text()
    assert "output_to_operand_aliasing" not in compiled[0].as_text()
    # The same pull twice, and once more afterwards.
    expected = apart(*given)

    @jax.jit
    def twice(*given: Any) -> Any:
        return in_place(*given), in_place(*given), given[2] + 1

    for found in twice(*given)[:2]:
        assert_same(np.asarray(found), np.asarray(expected))
    assert_same(np.asarray(twice(*given)[2]), np.asarray(given[2] + 1))
    copies = [*given[:2], jax.numpy.copy(given[2]), given[3]]
    assert_same(np.asarray(compiled[1](*copies)), np.asarray(expected))
