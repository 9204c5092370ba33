"""Quantiles without sorting: of the values in their order no more is computed than is asked for."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

__all__ = ["quantiles"]

_BITS = 32


@functools.partial(jax.jit, static_argnames="shares")
def quantiles(values: jax.Array, shares: Sequence[float]) -> jax.Array:
    """Return quantiles along the last axis, as `jax.numpy.quantile` interpolates them linearly.

    That sorts, and on a GPU XLA compiles a sort for several seconds of a processor. Here each value
    that a quantile lies between is found bit by bit: it is the largest of which not too many values
    are less.

    Parameters
    ----------
    values
        ``(..., n)``, taken as float32; not a number in one item is so in its quantiles.
    shares
        Numbers from 0 to 1, a tuple.

    Returns
    -------
    float32[Q, ...]
        For each of the shares.
    """
    values = values.astype(jnp.float32)
    count = values.shape[-1]
    # In float32, as where shares are an array.
    places = np.array(shares, np.float32) * np.float32(count - 1)
    low, high = np.floor(places), np.ceil(places)
    ranks = np.unique(np.clip([low, high], 0, count - 1).astype(np.int32))
    found = _of_ranks(values, ranks)
    below, above = (found[np.searchsorted(ranks, np.clip(x, 0, count - 1))] for x in (low, high))
    weights = (places - low).reshape(-1, *(1,) * (values.ndim - 1))
    between = below * (1 - weights) + above * weights
    return jnp.where(jnp.isnan(values).any(axis=-1), jnp.nan, between)


def _of_ranks(values: jax.Array, ranks: NDArray[np.int32]) -> jax.Array:
    """Return the values that so many others are less than, ``(R, ...)``, of float32."""
    # As integers without a sign, numbers are in the order of their values: positive ones in that of
    # their bits, and before them negative ones in the reverse.
    top = jnp.uint32(1 << (_BITS - 1))
    bits = jax.lax.bitcast_convert_type(jnp.where(values == 0, 0, values), jnp.uint32)
    keys = jnp.where(bits < top, bits | top, ~bits)
    wanted = jnp.asarray(ranks).reshape(-1, *(1,) * (values.ndim - 1))

    def with_bit(number: jax.Array, so_far: jax.Array) -> jax.Array:
        more = so_far | (top >> number.astype(jnp.uint32))
        less = (keys < more[..., None]).sum(axis=-1, dtype=jnp.int32)
        return jnp.where(less <= wanted, more, so_far)

    start = jnp.zeros((len(ranks), *values.shape[:-1]), jnp.uint32)
    found = jax.lax.fori_loop(0, _BITS, with_bit, start)
    numbers: jax.Array = jax.lax.bitcast_convert_type(
        jnp.where(found < top, ~found, found & ~top), jnp.float32
    )
    return numbers
