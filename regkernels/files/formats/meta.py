"""MetaImages."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import numpy as np

from regkernels.files.formats.reading import (
    FileWarning,
    Header,
    Voxels,
    check_sizes,
    existing_file,
    integer_field,
    length_unit,
)

__all__ = ["find_meta"]


def find_meta(path: Path) -> Header:
    """Look at a MetaImage."""
    fields: dict[str, str] = {}
    with path.open("rb") as file:
        for line in file:
            name, _, value = re.sub(r"[=:]", "=", line.decode("latin-1"), count=1).partition("=")
            if name.strip() in fields and name.strip() in _META_ONCE:
                raise ValueError(f"{path}: expected one {name.strip()} in its header, got several")
            fields[name.strip()] = value.strip()
            if name.strip() == "ElementDataFile":
                break
        end = file.tell()
    for synonyms in _META_SYNONYMS:
        if len(given := {name: fields[name] for name in synonyms if name in fields}) > 1:
            raise ValueError(f"{path}: expected one of {', '.join(given)} in its header, got both")
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
    voxels = Voxels(
        path if local else existing_file(path, path.parent / data),
        start or (end if local else 0),
        0,
        "zlib" if _is_true(fields.get("CompressedData", "False")) else "none",
    )
    if ndim == 3 and "ElementSpacing" not in fields and "ElementSize" not in fields:
        _warn(path, "its header does not say how large voxels are; 1 mm is assumed")
    _tell_of_contradictions(path, fields, ndim)
    slope, intercept = (
        (_numbers(path, f"ElementToIntensityFunction{name}", fields) or [default])[0]
        for name, default in (("Slope", 1.0), ("Offset", 0.0))
    )
    return Header(
        voxels,
        unit=length_unit(path, "DistanceUnits", fields.get("DistanceUnits", "")),
        scale=None if (slope, intercept) == (1, 0) else (slope, intercept),
    )


def _tell_of_contradictions(path: Path, fields: dict[str, str], ndim: int) -> None:
    """Tell where the header places voxels otherwise than by matrix and offset, as ITK does."""
    turns = _META_SYNONYMS[0]
    given = next((numbers for name in turns if (numbers := _numbers(path, name, fields))), None)
    rows = np.eye(ndim) if given is None else np.resize(given, (ndim, ndim))
    letters = fields.get("AnatomicalOrientation", "").upper()[:ndim]
    # A letter says where an axis comes from, as in ITK: R stands for one that runs to the left.
    steps = {"R": (0, 1), "L": (0, -1), "A": (1, 1), "P": (1, -1), "I": (2, 1), "S": (2, -1)}
    known = [
        (row, *steps[letter]) for row, letter in zip(rows, letters, strict=False) if letter in steps
    ]
    if ndim == 3 and any(sign * row[axis] <= 0 for row, axis, sign in known):
        _tell(path, f"its AnatomicalOrientation {letters} is not what its TransformMatrix says")
    centre = _numbers(path, "CenterOfRotation", fields)
    if any(centre or ()) and not np.allclose(rows, np.eye(ndim)):
        _tell(path, "its axes are turned about a CenterOfRotation that is not 0")


def _tell(path: Path, complaint: str) -> None:
    _warn(
        path,
        f"{complaint}; matrix and offset say where its voxels lie, as in ITK, and programs that go "
        "by the other may find them elsewhere",
    )


def _warn(path: Path, what: str) -> None:
    warnings.warn(f"{path}: {what}", FileWarning, stacklevel=3)


def _numbers(path: Path, name: str, fields: dict[str, str]) -> list[float]:
    try:
        return [float(number) for number in fields.get(name, "").split()]
    except ValueError:
        raise ValueError(f"{path}: {name}: expected numbers, got {fields[name][:40]!r}") from None


_META_NEEDED = ("NDims", "DimSize", "ElementType", "ElementDataFile")
_META_SYNONYMS = (
    ("TransformMatrix", "Rotation", "Orientation"),
    ("Offset", "Position", "Origin"),
    ("BinaryDataByteOrderMSB", "ElementByteOrderMSB"),
)
_META_ONCE = {*_META_NEEDED, "ElementSpacing"}.union(*_META_SYNONYMS)
_META_TYPES = (
    *("MET_CHAR", "MET_UCHAR", "MET_SHORT", "MET_USHORT", "MET_INT", "MET_UINT"),
    *("MET_LONG", "MET_ULONG", "MET_LONG_LONG", "MET_ULONG_LONG", "MET_FLOAT", "MET_DOUBLE"),
)


def _is_true(text: str) -> bool:
    return text[:1].upper() in ("T", "Y", "1")
