"""Volumes as files, through SimpleITK: their values, and where their voxels lie."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from regkernels.files.atomic import atomic_path
from regkernels.files.compression import compress, has_isal
from regkernels.files.formats import IMAGE_FORMATS
from regkernels.files.formats.dicom import (
    check_dicom,
    dicom_grid,
    dicom_series,
    dicom_values,
    series_grid,
)
from regkernels.files.formats.hdf5 import check_hdf5
from regkernels.files.formats.minc import minc_to_lps
from regkernels.files.formats.nifti import (
    Intent,
    check_field,
    is_nifti2,
    read_nifti_header,
    read_values,
)
from regkernels.files.formats.reading import FileWarning, Header, telling_of_damage
from regkernels.files.integrity import check_voxels, read_header
from regkernels.files.itk_warnings import collected_output, tell_of_output, telling_warnings
from regkernels.files.simpleitk import import_simpleitk
from regkernels.grid import Grid
from regkernels.volume import Volume

__all__ = [
    "NIFTI_SUFFIXES",
    "WRITTEN_SUFFIXES",
    "Image",
    "check_image_grid",
    "check_image_name",
    "image_format_is_nifti",
    "image_grid",
    "image_values",
    "itk_image",
    "itk_reason",
    "read_grid",
    "read_image",
    "read_volume",
    "write_image",
    "write_itk_image",
    "write_volume",
]

WRITTEN_SUFFIXES = (
    *(".nii", ".nii.gz", ".hdr", ".img", ".hdr.gz", ".img.gz"),
    *(".mha", ".mhd"),
    *(".nrrd", ".nhdr"),
)
"""Endings of the formats that keep all of an image: NIfTI, MetaImage and NRRD."""


def read_volume(path: str | os.PathLike[str]) -> Volume:
    """Read a 2-D or 3-D image through SimpleITK.

    Parameters
    ----------
    path
        The file: NIfTI, MetaImage, NRRD, GIPL, MINC 2, HDF5, DICOM or PNG; or the folder of one
        series of DICOM. Where sform and qform of NIfTI differ, the sform says where voxels lie, and
        a warning tells.

    Returns
    -------
    Volume
        Its values and its place in the world. Several values per voxel become channels.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is not an image of real numbers in such a format, is cut short or damaged, or holds
        values that are not finite; or if slices of a series are missing, or belong to several.
    """
    array, grid, *_ = read_image(path)
    if array.ndim > grid.ndim:
        array = np.moveaxis(array, -1, 0)
    try:
        return Volume.create(array, grid.spacing, grid.origin, grid.direction)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def write_volume(volume: Volume, path: str | os.PathLike[str]) -> None:
    """Write a volume through SimpleITK; the file appears complete or not at all.

    Parameters
    ----------
    volume
        What to write, with the dtype of its array. Channels become several values per voxel.
    path
        The file; its ending says in which format: ``.nii``, ``.nii.gz``, ``.hdr``, ``.img``,
        ``.hdr.gz`` or ``.img.gz`` for NIfTI, ``.mha`` or ``.mhd`` for MetaImage, ``.nrrd`` or
        ``.nhdr`` for NRRD.

    Raises
    ------
    OSError
        If there is no such folder, or no writing in it.
    ValueError
        For another ending, or if the format cannot hold such an image, as NIfTI one whose axes are
        not at right angles, or one slice in space with channels.
    """
    check_image_name(path)
    check_image_grid(volume.grid, path, volume.channels)
    array = np.asarray(volume.array)
    if array.ndim > volume.ndim:
        array = np.moveaxis(array, 0, -1)
    write_image(array, volume.grid, path, vectors=array.ndim > volume.ndim)


class Image(NamedTuple):
    """What is in the file of an image.

    Attributes
    ----------
    values
        ``([Z,] Y, X)``, or ``([Z,] Y, X, C)`` if there are several per voxel.
    grid
        Where the voxels lie.
    intent
        What NIfTI says that they are.
    vectors
        What they are in if they are vectors, but not in millimetres and LPS, or if nobody knows;
        empty otherwise.
    """

    values: NDArray[Any]
    grid: Grid
    intent: Intent | None = None
    vectors: str = ""


def read_image(path: str | os.PathLike[str], *, vectors: bool = False) -> Image:
    """Read a 2-D or 3-D image.

    Parameters
    ----------
    path
        The file.
    vectors
        Whether there are to be displacements, as many values per voxel as dimensions: of three in
        one slice NIfTI does not say whether the image is 2-D.

    Returns
    -------
    Image
        As it is in the file.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is of a format that is not read, is not 2-D or 3-D, is cut short or damaged, is a
        NIfTI image with voxels that are not finite, or is to be displacements and is a warp of
        another program.
    """
    if Path(path).is_dir():
        return _read_series(Path(path))
    kind = _format(path)
    if kind == _NIFTI:
        with telling_of_damage(path):
            nifti = read_nifti_header(Path(path))
            if vectors:
                check_field(Path(path), nifti)
            flat = vectors and nifti.ndim == 2 and nifti.components == 3
            ndim = 3 if flat else nifti.ndim
            _check_kind(path, ndim, real=nifti.dtype.kind != "c")
            grid = nifti.grid(Path(path), ndim)
            values = read_values(Path(path), nifti, ndim)
            return Image(values, grid, nifti.intent, _unit_of_vectors(nifti.unit))
    opened = _open(path, kind)
    header, grid = opened.header, opened.grid
    values = _values(path, kind, opened)
    if header.scale is not None:
        slope, intercept = header.scale
        values = values * np.float64(slope) + np.float64(intercept)
    return Image(values, grid, vectors=header.vectors or _unit_of_vectors(header.unit))


def _values(path: str | os.PathLike[str], kind: str, opened: _Opened) -> NDArray[Any]:
    """Return what is in an image that is open, before it is scaled as its header says."""
    if opened.header.voxels is not None:
        check_voxels(path, opened.header.voxels, _voxel_bytes(opened.reader))
    with collected_output() as more:
        try:
            values = image_values(opened.reader.Execute())
        except RuntimeError as error:
            raise ValueError(f"{path}: not an image: {itk_reason(error)}") from error
    tell_of_output(path, opened.said + more)
    if kind == _DICOM:
        values = dicom_values(Path(path), _fields(opened.reader), values)
    return values


def _open_series(folder: Path) -> tuple[list[Path], list[_Opened]]:
    """Open the slices of the series of DICOM in a folder."""
    files = dicom_series(folder)
    if len(files) == 1:
        raise ValueError(f"{folder}: expected slices of a series, got one; give {files[0]}")
    for file in files:
        if _format(file) != _DICOM:
            raise ValueError(f"{file}: expected DICOM as the others in its folder")
    return files, [_open(file, _DICOM, in_series=True) for file in files]


def _read_series(folder: Path) -> Image:
    files, slices = _open_series(folder)
    grid = series_grid(folder, [opened.grid for opened in slices])
    # Each is scaled by itself: ITK would give all of them the type of the first.
    values = [_values(file, _DICOM, opened) for file, opened in zip(files, slices, strict=True)]
    if len({array.shape for array in values}) > 1:
        raise ValueError(f"{folder}: expected as many values per voxel in all slices")
    return Image(np.concatenate(values), grid)


def read_grid(path: str | os.PathLike[str]) -> Grid:
    """Read where the voxels of a 2-D or 3-D image lie, and nothing else of it.

    Parameters
    ----------
    path
        The file.

    Returns
    -------
    Grid
        That of the image.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is of a format that is not read, or is not 2-D or 3-D.
    """
    if Path(path).is_dir():
        return series_grid(Path(path), [opened.grid for opened in _open_series(Path(path))[1]])
    kind = _format(path)
    if kind == _NIFTI:
        with telling_of_damage(path):
            header = read_nifti_header(Path(path))
            _check_kind(path, header.ndim, real=header.dtype.kind != "c")
            return header.grid(Path(path))
    _, _, grid, said = _open(path, kind)
    tell_of_output(path, said)
    return grid


def _unit_of_vectors(unit: float) -> str:
    """Programs do not agree whether the unit of a header is that of vectors, too."""
    return "" if unit == 1 else "a file whose unit is another"


_NIFTI = "NiftiImageIO"
_MINC = "MINCImageIO"
_DICOM = "GDCMImageIO"


def _minc_grid(grid: Grid) -> Grid:
    """Return in LPS what ITK reads as the grid of a MINC image."""
    to_lps = minc_to_lps(grid.ndim)[:-1, :-1]
    return dataclasses.replace(grid, origin=to_lps @ grid.origin, direction=to_lps @ grid.direction)


def _format(path: str | os.PathLike[str]) -> str:
    """Return ITK's name of the format of an image, one of `IMAGE_FORMATS`."""
    sitk = import_simpleitk()

    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    check_hdf5(path)
    with collected_output():  # which is said again when it is read
        kind: str = sitk.ImageFileReader().GetImageIOFromFileName(os.fspath(path))
    if not kind and is_nifti2(Path(path)):
        return _NIFTI
    if kind not in IMAGE_FORMATS:
        known = ", ".join(name for name, _ in IMAGE_FORMATS.values())
        found = f", got {kind.removesuffix('ImageIO')}" if kind else ""
        raise ValueError(f"{path}: not an image that can be read: expected one of {known}{found}")
    return kind


