"""NIfTI images, read from the definitions of ``nifti1.h`` and ``nifti2.h``.

ITK is not asked: it goes by the qform where the sform has a shear, adds an intercept where there is
no slope, knows neither NIfTI-2 nor what the intent says, and takes Analyze images to be turned.
"""

from __future__ import annotations

import math
import re
import warnings
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from regkernels.files.compression import DAMAGE, uncompressed
from regkernels.files.formats.reading import (
    FileWarning,
    Voxels,
    blocks,
    existing_file,
    is_gzip,
    packing_of,
    read_exactly,
)
from regkernels.grid import Grid, Matrix

__all__ = [
    "Intent",
    "NiftiHeader",
    "check_field",
    "is_nifti2",
    "read_nifti_header",
    "read_values",
]


class Intent(NamedTuple):
    """What the values of an image are meant to be.

    Attributes
    ----------
    code
        One of ``nifti1.h``; 1007 stands for vectors.
    name
        What the writer calls them.
    parameter
        The first one.
    """

    code: int
    name: str
    parameter: float


class NiftiHeader(NamedTuple):
    """What a NIfTI file says of its voxels.

    Attributes
    ----------
    voxels
        Where they are in the file.
    dtype
        How one value is stored.
    sizes
        As many values as there are along each axis of the file, fastest first.
    samples
        How many values are one pixel of colour; 1 if it has none.
    ndim
        How many of the axes are spatial.
    affine
        ``(4, 4)``, from voxel indices to millimetres, RAS.
    unit
        How many millimetres the unit of its lengths is.
    scale
        Slope and intercept of the values; None if they are as stored.
    intent
        What they are.
    time_step
        Seconds from one 3-D image to the next along the fourth axis; 0 if it does not say.
    """

    voxels: Voxels
    dtype: np.dtype[Any]
    sizes: tuple[int, ...]
    samples: int
    ndim: int
    affine: Matrix
    unit: float
    scale: tuple[float, float] | None
    intent: Intent
    time_step: float

    @property
    def components(self) -> int:
        """Number of values per voxel."""
        return self.sizes[4] if _is_vector(self.intent.code, self.sizes) else self.samples

    def grid(self, path: Path, ndim: int | None = None) -> Grid:
        """Return where the voxels lie, in LPS; as an image of `ndim` dimensions.

        Raises
        ------
        ValueError
            If the axes do not span the space.
        """
        ndim = self.ndim if ndim is None else ndim
        matrix = np.diag([-1.0, -1.0, 1.0, 1.0]) @ self.affine
        axes, spacing = matrix[:3, :3], np.linalg.norm(matrix[:3, :3], axis=0)
        if ndim == 2 and (abs(axes[2, :2]) > 1e-3 * spacing[:2]).any():
            raise ValueError(
                f"{path}: a 2-D image out of the plane of x and y has no place in 2-D; store it as "
                "a 3-D image of one slice"
            )
        axes, spacing = axes[:ndim, :ndim], np.linalg.norm(axes[:ndim, :ndim], axis=0)
        if not np.isfinite(matrix).all() or not (spacing > 0).all():
            raise ValueError(f"{path}: expected finite axes that are not 0, got {axes.tolist()}")
        if abs(np.linalg.det(axes / spacing)) < 1e-6:
            raise ValueError(f"{path}: expected axes that span the space, got {axes.tolist()}")
        return Grid(self.sizes[:ndim][::-1], spacing, matrix[:ndim, 3].copy(), axes / spacing)


