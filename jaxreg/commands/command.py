"""What every subcommand does: it tells what is wrong in the words of the command line."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperCommand

from jaxreg_cli.examples import WithExamples
from jaxreg_cli.telling import warn
from regkernels.files.formats.reading import FileWarning

__all__ = ["Command"]


class Command(WithExamples, TyperCommand):
    """A subcommand whose errors name what was typed.

    The library's errors begin with the name of an argument. Where the command has a parameter of
    that name, its option or metavariable takes the place: ``--fixed-mask`` for ``fixed_mask``.
    """

    def invoke(self, ctx: Any) -> Any:
        """Run the command.

        Raises
        ------
        ValueError
            For an error about a parameter.
        typer.Abort
            For an interrupt.
        """
        try:
            with _telling_warnings():
                return super().invoke(ctx)
        except KeyboardInterrupt:  # what the parser makes of an interrupt depends on its version
            raise typer.Abort from None
        except (OSError, TypeError, ValueError) as error:
            argument, _, complaint = str(error).partition(": ")
            typed = {parameter.name: parameter for parameter in self.params}.get(argument)
            if typed is None or not complaint:
                raise
            option = typed.param_type_name == "option"
            names = [name for name in typed.opts if name.startswith("--")]
            name = "/".join(names) if option else str(typed.metavar).removesuffix("...")
            raise ValueError(f"{name}: {complaint}") from error


@contextmanager
def _telling_warnings() -> Iterator[None]:
    """Say once, in one line, where a file can be understood in more than one way."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", FileWarning)
        show = warnings.showwarning
        told: set[str] = set()  # a file is read more than once, its grid first

        def tell(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
            if not issubclass(category, FileWarning):
                show(message, category, *where, **more)
            elif str(message) not in told:
                told.add(str(message))
                warn(str(message))

        warnings.showwarning = tell
        yield
