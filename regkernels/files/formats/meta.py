"""MetaImages."""

from __future__ import annotations

import re
from pathlib import Path

from regkernels.files.formats.reading import Voxels, check_sizes, existing_file, integer_field

__all__ = ["find_meta"]


def find_meta(path: Path) -> Voxels:
    """Look at a MetaImage."""
    fields: dict[str, str] = {}
    with path.open("rb") as file:
        for line in file:
            name, _, value = re.sub(r"[=:]", "=", line.decode("latin-1"), count=1).partition("=")
            if name.strip() in fields and name.strip() in _META_NEEDED:
                raise ValueError(f"{path}: expected one {name.strip()} in its header, got several")
            fields[name.strip()] = value.strip()
            if name.strip() == "ElementDataFile":
                break
        end = file.tell()
    for name in _META_NEEDED:
        if name not in fields:
            raise EOFError(f"its header has no {name}")
    ndim = integer_field("NDims", fields)
    if ndim not in (2, 3):
        raise ValueError(f"{path}: expected a 2-D or 3-D image, got {ndim}-D")
    check_sizes(path, "DimSize", fields["DimSize"], ndim)
    if fields["ElementType"] not in _META_TYPES:
        raise ValueError(
            f"{path}: expected the ElementType to be one of {', '.join(_META_TYPES)}, got "
            f"{fields['ElementType'][:40]!r}"
        )
    data = fields["ElementDataFile"]
    if not _is_true(fields.get("BinaryData", "True")):
        raise ValueError(f"{path}: expected binary voxels, got text")
    if data.startswith("LIST") or "%" in data:
        raise ValueError(f"{path}: expected voxels in one file, got {data}")
    start = integer_field("HeaderSize", fields)
    if start < 0:
        raise ValueError(f"{path}: expected where the voxels begin, got HeaderSize {start}")
    local = data.upper() == "LOCAL"
    return Voxels(
        path if local else existing_file(path, path.parent / data),
        start or (end if local else 0),
        0,
        "zlib" if _is_true(fields.get("CompressedData", "False")) else "none",
    )


_META_NEEDED = ("NDims", "DimSize", "ElementType", "ElementDataFile")
_META_TYPES = (
    *("MET_CHAR", "MET_UCHAR", "MET_SHORT", "MET_USHORT", "MET_INT", "MET_UINT"),
    *("MET_LONG", "MET_ULONG", "MET_LONG_LONG", "MET_ULONG_LONG", "MET_FLOAT", "MET_DOUBLE"),
)


def _is_true(text: str) -> bool:
    return text[:1].upper() in ("T", "Y", "1")
