"""Where the construction of a template keeps what one image, or one round, has come to."""

from __future__ import annotations

import os
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from regkernels.files.atomic import atomic_path

__all__ = ["FolderStore", "MemoryStore", "TemplateStore"]


class TemplateStore(Protocol):
    """Keeps arrays under names, each set of them as a whole or not at all.

    What a store keeps lets `build_template` go on after an interruption.
    """

    def load(self, name: str) -> Mapping[str, NDArray[Any]] | None:
        """Return the arrays of a name; `None` if nothing is kept under it."""

    def save(self, name: str, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Keep arrays under a name, in place of those before."""

    def remove(self, name: str) -> None:
        """Forget a name, whether or not something is kept under it."""


class MemoryStore:
    """A `TemplateStore` that ends with the process, and takes the memory of one field per image."""

    def __init__(self) -> None:
        self._kept: dict[str, dict[str, NDArray[Any]]] = {}

    def __str__(self) -> str:
        return "memory"

    def load(self, name: str) -> Mapping[str, NDArray[Any]] | None:
        """Return the arrays of a name; `None` if nothing is kept under it."""
        return self._kept.get(name)

    def save(self, name: str, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Keep arrays under a name, in place of those before."""
        self._kept[name] = {key: np.asarray(array) for key, array in arrays.items()}

    def remove(self, name: str) -> None:
        """Forget a name, whether or not something is kept under it."""
        self._kept.pop(name, None)


class FolderStore:
    """A `TemplateStore` of files in a folder, in NumPy's format ``.npz``.

    They appear complete or not at all, so that a process that was killed can be followed by another
    one. Per image there is a field, uncompressed: 12 bytes per voxel of the template in space.

    Parameters
    ----------
    path
        The folder; it is made when there is something to keep.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)

    def __str__(self) -> str:
        return str(self._path)

    def load(self, name: str) -> Mapping[str, NDArray[Any]] | None:
        """Return the arrays of a name; `None` if nothing is kept under it.

        Raises
        ------
        ValueError
            If its file is damaged.
        """
        file = self._file(name)
        if not file.is_file():
            return None
        try:
            with np.load(file, allow_pickle=False) as arrays:
                return dict(arrays)
        except (ValueError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{file}: damaged ({error}); remove {self._path}") from error

    def save(self, name: str, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Keep arrays under a name, in place of those before.

        Raises
        ------
        OSError
            If there is no writing in the folder.
        """
        self._path.mkdir(parents=True, exist_ok=True)
        with atomic_path(self._file(name)) as beside:
            np.savez(beside, **arrays)  # type: ignore[arg-type]

    def remove(self, name: str) -> None:
        """Forget a name, whether or not something is kept under it."""
        self._file(name).unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove all that is kept, what a killed process left half-written too, and the folder.

        The folder stays where there are other files in it.
        """
        if not self._path.is_dir():
            return
        for path in self._path.iterdir():
            if path.suffix == ".npz":
                path.unlink()
            elif path.is_dir() and path.name.startswith(".regkernels-"):
                shutil.rmtree(path)
        if not any(self._path.iterdir()):
            self._path.rmdir()

    def _file(self, name: str) -> Path:
        return self._path / f"{name}.npz"
