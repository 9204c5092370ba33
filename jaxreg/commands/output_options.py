"""The options ``--quiet`` and ``--json``, which every subcommand has."""

from __future__ import annotations

import functools
import inspect
import io
import json
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from typing import Annotated, Any

import typer

__all__ = ["with_output_options"]

_OPTIONS: dict[str, Any] = {
    "quiet": Annotated[
        bool,
        typer.Option("--quiet", help="Print nothing but warnings and errors, which are on stderr."),
    ],
    "as_json": Annotated[
        bool, typer.Option("--json", help="Print what was found as JSON, and nothing else.")
    ],
}


def with_output_options(function: Callable[..., Any]) -> Callable[..., None]:
    """Add ``--quiet`` to a subcommand, and ``--json`` if it returns what can be printed so."""
    signature = inspect.signature(function, eval_str=True)
    names = ["quiet"] if signature.return_annotation is None else [*_OPTIONS]

    @functools.wraps(function)
    def told(*arguments: Any, **options: Any) -> None:
        asked = {name: options.pop(name) for name in names}
        silent = redirect_stdout(io.StringIO()) if any(asked.values()) else nullcontext()
        with silent:
            found = function(*arguments, **options)
        if asked.get("as_json"):
            print(json.dumps(found, indent=2))

    more = [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=_OPTIONS[name]
        )
        for name in names
    ]
    parameters = [*signature.parameters.values(), *more]
    told.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=parameters, return_annotation=None
    )
    told.__annotations__ = {x.name: x.annotation for x in parameters} | {"return": None}
    return told
