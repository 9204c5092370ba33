"""GIPL images."""

from __future__ import annotations

from pathlib import Path

from regkernels.files.formats.reading import Header, Voxels, packing_of

__all__ = ["find_gipl"]


def find_gipl(path: Path) -> Header:
    """Look at a GIPL image, which has 256 bytes of header and no direction that ITK would read."""
    return Header(
        Voxels(path, 0, 256, packing_of(path)), unplaced="GIPL does not say which way its axes run"
    )
