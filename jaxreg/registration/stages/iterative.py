"""What the iterative stages have in common: the schedule, and the loop that runs on the device."""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
from collections.abc import Callable
from numbers import Integral
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from numpy.typing import NDArray

from jaxreg.registration.programs import Program, changed_fields, on_device, settled
from jaxreg.registration.progress import Callback, Progress
from jaxreg.registration.stages.base import Stage, Trace
from jaxreg.registration.stages.coverage import iteration
from jaxreg.registration.stages.metrics import LNCC, MetricField
from jaxreg.registration.stages.problem import Alignment, Level, Problem, Weighted, charged

__all__ = [
    "Iterate",
    "Iterative",
    "LastLevel",
    "Resolution",
    "State",
    "block_length",
    "mean_over_channels",
    "trend",
]


class Resolution(NamedTuple):
    """How fine a level is, beside its images: programs of levels of one shape are shared.

    Attributes
    ----------
    whole
        Shape of the fixed grid at full resolution, ``([Z,] Y, X)``.
    scale
        How many times wider a voxel of the level is.
    """

    whole: tuple[int, ...]
    scale: float


class State(NamedTuple):
    """What the iterations of a stage change."""

    found: Any
    """What the stage looks for: parameters or fields, a pytree."""
    moments: Any
    """What the optimiser remembers, a pytree: Adam's moments, for one."""


_Carry = tuple[State, Trace]
"""What the loop over the blocks of a level carries."""

_Losses = jax.Array | NDArray[np.float32]

