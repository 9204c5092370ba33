"""DICOM files: what ITK reads wrongly without an error, by the tags of their part 6."""

from __future__ import annotations

import dataclasses
import math
import mmap
import os
import re
import struct
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from regkernels.files.formats.reading import FileWarning
from regkernels.files.itk_warnings import collected_output
from regkernels.files.simpleitk import import_simpleitk
from regkernels.grid import Grid

__all__ = ["check_dicom", "dicom_grid", "dicom_series", "dicom_values", "series_grid"]

_SYNTAX = re.compile(rb"\x02\0\x10\0UI..([0-9.]+)", re.DOTALL)
_IMPLICIT = "1.2.840.10008.1.2"
_UNCOMPRESSED = (_IMPLICIT, "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.1.99")
_BIG_ENDIAN = "1.2.840.10008.1.2.2"
_LOSSY_JPEG = ("1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51")
_VOXELS = b"\xe0\x7f\x10\0"
_CONVERT = "write it with another transfer syntax, by dcmconv or gdcmconv, say"
_TO_NIFTI = "convert it to NIfTI, by dcm2niix, say"
_NOTABLE = 0.05
"""Voxels by which a slice may be misplaced."""


def check_dicom(path: Path, fields: Mapping[str, str]) -> None:
    """Refuse a file of whose values ITK makes others without an error.

    Parameters
    ----------
    path
        The file.
    fields
        What ITK has read of it, by tag, such as ``0028|0010``.

    Raises
    ------
    ValueError
        If its values would not be what is displayed.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        found = _SYNTAX.search(data, 0, 1024)
        pixels = _Pixels(
            "" if found is None else found[1].decode(),
            fields.get("0028|0004", ""),
            samples=int(fields.get("0028|0002", "1")),
            bits=int(fields.get("0028|0100", "1")),
            planes=fields.get("0028|0006", "0") != "0",
        )
        stored, high = (int(fields.get(tag, "0")) for tag in ("0028|0101", "0028|0102"))
        start = data.find(_VOXELS)
        complaint = (
            _bits(pixels, stored, high)
            or _colours(pixels, data[start : start + (1 << 16)])
            or _scaling(pixels, data, start)
        )
    if "MOSAIC" in fields.get("0008|0008", ""):
        complaint = f"expected slices, got a mosaic of them in one; {_TO_NIFTI}"
    if complaint:
        raise ValueError(f"{path}: {complaint}")


class _Pixels(NamedTuple):
    syntax: str
    photometric: str
    samples: int
    bits: int
    planes: bool


def _bits(pixels: _Pixels, stored: int, high: int) -> str:
    # Of 16 bits it has been seen to be right.
    if pixels.syntax == _BIG_ENDIAN and pixels.bits != 16:
        return (
            "expected little-endian DICOM, got big-endian voxels that are not of 16 bits; "
            f"{_CONVERT}"
        )
    # ITK clears others than the bits that are not used.
    if stored and (high != stored - 1 or (pixels.bits > 16 and stored != pixels.bits)):
        return (
            "expected values in the low bits, and in all of 32, got BitsAllocated "
            f"{pixels.bits}, BitsStored {stored} and HighBit {high}"
        )
    return ""


def _colours(pixels: _Pixels, start: bytes) -> str:
    if pixels.samples == 1:
        return ""
    # Of more bits ITK mixes up the bytes of packed colours and leaves YBR as it is; of 32 bits in
    # planes it returns what was in memory.
    packed = pixels.syntax not in _UNCOMPRESSED
    apart = pixels.bits > 16 and pixels.planes
    if pixels.bits > 8 and (packed or pixels.photometric != "RGB" or apart):
        return (
            "expected colours of 8 bits, or RGB that is not compressed, got "
            f"{pixels.photometric} of {pixels.bits} bits; {_CONVERT}"
        )
    if pixels.photometric != "RGB" and not pixels.photometric.startswith("YBR"):
        return f"expected grey values, RGB or YBR, got {pixels.photometric}"
    rgb = _is_rgb(start) if pixels.syntax in _LOSSY_JPEG else None
    if rgb is not None and rgb != (pixels.photometric == "RGB"):
        return (
            f"expected colours as its PhotometricInterpretation {pixels.photometric} says, got a "
            f"JPEG image of others; {_CONVERT}"
        )
    return ""


def _scaling(pixels: _Pixels, data: mmap.mmap, start: int) -> str:
    lut = b"\x28\0\0\x30" + (b"" if pixels.syntax == _IMPLICIT else b"SQ")
    if data.find(lut, 0, start) > 0:
        return "expected values that a slope and an intercept scale, got a Modality LUT"
    slopes, intercepts = (_found(data, 0x28, tag, 1) for tag in (0x1053, 0x1052))
    if len(np.unique(slopes)) > 1 or len(np.unique(intercepts)) > 1:
        return (
            "expected one RescaleSlope and RescaleIntercept, got several for its frames; "
            f"{_TO_NIFTI}"
        )
    scaled = not (np.allclose(slopes, 1) and np.allclose(intercepts, 0))
    # ITK turns small values that are bright over first, and keeps colours in 8 bits.
    if scaled and (pixels.photometric == "MONOCHROME1" or pixels.samples > 1):
        return f"expected MONOCHROME2 with a slope or an intercept, got {pixels.photometric}"
    return ""


def dicom_series(folder: Path) -> list[Path]:
    """Return the files of the one series of slices in a folder, in the order of their places.

    Raises
    ------
    FileNotFoundError
        If there is none.
    ValueError
        If there are several.
    """
    sitk = import_simpleitk()

    reader = sitk.ImageSeriesReader
    with collected_output():  # about files that are no DICOM
        series = reader.GetGDCMSeriesIDs(os.fspath(folder))
        files = [reader.GetGDCMSeriesFileNames(os.fspath(folder), name) for name in series]
    if not series:
        raise FileNotFoundError(f"{folder}: expected a file, or a folder with a series of DICOM")
    if len(series) > 1:
        found = "; ".join(
            f"{len(names)} in {Path(names[0]).name} and others"
            if len(names) > 1
            else f"one in {Path(names[0]).name}"
            for names in files
        )
        raise ValueError(
            f"{folder}: expected one series of DICOM, got slices of {len(series)}: {found}; move "
            "each to a folder of its own"
        )
    return [Path(name) for name in files[0]]


def series_grid(folder: Path, grids: Sequence[Grid]) -> Grid:
    """Return the grid of slices that are in files of their own, from the grids of these.

    Raises
    ------
    ValueError
        If they are not spaced evenly on a line, are not parallel, or differ in size.
    """
    if any(grid.ndim != 3 or grid.shape[0] != 1 for grid in grids):
        raise ValueError(f"{folder}: expected files of one slice in space each")
    first = grids[0]
    for grid in grids:
        turned = np.abs(np.asarray(grid.direction) - first.direction).max() > 1e-4
        sized = np.abs(np.asarray(grid.spacing)[:2] - first.spacing[:2]).max() > 1e-4
        if turned or sized or grid.shape != first.shape:
            raise ValueError(
                f"{folder}: expected parallel slices of one size, got others among them"
            )
    spacing, direction = np.array(first.spacing), np.array(first.direction)
    positions = np.array([grid.origin for grid in grids])
    if len(grids) > 1:
        spacing[2], direction[:, 2] = _even_step(folder, positions, spacing[:2].min())
    return Grid((len(grids), *first.shape[1:]), spacing, positions[0], direction)


def dicom_grid(
    path: Path, fields: Mapping[str, str], grid: Grid, *, in_series: bool = False
) -> Grid:
    """Return where the slices of a file lie.

    Parameters
    ----------
    path
        The file.
    fields
        What ITK has read of it, by tag.
    grid
        That of ITK, which takes slices to follow each other at right angles and evenly; where they
        do not it may take them to be 1 mm apart.
    in_series
        Whether it is one of several files of a volume, and one slice alone is what it should be.

    Returns
    -------
    Grid
        As the file says; sheared if the gantry was tilted.

    Raises
    ------
    ValueError
        If slices are not spaced evenly on a line, or if nothing tells where they lie.
    """
    if grid.ndim != 3:
        return grid
    slices = grid.shape[0]
    positions, axes, steps = _slices(path, fields, slices)
    if slices == 1 and not (len(positions) and len(axes)):
        return grid
    if len(positions) != slices or not len(axes):
        raise ValueError(
            f"{path}: expected where each of its {slices} slices lies, got {len(positions)} "
            "positions: a clip or a series in time is no volume; of another stack make one in "
            "NIfTI, by dcm2niix, say"
        )
    if np.ptp(axes, axis=0).max() > 1e-4 or (len(steps) and np.ptp(steps, axis=0).max() > 1e-4):
        raise ValueError(f"{path}: expected parallel slices of one size, got others among them")
    direction, spacing = np.empty((3, 3)), np.array(grid.spacing)
    direction[:, :2] = np.transpose([axis / np.linalg.norm(axis) for axis in np.split(axes[0], 2)])
    direction[:, 2] = np.cross(direction[:, 0], direction[:, 1])
    if len(steps):
        spacing[:2] = steps[0, ::-1]
    if slices == 1:
        spacing[2] = _thickness(path, fields, spacing[2], in_series=in_series)
    else:
        spacing[2], direction[:, 2] = _even_step(path, positions, spacing[:2].min())
    return dataclasses.replace(grid, spacing=spacing, origin=positions[0], direction=direction)


def _slices(path: Path, fields: Mapping[str, str], slices: int) -> tuple[NDArray[Any], ...]:
    """Return positions, orientations and sizes of pixels, ``(n, 3)``, ``(n, 6)`` and ``(n, 2)``."""
    offsets = _numbers(fields.get("3004|000c", ""))
    of_dose = offsets is not None and len(offsets) == slices
    if slices > 1 and not of_dose:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            positions, axes = (_found(data, 0x20, tag, n) for tag, n in ((0x32, 3), (0x37, 6)))
            return positions, axes, _found(data, 0x28, 0x30, 2)
    given = [_numbers(fields.get(tag, "")) for tag in ("0020|0032", "0020|0037", "0028|0030")]
    positions, axes, steps = (
        np.empty((0, count)) if row is None or len(row) != count else row[None]
        for row, count in zip(given, (3, 6, 2), strict=True)
    )
    if offsets is not None and of_dose and len(axes):
        # They are relative, or the first is the place along the normal.
        along = (offsets - offsets[0])[:, None]
        positions = positions + along * np.cross(axes[0, :3], axes[0, 3:])
    return positions, axes, steps


def _even_step(
    path: Path, positions: NDArray[Any], pixel: float
) -> tuple[float, NDArray[np.float64]]:
    """Return the distance of slices and the way from one to the next."""
    step = (positions[-1] - positions[0]) / (len(positions) - 1)
    length = float(np.linalg.norm(step))
    if not length > 0:
        raise ValueError(f"{path}: expected slices side by side, got the last one at the first")
    even = positions[0] + np.arange(len(positions))[:, None] * step
    apart = np.linalg.norm(positions - even, axis=1).max()
    if apart > _NOTABLE * min(length, pixel):
        raise ValueError(
            f"{path}: expected slices that are spaced evenly on a line, got some up to "
            f"{apart:.3g} mm away from it: one is missing, there are several volumes in the file, "
            "or they were taken so; convert or resample it first, by dcm2niix, say"
        )
    return length, step / length


def _thickness(path: Path, fields: Mapping[str, str], known: float, *, in_series: bool) -> float:
    """Return how thick one slice is, and warn that it is one where there should be more."""
    # ITK knows SpacingBetweenSlices, and takes 1 mm where it is missing.
    thickness = _numbers(fields.get("0018|0050", ""))
    if "0018|0088" not in fields and thickness is not None and thickness[0] > 0:
        known = float(thickness[0])
    if not in_series:
        warnings.warn(
            f"{path}: it holds one slice, of {known:g} mm; if it is one of a series, the others "
            "are not read: give the folder that they are in",
            FileWarning,
            stacklevel=3,
        )
    return known


def dicom_values(path: Path, fields: Mapping[str, str], values: NDArray[Any]) -> NDArray[Any]:
    """Return what the values of ITK stand for.

    Parameters
    ----------
    path
        The file.
    fields
        What ITK has read of it, by tag.
    values
        What ITK makes of its voxels: of a dose grid the stored integers, of single bits 0 and 255.

    Returns
    -------
    ndarray
        In the unit of the dose, or 0 and 1.

    Raises
    ------
    ValueError
        If the scaling of a dose grid is not positive.
    """
    if fields.get("0028|0100") == "1":
        return values // 255
    if "3004|000e" not in fields:
        return values
    text = fields["3004|000e"]
    try:
        scaling = float(text)
    except ValueError:
        scaling = math.nan
    if not 0 < scaling < math.inf:
        raise ValueError(f"{path}: expected a positive DoseGridScaling, got {text!r}")
    scaled: NDArray[Any] = values * np.float64(scaling)
    return scaled


def _found(data: mmap.mmap, group: int, number: int, count: int) -> NDArray[Any]:
    """Return all decimal numbers of a tag, ``(n, count)``, wherever in sequences it is.

    ITK tells what is not in a sequence alone, and frames have their positions there.
    """
    rows = []
    for found in re.finditer(re.escape(struct.pack("<2H", group, number)), data):
        at = found.end()
        explicit = data[at : at + 2] == b"DS"
        form, at = ("<H", at + 2) if explicit else ("<I", at)
        start = at + struct.calcsize(form)
        if start > len(data):
            break
        (length,) = struct.unpack(form, data[at:start])
        row = _numbers(data[start : start + length].decode("latin-1")) if length < 200 else None
        if row is not None and len(row) == count:
            rows.append(row)
    return np.reshape(rows, (-1, count))


def _numbers(text: str) -> NDArray[Any] | None:
    try:
        return np.array([float(number) for number in text.strip(" \0").split("\\")])
    except ValueError:
        return None


def _is_rgb(data: bytes) -> bool | None:
    """Tell whether a JPEG image has its colours as RGB or YBR; None if it does not say."""
    at = data.find(b"\xff\xd8\xff") + 2
    while at > 1 and at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:
        kind, length = struct.unpack(">xBH", data[at : at + 4])
        content = data[at + 4 : at + 2 + length]
        if kind == 0xE0 and content.startswith(b"JFIF"):
            return False
        if kind == 0xEE and content.startswith(b"Adobe") and len(content) > 11:
            return content[11] == 0
        if kind in (0xC0, 0xC1, 0xC2) and len(content) == 15:  # of three components
            if content[6::3] == b"RGB":
                return True
            if content[7] != content[10]:  # the second is sampled less densely, as no colour is
                return False
        at += 2 + length
    return None
