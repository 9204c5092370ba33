"""Programs that another process traces are those that this one would have traced."""

from __future__ import annotations

import contextlib
import functools
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scenes import header, physical_grid, scene

from jaxreg.registration import (
    Affine,
    Greedy,
    Moments,
    Registration,
    Stage,
    elsewhere,
    programs,
    register,
    running,
)
from jaxreg.registration.programs import Compiler, Program, Tracer, shapes_of
from jaxreg_cli.tracing import TracingProcess, start
from regkernels import Volume

# Settings that no other test has, so that nothing is compiled when one of these begins.
STAGES = (Moments(scale=2), Affine((2, 1), (6, 4)), Greedy((2,), (4,), learning_rate=0.3))
LOOPS = 3


def pair() -> tuple[Volume, Volume]:
    fixed = header((26, 34), (4, 4))
    points = physical_grid(fixed)
    return fixed.with_array(scene(points)), fixed.with_array(scene(points + 3))


def registered(
    tracer: Tracer | None,
    *,
    stages: tuple[Stage, ...] = STAGES,
    watched: bool = False,
    folder: Path | None = None,
) -> Registration:
    jax.clear_caches()
    with Compiler(folder) as compiler, compiler.working() as work:
        work.tracer = tracer
        work.beside = functools.partial(jax.default_device, jax.devices()[0])
        return register(*pair(), stages, callback=(lambda _: None) if watched else None)


@functools.cache
def plain(watched: bool = False) -> Registration:
    """One that is traced in this process."""
    return registered(None, watched=watched)


