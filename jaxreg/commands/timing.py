"""How long a command took, as the last rows of its table and for its record."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.table import Table

from jaxreg.commands.compilation import compile_seconds
from jaxreg_cli.telling import detail

__all__ = ["Stopwatch", "fact_table"]


class Stopwatch:
    """Counts the seconds of a command from when it is made, and those of compilation apart."""

    def __init__(self) -> None:
        self._began, self._compiled = time.perf_counter(), compile_seconds()
        self._phases: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what is done meanwhile, without its compilation, as a phase of the command."""
        began, compiled = time.perf_counter(), compile_seconds()
        try:
            yield
        finally:
            seconds = time.perf_counter() - began - (compile_seconds() - compiled)
            self._phases[name] = self._phases.get(name, 0.0) + seconds
            detail(f"{name}: {seconds:.3f} s, without what it compiled")

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each phase, of compilation, and of all until now, rounded."""
        seconds, compiling = self._passed()
        found = {**self._phases, "compilation": compiling, "total": seconds}
        return {name: round(value, 3) for name, value in found.items()}

    def add_rows(self, table: Table, device: str) -> None:
        """Tell what it has counted until now, and on which device that was, by its name."""
        seconds, compiling = self._passed()
        table.add_row("Total", f"{seconds:.1f} s", style="bold")
        table.add_row("of which compilation", f"{compiling:.1f} s", style="dim")
        table.add_row("Device", device)

    def _passed(self) -> tuple[float, float]:
        return time.perf_counter() - self._began, compile_seconds() - self._compiled


def fact_table() -> Table:
    """Return an empty table for names with their values to the right."""
    table = Table(show_header=False)
    table.add_column()
    table.add_column(justify="right")
    return table
