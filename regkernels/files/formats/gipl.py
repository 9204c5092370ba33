"""GIPL images."""

from __future__ import annotations

from pathlib import Path

from regkernels.files.formats.reading import Voxels, packing_of

__all__ = ["find_gipl"]


def find_gipl(path: Path) -> Voxels:
    """Look at a GIPL image, which has 256 bytes of header."""
    return Voxels(path, 0, 256, packing_of(path))
