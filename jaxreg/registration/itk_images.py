"""Images as SimpleITK reads and writes them, and where their voxels lie."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from jaxreg.registration.files import atomic_path
from jaxreg.registration.grid import Grid

__all__ = ["image_grid", "image_values", "itk_reason", "read_image", "write_image"]


def read_image(path: str | os.PathLike[str]) -> Any:
    """Read a 2-D or 3-D image.

    Parameters
    ----------
    path
        The file.

    Returns
    -------
    SimpleITK.Image
        As it is in the file.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If SimpleITK cannot read it, or it is not 2-D or 3-D.
    """
    import SimpleITK as sitk  # noqa: N813

    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        image = sitk.ReadImage(os.fspath(path))
    except RuntimeError as error:
        raise ValueError(f"{path}: not an image: {itk_reason(error)}") from error
    if image.GetDimension() not in (2, 3):
        raise ValueError(f"{path}: expected a 2-D or 3-D image, got {image.GetDimension()}-D")
    return image


def image_grid(image: Any) -> Grid:
    """Return where the voxels of a SimpleITK image lie."""
    ndim = image.GetDimension()
    return Grid(
        tuple(image.GetSize()[::-1]),
        np.array(image.GetSpacing()),
        np.array(image.GetOrigin()),
        np.reshape(image.GetDirection(), (ndim, ndim)),
    )


def image_values(image: Any) -> NDArray[Any]:
    """Return the values of a SimpleITK image, ``([Z,] Y, X)`` or ``([Z,] Y, X, C)``."""
    import SimpleITK as sitk  # noqa: N813

    values: NDArray[Any] = sitk.GetArrayFromImage(image)
    return values


def write_image(
    values: ArrayLike, grid: Grid, path: str | os.PathLike[str], *, vectors: bool = False
) -> None:
    """Write an image, compressed; the file appears complete or not at all.

    Parameters
    ----------
    values
        ``([Z,] Y, X)``, or ``([Z,] Y, X, C)`` with `vectors`.
    grid
        Where the voxels lie.
    path
        The file; its ending says in which format.
    vectors
        Whether there are several values per voxel.

    Raises
    ------
    OSError
        If there is no such folder, or no writing in it.
    ValueError
        If SimpleITK cannot write such an image to such a file.
    """
    import SimpleITK as sitk  # noqa: N813

    image = sitk.GetImageFromArray(np.asarray(values), isVector=vectors)
    image.SetSpacing(np.asarray(grid.spacing).tolist())
    image.SetOrigin(np.asarray(grid.origin).tolist())
    image.SetDirection(np.ravel(grid.direction).tolist())
    with atomic_path(path) as beside:
        try:
            sitk.WriteImage(image, str(beside), useCompression=True)
        except RuntimeError as error:
            reason = itk_reason(error).replace(str(beside), os.fspath(path))
            raise ValueError(f"{path}: cannot write it: {reason}") from error


def itk_reason(error: RuntimeError) -> str:
    """Return what went wrong in an exception of SimpleITK, without where in its sources."""
    last = str(error).strip().splitlines()[-1]
    return re.sub(r"^(sitk::|ITK )ERROR: (\w+\(0x[0-9a-f]+\): )?", "", last)
