"""Files that appear complete or not at all."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import FrameType

__all__ = ["atomic_folder", "atomic_path"]


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a place to write a file to; on success it is renamed to ``path``.

    The place is a folder beside ``path``, and the file has its name there: writers choose a format
    by its ending, and those that put a header and its data into two files (MetaImage's ``.mhd``,
    NIfTI's ``.hdr``) name one after the other. Whatever they write moves along. On an exception the
    folder is removed and ``path`` is as it was before.

    Raises
    ------
    OSError
        At once, if ``path`` cannot be written to.
    """
    path = Path(path)
    with _folder_in(path.parent, path) as beside:
        yield beside / path.name
        with _uninterrupted():
            # Data first: what names them is there only when they are.
            for file in sorted(beside.iterdir(), key=lambda file: file.name == path.name):
                os.replace(file, path.with_name(file.name))


@contextmanager
def atomic_folder(
    path: str | os.PathLike[str], owned: Collection[str] = (), *, guarded: bool = False
) -> Iterator[Path]:
    """Give an empty folder to write to; on success its files move to the folder ``path``.

    That is made if it is missing. Files of other names stay in it, except those that are
    ``owned``: were they not written again, they would be leftovers. On an exception nothing has
    changed; nor if this process ends without one, killed or aborted, where that is ``guarded``
    against: a small process of its own then removes what was written so far.

    Raises
    ------
    OSError
        At once, if ``path`` cannot be written to, or has a folder where an owned file belongs.
    """
    path = Path(path)
    _refuse_folders(path / name for name in owned)
    # The same file system as the goal, so that moving a file is renaming it.
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    with _folder_in(existing, path) as beside, _guard(beside) if guarded else nullcontext():
        yield beside
        with _uninterrupted():
            path.mkdir(parents=True, exist_ok=True)
            written = {file.name for file in beside.iterdir()}
            _refuse_folders(path / name for name in written)
            for file in sorted(beside.iterdir()):
                os.replace(file, path / file.name)
            for name in set(owned) - written:
                (path / name).unlink(missing_ok=True)


def _refuse_folders(goals: Iterable[Path]) -> None:
    for goal in goals:
        if goal.is_dir():
            raise OSError(f"{goal}: expected a file or nothing, got a folder")


@contextmanager
def _folder_in(parent: Path, goal: Path) -> Iterator[Path]:
    """Give a new folder that is removed afterwards; ``goal`` is what an error is about."""
    beside: Path | None = None
    try:
        with _uninterrupted():  # else a folder might be made that nobody knows of
            try:
                beside = Path(tempfile.mkdtemp(prefix=".regkernels-", dir=parent))
            except OSError as error:
                raise OSError(f"{goal}: cannot write there ({error.strerror})") from error
        yield beside
    finally:
        if beside is not None:
            with _uninterrupted():
                shutil.rmtree(beside, ignore_errors=True)


@contextmanager
def _guard(folder: Path) -> Iterator[None]:
    """Have a folder removed as soon as this process is no more, however it ends."""
    waiting = "import shutil, sys; sys.stdin.read(); shutil.rmtree(sys.argv[1], ignore_errors=True)"
    with subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", waiting, os.path.abspath(folder)],
        stdin=subprocess.PIPE,  # which ends when we do
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is for us
    ) as guard:
        try:
            yield
        finally:
            guard.kill()  # what is to be removed is removed here


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Hold back the exceptions that Python makes of signals, Ctrl-C's above all, until the end.

    Then each signal that came is delivered once, in their order.
    """
    if threading.current_thread() is not threading.main_thread():  # Python interrupts that one only
        yield
        return
    handlers = {
        number: handler
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        if callable(handler := signal.getsignal(number))
    }
    held: list[int] = []

    def hold(number: int, _: FrameType | None) -> None:
        if number not in held:
            held.append(number)

    def deliver() -> None:
        if held:
            try:
                signal.raise_signal(held.pop(0))
            finally:
                deliver()

    # A stack: a handler that is back may raise an exception before the others are.
    with ExitStack() as stack:
        stack.callback(deliver)
        for number, handler in handlers.items():
            stack.callback(signal.signal, number, handler)
            signal.signal(number, hold)
        yield
