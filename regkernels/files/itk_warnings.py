"""What ITK and the libraries that it reads with print, told in a line that says what follows."""

from __future__ import annotations

import os
import re
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import IO, NamedTuple

from regkernels.files.formats.reading import FileWarning

__all__ = ["collected_output", "tell_of_output", "telling_warnings"]

_STDERR = threading.Lock()
"""Held by whoever has the standard error of the process, which is one."""


@contextmanager
def _caught() -> Iterator[IO[bytes] | None]:
    """Have what is written to the standard error go to a file; `None` if the process has none."""
    with tempfile.TemporaryFile() as caught:
        try:
            kept = os.dup(2)
        except OSError:
            yield None
            return
        try:
            if sys.stderr is not None:
                sys.stderr.flush()
            os.dup2(caught.fileno(), 2)
            yield caught
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def _messages(text: bytes) -> list[str]:
    """Return what was written as messages, each once."""
    written = text.decode(errors="replace")
    written = re.sub(r"(?m)^WARNING: In \S+, line \d+\n(\w+ \(0x[0-9a-f]+\): )?", "", written)
    lines = dict.fromkeys(" ".join(line.split()) for line in written.splitlines())
    return list(filter(None, lines))


@contextmanager
def collected_output() -> Iterator[list[str]]:
    """Collect what is written to the standard error of the process, from C++ above all.

    ITK's own warnings alone could be had by a logger of SimpleITK. libpng, HDF5, OpenJPEG and
    MetaIO do not ask it. One thread at a time collects, since there is one standard error; nothing
    else should be called meanwhile, for what Python prints is collected, too.

    Yields
    ------
    list
        Filled at the end, with each message once.
    """
    said: list[str] = []
    with _STDERR, _caught() as caught:
        try:
            yield said
        finally:
            if caught is not None:
                caught.seek(0)
                said += _messages(caught.read())


def tell_of_output(path: str | os.PathLike[str], said: list[str]) -> None:
    """Make one `FileWarning` of what ITK has said of a file, if it has said anything."""
    if said:
        words = "; ".join(dict.fromkeys(said))
        warnings.warn(
            f"{path}: ITK warns of it, and goes on ({words}); see with jaxreg info or a viewer "
            "whether its voxels are what and where they should be",
            FileWarning,
            stacklevel=2,
        )


class _Piece(NamedTuple):
    """What was said while some files were written."""

    paths: list[str]
    text: bytes


class _Writers:
    """Those that write files at the same time; together they have the standard error."""

    def __init__(self) -> None:
        self._changing = threading.Lock()
        self._paths: list[str] = []
        """Of the files that are being written."""
        self._pieces: list[_Piece] = []
        self._caught: IO[bytes] | None = None
        self._read = 0
        """How many bytes are in pieces by now."""
        self._last = ExitStack()
        """What the last one of them leaves."""

    def enter(self, path: str) -> None:
        """Begin to write a file."""
        with self._changing:
            if not self._paths:
                with ExitStack() as stack:
                    stack.enter_context(_STDERR)
                    self._caught, self._read = stack.enter_context(_caught()), 0
                    self._last = stack.pop_all()
            self._note()
            self._paths.append(path)

    def leave(self, path: str, *, tells: bool) -> list[_Piece]:
        """End to write a file; return what may have been said of it, and no other has returned.

        If it does not tell, that stays for the others of which it may have been said.
        """
        with self._changing:
            self._note()
            self._paths.remove(path)
            found = [piece for piece in self._pieces if path in piece.paths]
            self._pieces = [piece for piece in self._pieces if path not in piece.paths]
            if not tells:
                of_others = (_Piece([p for p in paths if p != path], t) for paths, t in found)
                self._pieces += [piece for piece in of_others if piece.paths]
            if not self._paths:
                self._last.close()
            return found

    def _note(self) -> None:
        """Note of which files was said what has been said since the last one came or went."""
        if self._caught is None or not self._paths:
            return
        size = os.fstat(self._caught.fileno()).st_size
        text = os.pread(self._caught.fileno(), size - self._read, self._read)
        self._read = size
        if text:
            self._pieces.append(_Piece(self._paths[:], text))


_writers = _Writers()


@contextmanager
def telling_warnings(path: str | os.PathLike[str]) -> Iterator[None]:
    """Tell what ITK says of a file that it writes; an error is told alone.

    Several threads may write. What is said meanwhile is told once, of all files that it may be
    about.
    """
    name = os.fspath(path)
    _writers.enter(name)
    try:
        yield
    except BaseException:
        _writers.leave(name, tells=False)
        raise
    for paths, text in _writers.leave(name, tells=True):
        tell_of_output(" or ".join(paths), _messages(text))
