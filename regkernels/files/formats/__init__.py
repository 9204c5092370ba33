"""What is known of each format of files: how to see that one is whole before ITK reads it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from regkernels.files.formats.gipl import find_gipl
from regkernels.files.formats.hdf5 import check_hdf5_transform
from regkernels.files.formats.insight import check_insight
from regkernels.files.formats.matlab import check_matlab
from regkernels.files.formats.meta import find_meta
from regkernels.files.formats.minc import check_minc
from regkernels.files.formats.nrrd import find_nrrd
from regkernels.files.formats.png import check_png
from regkernels.files.formats.reading import Header
from regkernels.files.formats.xfm import check_xfm

__all__ = ["IMAGE_FORMATS", "TRANSFORM_FORMATS"]


def _trust(path: Path) -> Header:
    """Leave it to ITK: it refuses every DICOM file that lacks voxels, HDF5 has been looked at."""
    return Header()


IMAGE_FORMATS: dict[str, tuple[str, Callable[[Path], Header]]] = {
    "NiftiImageIO": ("NIfTI", _trust),  # which is read without ITK
    "MetaImageIO": ("MetaImage", find_meta),
    "NrrdImageIO": ("NRRD", find_nrrd),
    "GiplImageIO": ("GIPL", find_gipl),
    "MINCImageIO": ("MINC", check_minc),
    "HDF5ImageIO": ("HDF5", _trust),
    "GDCMImageIO": ("DICOM", _trust),
    "PNGImageIO": ("PNG", check_png),
}
"""ITK's name of what reads a format, the format's own, and how to see that a file is whole."""

TRANSFORM_FORMATS: dict[str, Callable[[Path], None]] = {
    ".tfm": check_insight,
    ".txt": check_insight,
    ".mat": check_matlab,
    ".xfm": check_xfm,
    ".h5": check_hdf5_transform,
    ".hdf5": check_hdf5_transform,
}
"""How to see that a file of a transform is whole, by its ending."""
