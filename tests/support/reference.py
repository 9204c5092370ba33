"""The definition of every op, as float64 NumPy that can be read and run.

Nothing here is fast and nothing is clever: a test that disagrees with this file is a test of the
kernels, so the file has to be trusted by reading it.

Conventions. Images are ``(N, C, [Z,] Y, X)``. Vector fields are ``(N, [Z,] Y, X, D)`` with their
components in x, y, z order. Affines are ``(N, D, D+1)`` and map output to input coordinates. Every
operand has a batch size of 1 or N. Coordinates are normalised: along an axis of ``n`` voxels, the
coordinate ``v`` is the voxel position ``c + s v`` with the centre ``c = (n - 1) / 2`` and the half
extent ``s = (n - 1) / 2`` (``align_corners=True``) or ``s = n / 2`` (``align_corners=False``).

Small vectors over the axes (sizes, centres, half extents) are in x, y, z order throughout; array
shapes are in z, y, x order, as NumPy has them.

An op's derivative comes in one of two ways: ``interpolate_vjp``, ``compose_vjp``,
``scaling_and_squaring_vjp``, ``lncc_loss_vjp``, ``mutual_information_loss_vjp`` and
``mind_ssc_vjp`` are written out, with the right-sided derivative where the interpolation has a
kink; ``vjp_by_central_differences`` serves any function away from kinks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

Array = np.ndarray
Shape = tuple[int, ...]


# ------------------------------------------------------------------------------------ coordinates


def centre(shape: Shape) -> Array:
    """Voxel position of the volume's centre, per axis."""
    return (np.array(shape[::-1], np.float64) - 1) / 2


def half_extent(shape: Shape, align_corners: bool) -> Array:
    """Voxels from the centre to the normalised coordinate 1, per axis."""
    size = np.array(shape[::-1], np.float64)
    return (size - 1) / 2 if align_corners else size / 2


def offsets_from_centre(shape: Shape) -> Array:
    """Of every voxel, in voxels: ``(*shape, D)``."""
    zyx = np.meshgrid(*[np.arange(n, dtype=np.float64) for n in shape], indexing="ij")
    return np.stack(zyx[::-1], axis=-1) - centre(shape)


def divide_or_zero(numerator: Array, denominator: Array) -> Array:
    """``numerator / denominator``, and 0 where the denominator is 0."""
    safe = np.where(denominator == 0, 1, denominator)
    return np.where(denominator == 0, 0, numerator / safe)


def normalised_coordinates(shape: Shape, align_corners: bool = True) -> Array:
    """Of every voxel: ``(*shape, D)``; 0 along an axis that has no extent."""
    return divide_or_zero(offsets_from_centre(shape), half_extent(shape, align_corners))


def sampling_positions(
    in_shape: Shape,
    out_shape: Shape,
    affine: Array | None,
    grid: Array | None,
    affine_last: bool,
    is_displacement: bool,
    align_corners: bool,
) -> Array:
    """Voxel positions in the input at which the output's voxels are sampled: ``(*out_shape, D)``.

    One batch item: ``affine`` is ``(D, D+1)``, ``grid`` is ``(*out_shape, D)``. Everything is
    taken relative to the centres and in voxels, so that where input and output have the same
    shape a zero displacement gives exactly the voxel itself. A displacement along an axis without
    extent has no effect; what it displaces is the output point in ``A(x + u)``, and otherwise the
    input point.
    """
    s_in = half_extent(in_shape, align_corners)
    s_out = half_extent(out_shape, align_corners)

    def where_there_is_extent(position: Array) -> Array:
        """Not left to a product with 0: a displacement may be infinite."""
        return np.where(s_in == 0, centre(in_shape), position)

    if grid is not None and not is_displacement:
        return where_there_is_extent(centre(in_shape) + s_in * grid)

    dim = len(in_shape)
    u = np.zeros((*out_shape, dim)) if grid is None else grid
    matrix = np.eye(dim) if affine is None else affine[:, :dim]
    shift = np.zeros(dim) if affine is None else affine[:, dim]
    if affine_last:
        # A(x + u) = Ax + matrix u
        u = np.where(s_out == 0, 0, u) @ matrix.T

    voxel_matrix = divide_or_zero(s_in[:, None] * matrix, s_out[None, :])
    position = offsets_from_centre(out_shape) @ voxel_matrix.T + s_in * (shift + u)
    return where_there_is_extent(centre(in_shape) + position)


# --------------------------------------------------------------------------------------- sampling


def pad(index: Array, size: int, padding_mode: str, align_corners: bool) -> tuple[Array, Array]:
    """Where along an axis of ``size`` voxels a voxel index outside finds its value.

    Returns the index inside, and whether there is a value at all (zero padding has none outside).
    """
    everywhere = np.ones(index.shape, bool)
    if padding_mode == "zeros":
        inside = (index >= 0) & (index <= size - 1)
        return np.where(inside, index, 0), inside
    if padding_mode == "border":
        return np.clip(index, 0, size - 1), everywhere
    if padding_mode == "reflection":
        # Mirrors stand at the centres of the first and last voxel, or at their outer edges.
        first, length = (0, size - 1) if align_corners else (-0.5, size)
        if length == 0:
            return np.zeros_like(index), everywhere
        travelled = np.mod(index - first, 2 * length)
        folded = first + np.minimum(travelled, 2 * length - travelled)
        return np.clip(folded, 0, size - 1), everywhere
    raise ValueError(f"padding_mode {padding_mode!r}")


def replace_non_finite(position: Array, shape: Shape, padding_mode: str) -> Array:
    """Finite stand-ins for NaN and infinite positions.

    They sample as outside: nothing with zero padding, the edge that an infinity points to with
    border padding; and the first voxel for what has no direction.
    """
    for_nan, for_minus, for_plus = {
        "zeros": (-2, -2, -2),
        "border": (0, 0, np.array(shape[::-1]) - 1),
        "reflection": (0, 0, 0),
    }[padding_mode]
    position = np.where(np.isnan(position), for_nan, position)
    position = np.where(position == -np.inf, for_minus, position)
    return np.where(position == np.inf, for_plus, position)


def corners(
    position: Array, shape: Shape, mode: str, padding_mode: str, align_corners: bool
) -> Iterator[tuple[tuple[Array, ...], Array, Array]]:
    """The voxels that contribute to a sample at ``position`` ``(..., D)``.

    Yields, one contributor at a time, its index (a tuple of arrays in z, y, x order), its weight
    ``(...)``, and the weight's derivatives by the position ``(..., D)``. Bilinear interpolation
    continues the image to all integers by padding and takes the cell to the right of the position,
    ``[floor(p), floor(p) + 1]``: hence the right-sided derivative at integers. There is no
    derivative where both voxels of a cell are the same one, which padding repeats, nor where a
    position is not finite.
    """
    dim = len(shape)
    sizes = shape[::-1]
    finite = np.isfinite(position)
    position = replace_non_finite(position, shape, padding_mode)

    if mode == "nearest":
        if padding_mode == "reflection":  # fold first, then round, as grid_sample does
            folded = [
                pad(position[..., a], sizes[a], padding_mode, align_corners) for a in range(dim)
            ]
            position = np.stack([inside for inside, _ in folded], axis=-1)
        base, neighbours = np.round(position), (0,)  # np.round rounds half to even
    elif mode == "bilinear":
        base, neighbours = np.floor(position), (0, 1)
    elif mode in ("cubic", "b-spline"):
        yield from taps(position, finite, shape, mode, padding_mode, align_corners)
        return
    else:
        raise ValueError(f"mode {mode!r}")
    fraction = position - base
    varies = np.ones_like(finite)
    for a in range(dim):
        (low, low_exists), (high, high_exists) = (
            pad(base[..., a] + k, sizes[a], padding_mode, align_corners) for k in (0, 1)
        )
        varies[..., a] = finite[..., a] & ~(low_exists & high_exists & (low == high))

    for offsets in itertools.product(neighbours, repeat=dim):
        index, factor, slope = [], [], []
        exists = np.ones(position.shape[:-1], bool)
        for a in range(dim):
            inside, there = pad(base[..., a] + offsets[a], sizes[a], padding_mode, align_corners)
            index.append(inside.astype(np.int64))
            exists &= there
            if mode == "nearest":
                factor.append(np.ones_like(fraction[..., a]))
                slope.append(np.zeros_like(fraction[..., a]))
            else:
                factor.append(fraction[..., a] if offsets[a] else 1 - fraction[..., a])
                slope.append(np.where(varies[..., a], 1.0 if offsets[a] else -1.0, 0.0))
        weight = np.prod(factor, axis=0) * exists
        slopes = [
            np.prod([slope[a] if a == b else factor[b] for b in range(dim)], axis=0) * exists
            for a in range(dim)
        ]
        yield tuple(index[::-1]), weight, np.stack(slopes, axis=-1)