def image_format_is_nifti(path: str | os.PathLike[str]) -> bool:
    """Tell whether a file is NIfTI.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is no image of a format that is read.
    """
    return _format(path) == _NIFTI


class _Opened(NamedTuple):
    """An image before its voxels are read: what ITK knows, what we see, the place, ITK's words."""

    reader: Any
    header: Header
    grid: Grid
    said: list[str]


def _open(path: str | os.PathLike[str], kind: str, *, in_series: bool = False) -> _Opened:
    sitk = import_simpleitk()

    header = read_header(path, kind)
    reader = sitk.ImageFileReader()
    with collected_output() as said:
        try:
            reader.SetFileName(os.fspath(path))
            reader.ReadImageInformation()
        except RuntimeError as error:
            raise ValueError(f"{path}: not an image: {itk_reason(error)}") from error
    kinds = (sitk.sitkComplexFloat32, sitk.sitkComplexFloat64)
    _check_kind(path, reader.GetDimension(), real=reader.GetPixelID() not in kinds)
    grid = image_grid(reader)
    if header.unplaced and grid.ndim == 3:
        warnings.warn(
            f"{path}: {header.unplaced}, so nothing tells left from right; x is taken to run to "
            "the left, y to the back and z upwards, as in ITK",
            FileWarning,
            stacklevel=2,
        )
    if kind == _MINC:
        grid = _minc_grid(grid)
    if kind == _DICOM:
        check_dicom(Path(path), _fields(reader))
        grid = dicom_grid(Path(path), _fields(reader), grid, in_series=in_series)
    if header.unit != 1:
        spacing, origin = header.unit * grid.spacing, header.unit * grid.origin
        grid = dataclasses.replace(grid, spacing=spacing, origin=origin)
    return _Opened(reader, header, grid, said)


