"""Real volumes for examples, tests and the demonstration, all at 2 mm and 8 bit.

Two brains of one contrast: the ICBM152 2009a T1 template (fixed) and the Colin27 single-subject T1
(moving), brain only. And two contrasts: Colin27's whole head (fixed) and a CT template of the brain
(moving), in a frame of its own, with a transform that aligns them. 1.0 MB together.
``NOTICE.txt`` beside them holds the notices of their owners, which have to travel with every copy.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import NamedTuple

__all__ = [
    "BrainPair",
    "MultimodalPair",
    "copyright_notice",
    "load_multimodal_paths",
    "load_pair_paths",
]


class BrainPair(NamedTuple):
    """Paths of the shipped volumes of one contrast.

    Attributes
    ----------
    fixed
        ICBM152 2009a T1, 83 x 101 x 88 voxels.
    moving
        Colin27 T1, 82 x 100 x 86 voxels.
    """

    fixed: Path
    moving: Path


class MultimodalPair(NamedTuple):
    """Paths of the shipped volumes of two contrasts, and of their alignment.

    Attributes
    ----------
    fixed
        Colin27 T1, the whole head, 91 x 108 x 89 voxels.
    moving
        CT of a brain, 75 x 90 x 78 voxels. Its values are twice the Hounsfield units, from 0 to
        100 HU; outside of the brain they are 0. Its frame is another one: the origins are more than
        a metre apart.
    reference
        ITK transform file, affine, fixed -> moving. It was found by SimpleITK inside of Colin27's
        brain, away from its surface, by ``scripts/make_data.py``. Found from other starts or
        further away from the surface it differs by 0.6 to 0.9 mm.
    """

    fixed: Path
    moving: Path
    reference: Path


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
    return BrainPair(_path("icbm152_t1_2mm.nii.gz"), _path("colin27_t1_2mm.nii.gz"))


def load_multimodal_paths() -> MultimodalPair:
    """Return the paths of the shipped MR and CT, and of a transform that aligns them.

    Returns
    -------
    MultimodalPair
        Paths for a NIfTI reader, and one for `regkernels.read_transform`.

    Raises
    ------
    FileNotFoundError
        If the installation lacks the files.
    """
    return MultimodalPair(
        _path("colin27_head_t1_2mm.nii.gz"),
        _path("ct_brain_2mm.nii.gz"),
        _path("colin27_head_to_ct.tfm"),
    )


def copyright_notice() -> str:
    """Return the copyright notices of the shipped volumes."""
    return (resources.files(__name__) / "NOTICE.txt").read_text(encoding="utf-8")


def _path(name: str) -> Path:
    path = Path(str(resources.files(__name__))) / name
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: the installation is incomplete")
    return path
