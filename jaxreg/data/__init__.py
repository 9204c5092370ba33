"""Two real brains for examples, tests and the demonstration.

The ICBM152 2009a T1 template (fixed) and the Colin27 single-subject T1 (moving): brain only, 2 mm
isotropic, 8 bit NIfTI, 0.4 MB together. ``NOTICE.txt`` beside them holds the notices of the
Montreal Neurological Institute, which have to travel with every copy.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import NamedTuple

__all__ = ["BrainPair", "copyright_notice", "load_pair_paths"]


class BrainPair(NamedTuple):
    """Paths of the shipped volumes.

    Attributes
    ----------
    fixed
        ICBM152 2009a T1, 83 x 101 x 88 voxels.
    moving
        Colin27 T1, 82 x 100 x 86 voxels.
    """

    fixed: Path
    moving: Path


def load_pair_paths() -> BrainPair:
    """Return the paths of the shipped pair of brains.

    Returns
    -------
    BrainPair
        Paths that any NIfTI reader opens.

    Raises
    ------
    FileNotFoundError
        If the installation lacks the files.
    """
    folder = Path(str(resources.files(__name__)))
    pair = BrainPair(folder / "icbm152_t1_2mm.nii.gz", folder / "colin27_t1_2mm.nii.gz")
    for path in pair:
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: the installation is incomplete")
    return pair


def copyright_notice() -> str:
    """Return the copyright notices of the shipped volumes."""
    return (resources.files(__name__) / "NOTICE.txt").read_text(encoding="utf-8")