_FIELDS = [
    # Name, format and place in NIfTI-1, and in NIfTI-2.
    ("dim", "8i2", 40, "8i8", 16),
    ("p1", "f4", 56, "f8", 80),
    ("intent", "i2", 68, "i4", 504),
    ("datatype", "i2", 70, "i2", 12),
    ("bitpix", "i2", 72, "i2", 14),
    ("pixdim", "8f4", 76, "8f8", 104),
    ("offset", "f4", 108, "i8", 168),
    ("slope", "f4", 112, "f8", 176),
    ("inter", "f4", 116, "f8", 184),
    ("units", "u1", 123, "i4", 500),
    ("qcode", "i2", 252, "i4", 344),
    ("scode", "i2", 254, "i4", 348),
    ("quatern", "3f4", 256, "3f8", 352),
    ("qoffset", "3f4", 268, "3f8", 376),
    ("srow", "(3,4)f4", 280, "(3,4)f8", 400),
    ("name", "S16", 328, "S16", 508),
    ("magic", "S4", 344, "S8", 4),
]


def _layout(version: int, length: int) -> np.dtype[Any]:
    names, *columns = zip(*_FIELDS, strict=True)
    formats, offsets = columns[2 * version - 2 : 2 * version]
    fields: Any = {"names": names, "formats": formats, "offsets": offsets, "itemsize": length}
    result: np.dtype[Any] = np.dtype(fields)
    return result


_ORDERS: tuple[Literal["<", ">"], ...] = ("<", ">")
_LAYOUTS = {348: _layout(1, 348), 540: _layout(2, 540)}
# Of one file, and of two.
_MAGIC = {348: (b"n+1", b"ni1"), 540: (b"n+2\0\r\n\x1a\n", b"ni2\0\r\n\x1a\n")}

_STORED = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4"}
_STORED |= {1024: "i8", 1280: "u8", 128: "u1", 2304: "u1", 32: "c8", 1792: "c16"}
"""How each datatype of ``nifti1.h`` that is known here is stored; of colours, one sample."""

_SAMPLES = {128: 3, 2304: 4}

_MILLIMETRES = {1: 1e3, 3: 1e-3}
"""By the code of the unit; all others are taken for millimetres."""

_SECONDS = {0: 1.0, 8: 1.0, 16: 1e-3, 24: 1e-6}
"""By the code of the unit of time; without one it is taken for seconds."""

_DISPLACEMENT, _VECTOR, _SYMMETRIC = 1006, 1007, 1005

_NOTABLE = 0.05
"""Voxels that two places are apart for it to be told; rounding of headers stays far below."""


_UNREADABLE: tuple[type[Exception], ...] = (*DAMAGE, OSError)


def is_nifti2(path: Path) -> bool:
    """Tell whether a file begins as NIfTI-2, which ITK does not know."""
    try:
        return _start(_nifti_pair(path)[0])[4:12] in _MAGIC[540]
    except _UNREADABLE:
        return False


