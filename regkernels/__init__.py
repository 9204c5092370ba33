"""What `jaxreg` and `torchreg` share, and need no framework for: kernels, grids, volumes, files.

>>> from regkernels import read_volume, write_volume
>>> from regkernels.data import load_pair_paths
>>> fixed, moving = map(read_volume, load_pair_paths())  # doctest: +SKIP

Reading and writing needs SimpleITK: ``pip install 'regkernels[files]'``.
"""

try:
    from regkernels._core import __version__
except ModuleNotFoundError as error:
    if error.name != "regkernels._core":
        raise
    raise ImportError(
        f"regkernels: {__path__[0]} has no compiled kernels: it is a folder of sources, which "
        "Python prefers to what is installed when it is started beside it. Start it in another "
        "folder, and install regkernels if it is not: pip install FOLDER-OF-THE-SOURCES",
        name="regkernels",
    ) from None
from regkernels.files import (
    PointSet,
    Series,
    from_nibabel,
    from_simpleitk,
    read_grid,
    read_points,
    read_series,
    read_transform,
    read_volume,
    to_nibabel,
    to_simpleitk,
    write_affine,
    write_composite,
    write_displacement,
    write_points,
    write_series,
    write_transform,
    write_volume,
)
from regkernels.grid import Grid
from regkernels.maps import AffineMap, DisplacementField, move_points
from regkernels.volume import Volume, centre_of_mass, normalised_affine, rigid_motion

__all__ = [
    "AffineMap",
    "DisplacementField",
    "Grid",
    "PointSet",
    "Series",
    "Volume",
    "__version__",
    "centre_of_mass",
    "from_nibabel",
    "from_simpleitk",
    "move_points",
    "normalised_affine",
    "read_grid",
    "read_points",
    "read_series",
    "read_transform",
    "read_volume",
    "rigid_motion",
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
