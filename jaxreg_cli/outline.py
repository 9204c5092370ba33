"""The ``jaxreg`` command without its subcommands, of which it knows what they are for and take."""

from __future__ import annotations

import enum
import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from jaxreg_cli.examples import WithExamples

__all__ = ["OPTIONS", "SUBCOMMANDS", "completing_app", "describing_app", "empty_app"]

SUBCOMMANDS: Mapping[str, str] = {
    "register": "Register MOVING to FIXED, or many pairs.",
    "template": "Build the template of several images: their mean shape and their mean intensity.",
    "motion": "Align the frames of a series in time, rigidly by default.",
    "apply": "Resample IMAGE onto the grid of a reference, through any number of transforms.",
    "apply-points": "Send points through any number of transforms.",
    "invert": "Invert an affine, or a displacement field on its own grid.",
    "compare": "Compare two images, or two label maps, whose grids may differ.",
    "info": "Describe an image or a transform; without FILE, the installation.",
    "demo": "Register Colin27 to the ICBM152 template: affine, then diffeomorphic.",
}
"""In the order in which the help lists them, with the first lines of their own helps."""

OPTIONS = Path(__file__).with_name("options.json")
"""What the subcommands take, for the completion of a shell: a list of options for each, with their
``names``, their ``help``, whether one is a ``flag`` and whether it can be given ``several`` times,
and the ``choices`` of its value, if any.

``scripts/write_options.py`` writes it."""


class _Root(WithExamples, TyperGroup):
    """The command itself, whose help ends with examples."""


def empty_app() -> typer.Typer:
    """Return the command without subcommands."""
    app = typer.Typer(cls=_Root, pretty_exceptions_enable=False)
    app.callback(invoke_without_command=True)(_root)
    return app


def describing_app() -> typer.Typer:
    """Return the command with subcommands that do nothing but tell what they are for."""
    app = empty_app()
    for name, purpose in SUBCOMMANDS.items():
        app.command(name, help=purpose)(_nothing)
    return app


def completing_app() -> typer.Typer:
    """Return the command with subcommands that do nothing but know their options."""
    app = empty_app()
    for name, options in json.loads(OPTIONS.read_text()).items():
        app.command(name, help=SUBCOMMANDS[name])(_taking(options))
    return app


def _taking(options: list[dict[str, Any]]) -> Callable[..., None]:
    """Return a function that takes options, all as text but flags and choices."""

    def nothing(**_: Any) -> None:
        pass

    parameters = []
    for number, option in enumerate(options):
        is_flag = option["flag"]
        kind: Any = bool if is_flag else str
        if option["choices"]:
            choices = {choice: choice for choice in option["choices"]}
            kind = enum.Enum("Choice", choices)  # type: ignore[misc, no-redef]
        if option["several"]:
            kind = list[kind]
        kind = kind if is_flag else kind | None
        parameters.append(
            inspect.Parameter(
                f"option_{number}",
                inspect.Parameter.KEYWORD_ONLY,
                default=False if is_flag else None,
                annotation=Annotated[kind, typer.Option(*option["names"], help=option["help"])],
            )
        )
    nothing.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    nothing.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return nothing


def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Tell the version.")] = False,
) -> None:
    r"""Image registration in JAX, on the CPU and the GPU.

    `jaxreg COMMAND --help` says what a command can do, with examples.

    Examples
    --------
    See it at work, on images that come along:
    jaxreg demo

    Register two images of your own:
    jaxreg register fixed.nii.gz moving.nii.gz -o out --report

    Bring labels along:
    jaxreg apply labels.nii.gz -r fixed.nii.gz -t out/warp.nii.gz -t out/affine.tfm \
      --labels -o moved_labels.nii.gz
    """
    if version:
        from regkernels import __version__

        typer.echo(__version__)
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


def _nothing() -> None:
    pass
