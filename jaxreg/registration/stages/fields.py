"""Fields of displacements: smoothed, confined to their volume, and one to one between voxels."""

from __future__ import annotations

import functools
import itertools
import math

import jax
import jax.numpy as jnp

from jaxreg import gaussian_smooth
from jaxreg.registration.stages.neighbours import after
from jaxreg.registration.stages.spread import AXIS, devices_of, spec

__all__ = [
    "cell_determinants",
    "confined",
    "confined_in_place",
    "longest",
    "mended",
    "smoothed",
    "smoothing",
]

_Carry = tuple[jax.Array, jax.Array, jax.Array]
"""The field, its bad cells, and the number of rounds."""

_ROUNDS = 20
"""Each takes a deformation nearer to a smooth one, so that more of them are hardly ever needed."""

_MANY_VOXELS = 2**22
"""Of a field whose faces take less time than itself."""

_SIGMA = 1.5
"""Voxels: what is wrong with a cell is gone after a round or two, and little else changes."""


def smoothed(field: jax.Array, sigma: float) -> jax.Array:
    """Return `gaussian_smooth` of a field."""
    if sigma == 0:
        return field
    return gaussian_smooth(field, smoothing(field.shape[1:-1], sigma), channel_last=True)


def smoothing(shape: tuple[int, ...], sigma: float) -> list[float]:
    """Return the Gaussian for each axis of a grid.

    Across a single slice there is nothing to mix with but the zeros outside, so that axis is left.
    """
    return [sigma if size > 1 else 0.0 for size in shape]


def confined(field: jax.Array) -> jax.Array:
    """Set the component across each face of the volume to 0 there; along it points may slide.

    A flow that never crosses the border takes the volume onto itself. Otherwise points would leave
    the grid, where nothing is known of the inverse.
    """
    *sizes, ndim = shape = field.shape[1:]
    across = jax.lax.broadcasted_iota(jnp.int32, shape, ndim)
    on_face = jnp.zeros((), jnp.bool)
    for component in range(ndim):
        axis = ndim - 1 - component  # components are in x, y, z order
        index = jax.lax.broadcasted_iota(jnp.int32, shape, axis)
        ends = (index == 0) | (index == sizes[axis] - 1)
        on_face |= ends & (across == component)
    return jnp.where(on_face, 0, field)


def confined_in_place(field: jax.Array) -> jax.Array:
    """Return `confined` of a field that nobody needs any more, which it is written over if large.

    To write the faces alone takes a launch for each on a GPU, where a pass over the field takes
    one. Several devices have to share the planes evenly.
    """
    *sizes, _ = field.shape[1:]
    devices = devices_of(sizes)
    if math.prod(sizes) < _MANY_VOXELS * devices or sizes[0] % devices:
        return confined(field)
    if devices == 1:
        return _with_faces(field, True, True)

    def of_slab(slab: jax.Array) -> jax.Array:
        device = jax.lax.axis_index(AXIS)
        return _with_faces(slab, device == 0, device == devices - 1)

    planes = spec(1)
    shared: jax.Array = jax.shard_map(of_slab, in_specs=planes, out_specs=planes)(field)
    return shared


def _with_faces(field: jax.Array, first: bool | jax.Array, last: bool | jax.Array) -> jax.Array:
    """Set the components across faces to 0: of the first and the last planes, where they are."""
    ndim = field.shape[-1]
    for component in range(ndim):
        axis = ndim - component  # components are in x, y, z order
        slowest = axis == 1
        for end, is_face in ((0, first), (field.shape[axis] - 1, last)):
            start = [0] * field.ndim
            start[axis], start[-1] = end, component
            shape = [*field.shape[:-1], 1]
            shape[axis] = 1
            there = jax.lax.dynamic_slice(field, start, shape)
            # What is written must not be read in the same pass, or XLA makes a copy of the field.
            there = jax.lax.optimization_barrier(there)  # type: ignore[no-untyped-call]
            face = jnp.where(is_face, 0, there) if slowest else jnp.zeros_like(there)
            field = jax.lax.dynamic_update_slice(field, face, start)
    return field


def longest(field: jax.Array) -> jax.Array:
    """Return the greatest size of each component, ``(D,)``."""
    # A reduction to an axis of three would have three of 32 threads of a GPU at work.
    components = (field[..., component] for component in range(field.shape[-1]))
    return jnp.stack([jnp.abs(component).max() for component in components])


