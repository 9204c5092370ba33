"""Registration with its progress on the console."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from jaxreg.registration import Progress, Registration, Stage, register
from jaxreg.registration.progress import Callback
from jaxreg.registration.stages.deformable import Deformable
from jaxreg_cli.telling import detail, unlogged
from regkernels import Volume

__all__ = ["for_bars", "register_watched"]


def register_watched(
    fixed: Volume, moving: Volume, stages: Sequence[Stage], console: Console, **options: Any
) -> Registration:
    """Run `register`, with a bar for each stage on a terminal and a line for each level elsewhere.

    Parameters
    ----------
    fixed, moving, stages
        As for `register`.
    console
        Where to show it.
    **options
        Further arguments of `register`.

    Returns
    -------
    Registration
        What `register` returns.
    """
    # Stages are told apart by their names: of two with one name the latter takes over.
    by_name = {stage.name: stage for stage in stages}
    if console.is_terminal:
        columns = (
            TextColumn("{task.description:<12}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[note]}", style="dim"),
            TimeElapsedColumn(),
        )
        with Bars(*columns, console=for_bars(console)) as bars:
            tasks = {
                name: bars.add_task(name.capitalize(), total=1, start=False, note="waiting")
                for name in by_name
            }

            def advance(block: Progress, tell: Callback) -> None:
                tell(block)
                task = tasks[block.stage]
                bars.start_task(task)
                bars.update(
                    task,
                    total=block.total,
                    completed=block.done,
                    note=_note(by_name[block.stage], block),
                )

            with _lines(by_name, detail) as tell:
                callback = functools.partial(advance, tell=tell)
                return register(fixed, moving, stages, callback=callback, **options)

    def show(line: str) -> None:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    with _lines(by_name, show) as tell:
        return register(fixed, moving, stages, callback=tell, **options)


def for_bars(console: Console) -> Console:
    """Return a console for what moves; a log hears nothing of that."""
    stream = unlogged(console.file)
    return console if stream is console.file else Console(file=stream)


@contextmanager
def _lines(by_name: Mapping[str, Stage], show: Callable[[str], None]) -> Iterator[Callback]:
    """Give what shows a line for each level, when its last block has ended."""
    last: list[Progress] = []

    def end_level() -> None:
        previous = last.pop()
        note = _note(by_name[previous.stage], previous)
        show(f"{previous.stage}: {note}, iteration {previous.done} of {previous.total}")

    def tell(block: Progress) -> None:
        if last and (block.stage, block.scale) != (last[0].stage, last[0].scale):
            end_level()
        last[:] = [block]

    yield tell
    if last:
        end_level()


def _note(stage: Stage, block: Progress) -> str:
    loss = float(np.asarray(block.losses)[-1])  # waits for the block
    metric = stage.for_scale(block.scale).metric
    held_back = isinstance(stage, Deformable) and stage.regularisation is not None
    penalty = " with penalty" if held_back else ""
    where = f" on {block.devices} devices" if block.devices > 1 else ""
    return f"1/{block.scale:g} resolution{where}, {metric.format_loss(loss)}{penalty}"
