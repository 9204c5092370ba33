"""What a run tells beside its results: warnings, details for those who ask, and a log of all."""

from __future__ import annotations

import contextlib
import datetime
import io
import os
import re
import shlex
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TextIO

__all__ = [
    "aside",
    "detail",
    "logs",
    "silence",
    "start_telling",
    "unlogged",
    "wants_details",
    "warn",
    "warnings_told",
]

_BEGAN = time.perf_counter()

_TIME = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}  ")
_COLOUR = re.compile(r"\x1b\[[\d;]*m|\x1b\]8;[^\x1b]*\x1b\\")


class _Log:
    """A file of lines with their times."""

    def __init__(self, path: Path) -> None:
        if path.exists() and path.stat().st_size > 0:
            with path.open("rb") as file:
                first = file.readline(80).decode(errors="replace")
            if not _TIME.match(first):
                raise ValueError(f"{path} is there, and no log; choose another name")
        self._file = path.open("a", encoding="utf-8")
        self._lock = threading.Lock()

    def line(self, text: str) -> None:
        """Write a line; what it says on a terminal in colours is said without."""
        now = datetime.datetime.now().isoformat(" ", "milliseconds")
        with self._lock:
            self._file.write(f"{now}  {_COLOUR.sub('', text)}".rstrip() + "\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class _Logged(io.TextIOBase):
    """A stream that a log hears."""

    def __init__(self, stream: TextIO, log: _Log) -> None:
        self.stream = stream
        self._log = log
        self._rest = ""

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._log.line(line)
        return self.stream.write(text)

    def flush(self) -> None:
        self.stream.flush()

    def end(self) -> None:
        """Log the last line, which nothing ended."""
        if self._rest:
            self._log.line(self._rest)

    def isatty(self) -> bool:
        return self.stream.isatty()

    def fileno(self) -> int:
        return self.stream.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self.stream.encoding


class _Run:
    """What is asked for of the command that runs."""

    def __init__(self, arguments: Sequence[str] = ()) -> None:
        self.arguments = arguments
        self.verbose = False
        self.log: _Log | None = None
        self.warnings: list[str] = []


_run = _Run()
_saying = threading.Lock()


@contextlib.contextmanager
def aside() -> Iterator[None]:
    """Print what Python prints past the descriptor that libraries print to.

    What they say while ITK reads or writes a file is taken from it for a warning of that file, and
    what another thread prints meanwhile would be taken with it.
    """
    stream = sys.stderr
    try:
        copy = os.dup(2) if stream is not None and stream.fileno() == 2 else None
    except (OSError, ValueError):  # there is none, or it is in memory
        copy = None
    if copy is None:
        yield
        return
    with open(copy, "w", buffering=1, encoding=stream.encoding, errors=stream.errors) as own:
        sys.stderr = own
        try:
            yield
        finally:
            sys.stderr = stream


@contextlib.contextmanager
def logs(arguments: Sequence[str]) -> Iterator[None]:
    """Let a command ask for a log, which then hears of its end, too.

    Parameters
    ----------
    arguments
        What was typed after the program's name, for the first line.
    """
    global _run
    _run = _Run(arguments)
    streams = sys.stdout, sys.stderr
    try:
        yield
    except SystemExit as end:
        _end(f"exit status {end.code or 0}")
        raise
    except BaseException as error:
        _end(f"{type(error).__name__}: {error}")
        raise
    finally:
        if _run.log is not None:
            _run.log.close()
        sys.stdout, sys.stderr = streams
        _run = _Run()


def _end(text: str) -> None:
    if _run.log is not None:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, _Logged):
                stream.end()
        _run.log.line(text)


def start_telling(verbose: bool, log: Path | None) -> None:
    """Do what ``--verbose`` and ``--log`` ask for, until the run ends.

    Raises
    ------
    ValueError
        If the log cannot be written, or something else is there.
    """
    _run.verbose = verbose
    if log is None:
        return
    try:
        _run.log = _Log(log)
    except OSError as error:
        raise ValueError(f"--log: {log}: cannot write there ({error.strerror})") from error
    except ValueError as error:
        raise ValueError(f"--log: {error}") from error
    _run.log.line(f"jaxreg {shlex.join(_run.arguments)}")
    sys.stdout, sys.stderr = (_Logged(stream, _run.log) for stream in (sys.stdout, sys.stderr))


def silence() -> AbstractContextManager[Any]:
    """Return a context in which nothing is printed to stdout; a log hears it all the same."""
    nowhere: TextIO = io.StringIO()
    return contextlib.redirect_stdout(nowhere if _run.log is None else _Logged(nowhere, _run.log))


def unlogged(stream: Any) -> Any:
    """Return a stream as no log hears it: for bars, of which a log would get every movement."""
    return stream.stream if isinstance(stream, _Logged) else stream


def warn(text: str) -> None:
    """Say on stderr what one should know of a result."""
    _run.warnings.append(text)
    _say(f"jaxreg: warning: {text}")


def warnings_told() -> list[str]:
    """Return what `warn` has said since the command began, for a record."""
    return list(_run.warnings)


def detail(text: str) -> None:
    """Say what happens, on stderr if it was asked for, and in the log."""
    if _run.verbose:
        _say(f"{time.perf_counter() - _BEGAN:8.3f} s  {text}", logged=text)
    elif _run.log is not None:
        _run.log.line(text)


def wants_details() -> bool:
    """Tell whether anybody asks for details: some take time to find out."""
    return _run.verbose or _run.log is not None


def _say(text: str, logged: str | None = None) -> None:
    stream: Any = sys.stderr
    if isinstance(stream, _Logged):
        stream = stream.stream
    # While there are bars, rich has its own stream here, which writes above them.
    with _saying:  # images are read by several threads
        print(text, file=stream)
    if _run.log is not None:
        _run.log.line(text if logged is None else logged)
