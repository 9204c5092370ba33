"""What kernels do with the parts of a transform: sample, chain and invert them."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike, NDArray

from jaxreg import interpolate, invert_displacement
from jaxreg.registration.programs import Program
from jaxreg.warp import INVERSE_TOLERANCE
from regkernels import AffineMap, DisplacementField, Grid
from regkernels.grid import Matrix, inverse_matrix
from regkernels.maps import Part, as_part

__all__ = [
    "Chain",
    "Step",
    "affine_between",
    "chain_on",
    "compose_parts",
    "displacements",
    "fields_of",
    "invert_part",
    "matrix_of",
    "rotate",
    "turned",
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


class Step(NamedTuple):
    """What takes a chain through a displacement field, in float32."""

    to_normalised: NDArray[np.float32]
    """From millimetres to the normalised coordinates of the grid that the chain is on, linear."""
    affine: NDArray[np.float32]
    """The ``affine`` of `interpolate` to the field."""
    back: NDArray[np.float32]
    """What undoes the affine maps before the field, linear."""


class Chain(NamedTuple):
    """A chain on a grid, without the vectors of its fields."""

    matrix: Matrix
    steps: tuple[Step, ...]
    """One for each field."""
    is_on_grid: bool
    """Whether the first field is on the grid of the chain, and comes first."""


def chain_on(parts: Sequence[Part | ArrayLike], grid: Grid) -> Chain:
    """Return what there is to know of a chain before its fields are sampled on a grid."""
    matrix, is_on_grid = np.eye(grid.ndim + 1), False
    steps: list[Step] = []
    to_physical = grid.normalised_to_physical(align_corners=False)
    to_normalised = _linear(inverse_matrix(to_physical))
    for part in map(as_part, parts):
        if isinstance(part, AffineMap):
            matrix = np.asarray(part.matrix, np.float64) @ matrix
            continue
        affine = affine_between(part.grid, matrix @ to_physical)
        if not steps:
            same = np.allclose(affine, np.eye(*affine.shape[1:]), 0, 1e-7)
            is_on_grid = part.grid.shape == grid.shape and same
        back = _linear(inverse_matrix(matrix))
        steps.append(Step(to_normalised, affine.astype(np.float32), back))
    return Chain(matrix, tuple(steps), is_on_grid)


@functools.partial(Program, static=("is_on_grid", "shape"))
def displacements(
    fields: Sequence[jax.Array],
    steps: Sequence[Step],
    *,
    is_on_grid: bool,
    shape: tuple[int, ...],
) -> jax.Array:
    """Return how a chain displaces the voxels of a grid before its affine maps.

    Parameters
    ----------
    fields
        The vectors of its fields, one or more.
    steps, is_on_grid
        See `Chain`.
    shape
        That of the grid.

    Returns
    -------
    float32[*S, D]
        Millimetres, LPS.
    """
    vectors: jax.Array | None = None
    for field, step in zip(fields, steps, strict=True):
        found = jnp.asarray(field, jnp.float32)
        if vectors is not None or not is_on_grid:  # else sampling would give the same
            before = None if vectors is None else turned(step.to_normalised, vectors)[None]
            found = _sample_vectors(found, step.affine, before, shape)
        shift = turned(step.back, found)
        vectors = shift if vectors is None else vectors + shift
    assert vectors is not None
    return vectors


def compose_parts(parts: Sequence[Part | ArrayLike], grid: Grid) -> tuple[Matrix, jax.Array | None]:
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
    chain = chain_on(parts, grid)
    if not chain.steps:
        return chain.matrix, None
    fields = fields_of([as_part(part) for part in parts])
    found = displacements(fields, chain.steps, is_on_grid=chain.is_on_grid, shape=grid.shape)
    return chain.matrix, found


def matrix_of(parts: Sequence[Part], ndim: int) -> Matrix:
    """Return the product of a chain's affine maps, which is the ``A`` of `compose_parts`."""
    matrices = [np.asarray(x.matrix, np.float64) for x in parts if isinstance(x, AffineMap)]
    return functools.reduce(lambda before, matrix: matrix @ before, matrices, np.eye(ndim + 1))


def fields_of(parts: Sequence[Part]) -> list[Any]:
    """Return the vectors of the displacement fields in a chain."""
    return [part.vectors for part in parts if isinstance(part, DisplacementField)]


def affine_between(sampled: Grid, to_physical: Matrix) -> Matrix:
    """Return the ``affine`` of `interpolate` from a matrix to physical space, ``(1, D, D + 1)``."""
    to_normalised = inverse_matrix(sampled.normalised_to_physical(align_corners=False))
    return (to_normalised @ to_physical)[None, :-1]


def _sample_vectors(
    field: jax.Array,
    affine: NDArray[np.float32] | jax.Array,
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
    return turned(_linear(matrix), vectors)


def turned(linear: NDArray[np.float32] | jax.Array, vectors: jax.Array) -> jax.Array:
    """Multiply vectors ``(..., D)`` by a matrix ``(D, D)``."""
    # Written out it is a pass over the vectors, with what is around it. As a product it calls a
    # library on a GPU, which takes longer to load than this to run.
    terms = (vectors[..., k, None] * linear[:, k] for k in range(vectors.shape[-1]))
    product: jax.Array = functools.reduce(operator.add, terms)
    return product


def _linear(matrix: Matrix) -> NDArray[np.float32]:
    linear: NDArray[np.float32] = np.asarray(matrix)[:-1, :-1].astype(np.float32)
    return linear
