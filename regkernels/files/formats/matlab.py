"""Transforms of ANTs, as MATLAB 4 writes matrices."""

from __future__ import annotations

import struct
from pathlib import Path

from regkernels.files.formats.reading import read_exactly

__all__ = ["check_matlab"]


def check_matlab(path: Path) -> None:
    """Look at a file of ANTs: two matrices for each transform, as MATLAB 4 writes them."""
    matrices = 0
    with path.open("rb") as file:
        while head := file.read(20):
            head += read_exactly(file, 20 - len(head))
            # The first number has the order of the bytes in its thousands and the type in its tens.
            order = "<" if struct.unpack("<i", head[:4])[0] < 1000 else ">"
            kind, rows, columns, imaginary, name = struct.unpack(f"{order}5i", head)
            widths = {0: 8, 1: 4, 2: 4, 3: 2, 4: 2, 5: 1}
            width = widths.get(kind // 10 % 10)
            if width is None or kind not in range(2000) or min(rows, columns, name) < 0:
                raise ValueError(f"{path}: not a transform: expected matrices of MATLAB 4")
            read_exactly(file, name + rows * columns * width * (2 if imaginary else 1))
            matrices += 1
    if matrices == 0 or matrices % 2:
        raise EOFError(f"expected two matrices for each transform, got {matrices}")
