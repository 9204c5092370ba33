"""What the command imports before it answers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from command import run

from jaxreg import commands
from jaxreg_cli import outline

LARGE = {"jax", "jaxreg", "optax", "torch", "matplotlib", "SimpleITK", "scipy"}


def imported_by(tmp_path: Path, *arguments: object) -> set[str]:
    """Which of the large packages a command imports, in a process of its own."""
    code = (
        "import sys, jaxreg_cli\n"
        "try:\n"
        "    jaxreg_cli.main()\n"
        "finally:\n"
        f"    print(*({LARGE!r} & sys.modules.keys()), file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=tmp_path,
        env={**os.environ, "COLUMNS": "100"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return set(done.stderr.split())


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], []])
def test_help_and_version_import_nothing_large(tmp_path: Path, arguments: list[str]) -> None:
    assert imported_by(tmp_path, *arguments) == set()


def test_the_help_of_a_subcommand_reads_no_files_and_draws_nothing(tmp_path: Path) -> None:
    assert imported_by(tmp_path, "register", "--help") <= {"jax", "jaxreg"}


def test_the_outline_knows_the_subcommands_and_what_they_are_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--help") == 0
    told = capsys.readouterr().out
    for name in outline.SUBCOMMANDS:
        assert f" {name} " in told
    monkeypatch.setattr(outline, "describing_app", lambda: commands.app)
    assert run("--help") == 0
    assert capsys.readouterr().out == told
