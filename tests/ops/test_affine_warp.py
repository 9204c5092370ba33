"""``affine_warp``: the coordinates ``Ax + u`` that an affine and a displacement lead to."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import reference
from backends import Backend
from inputs import SHAPES, assert_close, assert_same, random_affine, random_array


def check_values_and_gradients(
    backend: Backend, args: tuple[Any, ...], options: dict[str, Any], dtype: object
) -> None:
    expected = reference.affine_warp(*args, **options)
    cotangent = random_array(99, *expected.shape, dtype=dtype)
    expected_gradients = reference.vjp_by_central_differences(
        lambda affine, u: reference.affine_warp(affine, u, **options),
        args,
        cotangent,
        (0, 1),
        step=1.0,  # linear: a large step is exact
    )
    value, gradients = backend.value_and_vjp("affine_warp", args, cotangent, (0, 1), **options)
    assert_close(value, expected, dtype)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert_close(gradient, expected_gradient, dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("align_corners", [True, False])
def test_warps_have_the_reference_values_and_gradients(
    backend: Backend, align_corners: bool, dim: int, dtype: object
) -> None:
    args = (random_affine(0, 2, dim, dtype), random_array(1, 2, *SHAPES[dim], dim, dtype=dtype))
    check_values_and_gradients(backend, args, {"align_corners": align_corners}, dtype)


@pytest.mark.parametrize("batches", list(itertools.product([1, 2], repeat=2)))
def test_an_operand_of_batch_one_serves_every_item_and_collects_their_gradients(
    backend: Backend, batches: tuple[int, int]
) -> None:
    args = (random_affine(0, batches[0], 2), random_array(1, batches[1], 4, 5, 2))
    check_values_and_gradients(backend, args, {}, np.float64)


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("shape", [(1, 6), (2, 1), (1, 6, 2), (1, 1, 1)])
def test_axes_of_one_and_two_voxels(
    backend: Backend, shape: tuple[int, ...], align_corners: bool
) -> None:
    dim = len(shape)
    args = (random_affine(0, 2, dim), random_array(1, 1, *shape, dim))
    check_values_and_gradients(backend, args, {"align_corners": align_corners}, np.float64)


@pytest.mark.parametrize("align_corners", [True, False])
def test_without_displacement_it_is_affine_grid(backend: Backend, align_corners: bool) -> None:
    import torch

    affine, shape = random_affine(0, 2, 3), SHAPES[3]
    expected = torch.nn.functional.affine_grid(
        torch.tensor(affine), (2, 1, *shape), align_corners=align_corners
    )
    warp = backend.call(
        "affine_warp", affine, np.zeros((1, *shape, 3)), align_corners=align_corners
    )
    assert_close(warp, expected.numpy(), np.float64)


def test_sampling_through_the_warp_is_sampling_through_its_parts(backend: Backend) -> None:
    image = random_array(0, 1, 2, 5, 6, 7)
    affine, u = random_affine(1, 1, 3), 0.1 * random_array(2, 1, 5, 6, 7, 3)
    warp = backend.call("affine_warp", affine, u)
    through_warp = backend.call("interpolate", image, None, warp, is_displacement=False)
    through_parts = backend.call("interpolate", image, affine, u)
    assert_close(through_warp, through_parts, np.float64)


def test_an_empty_batch_gives_an_empty_result_and_no_gradient(backend: Backend) -> None:
    affine, u = np.ones((1, 2, 3), np.float32), np.zeros((0, 4, 5, 2), np.float32)
    value, (to_affine, to_u) = backend.value_and_vjp("affine_warp", (affine, u), u, (0, 1))
    assert_same(value, u)
    assert_same(to_affine, np.zeros_like(affine))
    assert_same(to_u, u)
