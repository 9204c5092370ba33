"""Reading and writing of images and transforms, as ITK, ANTs and 3D Slicer read and write them.

Needs SimpleITK: ``pip install 'regkernels[files]'``.
"""

from regkernels.files.images import read_grid, read_volume, write_volume
from regkernels.files.transforms import (
    read_transform,
    write_affine,
    write_displacement,
    write_transform,
)

__all__ = [
    "read_grid",
    "read_transform",
    "read_volume",
    "write_affine",
    "write_displacement",
    "write_transform",
    "write_volume",
]
