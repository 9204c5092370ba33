"""``jaxreg apply``: an image through transforms."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import typer

from jaxreg.commands import devices
from jaxreg.commands.compilation import NoCache, keep_compiled
from jaxreg.commands.devices import Device
from jaxreg.commands.inputs import (
    format_values,
    naming,
    parse_outside,
    read_chain,
    read_image,
    refuse_overwriting,
)
from jaxreg.registration import outside_values, resample
from jaxreg.registration.transforms import resampling
from jaxreg_cli.telling import warnings_told
from regkernels import write_volume
from regkernels.files.images import check_image_grid, check_image_name, read_grid

__all__ = ["apply"]


class Interpolation(enum.StrEnum):
    """How to read between voxels."""

    LINEAR = "linear"
    NEAREST = "nearest"
    CUBIC = "cubic"
    B_SPLINE = "b-spline"


def apply(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="What to resample, 2-D or 3-D.")],
    reference: Annotated[
        Path, typer.Option("--reference", "-r", help="Image whose grid the result gets.")
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="Where to write the result: NIfTI, MetaImage or NRRD, by its ending.",
        ),
    ],
    transform: Annotated[
        list[str] | None,
        typer.Option(
            "--transform",
            "-t",
            metavar="FILE[:inverse]",
            help="Affine or displacement field. Give several in the order in which a point of the "
            "reference goes through them, as antsApplyTransforms takes them: -t warp -t affine.",
        ),
    ] = None,
    labels: Annotated[
        bool,
        typer.Option(
            "--labels", help="IMAGE holds labels: take the one with the largest linear weight."
        ),
    ] = False,
    interpolation: Annotated[
        Interpolation, typer.Option(help="Between voxels; for labels rather say --labels.")
    ] = Interpolation.LINEAR,
    outside: Annotated[
        str | None,
        typer.Option(
            "--outside",
            "--default-value",
            metavar="VALUE",
            help="What is outside of IMAGE: a number, one for each channel with commas between "
            "them, or background, its own background where that is clear, else 0. By default "
            "background; with --labels 0. The second name is that of antsApplyTransforms.",
        ),
    ] = None,
    device: Annotated[Device, typer.Option(help="auto: a GPU if JAX sees one.")] = Device.AUTO,
    no_cache: NoCache = False,
) -> dict[str, Any]:
    r"""Resample IMAGE onto the grid of a reference, through any number of transforms.

    Labels and nearest neighbours keep the type of the voxels, all other interpolation writes
    float32. Cubic convolution and B-splines keep what is sharp sharper than linear interpolation
    does, and overshoot a little beside edges: a positive image may get values below 0.
    What is taken to be outside of IMAGE is printed, unless it is 0.

    Examples
    --------
    After jaxreg register fixed.nii.gz moving.nii.gz -o out, another image to the fixed grid:
    jaxreg apply other.nii.gz -r fixed.nii.gz -t out/warp.nii.gz -t out/affine.tfm -o moved.nii.gz

    The same with a cubic B-spline between voxels:
    jaxreg apply other.nii.gz -r fixed.nii.gz -t out/warp.nii.gz -t out/affine.tfm \
      --interpolation b-spline -o moved.nii.gz

    Labels drawn on the moving image:
    jaxreg apply labels.nii.gz -r fixed.nii.gz -t out/warp.nii.gz -t out/affine.tfm \
      --labels -o moved_labels.nii.gz

    The fixed image to the moving grid:
    jaxreg apply fixed.nii.gz -r moving.nii.gz -t out/affine.tfm:inverse \
      -t out/inverse_warp.nii.gz -o back.nii.gz
    """
    around = parse_outside(outside)
    if labels and interpolation is not Interpolation.LINEAR:
        raise ValueError(f"--labels: expected no --interpolation beside it, got {interpolation}")
    texts = transform or []
    refuse_overwriting(
        [output],
        [("IMAGE", image), ("--reference", reference), *(("--transform", t) for t in texts)],
    )
    with naming("--output"):
        check_image_name(output)
    with naming("--reference"):
        grid = read_grid(reference)
    with naming("IMAGE"):
        volume = read_image(image)
        values = np.asarray(volume.array)
        if labels and values.dtype.kind == "f" and (values % 1).any():
            raise ValueError(f"{image}: expected integers for --labels, got fractions")
    with naming("--reference"):
        if grid.ndim != volume.ndim:
            raise ValueError(f"{reference}: expected a {volume.ndim}-D image, got {grid.ndim}-D")
    with naming("--output"):
        check_image_grid(grid, output, volume.channels)
    keep_compiled(None, no_cache)
    with jax.default_device(devices.find(device)):
        parts = read_chain("--transform", texts, grid, volume.grid)
        kind: resampling.Interpolation = "labels" if labels else interpolation.value
        beyond = outside_values(volume, around, kind)
        with naming("IMAGE"):
            moved = resample(volume, grid, parts, kind, beyond)
    with naming("--output"):
        write_volume(moved, output)
    if beyond.any():
        print(f"Outside of IMAGE is {format_values(beyond)}.")
    return {
        "inputs": {"IMAGE": str(image), "--reference": str(reference), "--transform": texts},
        "interpolation": kind,
        "outside": {"IMAGE": beyond.tolist()},
        "warnings": warnings_told(),
        "written": [str(output)],
    }
