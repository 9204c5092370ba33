"""Exit statuses: those of the documentation's table, and no others, each of them provoked."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from command import run

from jaxreg.registration import Registration, Transform
from jaxreg_cli import running, signals
from regkernels import Volume, read_volume, write_volume

PAGE = Path(__file__).parents[2] / "docs" / "command_line.md"

# The package's attributes of these names are the functions in them.
apply_command = importlib.import_module("jaxreg.commands.apply")
register_command = importlib.import_module("jaxreg.commands.register")

APPLY = ["apply", "image.nii.gz", "-r", "image.nii.gz", "--device", "cpu", "-o"]


class Row(NamedTuple):
    """A status, and one thing that it means."""

    status: int
    meaning: str


def documented() -> list[Row]:
    """The rows of the table: meanings of one status are parted by ``;``, of several by commas."""
    _, _, table = PAGE.read_text().partition("| exit status | means |\n|---|---|\n")
    rows = []
    for line in table.partition("\n\n")[0].splitlines():
        # What is in code may have a bar in it.
        statuses, _, means = line.strip("| ").partition(" | ")
        numbers = [int(number) for number in statuses.split(", ")]
        meanings = means.split("; " if len(numbers) == 1 else ", ")
        if len(numbers) == 1:
            numbers *= len(meanings)
        rows += [Row(*row) for row in zip(numbers, meanings, strict=True)]
    return rows


def during(monkeypatch: pytest.MonkeyPatch, happens: Callable[[], None]) -> int:
    """Apply nothing to an image, while which something happens."""
    monkeypatch.setattr(apply_command, "resample", lambda *_: happens())
    return run(*APPLY, "out.nii.gz")


def lacking(_: pytest.MonkeyPatch) -> int:
    def lack() -> None:
        raise MemoryError("Unable to allocate 2 TiB")

    return during(_, lack)


def signalled(number: int) -> Callable[[pytest.MonkeyPatch], int]:
    return lambda monkeypatch: during(monkeypatch, lambda: signal.raise_signal(number))


def doubtful(monkeypatch: pytest.MonkeyPatch) -> int:
    image = read_volume("image.nii.gz")
    found = Registration(image, image, Transform(image.grid, np.diag([9.0, 9, 1])), ())
    assert found.doubts
    monkeypatch.setattr(register_command, "register_watched", lambda *_, **__: found)
    return run("register", "image.nii.gz", "image.nii.gz", "-o", "out", "--device", "cpu")


def unread(_: pytest.MonkeyPatch) -> int:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as pipe:
        command = [sys.executable, "-m", "jaxreg_cli", "info", "image.nii.gz"]
        done = subprocess.run(command, stdout=pipe, stderr=subprocess.PIPE, check=False)
    assert done.stderr == b""
    return done.returncode


def misused(_: pytest.MonkeyPatch) -> int:
    statuses = [run("info", "missing.nii.gz"), run("info", "--magic"), run("magic"), run("apply")]
    assert len(set(statuses)) == 1
    return statuses[0]


def failed_pair(_: pytest.MonkeyPatch) -> int:
    Path("bad.nii.gz").write_text("no image")
    Path("pairs.csv").write_text("fixed,moving\nimage.nii.gz,bad.nii.gz\n")
    return run("register", "--pairs", "pairs.csv", "-o", "study", "--device", "cpu")


CASES: dict[tuple[int, str], Callable[[pytest.MonkeyPatch], int]] = {
    (0, "done"): lambda _: run("info", "image.nii.gz"),
    (0, "[doubts]"): doubtful,
    (1, "memory did not suffice"): lacking,
    (1, "or nobody read the rest of the output"): unread,
    (2, "bad input"): misused,
    (2, "a study of which a pair failed"): failed_pair,
    (2, "no writing where the results go"): lambda _: run(*APPLY, "missing/out.nii.gz"),
    (129, "ended by SIGHUP"): signalled(signal.SIGHUP),
    (130, "by Ctrl-C (SIGINT)"): signalled(signal.SIGINT),
    (143, "by SIGTERM"): signalled(signal.SIGTERM),
}
"""What provokes each of them, by the status and the beginning of what it means."""


def test_each_row_of_the_table_has_a_case_and_each_case_a_row() -> None:
    rows = documented()
    assert len(rows) == len(CASES)
    for row, (status, beginning) in zip(rows, CASES, strict=True):
        assert row.status == status
        assert row.meaning.startswith(beginning)


def test_the_table_has_all_statuses_that_there_are() -> None:
    own = {0, running.FAILED, running.BAD_INPUT, *(128 + number for number in signals.ENDING)}
    assert {row.status for row in documented()} == own


@pytest.mark.parametrize("status,beginning", CASES)
def test_a_documented_exit_status_is_that_of_the_command(
    status: int,
    beginning: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    default_signals: None,
) -> None:
    monkeypatch.chdir(tmp_path)
    image: Any = np.random.default_rng(0).random((12, 14), np.float32)
    write_volume(Volume.create(image), "image.nii.gz")
    assert CASES[status, beginning](monkeypatch) == status
