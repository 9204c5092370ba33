"""Transforms as files that ITK, ANTs and 3D Slicer read and write.

Affine transforms are ITK transform files; displacement fields are images of vectors in
millimetres, LPS, which NIfTI marks with the intent code 1007.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from regkernels.files.atomic import atomic_path
from regkernels.files.formats.exchange import (
    is_fsl_affine,
    read_afni_affine,
    read_freesurfer_affine,
    read_fsl_affine,
)
from regkernels.files.formats.minc import minc_to_lps
from regkernels.files.images import (
    Image,
    check_image_grid,
    check_image_name,
    image_grid,
    image_values,
    itk_image,
    itk_reason,
    read_image,
    write_image,
)
from regkernels.files.integrity import check_transform
from regkernels.files.itk_warnings import collected_output, tell_of_output, telling_warnings
from regkernels.files.simpleitk import import_simpleitk
from regkernels.grid import Grid, Matrix
from regkernels.maps import AffineMap, DisplacementField, Part, as_part
from regkernels.volume import Volume

__all__ = [
    "READ_SUFFIXES",
    "TRANSFORM_SUFFIXES",
    "check_transform_name",
    "read_transform",
    "write_affine",
    "write_composite",
    "write_displacement",
    "write_transform",
]

TRANSFORM_SUFFIXES = (".tfm", ".txt", ".mat", ".h5", ".hdf5", ".xfm")
"""Endings of ITK transform files; what ends otherwise is an image of displacements."""

_AFNI_SUFFIXES = (".1d", ".afni", ".afni-array")

READ_SUFFIXES = (*TRANSFORM_SUFFIXES, ".lta", ".fsl", *_AFNI_SUFFIXES)
"""With those of affines that are read and not written."""


def read_transform(
    path: str | os.PathLike[str],
    *,
    fixed: Volume | Grid | None = None,
    moving: Volume | Grid | None = None,
) -> tuple[Part, ...]:
    """Read a transform of ITK, ANTs, 3D Slicer, FreeSurfer, FSL, AFNI or `write_transform`.

    Parameters
    ----------
    path
        An ITK transform file of linear transforms, displacement fields or both, composed in any
        way; linear ones of MINC (``.xfm``), which are converted from RAS; or an image of
        displacements in millimetres, LPS. Of the positions in millimetres, RAS, that SPM
        (``y_*.nii``) and NiftyReg write, displacements are made. FreeSurfer's ``.lta`` and what
        FSL's FLIRT writes (four rows of text, in ``.mat`` or ``.fsl``) are read by nitransforms:
        ``pip install 'regkernels[exchange]'``. AFNI's matrices (``.aff12.1D``, ``.1D`` or
        ``.afni``) are those of images along the axes of the scanner.
    fixed, moving
        The images that an affine of FSL or AFNI is between, of which nothing but the grid counts;
        for others they do not matter.

    Returns
    -------
    tuple
        `AffineMap` and `DisplacementField`, in the order in which a point goes
        through them.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is not a transform, is one of another kind (a B-spline, say), is cut short or damaged,
        cannot be inverted or holds values that are not finite; if it is an affine of FSL and
        nobody says between which images, or one of AFNI between oblique images; or if it is a warp
        field of FSL.
    ImportError
        If nitransforms is missing for one that it reads.
    """
    sitk = import_simpleitk()

    if Path(path).suffix.lower() == ".mnc":
        raise ValueError(
            f"{path}: expected displacements in NIfTI, NRRD or MetaImage, got MINC, of which ITK "
            "and MINC disagree which way they point"
        )
    if Path(path).suffix.lower() not in READ_SUFFIXES:
        return (_field_of_image(read_image(path, vectors=True), path),)
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if Path(path).suffix.lower() == ".lta":
        return (AffineMap(read_freesurfer_affine(Path(path))),)
    still, moved = (x.grid if isinstance(x, Volume) else x for x in (fixed, moving))
    if Path(path).suffix.lower() in _AFNI_SUFFIXES:
        return (AffineMap(read_afni_affine(Path(path), still, moved)),)
    if Path(path).suffix.lower() in (".mat", ".fsl") and is_fsl_affine(Path(path)):
        if still is None or moved is None:
            raise ValueError(
                f"{path}: expected the images that this affine of FSL is between, without which it "
                "tells nothing, as fixed and moving"
            )
        return (AffineMap(read_fsl_affine(Path(path), still, moved)),)
    if Path(path).suffix.lower() == ".fsl":
        raise ValueError(f"{path}: expected four rows of four numbers, as FLIRT writes them")
    check_transform(path)
    with collected_output() as said:
        try:
            transform = sitk.ReadTransform(os.fspath(path))
        except RuntimeError as error:
            raise ValueError(f"{path}: not a transform: {itk_reason(error)}") from error
    if any("more than one transform" in line for line in said):
        # ITK takes the first and nothing tells in which order the others would be meant.
        raise ValueError(
            f"{path}: expected one transform or a composite, got several side by side; write each "
            "to a file of its own"
        )
    tell_of_output(path, said)
    parts = _parts(transform, path)
    if _is_xfm(path):
        return tuple(AffineMap(_between_xfm_and_lps(np.asarray(part))) for part in parts)
    return parts


def check_transform_name(part: Part, path: str | os.PathLike[str]) -> None:
    """See that an affine or a displacement field can be in a file of such a name.

    Parameters
    ----------
    part
        What is to be written.
    path
        Where to.

    Raises
    ------
    ValueError
        If its ending is one of another kind of file, or if that cannot hold the field's grid.
    """
    of_transform = Path(path).suffix.lower() in TRANSFORM_SUFFIXES
    if isinstance(part, AffineMap):
        if not of_transform:
            raise ValueError(f"{path}: expected an ending of {', '.join(TRANSFORM_SUFFIXES)}")
        if _is_xfm(path) and part.ndim != 3:
            raise ValueError(f"{path}: expected a 3-D transform for .xfm, got {part.ndim}-D")
        return
    if of_transform:
        raise ValueError(f"{path}: expected the ending of an image, such as .nii.gz")
    check_image_name(path)
    check_image_grid(part.grid, path)


def write_transform(part: Part | ArrayLike, path: str | os.PathLike[str]) -> None:
    """Write an affine or a displacement field; see `write_affine` and `write_displacement`.

    Parameters
    ----------
    part
        What to write.
    path
        The file; its ending says in which format.

    Raises
    ------
    OSError
        If there is no such folder, or no writing in it.
    ValueError
        If such a part cannot be in such a file.
    """
    part = as_part(part)
    if isinstance(part, DisplacementField):
        write_displacement(part.vectors, part.grid, path)
    else:
        write_affine(part.matrix, path)


def write_composite(parts: Sequence[Part | ArrayLike], path: str | os.PathLike[str]) -> None:
    """Write a chain as one composite transform, which ITK, ANTs and 3D Slicer read as such.

    Parameters
    ----------
    parts
        Affine maps (or their matrices) and displacement fields, in the order in which a point goes
        through them.
    path
        The file: ``.h5`` or ``.hdf5``, without displacements ``.tfm`` or ``.txt``, too. Vectors are
        stored in float64, as ITK computes with them, and not compressed.

    Raises
    ------
    OSError
        If there is no such folder, or no writing in it.
    ValueError
        For another ending, no part, or parts of different dimensions.
    TypeError
        If a part is neither an affine map, a displacement field nor a matrix.
    """
    sitk = import_simpleitk()

    chain = [as_part(part) for part in parts]
    deforms = any(isinstance(part, DisplacementField) for part in chain)
    endings = _COMPOSITE_SUFFIXES[: 2 if deforms else 4]
    if Path(path).suffix.lower() not in endings:
        raise ValueError(f"{path}: expected an ending of {', '.join(endings)}")
    dimensions = sorted({part.ndim for part in chain})
    if len(dimensions) != 1:
        raise ValueError(f"parts: expected some of one dimension, got {dimensions}")
    # ITK sends a point through the transform that was added last first.
    _write(sitk.CompositeTransform([_itk_transform(part) for part in reversed(chain)]), path)


_COMPOSITE_SUFFIXES = (".h5", ".hdf5", ".tfm", ".txt")


def _itk_transform(part: Part) -> Any:
    sitk = import_simpleitk()

    if isinstance(part, DisplacementField):
        vectors = np.asarray(part.vectors, dtype=np.float64)
        return sitk.DisplacementFieldTransform(itk_image(vectors, part.grid, vectors=True))
    matrix = np.asarray(part.matrix, dtype=np.float64)
    transform = sitk.AffineTransform(part.ndim)
    transform.SetMatrix(matrix[:-1, :-1].ravel().tolist())
    transform.SetTranslation(matrix[:-1, -1].tolist())
    return transform


_WRITING = threading.Lock()
"""Held by whoever writes a transform, since the HDF5 of SimpleITK is for one thread at a time."""


def _write(transform: Any, path: str | os.PathLike[str]) -> None:
    sitk = import_simpleitk()

    with _WRITING, atomic_path(path) as beside, telling_warnings(path):
        try:
            sitk.WriteTransform(transform, str(beside))
        except RuntimeError as error:
            raise ValueError(f"{path}: cannot write it: {itk_reason(error)}") from error


def write_affine(matrix: ArrayLike, path: str | os.PathLike[str]) -> None:
    """Write an affine as an ITK transform file, about the centre 0.

    Parameters
    ----------
    matrix
        ``(D + 1, D + 1)``, fixed -> moving, millimetres, LPS.
    path
        Where to: ``.tfm`` and ``.txt`` are text, ``.mat`` is what ANTs writes, ``.h5`` and
        ``.hdf5`` are HDF5; ``.xfm`` is that of MINC, in RAS and 3-D. The file appears complete or
        not at all.

    Raises
    ------
    OSError
        If there is no such folder, or no writing in it.
    ValueError
        For another ending, or if such a file cannot hold the matrix.
    """
    matrix = np.asarray(matrix, dtype=np.float64)
    check_transform_name(AffineMap(matrix), path)
    if _is_xfm(path):
        matrix = _between_xfm_and_lps(matrix)
    _write(_itk_transform(AffineMap(matrix)), path)


def write_displacement(
    field: ArrayLike, reference: Volume | Grid, path: str | os.PathLike[str]
) -> None:
    """Write a displacement field as an ITK displacement image.

    Parameters
    ----------
    field
        ``([Z,] Y, X, D)`` in millimetres, LPS.
    reference
        Gives the grid.
    path
        Where to; the suffix chooses the format, one that `write_volume` knows. The file appears
        complete or not at all.

    Raises
    ------
    OSError
        If there is no such folder, or no writing in it.
    ValueError
        For another ending.
    """
    grid = reference.grid if isinstance(reference, Volume) else reference
    vectors = np.asarray(field, dtype=np.float32)
    check_transform_name(DisplacementField(grid, vectors), path)
    write_image(vectors, grid, path, vectors=True)


def _is_xfm(path: str | os.PathLike[str]) -> bool:
    return Path(path).suffix.lower() == ".xfm"


def _between_xfm_and_lps(matrix: Matrix) -> Matrix:
    """Convert a matrix as ITK has it in such a file to LPS, or back."""
    to_lps = minc_to_lps(len(matrix) - 1)
    converted: Matrix = to_lps @ matrix @ to_lps
    return converted


def _field_of_image(image: Image, path: str | os.PathLike[str]) -> DisplacementField:
    """Make displacements in LPS of vectors, by what NIfTI says that they are.

    ITK and ANTs leave the intent's name empty and keep LPS. SPM's deformations and NiftyReg's are
    positions in millimetres, RAS; NiftyReg tells by the first parameter what else they may be.
    """
    values, grid, intent, frame = image
    if frame:
        raise ValueError(
            f"{path}: expected displacements in millimetres, LPS, got vectors in {frame}"
        )
    if intent is None or intent.code not in (_DISPLACEMENT, _VECTOR):
        return _field(values, grid, path)
    name = intent.name.casefold()
    positions = name == "mapping" or (name == "nreg_trans" and intent.parameter == 0)
    displaced = intent.code == _DISPLACEMENT or (name == "nreg_trans" and intent.parameter == 1)
    if name == "nreg_trans" and not (positions or displaced):
        raise ValueError(
            f"{path}: expected displacements or positions, got another transform of NiftyReg (a "
            "spline or a velocity field); make a deformation field of it by reg_transform -def"
        )
    if not (positions or displaced) or values.shape[grid.ndim :] != (grid.ndim,):
        return _field(values, grid, path)
    vectors = values.astype(np.float64) * np.array([-1.0, -1.0, 1.0])[: grid.ndim]
    if positions:
        matrix = grid.voxel_to_physical()
        index = np.moveaxis(np.indices(grid.shape), 0, -1)[..., ::-1]
        vectors -= index @ matrix[:-1, :-1].T + matrix[:-1, -1]
    return _field(vectors, grid, path)


_DISPLACEMENT, _VECTOR = 1006, 1007
"""Intents of NIfTI: displacements in its own coordinates, RAS, and vectors of any kind."""


def _field(values: NDArray[Any], grid: Grid, path: str | os.PathLike[str]) -> DisplacementField:
    components = values.shape[-1] if values.ndim > grid.ndim else 1
    if components != grid.ndim:
        raise ValueError(
            f"{path}: expected displacements, {grid.ndim} values per voxel, got {components}"
        )
    vectors = values.astype(np.float32)
    if not np.isfinite(vectors).all():
        raise ValueError(f"{path}: expected finite displacements, got NaN or infinity")
    return DisplacementField(grid, vectors)


def _parts(transform: Any, path: str | os.PathLike[str]) -> tuple[Part, ...]:
    sitk = import_simpleitk()

    transform = transform.Downcast()
    # What SimpleITK has no class for, such as older ANTs' MatrixOffsetTransformBase, comes as a
    # composite whose only part is itself.
    composite = isinstance(transform, sitk.CompositeTransform)
    if composite and not (transform.IsLinear() and transform.GetNumberOfTransforms() == 1):
        # ITK sends a point through the transform that was added last first.
        numbers = reversed(range(transform.GetNumberOfTransforms()))
        return tuple(
            part for number in numbers for part in _parts(transform.GetNthTransform(number), path)
        )
    if isinstance(transform, sitk.DisplacementFieldTransform):
        field = transform.GetDisplacementField()
        return (_field(image_values(field), image_grid(field), path),)
    if not transform.IsLinear():
        raise ValueError(
            f"{path}: expected linear transforms and displacement fields, got a "
            f"{transform.GetName()}"
        )
    return (_affine(transform, path),)


def _affine(transform: Any, path: str | os.PathLike[str]) -> AffineMap:
    """Read a linear transform of any class off the points that it maps."""
    ndim = transform.GetDimension()
    offset = np.array(transform.TransformPoint([0.0] * ndim))
    columns = [transform.TransformVector(unit, [0.0] * ndim) for unit in np.eye(ndim).tolist()]
    matrix = np.eye(ndim + 1)
    matrix[:-1] = np.column_stack([*columns, offset])
    if not np.isfinite(matrix).all() or abs(np.linalg.det(matrix)) < 1e-9:
        raise ValueError(f"{path}: expected a transform with an inverse, got {matrix.tolist()}")
    return AffineMap(matrix)
