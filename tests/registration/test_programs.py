"""Programs of a registration are compiled ahead, by several threads, and each of them once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest
from scenes import header, physical_grid, scene

from jaxreg.registration import MSE, Affine, Greedy, Moments, Progress, register
from jaxreg.registration.programs import (
    Compiler,
    Program,
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


def test_changed_fields_are_those_that_are_other_arrays() -> None:
    matrix, field = np.eye(3), np.zeros((1, 2, 2, 2))
    before = Alignment(matrix, field)
    assert changed_fields(before, Alignment(matrix, field)) == {}
    changed = changed_fields(before, before._replace(displacement=field + 1))
    assert list(changed) == ["displacement"]
