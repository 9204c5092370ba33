"""What an image knows of the places where it is asked for: beyond its grid there is no data.

A sample that an image does not cover is the value at its border, and weighs nothing. The weight is
a continuous function of the place, and a metric is differentiated through it.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

__all__ = ["coverage", "margins"]


def margins(whole: Sequence[int], shape: Sequence[int]) -> jax.Array:
    """Return how many voxels at the ends of each axis of a level are not data.

    Parameters
    ----------
    whole, shape
        Spatial shapes of an image and of a level of it, ``([Z,] Y, X)``.

    Returns
    -------
    float32[D]
        In x, y, z order: 1 along an axis that became coarser. Half of what its last voxel was
        smoothed from lies beyond the image, and was made up; of the next one nearly nothing was.
    """
    coarser = [old != new for old, new in zip(whole, shape, strict=True)]
    return jnp.asarray(coarser[::-1], jnp.float32)


def coverage(
    source: Sequence[int],
    shape: Sequence[int],
    margin: jax.Array,
    affine: jax.Array | None,
    displacement: jax.Array | None,
    reach: jax.Array | float = 0,
) -> jax.Array:
    """Return how far an image covers the samples that `jaxreg.interpolate` takes from it.

    Parameters
    ----------
    source
        Spatial shape of the image.
    shape
        Spatial shape of the grid that is sampled on.
    margin
        See `margins`.
    affine, displacement
        ``(1, D, D + 1)`` and ``(1, *shape, D)``, in normalised coordinates; samples are taken at
        ``A(x + d(x))``.
    reach
        How many voxels of the grid around a sample have to be covered, too, for it to count. Along
        an axis of the image no more than a quarter of it is asked for.

    Returns
    -------
    float32[1, 1, *shape]
        1 up to the centre of the image's last voxel, from where it falls to 0 at that voxel's outer
        edge. Where there is a margin, 1 up to the last voxel that is data, and 0 at the margin's
        centre. Across a single slice it falls to 0 over the thickness of that slice.
    """
    ndim = len(shape)
    points = []
    for component, size in enumerate(reversed(shape)):
        index = jax.lax.broadcasted_iota(jnp.float32, (1, *shape), ndim - component)
        along = index * (2 / (size - 1)) - 1 if size > 1 else jnp.zeros_like(index)
        points.append(along if displacement is None else along + displacement[..., component])
    halves = [max(size - 1, 1) / 2 for size in reversed(source)]
    reaches = [reach] * ndim
    if affine is not None:
        width = [2 / max(size - 1, 1) for size in reversed(shape)]  # of a voxel of the grid
        reaches = [
            half * reach * sum(jnp.abs(row[k]) * width[k] for k in range(ndim))
            for half, row in zip(halves, affine[0], strict=True)
        ]
        points = [
            sum((row[k] * points[k] for k in range(ndim)), start=row[ndim]) for row in affine[0]
        ]
    weight = jnp.ones((), jnp.float32)
    for point, edge, wide, half, size in zip(
        points, margin, reaches, halves, reversed(source), strict=True
    ):
        inside = (half if size > 1 else 0) - jnp.abs(point) * half  # from the last centre, voxels
        slope = jnp.where(edge > 0, 1.0, 2.0 if size > 1 else 1.0)
        wide = jax.lax.stop_gradient(jnp.minimum(wide, (size - 1) // 4))
        weight = weight * jnp.clip(1 + slope * (inside - edge - wide), 0, 1)
    weight = jnp.where(weight > 0, weight, 0)  # at a place that is not a number, too
    return jnp.broadcast_to(weight, (1, *shape))[:, None]
