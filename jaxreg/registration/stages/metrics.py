"""How alike two images are: the measures that the stages can maximise."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from jaxreg.loss import lncc_loss, mutual_information_loss

__all__ = ["Metric", "find_loss", "mse_loss", "ncc", "ncc_loss"]

Metric = Literal["lncc", "mi", "mse", "ncc"] | Callable[..., jax.Array]
"""A measure by its name, or ``loss(pred, target)`` itself, to be minimised."""

Loss = Callable[[jax.Array, jax.Array, jax.Array | None], jax.Array]
"""``loss(pred, target, mask)``: a scalar, the mean over whatever the images hold."""


def ncc(pred: jax.Array, target: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    r"""Global normalised cross-correlation (Pearson's correlation over the voxels).

    .. math:: \frac{\sum w\,(I - \bar I)(J - \bar J)}
                   {\sqrt{\sum w\,(I - \bar I)^2}\ \sqrt{\sum w\,(J - \bar J)^2}}

    with the means weighted by ``w`` as well. It is invariant to the gain and the offset of both
    images.

    Parameters
    ----------
    pred, target
        Images, ``(N, C, [Z,] Y, X)``.
    mask
        Weights ``w >= 0`` that broadcast to the images; 1 everywhere by default.

    Returns
    -------
    Array
        ``(N, C)``, from -1 to 1; 0 where an image is constant (its gradient is 0 too).
    """
    axes = tuple(range(2, pred.ndim))
    weight = jnp.ones((), pred.dtype) if mask is None else mask
    weight = jnp.broadcast_to(weight, jnp.broadcast_shapes(pred.shape, target.shape))
    total = jnp.maximum(weight.sum(axes, keepdims=True), jnp.finfo(pred.dtype).tiny)

    def centred(image: jax.Array) -> jax.Array:
        return image - (weight * image).sum(axes, keepdims=True) / total

    pred, target = centred(pred), centred(target)
    covariance = (weight * pred * target).sum(axes)
    pred_variance, target_variance = (weight * pred**2).sum(axes), (weight * target**2).sum(axes)
    varies = (pred_variance > 0) & (target_variance > 0)
    # The inner `where`s keep the square root's infinite slope at 0 out of the gradient.
    pred_scale = jnp.sqrt(jnp.where(varies, pred_variance, 1))
    target_scale = jnp.sqrt(jnp.where(varies, target_variance, 1))
    # One after the other: the square of their product, in the gradient, may overflow.
    return jnp.where(varies, covariance / pred_scale / target_scale, 0)


def ncc_loss(pred: jax.Array, target: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Negative mean over items and channels of the global normalised cross-correlation.

    Parameters
    ----------
    pred, target, mask
        As in `ncc`.

    Returns
    -------
    jax.Array
        A scalar.
    """
    return -ncc(pred, target, mask).mean()


def mse_loss(pred: jax.Array, target: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    r"""Mean squared difference, :math:`\sum w\,(I - J)^2 / \sum w`.

    Parameters
    ----------
    pred, target, mask
        As in `ncc`.

    Returns
    -------
    jax.Array
        A scalar; 0 where the mask is empty.
    """
    squares = (pred - target) ** 2
    if mask is None:
        return squares.mean()
    weight = jnp.broadcast_to(mask, squares.shape)
    return (weight * squares).sum() / jnp.maximum(weight.sum(), jnp.finfo(squares.dtype).tiny)


@functools.cache
def find_loss(metric: Metric, kernel_size: int = 7, num_bins: int = 32) -> Loss:
    """Return the loss that a stage's settings ask for.

    Parameters
    ----------
    metric
        ``"lncc"``, ``"mi"``, ``"mse"``, ``"ncc"`` or the loss itself: ``loss(pred, target)``, or
        ``loss(pred, target, mask=...)`` where there is a mask.
    kernel_size
        Window of ``"lncc"`` in voxels, odd, from 3 to 31.
    num_bins
        Bins of ``"mi"`` along each axis of the histogram, from 2 to 256.

    Returns
    -------
    callable
        ``loss(pred, target, mask)``; the mask may be `None`.

    Raises
    ------
    ValueError
        If there is no such measure, or for a window or a number of bins that the measure does not
        take.
    """
    if kernel_size not in range(3, 32, 2):
        raise ValueError(f"kernel_size: expected an odd number from 3 to 31, got {kernel_size!r}")
    if num_bins not in range(2, 257):
        raise ValueError(f"num_bins: expected an integer from 2 to 256, got {num_bins!r}")
    if callable(metric):
        return functools.partial(_call, metric)
    options: dict[str, Callable[..., jax.Array]] = {
        # So that the unit of the intensities does not matter: to the default, for intensities that
        # spread by about 1, a map of diffusivities in mm²/s would be flat. What is flat as far as
        # float32 can tell counts as such in any case.
        "lncc": functools.partial(lncc_loss, kernel_size=kernel_size, smooth_dr=1e-18),
        "mi": functools.partial(mutual_information_loss, num_bins=num_bins),
        "mse": mse_loss,
        "ncc": ncc_loss,
    }
    if metric not in options:
        raise ValueError(
            f"metric: expected one of {sorted(options)} or a function of two images, got {metric!r}"
        )
    measure = options[metric]
    return lambda pred, target, mask: measure(pred, target, mask=mask)


def _call(
    metric: Callable[..., jax.Array], pred: jax.Array, target: jax.Array, mask: jax.Array | None
) -> jax.Array:
    """Call a user's loss, with the mask only where there is one."""
    if mask is None:
        return metric(pred, target)
    parameters = inspect.signature(metric).parameters.values()
    if not any(p.name == "mask" or p.kind is p.VAR_KEYWORD for p in parameters):
        raise ValueError(f"metric: expected a function that takes mask=, got {metric!r}")
    return metric(pred, target, mask=mask)
