"""``jaxreg register``: two images, and the transform between them."""

from __future__ import annotations

import contextlib
import functools
import importlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from jaxreg.commands import devices
from jaxreg.commands.command import Command
from jaxreg.commands.compilation import Cache, NoCache, keep_compiled, keep_registrations
from jaxreg.commands.devices import Device
from jaxreg.commands.doubts import tell_doubts
from jaxreg.commands.inputs import (
    format_values,
    naming,
    parse_clip,
    parse_outside,
    read_chain,
    read_image,
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
    rehearse_images,
    write_images,
)
from jaxreg.commands.progress_bars import register_watched
from jaxreg.commands.schedules import Like, Recipe, Schedule, StageTexts, read_schedule
from jaxreg.commands.stage_options import Preset, choose_stages, for_pairs, parse_weights
from jaxreg.commands.study import ALSO, Jobs, Pair, Pairs, read_pairs, register_pairs
from jaxreg.commands.timing import Stopwatch, fact_table
from jaxreg.commands.transform_files import chains
from jaxreg.registration import Registration, Stage, Transform, outside_values
from jaxreg.registration.across import LostProcessError
from jaxreg.registration.channels import is_resampled
from jaxreg.registration.intensities import Clip
from jaxreg.registration.programs import Compiler, Work
from jaxreg.registration.report.page import write_report
from jaxreg.registration.transforms.resampling import Outside
from jaxreg.warp import INVERSE_TOLERANCE
from jaxreg_cli.telling import detail
from jaxreg_cli.tracing import TracingProcess
from regkernels import Volume
from regkernels.files.atomic import atomic_folder
from regkernels.files.images import check_image_grid
from regkernels.info import describe

__all__ = ["RegisterCommand", "register"]


