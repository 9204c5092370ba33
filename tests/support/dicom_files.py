"""DICOM files written by hand, by the tables of parts 5 and 6: SimpleITK writes few of them."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

IMPLICIT, EXPLICIT = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1"
BIG_ENDIAN = "1.2.840.10008.1.2.2"
JPEG, RLE = "1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.5"

DOSE = "1.2.840.10008.5.1.4.1.1.481.2"
ENHANCED_CT = "1.2.840.10008.5.1.4.1.1.2.1"
CT = "1.2.840.10008.5.1.4.1.1.2"
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"

Fields = dict[int, tuple[str, Any]]


def write_dicom(
    path: Path,
    values: NDArray[Any],
    fields: Fields | None = None,
    *,
    kind: str = SECONDARY_CAPTURE,
    syntax: str = EXPLICIT,
    photometric: str | None = None,
    planes: bool = False,
    stream: bytes | None = None,
) -> None:
    """Write ``(Y, X)``, ``(Z, Y, X)`` or, with a photometric interpretation, ``(Y, X, 3)``.

    `fields` are by tag, such as ``0x00280010: ("US", 4)``; a sequence is a list of such. `stream`
    is a compressed image.
    """
    colours = values.shape[-1] if photometric else 1
    frames, (rows, columns) = (1, values.shape[:2]) if photometric else (0, values.shape[-2:])
    bits = 8 * values.itemsize
    data = np.moveaxis(values, -1, 0) if planes else values
    order = ">" if syntax == BIG_ENDIAN else "<"
    known: Fields = {
        0x00080016: ("UI", kind),
        0x00080018: ("UI", "1.2.3"),
        0x00280002: ("US", colours),
        0x00280004: ("CS", photometric or "MONOCHROME2"),
        0x00280010: ("US", rows),
        0x00280011: ("US", columns),
        0x00280100: ("US", bits),
        0x00280101: ("US", bits),
        0x00280102: ("US", bits - 1),
        0x00280103: ("US", int(values.dtype.kind == "i")),
        0x7FE00010: ("OW", data.astype(values.dtype.newbyteorder(order)).tobytes()),
    }
    if photometric:
        known[0x00280006] = ("US", int(planes))
    if values.ndim == 3 and not frames:
        known[0x00280008] = ("IS", str(len(values)))
    if stream is not None:
        stream += b"\0" * (len(stream) % 2)
        items = (b"", stream)
        packed = b"".join(struct.pack("<2HI", 0xFFFE, 0xE000, len(x)) + x for x in items)
        known[0x7FE00010] = ("OB", packed + struct.pack("<2HI", 0xFFFE, 0xE0DD, 0))
    known |= fields or {}
    known = {tag: field for tag, field in known.items() if field[1] is not None}
    body = b"".join(_element(*field, syntax, stream is not None) for field in sorted(known.items()))
    meta = b"".join(
        _element(tag, field, EXPLICIT)
        for tag, field in (
            (0x00020001, ("OB", b"\0\1")),
            (0x00020002, ("UI", kind)),
            (0x00020003, ("UI", "1.2.3")),
            (0x00020010, ("UI", syntax)),
        )
    )
    length = _element(0x00020000, ("UL", struct.pack("<I", len(meta))), EXPLICIT)
    path.write_bytes(b"\0" * 128 + b"DICM" + length + meta + body)


def _element(tag: int, field: tuple[str, Any], syntax: str, encapsulated: bool = False) -> bytes:
    kind, value = field
    order = ">" if syntax == BIG_ENDIAN else "<"
    if kind == "SQ":
        items = [
            b"".join(_element(*part, syntax) for part in sorted(item.items())) for item in value
        ]
        value = b"".join(struct.pack(f"{order}2HI", 0xFFFE, 0xE000, len(x)) + x for x in items)
    elif isinstance(value, int):
        value = struct.pack(f"{order}H", value)
    elif isinstance(value, str):
        value = value.encode()
    value += (b"\0" if kind in ("UI", "OB") else b" ") * (len(value) % 2)
    head = struct.pack(f"{order}2H", tag >> 16, tag & 0xFFFF)
    undefined = encapsulated and tag == 0x7FE00010
    length = 0xFFFFFFFF if undefined else len(value)
    if syntax == IMPLICIT:
        return head + struct.pack("<I", length) + value
    form = "2xI" if kind in ("OB", "OW", "SQ") else "H"
    return head + kind.encode() + struct.pack(f"{order}{form}", length) + value


def run_lengths(values: NDArray[Any]) -> bytes:
    """Pack ``(Y, X)`` or ``(Y, X, C)`` as the RLE of part 5, annex G, all bytes as they are."""
    samples = np.moveaxis(np.atleast_3d(values), -1, 0)
    segments = []
    for sample in samples:
        raw = np.ascontiguousarray(sample.astype(sample.dtype.newbyteorder(">")))
        for plane in raw.view(np.uint8).reshape(sample.size, -1).T:
            text, rows = plane.tobytes(), range(0, sample.size, sample.shape[1])
            packed = b"".join(
                bytes([sample.shape[1] - 1]) + text[at : at + sample.shape[1]] for at in rows
            )
            segments.append(packed + b"\x80" * (len(packed) % 2))
    starts = 64 + np.cumsum([0, *map(len, segments)])[:-1]
    return struct.pack("<16I", len(segments), *starts, *[0] * (15 - len(segments))) + b"".join(
        segments
    )


def decimals(*numbers: float) -> tuple[str, str]:
    """A field of decimal strings."""
    return "DS", "\\".join(f"{number:.10g}" for number in numbers)


def frames_at(
    positions: NDArray[Any],
    axes: NDArray[Any],
    spacing: tuple[float, float],
    slopes: tuple[float, ...] = (),
) -> Fields:
    """Return what an enhanced file says of its frames: ``axes`` is ``(6,)`` or one for each."""
    axes = np.broadcast_to(axes, (len(positions), 6))
    frames: list[Fields] = [
        {
            0x00209113: ("SQ", [{0x00200032: decimals(*position)}]),
            0x00209116: ("SQ", [{0x00200037: decimals(*turn)}]),
        }
        for position, turn in zip(positions, axes, strict=True)
    ]
    for frame, slope in zip(frames, slopes, strict=False):
        frame[0x00289145] = ("SQ", [{0x00281052: decimals(0), 0x00281053: decimals(slope)}])
    measures = ("SQ", [{0x00280030: decimals(*spacing[::-1])}])
    return {0x52009229: ("SQ", [{0x00289110: measures}]), 0x52009230: ("SQ", frames)}
