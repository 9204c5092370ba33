"""Whether files are whole, seen before ITK reads them.

Of a file that is cut short ITK reads what is missing as zeros, as what was in memory or, of
transforms, as the identity; or it refuses it, but the libraries that it reads with print lines of
their own. It does not verify the checksum of what gzip compressed either. So the bytes that the
header promises are compared with those that are there, and what is compressed is unpacked once.
Files of formats for which that is not done here are not read.
"""

from __future__ import annotations

import gzip
import math
import os
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, cast

import numpy as np

__all__ = [
    "IMAGE_FORMATS",
    "Voxels",
    "check_hdf5",
    "check_transform",
    "check_voxels",
    "find_voxels",
]

_BLOCK = 1 << 22
_HDF5 = b"\x89HDF\r\n\x1a\n"
_PNG = b"\x89PNG\r\n\x1a\n"
_INSIGHT = b"#Insight Transform File"
_XFM = b"MNI Transform File"


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
    dtype
        What they are if ITK would hide that one is not finite.
    """

    file: Path
    offset: int
    skipped: int
    packing: Literal["none", "gzip", "zlib"]
    size: int | None = None
    dtype: np.dtype[Any] | None = None


def find_voxels(path: str | os.PathLike[str], kind: str) -> Voxels | None:
    """Look at the header of an image, and at all of it if the format has a checksum for that.

    Parameters
    ----------
    path
        The file.
    kind
        ITK's name of what reads it, one of `IMAGE_FORMATS`.

    Returns
    -------
    Voxels
        For `check_voxels`; None if they have nothing left to be checked.

    Raises
    ------
    FileNotFoundError
        If the voxels are to be in another file, and there is none.
    ValueError
        If the file is cut short or damaged, or if nothing in it tells whether it is.
    """
    with _telling_of_damage(path):
        return IMAGE_FORMATS[kind][1](Path(path))


def check_voxels(path: str | os.PathLike[str], voxels: Voxels, size: int) -> None:
    """See that the voxels of an image are all there, and finite where ITK's reader would hide it.

    Parameters
    ----------
    path
        The file.
    voxels
        Where they are.
    size
        How many bytes they take in memory.

    Raises
    ------
    ValueError
        If the file is cut short or damaged, or a voxel is not finite.
    """
    size = size if voxels.size is None else voxels.size
    length = voxels.file.stat().st_size - voxels.offset - voxels.skipped
    with _telling_of_damage(path):
        if voxels.packing != "none" or (voxels.dtype is not None and length >= size):
            length = 0
            for block in _blocks(voxels):
                inside = block[: max(size - length, 0)]
                length += len(block)
                if voxels.dtype is not None:
                    count = len(inside) // voxels.dtype.itemsize
                    if not np.isfinite(np.frombuffer(inside, voxels.dtype, count)).all():
                        raise ValueError(f"{path}: expected finite values, got NaN or infinity")
        if length < size:
            raise EOFError(
                f"expected {size} bytes of voxels, got {max(length, 0)} in {voxels.file.name}"
            )


def check_transform(path: str | os.PathLike[str]) -> None:
    """See that no transform of a file lacks parameters.

    Parameters
    ----------
    path
        A file of an ITK transform.

    Raises
    ------
    ValueError
        If the file is cut short or damaged.
    """
    check_hdf5(path)
    check = _TRANSFORM_FORMATS.get(Path(path).suffix.lower())
    if check is not None:
        with _telling_of_damage(path):
            check(Path(path))


def check_hdf5(path: str | os.PathLike[str]) -> None:
    """See that a file is as long as it says if it is one of HDF5.

    Parameters
    ----------
    path
        The file.

    Raises
    ------
    ValueError
        If it is cut short.

    Notes
    -----
    The places of the fields are those of the superblock in the HDF5 File Format Specification.
    """
    if not _is_hdf5(Path(path)):
        return
    with _telling_of_damage(path), Path(path).open("rb") as file:
        file.seek(len(_HDF5))
        start = _take(file, 64)
        # Where it says how long an address is, and where the addresses begin.
        at, first = {0: (5, 16), 1: (5, 20)}.get(start[0], (1, 4))
        width = start[at]
        # Each version has two of them before that of the end.
        end = int.from_bytes(start[first + 2 * width :][:width], "little")
        if Path(path).stat().st_size < end:
            raise EOFError(f"expected {end} bytes, got {Path(path).stat().st_size}")


def _is_hdf5(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(_HDF5)) == _HDF5


@contextmanager
def _telling_of_damage(path: str | os.PathLike[str]) -> Iterator[None]:
    """Say of which file it is that something is missing."""
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: cut short or damaged: {error}") from error


# --- images -------------------------------------------------------------------------------------


def _find_nifti(path: Path) -> Voxels:
    """Look at a NIfTI or Analyze image, whose values ITK may scale: what it says is no size.

    Notes
    -----
    The places of the fields are those of ``nifti1.h`` and ``nifti2.h``.
    """
    header, data = _nifti_pair(path)
    with header.open("rb") as raw:
        file = cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if _is_gzip(header) else raw
        start = _take(file, 348)
        start += file.read(540 - 348)
    # Of the two versions: how long the header is, and where it has the dimensions, the voxels'
    # type with their size in bits behind it, the voxels' offset and the spacing.
    layouts = {348: ("8h", 40, 70, "f", 108, 80), 540: ("8q", 16, 12, "q", 168, 112)}
    sizes = {order: struct.unpack_from(f"{order}i", start)[0] for order in "<>"}
    order = next((order for order, size in sizes.items() if size in layouts), None)
    if order is None or len(start) < sizes[order]:
        raise EOFError("expected the header of a NIfTI image")
    dims_code, dims_at, kind_at, offset_code, offset_at, spacing_at = layouts[sizes[order]]
    ndim, *dims = struct.unpack_from(f"{order}{dims_code}", start, dims_at)
    kind, bits = struct.unpack_from(f"{order}2h", start, kind_at)
    (offset,) = struct.unpack_from(f"{order}{offset_code}", start, offset_at)
    spacing_code = "3f" if sizes[order] == 348 else "3d"
    spacing = struct.unpack_from(f"{order}{spacing_code}", start, spacing_at)
    for dim, step in zip(dims[:ndim], spacing, strict=False):
        # ITK takes 1. Along a single voxel it does no harm, and some writers leave it out.
        if dim > 1 and not 0 < abs(step) < math.inf:
            raise ValueError(f"{path}: expected a finite spacing other than 0, got {spacing}")
    if kind not in _NIFTI_BITS:
        raise ValueError(f"{path}: expected a NIfTI datatype of whole bytes, got {kind}")
    if bits != _NIFTI_BITS[kind]:
        raise ValueError(
            f"{path}: expected bitpix {_NIFTI_BITS[kind]} for the datatype {kind}, got {bits}"
        )
    if not math.isfinite(offset):
        raise ValueError(f"{path}: expected a finite vox_offset, got {offset}")
    # Some writers leave the offset 0; behind the header of the same file it cannot be less.
    first = max(int(offset), sizes[order] if header == data else 0)
    # A dimension of 0 stands for one of 1, as in ITK.
    count = math.prod(max(dim, 1) for dim in dims[:ndim])
    dtype = {16: np.dtype(f"{order}f4"), 64: np.dtype(f"{order}f8")}.get(kind)
    return Voxels(data, 0, first, _packing(data), count * bits // 8, dtype)


_NIFTI_BITS = {2: 8, 4: 16, 8: 32, 16: 32, 32: 64, 64: 64, 128: 24, 256: 8, 512: 16, 768: 32}
_NIFTI_BITS |= {1024: 64, 1280: 64, 1536: 128, 1792: 128, 2048: 256, 2304: 32}
"""Size in bits of each datatype of ``nifti1.h``: ITK goes by it, whatever bitpix says."""


def _nifti_pair(path: Path) -> tuple[Path, Path]:
    """Return the files of the header and of the voxels, which may be one."""
    ending = re.search(r"\.(hdr|img)(\.gz)?$", path.name, re.IGNORECASE)
    if ending is None:
        return path, path
    kinds = ("HDR", "IMG") if ending[1].isupper() else ("hdr", "img")
    header, data = (
        path.with_name(f"{path.name[: ending.start()]}.{kind}{ending[2] or ''}") for kind in kinds
    )
    return (header, _existing(path, data)) if header.is_file() else (path, path)


def _find_meta(path: Path) -> Voxels:
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
    ndim = _integer("NDims", fields)
    if ndim not in (2, 3):
        raise ValueError(f"{path}: expected a 2-D or 3-D image, got {ndim}-D")
    _check_sizes(path, "DimSize", fields["DimSize"], ndim)
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
    start = _integer("HeaderSize", fields)
    if start < 0:
        raise ValueError(f"{path}: expected where the voxels begin, got HeaderSize {start}")
    local = data.upper() == "LOCAL"
    return Voxels(
        path if local else _existing(path, path.parent / data),
        start or (end if local else 0),
        0,
        "zlib" if _is_true(fields.get("CompressedData", "False")) else "none",
    )


_META_NEEDED = ("NDims", "DimSize", "ElementType", "ElementDataFile")
_META_TYPES = (
    *("MET_CHAR", "MET_UCHAR", "MET_SHORT", "MET_USHORT", "MET_INT", "MET_UINT"),
    *("MET_LONG", "MET_ULONG", "MET_LONG_LONG", "MET_ULONG_LONG", "MET_FLOAT", "MET_DOUBLE"),
)


def _check_sizes(path: Path, name: str, text: str, count: int) -> None:
    """Look at how many voxels there are along each axis: ITK's readers trust what is there."""
    sizes = text.split()
    if len(sizes) != count or not all(re.fullmatch(r"\+?0*[1-9][0-9]{0,9}", s) for s in sizes):
        raise ValueError(f"{path}: {name}: expected {count} positive integers, got {text[:40]!r}")