def read_nifti_header(path: Path) -> NiftiHeader:
    """Read all but the voxels of a NIfTI image.

    Parameters
    ----------
    path
        The file.

    Returns
    -------
    NiftiHeader
        Its place is that of the sform if that is coded, of the qform if that is, or else what
        nibabel takes: x to the left, the middle of the image at 0. A `FileWarning` says where
        somebody else may find another place.

    Raises
    ------
    EOFError
        If the header is cut short.
    ValueError
        If it is of Analyze 7.5, or says what cannot be.
    """
    header, data = _nifti_pair(path)
    start = _start(header)
    orders = {order: int(np.frombuffer(start, f"{order}i4", 1)[0]) for order in _ORDERS}
    order = next((order for order, size in orders.items() if size in _LAYOUTS), None)
    if order is None or len(start) < orders[order]:
        raise EOFError("expected the header of a NIfTI image")
    length = orders[order]
    fields = np.frombuffer(start, _LAYOUTS[length].newbyteorder(order), 1)[0]
    if fields["magic"] not in _MAGIC[length]:
        raise ValueError(
            f"{path}: an Analyze 7.5 image does not say which side is left; convert it to NIfTI "
            "with a program that knows where it comes from, such as fslchfiletype, SPM or nibabel"
        )
    if header == data and fields["magic"] == _MAGIC[length][1]:
        raise ValueError(f"{path}: expected its voxels in another file, as its magic says, got one")
    ndim = int(fields["dim"][0])
    if not 1 <= ndim <= 7:
        raise ValueError(f"{path}: expected 1 to 7 dimensions, got {ndim}")
    if (fields["dim"][1 : ndim + 1] < 0).any():
        raise ValueError(
            f"{path}: expected sizes of axes that are not negative, got "
            f"{fields['dim'][1 : ndim + 1].tolist()}"
        )
    # A dimension of 0 stands for one of 1.
    sizes = tuple(max(int(size), 1) for size in fields["dim"][1 : ndim + 1]) + (1,) * (7 - ndim)
    spacing = fields["pixdim"][1:4].astype(np.float64)
    # Along a single voxel it does no harm, and some writers leave it out.
    harmless = np.array(sizes[:3]) == 1
    good = np.isfinite(spacing) & (spacing != 0)
    if not (good | harmless).all():
        raise ValueError(
            f"{path}: expected a finite spacing other than 0, got {tuple(spacing.tolist())}"
        )
    spacing = np.where(good, abs(spacing), 1.0)
    kind, bits = int(fields["datatype"]), int(fields["bitpix"])
    if kind not in _STORED:
        raise ValueError(f"{path}: expected a NIfTI datatype of whole bytes, got {kind}")
    dtype, samples = np.dtype(f"{order}{_STORED[kind]}"), _SAMPLES.get(kind, 1)
    if bits != 8 * samples * dtype.itemsize:
        raise ValueError(
            f"{path}: expected bitpix {8 * samples * dtype.itemsize} for the datatype {kind}, "
            f"got {bits}"
        )
    offset = float(fields["offset"])
    if not math.isfinite(offset):
        raise ValueError(f"{path}: expected a finite vox_offset, got {offset}")
    # Some writers leave the offset 0; behind the header of the same file it cannot be less.
    first = max(int(offset), length if header == data else 0)
    size = math.prod(sizes) * samples * dtype.itemsize
    unit = _unit(path, fields)
    intent = Intent(
        int(fields["intent"]),
        bytes(fields["name"]).split(b"\0")[0].decode("latin-1").strip(),
        float(fields["p1"]),
    )
    return NiftiHeader(
        Voxels(data, 0, first, packing_of(data), size),
        dtype,
        sizes,
        samples,
        _spatial(intent.code, ndim, sizes),
        _place(path, fields, sizes[:3], spacing, unit),
        unit,
        _scale(path, fields) if samples == 1 else None,
        intent,
        _time_step(fields),
    )


def check_field(path: Path, header: NiftiHeader) -> None:
    """Refuse by name what other programs keep of a transform and what is no displacement in mm.

    Parameters
    ----------
    path
        The file.
    header
        Its header.

    Raises
    ------
    ValueError
        If it is a warp of FSL's, or has its components along the fourth axis, as AFNI's.
    """
    got, instead = _OF_FSL.get(header.intent.code, ("", ""))
    if got:
        raise ValueError(
            f"{path}: expected displacements in millimetres, LPS, got {got}; {instead}"
        )
    if header.ndim == 4 and header.sizes[3] == 3:
        raise ValueError(
            f"{path}: expected displacements along the fifth axis (x, y, z, 1, 3), as ITK and ANTs "
            "write them, got three images one after the other, as AFNI's 3dQwarp and others do; "
            "convert them with a program that knows their convention, such as nitransforms"
        )


_CONVERTING = "`wb_command -convert-warpfield -from-fnirt FIELD MOVING -to-itk WARP.nii.gz`"
_OF_SPLINES = (
    "spline coefficients of FSL's FNIRT",
    "`convertwarp --ref=FIXED --warp1=COEFFICIENTS --out=FIELD` makes a field of them, and "
    f"{_CONVERTING} converts that",
)
_OF_TOPUP = (
    "a field of FSL's topup, which says how far voxels are moved only with how they were acquired",
    "`applytopup` unwarps the image itself",
)
_OF_FSL = {
    2006: (
        "a warp field of FSL (FNIRT, convertwarp), whose coordinates depend on both images",
        f"{_CONVERTING} converts it",
    ),
    **dict.fromkeys((2007, 2008, 2009), _OF_SPLINES),
    **dict.fromkeys((2016, 2017, 2018), _OF_TOPUP),
}
"""By the intent that FSL gives to what it writes."""


