"""Images with many channels: they are taken one after the other, and need the memory of one."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from inputs import random_array

from jaxreg import gaussian_smooth, lncc_loss
from jaxreg.registration import (
    FFD,
    LNCC,
    MI,
    MSE,
    NCC,
    NMI,
    SVF,
    Affine,
    Greedy,
    Metric,
    Rigid,
    SyN,
    downsample,
)
from jaxreg.registration.register_images import make_problem
from jaxreg.registration.stages.iterative import Iterative, Resolution, State
from jaxreg.registration.stages.problem import Level

SHAPE = (20, 22, 24)


def images(channels: int, shape: tuple[int, ...] = SHAPE) -> list[np.ndarray]:
    """Two images that have something to do with each other; an empty channel in the first."""
    noise = random_array(0, 1, channels, *shape, dtype=np.float32)
    smooth = np.array(gaussian_smooth(noise, (2.0,) * len(shape)))
    other = np.roll(smooth, 1, axis=-1) + 0.1 * smooth[:, ::-1]
    smooth[:, :1] = 0
    return [10 * smooth[0], 10 * other[0]]


def level_of(metric: Metric, channels: int, shape: tuple[int, ...] = SHAPE) -> Level:
    """The finest level of two images, with masks, some of which a shift has left without data."""
    fixed, moving = images(channels, shape)
    mask = np.ones(shape, np.float32)
    mask[:3] = 0.5
    problem = make_problem(
        fixed,
        moving,
        fixed_mask=mask,
        moving_mask=None,
        fixed_to_physical=None,
        moving_to_physical=None,
        moving_ratio=1.0,
        clip="outliers",
    )
    start = problem.start()
    shifted = start.matrix.at[0, -1].set(0.7)
    return problem.level(1, start._replace(matrix=shifted), metric)


def iterate(stage: Iterative, level: Level) -> tuple[State, jax.Array]:
    return stage.step(
        level, stage.begin(level, Resolution(SHAPE, 1), stage.measured(level)), jnp.zeros(())
    )


def step(stage: Iterative, level: Level) -> tuple[Any, jax.Array]:
    """What a first step finds, and the loss before it."""
    state, loss = jax.jit(lambda level: iterate(stage, level))(level)
    return state.moments.mu, loss


METRICS = [LNCC(5), MI(16), NMI(16), MSE(), NCC()]
# Linear stages share one way, and deformable ones another, which SyN goes with both images: each
# metric takes them, and every other stage with one metric.
PAIRINGS = [(stage, metric) for stage in (Affine, SyN) for metric in METRICS]
PAIRINGS += [(stage, METRICS[0]) for stage in (Rigid, Greedy, SVF, FFD)]


@pytest.mark.parametrize(("stage", "metric"), PAIRINGS)
def test_channels_one_after_the_other_are_the_same_as_all_at_once(
    monkeypatch: pytest.MonkeyPatch, stage: type, metric: Metric
) -> None:
    settings = stage((1,), (1,), metric=metric)
    level = level_of(metric, 6)
    assert settings.takes_channels_singly(level)
    singly, loss = step(settings, level)
    monkeypatch.setattr(Level, "has_many_channels", False)
    together = level_of(metric, 6)
    if level.content is not None:
        np.testing.assert_array_equal(together.content, level.content)
    at_once, expected = step(settings, together)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    for one, other in zip(jax.tree.leaves(singly), jax.tree.leaves(at_once), strict=True):
        assert np.abs(other).max() > 0
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-4 * np.abs(other).max())


def test_few_channels_are_taken_at_once() -> None:
    for channels in (1, 3, 4):
        assert not Greedy().takes_channels_singly(level_of(LNCC(), channels))


def test_a_metric_that_says_nothing_sees_all_channels() -> None:
    """A loss of its own may be anything, whatever the metric that it derives from."""

    class Largest(LNCC):
        def loss(self, pred: jax.Array, target: jax.Array, mask: jax.Array | None) -> jax.Array:
            return jnp.abs(pred - target).max(axis=1).mean()

    def absolute(pred: jax.Array, target: jax.Array) -> jax.Array:
        return jnp.abs(pred - target).mean()

    for metric in (Largest(), absolute):
        settings = Greedy(metric=metric)
        assert not settings.takes_channels_singly(level_of(settings.metric, 6))


def test_levels_of_many_channels_are_those_of_each() -> None:
    image = random_array(0, 1, 6, 30, 33, dtype=np.float32)
    shape = (16, 17)
    each = [downsample(image[:, c : c + 1], shape) for c in range(6)]
    np.testing.assert_array_equal(downsample(image, shape), np.concatenate(each, axis=1))


def planned(function: Any, *arguments: Any) -> int:
    """Bytes that a program needs beside its arguments."""
    plan = jax.jit(function).lower(*arguments).compile().memory_analysis()
    if plan is None:
        pytest.skip("this device plans no memory")
    return int(plan.temp_size_in_bytes + plan.output_size_in_bytes)


@pytest.mark.parametrize("stage", [Affine, Greedy, SVF, SyN, FFD])
def test_an_iteration_needs_no_memory_for_more_channels(stage: type) -> None:
    settings = stage((1,), (1,))

    levels = (level_of(LNCC(), channels) for channels in (6, 24))
    few, many = (planned(functools.partial(iterate, settings), level) for level in levels)
    assert many - few < 4 * np.prod(SHAPE)  # one volume, for 18 more channels in both images


def test_a_level_of_many_channels_needs_no_more_memory_than_itself() -> None:
    shapes = {c: jax.ShapeDtypeStruct((1, c, *SHAPE), jnp.float32) for c in (6, 24)}
    smaller = functools.partial(downsample, shape=(16, 16, 16))
    few, many = (planned(smaller, shapes[c]) for c in (6, 24))
    inputs = 18 * 4 * np.prod(SHAPE)
    assert many - few < 2.2 * inputs  # what is laid out for the loop, and the result


@pytest.mark.parametrize("channels", [1, 24])
@pytest.mark.parametrize("wrt", [(0,), (0, 1)])
def test_lncc_needs_a_volume_for_each_gradient(channels: int, wrt: tuple[int, ...]) -> None:
    image = jax.ShapeDtypeStruct((1, channels, *SHAPE), jnp.float32)

    def loss(pred: jax.Array, target: jax.Array) -> jax.Array:
        return lncc_loss(pred, target, kernel_size=7)

    volume = 4 * channels * np.prod(SHAPE)
    assert planned(jax.value_and_grad(loss, wrt), image, image) < (len(wrt) + 0.1) * volume + 2**17
