"""What the diffeomorphic stages have in common: how a gradient becomes a step of a field."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from jaxreg import compose, step_gradient
from jaxreg._shared_planes import overwriting, samples_within
from jaxreg.registration.stages.adam import (
    AdamMoments,
    no_moments,
    resize_moments,
    riemannian_adam_step,
)
from jaxreg.registration.stages.deformable import Deformable, Loss
from jaxreg.registration.stages.fields import confined_in_place, longest, smoothed, smoothing
from jaxreg.registration.stages.iterative import Iterate, Resolution, State
from jaxreg.registration.stages.neighbours import differences
from jaxreg.registration.stages.problem import Level, Weighted, sampled_near
from jaxreg.registration.stages.pyramid import resize_field
from jaxreg.registration.stages.spread import spread

__all__ = ["Diffeomorphic", "through_warp"]

_Block = tuple[jax.Array, State, jax.Array]
"""Whether a block is to run, what it changes, and its losses."""


@dataclasses.dataclass(frozen=True)
class Diffeomorphic(Deformable):
    """Settings of the stages whose deformations grow by small steps; the others as `Deformable`.

    They have fields with a value at each voxel of a level.

    Attributes
    ----------
    gradient_sigma
        Gaussian that smooths the gradient, in voxels of the level: the larger, the more the field
        flows like a viscous fluid.
    field_sigma
        Gaussian that smooths the field after each step, in voxels of the level: the larger, the
        more it resists like an elastic body.
    moments_dtype
        What Adam's moments are kept in, ``"float32"`` or ``"bfloat16"``: 12 bytes a voxel and field
        less, for volumes that need all the memory there is. Arithmetic stays in float32.

    Raises
    ------
    ValueError
        As `Deformable`.
    """

    fields: ClassVar[int] = 1
    """How many fields the stage looks for."""

    gradient_sigma: float = 1.25
    field_sigma: float = 0.6
    moments_dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("gradient_sigma", "field_sigma"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: expected at least 0, got {getattr(self, name)}")
        if self.moments_dtype not in ("float32", "bfloat16"):
            raise ValueError(
                f"moments_dtype: expected float32 or bfloat16, got {self.moments_dtype!r}"
            )

    def begin(self, level: Level, resolution: Resolution, measured: None) -> State:
        """Return fields of zero, ``(fields, [Z,] Y, X, D)``."""
        zero = spread(jnp.zeros((self.fields, *level.shape, level.ndim), jnp.float32), 1)
        return State(zero, no_moments(zero.astype(self.moments_dtype)))

    def resized(self, state: State, shape: tuple[int, ...], resolution: Resolution) -> State:
        """Return the same on a grid of another shape."""
        return State(resize_field(state.found, shape), resize_moments(state.moments, shape))

    def smooth(self, field: jax.Array) -> jax.Array:
        """Smooth a field after its step."""
        return confined_in_place(smoothed(field, self.field_sigma))

    def after_step(self, field: jax.Array, step: jax.Array) -> jax.Array:
        """Return a field after a step of :meth:`descend` composed from the right, smooth again."""
        with samples_within(math.ceil(self.learning_rate / 2)), overwriting():
            composed = compose(field, step)
        return self.smooth(composed)

    def repeat(
        self, level: Level, iterate: Iterate, state: State, indices: jax.Array
    ) -> tuple[State, jax.Array]:
        """Run the iterations of a block.

        Where several devices share a volume, how far away they sample the images is found out once
        for all of them.
        """
        # A step makes no displacement longer than by its own length, and smoothing none at all.
        voxels = jnp.asarray([max(n - 1, 1) for n in level.shape[::-1]])
        steps = indices.size * self.learning_rate / voxels
        is_near = level.lies_near(longest(state.found) + steps)

        def far(state: State, index: jax.Array) -> tuple[State, jax.Array]:
            return iterate(state, index)

        def near(state: State, index: jax.Array) -> tuple[State, jax.Array]:
            with sampled_near():
                return iterate(state, index)

        def run(one: Iterate, state: State) -> tuple[State, jax.Array]:
            return super(Diffeomorphic, self).repeat(level, one, state, indices)

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

    def descend(
        self, level: Level, gradient: jax.Array, moments: AdamMoments
    ) -> tuple[jax.Array, AdamMoments]:
        """Return the step for the gradient of a mean loss, made smooth, and Adam's moments."""
        # The loss is a mean: its sum has a gradient whose size does not depend on the grid.
        voxels = jnp.asarray(math.prod(gradient.shape[1:-1]), gradient.dtype)
        per_voxel = jnp.asarray([max(n - 1, 1) / 2 for n in level.shape[::-1]], gradient.dtype)
        scale, epsilon = self.in_scale(level, voxels, self.epsilon * per_voxel)
        with overwriting():
            return riemannian_adam_step(
                gradient,
                moments,
                learning_rate=self.learning_rate,
                beta1=self.beta1,
                beta2=self.beta2,
                epsilon=epsilon,
                scale=scale,
                confined=True,
                sigma=smoothing(level.shape, self.gradient_sigma),
            )

    def loss_and_gradient(
        self,
        level: Level,
        pair: Callable[[Level], tuple[Weighted, Weighted]],
        wrt: tuple[int, ...],
        field: jax.Array,
        *,
        through: bool,
    ) -> tuple[jax.Array, jax.Array]:
        """Return the loss with its penalty, and the gradient with respect to steps of a field.

        Parameters
        ----------
        level
            The level.
        pair
            ``pair(level)``: the moved image and its target, of all channels of a level.
        wrt
            With respect to which steps: 0 of the moved image, 1 of its target.
        field
            What is regularised, ``(steps, [Z,] Y, X, D)``.
        through
            Whether the gradient of the penalty is taken through the warps of the field first, as it
            is the one with respect to a displacement: as for the metric, the step is composed from
            the right, at the zero step.

        Returns
        -------
        loss
            A scalar.
        gradient
            ``(steps, [Z,] Y, X, D)``, in the order of ``wrt``.
        """
        if not self.takes_channels_singly(level):
            images = pair(level)
            loss, slopes, rate = self.loss_and_slopes(level, *images, wrt)
            # The pull takes more memory than slopes, and so is made when what those are made of is
            # gone.
            field, slopes = jax.lax.optimization_barrier(  # type: ignore[no-untyped-call]
                (field, slopes)
            )
            penalty = self.penalty(level, field)
            # To put images side by side takes less than to do so with fields.
            chosen = jnp.concatenate([images[k].image for k in wrt])
            joined = jnp.concatenate(slopes)
            # It is smoothed where its moments are made, and so is in the place of the pull, and
            # the step in its own. Devices that share a volume send each other one plane of what is
            # multiplied, and of the product what a Gaussian reaches.
            with overwriting():
                gradient = step_gradient(
                    chosen,
                    joined,
                    penalty.gradient,
                    field if through and penalty.gradient is not None else None,
                    slope_scale=rate,
                    pull_scale=penalty.unit,
                )
            return loss + penalty.value, gradient
        moved, target = pair(level.channel(0))

        def of_channel(one: Level, loss: Loss) -> tuple[jax.Array, jax.Array]:
            images = tuple(image.image for image in pair(one))
            value, slopes = jax.value_and_grad(loss, wrt)(*images)
            chosen = [images[k] for k in wrt]
            return value, step_gradient(jnp.concatenate(chosen), jnp.concatenate(slopes))

        loss, gradient = self.by_channels(level, moved.weight * target.weight, of_channel)
        penalty = self.penalty(level, field)
        if (pull := penalty.pull) is not None:
            gradient += through_warp(field, pull) if through else pull
        return loss + penalty.value, gradient

    def transforms(
        self, shape: tuple[int, ...], found: jax.Array
    ) -> tuple[jax.Array, jax.Array | None]:
        """Return the displacement of the fields that were found, and what is known of its inverse.

        Both are on a grid of a shape.
        """
        return self.transforms_of_fields(resize_field(found, shape))

    @abc.abstractmethod
    def transforms_of_fields(self, found: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Return the displacement of fields, and what is known of its inverse, on their grid."""


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