def read_values(path: Path, header: NiftiHeader, ndim: int | None = None) -> NDArray[Any]:
    """Read the values of a NIfTI image.

    Parameters
    ----------
    path
        The file.
    header
        Its header.
    ndim
        How many axes are spatial; as many as in the header by default.

    Returns
    -------
    ndarray
        ``([Z,] Y, X)``, or ``([Z,] Y, X, C)``; as they are stored, or float64 if they are scaled.

    Raises
    ------
    EOFError
        If there are fewer than the header says.
    ValueError
        If one is not finite.
    """
    size = header.voxels.size or 0
    data = bytearray()
    for block in blocks(header.voxels):  # to the end, where the checksum is
        data += memoryview(block)[: max(size - len(data), 0)]
    if len(data) < size:
        raise EOFError(
            f"expected {size} bytes of voxels, got {len(data)} in {header.voxels.file.name}"
        )
    stored = np.frombuffer(data, header.dtype)
    if stored.dtype.kind == "f" and not np.isfinite(stored).all():
        raise ValueError(f"{path}: expected finite values, got NaN or infinity")
    shape = header.sizes[: header.ndim if ndim is None else ndim][::-1]
    values = stored.astype(header.dtype.newbyteorder("="), copy=False)
    if header.scale is not None:
        slope, intercept = header.scale
        values = values * np.float64(slope) + np.float64(intercept)
    if header.samples > 1:
        return values.reshape(*shape, header.samples)
    if header.components > 1:
        return np.ascontiguousarray(np.moveaxis(values.reshape(header.components, *shape), 0, -1))
    return values.reshape(shape)


def _start(header: Path) -> bytes:
    """Read as much as a header takes, or all that there is."""
    with header.open("rb") as raw:
        file = uncompressed(raw) if is_gzip(header) else raw
        return read_exactly(file, 348) + file.read(540 - 348)


def _is_vector(code: int, sizes: tuple[int, ...]) -> bool:
    """Tell whether the fifth axis holds the components, as ITK takes it by the intent."""
    return code in (_DISPLACEMENT, _VECTOR, _SYMMETRIC) and math.prod(sizes[5:]) == 1


def _spatial(code: int, ndim: int, sizes: tuple[int, ...]) -> int:
    """Count the spatial axes, as ITK does: single voxels at the end are none beyond the third."""
    if _is_vector(code, sizes) and ndim > 4:
        return max((axis + 1 for axis in range(4) if sizes[axis] > 1), default=1)
    while ndim > 3 and sizes[ndim - 1] == 1:
        ndim -= 1
    return ndim


def _scale(path: Path, fields: Any) -> tuple[float, float] | None:
    """Return slope and intercept; a slope of 0, or none at all, stands for no scaling."""
    slope, intercept = float(fields["slope"]), float(fields["inter"])
    if slope == 0 or not math.isfinite(slope) or (slope, intercept) == (1, 0):
        return None
    if not math.isfinite(intercept):
        raise ValueError(f"{path}: expected a finite scl_inter, got {intercept}")
    return slope, intercept


def _unit(path: Path, fields: Any) -> float:
    """Return how many millimetres the unit of lengths is."""
    code = int(fields["units"]) & 7
    if code > 3:
        warnings.warn(
            f"{path}: its unit of length has the code {code}, which stands for none; it is taken "
            "for millimetres",
            FileWarning,
            stacklevel=2,
        )
    return _MILLIMETRES.get(code, 1.0)


def _time_step(fields: Any) -> float:
    """Return the spacing along the fourth axis in seconds, if its unit is one of time, or none."""
    code, step = int(fields["units"]) & 0o70, float(fields["pixdim"][4])
    if not math.isfinite(step) or code not in _SECONDS:
        return 0.0
    return abs(step) * _SECONDS[code]


