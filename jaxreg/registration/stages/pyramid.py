"""Image pyramids in align-corners-true geometry.

Every level spans the same volume: the centres of its first and last voxels stay where they are, so
normalised coordinates, displacements and affines keep their numbers from level to level.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxreg import gaussian_smooth, interpolate
from jaxreg.registration.stages.spread import spread

__all__ = ["FEW_CHANNELS", "downsample", "level_shape", "resize_field", "resize_image"]

FEW_CHANNELS = 4
"""Up to so many channels are computed with at the same time, which is faster; of more, each by
itself, so that no more memory is needed for the many."""

_TRUNCATE = 4.0


def level_shape(shape: Sequence[int], factor: float, minimum: int = 16) -> tuple[int, ...]:
    """Return the spatial shape of a level.

    Parameters
    ----------
    shape
        Spatial shape of the full resolution.
    factor
        How many times wider a voxel of the level is, at least 1.
    minimum
        No axis gets shorter than this (nor longer than it was).

    Returns
    -------
    tuple of int
        The level's sizes, in the order of ``shape``.

    Raises
    ------
    ValueError
        If the factor is below 1.
    """
    if not factor >= 1:
        raise ValueError(f"factor: expected at least 1, got {factor}")
    return tuple(max(min(n, minimum), round((n - 1) / factor) + 1) for n in shape)


@functools.partial(jax.jit, static_argnames="shape")
def resize_image(image: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Interpolate images linearly on a grid of another shape over the same volume.

    Parameters
    ----------
    image
        ``(N, C, [Z,] Y, X)``.
    shape
        New spatial shape.

    Returns
    -------
    Array
        ``(N, C, *shape)``.
    """
    if image.shape[2:] == tuple(shape):
        return image
    return spread(interpolate(image, out_shape=tuple(shape), padding_mode="border"))


def resize_field(field: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Interpolate vector fields on a grid of another shape.

    The components are in normalised coordinates, which mean the same on every grid: only the
    sampling changes.

    Parameters
    ----------
    field
        ``(N, [Z,] Y, X, D)``.
    shape
        Spatial sizes of the new grid.

    Returns
    -------
    jax.Array
        ``(N, *shape, D)``.
    """
    if field.shape[1:-1] == tuple(shape):
        return field
    return spread(jnp.moveaxis(resize_image(jnp.moveaxis(field, -1, 1), shape), 1, -1), 1)


@functools.partial(jax.jit, static_argnames="shape")
def downsample(image: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Smooth images against aliasing and sample them on a coarser grid.

    The Gaussian widens a point spread of half an old voxel to half a new one:
    ``sigma = sqrt(f**2 - 1) / 2`` old voxels along an axis whose voxels become ``f`` times wider.
    At the borders the image is continued by point reflection, so that a linear ramp stays the same
    ramp up to its ends.

    Parameters
    ----------
    image
        ``(N, C, [Z,] Y, X)``.
    shape
        New spatial shape, no longer than the image along any axis.

    Returns
    -------
    Array
        ``(N, C, *shape)``.

    Raises
    ------
    ValueError
        If an axis would become longer.
    """
    old = image.shape[2:]
    if len(shape) != len(old) or any(new > n for new, n in zip(shape, old, strict=True)):
        raise ValueError(f"shape: expected at most {old}, got {shape}")
    if tuple(shape) == old:
        return image  # the same array: a full resolution is large enough to be there once
    if image.shape[1] > FEW_CHANNELS:
        each = jnp.moveaxis(image, 1, 0)[:, :, None]
        singly: jax.Array = jax.lax.map(functools.partial(downsample, shape=tuple(shape)), each)
        return jnp.moveaxis(singly[:, :, 0], 0, 1)
    factors = [max(n - 1, 1) / max(new - 1, 1) for n, new in zip(old, shape, strict=True)]
    sigma = [math.sqrt(f**2 - 1) / 2 for f in factors]
    radius = [math.ceil(_TRUNCATE * s) for s in sigma]
    padded = image
    for axis, reach in enumerate(radius, 2):
        padded = _reflected(padded, axis, reach)
    smooth = spread(gaussian_smooth(spread(padded), tuple(sigma), truncate=_TRUNCATE))
    inside = tuple(slice(r, r + n) for r, n in zip(radius, old, strict=True))
    smaller: jax.Array = resize_image(spread(smooth[(..., *inside)]), tuple(shape))
    return smaller


def _reflected(image: jax.Array, axis: int, reach: int) -> jax.Array:
    """Continue an image by point reflection at both ends of an axis, by so many voxels."""
    size = image.shape[axis]
    if reach == 0:
        return image
    if reach >= size or axis != 2 or image.ndim != 5:
        widths = [(reach, reach) if i == axis else (0, 0) for i in range(image.ndim)]
        return jnp.pad(image, widths, mode="reflect", reflect_type="odd")
    # Where the planes are spread over devices XLA gathers all of them to join others at their ends,
    # but pads them where they are, and looks up those few.
    total = size + 2 * reach
    plane = jnp.arange(total, dtype=jnp.int32)

    def planes(begin: int, end: int) -> jax.Array:
        return jax.lax.slice_in_dim(image, begin, end, axis=axis)

    def found(begin: int, part: jax.Array) -> jax.Array:
        return jnp.take(part, jnp.clip(plane - begin, 0, reach - 1), axis, mode="clip")

    first = 2 * planes(0, 1) - jnp.flip(planes(1, reach + 1), axis)
    last = 2 * planes(size - 1, size) - jnp.flip(planes(size - 1 - reach, size - 1), axis)
    beyond = [(reach, reach, 0) if i == axis else (0, 0, 0) for i in range(image.ndim)]
    inner = jax.lax.pad(image, jnp.zeros((), image.dtype), beyond)
    place = plane[:, None, None]
    inner = jnp.where(place < reach + size, inner, found(reach + size, last))
    return jnp.where(place < reach, found(0, first), inner)
