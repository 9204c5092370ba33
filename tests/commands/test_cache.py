"""Compiled programs are kept for the next run, by default in the user's cache folder."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.monitoring
import numpy as np
import pytest
from command import run
from jax.experimental.compilation_cache import compilation_cache

from jaxreg.commands import compilation
from regkernels import Volume, read_volume, write_volume


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
    finally:
        jax.config.update("jax_enable_compilation_cache", False)
    told = capsys.readouterr().out
    assert str(tmp_path / "regkernels" / "xla-") in told
    assert "0 files, 0.0 of at most 512 MiB" in told


def test_of_a_folder_that_is_too_large_what_was_used_last_is_left(tmp_path: Path) -> None:
    for age in range(8):
        path = tmp_path / f"{age}-cache"
        path.write_bytes(bytes(100))
        os.utime(path, (1e9 - age, 1e9 - age))
    compilation._remove_oldest(tmp_path, 800)
    assert len(kept(tmp_path)) == 8
    compilation._remove_oldest(tmp_path, 600)
    assert [path.name for path in kept(tmp_path)] == [f"{age}-cache" for age in range(4)]


@contextlib.contextmanager
def compiled_programs() -> Iterator[list[str]]:
    """The names of the programs that JAX traces, compiles or loads meanwhile, in any thread."""
    names: list[str] = []

    def listen(event: str, seconds: float, **about: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(str(about.get("fun_name")))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture
def forgetful() -> Iterator[None]:
    """JAX without what it has compiled, before and after, and with the options that it had."""
    names = (
        "jax_enable_compilation_cache",
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    )
    options = {name: getattr(jax.config, name) for name in names}
    jax.clear_caches()
    compilation_cache.reset_cache()
    yield
    for name, value in options.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


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
    for name in ("moved.nii.gz", "affine.tfm"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_a_registration_of_another_shape_or_by_other_stages_finds_nothing_of_the_first(
    image: Path, tmp_path: Path, forgetful: None
) -> None:
    folder = tmp_path / "cache"
    write_volume(read_volume(image).with_array(np.ones((5, 6)) * np.arange(6)), tmp_path / "b.nii")
    for stages in ("moments", "rigid"):
        arguments = ["register", image, tmp_path / "b.nii", "--stages", stages, "--device", "cpu"]
        assert run(*arguments, "-o", tmp_path / stages, "--cache", folder) == 0
    assert len(list(folder.iterdir())) == 2


@pytest.mark.parametrize("damage", [b"", b"nothing that was pickled"])
def test_a_registration_that_was_kept_and_damaged_is_compiled_again(
    image: Path, tmp_path: Path, forgetful: None, damage: bytes
) -> None:
    folder = tmp_path / "cache"
    arguments = ["register", image, image, "--stages", "moments", "--device", "cpu"]
    assert run(*arguments, "-o", tmp_path / "first", "--cache", folder) == 0
    (file,) = folder.iterdir()
    whole = file.stat().st_size
    file.write_bytes(damage)
    jax.clear_caches()
    assert run(*arguments, "-o", tmp_path / "second", "--cache", folder) == 0
    assert file.stat().st_size == pytest.approx(whole, rel=0.01)
    for name in ("moved.nii.gz", "affine.tfm"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_a_folder_and_no_folder_at_once_is_refused(
    image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["register", image, image, "-o", tmp_path / "out", "--cache", tmp_path / "cache"]
    assert run(*arguments, "--no-cache") == 2
    assert "--no-cache: expected no --cache beside it" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
