"""Smoothing of images and fields."""

from __future__ import annotations

from collections.abc import Sequence

import jax

from jaxreg._ops import apply
from regkernels.options import static_tuple


def gaussian_smooth(
    x: jax.Array,
    sigma: float | Sequence[float],
    *,
    truncate: float = 4.0,
    channel_last: bool = False,
) -> jax.Array:
    """Smooth with a separable Gaussian, sampled at integers and normalised; zero outside.

    Parameters
    ----------
    x : float[N, C, *S] or float[N, *S, C]
        The second with ``channel_last``; ``*S`` stands for the spatial axes ``Z, Y, X`` or
        ``Y, X``. Half precision is added up in float32 and rounded once, at the end.
    sigma
        Standard deviation in voxels: one number, or one per axis in (z, y, x) order. 0 leaves an
        axis as it is.
    truncate
        The window reaches ``ceil(truncate * sigma)`` voxels to either side.
    channel_last
        Where the channels are.

    Returns
    -------
    float[N, C, *S] or float[N, *S, C]
        Of the shape and dtype of ``x``. Differentiable; the filter is its own adjoint.

    Raises
    ------
    ValueError
        A shape, ``sigma`` or ``truncate`` that does not fit; the message names the argument.
    TypeError
        A dtype or an argument's type that is not supported.
    """
    return apply(
        "gaussian_smooth",
        (x,),
        {
            "sigma": static_tuple(sigma),
            "truncate": truncate,
            "channel_last": channel_last,
        },
    )
