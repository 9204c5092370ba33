"""Small matrices that are written out: against those of NumPy in float64."""

from __future__ import annotations

import types

import jax
import numpy as np
import pytest

from jaxreg.registration.stages import matrices
from jaxreg.registration.stages.matrices import inverse, matmul, principal_axes


def affine(ndim: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    matrix = np.eye(ndim + 1)
    matrix[:-1] = rng.normal(size=(ndim, ndim + 1)) * [*[80] * ndim, 30]
    return matrix


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("seed", range(8))
def test_inverse_undoes_the_matrix(ndim: int, seed: int) -> None:
    matrix = affine(ndim, seed)
    error = np.abs(np.asarray(inverse(np.float32(matrix))) @ matrix - np.eye(ndim + 1)).max()
    assert error < 1e-6 * np.linalg.cond(matrix)


@pytest.mark.parametrize("lengths", [(3.3, 80.7), (101.3, 87.9, 75.5)])
def test_inverse_of_a_diagonal_is_exact(lengths: tuple[float, ...]) -> None:
    lengths = (*lengths, 1.0)
    found = inverse(np.diag(np.float32(lengths)))
    np.testing.assert_array_equal(found, np.diag(1 / np.float32(lengths)))


def test_inverse_exchanges_rows_where_it_has_to() -> None:
    matrix = np.array([[0, 2, 3], [4, 0, 5], [0, 0, 1]], np.float32)
    np.testing.assert_allclose(inverse(matrix), np.linalg.inv(matrix), rtol=1e-6, atol=1e-7)


def test_inverse_of_what_has_none_is_not_finite() -> None:
    assert not np.isfinite(inverse(np.zeros((3, 3), np.float32))).any()


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("kind", ["any", "diagonal", "equal", "flat", "zero"])
@pytest.mark.parametrize("seed", range(4))
def test_principal_axes_are_the_eigenvectors(ndim: int, kind: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(ndim, ndim)) * 50
    covariance = root @ root.T
    if kind == "diagonal":
        covariance = np.diag(rng.uniform(1, 100, ndim))
    if kind == "equal":
        covariance = 7.0 * np.eye(ndim)
    if kind == "flat":  # nothing along one axis
        root[:, 0] = 0
        covariance = root @ root.T
    if kind == "zero":
        covariance = np.zeros((ndim, ndim))
    axes = np.asarray(principal_axes(np.float32(covariance)), np.float64)
    np.testing.assert_allclose(axes.T @ axes, np.eye(ndim), atol=2e-6)
    assert np.linalg.det(axes) > 0
    values = np.linalg.eigvalsh(covariance)
    largest = max(values.max(), 1)
    np.testing.assert_allclose(axes.T @ covariance @ axes, np.diag(values), atol=5e-6 * largest)


def test_principal_axes_of_many_are_those_of_each() -> None:
    roots = np.random.default_rng(0).normal(size=(5, 3, 3)).astype(np.float32)
    many = roots @ roots.transpose(0, 2, 1)
    for one, axes in zip(many, jax.vmap(principal_axes)(many), strict=True):
        np.testing.assert_allclose(axes, principal_axes(one), atol=1e-5)


def test_product_has_the_gradient_of_a_product() -> None:
    one, other = affine(3, 0).astype(np.float32), affine(3, 1).astype(np.float32)
    np.testing.assert_allclose(matmul(one, other), one @ other, rtol=1e-6, atol=1e-2)
    slope = jax.grad(lambda x: matmul(x, other).sum())(one)
    np.testing.assert_allclose(slope, np.ones((4, 4)) @ other.T, rtol=1e-5, atol=1e-3)


def test_products_of_one_shape_and_their_gradients_are_traced_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    added = []

    def add(one: jax.Array, other: jax.Array) -> jax.Array:
        added.append(one.shape)
        return one + other

    monkeypatch.setattr(matrices, "operator", types.SimpleNamespace(add=add))

    def loss(one: jax.Array, other: jax.Array) -> jax.Array:
        for _ in range(6):
            one = matmul(one, other)
        return one.sum()

    matrix = np.eye(5, dtype=np.float32)  # no other test has one of this size
    jax.make_jaxpr(jax.grad(loss, (0, 1)))(matrix, matrix)
    # The product, that in its rule, and two of its gradient, of four sums each.
    assert 4 <= len(added) <= 16