def register(
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="OUT_DIR", help="Folder for the results, made if missing."
        ),
    ],
    fixed: Annotated[
        Path | None,
        typer.Argument(
            metavar="FIXED", help="Image that stays, 2-D or 3-D; the result has its grid."
        ),
    ] = None,
    moving: Annotated[
        Path | None, typer.Argument(metavar="MOVING", help="Image to be aligned to it.")
    ] = None,
    also: Annotated[
        list[Path] | None,
        typer.Option(
            "--also",
            metavar="FIXED MOVING",
            help="Another image of each of the two, of another contrast, say, in the same place: "
            "what it shows is compared, too. Give it again for more.",
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="W,...",
            help="What FIXED and MOVING count, and then the images of each --also. By default all "
            "alike.",
        ),
    ] = None,
    pairs: Pairs = None,
    jobs: Jobs = 2,
    stages: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="Stages to run, with commas between them, in the order given. Linear: moments, "
            "translation, rigid, similarity, affine; deforming: greedy, svf, syn, ffd. By default "
            "those of the preset.",
        ),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="How images are compared, in all stages, or with --also a name for each pair: "
            "lncc or ncc for one contrast, mi or nmi for two (CT and MR, say), mse for equal "
            "intensities; mind deforms images of two contrasts: linear stages use mi then, and by "
            "default there are moments, rigid and greedy. By default linear stages use ncc (the "
            "affine one of most presets lncc at its end), deforming ones lncc.",
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
    match_histogram: Annotated[
        bool,
        typer.Option(
            "--match-histogram",
            help="The metrics see MOVING with the histogram of FIXED: one contrast, other units.",
        ),
    ] = False,
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
) -> dict[str, Any] | list[dict[str, Any]]:
    r"""Register MOVING to FIXED, or many pairs.

    Writes moved.nii.gz, MOVING on the grid of FIXED; fixed_moved.nii.gz, FIXED on the grid of
    MOVING; affine.tfm and, if there is a deformation, warp.nii.gz and inverse_warp.nii.gz, which
    `jaxreg apply`, ITK, ANTs and 3D Slicer read; registration.json, with settings, versions and
    losses. Where the result may be wrong, a warning says why.

    Examples
    --------
    Two people, one contrast, with pictures to judge the result by:
    jaxreg register fixed.nii.gz moving.nii.gz -o out --report

    One person, two contrasts:
    jaxreg register mr.nii.gz ct.nii.gz -o out --stages moments,rigid --metric mi

    Two contrasts of each, the second of which counts half, by a metric of its own:
    jaxreg register t1_fixed.nii.gz t1_moving.nii.gz -o out \
      --also t2_fixed.nii.gz t2_moving.nii.gz --metric lncc,mi --weights 1,0.5

    Stages with settings of their own:
    jaxreg register fixed.nii.gz moving.nii.gz -o out \
      --stage "rigid metric=MI(num_bins=64) scales=4,2 iterations=80,40" \
      --stage "syn scales=4,2 iterations=60,30"

    Judged by labels and landmarks, before and after:
    jaxreg register fixed.nii.gz moving.nii.gz -o out --report \
      --fixed-labels fixed_labels.nii.gz --moving-labels moving_labels.nii.gz \
      --fixed-points fixed.mrk.json --moving-points moving.mrk.json

    A study, each pair into a folder of its own, with a table of how they went:
    jaxreg register --pairs pairs.csv -o study
    """
    if distributed:
        devices.join()
        several = "all" if several == "1" else several
    stopwatch = Stopwatch()
    schedule = read_schedule(texts, recipe, like, stages=stages, metric=metric)
    if schedule is not None and clip == "outliers":
        clip = schedule.clip or clip
    match_histogram |= schedule is not None and schedule.match_histogram
    asked = _Asked(
        schedule,
        stages,
        metric,
        effort,
        parse_weights(weights),
        clip,
        parse_clip(clip),
        match_histogram,
        parse_outside(outside),
        choose_outputs(outputs, report=report, composite=composite),
        device,
        several,
    )
    if several == "1":
        kept = keep_registrations(cache, no_cache)
    else:  # the program of a stage is one, and JAX keeps it
        kept = None
        keep_compiled(cache, no_cache)
    files = {
        "FIXED": fixed,
        "MOVING": moving,
        "--fixed-mask": fixed_mask,
        "--moving-mask": moving_mask,
        "--fixed-labels": fixed_labels,
        "--moving-labels": moving_labels,
        "--fixed-points": fixed_points,
        "--moving-points": moving_points,
    }
    given = {name: path for name, path in files.items() if path is not None}
    if pairs is not None:
        beside = {"--initial": initial, "--also": also, "--distributed": distributed}
        ways = [*given, *(name for name, value in beside.items() if value)]
        if ways:
            raise ValueError(f"--pairs: expected no {ways[0]} beside it")
        with TracingProcess.of_command() as tracer, Compiler(kept) as compiler:
            return _register_study(pairs, output, asked, jobs, compiler, tracer)
    for name in ("FIXED", "MOVING"):
        if name not in given:
            raise ValueError(f"missing argument {name}")
    console = Console(quiet=not devices.is_leader())
    others = also or []
    inputs = _Inputs(given, list(zip(others[::2], others[1::2], strict=True)), initial or [])
    with TracingProcess.of_command() as tracer, Compiler(kept) as compiler:
        run = functools.partial(_register_pair, inputs, output, asked, console, stopwatch, tracer)
        try:
            done = compiler.run(run)
        except LostProcessError as error:
            raise ConnectionError(f"--distributed: {error}") from error
    if not devices.is_leader():
        return {}
    console.print(
        _summary(done.result, done.judgement, stopwatch, done.record["versions"]["device"])
    )
    for line in done.resampled:
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    for name, values in done.beyond.items():
        if values.any():
            text = f"Outside of the image in {name} is {format_values(values)}."
            console.print(text, highlight=False, soft_wrap=True, markup=False)
    tell_doubts(done.result.doubts)
    done.judgement.tell()
    for name in done.written:
        console.print(output / name, highlight=False, soft_wrap=True, markup=False)
    return done.record


class RegisterCommand(Command):
    """The subcommand, whose option ``--also`` takes two files."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Repeat the option before the second file, as the parser wants it."""
        found: list[str] = []
        rest = iter(args)
        for argument in rest:
            found.append(argument)
            if argument == "--also":
                files = list(itertools.islice(rest, 2))
                if len(files) < 2 or any(file.startswith("-") for file in files):
                    got = " ".join(files) or "none"
                    raise ValueError(
                        f"--also: expected a fixed and a moving image after it, got {got}"
                    )
                found += [files[0], "--also", files[1]]
        return super().parse_args(ctx, found)


class _Asked(NamedTuple):
    """What is asked for of every pair."""

    schedule: Schedule | None
    stages: str | None
    metric: str | None
    effort: Preset
    weights: tuple[float, ...] | None
    clip_text: str
    clip: Clip
    match_histogram: bool
    outside: Outside
    wanted: frozenset[str]
    device: Device
    several: str

    def chosen(
        self, pairs: Sequence[tuple[Volume, Volume]], target: jax.Device, console: Console
    ) -> tuple[Stage, ...]:
        """Return the stages, for pairs of images."""
        if self.schedule is not None:
            stages = self.schedule.stages
        else:
            ndim = pairs[0][0].ndim
            stages = choose_stages(self.stages, self.metric, self.effort, ndim, target, console)
        return for_pairs(stages, self.metric, self.weights, [fixed.channels for fixed, _ in pairs])

    def settings(self) -> dict[str, Any]:
        """Return what results depend on, for JSON."""
        stages = () if self.schedule is None else self.schedule.stages
        return {
            "stages": self.stages,
            "metric": self.metric,
            "preset": self.effort,
            "schedule": [{"name": stage.name, **stage.record()} for stage in stages],
            "weights": self.weights,
            "clip": self.clip,
            "match_histogram": self.match_histogram,
            "outside": self.outside,
            "outputs": sorted(self.wanted),
        }


