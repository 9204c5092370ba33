"""Warnings about results that may be wrong."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from jaxreg.registration import Doubt

__all__ = ["tell_doubts"]


def tell_doubts(doubts: Iterable[Doubt], name: str = "") -> None:
    """Say on stderr why a registration may be wrong, a line for each reason, of an image's name."""
    for doubt in doubts:
        print(f"jaxreg: warning: {f'{name}: ' if name else ''}{doubt.text}", file=sys.stderr)
