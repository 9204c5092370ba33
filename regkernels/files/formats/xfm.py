"""Text files of MINC transforms."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["check_xfm"]

_XFM = b"MNI Transform File"


def check_xfm(path: Path) -> None:
    """Look at a text file of MINC, statements with a semicolon behind each."""
    text = path.read_bytes()
    if not text.startswith(_XFM):
        raise ValueError(f"{path}: not a transform: expected {_XFM.decode()} at its start")
    text = re.sub(rb"(?m)^%.*", b"", text)
    *statements, rest = text.split(b";")
    if rest.strip() or not statements or b"Transform_Type" in statements[-1]:
        raise EOFError("expected a statement with a semicolon at the end")
    for kind in re.findall(rb"Transform_Type\s*=\s*(\w*)", text):
        # Displacements lie in a MINC image, of which ITK and MINC disagree which way they point.
        if kind != b"Linear":
            raise ValueError(
                f"{path}: expected linear transforms, got {kind.decode('latin-1')}; write its "
                "displacements as an image of vectors in millimetres, LPS, in NIfTI or NRRD"
            )
    if re.search(rb"Invert_Flag\s*=\s*True", text, re.IGNORECASE):
        # ITK overlooks it.
        raise ValueError(
            f"{path}: expected transforms that are not to be inverted, got Invert_Flag = True; "
            "write the inverse matrix by xfminvert"
        )
