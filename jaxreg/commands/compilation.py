"""How long XLA compiled: the part of a run's time that a second run does not need."""

from __future__ import annotations

import jax.monitoring

__all__ = ["compile_seconds"]

_EVENT = "/jax/core/compile/backend_compile_duration"
_durations: list[float] = []


def _listen(event: str, duration_secs: float, **_: str | int) -> None:
    if event == _EVENT:
        _durations.append(duration_secs)


jax.monitoring.register_event_duration_secs_listener(_listen)


def compile_seconds() -> float:
    """Return the seconds that XLA has compiled since this module was imported."""
    return sum(_durations)
