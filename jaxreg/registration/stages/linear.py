r"""The linear stages: translation, rigid, similarity and affine transforms.

A stage looks for a motion :math:`p \mapsto c + B(\theta)(p - c) + L\,s` of the fixed space, which
is followed by the transform that it starts from. The centre :math:`c` is the fixed image's centre
of mass; :math:`L` is half the diagonal of the fixed grid: a change of any parameter by
:math:`\epsilon` moves no point of the grid by more than about :math:`\epsilon L`, so that one
learning rate fits all of them. They are found by Adam, or by the method of Levenberg and Marquardt.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from numpy.typing import NDArray

from jaxreg import interpolate
from jaxreg.registration.stages.adam import adam_direction, no_moments
from jaxreg.registration.stages.base import Trace
from jaxreg.registration.stages.iterative import (
    Iterative,
    Resolution,
    State,
    block_length,
    mean_over_channels,
)
from jaxreg.registration.stages.levenberg_marquardt import (
    Evaluation,
    Memory,
    judged,
    nothing_known,
    proposed,
)
from jaxreg.registration.stages.matrices import matmul
from jaxreg.registration.stages.metrics import NCC, Metric, MetricField
from jaxreg.registration.stages.moments import centre_of_mass, moments_of_mass
from jaxreg.registration.stages.problem import Alignment, Level, Probe, Weighted, charged
from jaxreg.registration.stages.pyramid import level_shape, resize_field, resize_image

__all__ = [
    "Affine",
    "Linear",
    "OptimiserName",
    "Rigid",
    "Similarity",
    "Translation",
    "rotation_matrix",
]


OptimiserName = Literal["adam", "levenberg-marquardt"]
"""How a linear stage finds its parameters."""

_POINTS = 2**16
"""At so many points, about, the curvature of a loss is looked at: more would tell no more."""

_LONGEST = 8
"""A step of second order goes at most so many times as far as one of Adam."""

_NEAR = 0.5
"""Over so many voxels the gradients at both ends of a step tell how the loss changes between."""

_EPSILON = 1e-6
"""A mean loss changes by less than so much of its scale, over a voxel, only through rounding."""


class _Parameters(NamedTuple):
    """What moves points; a part that a stage does not have is `None`. All start from 0."""

    shift: jax.Array
    """:math:`s`, ``(D,)``."""
    rotation: jax.Array | None = None
    """A rotation vector, ``(3,)``, or an angle, ``(1,)``, in radians."""
    log_scale: jax.Array | None = None
    """A scalar."""
    matrix: jax.Array | None = None
    """:math:`B - 1`, ``(D, D)``."""


class _Motion(NamedTuple):
    parameters: _Parameters
    centre: jax.Array
    length: jax.Array
    plane: jax.Array | None
    """Two vectors, ``(3, 2)``, in whose plane the parameters move; `None` if they do in space."""
    start: _Parameters
    """The parameters at the start of the level."""

    def matrix(self, parameters: _Parameters) -> jax.Array:
        """Return the motion of the fixed space for parameters, ``(D + 1, D + 1)``."""
        ndim = self.centre.size
        turn: Any = np.eye(parameters.shift.size, dtype=self.centre.dtype)
        if parameters.rotation is not None:
            turn = rotation_matrix(parameters.rotation)
        if parameters.log_scale is not None:
            turn = jnp.exp(parameters.log_scale) * turn
        if parameters.matrix is not None:
            turn = turn + parameters.matrix
        shift = parameters.shift
        if self.plane is not None:
            change = turn - np.eye(shift.size, dtype=turn.dtype)
            turn = np.eye(ndim, dtype=turn.dtype)
            turn = turn + matmul(self.plane, matmul(change, self.plane.T))
            shift = (self.plane * shift).sum(axis=1)
        turned = (turn * self.centre).sum(axis=1)
        offset = self.centre + self.length * shift - turned
        top = jnp.concatenate([turn, offset[:, None]], axis=1)
        return jnp.concatenate([top, np.eye(1, ndim + 1, ndim, dtype=top.dtype)])


@dataclasses.dataclass(frozen=True)
class Linear(Iterative):
    """Settings of the linear stages; the others are those of `Iterative`.

    Where both volumes have a single slice, all move within the plane of the fixed one: what lies
    beside it is not seen.

    Attributes
    ----------
    learning_rate
        How far, in voxels of the level, a step of one parameter moves the corners of the fixed
        grid at most. Within a level it decays to a tenth, along half a cosine. A step of
        Levenberg and Marquardt's method goes up to eight times as far, and does not decay.
    optimiser
        ``"adam"``, or ``"levenberg-marquardt"``: of second order, which asks for the loss and its
        gradient a fifth as often. The curvature is that of Gauss and Newton, from the slopes of the
        moving image at 65,536 points of the level at most, and from how the gradient changed along
        the last steps; a metric may know its own, see `Metric.curvature`. Iterations are
        evaluations of the loss, and a trace has that of the best parameters so far. Only steps that
        make the loss smaller are taken; where it falls or rises by no more than rounding, the
        gradient tells. Where it changes with what the images cover, and the gradient does not (see
        `Metric.has_gradient_of_mask`), it is enough for a step of up to half a voxel if the
        gradient says so. A level ends when less than ``tolerance / window`` times its largest loss
        is left to be gained, and the step before has shown that this is true.

    Raises
    ------
    ValueError
        As `Iterative`, or for an unknown optimiser.
    """

    scales: tuple[float, ...] = (4, 2)
    iterations: tuple[int, ...] = (80, 40)
    metric: MetricField = MetricField(NCC())
    optimiser: OptimiserName = "adam"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.optimiser not in get_args(OptimiserName):
            raise ValueError(
                f"optimiser: expected one of {', '.join(get_args(OptimiserName))}, got "
                f"{self.optimiser!r}"
            )

    @abc.abstractmethod
    def _parameters(self, ndim: int) -> _Parameters:
        """Return the parameters of no motion."""

    def measured(self, level: Level) -> jax.Array:
        """Return the mean place of the fixed image's mass, in normalised coordinates."""
        return moments_of_mass(level.fixed, level.fixed_mask).mean

    def begin(self, level: Level, resolution: Resolution, measured: jax.Array) -> State:
        """Return the parameters of no motion, about the fixed image's centre of mass."""
        plane = level.plane()
        parameters = self._parameters(level.ndim if plane is None else 2)
        centre = centre_of_mass(measured, level.to_physical)
        length = jnp.linalg.norm(level.to_physical[:-1, :-1])
        motion = _Motion(parameters, centre, length, plane, _copy(parameters))
        return State(motion, self._nothing_known(parameters))

    def _nothing_known(self, parameters: _Parameters) -> Any:
        if self.optimiser == "adam":
            return no_moments(parameters)
        return nothing_known(ravel_pytree(parameters)[0])

    def prepared(self, level: Level) -> Level:
        """Return a level with what its curvature is computed from, if the stage looks at it."""
        if self.optimiser == "adam":
            return level
        return level._replace(probe=_probe(self.metric, level))

    def tests(self, iterations: int) -> bool:
        """Whether convergence is tested on a level with so many iterations."""
        return self.tolerance > 0 if self.optimiser != "adam" else super().tests(iterations)

    def _block_length(self, iterations: int) -> int:
        if self.optimiser == "adam":
            return super()._block_length(iterations)
        return block_length(iterations, self.block)

    def resized(self, state: State, shape: tuple[int, ...], resolution: Resolution) -> State:
        """Return the same: the parameters do not depend on the grid."""
        motion: _Motion = state.found
        motion = motion._replace(start=_copy(motion.parameters))
        if self.optimiser == "adam":
            return state._replace(found=motion)
        return State(motion, self._nothing_known(motion.parameters))

    def start_of_level(self, found: _Motion) -> _Motion:
        """Return the motion that the level started with."""
        return found._replace(parameters=found.start)

    def step(self, level: Level, state: State, progress: jax.Array) -> tuple[State, jax.Array]:
        """Take one step of Adam; return the loss before it."""
        motion: _Motion = state.found
        loss, gradient = self._loss_and_gradient(level, motion, motion.parameters)
        voxel = level.voxel_size() / motion.length
        gradient, epsilon = self.in_scale(level, gradient, _EPSILON / voxel)
        direction, moments = adam_direction(
            gradient, state.moments, beta1=0.9, beta2=0.99, epsilon=epsilon
        )
        rate = self.learning_rate * voxel
        rate *= 0.55 + 0.45 * jnp.cos(jnp.pi * progress)
        parameters = jax.tree.map(lambda p, d: p - rate * d, motion.parameters, direction)
        return State(motion._replace(parameters=parameters), moments), loss

    def advance(self, level: Level, state: State, trace: Trace) -> tuple[State, Trace]:
        """Run one block of iterations; tell in the trace whether the level has converged."""
        if self.optimiser == "adam":
            return super().advance(level, state, trace)
        iterations = trace.losses.size
        last = trace.ran + self._block_length(iterations)

        def unfinished(carry: tuple[State, Trace]) -> jax.Array:
            return (carry[1].ran < last) & ~carry[1].converged

        def iterate(carry: tuple[State, Trace]) -> tuple[State, Trace]:
            state, trace = carry
            state = self._second_order_step(level, state)
            memory: Memory = state.moments
            loss = memory.at_best.loss.astype(jnp.float32)
            losses = jnp.where(jnp.arange(iterations) >= trace.ran, loss, trace.losses)
            converged = memory.converged & self.tests(iterations)
            return state, Trace(losses, trace.ran + 1, converged)

        carry: tuple[State, Trace] = jax.lax.while_loop(unfinished, iterate, (state, trace))
        state, trace = carry
        ended = trace.converged | (trace.ran == iterations)
        worse = ended & (trace.losses[-1] > trace.losses[0])
        found = jax.tree.map(
            functools.partial(jnp.where, worse), self.start_of_level(state.found), state.found
        )
        return state._replace(found=found), trace

    def _second_order_step(self, level: Level, state: State) -> State:
        """Judge the trial of the step before, and find the next one."""
        assert level.probe is not None  # of `prepared`
        motion: _Motion = state.found
        _, unravel = ravel_pytree(motion.parameters)
        memory: Memory = state.moments
        loss, gradient = self._loss_and_gradient(level, motion, unravel(memory.trial))
        normal = self._normal(level, level.probe, motion, memory.trial)
        voxel = level.voxel_size() / motion.length
        # What the images cover changes the loss, but not the gradient, of most metrics: judged by
        # the loss, a step that follows the gradient might never be taken.
        is_near = jnp.sqrt(((memory.trial - memory.best) ** 2).sum()) <= _NEAR * voxel
        memory = judged(
            memory,
            Evaluation(loss, ravel_pytree(gradient)[0], normal),
            is_near=is_near,
            or_by_work=not self.metric.has_gradient_of_mask,
        )
        rate = self.learning_rate * voxel
        memory = proposed(
            memory,
            longest=_LONGEST * rate,
            first=rate,
            is_scaled=level.probe.is_scaled,
            least=self.tolerance / self.window * memory.largest,
        )
        return State(motion._replace(parameters=unravel(memory.best)), memory)

    def _normal(
        self, level: Level, probe: Probe, motion: _Motion, parameters: jax.Array
    ) -> jax.Array:
        r"""Return the Gauss-Newton matrix at the parameters of a motion, ``(P,)``.

        The moving image's slope :math:`s` at a sample, and the sample's place :math:`T q` with
        :math:`q = (x, y, z, 1)`, make the derivative by :math:`T_{ik}` the product
        :math:`s_i q_k`. So sums of :math:`s_i s_j q_k q_l` over the points are all that has to be
        known; the parameters come in through the few numbers :math:`\partial T / \partial\theta`.
        """
        _, unravel = ravel_pytree(motion.parameters)
        ndim, shape = level.ndim, probe.counts.shape[2:]

        def chain(parameters: jax.Array) -> jax.Array:
            return level.normalised(matmul(level.matrix, motion.matrix(unravel(parameters))))

        affine = chain(parameters)
        by_parameters = jax.jacrev(chain)(parameters).reshape(ndim * (ndim + 1), -1)
        places = []
        for component, size in enumerate(reversed(shape)):
            index = jax.lax.broadcasted_iota(jnp.float32, shape, ndim - 1 - component)
            along = index * (2 / max(size - 1, 1)) - 1 if size > 1 else jnp.zeros_like(index)
            shift = 0 if probe.displacement is None else probe.displacement[0, ..., component]
            places.append(along + shift)
        places.append(jnp.ones(shape, jnp.float32))
        shifts = jnp.zeros((1, *shape, ndim), jnp.float32)  # behind the affine
        if probe.displacement is not None:
            shifts = (probe.displacement[..., None, :] * affine[0, :, :ndim]).sum(-1)
        weight = level.weight_of_moving(affine, shape, probe.displacement)
        weight = weight / jnp.maximum(weight.sum(), 1)

        def products(channel: jax.Array) -> jax.Array:
            image = jax.lax.dynamic_slice_in_dim(level.moving, channel, 1, axis=1)
            counts = jax.lax.dynamic_slice_in_dim(probe.counts, channel, 1, axis=1)

            def sample(shifts: jax.Array) -> jax.Array:
                return interpolate(image, affine, shifts, padding_mode="border")

            moved, to_shifts = jax.vjp(sample, shifts)
            (slope,) = to_shifts(jnp.ones_like(moved))
            slopes = [slope[0, ..., axis] for axis in range(ndim)]
            counted = [(weight * counts)[0, 0] * slope for slope in slopes]
            return jnp.stack([counted[i] * slopes[j] for i, j in _pairs(ndim)])

        channels = level.moving.shape[1]
        total = channels * mean_over_channels(products, channels)
        squares = jnp.stack([places[i] * places[j] for i, j in _pairs(ndim + 1)])
        axes = "zyx"[-ndim:]
        sums = jnp.einsum(
            f"p{axes},q{axes}->pq", total, squares, precision=jax.lax.Precision.HIGHEST
        )
        normal = sums[_square(ndim)[:, None, :, None], _square(ndim + 1)[None, :, None, :]]
        normal = normal.reshape(ndim * (ndim + 1), ndim * (ndim + 1))
        return matmul(by_parameters.T, matmul(normal, by_parameters))

    def _loss_and_gradient(
        self, level: Level, motion: _Motion, parameters: _Parameters
    ) -> tuple[jax.Array, _Parameters]:
        def moved(level: Level, parameters: _Parameters) -> Weighted:
            return level.moved(
                matmul(level.matrix, motion.matrix(parameters)),
                level.displacement,
                is_weight_constant=not self.metric.has_gradient_of_mask,
            )

        def objective(parameters: _Parameters) -> jax.Array:
            return self.loss(level, moved(level, parameters), level.target())

        if self.takes_channels_singly(level):
            return self._of_many_channels(level, moved, parameters)
        return jax.value_and_grad(objective)(parameters)

    def _of_many_channels(
        self,
        level: Level,
        moved: Callable[[Level, _Parameters], Weighted],
        parameters: _Parameters,
    ) -> tuple[jax.Array, _Parameters]:
        """Return the loss and its gradient, found channel by channel."""

        def weigh(parameters: _Parameters) -> jax.Array:
            return moved(level.channel(0), parameters).weight * level.target().weight

        weight, to_parameters = jax.vjp(weigh, parameters)

        def of_channel(channel: jax.Array) -> tuple[jax.Array, tuple[_Parameters, jax.Array]]:
            one = level.channel(channel)

            def of(parameters: _Parameters, weight: jax.Array) -> jax.Array:
                if not self.metric.has_gradient_of_mask:
                    weight = jax.lax.stop_gradient(weight)
                pred = moved(one, parameters).image
                return self.metric.loss_of_level(
                    pred, one.fixed, weight, fixed=one.fixed, moving=one.moving
                )

            return jax.value_and_grad(of, (0, 1))(parameters, weight)

        loss, (direct, by_weight) = mean_over_channels(of_channel, level.fixed.shape[1])
        loss, (rate, by_overlap) = jax.value_and_grad(charged, (0, 1))(
            loss, weight.sum(), level.overlap
        )
        gradient = jax.tree.map(lambda g: rate * g, direct)
        if self.metric.has_gradient_of_mask:
            (aside,) = to_parameters(rate * by_weight + by_overlap)
            gradient = jax.tree.map(jnp.add, gradient, aside)
        return loss, gradient

    def finish(self, shape: tuple[int, ...], alignment: Alignment, found: _Motion) -> Alignment:
        """Return the alignment with the motion before its matrix."""
        motion = found.matrix(found.parameters)
        return alignment._replace(matrix=matmul(alignment.matrix, motion))