def _fields(reader: Any) -> dict[str, str]:
    return {key: reader.GetMetaData(key).strip(" \0") for key in reader.GetMetaDataKeys()}


def _check_kind(path: str | os.PathLike[str], ndim: int, *, real: bool) -> None:
    if ndim not in (2, 3):
        raise ValueError(f"{path}: expected a 2-D or 3-D image, got {ndim}-D")
    if not real:
        raise ValueError(f"{path}: expected real numbers, got complex ones")


def _voxel_bytes(reader: Any) -> int:
    sitk = import_simpleitk()

    size: int = sitk.Image([1, 1], reader.GetPixelID()).GetSizeOfPixelComponent()
    count: int = math.prod([reader.GetNumberOfComponents(), *reader.GetSize()])
    return size * count


def image_grid(image: Any) -> Grid:
    """Return where the voxels of a SimpleITK image lie, or of what is to be read."""
    ndim = image.GetDimension()
    return Grid(
        tuple(image.GetSize()[::-1]),
        np.array(image.GetSpacing()),
        np.array(image.GetOrigin()),
        np.reshape(image.GetDirection(), (ndim, ndim)),
    )


def image_values(image: Any) -> NDArray[Any]:
    """Return the values of a SimpleITK image, ``([Z,] Y, X)`` or ``([Z,] Y, X, C)``."""
    sitk = import_simpleitk()

    values: NDArray[Any] = sitk.GetArrayFromImage(image)
    return values


def check_image_name(path: str | os.PathLike[str]) -> None:
    """See that a file can keep all of an image, for which its name is enough.

    Parameters
    ----------
    path
        Where an image is to be written.

    Raises
    ------
    ValueError
        If its ending is none of `WRITTEN_SUFFIXES`. ITK writes other formats without an error, and
        without the origin, the direction, or all slices but the first.
    """
    if not Path(path).name.endswith(WRITTEN_SUFFIXES):
        raise ValueError(f"{path}: cannot write it: expected one of {', '.join(WRITTEN_SUFFIXES)}")


