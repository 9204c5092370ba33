"""The ``jaxreg`` command: what a shell starts, and how it ends when something is wrong."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

__all__ = ["main"]

_NEEDED = ("jax", "optax", "SimpleITK", "typer", "rich", "matplotlib")

_BAD_INPUT, _FAILED, _INTERRUPTED = 2, 1, 130


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and leave with its exit status.

    Bad input of any kind is one line on stderr and exit status 2; so is what memory does not hold,
    with exit status 1, and an interrupt, with 130. A traceback is a bug of ours.

    Parameters
    ----------
    arguments
        Without the program's name; the process's own by default.
    """
    missing = [package for package in _NEEDED if importlib.util.find_spec(package) is None]
    if missing:
        _fail(f"the command line needs {', '.join(missing)}: pip install 'regkernels[jax,cli]'")
    _ask_for_the_same_bits()
    try:
        import typer

        from jaxreg.commands import app

        try:
            raise SystemExit(app(args=arguments, prog_name="jaxreg", standalone_mode=False))
        except typer.Abort:
            raise KeyboardInterrupt from None
    except KeyboardInterrupt:
        _fail("interrupted", _INTERRUPTED)
    except (OSError, ValueError) as error:
        _fail(str(error))
    except Exception as error:
        if _is_lack_of_memory(error):
            _fail(f"out of memory: {error}", _FAILED)
        # What the parser finds wrong with the arguments; its class moved between typer's versions.
        if not hasattr(error, "format_message"):
            raise
        if not error.format_message():  # the help was asked for, by giving no arguments
            raise SystemExit(_BAD_INPUT) from None
        _fail(error.format_message())


def _ask_for_the_same_bits() -> None:
    """Make the same command give the same bits on a GPU, too.

    There XLA otherwise adds up sums of its own in an order that differs from run to run, and
    chooses algorithms by timing them. It reads the variable when it starts; what the user sets in
    it comes later and so wins. It may also be the name of a file with flags, which is left alone.
    """
    flags = os.environ.get("XLA_FLAGS", "").strip()
    if (flags and not flags.startswith("-")) or "xla_gpu_deterministic_ops" in flags:
        return
    os.environ["XLA_FLAGS"] = f"--xla_gpu_deterministic_ops=true {flags}".strip()


def _is_lack_of_memory(error: Exception) -> bool:
    import jax

    return isinstance(error, MemoryError) or (
        isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
    )


def _fail(message: str, status: int = _BAD_INPUT) -> NoReturn:
    print(f"jaxreg: error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(status)
