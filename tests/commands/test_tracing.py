"""A process that traces is begun where it pays, and never outlives the command."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from jaxreg.registration.kept_programs import SUFFIX
from jaxreg_cli import tracing
from jaxreg_cli.tracing import TracingProcess, begin_early, end_early, start

REGISTER = ["register", "a.nii", "b.nii", "-o", "out"]


class Begun:
    """A process that only counts."""

    stdin = stdout = None

    def __init__(self) -> None:
        self.ended = 0

    def kill(self) -> None:
        self.ended += 1

    def wait(self, timeout: float) -> int:
        return 0


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Begun]:
    """What is begun, on a machine with a GPU, many cores and an empty cache."""
    found: list[Begun] = []

    def begin() -> Begun:
        found.append(Begun())
        return found[-1]

    monkeypatch.setattr(tracing, "start", begin)
    monkeypatch.setattr(tracing, "_CARDS", ("/",))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    for name in ("JAX_PLATFORMS", "JAX_COMPILATION_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "users"))
    return found


def folder_with_programs(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / f"0123{SUFFIX}").touch()
    return path


@pytest.mark.parametrize(
    ("words", "count"),
    [
        ([], 1),
        (["--device", "gpu"], 1),
        (["--devices", "1"], 1),
        (["--device", "cpu"], 0),
        (["--device=cpu"], 0),
        (["--devices", "2"], 0),
        (["--distributed"], 0),
        (["--help"], 0),
    ],
)
def test_it_is_begun_for_a_registration_on_one_gpu(
    begun: list[Begun], words: list[str], count: int
) -> None:
    begin_early([*REGISTER, *words])
    assert len(begun) == count
    end_early()
    assert [process.ended for process in begun] == [1] * count


def test_it_is_not_begun_for_other_commands(begun: list[Begun]) -> None:
    begin_early(["apply", *REGISTER[1:]])
    begin_early([])
    assert begun == []


def test_it_is_not_begun_where_programs_are_kept(begun: list[Begun], tmp_path: Path) -> None:
    folder_with_programs(tmp_path / "users" / "regkernels" / "xla-0")
    begin_early(REGISTER)
    assert begun == []
    begin_early([*REGISTER, "--no-cache"])
    begin_early([*REGISTER, "--cache", str(tmp_path / "other")])
    assert len(begun) == 2
    other = folder_with_programs(tmp_path / "other")
    begin_early([*REGISTER, "--cache", str(other)])
    begin_early([*REGISTER, f"--cache={other}"])
    assert len(begun) == 2
    end_early()


def test_it_is_begun_neither_for_a_cpu_nor_with_few_cores(
    begun: list[Begun], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    begin_early(REGISTER)
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setattr(tracing, "_CARDS", ("/no/such/card",))
    begin_early(REGISTER)
    monkeypatch.setattr(tracing, "_CARDS", ("/",))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    begin_early(REGISTER)
    assert begun == []
    with TracingProcess() as tracer:  # nor when something is asked
        tracer.begin()
        assert not tracer.submit(b"", lambda _: None)
    assert begun == []


def test_one_that_nobody_asks_is_ended(begun: list[Begun]) -> None:
    begin_early(REGISTER)
    with TracingProcess.of_command():
        pass
    end_early()
    (process,) = begun
    assert process.ended > 0


def scripted(code: str) -> subprocess.Popen[bytes]:
    """A process that is there at once, and then does something else."""
    there = "import sys, time; sys.stdout.buffer.write(bytes(8)); sys.stdout.flush();"
    return subprocess.Popen(
        [sys.executable, "-c", there + code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )


@pytest.mark.parametrize(
    "code",
    [
        "",
        "sys.stdin.buffer.read(9)",
        "sys.stdin.buffer.read(9); print('half')",
        "time.sleep(300)",
    ],
)
def test_a_process_that_ends_or_is_silent_gives_no_answer(
    code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracing, "_PATIENCE", 2)
    process, answers, there = scripted(code), [], threading.Event()

    def note(answer: bytes | None) -> None:
        answers.append(answer)
        there.set()

    with TracingProcess(process) as tracer:
        tracer.begin()
        assert tracer.submit(b"?", note)
        assert there.wait(30)
        assert answers == [None]
        process.wait(30)
        # What is asked later is refused, or taken by who helps.
        if tracer.submit(b"?", note):
            tracer.help()
            assert answers == [None, None]


def test_who_helps_takes_the_last_first() -> None:
    process = subprocess.Popen(  # it is never there
        [sys.executable, "-c", "import time; time.sleep(300)"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    taken: list[int] = []
    with TracingProcess(process) as tracer:
        tracer.begin()
        for number in range(3):
            assert tracer.submit(b"?", lambda _, number=number: taken.append(number))
        tracer.help()
    assert taken == [2, 1, 0]
    assert process.wait(30) != 0


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("seconds", [0.0, 4.0])
def test_it_ends_with_the_process_that_has_started_it(tmp_path: Path, seconds: float) -> None:
    code = "from jaxreg_cli.tracing import start; import time; print(start().pid, flush=True);"
    with subprocess.Popen(
        [sys.executable, "-c", f"{code} time.sleep(300)"], stdout=subprocess.PIPE, cwd=tmp_path
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        time.sleep(seconds)  # it is at its imports, or there
        assert is_running(pid)
        parent.kill()
    deadline = time.monotonic() + 30
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(pid)


def test_it_finds_packages_where_its_starter_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that happens to be the working directory is none of these."""
    (tmp_path / "jaxreg_cli.py").write_text("raise SystemExit")
    monkeypatch.chdir(tmp_path)
    process, there = start(), threading.Event()
    assert process is not None
    with TracingProcess(process) as tracer:
        tracer.begin()
        assert tracer.submit(b"nonsense", lambda _: there.set())
        assert there.wait(60)
        assert process.poll() is None