@dataclasses.dataclass(frozen=True)
class Translation(Linear):
    """A shift. The settings are those of `Linear`."""

    name: ClassVar[str] = "translation"

    def _parameters(self, ndim: int) -> _Parameters:
        return _Parameters(jnp.zeros(ndim, jnp.float32))


@dataclasses.dataclass(frozen=True)
class Rigid(Linear):
    """A rotation and a shift. The settings are those of `Linear`."""

    name: ClassVar[str] = "rigid"

    def _parameters(self, ndim: int) -> _Parameters:
        return _Parameters(
            jnp.zeros(ndim, jnp.float32), rotation=jnp.zeros(3 if ndim == 3 else 1, jnp.float32)
        )


@dataclasses.dataclass(frozen=True)
class Similarity(Linear):
    """A rotation, one scale for all directions, and a shift. The settings are those of `Linear`."""

    name: ClassVar[str] = "similarity"

    def _parameters(self, ndim: int) -> _Parameters:
        return _Parameters(
            jnp.zeros(ndim, jnp.float32),
            rotation=jnp.zeros(3 if ndim == 3 else 1, jnp.float32),
            log_scale=jnp.zeros((), jnp.float32),
        )


@dataclasses.dataclass(frozen=True)
class Affine(Linear):
    """Any matrix, and a shift. The settings are those of `Linear`."""

    name: ClassVar[str] = "affine"

    def _parameters(self, ndim: int) -> _Parameters:
        return _Parameters(
            jnp.zeros(ndim, jnp.float32), matrix=jnp.zeros((ndim, ndim), jnp.float32)
        )


