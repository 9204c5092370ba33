"""MINC images, and which way the axes of MINC run."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import numpy as np

from regkernels.files.formats.hdf5 import is_hdf5
from regkernels.files.formats.reading import Header
from regkernels.files.simpleitk import import_simpleitk
from regkernels.grid import Matrix

__all__ = ["check_minc", "minc_to_lps"]


def check_minc(path: Path) -> Header:
    """Look at a MINC image; whether HDF5 is whole has been seen before."""
    if not is_hdf5(path):
        raise ValueError(f"{path}: not an image: expected MINC 2, which is HDF5")
    return Header()


@functools.cache
def minc_to_lps(ndim: int) -> Matrix:
    """Return the matrix from what ITK takes for LPS in files of MINC to LPS; it is its own inverse.

    Parameters
    ----------
    ndim
        Number of spatial dimensions.

    Returns
    -------
    ndarray
        ``(D + 1, D + 1)``.

    Notes
    -----
    In MINC x runs from left to right and y from back to front ("MINC 2.0 Users Guide", "Coordinate
    systems"). ITK keeps the numbers as they are unless it was built to turn these two axes.
    """
    sitk = import_simpleitk()

    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder, "probe.xfm")
        rows = "1 0 0 1 0 1 0 0 0 0 1 0"
        probe.write_text(
            f"MNI Transform File\nTransform_Type = Linear;\nLinear_Transform = {rows};\n"
        )
        turned = sitk.ReadTransform(str(probe)).TransformPoint((0.0, 0.0, 0.0))[0] < 0
    matrix = np.eye(ndim + 1)
    if not turned:
        matrix[[0, 1], [0, 1]] = -1
    matrix.flags.writeable = False
    return matrix