class _Inputs(NamedTuple):
    """The files of a pair, by the arguments that name them."""

    files: Mapping[str, Path]
    also: Sequence[tuple[Path, Path]]
    initial: Sequence[str]


class _Done(NamedTuple):
    """A registration that is written; without ``written`` and a record where others write."""

    result: Registration
    judgement: Judgement
    beyond: dict[str, NDArray[Any]]
    resampled: list[str]
    record: dict[str, Any]
    written: list[str]


_JUDGING = ("--fixed-labels", "--moving-labels", "--fixed-points", "--moving-points")


def _register_study(
    table: Path, output: Path, asked: _Asked, jobs: int, compiler: Compiler, tracer: TracingProcess
) -> list[dict[str, Any]]:
    with naming("--pairs"):
        pairs = read_pairs(table)
    arguments = {"fixed": "FIXED", "moving": "MOVING"}

    def register(pair: Pair, folder: Path) -> dict[str, Any]:
        files = {
            arguments.get(column) or f"--{column.replace('_', '-')}": path
            for column, path in pair.files.items()
            if column != "initial" and not ALSO.fullmatch(column)
        }
        initial = [str(path) for column, path in pair.files.items() if column == "initial"]
        inputs, console = _Inputs(files, pair.also, initial), Console(quiet=True)
        run = functools.partial(_register_pair, inputs, folder, asked, console, Stopwatch(), tracer)
        return compiler.run(run).record

    asked = asked._replace(wanted=asked.wanted | {RECORD})
    return register_pairs(pairs, output, register, asked.settings(), jobs)


