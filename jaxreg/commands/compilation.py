"""Compilation by XLA: how long it took, and how a second run is spared it."""

from __future__ import annotations

import tempfile
from pathlib import Path

import jax
import jax.monitoring

__all__ = ["compile_seconds", "keep_compiled"]

_EVENT = "/jax/core/compile/backend_compile_duration"
_durations: list[float] = []


def _listen(event: str, duration_secs: float, **_: str | int) -> None:
    if event == _EVENT:
        _durations.append(duration_secs)


jax.monitoring.register_event_duration_secs_listener(_listen)


def compile_seconds() -> float:
    """Return the seconds that XLA has compiled since this module was imported."""
    return sum(_durations)


def keep_compiled(folder: Path) -> None:
    """Keep what XLA compiles from now on in a folder, and look there before compiling.

    Raises
    ------
    OSError
        If the folder cannot be made, or not be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"{folder}: cannot write there ({error.strerror})") from error
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # By default what compiles within a second is not kept; here that is most of it.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
