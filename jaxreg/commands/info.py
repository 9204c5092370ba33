"""``jaxreg info``: what a file holds, or what is installed."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.typing import ArrayLike, NDArray

from jaxreg.commands.compilation import describe_kept
from jaxreg.commands.inputs import naming
from regkernels import AffineMap, DisplacementField, Grid, Volume, read_transform, read_volume
from regkernels.files.transforms import READ_SUFFIXES
from regkernels.info import describe
from regkernels.maps import Part

__all__ = ["info"]


def info(
    file: Annotated[Path | None, typer.Argument(metavar="FILE", help="Image or transform.")] = None,
) -> list[dict[str, str]]:
    """Describe an image or a transform; without FILE, the installation.

    Examples
    --------
    Size, place and values of an image:
    jaxreg info fixed.nii.gz

    What a transform does:
    jaxreg info out/affine.tfm

    Versions and devices, for a bug report:
    jaxreg info --json
    """
    found = [_of_installation()] if file is None else _of_file(file)
    for facts in found:
        _print(facts)
    return found


def _of_installation() -> dict[str, str]:
    return {**describe(), "compiled programs": describe_kept()}


def _of_file(file: Path) -> list[dict[str, str]]:
    with naming("FILE"):
        if file.suffix.lower() not in READ_SUFFIXES:
            return [_of_volume(read_volume(file))]
        return [
            {"transform": f"{number}, as a point goes through them", **_of_part(part)}
            for number, part in enumerate(read_transform(file), start=1)
        ]


def _print(facts: dict[str, str]) -> None:
    width = max(len(name) for name in facts)
    for name, value in facts.items():
        for line in value.splitlines():
            print(f"{name:<{width}}  {line}")
            name = ""


@functools.singledispatch
def _of_part(part: Part) -> dict[str, str]:
    raise NotImplementedError


@_of_part.register
def _(part: DisplacementField) -> dict[str, str]:
    return {"kind": "displacement field", **_of_grid(part.grid), **_of_vectors(part.vectors)}


@_of_part.register
def _(part: AffineMap) -> dict[str, str]:
    linear = part.matrix[:-1, :-1]
    return {
        "kind": "affine",
        "dimensions": str(len(linear)),
        "matrix": "\n".join(map(_numbers, linear)),
        "translation (mm)": _numbers(part.matrix[:-1, -1]),
        "determinant": f"{np.linalg.det(linear):.6g}",
    }


def _of_volume(volume: Volume) -> dict[str, str]:
    values = np.asarray(volume.array)
    facts = {
        "kind": "image",
        **_of_grid(volume.grid),
        "channels": str(volume.channels),
        "voxel type": str(values.dtype),
        "values": f"{values.min():g} to {values.max():g}, mean {values.mean(dtype=np.float64):g}",
    }
    if volume.channels == volume.ndim:
        facts["kind"] = "image, or displacement field"
        facts |= _of_vectors(np.moveaxis(values, 0, -1))
    return facts


def _of_grid(grid: Grid) -> dict[str, str]:
    last = grid.voxel_to_physical() @ [*(np.array(grid.shape[::-1]) - 1), 1]
    return {
        "dimensions": str(grid.ndim),
        "size (x first)": " x ".join(map(str, grid.shape[::-1])),
        "spacing (mm)": _numbers(grid.spacing),
        "first voxel (mm, LPS)": _numbers(grid.origin),
        "last voxel (mm, LPS)": _numbers(last[:-1]),
        "direction": "\n".join(map(_numbers, np.asarray(grid.direction))),
    }


def _of_vectors(vectors: ArrayLike) -> dict[str, str]:
    lengths: NDArray[np.float64] = np.linalg.norm(np.asarray(vectors, np.float64), axis=-1)
    return {"length of vectors": f"mean {lengths.mean():.4g}, at most {lengths.max():.4g}"}


def _numbers(values: ArrayLike) -> str:
    return "  ".join(f"{value:.6g}" for value in np.asarray(values))
