"""The ``jaxreg`` command: what a shell starts, and how it ends when something is wrong."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from typing import NoReturn

__all__ = ["main"]

_NEEDED = ("jax", "optax", "SimpleITK", "typer", "rich", "matplotlib")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and leave with its exit status.

    Bad input of any kind is one line on stderr and exit status 2.

    Parameters
    ----------
    arguments
        Without the program's name; the process's own by default.
    """
    missing = [package for package in _NEEDED if importlib.util.find_spec(package) is None]
    if missing:
        _fail(f"the command line needs {', '.join(missing)}: pip install 'regkernels[jax,cli]'")

    import typer

    from jaxreg.commands import app

    try:
        raise SystemExit(app(args=arguments, prog_name="jaxreg", standalone_mode=False))
    except (OSError, ValueError) as error:
        _fail(str(error))
    except typer.Abort:
        raise SystemExit(130) from None
    except Exception as error:
        # What the parser finds wrong with the arguments; its class moved between typer's versions.
        if not hasattr(error, "format_message"):
            raise
        _fail(error.format_message())


def _fail(message: str) -> NoReturn:
    print(f"jaxreg: error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)