def _is_true(text: str) -> bool:
    return text[:1].upper() in ("T", "Y", "1")


_LONGEST_NRRD_FIELD = 1000


def _find_nrrd(path: Path) -> Voxels:
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
    ndim = _integer("dimension", fields)
    if ndim not in range(1, 5):  # of which one may be that of several values per voxel
        raise ValueError(f"{path}: expected a 2-D or 3-D image, got dimension {ndim}")
    _check_sizes(path, "sizes", fields.get("sizes", ""), ndim)
    encoding = fields["encoding"].lower()
    if encoding not in ("raw", "gzip", "gz"):
        raise ValueError(f"{path}: expected the encoding raw or gzip, got {encoding}")
    lines, skipped = (_integer(name, fields) for name in ("lineskip", "byteskip"))
    if skipped < 0:
        raise ValueError(f"{path}: expected where the voxels begin, got byte skip {skipped}")
    source = path if data is None else _existing(path, path.parent / data)
    with source.open("rb") as file:
        file.seek(end if data is None else 0)
        for _ in range(lines):
            if not file.readline():
                break
        start = file.tell()
    return Voxels(source, start, skipped, "none" if encoding == "raw" else "gzip")


def _integer(name: str, fields: dict[str, str]) -> int:
    try:
        return int(fields.get(name, "0"))
    except ValueError:
        raise EOFError(f"{name}: expected an integer, got {fields[name]!r}") from None


