"""Text files of ITK transforms."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["check_insight"]

_INSIGHT = b"#Insight Transform File"


def check_insight(path: Path) -> None:
    """Look at a text file of ITK, which would take the identity for what is missing."""
    text = path.read_bytes()
    if not text.startswith(_INSIGHT):
        return
    transforms, *parameters = (
        len(re.findall(start, text, re.MULTILINE))
        for start in (rb"^Transform:(?! *Composite)", rb"^Parameters:", rb"^FixedParameters:")
    )
    if min(parameters) < transforms:
        raise EOFError(
            f"expected the parameters of {transforms} transforms, got those of {min(parameters)}"
        )
    if not text.endswith(b"\n"):
        raise EOFError("expected a line break at the end: the last number may lack digits")
