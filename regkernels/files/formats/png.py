"""PNG images."""

from __future__ import annotations

import struct
import warnings
import zlib
from pathlib import Path

from regkernels.files.formats.reading import FileWarning, Header, read_exactly

__all__ = ["check_png"]

_PNG = b"\x89PNG\r\n\x1a\n"


def check_png(path: Path) -> Header:
    """Look at a PNG image, a row of chunks with checksums."""
    with path.open("rb") as file:
        read_exactly(file, len(_PNG))
        kind = b""
        while kind != b"IEND":
            length, kind = struct.unpack(">I4s", read_exactly(file, 8))
            content = read_exactly(file, length)
            if struct.unpack(">I", read_exactly(file, 4)) != (zlib.crc32(kind + content),):
                raise EOFError("CRC check failed")
            if kind == b"sCAL" and content[1:] != b"1\x001":  # which ITK writes for no size
                size = content[1:].replace(b"\0", b" x ").decode("latin-1")
                unit = {1: "metres", 2: "radians"}.get(content[0] if content else 0, "units")
                warnings.warn(
                    f"{path}: its pixels have a size of {size} {unit}; it is taken to be in "
                    "millimetres, which is what ITK writes there",
                    FileWarning,
                    stacklevel=2,
                )
    return Header()
