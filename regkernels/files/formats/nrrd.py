"""NRRD images."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from regkernels.files.formats.reading import (
    Header,
    Voxels,
    check_sizes,
    existing_file,
    integer_field,
    length_unit,
)

__all__ = ["find_nrrd"]

_LONGEST_NRRD_FIELD = 1000


def find_nrrd(path: Path) -> Header:
    """Look at an NRRD image."""
    fields: dict[str, str] = {}
    with path.open("rb") as file:
        for line in file:
            if not line.strip():
                break
            name, _, value = line.decode(errors="replace").partition(": ")
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
    return Header(
        Voxels(source, start, skipped, "none" if encoding == "raw" else "gzip"),
        unit=_unit(path, fields),
        unplaced=_unplaced(path, fields),
        vectors=_vectors(fields),
    )


_TO_LPS = {
    "left-posterior-superior": (1, 1, 1),
    "lps": (1, 1, 1),
    "left-anterior-superior": (1, -1, 1),
    "las": (1, -1, 1),
    "right-anterior-superior": (-1, -1, 1),
    "ras": (-1, -1, 1),
}
"""The spaces that tell left from right, of which ITK converts the places of voxels."""


def _unit(path: Path, fields: dict[str, str]) -> float:
    name = "space units" if "spaceunits" in fields else "units"
    texts = re.findall(r'"([^"]*)"', fields.get(name.replace(" ", ""), ""))
    units = {length_unit(path, name, text) for text in texts if text.strip(" ?")}
    if len(units) > 1:
        raise ValueError(f"{path}: {name}: expected one unit, got {', '.join(texts)}")
    return units.pop() if units else 1.0


def _unplaced(path: Path, fields: dict[str, str]) -> str:
    directions = re.findall(r"\([^)]*\)|none", fields.get("spacedirections", "").lower())
    kinds = fields.get("kinds", "").lower().split()
    if any(
        direction == "none" and kind in ("domain", "space")
        for direction, kind in zip(directions, kinds, strict=False)
    ):
        raise ValueError(f"{path}: expected a direction of every axis in space, got {directions}")
    space = fields.get("space")
    if space is None:
        missing = "its header names no space"
    elif space.lower() not in _TO_LPS:
        missing = f"its space is {space}"
    elif not directions:
        missing = "its header has no directions of its axes"
    else:
        return ""
    if directions or "spacings" in fields:
        return missing
    return f"{missing} and no size of its voxels, for which 1 mm is assumed"


def _vectors(fields: dict[str, str]) -> str:
    space = fields.get("space", "lps").lower()
    rows = re.findall(r"\(([^)]*)\)", fields.get("measurementframe", ""))
    if not rows:
        # ITK writes no frame, and LPS.
        return "" if _TO_LPS.get(space, (1, 1, 1)) == (1, 1, 1) else f"the space {space}"
    try:
        columns = np.array([[float(number) for number in row.split(",")] for row in rows])
        to_lps = np.diag(_TO_LPS.get(space, (1, 1, 1))[: len(rows)]) @ columns.T
        same = np.allclose(to_lps, np.eye(len(rows)), atol=1e-6)
    except ValueError:
        same = False
    return "" if same else "another measurement frame"