def assert_same(found: Registration, expected: Registration) -> None:
    np.testing.assert_array_equal(found.transform.matrix, expected.transform.matrix)
    np.testing.assert_array_equal(found.transform.displacement, expected.transform.displacement)
    for stage, other in zip(found.stages, expected.stages, strict=True):
        for level, level_of_other in zip(stage.levels, other.levels, strict=True):
            np.testing.assert_array_equal(level.losses, level_of_other.losses)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of programs that are taken from answers."""
    found = []
    jitted = elsewhere.jitted

    def take(program: Any, answer: bytes) -> Any:
        function = jitted(program, answer)
        found.append(program.function.__name__)
        return function

    monkeypatch.setattr(elsewhere, "jitted", take)
    return found


class OfThread:
    """Asks a function, in threads of its own."""

    def __init__(self, answer: Callable[[bytes], bytes | None]) -> None:
        self._answer = answer
        self.requests: list[bytes] = []

    def submit(self, request: bytes, done: Callable[[bytes | None], None]) -> bool:
        self.requests.append(request)
        threading.Thread(target=lambda: done(self._answer(request))).start()
        return True

    def begin(self) -> None:
        pass

    def help(self) -> None:
        pass


class OnlyProcess(TracingProcess):
    """Helps nobody, so that the process has to answer."""

    def help(self) -> None:
        pass


@contextlib.contextmanager
def process_of(kind: type[TracingProcess]) -> Iterator[TracingProcess]:
    begun = start()
    assert begun is not None
    with kind(begun) as tracer:
        tracer.begin()
        yield tracer
    begun.wait(timeout=10)


@pytest.mark.parametrize("watched", [False, True])
def test_loops_that_another_process_traces_give_the_same_bits(
    taken: list[str], watched: bool
) -> None:
    expected = plain(watched)
    assert taken == []
    with process_of(OnlyProcess) as tracer:
        found = registered(tracer, watched=watched)
    assert taken == ["_run_block" if watched else "_run_level"] * LOOPS
    assert_same(found, expected)


def test_what_another_process_has_traced_is_kept(
    taken: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracer = OfThread(elsewhere.answer)
    first = registered(tracer, folder=tmp_path)
    assert len(taken) == LOOPS
    monkeypatch.setattr(programs._Call, "lowered", lambda _: pytest.fail("traced again"))
    again = registered(tracer, folder=tmp_path)
    assert len(taken) == len(tracer.requests) == LOOPS
    assert_same(again, first)


def test_what_follows_a_program_of_another_process_is_not_compiled_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """JAX binds its results to their device, as if somebody had chosen that."""
    find, missed = programs.Work.find, []

    def found(work: programs.Work, call: programs._Call) -> Any:
        program = find(work, call)
        if program is None:
            missed.append(call.program.name)
        return program

    monkeypatch.setattr(programs.Work, "find", found)
    plain()
    jax.clear_caches()
    missed.clear()
    registered(None)
    expected = list(missed)
    registered(OfThread(elsewhere.answer))
    assert missed == 2 * expected


@pytest.mark.parametrize(
    ("stages", "rehearsed"),
    [
        (STAGES, ["Greedy", "Moments", "Affine"]),
        ((Greedy((2,), (4,)), Greedy((2,), (3,))), ["Greedy", "Greedy", "Greedy"]),
        (STAGES[:1], ["Moments"]),
    ],
)
def test_the_last_stage_is_rehearsed_first_and_again_if_the_alignment_is_another(
    monkeypatch: pytest.MonkeyPatch, stages: tuple[Stage, ...], rehearsed: list[str]
) -> None:
    rehearse, found = running.rehearse, []

    def noted(function: Any, *args: Any) -> Any:
        if function is running._stage:
            found.append(type(args[0]).__name__)
        return rehearse(function, *args)

    monkeypatch.setattr(running, "rehearse", noted)
    result = registered(OfThread(elsewhere.answer), stages=stages)
    assert found == rehearsed
    assert_same(result, registered(None, stages=stages))


def test_a_process_that_is_killed_or_late_changes_nothing() -> None:
    for seconds in (0.0, 1.5, 3.0):
        begun = start()
        assert begun is not None
        timer = threading.Timer(seconds, begun.kill)
        timer.start()
        with TracingProcess(begun) as tracer:
            assert_same(registered(tracer), plain())
        timer.join()
        begun.wait(timeout=10)


@pytest.mark.parametrize("answer", [None, b"", b"nonsense"])
def test_what_is_not_answered_is_traced_here(taken: list[str], answer: bytes | None) -> None:
    tracer = OfThread(lambda _: answer)
    assert_same(registered(tracer), plain())
    assert len(tracer.requests) == LOOPS
    assert taken == []


def test_a_metric_of_a_user_is_traced_here() -> None:
    def loss(pred: jax.Array, target: jax.Array) -> jax.Array:
        return jnp.abs(pred - target).mean()

    stages = (Moments(scale=2), Affine((2,), (5,), metric=loss))
    tracer = OfThread(elsewhere.answer)
    found = registered(tracer, stages=stages)
    assert tracer.requests == []
    expected = registered(None, stages=stages)
    np.testing.assert_array_equal(found.transform.matrix, expected.transform.matrix)


def test_what_cannot_be_traced_ahead_is_traced_where_it_is_called(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(programs._Call, "lowered", fail)
    tracer = OfThread(lambda _: None)
    assert_same(registered(tracer), plain())
    assert len(tracer.requests) == LOOPS


@functools.partial(Program, static=("times",), donated=("x",))
def _scaled(
    x: jax.Array, unused: jax.Array, weak: Any, *, times: int
) -> dict[str, tuple[jax.Array, ...]]:
    return {"scaled": (times * x, weak + 1), "sum": (x.sum() + weak,)}


ARGUMENTS = np.arange(6, dtype=np.float32), np.ones(3, np.float32), np.float32(2)


def call() -> programs._Call:
    x, unused, _ = (jax.device_put(array) for array in ARGUMENTS)
    return programs._Call(_scaled, (x, unused, jax.lax.full((), 2.0)), {"times": 3})


def asked_for(called: programs._Call) -> bytes:
    key, platform = called.key(), elsewhere.platform_of(jax.devices()[0])
    assert key is not None and platform is not None
    request = elsewhere.request(called.program, key, platform)
    assert request is not None
    return request


def test_an_answer_is_called_as_the_program_itself() -> None:
    called = call()
    answer = elsewhere.answer(asked_for(called))
    other, shapes = call(), shapes_of(called.args)
    lowered = elsewhere.jitted(_scaled, answer).lower(*shapes)
    expected = other.lowered()
    assert lowered.out_info == expected.out_info
    assert lowered.args_info == expected.args_info  # with what is donated
    for text in (lowered.as_text(), expected.as_text()):
        (signature,) = re.findall(r"@main\((.*)\) ->", text)
        assert signature.count("%arg") == 2  # nothing follows from the other one
    results = lowered.compile()(*called.args)
    expected_results = expected.compile()(*other.args)
    jax.tree.map(np.testing.assert_array_equal, results, expected_results)
    assert shapes_of(results) == shapes_of(expected_results)  # weak types are, too
    assert called.args[0].is_deleted() and other.args[0].is_deleted()


def test_nothing_is_answered_under_other_settings() -> None:
    request = asked_for(call())
    assert elsewhere.answer(request)
    with jax.default_matmul_precision("float32"):
        assert elsewhere.answer(request) == b""
    assert elsewhere.answer(request)


@pytest.mark.parametrize(
    ("platform", "version", "expected"),
    [("cpu", "cpu", "cpu"), ("gpu", "PJRT C API\ncuda 13000", "cuda"), ("gpu", "rocm 7", None)],
)
def test_programs_are_lowered_for_the_platform_of_the_device(
    platform: str, version: str, expected: str | None
) -> None:
    device: Any = SimpleNamespace(
        platform=platform, client=SimpleNamespace(platform_version=version)
    )
    assert elsewhere.platform_of(device) == expected


def test_a_program_of_no_module_is_asked_of_nobody() -> None:
    def doubled(x: jax.Array) -> jax.Array:
        return 2 * x

    called = programs._Call(Program(doubled), (np.ones(2, np.float32),), {})
    key = called.key()
    assert key is not None
    assert elsewhere.request(called.program, key, "cpu") is None


def test_a_process_does_not_end_over_what_it_cannot_answer() -> None:
    answers: list[bytes | None] = []
    there = threading.Event()

    def note(answer: bytes | None) -> None:
        answers.append(answer)
        there.set()

    with process_of(TracingProcess) as tracer:
        for _ in range(2):
            there.clear()
            assert tracer.submit(b"nonsense", note)
            assert there.wait(60)
    assert answers == [None, None]
