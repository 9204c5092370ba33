"""The ``jaxreg`` command: what a shell starts, and how it ends when something is wrong."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import importlib.util
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from jaxreg_cli.libraries import THREAD, begin_to_load
from jaxreg_cli.memory import is_lack_of_memory
from jaxreg_cli.signals import ENDING, end_at_once, reason
from jaxreg_cli.telling import aside, logs
from jaxreg_cli.tracing import begin_early, end_early

if TYPE_CHECKING:
    import typer

__all__ = ["BAD_INPUT", "FAILED", "main", "run_as_process"]

_NEEDED = ("jax", "optax", "SimpleITK", "typer", "rich", "matplotlib")

_COMPLETING = "_JAXREG_COMPLETE"
"""The variable in which the script of a shell's completion says what it wants."""

_COMPUTING = (
    *("register", "template", "motion", "demo"),
    *("apply", "apply-points", "invert", "compare"),
)
"""What runs on a device."""

_DEVICES = "devices"
"""The thread that starts them."""

_MOMENT = 0.05
"""Seconds in which a thread that has nothing to do any more ends."""

_OF_THE_COMMAND_ITSELF = ("--help", "--version", "--install-completion", "--show-completion")

BAD_INPUT, FAILED = 2, 1


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and leave with its exit status.

    Bad input of any kind is one line on stderr and exit status 2; so is what memory does not hold,
    with exit status 1, an interrupt, with 130, and what else ends a process early, with 128 and the
    number of the signal: 143 for SIGTERM, 129 for SIGHUP. Where nobody reads the rest of stdout it
    ends without a word, with 1. A traceback is a bug of ours.

    Parameters
    ----------
    arguments
        Without the program's name; the process's own by default.
    """
    try:
        with aside(), logs(sys.argv[1:] if arguments is None else arguments):
            try:
                _run(arguments)
            except _Ended as ended:
                _fail(reason(ended.number), 128 + ended.number)
    except SystemExit as end:
        if arguments is None:
            _leave(int(end.code or 0))
        raise


def run_as_process() -> NoReturn:
    """Run the command line of this process, and end the process with it.

    What Python and JAX would then take apart, with the context of a GPU, the system takes back at
    once.
    """
    try:
        main()
    except SystemExit as end:
        if _wants_a_device(sys.argv[1:]):
            _end(int(end.code or 0))
        raise


def _leave(status: int) -> None:
    """End an interrupted process at once where XLA compiles a program, which takes it seconds.

    Nothing interrupts that, and Python would wait for its threads. What is to be written or removed
    has been by now.
    """
    if status >= 128 and any(_compiles(thread) for thread in threading.enumerate()):
        _flush()
        os._exit(status)


def _end(status: int) -> None:
    """End the process, unless Python has to: for a debugger, or for threads that are at work.

    Whatever asks to be called at the end is, but for what takes the devices down.
    """
    is_watched = sys.gettrace() or sys.getprofile() or sys.flags.inspect
    if is_watched or "coverage" in sys.modules or any(map(_works, threading.enumerate())):
        return
    if (api := sys.modules.get("jax._src.api")) is not None and hasattr(api, "clean_up"):
        atexit.unregister(api.clean_up)
    atexit._run_exitfuncs()
    _flush()
    os._exit(status)


def _works(thread: threading.Thread) -> bool:
    """Whether the end of the process has to wait for a thread."""
    if thread.daemon or thread in (threading.main_thread(), threading.current_thread()):
        return False
    if _compiles(thread):  # what nobody waits for any more, unless JAX keeps it
        config = sys.modules["jax"].config
        return bool(config.jax_enable_compilation_cache and config.jax_compilation_cache_dir)
    if thread.name in (_DEVICES, THREAD):
        return False
    with contextlib.suppress(RuntimeError):  # an interrupt has kept it from being started
        thread.join(_MOMENT)  # JAX has a timer that warns of a slow start, and has been stopped
    return thread.is_alive()


def _compiles(thread: threading.Thread) -> bool:
    return thread.is_alive() and thread.name.startswith("compiler")


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or there is none
            stream.flush()
    with contextlib.suppress(OSError, TypeError, AttributeError):  # what libraries have printed
        ctypes.CDLL(None).fflush(None)


def _run(arguments: Sequence[str] | None) -> NoReturn:
    missing = [package for package in _NEEDED if importlib.util.find_spec(package) is None]
    if missing:
        _fail(f"the command line needs {', '.join(missing)}: pip install 'regkernels[jax,cli]'")
    _ask_for_the_same_bits()
    typed = list(sys.argv[1:] if arguments is None else arguments)
    if _wants_a_device(typed):
        begin_early(typed)
        begin_to_load()
    try:
        import typer

        command = _app(arguments)
        try:
            with _ended_by_signals():
                status = command(args=arguments, prog_name="jaxreg", standalone_mode=False)
                sys.stdout.flush()
            raise SystemExit(status)
        except typer.Abort:
            raise KeyboardInterrupt from None
    except KeyboardInterrupt:
        raise _Ended(signal.SIGINT) from None
    except BrokenPipeError:  # whoever reads has seen enough, as `head` does
        # Python would try to write the rest when it ends, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(FAILED) from None
    except (OSError, ValueError) as error:
        _fail(str(error))
    except Exception as error:
        if is_lack_of_memory(error):
            _fail(f"out of memory: {error}", FAILED)
        # The parser's own errors have this method; their class moved between typer's versions.
        if not hasattr(error, "format_message"):
            raise
        # The help was asked for, by giving no arguments; what rich draws of it is told by now.
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error.format_message())
            raise SystemExit(BAD_INPUT) from None
        _fail(error.format_message())
    finally:
        end_early()


def _app(arguments: Sequence[str] | None) -> typer.Typer:
    """Return the command; only an outline of it where that is all that is asked for."""
    typed = list(sys.argv[1:] if arguments is None else arguments)
    if _COMPLETING in os.environ:  # a shell asks what could be typed next
        from jaxreg_cli.outline import completing_app

        return completing_app()
    if typed in ([], *([option] for option in _OF_THE_COMMAND_ITSELF)):
        from jaxreg_cli.outline import describing_app

        return describing_app()
    with _without_collections():
        if _wants_a_device(typed):
            _begin_to_find_devices()
        from jaxreg.commands import app
    return app


@contextlib.contextmanager
def _without_collections() -> Iterator[None]:
    """Import packages without looking for garbage, which takes a sixth of the time they take.

    What they make stays to the end, and is not looked at later, either.
    """
    if "jaxreg.commands" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()


def _wants_a_device(typed: Sequence[str]) -> bool:
    """Whether a command computes, on devices that need not be joined with others before."""
    beside = {"--help", "--distributed"}.intersection(typed)
    return bool(typed) and typed[0] in _COMPUTING and not beside and _COMPLETING not in os.environ


def _begin_to_find_devices() -> None:
    """Have JAX start its devices while the rest is imported: that of a GPU takes as long."""
    import jax

    def find() -> None:
        with contextlib.suppress(Exception):  # whoever asks for a device gets the error again
            jax.local_devices()

    threading.Thread(target=find, name=_DEVICES).start()


class _Ended(BaseException):
    """A signal asks for the end; no ``except Exception`` on the way is to keep it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end a run as Ctrl-C does, which leaves no temporary files behind.

    Whatever comes out of the run after a signal is taken for its end: what libraries make of an
    exception in the midst of them, or an extension that is being imported, may be any other one.
    """
    asked: list[int] = []

    def end(number: int, _: FrameType | None) -> NoReturn:
        asked.append(number)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise _Ended(number)

    try:
        with contextlib.ExitStack() as stack:
            for number in ENDING:
                handler = signal.getsignal(number)
                if _is_replaced(number, handler):
                    stack.callback(signal.signal, number, handler)
                    signal.signal(number, end)
            stack.enter_context(_swallowed_ends_return())
            yield
    except Exception:
        if not asked:
            raise
        raise _Ended(asked[0]) from None


def _is_replaced(number: int, handler: Any) -> bool:
    """Whether a command handles a signal: only the main thread may, and what is ignored stays so.

    By ignoring one nohup has asked for that. A handler of the program for Ctrl-C is its own way to
    end what it runs.
    """
    if threading.current_thread() is not threading.main_thread():
        return False
    if number == signal.SIGINT:
        return handler in (signal.default_int_handler, end_at_once)
    return handler not in (signal.SIG_IGN, None)


@contextlib.contextmanager
def _swallowed_ends_return() -> Iterator[None]:
    """Send a signal again whose exception was raised where Python cannot pass it on.

    Such a place is a callback of the garbage collector, of which JAX has one: what is raised there
    is reported and forgotten, and the run would go on as if nobody had asked for its end.
    """
    report = sys.unraisablehook

    def send_again(unraisable: sys.UnraisableHookArgs) -> None:
        error = unraisable.exc_value
        number = {_Ended: getattr(error, "number", 0), KeyboardInterrupt: signal.SIGINT}.get(
            unraisable.exc_type
        )
        if number is None:
            report(unraisable)
            return
        # The callback has to return first. Should the next exception be swallowed too, this is
        # called again.
        timer = threading.Timer(0.01, os.kill, (os.getpid(), number))
        timer.daemon = True
        timer.start()

    sys.unraisablehook = send_again
    try:
        yield
    finally:
        sys.unraisablehook = report


def _ask_for_the_same_bits() -> None:
    """Make the same command give the same bits on a GPU, too.

    There XLA otherwise adds up sums of its own in an order that differs from run to run, and
    chooses algorithms by timing them. It reads the variable when it starts; what the user sets in
    it comes later and so wins. It may also be the name of a file with flags, which is left alone.
    """
    flags = os.environ.get("XLA_FLAGS", "").strip()
    if (flags and not flags.startswith("-")) or "xla_gpu_deterministic_ops" in flags:
        return
    os.environ["XLA_FLAGS"] = f"--xla_gpu_deterministic_ops=true {flags}".strip()


def _fail(message: str, status: int = BAD_INPUT) -> NoReturn:
    with contextlib.suppress(OSError):  # the terminal may be gone
        print(f"jaxreg: error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(status)
