"""What ends a process of the command by a signal while it has not begun anything.

It imports until then. An exception that a handler raises there comes out of an extension's
initialisation as another error, as none at all or as the end of the process with a core dump: JAX's
extensions import Python modules while they are set up, and what their C++ does with an exception
nobody promises. So none is raised: there is nothing to put in order, and the process ends.
"""

from __future__ import annotations

import os
import signal

TYPE_CHECKING = False  # as `typing` has it, which takes longer to import than all of this
if TYPE_CHECKING:
    from types import FrameType
    from typing import NoReturn

__all__ = ["ENDING", "end_at_once", "end_by_signals", "reason"]

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""The signals that ask a command for its end."""


def reason(number: int) -> str:
    """Return what is told of an end by a signal."""
    if number == signal.SIGINT:
        return "interrupted"
    return (signal.strsignal(number) or f"signal {number}").lower()


def end_at_once(number: int, _: FrameType | None) -> NoReturn:
    """End the process as a handler of a signal."""
    try:
        # Not by a stream, which may be in the middle of a line, or of another call.
        os.write(2, f"jaxreg: error: {reason(number)}\n".encode())
    finally:
        os._exit(128 + number)


def end_by_signals() -> None:
    """Have signals end this process at once, unless somebody else handles or ignores them."""
    for number in ENDING:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, end_at_once)