Iterate = Callable[[State, jax.Array], tuple[State, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Iterative(Stage):
    """Settings of every stage that iterates from coarse to fine.

    Attributes
    ----------
    scales
        How many times wider a voxel is than at full resolution, per level.
    iterations
        Steps per level, at most.
    learning_rate
        How far a step may go, in voxels of the level; see the stage.
    metric
        What is minimised: a `Metric`, such as ``LNCC(kernel_size=5)``; the name ``"lncc"``,
        ``"mi"``, ``"mind"``, ``"mse"``, ``"ncc"`` or ``"nmi"`` of one with its default settings; or
        ``loss(pred, target)``, a scalar, the mean over the voxels: any JAX function of two images
        ``(1, C, [Z,] Y, X)``, which takes ``mask=``, too, if there are masks. The stage holds the
        metric.
    window, tolerance
        A level ends when a line through its last ``window`` losses falls by less than ``tolerance``
        times the largest loss of the level, in magnitude, or rises. If in the last block the loss
        has then risen by more than a tenth of what it had fallen by before, that block is undone:
        steps that are too long do not spoil what was found. Nor does a level end with a larger loss
        than it began with: images that are alike already stay where they are. A tolerance of 0 runs
        all iterations and undoes none; nor is a level with fewer iterations than the window tested.
    block
        Iterations between two tests of convergence, and two calls of the callback. Where the
        iterations of a level are no multiple of it, the nearest divisor that they have; where
        convergence is tested, the nearest of at least ``window``.

    Raises
    ------
    ValueError
        If scales and iterations do not make a schedule, for an unknown metric, or for a number out
        of its range.
    """

    stops_when_worse: ClassVar[bool] = False
    """Whether a level stops when, after a block, its loss is larger than at its start. A stage that
    can return to its start need not."""

    scales: tuple[float, ...] = (4, 2, 1)
    iterations: tuple[int, ...] = (60, 40, 20)
    learning_rate: float = 0.5
    metric: MetricField = MetricField(LNCC())
    window: int = 10
    tolerance: float = 1e-4
    block: int = 10

    def __post_init__(self) -> None:
        for name in ("scales", "iterations"):
            value = getattr(self, name)
            if not isinstance(value, tuple | list):
                raise ValueError(f"{name}: expected a number for each level, got {value!r}")
            object.__setattr__(self, name, tuple(value))  # a list has no hash
        if not self.scales or any(not scale >= 1 for scale in self.scales):
            raise ValueError(f"scales: expected numbers of at least 1, got {self.scales}")
        counts = [n for n in self.iterations if isinstance(n, Integral) and n >= 0]
        if len(counts) != len(self.scales) or len(counts) != len(self.iterations):
            raise ValueError(
                f"iterations: expected a count for each of {self.scales}, got {self.iterations}"
            )
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate: expected a positive number, got {self.learning_rate}")
        for name, least in (("window", 2), ("block", 1)):
            value = getattr(self, name)
            if not isinstance(value, Integral) or value < least:
                raise ValueError(f"{name}: expected an integer of at least {least}, got {value}")
        if not self.tolerance >= 0:
            raise ValueError(f"tolerance: expected at least 0, got {self.tolerance}")

    def loss(self, level: Level, pred: Weighted, target: Weighted) -> jax.Array:
        """Return the metric of two images, of the voxels that both of them cover."""
        weight = self.weight_of_both(pred, target)
        loss = self.metric.loss_of_level(
            pred.image, target.image, weight, fixed=level.fixed, moving=level.moving
        )
        return charged(loss, weight.sum(), level.overlap)

    def weight_of_both(self, pred: Weighted, target: Weighted) -> jax.Array:
        """Return what voxels of two images count together; constant if the metric needs it so."""
        weight = pred.weight * target.weight
        return weight if self.metric.has_gradient_of_mask else jax.lax.stop_gradient(weight)

    def takes_channels_singly(self, level: Level) -> bool:
        """Whether the channels of a level are taken one after the other, to need less memory."""
        return self.metric.mean_over_channels and level.has_many_channels

    def in_scale(
        self, level: Level, gradient: Any, epsilon: float | jax.Array
    ) -> tuple[Any, jax.Array]:
        """Return a gradient in units of the metric's scale, and Adam's ``epsilon`` for it.

        Beside that ``epsilon`` what is no more than rounding leads nowhere. Without a scale the
        gradient stays what it is, and nothing is taken for rounding.
        """
        scale = level.metric_scale
        unit = jnp.where(scale > 0, scale, 1)
        return jax.tree.map(lambda g: g / unit, gradient), jnp.where(scale > 0, epsilon, 1e-8)

    def prepared(self, level: Level) -> Level:
        """Return a level with what the stage needs to know of it before its iterations."""
        return level

    def measured(self, level: Level) -> Any:
        """Return what `begin` asks of the images, by programs that other stages call as well."""
        return None

    @abc.abstractmethod
    def begin(self, level: Level, resolution: Resolution, measured: Any) -> State:
        """Return what the iterations change, before the first of them."""

    @abc.abstractmethod
    def resized(self, state: State, shape: tuple[int, ...], resolution: Resolution) -> State:
        """Return the same for the next level, whose grid has a shape."""

    def start_of_level(self, found: Any) -> Any:
        """Return where the level started, if what is found tells; else what is found."""
        return found

    @abc.abstractmethod
    def step(self, level: Level, state: State, progress: jax.Array) -> tuple[State, jax.Array]:
        """Take one step; return the loss before it. ``progress`` goes from 0 to 1 in a level."""

    @abc.abstractmethod
    def finish(self, shape: tuple[int, ...], alignment: Alignment, found: Any) -> Alignment:
        """Return the alignment after the stage, its fields on the fixed grid of a shape."""

    def tests(self, iterations: int) -> bool:
        """Whether convergence is tested on a level with so many iterations."""
        return self.tolerance > 0 and iterations >= self.window

    def advance(self, level: Level, state: State, trace: Trace) -> tuple[State, Trace]:
        """Run one block of iterations; tell in the trace whether the level has converged."""
        return _advance(self, level, state, trace)

    def repeat(
        self, level: Level, iterate: Iterate, state: State, indices: jax.Array
    ) -> tuple[State, jax.Array]:
        """Run the iterations of a block; return the state after them, and their losses.

        ``iterate(state, index)`` is one of them.
        """
        found: tuple[State, jax.Array] = jax.lax.scan(iterate, state, indices)
        return found

    def _block_length(self, iterations: int) -> int:
        # A shorter block could not be tested by itself, and what it has spoilt would stay.
        return block_length(iterations, self.block, self.window if self.tests(iterations) else 1)

    def kept_loss(self, losses: NDArray[np.float32], iterations: int) -> float:
        """Return the loss of what a level that has converged kept: that of a block may be undone.

        Parameters
        ----------
        losses
            Of the iterations that ran.
        iterations
            How many the level could have run.
        """
        block = losses[-self._block_length(iterations) :]
        if not self.stops_when_worse:
            return float(min(losses[-1], losses[0]))
        return float(block[-1] if block[-1] <= _bearable(losses, block) else block[0])

    def run(
        self, problem: Problem, alignment: Alignment, callback: Callback | None = None
    ) -> tuple[Alignment, tuple[Trace, ...]]:
        """Run all levels from an alignment; return the one that they find, and their traces."""
        found, traces = self.search(problem, alignment, callback)
        return self.complete(problem.shape, problem.to_physical, alignment, found), traces

    def search(
        self, problem: Problem, alignment: Alignment, callback: Callback | None = None
    ) -> tuple[Any, tuple[Trace, ...]]:
        """Run all levels from an alignment; return what the last one found, and their traces."""
        # Nothing else refers to these, so that each goes when what follows from it is there.
        stage, level, state, traces = settled(self.approach(problem, alignment, callback))
        level, state = settled(stage._begun(level, state, self.scales[-1], problem.shape))
        state, trace = settled(stage._iterated(level, state, self.scales[-1], traces, callback))
        return state.found, (*traces, trace)

    def approach(
        self, problem: Problem, alignment: Alignment, callback: Callback | None = None
    ) -> LastLevel:
        """Run all levels but the last from an alignment; the problem is not needed after that."""
        chosen = self.for_grid(problem.shape, problem.to_physical)
        state: State | None = None
        traces: tuple[Trace, ...] = ()
        *coarse, last = self.scales
        for scale in coarse:
            stage = chosen.for_scale(scale)
            level = problem.level(scale, alignment, stage.metric)
            level, state = stage._begun(level, state, scale, problem.shape)
            state, trace = stage._iterated(level, state, scale, traces, callback)
            traces = *traces, trace
        stage = chosen.for_scale(last)
        level = problem.level(last, alignment, stage.metric, is_last=True)
        return LastLevel(stage, level, state, traces)

    def _begun(
        self,
        level: Level,
        state: State | None,
        scale: float,
        shape: tuple[int, ...],
        *,
        is_prepared: bool = False,
    ) -> tuple[Level, State]:
        """Return a level as the iterations take it, and what they change."""
        resolution = Resolution(shape, scale)
        measured = self.measured(level) if state is None else None
        added, state = _begun(
            *(self, level, state, measured), resolution=resolution, is_prepared=is_prepared
        )
        return level._replace(**added), state

    def _iterated(
        self,
        level: Level,
        state: State,
        scale: float,
        before: tuple[Trace, ...],
        callback: Callback | None,
    ) -> tuple[State, Trace]:
        """Run the iterations of a level, the next after those that have traces."""
        iterations = self.iterations[len(before)]
        done = sum(trace.losses.size for trace in before)
        trace = _no_trace(iterations)
        if iterations == 0:
            return state, trace
        if callback is None:
            return _run_level(self, level, state, trace)
        total = sum(self.iterations)
        for first in range(0, iterations, length := self._block_length(iterations)):
            start = np.asarray(first, np.int32)
            state, trace, losses = _run_block(self, level, state, trace, start)
            callback(Progress(self.name, scale, done + first + length, total, losses))
        return state, trace

    def complete(
        self, shape: tuple[int, ...], to_physical: jax.Array, alignment: Alignment, found: Any
    ) -> Alignment:
        """Return the alignment that follows from what was found, and from the one before.

        The moments, and the images of levels, need not be there any more.

        Parameters
        ----------
        shape, to_physical
            Of the fixed grid, as `for_grid` takes them.
        alignment
            Where the levels started.
        found
            What :meth:`search` has returned.
        """
        chosen = self.for_grid(shape, to_physical)
        changed = _finished(chosen, alignment, found, shape=shape)
        return alignment._replace(**changed)


class LastLevel(NamedTuple):
    """What a stage has come to when only its last level is left, of which it holds all there is.

    Attributes
    ----------
    stage
        With the metric of that level, and settings of its grid.
    level
        The last one.
    state
        After the level before, `None` if there is none.
    traces
        Of the levels before.
    """

    stage: Iterative
    level: Level
    state: State | None
    traces: tuple[Trace, ...]

    def prepared(self) -> LastLevel:
        """Return the same with what the stage needs to know of the level before its iterations."""
        return self._replace(level=self.stage.prepared(self.level))

    def arrive(self, shape: tuple[int, ...]) -> tuple[Any, tuple[Trace, ...]]:
        """Run a level that is prepared; return what it found, and the traces of all levels.

        Parameters
        ----------
        shape
            Of the fixed grid at full resolution.
        """
        stage, level, state, traces = self
        scale = stage.scales[-1]
        level, state = stage._begun(level, state, scale, shape, is_prepared=True)
        state, trace = stage._iterated(level, state, scale, traces, None)
        return state.found, (*traces, trace)


def mean_over_channels(function: Callable[[jax.Array], Any], channels: int) -> Any:
    """Return the mean of what a function returns for each channel, one after the other.

    Parameters
    ----------
    function
        ``function(channel)``: any arrays, for the index of a channel.
    channels
        How many there are.
    """
    index = jnp.arange(channels, dtype=jnp.int32)
    shapes = jax.eval_shape(function, index[0])
    total = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)

    def add(total: Any, channel: jax.Array) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, function(channel)), None

    total, _ = jax.lax.scan(add, total, index)
    return jax.tree.map(lambda sums: sums / channels, total)


