"""Means over images that depend on no order, and take the memory of one of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from regkernels.grid import Grid, Matrix, inverse_matrix

__all__ = ["ExactSum", "mean_grid", "mean_motion", "mean_of"]

_BITS = 36
"""Terms of a sum are rounded to the largest one over 2^36, which float32 does not see; so float64
adds up 2^17 of them without rounding."""


class ExactSum:
    """A sum of arrays that has the same bits in whichever order they come.

    Parameters
    ----------
    shape
        That of the arrays.
    largest
        How large their values are; those that are larger take away from how many can be added.
    """

    def __init__(self, shape: Sequence[int], largest: float = 1.0) -> None:
        self._total = np.zeros(tuple(shape))
        self._steps = 2.0 ** (_BITS - math.ceil(math.log2(largest or 1.0)))

    def add(self, array: ArrayLike) -> None:
        """Add an array."""
        self._total += np.rint(np.asarray(array, np.float64) * self._steps)

    def value(self) -> NDArray[np.float64]:
        """Return the sum."""
        total: NDArray[np.float64] = self._total / self._steps
        return total


def mean_of(arrays: Sequence[ArrayLike]) -> NDArray[np.float64]:
    """Return the mean of small arrays, correctly rounded, so that it depends on no order."""
    stacked = np.asarray(arrays, np.float64)
    columns = stacked.reshape(len(stacked), -1).T
    mean = np.array([math.fsum(column) / len(stacked) for column in columns.tolist()])
    return mean.reshape(stacked.shape[1:])


def mean_motion(matrices: Sequence[ArrayLike], centre: ArrayLike) -> Matrix:
    """Return the affine that takes away the mean of several ones.

    Parameters
    ----------
    matrices
        ``(D + 1, D + 1)`` each, in physical space.
    centre
        A point, ``(D,)``, which turns and scales leave in place.

    Returns
    -------
    float64[D + 1, D + 1]
        ``M``, so that of all ``A M`` the linear parts have logarithms that add up to 0, and the
        places to which they send the centre have their mean in the centre.

    Raises
    ------
    ValueError
        If a linear part has no real logarithm: it mirrors, or makes half a turn.

    Notes
    -----
    The linear part of the mean is the barycentre of Pennec and Arsigny, "Exponential Barycenters of
    the Canonical Cartan Connection and Invariant Means on Lie Groups", 2013. It does not depend on
    where the origin is. Positions have an arithmetic mean, because of turns about far-away points
    the barycentre would be far away.
    """
    stacked = np.asarray(matrices, np.float64)
    middle = np.asarray(centre, np.float64)
    linear = stacked[:, :-1, :-1]
    inverse = np.eye(len(middle))
    for _ in range(_MOST_TURNS):
        rest = mean_of([_logarithm(one @ inverse) for one in linear])
        inverse = inverse @ _exponential(-rest)
        if np.abs(rest).max() < _NOTHING:
            break
    motion = np.eye(len(middle) + 1)
    motion[:-1, :-1] = inverse
    # Where the arithmetic mean of the affines leads to the centre from.
    source = (inverse_matrix(mean_of(list(stacked))) @ [*middle, 1.0])[:-1]
    motion[:-1, -1] = source - inverse @ middle
    return motion


_MOST_TURNS = 50
_NOTHING = 1e-14


def mean_grid(grids: Sequence[Grid], spacing: ArrayLike | None = None) -> Grid:
    """Return a grid for what all images show, if their middles are brought together.

    Parameters
    ----------
    grids
        Those of the images, of one dimension.
    spacing
        Millimetres, one number or one for each axis, x first.

    Returns
    -------
    Grid
        That of all images, if it is one and there is no spacing. Otherwise its axes have the mean
        directions of those axes of the images that run along the same physical axis, it is as
        large as the largest image along each of them, its voxels have their geometric mean unless
        a spacing is given, and its middle is the mean of the middles.
    """
    first = grids[0]
    if spacing is None and all(_equal(grid, first) for grid in grids):
        return first
    turned = [_along_physical_axes(grid) for grid in grids]
    left, _, right = np.linalg.svd(mean_of([direction for direction, _, _ in turned]))
    direction = left @ right
    if spacing is None:
        step = np.exp(mean_of([np.log(size) for _, size, _ in turned]))
    else:
        step = np.broadcast_to(np.asarray(spacing, np.float64), (first.ndim,))
    extents = [np.abs(direction.T @ own) @ extent for own, _, extent in turned]
    # What differs by rounding alone is no reason for another voxel.
    size = np.maximum(np.ceil(np.max(extents, axis=0) / step - 1e-3), 1).astype(int)
    middle = mean_of([grid.centre() for grid in grids])
    origin = middle - direction @ (step * (size - 1) / 2)
    return Grid(tuple(size[::-1].tolist()), np.array(step), origin, direction)


def _equal(one: Grid, other: Grid) -> bool:
    return one.shape == other.shape and np.array_equal(
        one.voxel_to_physical(), other.voxel_to_physical()
    )


def _along_physical_axes(
    grid: Grid,
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return directions, voxel sizes and lengths of the axes, in the order of those of space."""
    direction = np.asarray(grid.direction, np.float64)
    axes = np.arange(grid.ndim)
    best = max(
        itertools.permutations(axes.tolist()),
        key=lambda order: float(np.abs(direction[axes, list(order)]).sum()),
    )
    order = list(best)
    spacing = np.asarray(grid.spacing, np.float64)[order]
    signs = np.where(direction[axes, order] < 0, -1.0, 1.0)
    return direction[:, order] * signs, spacing, spacing * np.array(grid.shape[::-1])[order]


def _logarithm(matrix: Matrix) -> Matrix:
    """Return the principal logarithm of a real matrix, by square roots and a series."""
    values = np.linalg.eigvals(matrix)
    if ((np.abs(values.imag) <= 1e-9 * np.abs(values)) & (values.real <= 0)).any():
        raise ValueError(
            "matrices: expected affines that neither mirror nor make half a turn, between which "
            f"there is a mean, got {matrix.tolist()}"
        )
    identity = np.eye(len(matrix))
    roots = 0
    while np.abs(matrix - identity).max() > 0.05:
        root, other = matrix, identity
        for _ in range(_MOST_TURNS):  # Denman and Beavers, 1976
            before = root
            root, other = (root + np.linalg.inv(other)) / 2, (other + np.linalg.inv(root)) / 2
            if np.abs(root - before).max() < _NOTHING:
                break
        matrix, roots = root, roots + 1
    ratio = np.linalg.solve((matrix + identity).T, (matrix - identity).T).T
    power, total = ratio, ratio.copy()
    for degree in range(3, 30, 2):
        power = power @ ratio @ ratio
        total += power / degree
    return np.asarray(total * 2.0 ** (roots + 1), np.float64)


def _exponential(matrix: Matrix) -> Matrix:
    """Return the exponential of a matrix, by a series and squaring."""
    squarings = max(0, math.ceil(math.log2(max(float(np.abs(matrix).max()), 1e-300)))) + 4
    small = matrix / 2.0**squarings
    total = np.eye(len(matrix))
    for degree in range(20, 0, -1):
        total = np.eye(len(matrix)) + small @ total / degree
    for _ in range(squarings):
        total = total @ total
    return total
