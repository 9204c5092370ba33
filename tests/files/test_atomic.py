"""Files and folders appear whole or not at all, whatever interrupts the writing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest

from regkernels.files.atomic import _uninterrupted, atomic_folder, atomic_path


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "result.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_path(path) as beside:
        beside.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_filled_whole_or_not_at_all(tmp_path: Path) -> None:
    goal = tmp_path / "new" / "folder"
    with pytest.raises(RuntimeError), atomic_folder(goal) as beside:
        (beside / "a").write_text("half")
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    for text in ("first", "second"):
        with atomic_folder(goal) as beside:
            (beside / "a").write_text(text)
    (goal / "b").write_text("of someone else")
    with atomic_folder(goal) as beside:
        (beside / "a").write_text("third")
    assert {path.name: path.read_text() for path in goal.iterdir()} == {
        "a": "third",
        "b": "of someone else",
    }
    with pytest.raises(OSError, match="cannot write there"), atomic_folder(goal / "a"):
        pass
    (goal / "c").mkdir()
    with pytest.raises(OSError, match="expected a file"), atomic_folder(goal, owned=["c"]):
        pass
    with pytest.raises(OSError, match="expected a file"), atomic_folder(goal) as beside:
        for name in ("a", "c"):
            (beside / name).write_text("fourth")
    assert (goal / "a").read_text() == "third"


def test_what_a_process_that_is_killed_has_written_is_removed(tmp_path: Path) -> None:
    program = textwrap.dedent(
        """
        import os
        from pathlib import Path
        from regkernels.files.atomic import atomic_folder

        for name in ("whole", "half"):
            with atomic_folder(Path("out"), guarded=True) as beside:
                (beside / name).write_text(name)
                if name == "half":
                    print(beside.name)
                    os.abort()
        """
    )
    done = subprocess.run(
        [sys.executable, "-u", "-c", program],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGABRT, done.stderr
    beside = tmp_path / "out" / done.stdout.strip()
    assert beside.name.startswith(".regkernels-")
    end = time.monotonic() + 60
    while beside.exists() and time.monotonic() < end:
        time.sleep(0.05)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "whole"]


def test_an_interrupt_between_two_files_waits_for_the_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, default_signals: None
) -> None:
    replace = os.replace

    def interrupted(*paths: Path) -> None:
        signal.raise_signal(signal.SIGINT)
        replace(*paths)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path) as beside:
        for name in ("a", "b"):
            (beside / name).write_text(name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)  # which interrupts again


@pytest.fixture
def handled() -> Iterator[list[int]]:
    """The signals that handlers of the program have got; that of SIGHUP raises an exception."""
    got: list[int] = []

    def handle(number: int, _: object) -> None:
        got.append(number)
        if number == signal.SIGHUP:
            raise InterruptedError

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, handle) for number in numbers}
    yield got
    assert [signal.signal(number, handler) for number, handler in before.items()] == [handle] * 3


def test_every_signal_that_was_held_is_delivered_once(handled: list[int], tmp_path: Path) -> None:
    sent = [signal.SIGHUP, signal.SIGINT, signal.SIGTERM]

    def write() -> None:
        with atomic_path(tmp_path / "a"), _uninterrupted():
            for number in (*sent, *sent):
                signal.raise_signal(number)
            assert not handled

    with pytest.raises(InterruptedError):
        write()
    assert handled == sent


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_handlers_are_put_back_is_delivered_once(
    number: signal.Signals, handled: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    put = signal.signal
    restored = 0

    def interrupted(which: int, handler: object) -> object:
        nonlocal restored
        before = put(which, handler)
        if before.__name__ == "hold":
            restored += 1
            if restored == 2:  # one handler is still to be put back
                signal.raise_signal(number)
        return before

    monkeypatch.setattr(signal, "signal", interrupted)
    raised = pytest.raises(InterruptedError) if number == signal.SIGHUP else nullcontext()
    with raised, _uninterrupted():
        pass
    monkeypatch.undo()
    assert handled == [number]
