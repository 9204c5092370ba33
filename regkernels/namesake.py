"""The other `torchreg`: a package of PyPI that installs into the folder of ours.

Whichever is installed later writes its ``__init__.py`` over that of the other, and uninstalling one
takes the file away from both. What is left imports as a mixture, or as nothing at all.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

__all__ = ["refuse_mixture", "trouble"]

_OURS = {
    "__init__.py",
    "_flows.py",
    "_ops",
    "descriptors.py",
    "fireants",
    "loss.py",
    "monai.py",
    "regularisation.py",
    "smooth.py",
    "steps.py",
    "voxelmorph.py",
    "warp.py",
}


def trouble(folder: Path) -> str | None:
    """Tell what is wrong with the folder of our `torchreg`.

    Parameters
    ----------
    folder
        The folder that the package is in. One that cannot be listed, as in an archive, is taken for
        sound.

    Returns
    -------
    str or None
        A sentence on what is there and what to do, ``None`` if all is well.
    """
    names: list[str] = []
    with contextlib.suppress(OSError):
        names = os.listdir(folder)
    strange = sorted(
        name
        for name in names
        if name.endswith((".py", ".so")) and name not in _OURS and not name.startswith(".")
    )
    if strange:
        found = f"holds files that are not those of this version: {', '.join(strange)}"
    elif names and "__init__.py" not in names:
        found = "has lost its __init__.py"
    else:
        return None
    return (
        f"{folder} {found}. PyPI has another package of this name, which installs into "
        "the same folder: one environment can hold only one of them. Uninstall both (pip uninstall "
        "torchreg regkernels), delete the folder if it is still there, and install regkernels again"
    )


def refuse_mixture(folder: Path) -> None:
    """Raise for a folder of our `torchreg` that is not as it was installed.

    Raises
    ------
    ImportError
        What :func:`trouble` tells.
    """
    found = trouble(folder)
    if found is not None:
        raise ImportError(f"torchreg: {found}", name="torchreg", path=str(folder))