def cubic_kernel(x: Array, mode: str) -> tuple[Array, Array]:
    """What a voxel weighs at a distance ``x``, and the derivative by ``x``.

    Keys' kernel with a = -3/4, or the cubic B-spline.
    """
    distance, sign = np.abs(x), np.sign(x)
    if mode == "cubic":
        a = -0.75
        near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
        far = a * (((distance - 5) * distance + 8) * distance - 4)
        near_slope = (3 * (a + 2) * distance - 2 * (a + 3)) * distance
        far_slope = a * ((3 * distance - 10) * distance + 8)
    else:
        near, far = 2 / 3 - distance**2 + distance**3 / 2, (2 - distance) ** 3 / 6
        near_slope, far_slope = -2 * distance + 1.5 * distance**2, -((2 - distance) ** 2) / 2
    value = np.where(distance < 1, near, np.where(distance < 2, far, 0))
    slope = np.where(distance < 1, near_slope, np.where(distance < 2, far_slope, 0))
    return value, sign * slope


def spline_padding(padding_mode: str, align_corners: bool) -> tuple[str, bool]:
    """How the coefficients of a spline are continued: at the border they are mirrored."""
    return ("reflection", True) if padding_mode == "border" else (padding_mode, align_corners)


def taps(
    position: Array,
    finite: Array,
    shape: Shape,
    mode: str,
    padding_mode: str,
    align_corners: bool,
) -> Iterator[tuple[tuple[Array, ...], Array, Array]]:
    """What :func:`corners` yields for cubic sampling: 4 voxels along each axis.

    The array, of values or of coefficients, is continued to all integers by padding. Only a spline
    with border padding is that at the nearest position within the volume. Along an axis without
    extent there is one voxel. There is no derivative where all that counts is one voxel.
    """
    dim, sizes = len(shape), shape[::-1]
    along = []
    for a in range(dim):
        p, varies = position[..., a], finite[..., a]
        if sizes[a] == 1 and align_corners:
            p, kernel = np.zeros_like(p), "cubic"
            varies = np.zeros_like(varies)
        else:
            kernel = mode
        padding, align = padding_mode, align_corners
        if mode == "b-spline":
            if padding_mode == "border":
                varies = varies & (p > 0) & (p < sizes[a] - 1)
                p = np.clip(p, 0, sizes[a] - 1)
            padding, align = spline_padding(padding_mode, align_corners)
        found = []
        for k in (-1, 0, 1, 2):
            voxel = np.floor(p) + k
            weight, slope = cubic_kernel(p - voxel, kernel)
            index, exists = pad(voxel, sizes[a], padding, align)
            found.append([index.astype(np.int64), weight * exists, slope * exists])
        index, weight, slope = (np.stack(x) for x in zip(*found, strict=True))
        counts = (weight != 0) | (slope != 0)
        first = np.where(counts, index, index.max()).min(axis=0)
        last = np.where(counts, index, -1).max(axis=0)
        if padding != "zeros":
            # One voxel alone has no slope, and weighs 1.
            varies = varies & (first != last)
            one = np.eye(4)[0].reshape(4, *[1] * first.ndim)
            weight = np.where(first == last, one, weight)
            index = np.where(first == last, first, index)
        along.append((index, weight, np.where(varies, slope, 0)))
    for offsets in itertools.product(range(4), repeat=dim):
        index = [along[a][0][offsets[a]] for a in range(dim)]
        weights = [along[a][1][offsets[a]] for a in range(dim)]
        slopes = [
            np.prod([along[a][2 if a == b else 1][offsets[a]] for a in range(dim)], axis=0)
            for b in range(dim)
        ]
        yield tuple(index[::-1]), np.prod(weights, axis=0), np.stack(slopes, axis=-1)


def times(weight: Array, value: Array) -> Array:
    """``weight * value``, where a weight of 0 silences even an infinite or NaN value."""
    result = np.zeros(np.broadcast_shapes(weight.shape, value.shape))
    return np.multiply(weight, value, where=weight != 0, out=result)


# -------------------------------------------------------------------------------------------- ops


def batch_size(*operands: Array | None) -> int:
    """N, where each operand's batch size is 1 or N."""
    sizes = {operand.shape[0] for operand in operands if operand is not None} - {1}
    if len(sizes) > 1:
        raise ValueError(f"batch sizes {sorted(sizes)}")
    return sizes.pop() if sizes else 1


def item(operand: Array | None, n: int) -> Array | None:
    """Batch item ``n`` of an operand whose batch size is 1 or N."""
    return None if operand is None else operand[n if operand.shape[0] > 1 else 0]


def float64(operand: Array | None) -> Array | None:
    return None if operand is None else np.asarray(operand, np.float64)


def output_shape(image: Array, grid: Array | None, out_shape: Sequence[int] | None) -> Shape:
    """Spatial shape of what ``interpolate`` returns."""
    if grid is not None:
        return grid.shape[1:-1]
    return image.shape[2:] if out_shape is None else tuple(out_shape)[-(image.ndim - 2) :]


def spline_matrix(size: int, padding_mode: str, align_corners: bool) -> Array:
    """From the coefficients of a cubic B-spline along an axis to its values at the voxels."""
    if size == 1 and align_corners:
        return np.eye(1)
    matrix = np.zeros((size, size))
    voxels = np.arange(size)
    for k, weight in ((-1, 1 / 6), (0, 4 / 6), (1, 1 / 6)):
        index, exists = pad(voxels + k, size, *spline_padding(padding_mode, align_corners))
        np.add.at(matrix, (voxels, index.astype(np.int64)), weight * exists)
    return matrix


def along_axes(x: Array, matrices: Sequence[Array], first: int) -> Array:
    """Each matrix applied along an axis, from the axis ``first`` on."""
    for axis, matrix in enumerate(matrices, first):
        x = np.moveaxis(np.tensordot(matrix, x, (1, axis)), 0, axis)
    return x


def spline_coefficients(
    image: Array,
    *,
    padding_mode: str = "zeros",
    align_corners: bool = True,
    channel_last: bool = False,
) -> Array:
    """Those of the cubic B-spline that passes through all values of an image."""
    first = 1 if channel_last else 2
    matrices = [
        np.linalg.inv(spline_matrix(n, padding_mode, align_corners))
        for n in image.shape[first : first + image.ndim - 2]
    ]
    return along_axes(float64(image), matrices, first)


