"""The command line, run in this process."""

from __future__ import annotations

import pytest

import jaxreg_cli


def run(*arguments: object) -> int:
    """Run the command line; return its exit status."""
    with pytest.raises(SystemExit) as end:
        jaxreg_cli.main([str(argument) for argument in arguments])
    return int(end.value.code or 0)
