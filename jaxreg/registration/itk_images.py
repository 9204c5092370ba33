"""Images as SimpleITK reads and writes them, and where their voxels lie."""

from __future__ import annotations

import gzip
import os
import re
import struct
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from jaxreg.registration.files import atomic_path
from jaxreg.registration.grid import Grid

__all__ = [
    "image_grid",
    "image_values",
    "itk_reason",
    "read_image",
    "refuse_non_finite_nifti",
    "write_image",
]


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


def refuse_non_finite_nifti(path: str | os.PathLike[str]) -> None:
    """See that no voxel of a NIfTI file is NaN or infinite; other files pass.

    ITK's reader turns such voxels into 0 without a word, so the file itself is looked at.

    Parameters
    ----------
    path
        A file that `read_image` reads.

    Raises
    ------
    ValueError
        If a voxel is not finite.

    Notes
    -----
    The places of the fields are those of ``nifti1.h`` and ``nifti2.h``.
    """
    path = Path(path)
    ending = re.search(r"\.(nii|hdr|img)(\.gz)?$", path.name, re.IGNORECASE)
    if ending is None:
        return
    header, data = path, path
    if ending[1].lower() != "nii":
        header, data = (
            path.with_name(f"{path.name[: ending.start()]}.{kind}{ending[2] or ''}")
            for kind in ("hdr", "img")
        )
        if not (header.is_file() and data.is_file()):  # endings of another case: ITK's to judge
            return
    with _uncompressed(header) as file:
        start = file.read(540)
    # Of the two versions: the size of the header, and where the voxels' type and offset stand.
    layouts = {348: (70, "f", 108), 540: (12, "q", 168)}
    order = next((o for o in "<>" if struct.unpack_from(f"{o}i", start)[0] in layouts), None)
    if order is None:
        return
    type_at, offset_code, offset_at = layouts[struct.unpack_from(f"{order}i", start)[0]]
    (kind,) = struct.unpack_from(f"{order}h", start, type_at)
    (offset,) = struct.unpack_from(f"{order}{offset_code}", start, offset_at)
    dtypes = {16: np.dtype(f"{order}f4"), 64: np.dtype(f"{order}f8")}
    if kind not in dtypes:
        return
    dtype = dtypes[kind]
    with _uncompressed(data) as file:
        file.seek(int(offset))
        while block := file.read(1 << 22):
            values = np.frombuffer(block, dtype, len(block) // dtype.itemsize)
            if not np.isfinite(values).all():
                raise ValueError(f"{path}: expected finite values, got NaN or infinity")


def _uncompressed(path: Path) -> BinaryIO:
    """Open a file to read, compressed or not whatever its name says, as ITK does."""
    with path.open("rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
    return cast(BinaryIO, gzip.open(path, "rb")) if compressed else path.open("rb")


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
