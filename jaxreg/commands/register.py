"""``jaxreg register``: two images, and the transform between them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from jaxreg.commands import devices
from jaxreg.commands.compilation import Cache, NoCache, keep_compiled
from jaxreg.commands.devices import Device
from jaxreg.commands.doubts import tell_doubts
from jaxreg.commands.inputs import (
    format_values,
    naming,
    parse_clip,
    parse_outside,
    read_chain,
    refuse_overwriting,
)
from jaxreg.commands.judging import Judgement, Judging
from jaxreg.commands.outputs import (
    FILES,
    FIXED_MOVED,
    MOVED,
    RECORD,
    REPORT,
    Composite,
    Outputs,
    choose_outputs,
    write_images,
)
from jaxreg.commands.progress_bars import register_watched
from jaxreg.commands.schedules import Like, Recipe, StageTexts, read_schedule
from jaxreg.commands.stage_options import Preset, choose_stages
from jaxreg.commands.timing import Stopwatch, fact_table
from jaxreg.commands.transform_files import chains
from jaxreg.registration import (
    Registration,
    Transform,
    outside_values,
)
from jaxreg.registration.report.page import write_report
from jaxreg.warp import INVERSE_TOLERANCE
from regkernels import Volume, read_volume
from regkernels.files.atomic import atomic_folder
from regkernels.files.images import check_image_grid
from regkernels.info import describe

__all__ = ["register"]


def register(
    fixed: Annotated[
        Path,
        typer.Argument(
            metavar="FIXED", help="Image that stays, 2-D or 3-D; the result has its grid."
        ),
    ],
    moving: Annotated[Path, typer.Argument(metavar="MOVING", help="Image to be aligned to it.")],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="OUT_DIR", help="Folder for the results, made if missing."
        ),
    ],
    stages: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="Stages to run, with commas between them, in the order given. Linear: moments, "
            "translation, rigid, similarity, affine; deforming: greedy, svf, syn. By default those "
            "of the preset.",
        ),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="How images are compared, in all stages: lncc or ncc for one contrast, mi or nmi "
            "for two (CT and MR, say), mse for equal intensities; mind deforms images of two "
            "contrasts: linear stages use mi then, and by default there are moments, rigid and "
            "greedy. By default linear stages use ncc (the affine one of most presets lncc at its "
            "end), deforming ones lncc.",
        ),
    ] = None,
    texts: StageTexts = None,
    recipe: Recipe = None,
    like: Like = None,
    effort: Annotated[
        Preset,
        typer.Option(
            "--preset",
            help="affine: moments and affine alone; fast: these and greedy, down to half the "
            "resolution; default: moments, affine and syn at full resolution; accurate: the same "
            "with more iterations.",
        ),
    ] = Preset.DEFAULT,
    fixed_mask: Annotated[
        Path | None,
        typer.Option(help="Image on the grid of FIXED: what each voxel counts, 0 for nothing."),
    ] = None,
    moving_mask: Annotated[
        Path | None, typer.Option(help="The same on the grid of MOVING.")
    ] = None,
    initial: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE[:inverse]",
            help="Transform to start from, affine.tfm of an earlier run, say. Give several as for "
            "`jaxreg apply -t`.",
        ),
    ] = None,
    fixed_labels: Annotated[
        Path | None,
        typer.Option(
            help="Labels on the grid of FIXED, to judge the result by: Dice coefficients and "
            "Hausdorff distances, before and after."
        ),
    ] = None,
    moving_labels: Annotated[
        Path | None, typer.Option(help="The same on the grid of MOVING, with the same numbers.")
    ] = None,
    fixed_points: Annotated[
        Path | None,
        typer.Option(
            help="Landmarks in FIXED, to judge the result by: .csv, .mrk.json or .fcsv, in "
            "millimetres, as for `jaxreg apply-points`."
        ),
    ] = None,
    moving_points: Annotated[
        Path | None, typer.Option(help="The same landmarks in MOVING, in the same order.")
    ] = None,
    clip: Annotated[
        str,
        typer.Option(
            metavar="LOW,HIGH",
            help="Which intensities the metrics see. outliers: a few that are far from all others "
            "are brought nearer. Two quantiles such as 0.005,0.995: those beyond are moved there. "
            "none: all as they are.",
        ),
    ] = "outliers",
    outside: Annotated[
        str,
        typer.Option(
            metavar="VALUE",
            help=f"What is outside of the images in {MOVED} and {FIXED_MOVED}: a number, one for "
            "each channel with commas between them, or background, the own background of each "
            "where that is clear, else 0.",
        ),
    ] = "background",
    device: Annotated[Device, typer.Option(help="auto: a GPU if JAX sees one.")] = Device.AUTO,
    several: Annotated[
        str,
        typer.Option(
            "--devices",
            metavar="N",
            help="How many of them to spread volumes over that do not fit one; all: as many as "
            "there are.",
        ),
    ] = "1",
    distributed: Annotated[
        bool,
        typer.Option(
            "--distributed",
            help="This is one of several processes, started by srun or mpirun, which share the "
            "devices of all of them. The first one writes.",
        ),
    ] = False,
    report: Annotated[
        bool,
        typer.Option("--report", help=f"Also write {REPORT}: pictures to judge the result by."),
    ] = False,
    composite: Composite = False,
    outputs: Outputs = None,
    cache: Cache = None,
    no_cache: NoCache = False,
) -> dict[str, Any]:
    """Register MOVING to FIXED.

    For example: jaxreg register fixed.nii.gz moving.nii.gz -o out --report

    Writes moved.nii.gz, MOVING on the grid of FIXED; fixed_moved.nii.gz, FIXED on the grid of
    MOVING; affine.tfm and, if there is a deformation, warp.nii.gz and inverse_warp.nii.gz, which
    `jaxreg apply`, ITK, ANTs and 3D Slicer read; registration.json, with settings, versions and
    losses. Where the result may be wrong, a warning says why.

    Judged by labels and landmarks, before and after, on the console, in record and report:
    jaxreg register fixed.nii.gz moving.nii.gz -o out --report
    --fixed-labels fixed_labels.nii.gz --moving-labels moving_labels.nii.gz
    --fixed-points fixed.mrk.json --moving-points moving.mrk.json
    """
    if distributed:
        devices.join()
        several = "all" if several == "1" else several
    stopwatch = Stopwatch()
    schedule = read_schedule(texts, recipe, like, stages=stages, metric=metric)
    if schedule is not None and clip == "outliers":
        clip = schedule.clip or clip
    clipping, around = parse_clip(clip), parse_outside(outside)
    wanted = choose_outputs(outputs, report=report, composite=composite)
    given = [("--initial", text) for text in initial or []]
    files = (
        ("FIXED", fixed),
        ("MOVING", moving),
        ("--fixed-mask", fixed_mask),
        ("--moving-mask", moving_mask),
    )
    judged_by = {
        "--fixed-labels": fixed_labels,
        "--moving-labels": moving_labels,
        "--fixed-points": fixed_points,
        "--moving-points": moving_points,
    }
    read = [(name, path) for name, path in files if path is not None]
    beside = [(name, path) for name, path in judged_by.items() if path is not None]
    refuse_overwriting([output / name for name in FILES], [*read, *beside, *given])
    with stopwatch.phase("reading"), ThreadPoolExecutor() as pool:
        starting = pool.submit(devices.find, device)  # a GPU takes longer to start than a file
        volumes = dict(_read(read))
        judging = Judging.read(judged_by, volumes["FIXED"], volumes["MOVING"])
    for name in ("FIXED", "MOVING"):
        _check_contrast(name, volumes[name])
        with naming(name):
            check_image_grid(volumes[name].grid, output / MOVED, volumes[name].channels)
    target = starting.result()
    spread = devices.find_several(several, target, volumes["FIXED"].ndim)
    keep_compiled(cache, no_cache)
    console = Console(quiet=not devices.is_leader())
    with contextlib.ExitStack() as stack:
        folder = None
        if devices.is_leader():
            with naming("--output"):
                folder = stack.enter_context(atomic_folder(output, owned=FILES))
        stack.enter_context(jax.default_device(target))
        image = volumes["FIXED"]
        grids = image.grid, volumes["MOVING"].grid
        parts = read_chain("--initial", initial or [], *grids)
        with stopwatch.phase("stages"):
            result = register_watched(
                image,
                volumes["MOVING"],
                schedule.stages
                if schedule is not None
                else choose_stages(stages, metric, effort, image.ndim, target, console),
                console,
                fixed_mask=volumes.get("--fixed-mask"),
                moving_mask=volumes.get("--moving-mask"),
                initial=Transform.from_parts(image.grid, parts).with_inverse() if parts else None,
                clip=clipping,
                outside=around,
                devices=spread,
            )
        write_images(result, wanted, folder, stopwatch)
        with stopwatch.phase("results"):
            judgement = judging.judge(Transform.from_parts(image.grid, parts), result.transform)
        if folder is None:
            return {}
        facts = {**describe(["jax"]), "device": _told(target, spread)}
        inputs = {name: str(path) for name, path in [*read, *beside]} | {"--initial": initial or []}
        beyond = {
            name: outside_values(volume, result.outside)
            for name, volume in ((MOVED, result.moving), (FIXED_MOVED, result.fixed))
        }
        if REPORT in wanted:
            title = f"{moving.name} registered to {fixed.name}"
            told = {name: str(path) for name, path in [*read, *beside]}
            told |= {"--initial": " ".join(initial)} if initial else {}
            told |= {"--clip": clip}
            told |= {f"Outside of the image in {n}": format_values(v) for n, v in beyond.items()}
            tables = {"Inputs": told, "Versions": facts}
            scores = judgement.tables()
            with stopwatch.phase("report"):
                write_report(result, folder / REPORT, title=title, tables=tables, scores=scores)
        settings = {"clip": clipping, "outside": {n: v.tolist() for n, v in beyond.items()}}
        record = _record(result, inputs, facts, wanted) | settings | judgement.record()
        record["seconds"] = stopwatch.seconds()
        record["peak memory (MB)"] = devices.peak_memory()
        if RECORD in wanted:
            (folder / RECORD).write_text(f"{json.dumps(record, indent=2)}\n")
        written = sorted(path.name for path in folder.iterdir())
    console.print(_summary(result, judgement, stopwatch, facts["device"]))
    for name, values in beyond.items():
        if values.any():
            text = f"Outside of the image in {name} is {format_values(values)}."
            console.print(text, highlight=False, soft_wrap=True, markup=False)
    tell_doubts(result.doubts)
    judgement.tell()
    for name in written:
        console.print(output / name, highlight=False, soft_wrap=True, markup=False)
    return record


def _read(paths: list[tuple[str, Path]]) -> Iterator[tuple[str, Volume]]:
    with ThreadPoolExecutor() as pool:
        reading = [(argument, pool.submit(read_volume, path)) for argument, path in paths]
        for argument, volume in reading:
            with naming(argument):
                yield argument, volume.result()


def _check_contrast(argument: str, volume: Volume) -> None:
    """Refuse an image to which every metric is flat: nothing would move, and nobody be told."""
    low, high = float(np.min(volume.array)), float(np.max(volume.array))
    if low == high:
        raise ValueError(f"{argument}: expected different intensities, got {low:g} everywhere")


def _record(
    result: Registration, inputs: dict[str, Any], facts: dict[str, str], wanted: frozenset[str]
) -> dict[str, Any]:
    """Return what is worth keeping beside the images, for JSON."""
    there, back = (
        chain if {name.partition(":")[0] for name in chain} <= wanted else []
        for chain in chains(result.transform)
    )
    return {
        "inputs": inputs,
        "transform": {
            "fixed to moving": there,
            "moving to fixed": back,
            "matrix": np.asarray(result.transform.matrix).tolist(),
        },
        "jacobian": result.folds._asdict(),
        "mended": result.mended,
        "inverse residual (voxels)": result.inverse_residual._asdict(),
        "doubts": [doubt._asdict() for doubt in result.doubts],
        "stages": [
            {
                "name": stage.name,
                "settings": stage.settings.record(),
                "seconds": stage.seconds,
                "levels": [
                    {**level._asdict(), "losses": np.asarray(level.losses).tolist()}
                    for level in stage.levels
                ],
            }
            for stage in result.stages
        ],
        "versions": facts,
    }


def _told(target: jax.Device, spread: list[jax.Device] | None) -> str:
    """Return what the stages ran on, for people."""
    name = devices.describe(target)
    return name if spread is None else f"{len(spread)} of {name}, with some planes on each"


def _summary(
    result: Registration, judgement: Judgement, stopwatch: Stopwatch, device: str
) -> Table:
    table = fact_table()
    for stage in result.stages:
        table.add_row(stage.name.capitalize(), f"{stage.seconds:.1f} s")
    stopwatch.add_rows(table, device)
    table.add_section()
    folds = result.folds
    table.add_row("Voxels with Jacobian determinant ≤ 0", f"{100 * folds.share:.4g} %")
    table.add_row("Jacobian determinant", f"{folds.minimum:.3f} to {folds.maximum:.3f}")
    if result.transform.displacement is not None:
        residual = result.inverse_residual
        missed = f"Voxels without an inverse to {INVERSE_TOLERANCE:g} voxels"
        table.add_row(missed, f"{100 * residual.share:.4g} %")
        table.add_row("Residual of the inverse", f"at most {residual.maximum:.3g} voxels")
    table.add_section()
    for name, value in judgement.rows():
        table.add_row(name, value)
    return table
