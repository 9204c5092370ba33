"""``jaxreg apply-points``: points through transforms."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import typer

from jaxreg.commands import devices
from jaxreg.commands.compilation import NoCache, keep_compiled
from jaxreg.commands.devices import Device
from jaxreg.commands.doubts import listed
from jaxreg.commands.inputs import naming, read_chain, refuse_overwriting
from jaxreg_cli.telling import warn, warnings_told
from regkernels import DisplacementField, move_points, read_points, write_points
from regkernels.files.points import check_points_name

__all__ = ["apply_points"]


def apply_points(
    points: Annotated[
        Path,
        typer.Argument(
            metavar="POINTS",
            help="Points in millimetres: a table (.csv, .tsv) with columns x,y,z or l,p,s (LPS) or "
            "r,a,s (RAS), without a header x,y,z first; or markups of 3D Slicer (.mrk.json, "
            ".fcsv).",
        ),
    ],
    transform: Annotated[
        list[str],
        typer.Option(
            "--transform",
            "-t",
            metavar="FILE[:inverse]",
            help="Affine, displacement field or composite. Give several in the order in which a "
            "point goes through them.",
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="Where to write them, with the same ending and all else in it."
        ),
    ],
    device: Annotated[
        Device, typer.Option(help="Where inverses are computed. auto: a GPU if JAX sees one.")
    ] = Device.AUTO,
    no_cache: NoCache = False,
) -> dict[str, Any]:
    r"""Send points through any number of transforms.

    Points go the other way than images: the transforms that bring the moving image to the fixed
    grid take points of the fixed image to where they are in the moving one.

    Beyond its grid a displacement field moves nothing; a warning names the points that are there.

    Examples
    --------
    After jaxreg register fixed.nii.gz moving.nii.gz -o out, from the fixed image to the moving one:
    jaxreg apply-points fixed.csv -t out/warp.nii.gz -t out/affine.tfm -o in_moving.csv

    From the moving image to the fixed one:
    jaxreg apply-points moving.csv -t out/affine.tfm:inverse -t out/inverse_warp.nii.gz \
      -o in_fixed.csv

    Markups of 3D Slicer:
    jaxreg apply-points fixed.mrk.json -t out/affine.tfm -o in_moving.mrk.json
    """
    refuse_overwriting([output], [("POINTS", points), *(("--transform", t) for t in transform)])
    keep_compiled(None, no_cache)
    with jax.default_device(devices.find(device)):
        chains, ndim = [], None
        for text in transform:
            chain = read_chain("--transform", [text], ndim=ndim)
            ndim = ndim or chain[0].ndim
            chains.append((text, chain))
    with naming("POINTS"):
        given = read_points(points, ndim)
    with naming("--output"):
        check_points_name(given, output)
    moved = given.positions
    beyond: dict[str, list[str]] = {}
    for text, chain in chains:
        covered = np.ones(len(moved), np.bool_)
        for part in chain:
            if isinstance(part, DisplacementField):
                covered &= part.covers(moved)
            moved = move_points(moved, [part])
        names = [name for name, inside in zip(given.names, covered, strict=True) if not inside]
        if names:
            beyond[text] = names
    with naming("--output"):
        write_points(given.with_positions(moved), output)
    for text, names in beyond.items():
        warn(f"{text} moves nothing beyond its grid: {listed('point', names)}")
    return {
        "inputs": {"POINTS": str(points), "--transform": transform},
        "points": len(moved),
        "beyond the grid": beyond,
        "warnings": warnings_told(),
        "written": [str(output)],
    }
