"""``jaxreg motion``: the frames of a series brought to one place."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import jax
import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table

from jaxreg.commands import devices
from jaxreg.commands.compilation import Cache, NoCache, keep_registrations
from jaxreg.commands.devices import Device
from jaxreg.commands.inputs import naming, parse_clip, read_image, refuse_overwriting
from jaxreg.commands.progress_bars import for_bars
from jaxreg.commands.schedules import StageTexts, read_schedule
from jaxreg.commands.timing import Stopwatch, fact_table
from jaxreg.registration import Motion, Stage, align_frames
from jaxreg.registration.motion import DEFAULT_STAGES, HEAD_RADIUS
from jaxreg.registration.programs import Compiler, Work
from jaxreg.registration.stages.metrics import MetricName
from jaxreg_cli.telling import detail
from regkernels import read_series, write_affine, write_series, write_volume
from regkernels.files.atomic import atomic_folder
from regkernels.files.images import check_image_grid
from regkernels.info import describe

__all__ = ["motion"]

_ALIGNED, _MEAN, _TABLE, _RECORD = "aligned.nii.gz", "mean.nii.gz", "motion.tsv", "motion.json"
_FILES = (_ALIGNED, _MEAN, _TABLE, _RECORD)
_TRANSFORMS = "transforms"

COLUMNS = (
    *("trans_x_mm", "trans_y_mm", "trans_z_mm"),
    *("rot_x_rad", "rot_y_rad", "rot_z_rad"),
    "framewise_displacement_mm",
)


def motion(
    series: Annotated[
        Path, typer.Argument(metavar="SERIES", help="NIfTI file of 3-D images in time.")
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="OUT_DIR", help="Folder for the results, made if missing."
        ),
    ],
    reference: Annotated[
        str,
        typer.Option(
            metavar="N",
            help="Frame that the others are aligned to, counted from 0; or mean: the mean of all, "
            "which are aligned to the one in the middle first.",
        ),
    ] = "mean",
    stages: StageTexts = None,
    metric: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="How frames are compared, as for `jaxreg register`; by default ncc.",
        ),
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option(
            help="Image on the grid of SERIES: what each voxel of the reference counts, 0 for "
            "nothing."
        ),
    ] = None,
    radius: Annotated[
        float,
        typer.Option(
            metavar="MM",
            help="Of the head, on whose surface framewise displacement measures rotations.",
        ),
    ] = HEAD_RADIUS,
    transforms: Annotated[
        bool,
        typer.Option(
            "--transforms",
            help=f"Also write {_TRANSFORMS}/0000.tfm and so on, which `jaxreg apply -t` takes.",
        ),
    ] = False,
    clip: Annotated[
        str,
        typer.Option(
            metavar="LOW,HIGH",
            help="Which intensities the metric sees, as for `jaxreg register`: outliers, two "
            "quantiles or none.",
        ),
    ] = "outliers",
    block: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="How many frames at once; by default as many as are fast."
        ),
    ] = None,
    device: Annotated[Device, typer.Option(help="auto: a GPU if JAX sees one.")] = Device.AUTO,
    cache: Cache = None,
    no_cache: NoCache = False,
) -> dict[str, Any]:
    """Align the frames of a series in time, rigidly by default.

    Writes aligned.nii.gz, the series with each frame in the place of the reference; mean.nii.gz,
    its mean; motion.tsv, a row for each frame: how the head lies in it beside the reference, as a
    shift of the centre of the grid (millimetres) and a rotation vector about it (radians), along
    x, y and z (LPS), and framewise displacement (Power et al. 2012); motion.json, with settings and
    versions.

    Examples
    --------
    Aligned to their mean:
    jaxreg motion bold.nii.gz -o out

    Aligned to the first frame, where the brain alone counts, with a transform for each:
    jaxreg motion bold.nii.gz -o out --reference 0 --mask brain.nii.gz --transforms

    By mutual information, with a schedule of its own:
    jaxreg motion perfusion.nii.gz -o out --stage "rigid metric=MI scales=2,1 iterations=60,40"
    """
    stopwatch = Stopwatch()
    schedule = read_schedule(stages, None, None, metric=metric)
    clipping = parse_clip(clip)
    to = _parse_reference(reference)
    if not 0 < radius < np.inf:
        raise ValueError(f"--radius: expected a positive number, got {radius}")
    reads = [("SERIES", series)] + ([] if mask is None else [("--mask", mask)])
    refuse_overwriting([output / name for name in _FILES], reads)
    kept = keep_registrations(cache, no_cache)
    with stopwatch.phase("reading"):
        with naming("SERIES"):
            frames = read_series(series)
            check_image_grid(frames.grid, output / _ALIGNED)
        size = " x ".join(map(str, frames.grid.shape[::-1]))
        detail(f"read {series}: {len(frames.frames)} frames of {size} voxels")
        weights = None
        if mask is not None:
            with naming("--mask"):
                weights = read_image(mask)
    chosen = _stages(None if schedule is None else schedule.stages, metric)
    target = devices.find(device)
    console = Console()
    with contextlib.ExitStack() as stack:
        with naming("--output"):
            folder = stack.enter_context(atomic_folder(output, owned=_FILES))
        stack.enter_context(jax.default_device(target))

        def align(work: Work) -> Motion:
            with stopwatch.phase("stages"), _watched(console) as callback:
                found = align_frames(
                    frames,
                    chosen,
                    reference=to,
                    mask=weights,
                    clip=clipping,
                    block=block,
                    callback=callback,
                )
            with stopwatch.phase("results"):
                found.aligned  # noqa: B018 - the mean follows from the same
            return found

        with Compiler(kept) as compiler:
            found = compiler.run(align)
        with stopwatch.phase("writing"):
            write_series(found.aligned, folder / _ALIGNED)
            write_volume(found.mean, folder / _MEAN)
            _write_table(found, radius, folder / _TABLE)
            if transforms:
                _write_transforms(found, output / _TRANSFORMS)
        moved = found.framewise_displacement(radius)
        record: dict[str, Any] = {
            "inputs": {"SERIES": str(series), "--mask": None if mask is None else str(mask)},
            "frames": len(frames.frames),
            "time step (s)": frames.time_step,
            "reference": to,
            "stages": [{"name": stage.name, "settings": stage.record()} for stage in chosen],
            "clip": clipping,
            "radius (mm)": radius,
            "framewise displacement (mm)": {
                "mean": float(moved[1:].mean()),
                "maximum": float(moved.max()),
                "frame of the maximum": int(moved.argmax()),
            },
            "losses": found.losses.tolist(),
            "seconds": stopwatch.seconds(),
            "peak memory (MB)": devices.peak_memory(),
            "versions": {**describe(["jax"]), "device": devices.describe(target)},
        }
        (folder / _RECORD).write_text(f"{json.dumps(record, indent=2)}\n")
        written = sorted(path.name for path in folder.iterdir())
    console.print(_summary(found, record, stopwatch, target))
    for name in [*written, *([_TRANSFORMS] if transforms else [])]:
        console.print(output / name, highlight=False, soft_wrap=True, markup=False)
    return record


def _parse_reference(text: str) -> int | Literal["mean"]:
    if text == "mean":
        return "mean"
    if not text.isdecimal():
        raise ValueError(f"--reference: expected mean, or the number of a frame, got {text!r}")
    return int(text)


def _stages(chosen: tuple[Stage, ...] | None, metric: str | None) -> tuple[Stage, ...]:
    """Return what ``--stage`` says, or the stage of `align_frames` with a metric."""
    stages = DEFAULT_STAGES if chosen is None else chosen
    if metric is None:
        return stages
    return tuple(stage.with_metric(cast(MetricName, metric)) for stage in stages)


@contextlib.contextmanager
def _watched(console: Console) -> Iterator[Callable[[int, int], None]]:
    """Give what shows how many frames are aligned: a bar, or lines on what is no terminal."""
    if not console.is_terminal:

        def tell(done: int, total: int) -> None:
            console.print(f"aligned {done} of {total} frames", highlight=False)

        yield tell
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Bars(*columns, console=for_bars(console)) as bars:
        task = bars.add_task("Frames", total=None)

        def show(done: int, total: int) -> None:
            detail(f"aligned {done} of {total} frames")
            bars.update(task, total=total, completed=done)

        yield show


def _write_table(found: Motion, radius: float, path: Path) -> None:
    rows = np.column_stack([found.parameters, found.framewise_displacement(radius)])
    lines = ["\t".join(COLUMNS), *("\t".join(f"{x:.6f}" for x in row) for row in rows)]
    path.write_text("\n".join(lines) + "\n")


def _write_transforms(found: Motion, folder: Path) -> None:
    with naming("--output"), atomic_folder(folder) as beside:
        for number, matrix in enumerate(found.matrices):
            write_affine(matrix, beside / f"{number:04d}.tfm")


def _summary(
    found: Motion, record: dict[str, Any], stopwatch: Stopwatch, target: jax.Device
) -> Table:
    table = fact_table()
    shifts, turns = found.parameters[:, :3], found.parameters[:, 3:]
    table.add_row("Frames", str(len(shifts)))
    moved = record["framewise displacement (mm)"]
    table.add_row("Framewise displacement, mean", f"{moved['mean']:.3f} mm")
    table.add_row(
        "Framewise displacement, largest",
        f"{moved['maximum']:.3f} mm, frame {moved['frame of the maximum']}",
    )
    table.add_row("Largest shift", f"{np.linalg.norm(shifts, axis=1).max():.3f} mm")
    table.add_row("Largest rotation", f"{np.rad2deg(np.linalg.norm(turns, axis=1).max()):.3f}°")
    table.add_section()
    stopwatch.add_rows(table, devices.describe(target))
    return table
