"""Images as SimpleITK reads and writes them, and where their voxels lie."""

from __future__ import annotations

import gzip
import math
import os
import re
import struct
import zlib
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from jaxreg.registration.files import atomic_path
from jaxreg.registration.grid import Grid

__all__ = [
    "check_voxels",
    "image_grid",
    "image_values",
    "itk_reason",
    "read_image",
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


def check_voxels(path: str | os.PathLike[str]) -> None:
    """See that the voxels of a file are all there and finite, where ITK's reader does not.

    Of NIfTI files it takes voxels that are NaN or infinite for 0, and so it does with those that
    are missing; nor does it verify the checksum of what is compressed by gzip. So such files are
    looked at once more. MetaImage and NRRD ITK judges by itself; GIPL and VTK nobody does.

    Parameters
    ----------
    path
        A file that `read_image` reads.

    Raises
    ------
    ValueError
        If the file is cut short or damaged, or a voxel is not finite.
    """
    data, voxels = Path(path), None
    try:
        pair = _nifti_pair(data)
        if pair is not None:
            header, data = pair
            voxels = _nifti_voxels(header, single=header == data)
        if voxels is None:
            voxels = _Voxels(0, 0, None)
        compressed = _is_compressed(data)
        if not compressed and data.stat().st_size < voxels.end:
            raise EOFError(f"{voxels.end} bytes expected, {data.stat().st_size} there")
        if compressed or voxels.dtype is not None:
            _read_through(data, path, voxels)
    except (EOFError, gzip.BadGzipFile, zlib.error, struct.error) as error:
        raise ValueError(f"{path}: cut short or damaged: {error}") from error


class _Voxels(NamedTuple):
    """Where the voxels of a file are, uncompressed."""

    start: int
    end: int
    dtype: np.dtype[Any] | None
    """What they are if they might not be finite."""


def _nifti_pair(path: Path) -> tuple[Path, Path] | None:
    """Return the files of the header and of the voxels, or None if it is another format."""
    ending = re.search(r"\.(nii|hdr|img)(\.gz)?$", path.name, re.IGNORECASE)
    if ending is None:
        return None
    if ending[1].lower() == "nii":
        return path, path
    header, data = (
        path.with_name(f"{path.name[: ending.start()]}.{kind}{ending[2] or ''}")
        for kind in ("hdr", "img")
    )
    # Endings of another case are ITK's to judge.
    return (header, data) if header.is_file() and data.is_file() else None


def _nifti_voxels(header: Path, *, single: bool) -> _Voxels | None:
    """Find the voxels by a header; None if it is not one of NIfTI.

    Notes
    -----
    The places of the fields are those of ``nifti1.h`` and ``nifti2.h``.
    """
    with _uncompressed(header) as file:
        start = file.read(540)
    # Of the two versions: how long the header is, and where it has the dimensions, the voxels'
    # type with their size in bits behind it, and the voxels' offset.
    layouts = {348: ("8h", 40, 70, "f", 108), 540: ("8q", 16, 12, "q", 168)}
    sizes = {order: struct.unpack_from(f"{order}i", start)[0] for order in "<>"}
    order = next((order for order, size in sizes.items() if size in layouts), None)
    if order is None:
        return None
    size = sizes[order]
    dims_code, dims_at, kind_at, offset_code, offset_at = layouts[size]
    ndim, *dims = struct.unpack_from(f"{order}{dims_code}", start, dims_at)
    kind, bits = struct.unpack_from(f"{order}2h", start, kind_at)
    (offset,) = struct.unpack_from(f"{order}{offset_code}", start, offset_at)
    # Some writers leave the offset 0; behind the header of the same file it cannot be less.
    first = max(int(offset), size if single else 0)
    # A dimension of 0 stands for one of 1, as in ITK.
    count = math.prod(max(dim, 1) for dim in dims[:ndim])
    dtypes = {16: np.dtype(f"{order}f4"), 64: np.dtype(f"{order}f8")}
    return _Voxels(first, first + count * bits // 8, dtypes.get(kind))


def _read_through(data: Path, path: str | os.PathLike[str], voxels: _Voxels) -> None:
    """Read a file to its end, which verifies its checksum if it is compressed."""
    with _uncompressed(data) as file:
        length = len(file.read(voxels.start))
        while block := file.read(1 << 22):
            inside = block[: max(voxels.end - length, 0)]
            length += len(block)
            if voxels.dtype is not None:
                count = len(inside) // voxels.dtype.itemsize
                if not np.isfinite(np.frombuffer(inside, voxels.dtype, count)).all():
                    raise ValueError(f"{path}: expected finite values, got NaN or infinity")
    if length < voxels.end:
        raise EOFError(f"{voxels.end} bytes expected, {length} there")


def _is_compressed(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"


def _uncompressed(path: Path) -> BinaryIO:
    """Open a file to read, compressed or not whatever its name says, as ITK does."""
    return cast(BinaryIO, gzip.open(path, "rb")) if _is_compressed(path) else path.open("rb")


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
