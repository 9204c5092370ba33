"""Volumes to and from the images that SimpleITK and nibabel keep in memory."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from regkernels.files.images import image_grid, image_values, itk_image
from regkernels.grid import Grid
from regkernels.volume import Volume

__all__ = ["from_nibabel", "from_simpleitk", "to_nibabel", "to_simpleitk"]

_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
"""From RAS to LPS, or back."""


def from_simpleitk(image: Any) -> Volume:
    """Return a SimpleITK image as a volume.

    Parameters
    ----------
    image : SimpleITK.Image
        In 2-D or 3-D; several values per voxel become channels.

    Returns
    -------
    Volume
        With a copy of its values.

    Raises
    ------
    ValueError
        If it is not in 2-D or 3-D, is empty, or holds values that are not finite.
    """
    grid, values = image_grid(image), image_values(image)
    if values.ndim > grid.ndim:
        values = np.moveaxis(values, -1, 0)
    return Volume.create(values, grid.spacing, grid.origin, grid.direction)


def to_simpleitk(volume: Volume) -> Any:
    """Return a volume as a SimpleITK image.

    Parameters
    ----------
    volume
        Channels become several values per voxel.

    Returns
    -------
    SimpleITK.Image
        With a copy of its values.
    """
    array = np.asarray(volume.array)
    several = array.ndim > volume.ndim
    return itk_image(np.moveaxis(array, 0, -1) if several else array, volume.grid, vectors=several)


def from_nibabel(image: Any) -> Volume:
    """Return a spatial image of nibabel as a volume.

    Parameters
    ----------
    image : nibabel.spatialimages.SpatialImage
        ``(X, Y)``, ``(X, Y, Z)`` or ``(X, Y, Z, C)``, or with one axis more of one entry before
        ``C``, as NIfTI has vectors; its affine leads to RAS. A single slice in ``(X, Y, 1)`` stays
        in space.

    Returns
    -------
    Volume
        With its scaled values, as channels those of the last axis.

    Raises
    ------
    ValueError
        For another number of axes, an affine that cannot be inverted or, in 2-D, leaves the plane
        of x and y, or values that are not finite.
    """
    values = np.asanyarray(image.dataobj)
    if values.ndim == 5 and values.shape[3] == 1:
        values = values[:, :, :, 0]
    if values.ndim not in (2, 3, 4):
        raise ValueError(f"image: expected 2 to 4 axes, got shape {values.shape}")
    ndim = min(values.ndim, 3)
    grid = _grid(np.asarray(image.affine, np.float64), values.shape[:ndim][::-1])
    array = np.transpose(values, (*range(ndim, values.ndim), *reversed(range(ndim))))
    return Volume.create(array, grid.spacing, grid.origin, grid.direction)


def _grid(affine: NDArray[np.float64], shape: tuple[int, ...]) -> Grid:
    ndim = len(shape)
    matrix = _RAS @ affine
    lengths = np.linalg.norm(matrix[:3, :ndim], axis=0)
    if ndim == 2 and (abs(matrix[2, :2]) > 1e-3 * lengths).any():
        raise ValueError(
            "image: expected a 2-D image in the plane of x and y, got one that leaves it; give it "
            "a third axis of one slice"
        )
    axes = matrix[:ndim, :ndim]
    spacing = np.linalg.norm(axes, axis=0)
    if not np.isfinite(matrix).all() or not (spacing > 0).all():
        raise ValueError(f"image: expected finite axes that are not 0, got {affine.tolist()}")
    return Grid(shape, spacing, matrix[:ndim, 3].copy(), axes / spacing)


def to_nibabel(volume: Volume) -> Any:
    """Return a volume as a NIfTI image of nibabel.

    Parameters
    ----------
    volume
        Channels come last. An image in 2-D gets no third axis, and can have one channel alone.

    Returns
    -------
    nibabel.Nifti1Image
        With an affine that leads to RAS, in millimetres, as its sform. Integers of 64 bits stay
        what they are.

    Raises
    ------
    ValueError
        If it is in 2-D and has several channels, which NIfTI has no axis for.
    """
    import nibabel

    array, ndim = np.asarray(volume.array), volume.ndim
    if ndim == 2 and volume.channels > 1:
        raise ValueError(f"volume: expected 1 channel in 2-D, got {volume.channels}")
    if array.ndim > ndim and ndim == 2:
        array = array[0]
    channels = array.ndim - ndim
    axes = (*reversed(range(channels, array.ndim)), *range(channels))
    affine = np.eye(4)
    matrix = volume.grid.voxel_to_physical()
    affine[:ndim, :ndim], affine[:ndim, 3] = matrix[:-1, :-1], matrix[:-1, -1]
    values = np.transpose(array, axes)
    image = nibabel.Nifti1Image(values, _RAS @ affine, dtype=values.dtype)
    image.header.set_xyzt_units("mm")
    return image
