"""Files that appear complete or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["atomic_folder", "atomic_path"]


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a name beside ``path`` to write to; on success the file is renamed to ``path``.

    The temporary name keeps the suffixes, by which writers choose a format. On an exception the
    temporary file is removed and ``path`` is as it was before.

    Raises
    ------
    OSError
        At once, if ``path`` cannot be written to.
    """
    path = Path(path)
    beside = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        beside.touch()
    except OSError as error:
        raise OSError(f"{path}: cannot write there ({error.strerror})") from error
    try:
        yield beside
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | os.PathLike[str], owned: Iterable[str] = ()) -> Iterator[Path]:
    """Give an empty folder to write to; on success its files move to the folder ``path``.

    That is made if it is missing. Files of other names stay in it, except those that are
    ``owned``: were they not written again, they would be leftovers. On an exception nothing has
    changed.

    Raises
    ------
    OSError
        At once, if ``path`` cannot be written to.
    """
    path = Path(path)
    # The same file system as the goal, so that moving a file is renaming it.
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    try:
        beside = Path(tempfile.mkdtemp(prefix=".jaxreg-", dir=existing))
    except OSError as error:
        raise OSError(f"{path}: cannot write there ({error.strerror})") from error
    try:
        yield beside
        path.mkdir(parents=True, exist_ok=True)
        written = {file.name for file in beside.iterdir()}
        for file in sorted(beside.iterdir()):
            os.replace(file, path / file.name)
        for name in set(owned) - written:
            (path / name).unlink(missing_ok=True)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