def _existing(path: Path, data: Path) -> Path:
    if not os.path.isfile(data):  # names that are too long, too
        raise FileNotFoundError(f"{path}: no such file of its voxels: {data}")
    return data


def _find_gipl(path: Path) -> Voxels:
    """Look at a GIPL image, which has 256 bytes of header."""
    return Voxels(path, 0, 256, _packing(path))


def _check_png(path: Path) -> None:
    """Look at a PNG image, a row of chunks with checksums."""
    with path.open("rb") as file:
        _take(file, len(_PNG))
        kind = b""
        while kind != b"IEND":
            length, kind = struct.unpack(">I4s", _take(file, 8))
            content = _take(file, length)
            if struct.unpack(">I", _take(file, 4)) != (zlib.crc32(kind + content),):
                raise EOFError("CRC check failed")


def _check_minc(path: Path) -> None:
    """Look at a MINC image; whether HDF5 is whole has been seen before."""
    if not _is_hdf5(path):
        raise ValueError(f"{path}: not an image: expected MINC 2, which is HDF5")


def _trust(path: Path) -> None:
    """Leave it to ITK: it refuses every DICOM file that lacks voxels, HDF5 has been looked at."""


IMAGE_FORMATS: dict[str, tuple[str, Callable[[Path], Voxels | None]]] = {
    "NiftiImageIO": ("NIfTI", _find_nifti),
    "MetaImageIO": ("MetaImage", _find_meta),
    "NrrdImageIO": ("NRRD", _find_nrrd),
    "GiplImageIO": ("GIPL", _find_gipl),
    "MINCImageIO": ("MINC", _check_minc),
    "HDF5ImageIO": ("HDF5", _trust),
    "GDCMImageIO": ("DICOM", _trust),
    "PNGImageIO": ("PNG", _check_png),
}
"""ITK's name of what reads a format, the format's own, and how to see that a file is whole."""