def spline_field(
    coefficients: Array, spacing: Sequence[float], whole: Shape, shape: Shape
) -> Array:
    """The field of control points on a grid of a shape, with the extent of a grid ``whole``.

    Of ``(N, *points, D)``, the points ``spacing`` voxels of the grid ``whole`` apart along each of
    its axes, the middle one at its middle.
    """
    points = coefficients.shape[1:-1]
    result = np.zeros((coefficients.shape[0], *shape, coefficients.shape[-1]))
    for voxel in np.ndindex(*shape):
        for point in np.ndindex(*points):
            weight = 1.0
            for axis, size in enumerate(shape):
                place = (voxel[axis] / max(size - 1, 1) - (size > 1) / 2) * (whole[axis] - 1)
                distance = place / spacing[axis] - (point[axis] - (points[axis] - 1) / 2)
                weight *= cubic_kernel(np.float64(distance), "b-spline")[0] if size > 1 else 1
            result[:, *voxel] += weight * float64(coefficients)[:, *point]
    return result


def spline_coefficients_vjp(
    cotangent: Array,
    image: Array,
    *,
    padding_mode: str = "zeros",
    align_corners: bool = True,
    channel_last: bool = False,
) -> Array:
    """The gradient of ``sum(cotangent * spline_coefficients(image))``."""
    first = 1 if channel_last else 2
    matrices = [
        np.linalg.inv(spline_matrix(n, padding_mode, align_corners)).T
        for n in image.shape[first : first + image.ndim - 2]
    ]
    return along_axes(float64(cotangent), matrices, first)


def interpolate(
    image: Array,
    affine: Array | None = None,
    grid: Array | None = None,
    *,
    affine_last: bool = False,
    is_displacement: bool = True,
    out_shape: Sequence[int] | None = None,
    mode: str = "bilinear",
    padding_mode: str = "zeros",
    align_corners: bool = True,
    prefilter: bool = True,
) -> Array:
    """The image sampled at ``Ax + u``, at ``A(x + u)`` or at ``v``: ``(N, C, *out)``."""
    image, affine, grid = float64(image), float64(affine), float64(grid)
    if mode == "b-spline" and prefilter:
        image = spline_coefficients(image, padding_mode=padding_mode, align_corners=align_corners)
    shape, out = image.shape[2:], output_shape(image, grid, out_shape)
    result = np.zeros((batch_size(image, affine, grid), image.shape[1], *out))
    for n in range(result.shape[0]):
        position = sampling_positions(
            shape, out, item(affine, n), item(grid, n), affine_last, is_displacement, align_corners
        )
        for index, weight, _ in corners(position, shape, mode, padding_mode, align_corners):
            for c in range(image.shape[1]):
                result[n, c] += times(weight, item(image, n)[c][index])
    return result


def interpolate_vjp(
    cotangent: Array,
    image: Array,
    affine: Array | None = None,
    grid: Array | None = None,
    *,
    affine_last: bool = False,
    is_displacement: bool = True,
    out_shape: Sequence[int] | None = None,
    mode: str = "bilinear",
    padding_mode: str = "zeros",
    align_corners: bool = True,
    prefilter: bool = True,
) -> tuple[Array, Array | None, Array | None]:
    """Gradients of ``sum(cotangent * interpolate(image, affine, grid))``.

    To image, affine and grid; None for an operand that is absent. An operand with a batch size of
    1 receives the sum over the batch.
    """
    image, affine, grid = float64(image), float64(affine), float64(grid)
    padding = {"padding_mode": padding_mode, "align_corners": align_corners}
    filtered = mode == "b-spline" and prefilter
    if filtered:
        image = spline_coefficients(image, **padding)
    shape, out = image.shape[2:], output_shape(image, grid, out_shape)
    dim = len(shape)
    x, s_in = normalised_coordinates(out, align_corners), half_extent(shape, align_corners)
    to_image = np.zeros(image.shape)
    to_affine = None if affine is None else np.zeros(affine.shape)
    to_grid = None if grid is None else np.zeros(grid.shape)

    for n in range(batch_size(image, affine, grid)):
        position = sampling_positions(
            shape, out, item(affine, n), item(grid, n), affine_last, is_displacement, align_corners
        )
        to_position = np.zeros((*out, dim))
        for index, weight, slope in corners(position, shape, mode, padding_mode, align_corners):
            for c in range(image.shape[1]):
                np.add.at(item(to_image, n)[c], index, times(weight, cotangent[n, c]))
                value = item(image, n)[c][index]
                to_position += times(slope, (value * cotangent[n, c])[..., None])

        # The position is, up to constants, s_in * y for the normalised coordinate y, and y is one
        # of v, Ax + u, A(x + u).
        to_y = times(s_in, to_position)
        affine_acts = affine is not None and (grid is None or is_displacement)
        moves_output_point = affine_last and grid is not None and is_displacement
        has_extent = half_extent(out, align_corners) > 0
        if affine_acts:
            source = x + np.where(has_extent, item(grid, n), 0) if moves_output_point else x
            homogeneous = np.concatenate([source, np.ones((*out, 1))], axis=-1)
            rows, columns = to_y.reshape(-1, dim), homogeneous.reshape(-1, dim + 1)
            item(to_affine, n)[...] += times(rows[:, :, None], columns[:, None, :]).sum(axis=0)
        if grid is not None:
            if moves_output_point:
                matrix = np.eye(dim) if affine is None else item(affine, n)[:, :dim]
                to_y = np.where(has_extent, times(to_y[..., None], matrix).sum(axis=-2), 0)
            item(to_grid, n)[...] += to_y
    if filtered:
        to_image = spline_coefficients_vjp(to_image, image, **padding)
    return to_image, to_affine, to_grid


def interpolate_labels(
    labels: Array,
    affine: Array | None = None,
    grid: Array | None = None,
    *,
    affine_last: bool = False,
    is_displacement: bool = True,
    out_shape: Sequence[int] | None = None,
    padding_mode: str = "zeros",
    align_corners: bool = True,
    background: int = 0,
    return_weights: bool = False,
) -> Array | tuple[Array, Array]:
    """The label with the largest sum of linear weights at ``Ax + u``, ``A(x + u)`` or ``v``.

    The smallest of several. What is missing from the weights lies outside: the background's share.
    """
    affine, grid = float64(affine), float64(grid)
    shape, out = labels.shape[2:], output_shape(labels, grid, out_shape)
    size = (batch_size(labels, affine, grid), labels.shape[1], *out)
    winner, share = np.zeros(size, labels.dtype), np.full(size, -1.0)
    for n in range(size[0]):
        position = sampling_positions(
            shape, out, item(affine, n), item(grid, n), affine_last, is_displacement, align_corners
        )
        found = list(corners(position, shape, "bilinear", padding_mode, align_corners))
        outside = 1 - sum(weight for _, weight, _ in found)
        for c in range(size[1]):
            values = item(labels, n)[c]
            for label in sorted({*values.ravel().tolist(), background}):
                weights = sum(weight * (values[index] == label) for index, weight, _ in found)
                weights = weights + (outside if label == background else 0)
                better = weights > share[n, c]
                winner[n, c][better], share[n, c][better] = label, weights[better]
    return (winner, share) if return_weights else winner


def compose(
    u: Array,
    v: Array,
    affine: Array | None = None,
    *,
    add: bool = True,
    mode: str = "bilinear",
    padding_mode: str = "border",
    align_corners: bool = True,
    prefilter: bool = True,
) -> Array:
    """``v + u(Ax + v)``, or ``u(Ax + v)`` alone with ``add=False``; on the grid of ``v``."""
    u, v = float64(u), float64(v)
    options = {
        "mode": mode,
        "padding_mode": padding_mode,
        "align_corners": align_corners,
        "prefilter": prefilter,
    }
    moved = np.moveaxis(interpolate(np.moveaxis(u, -1, 1), affine, v, **options), 1, -1)
    return v + moved if add else moved


