"""Adam, for a few parameters and for fields."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxreg.registration.pyramid import resize_field

__all__ = ["AdamMoments", "adam_direction", "riemannian_adam_step"]


class AdamMoments(NamedTuple):
    """Adam's memory of the gradients: of a field, or of any pytree of parameters.

    Those of fields are in normalised coordinates. There a gradient of the sum loss has the same
    size on every level, so a change of scale only has to resize the moments.
    """

    first: Any
    """Running mean of the gradient, shaped like it."""
    second: Any
    """Running mean of its square, likewise."""
    steps: jax.Array
    """Steps taken, a scalar."""

    @classmethod
    def zeros(cls, like: Any) -> AdamMoments:
        """Return the memory before the first step for gradients shaped like a pytree."""
        first, second = (jax.tree.map(jnp.zeros_like, like) for _ in range(2))
        return cls(first, second, jnp.zeros((), jnp.int32))

    def resized(self, shape: tuple[int, ...]) -> AdamMoments:
        """Return the memory of a field on a grid of another spatial shape."""
        return AdamMoments(
            resize_field(self.first, shape), resize_field(self.second, shape), self.steps
        )


def adam_direction(
    gradient: Any, moments: AdamMoments, *, beta1: float, beta2: float, epsilon: float = 1e-8
) -> tuple[Any, AdamMoments]:
    r"""Return :math:`\hat m / (\sqrt{\hat v} + \epsilon)` and the moments for the next step.

    Parameters
    ----------
    gradient
        A pytree of arrays.
    moments
        From the previous step.
    beta1, beta2, epsilon
        Decay of the two moments, and what keeps the quotient finite.

    Returns
    -------
    direction
        Shaped like the gradient; about 1 per component, without a unit.
    moments
        For the next step.

    Notes
    -----
    Kingma and Ba, "Adam: A Method for Stochastic Optimization", ICLR 2015, with the bias
    corrections of its algorithm 1.
    """
    steps = moments.steps + 1
    first = jax.tree.map(lambda m, g: beta1 * m + (1 - beta1) * g, moments.first, gradient)
    second = jax.tree.map(lambda v, g: beta2 * v + (1 - beta2) * g**2, moments.second, gradient)

    # In float32 also under x64. Together: on a GPU every scalar of its own costs a kernel.
    unbiased = 1 / (1 - jnp.asarray([beta1, beta2], jnp.float32) ** steps)

    def quotient(mean: jax.Array, variance: jax.Array) -> jax.Array:
        return mean * unbiased[0] / (jnp.sqrt(variance * unbiased[1]) + epsilon)

    return jax.tree.map(quotient, first, second), AdamMoments(first, second, steps)


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

    Notes
    -----
    Jena, Chaudhari and Gee, "FireANTs: Adaptive Riemannian Optimization for Multi-Scale
    Diffeomorphic Matching", arXiv:2404.01249.
    """
    direction, moments = adam_direction(
        gradient, moments, beta1=beta1, beta2=beta2, epsilon=epsilon
    )
    # Without `convert_displacement`: XLA fuses all that is done to a voxel, but not into an op.
    squares = jnp.sum(direction**2, axis=-1)
    longest = jnp.sqrt(jnp.max(squares, axis=tuple(range(1, gradient.ndim - 1))))
    length = -learning_rate * 0.5 / jnp.maximum(0.5, longest)
    voxel = [2 / (n - 1) if n > 1 else 0 for n in reversed(gradient.shape[1:-1])]
    length = length.reshape(-1, *(1,) * (gradient.ndim - 1))
    return length * jnp.asarray(voxel, gradient.dtype) * direction, moments
