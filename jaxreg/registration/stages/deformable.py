"""What the deformable stages have in common: how a gradient becomes a step of a field."""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxreg import compose, invert_displacement, step_gradient
from jaxreg._shared_planes import samples_within
from jaxreg.registration.stages.adam import (
    AdamMoments,
    no_moments,
    resize_moments,
    riemannian_adam_step,
)
from jaxreg.registration.stages.fields import confined, mended, smoothed, smoothing
from jaxreg.registration.stages.iterative import Iterate, Iterative, State, mean_over_channels
from jaxreg.registration.stages.metrics import Metric, as_metric
from jaxreg.registration.stages.neighbours import differences
from jaxreg.registration.stages.problem import Alignment, Level, Weighted, charged, sampled_near
from jaxreg.registration.stages.pyramid import resize_field
from jaxreg.registration.stages.regularisers import Regulariser
from jaxreg.registration.stages.spread import spread

__all__ = ["Deformable", "Regularisation", "through_warp"]

Regularisation = Callable[[jax.Array], jax.Array]
"""``penalty(field)``: a scalar that is added to the loss."""


_Block = tuple[jax.Array, State, jax.Array]
"""Whether a block is to run, what it changes, and its losses."""


@dataclasses.dataclass(frozen=True)
class Deformable(Iterative):
    """Settings of the stages that deform; the others are those of `Iterative`.

    Attributes
    ----------
    learning_rate
        No step moves a point by more than half a voxel of the level times this.
    gradient_sigma
        Gaussian that smooths the gradient, in voxels of the level: the larger, the more the field
        flows like a viscous fluid.
    field_sigma
        Gaussian that smooths the field after each step, in voxels of the level: the larger, the
        more it resists like an elastic body.
    beta1, beta2
        Decay of Adam's two moments.
    epsilon
        Gradients that are small beside this lead to small steps: it is added to the root of Adam's
        second moment. In units of the metric's scale per voxel of the level, of the summed loss;
        where anything is to be gained gradients are about 0.1, and rounding is mostly below 1e-6.
    regularisation
        What is added to the loss: a `Regulariser` such as ``Diffusion(0.3)``, in units of the
        metric's scale; or ``penalty(field)``, a scalar in units of the loss, any JAX function of
        the stage's field ``(N, [Z,] Y, X, D)``, in normalised coordinates on the grid of the level.
    volume_change
        What lies between voxels becomes at most so many times larger or smaller, and never turns
        inside out: where it would, the deformation that the stage found is smoothed in the end.

    Raises
    ------
    ValueError
        As `Iterative`.
    """

    # To keep a field until the end of the level would cost as much memory again.
    stops_when_worse: ClassVar[bool] = True

    fields: ClassVar[int] = 1
    """How many fields the stage looks for."""

    gradient_sigma: float = 1.25
    field_sigma: float = 0.6
    beta1: float = 0.9
    beta2: float = 0.99
    epsilon: float = 1e-5
    regularisation: Regularisation | None = None
    volume_change: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("gradient_sigma", "field_sigma"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: expected at least 0, got {getattr(self, name)}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: expected 0 <= {name} < 1, got {getattr(self, name)}")
        if not self.epsilon > 0:
            raise ValueError(f"epsilon: expected a positive number, got {self.epsilon}")
        if not self.volume_change > 1:
            raise ValueError(f"volume_change: expected more than 1, got {self.volume_change}")

    def begin(self, level: Level) -> State:
        """Return fields of zero, ``(fields, [Z,] Y, X, D)``."""
        zero = spread(jnp.zeros((self.fields, *level.shape, level.ndim), jnp.float32), 1)
        return State(zero, no_moments(zero))

    def resized(self, state: State, shape: tuple[int, ...]) -> State:
        """Return the same on a grid of another shape."""
        return State(resize_field(state.found, shape), resize_moments(state.moments, shape))

    def repeat(
        self, level: Level, iterate: Iterate, state: State, indices: jax.Array
    ) -> tuple[State, jax.Array]:
        """Run the iterations of a block, where several devices share a volume with one test for all
        of them of how far away they sample the images.
        """
        # No step makes a displacement longer than by its own length, and to smooth does not.
        steps = (
            indices.size
            * self.learning_rate
            / jnp.asarray([max(n - 1, 1) for n in level.shape[::-1]])
        )
        longest = jnp.abs(state.found).max(tuple(range(state.found.ndim - 1))) + steps
        is_near = level.lies_near(longest)

        def far(state: State, index: jax.Array) -> tuple[State, jax.Array]:
            return iterate(state, index)

        def near(state: State, index: jax.Array) -> tuple[State, jax.Array]:
            with sampled_near():
                return iterate(state, index)

        def run(one: Iterate, state: State) -> tuple[State, jax.Array]:
            return super(Deformable, self).repeat(level, one, state, indices)

        if is_near is None:
            return run(far, state)

        def once(one: Iterate, carry: _Block) -> _Block:
            # A loop of one turn or none: XLA would copy fields for the branches of `jax.lax.cond`.
            def turn(carry: _Block) -> _Block:
                return (jnp.zeros((), bool), *run(one, carry[1]))

            turned: _Block = jax.lax.while_loop(lambda carry: carry[0], turn, carry)
            return turned

        losses = jnp.zeros_like(indices, state.found.dtype)
        _, state, losses = once(near, (is_near, state, losses))
        _, state, losses = once(far, (~is_near, state, losses))
        return state, losses

    def smooth(self, field: jax.Array) -> jax.Array:
        """Smooth a field after its step."""
        return confined(smoothed(field, self.field_sigma))

    def after_step(self, field: jax.Array, step: jax.Array) -> jax.Array:
        """Return a field after a step of :meth:`descend` composed from the right, smooth again."""
        with samples_within(math.ceil(self.learning_rate / 2)):
            composed = compose(field, step)
        return self.smooth(composed)

    def descend(
        self, level: Level, gradient: jax.Array, moments: AdamMoments
    ) -> tuple[jax.Array, AdamMoments]:
        """Return the step for the smooth gradient of a mean loss, and Adam's moments after it."""
        # The loss is a mean: its sum has a gradient whose size does not depend on the grid.
        voxels = jnp.asarray(math.prod(gradient.shape[1:-1]), gradient.dtype)
        per_voxel = jnp.asarray([max(n - 1, 1) / 2 for n in level.shape[::-1]], gradient.dtype)
        scale, epsilon = self.in_scale(level, voxels, self.epsilon * per_voxel)
        return riemannian_adam_step(
            gradient,
            moments,
            learning_rate=self.learning_rate,
            beta1=self.beta1,
            beta2=self.beta2,
            epsilon=epsilon,
            scale=scale,
            confined=True,
        )

    def prepared(self, level: Level) -> Level:
        """Return a level with the unit of the regularisation.

        That is the metric's scale or, if it has none, the magnitude of its loss where the stage
        starts: so one weight fits metrics of any size.
        """
        if not isinstance(self.regularisation, Regulariser):
            return level
        if type(as_metric(self.metric)).scale is not Metric.scale:
            return level._replace(loss_unit=level.metric_scale)
        return level._replace(loss_unit=_first_loss(self, level))

    def penalty(self, level: Level, field: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Return the regularisation of a field, and its gradient with respect to the field.

        Without a regularisation there is none.
        """
        if self.regularisation is None:
            return jnp.zeros((), field.dtype), None
        penalty, pull_of = jax.vjp(self.regularisation, field)
        unit = jnp.ones_like(penalty) if level.loss_unit is None else level.loss_unit
        # The kernel multiplies by the cotangent anyhow: the field's gradient needs no pass for it.
        (pull,) = pull_of(unit.astype(penalty.dtype))
        return unit * penalty, pull

    def objective(
        self, level: Level, moved: Weighted, target: Weighted
    ) -> Callable[[jax.Array, jax.Array], jax.Array]:
        """Return the loss as a function of the two images alone.

        The weights are held fixed: by their own gradient a field would push whatever does not match
        out of what is covered, and end with little that is.
        """

        def of_images(pred: jax.Array, image: jax.Array) -> jax.Array:
            return self.loss(level, moved._replace(image=pred), target._replace(image=image))

        return of_images

    def loss_and_gradient(
        self,
        level: Level,
        pair: Callable[[Level], tuple[Weighted, Weighted]],
        wrt: tuple[int, ...],
        pull: jax.Array | None,
        displacement: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Return the loss of two images, and its gradient with respect to steps that warp them.

        Parameters
        ----------
        level
            The level.
        pair
            ``pair(level)``: the moved image and its target, of all channels of a level.
        wrt
            With respect to which steps: 0 of the moved image, 1 of its target.
        pull
            What is added to the gradient, of its shape, or `None`.
        displacement
            Through whose warp the pull is taken first: it is that on the displacement, and as for
            the metric, the step is composed from the right, at the zero step.

        Returns
        -------
        loss
            A scalar.
        gradient
            ``(steps, [Z,] Y, X, D)``, smooth, in the order of ``wrt``.
        """
        if not self.takes_channels_singly(level):
            images = pair(level)
            objective = self.objective(level, *images)
            loss, slopes = jax.value_and_grad(objective, wrt)(*(image.image for image in images))
            # To put images side by side takes less than to do so with fields.
            chosen = jnp.concatenate([images[k].image for k in wrt])
            sigma = smoothing(chosen.shape[2:], self.gradient_sigma)
            joined = jnp.concatenate(slopes)
            warp = None if pull is None else displacement
            return loss, step_gradient(chosen, joined, pull, warp, sigma=sigma)
        metric = as_metric(self.metric)
        moved, target = pair(level.channel(0))
        weight = moved.weight * target.weight

        def of_channel(channel: jax.Array) -> tuple[jax.Array, jax.Array]:
            one = level.channel(channel)
            images = tuple(image.image for image in pair(one))

            def of_images(pred: jax.Array, image: jax.Array) -> jax.Array:
                return metric.loss_of_level(pred, image, weight, fixed=one.fixed, moving=one.moving)

            loss, slopes = jax.value_and_grad(of_images, wrt)(*images)
            chosen = [images[k] for k in wrt]
            return loss, step_gradient(jnp.concatenate(chosen), jnp.concatenate(slopes))

        loss, total = mean_over_channels(of_channel, level.fixed.shape[1])
        loss, rate = jax.value_and_grad(charged)(loss, weight.sum(), level.overlap)
        gradient = rate * total
        if pull is not None:
            gradient += pull if displacement is None else through_warp(displacement, pull)
        return loss, smoothed(gradient, self.gradient_sigma)

    @abc.abstractmethod
    def transforms(self, found: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Return the displacement of the fields that were found, and what is known of its inverse.

        All are on one grid.
        """

    def finish(self, shape: tuple[int, ...], alignment: Alignment, found: jax.Array) -> Alignment:
        """Return the alignment with the deformation before it, and its inverse."""
        displacement, inverse = self.transforms(resize_field(found, shape))
        if alignment.displacement is not None:
            displacement = compose(alignment.displacement, displacement)
            before = alignment.inverse_displacement
            inverse = None if inverse is None or before is None else compose(inverse, before)
        displacement, share = mended(displacement, self.volume_change)
        if alignment.mended is not None:
            share = jnp.maximum(share, alignment.mended)
        inverse = invert_displacement(displacement, inverse)
        return Alignment(alignment.matrix, displacement, inverse, share)


@functools.partial(jax.jit, static_argnames="stage")
def _first_loss(stage: Deformable, level: Level) -> jax.Array:
    """Return the magnitude of a stage's loss where it starts, a scalar."""
    moved = level.moved(level.matrix, level.displacement)
    return jnp.abs(stage.loss(level, moved, level.target()))


def through_warp(displacement: jax.Array, slope: jax.Array) -> jax.Array:
    r"""Gradient of a function of a displacement with respect to a step composed from the right.

    With :math:`\psi = \mathrm{id} + d` it is :math:`D\psi^T \,\partial P / \partial d`, at the zero
    step.

    Parameters
    ----------
    displacement
        :math:`d`, ``(N, [Z,] Y, X, D)``, normalised coordinates.
    slope
        The function's gradient with respect to it, :math:`\partial P / \partial d`.

    Returns
    -------
    Array
        ``(N, [Z,] Y, X, D)``. Central differences, one-sided at the borders; the displacement does
        not change along an axis of length 1.
    """
    ndim = displacement.shape[-1]
    components = []
    for component in range(ndim):
        axis = ndim - component  # components are in x, y, z order
        turned = (slope * _along(displacement, axis)).sum(axis=-1)
        components.append(slope[..., component] + turned)
    return jnp.stack(components, axis=-1)


def _along(array: jax.Array, axis: int) -> jax.Array:
    """Return the derivative along an axis of a grid per unit of normalised coordinates."""
    if array.shape[axis] == 1:
        return jnp.zeros_like(array)
    return differences(array, axis) * ((array.shape[axis] - 1) / 2)
