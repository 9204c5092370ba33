"""Compilation: how long it took, and how the next run of a command is spared it.

What XLA compiles is kept in a folder, by what it was compiled from: the program, with the names and
the attributes of our kernels in it, the versions of jaxlib and of the device, and XLA's flags. The
kernels themselves are not among it. They are looked up when a program is loaded, so a program that
an earlier version has compiled calls the kernels of this one.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.monitoring
import typer

from jaxreg.commands.inputs import naming
from jaxreg.registration.kept_programs import SUFFIX, processor
from jaxreg.registration.programs import LOADED, WAITED
from jaxreg_cli.telling import detail

__all__ = [
    "Cache",
    "NoCache",
    "compile_seconds",
    "describe_kept",
    "keep_compiled",
    "keep_registrations",
]

Cache = Annotated[
    Path | None,
    typer.Option(
        "--cache",
        metavar="DIR",
        help="Folder that keeps compiled programs, so that the next run starts sooner. By default "
        "one in the cache folder of the user, which `jaxreg info` tells.",
    ),
]
NoCache = Annotated[
    bool, typer.Option("--no-cache", help="Neither keep compiled programs nor look for them.")
]

_LARGEST = 512 * 2**20
"""Bytes that our own folder may hold when a command starts; a registration adds about a
hundredth of it."""

_COMPILED = "/jax/core/compile/backend_compile_duration"
_EVENTS = (
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    _COMPILED,
    WAITED,
)
_LOADED = "/jax/compilation_cache/cache_retrieval_time_sec"


class _OfThread(threading.local):
    """What is known of the programs of a thread."""

    def __init__(self) -> None:
        self.spans: list[tuple[float, float]] = []
        """When it compiled something, or waited for that, from and to, without overlaps."""
        self.loading: float | None = None
        """Seconds, where the program that it asked for last came from the cache."""


_own = _OfThread()


def _listen(event: str, duration_secs: float, **about: str | int) -> None:
    if event == _LOADED:
        _own.loading = duration_secs
    if event == _COMPILED:
        loaded, _own.loading = _own.loading, None
        how = "compiled" if loaded is None else "found in the cache"
        detail(f"program {about.get('fun_name', '')}: {how}, {duration_secs:.3f} s")
    if event == LOADED:
        detail(f"program {about.get('fun_name', '')}: found in the cache, {duration_secs:.3f} s")
    if event in _EVENTS:
        end = time.perf_counter()
        start = end - duration_secs
        # A function is traced within another one, of whose time it is a part.
        spans = _own.spans
        while spans and spans[-1][1] > start:
            start = min(start, spans.pop()[0])
        spans.append((start, end))


jax.monitoring.register_event_duration_secs_listener(_listen)


def compile_seconds() -> float:
    """Return the seconds that this thread has compiled programs, or waited until they were.

    Tracing and loading them is part of that; what other threads compile meanwhile is not.
    """
    return sum(end - start for start, end in _own.spans)


def keep_compiled(folder: Path | None, no_cache: bool = False) -> None:
    """Keep what XLA compiles from now on in a folder, and look there before compiling.

    Parameters
    ----------
    folder
        What ``--cache`` says. Without one it is JAX's own setting, such as the variable
        ``JAX_COMPILATION_CACHE_DIR``, and without that a folder in the user's cache folder, of
        which what has not been used for longest is removed where it is too large. Should there be
        no writing in that one, nothing is kept.
    no_cache
        Whether ``--no-cache`` was said.

    Raises
    ------
    ValueError
        If the folder cannot be made, or not be written to, or if nothing is to be kept in it.
    """
    where = _where_to_keep(folder, no_cache)
    jax.config.update("jax_enable_compilation_cache", where is not None)
    if where is None:
        return
    # An entry that another process has just begun to write, or a full disk: it is compiled then.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")
    jax.config.update("jax_compilation_cache_dir", where)
    # By default what compiles within a second is not kept; here that is most of it.
    for name in ("min_compile_time_secs", "min_entry_size_bytes"):
        if f"JAX_PERSISTENT_CACHE_{name.upper()}" not in os.environ:
            jax.config.update(f"jax_persistent_cache_{name}", 0)


def keep_registrations(folder: Path | None, no_cache: bool = False) -> Path | None:
    """Return the folder for the programs of registrations, which are found there without tracing.

    JAX keeps nothing then: the CPU's compiler does not give all of a program that JAX has loaded.
    Where the folder is no place of this machine, JAX keeps what it compiles, as by `keep_compiled`.

    Parameters
    ----------
    folder, no_cache
        As for `keep_compiled`.

    Returns
    -------
    Path or None
        `None`: there is none.

    Raises
    ------
    ValueError
        As `keep_compiled`.
    """
    where = _where_to_keep(folder, no_cache)
    if where is not None and "://" in where:
        keep_compiled(folder, no_cache)
        return None
    jax.config.update("jax_enable_compilation_cache", False)
    return None if where is None else Path(where)


def _where_to_keep(folder: Path | None, no_cache: bool) -> str | None:
    if no_cache:
        if folder is not None:
            raise ValueError(f"--no-cache: expected no --cache beside it, got {folder}")
        return None
    if folder is not None:
        with naming("--cache"):
            _check_writing(folder)
    elif not _setting("enable_compilation_cache"):
        return None
    elif (users := _setting("compilation_cache_dir")) is not None:
        return str(users)
    else:
        try:
            folder = _own_folder()
            _check_writing(folder)
            _remove_oldest(folder, _LARGEST)
        except OSError:
            return None
    detail(f"compiled programs are kept in {folder}")
    return str(folder)


def describe_kept() -> str:
    """Return where compiled programs are kept by default, and how many."""
    users = _setting("compilation_cache_dir")
    try:
        folder = Path(users) if users else _own_folder()
        files = _files(folder)
    except OSError as error:
        return f"not kept: {error}"
    if not _setting("enable_compilation_cache"):
        return "not kept: JAX_ENABLE_COMPILATION_CACHE is off"
    size = sum(file.size for file in files) / 2**20
    limit = "" if users else f" of at most {_LARGEST / 2**20:.0f}"
    registrations = sum(file.path.endswith(SUFFIX) for file in files)
    those = f"; {registrations} with all programs of a registration" if registrations else ""
    return f"{folder}\n{len(files)} files, {size:.1f}{limit} MiB{those}"


def _setting(name: str) -> Any:
    return getattr(jax.config, f"jax_{name}")


def _own_folder() -> Path:
    """Return our folder for this processor in the user's cache folder, by the rules of XDG."""
    users = os.environ.get("XDG_CACHE_HOME", "")
    try:
        root = Path(users) if os.path.isabs(users) else Path.home() / ".cache"
    except RuntimeError as error:
        raise OSError(str(error)) from error
    digest = hashlib.sha256(processor().encode()).hexdigest()
    return root / "regkernels" / f"xla-{digest[:12]}"


def _check_writing(folder: Path) -> None:
    try:
        # Who can write there can have this process run what they like.
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"{folder}: cannot write there ({error.strerror})") from error


class _File(NamedTuple):
    used: float
    size: int
    path: str


def _files(folder: Path) -> list[_File]:
    """Return what is in a folder, what was used last at the end; nothing if there is none."""
    found = []
    for where, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(where, name)
            with contextlib.suppress(FileNotFoundError):  # another process has removed it
                about = os.stat(path)
                found.append(_File(max(about.st_atime, about.st_mtime), about.st_size, path))
    return sorted(found)


def _remove_oldest(folder: Path, largest: int) -> None:
    """Bring a folder that is larger than so many bytes to three quarters of them."""
    files = _files(folder)
    size = sum(file.size for file in files)
    if size <= largest:
        return
    for file in files:
        if size <= 0.75 * largest:
            return
        with contextlib.suppress(FileNotFoundError):
            os.unlink(file.path)
        size -= file.size
