"""``compose``: one displacement that does what two transforms do one after the other."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import numpy as np
import pytest
import reference
from backends import Backend
from inputs import (
    SHAPES,
    assert_close,
    assert_same,
    off_grid_displacement,
    random_affine,
    random_array,
    small_displacement,
)

import jaxreg
from jaxreg._shared_planes import overwriting

DTYPES = [np.float32, np.float64]


def check_values_and_gradients(
    backend: Backend, args: tuple[Any, ...], options: dict[str, Any], dtype: object
) -> None:
    expected = reference.compose(*args, **options)
    cotangent = random_array(99, *expected.shape, dtype=dtype)
    wrt = [k for k, operand in enumerate(args) if operand is not None]
    expected_gradients = reference.compose_vjp(cotangent, *args, **options)
    value, gradients = backend.value_and_vjp("compose", args, cotangent, wrt, **options)
    assert_close(value, expected, dtype)
    for k, gradient in zip(wrt, gradients, strict=True):
        assert_close(gradient, expected_gradients[k], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("with_affine", [False, True])
@pytest.mark.parametrize("add", [True, False])
def test_compositions_have_the_reference_values_and_gradients(
    backend: Backend, add: bool, with_affine: bool, dim: int, dtype: object
) -> None:
    shape = SHAPES[dim]
    u = random_array(0, 2, *shape, dim, dtype=dtype)
    v = off_grid_displacement(1, 2, shape, dtype=dtype)
    affine = random_affine(2, 2, dim, dtype) if with_affine else None
    check_values_and_gradients(backend, (u, v, affine), {"add": add}, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(6, 77), (3, 4, 77), (6, 76), (3, 4, 76)])
@pytest.mark.parametrize("add", [True, False])
def test_long_rows_have_the_reference_values_and_gradients(
    backend: Backend, add: bool, shape: tuple[int, ...], dtype: object
) -> None:
    """Which the CPU computes by vector code, but for what lies outside."""
    dim = len(shape)
    u = random_array(0, 1, *shape, dim, dtype=dtype)
    v = off_grid_displacement(1, 1, shape, dtype=dtype)
    for affine in (None, random_affine(2, 1, dim, dtype)):
        check_values_and_gradients(backend, (u, v, affine), {"add": add}, dtype)


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("padding_mode", ["zeros", "border", "reflection"])
def test_every_padding_has_the_reference_values_and_gradients(
    backend: Backend, padding_mode: str, align_corners: bool
) -> None:
    shape = SHAPES[3]
    u = random_array(0, 1, *shape, 3)
    v = off_grid_displacement(1, 1, shape, align_corners=align_corners, reach=8)
    options = {"padding_mode": padding_mode, "align_corners": align_corners}
    check_values_and_gradients(backend, (u, v), options, np.float64)


@pytest.mark.parametrize("batches", list(itertools.product([1, 2], repeat=3)))
def test_an_operand_of_batch_one_serves_every_item_and_collects_their_gradients(
    backend: Backend, batches: tuple[int, int, int]
) -> None:
    shape = (3, 4)
    u = small_displacement(0, batches[0], shape)
    v = small_displacement(1, batches[1], shape)
    affine = random_affine(2, batches[2], 2)
    check_values_and_gradients(backend, (u, v, affine), {}, np.float64)


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("shape", [(1, 6), (2, 1), (1, 6, 2), (1, 1, 1)])
def test_axes_of_one_and_two_voxels(
    backend: Backend, shape: tuple[int, ...], align_corners: bool
) -> None:
    u, v = random_array(0, 1, *shape, len(shape)), random_array(1, 2, *shape, len(shape))
    options = {"align_corners": align_corners}
    check_values_and_gradients(backend, (u, v), options, np.float64)


def test_the_two_fields_may_live_on_grids_of_different_shapes(backend: Backend) -> None:
    """The result lives on the grid of the second."""
    u, v = random_array(0, 1, 4, 5, 6, 3), small_displacement(1, 1, (7, 3, 5))
    check_values_and_gradients(backend, (u, v), {}, np.float64)


def test_a_composition_applies_one_transform_after_the_other(backend: Backend) -> None:
    """``Ax + w`` is ``(id + u)(Ax + v)``: checked with a linear ``u``, which sampling keeps."""
    shape, matrix = (5, 6, 7), 0.2 * random_array(0, 3, 3)
    x = reference.normalised_coordinates(shape)
    u, v = (x @ matrix.T)[None], small_displacement(1, 1, shape, 0.05)
    affine = 0.8 * np.eye(3, 4)[None]
    w = backend.call("compose", u, v, affine)
    inner = 0.8 * x + v
    assert_close(0.8 * x + w, inner + inner @ matrix.T, np.float64)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_zero_displacement_is_the_neutral_element_bit_for_bit(
    backend: Backend, dtype: object
) -> None:
    u, zero = random_array(0, 2, 5, 6, 7, 3, dtype=dtype), np.zeros((1, 5, 6, 7, 3), dtype)
    assert_same(backend.call("compose", u, zero), u)
    assert_same(backend.call("compose", zero, u), u)
    assert_same(backend.call("compose", u, zero, add=False), u)


def test_the_default_padding_keeps_a_translation_whole_at_the_border(backend: Backend) -> None:
    """With zero padding the composed field would tear where samples leave the volume."""
    u = np.full((1, 4, 5, 6, 3), 0.25, np.float32)
    assert_same(backend.call("compose", u, u), 2 * u)
    assert not (backend.call("compose", u, u, padding_mode="zeros") == 2 * u).all()


def test_derivatives_at_a_zero_displacement_are_right_sided(backend: Backend) -> None:
    u, zero = random_array(0, 1, 4, 5, 2), np.zeros((1, 4, 5, 2))
    check_values_and_gradients(backend, (u, zero), {}, np.float64)


def test_one_array_may_be_both_fields(backend: Backend) -> None:
    u = small_displacement(0, 1, (4, 5, 6), dtype=np.float32)
    assert_same(backend.call("compose", u, u), backend.call("compose", u, u.copy()))


@pytest.mark.parametrize("shape", [(36, 41), (10, 12, 14), (9, 40, 70)])
@pytest.mark.parametrize("mode", ["bilinear", "cubic"])
def test_the_result_may_be_in_the_place_of_the_second_field(
    backend: Backend, mode: str, shape: tuple[int, ...]
) -> None:
    if backend.framework != "jax":
        pytest.skip("PyTorch has memory for each result")
    dim = len(shape)
    u, v = (np.float32(0.3) * random_array(k, 2, *shape, dim, dtype=np.float32) for k in (1, 2))
    expected = backend.call("compose", u, v, mode=mode)

    def compose(u: Any, v: Any) -> Any:
        with overwriting():
            return jaxreg.compose(u, v, mode=mode)

    compiled = jax.jit(compose, donate_argnums=1).lower(*map(backend.array, (u, v))).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.1 * v.nbytes
    assert_same(np.asarray(compiled(*map(backend.array, (u, v)))), expected)


def test_an_empty_batch_gives_an_empty_result_and_no_gradient(backend: Backend) -> None:
    u, v = np.ones((1, 4, 5, 6, 3), np.float32), np.zeros((0, 4, 5, 6, 3), np.float32)
    composed = backend.call("compose", u, v)
    assert_same(composed, v)
    to_u, to_v = backend.vjp("compose", (u, v), composed, (0, 1))
    assert_same(to_u, np.zeros_like(u))
    assert_same(to_v, v)
