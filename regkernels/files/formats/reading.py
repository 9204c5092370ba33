"""What the formats have in common: where voxels are, and reading what may be cut short."""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

from regkernels.files.compression import DAMAGE, uncompressed

__all__ = [
    "FileWarning",
    "Header",
    "Voxels",
    "blocks",
    "check_sizes",
    "existing_file",
    "integer_field",
    "is_gzip",
    "length_unit",
    "packing_of",
    "read_exactly",
    "telling_of_damage",
]

_BLOCK = 1 << 22


class FileWarning(UserWarning):
    """What a file says can be understood in more than one way."""


class Voxels(NamedTuple):
    """Where the voxels of an image are.

    Attributes
    ----------
    file
        That of the image, or one beside it.
    offset
        Where in the file they begin, or what they are compressed to.
    skipped
        Bytes before them, counted when it is unpacked.
    packing
        How they are compressed.
    size
        How many bytes they are if not as many as in memory.
    """

    file: Path
    offset: int
    skipped: int
    packing: Literal["none", "gzip", "zlib"]
    size: int | None = None


class Header(NamedTuple):
    """What is seen of an image before ITK reads it, and what ITK leaves undone.

    Attributes
    ----------
    voxels
        Where they are; None if nothing is left to be checked.
    unit
        How many millimetres the unit of its lengths is.
    scale
        Slope and intercept by which values are made of the stored ones; None if they are these.
    unplaced
        What is missing in it to say where an image in space lies; empty if nothing is.
    vectors
        What its vectors are in, if not in LPS or if nobody knows; empty otherwise.
    """

    voxels: Voxels | None = None
    unit: float = 1.0
    scale: tuple[float, float] | None = None
    unplaced: str = ""
    vectors: str = ""


@contextmanager
def telling_of_damage(path: str | os.PathLike[str]) -> Iterator[None]:
    """Say of which file it is that something is missing."""
    try:
        yield
    except DAMAGE as error:
        raise ValueError(f"{path}: cut short or damaged: {error}") from error


def check_sizes(path: Path, name: str, text: str, count: int) -> None:
    """Look at how many voxels there are along each axis: ITK's readers trust what is there."""
    sizes = text.split()
    if len(sizes) != count or not all(re.fullmatch(r"\+?0*[1-9][0-9]{0,9}", s) for s in sizes):
        raise ValueError(f"{path}: {name}: expected {count} positive integers, got {text[:40]!r}")


def integer_field(name: str, fields: dict[str, str]) -> int:
    """Return a field of a header, 0 where it is missing."""
    try:
        return int(fields.get(name, "0"))
    except ValueError:
        raise EOFError(f"{name}: expected an integer, got {fields[name]!r}") from None


_MILLIMETRES = {"nm": 1e-6, "um": 1e-3, "mm": 1.0, "cm": 10.0, "m": 1e3}
_PREFIXES = {"nano": "n", "micro": "u", "milli": "m", "centi": "c"}


def length_unit(path: Path, name: str, text: str) -> float:
    """Return how many millimetres a unit of length is, 1 if none is named."""
    unit = text.strip(" ?").lower().replace("µ", "u").replace("μ", "u")
    unit = re.sub(r"^microns?$", "micrometre", unit)
    unit = re.sub(
        r"^(\w*)met(er|re)s?$", lambda found: _PREFIXES.get(found[1], found[1]) + "m", unit
    )
    if not unit:
        return 1.0
    if unit not in _MILLIMETRES:
        known = ", ".join(_MILLIMETRES)
        raise ValueError(f"{path}: {name}: expected one of {known}, got {text[:40]!r}")
    return _MILLIMETRES[unit]


def existing_file(path: Path, data: Path) -> Path:
    """Return the file of the voxels of an image if there is one."""
    if not os.path.isfile(data):  # names that are too long, too
        raise FileNotFoundError(f"{path}: no such file of its voxels: {data}")
    return data


def blocks(voxels: Voxels) -> Iterator[bytes]:
    """Read all from the voxels to the end of a file, which verifies its checksum if it has one."""
    with voxels.file.open("rb") as raw:
        raw.seek(min(voxels.offset, voxels.file.stat().st_size))
        if voxels.packing == "zlib":
            yield from _inflated(raw)
            return
        file = uncompressed(raw) if voxels.packing == "gzip" else raw
        skipped = voxels.skipped
        while skipped > 0 and (block := file.read(min(skipped, _BLOCK))):
            skipped -= len(block)
        while block := file.read(_BLOCK):
            yield block


def _inflated(file: BinaryIO) -> Iterator[bytes]:
    inflate = zlib.decompressobj()
    while not inflate.eof:
        packed = inflate.unconsumed_tail or file.read(_BLOCK)
        block = inflate.decompress(packed, _BLOCK)
        if not packed and not block:
            raise EOFError("its compressed voxels have no end")
        yield block


def packing_of(path: Path) -> Literal["none", "gzip"]:
    """Tell whether a file is compressed; as for ITK, its name does not say."""
    return "gzip" if is_gzip(path) else "none"


def is_gzip(path: Path) -> bool:
    """Tell whether a file begins as gzip compresses."""
    with path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"


def read_exactly(file: BinaryIO, count: int) -> bytes:
    """Read so many bytes, or fail if a file has fewer left."""
    # The count is what a file says: it may be more than there is, in the file and in memory.
    data = file.read(min(count, max(os.fstat(file.fileno()).st_size, _BLOCK)))
    if len(data) < count:
        raise EOFError(f"expected {count} bytes more, got {len(data)}")
    return data
