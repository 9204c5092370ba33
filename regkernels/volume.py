"""Volumes with a place in the world: voxels, spacing, origin and direction, as ITK keeps them.

Three coordinate systems meet here, all with components in x, y, z order:

- *voxel*: the index of a voxel centre, x along the last array axis;
- *physical*: millimetres in the patient's LPS frame (x to the left, y to the back, z up);
- *normalised*: ``[-1, 1]`` between the centres of the first and the last voxel of an axis
  (``align_corners=True``), which is what the operations of `jaxreg` and `torchreg` work in.

Matrices are homogeneous, ``(D + 1, D + 1)``, float64, and applied to column vectors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from regkernels.grid import Grid, Matrix

__all__ = ["Volume", "centre_of_mass", "normalised_affine", "rigid_motion"]


_LARGEST_EXACT = 2**24
"""Up to here float32 holds every whole number."""


def _voxel_values(array: ArrayLike) -> NDArray[Any]:
    """Keep integers, so that labels are not rounded; everything else is computed with anyway.

    Labels that are stored as floats too wide for float32 become integers.
    """
    values = np.asarray(array)
    if np.iscomplexobj(values):
        raise ValueError("array: expected real numbers, got complex ones")
    if values.dtype == np.bool_:
        return values.astype(np.uint8)
    if np.issubdtype(values.dtype, np.integer):
        return values
    if values.dtype.itemsize > 4 and values.size:
        dtype = _integers_that_hold(values)
        if dtype is not None:
            return values.astype(dtype)
    return values.astype(np.float32)


def _integers_that_hold(values: NDArray[Any]) -> type[np.integer[Any]] | None:
    """Return an integer dtype for whole numbers that float32 would round, `None` for others."""
    low, high = values.min(), values.max()
    if not max(-low, high) > _LARGEST_EXACT or not (np.trunc(values) == values).all():
        return None
    if (values.astype(np.float32) == values).all():
        return None
    for dtype in (np.int32, np.int64, np.uint64):
        # As floats, the largest of the wider ones would be rounded to one more, which overflows.
        first, beyond = int(np.iinfo(dtype).min), int(np.iinfo(dtype).max) + 1
        if first <= low and high < beyond:
            return dtype
    return None


@dataclasses.dataclass(frozen=True)
class Volume:
    """An image on a regular grid in physical space. `jaxreg` makes it a JAX pytree.

    `create` and `on_grid` check what they are given; the constructor takes it as it is.

    Attributes
    ----------
    array
        Voxel values, ``([Z,] Y, X)`` or, with several channels, ``(C, [Z,] Y, X)``.
    grid
        Where the voxels lie.
    """

    array: Any
    grid: Grid

    @classmethod
    def create(
        cls,
        array: ArrayLike,
        spacing: Sequence[float] | None = None,
        origin: Sequence[float] | None = None,
        direction: ArrayLike | None = None,
    ) -> Volume:
        """Build a volume and check that its parts fit together.

        Parameters
        ----------
        array
            Voxel values, ``([Z,] Y, X)`` or ``(C, [Z,] Y, X)``. Integers stay what they are,
            booleans become uint8, all else float32; but where all values are whole and float32
            would round one, as of labels stored as float64, they become int32, int64 or uint64.
        spacing
            Millimetres, x first; 1 by default. Its length says how many of the array's axes are
            spatial; without it all are.
        origin
            Millimetres, LPS; 0 by default.
        direction
            ``(D, D)``; the identity by default.

        Raises
        ------
        ValueError
            If the array is not 2-D or 3-D, is empty or holds a value that is not finite, if the
            spacing is not positive, if the direction cannot be inverted, or if a size is wrong.
        """
        values = _voxel_values(array)
        ndim = values.ndim if spacing is None else np.size(spacing)
        if ndim not in (2, 3):
            raise ValueError(f"array: expected 2 or 3 dimensions, got {ndim}")
        if values.ndim not in (ndim, ndim + 1):
            raise ValueError(
                f"array: expected {ndim} dimensions as spacing, or one more for channels, "
                f"got shape {values.shape}"
            )
        if values.size == 0:
            raise ValueError(f"array: expected voxels, got shape {values.shape}")
        if not np.isfinite(values).all():
            raise ValueError("array: expected finite values, got NaN or infinity")
        header = {
            "spacing": (np.ones(ndim) if spacing is None else spacing, (ndim,)),
            "origin": (np.zeros(ndim) if origin is None else origin, (ndim,)),
            "direction": (np.eye(ndim) if direction is None else direction, (ndim, ndim)),
        }
        parts = {}
        for name, (value, shape) in header.items():
            part = np.asarray(value, dtype=np.float64)
            if part.shape != shape or not np.isfinite(part).all():
                raise ValueError(f"{name}: expected {shape} finite numbers, got {value!r}")
            parts[name] = part
        if (parts["spacing"] <= 0).any():
            raise ValueError(f"spacing: expected positive numbers, got {spacing!r}")
        if abs(np.linalg.det(parts["direction"])) < 1e-6:
            raise ValueError(f"direction: expected independent columns, got {direction!r}")
        return cls(values, Grid(values.shape[-ndim:], **parts))

    @classmethod
    def on_grid(cls, grid: Grid, array: ArrayLike) -> Volume:
        """Return a volume on a grid.

        Parameters
        ----------
        grid
            Where the voxels lie.
        array
            ``([Z,] Y, X)`` or ``(C, [Z,] Y, X)``; its dtype is as in `create`.

        Raises
        ------
        ValueError
            If the array does not have the grid's shape.
        """
        shape = np.shape(array)
        if shape[-grid.ndim :] != grid.shape or len(shape) > grid.ndim + 1:
            raise ValueError(f"array: expected shape {grid.shape}, got {shape}")
        return cls(_voxel_values(array), grid)

    @property
    def ndim(self) -> int:
        """Number of spatial dimensions."""
        return self.grid.ndim

    @property
    def shape(self) -> tuple[int, ...]:
        """Voxels along each axis, ``([Z,] Y, X)``."""
        return self.grid.shape

    @property
    def channels(self) -> int:
        """Number of values per voxel."""
        return 1 if np.ndim(self.array) == self.ndim else int(np.shape(self.array)[0])

    def batched(self) -> Any:
        """Return the voxel values as a batch of one, ``(1, C, [Z,] Y, X)``, float32.

        An array of NumPy, or of JAX if the volume holds one; ``torch.from_numpy`` takes the former.
        """
        array = self.array if hasattr(self.array, "astype") else np.asarray(self.array)
        return array.astype(np.float32, copy=False).reshape(1, self.channels, *self.shape)

    def with_array(self, array: ArrayLike) -> Volume:
        """Return a volume on the same grid with other values, one or several channels of them.

        Their dtype is as in `create`.
        """
        return Volume.on_grid(self.grid, array)

    def moved_by(self, motion: ArrayLike) -> Volume:
        """Return the same voxels at another place: a change of the header, without resampling.

        Parameters
        ----------
        motion
            ``(D + 1, D + 1)`` rigid motion in physical space; a point ``p`` of this volume is at
            ``motion @ p`` afterwards.
        """
        motion = np.asarray(motion, dtype=np.float64)
        grid = dataclasses.replace(
            self.grid,
            origin=motion[:-1, :-1] @ self.grid.origin + motion[:-1, -1],
            direction=motion[:-1, :-1] @ self.grid.direction,
        )
        return dataclasses.replace(self, grid=grid)


def normalised_affine(transform: ArrayLike, fixed: Volume, moving: Volume) -> Matrix:
    """Express a physical transform in the normalised coordinates of two volumes.

    The chain is fixed normalised -> fixed voxel -> physical -> (transform) -> physical -> moving
    voxel -> moving normalised.

    Parameters
    ----------
    transform
        ``(D + 1, D + 1)``; maps physical points of the fixed space to the moving space.
    fixed, moving
        Volumes that may differ in size, spacing, origin and direction.

    Returns
    -------
    ndarray
        ``(1, D, D + 1)``, the ``affine`` of `jaxreg.interpolate`.
    """
    chain = np.asarray(transform, dtype=np.float64) @ fixed.grid.normalised_to_physical()
    affine = np.linalg.solve(moving.grid.normalised_to_physical(), chain)
    return np.asarray(affine[None, :-1], dtype=np.float64)


def centre_of_mass(volume: Volume) -> NDArray[np.float64]:
    """Return the physical centre of mass of the intensities above their minimum.

    Parameters
    ----------
    volume
        A constant one has its centre of mass in the middle of the grid; of several channels the
        sum counts.

    Returns
    -------
    ndarray
        ``(D,)``, millimetres.
    """
    weights = np.asarray(volume.array, dtype=np.float64)
    weights = weights.reshape(-1, *volume.shape).sum(axis=0)
    weights = weights - weights.min()
    total = weights.sum()
    if total == 0:
        return volume.grid.centre()
    axes = range(volume.ndim)
    index = [
        np.arange(volume.shape[axis])
        @ weights.sum(axis=tuple(a for a in axes if a != axis))
        / total
        for axis in reversed(axes)
    ]
    position: NDArray[np.float64] = volume.grid.voxel_to_physical() @ [*index, 1.0]
    return position[:-1]


def rigid_motion(
    angle_degrees: float, axis: ArrayLike, shift: ArrayLike, centre: ArrayLike
) -> Matrix:
    """Return a 3-D rotation about a centre, followed by a shift, as a ``(4, 4)`` matrix.

    Parameters
    ----------
    angle_degrees
        Angle of the right-handed rotation (Rodrigues' formula).
    axis
        Direction of the rotation axis; need not have length 1.
    shift
        Millimetres.
    centre
        Physical point that the rotation leaves in place, millimetres.

    Returns
    -------
    ndarray
        ``(4, 4)``, from physical to physical coordinates.
    """
    x, y, z = np.asarray(axis, dtype=np.float64) / np.linalg.norm(np.asarray(axis))
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    angle = np.deg2rad(angle_degrees)
    rotation = np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
    motion = np.eye(4)
    motion[:3, :3] = rotation
    motion[:3, 3] = np.asarray(centre) - rotation @ np.asarray(centre) + np.asarray(shift)
    return motion
