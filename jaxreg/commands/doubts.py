"""Warnings about results that may be wrong."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

from jaxreg.registration import Doubt

__all__ = ["listed", "tell", "tell_doubts"]

_SHOWN = 12
"""So many names are told in a warning."""


def tell_doubts(doubts: Iterable[Doubt], name: str = "") -> None:
    """Say on stderr why a registration may be wrong, a line for each reason, of an image's name."""
    for doubt in doubts:
        tell(f"{f'{name}: ' if name else ''}{doubt.text}")


def tell(text: str) -> None:
    """Say on stderr what one should know of a result."""
    print(f"jaxreg: warning: {text}", file=sys.stderr)


def listed(noun: str, names: Sequence[str]) -> str:
    """Name things, some of them if there are many."""
    shown = ", ".join(names[:_SHOWN])
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{noun}{'s' * (len(names) > 1)} {shown}{more}"
