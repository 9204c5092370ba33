r"""The linear stages: translation, rigid, similarity and affine transforms, found by Adam.

A stage looks for a motion :math:`p \mapsto c + B(\theta)(p - c) + L\,s` of the fixed space, which
is followed by the transform that it starts from. The centre :math:`c` is the fixed image's centre
of mass; :math:`L` is half the diagonal of the fixed grid: a change of any parameter by
:math:`\epsilon` moves no point of the grid by more than about :math:`\epsilon L`, so that one
learning rate fits all of them.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from jaxreg.registration.stages.adam import adam_direction, no_moments
from jaxreg.registration.stages.iterative import Iterative, State, mean_over_channels
from jaxreg.registration.stages.metrics import NCC, MetricField
from jaxreg.registration.stages.moments import centre_of_mass
from jaxreg.registration.stages.problem import Alignment, Level, Weighted, charged, matmul

__all__ = ["Affine", "Linear", "Rigid", "Similarity", "Translation", "rotation_matrix"]


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
        turn = jnp.eye(parameters.shift.size, dtype=self.centre.dtype)
        if parameters.rotation is not None:
            turn = rotation_matrix(parameters.rotation)
        if parameters.log_scale is not None:
            turn = jnp.exp(parameters.log_scale) * turn
        if parameters.matrix is not None:
            turn = turn + parameters.matrix
        shift = parameters.shift
        if self.plane is not None:
            change = turn - jnp.eye(shift.size, dtype=turn.dtype)
            turn = jnp.eye(ndim, dtype=turn.dtype)
            turn = turn + matmul(self.plane, matmul(change, self.plane.T))
            shift = (self.plane * shift).sum(axis=1)
        turned = (turn * self.centre).sum(axis=1)
        offset = self.centre + self.length * shift - turned
        top = jnp.concatenate([turn, offset[:, None]], axis=1)
        return jnp.concatenate([top, jnp.eye(1, ndim + 1, ndim, dtype=top.dtype)])


@dataclasses.dataclass(frozen=True)
class Linear(Iterative):
    """Settings of the linear stages; the others are those of `Iterative`.

    Where both volumes have a single slice, all move within the plane of the fixed one: what lies
    beside it is not seen.

    Attributes
    ----------
    learning_rate
        How far, in voxels of the level, a step of one parameter moves the corners of the fixed
        grid at most. Within a level it decays to a tenth, along half a cosine.
    """

    scales: tuple[float, ...] = (4, 2)
    iterations: tuple[int, ...] = (80, 40)
    metric: MetricField = MetricField(NCC())

    @abc.abstractmethod
    def _parameters(self, ndim: int) -> _Parameters:
        """Return the parameters of no motion."""

    def begin(self, level: Level) -> State:
        """Return the parameters of no motion, about the fixed image's centre of mass."""
        plane = level.plane()
        parameters = self._parameters(level.ndim if plane is None else 2)
        centre = centre_of_mass(level.fixed, level.fixed_mask, level.to_physical)
        length = jnp.linalg.norm(level.to_physical[:-1, :-1])
        motion = _Motion(parameters, centre, length, plane, _copy(parameters))
        return State(motion, no_moments(parameters))

    def resized(self, state: State, shape: tuple[int, ...]) -> State:
        """Return the same: the parameters do not depend on the grid."""
        motion: _Motion = state.found
        return state._replace(found=motion._replace(start=_copy(motion.parameters)))

    def start_of_level(self, found: _Motion) -> _Motion:
        """Return the motion that the level started with."""
        return found._replace(parameters=found.start)

    def step(self, level: Level, state: State, progress: jax.Array) -> tuple[State, jax.Array]:
        """Take one step; return the loss before it."""
        motion: _Motion = state.found

        def moved(level: Level, parameters: _Parameters) -> Weighted:
            return level.moved(matmul(level.matrix, motion.matrix(parameters)), level.displacement)

        def objective(parameters: _Parameters) -> jax.Array:
            return self.loss(level, moved(level, parameters), level.target())

        if self.takes_channels_singly(level):
            loss, gradient = self._of_many_channels(level, moved, motion.parameters)
        else:
            loss, gradient = jax.value_and_grad(objective)(motion.parameters)
        voxel = level.voxel_size() / motion.length
        gradient, epsilon = self.in_scale(level, gradient, _EPSILON / voxel)
        direction, moments = adam_direction(
            gradient, state.moments, beta1=0.9, beta2=0.99, epsilon=epsilon
        )
        rate = self.learning_rate * voxel
        rate *= 0.55 + 0.45 * jnp.cos(jnp.pi * progress)
        parameters = jax.tree.map(lambda p, d: p - rate * d, motion.parameters, direction)
        return State(motion._replace(parameters=parameters), moments), loss

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
    return jnp.eye(3, dtype=vector.dtype) + first * cross + second * matmul(cross, cross)
