"""Where voxels lie in physical space: the header of a volume, without its intensities."""

from __future__ import annotations

import dataclasses
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
