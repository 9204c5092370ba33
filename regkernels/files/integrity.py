"""Whether files are whole, seen before ITK reads them.

Of a file that is cut short ITK reads what is missing as zeros, as what was in memory or, of
transforms, as the identity; or it refuses it, but the libraries that it reads with print lines of
their own. It does not verify the checksum of what gzip compressed either. So the bytes that the
header promises are compared with those that are there, and what is compressed is unpacked once.
Files of formats for which that is not done here are not read.
"""

from __future__ import annotations

import os
from pathlib import Path

from regkernels.files.formats import IMAGE_FORMATS, TRANSFORM_FORMATS
from regkernels.files.formats.hdf5 import check_hdf5
from regkernels.files.formats.reading import Header, Voxels, blocks, telling_of_damage

__all__ = ["check_transform", "check_voxels", "read_header"]


def read_header(path: str | os.PathLike[str], kind: str) -> Header:
    """Look at the header of an image, and at all of it if the format has a checksum for that.

    Parameters
    ----------
    path
        The file.
    kind
        ITK's name of what reads it, one of `IMAGE_FORMATS`.

    Returns
    -------
    Header
        Where its voxels are, and what ITK leaves undone.

    Raises
    ------
    FileNotFoundError
        If the voxels are to be in another file, and there is none.
    ValueError
        If the file is cut short or damaged, or if nothing in it tells whether it is.
    """
    with telling_of_damage(path):
        return IMAGE_FORMATS[kind][1](Path(path))


def check_voxels(path: str | os.PathLike[str], voxels: Voxels, size: int) -> None:
    """See that the voxels of an image are all there.

    Parameters
    ----------
    path
        The file.
    voxels
        Where they are.
    size
        How many bytes they take in memory.

    Raises
    ------
    ValueError
        If the file is cut short or damaged.
    """
    size = size if voxels.size is None else voxels.size
    length = voxels.file.stat().st_size - voxels.offset - voxels.skipped
    with telling_of_damage(path):
        if voxels.packing != "none":
            length = sum(map(len, blocks(voxels)))
        if length < size:
            raise EOFError(
                f"expected {size} bytes of voxels, got {max(length, 0)} in {voxels.file.name}"
            )


def check_transform(path: str | os.PathLike[str]) -> None:
    """See that no transform of a file lacks parameters.

    Parameters
    ----------
    path
        A file of an ITK transform.

    Raises
    ------
    ValueError
        If the file is cut short or damaged.
    """
    check_hdf5(path)
    check = TRANSFORM_FORMATS.get(Path(path).suffix.lower())
    if check is not None:
        with telling_of_damage(path):
            check(Path(path))
