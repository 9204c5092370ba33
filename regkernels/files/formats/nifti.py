"""NIfTI and Analyze images."""

from __future__ import annotations

import gzip
import math
import re
import struct
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np

from regkernels.files.formats.reading import (
    Voxels,
    existing_file,
    is_gzip,
    packing_of,
    read_exactly,
)

__all__ = ["find_nifti"]


def find_nifti(path: Path) -> Voxels:
    """Look at a NIfTI or Analyze image, whose values ITK may scale: what it says is no size.

    Notes
    -----
    The places of the fields are those of ``nifti1.h`` and ``nifti2.h``.
    """
    header, data = _nifti_pair(path)
    with header.open("rb") as raw:
        file = cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if is_gzip(header) else raw
        start = read_exactly(file, 348)
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
    return Voxels(data, 0, first, packing_of(data), count * bits // 8, dtype)


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
    return (header, existing_file(path, data)) if header.is_file() else (path, path)
