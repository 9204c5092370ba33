"""Points as files: tables (CSV, TSV) and the markups of 3D Slicer (.mrk.json, .fcsv)."""

from __future__ import annotations

import copy
import csv
import dataclasses
import io
import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from regkernels.files.atomic import atomic_path

__all__ = ["PointSet", "check_points_name", "read_points", "write_points"]

_KINDS = {".csv": "table", ".tsv": "table", ".fcsv": "fcsv", ".json": "markups"}

_FRAMES = {"xyz": (1, 1, 1), "lps": (1, 1, 1), "ras": (-1, -1, 1)}
"""Names of three columns, and the signs that bring them to LPS."""

_SYSTEMS = {"LPS": (1, 1, 1), "1": (1, 1, 1), "RAS": (-1, -1, 1), "0": (-1, -1, 1)}
"""What Slicer calls coordinate systems, by name and by number, and likewise."""

_COLUMN = re.compile(r"#?\s*(?P<name>[a-z])(?:\s*[\[(](?P<unit>.*)[\])]|[\s_]+(?P<word>\S+))?")
"""The name of a column of coordinates; a unit may follow, and NumPy begins a header with "#"."""

_DEFINED_BY_POINTS = ("Fiducial", "Line", "Angle", "Curve", "ClosedCurve")
"""Markups that are where their control points are; planes and regions have a place beside."""


class _Source(Protocol):
    """What a file holds beside positions, so that the same file with others can be written."""

    @property
    def kind(self) -> str: ...

    def text(self, positions: NDArray[np.float64]) -> str: ...


@dataclasses.dataclass(frozen=True)
class PointSet:
    """Points of a file, and all else that the file says.

    Attributes
    ----------
    positions
        ``(K, D)``, millimetres, LPS, float64.
    names
        What the file calls the points; their numbers, from 1 on, where it does not.
    source
        What else is in the file, for `write_points`.
    """

    positions: NDArray[np.float64]
    names: tuple[str, ...]
    source: _Source

    def with_positions(self, positions: ArrayLike) -> PointSet:
        """Return the same points at other places.

        Parameters
        ----------
        positions
            ``(K, D)``, millimetres, LPS.

        Raises
        ------
        ValueError
            If these are not as many finite points.
        """
        array = np.array(positions, dtype=np.float64)
        if array.shape != self.positions.shape or not np.isfinite(array).all():
            raise ValueError(
                f"positions: expected {self.positions.shape} finite numbers, got shape "
                f"{array.shape}{'' if np.isfinite(array).all() else ' with NaN or infinity'}"
            )
        return dataclasses.replace(self, positions=array)


def read_points(path: str | os.PathLike[str], ndim: int | None = None) -> PointSet:
    """Read points in millimetres.

    Parameters
    ----------
    path
        A table, ``.csv`` or ``.tsv``: with a header that names columns ``x, y, z`` or ``l, p, s``
        (LPS, the former as ANTs has them) or ``r, a, s`` (RAS), or without one, with x, y and z
        first; columns of two coordinates are points in the plane. Or markups of 3D Slicer,
        ``.mrk.json`` or ``.fcsv``, which say themselves whether they are in LPS or in RAS.
    ndim
        How many coordinates there are to be: of points in space whose third one is 0 everywhere
        two can be had. By default as many as the file has.

    Returns
    -------
    PointSet
        In LPS, whatever the file has.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is of another kind or damaged, has no points, is not in millimetres, does not say in
        which system it is, has a point without a finite position, or has other dimensions.
    """
    kind = _kind(path)
    try:
        # Spreadsheets begin UTF-8 with a mark of the order of bytes.
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected text in UTF-8: {error}") from error
    try:
        if kind == "markups":
            points = _read_markups(text)
        else:
            points = _read_table(text, kind, _delimiter(path))
        if not len(points.positions):
            raise ValueError("expected points, got none")
        return points if ndim is None else _of_dimension(points, ndim)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def write_points(points: PointSet, path: str | os.PathLike[str]) -> None:
    """Write points as the file that they were read from has them: its system, columns and fields.

    Parameters
    ----------
    points
        From `read_points`.
    path
        Where to; of the same kind as what was read. The file appears complete or not at all.

    Raises
    ------
    OSError
        If there is no such folder, or no writing in it.
    ValueError
        For the ending of another kind of file.
    """
    check_points_name(points, path)
    with atomic_path(path) as beside:
        beside.write_text(points.source.text(points.positions), encoding="utf-8", newline="")


