"""The options that every subcommand has: how much it tells, and where."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from jaxreg.commands.compilation import compile_seconds
from jaxreg.commands.devices import peak_memory
from jaxreg_cli.telling import detail, silence, start_telling, wants_details

__all__ = ["with_output_options"]

_OPTIONS: dict[str, tuple[Any, Any]] = {
    "quiet": (
        Annotated[
            bool,
            typer.Option(
                "--quiet", help="Print nothing but warnings and errors, which are on stderr."
            ),
        ],
        False,
    ),
    "verbose": (
        Annotated[
            bool,
            typer.Option(
                "--verbose",
                help="Say on stderr what happens: sizes, devices, programs compiled, times.",
            ),
        ],
        False,
    ),
    "log": (
        Annotated[
            Path | None,
            typer.Option(
                "--log",
                metavar="FILE",
                help="Add all that is printed, and what --verbose says, to a file, with times.",
            ),
        ],
        None,
    ),
    "as_json": (
        Annotated[
            bool, typer.Option("--json", help="Print what was found as JSON, and nothing else.")
        ],
        False,
    ),
}


def with_output_options(function: Callable[..., Any]) -> Callable[..., None]:
    """Add these options to a subcommand, which returns what ``--json`` prints."""
    signature = inspect.signature(function, eval_str=True)

    @functools.wraps(function)
    def told(*arguments: Any, **options: Any) -> None:
        asked = {name: options.pop(name) for name in _OPTIONS}
        start_telling(asked["verbose"], asked["log"])
        with silence() if asked["quiet"] or asked["as_json"] else nullcontext():
            found = function(*arguments, **options)
        if wants_details():
            used = ", ".join(f"{most:.0f} MB of the {name}" for name, most in peak_memory().items())
            detail(f"programs took {compile_seconds():.3f} s; at most {used} were used")
        if asked["as_json"]:
            print(json.dumps(found, indent=2))

    more = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
        for name, (kind, default) in _OPTIONS.items()
    ]
    parameters = [*signature.parameters.values(), *more]
    told.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=parameters, return_annotation=None
    )
    told.__annotations__ = {x.name: x.annotation for x in parameters} | {"return": None}
    return told
