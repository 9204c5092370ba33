"""HDF5, which holds images and transforms."""

from __future__ import annotations

import os
from pathlib import Path

from regkernels.files.formats.reading import read_exactly, telling_of_damage

__all__ = ["check_hdf5", "check_hdf5_transform", "is_hdf5"]

_HDF5 = b"\x89HDF\r\n\x1a\n"


def check_hdf5(path: str | os.PathLike[str]) -> None:
    """See that a file is as long as it says if it is one of HDF5.

    Parameters
    ----------
    path
        The file.

    Raises
    ------
    ValueError
        If it is cut short.

    Notes
    -----
    The places of the fields are those of the superblock in the HDF5 File Format Specification.
    """
    if not is_hdf5(Path(path)):
        return
    with telling_of_damage(path), Path(path).open("rb") as file:
        file.seek(len(_HDF5))
        start = read_exactly(file, 64)
        # Where it says how long an address is, and where the addresses begin.
        at, first = {0: (5, 16), 1: (5, 20)}.get(start[0], (1, 4))
        width = start[at]
        # Each version has two of them before that of the end.
        end = int.from_bytes(start[first + 2 * width :][:width], "little")
        if Path(path).stat().st_size < end:
            raise EOFError(f"expected {end} bytes, got {Path(path).stat().st_size}")


def is_hdf5(path: Path) -> bool:
    """Tell whether a file begins as one of HDF5."""
    with path.open("rb") as file:
        return file.read(len(_HDF5)) == _HDF5


def check_hdf5_transform(path: Path) -> None:
    """See that a file of a transform is one of HDF5."""
    if not is_hdf5(path):
        raise ValueError(f"{path}: not a transform: expected HDF5")
