"""What an image knows of the places where it is asked for: beyond its grid there is no data.

A sample that an image does not cover is the value at its border, and weighs nothing. The weight is
a continuous function of the place, and a metric is differentiated through it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

import jaxreg
from jaxreg.registration.programs import on_device

__all__ = ["coverage", "iteration", "margins"]

_is_iteration: ContextVar[bool] = ContextVar("is_iteration", default=False)


@contextlib.contextmanager
def iteration() -> Iterator[None]:
    """Have what is traced in the context run as fast as can be, though it takes longer to compile.

    What runs many times is worth it.
    """
    token = _is_iteration.set(True)
    try:
        yield
    finally:
        _is_iteration.reset(token)


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


def coverage(
    source: tuple[int, ...],
    shape: tuple[int, ...],
    margin: jax.Array,
    affine: jax.Array | None,
    displacement: jax.Array | None,
    reach: jax.Array | None = None,
) -> jax.Array:
    """Return how far an image covers the samples that `jaxreg.interpolate` takes from it.

    That is `jaxreg.coverage`, with derivatives of any kind.

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
    if displacement is None and _is_iteration.get():
        # There is nothing to read: the weight is made where it is needed, and not written before.
        from_indices: jax.Array = _defined(source, shape, margin, affine, None, reach)
        return from_indices
    weight: jax.Array = _weight(source, shape, margin, affine, displacement, reach)
    return weight


# A metric is differentiated through it in a linear stage alone. All others want the weight as it
# is: one pass over the displacement, where what the formula becomes has several.
@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _weight(
    source: tuple[int, ...], shape: tuple[int, ...], margin: jax.Array, *others: jax.Array | None
) -> jax.Array:
    affine, displacement, reach = others
    return jaxreg.coverage(
        affine, displacement, source_shape=source, out_shape=shape, margin=margin, reach=reach
    )


@functools.partial(_weight.defjvp, symbolic_zeros=True)
def _(
    source: tuple[int, ...], shape: tuple[int, ...], primals: Any, tangents: Any
) -> tuple[jax.Array, jax.Array]:
    value = _weight(source, shape, *primals)
    varies = [x is not None and not isinstance(x, SymbolicZero) for x in tangents]
    if not any(varies):
        return value, jnp.zeros_like(value)

    def defined(*operands: jax.Array) -> jax.Array:
        given = iter(operands)
        both = zip(primals, varies, strict=True)
        weight: jax.Array = _defined(
            source, shape, *(next(given) if moves else x for x, moves in both)
        )
        return weight

    at, along = (
        [x for x, moves in zip(all_of_them, varies, strict=True) if moves]
        for all_of_them in (primals, tangents)
    )
    _, tangent = jax.jvp(defined, at, along)
    return value, tangent.astype(value.dtype)


# Traced once for all its calls in the programs of a registration, which are many.
@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def _defined(
    source: tuple[int, ...],
    shape: tuple[int, ...],
    margin: jax.Array,
    affine: jax.Array | None,
    displacement: jax.Array | None,
    reach: jax.Array | None,
) -> jax.Array:
    """Return the same in steps of JAX, which can be differentiated."""
    ndim = len(shape)

    # Each element of the matrix is taken out of it once: this is traced for many programs.
    rows: list[list[jax.Array]] | None = None
    if affine is not None:
        rows = [[affine[0, i, k] for k in range(ndim + 1)] for i in range(ndim)]
    positive = [] if rows is None else [[factor > 0 for factor in row[:ndim]] for row in rows]

    def corner(offset: jax.Array | None) -> list[jax.Array]:
        """Return the coordinates of the voxels so far along all axes, those of the grid."""
        coordinates = []
        for component, size in enumerate(reversed(shape)):
            index = jax.lax.broadcasted_iota(jnp.float32, (1, *shape), ndim - component)
            moved = index if offset is None else jnp.clip(index + offset, 0, size - 1)
            along = moved * (2 / max(size - 1, 1)) - 1 if size > 1 else jnp.zeros_like(index)
            if displacement is not None:
                along = along + displacement[..., component]
            coordinates.append(along)
        return coordinates

    def mapped(one: list[jax.Array], other: list[jax.Array] | None = None) -> list[jax.Array]:
        """Map the corner where a coordinate is that of `one` if its factor is positive."""
        if rows is None:
            return one
        found = []
        for row, is_positive in zip(rows, positive, strict=True):
            total = row[ndim]
            for k in range(ndim):
                chosen = one[k]
                if other is not None:
                    chosen = jnp.where(is_positive[k], one[k], other[k])
                total = total + row[k] * chosen
            found.append(total)
        return found

    places = mapped(corner(None))
    ends = [(place, place) for place in places]  # of what has to be covered around each sample
    if reach is not None:
        low, high = corner(-reach), corner(reach)
        ends = list(zip(mapped(low, high), mapped(high, low), strict=True))
    weight = jnp.ones((), jnp.float32)
    for place, (first, last), edge, size in zip(
        places, ends, margin, reversed(source), strict=True
    ):
        half = max(size - 1, 1) / 2  # in voxels; the centres of a single slice are all one
        extent = half if size > 1 else 0
        inside = extent - jnp.abs(place) * half - edge
        if reach is not None:
            around = extent - jnp.maximum(jnp.abs(first), jnp.abs(last)) * half
            inside = jnp.minimum(inside, jnp.maximum(around, inside - (size - 1) // 4))
        slope = jnp.where(edge > 0, 1.0, 2.0 if size > 1 else 1.0)
        weight = weight * jnp.clip(1 + slope * inside, 0, 1)
    weight = jnp.broadcast_to(weight, (1, *shape))[:, None]
    weight = jnp.where(weight > 0, weight, 0)  # at a place that is not a number, too
    return weight
