"""The files of a registration: which are wanted, and their writing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from jaxreg.commands.timing import Stopwatch
from jaxreg.commands.transform_files import AFFINE, INVERSE_WARP, WARP
from jaxreg.registration import Registration, Transform
from jaxreg.registration.intensities import rehearse_background
from jaxreg.registration.programs import rehearse
from jaxreg_cli.telling import detail
from regkernels import Volume, write_affine, write_composite, write_displacement, write_volume

__all__ = [
    "FILES",
    "FIXED_MOVED",
    "MOVED",
    "RECORD",
    "REPORT",
    "Composite",
    "Outputs",
    "choose_outputs",
    "rehearse_images",
    "write_images",
]

MOVED = "moved.nii.gz"
FIXED_MOVED = "fixed_moved.nii.gz"
RECORD = "registration.json"
REPORT = "report.html"

_COMPOSITE = "composite.h5"
_INVERSE_COMPOSITE = "inverse_composite.h5"
_TOTAL_WARP = "total_warp.nii.gz"

_OUTPUTS: Mapping[str, tuple[str, ...]] = {
    "transform": (AFFINE, WARP),
    "inverse": (AFFINE, INVERSE_WARP),
    "moved": (MOVED,),
    "fixed_moved": (FIXED_MOVED,),
    "record": (RECORD,),
    "report": (REPORT,),
    "composite": (_COMPOSITE, _INVERSE_COMPOSITE, _TOTAL_WARP),
}
FILES = tuple(dict.fromkeys(name for files in _OUTPUTS.values() for name in files))
"""All that a registration may write."""

Outputs = Annotated[
    str | None,
    typer.Option(
        "--outputs",
        metavar="NAME,...",
        help=f"What to write, with commas between: {', '.join(_OUTPUTS)}. By default all but the "
        "last two.",
    ),
]
Composite = Annotated[
    bool,
    typer.Option(
        "--composite",
        help=f"Also write {_COMPOSITE} and {_INVERSE_COMPOSITE}, which hold all of the transform "
        f"and of its inverse for ITK, ANTs and 3D Slicer, and {_TOTAL_WARP}, one displacement "
        "field with the affine in it.",
    ),
]


def choose_outputs(text: str | None, *, report: bool, composite: bool) -> frozenset[str]:
    """Return the names of the files that are wanted.

    Parameters
    ----------
    text
        What ``--outputs`` says.
    report
        Whether ``--report`` was said, which adds the report.
    composite
        Whether ``--composite`` was said, likewise.

    Raises
    ------
    ValueError
        For an output that there is not, or for none.
    """
    more = {"report": report, "composite": composite}
    wanted = [name for name in _OUTPUTS if name not in more]
    if text is not None:
        wanted = [name.strip() for name in text.split(",")]
        unknown = [name for name in wanted if name not in _OUTPUTS]
        if unknown:
            raise ValueError(
                f"--outputs: expected some of {', '.join(_OUTPUTS)}, got {unknown[0]!r}"
            )
    wanted += [name for name, is_wanted in more.items() if is_wanted]
    return frozenset(file for name in wanted for file in _OUTPUTS[name])


def rehearse_images(
    fixed: Volume, moving: Volume, wanted: frozenset[str], displacement: Any, inverse: Any
) -> None:
    """Have the programs of `write_images` compiled, while those of the stages run.

    Parameters
    ----------
    fixed, moving
        The images.
    wanted
        The files.
    displacement, inverse
        The shapes of the displacement that will be found and of its inverse, or `None`.
    """
    matrix = np.diag([*[2.0] * fixed.ndim, 1.0])  # any that is not the identity

    def result(displacement: Any, inverse: Any) -> Registration:
        transform = Transform(fixed.grid, matrix, displacement, inverse)
        return Registration(fixed, moving, transform, (), outside=0.0)

    def rehearse_one(ask: Callable[[Registration], Any]) -> None:
        rehearse(lambda *fields: ask(result(*fields)), displacement, inverse)

    if displacement is not None:
        rehearse_one(lambda found: found.transform.displacement_field())
        rehearse_one(lambda found: found.jacobian)
        rehearse_one(lambda found: found.inverse_residual)
    for volume in (fixed, moving):
        rehearse_background((1, volume.channels, *volume.shape))
    if MOVED in wanted or REPORT in wanted:
        rehearse_one(lambda found: found.moved)
    if FIXED_MOVED in wanted:
        rehearse_one(lambda found: found.fixed_moved)
    rehearse_one(lambda found: found.doubts)


def write_images(
    result: Registration, wanted: frozenset[str], folder: Path | None, stopwatch: Stopwatch
) -> None:
    """Write the transform and the images of a registration into a folder, if there is one.

    They are compressed and written while the next of them, and what else the record tells of the
    result, is computed. Where several processes run together all compute, and one has a folder.
    """
    if folder is None:
        for _ in _files(result, wanted):
            pass
        _ = result.folds, result.inverse_residual, result.doubts
        return
    with ThreadPoolExecutor() as pool:
        with stopwatch.phase("results"):
            writing = [
                pool.submit(_write, write, folder / name) for name, write in _files(result, wanted)
            ]
            # What is computed when it is first asked for: the record, or the summary, tells it.
            _ = result.folds, result.inverse_residual, result.doubts
        with stopwatch.phase("writing"):
            for file in writing:
                file.result()


def _write(write: Callable[[Path], None], path: Path) -> None:
    began = time.perf_counter()
    write(path)
    size, seconds = path.stat().st_size / 1e6, time.perf_counter() - began
    detail(f"wrote {path.name}: {size:.1f} MB in {seconds:.3f} s")


def _files(
    result: Registration, wanted: frozenset[str]
) -> Iterator[tuple[str, Callable[[Path], None]]]:
    """Return what is wanted, each computed when it is asked for, with what writes it.

    It is computed here, because a device that is the default is that of one thread.
    """
    transform = result.transform
    if AFFINE in wanted:
        yield AFFINE, lambda path: write_affine(transform.matrix, path)
    if transform.displacement is not None:
        if WARP in wanted:
            there = transform.displacement_field()
            yield WARP, lambda path: write_displacement(there, transform.grid, path)
        if INVERSE_WARP in wanted:
            back = transform.inverse_displacement_field()
            yield INVERSE_WARP, lambda path: write_displacement(back, transform.grid, path)
    if _COMPOSITE in wanted:
        there_parts, back_parts = transform.parts, transform.inverse_parts
        yield _COMPOSITE, lambda path: write_composite(there_parts, path)
        yield _INVERSE_COMPOSITE, lambda path: write_composite(back_parts, path)
        total = transform.displacement_field(with_affine=True)
        yield _TOTAL_WARP, lambda path: write_displacement(total, transform.grid, path)
    if REPORT in wanted:  # which shows it
        _ = result.moved
    if MOVED in wanted:
        moved = result.moved
        yield MOVED, lambda path: write_volume(moved, path)
    if FIXED_MOVED in wanted:
        fixed_moved = result.fixed_moved
        yield FIXED_MOVED, lambda path: write_volume(fixed_moved, path)