def _register_pair(
    inputs: _Inputs,
    output: Path,
    asked: _Asked,
    console: Console,
    stopwatch: Stopwatch,
    tracer: TracingProcess,
    work: Work,
) -> _Done:
    """Register two images, and write what is wanted into a folder."""
    images = [(name, path) for name, path in inputs.files.items() if name not in _JUDGING]
    judged_by = {name: inputs.files.get(name) for name in _JUDGING}
    given: list[tuple[str, Path | str]] = [("--initial", text) for text in inputs.initial]
    further = [("--also", path) for pair in inputs.also for path in pair]
    given += further
    refuse_overwriting([output / name for name in FILES], [*inputs.files.items(), *given])
    with stopwatch.phase("reading"), ThreadPoolExecutor() as pool:
        starting = pool.submit(devices.find, asked.device)  # takes longer than reading on a GPU
        if work.will_trace():  # meanwhile; most stages are traced with it
            pool.submit(importlib.import_module, "optax")
        read = list(_read([*further, *images]))
        volumes = dict(read[len(further) :])
        fixed, moving = volumes["FIXED"], volumes["MOVING"]
        others = [volume for _, volume in read[: len(further)]]
        also = list(zip(others[::2], others[1::2], strict=True))
        judging = Judging.read(judged_by, fixed, moving)
    for name in ("FIXED", "MOVING"):
        _check_contrast(name, volumes[name])
        with naming(name):
            check_image_grid(volumes[name].grid, output / MOVED, volumes[name].channels)
    for volume in others:
        _check_contrast("--also", volume)
    target = starting.result()
    spread = devices.find_several(asked.several, target, fixed.ndim)
    with contextlib.ExitStack() as stack:
        folder = None
        if devices.is_leader():
            with naming("--output"):
                # JAX aborts a process, without an exception, where it misses another one.
                guarded = jax.process_count() > 1
                writing = atomic_folder(output, owned=FILES, guarded=guarded)
                folder = stack.enter_context(writing)
        stack.enter_context(jax.default_device(target))
        parts = read_chain("--initial", inputs.initial, fixed.grid, moving.grid)
        start = Transform.from_parts(fixed.grid, parts, devices=spread)
        work.afterwards = functools.partial(rehearse_images, fixed, moving, asked.wanted)
        work.beside = functools.partial(jax.default_device, target)
        if target.platform != "cpu":  # for which compilation takes longer than tracing
            work.tracer = tracer
        with stopwatch.phase("stages"):
            result = register_watched(
                fixed,
                moving,
                asked.chosen([(fixed, moving), *also], target, console),
                console,
                also=also,
                fixed_mask=volumes.get("--fixed-mask"),
                moving_mask=volumes.get("--moving-mask"),
                initial=start.with_inverse() if parts else None,
                clip=asked.clip,
                match_histogram=asked.match_histogram,
                outside=asked.outside,
                devices=spread,
            )
        _tell_levels(result)
        write_images(result, asked.wanted, folder, stopwatch)
        with stopwatch.phase("results"):
            judgement = judging.judge(start, result.transform)
        beyond = {
            name: outside_values(volume, result.outside)
            for name, volume in ((MOVED, result.moving), (FIXED_MOVED, result.fixed))
        }
        resampled = _resampled(inputs, result)
        if folder is None:
            return _Done(result, judgement, beyond, resampled, {}, [])
        facts = {**describe(["jax"]), "device": _told(target, spread, result)}
        files = {name: str(path) for name, path in inputs.files.items()}
        if REPORT in asked.wanted:
            names = [inputs.files[name].name for name in ("MOVING", "FIXED")]
            told = dict(files)
            told |= {"--initial": " ".join(inputs.initial)} if inputs.initial else {}
            for number, paths in enumerate(inputs.also, 2):
                told[f"--also, pair {number}"] = " ".join(map(str, paths))
            told |= {"Resampled": " ".join(resampled)} if resampled else {}
            if asked.weights is not None:
                told["--weights"] = ",".join(f"{weight:g}" for weight in asked.weights)
            told |= {"--clip": asked.clip_text}
            told |= {"--match-histogram": "yes"} if asked.match_histogram else {}
            told |= {f"Outside of the image in {n}": format_values(v) for n, v in beyond.items()}
            with stopwatch.phase("report"):
                write_report(
                    result,
                    folder / REPORT,
                    title=" registered to ".join(names),
                    tables={"Inputs": told, "Versions": facts},
                    scores=judgement.tables(),
                )
        listed = {
            "--initial": list(inputs.initial),
            "--also": [[str(path) for path in pair] for pair in inputs.also],
        }
        record = {
            **_record(result, files | listed, facts, asked.wanted),
            "clip": asked.clip,
            "match_histogram": asked.match_histogram,
            "weights": asked.weights,
            "resampled": resampled,
            "outside": {name: values.tolist() for name, values in beyond.items()},
            **judgement.record(),
            "seconds": stopwatch.seconds(),
            "peak memory (MB)": devices.peak_memory(),
        }
        if RECORD in asked.wanted:
            (folder / RECORD).write_text(f"{json.dumps(record, indent=2)}\n")
        written = sorted(path.name for path in folder.iterdir())
    return _Done(result, judgement, beyond, resampled, record, written)


def _resampled(inputs: _Inputs, result: Registration) -> list[str]:
    """Return what is told of further images on other grids."""
    firsts = {"FIXED": result.fixed.grid, "MOVING": result.moving.grid}
    return [
        f"{path} was resampled onto the grid of {name} to be compared."
        for paths, pair in zip(inputs.also, result.also, strict=True)
        for path, volume, (name, grid) in zip(paths, pair, firsts.items(), strict=True)
        if is_resampled(volume, grid)
    ]


def _tell_levels(result: Registration) -> None:
    """Say how each level went, to those who ask for details."""
    for stage in result.stages:
        for level in stage.levels:
            shape = " x ".join(map(str, level.shape[::-1]))
            where = f" on {level.devices} devices" if level.devices > 1 else ""
            losses = [f"{loss:.6g}" for loss in (*level.losses[:1], *level.losses[-1:])]
            detail(
                f"{stage.name} at 1/{level.scale:g} resolution, {shape} voxels{where}: "
                f"{len(level.losses)} losses, {' to '.join(losses) or 'none'}, "
                f"{'converged' if level.converged else 'iterations used up'}"
            )
        detail(f"{stage.name}: {stage.seconds:.3f} s, with what it compiled")


def _read(paths: list[tuple[str, Path]]) -> Iterator[tuple[str, Volume]]:
    with ThreadPoolExecutor() as pool:
        reading = [(argument, pool.submit(read_image, path)) for argument, path in paths]
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


def _told(target: jax.Device, spread: list[jax.Device] | None, result: Registration) -> str:
    """Return what the stages ran on, for people."""
    name = devices.describe(target)
    if spread is None:
        return name
    is_shared = any(level.devices > 1 for stage in result.stages for level in stage.levels)
    # Levels that are small are on every device, and so are all of a small image.
    return f"{len(spread)} of {name}, with {'some' if is_shared else 'all'} planes on each"


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
