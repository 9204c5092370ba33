"""PNG images."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

from regkernels.files.formats.reading import read_exactly

__all__ = ["check_png"]

_PNG = b"\x89PNG\r\n\x1a\n"


def check_png(path: Path) -> None:
    """Look at a PNG image, a row of chunks with checksums."""
    with path.open("rb") as file:
        read_exactly(file, len(_PNG))
        kind = b""
        while kind != b"IEND":
            length, kind = struct.unpack(">I4s", read_exactly(file, 8))
            content = read_exactly(file, length)
            if struct.unpack(">I", read_exactly(file, 4)) != (zlib.crc32(kind + content),):
                raise EOFError("CRC check failed")
