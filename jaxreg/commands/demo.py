"""``jaxreg demo``: two real brains, registered."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from jaxreg import lncc_loss
from jaxreg.commands import devices
from jaxreg.commands.compilation import NoCache, keep_compiled
from jaxreg.commands.devices import Device
from jaxreg.commands.doubts import tell_doubts
from jaxreg.commands.inputs import naming
from jaxreg.commands.multimodal import compare_metrics
from jaxreg.commands.progress_bars import for_bars, register_watched
from jaxreg.commands.timing import Stopwatch, fact_table
from jaxreg.registration import Affine, Greedy, Moments, Registration, dice, ncc, resample
from jaxreg.registration.report.page import write_report
from regkernels import Volume, read_volume, rigid_motion, write_displacement, write_volume
from regkernels.data import load_pair_paths
from regkernels.files.atomic import atomic_folder
from regkernels.info import describe
from regkernels.maps import Part

__all__ = ["demo", "load"]

# The axis is oblique and the shift is slanted, so that no coordinate is left as it was.
_AXIS = (1.0, 2.0, 3.0)
_ROTATION, _SHIFT = 15.0, 20.0
_SHIFT_DIRECTION = np.array((2.0, -1.0, 2.0)) / 3


class _Scores(NamedTuple):
    """How well a moving image fits; each is 1 for the fixed image itself."""

    ncc: float
    lncc: float
    """Mean over the fixed brain: outside of it there is nothing to align."""
    overlap: float
    """Dice coefficient of the two brains."""


def demo(
    output_dir: Annotated[
        Path, typer.Option(help="Where to write; made if missing.", show_default=True)
    ] = Path("jaxreg-demo"),
    device: Annotated[Device, typer.Option(help="auto: a GPU if JAX sees one.")] = Device.AUTO,
    rotation: Annotated[
        float | None,
        typer.Option(
            help="Turn the moving image's header by this many degrees first.",
            show_default=f"{_ROTATION:g}",
        ),
    ] = None,
    shift: Annotated[
        float | None,
        typer.Option(
            help="Shift the moving image's header by this many mm first.",
            show_default=f"{_SHIFT:g}",
        ),
    ] = None,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick", help="Stop at 4 mm voxels (8 mm with --multimodal): rougher and faster."
        ),
    ] = False,
    multimodal: Annotated[
        bool,
        typer.Option(
            "--multimodal",
            help="Register a CT to an MR image instead, by three metrics from the same six starts.",
        ),
    ] = False,
    no_cache: NoCache = False,
) -> dict[str, Any]:
    """Register Colin27 to the ICBM152 template: affine, then diffeomorphic.

    Writes moved.nii.gz, displacement.nii.gz (an ITK displacement image, mm) and report.png; with
    --multimodal moved.nii.gz and multimodal.png.

    Examples
    --------
    The images come along, so that nothing has to be there:
    jaxreg demo

    Coarsely, from a start that is further away:
    jaxreg demo --quick --rotation 30 --shift 40 --output-dir far

    A CT to an MR image:
    jaxreg demo --multimodal
    """
    stopwatch = Stopwatch()
    for name, value in (("--rotation", rotation), ("--shift", shift)):
        if value is not None and multimodal:
            raise ValueError(f"{name}: expected none with --multimodal, got {value}")
        if value is not None and not np.isfinite(value):
            raise ValueError(f"{name}: expected a finite number, got {value}")
    target = devices.find(device)
    keep_compiled(None, no_cache)
    console = Console()
    with contextlib.ExitStack() as stack:
        with naming("--output-dir"):
            folder = stack.enter_context(atomic_folder(output_dir))
        stack.enter_context(jax.default_device(target))
        if multimodal:
            scores, facts, found = compare_metrics(folder, console, quick)
        else:
            fixed, moving = load(
                _ROTATION if rotation is None else rotation, _SHIFT if shift is None else shift
            )
            scores, facts, found = _register(fixed, moving, folder, console, target, quick)
        written = sorted(path.name for path in folder.iterdir())
    stopwatch.add_rows(facts, devices.describe(target))
    console.print(scores)
    console.print(facts)
    for name in written:
        console.print(output_dir / name, highlight=False, soft_wrap=True, markup=False)
    return {
        **found,
        "seconds": stopwatch.seconds(),
        "peak memory (MB)": devices.peak_memory(),
        "versions": {**describe(["jax"]), "device": devices.describe(target)},
        "written": [str(output_dir / name) for name in written],
    }


def load(rotation: float, shift: float) -> tuple[Volume, Volume]:
    """Read the shipped pair and displace the moving volume's header.

    Parameters
    ----------
    rotation
        Degrees, about an oblique axis through the middle of the volume.
    shift
        Millimetres, in an oblique direction.

    Returns
    -------
    fixed, moving
        ICBM152 and Colin27.
    """
    fixed, moving = (read_volume(path) for path in load_pair_paths())
    motion = rigid_motion(rotation, _AXIS, shift * _SHIFT_DIRECTION, moving.grid.centre())
    return fixed, moving.moved_by(motion)


def _register(
    fixed: Volume,
    moving: Volume,
    folder: Path,
    console: Console,
    target: jax.Device,
    quick: bool,
) -> tuple[Table, Table, dict[str, Any]]:
    """Register the pair and fill a folder; return scores, what else there is to tell, and both."""
    result = register_watched(fixed, moving, _stages(quick), console)
    tell_doubts(result.doubts)
    parts = result.transform.parts
    scores = {
        "before": _score(fixed, moving),
        "affine": _score(fixed, moving, parts[1:]),
        "deformable": _score(fixed, moving, parts),
    }
    written = time.perf_counter()
    with for_bars(console).status("Writing the images and the report"):
        _write(result, scores, folder, devices.describe(target))
    now = time.perf_counter()
    facts = _fold_table(result)
    facts.add_section()
    for name, record in zip(("Moments", "Affine", "Deformable"), result.stages, strict=True):
        facts.add_row(f"{name} stage", f"{record.seconds:.1f} s")
    facts.add_row("Files and report", f"{now - written:.1f} s")
    found: dict[str, Any] = {
        "scores": {stage: score._asdict() for stage, score in scores.items()},
        "jacobian": result.folds._asdict(),
        "doubts": [doubt._asdict() for doubt in result.doubts],
        "stages": [{"name": stage.name, "seconds": stage.seconds} for stage in result.stages],
    }
    return _score_table(scores), facts, found


def _stages(quick: bool) -> tuple[Moments, Affine, Greedy]:
    if quick:
        return Moments(), Affine((4,), (60,)), Greedy((4, 2), (30, 10))
    return Moments(), Affine(), Greedy()


def _score(fixed: Volume, moving: Volume, parts: Sequence[Part] = ()) -> _Scores:
    moved, target = resample(moving, fixed, parts).batched(), fixed.batched()
    brain = target > 0
    other = moving.with_array(np.asarray(moving.array) > 0)
    moved_brain = resample(other, fixed, parts).batched() > 0.5
    return _Scores(
        float(ncc(moved, target)[0, 0]),
        -float(lncc_loss(moved, target, mask=brain)),
        dice(np.asarray(brain), np.asarray(moved_brain)).get(1, 0.0),
    )


def _write(result: Registration, scores: dict[str, _Scores], folder: Path, device: str) -> None:
    write_volume(result.moved, folder / "moved.nii.gz")
    field = result.transform.displacement_field(with_affine=True)
    write_displacement(field, result.fixed, folder / "displacement.nii.gz")
    seconds = sum(record.seconds for record in result.stages)
    write_report(
        result,
        folder / "report.png",
        title="Colin27 registered to ICBM152",
        subtitle=(
            f"LNCC {scores['before'].lncc:.3f} before · {scores['affine'].lncc:.3f} affine · "
            f"{scores['deformable'].lncc:.3f} deformable    |    "
            f"{_percent(result.folds.share)} folds    |    {seconds:.1f} s on the {device}"
        ),
        names=("ICBM152 2009a", "Colin27"),
    )


def _score_table(scores: dict[str, _Scores]) -> Table:
    table = Table(title="Colin27 registered to ICBM152", title_style="bold")
    table.add_column()
    for stage in scores:
        table.add_column(stage, justify="right")
    names = ("NCC", "LNCC in the brain", "Overlap of the brains (Dice)")
    for name, *values in zip(names, *scores.values(), strict=True):
        table.add_row(name, *(f"{value:.4f}" for value in values))
    return table


def _fold_table(result: Registration) -> Table:
    folds = result.folds
    table = fact_table()
    table.add_row("Voxels with Jacobian determinant ≤ 0", _percent(folds.share))
    table.add_row("Smallest determinant", f"{folds.minimum:.3f}")
    return table


def _percent(share: float) -> str:
    return f"{100 * share:.4f} %" if share else "0 %"