def check_image_grid(grid: Grid, path: str | os.PathLike[str], channels: int = 1) -> None:
    """See that a file can keep an image of such a grid.

    Parameters
    ----------
    grid
        Where the voxels lie.
    path
        Where the image is to be written.
    channels
        Values per voxel, unless they are displacements.

    Raises
    ------
    ValueError
        If the file would be NIfTI and the axes are not at right angles: the qform cannot hold
        them, and ITK writes other axes than these. Or if it would have several values per voxel in
        one slice in space: it would come back as 2-D.
    """
    if not Path(path).name.endswith(NIFTI_SUFFIXES):
        return
    instead = f"write {' or '.join(_SHEARED_SUFFIXES)}"
    if channels > 1 and grid.ndim == 3 and grid.shape[0] == 1:
        raise ValueError(
            f"{path}: cannot write it: NIfTI with several values per voxel does not tell one slice "
            f"in space from a 2-D image; {instead}"
        )
    direction = np.asarray(grid.direction, dtype=np.float64)
    left, _, right = np.linalg.svd(direction)
    step, size = np.asarray(grid.spacing), np.array(grid.shape[::-1])
    # How far the last voxel along an axis would go, in voxels.
    apart = np.linalg.norm(direction - left @ right, axis=0) * step * (size - 1) / step.min()
    if (apart > _NOTABLE).any():
        raise ValueError(
            f"{path}: cannot write it: the axes of its grid are not at right angles, which NIfTI "
            f"does not hold for all programs; {instead}"
        )


NIFTI_SUFFIXES = WRITTEN_SUFFIXES[:6]
_SHEARED_SUFFIXES = (".nrrd", ".mha")
_NOTABLE = 0.05
"""Voxels by which a voxel may be misplaced; rounding of headers stays far below."""


def write_image(
    values: ArrayLike, grid: Grid, path: str | os.PathLike[str], *, vectors: bool = False
) -> None:
    """Write an image, compressed; the file appears complete or not at all.

    Parameters
    ----------
    values
        ``([Z,] Y, X)``, or ``([Z,] Y, X, C)`` with `vectors`.
    grid
        Where the voxels lie.
    path
        The file; its ending, one of `WRITTEN_SUFFIXES`, says in which format.
    vectors
        Whether there are several values per voxel.

    Raises
    ------
    OSError
        If there is no such folder, or no writing in it.
    ValueError
        For another ending, if a NIfTI file is to have axes that are not at right angles, or if
        SimpleITK cannot write such an image to such a file.
    """
    check_image_name(path)
    check_image_grid(grid, path)
    write_itk_image(itk_image(values, grid, vectors=vectors), path)


def write_itk_image(image: Any, path: str | os.PathLike[str]) -> None:
    """Write an image of SimpleITK as `write_image` does, which has looked at name and grid."""
    sitk = import_simpleitk()

    # ITK compresses a file of any format by itself, but slowly.
    apart = has_isal and Path(path).suffix == ".gz"
    with atomic_path(path) as beside:
        written = beside.with_suffix("") if apart else beside
        with telling_warnings(path):
            try:
                sitk.WriteImage(image, str(written), useCompression=not apart)
            except RuntimeError as error:
                reason = itk_reason(error).replace(str(written), os.fspath(path))
                raise ValueError(f"{path}: cannot write it: {reason}") from error
        if apart:
            for plain in list(beside.parent.iterdir()):
                compress(plain, plain.with_name(f"{plain.name}.gz"))
                plain.unlink()


def itk_image(values: ArrayLike, grid: Grid, *, vectors: bool = False) -> Any:
    """Return a SimpleITK image of values, as `write_image` takes them, on a grid."""
    sitk = import_simpleitk()

    image = sitk.GetImageFromArray(np.asarray(values), isVector=vectors)
    image.SetSpacing(np.asarray(grid.spacing).tolist())
    image.SetOrigin(np.asarray(grid.origin).tolist())
    image.SetDirection(np.ravel(grid.direction).tolist())
    return image


def itk_reason(error: RuntimeError) -> str:
    """Return what went wrong in an exception of SimpleITK, without where in its sources."""
    lines = str(error).strip().splitlines()
    if len(lines) > 1 and lines[-1].startswith("Reason: "):  # the last error of the system, any one
        lines.pop()
    return re.sub(r"^(sitk::|ITK )ERROR: (\w+\(0x[0-9a-f]+\): )?", "", lines[-1])
