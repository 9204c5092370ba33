"""What transforms are chained of: affine maps and displacement fields in physical space.

A chain is a sequence of such *parts*, in the order in which a point goes through them.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from regkernels.grid import Grid, inverse_matrix

__all__ = ["AffineMap", "DisplacementField", "Part", "affine_product", "as_part", "move_points"]

Points = NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class AffineMap:
    """Maps a point ``p`` to ``Mp``, in millimetres, LPS. `jaxreg` makes it a JAX pytree.

    Attributes
    ----------
    matrix
        ``M``, homogeneous: ``(D + 1, D + 1)``.
    """

    matrix: Any

    @property
    def ndim(self) -> int:
        """Number of spatial dimensions."""
        return int(np.shape(self.matrix)[0]) - 1

    def inverse(self) -> AffineMap:
        """Return the map that undoes this one.

        Raises
        ------
        numpy.linalg.LinAlgError
            If there is none.
        """
        return AffineMap(inverse_matrix(self.matrix))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        """Return the matrix, for NumPy's functions."""
        return np.array(self.matrix, dtype=dtype)

    def move(self, points: Points) -> Points:
        """Return where points ``(..., D)`` go, in float64."""
        matrix = np.asarray(self.matrix, dtype=np.float64)
        moved: Points = points @ matrix[:-1, :-1].T + matrix[:-1, -1]
        return moved


@dataclasses.dataclass(frozen=True)
class DisplacementField:
    """Maps a point ``p`` to ``p + v(p)``, in millimetres, LPS. `jaxreg` makes it a JAX pytree.

    As ITK reads such a field: linear between voxel centres, constant in the outer half of the
    outermost voxels, and zero beyond.

    Attributes
    ----------
    grid
        Where the vectors are.
    vectors
        ``([Z,] Y, X, D)``, millimetres, LPS.
    """

    grid: Grid
    vectors: Any

    @property
    def ndim(self) -> int:
        """Number of spatial dimensions."""
        return self.grid.ndim

    def covers(self, points: Points) -> NDArray[np.bool_]:
        """Return which points ``(..., D)`` lie on the grid; beyond it the field is zero."""
        voxel = AffineMap(self.grid.voxel_to_physical()).inverse().move(points)
        last = np.array(self.grid.shape[::-1]) - 1
        return np.asarray(((voxel >= -0.5) & (voxel <= last + 0.5)).all(axis=-1))

    def move(self, points: Points) -> Points:
        """Return where points ``(..., D)`` go, in float64."""
        to_voxel = AffineMap(self.grid.voxel_to_physical()).inverse()
        vectors = np.asarray(self.vectors)
        last = np.array(self.grid.shape[::-1]) - 1  # x first, as the components of points
        voxel = to_voxel.move(points)
        covered = self.covers(points)[..., None]
        inside = np.clip(voxel, 0, last)
        lower = np.minimum(inside.astype(np.int64), np.maximum(last - 1, 0))
        part = inside - lower
        found = np.zeros_like(points)
        for corner in itertools.product((0, 1), repeat=self.ndim):
            weight = np.where(corner, part, 1 - part).prod(axis=-1, keepdims=True)
            index = np.minimum(lower + corner, last)
            found += weight * vectors[tuple(np.moveaxis(index, -1, 0)[::-1])]
        moved: Points = points + np.where(covered, found, 0)
        return moved


Part = AffineMap | DisplacementField


def as_part(value: Part | ArrayLike) -> Part:
    """Return a part as it is, and a matrix as the affine map that it stands for.

    Parameters
    ----------
    value
        An affine map, a displacement field or a homogeneous matrix, ``(3, 3)`` or ``(4, 4)``.

    Returns
    -------
    AffineMap or DisplacementField

    Raises
    ------
    TypeError
        If it is none of them.
    ValueError
        If it is a matrix of another shape, or holds values that are not finite.
    """
    if isinstance(value, AffineMap | DisplacementField):
        return value
    try:
        matrix = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        raise TypeError(
            "parts: expected affine maps, displacement fields or matrices, got "
            f"{type(value).__name__}"
        ) from None
    if matrix.shape not in ((3, 3), (4, 4)) or not np.isfinite(matrix).all():
        raise ValueError(
            f"parts: expected a matrix of (3, 3) or (4, 4) finite numbers, got shape {matrix.shape}"
        )
    return AffineMap(matrix)


def affine_product(parts: Sequence[Part]) -> AffineMap | None:
    """Return a chain as one affine map; `None` where it is empty or has a displacement field."""
    maps = [part for part in parts if isinstance(part, AffineMap)]
    if not maps or len(maps) < len(parts):
        return None
    return functools.reduce(lambda first, then: AffineMap(then.matrix @ first.matrix), maps)


def move_points(points: ArrayLike, parts: Sequence[Part | ArrayLike]) -> Points:
    """Send points through a chain of transforms.

    Parameters
    ----------
    points
        ``(..., D)``, millimetres, LPS.
    parts
        Affine maps (or their matrices) and displacement fields, in the order in which a point goes
        through them.

    Returns
    -------
    ndarray
        ``(..., D)``, millimetres, LPS, float64.

    Raises
    ------
    ValueError
        If these are not finite points of D coordinates, or a matrix has another shape.
    TypeError
        If a part is neither an affine map, a displacement field nor a matrix.
    """
    moved = np.array(points, dtype=np.float64)
    for part in map(as_part, parts):
        if moved.ndim == 0 or moved.shape[-1] != part.ndim:
            raise ValueError(f"points: expected shape (..., {part.ndim}), got {moved.shape}")
        if not np.isfinite(moved).all():
            raise ValueError("points: expected finite coordinates, got NaN or infinity")
        moved = part.move(moved)
    return moved