def block_length(iterations: int, block: int, least: int = 1) -> int:
    """Return the divisor of a number of iterations that is nearest to a block, by their ratio.

    With equal blocks one compiled program serves them all.
    """
    divisors = (n for n in range(least, iterations + 1) if iterations % n == 0)
    return max(divisors, key=lambda n: (min(n, block) / max(n, block), n), default=1)


def _no_trace(iterations: int) -> Trace:
    # Of arrays of the host no program has to be made.
    return Trace(
        on_device(np.zeros(iterations, np.float32)),
        on_device(np.int32(0)),
        on_device(np.bool_(False)),
    )


@functools.partial(Program, static=("resolution", "is_prepared"))
def _begun(
    stage: Iterative,
    level: Level,
    state: State | None,
    measured: Any,
    *,
    resolution: Resolution,
    is_prepared: bool = False,
) -> tuple[dict[str, Any], State]:
    """Return what a stage adds to a level before its iterations, and their state."""
    prepared = level if is_prepared else stage.prepared(level)
    if state is None:
        begun = stage.begin(prepared, resolution, measured)
    else:
        begun = stage.resized(state, level.shape, resolution)
    return changed_fields(level, prepared), begun


@functools.partial(Program, static=("shape",))
def _finished(
    stage: Iterative, alignment: Alignment, found: Any, *, shape: tuple[int, ...]
) -> dict[str, Any]:
    return changed_fields(alignment, stage.finish(shape, alignment, found))


