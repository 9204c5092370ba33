"""MINC images."""

from __future__ import annotations

from pathlib import Path

from regkernels.files.formats.hdf5 import is_hdf5

__all__ = ["check_minc"]


def check_minc(path: Path) -> None:
    """Look at a MINC image; whether HDF5 is whole has been seen before."""
    if not is_hdf5(path):
        raise ValueError(f"{path}: not an image: expected MINC 2, which is HDF5")
