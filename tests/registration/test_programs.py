"""Programs of a registration are compiled ahead, by several threads, and each of them once."""

from __future__ import annotations

import contextlib
import functools
import gc
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest
from scenes import header, physical_grid, scene

from jaxreg import compose
from jaxreg.commands.outputs import rehearse_images
from jaxreg.registration import FFD, MSE, Affine, Greedy, Moments, Progress, programs, register
from jaxreg.registration.kept_programs import Entry, read, write
from jaxreg.registration.programs import (
    Compiler,
    Program,
    Work,
    changed_fields,
    compiling,
    rehearse,
    shapes_of,
)
from jaxreg.registration.stages.problem import Alignment
from regkernels import Volume

# Settings that no other test has, so that nothing is compiled when one of these begins.
STAGES = (Moments(scale=2), Affine((2, 1), (6, 4)), Greedy((1,), (4,), learning_rate=0.4))


def pair() -> tuple[Volume, Volume]:
    fixed = header((26, 34), (4, 4))
    points = physical_grid(fixed)
    return fixed.with_array(scene(points)), fixed.with_array(scene(points + 3))


@pytest.fixture
def compiled() -> Iterator[list[tuple[str, bool]]]:
    """The programs that XLA compiles from now on, and whether the thread of the test does it."""
    found: list[tuple[str, bool]] = []
    for thread in threading.enumerate():  # what a registration that failed has begun
        if thread.name.startswith("compiler"):
            thread.join()

    def listen(event: str, seconds: float, **about: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            here = threading.current_thread() is threading.main_thread()
            found.append((str(about.get("fun_name")), here))

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


def test_no_program_sorts_or_calls_a_library_of_linear_algebra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # On a GPU a sort takes seconds to compile, and such a library a part of one to load.
    found: dict[str, str] = {}

    def note(self: Work, call: Any) -> None:
        found[call.program.name] = call.lowered().as_text()

    monkeypatch.setattr(Work, "begin", note)
    jax.clear_caches()
    fixed, moving = pair()
    with Compiler() as compiler, compiler.working() as work:
        names = frozenset({"moved.nii.gz", "fixed_moved.nii.gz"})
        work.afterwards = functools.partial(rehearse_images, fixed, moving, names)
        register(fixed, moving, STAGES)
    assert len(found) > 10
    for name, text in found.items():
        for costly in ("stablehlo.sort", "stablehlo.dot", "stablehlo.cholesky", "lapack"):
            assert costly not in text, name


@pytest.mark.parametrize("watched", [False, True])
def test_all_programs_of_the_stages_are_compiled_ahead_and_none_of_them_twice(
    compiled: list[tuple[str, bool]], watched: bool
) -> None:
    jax.clear_caches()
    told: list[Progress] = []
    first = register(*pair(), STAGES, callback=told.append if watched else None)
    assert [name for name, here in compiled if here] == []
    assert len(compiled) > 10
    compiled.clear()
    again = register(*pair(), STAGES, callback=told.append if watched else None)
    assert compiled == []
    np.testing.assert_array_equal(first.transform.displacement, again.transform.displacement)
    assert bool(told) == watched


def test_what_is_compiled_ahead_gives_the_bits_of_what_is_compiled_when_it_is_called(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ahead = register(*pair(), STAGES)
    jax.clear_caches()
    monkeypatch.setattr("jaxreg.registration.running._rehearse", lambda *_: None)
    plain = register(*pair(), STAGES)
    np.testing.assert_array_equal(ahead.transform.matrix, plain.transform.matrix)
    np.testing.assert_array_equal(ahead.transform.displacement, plain.transform.displacement)


def test_an_error_of_a_metric_is_raised_where_it_is_used_and_as_it_is() -> None:
    def wrong(pred: jax.Array, target: jax.Array) -> jax.Array:
        raise ZeroDivisionError("of the metric")

    with pytest.raises(ZeroDivisionError, match="of the metric"):
        register(*pair(), [Affine((2,), (2,), metric=wrong)])


def test_a_rehearsal_computes_nothing_and_has_compiled_what_is_called_later(
    compiled: list[tuple[str, bool]],
) -> None:
    ran = []

    @Program
    def doubled(x: jax.Array) -> jax.Array:
        jax.debug.callback(lambda: ran.append(1))
        return 2 * x

    with compiling():
        shape = rehearse(lambda x: doubled(doubled(x)), shapes_of(np.ones(3, np.float32)))
        assert (shape.shape, shape.dtype) == ((3,), np.float32)
        result = doubled(np.ones(3, np.float32))
    jax.effects_barrier()
    assert (len(ran), compiled) == (1, [("jit(doubled)", False)])
    np.testing.assert_array_equal(result, [2, 2, 2])


def test_a_program_within_another_is_a_part_of_that(compiled: list[tuple[str, bool]]) -> None:
    @Program
    def inner(x: jax.Array) -> jax.Array:
        return x + 1

    @Program
    def outer(x: jax.Array) -> jax.Array:
        return 3 * inner(x)

    with compiling():
        rehearse(outer, shapes_of(np.ones(2, np.float32)))
        outer(np.ones(2, np.float32))
    assert compiled == [("jit(outer)", False)]
    np.testing.assert_array_equal(jax.vmap(outer)(jnp.ones((2, 2))), 6 * np.ones((2, 2)))


def test_kept_programs_are_loaded_by_another_compiler_and_compute_the_same(
    tmp_path: Path, compiled: list[tuple[str, bool]]
) -> None:
    results = []
    jax.clear_caches()  # what has run cannot be kept any more, on a CPU
    for _ in range(2):
        with Compiler(tmp_path) as compiler, compiler.working():
            results.append(register(*pair(), STAGES))
        jax.clear_caches()
        compiled.append(("end", True))
    assert compiled.index(("end", True)) == len(compiled) - 2 > 10  # the second compiles nothing
    first, second = (result.transform for result in results)
    np.testing.assert_array_equal(first.matrix, second.matrix)
    np.testing.assert_array_equal(first.displacement, second.displacement)


def test_what_follows_from_functions_of_others_is_not_kept(tmp_path: Path) -> None:
    def own(pred: jax.Array, target: jax.Array) -> jax.Array:
        return ((pred - target) ** 2).mean()

    for metric, count in ((own, 0), (MSE(), 1)):
        with Compiler(tmp_path) as compiler, compiler.working():
            register(*pair(), [Affine((2,), (2,), metric=metric)])
        assert len(list(tmp_path.iterdir())) == count


def kept_doubling(folder: Path, function: Callable[[jax.Array], jax.Array]) -> Path:
    """A file with the program of a function of three numbers, as a registration leaves it."""
    with Compiler(folder) as compiler, compiler.working() as work:
        assert not work.is_kept("a registration")
        function(np.ones(3, np.float32))
    (file,) = folder.iterdir()
    jax.clear_caches()
    return file


def failing(error: Exception) -> Callable[..., Any]:
    def run(*args: jax.Array) -> jax.Array:
        raise error

    return run


def test_a_program_that_was_loaded_and_fails_is_compiled_and_kept_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: list[tuple[str, bool]]
) -> None:
    @Program
    def doubled(x: jax.Array) -> jax.Array:
        return 2 * x

    file = kept_doubling(tmp_path, doubled)
    content = file.read_bytes()
    file.write_bytes(content)
    changed = file.stat().st_mtime_ns
    compiled.clear()
    with monkeypatch.context() as patch:
        error = jax.errors.JaxRuntimeError("INTERNAL: of a device")
        patch.setattr(Entry, "load", lambda *_: failing(error))
        with Compiler(tmp_path) as compiler, compiler.working() as work:
            assert work.is_kept("a registration")
            np.testing.assert_array_equal(doubled(np.ones(3, np.float32)), [2, 2, 2])
            np.testing.assert_array_equal(doubled(np.ones(3, np.float32)), [2, 2, 2])
    assert compiled == [("jit(doubled)", False)]
    assert file.stat().st_mtime_ns > changed
    jax.clear_caches()
    with Compiler(tmp_path) as compiler, compiler.working() as work:
        assert work.is_kept("a registration")
        np.testing.assert_array_equal(doubled(np.ones(3, np.float32)), [2, 2, 2])
    assert len(compiled) == 1


def test_an_error_of_a_program_that_has_written_to_its_arguments_is_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @functools.partial(Program, donated=("x",))
    def doubled(x: jax.Array) -> jax.Array:
        return 2 * x

    def written(x: jax.Array) -> jax.Array:
        x.delete()
        raise jax.errors.JaxRuntimeError("INTERNAL: of a device")

    kept_doubling(tmp_path, doubled)
    monkeypatch.setattr(Entry, "load", lambda *_: written)
    with Compiler(tmp_path) as compiler, compiler.working() as work:
        assert work.is_kept("a registration")
        with pytest.raises(jax.errors.JaxRuntimeError, match="of a device"):
            doubled(jax.device_put(np.ones(3, np.float32)))


@pytest.mark.parametrize(
    ("message", "runs"), [("INTERNAL: a kernel", 2), ("RESOURCE_EXHAUSTED: of memory", 1)]
)
def test_what_fails_later_runs_again_without_what_was_loaded(
    tmp_path: Path, message: str, runs: int
) -> None:
    @Program
    def doubled(x: jax.Array) -> jax.Array:
        return 2 * x

    file = kept_doubling(tmp_path, doubled)
    ran = []

    def registration(work: Work) -> Any:
        was_kept = work.is_kept("a registration")
        ran.append(was_kept)
        found = np.asarray(doubled(np.ones(3, np.float32)))
        if was_kept:  # as a device tells it that has run other programs meanwhile
            raise jax.errors.JaxRuntimeError(message)
        return found

    with Compiler(tmp_path) as compiler:
        if runs == 1:
            with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
                compiler.run(registration)
        else:
            np.testing.assert_array_equal(compiler.run(registration), [2, 2, 2])
    assert ran == [True, False][:runs]
    assert read(file) != {}


@pytest.mark.parametrize("was_enabled", [True, False])
def test_a_rehearsal_looks_for_no_garbage_and_leaves_that_as_it_was(
    monkeypatch: pytest.MonkeyPatch, was_enabled: bool
) -> None:
    found = []
    monkeypatch.setattr(Work, "begin", lambda *_: found.append(gc.isenabled()))
    jax.clear_caches()
    if not was_enabled:
        gc.disable()
    try:
        register(*pair(), STAGES[:1])
        assert set(found) == {False}
        assert gc.isenabled() == was_enabled
    finally:
        gc.enable()


def test_linear_algebra_that_was_kept_is_found_by_a_process_that_has_traced_none(
    tmp_path: Path,
) -> None:
    code = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from jaxreg.registration.programs import Compiler, Program

@Program
def doubled(x):
    return 2 * x

@Program
def root(x):
    return jnp.linalg.cholesky(x)

with Compiler(Path("kept")) as compiler, compiler.working() as work:
    was_kept = work.is_kept("these")
    assert was_kept == (sys.argv[1] == "again"), was_kept
    print(doubled(np.ones(1, np.float32))[0])
    if was_kept:
        print("scipy" in sys.modules)
    if "root" in sys.argv:
        print(root(np.full((1, 1), 9, np.float32))[0, 0])
"""

    def run(*words: str) -> list[str]:
        done = subprocess.run(
            [sys.executable, "-c", code, *words],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.split()

    (tmp_path / "kept").mkdir()
    assert run("first") == ["2.0"]
    on_cpu = jax.default_backend() == "cpu"
    assert run("again") == ["2.0", "False"]  # it takes long to import
    assert run("again", "root") == ["2.0", "False", "3.0"]
    assert run("again", "root") == ["2.0", str(on_cpu), "3.0"]


def test_an_error_that_nothing_loaded_has_part_in_is_raised_at_once(tmp_path: Path) -> None:
    ran = []

    def registration(work: Work) -> None:
        ran.append(work.is_kept("a registration"))
        raise jax.errors.JaxRuntimeError("INTERNAL: of a device")

    with Compiler(tmp_path) as compiler, pytest.raises(jax.errors.JaxRuntimeError):
        compiler.run(registration)
    assert ran == [False]


def test_a_file_holds_what_was_used_last_and_not_more_than_so_many_programs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @Program
    def doubled(x: jax.Array) -> jax.Array:
        return 2 * x

    monkeypatch.setattr(programs, "_MOST", 3)
    for sizes in ([1, 2, 3], [1, 4]):
        with Compiler(tmp_path) as compiler, compiler.working() as work:
            work.is_kept("a registration")
            for size in sizes:
                doubled(np.ones(size, np.float32))
        jax.clear_caches()
    (file,) = tmp_path.iterdir()
    assert [key[3][0][0] for key in read(file)] == [(3,), (1,), (4,)]


def test_a_reader_finds_what_one_of_several_writers_has_written(tmp_path: Path) -> None:
    path = tmp_path / "file"

    def entries(writer: int) -> dict[Any, Entry]:
        found = (Entry((f"program {n}", writer), bytes(10_000), None, None) for n in range(50))
        return {entry.key: entry for entry in found}

    def write_often(writer: int) -> None:
        for _ in range(30):
            write(path, entries(writer))

    write(path, entries(0))
    with ThreadPoolExecutor(3) as pool:
        writing = [pool.submit(write_often, writer) for writer in range(3)]
        while not all(future.done() for future in writing):
            found = read(path)
            assert len(found) == 50
            assert len({writer for _, writer in found}) == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_process_that_has_traced_nothing_runs_the_ops_that_it_loads(tmp_path: Path) -> None:
    """The kernels have to be registered by the import of what loads: no tracing does it."""

    @Program
    def composed(x: jax.Array) -> jax.Array:
        return compose(x, x) + jnp.linalg.inv(jnp.eye(2, dtype=x.dtype)).sum()

    field = np.full((1, 4, 5, 2), 0.25, np.float32)
    (tmp_path / "kept").mkdir()
    with Compiler(tmp_path / "kept") as compiler, compiler.working() as work:
        work.is_kept("a registration")
        expected = np.asarray(composed(field))
    (file,) = (tmp_path / "kept").iterdir()
    code = """
import pathlib, sys
from jaxreg.registration.kept_programs import read
import jax, numpy as np
(entry,) = read(pathlib.Path(sys.argv[1])).values()
program = entry.load(jax.devices("cpu")[0])
np.save(sys.argv[2], program(np.full((1, 4, 5, 2), 0.25, np.float32)))
"""
    found = tmp_path / "found.npy"
    subprocess.run([sys.executable, "-c", code, file, found], cwd=tmp_path, check=True)
    np.testing.assert_array_equal(np.load(found), expected)


def test_programs_of_control_points_in_millimetres_are_compiled_ahead(
    compiled: list[tuple[str, bool]],
) -> None:
    register(*pair(), [FFD((2, 1), (3, 2), spacing=20, unit="mm")])
    assert len(compiled) > 5
    assert [name for name, here in compiled if here] == []


def test_changed_fields_are_those_that_are_other_arrays() -> None:
    matrix, field = np.eye(3), np.zeros((1, 2, 2, 2))
    before = Alignment(matrix, field)
    assert changed_fields(before, Alignment(matrix, field)) == {}
    changed = changed_fields(before, before._replace(displacement=field + 1))
    assert list(changed) == ["displacement"]


def test_large_arrays_are_waited_for_and_tracers_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    waited = []
    monkeypatch.setattr(programs, "_LARGE", 100)
    monkeypatch.setattr(jax, "block_until_ready", waited.append)
    small, large = jnp.zeros(20), jnp.zeros(30)
    assert programs.settled({"x": small})["x"] is small
    assert waited == []
    assert programs.settled((large, None)) == (large, None)
    assert waited == [[large]]
    jax.jit(programs.settled)(large)
    assert len(waited) == 1


def test_stages_run_beside_their_rehearsal_and_wait_for_what_it_has_not_met_yet() -> None:
    met = []
    has_run = threading.Event()

    @Program
    def first(x: jax.Array) -> jax.Array:
        return 2 * x

    @Program
    def second(x: jax.Array) -> jax.Array:
        met.append((threading.current_thread().name, has_run.wait(30)))
        return x + 1

    ones = np.ones(3, np.float32)
    with Compiler() as compiler, compiler.working() as work:
        work.beside = contextlib.nullcontext
        work.rehearse(lambda: rehearse(lambda x: second(first(x)), shapes_of(ones)))
        found = first(ones)
        has_run.set()
        np.testing.assert_array_equal(second(found), [3, 3, 3])
    assert met == [("compiler_rehearsal", True)]  # and nobody has traced it a second time


def test_what_is_rehearsed_beside_the_stages_is_compiled_once_and_gives_the_same_bits(
    tmp_path: Path, compiled: list[tuple[str, bool]]
) -> None:
    results, names = [], []
    for beside in (None, contextlib.nullcontext):
        jax.clear_caches()
        compiled.clear()
        with Compiler(tmp_path / str(beside)) as compiler, compiler.working() as work:
            (tmp_path / str(beside)).mkdir()
            work.beside = beside
            results.append(register(*pair(), STAGES, callback=lambda _: None).transform)
        assert [name for name, here in compiled if here] == []
        names.append(sorted(name for name, _ in compiled))
        (file,) = (tmp_path / str(beside)).iterdir()
        names.append(sorted(f"jit({entry.name})" for entry in read(file).values()))
    assert names == [names[0]] * 4
    np.testing.assert_array_equal(results[0].displacement, results[1].displacement)


def test_a_rehearsal_ends_when_the_stages_have_failed() -> None:
    goes_on = threading.Event()
    met = []

    @Program
    def first(x: jax.Array) -> jax.Array:
        goes_on.wait(30)
        return 2 * x

    @Program
    def second(x: jax.Array) -> jax.Array:
        met.append("second")
        return x

    with (
        pytest.raises(ValueError, match="of a stage"),
        Compiler() as compiler,
        compiler.working() as work,
    ):
        work.beside = contextlib.nullcontext
        work.rehearse(lambda: rehearse(lambda x: second(first(x)), shapes_of(np.ones(3))))
        raise ValueError("of a stage")
    goes_on.set()
    for thread in threading.enumerate():
        if thread.name == "compiler_rehearsal":
            thread.join()
    assert met == []


def test_no_bytes_of_programs_are_taken_while_others_are_traced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = []
    of_program = Entry.of
    is_rehearsed = False

    def of(key: Any, compiled: Any) -> Entry | None:
        taken.append(is_rehearsed)
        return of_program(key, compiled)

    @Program
    def doubled(x: jax.Array) -> jax.Array:
        return 2 * x

    monkeypatch.setattr(Entry, "of", of)
    with Compiler(tmp_path) as compiler, compiler.working() as work:
        work.is_kept("a registration")

        def rehearsal() -> None:
            nonlocal is_rehearsed
            for size in range(1, 5):
                rehearse(doubled, shapes_of(np.ones(size, np.float32)))
            for future in list(compiler._programs.values()):
                future.result()
            is_rehearsed = True

        work.rehearse(rehearsal)
        doubled(np.ones(1, np.float32))
    assert taken == [True] * 4


def test_what_returns_arrays_like_its_own_is_rehearsed_last() -> None:
    traced = []

    @functools.partial(Program, like=lambda x: x)
    def loop(x: jax.Array) -> jax.Array:
        traced.append("loop")
        return x + 1

    @Program
    def after(x: jax.Array) -> jax.Array:
        traced.append("after")
        return 2 * x

    ones = np.ones(3, np.float32)
    with compiling():
        shape = rehearse(lambda x: after(loop(loop(x))), shapes_of(ones))
        assert (shape.shape, shape.dtype) == ((3,), np.float32)
        np.testing.assert_array_equal(after(loop(loop(ones))), [6, 6, 6])
    assert traced == ["after", "loop"]


@pytest.mark.parametrize("once", [True, False])
def test_the_bytes_of_a_program_are_taken_before_it_runs_where_it_gives_them_only_then(
    once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    did: list[str] = []
    monkeypatch.setattr(Entry, "of", lambda *_: did.append("bytes"))
    key = ("a program",)
    compiled = programs._Compiled(lambda: did.append("run"), None, key, gives_bytes_once=once)
    compiled.executable()()
    for _ in range(2):
        compiled.entry()
    assert did == (["bytes", "run"] if once else ["run", "bytes"])
