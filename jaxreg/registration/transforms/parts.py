"""What kernels do with the parts of a transform: sample, chain and invert them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike, NDArray

from jaxreg import interpolate, invert_displacement
from jaxreg.warp import INVERSE_TOLERANCE
from regkernels import AffineMap, DisplacementField, Grid
from regkernels.grid import Matrix, inverse_matrix
from regkernels.maps import Part, as_part

__all__ = [
    "affine_between",
    "compose_parts",
    "fields_of",
    "invert_part",
    "matrix_of",
    "rotate",
    "with_fields",
]

Residual = NDArray[np.float32]


@functools.singledispatch
def invert_part(part: Part, *, tolerance: float = INVERSE_TOLERANCE) -> tuple[Part, Residual]:
    """Return the part that undoes another one.

    Parameters
    ----------
    part
        An affine map, or a displacement field, which `jaxreg.invert_displacement` inverts.
    tolerance
        In voxels of a field: how far from where it started a point may be after both.

    Returns
    -------
    inverse : AffineMap or DisplacementField
        A field is on the same grid. For its inverse it goes on beyond its grid as it is at the
        border.
    residual : float32[*S]
        In voxels: how far off the inverse of a field is. Where the field folds it may be above the
        tolerance. 0 for an affine map.

    Raises
    ------
    TypeError
        If it is neither.
    """
    raise TypeError(
        f"part: expected an AffineMap or a DisplacementField, got {type(part).__name__}"
    )


@invert_part.register
def _(part: AffineMap, *, tolerance: float = INVERSE_TOLERANCE) -> tuple[Part, Residual]:
    return part.inverse(), np.zeros((), np.float32)


@invert_part.register
def _(part: DisplacementField, *, tolerance: float = INVERSE_TOLERANCE) -> tuple[Part, Residual]:
    grid = part.grid
    size = jnp.asarray(2 / np.array(grid.shape[::-1]), jnp.float32)
    vectors = jnp.asarray(part.vectors, jnp.float32)
    displacement = rotate(inverse_matrix(grid.voxel_to_physical()), vectors) * size
    found, residual = invert_displacement(
        displacement[None], tolerance=tolerance, align_corners=False, return_residual=True
    )
    inverse = rotate(grid.voxel_to_physical(), found[0] / size)
    return DisplacementField(grid, inverse), np.asarray(residual)[0]


_Chain = tuple[Matrix, jax.Array | None]
"""``p -> A(p + v(p))``: ``A``, and ``v`` in millimetres at the voxels of a grid or `None`."""


def compose_parts(parts: Sequence[Part | ArrayLike], grid: Grid) -> _Chain:
    """Write a chain on a grid as ``p -> A(p + v(p))``.

    Parameters
    ----------
    parts
        Affine maps (or their matrices) and displacement fields, in the order in which a point goes
        through them.
    grid
        Where the displacements are to be known.

    Returns
    -------
    matrix : float64[D + 1, D + 1]
        ``A``.
    vectors : float32[*S, D] or None
        ``v``, millimetres, LPS; `None` where no part deforms.

    Raises
    ------
    TypeError
        If a part is neither an affine map, a displacement field nor a matrix.
    ValueError
        If a matrix has another shape.
    """
    chain: _Chain = np.eye(grid.ndim + 1), None
    for part in map(as_part, parts):
        chain = _followed_by(part, chain, grid)
    return chain


def matrix_of(parts: Sequence[Part], ndim: int) -> Matrix:
    """Return the product of a chain's affine maps, which is the ``A`` of `compose_parts`."""
    matrices = [np.asarray(x.matrix, np.float64) for x in parts if isinstance(x, AffineMap)]
    return functools.reduce(lambda before, matrix: matrix @ before, matrices, np.eye(ndim + 1))


def fields_of(parts: Sequence[Part]) -> list[Any]:
    """Return the vectors of the displacement fields in a chain."""
    return [part.vectors for part in parts if isinstance(part, DisplacementField)]


def with_fields(parts: Sequence[Part], fields: Sequence[jax.Array]) -> list[Part]:
    """Return a chain with other vectors in its displacement fields, as in a traced program."""
    others = iter(fields)
    return [
        DisplacementField(part.grid, next(others)) if isinstance(part, DisplacementField) else part
        for part in parts
    ]


@functools.singledispatch
def _followed_by(part: Part, chain: _Chain, grid: Grid) -> _Chain:
    raise NotImplementedError(type(part))


@_followed_by.register
def _(part: AffineMap, chain: _Chain, grid: Grid) -> _Chain:
    matrix, vectors = chain
    return np.asarray(part.matrix, dtype=np.float64) @ matrix, vectors


@_followed_by.register
def _(part: DisplacementField, chain: _Chain, grid: Grid) -> _Chain:
    matrix, vectors = chain
    to_physical = grid.normalised_to_physical(align_corners=False)
    before = None if vectors is None else rotate(inverse_matrix(to_physical), vectors)[None]
    affine = affine_between(part.grid, matrix @ to_physical)
    same = part.grid.shape == grid.shape and np.allclose(affine, np.eye(*affine.shape[1:]), 0, 1e-7)
    if same and before is None:
        # Sampling would give the same and take memory.
        found = jnp.asarray(part.vectors, jnp.float32)
    else:
        field = jnp.asarray(part.vectors, jnp.float32)
        found = _sample_vectors(field, np.float32(affine), before, grid.shape)
    step = rotate(inverse_matrix(matrix), found)
    return matrix, step if vectors is None else vectors + step


def affine_between(sampled: Grid, to_physical: Matrix) -> Matrix:
    """Return the ``affine`` of `interpolate` from a matrix to physical space, ``(1, D, D + 1)``."""
    to_normalised = inverse_matrix(sampled.normalised_to_physical(align_corners=False))
    return (to_normalised @ to_physical)[None, :-1]


@functools.partial(jax.jit, static_argnames="shape")
def _sample_vectors(
    field: jax.Array,
    affine: NDArray[np.float32],
    before: jax.Array | None,
    shape: tuple[int, ...],
) -> jax.Array:
    """Sample displacements ``(*S, D)`` as ITK does, at ``A(x + u(x))``: ``(*shape, D)``."""
    where: dict[str, Any] = {
        "affine": jnp.asarray(affine),
        "grid": before,
        "affine_last": True,
        "out_shape": shape,
        "align_corners": False,
    }
    vectors = jnp.moveaxis(field, -1, 0)[None]
    found = interpolate(vectors, padding_mode="border", **where)
    # The nearest voxel exists up to half a voxel beyond the outermost centres.
    ones = jnp.ones((1, 1, *field.shape[:-1]), jnp.float32)
    inside = interpolate(ones, mode="nearest", **where)
    return jnp.moveaxis((found * inside)[0], 0, -1)


def rotate(matrix: Matrix, vectors: jax.Array) -> jax.Array:
    """Multiply vectors ``(..., D)`` by the linear part of a homogeneous matrix."""
    linear = jnp.asarray(matrix[:-1, :-1], jnp.float32)
    # By default a GPU rounds the factors of a product to fewer bits.
    return jnp.einsum("ij,...j->...i", linear, vectors, precision=jax.lax.Precision.HIGHEST)