@functools.partial(jax.jit, static_argnames="metric")
def _probe(metric: Metric, level: Level) -> Probe:
    """Return the points at which the curvature of a level is looked at."""
    moved, target = level.moved(level.matrix, level.displacement), level.target()
    weight = target.weight
    # The slopes are those of the moving image: so are the units of its intensities.
    curvature = metric.curvature(moved.image, weight * moved.weight)
    is_scaled = jnp.full((), curvature is not None)
    if curvature is None:
        curvature = jnp.ones((1,) * level.fixed.ndim, jnp.float32)
    mean = weight.mean()
    counts = curvature * weight / jnp.where(mean > 0, mean, 1)
    factor = max(1.0, (math.prod(level.shape) / _POINTS) ** (1 / level.ndim))
    shape = level_shape(level.shape, factor, minimum=8)
    counts = resize_image(jnp.broadcast_to(counts, level.fixed.shape), shape)
    field = None if level.displacement is None else resize_field(level.displacement, shape)
    return Probe(counts, is_scaled, field)


@functools.cache
def _pairs(count: int) -> list[tuple[int, int]]:
    return [(i, j) for i in range(count) for j in range(i, count)]


@functools.cache
def _square(count: int) -> NDArray[np.int32]:
    """Return for each element of a symmetric matrix which pair it is, ``(count, count)``."""
    square = np.zeros((count, count), np.int32)
    for number, (i, j) in enumerate(_pairs(count)):
        square[i, j] = square[j, i] = number
    return square