def compose_vjp(
    cotangent: Array,
    u: Array,
    v: Array,
    affine: Array | None = None,
    *,
    add: bool = True,
    mode: str = "bilinear",
    padding_mode: str = "border",
    align_corners: bool = True,
    prefilter: bool = True,
) -> tuple[Array, Array, Array | None]:
    """Gradients of ``sum(cotangent * compose(u, v, affine))`` to u, v and affine."""
    options = {
        "mode": mode,
        "padding_mode": padding_mode,
        "align_corners": align_corners,
        "prefilter": prefilter,
    }
    to_u, to_affine, to_v = interpolate_vjp(
        np.moveaxis(cotangent, -1, 1), np.moveaxis(float64(u), -1, 1), affine, v, **options
    )
    if add:
        to_v = to_v + (cotangent.sum(axis=0, keepdims=True) if v.shape[0] == 1 else cotangent)
    return np.moveaxis(to_u, 1, -1), to_v, to_affine


def affine_warp(affine: Array, displacement: Array, *, align_corners: bool = True) -> Array:
    """The normalised coordinates ``Ax + u``: ``(N, [Z,] Y, X, D)``."""
    affine, displacement = float64(affine), float64(displacement)
    dim = displacement.shape[-1]
    x = normalised_coordinates(displacement.shape[1:-1], align_corners)
    moved = [x @ item(affine, n)[:, :dim].T + item(affine, n)[:, dim] for n in range(len(affine))]
    return np.array(moved).reshape(len(affine), *x.shape) + displacement


def _mapped(voxels: Array, d: Array, matrix: Array) -> Array:
    """``A(x + d(x))``, where each voxel of a grid has its ``d``, but for ``x`` that of another."""
    last = np.array(voxels.shape[-2::-1]) - 1
    x = np.where(last > 0, 2 * voxels / np.maximum(last, 1) - 1, 0)
    dim = len(last)
    return (x + d) @ matrix[:, :dim].T + matrix[:, dim]


