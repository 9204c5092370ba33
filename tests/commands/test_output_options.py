"""``--quiet``, ``--verbose``, ``--log`` and ``--json``: what is told, to people and to scripts."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import run
from scenes import header, physical_grid, scene, write_shifted_pair

from jaxreg.commands import app
from regkernels import (
    Series,
    read_grid,
    read_volume,
    write_affine,
    write_displacement,
    write_series,
)

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


COMMANDS: dict[str, tuple[str, ...]] = {
    "register": ("fixed.nii.gz", "moving.nii.gz", "-o", "out", "--stages", "translation"),
    "register --pairs": ("--pairs", "pairs.csv", "-o", "study", "--stages", "translation"),
    "template": (
        *("fixed.nii.gz", "moving.nii.gz", "-o", "mean", "--stages", "translation"),
        *("--preset", "fast", "--rounds", "1"),
    ),
    "motion": (
        *("series.nii.gz", "-o", "aligned", "--reference", "0"),
        *("--stage", "rigid scales=2 iterations=3"),
    ),
    "apply": (
        *("moving.nii.gz", "-r", "fixed.nii.gz", "-t", "warp.nii.gz:inverse", "-t", "affine.tfm"),
        *("-o", "moved.nii.gz", "--outside", "7"),
    ),
    "apply-points": ("points.csv", "-t", "warp.nii.gz", "-t", "affine.tfm", "-o", "there.csv"),
    "invert": ("warp.nii.gz", "-o", "inverse.nii.gz"),
    "compare": ("fixed.nii.gz", "moving.nii.gz"),
    "info": ("affine.tfm",),
    "demo": ("--quick", "--output-dir", "demo"),
    "demo --multimodal": ("--multimodal", "--quick", "--output-dir", "multimodal"),
}
"""What is typed after the name of each subcommand, in the folder `files`."""

WITHOUT_DEVICE = ("compare", "info")


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Two images, a series, points and transforms, of which one folds."""
    fixed = read_volume(write_shifted_pair(tmp_path)[0])
    (tmp_path / "pairs.csv").write_text("fixed,moving\nfixed.nii.gz,moving.nii.gz\n")
    head = header((12, 14, 13), (5.0, 5.0, 5.0))
    frames = [1000 * scene(physical_grid(head) + shift) for shift in (0.0, 2.0)]
    write_series(
        Series(np.asarray(frames).astype(np.int16), head.grid, 2.0), tmp_path / "series.nii.gz"
    )
    folds = 30 * np.sin(physical_grid(fixed) / 11)
    write_displacement(folds, fixed, tmp_path / "warp.nii.gz")
    write_affine(np.array([[1, 0, 2.0], [0, 1, -1.0], [0, 0, 1]]), tmp_path / "affine.tfm")
    (tmp_path / "points.csv").write_text("x,y\n1,2\n500,3\n")
    return tmp_path


def typed(name: str) -> tuple[str, ...]:
    device = () if name in WITHOUT_DEVICE else ("--device", "cpu")
    return name.split()[0], *COMMANDS[name], *device


def test_each_subcommand_is_run_here() -> None:
    names = {command.callback.__name__ for command in app.registered_commands if command.callback}
    assert {name.replace("_", "-") for name in names} == {name.split()[0] for name in COMMANDS}


@pytest.mark.parametrize("name", COMMANDS)
def test_each_subcommand_prints_one_json_document_and_tells_the_rest_aside(
    name: str, files: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "jaxreg_cli", *typed(name), "--json", "--verbose", "--log", "a.log"],
        cwd=files,
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)
    assert found
    assert re.search(r"(?m)^ *\d+\.\d{3} s  programs took \d", done.stderr)
    lines = logged(files / "a.log")
    assert lines[0].startswith(f"jaxreg {name.split()[0]} ") and lines[-1] == "exit status 0"
    assert any(line.startswith("programs took ") for line in lines)
    if isinstance(found, dict):
        assert all((files / path).is_file() for path in found.get("written", []))
        warned = [f"jaxreg: warning: {text}" for text in found.get("warnings", [])]
        assert set(warned) <= set(done.stderr.splitlines()) and set(warned) <= set(lines)
    check = CHECKS.get(name)
    if check is not None:
        check(found, files)


def _check_template(found: Any, folder: Path) -> None:
    assert found == json.loads((folder / "mean" / "template.json").read_text())


def _check_motion(found: Any, folder: Path) -> None:
    assert found == json.loads((folder / "aligned" / "motion.json").read_text())
    assert 50 < found["peak memory (MB)"]["host"] < 1e6


def _check_apply(found: Any, folder: Path) -> None:
    assert found["inputs"] == {
        "IMAGE": "moving.nii.gz",
        "--reference": "fixed.nii.gz",
        "--transform": ["warp.nii.gz:inverse", "affine.tfm"],
    }
    assert found["interpolation"] == "linear" and found["outside"] == {"IMAGE": [7.0]}
    (warning,) = found["warnings"]
    assert warning.startswith("warp.nii.gz:inverse: no inverse within 0.01 voxels found for ")
    assert found["written"] == ["moved.nii.gz"]


def _check_points(found: Any, folder: Path) -> None:
    assert found["points"] == 2 and found["beyond the grid"] == {"warp.nii.gz": ["2"]}
    assert found["warnings"] == ["warp.nii.gz moves nothing beyond its grid: point 2"]
    assert found["written"] == ["there.csv"]


def _check_invert(found: Any, folder: Path) -> None:
    residual = found["inverse residual (voxels)"]
    assert 0 < residual["share"] < 1 and 0 < residual["mean"] < residual["maximum"]
    (warning,) = found["warnings"]
    assert f"the largest residual is {residual['maximum']:.3g} voxels" in warning
    assert found["inputs"] == {"TRANSFORM": "warp.nii.gz"}
    assert found["written"] == ["inverse.nii.gz"]


def _check_demo(found: Any, folder: Path) -> None:
    scores = found["scores"]
    assert scores["before"]["ncc"] < scores["affine"]["ncc"] < scores["deformable"]["ncc"] <= 1
    assert [stage["name"] for stage in found["stages"]] == ["moments", "affine", "greedy"]
    assert found["jacobian"]["minimum"] > 0 and found["doubts"] == []
    names = ("displacement.nii.gz", "moved.nii.gz", "report.png")
    assert found["written"] == [str(Path("demo", name)) for name in names]


def _check_multimodal(found: Any, folder: Path) -> None:
    distance = found["distance from the reference (mm)"]
    assert max(distance["mi"]) < min(distance["start"])
    assert found["registrations (s)"].keys() == {"mse", "ncc", "mi"}
    names = ("moved.nii.gz", "multimodal.png")
    assert found["written"] == [str(Path("multimodal", name)) for name in names]


CHECKS: dict[str, Callable[[Any, Path], None]] = {
    "template": _check_template,
    "motion": _check_motion,
    "apply": _check_apply,
    "apply-points": _check_points,
    "invert": _check_invert,
    "demo": _check_demo,
    "demo --multimodal": _check_multimodal,
}


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "demo --multimodal"])
def test_each_subcommand_is_silent_where_it_is_asked_to_be(
    name: str, files: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.chdir(files)
    assert run(*typed(name), "--quiet") == 0
    told = capsys.readouterr()
    assert told.out == ""
    assert all(line.startswith("jaxreg: warning: ") for line in told.err.splitlines())
