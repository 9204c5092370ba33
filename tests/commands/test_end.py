"""How the process of a command ends: at once, but not before all is written that is to be."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from regkernels import Volume, write_volume

AROUND = """
import atexit, importlib, logging, sys, threading, time
main = importlib.import_module("jaxreg_cli.running")
sys.argv = ["jaxreg", "apply"]
{before}

def command(**_):
    import jax
    jax.devices()
    jax._src.api.clean_up = atexit.register(lambda: print("devices are taken down"))
    atexit.register(print, "called at the end")
    {during}
    print("done")
    return {status}

main._app = lambda arguments: command
try:
    main.run_as_process()
finally:
    print("left to Python")
"""


def run(tmp_path: Path, before: str = "", during: str = "", status: int = 0) -> tuple[int, str]:
    """Run a command that computes, in a process of its own; return its status and output."""
    code = AROUND.format(before=before, during=during, status=status)
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.stderr == ""
    return done.returncode, done.stdout


@pytest.mark.parametrize("status", [0, 2])
def test_what_asks_for_it_is_called_at_the_end_but_devices_are_not_taken_down(
    tmp_path: Path, status: int
) -> None:
    assert run(tmp_path, status=status) == (status, "done\ncalled at the end\n")


@pytest.mark.parametrize(
    "before",
    ["sys.setprofile(lambda *_: None)", "sys.settrace(lambda *_: None)", "import coverage"],
)
def test_a_process_that_is_watched_ends_as_python_does(tmp_path: Path, before: str) -> None:
    if before == "import coverage":
        before = 'sys.modules["coverage"] = sys'
    told = "done\nleft to Python\ncalled at the end\ndevices are taken down\n"
    assert run(tmp_path, before) == (0, told)


def test_the_end_waits_for_what_another_thread_does(tmp_path: Path) -> None:
    during = "threading.Timer(0.5, print, ('another is done',)).start()"
    status, told = run(tmp_path, during=during)
    assert status == 0
    assert told.startswith("done\nleft to Python\nanother is done\n")


def test_the_end_does_not_wait_for_a_thread_that_an_interrupt_kept_from_starting(
    tmp_path: Path,
) -> None:
    during = "thread = threading.Thread(target=print); threading._limbo[thread] = thread"
    assert run(tmp_path, during=during) == (0, "done\ncalled at the end\n")


COMPILING = "threading.Thread(target=time.sleep, args=(300,), name='compiler_0').start()"


def test_the_end_does_not_wait_for_programs_that_nobody_waits_for(tmp_path: Path) -> None:
    assert run(tmp_path, during=COMPILING) == (0, "done\ncalled at the end\n")


def test_the_end_waits_for_programs_that_jax_keeps(tmp_path: Path) -> None:
    during = COMPILING.replace("300", "1") + ""
    during += "; jax.config.update('jax_enable_compilation_cache', True)"
    during += "; jax.config.update('jax_compilation_cache_dir', 'x')"
    status, told = run(tmp_path, during=during)
    assert status == 0
    assert told.startswith("done\nleft to Python\n")


@pytest.mark.parametrize("module", ["jaxreg_cli", "jaxreg"])
def test_all_that_is_printed_into_a_pipe_or_a_file_arrives(tmp_path: Path, module: str) -> None:
    image = np.random.default_rng(0).normal(size=(40, 50)).astype(np.float32)
    write_volume(Volume.create(image), tmp_path / "image.nii.gz")
    command = [sys.executable, "-m", module, "compare", "image.nii.gz", "image.nii.gz"]
    into_pipe = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert into_pipe.stderr == ""
    assert into_pipe.stdout.endswith("\n")
    with (tmp_path / "told").open("w") as file:
        subprocess.run(command, cwd=tmp_path, stdout=file, check=True)
    assert (tmp_path / "told").read_text() == into_pipe.stdout
    command[-1] = "missing.nii.gz"
    failed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert failed.returncode == 2
    assert failed.stderr.startswith("jaxreg: error: ")
    assert failed.stderr.count("\n") == 1


# --- By signals while it imports ------------------------------------------------------------------

IMPORTING = """
import signal, sys
number, module, handler = int(sys.argv[1]), sys.argv[2], sys.argv[3]

# What a shell runs in the background ignores some of them, and so would this process.
for each, usual in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGTERM, signal.SIG_DFL),
    (signal.SIGHUP, signal.SIG_DFL),
):
    signal.signal(each, signal.SIG_IGN if handler == "ignored" else usual)

class Finder:
    is_waiting = True

    def find_spec(self, name, path=None, target=None):
        if name == module and self.is_waiting:
            self.is_waiting = False
            try:
                signal.raise_signal(number)
            except BaseException:  # what an extension may make of it
                if handler == "another error":
                    raise ImportError("initialization failed") from None

sys.meta_path.insert(0, Finder())
sys.argv[1:] = ["apply", "image.nii.gz", "-r", "image.nii.gz", "-o", "out.nii.gz"]
sys.argv += ["--device", "cpu", "--no-cache"]
from jaxreg_cli import run_as_process
run_as_process()
"""


def signalled(tmp_path: Path, number: int, module: str, handler: str) -> tuple[int, str]:
    """Run a command that gets a signal when it imports a module; return its status and stderr."""
    image = np.random.default_rng(0).normal(size=(8, 9)).astype(np.float32)
    write_volume(Volume.create(image), tmp_path / "image.nii.gz")
    done = subprocess.run(
        [sys.executable, "-c", IMPORTING, str(int(number)), module, handler],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize("module", ["jaxreg_cli.tracing", "typer", "jaxlib", "jax._src.lib"])
@pytest.mark.parametrize("handler", ["swallowed", "another error"])
def test_an_interrupt_during_imports_ends_the_process_at_once_in_one_line(
    tmp_path: Path, module: str, handler: str
) -> None:
    told = signalled(tmp_path, signal.SIGINT, module, handler)
    assert told == (130, "jaxreg: error: interrupted\n")
    assert not (tmp_path / "out.nii.gz").exists()


@pytest.mark.parametrize(
    ("number", "status", "told"),
    [(signal.SIGTERM, 143, "terminated"), (signal.SIGHUP, 129, "hangup")],
)
def test_other_signals_during_imports_do_so_too(
    tmp_path: Path, number: signal.Signals, status: int, told: str
) -> None:
    found = signalled(tmp_path, number, "jax._src.lib", "another error")
    assert found == (status, f"jaxreg: error: {told}\n")


def test_a_signal_that_is_ignored_stays_so_during_imports(tmp_path: Path) -> None:
    assert signalled(tmp_path, signal.SIGINT, "jax._src.lib", "ignored") == (0, "")
    assert (tmp_path / "out.nii.gz").exists()
