"""Write what the subcommands of ``jaxreg`` take, which the completion of a shell reads.

python scripts/write_options.py
"""

from __future__ import annotations

import json
from typing import Any

import typer

from jaxreg.commands import app
from jaxreg_cli.outline import OPTIONS


def options() -> dict[str, list[dict[str, Any]]]:
    """Return the options of each subcommand."""
    command: Any = typer.main.get_command(app)
    return {
        name: [
            {
                "names": [*parameter.opts, *parameter.secondary_opts],
                "help": parameter.help,
                "flag": parameter.is_flag,
                "several": parameter.multiple,
                "choices": _choices(parameter),
            }
            for parameter in subcommand.params
            if parameter.param_type_name == "option" and parameter.name != "help"
        ]
        for name, subcommand in command.commands.items()
    }


def _choices(parameter: Any) -> list[str]:
    """Return the words that an option takes, if there are only so many."""
    kind = getattr(parameter, "type_descriptor", None)  # of newer versions of typer
    found = (kind.choices if kind is not None else getattr(parameter.type, "choices", None)) or ()
    return [str(getattr(choice, "value", choice)) for choice in found]


def text() -> str:
    """Return the file."""
    return f"{json.dumps(options(), indent=1)}\n"


if __name__ == "__main__":
    OPTIONS.write_text(text())