def _advance(stage: Iterative, level: Level, state: State, trace: Trace) -> _Carry:
    """Run one block of iterations."""
    start = state.found
    iterations = trace.losses.size
    length = stage._block_length(iterations)

    def iterate(state: State, index: jax.Array) -> tuple[State, jax.Array]:
        progress = index.astype(jnp.float32) / max(iterations - 1, 1)
        with iteration():
            return stage.step(level, state, progress)

    indices = trace.ran + jnp.arange(length, dtype=jnp.int32)
    state, block = stage.repeat(level, iterate, state, indices)
    ran = trace.ran + length
    losses = jax.lax.dynamic_update_slice(trace.losses, block.astype(jnp.float32), (trace.ran,))
    last = jnp.arange(iterations) >= ran
    losses = jnp.where(last, losses[ran - 1], losses)
    if not stage.tests(iterations):
        return state, Trace(losses, ran, trace.converged)
    worse = block[-1] > losses[0]
    converged = _converged(stage, losses, ran) | (worse & stage.stops_when_worse)
    # Keeping the start of a block costs one field; keeping the best of all iterations would cost a
    # copy in each of them. The block before was tested, too: the losses had fallen until this one.
    bearable = block[-1] <= _bearable(losses, block)  # a NaN is not
    undone = converged & (~bearable if stage.stops_when_worse else jnp.isnan(block[-1]))
    found = jax.tree.map(functools.partial(jnp.where, undone), start, state.found)
    # The next level must not go on with moments that have led astray.
    moments = jax.tree.map(lambda x: jnp.where(undone, jnp.zeros_like(x), x), state.moments)
    ended = converged | (ran == iterations)
    found = jax.tree.map(
        functools.partial(jnp.where, ended & worse & ~undone), stage.start_of_level(found), found
    )
    return state._replace(found=found, moments=moments), Trace(losses, ran, converged)


