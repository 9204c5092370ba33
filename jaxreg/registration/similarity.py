"""How alike two images are: the measures that the stages can maximise."""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp

from jaxreg.loss import lncc_loss
from jaxreg.registration.progress import Loss

__all__ = ["Similarity", "find_loss", "ncc", "ncc_loss"]

Similarity = Literal["ncc", "lncc"] | Loss
"""A measure by its name, or ``loss(pred, target)`` itself."""


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
    scale = jnp.sqrt(jnp.where(varies, pred_variance, 1))
    scale *= jnp.sqrt(jnp.where(varies, target_variance, 1))
    return jnp.where(varies, covariance / scale, 0)


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


@functools.cache
def find_loss(similarity: Similarity, kernel_size: int) -> Loss:
    """Return the loss that a stage's settings ask for.

    The same settings get the same object, so that nothing is compiled twice for it.

    Parameters
    ----------
    similarity
        ``"ncc"``, ``"lncc"`` or the loss itself.
    kernel_size
        Window of ``"lncc"`` in voxels, odd, from 3 to 31.

    Raises
    ------
    ValueError
        If there is no such measure, or for a window that `jaxreg.lncc_loss` does not take.
    """
    if callable(similarity):
        return similarity
    if similarity == "ncc":
        return ncc_loss
    if similarity != "lncc":
        raise ValueError(
            f"loss: expected 'ncc', 'lncc' or a function of two images, got {similarity!r}"
        )
    if kernel_size not in range(3, 32, 2):
        raise ValueError(f"kernel_size: expected an odd number from 3 to 31, got {kernel_size!r}")
    return functools.partial(lncc_loss, kernel_size=kernel_size)
