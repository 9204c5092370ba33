"""The ``jaxreg`` command without its subcommands, of which it knows what each is for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import typer

__all__ = ["SUBCOMMANDS", "describing_app", "empty_app"]

SUBCOMMANDS: Mapping[str, str] = {
    "register": "Register MOVING to FIXED, or many pairs.",
    "template": "Build the template of several images: their mean shape and their mean intensity.",
    "apply": "Resample IMAGE onto the grid of a reference, through any number of transforms.",
    "apply-points": "Send points through any number of transforms.",
    "invert": "Invert an affine, or a displacement field on its own grid.",
    "compare": "Compare two images, or two label maps, whose grids may differ.",
    "info": "Describe an image or a transform; without FILE, the installation.",
    "demo": "Register Colin27 to the ICBM152 template: affine, then diffeomorphic.",
}
"""In the order in which the help lists them, with the first lines of their own helps."""


def empty_app() -> typer.Typer:
    """Return the command without subcommands."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.callback(invoke_without_command=True)(_root)
    return app


def describing_app() -> typer.Typer:
    """Return the command with subcommands that do nothing but tell what they are for."""
    app = empty_app()
    for name, purpose in SUBCOMMANDS.items():
        app.command(name, help=purpose)(_nothing)
    return app


def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Tell the version.")] = False,
) -> None:
    """Image registration in JAX, on the CPU and the GPU.

    `jaxreg demo` shows it at work; `jaxreg register FIXED MOVING -o FOLDER` takes your images, and
    `jaxreg COMMAND --help` says what else a command can do.
    """
    if version:
        from regkernels import __version__

        typer.echo(__version__)
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


def _nothing() -> None:
    pass
