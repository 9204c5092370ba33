"""A process that traces programs beside a command: Python runs one thread of a process at a time.

It is begun before the command imports anything large, and imports the same meanwhile. What it is
asked and what it answers is bytes here; `jaxreg.registration.elsewhere` makes and reads them.
"""

from __future__ import annotations

import contextlib
import gc
import os
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import IO, NamedTuple, NoReturn, Self

__all__ = ["SUFFIX", "TracingProcess", "begin_early", "end_early", "serve", "start"]

SUFFIX = "-registration"
"""Of the names of files with the programs of a registration."""

_THREAD = "compiler_tracer"
"""The name of threads that ask: who is interrupted waits for none whose name says it compiles."""

_CODE = "import sys; sys.path[:] = sys.argv[1:]; from jaxreg_cli.tracing import serve; serve()"

_PATIENCE = 10.0
"""Seconds after which a process that does not answer is given up; it needs a fraction of one."""

_FEWEST_CORES = 4
"""With fewer of them XLA's compiler, which has a thread for each, is what a command waits for."""

_CARDS = "/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg", "/proc/driver/nvidia/version"
"""One of them is there where there may be a GPU."""

_Process = subprocess.Popen[bytes]

Done = Callable[[bytes | None], None]
"""Takes an answer, or `None` where there is none."""


def start() -> _Process | None:
    """Start a process that traces; `None` where that cannot be."""
    if not sys.executable or getattr(sys, "frozen", False):
        return None
    options = ["-B"] if sys.dont_write_bytecode else []
    try:
        return subprocess.Popen(
            [sys.executable, *options, "-c", _CODE, *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            # It needs no GPU to trace for one, and must not take memory of it.
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
        )
    except OSError:  # no memory, or no more processes
        return None


_early: list[_Process] = []
"""That which was begun early, if any was."""


def begin_early(typed: Sequence[str]) -> None:
    """Begin to start the process, for a command that is about to trace programs for a GPU.

    Where nobody knows that yet it starts later, if at all. If it was begun in vain, nobody asks it.

    Parameters
    ----------
    typed
        The command and its options.
    """
    if typed[:1] != ["register"] or not {"--help", "--distributed"}.isdisjoint(typed):
        return
    if _value(typed, "--device") == "cpu" or _value(typed, "--devices") not in (None, "1"):
        return
    if _pays() and not _keeps_programs(typed):
        _early.extend(filter(None, [start()]))


def end_early() -> None:
    """End the process that was begun early, if nobody has taken it."""
    while _early:
        _end(_early.pop())


def _pays() -> bool:
    """Whether there may be a GPU, and cores enough."""
    asked = os.environ.get("JAX_PLATFORMS", "").lower().split(",")
    if sys.platform != "linux" or {"", "cuda", "gpu"}.isdisjoint(asked):
        return False
    return len(os.sched_getaffinity(0)) >= _FEWEST_CORES and any(map(os.path.exists, _CARDS))


def _value(typed: Sequence[str], option: str) -> str | None:
    """Return the last value that was given to an option."""
    found = None
    for word, after in zip(typed, [*typed[1:], None], strict=True):
        if word == option:
            found = after
        elif word.startswith(f"{option}="):
            found = word.partition("=")[2]
    return found


def _keeps_programs(typed: Sequence[str]) -> bool:
    """Whether programs are kept in the folder that is meant, or in one that may be."""
    if "--no-cache" in typed:
        return False
    where = _value(typed, "--cache") or os.environ.get("JAX_COMPILATION_CACHE_DIR")
    users = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    # Below the user's there is a folder for each kind of processor.
    folder, pattern = (where, f"*{SUFFIX}") if where else (users, f"regkernels/*/*{SUFFIX}")
    try:
        return any(Path(folder).expanduser().glob(pattern))
    except (OSError, RuntimeError, ValueError):  # no home, or no name of a folder
        return False


def _end(process: _Process) -> None:
    """End a process, which leaves nothing behind."""
    process.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=1)
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):  # what was still to be written
                pipe.close()


class _Task(NamedTuple):
    """What is asked, and who takes the answer."""

    request: bytes
    done: Done


