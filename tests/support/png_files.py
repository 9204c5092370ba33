"""PNG files written by hand, with chunks that SimpleITK does not write."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path


def write_png(path: Path, rows: list[bytes], **chunks: bytes) -> None:
    """Write rows of grey bytes; `chunks` stand before them, by name."""
    header = struct.pack(">2I5B", len(rows[0]), len(rows), 8, 0, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    whole = b"\x89PNG\r\n\x1a\n"
    for name, content in {"IHDR": header, **chunks, "IDAT": data, "IEND": b""}.items():
        checked = name.encode() + content
        whole += struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))
    path.write_bytes(whole)
