"""``coverage``: how far an image covers the places where it is sampled."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import reference
from backends import Backend
from inputs import SHAPES, assert_close, assert_same, random_affine, random_array

from regkernels import _core

NAN, INFINITY = float("nan"), float("inf")


def near_identity(seed: int, items: int, dim: int, dtype: object = np.float64) -> np.ndarray:
    """Affines that leave about half of the samples inside."""
    return (np.eye(dim, dim + 1) + 0.4 * random_affine(seed, items, dim)).astype(dtype)


def weights(backend: Backend, *args: Any, **options: Any) -> np.ndarray:
    """What it returns; options that are arrays are operands."""
    if backend.framework == "torch":
        options = {name: backend.array(value) for name, value in options.items()}
    return backend.call("coverage", *args, **options)


def check(
    backend: Backend, args: tuple[Any, ...], dtype: object = np.float64, **options: Any
) -> Any:
    expected = reference.coverage(*args, **options)
    value = weights(backend, *args, **options)
    assert value.dtype == dtype
    assert_close(value, expected, dtype)
    return value


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("margin", [None, 0.0, 1.0])
@pytest.mark.parametrize("reach", [None, 0.0, 1.0, 2.5])
def test_weights_are_those_of_the_definition(
    backend: Backend, reach: float | None, margin: float | None, dim: int, dtype: Any
) -> None:
    shape = SHAPES[dim]
    affine = near_identity(0, 2, dim, dtype)
    displacement = random_array(1, 2, *shape, dim, dtype=dtype) * dtype(0.3)
    source = tuple(n + 2 for n in shape)
    options = {"source_shape": source, "margin": margin, "reach": reach}
    value = check(backend, (affine, displacement), dtype, **options)
    assert value.shape == (2, 1, *shape)
    if reach in (None, 0.0) and not margin:
        assert 0 < np.count_nonzero(value) < value.size


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("given", list(itertools.product([False, True], repeat=3)))
def test_operands_may_be_absent(backend: Backend, dim: int, given: tuple[bool, ...]) -> None:
    shape = SHAPES[dim]
    operands = (
        near_identity(0, 1, dim),
        random_array(1, 1, *shape, dim),
        random_array(2, 1, dim) ** 2,
    )
    affine, displacement, margin = (
        x if is_given else None for x, is_given in zip(operands, given, strict=True)
    )
    options = {"source_shape": shape, "margin": margin, "reach": np.full(1, 1.5)}
    if not any(given):
        with pytest.raises(TypeError, match="coverage: affine: expected an array"):
            weights(backend, None, None, **options)
        return
    check(backend, (affine, displacement), **options)
    if displacement is None:
        other = tuple(n + 3 for n in shape)
        value = check(backend, (affine, None), **options, out_shape=(7, *other))
        assert value.shape == (1, 1, *other)


@pytest.mark.parametrize("reach", [None, 1.0])
@pytest.mark.parametrize("source", [(1, 6), (5, 1), (1, 1), (1, 6, 2), (4, 1, 1), (1, 1, 1)])
def test_single_slices(backend: Backend, source: tuple[int, ...], reach: float | None) -> None:
    """Of the image, of the grid, and of both."""
    dim = len(source)
    for shape in (source, source[::-1], (4, 5, 3)[:dim], (1, 1, 1)[:dim]):
        args = (near_identity(0, 2, dim), random_array(1, 1, *shape, dim))
        check(backend, args, source_shape=source, margin=0.3, reach=reach)
        check(backend, args, source_shape=source, reach=reach)


@pytest.mark.parametrize("batches", list(itertools.product([1, 2], repeat=4)))
def test_an_operand_of_batch_one_serves_every_item(
    backend: Backend, batches: tuple[int, int, int, int]
) -> None:
    affines, fields, margins, reaches = batches
    args = (near_identity(0, affines, 2), 0.3 * random_array(1, fields, 4, 5, 2))
    margin, reach = random_array(2, margins, 2) ** 2, 3 * random_array(3, reaches) ** 2
    check(backend, args, source_shape=(5, 7), margin=margin, reach=reach)


@pytest.mark.parametrize("reach", [None, 1.3])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("dim", [2, 3])
def test_an_item_has_the_bits_that_it_has_alone(
    backend: Backend, dim: int, dtype: Any, reach: float | None
) -> None:
    shape = {2: (37, 70), 3: (5, 9, 35)}[dim]
    affine = near_identity(0, 3, dim, dtype)
    displacement = random_array(1, 3, *shape, dim, dtype=dtype) * dtype(0.3)
    margin = (random_array(2, 3, dim) ** 2).astype(dtype)
    options = {"source_shape": shape, "reach": reach}
    together = weights(backend, affine, displacement, margin=margin, **options)
    for n in range(3):
        one = slice(n, n + 1)
        alone = weights(backend, affine[one], displacement[one], margin=margin[one], **options)
        assert_same(together[one], alone)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("dim", [2, 3])
def test_an_image_covers_its_own_grid_exactly(backend: Backend, dim: int, dtype: Any) -> None:
    shape = (97, 100, 101)[:dim]
    displacement = np.zeros((1, *shape, dim), dtype)
    for affine in (None, np.eye(dim, dim + 1, dtype=dtype)[None]):
        for options in ({}, {"reach": 2.0}):
            value = weights(backend, affine, displacement, source_shape=shape, **options)
            assert_same(value, np.ones((1, 1, *shape), dtype))


def test_the_weight_falls_to_0_at_the_outer_edge(backend: Backend) -> None:
    """Along a row of voxels, which is moved by tenths of a voxel."""
    moves = np.arange(11) / 10
    affine = np.tile(np.eye(2, 3), (11, 1, 1))
    affine[:, 0, 2] = moves * 2 / 8
    row = weights(backend, affine, source_shape=(3, 9))[:, 0, 1]
    assert_close(row[:, -1], np.clip(1 - 2 * moves, 0, 1), np.float64)
    assert_same(row[:, 1:-1], np.ones((11, 7)))
    margin = np.array([1.0, 0])
    row = weights(backend, affine, source_shape=(3, 9), margin=margin)[:, 0, 1]
    assert_close(row[:, -2], 1 - moves, np.float64)
    assert_close(row[:, 0], moves, np.float64)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("reach", [None, 2.0])
@pytest.mark.parametrize("dim", [2, 3])
def test_a_place_that_is_not_a_number_weighs_nothing(
    backend: Backend, dim: int, reach: float | None, dtype: Any
) -> None:
    shape = (6, 7, 40)[:dim]
    displacement = np.zeros((1, *shape, dim), dtype)
    spoilt = [(NAN, 0), (INFINITY, dim - 1), (-INFINITY, 0)]
    for i, (bad, component) in enumerate(spoilt):
        displacement[(0, 2, 2 + i, *[3] * (dim - 2), component)] = bad
    options: dict[str, Any] = {"source_shape": shape, "reach": reach}
    for affine in (None, np.eye(dim, dim + 1, dtype=dtype)[None]):
        value = weights(backend, affine, displacement, **options)
        expected = np.ones((1, 1, *shape), dtype)
        for i in range(len(spoilt)):
            expected[(0, 0, 2, 2 + i, *[3] * (dim - 2))] = 0
        assert_same(value, expected)
    nothing = np.full((1, dim, dim + 1), NAN, dtype)
    value = weights(backend, nothing, displacement, **options)
    assert_same(value, np.zeros((1, 1, *shape), dtype))


def test_no_voxel_beyond_a_quarter_of_the_image_is_asked_for(backend: Backend) -> None:
    """A grid of voxels that are each as large as the image: none of them would count otherwise."""
    affine = 8 * np.eye(2, 3)[None]
    value = weights(backend, affine, source_shape=(9, 9), out_shape=(3, 3), reach=1.0)
    assert_same(value[0, 0], np.outer([0.0, 1, 0], [0.0, 1, 0]))


def test_an_empty_batch_or_grid_gives_an_empty_result(backend: Backend) -> None:
    affine = np.ones((1, 2, 3), np.float32)
    for shape in ((0, 4, 5), (1, 0, 5), (2, 4, 0)):
        value = weights(backend, affine, np.zeros((*shape, 2), np.float32), source_shape=(4, 5))
        assert_same(value, np.zeros((shape[0], 1, *shape[1:]), np.float32))
    value = weights(backend, affine, source_shape=(4, 5), out_shape=(0, 3), reach=1.0)
    assert value.shape == (1, 1, 0, 3)


def test_it_has_no_gradient(backend: Backend) -> None:
    assert _core.ops()["coverage"]["gradient"] is None
    affine = np.eye(2, 3)[None]
    with pytest.raises((TypeError, ValueError), match="coverage: affine: "):
        backend.vjp("coverage", (affine,), np.ones((1, 1, 4, 5)), (0,), source_shape=(4, 5))
