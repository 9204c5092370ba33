"""Affines of AFNI, and of FreeSurfer and FSL, through nitransforms."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from regkernels.files.formats.reading import FileWarning
from regkernels.grid import Grid, Matrix

__all__ = ["is_fsl_affine", "read_afni_affine", "read_freesurfer_affine", "read_fsl_affine"]

_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
"""From RAS to LPS, or back."""


def is_fsl_affine(path: Path) -> bool:
    """Tell whether a file holds what FLIRT writes, four rows of four numbers as text."""
    with path.open("rb") as file:
        start = file.read(4096)
    try:
        rows = [
            [float(word) for word in line.split()] for line in start.decode("ascii").split("\n")
        ]
    except ValueError:
        return False
    return [len(row) for row in rows if row] == [4] * 4


def read_afni_affine(path: Path, fixed: Grid | None, moving: Grid | None) -> Matrix:
    """Read an affine of AFNI, of a base to a source, which is in LPS as it is.

    Parameters
    ----------
    path
        A row of 12 numbers, as ``-1Dmatrix_save`` of 3dAllineate and 3dvolreg writes it, or three
        rows of four, as cat_matvec does.
    fixed, moving
        Grids of the images that it is between, if they are known. AFNI leaves out how far one is
        turned from the axes of the scanner, which cannot be told from the matrix.

    Returns
    -------
    float64[4, 4]
        From the fixed to the moving space, LPS.

    Raises
    ------
    ValueError
        If it is none, if there are several, or if one of the images is turned or not in 3-D.
    """
    for name, grid in (("fixed", fixed), ("moving", moving)):
        if grid is not None and grid.ndim != 3:
            raise ValueError(
                f"{name}: expected 3 dimensions for an affine of AFNI, got {grid.ndim}"
            )
        if grid is not None and _is_oblique(grid):
            raise ValueError(
                f"{path}: expected images along the axes of the scanner for an affine of AFNI, "
                f"which has other places for an oblique one, and the {name} image is oblique; "
                "resample it by 3dWarp -deoblique and align again"
            )
    numbers = _afni_numbers(path)
    matrix = np.vstack([numbers.reshape(3, 4), [0, 0, 0, 1]])
    if not np.isfinite(matrix).all() or abs(np.linalg.det(matrix)) < 1e-9:
        raise ValueError(f"{path}: expected a transform with an inverse, got {matrix.tolist()}")
    if fixed is None or moving is None:
        warnings.warn(
            f"{path}: this affine of AFNI is taken to be between images along the axes of the "
            "scanner; for oblique ones AFNI has other places",
            FileWarning,
            stacklevel=2,
        )
    return matrix


def _afni_numbers(path: Path) -> Matrix:
    """Return the numbers of the one matrix in a file of AFNI's."""
    try:
        lines = [line.strip() for line in path.read_text("ascii").splitlines()]
        rows = [
            [float(word) for word in line.split()]
            for line in lines
            if line and not line.startswith("#")
        ]
    except ValueError as error:
        raise ValueError(f"{path}: expected a matrix of AFNI as text: {error}") from error
    said = " ".join(line for line in lines if line.startswith("#")).casefold()
    if "parameters" in said or "shift" in said or path.name.casefold().endswith(".param.1d"):
        raise ValueError(
            f"{path}: expected a matrix of AFNI, got parameters; 3dAllineate writes it with "
            "-1Dmatrix_save, and 1dApar2mat makes it of them"
        )
    # A row of twelve may be anything, unless the name or the first line tells.
    named = path.name.casefold().endswith(_ONE_LINE) or "dicom-to-dicom" in said
    sizes = [len(row) for row in rows]
    if named and len(rows) > 1 and set(sizes) == {12}:
        raise ValueError(
            f"{path}: expected one affine, got {len(rows)}, as of a series; write the row of one "
            "volume to a file of its own, whose name ends in .aff12.1D"
        )
    if sizes != [4, 4, 4] and not (named and sizes == [12]):
        raise ValueError(
            f"{path}: expected a matrix of AFNI, three rows of four numbers, or a row of twelve in "
            f"a file whose name ends in .aff12.1D, got rows of {sizes[:4]}"
        )
    return np.array(rows, np.float64)


_ONE_LINE = (".aff12.1d", ".afni", ".afni-array")
"""Endings of names by which AFNI and nitransforms tell that a row of twelve is a matrix."""


def _is_oblique(grid: Grid) -> bool:
    """Tell whether AFNI has other places for voxels: it takes the nearest axes for their own."""
    upright = np.rint(np.asarray(grid.direction, np.float64))
    if round(abs(np.linalg.det(upright))) != 1:  # turned by half a right angle, or sheared as much
        return True
    return grid.voxels_apart(dataclasses.replace(grid, direction=upright)) > _NOTABLE


_NOTABLE = 0.05
"""Voxels by which a voxel may be misplaced; rounding of headers stays far below."""


def read_freesurfer_affine(path: Path) -> Matrix:
    """Read a FreeSurfer ``.lta`` of one affine.

    Returns
    -------
    float64[4, 4]
        From the space of its destination to that of its source, LPS: it brings the source to the
        destination.

    Raises
    ------
    ValueError
        If it is none.
    """
    loaded = _load(path, "fs")
    if loaded.shape != (4, 4):
        raise ValueError(f"{path}: expected one affine, got {len(loaded)}")
    return _to_lps(loaded)


def read_fsl_affine(path: Path, fixed: Grid, moving: Grid) -> Matrix:
    """Read an affine of FSL's FLIRT, which brings the moving image to the fixed one.

    Parameters
    ----------
    path
        The file.
    fixed, moving
        Grids of the images, in whose scaled voxel coordinates FSL has the matrix.

    Returns
    -------
    float64[4, 4]
        From the fixed to the moving space, LPS.

    Raises
    ------
    ValueError
        If it is none, or if the images are not in 3-D.
    """
    for name, grid in (("fixed", fixed), ("moving", moving)):
        if grid.ndim != 3:
            raise ValueError(f"{name}: expected 3 dimensions for an affine of FSL, got {grid.ndim}")
    return _to_lps(_load(path, "fsl", reference=_image(fixed), moving=_image(moving)))


def _to_lps(matrix: Matrix) -> Matrix:
    converted: Matrix = _RAS @ matrix @ _RAS
    return converted


def _image(grid: Grid) -> Any:
    """Return an image of nibabel's that takes no memory."""
    import nibabel

    nothing = np.broadcast_to(np.uint8(0), grid.shape[::-1])
    return nibabel.Nifti1Image(nothing, _RAS @ grid.voxel_to_physical())


def _load(path: Path, kind: str, **images: Any) -> Matrix:
    try:
        from nitransforms.linear import load
    except ImportError as error:
        raise ImportError(
            f"{path}: affines of FreeSurfer and FSL need nitransforms: pip install "
            "'regkernels[exchange]'"
        ) from error
    try:
        matrix = np.asarray(load(str(path), fmt=kind, **images).matrix, np.float64)
    except Exception as error:  # of any kind, depending on what is wrong with the text
        raise ValueError(f"{path}: not an affine that nitransforms reads: {error}") from error
    if not np.isfinite(matrix).all() or (abs(np.linalg.det(matrix)) < 1e-9).any():
        raise ValueError(f"{path}: expected a transform with an inverse, got {matrix.tolist()}")
    return matrix
