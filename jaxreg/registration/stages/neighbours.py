"""Neighbours in a volume, so that the compiler can divide the work among devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp

__all__ = ["after", "before", "differences"]


def after(array: jax.Array, axis: int) -> jax.Array:
    """Return what follows each voxel along an axis; the last one follows itself."""
    return _shifted(array, axis, 1)


def before(array: jax.Array, axis: int) -> jax.Array:
    """Return what comes before each voxel along an axis; before the first one comes itself."""
    return _shifted(array, axis, -1)


def differences(array: jax.Array, axis: int) -> jax.Array:
    """Return central differences along an axis, one-sided at the borders, as ``numpy.gradient``."""
    size = array.shape[axis]
    index = jax.lax.broadcasted_iota(jnp.int32, array.shape, axis)
    share = jnp.where((index == 0) | (index == size - 1), 1.0, 0.5).astype(array.dtype)
    return (after(array, axis) - before(array, axis)) * share


def _shifted(array: jax.Array, axis: int, step: int) -> jax.Array:
    # Of planes that are spread over devices, neighbours then exchange one. Where the parts of an
    # array are concatenated, all planes would travel.
    widths = [(0, 0, 0)] * array.ndim
    widths[axis] = (-step, step, 0)
    moved = jax.lax.pad(array, jnp.zeros((), array.dtype), widths)
    index = jax.lax.broadcasted_iota(jnp.int32, array.shape, axis)
    return jnp.where(index == (array.shape[axis] - 1 if step > 0 else 0), array, moved)
