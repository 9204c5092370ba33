"""The subcommands of ``jaxreg``, one module each."""

from __future__ import annotations

from jaxreg.commands.apply import apply
from jaxreg.commands.apply_points import apply_points
from jaxreg.commands.command import Command
from jaxreg.commands.compare import compare
from jaxreg.commands.demo import demo
from jaxreg.commands.info import info
from jaxreg.commands.invert import invert
from jaxreg.commands.register import register
from jaxreg.commands.template import TemplateCommand, template
from jaxreg_cli.outline import empty_app

__all__ = ["app"]

app = empty_app()
app.command(cls=Command, no_args_is_help=True)(register)
app.command(cls=TemplateCommand, no_args_is_help=True)(template)
app.command(cls=Command, no_args_is_help=True)(apply)
app.command(cls=Command, no_args_is_help=True)(apply_points)
app.command(cls=Command, no_args_is_help=True)(invert)
app.command(cls=Command, no_args_is_help=True)(compare)
app.command(cls=Command)(info)
app.command(cls=Command)(demo)
