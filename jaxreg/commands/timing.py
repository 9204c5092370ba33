"""How long a command took, as the last rows of its table."""

from __future__ import annotations

import time

from rich.table import Table

from jaxreg.commands.compilation import compile_seconds

__all__ = ["Stopwatch", "fact_table"]


class Stopwatch:
    """Counts the seconds of a command from when it is made, and those of XLA's compiler apart."""

    def __init__(self) -> None:
        self._began, self._compiled = time.perf_counter(), compile_seconds()

    def add_rows(self, table: Table, device: str) -> None:
        """Tell what it has counted until now, and on which device that was, by its name."""
        seconds, compiling = time.perf_counter() - self._began, compile_seconds() - self._compiled
        table.add_row("Total", f"{seconds:.1f} s", style="bold")
        table.add_row("of which XLA compilation", f"{compiling:.1f} s", style="dim")
        table.add_row("Device", device)


def fact_table() -> Table:
    """Return an empty table for names with their values to the right."""
    table = Table(show_header=False)
    table.add_column()
    table.add_column(justify="right")
    return table
