"""``mind_ssc``: descriptors that say how alike the patches near a voxel are to each other."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import reference
from backends import BACKENDS, Backend
from inputs import SHAPES, assert_close, assert_same, random_array


def check_values_and_gradient(
    backend: Backend, image: np.ndarray, dtype: object, **options: Any
) -> None:
    expected = reference.mind_ssc(image, **options)
    cotangent = random_array(99, *expected.shape, dtype=dtype)
    value, (gradient,) = backend.value_and_vjp("mind_ssc", (image,), cotangent, (0,), **options)
    assert_close(value, expected, dtype)
    assert_close(gradient, reference.mind_ssc_vjp(cotangent, image, **options), dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("radius", [1, 2, 3, 4])
@pytest.mark.parametrize("dim", [2, 3])
def test_patches_of_every_width(backend: Backend, dim: int, radius: int, dtype: object) -> None:
    image = random_array(0, 2, 2, *SHAPES[dim], dtype=dtype)
    check_values_and_gradient(backend, image, dtype, radius=radius, dilation=1)


@pytest.mark.parametrize("dilation", [1, 2, 3, 16])
@pytest.mark.parametrize("dim", [2, 3])
def test_neighbours_at_every_distance(backend: Backend, dim: int, dilation: int) -> None:
    """Even where all of them lie beyond the border."""
    image = random_array(0, 1, 2, *SHAPES[dim])
    check_values_and_gradient(backend, image, np.float64, radius=1, dilation=dilation)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(35, 67), (37, 19, 35)])
def test_volumes_larger_than_a_block_of_work(
    backend: Backend, shape: tuple[int, ...], dtype: object
) -> None:
    image = random_array(0, 1, 1, *shape, dtype=dtype)
    check_values_and_gradient(backend, image, dtype, radius=2, dilation=1)


@pytest.mark.parametrize("dtype", [np.float16, "bfloat16"])
def test_half_precision_is_computed_with_in_single(dtype: Any) -> None:
    """The image is what it is stored as; descriptors and gradients are rounded once."""
    import torch

    import torchreg

    kind = torch.bfloat16 if dtype == "bfloat16" else torch.float16
    image = torch.tensor(random_array(0, 1, 2, *SHAPES[3])).to(kind).requires_grad_()
    wide = image.detach().float().requires_grad_()
    value, expected = torchreg.mind_ssc(image), torchreg.mind_ssc(wide)
    assert torch.equal(value, expected.to(kind))
    cotangent = torch.tensor(random_array(1, *expected.shape)).to(kind)
    value.backward(cotangent)
    expected.backward(cotangent.float())
    assert torch.equal(image.grad, wide.grad.to(kind))


@pytest.mark.parametrize("shape", [(1, 6), (2, 1), (1, 1, 5), (1, 6, 2), (2, 2, 1)])
def test_axes_of_one_and_two_voxels(backend: Backend, shape: tuple[int, ...]) -> None:
    check_values_and_gradient(backend, random_array(3, 1, 2, *shape), np.float64, radius=1)


@pytest.mark.parametrize("dim", [2, 3])
def test_a_constant_image_has_descriptors_of_one_and_no_gradient(
    backend: Backend, dim: int
) -> None:
    image = np.full((1, 1, *SHAPES[dim]), 3, np.float32)
    ones = np.ones((1, 12 if dim == 3 else 4, *SHAPES[dim]), np.float32)
    value, (gradient,) = backend.value_and_vjp("mind_ssc", (image,), ones, (0,))
    assert_same(value, ones)
    assert_same(gradient, np.zeros_like(image))


def test_a_constant_background_has_descriptors_of_one_and_no_gradient(backend: Backend) -> None:
    image = np.zeros((1, 1, 12, 14, 30), np.float32)
    image[..., :8] = random_array(0, 1, 1, 12, 14, 8, dtype=np.float32)
    cotangent = random_array(1, 1, 12, 12, 14, 30, dtype=np.float32)
    value, (gradient,) = backend.value_and_vjp("mind_ssc", (image,), cotangent, (0,), radius=1)
    assert_close(value, reference.mind_ssc(image, radius=1), np.float32)
    far = 8 + 1 + 2
    assert_same(value[..., far:], np.ones_like(value[..., far:]))
    assert_same(gradient[..., far:], np.zeros_like(image[..., far:]))
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("kind", ["faint noise beside contrast", "spot in a large image"])
def test_where_a_bound_replaces_the_variance_it_has_no_gradient(
    backend: Backend, kind: str
) -> None:
    if kind == "spot in a large image":
        image = 0.003 * random_array(1, 1, 1, 200, 240)
        image[..., 100, 120] = 1
    else:
        image = random_array(0, 1, 1, 9, 40)
        image[..., 12:] *= 1e-2
    low, high = reference.variance_bounds(image, 1, 1)
    distances = reference.patch_distances(image, 1, 1)
    variance = np.mean(distances - distances.min(axis=2, keepdims=True), axis=2, keepdims=True)
    assert ((variance > high) if kind.startswith("spot") else (variance < low)).any()
    check_values_and_gradient(backend, image, np.float64, radius=1, dilation=1)


@pytest.mark.parametrize("dim", [2, 3])
def test_neither_gain_nor_offset_nor_inversion_matters(backend: Backend, dim: int) -> None:
    image = random_array(0, 1, 1, *SHAPES[dim])
    expected = backend.call("mind_ssc", image)
    for gain, offset in ((3.0, 5.0), (-1.0, 0.0), (1e-6, 1.0)):
        value = backend.call("mind_ssc", gain * image + offset)
        np.testing.assert_allclose(value, expected, atol=1e-8)


def test_one_channel_of_every_voxel_is_one_and_the_others_are_less(backend: Backend) -> None:
    value = backend.call("mind_ssc", random_array(0, 1, 2, *SHAPES[3]))
    by_channel = value.reshape(1, 2, 12, *SHAPES[3])
    assert_same(by_channel.max(axis=2), np.ones((1, 2, *SHAPES[3])))
    assert ((value > 0) & (value <= 1)).all()


def test_channels_are_told_apart_by_the_pair_of_neighbours(backend: Backend) -> None:
    """Of an image that rises along x alone, all pairs along y and z are alike."""
    image = np.broadcast_to(np.arange(30.0) ** 2, (1, 1, 20, 20, 30))
    middle = backend.call("mind_ssc", np.array(image))[0, :, 10, 10, 15]
    assert (middle[8:] == 1).all()
    assert (middle[:8] < 1).all()


def test_each_channel_of_an_image_has_descriptors_of_its_own(backend: Backend) -> None:
    image = random_array(0, 2, 3, *SHAPES[2])
    value = backend.call("mind_ssc", image)
    for n in range(2):
        for c in range(3):
            alone = backend.call("mind_ssc", image[n : n + 1, c : c + 1])
            assert_same(value[n : n + 1, 4 * c : 4 * c + 4], alone)


def test_the_same_bits_come_every_time(backend: Backend) -> None:
    image = random_array(0, 1, 1, 20, 33, 40, dtype=np.float32)
    cotangent = random_array(1, 1, 12, 20, 33, 40, dtype=np.float32)
    value, gradients = backend.value_and_vjp("mind_ssc", (image,), cotangent, (0,))
    for _ in range(3):
        again = backend.value_and_vjp("mind_ssc", (image,), cotangent, (0,))
        assert_same(again[0], value)
        assert_same(again[1][0], gradients[0])


def test_a_voxel_that_is_no_number_is_seen_only_by_what_looks_at_it() -> None:
    image = random_array(0, 1, 1, 24, 26, dtype=np.float32)
    image[0, 0, 12, 13] = np.nan
    value = BACKENDS["torch", "cpu"].call("mind_ssc", image, radius=1, dilation=2)
    assert np.isfinite(value[..., :9, :]).all() and np.isfinite(value[..., 16:, :]).all()
    assert np.isnan(value[0, :, 12, 13 + 2]).any()


@pytest.mark.parametrize("shape", [(0, 1, 3, 4, 5), (2, 0, 3, 4)])
def test_an_empty_batch_gives_an_empty_result(backend: Backend, shape: tuple[int, ...]) -> None:
    image = np.zeros(shape, np.float32)
    channels = 12 if len(shape) == 5 else 4
    empty = np.zeros((shape[0], shape[1] * channels, *shape[2:]), np.float32)
    value, (gradient,) = backend.value_and_vjp("mind_ssc", (image,), empty, (0,))
    assert_same(value, empty)
    assert_same(gradient, image)
