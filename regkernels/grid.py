"""Where voxels lie in physical space: the header of a volume, without its intensities."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["Grid", "Matrix", "inverse_matrix", "normalised_to_voxel"]

Matrix = NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Grid:
    """A regular grid in physical space, as ITK keeps it.

    `jaxreg` makes it a JAX pytree whose shape is static.

    Attributes
    ----------
    shape
        Voxels along each axis, ``([Z,] Y, X)``.
    spacing
        Distance between voxel centres in millimetres, ``(D,)``, x first.
    origin
        Physical position of the first voxel's centre in millimetres, ``(D,)``, LPS.
    direction
        ``(D, D)``; column ``k`` is the unit vector along which voxel axis ``k`` (x first) runs.
    """

    shape: tuple[int, ...]
    spacing: Any
    origin: Any
    direction: Any

    @property
    def ndim(self) -> int:
        """Number of spatial dimensions."""
        return len(self.shape)

    def voxel_to_physical(self) -> Matrix:
        """Return the matrix from voxel to physical coordinates."""
        matrix = np.eye(self.ndim + 1)
        matrix[:-1, :-1] = np.asarray(self.direction) * np.asarray(self.spacing)
        matrix[:-1, -1] = self.origin
        return matrix

    def normalised_to_physical(self, *, align_corners: bool = True) -> Matrix:
        """Return the matrix from normalised to physical coordinates."""
        return self.voxel_to_physical() @ normalised_to_voxel(
            self.shape, align_corners=align_corners
        )

    def centre(self) -> NDArray[np.float64]:
        """Return the physical position of the middle of the grid in millimetres, ``(D,)``."""
        return self.normalised_to_physical()[:-1, -1]

    def voxels_apart(self, other: Grid) -> float:
        """Return how far the voxels of this grid are from those of the same index in another one.

        Parameters
        ----------
        other
            A grid with as many dimensions.

        Returns
        -------
        float
            The largest distance along an axis of the other grid in its voxels, at the outer
            corners, where it is largest; infinity for other shapes.
        """
        if self.shape != other.shape:
            return math.inf
        to_voxel = np.linalg.solve(other.voxel_to_physical(), self.voxel_to_physical())
        # A single voxel is as long as its spacing says, so that also that is compared.
        outer = [(-0.5, size - 0.5) for size in self.shape[::-1]]
        corners = np.array([(*corner, 1.0) for corner in itertools.product(*outer)]).T
        return float(np.abs(to_voxel @ corners - corners).max())

    def same_place(self, other: Grid, tolerance: float = 0.01) -> bool:
        """Return whether the voxels of two grids lie at the same places.

        Parameters
        ----------
        other
            A grid with as many dimensions.
        tolerance
            Of `voxels_apart`. The default leaves room for headers that a format rounds to float32,
            which are 0.003 voxels off where 256 of 0.1 mm are 1 m from the origin.
        """
        return self.voxels_apart(other) <= tolerance


def normalised_to_voxel(shape: Sequence[int], *, align_corners: bool = True) -> Matrix:
    """Return the matrix from normalised to voxel coordinates of a grid.

    Parameters
    ----------
    shape
        Array shape, ``([Z,] Y, X)``.
    align_corners
        Whether -1 and 1 are the centres of the first and last voxel (an axis of length 1 counts
        as one voxel long) or the outer edges.
    """
    size = np.array(shape[::-1], dtype=np.float64)
    length = np.maximum(size - 1, 1) if align_corners else size
    matrix = np.diag([*length / 2, 1.0])
    matrix[:-1, -1] = (size - 1) / 2
    return matrix


def inverse_matrix(matrix: ArrayLike) -> Matrix:
    """Return the inverse of a homogeneous matrix in float64."""
    inverse: Matrix = np.linalg.inv(np.asarray(matrix, dtype=np.float64))
    return inverse
