"""``jaxreg template``: the mean shape and the mean intensity of several images."""

from __future__ import annotations

import contextlib
import enum
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table

from jaxreg.commands import devices
from jaxreg.commands.command import Command
from jaxreg.commands.compilation import Cache, NoCache, keep_compiled
from jaxreg.commands.devices import Device
from jaxreg.commands.doubts import tell_doubts
from jaxreg.commands.inputs import (
    naming,
    parse_clip,
    parse_spacing,
    read_image,
    refuse_overwriting,
)
from jaxreg.commands.progress_bars import for_bars
from jaxreg.commands.stage_options import Preset, choose_stages, for_pairs
from jaxreg.commands.timing import Stopwatch, fact_table
from jaxreg.commands.transform_files import (
    AFFINE,
    INVERSE_WARP,
    WARP,
    chains,
    write_transform_files,
)
from jaxreg.registration import FolderStore, Stage, Template, TemplateProgress, build_template
from regkernels import Grid, Volume, read_grid, read_volume, write_volume
from regkernels.files.atomic import atomic_folder
from regkernels.files.images import check_image_grid
from regkernels.info import describe

__all__ = ["TemplateCommand", "template"]

_TEMPLATE = "template.nii.gz"
_COVERAGE = "coverage.nii.gz"
_LABELS = "labels.nii.gz"
_MOVED = "moved.nii.gz"
_RECORD = "template.json"
_FILES = (_TEMPLATE, _COVERAGE, _LABELS, _RECORD)
_FILES_OF_IMAGE = (AFFINE, WARP, INVERSE_WARP, _MOVED, _LABELS)
_UNFINISHED = "unfinished"


class Start(enum.StrEnum):
    """How the images lie before anything is registered."""

    CENTRES = "centres"
    HEADERS = "headers"


class TemplateCommand(Command):
    """The subcommand, whose option ``--labels`` takes all files that follow it."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Repeat the option before each file, as the parser wants it."""
        found: list[str] = []
        many, files = False, 0
        for argument in [*args, "-"]:  # at the end, too, it is seen whether files came
            if many and argument.startswith("-"):
                if files == 0:
                    raise ValueError("--labels: expected label maps after it, got none")
                many = False
            if argument == "--labels":
                many, files = True, 0
                continue
            files += 1
            found += ["--labels", argument] if many else [argument]
        return super().parse_args(ctx, found[:-1])


