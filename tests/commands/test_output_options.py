"""``--quiet`` and ``--json``: what is printed, for people and for scripts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from command import run
from scenes import write_shifted_pair

from jaxreg.commands import app
from regkernels import write_affine

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


def test_each_subcommand_can_be_quiet(capsys: Captured) -> None:
    for command in app.registered_commands:
        assert command.callback is not None
        name = command.callback.__name__.replace("_", "-")
        assert run(name, "--help") == 0
        assert "--quiet" in capsys.readouterr().out
