"""NRRD images."""

from __future__ import annotations

from pathlib import Path

from regkernels.files.formats.reading import Voxels, check_sizes, existing_file, integer_field

__all__ = ["find_nrrd"]

_LONGEST_NRRD_FIELD = 1000


def find_nrrd(path: Path) -> Voxels:
    """Look at an NRRD image."""
    fields: dict[str, str] = {}
    with path.open("rb") as file:
        for line in file:
            if not line.strip():
                break
            name, _, value = line.decode("latin-1").partition(": ")
            # Where a longer one is wrong, NRRD's library writes beyond its message's end.
            if len(line) > _LONGEST_NRRD_FIELD and line[:1] != b"#" and ":=" not in name:
                raise ValueError(
                    f"{path}: expected at most {_LONGEST_NRRD_FIELD} characters in a field, got "
                    f"{len(line)} in {name[:40]!r}"
                )
            fields[name.lower().replace(" ", "")] = value.strip()
        end = file.tell()
    data = fields.get("datafile")
    if data is not None and (data.startswith("LIST") or "%" in data):
        raise ValueError(f"{path}: expected voxels in one file, got {data}")
    if "encoding" not in fields:
        raise EOFError("its header has no encoding")
    ndim = integer_field("dimension", fields)
    if ndim not in range(1, 5):  # of which one may be that of several values per voxel
        raise ValueError(f"{path}: expected a 2-D or 3-D image, got dimension {ndim}")
    check_sizes(path, "sizes", fields.get("sizes", ""), ndim)
    encoding = fields["encoding"].lower()
    if encoding not in ("raw", "gzip", "gz"):
        raise ValueError(f"{path}: expected the encoding raw or gzip, got {encoding}")
    lines, skipped = (integer_field(name, fields) for name in ("lineskip", "byteskip"))
    if skipped < 0:
        raise ValueError(f"{path}: expected where the voxels begin, got byte skip {skipped}")
    source = path if data is None else existing_file(path, path.parent / data)
    with source.open("rb") as file:
        file.seek(end if data is None else 0)
        for _ in range(lines):
            if not file.readline():
                break
        start = file.tell()
    return Voxels(source, start, skipped, "none" if encoding == "raw" else "gzip")
