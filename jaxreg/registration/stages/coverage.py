"""What an image knows of the places where it is asked for: beyond its grid there is no data.

A sample that an image does not cover is the value at its border, and weighs nothing. The weight is
a continuous function of the place, and a metric is differentiated through it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxreg.registration.programs import on_device

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
    return on_device(np.array(coarser[::-1], np.float32))


# Traced once for all its calls in the programs of a registration, which are many.
@functools.partial(jax.jit, static_argnames=("source", "shape"), inline=True)
def coverage(
    source: tuple[int, ...],
    shape: tuple[int, ...],
    margin: jax.Array,
    affine: jax.Array | None,
    displacement: jax.Array | None,
    reach: jax.Array | None = None,
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
        How many voxels of the grid around a sample have to be covered, too, for it to count: those
        of them that are on the grid. Along an axis of the image no more than a quarter of it is
        asked for. `None`: nothing else has to be.

    Returns
    -------
    float32[1, 1, *shape]
        1 up to the centre of the image's last voxel, from where it falls to 0 at that voxel's outer
        edge. Where there is a margin, 1 up to the last voxel that is data, and 0 at the margin's
        centre. Across a single slice it falls to 0 over the thickness of that slice.
    """
    ndim = len(shape)

    def along(component: int, index: jax.Array) -> jax.Array:
        """Return what is known of the voxels along an axis as an array that fits the grid."""
        return index.reshape(1, *(-1 if k == component else 1 for k in reversed(range(ndim))))

    def shifted(component: int, index: jax.Array) -> jax.Array:
        """Return the coordinates, before the affine, of places along an axis in voxels."""
        size = index.size
        coordinate = index * (2 / (size - 1)) - 1 if size > 1 else jnp.zeros_like(index)
        coordinate = along(component, coordinate)
        return coordinate if displacement is None else coordinate + displacement[..., component]

    def mapped(component: int, terms: list[jax.Array], unit: float = 1) -> jax.Array:
        """Return a coordinate after the affine, in a unit of its own."""
        if affine is None:
            return unit * terms[component]
        row = unit * affine[0, component]
        return sum((row[k] * terms[k] for k in range(ndim)), start=row[ndim])

    indices = [jnp.arange(size, dtype=jnp.float32) for size in reversed(shape)]
    places = [shifted(k, index) for k, index in enumerate(indices)]
    if reach is not None:
        # What has to be covered around each voxel is a box, of the grid alone.
        ends = [[jnp.clip(x + end, 0, x.size - 1) for end in (-reach, reach)] for x in indices]
        centres = [shifted(k, (low + high) / 2) for k, (low, high) in enumerate(ends)]
        halves = [
            along(k, (high - low) / max(high.size - 1, 1)) for k, (low, high) in enumerate(ends)
        ]

    def farthest(component: int) -> jax.Array:
        """Return how far from 0 the box of each voxel reaches after the affine."""
        centre = jnp.abs(mapped(component, centres))
        if affine is None:
            return centre + halves[component]
        row = jnp.abs(affine[0, component])
        return sum((row[k] * halves[k] for k in range(ndim)), start=centre)

    weight = jnp.ones((), jnp.float32)
    for component, (edge, size) in enumerate(zip(margin, reversed(source), strict=True)):
        half = max(size - 1, 1) / 2  # in voxels; the centres of a single slice are all one
        extent = half if size > 1 else 0
        inside = extent - jnp.abs(mapped(component, places)) * half - edge
        if reach is not None:
            around = extent - farthest(component) * half
            # A quarter of the axis less than `inside`. XLA keeps in memory what is asked for twice,
            # at three times what it costs to compute it again; so it is asked for in voxels.
            enough = extent - edge - (size - 1) // 4 - jnp.abs(mapped(component, places, half))
            inside = jnp.minimum(inside, jnp.maximum(around, enough))
        slope = jnp.where(edge > 0, 1.0, 2.0 if size > 1 else 1.0)
        weight = weight * jnp.clip(1 + slope * inside, 0, 1)
    weight = jnp.broadcast_to(weight, (1, *shape))[:, None]
    weight = jnp.where(weight > 0, weight, 0)  # at a place that is not a number, too
    return weight
