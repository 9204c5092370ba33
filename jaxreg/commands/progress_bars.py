"""Registration with its progress on the console."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from jaxreg.registration import Progress, Registration, Stage, register
from jaxreg.registration.stages.deformable import Deformable
from regkernels import Volume

__all__ = ["register_watched"]


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
        with Bars(*columns, console=console) as bars:
            tasks = {
                name: bars.add_task(name.capitalize(), total=1, start=False, note="waiting")
                for name in by_name
            }

            def advance(block: Progress) -> None:
                task = tasks[block.stage]
                bars.start_task(task)
                bars.update(
                    task,
                    total=block.total,
                    completed=block.done,
                    note=_note(by_name[block.stage], block),
                )

            return register(fixed, moving, stages, callback=advance, **options)

    last: list[Progress] = []

    def tell(block: Progress | None) -> None:
        """Print the block before, if it was the last of its level."""
        if last:
            previous = last.pop()
            if block is None or (block.stage, block.scale) != (previous.stage, previous.scale):
                note = _note(by_name[previous.stage], previous)
                line = f"{previous.stage}: {note}, iteration {previous.done} of {previous.total}"
                console.print(line, highlight=False, markup=False, soft_wrap=True)
        if block is not None:
            last.append(block)

    result = register(fixed, moving, stages, callback=tell, **options)
    tell(None)
    return result


def _note(stage: Stage, block: Progress) -> str:
    loss = float(np.asarray(block.losses)[-1])  # waits for the block
    metric = stage.for_scale(block.scale).metric
    held_back = isinstance(stage, Deformable) and stage.regularisation is not None
    penalty = " with penalty" if held_back else ""
    return f"1/{block.scale:g} resolution, {metric.format_loss(loss)}{penalty}"
