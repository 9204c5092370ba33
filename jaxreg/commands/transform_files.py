"""The files of a transform that a command has found."""

from __future__ import annotations

from pathlib import Path

from jaxreg.registration import Transform
from regkernels import write_affine, write_displacement

__all__ = ["AFFINE", "INVERSE_WARP", "WARP", "chains", "write_transform_files"]

AFFINE = "affine.tfm"
WARP = "warp.nii.gz"
INVERSE_WARP = "inverse_warp.nii.gz"


def write_transform_files(transform: Transform, folder: Path) -> None:
    """Write the affine and, if there is one, the deformation and its inverse into a folder."""
    write_affine(transform.matrix, folder / AFFINE)
    if transform.displacement is not None:
        write_displacement(transform.displacement_field(), transform.grid, folder / WARP)
        inverse = transform.inverse_displacement_field()
        write_displacement(inverse, transform.grid, folder / INVERSE_WARP)


def chains(transform: Transform) -> tuple[list[str], list[str]]:
    """Return the files as `jaxreg apply -t` takes them: of the transform, and of its inverse."""
    if transform.displacement is None:
        return [AFFINE], [f"{AFFINE}:inverse"]
    return [WARP, AFFINE], [f"{AFFINE}:inverse", INVERSE_WARP]
