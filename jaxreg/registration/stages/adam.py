"""Adam of optax, for a few parameters and for fields."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

import jaxreg
from jaxreg.registration.stages.pyramid import resize_field

__all__ = [
    "AdamMoments",
    "adam_direction",
    "no_moments",
    "resize_moments",
    "riemannian_adam_step",
]


class AdamMoments(NamedTuple):
    """Adam's running means. The fields are those of `optax.ScaleByAdamState`."""

    count: jax.Array  # type: ignore[assignment]  # of tuples that is a method
    """How many steps were taken, a scalar, int32."""
    mu: Any
    """The mean of the gradients, shaped like them."""
    nu: Any
    """The mean of their squares."""


_Moments = TypeVar("_Moments", bound=tuple[Any, ...])
"""`AdamMoments`, or the state of optax."""


def no_moments(like: Any) -> AdamMoments:
    """Return the moments before the first step for gradients shaped like a pytree."""
    zeros = [jax.tree.map(jnp.zeros_like, like) for _ in range(2)]
    return AdamMoments(jnp.zeros((), jnp.int32), *zeros)


def resize_moments(moments: AdamMoments, shape: tuple[int, ...]) -> AdamMoments:
    """Return the moments of a field on a grid of another spatial shape.

    They are in normalised coordinates. There a gradient of the sum loss has the same size on every
    level, so that nothing but the sampling changes.
    """
    first, second = (
        resize_field(field.astype(jnp.float32), shape).astype(field.dtype)
        for field in (moments.mu, moments.nu)
    )
    return AdamMoments(moments.count, first, second)


def adam_direction(
    gradient: Any,
    moments: AdamMoments,
    *,
    beta1: float,
    beta2: float,
    epsilon: float | jax.Array = 1e-8,
) -> tuple[Any, AdamMoments]:
    r"""Return :math:`\hat m / (\sqrt{\hat v} + \epsilon)` and the moments for the next step.

    Parameters
    ----------
    gradient
        A pytree of arrays.
    moments
        From the previous step; `no_moments` before the first.
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
    import optax  # takes a tenth of a second, which a command whose programs are kept need not wait

    adam = optax.scale_by_adam(b1=beta1, b2=beta2, eps=epsilon)
    direction, after = adam.update(gradient, optax.ScaleByAdamState(*moments))
    return direction, AdamMoments(*after)


def riemannian_adam_step(
    gradient: jax.Array,
    moments: _Moments,
    *,
    learning_rate: float,
    beta1: float = 0.9,
    beta2: float = 0.99,
    epsilon: float | jax.Array = 1e-8,
    scale: float | jax.Array | None = None,
    confined: bool = False,
    sigma: float | Sequence[float] = 0.0,
) -> tuple[jax.Array, _Moments]:
    """Turn a gradient into the displacement to compose with: `jaxreg.riemannian_adam_step`.

    Parameters
    ----------
    gradient
        Gradient of the loss summed over voxels and items with respect to the step, ``(N, [Z,] Y,
        X, D)``, in normalised coordinates.
    moments
        From the previous step; ``optax.scale_by_adam().init(gradient)`` before the first, or
        `AdamMoments` with zeros in the shapes of that.
    learning_rate, beta1, beta2, epsilon, scale, confined, sigma
        As for `jaxreg.riemannian_adam_step`.

    Returns
    -------
    step
        ``(N, [Z,] Y, X, D)``, normalised coordinates.
    moments
        For the next step, of the type of those that were given.
    """
    given: Any = moments
    step, mu, nu = jaxreg.riemannian_adam_step(
        gradient,
        given.mu,
        given.nu,
        given.count,
        learning_rate=learning_rate,
        beta1=beta1,
        beta2=beta2,
        epsilon=epsilon,
        scale=scale,
        confined=confined,
        sigma=sigma,
    )
    return step, given._replace(count=given.count + 1, mu=mu, nu=nu)