def template(
    images: Annotated[
        list[Path],
        typer.Argument(metavar="IMAGES...", help="Two images or more, 2-D or 3-D."),
    ],
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
            help="Stages of each registration, as for `jaxreg register`. By default those of the "
            "preset.",
        ),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="How images are compared, as for `jaxreg register`."),
    ] = None,
    effort: Annotated[
        Preset, typer.Option("--preset", help="As for `jaxreg register`.")
    ] = Preset.DEFAULT,
    rounds: Annotated[
        int, typer.Option(min=1, help="How often all images are registered by all stages.")
    ] = 4,
    linear_rounds: Annotated[
        int,
        typer.Option(min=0, help="How often before by those stages alone that do not deform."),
    ] = 1,
    reference: Annotated[
        Path | None,
        typer.Option(
            "--reference",
            "-r",
            help="Image whose grid the template gets; its intensities count nothing. By default "
            "the grid of the images if it is one, else a mean of theirs.",
        ),
    ] = None,
    spacing: Annotated[
        str | None,
        typer.Option(
            metavar="MM", help="Voxel size of a mean grid: a number, or one for each axis, x first."
        ),
    ] = None,
    start: Annotated[
        Start,
        typer.Option(
            help="centres: begin with the centres of mass brought together; headers: where the "
            "files say that the images lie."
        ),
    ] = Start.CENTRES,
    normalise: Annotated[
        bool,
        typer.Option(
            help="Scale intensities, so that background and median are the same in all images."
        ),
    ] = True,
    labels: Annotated[
        list[Path] | None,
        typer.Option(
            "--labels",
            metavar="FILES...",
            help=f"A label map for each image, in their order; {_LABELS} has what most say.",
        ),
    ] = None,
    clip: Annotated[
        str,
        typer.Option(
            metavar="LOW,HIGH",
            help="Which intensities the metrics see, as for `jaxreg register`: outliers, two "
            "quantiles or none.",
        ),
    ] = "outliers",
    device: Annotated[Device, typer.Option(help="auto: a GPU if JAX sees one.")] = Device.AUTO,
    cache: Cache = None,
    no_cache: NoCache = False,
) -> dict[str, Any]:
    r"""Build the template of several images: their mean shape and their mean intensity.

    Writes template.nii.gz; coverage.nii.gz, the share of the images that has data at each voxel;
    labels.nii.gz, if there are label maps; template.json, with settings, versions, memory and how
    far each round has gone; and for each image a folder with its transform (affine.tfm,
    warp.nii.gz, inverse_warp.nii.gz, from the template to the image) and the image in the
    template's space, moved.nii.gz. While it runs OUT_DIR/unfinished keeps what is done: after an
    interruption the same command goes on from there.

    Examples
    --------
    Of three people:
    jaxreg template a.nii.gz b.nii.gz c.nii.gz -o out

    With labels of all of them, and voxels of 1.5 mm:
    jaxreg template a.nii.gz b.nii.gz c.nii.gz -o out --spacing 1.5 \
      --labels a_labels.nii.gz b_labels.nii.gz c_labels.nii.gz

    A look, without deformations:
    jaxreg template a.nii.gz b.nii.gz -o out --preset affine --rounds 2
    """
    stopwatch = Stopwatch()
    clipping, sizes = parse_clip(clip), parse_spacing(spacing)
    if len(images) < 2:
        raise ValueError(f"IMAGES: expected two or more, got {len(images)}")
    if labels is not None and len(labels) != len(images):
        raise ValueError(
            f"--labels: expected {len(images)} label maps, one for each image, got {len(labels)}"
        )
    folders = [output / name for name in _folder_names(images)]
    writes = [output / name for name in _FILES]
    writes += [folder / name for folder in folders for name in _FILES_OF_IMAGE]
    reads = [("IMAGES", path) for path in images] + [("--labels", path) for path in labels or []]
    reads += [] if reference is None else [("--reference", reference)]
    refuse_overwriting(writes, reads)
    ndim = _check_files(images, labels, reference)
    grid: Grid | None = None
    if reference is not None:
        with naming("--reference"):
            grid = read_grid(reference)
            check_image_grid(grid, output / _TEMPLATE)
    target = devices.find(device)
    keep_compiled(cache, no_cache)
    console = Console()
    store = FolderStore(output / _UNFINISHED)
    label_maps = None if labels is None else _Files("--labels", labels)
    with jax.default_device(target):
        chosen = choose_stages(stages, metric, effort, ndim, target, console)
        chosen = for_pairs(chosen, metric, None, [1])
        with naming("--output"):
            output.mkdir(parents=True, exist_ok=True)
        with _telling_how_to_go_on(output / _UNFINISHED), _watched(console) as callback:
            result = build_template(
                _Files("IMAGES", images),
                chosen,
                rounds=rounds,
                linear_rounds=linear_rounds,
                grid=grid,
                spacing=sizes,
                start=start.value,
                normalise=normalise,
                clip=clipping,
                names=[str(path) for path in images],
                store=store,
                callback=callback,
            )
            for number, folder in enumerate(folders):
                _write_image(result, number, _Files("IMAGES", images), label_maps, folder)
            with (
                naming("--output"),
                atomic_folder(output, owned=_FILES) as beside,
            ):
                write_volume(result.volume, beside / _TEMPLATE)
                write_volume(result.coverage, beside / _COVERAGE)
                if label_maps is not None:
                    write_volume(result.consensus(label_maps), beside / _LABELS)
                settings = {
                    "rounds": rounds,
                    "linear rounds": linear_rounds,
                    "reference": None if reference is None else str(reference),
                    "start": start.value,
                    "normalise": normalise,
                    "clip": clipping,
                }
                facts = {**describe(["jax"]), "device": devices.describe(target)}
                record = {
                    **_record(result, settings, chosen, folders, labels, facts),
                    "seconds": stopwatch.seconds(),
                    "peak memory (MB)": devices.peak_memory(),
                }
                (beside / _RECORD).write_text(f"{json.dumps(record, indent=2)}\n")
                written = sorted(path.name for path in beside.iterdir())
    store.clear()
    console.print(_summary(result, stopwatch, target))
    for name, doubts in zip(result.names, result.doubts, strict=True):
        tell_doubts(doubts, name)
    for path in [*(output / name for name in written), *folders]:
        console.print(path, highlight=False, soft_wrap=True, markup=False)
    return record


class _Files(Sequence[Volume]):
    """The images of files, each read when it is asked for."""

    def __init__(self, argument: str, paths: Sequence[Path]) -> None:
        self._argument, self._paths = argument, paths

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: Any) -> Any:
        with naming(self._argument):
            return read_image(self._paths[index])