def _bearable(losses: _Losses, block: _Losses) -> jax.Array:
    """Return up to which loss the last block of a level is kept.

    A small rise is no reason to undo it: what looks alike on this level goes on to a finer one.
    """
    numbers = np if isinstance(losses, np.ndarray) else jnp
    bearable: jax.Array = block[0] + 0.1 * numbers.maximum(losses[0] - block[0], 0)
    return bearable


def trend(losses: _Losses) -> jax.Array:
    """Return by how much a line through losses falls over as many iterations."""
    time = np.arange(losses.size, dtype=np.float32) - (losses.size - 1) / 2
    fall: jax.Array = -(time * losses).sum() / (time**2).sum() * losses.size
    return fall


def _converged(stage: Iterative, losses: jax.Array, ran: jax.Array) -> jax.Array:
    window = stage.window
    recent = jax.lax.dynamic_slice(losses, (ran - window,), (window,))
    # A stage that returns to its start in the end may well find a way down after a way up.
    change = trend(recent) if stage.stops_when_worse else jnp.abs(trend(recent))
    return ~(change >= stage.tolerance * jnp.abs(losses).max())


def _like_level(stage: Iterative, level: Level, state: State, trace: Trace) -> _Carry:
    return state, trace


@functools.partial(Program, donated=("state", "trace"), like=_like_level)
def _run_level(stage: Iterative, level: Level, state: State, trace: Trace) -> _Carry:
    """Run a level until it has converged or its iterations are used up."""
    iterations = trace.losses.size
    blocks = iterations // stage._block_length(iterations)

    def advance(carry: _Carry) -> _Carry:
        return stage.advance(level, *carry)

    def unfinished(carry: _Carry) -> jax.Array:
        return (carry[1].ran < iterations) & ~carry[1].converged

    carry: _Carry = (state, trace)
    if not stage.tests(iterations) or blocks < 2:
        # The host need not wait for the outcome of a test.
        carry = jax.lax.fori_loop(0, blocks, lambda _, carry: advance(carry), carry)
    else:
        carry = jax.lax.while_loop(unfinished, advance, carry)
    return carry


def _like_block(
    stage: Iterative, level: Level, state: State, trace: Trace, first: ArrayLike
) -> tuple[State, Trace, jax.Array]:
    length = stage._block_length(trace.losses.size)
    return state, trace, jax.lax.slice(trace.losses, (0,), (length,))


@functools.partial(Program, donated=("state", "trace"), like=_like_block)
def _run_block(
    stage: Iterative, level: Level, state: State, trace: Trace, first: ArrayLike
) -> tuple[State, Trace, jax.Array]:
    """Run one block of a level, from its iteration ``first`` on, unless it has converged.

    The losses of the block come last.
    """

    def advance(state: State, trace: Trace) -> _Carry:
        return stage.advance(level, state, trace)

    def rest(state: State, trace: Trace) -> _Carry:
        return state, trace

    carry: _Carry = jax.lax.cond(trace.converged, rest, advance, state, trace)
    state, trace = carry
    length = stage._block_length(trace.losses.size)
    return state, trace, jax.lax.dynamic_slice(trace.losses, (jnp.asarray(first),), (length,))