def coverage(
    affine: Array | None = None,
    displacement: Array | None = None,
    *,
    source_shape: Sequence[int],
    out_shape: Sequence[int] | None = None,
    margin: float | Array | None = None,
    reach: float | Array | None = None,
) -> Array:
    """How far an image covers the places ``A(x + d(x))``: ``(N, 1, [Z,] Y, X)``."""
    dim = len(source_shape)
    shape = source_shape if out_shape is None else tuple(out_shape)[-dim:]
    if displacement is not None:
        shape = displacement.shape[1:-1]
    affine = np.eye(dim, dim + 1)[None] if affine is None else float64(affine)
    field = np.zeros((1, *shape, dim)) if displacement is None else float64(displacement)
    edges = np.atleast_2d(0.0 if margin is None else float64(margin)) * np.ones(dim)
    reaches = np.atleast_1d(0.0 if reach is None else float64(reach))
    operands = (affine, field, edges, reaches)
    count = next((len(x) for x in operands if len(x) != 1), 1)
    last = np.array(shape[::-1]) - 1
    index = np.stack(np.indices(shape)[::-1], axis=-1)
    result = np.ones((count, 1, *shape))
    for n in range(count):
        matrix, d, edge, r = (item(x, n) for x in operands)

        with np.errstate(invalid="ignore"):
            # A sample's box lies between the images of its corners.
            place = _mapped(index, d, matrix)
            around_it = itertools.product([-r, r], repeat=dim)
            corners = [_mapped(np.clip(index + c, 0, last), d, matrix) for c in around_it]
            farthest = np.max([np.abs(corner) for corner in corners], axis=0)
            for axis, size in enumerate(reversed(tuple(source_shape))):
                half, extent = max(size - 1, 1) / 2, (size - 1) / 2
                inside = extent - np.abs(place[..., axis]) * half - edge[axis]
                if reach is not None:
                    around = extent - farthest[..., axis] * half
                    inside = np.minimum(inside, np.maximum(around, inside - (size - 1) // 4))
                slope = 1 if edge[axis] > 0 or size == 1 else 2
                result[n, 0] *= np.clip(1 + slope * inside, 0, 1)
    return np.where(result > 0, result, 0)


def invert_displacement(
    displacement: Array,
    *,
    tolerance: float = 0.0,
    padding_mode: str = "border",
    align_corners: bool = True,
) -> Array:
    """The ``e`` with ``e + u(x + e) = 0``, to rounding whatever the tolerance.

    By the iteration ``e <- -u(x + e)``, for displacements for which that converges: where
    neighbours differ by less than their distance. An axis without extent has no displacement.
    """
    has_extent = half_extent(displacement.shape[1:-1], align_corners) > 0
    u = np.where(has_extent, displacement, 0).astype(np.float64)
    e = np.zeros_like(u)
    options = {"padding_mode": padding_mode, "align_corners": align_corners}
    for _ in range(500):
        last, e = e, -compose(u, e, add=False, **options)
        if np.allclose(e, last, rtol=0, atol=1e-15):
            break
    return e


def scaling_and_squaring(
    velocity: Array, num_steps: int = 6, *, padding_mode: str = "border", align_corners: bool = True
) -> Array:
    """The displacement after unit time: ``v / 2**num_steps``, doubled by composition as often."""
    u = float64(velocity) / 2**num_steps
    for _ in range(num_steps):
        u = compose(u, u, padding_mode=padding_mode, align_corners=align_corners)
    return u


def scaling_and_squaring_vjp(
    cotangent: Array,
    velocity: Array,
    num_steps: int = 6,
    *,
    padding_mode: str = "border",
    align_corners: bool = True,
) -> Array:
    """Gradient of ``sum(cotangent * scaling_and_squaring(velocity))``."""
    options = {"padding_mode": padding_mode, "align_corners": align_corners}
    stages = [float64(velocity) / 2**num_steps]
    for _ in range(num_steps):
        stages.append(compose(stages[-1], stages[-1], **options))
    for u in stages[-2::-1]:
        to_u, to_v, _ = compose_vjp(cotangent, u, u, **options)
        cotangent = to_u + to_v
    return cotangent / 2**num_steps


def gaussian_weights(sigma: float, truncate: float) -> Array:
    """A Gaussian at the integers up to ``ceil(truncate * sigma)``, with a sum of 1."""
    if sigma == 0:
        return np.ones(1)
    radius = math.ceil(truncate * sigma)
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    return weights / weights.sum()


def weighted_sums(x: Array, weights: Array, axis: int) -> Array:
    """Along ``axis``, sums over windows about every element, with the weights; zero outside."""
    radius, size = len(weights) // 2, x.shape[axis]
    padded = np.pad(x, [(radius, radius) if a == axis else (0, 0) for a in range(x.ndim)])
    return sum(w * padded.take(range(k, k + size), axis) for k, w in enumerate(weights))


def gaussian_smooth(
    x: Array,
    sigma: float | Sequence[float],
    *,
    truncate: float = 4.0,
    channel_last: bool = False,
) -> Array:
    """Convolved along each spatial axis with a Gaussian of ``sigma`` voxels; zero outside.

    ``sigma`` is one number, or one per axis in (z, y, x) order.
    """
    x = float64(x)
    first = 1 if channel_last else 2
    sigmas = [sigma] * (x.ndim - 2) if np.isscalar(sigma) else sigma
    for axis, sigma_of_axis in enumerate(sigmas, start=first):
        x = weighted_sums(x, gaussian_weights(sigma_of_axis, truncate), axis)
    return x


def step_gradient(
    moved: Array,
    slope: Array,
    pull: Array | None = None,
    displacement: Array | None = None,
    *,
    sigma: float | Sequence[float] = 0.0,
    truncate: float = 4.0,
    slope_scale: float | Array | None = None,
    pull_scale: float | Array | None = None,
) -> Array:
    """The slope of a loss times that of the moved image, and the pull, smoothed."""
    shape, dim = moved.shape[2:], moved.ndim - 2

    def scaled(x: Array, scale: float | Array | None) -> Array:
        factor = np.asarray(1 if scale is None else scale, np.float64)
        return x * factor.reshape(-1, *[1] * (x.ndim - 1))

    slope = scaled(slope, slope_scale)
    pull = None if pull is None else scaled(pull, pull_scale)

    def slopes(x: Array) -> Array:
        """Along x, y and z, per unit of normalised coordinates, on the last axis."""
        axes = range(x.ndim - 1, x.ndim - 1 - dim, -1)
        flat = np.zeros_like(x)
        each = [flat if x.shape[axis] == 1 else np.gradient(x, axis=axis) for axis in axes]
        return np.stack(each, axis=-1) * half_extent(shape, True)

    gradient = (slope[..., None] * slopes(moved)).sum(axis=1)
    if displacement is not None:
        turned = [pull[..., k, None] * slopes(displacement[..., k]) for k in range(dim)]
        gradient = gradient + sum(turned)
    gradient = gradient if pull is None else gradient + pull
    return gaussian_smooth(gradient, sigma, truncate=truncate, channel_last=True)


def dithered_bfloat16(x: Array, count: int, *, first: bool) -> Array:
    """Numbers rounded to 8 bits as moments are, the first or the second, for one batch item."""
    place = np.arange(x.size, dtype=np.uint32).reshape(x.shape)
    with np.errstate(over="ignore"):
        bits = place * np.uint32(0x9E3779B1) + np.uint32(count) * np.uint32(0xC2B2AE3D)
        bits = (bits ^ bits >> 16) * np.uint32(0x7FEB352D)
        bits = (bits ^ bits >> 15) * np.uint32(0x846CA68B)
    bits ^= bits >> 16
    dither = bits >> 16 if first else bits & np.uint32(0xFFFF)
    rounded = x.astype(np.float32).view(np.uint32) + dither & np.uint32(0xFFFF0000)
    return rounded.view(np.float32)


def riemannian_adam_step(
    gradient: Array,
    mu: Array,
    nu: Array,
    count: int | Array,
    *,
    learning_rate: float,
    beta1: float = 0.9,
    beta2: float = 0.99,
    epsilon: float | Array = 1e-8,
    scale: float | Array | None = None,
    confined: bool = False,
    sigma: float | Sequence[float] = 0.0,
    truncate: float = 4.0,
) -> tuple[Array, Array, Array]:
    """The step, and the moments for the next one; they are those of the gradient, smoothed."""
    shape, dim = gradient.shape[1:-1], gradient.shape[-1]
    gradient = gaussian_smooth(gradient, sigma, truncate=truncate, channel_last=True)

    def of_items(value: float | Array, *sizes: int) -> Array:
        given = np.asarray(value, np.float64)
        first = given.shape[0] if given.ndim > len(sizes) else 1
        return np.broadcast_to(given, (first, *sizes)).reshape(first, *[1] * dim, -1)

    scaled = gradient * (1 if scale is None else of_items(scale))
    mu = (1 - beta1) * scaled + beta1 * mu
    nu = (1 - beta2) * scaled**2 + beta2 * nu
    steps = of_items(count) + 1
    unbiased = mu / (1 - beta1**steps), nu / (1 - beta2**steps)
    direction = unbiased[0] / (np.sqrt(unbiased[1]) + of_items(epsilon, dim))
    length = np.sqrt((direction**2).sum(-1, keepdims=True))
    longest = length.max(axis=tuple(range(1, length.ndim)), keepdims=True)
    voxel = np.array([2 / (n - 1) if n > 1 else 0 for n in reversed(shape)])
    step = -learning_rate * 0.5 / np.maximum(0.5, longest) * voxel * direction
    for component in range(dim if confined else 0):
        across = np.moveaxis(step[..., component], dim - component, 0)
        across[[0, -1]] = 0
    return step, mu, nu


def jacobian_determinant(displacement: Array, *, align_corners: bool = True) -> Array:
    """Determinant of the Jacobian of ``x + u(x)`` in voxels: ``(N, [Z,] Y, X)``.

    Central differences inside, one-sided ones at the first and last voxel; an axis of one voxel
    has no derivative along it.
    """
    displacement = float64(displacement)
    shape, dim = displacement.shape[1:-1], displacement.shape[-1]
    in_voxels = times(half_extent(shape, align_corners), displacement)
    jacobian = np.zeros((*displacement.shape, dim)) + np.eye(dim)
    for component in range(dim):
        for along in range(dim):
            axis = dim - along  # x is the last spatial axis; axis 0 is the batch
            if displacement.shape[axis] > 1:
                slope = np.gradient(in_voxels[..., component], axis=axis)
                jacobian[..., component, along] += slope
    return np.linalg.det(jacobian)


def convert_displacement(
    displacement: Array,
    source: str,
    target: str,
    *,
    spacing: Sequence[float] | None = None,
    align_corners: bool = True,
    source_channels: str = "last",
    target_channels: str = "last",
) -> Array:
    """The same displacements in other units and with their components on another axis.

    ``"voxel"`` is ``"normalised"`` times the half extent, where an axis of one voxel counts as one
    voxel long; ``"mm"`` is ``"voxel"`` times the spacing (x, y, z).
    """
    field = float64(displacement)
    if source_channels == "first":
        field = np.moveaxis(field, 1, -1)
    size = np.array(field.shape[-2:0:-1], np.float64)  # x, y, z
    voxels_per_unit = {
        "normalised": np.maximum(size - 1, 1) / 2 if align_corners else size / 2,
        "voxel": np.ones_like(size),
        "mm": None if spacing is None else 1 / np.array(spacing, np.float64),
    }
    field = field * (voxels_per_unit[source] / voxels_per_unit[target])
    return np.moveaxis(field, -1, 1) if target_channels == "first" else field


def window_weights(size: int, window: str, sigma: float | None) -> Array:
    """The weights of a window along one axis."""
    offsets = np.arange(size) - size // 2
    if window == "gaussian":
        return np.exp(-0.5 * (offsets / (size / 3 if sigma is None else sigma)) ** 2)
    if window == "triangular":
        half = (size + 1) // 2
        width = half if half % 2 == 1 else half - 1
        return np.maximum(width - abs(offsets), 0) / width**2
    return np.ones(size)


def correlation_window(
    kernel_size: int | Sequence[int], window: str, sigma: float | None, dim: int
) -> tuple[Callable[[Array], Array], float]:
    """What sums the values in the window about every voxel; and the sum of its weights.

    A size for each axis is in the order of the array's axes. Outside of an image there are zeros,
    which count.
    """
    sizes = (kernel_size,) * dim if isinstance(kernel_size, int) else tuple(kernel_size)
    weights = [window_weights(size, window, sigma) for size in sizes]

    def sums(x: Array) -> Array:
        for axis, along in enumerate(weights, 2):
            x = weighted_sums(x, along, axis)
        return x

    return sums, math.prod(along.sum() for along in weights)


def shares(mask: Array | None, shape: Shape, reduction: str) -> Array:
    """With what weight each element of a map of that shape goes into its reduction."""
    weights = np.ones(shape) if mask is None else np.broadcast_to(float64(mask), shape)
    return divide_or_zero(weights, weights.sum()) if reduction == "mean" else weights


def lncc_loss(
    pred: Array,
    target: Array,
    *,
    kernel_size: int | Sequence[int] = 7,
    window: str = "rectangular",
    sigma: float | None = None,
    smooth_nr: float = 0.0,
    smooth_dr: float = 1e-5,
    smooth_product: float = 0.0,
    common_variance: float = 0.0,
    both_flat: float | None = None,
    mask: Array | None = None,
    reduction: str = "mean",
) -> Array:
    """Minus the local normalised cross-correlation of two images, weighted by a mask."""
    pred, target = float64(pred), float64(target)
    sums, mass = correlation_window(kernel_size, window, sigma, pred.ndim - 2)
    common = mass * common_variance
    cross = sums(pred * target) - sums(pred) * sums(target) / mass + common
    raw = [sums(x**2) - sums(x) ** 2 / mass for x in (pred, target)]
    of_pred, of_target = (np.maximum(v, smooth_dr) + common for v in raw)
    ncc = (cross**2 + smooth_nr) / (of_pred * of_target + smooth_product)
    if both_flat is not None:
        flat = [v <= 1e-12 * sums(x**2) for v, x in zip(raw, (pred, target), strict=True)]
        ncc = np.where(flat[0] & flat[1], both_flat, ncc)
    shape = (batch_size(pred, target, mask), *ncc.shape[1:])
    loss = -shares(mask, shape, reduction) * ncc
    return loss if reduction == "none" else np.sum(loss)


def lncc_loss_vjp(
    cotangent: Array,
    pred: Array,
    target: Array,
    *,
    kernel_size: int | Sequence[int] = 7,
    window: str = "rectangular",
    sigma: float | None = None,
    smooth_nr: float = 0.0,
    smooth_dr: float = 1e-5,
    smooth_product: float = 0.0,
    common_variance: float = 0.0,
    both_flat: float | None = None,
    mask: Array | None = None,
    reduction: str = "mean",
) -> tuple[Array, Array]:
    """Gradients of ``sum(cotangent * lncc_loss(...))`` to pred and target.

    A variance that was raised to ``smooth_dr`` has no gradient; so has a constant window, whatever
    its correlation is said to be.
    """
    images = [float64(pred), float64(target)]
    sums, mass = correlation_window(kernel_size, window, sigma, pred.ndim - 2)
    means = [sums(x) / mass for x in images]
    raw = [sums(x**2) - sums(x) ** 2 / mass for x in images]
    common = mass * common_variance
    variances = [np.maximum(v, smooth_dr) + common for v in raw]
    cross = sums(images[0] * images[1]) - sums(images[0]) * means[1] + common
    product = variances[0] * variances[1] + smooth_product
    ncc = (cross**2 + smooth_nr) / product
    shape = (batch_size(pred, target, mask), *ncc.shape[1:])
    to_ncc = -cotangent * shares(mask, shape, reduction)
    to_cross = to_ncc * 2 * cross / product
    gradients = []
    for k, image in enumerate(images):
        other = 1 - k
        to_variance = np.where(raw[k] < smooth_dr, 0, -to_ncc * ncc * variances[other] / product)
        # The voxel's own value less the mean of each window that holds it.
        gradient = images[other] * sums(to_cross) - sums(to_cross * means[other])
        gradient = gradient + 2 * (image * sums(to_variance) - sums(to_variance * means[k]))
        gradients.append(gradient.sum(axis=0, keepdims=True) if len(image) == 1 else gradient)
    return gradients[0], gradients[1]


def intensity_ranges(
    images: Sequence[Array], value_range: str | Sequence[Sequence[object]] | None
) -> list[tuple[float, float]]:
    """The intensities of pred and of target that are mapped to 0 and to 1.

    The images are one item and channel. Voxels that are not finite have no part in it.
    """
    finite = [x[np.isfinite(x)] for x in images]
    if value_range is None:
        return [(x.min(), x.max()) for x in finite]
    if value_range == "joint":
        both = np.concatenate(finite)
        return [(both.min(), both.max())] * 2
    return [(float(lo), float(hi)) for lo, hi in value_range]


def parzen_windows(
    image: Array, lo: float, hi: float, num_bins: int, kernel: str, sigma_ratio: float
) -> tuple[Array, Array]:
    """How every sample is spread over the bins, and the derivatives by its intensity.

    Both are ``(samples, num_bins)``. The range is held fixed. What lies outside counts as at its
    end and has no derivative; at the ends there is one. An empty range maps everything to 0.
    """
    scale = 1 / (hi - lo) if lo < hi else 0
    x = ((np.clip(image, lo, hi) - lo) * scale)[:, None]
    slope = np.where((image < lo) | (image > hi), 0, scale)[:, None]
    distance = x - (np.arange(num_bins) + 0.5) / num_bins
    if kernel == "delta":
        nearest = np.minimum(np.floor(x * num_bins), num_bins - 1)
        hard = np.where(np.isnan(x), np.nan, nearest == np.arange(num_bins))
        return hard, np.zeros_like(hard)
    if kernel == "gaussian":
        sigma = sigma_ratio / (2 * num_bins)
        raw = np.exp(-0.5 * (distance / sigma) ** 2)
        raw_slope = -distance / sigma**2 * raw
    elif kernel == "b-spline":
        t = np.abs(distance) * num_bins
        middle, tail = t < 1, (t >= 1) & (t < 2)
        raw = np.where(middle, 2 / 3 - t**2 + t**3 / 2, np.where(tail, (2 - t) ** 3 / 6, 0))
        by_t = np.where(middle, 1.5 * t**2 - 2 * t, np.where(tail, -((2 - t) ** 2) / 2, 0))
        raw_slope = by_t * np.sign(distance) * num_bins
    else:
        raise ValueError(f"kernel {kernel!r}")
    total = raw.sum(axis=1, keepdims=True)
    windows = raw / total
    return windows, (raw_slope - windows * raw_slope.sum(axis=1, keepdims=True)) / total * slope


def paired_samples(
    pred: Array,
    target: Array,
    num_bins: int,
    kernel: str,
    sigma_ratio: float,
    value_range: str | Sequence[Sequence[object]] | None,
    mask: Array | None,
) -> Iterator[tuple[tuple[int, int], Array, list[tuple[Array, Array]]]]:
    """Of each item and channel: its indices, the share of each sample, both images' windows.

    A bound of ``value_range`` is a number, or an array of one for each item. A sample that weighs
    nothing does not count, whatever its intensities are.
    """
    count = batch_size(pred, target, mask)
    for n, c in np.ndindex(count, pred.shape[1]):
        images = [item(x, n)[c] for x in (pred, target)]
        weights = np.ones(images[0].size)
        if mask is not None:
            of_item = item(float64(mask), n)
            of_channel = of_item[c if len(of_item) > 1 else 0]
            weights = np.broadcast_to(of_channel, images[0].shape).ravel()
        given = value_range
        if given is not None and given != "joint":
            given = [[np.broadcast_to(bound, count)[n] for bound in pair] for pair in given]
        windows = [
            parzen_windows(
                np.where(weights == 0, lo, image.ravel()), lo, hi, num_bins, kernel, sigma_ratio
            )
            for image, (lo, hi) in zip(images, intensity_ranges(images, given), strict=True)
        ]
        yield (n, c), divide_or_zero(weights, weights.sum()), windows


def joint_histogram(
    pred: Array,
    target: Array,
    *,
    num_bins: int = 32,
    kernel: str = "gaussian",
    sigma_ratio: float = 1.0,
    value_range: str | Sequence[Sequence[object]] | None = None,
    mask: Array | None = None,
) -> Array:
    """How probable each pair of bins is, of pred and of target: ``(N, C, num_bins, num_bins)``."""
    pred, target = float64(pred), float64(target)
    options = (num_bins, kernel, sigma_ratio, value_range, mask)
    result = np.zeros((batch_size(pred, target, mask), pred.shape[1], num_bins, num_bins))
    for index, share, ((of_pred, _), (of_target, _)) in paired_samples(pred, target, *options):
        result[index] = (of_pred * share[:, None]).T @ of_target
    return result


def mutual_information(joint: Array, smooth_nr: float, smooth_dr: float) -> tuple[float, Array]:
    """Of a joint histogram, and its derivative by every entry, marginals included."""
    p_a, p_b = joint.sum(axis=1, keepdims=True), joint.sum(axis=0, keepdims=True)
    product = p_a * p_b + smooth_dr
    ratio = (joint + smooth_nr) / product
    by_ratio = joint / (ratio + smooth_dr)
    by_product = -by_ratio * ratio / product
    slope = np.log(ratio + smooth_dr) + by_ratio / product
    slope = slope + (by_product * p_b).sum(axis=1, keepdims=True)
    slope = slope + (by_product * p_a).sum(axis=0, keepdims=True)
    return np.sum(joint * np.log(ratio + smooth_dr)), slope


def information(
    joint: Array, normalised: bool, smooth_nr: float, smooth_dr: float
) -> tuple[float, Array]:
    """The mutual information of a joint histogram, normalised or not, and its derivative."""
    if normalised:
        return normalised_mutual_information(joint)
    return mutual_information(joint, smooth_nr, smooth_dr)


def normalised_mutual_information(joint: Array) -> tuple[float, Array]:
    """Of a joint histogram, and its derivative by every entry, marginals included."""
    p_a, p_b = joint.sum(axis=1, keepdims=True), joint.sum(axis=0, keepdims=True)
    logs = [np.log(np.where(p == 0, 1, p)) for p in (p_a, p_b, joint)]
    of_a, of_b, of_both = (-np.sum(p * log) for p, log in zip((p_a, p_b, joint), logs, strict=True))
    if of_both < 1e-10:
        return 1.0, np.zeros(joint.shape)
    value = (of_a + of_b) / of_both
    # A bin in which there is nothing has a derivative that is not finite, and nothing moves there.
    slope = (value * (logs[2] + 1) - (logs[0] + 1) - (logs[1] + 1)) / of_both
    return value, np.where(joint == 0, 0, slope)


def mutual_information_loss(
    pred: Array,
    target: Array,
    *,
    num_bins: int = 32,
    kernel: str = "gaussian",
    sigma_ratio: float = 1.0,
    value_range: str | Sequence[Sequence[object]] | None = None,
    mask: Array | None = None,
    normalised: bool = False,
    reduction: str = "mean",
    smooth_nr: float = 1e-7,
    smooth_dr: float = 1e-7,
) -> Array:
    """Minus the information of two images: ``(N, C)``, its mean or its sum."""
    joint = joint_histogram(
        pred,
        target,
        num_bins=num_bins,
        kernel=kernel,
        sigma_ratio=sigma_ratio,
        value_range=value_range,
        mask=mask,
    )
    loss = np.zeros(joint.shape[:2])
    for index in np.ndindex(loss.shape):
        loss[index] = -information(joint[index], normalised, smooth_nr, smooth_dr)[0]
    return {"mean": np.mean, "sum": np.sum, "none": np.asarray}[reduction](loss)


def mutual_information_loss_vjp(
    cotangent: Array,
    pred: Array,
    target: Array,
    *,
    num_bins: int = 32,
    kernel: str = "gaussian",
    sigma_ratio: float = 1.0,
    value_range: str | Sequence[Sequence[object]] | None = None,
    mask: Array | None = None,
    normalised: bool = False,
    reduction: str = "mean",
    smooth_nr: float = 1e-7,
    smooth_dr: float = 1e-7,
) -> tuple[Array, Array]:
    """Gradients of ``sum(cotangent * mutual_information_loss(...))`` to pred and target."""
    pred, target = float64(pred), float64(target)
    options = (num_bins, kernel, sigma_ratio, value_range, mask)
    shape = (batch_size(pred, target, mask), pred.shape[1])
    to_loss = cotangent * shares(None, shape, reduction)
    to_pred, to_target = np.zeros(pred.shape), np.zeros(target.shape)
    for (n, c), share, windows in paired_samples(pred, target, *options):
        (of_pred, pred_slope), (of_target, target_slope) = windows
        joint = (of_pred * share[:, None]).T @ of_target
        to_joint = -to_loss[n, c] * information(joint, normalised, smooth_nr, smooth_dr)[1]
        by_pred = share * np.sum(of_target @ to_joint.T * pred_slope, axis=1)
        by_target = share * np.sum(of_pred @ to_joint * target_slope, axis=1)
        item(to_pred, n)[c] += by_pred.reshape(pred.shape[2:])
        item(to_target, n)[c] += by_target.reshape(target.shape[2:])
    return to_pred, to_target


# ------------------------------------------------------------------------- roughness of a field


def in_lengths(
    displacement: Array, spacing: Sequence[float] | None, align_corners: bool
) -> tuple[Array, Array]:
    """A displacement in voxels, or in mm, and how long the step to the next voxel is, per axis."""
    displacement = float64(displacement)
    shape, dim = displacement.shape[1:-1], displacement.shape[-1]
    step = np.ones(dim) if spacing is None else np.array(spacing, np.float64)
    return step * times(half_extent(shape, align_corners), displacement), step


def mean_energy(voxels: int, sums: Array, reduction: str) -> Array:
    """Of each item, or over the items, where ``sums`` are over the voxels of each."""
    means = sums / voxels
    return {"none": means, "sum": np.sum(means), "mean": np.sum(means) / max(len(means), 1)}[
        reduction
    ]


def sum_of_items(values: Array) -> Array:
    """Over everything but the batch axis."""
    return values.reshape(len(values), math.prod(values.shape[1:])).sum(axis=1)


def diffusion_loss(
    displacement: Array,
    *,
    spacing: Sequence[float] | None = None,
    reduction: str = "mean",
    align_corners: bool = True,
) -> Array:
    """Squares of all differences of neighbours, per step."""
    v, step = in_lengths(displacement, spacing, align_corners)
    dim = v.shape[-1]
    sums = np.zeros(len(v))
    for along in range(dim):
        slope = np.diff(v, axis=dim - along) / step[along]  # x is the last spatial axis
        sums += sum_of_items(slope**2)
    return mean_energy(math.prod(v.shape[1:-1]), sums, reduction)


def bending_energy_loss(
    displacement: Array,
    *,
    spacing: Sequence[float] | None = None,
    reduction: str = "mean",
    align_corners: bool = True,
) -> Array:
    """Squares of all differences of differences, of those along two axes in either order."""
    v, step = in_lengths(displacement, spacing, align_corners)
    dim = v.shape[-1]
    sums = np.zeros(len(v))
    for along in range(dim):
        slope = np.diff(v, axis=dim - along) / step[along]
        for then in range(dim):
            sums += sum_of_items((np.diff(slope, axis=dim - then) / step[then]) ** 2)
    return mean_energy(math.prod(v.shape[1:-1]), sums, reduction)


def curvature_loss(
    displacement: Array,
    *,
    spacing: Sequence[float] | None = None,
    reduction: str = "mean",
    align_corners: bool = True,
) -> Array:
    """Squares of the Laplacian. The ends of an axis have no second difference along it."""
    v, step = in_lengths(displacement, spacing, align_corners)
    dim = v.shape[-1]
    laplacian = np.zeros_like(v)
    for along in range(dim):
        lines = np.moveaxis(v, dim - along, 0)
        inside = np.moveaxis(laplacian, dim - along, 0)[1:-1]
        inside += (lines[2:] - 2 * lines[1:-1] + lines[:-2]) / step[along] ** 2
    return mean_energy(math.prod(v.shape[1:-1]), sum_of_items(laplacian**2), reduction)


def central_slopes(v: Array, step: Array) -> Array:
    """``dv_k / da`` at every voxel, ``(N, [Z,] Y, X, k, a)``, as `jacobian_determinant` has them.

    Central differences inside, one-sided ones at the first and last voxel; an axis of one voxel
    has no derivative along it.
    """
    dim = v.shape[-1]
    slopes = np.zeros((*v.shape, dim))
    for along in range(dim):
        axis = dim - along
        if v.shape[axis] > 1:
            slopes[..., along] = np.gradient(v, axis=axis) / step[along]
    return slopes


def elasticity_loss(
    displacement: Array,
    *,
    mu: float = 1.0,
    lam: float = 1.0,
    spacing: Sequence[float] | None = None,
    reduction: str = "mean",
    align_corners: bool = True,
) -> Array:
    """``mu |e|^2 + lam / 2 tr(e)^2``, where the strain e is the symmetric part of the slopes."""
    slopes = central_slopes(*in_lengths(displacement, spacing, align_corners))
    strain = (slopes + np.swapaxes(slopes, -1, -2)) / 2
    squares = np.sum(strain**2, axis=(-1, -2))
    energy = mu * squares + lam / 2 * np.trace(strain, axis1=-2, axis2=-1) ** 2
    return mean_energy(math.prod(energy.shape[1:]), sum_of_items(energy), reduction)


def divergence_loss(
    displacement: Array, *, reduction: str = "mean", align_corners: bool = True
) -> Array:
    """Squares of the sum of each component's slope along its own axis."""
    slopes = central_slopes(*in_lengths(displacement, None, align_corners))
    energy = np.trace(slopes, axis1=-2, axis2=-1) ** 2
    return mean_energy(math.prod(energy.shape[1:]), sum_of_items(energy), reduction)


LEAST_DETERMINANT = 0.05


def jacobian_loss(
    displacement: Array, *, reduction: str = "mean", align_corners: bool = True
) -> Array:
    """Squared logarithm of the determinant, and its tangent for the least and what is below."""
    determinant = jacobian_determinant(displacement, align_corners=align_corners)
    least = LEAST_DETERMINANT
    tangent = math.log(least) ** 2 + 2 * math.log(least) / least * (determinant - least)
    energy = np.where(determinant < least, tangent, np.log(np.maximum(determinant, least)) ** 2)
    return mean_energy(math.prod(energy.shape[1:]), sum_of_items(energy), reduction)


def jacobian_loss_slope(determinant: Array) -> Array:
    """The derivative of what `jacobian_loss` takes the mean of, by the determinant."""
    least = LEAST_DETERMINANT
    at_least = np.maximum(determinant, least)
    return 2 * np.log(at_least) / at_least


# ------------------------------------------------------------------------------------ descriptors


def patch_pairs(dim: int) -> list[tuple[Array, Array]]:
    """The neighbours p and q that each channel compares, as directions in x, y, z order."""
    along = np.eye(dim, dtype=int)
    pairs = []
    for first, second in itertools.combinations(along, 2):
        pairs += [(first, second), (-first, -second), (first, -second), (-first, second)]
    return pairs


def squared_differences(image: Array, radius: int, dilation: int) -> Iterator[Array]:
    """Of each pair, ``(N, C, *S)`` with ``radius`` more voxels on each side: ``I(x+p) - I(x+q)``.

    The image is continued by its nearest voxel.
    """
    shape, dim = image.shape[2:], image.ndim - 2
    around = [(0, 0), (0, 0), *[(radius + dilation,) * 2] * dim]
    continued = np.pad(image, around, mode="edge")

    def moved(direction: Array) -> Array:
        start = dilation * (1 + direction[::-1])
        ends = start + np.array(shape) + 2 * radius
        return continued[(..., *itertools.starmap(slice, zip(start, ends, strict=True)))]

    for p, q in patch_pairs(dim):
        yield (moved(p) - moved(q)) ** 2


def patch_distances(image: Array, radius: int, dilation: int) -> Array:
    """Mean squared differences of the pairs of patches: ``(N, C, K, *S)``."""
    dim = image.ndim - 2
    axes, width = tuple(range(2, 2 + dim)), (2 * radius + 1,) * dim
    distances = [
        np.lib.stride_tricks.sliding_window_view(squares, width, axes).mean(tuple(range(-dim, 0)))
        for squares in squared_differences(image, radius, dilation)
    ]
    return np.stack(distances, axis=2)


def variance_bounds(image: Array, radius: int, dilation: int) -> tuple[Array, Array]:
    """Of the local variance, for each channel of an image: ``(N, C, 1, ...)``."""
    distances = patch_distances(float64(image), radius, dilation)
    variance = np.mean(distances - distances.min(axis=2, keepdims=True), axis=2, keepdims=True)
    mean = variance.mean(axis=tuple(range(2, variance.ndim)), keepdims=True)
    return 0.001 * mean, 1000 * mean


def mind_ssc(
    image: Array,
    *,
    radius: int = 2,
    dilation: int = 2,
    bounds: tuple[Array, Array] | None = None,
) -> Array:
    """Descriptors ``exp(-(D_k - min D) / V)`` of the distances D_k of pairs of patches.

    V is the mean of ``D_k - min D``, kept within ``bounds``, which by default are those of the
    image. Where the bounds are 0, the image is constant, and all descriptors are 1.
    """
    image = float64(image)
    low, high = bounds or variance_bounds(image, radius, dilation)
    distances = patch_distances(image, radius, dilation)
    beyond = distances - distances.min(axis=2, keepdims=True)
    variance = np.clip(beyond.mean(axis=2, keepdims=True), low, high)
    descriptors = np.exp(-divide_or_zero(beyond, variance))
    return descriptors.reshape(image.shape[0], -1, *image.shape[2:])


def mind_ssc_vjp(cotangent: Array, image: Array, *, radius: int = 2, dilation: int = 2) -> Array:
    """Gradient of ``sum(cotangent * mind_ssc(...))`` to the image, the bounds held fixed."""
    image = float64(image)
    low, high = variance_bounds(image, radius, dilation)
    distances = patch_distances(image, radius, dilation)
    nearest = np.argmin(distances, axis=2)[:, :, None]
    beyond = distances - distances.min(axis=2, keepdims=True)
    raw = beyond.mean(axis=2, keepdims=True)
    variance = np.clip(raw, low, high)
    quotient = divide_or_zero(beyond, variance)
    by_quotient = -float64(cotangent).reshape(distances.shape) * np.exp(-quotient)
    by_beyond = divide_or_zero(by_quotient, variance)
    by_variance = -divide_or_zero(by_quotient * quotient, variance).sum(axis=2, keepdims=True)
    free = (raw >= low) & (raw <= high)
    by_beyond += np.where(free, by_variance, 0) / distances.shape[2]
    by_distance = by_beyond.copy()
    least = np.take_along_axis(by_beyond, nearest, 2) - by_beyond.sum(axis=2, keepdims=True)
    np.put_along_axis(by_distance, nearest, least, 2)

    shape, dim = image.shape[2:], image.ndim - 2
    gradient = np.zeros(image.shape)
    reach = range(-radius, radius + 1)
    for k, (p, q) in enumerate(patch_pairs(dim)):
        for offset in itertools.product(reach, repeat=dim):
            places = [
                tuple(
                    np.clip(np.arange(n) + o + dilation * d, 0, n - 1)
                    for n, o, d in zip(shape, offset, direction[::-1], strict=True)
                )
                for direction in (p, q)
            ]
            (at_p, at_q) = (np.ix_(*map(np.arange, image.shape[:2]), *place) for place in places)
            slope = 2 * by_distance[:, :, k] * (image[at_p] - image[at_q]) / len(reach) ** dim
            np.add.at(gradient, at_p, slope)
            np.add.at(gradient, at_q, -slope)
    return gradient


# ------------------------------------------------------------------------------------ derivatives


def vjp_by_central_differences(
    function: Callable[..., Array],
    args: Sequence[Array | None],
    cotangent: Array,
    wrt: Sequence[int],
    step: float = 1e-6,
) -> tuple[Array, ...]:
    """Gradients of ``sum(cotangent * function(*args))`` to the arguments numbered ``wrt``."""
    gradients = []
    for k in wrt:
        gradient = np.zeros(args[k].shape)
        for element in np.ndindex(*args[k].shape):
            sides = []
            for h in (step, -step):
                moved = [float64(a) if isinstance(a, np.ndarray) else a for a in args]
                moved[k] = moved[k].copy()
                moved[k][element] += h
                sides.append(np.sum(cotangent * function(*moved)))
            gradient[element] = (sides[0] - sides[1]) / (2 * step)
        gradients.append(gradient)
    return tuple(gradients)