def _blocks(voxels: Voxels) -> Iterator[bytes]:
    """Read all from the voxels to the end of a file, which verifies its checksum if it has one."""
    with voxels.file.open("rb") as raw:
        raw.seek(min(voxels.offset, voxels.file.stat().st_size))
        if voxels.packing == "zlib":
            yield from _inflated(raw)
            return
        file = cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if voxels.packing == "gzip" else raw
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


def _packing(path: Path) -> Literal["none", "gzip"]:
    """Tell whether a file is compressed; as for ITK, its name does not say."""
    return "gzip" if _is_gzip(path) else "none"


def _is_gzip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"


def _take(file: BinaryIO, count: int) -> bytes:
    # The count is what a file says: it may be more than there is, in the file and in memory.
    data = file.read(min(count, max(os.fstat(file.fileno()).st_size, _BLOCK)))
    if len(data) < count:
        raise EOFError(f"expected {count} bytes more, got {len(data)}")
    return data


# --- transforms ---------------------------------------------------------------------------------


def _check_insight(path: Path) -> None:
    """Look at a text file of ITK, which would take the identity for what is missing."""
    text = path.read_bytes()
    if not text.startswith(_INSIGHT):
        return
    transforms, *parameters = (
        len(re.findall(start, text, re.MULTILINE))
        for start in (rb"^Transform:(?! *Composite)", rb"^Parameters:", rb"^FixedParameters:")
    )
    if min(parameters) < transforms:
        raise EOFError(
            f"expected the parameters of {transforms} transforms, got those of {min(parameters)}"
        )
    if not text.endswith(b"\n"):
        raise EOFError("expected a line break at the end: the last number may lack digits")


def _check_xfm(path: Path) -> None:
    """Look at a text file of MINC, statements with a semicolon behind each."""
    text = path.read_bytes()
    if not text.startswith(_XFM):
        raise ValueError(f"{path}: not a transform: expected {_XFM.decode()} at its start")
    *statements, rest = re.sub(rb"(?m)^%.*", b"", text).split(b";")
    if rest.strip() or not statements or b"Transform_Type" in statements[-1]:
        raise EOFError("expected a statement with a semicolon at the end")


def _check_matlab(path: Path) -> None:
    """Look at a file of ANTs: two matrices for each transform, as MATLAB 4 writes them."""
    matrices = 0
    with path.open("rb") as file:
        while head := file.read(20):
            head += _take(file, 20 - len(head))
            # The first number has the order of the bytes in its thousands and the type in its tens.
            order = "<" if struct.unpack("<i", head[:4])[0] < 1000 else ">"
            kind, rows, columns, imaginary, name = struct.unpack(f"{order}5i", head)
            widths = {0: 8, 1: 4, 2: 4, 3: 2, 4: 2, 5: 1}
            width = widths.get(kind // 10 % 10)
            if width is None or kind not in range(2000) or min(rows, columns, name) < 0:
                raise ValueError(f"{path}: not a transform: expected matrices of MATLAB 4")
            _take(file, name + rows * columns * width * (2 if imaginary else 1))
            matrices += 1
    if matrices == 0 or matrices % 2:
        raise EOFError(f"expected two matrices for each transform, got {matrices}")


def _check_is_hdf5(path: Path) -> None:
    if not _is_hdf5(path):
        raise ValueError(f"{path}: not a transform: expected HDF5")


_TRANSFORM_FORMATS: dict[str, Callable[[Path], None]] = {
    ".tfm": _check_insight,
    ".txt": _check_insight,
    ".mat": _check_matlab,
    ".xfm": _check_xfm,
    ".h5": _check_is_hdf5,
    ".hdf5": _check_is_hdf5,
}
