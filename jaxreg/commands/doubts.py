"""Warnings about results that may be wrong."""

from __future__ import annotations

import sys

from jaxreg.registration import Registration

__all__ = ["tell_doubts"]


def tell_doubts(result: Registration) -> None:
    """Say on stderr why a registration may be wrong, a line for each reason."""
    for doubt in result.doubts:
        print(f"jaxreg: warning: {doubt.text}", file=sys.stderr)
