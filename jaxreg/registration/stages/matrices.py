"""Small matrices, written out.

For what follows from a matrix of three rows JAX calls libraries of linear algebra, which on a GPU
take longer to load than a stage takes to run. What is here becomes a part of the program around it.
"""

from __future__ import annotations

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["inverse", "matmul", "principal_axes"]

_ROTATIONS = 24
"""Each of three planes is turned eight times; after five no off-diagonal element of a symmetric
matrix of three rows is left in float32."""

_Elimination = tuple[jax.Array, jax.Array, jax.Array]
"""Rows of the matrix and beside them of what becomes the inverse; which of them are left; and for
each column the one that was taken."""


def matmul(one: jax.Array, other: jax.Array) -> jax.Array:
    """Return the product of two small matrices, ``(I, K)`` and ``(K, J)``.

    Written out, and so that its gradient is such a product, too: XLA fuses that with what is around
    it, where on a GPU every call of a library costs more than it computes. The sums are in float32:
    TensorFloat-32, the default for products there, would move samples by a tenth of a voxel.
    """
    product: jax.Array = _traced_product(one, other)
    return product


@jax.custom_vjp
def _product(one: jax.Array, other: jax.Array) -> jax.Array:
    terms = (one[:, k, None] * other[k] for k in range(one.shape[1]))
    return functools.reduce(operator.add, terms)


def _matmul_forward(
    one: jax.Array, other: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return matmul(one, other), (one, other)


def _matmul_backward(
    operands: tuple[jax.Array, jax.Array], slope: jax.Array
) -> tuple[jax.Array, jax.Array]:
    one, other = operands
    return matmul(slope, other.T), matmul(one.T, slope)


_product.defvjp(_matmul_forward, _matmul_backward)

_traced_product = jax.jit(_product)
"""Traced and lowered once for all calls with the same shapes, as its derivatives are: the programs
of a registration have nearly a hundred."""


def inverse(matrix: jax.Array) -> jax.Array:
    """Return the inverse of a small matrix, ``(D, D)``; not a finite one where there is none.

    By elimination, each time with the row that has the largest element in the column. So the
    inverse of a diagonal matrix is as exact as numbers are: that of an image's own grid leads back
    to its voxels.
    """
    size = len(matrix)
    eye = np.eye(size, dtype=matrix.dtype)
    index = np.arange(size)

    def eliminated(column: jax.Array, carry: _Elimination) -> _Elimination:
        rows, left, places = carry
        factors = jax.lax.dynamic_index_in_dim(rows, column, axis=1)
        pivot = jnp.argmax(jnp.where(left, jnp.abs(factors[:, 0]), -1))
        row = rows[pivot] / factors[pivot]
        rows = jnp.where((index == pivot)[:, None], row, rows - factors * row)
        return rows, left & (index != pivot), places.at[column].set(pivot.astype(places.dtype))

    start = jnp.concatenate([matrix, eye], axis=1), jnp.ones(size, bool), jnp.zeros(size, jnp.int32)
    rows, _, places = jax.lax.fori_loop(0, size, eliminated, start)
    found: jax.Array = rows[places, size:]
    return found


def principal_axes(covariance: jax.Array) -> jax.Array:
    """Return the eigenvectors of a symmetric matrix, ``(D, D)``, as columns, for D of 2 or 3.

    They are orthonormal and right-handed, that of the smallest eigenvalue first. Jacobi's method:
    in one plane after the other the matrix is turned so that an element off the diagonal becomes 0.
    See Golub and Van Loan, "Matrix Computations", section 8.5.
    """
    size = len(covariance)
    eye = np.eye(size, dtype=covariance.dtype)

    def turned(_: int, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        matrix, vectors = carry
        off = matrix[0, 1]
        ratio = (matrix[1, 1] - matrix[0, 0]) / jnp.where(off == 0, 1, 2 * off)
        # Of the two angles the smaller one.
        tangent = jnp.where(ratio < 0, -1, 1) / (jnp.abs(ratio) + jnp.sqrt(ratio**2 + 1))
        tangent = jnp.where(off == 0, 0, tangent)
        cosine = 1 / jnp.sqrt(tangent**2 + 1)
        sine = tangent * cosine
        turn = jnp.asarray(eye).at[:2, :2].set(jnp.array([[cosine, sine], [-sine, cosine]]))
        # The axes then change places, all in a row, so that the next turn is of the same two.
        turn = jnp.roll(turn, 1, axis=1)
        return matmul(turn.T, matmul(matrix, turn)), matmul(vectors, turn)

    matrix, vectors = jax.lax.fori_loop(0, _ROTATIONS, turned, (covariance, jnp.asarray(eye)))
    values = jnp.diagonal(matrix)
    index = np.arange(size)
    before = (values[:, None] < values) | ((values[:, None] == values) & (index[:, None] < index))
    place = before.sum(axis=0)  # of each value among all
    vectors = (vectors[:, :, None] * (place[:, None] == index)).sum(axis=1)
    mirrored = (vectors[0] * _cofactors(vectors)[0]).sum() < 0
    right_handed: jax.Array = vectors.at[:, 0].multiply(jnp.where(mirrored, -1, 1))
    return right_handed


def _cofactors(matrix: jax.Array) -> jax.Array:
    if len(matrix) == 2:
        return jnp.array([[matrix[1, 1], -matrix[1, 0]], [-matrix[0, 1], matrix[0, 0]]])
    one, two = (-1, -1), (-2, -2)

    def rolled(by: tuple[int, int]) -> jax.Array:
        return jnp.roll(matrix, by, axis=(0, 1))

    cofactors: jax.Array = rolled(one) * rolled(two) - rolled((-1, -2)) * rolled((-2, -1))
    return cofactors
