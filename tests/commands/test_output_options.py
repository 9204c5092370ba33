"""``--quiet``, ``--verbose``, ``--log`` and ``--json``: what is told, to people and to scripts."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from command import run
from scenes import write_shifted_pair

from jaxreg.commands import app
from regkernels import read_grid, write_affine

Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_shifted_pair(tmp_path_factory.mktemp("images"))


REGISTER = ("register", "--stages", "translation", "--device", "cpu")


def test_a_quiet_command_writes_and_prints_nothing(
    images: list[Path], tmp_path: Path, capsys: Captured
) -> None:
    assert run(*REGISTER, *images, "-o", tmp_path / "out", "--quiet") == 0
    assert capsys.readouterr().out == ""
    assert (tmp_path / "out" / "affine.tfm").is_file()


def test_a_quiet_command_tells_what_is_wrong(
    images: list[Path], tmp_path: Path, capsys: Captured
) -> None:
    missing = tmp_path / "missing.nii.gz"
    assert run(*REGISTER, images[0], missing, "-o", tmp_path / "out", "--quiet") == 2
    assert f"MOVING: {missing}: no such file" in capsys.readouterr().err


def test_the_record_of_a_registration_is_printed_for_scripts(
    images: list[Path], tmp_path: Path, capsys: Captured
) -> None:
    assert run(*REGISTER, *images, "-o", tmp_path / "out", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "out" / "registration.json").read_text())
    assert printed["stages"][0]["name"] == "translation"
    assert printed["peak memory (MB)"]["host"] > 50


def test_what_compare_and_info_find_is_printed_for_scripts(
    images: list[Path], tmp_path: Path, capsys: Captured
) -> None:
    assert run("compare", *images, "--json") == 0
    assert json.loads(capsys.readouterr().out)["inputs"]["A"] == str(images[0])
    write_affine(np.eye(4), tmp_path / "a.tfm")
    assert run("info", tmp_path / "a.tfm", "--json") == 0
    (part,) = json.loads(capsys.readouterr().out)
    assert part["kind"] == "affine"


def test_details_are_told_on_stderr_beside_what_is_printed(
    images: list[Path], tmp_path: Path
) -> None:
    def told(*options: str) -> tuple[str, str]:
        command = (*REGISTER, *images, "-o", tmp_path / "out", *options)
        done = subprocess.run(
            [sys.executable, "-m", "jaxreg_cli", *map(str, command)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout, done.stderr

    cache = ("--cache", str(tmp_path / "cache"))
    out, details = told("--verbose", "--json", *cache)
    assert json.loads(out)["stages"][0]["name"] == "translation"
    for line in details.splitlines():
        assert re.match(r" *\d+\.\d{3} s  ", line)
    size = " x ".join(map(str, read_grid(images[0]).shape[::-1]))
    assert f"read {images[0]}: {size} voxels of " in details
    assert "device: CPU, with JAX " in details
    assert re.search(r"program .*_run_.*: compiled, \d", details)
    assert re.search(r"translation at 1/4 resolution, .* voxels: \d+ losses, -", details)
    assert re.search(r"wrote moved.nii.gz: 0.\d MB in 0.\d+ s", details)
    assert re.search(r"(?m)  results: \d\.\d+ s", details)
    assert re.search(r"at most \d+ MB of the host", details)
    assert re.search(r"program .*run_.*: found in the cache, ", told("--verbose", *cache)[1])
    assert told(*cache)[1] == ""


LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}(?:  (.*))?")


def logged(log: Path) -> list[str]:
    lines = [LINE.fullmatch(line) for line in log.read_text().splitlines()]
    assert all(lines)
    return [line[1] or "" for line in lines if line]


def test_a_log_has_all_that_is_printed_and_the_details(
    images: list[Path], tmp_path: Path, capsys: Captured
) -> None:
    log = tmp_path / "run.log"
    command = (*REGISTER, *images, "-o", tmp_path / "out", "--log", log)
    assert run(*command) == 0
    told = capsys.readouterr()
    assert "Jacobian" in told.out
    lines = logged(log)
    assert lines[0] == "jaxreg " + " ".join(map(str, command))
    assert {line.rstrip() for line in told.out.splitlines()} <= set(lines)
    assert any(line.startswith("device: CPU") for line in lines)
    assert lines[-1] == "exit status 0"
    assert told.err == ""


def test_a_log_goes_on_and_has_what_a_quiet_command_would_have_printed_and_its_error(
    images: list[Path], tmp_path: Path, capsys: Captured
) -> None:
    log = tmp_path / "run.log"
    assert run("compare", *images, "--quiet", "--log", log) == 0
    assert capsys.readouterr().out == ""
    before = logged(log)
    assert any("NCC" in line for line in before)
    assert run("info", tmp_path / "missing.tfm", "--log", log) == 2
    after = logged(log)
    assert after[: len(before)] == before
    error = capsys.readouterr().err.strip()
    assert error.startswith("jaxreg: error: FILE: ")
    assert after[-2:] == [error, "exit status 2"]
    assert run("info", tmp_path / "missing.tfm") == 2  # which asks for no log
    assert logged(log) == after


def test_what_is_no_log_is_not_written_to(
    images: list[Path], tmp_path: Path, capsys: Captured
) -> None:
    before = images[0].read_bytes()
    assert run("info", images[1], "--log", images[0]) == 2
    assert f"--log: {images[0]} is there, and no log" in capsys.readouterr().err
    assert images[0].read_bytes() == before
    assert run("info", images[1], "--log", tmp_path / "no" / "run.log") == 2
    assert "--log: " in capsys.readouterr().err


def test_a_log_has_a_line_for_each_level_where_a_terminal_has_bars(
    images: list[Path], tmp_path: Path
) -> None:
    log = tmp_path / "run.log"
    command = (*REGISTER, *images, "-o", tmp_path / "out", "--log", log)
    leader, follower = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "jaxreg_cli", *map(str, command)],
        cwd=tmp_path,
        env={**os.environ, "TERM": "xterm"},
        stdout=follower,
        stderr=follower,
    ) as process:
        os.close(follower)
        shown = b""
        while True:
            try:
                part = os.read(leader, 4096)
            except OSError:  # the end, on Linux
                break
            shown += part
    os.close(leader)
    assert process.returncode == 0
    assert b"\x1b[" in shown and "━".encode() in shown
    text = log.read_text()
    assert "\x1b" not in text and "━━━━" not in text.replace("┏", "")
    assert any(
        re.match(r"translation: 1/4 resolution, NCC .*, iteration 80 of 120", line)
        for line in logged(log)
    )


def test_each_subcommand_can_be_quiet_and_write_a_log(capsys: Captured) -> None:
    for command in app.registered_commands:
        assert command.callback is not None
        name = command.callback.__name__.replace("_", "-")
        assert run(name, "--help") == 0
        told = capsys.readouterr().out
        assert all(option in told for option in ("--quiet", "--verbose", "--log"))
