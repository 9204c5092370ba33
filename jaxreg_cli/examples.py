"""The examples at the end of a help, as they stand in the docstring of what it is about."""

from __future__ import annotations

from typing import Any

__all__ = ["WithExamples"]

_HEADING = "Examples\n--------\n"


class WithExamples:
    """A command or a group whose help ends with its examples, each on lines that can be copied.

    What is before them is wrapped to the width of the terminal; commands are not.
    """

    def __init__(self, *arguments: Any, help: str | None = None, **options: Any) -> None:
        text, _, self.examples = (help or "").partition(_HEADING)
        super().__init__(*arguments, help=text.rstrip(), **options)  # type: ignore[call-arg]

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help, and the examples after it."""
        super().format_help(ctx, formatter)  # type: ignore[misc]
        if self.examples:
            lines = self.examples.strip().splitlines()
            formatter.write("\n".join(["Examples:", "", *(f"  {x}".rstrip() for x in lines), ""]))
