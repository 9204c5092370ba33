"""Warnings about results that may be wrong."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from jaxreg.registration import Doubt
from jaxreg_cli.telling import warn

__all__ = ["listed", "tell_doubts"]

_SHOWN = 12
"""So many names are told in a warning."""


def tell_doubts(doubts: Iterable[Doubt], name: str = "") -> None:
    """Say on stderr why a registration may be wrong, a line for each reason, of an image's name."""
    for doubt in doubts:
        warn(f"{f'{name}: ' if name else ''}{doubt.text}")


def listed(noun: str, names: Sequence[str]) -> str:
    """Name things, some of them if there are many."""
    shown = ", ".join(names[:_SHOWN])
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{noun}{'s' * (len(names) > 1)} {shown}{more}"
