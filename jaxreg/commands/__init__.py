"""The subcommands of ``jaxreg``, one module each."""

from __future__ import annotations

from typing import Annotated

import typer

from jaxreg.commands.apply import apply
from jaxreg.commands.apply_points import apply_points
from jaxreg.commands.command import Command
from jaxreg.commands.compare import compare
from jaxreg.commands.demo import demo
from jaxreg.commands.info import info
from jaxreg.commands.invert import invert
from jaxreg.commands.register import register
from jaxreg.commands.template import TemplateCommand, template
from regkernels.info import describe

__all__ = ["app"]

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command(cls=Command, no_args_is_help=True)(register)
app.command(cls=TemplateCommand, no_args_is_help=True)(template)
app.command(cls=Command, no_args_is_help=True)(apply)
app.command(cls=Command, no_args_is_help=True)(apply_points)
app.command(cls=Command, no_args_is_help=True)(invert)
app.command(cls=Command, no_args_is_help=True)(compare)
app.command(cls=Command)(info)
app.command(cls=Command)(demo)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Tell the version.")] = False,
) -> None:
    """Image registration in JAX, on the CPU and the GPU.

    `jaxreg demo` shows it at work; `jaxreg register FIXED MOVING -o FOLDER` takes your images, and
    `jaxreg COMMAND --help` says what else a command can do.
    """
    if version:
        typer.echo(describe()["regkernels"])
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())
