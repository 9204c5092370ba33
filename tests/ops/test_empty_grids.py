"""Where nothing is sampled there is nothing to sample: an empty result, and gradients of zero."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from backends import Backend, JaxBackend
from inputs import assert_same, random_affine, random_array

import torchreg

SIZES = [(0, 4, 5), (3, 0, 5), (3, 4, 0), (0, 0, 0), (0, 5), (4, 0)]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def affine_of(dimensions: int, dtype: object = np.float32) -> np.ndarray:
    return random_affine(1, 1, dimensions, dtype=dtype)


def image_of(dimensions: int, dtype: object = np.float32) -> np.ndarray:
    return random_array(0, 2, 3, *(4, 5, 6)[:dimensions], dtype=np.float32).astype(dtype)


def field_of(size: tuple[int, ...], batch: int = 1) -> np.ndarray:
    return np.zeros((batch, *size, len(size)), np.float32)


def check(
    backend: Backend, op: str, operands: tuple[Any, ...], shape: tuple[int, ...], **options: Any
) -> None:
    """The result has this shape and no elements, and every gradient is zero."""
    empty = np.zeros(shape, operands[0].dtype)
    wrt = [k for k, operand in enumerate(operands) if isinstance(operand, np.ndarray)]
    value, gradients = backend.value_and_vjp(op, operands, empty, wrt, **options)
    assert_same(value, empty)
    for k, gradient in zip(wrt, gradients, strict=True):
        assert_same(gradient, np.zeros_like(operands[k]))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("deterministic", [False, True])
def test_an_image_sampled_at_an_empty_grid(
    backend: Backend, size: tuple[int, ...], deterministic: bool
) -> None:
    D = len(size)
    for dtype in (np.float32, np.float16, np.float64):
        operands = (image_of(D, dtype), affine_of(D), field_of(size))
        check(backend, "interpolate", operands, (2, 3, *size), deterministic=deterministic)


@pytest.mark.parametrize("size", [(3, 0, 5), (4, 0)], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"is_displacement": False},
        {"affine_last": True, "mode": "nearest"},
        {"padding_mode": "reflection", "align_corners": False},
    ],
    ids=str,
)
def test_whichever_way_the_grid_is_used(
    backend: Backend, size: tuple[int, ...], options: dict[str, Any]
) -> None:
    operands = (image_of(len(size)), affine_of(len(size)), field_of(size, 2))
    check(backend, "interpolate", operands, (2, 3, *size), **options)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_an_image_sampled_at_an_empty_grid_of_voxels(
    backend: Backend, size: tuple[int, ...]
) -> None:
    D = len(size)
    operands = (image_of(D), None, np.zeros((1, D, *size), np.float32))
    options = {"grid_unit": "voxel", "grid_channels": "first", "grid_components": "zyx"}
    check(backend, "interpolate", operands, (2, 3, *size), **options)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_an_image_resampled_to_an_empty_shape(backend: Backend, size: tuple[int, ...]) -> None:
    D = len(size)
    check(backend, "interpolate", (image_of(D), affine_of(D)), (2, 3, *size), out_shape=size)
    check(backend, "interpolate", (image_of(D),), (2, 3, *size), out_shape=size)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_labels_sampled_at_an_empty_grid(backend: Backend, size: tuple[int, ...]) -> None:
    labels = np.ones((2, 1, *(4, 5, 6)[: len(size)]), np.int16)
    for args, options in [((None, field_of(size)), {}), ((), {"out_shape": size})]:
        found = backend.call("interpolate_labels", labels, *args, return_weights=True, **options)
        assert_same(found[0], np.zeros((2, 1, *size), np.int16))
        assert_same(found[1], np.zeros((2, 1, *size), np.float32))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("options", [{}, {"add": False, "deterministic": True}], ids=str)
def test_a_field_composed_with_an_empty_one(
    backend: Backend, size: tuple[int, ...], options: dict[str, Any]
) -> None:
    D = len(size)
    u = random_array(2, 1, *(4, 5, 6)[:D], D, dtype=np.float32)
    v = field_of(size, 2)
    check(backend, "compose", (u, v), v.shape, **options)
    check(backend, "compose", (u, v, affine_of(D)), v.shape, **options)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_an_empty_displacement_after_an_affine(backend: Backend, size: tuple[int, ...]) -> None:
    for batch in (1, 2):
        u = field_of(size, batch)
        check(backend, "affine_warp", (affine_of(len(size)), u), u.shape)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("align_corners", [False, True])
def test_an_empty_displacement_in_other_units(
    backend: Backend, size: tuple[int, ...], align_corners: bool
) -> None:
    u, D = field_of(size), len(size)
    shape = (1, D, *size)
    for source, target in [("normalised", "voxel"), ("mm", "normalised"), ("voxel", "mm")]:
        options = {"source": source, "target": target, "spacing": (1.5,) * D}
        options |= {"target_channels": "first", "align_corners": align_corners}
        check(backend, "convert_displacement", (u,), shape, **options)


@pytest.mark.parametrize("size", [(3, 0, 5), (4, 0)], ids=str)
def test_an_empty_image_is_refused_at_an_empty_grid_too(
    backend: Backend, size: tuple[int, ...]
) -> None:
    """As by grid_sample."""
    image = np.zeros((1, 1, *size), np.float32)
    with pytest.raises(ValueError, match="image: expected"):
        backend.call("interpolate", image, None, field_of(size))
    with pytest.raises(ValueError, match="u: expected"):
        backend.call("compose", field_of(size), field_of(size))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [(3, 0, 5), (4, 0)], ids=str)
def test_results_are_those_of_grid_sample(size: tuple[int, ...], device: str) -> None:
    image = torch.tensor(image_of(len(size)), device=device, requires_grad=True)
    grid = torch.zeros((2, *size, len(size)), device=device, requires_grad=True)
    ours = torchreg.interpolate(image, grid=grid, is_displacement=False)
    theirs = torch.nn.functional.grid_sample(image, grid, align_corners=True)
    assert ours.shape == theirs.shape
    for sampled in (ours, theirs):
        to_image, to_grid = torch.autograd.grad(sampled.sum(), (image, grid))
        assert to_image.shape == image.shape
        assert not to_image.any()
        assert to_grid.shape == grid.shape


@pytest.mark.parametrize("device", DEVICES)
def test_torch_transforms_take_empty_grids(device: str) -> None:
    """Compiled, mapped, differentiated by torch.func."""
    image = torch.tensor(image_of(2), device=device)
    grid = torch.zeros((1, 4, 0, 2), device=device)

    def loss(image: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
        return torchreg.interpolate(image[None], grid=grid).sum() + 1

    mapped = torch.func.vmap(torch.func.grad(loss), in_dims=(0, None))(image, grid)
    torch.testing.assert_close(mapped, torch.zeros_like(image))
    compiled = torch.compile(torchreg.interpolate, fullgraph=True, backend="aot_eager")
    image.requires_grad_()
    sampled = compiled(image, grid=grid)
    assert sampled.shape == (2, 3, 4, 0)
    sampled.sum().backward()
    torch.testing.assert_close(image.grad, torch.zeros_like(image))


@pytest.mark.parametrize("device", DEVICES)
def test_jax_transforms_take_empty_grids(device: str) -> None:
    """Compiled, mapped, differentiated, over an image that is mapped and one that is not."""
    import jax

    backend = JaxBackend(device)
    image, grids = backend.array(image_of(2)), backend.array(np.zeros((3, 1, 4, 0, 2), np.float32))
    loss = lambda image, grid: backend.function("interpolate")(image, None, grid).sum()  # noqa: E731
    gradient = jax.jit(jax.vmap(jax.grad(loss), in_axes=(None, 0)))(image, grids)
    assert_same(np.asarray(gradient), np.zeros((3, *image.shape), np.float32))
    images = jax.numpy.stack([image] * 3)
    gradient = jax.jit(jax.vmap(jax.grad(loss)))(images, grids)
    assert_same(np.asarray(gradient), np.zeros(images.shape, np.float32))