def _place(
    path: Path, fields: Any, sizes: tuple[int, ...], spacing: NDArray[Any], unit: float
) -> Matrix:
    """Return the matrix from voxels to millimetres, RAS, and warn of what others may make of it."""
    quatern = np.array(fields["quatern"], np.float64)
    rotation = quatern @ quatern < 1.001
    qform = None
    if fields["qcode"] > 0 and rotation:
        qform = _scaled(_qform(fields, spacing), unit)
    if fields["scode"] > 0:
        sform = _scaled(np.vstack([fields["srow"].astype(np.float64), [0, 0, 0, 1]]), unit)
        complaint = _complaint(sform, qform, sizes, unit * spacing)
        if fields["qcode"] > 0 and not rotation:
            complaint = "its qform is no rotation"
        if complaint is not None:
            warnings.warn(
                f"{path}: {complaint}; the sform is used, as in nibabel, FSL and SPM, and what was "
                "made of this image by a program that uses the qform (ITK, ANTs) may not fit",
                FileWarning,
                stacklevel=2,
            )
        return sform
    if qform is not None:
        return qform
    if fields["qcode"] > 0:
        raise ValueError(
            f"{path}: expected the quaternion of a rotation, got {tuple(quatern.tolist())}"
        )
    warnings.warn(
        f"{path}: it has neither sform nor qform, so nothing tells left from right; x is taken to "
        "run to the left and the middle of the image to be at 0, as in nibabel",
        FileWarning,
        stacklevel=2,
    )
    axes = unit * spacing * [-1, 1, 1]
    base = np.diag([*axes, 1.0])
    base[:3, 3] = -axes * (np.array(sizes) - 1) / 2
    return base


def _scaled(matrix: Matrix, unit: float) -> Matrix:
    result: Matrix = np.diag([unit, unit, unit, 1.0]) @ matrix
    return result


def _qform(fields: Any, spacing: NDArray[Any]) -> Matrix:
    """Return the matrix of the quaternion, of which the header has all but the real part."""
    b, c, d = (float(part) for part in fields["quatern"])
    rest = 1 - (b * b + c * c + d * d)
    a = math.sqrt(max(rest, 0.0))
    if a < 1e-7:
        b, c, d = (part / math.sqrt(b * b + c * c + d * d) for part in (b, c, d))
    turn = np.array(
        [
            [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
            [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
            [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - c * c - b * b],
        ]
    )
    handed = -1.0 if fields["pixdim"][0] < 0 else 1.0
    matrix = np.eye(4)
    matrix[:3, :3] = turn * spacing * [1, 1, handed]
    matrix[:3, 3] = fields["qoffset"]
    return matrix


def _complaint(
    sform: Matrix, qform: Matrix | None, sizes: tuple[int, ...], spacing: NDArray[Any]
) -> str | None:
    """Say in what the sform is not what everybody takes from the header."""
    step = np.linalg.norm(sform[:3, :3], axis=0)
    if not np.isfinite(sform).all() or not (step > 0).all():
        return None
    last = np.maximum(np.array(sizes) - 1, 1)
    if qform is not None:
        corners = np.array(np.meshgrid(*([0, size - 1] for size in sizes))).reshape(3, -1)
        apart = (sform - qform)[:3, :3] @ corners + (sform - qform)[:3, 3:]
        largest = float(np.linalg.norm(apart, axis=0).max())
        if largest > _NOTABLE * step.min():
            return f"its sform and its qform place voxels up to {largest:.3g} mm apart"
        return None
    axes = sform[:3, :3] / step
    if (abs(axes.T @ axes - np.eye(3)) * last > _NOTABLE).any():
        return "the axes of its sform are not at right angles"
    if (abs(step / spacing - 1) * last > _NOTABLE).any():
        steps, told = (" x ".join(f"{x:.4g}" for x in each) for each in (step, spacing))
        return f"the voxels of its sform are {steps} mm large, those of its pixdim {told} mm"
    return None


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
