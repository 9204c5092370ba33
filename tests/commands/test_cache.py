"""Compiled programs are kept for the next run, by default in the user's cache folder."""

from __future__ import annotations

import hashlib
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.monitoring
import numpy as np
import pytest
from command import run
from programs import compiled_programs, forgetting_programs
from scipy.ndimage import gaussian_filter

from jaxreg.commands import compilation
from jaxreg.registration import kept_programs
from regkernels import Volume, read_volume, write_displacement, write_volume


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "image.nii.gz"
    write_volume(Volume.create(np.arange(30, dtype=np.float32).reshape(5, 6)), path)
    return path


def applied(image: Path, folder: Path, *options: object, **environment: object) -> bytes:
    """What `jaxreg apply` makes of an image in a process of its own, which says nothing."""
    out = folder / "out.nii.gz"
    arguments = ["apply", image, "-r", image, "--device", "cpu", "-o", out, *options]
    done = subprocess.run(
        [sys.executable, "-m", "jaxreg_cli", *map(str, arguments)],
        cwd=folder,
        env={
            **os.environ,
            "JAX_ENABLE_COMPILATION_CACHE": "true",
            "XDG_CACHE_HOME": str(folder / "cache"),
            **{name: str(value) for name, value in environment.items()},
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    return out.read_bytes()


def kept(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*-cache"))


def test_a_second_process_compiles_nothing_and_writes_the_same(image: Path, tmp_path: Path) -> None:
    first = applied(image, tmp_path)
    programs = kept(tmp_path / "cache" / "regkernels")
    assert programs == kept(tmp_path) != []
    times = [path.stat().st_mtime_ns for path in programs]
    assert applied(image, tmp_path) == first
    assert kept(tmp_path) == programs
    assert [path.stat().st_mtime_ns for path in programs] == times


@pytest.mark.parametrize(
    "command",
    [
        "compare image.nii.gz image.nii.gz",
        "apply-points points.csv -t warp.nrrd:inverse -o moved.csv",
    ],
)
def test_other_commands_keep_what_they_compile_too_unless_they_are_told_not_to(
    image: Path, tmp_path: Path, command: str
) -> None:
    volume = read_volume(image)
    write_volume(volume, tmp_path / "image.nii.gz")
    write_displacement(np.zeros((*volume.shape, 2)), volume, tmp_path / "warp.nrrd")
    (tmp_path / "points.csv").write_text("x,y\n1,2\n")

    def run_in_a_process(*options: str) -> list[Path]:
        subprocess.run(
            [sys.executable, "-m", "jaxreg_cli", *command.split(), "--device", "cpu", *options],
            cwd=tmp_path,
            env={
                **os.environ,
                "JAX_ENABLE_COMPILATION_CACHE": "true",
                "XDG_CACHE_HOME": str(tmp_path / "cache"),
            },
            capture_output=True,
            check=True,
        )
        return kept(tmp_path)

    assert run_in_a_process("--no-cache") == []
    programs = run_in_a_process()
    assert programs != []
    assert run_in_a_process() == programs


def test_nothing_is_kept_if_the_user_says_so_and_where_there_is_no_writing(
    image: Path, tmp_path: Path
) -> None:
    first = applied(image, tmp_path, "--no-cache")
    assert not (tmp_path / "cache").exists()
    (tmp_path / "cache").write_text("a file")
    assert applied(image, tmp_path) == first


def test_a_folder_that_jax_has_been_told_is_taken(image: Path, tmp_path: Path) -> None:
    applied(image, tmp_path, JAX_COMPILATION_CACHE_DIR=tmp_path / "own")
    assert kept(tmp_path / "own") == kept(tmp_path) != []


def test_a_program_that_is_damaged_is_compiled_again(image: Path, tmp_path: Path) -> None:
    first = applied(image, tmp_path)
    for path in kept(tmp_path):
        path.write_bytes(path.read_bytes()[:-10])
    assert applied(image, tmp_path) == first


def test_info_tells_where_programs_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert run("info") == 0
    assert "not kept: JAX_ENABLE_COMPILATION_CACHE is off" in capsys.readouterr().out
    jax.config.update("jax_enable_compilation_cache", True)
    try:
        assert run("info") == 0
        told = capsys.readouterr().out
        folder = compilation._own_folder()
        folder.mkdir(parents=True)
        for name, size in (("jit_f-cache", 2**20), ("0123-registration", 2**21)):
            (folder / name).write_bytes(bytes(size))
        assert run("info") == 0
    finally:
        jax.config.update("jax_enable_compilation_cache", False)
    assert str(tmp_path / "regkernels" / "xla-") in told
    assert "0 files, 0.0 of at most 512 MiB" in told
    told = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "2 files, 3.0 of at most 512 MiB; 1 with all programs of a registration" in told


def test_of_a_folder_that_is_too_large_what_was_used_last_is_left(tmp_path: Path) -> None:
    for age in range(8):
        path = tmp_path / f"{age}-cache"
        path.write_bytes(bytes(100))
        os.utime(path, (1e9 - age, 1e9 - age))
    compilation._remove_oldest(tmp_path, 800)
    assert len(kept(tmp_path)) == 8
    compilation._remove_oldest(tmp_path, 600)
    assert [path.name for path in kept(tmp_path)] == [f"{age}-cache" for age in range(4)]


@pytest.fixture
def forgetful() -> Iterator[None]:
    with forgetting_programs():
        yield


def test_a_registration_finds_what_was_compiled_in_the_folder_that_it_is_told(
    image: Path, tmp_path: Path, forgetful: None
) -> None:
    compiled = []
    for out in ("first", "second"):
        jax.clear_caches()  # as in another process
        with compiled_programs() as programs:
            arguments = ["register", image, image, "--stages", "moments,rigid", "--device", "cpu"]
            assert run(*arguments, "-o", tmp_path / out, "--cache", tmp_path / "cache") == 0
        compiled.append(len(programs))
        assert len(list((tmp_path / "cache").iterdir())) == 1
    assert compiled[0] > 5 and compiled[1] == 0
    assert files(tmp_path / "first") == files(tmp_path / "second")


def test_a_registration_of_another_shape_or_by_other_stages_finds_nothing_of_the_first(
    image: Path, tmp_path: Path, forgetful: None
) -> None:
    folder = tmp_path / "cache"
    write_volume(read_volume(image).with_array(np.ones((5, 6)) * np.arange(6)), tmp_path / "b.nii")
    for stages in ("moments", "rigid"):
        arguments = ["register", image, tmp_path / "b.nii", "--stages", stages, "--device", "cpu"]
        assert run(*arguments, "-o", tmp_path / stages, "--cache", folder) == 0
    assert len(list(folder.iterdir())) == 2


def without_the_end(content: bytes) -> bytes:
    return content[: len(content) // 2]


def with_another_bit(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def of_something_else(content: bytes) -> bytes:
    """A file that is whole, and has other things in it."""
    text = pickle.dumps([("a", "list"), 3])
    return kept_programs._HEAD + hashlib.sha256(text).digest() + text


def of_what_is_no_program(content: bytes) -> bytes:
    """A file that is whole, and whose programs are none."""
    entries = pickle.loads(content[len(kept_programs._HEAD) + kept_programs._DIGEST :])
    text = pickle.dumps([(key, b"no program", *trees) for key, _, *trees in entries])
    return kept_programs._HEAD + hashlib.sha256(text).digest() + text


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: b"nothing that was pickled",
        without_the_end,
        with_another_bit,
        of_something_else,
        of_what_is_no_program,
    ],
)
def test_a_registration_that_was_kept_and_damaged_is_compiled_again(
    image: Path, tmp_path: Path, forgetful: None, damage: Callable[[bytes], bytes]
) -> None:
    folder = tmp_path / "cache"
    arguments = ["register", image, image, "--stages", "moments", "--device", "cpu"]
    assert run(*arguments, "-o", tmp_path / "first", "--cache", folder) == 0
    (file,) = folder.iterdir()
    whole = kept_programs.read(file)
    file.write_bytes(damage(file.read_bytes()))
    jax.clear_caches()
    assert run(*arguments, "-o", tmp_path / "second", "--cache", folder) == 0
    again = kept_programs.read(file)
    assert set(again) == set(whole)
    for entry in again.values():
        entry.load(jax.devices("cpu")[0])
    assert files(tmp_path / "first") == files(tmp_path / "second")


def files(folder: Path) -> dict[str, bytes]:
    """What a command has written, by the names of the files, without the record of its times."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".json"}


def test_what_is_compiled_loaded_and_not_to_be_kept_gives_the_same_bits(
    tmp_path: Path, forgetful: None
) -> None:
    rng = np.random.default_rng(0)
    names = ("fixed.nii", "moving.nii")
    for name in names:
        array = gaussian_filter(rng.normal(size=(12, 14, 16)), 2).astype(np.float32)
        write_volume(Volume.create(array), tmp_path / name)
    stages = ["moments", "affine scales=2,1 iterations=6,4", "syn scales=2,1 iterations=6,4"]
    arguments = [tmp_path / name for name in names] + ["--device", "cpu"]
    arguments += [word for stage in stages for word in ("--stage", stage)]
    for out in ("compiled", "loaded", "not kept"):
        jax.clear_caches()
        cache = ["--no-cache"] if out == "not kept" else ["--cache", tmp_path / "cache"]
        with compiled_programs() as programs:
            assert run("register", *arguments, "-o", tmp_path / out, *cache) == 0
        assert (programs == []) == (out == "loaded")
    first = files(tmp_path / "compiled")
    assert {"moved.nii", "warp.nii", "affine.tfm"} <= {name.removesuffix(".gz") for name in first}
    assert first == files(tmp_path / "loaded") == files(tmp_path / "not kept")
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_folder_and_no_folder_at_once_is_refused(
    image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["register", image, image, "-o", tmp_path / "out", "--cache", tmp_path / "cache"]
    assert run(*arguments, "--no-cache") == 2
    assert "--no-cache: expected no --cache beside it" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
