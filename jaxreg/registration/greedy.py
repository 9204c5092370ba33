r"""The greedy stage: a diffeomorphism grown by composition of small steps, from coarse to fine.

The moving image :math:`M` is sampled at :math:`A(\psi(x))`, with an affine :math:`A` and
:math:`\psi = \mathrm{id} + d`. Each iteration composes a small step from the right,

.. math:: \psi \leftarrow \psi \circ (\mathrm{id} + \delta), \qquad
          \text{that is}\quad d \leftarrow \delta + d \circ (\mathrm{id} + \delta),

so :math:`\psi` stays invertible as long as every step is. The step minimises the loss to first
order; its gradient with respect to :math:`\delta` at 0 is

.. math:: \frac{\partial L}{\partial \delta(x)} = D\psi(x)^T \,\frac{\partial L}{\partial d(x)}
          = \frac{\partial L}{\partial I(x)} \nabla I(x), \qquad I = M \circ A \circ \psi .

It is *not* the gradient with respect to :math:`d`, which belongs to the additive update
:math:`d + \delta`: the two differ by :math:`D\psi^T`. The right-hand side needs the moved image
alone, no derivative of the warp. :math:`\nabla I` is taken by central differences. (The derivative
of the linear interpolant of :math:`I` at a voxel is its one-sided difference: it would drag the
image half a voxel to one side.)

Adam works in the tangent space at the identity, where :math:`\delta` lives, so its moments need no
transport from one :math:`\psi` to the next. The method is that of FireANTs: Jena, Chaudhari and
Gee, arXiv:2404.01249.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike, NDArray

from jaxreg import compose, convert_displacement, gaussian_smooth, interpolate
from jaxreg.registration.progress import Callback, Progress, blocks, check_schedule
from jaxreg.registration.pyramid import downsample, level_shape, resize_field
from jaxreg.registration.similarity import Similarity, find_loss
from jaxreg.registration.volume import Volume, normalised_affine

__all__ = ["AdamMoments", "Greedy", "register_greedy", "riemannian_adam_step", "step_gradient"]


@dataclasses.dataclass(frozen=True)
class Greedy:
    """Settings of the greedy stage.

    Attributes
    ----------
    scales
        How many times wider a voxel is than at full resolution, per level.
    iterations
        Steps per level.
    learning_rate
        No step moves a point by more than half a voxel of the level times this.
    gradient_sigma
        Gaussian that smooths the gradient, in voxels of the level: the larger, the more the field
        flows like a viscous fluid.
    field_sigma
        Gaussian that smooths the field after each step, in voxels of the level: the larger, the
        more it resists like an elastic body.
    beta1, beta2, epsilon
        Decay of Adam's two moments, and what keeps its quotient finite.
    loss
        ``"lncc"``, ``"ncc"`` (the global one), or ``loss(pred, target)``: a scalar to be
        minimised, the mean over the voxels; any JAX function of two images ``(1, 1, [Z,] Y, X)``.
    kernel_size
        Window of ``"lncc"``, in voxels of the level, odd.

    Raises
    ------
    ValueError
        If scales and iterations do not make a schedule, or for an unknown loss or window.
    """

    scales: tuple[float, ...] = (4, 2, 1)
    iterations: tuple[int, ...] = (60, 40, 20)
    learning_rate: float = 0.5
    gradient_sigma: float = 1.25
    field_sigma: float = 0.6
    beta1: float = 0.9
    beta2: float = 0.99
    epsilon: float = 1e-8
    loss: Similarity = "lncc"
    kernel_size: int = 7

    def __post_init__(self) -> None:
        check_schedule(self.scales, self.iterations)
        find_loss(self.loss, self.kernel_size)


class AdamMoments(NamedTuple):
    """Adam's memory of the gradients of a field, all in normalised coordinates.

    There a gradient of the sum loss has the same size on every level, so a change of scale only
    has to resize the moments.
    """

    first: jax.Array
    """``(N, [Z,] Y, X, D)``."""
    second: jax.Array
    """``(N, [Z,] Y, X, D)``."""
    steps: jax.Array
    """Steps taken, a scalar."""

    @classmethod
    def zeros(cls, shape: tuple[int, ...]) -> AdamMoments:
        """Return the memory before the first step for fields of a shape."""
        return cls(
            jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.float32), jnp.zeros((), jnp.int32)
        )

    def resized(self, shape: tuple[int, ...]) -> AdamMoments:
        """Return the same memory on a grid of another spatial shape."""
        return AdamMoments(
            resize_field(self.first, shape), resize_field(self.second, shape), self.steps
        )


class _State(NamedTuple):
    displacement: jax.Array
    moments: AdamMoments


def riemannian_adam_step(
    gradient: jax.Array,
    moments: AdamMoments,
    *,
    learning_rate: float,
    beta1: float = 0.9,
    beta2: float = 0.99,
    epsilon: float = 1e-8,
) -> tuple[jax.Array, AdamMoments]:
    r"""Turn a gradient into the displacement to compose with.

    .. math:: \delta = -\lambda\, \min\Big(1, \frac{1/2}{\max_x \|a(x)\|}\Big)\, a, \qquad
              a = \frac{\hat m}{\sqrt{\hat v} + \epsilon}

    with Adam's bias-corrected moments :math:`\hat m, \hat v` of every component. The direction
    :math:`a` has no unit; it is read in voxels. Per batch item, the longest step is at most half a
    voxel times the learning rate :math:`\lambda`.

    Parameters
    ----------
    gradient
        Gradient of the loss summed over voxels and items with respect to the step, ``(N, [Z,] Y,
        X, D)``, in normalised coordinates.
    moments
        From the previous step.
    learning_rate, beta1, beta2, epsilon
        See `Greedy`.

    Returns
    -------
    step
        ``(N, [Z,] Y, X, D)``, normalised coordinates.
    moments
        For the next step.
    """
    steps = moments.steps + 1
    first = beta1 * moments.first + (1 - beta1) * gradient
    second = beta2 * moments.second + (1 - beta2) * gradient**2
    # The powers get the gradient's dtype: a float to an integer array would be double under x64.
    mean = first / (1 - jnp.asarray(beta1, gradient.dtype) ** steps)
    variance = second / (1 - jnp.asarray(beta2, gradient.dtype) ** steps)
    direction = mean / (jnp.sqrt(variance) + epsilon)
    lengths = jnp.linalg.norm(direction, axis=-1, keepdims=True)
    longest = lengths.max(axis=tuple(range(1, gradient.ndim)), keepdims=True)
    step = -learning_rate * 0.5 / jnp.maximum(0.5, longest) * direction
    step = convert_displacement(step, "voxel", "normalised")
    return step, AdamMoments(first, second, steps)


def step_gradient(moved: jax.Array, slope: jax.Array) -> jax.Array:
    r"""Gradient of a loss with respect to a step composed from the right, at the zero step.

    The formula is at the head of this module: :math:`\partial L/\partial I \cdot \nabla I`,
    summed over the channels.

    Parameters
    ----------
    moved
        The moved image :math:`I`, ``(N, C, [Z,] Y, X)``.
    slope
        The loss's gradient with respect to it, :math:`\partial L/\partial I`.

    Returns
    -------
    Array
        ``(N, [Z,] Y, X, D)`` per unit of normalised coordinates. Central differences, one-sided
        at the borders; 0 along an axis of length 1.
    """
    components = []
    for axis in reversed(range(2, moved.ndim)):
        size = moved.shape[axis]
        if size == 1:
            components.append(jnp.zeros_like(moved[:, 0]))
            continue
        (derivative,) = jnp.gradient(moved, axis=(axis,))
        components.append((slope * derivative).sum(axis=1) * ((size - 1) / 2))
    return jnp.stack(components, axis=-1)


def register_greedy(
    fixed: Volume,
    moving: Volume,
    settings: Greedy | None = None,
    *,
    transform: ArrayLike | None = None,
    callback: Callback | None = None,
) -> tuple[jax.Array, NDArray[np.float32]]:
    """Find the diffeomorphism that makes the moving volume look like the fixed one.

    Each level runs in blocks of iterations, each block in one jitted call on the device; nothing
    is read back before the end unless the callback does.

    Parameters
    ----------
    fixed, moving
        Volumes that may differ in size, spacing, origin and direction. Outside of its grid the
        moving volume is 0.
    settings
        See `Greedy`.
    transform
        ``(D + 1, D + 1)``, physical fixed -> physical moving, applied after the diffeomorphism;
        the identity by default.
    callback
        Called with a `Progress` after each block of iterations.

    Returns
    -------
    displacement
        ``(1, [Z,] Y, X, D)`` on the fixed grid, normalised coordinates.
    losses
        ``(sum(iterations),)``, the loss before each step.
    """
    settings = settings or Greedy()
    transform = np.eye(fixed.ndim + 1) if transform is None else transform
    affine = jnp.asarray(normalised_affine(transform, fixed, moving), jnp.float32)
    fixed_image, moving_image = fixed.batched(), moving.batched()
    coarsest = (1, *level_shape(fixed.shape, settings.scales[0]), fixed.ndim)
    state = _State(jnp.zeros(coarsest, jnp.float32), AdamMoments.zeros(coarsest))
    losses = []
    done, total = 0, sum(settings.iterations)
    for scale, iterations in zip(settings.scales, settings.iterations, strict=True):
        shape = level_shape(fixed.shape, scale)
        target = downsample(fixed_image, shape)
        source = downsample(moving_image, level_shape(moving.shape, scale))
        state = _State(resize_field(state.displacement, shape), state.moments.resized(shape))
        for _, count in blocks(iterations):
            state, values = _descend(state, target, source, affine, count, settings)
            losses.append(values)
            done += count
            if callback is not None:
                callback(Progress("greedy", scale, done, total, values))
    displacement = resize_field(state.displacement, fixed.shape)
    return displacement, np.concatenate([np.zeros(0, np.float32), *map(np.asarray, losses)])


@functools.partial(jax.jit, static_argnames=("count", "settings"))
def _descend(
    state: _State,
    target: jax.Array,
    source: jax.Array,
    affine: jax.Array,
    count: int,
    settings: Greedy,
) -> tuple[_State, jax.Array]:
    """Take ``count`` steps; return the losses before each of them."""
    objective = find_loss(settings.loss, settings.kernel_size)

    def iterate(state: _State, _: None) -> tuple[_State, jax.Array]:
        moved = interpolate(source, affine, state.displacement, affine_last=True)
        loss, slope = jax.value_and_grad(objective)(moved, target)
        # The loss is a mean: its sum has a gradient whose size does not depend on the grid.
        gradient = step_gradient(moved, slope * math.prod(target.shape[2:]) * target.shape[0])
        gradient = gaussian_smooth(gradient, settings.gradient_sigma, channel_last=True)
        step, moments = riemannian_adam_step(
            gradient,
            state.moments,
            learning_rate=settings.learning_rate,
            beta1=settings.beta1,
            beta2=settings.beta2,
            epsilon=settings.epsilon,
        )
        displacement = compose(state.displacement, step)
        displacement = gaussian_smooth(displacement, settings.field_sigma, channel_last=True)
        return _State(displacement, moments), loss

    return jax.lax.scan(iterate, state, length=count)
