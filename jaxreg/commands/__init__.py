"""The subcommands of ``jaxreg``, one module each."""

from __future__ import annotations

from jaxreg.commands.apply import apply
from jaxreg.commands.apply_points import apply_points
from jaxreg.commands.command import Command
from jaxreg.commands.compare import compare
from jaxreg.commands.demo import demo
from jaxreg.commands.info import info
from jaxreg.commands.invert import invert
from jaxreg.commands.motion import motion
from jaxreg.commands.output_options import with_output_options
from jaxreg.commands.register import RegisterCommand, register
from jaxreg.commands.template import TemplateCommand, template
from jaxreg_cli.outline import empty_app

__all__ = ["app"]

app = empty_app()
_add = app.command
_add(cls=RegisterCommand, no_args_is_help=True)(with_output_options(register))
_add(cls=TemplateCommand, no_args_is_help=True)(with_output_options(template))
_add(cls=Command, no_args_is_help=True)(with_output_options(motion))
_add(cls=Command, no_args_is_help=True)(with_output_options(apply))
_add(cls=Command, no_args_is_help=True)(with_output_options(apply_points))
_add(cls=Command, no_args_is_help=True)(with_output_options(invert))
_add(cls=Command, no_args_is_help=True)(with_output_options(compare))
_add(cls=Command)(with_output_options(info))
_add(cls=Command)(with_output_options(demo))