def check_points_name(points: PointSet, path: str | os.PathLike[str]) -> None:
    """See that points can be in a file of such a name.

    Parameters
    ----------
    points
        What is to be written.
    path
        Where to.

    Raises
    ------
    ValueError
        If its ending is one of another kind than that of the file that was read.
    """
    source = points.source
    same = _kind(path) == source.kind
    if same and isinstance(source, _Table):
        same = source.kind == "fcsv" or _delimiter(path) == source.delimiter
    if not same:
        raise ValueError(f"{path}: expected the ending of the file that the points were read from")


def _kind(path: str | os.PathLike[str]) -> str:
    kind = _KINDS.get(Path(path).suffix.lower())
    if kind is None:
        raise ValueError(
            f"{path}: expected points in .csv, .tsv, .mrk.json or .fcsv, got another ending"
        )
    return kind


def _delimiter(path: str | os.PathLike[str]) -> str:
    return "\t" if Path(path).suffix.lower() == ".tsv" else ","


def _of_dimension(points: PointSet, ndim: int) -> PointSet:
    had = points.positions.shape[1]
    if had == ndim:
        return points
    if had < ndim:
        raise ValueError(f"expected points with {ndim} coordinates, got {had}")
    if points.positions[:, ndim:].any():
        raise ValueError(
            f"expected points in the plane, got {had} coordinates of which the last is not 0"
        )
    return dataclasses.replace(points, positions=points.positions[:, :ndim])


def _number(text: Any, where: str) -> float:
    try:
        number = float(text)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number) or isinstance(text, bool):
        raise ValueError(f"{where}: expected a finite coordinate, got {text!r}")
    return number


def _system(name: Any) -> tuple[int, ...]:
    if not isinstance(name, str) or name.strip().upper() not in _SYSTEMS:
        raise ValueError(f"expected the coordinate system LPS or RAS, got {name!r}")
    return _SYSTEMS[name.strip().upper()]


@dataclasses.dataclass(frozen=True)
class _Table:
    """Lines of cells; those above the first point are kept as they are."""

    kind: str
    delimiter: str
    rows: tuple[tuple[str, ...], ...]
    lines: tuple[int, ...]
    """The rows that are points."""
    columns: tuple[int, ...]
    signs: tuple[int, ...]
    preamble: str = ""

    def text(self, positions: NDArray[np.float64]) -> str:
        rows = [list(row) for row in self.rows]
        for line, position in zip(self.lines, positions.tolist(), strict=True):
            # Points in the plane have no third coordinate to write, so what the file has stays.
            for column, sign, value in zip(self.columns, self.signs, position, strict=False):
                rows[line][column] = repr(sign * value + 0.0)
        written = io.StringIO()
        csv.writer(written, delimiter=self.delimiter, lineterminator="\n").writerows(rows)
        return self.preamble + written.getvalue()


