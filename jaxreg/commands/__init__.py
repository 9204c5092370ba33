"""The subcommands of ``jaxreg``, one module each."""

from __future__ import annotations

import typer

from jaxreg.commands.apply import apply
from jaxreg.commands.command import Command
from jaxreg.commands.demo import demo
from jaxreg.commands.info import info
from jaxreg.commands.invert import invert
from jaxreg.commands.register import register

__all__ = ["app"]

app = typer.Typer(
    help="Image registration in JAX.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command(cls=Command, no_args_is_help=True)(register)
app.command(cls=Command, no_args_is_help=True)(apply)
app.command(cls=Command, no_args_is_help=True)(invert)
app.command(cls=Command)(info)
app.command(cls=Command)(demo)


@app.callback(invoke_without_command=True)
def _root(context: typer.Context) -> None:
    """Image registration in JAX, on the CPU and the GPU."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
