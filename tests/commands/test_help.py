"""``--help`` and what a shell completes: what one is told before anything runs."""

from __future__ import annotations

import importlib.util
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from command import run

from jaxreg.commands import app
from jaxreg_cli import outline

ROOT = Path(__file__).parents[2]
COMMAND: Any = typer.main.get_command(app)


def examples(told: str) -> list[str]:
    """The commands in the examples at the end of a help."""
    _, heading, rest = told.partition("Examples:\n")
    assert heading
    joined = rest.replace("\\\n", " ")
    return [line.strip() for line in joined.splitlines() if line.startswith("  jaxreg ")]


@pytest.mark.parametrize("name", [None, *COMMAND.commands])
def test_each_help_ends_with_examples_that_can_be_typed(
    name: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*([] if name is None else [name]), "--help") == 0
    typed = [shlex.split(line)[1:] for line in examples(capsys.readouterr().out)]
    assert len(typed) >= 2
    for subcommand, *arguments in typed:
        assert name in (None, subcommand)
        # The parser raises for an option that there is not, and for a missing argument.
        context = COMMAND.commands[subcommand].make_context(subcommand, arguments)
        assert context.params


@pytest.mark.parametrize(
    "name", [name for name in COMMAND.commands if name not in ("info", "demo")]
)
def test_without_arguments_a_subcommand_tells_its_help_and_no_error(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(name, "--help") == 0
    asked = capsys.readouterr().out
    assert run(name) == 2
    told = capsys.readouterr()
    assert told.err == ""
    assert told.out.split() == asked.split()


def test_the_help_is_the_same_where_rich_does_not_draw_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("invert", "--help") == 0
    drawn = examples(capsys.readouterr().out)
    plain = COMMAND.commands["invert"]
    monkeypatch.setattr(plain, "rich_markup_mode", None)
    context = plain.make_context("invert", [], resilient_parsing=True)
    assert examples(plain.get_help(context)) == drawn


# --- completion ---------------------------------------------------------------------------------


SMALL = """
import sys, jaxreg_cli
try:
    jaxreg_cli.main()
finally:
    assert not {"jax", "jaxreg", "numpy", "matplotlib"} & sys.modules.keys()
"""
"""The command, which may import no package of size."""


def completed(tmp_path: Path, *words: str) -> list[str]:
    """What bash is told that the last word could be."""
    asked = {
        "COMP_WORDS": " ".join(words),
        "COMP_CWORD": str(len(words) - 1),
        "_JAXREG_COMPLETE": "complete_bash",
    }
    done = subprocess.run(
        [sys.executable, "-c", SMALL],
        cwd=tmp_path,
        env={**os.environ, **asked},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_a_shell_completes_commands_options_and_choices_without_jax(tmp_path: Path) -> None:
    assert completed(tmp_path, "jaxreg", "reg") == ["register"]
    assert set(completed(tmp_path, "jaxreg", "register", "--fixed-")) == {
        "--fixed-mask",
        "--fixed-labels",
        "--fixed-points",
    }
    assert completed(tmp_path, "jaxreg", "apply", "--interpolation", "n") == ["nearest"]
    repeated = completed(tmp_path, "jaxreg", "apply", "a.nii", "-t", "affine.tfm", "--tr")
    assert repeated == ["--transform"]


def test_what_a_shell_completes_is_what_the_subcommands_take() -> None:
    spec = importlib.util.spec_from_file_location("writer", ROOT / "scripts" / "write_options.py")
    assert spec is not None and spec.loader is not None
    writer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(writer)
    assert writer.text() == outline.OPTIONS.read_text(), "run python scripts/write_options.py"


def test_the_script_of_the_completion_is_shown_and_installed(tmp_path: Path) -> None:
    def said(option: str) -> str:
        done = subprocess.run(
            ["bash", "--norc", "-c", f'{sys.executable} -c "$SMALL" {option}; exit $?'],
            cwd=tmp_path,
            env={**os.environ, "HOME": str(tmp_path), "SMALL": SMALL},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "complete -o default -F _jaxreg_completion jaxreg" in said("--show-completion")
    assert "bash completion installed" in said("--install-completion")
    assert (tmp_path / ".bash_completions" / "jaxreg.sh").is_file()
