"""Reading and writing of images, transforms and points, as ITK, ANTs and 3D Slicer have them.

Needs SimpleITK: ``pip install 'regkernels[files]'``.
"""

from regkernels.files.conversions import (
    from_nibabel,
    from_simpleitk,
    to_nibabel,
    to_simpleitk,
)
from regkernels.files.images import read_grid, read_volume, write_volume
from regkernels.files.points import PointSet, read_points, write_points
from regkernels.files.series import Series, read_series, write_series
from regkernels.files.transforms import (
    read_transform,
    write_affine,
    write_composite,
    write_displacement,
    write_transform,
)

__all__ = [
    "PointSet",
    "Series",
    "from_nibabel",
    "from_simpleitk",
    "read_grid",
    "read_points",
    "read_series",
    "read_transform",
    "read_volume",
    "to_nibabel",
    "to_simpleitk",
    "write_affine",
    "write_composite",
    "write_displacement",
    "write_points",
    "write_series",
    "write_transform",
    "write_volume",
]
