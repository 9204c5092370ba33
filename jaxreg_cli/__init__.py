"""What a shell starts as ``jaxreg``.

It is beside the package `jaxreg`, of which no part can be imported without JAX: what needs nothing
but the names of the commands, as ``jaxreg --help`` does, answers at once. And this file imports
hardly anything, so that a signal finds a handler as soon as there is a process.
"""

from __future__ import annotations

from jaxreg_cli.signals import end_by_signals

TYPE_CHECKING = False  # as `typing` has it, which takes longer to import than all of this
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import NoReturn

__all__ = ["main", "run_as_process"]


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and leave with its exit status; see `jaxreg_cli.running.main`."""
    from jaxreg_cli.running import main

    main(arguments)


def run_as_process() -> NoReturn:
    """Run the command line of this process, and end the process with it.

    See `jaxreg_cli.running.run_as_process`.
    """
    end_by_signals()
    from jaxreg_cli.running import run_as_process

    run_as_process()