def _folder_names(images: Sequence[Path]) -> list[str]:
    """Name a folder for each image: numbers tell apart files of one name in several folders."""
    digits = max(3, len(str(len(images))))
    return [
        f"{number:0{digits}d}_{path.name.removesuffix('.gz').rsplit('.', 1)[0]}"
        for number, path in enumerate(images, 1)
    ]


def _check_files(
    images: Sequence[Path], labels: Sequence[Path] | None, reference: Path | None
) -> int:
    """See that files can be read and have one dimension, before hours of work; return that."""
    ndim = 0
    given = [("IMAGES", path) for path in images]
    given += [] if reference is None else [("--reference", reference)]
    for argument, path in given + [("--labels", path) for path in labels or []]:
        with naming(argument):
            grid = read_grid(path)
            ndim = ndim or grid.ndim
            if grid.ndim != ndim:
                raise ValueError(f"{path}: expected a {ndim}-D image, got {grid.ndim}-D")
            if argument == "--labels" and (np.asarray(read_volume(path).array) % 1).any():
                raise ValueError(f"{path}: expected integers, got fractions")
    return ndim


@contextlib.contextmanager
def _telling_how_to_go_on(folder: Path) -> Iterator[None]:
    """Put errors about the store, and interruptions, into the words of the command line."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"jaxreg: {folder} keeps what is done: the same command goes on", file=sys.stderr)
        raise
    except ValueError as error:
        argument, _, complaint = str(error).partition(": ")
        if argument != "store":
            raise
        raise ValueError(f"--output: {complaint}") from error


@contextlib.contextmanager
def _watched(console: Console) -> Iterator[Callable[[TemplateProgress], None]]:
    """Give what shows progress: two bars on a terminal, a line for each registration elsewhere."""
    if not console.is_terminal:

        def tell(told: TemplateProgress) -> None:
            if told.block is None:
                console.print(_place(told), highlight=False, markup=False, soft_wrap=True)

        yield tell
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}", style="dim"),
        TimeElapsedColumn(),
    )
    with Bars(*columns, console=for_bars(console)) as bars:
        whole = bars.add_task("Registrations", total=1, note="")
        one = bars.add_task("Iterations", total=1, note="waiting")

        def show(told: TemplateProgress) -> None:
            before = (told.round - 1) * told.images + told.image
            bars.update(
                whole,
                total=told.rounds * told.images,
                completed=before - (told.block is not None),
                note=_place(told),
            )
            if told.block is not None:
                block = told.block
                bars.update(one, total=block.total, completed=block.done, note=block.stage)

        yield show


def _place(told: TemplateProgress) -> str:
    return f"round {told.round} of {told.rounds}, image {told.image} of {told.images}: {told.name}"


def _write_image(
    result: Template,
    number: int,
    images: Sequence[Volume],
    labels: Sequence[Volume] | None,
    folder: Path,
) -> None:
    transform = result.transform(number).with_inverse()
    with naming("--output"), atomic_folder(folder, owned=_FILES_OF_IMAGE) as beside:
        write_transform_files(transform, beside)
        write_volume(transform.apply(images[number]), beside / _MOVED)
        if labels is not None:
            moved = transform.apply(labels[number], interpolation="labels")
            write_volume(moved, beside / _LABELS)


def _record(
    result: Template,
    settings: dict[str, Any],
    stages: tuple[Stage, ...],
    folders: Sequence[Path],
    labels: Sequence[Path] | None,
    facts: dict[str, str],
) -> dict[str, Any]:
    """Return what is worth keeping beside the images, for JSON."""
    images = []
    for number, folder in enumerate(folders):
        there, back = chains(result.transform(number))
        images.append(
            {
                "image": result.names[number],
                "labels": None if labels is None else str(labels[number]),
                "folder": folder.name,
                "template to image": there,
                "image to template": back,
                "doubts": [doubt._asdict() for doubt in result.doubts[number]],
            }
        )
    return {
        "images": images,
        "settings": settings,
        "stages": [{"name": stage.name, "settings": stage.record()} for stage in stages],
        "rounds": [record._asdict() for record in result.rounds],
        "versions": facts,
    }


def _summary(result: Template, stopwatch: Stopwatch, target: jax.Device) -> Table:
    table = fact_table()
    for record in result.rounds:
        table.add_row(
            f"Round {record.number}: {', '.join(record.stages)}",
            f"moved {record.motion:.2f} mm, bent {record.displacement:.2f} mm, "
            f"changed {100 * record.change:.2g} %",
        )
    table.add_section()
    stopwatch.add_rows(table, devices.describe(target))
    return table
