"""``jaxreg compare``: two images in numbers and pictures."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from jaxreg.commands import devices
from jaxreg.commands.compilation import NoCache, keep_compiled
from jaxreg.commands.devices import Device
from jaxreg.commands.doubts import listed
from jaxreg.commands.inputs import naming, read_chain, read_image, refuse_overwriting
from jaxreg.commands.judging import LabelScore, format_score, label_table, read_labels
from jaxreg.commands.timing import fact_table
from jaxreg.registration import image_similarity, resample
from jaxreg.registration.report.page import write_comparison
from jaxreg.registration.report.pictures import (
    BACKGROUND,
    Shown,
    draw_comparison,
    draw_labels,
)
from jaxreg_cli.telling import warn
from regkernels import Volume
from regkernels.files.atomic import atomic_folder
from regkernels.info import describe
from regkernels.maps import Part

__all__ = ["compare"]

_RECORD, _PICTURE, _PAGE = "comparison.json", "comparison.png", "comparison.html"
_FILES = (_RECORD, _PICTURE, _PAGE)

_INSIDE = 1 - 1e-3
"""What a sample of ones is at least where all that it was read from lies in the image."""

_DPI = 110


def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="Image whose grid both are compared on.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Image that is resampled to that grid.")],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="OUT_DIR",
            help=f"Folder for {_RECORD}, {_PICTURE} and {_PAGE}, made if missing. Without it the "
            "numbers are printed alone.",
        ),
    ] = None,
    transform: Annotated[
        list[str] | None,
        typer.Option(
            "--transform",
            "-t",
            metavar="FILE[:inverse]",
            help="Transforms that B goes through, as for `jaxreg apply`.",
        ),
    ] = None,
    labels: Annotated[
        bool,
        typer.Option(
            "--labels", help="A and B hold labels: Dice coefficients and Hausdorff distances."
        ),
    ] = False,
    device: Annotated[Device, typer.Option(help="auto: a GPU if JAX sees one.")] = Device.AUTO,
    no_cache: NoCache = False,
) -> dict[str, Any]:
    """Compare two images, or two label maps, whose grids may differ.

    Of images it tells the global and the local normalised cross-correlation, the mutual information
    and the mean squared difference where both have data; of labels the Dice coefficient and the
    Hausdorff distance of each. The page has both images, their difference, a checkerboard, and for
    images sliders that swipe or fade between them.

    Examples
    --------
    A result of jaxreg register, in numbers and pictures:
    jaxreg compare fixed.nii.gz out/moved.nii.gz -o compared

    Numbers alone, with transforms of any program:
    jaxreg compare fixed.nii.gz moving.nii.gz -t out/warp.nii.gz -t out/affine.tfm

    Label maps, for a script:
    jaxreg compare labels.nii.gz moved_labels.nii.gz --labels --json
    """
    texts = transform or []
    reads: list[tuple[str, Path | str]] = [
        ("A", a),
        ("B", b),
        *(("--transform", text) for text in texts),
    ]
    refuse_overwriting([] if output is None else [output / name for name in _FILES], reads)
    read = read_labels if labels else read_image
    volumes = {}
    for name, path in (("A", a), ("B", b)):
        with naming(name):
            volumes[name] = read(path)
    one, other = volumes["A"], volumes["B"]
    with naming("B"):
        if other.ndim != one.ndim:
            raise ValueError(f"{b}: expected a {one.ndim}-D image as A, got {other.ndim}-D")
        if other.channels != one.channels:
            raise ValueError(f"{b}: expected {one.channels} channels as A, got {other.channels}")
    keep_compiled(None, no_cache)
    inputs = {"A": str(a), "B": str(b), "--transform": texts}
    with contextlib.ExitStack() as stack:
        folder = None
        if output is not None:
            with naming("--output"):
                folder = stack.enter_context(atomic_folder(output, owned=_FILES))
        stack.enter_context(jax.default_device(devices.find(device)))
        parts = read_chain("--transform", texts, one.grid, other.grid)
        compared = _compare_labels if labels else _compare_images
        record, table = compared(one, other, parts, folder, inputs)
        facts = {"inputs": inputs, **record, "versions": describe()}
        if folder is not None:
            (folder / _RECORD).write_text(f"{json.dumps(facts, indent=2)}\n")
    console = Console()
    console.print(table)
    if output is not None:
        for name in sorted(_FILES):
            console.print(output / name, highlight=False, soft_wrap=True, markup=False)
    return facts


def _compare_images(
    one: Volume,
    other: Volume,
    parts: tuple[Part, ...],
    folder: Path | None,
    inputs: dict[str, Any],
) -> tuple[dict[str, Any], Table]:
    moved = resample(other, one, parts)
    # In one channel, as masks are.
    everywhere = Volume.on_grid(other.grid, np.ones(other.shape, np.float32))
    inside = np.asarray(resample(everywhere, one, parts, outside=0).array) >= _INSIDE
    if not inside.any():
        raise ValueError("B: expected an image that overlaps A, got one that lies beside it")
    found = image_similarity(one, moved, inside)
    rows = {
        "NCC": f"{found.ncc:.4f}",
        "LNCC": "-" if math.isnan(found.lncc) else f"{found.lncc:.4f}",
        "Mutual information": f"{found.mutual_information:.4f} nats",
        "Mean squared difference": f"{found.mean_squared_difference:.6g}",
        "Voxels of A that B covers": f"{100 * found.share:.4g} %",
    }
    if folder is not None:
        shown = Shown.of(one, other, (moved,))
        subtitle = "    |    ".join(f"{name} {rows[name]}" for name in list(rows)[:3])
        title, names = _titled(inputs)
        figure = draw_comparison(shown, title=title, subtitle=subtitle, names=names)
        figure.savefig(folder / _PICTURE, dpi=_DPI, facecolor=BACKGROUND)
        tables = {"Numbers": rows, "Inputs": _told(inputs)}
        write_comparison(
            figure,
            folder / _PAGE,
            title=title,
            shown=shown,
            names=names,
            tables=tables,
            dpi=_DPI,
        )
    numbers = {name: None if math.isnan(v) else v for name, v in found._asdict().items()}
    table = fact_table()
    for name, value in rows.items():
        table.add_row(name, value)
    return {"similarity": numbers}, table


def _compare_labels(
    one: Volume,
    other: Volume,
    parts: tuple[Part, ...],
    folder: Path | None,
    inputs: dict[str, Any],
) -> tuple[dict[str, Any], Table]:
    moved = resample(other, one, parts, "labels")
    scores = LabelScore.of_maps(one, moved)
    here, there = ({*np.unique(np.asarray(volume.array)).tolist()} for volume in (one, moved))
    for name, of in (("A", here), ("B", there)):
        missing = [str(label) for label in scores if label not in of]
        if missing:
            warn(f"{name}: no voxel of {listed('label', missing)} on the grid of A")
    both = [score for label, score in scores.items() if label in here & there]
    mean = LabelScore.mean(both)
    rows = {str(label): (score,) for label, score in scores.items()}
    rows["mean over labels that both have"] = (mean,)
    cells = label_table(("",), rows)
    if folder is not None:
        subtitle = f"mean over labels that both have: Dice {format_score(0, mean.dice)}"
        title, names = _titled(inputs)
        figure = draw_labels(one, moved, title=title, subtitle=subtitle, names=names)
        figure.savefig(folder / _PICTURE, dpi=_DPI, facecolor=BACKGROUND)
        scored, tables = {"Labels": cells}, {"Inputs": _told(inputs)}
        write_comparison(
            figure, folder / _PAGE, title=title, scores=scored, tables=tables, dpi=_DPI
        )
    table = Table()
    for number, name in enumerate(cells[0]):
        table.add_column(name, justify="right" if number else "left")
    for row in cells[1:]:
        table.add_row(*row)
    record = {
        "mean over labels that both have": mean.record(),
        "each": [
            {
                "label": label,
                "missing in": next(
                    (n for n, of in (("A", here), ("B", there)) if label not in of), None
                ),
                **score.record(),
            }
            for label, score in scores.items()
        ],
    }
    return {"labels": record}, table


def _titled(inputs: dict[str, Any]) -> tuple[str, tuple[str, str]]:
    """Return a title, and the names of both files."""
    names = Path(inputs["A"]).name, Path(inputs["B"]).name
    return " and ".join(names), names


def _told(inputs: dict[str, Any]) -> dict[str, str]:
    told = {name: " ".join(v) if isinstance(v, list) else v for name, v in inputs.items()}
    return {name: text for name, text in told.items() if text}