def _read_table(text: str, kind: str, delimiter: str) -> PointSet:
    preamble, header = "", None
    system: tuple[int, ...] | None = None
    if kind == "fcsv":
        lines = text.splitlines()
        comments = [line for line in lines if line.startswith("#")]
        preamble = "".join(f"{line}\n" for line in comments)
        text = "\n".join(line for line in lines if not line.startswith("#"))
        told = dict(
            re.split(r"\s*=\s*", line.strip("# \t"), maxsplit=1) for line in comments if "=" in line
        )
        if "CoordinateSystem" not in told:
            raise ValueError("expected a line '# CoordinateSystem = LPS' (or RAS), got none")
        system = _system(told["CoordinateSystem"])
        header = (told.get("columns") or "id,x,y,z").split(",")
    rows = tuple(map(tuple, csv.reader(io.StringIO(text), delimiter=delimiter)))
    first = 0
    if header is None:
        filled = [k for k, row in enumerate(rows) if any(map(str.strip, row))]
        if filled and not _is_number(rows[filled[0]][0]):
            header, first = list(rows[filled[0]]), filled[0] + 1
            columns, system = _columns(header)
        else:
            columns, system = _first_columns(rows, filled), _FRAMES["xyz"]
    else:
        columns, _ = _columns(header)
    assert system is not None
    lines_of_points = tuple(
        k for k, row in enumerate(rows) if k >= first and any(map(str.strip, row))
    )
    positions = np.zeros((len(lines_of_points), len(columns)))
    for number, line in enumerate(lines_of_points):
        row = rows[line]
        for axis, column in enumerate(columns):
            cell = row[column] if column < len(row) else ""
            where = f"line {line + 1 + preamble.count(chr(10))}"
            positions[number, axis] = system[axis] * _number(cell, where)
    names = _names(header or (), [rows[line] for line in lines_of_points])
    source = _Table(kind, delimiter, rows, lines_of_points, columns, system, preamble)
    return PointSet(positions, names, source)


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _columns(header: Sequence[str]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return which columns hold coordinates, and the signs that bring them to LPS."""
    cells = [_COLUMN.fullmatch(cell.strip().lower()) for cell in header]
    letters = {cell["name"]: k for k, cell in enumerate(cells) if cell}
    found = [
        (names[:size], signs)
        for names, signs in _FRAMES.items()
        for size in (3, 2)
        if set(names[:size]) <= set(letters) and (size == 3 or names[2] not in letters)
    ]
    if len(found) != 1:
        raise ValueError(
            "expected one set of columns x,y,z (LPS), l,p,s or r,a,s in millimetres, or two of "
            f"them in the plane, got {','.join(cell.strip() for cell in header)!r}"
        )
    ((names, signs),) = found
    for name in names:
        cell = cells[letters[name]]
        unit = cell and (cell["unit"] or cell["word"])
        if unit not in (None, "mm"):
            raise ValueError(f"expected millimetres, got the unit {unit!r} of column {name}")
    return tuple(letters[name] for name in names), signs


def _first_columns(rows: Sequence[Sequence[str]], filled: Sequence[int]) -> tuple[int, ...]:
    """Return the columns of a table without a header."""
    widths = {len(rows[k]) for k in filled}
    return (0, 1) if widths == {2} else (0, 1, 2)


def _names(header: Sequence[str], rows: Sequence[Sequence[str]]) -> tuple[str, ...]:
    known = [cell.strip().lower() for cell in header]
    column = next((known.index(name) for name in ("label", "name", "id") if name in known), None)
    found = ("" if column is None or column >= len(row) else row[column].strip() for row in rows)
    return tuple(name or str(number) for number, name in enumerate(found, start=1))


@dataclasses.dataclass(frozen=True)
class _Markups:
    """A document of JSON."""

    document: Any
    kind: str = "markups"

    def text(self, positions: NDArray[np.float64]) -> str:
        document = copy.deepcopy(self.document)
        left = iter(positions.tolist())
        for markup in document["markups"]:
            signs = _system(markup.get("coordinateSystem", "LPS"))
            for point in markup.get("controlPoints", []):
                moved = [s * v + 0.0 for s, v in zip(signs, next(left), strict=False)]
                point["position"] = [*moved, *point["position"][len(moved) :]]
            for measurement in markup.get("measurements", []):
                # Lengths and angles are those of the old places; Slicer measures again.
                measurement.pop("value", None)
        return f"{json.dumps(document, indent=4, ensure_ascii=False)}\n"


def _read_markups(text: str) -> PointSet:
    try:
        document = json.loads(text)
        markups = document["markups"]
        kinds = [markup["type"] for markup in markups]
        listed = [[dict(p) for p in markup.get("controlPoints", [])] for markup in markups]
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"expected markups of 3D Slicer ({error})") from error
    positions: list[list[float]] = []
    names: list[str] = []
    for markup, kind, points in zip(markups, kinds, listed, strict=True):
        if kind not in _DEFINED_BY_POINTS:
            raise ValueError(f"expected {', '.join(_DEFINED_BY_POINTS)}, got a {kind}")
        signs = _system(markup.get("coordinateSystem", "LPS"))
        units = markup.get("coordinateUnits", "mm")
        units = units[0] if isinstance(units, list) and units else units
        if units != "mm":
            raise ValueError(f"expected millimetres, got coordinateUnits {units!r}")
        for point in points:
            name = str(point.get("label") or len(names) + 1)
            status = point.get("positionStatus", "defined")
            where = point.get("position")
            if status != "defined" or not isinstance(where, list) or len(where) != 3:
                raise ValueError(
                    f"point {name}: expected a position, got positionStatus {status!r} and "
                    f"{where}; place it or delete it"
                )
            values = [_number(value, f"point {name}") for value in where]
            positions.append([s * v for s, v in zip(signs, values, strict=True)])
            names.append(name)
    array = np.array(positions, dtype=np.float64).reshape(-1, 3)
    return PointSet(array, tuple(names), _Markups(document))
