"""Volumes with a place in the world: voxels, spacing, origin and direction, as ITK keeps them.

Three coordinate systems meet here, all with components in x, y, z order:

- *voxel*: the index of a voxel centre, x along the last array axis;
- *physical*: millimetres in the patient's LPS frame (x to the left, y to the back, z up);
- *normalised*: ``[-1, 1]`` between the centres of the first and the last voxel of an axis
  (``align_corners=True``), which is what the operations of this package work in.

Matrices are homogeneous, ``(D + 1, D + 1)``, float64, and applied to column vectors.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike, NDArray

from jaxreg.registration.grid import Grid, Matrix
from jaxreg.registration.itk_images import (
    image_grid,
    image_values,
    read_image,
    write_image,
)

__all__ = [
    "Volume",
    "centre_of_mass",
    "normalised_affine",
    "read_volume",
    "rigid_motion",
    "write_volume",
]


def _voxel_values(array: ArrayLike) -> NDArray[Any]:
    """Keep integers, so that labels are not rounded; everything else is computed with anyway."""
    values = np.asarray(array)
    if np.iscomplexobj(values):
        raise ValueError("array: expected real numbers, got complex ones")
    if values.dtype == np.bool_:
        return values.astype(np.uint8)
    if np.issubdtype(values.dtype, np.integer):
        return values
    return values.astype(np.float32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Volume:
    """An image on a regular grid in physical space; a JAX pytree.

    Attributes
    ----------
    array
        Voxel values, ``([Z,] Y, X)`` or, with several channels, ``(C, [Z,] Y, X)``.
    spacing
        Distance between voxel centres in millimetres, ``(D,)``, x first.
    origin
        Physical position of the first voxel's centre in millimetres, ``(D,)``, LPS.
    direction
        ``(D, D)``; column ``k`` is the unit vector along which voxel axis ``k`` (x first) runs.
    """

    array: Any
    spacing: Any
    origin: Any
    direction: Any

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
            booleans become uint8, all else float32.
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
        return cls(values, **parts)

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
        return cls(_voxel_values(array), grid.spacing, grid.origin, grid.direction)

    @property
    def ndim(self) -> int:
        """Number of spatial dimensions."""
        return int(np.shape(self.spacing)[0])

    @property
    def shape(self) -> tuple[int, ...]:
        """Voxels along each axis, ``([Z,] Y, X)``."""
        return tuple(np.shape(self.array)[-self.ndim :])

    @property
    def channels(self) -> int:
        """Number of values per voxel."""
        return 1 if np.ndim(self.array) == self.ndim else int(np.shape(self.array)[0])

    @property
    def grid(self) -> Grid:
        """Where the voxels lie."""
        return Grid(self.shape, self.spacing, self.origin, self.direction)

    def voxel_to_physical(self) -> Matrix:
        """Return the matrix from voxel to physical coordinates."""
        return self.grid.voxel_to_physical()

    def normalised_to_physical(self) -> Matrix:
        """Return the matrix from normalised to physical coordinates."""
        return self.grid.normalised_to_physical()

    def centre(self) -> NDArray[np.float64]:
        """Return the physical position of the middle of the grid in millimetres, ``(D,)``."""
        return self.grid.centre()

    def batched(self) -> jax.Array:
        """Return the voxel values as a batch of one, ``(1, C, [Z,] Y, X)``, float32."""
        return jnp.asarray(self.array, jnp.float32).reshape(1, self.channels, *self.shape)

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
        return dataclasses.replace(
            self,
            origin=motion[:-1, :-1] @ self.origin + motion[:-1, -1],
            direction=motion[:-1, :-1] @ self.direction,
        )


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
    chain = np.asarray(transform, dtype=np.float64) @ fixed.normalised_to_physical()
    affine = np.linalg.solve(moving.normalised_to_physical(), chain)
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
        return volume.centre()
    axes = range(volume.ndim)
    index = [
        np.arange(volume.shape[axis])
        @ weights.sum(axis=tuple(a for a in axes if a != axis))
        / total
        for axis in reversed(axes)
    ]
    position: NDArray[np.float64] = volume.voxel_to_physical() @ [*index, 1.0]
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


def read_volume(path: str | os.PathLike[str]) -> Volume:
    """Read a 2-D or 3-D image through SimpleITK.

    Parameters
    ----------
    path
        The file: NIfTI, MetaImage, NRRD, GIPL, MINC 2, HDF5, DICOM or PNG.

    Returns
    -------
    Volume
        Its values and its place in the world. Several values per voxel become channels.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is not an image of real numbers in such a format, is cut short or damaged, or holds
        values that are not finite.
    """
    image = read_image(path)
    array = image_values(image)
    if image.GetNumberOfComponentsPerPixel() > 1:
        array = np.moveaxis(array, -1, 0)
    grid = image_grid(image)
    try:
        return Volume.create(array, grid.spacing, grid.origin, grid.direction)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def write_volume(volume: Volume, path: str | os.PathLike[str]) -> None:
    """Write a volume through SimpleITK; the file appears complete or not at all.

    Parameters
    ----------
    volume
        What to write, with the dtype of its array. Channels become several values per voxel.
    path
        The file; its ending says in which format: ``.nii``, ``.nii.gz``, ``.hdr``, ``.img``,
        ``.hdr.gz`` or ``.img.gz`` for NIfTI, ``.mha`` or ``.mhd`` for MetaImage, ``.nrrd`` or
        ``.nhdr`` for NRRD.

    Raises
    ------
    OSError
        If there is no such folder, or no writing in it.
    ValueError
        For another ending, or if the format cannot hold such an image.
    """
    array = np.asarray(volume.array)
    if array.ndim > volume.ndim:
        array = np.moveaxis(array, 0, -1)
    write_image(array, volume.grid, path, vectors=array.ndim > volume.ndim)