class TracingProcess:
    """Asks a process, in a thread of its own.

    What that does not answer, for whatever reason, its asker has to do.

    Parameters
    ----------
    begun
        A process of `start`. Without it one is started if that pays.
    """

    def __init__(self, begun: _Process | None = None) -> None:
        self._process = begun
        self._tasks: deque[_Task] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._has_ended = False
        """Whether nobody is asked any more."""

    @classmethod
    def of_command(cls) -> Self:
        """Return the one that was begun early, if any was."""
        return cls(_early.pop() if _early else None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """End the process, and answer nothing any more."""
        with self._changed:
            self._has_ended = True
            self._tasks.clear()
            self._changed.notify_all()
        if self._process is not None:
            if self._thread is None:
                _end(self._process)
            self._process.kill()  # the thread, which reads what it writes, does the rest

    def begin(self) -> None:
        """Begin to ask the process; start one, if none was given and that pays."""
        with self._changed:
            if self._thread is not None or self._has_ended:
                return
            if self._process is None and _pays():
                self._process = start()
            if self._process is not None:
                self._thread = threading.Thread(
                    target=self._ask, args=(self._process,), name=_THREAD
                )
                self._thread.start()

    def submit(self, request: bytes, done: Done) -> bool:
        """Have something answered; return whether anybody will try.

        Parameters
        ----------
        request
            What is asked.
        done
            Called by the thread that asks, or by one that helps.
        """
        with self._changed:
            if self._thread is None or self._has_ended:
                return False
            self._tasks.append(_Task(request, done))
            self._changed.notify_all()
        return True

    def help(self) -> None:
        """Take, the last first, what the process has not begun: it gets no answer."""
        while True:
            with self._changed:
                if not self._tasks:
                    return
                task = self._tasks.pop()
            task.done(None)

    def _next(self) -> _Task | None:
        with self._changed:
            self._changed.wait_for(lambda: self._tasks or self._has_ended)
            return None if self._has_ended else self._tasks.popleft()

    def _ask(self, process: _Process) -> None:
        """Have the process answer one request after the other, as long as it does."""
        assert process.stdin is not None and process.stdout is not None
        answer = _read(process.stdout)  # by which it tells that it is there
        while answer is not None and (task := self._next()) is not None:
            watch = threading.Timer(_PATIENCE, process.kill)
            watch.name = _THREAD
            watch.start()
            try:
                _write(process.stdin, task.request)
                answer = _read(process.stdout)
            except OSError:  # it is there no more
                answer = None
            watch.cancel()
            if answer is None:
                self._stop()
            task.done(answer or None)
        self._stop()
        _end(process)

    def _stop(self) -> None:
        """Take no more requests; those that are left wait for who helps."""
        with self._changed:
            self._has_ended = True


def _write(pipe: IO[bytes], message: bytes) -> None:
    pipe.write(len(message).to_bytes(8, "little") + message)
    pipe.flush()


def _read(pipe: IO[bytes]) -> bytes | None:
    """Return the next message; `None` if the other side has ended."""
    head = pipe.read(8)
    if len(head) < 8:
        return None
    size = int.from_bytes(head, "little")
    message = pipe.read(size)
    return message if len(message) == size else None


def serve() -> NoReturn:
    """Answer what the other side asks, in a process of its own, until that ends."""
    requests: SimpleQueue[bytes] = SimpleQueue()

    def listen() -> None:
        with os.fdopen(os.dup(0), "rb") as pipe:
            while (request := _read(pipe)) is not None:
                requests.put(request)
        os._exit(0)

    # From the beginning, so that this process ends with the other one while it imports, too.
    threading.Thread(target=listen, daemon=True).start()
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    # JAX would load the libraries of a GPU with these, whatever platform is asked for.
    sys.modules["jax_plugins"] = None  # type: ignore[assignment]
    gc.disable()
    try:
        from jaxreg.registration.elsewhere import answer, prepare

        prepare()
        _write(answers, b"")
        while True:
            _write(answers, answer(requests.get()))
    finally:
        os._exit(1)
