"""Series of 3-D images in time, as NIfTI files with four axes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from regkernels.files.formats.nifti import read_nifti_header, read_values
from regkernels.files.formats.reading import telling_of_damage
from regkernels.files.images import (
    NIFTI_SUFFIXES,
    check_image_grid,
    image_format_is_nifti,
    write_itk_image,
)
from regkernels.files.simpleitk import import_simpleitk
from regkernels.grid import Grid
from regkernels.volume import Volume

__all__ = ["Series", "check_series_name", "read_series", "write_series"]


class Series(NamedTuple):
    """Images of one grid, one after the other.

    Attributes
    ----------
    frames
        ``(T, Z, Y, X)``.
    grid
        Where the voxels of each lie, in space.
    time_step
        Seconds from one to the next; 0 if nobody knows.
    """

    frames: NDArray[Any]
    grid: Grid
    time_step: float

    def volume(self, number: int) -> Volume:
        """Return a frame, counted from 0."""
        return Volume.on_grid(self.grid, self.frames[number])


def read_series(path: str | os.PathLike[str]) -> Series:
    """Read a series of 3-D images.

    Parameters
    ----------
    path
        A NIfTI file of four dimensions, the last of which is time.

    Returns
    -------
    Series
        With the values as they are stored, or as float32 if they are scaled.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is not NIfTI, has other dimensions or a single frame, or holds values that are not
        real or not finite, or is cut short or damaged.
    """
    if not image_format_is_nifti(path):
        raise ValueError(f"{path}: expected a series in a NIfTI file")
    with telling_of_damage(path):
        header = read_nifti_header(Path(path))
        if header.ndim != 4 or header.components > 1:
            what = f"a {header.ndim}-D image" if header.components == 1 else "vectors or colours"
            raise ValueError(
                f"{path}: expected a series of 3-D images, two frames or more, got {what}"
            )
        if header.dtype.kind == "c":
            raise ValueError(f"{path}: expected real numbers, got complex ones")
        values = read_values(Path(path), header, 4)
    if header.scale is not None or values.dtype.kind == "f":
        values = values.astype(np.float32, copy=False)
    return Series(values, header.grid(Path(path), 3), header.time_step)


def check_series_name(path: str | os.PathLike[str]) -> None:
    """See that a file can hold a series: that its name is one of NIfTI.

    Raises
    ------
    ValueError
        For another ending.
    """
    if not Path(path).name.endswith(NIFTI_SUFFIXES):
        raise ValueError(f"{path}: cannot write it: expected one of {', '.join(NIFTI_SUFFIXES)}")


def write_series(series: Series, path: str | os.PathLike[str]) -> None:
    """Write a series as NIfTI; the file appears complete or not at all.

    Parameters
    ----------
    series
        What to write, with the dtype of its frames.
    path
        The file, with an ending of NIfTI: ``.nii.gz``, ``.nii`` or a pair of ``.hdr`` and ``.img``.

    Raises
    ------
    OSError
        If there is no such folder, or no writing in it.
    ValueError
        For another ending, or axes that are not at right angles.
    """
    sitk = import_simpleitk()

    check_series_name(path)
    check_image_grid(series.grid, path)
    image = sitk.GetImageFromArray(np.asarray(series.frames), isVector=False)
    direction = np.eye(4)
    direction[:3, :3] = series.grid.direction
    # ITK has no image without a spacing along an axis; of no step it is 1.
    image.SetSpacing([*np.asarray(series.grid.spacing).tolist(), series.time_step or 1.0])
    image.SetOrigin([*np.asarray(series.grid.origin).tolist(), 0.0])
    image.SetDirection(direction.ravel().tolist())
    write_itk_image(image, path)
