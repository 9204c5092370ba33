"""Affines of FreeSurfer and FSL, through nitransforms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from regkernels.grid import Grid, Matrix

__all__ = ["is_fsl_affine", "read_freesurfer_affine", "read_fsl_affine"]

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