def cell_determinants(displacement: jax.Array) -> list[jax.Array]:
    r"""Return by how much the cells between voxels grow.

    A cell is cut into the :math:`D!` simplices of Kuhn's triangulation, which follow the paths from
    its first corner to its last along the axes, in every order. What a displacement makes of a
    simplex is known exactly. After Liu, Chen, Liu, Carass and Prince, "On finite difference
    Jacobian computation in deformable image registration", IJCV 2024.

    Parameters
    ----------
    displacement
        ``(N, [Z,] Y, X, D)``, normalised coordinates.

    Returns
    -------
    list of Array
        Of each simplex the determinant of the deformation, ``(N, [Z - 1,] Y - 1, X - 1)``. Axes of
        length 1 keep it, and do not count.
    """
    sizes = displacement.shape[1:-1]
    axes = [axis for axis, size in enumerate(sizes) if size > 1]
    lasting = {axis: len(sizes) - 1 - axis for axis in axes}  # components are in x, y, z order
    # Where devices share the planes, parts of which each has as many: slices of other planes would
    # be copies of the field. What follows the last plane is cut off in the end.
    are_spread = devices_of(sizes) > 1
    cells = [slice(0, -1 if size > 1 else None) for size in sizes]
    upper = [slice(1, None)] * len(sizes)
    if are_spread:
        cells[0] = upper[0] = slice(None)
    determinants = []
    for order in itertools.permutations(axes):
        # Or XLA would keep what several simplices have in common, a field of eleven components.
        displacement = jax.lax.optimization_barrier(displacement)  # type: ignore[no-untyped-call]
        corner, planes = list(cells), displacement
        edges = {}
        first = planes[:, *corner]
        for axis in order:
            corner[axis] = upper[axis]
            if are_spread and axis == 0:
                planes = after(displacement, 1)
            second = planes[:, *corner]
            edges[axis] = [
                (second - first)[..., component] * ((sizes[row] - 1) / 2) + (row == axis)
                for row, component in lasting.items()
            ]
            first = second
        determinants.append(_determinant([edges[axis] for axis in axes]))
    return [found[:, :-1] for found in determinants] if are_spread else determinants


def _determinant(rows: list[list[jax.Array]]) -> jax.Array:
    if len(rows) == 1:
        return rows[0][0]
    total = jnp.zeros_like(rows[0][0])
    for k, factor in enumerate(rows[0]):
        total += (-1) ** k * factor * _determinant([row[:k] + row[k + 1 :] for row in rows[1:]])
    return total


@functools.partial(jax.jit, static_argnames="volume_change")
def mended(displacement: jax.Array, volume_change: float) -> tuple[jax.Array, jax.Array]:
    """Return a displacement that is smoothed where cells between voxels change too much.

    Where points come near to each other, or move past each other in opposite directions, a
    deformation whose values at the voxels are sound may fold between them.

    Parameters
    ----------
    displacement
        ``(N, [Z,] Y, X, D)``, normalised coordinates.
    volume_change
        Simplices of a cell may become this many times larger or smaller, and not turn inside out.

    Returns
    -------
    displacement
        Of the same shape, and the same values but near such cells. After twenty rounds of smoothing
        it is returned as it is.
    share
        How many of the cells were such, from 0 to 1, a scalar.
    """
    long_axes = [axis for axis, size in enumerate(displacement.shape[1:-1], 1) if size > 1]
    if not long_axes:
        return displacement, jnp.zeros((), displacement.dtype)

    # A field that lets points cross a face would be torn there by zeros beyond it.
    is_confined = (displacement == confined(displacement)).all()
    within = _share_within(displacement.shape[1:-1]).astype(displacement.dtype)

    def calmer(field: jax.Array) -> jax.Array:
        smooth = smoothed(field, _SIGMA)
        return jnp.where(is_confined, confined(smooth), smooth / within)

    # One over the weight that a Gaussian has, about, on the corners of one cell.
    full = (math.sqrt(2 * math.pi) * _SIGMA / 2) ** len(long_axes)

    def bad_cells(field: jax.Array) -> jax.Array:
        # What is not a number is not among them: smoothing would not mend it.
        bad = [(d <= 1 / volume_change) | (d > volume_change) for d in cell_determinants(field)]
        # Or XLA would count them where it finds them, and compile that for seconds.
        found: jax.Array = jax.lax.optimization_barrier(  # type: ignore[no-untyped-call]
            functools.reduce(jnp.logical_or, bad)
        )
        return found

    def smoother(carry: _Carry) -> _Carry:
        field, bad, rounds = carry
        corners = bad.astype(field.dtype)
        for axis in long_axes:
            first = [(0, 0)] * corners.ndim
            first[axis] = (1, 1)
            padded = jnp.pad(corners, first)
            count = padded.shape[axis]
            corners = jnp.maximum(
                jax.lax.slice_in_dim(padded, 0, count - 1, axis=axis),
                jax.lax.slice_in_dim(padded, 1, count, axis=axis),
            )
        # The corners of a cell take all of the smoothed field.
        share = jnp.minimum(1, smoothed(corners[..., None], _SIGMA) * full)
        field = field + share * (calmer(field) - field)
        return field, bad_cells(field), rounds + 1

    def unsound(carry: _Carry) -> jax.Array:
        return carry[1].any() & (carry[2] < _ROUNDS)

    start = (displacement, bad_cells(displacement), jnp.zeros((), jnp.int32))
    return jax.lax.while_loop(unsound, smoother, start)[0], start[1].mean(dtype=displacement.dtype)


def _share_within(shape: tuple[int, ...]) -> jax.Array:
    """Return which share of the Gaussian about each voxel lies within a grid, ``(*shape, 1)``."""
    share = jnp.ones((1,) * (len(shape) + 1))
    for axis, (size, sigma) in enumerate(zip(shape, smoothing(shape, _SIGMA), strict=True)):
        line = [size if k == axis else 1 for k in range(len(shape))]
        of_axis = [sigma if k == axis else 0.0 for k in range(len(shape))]
        along = gaussian_smooth(jnp.ones((1, *line, 1)), of_axis, channel_last=True)
        share = share * along[0]
    return share
