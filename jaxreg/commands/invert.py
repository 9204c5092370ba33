"""``jaxreg invert``: a transform file the other way round."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import jax
import typer

from jaxreg.commands import devices
from jaxreg.commands.compilation import NoCache, keep_compiled
from jaxreg.commands.devices import Device
from jaxreg.commands.inputs import inverted, naming, refuse_overwriting
from jaxreg_cli.telling import warnings_told
from regkernels import read_transform, write_transform
from regkernels.files.transforms import check_transform_name
from regkernels.maps import affine_product

__all__ = ["invert"]


def invert(
    transform: Annotated[
        Path,
        typer.Argument(
            metavar="TRANSFORM",
            help="File of an affine (.tfm, .mat, ...) or of a displacement field (.nii.gz, ...).",
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="Where to write its inverse, with an ending of the same kind."
        ),
    ],
    device: Annotated[Device, typer.Option(help="auto: a GPU if JAX sees one.")] = Device.AUTO,
    no_cache: NoCache = False,
) -> dict[str, Any]:
    """Invert an affine, or a displacement field on its own grid.

    Where a field folds, or sends points beyond its grid, its inverse may be inexact; a warning
    tells for how many voxels.

    Examples
    --------
    An affine:
    jaxreg invert affine.tfm -o inverse.tfm

    A displacement field, on the CPU:
    jaxreg invert warp.nii.gz -o inverse_warp.nii.gz --device cpu
    """
    refuse_overwriting([output], [("TRANSFORM", transform)])
    with naming("TRANSFORM"):
        parts = read_transform(transform)
        affine = affine_product(parts)
        if affine is not None:
            parts = (affine,)
        if len(parts) > 1:
            raise ValueError(
                f"{transform}: expected affines or one displacement field, got {len(parts)} "
                "transforms; `jaxreg apply -t FILE:inverse` inverts them on the fly"
            )
    with naming("--output"):
        check_transform_name(parts[0], output)
    keep_compiled(None, no_cache)
    with jax.default_device(devices.find(device)):
        (inverse,), (residual,) = inverted(parts, str(transform))
    with naming("--output"):
        write_transform(inverse, output)
    return {
        "inputs": {"TRANSFORM": str(transform)},
        "inverse residual (voxels)": residual._asdict(),
        "warnings": warnings_told(),
        "written": [str(output)],
    }