def _copy(parameters: _Parameters) -> _Parameters:
    """Return a copy, because memory that a program may write to cannot be given to it twice."""
    copy: _Parameters = jax.tree.map(jnp.copy, parameters)
    return copy


def rotation_matrix(vector: jax.Array) -> jax.Array:
    """Return the rotation of a rotation vector: the exponential of its cross product.

    Parameters
    ----------
    vector
        Axis times angle in radians, ``(3,)``, or the angle of a rotation of the plane, ``(1,)``.

    Returns
    -------
    Array
        ``(3, 3)`` or ``(2, 2)``; differentiable, at 0 as well.

    Notes
    -----
    Rodrigues' formula, with the series of its coefficients near 0.
    """
    if vector.size == 1:
        cos, sin = jnp.cos(vector[0]), jnp.sin(vector[0])
        return jnp.stack([jnp.stack([cos, -sin]), jnp.stack([sin, cos])])
    square = (vector**2).sum()
    small = square < 1e-4
    # The inner `where` keeps the square root's infinite slope at 0 out of the gradient.
    angle = jnp.sqrt(jnp.where(small, 1.0, square))
    first = jnp.where(small, 1 - square / 6, jnp.sin(angle) / angle)
    second = jnp.where(small, 0.5 - square / 24, 2 * (jnp.sin(angle / 2) / angle) ** 2)
    x, y, z = vector
    zero = jnp.zeros_like(x)
    cross = jnp.stack([zero, -z, y, z, zero, -x, -y, x, zero]).reshape(3, 3)
    still = jnp.asarray(np.eye(3, dtype=vector.dtype))
    return still + first * cross + second * matmul(cross, cross)
