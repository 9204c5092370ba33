"""SimpleITK, which is asked for only where a file is read or written."""

from __future__ import annotations

from typing import Any

__all__ = ["import_simpleitk"]


def import_simpleitk() -> Any:
    """Return the module.

    Raises
    ------
    ModuleNotFoundError
        If it is not installed; it says how to.
    """
    try:
        import SimpleITK
    except ModuleNotFoundError as error:
        if error.name != "SimpleITK":
            raise
        raise ModuleNotFoundError(
            "regkernels reads and writes files through SimpleITK, which is not installed: "
            "pip install 'regkernels[files]'",
            name="SimpleITK",
        ) from None
    return SimpleITK
