"""The ops' maths, in steps that JAX can differentiate as often as it likes.

Forward mode and derivatives of derivatives go by these, where they are not calls of ops themselves:
values and gradients never do. So what is here is exact, and as fast as it comes: it takes several
times as long as the op, and memory for what is in between.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxreg._primitives import Arrays, apply_function, linear_map
from jaxreg._sharding import vary_alike
from regkernels.table import Op

Values = Mapping[str, jax.Array]
Sizes = tuple[int, ...]  # of spatial axes, in x, y, z order


class Call(Protocol):
    """A call of an op but for its operands. It is hashable."""

    @property
    def op(self) -> Op:
        """The op."""
        ...

    @property
    def attributes(self) -> dict[str, Any]:
        """Its attributes, by name."""
        ...

    @property
    def shares_planes(self) -> bool:
        """Whether the operands are the planes of a device: see `jaxreg.planes_over`."""
        ...

    def run(self, operands: Values, wanted: int) -> dict[str, jax.Array]:
        """Run the op on operands by name: the outputs of a bit mask."""
        ...

    def gradients(
        self, values: Values, cotangent: jax.Array, names: Collection[str]
    ) -> dict[str, jax.Array]:
        """Run its gradient op, on what that takes of some values: gradients of inputs by name."""
        ...

    def of(self, op: str, attributes: Mapping[str, Any]) -> Call:
        """Return a call of another op."""
        ...


Definition = Callable[[Call, Values], jax.Array]
"""The result of an op, in steps that JAX can differentiate as often as it likes."""


# --- Sampling -------------------------------------------------------------------------------------
#
# Linear interpolation has the slope, along an axis, of the sample at the upper end of the cell less
# that at its lower end. Both are samples, in which the position along that axis is a constant: so
# the derivatives of a sample are samples, and those of its transpose, which spreads values over the
# image, are transposes. Cubic interpolation is a cubic polynomial within a cell, with the slope of
# the one through four of its samples there.


_NODES = np.array([0, 0.25, 0.75, 1])
"""Places within a cell, exact in floating point."""

_NODE_SLOPES = np.polynomial.polynomial.polyder(np.linalg.inv(np.vander(_NODES, increasing=True)))
"""In column k the derivative of the cubic polynomial that is 1 at node k and 0 at the others.

Its coefficients, the constant first.
"""


def _half_extents(sizes: Sizes, align_corners: bool) -> list[float]:
    return [(size - 1 if align_corners else size) / 2 for size in sizes]


def _per_axis(numbers: Sequence[float], dtype: Any) -> Any:
    return np.asarray(numbers, dtype)


@dataclass(frozen=True)
class _Sampler:
    """Samples of an image at positions in voxels, and the transpose.

    Parameters
    ----------
    call
        Of ``interpolate`` at coordinates.
    shape
        Of the image, ``(N, C, *S)``.
    """

    call: Call
    shape: tuple[int, ...]

    @property
    def sizes(self) -> Sizes:
        return self.shape[:1:-1]

    @property
    def axes(self) -> list[int]:
        """Those along which samples have a slope."""
        if self.call.attributes["mode"] == "nearest":
            return []
        return [axis for axis, half in enumerate(self._half_extents()) if half > 0]

    def _half_extents(self) -> list[float]:
        return _half_extents(self.sizes, self.call.attributes["align_corners"])

    def coordinates(self, position: jax.Array) -> jax.Array:
        """Positions, normalised."""
        centre = [(size - 1) / 2 for size in self.sizes]
        inverse = [1 / half if half else 0.0 for half in self._half_extents()]
        dtype = position.dtype
        normalised: jax.Array = (position - _per_axis(centre, dtype)) * _per_axis(inverse, dtype)
        return normalised

    def nodes(self, position: jax.Array, axis: int) -> list[tuple[Any, jax.Array]]:
        """Weights and positions of the samples that the slope along an axis is the sum of.

        Along it, the positions are constants.
        """
        lower = jax.lax.stop_gradient(jnp.floor(position))
        along = np.arange(position.shape[-1]) == axis
        if self.call.attributes["mode"] == "bilinear":
            ends = (jnp.where(along, lower + 1, position), jnp.where(along, lower, position))
            return list(zip((1, -1), ends, strict=True))
        here, below = position[:, None, ..., axis], lower[:, None, ..., axis]
        # Nothing varies where a position is not finite.
        finite = jnp.isfinite(here)
        t = jnp.where(finite, here, 0) - jnp.where(finite, below, 0)
        nodes: list[tuple[Any, jax.Array]] = []
        for place, (a, b, c) in zip(_NODES.tolist(), _NODE_SLOPES.T.tolist(), strict=True):
            weight = jnp.where(finite, a + t * (b + t * c), 0)
            nodes.append((weight, jnp.where(along, lower + place, position)))
        return nodes

    def sample(self, image: jax.Array, position: jax.Array) -> jax.Array:
        image, grid = _alike(image, self.coordinates(position))
        result = self.call.op.result
        outputs = self.call.run({"image": image, "grid": grid}, 1 << result)
        return outputs[self.call.op.output_names[result]]

    def spread(self, values: jax.Array, position: jax.Array) -> jax.Array:
        """The transpose of :meth:`sample`, an image."""
        image = jnp.zeros(self.shape, values.dtype)
        image, grid, values = _alike(image, self.coordinates(position), values)
        gradients = self.call.gradients({"image": image, "grid": grid}, values, ("image",))
        return gradients["image"]


def _alike(*arrays: jax.Array) -> Any:
    return vary_alike(arrays)


@dataclass(frozen=True)
class _InImage:
    """A sampler as a linear map of what is sampled, or its transpose."""

    sampler: _Sampler
    transposed: bool

    def forward(self, residuals: Arrays, vectors: Arrays) -> Arrays:
        return (apply_function(_Samples(self.sampler, self.transposed), vectors[0], residuals[0]),)

    def transpose(self, residuals: Arrays, cotangents: Arrays) -> Arrays:
        return (
            apply_function(
                _Samples(self.sampler, not self.transposed), cotangents[0], residuals[0]
            ),
        )


@dataclass(frozen=True)
class _Samples:
    """What :meth:`_Sampler.sample` gives, or its transpose, with derivatives."""

    sampler: _Sampler
    transposed: bool

    def __call__(self, *arrays: jax.Array) -> jax.Array:
        function = self.sampler.spread if self.transposed else self.sampler.sample
        return function(*arrays)

    def differentiate(self, arrays: Arrays, tangents: tuple[Any, ...]) -> tuple[jax.Array, Any]:
        (values, position), (moved_values, moved_position) = arrays, tangents
        result = apply_function(self, values, position)

        def in_image(moved: jax.Array, at: jax.Array) -> jax.Array:
            # What is linear in a tangent has to be a linear map for JAX, which may transpose it.
            of = _InImage(self.sampler, self.transposed)
            return linear_map(of, [at], [moved], [jax.typeof(result)])[0]

        parts = []
        if moved_values is not None:
            parts.append(in_image(moved_values, position))
        if moved_position is not None:
            for axis in self.sampler.axes:
                nodes = self.sampler.nodes(position, axis)
                along = moved_position[:, None, ..., axis]
                if self.transposed:
                    parts += [in_image(values * (weight * along), at) for weight, at in nodes]
                else:
                    slope = [weight * apply_function(self, values, at) for weight, at in nodes]
                    parts.append(functools.reduce(jnp.add, slope) * along)
        return result, functools.reduce(jnp.add, parts) if parts else None


def _packed_field(field: jax.Array, attributes: Mapping[str, Any]) -> jax.Array:
    """The field with its components last, in x, y, z order, normalised."""
    if attributes.get("grid_channels") == "first":
        field = jnp.moveaxis(field, 1, -1)
    if attributes.get("grid_components") == "zyx":
        field = field[..., ::-1]
    if attributes.get("grid_unit") == "voxel":
        align, sizes = attributes["align_corners"], field.shape[-2:0:-1]
        halves = _half_extents(tuple(max(n, 2) if align else n for n in sizes), align)
        field = field * _per_axis([1 / half for half in halves], field.dtype)
    return field


def _positions(
    in_sizes: Sizes,
    out_sizes: Sizes,
    affine: jax.Array | None,
    field: jax.Array | None,
    attributes: Mapping[str, Any],
    dtype: Any,
) -> jax.Array:
    """Where samples are taken, in voxels: ``(N, *out, D)``.

    Rounded as in the kernels, as far as a position may be a whole number: it decides which cell a
    sample lies in.
    """
    align = attributes["align_corners"]
    half_in, half_out = _half_extents(in_sizes, align), _half_extents(out_sizes, align)
    centre = [(size - 1) / 2 for size in in_sizes]
    axes = range(len(in_sizes))
    if field is not None and not attributes.get("is_displacement", True):
        position = _per_axis(centre, dtype) + _per_axis(half_in, dtype) * field
    else:
        columns = [np.arange(n, dtype=dtype) - np.asarray((n - 1) / 2, dtype) for n in out_sizes]
        source = [x.reshape(1, *x.shape, *[1] * k) for k, x in enumerate(columns)]
        affine_last = affine is not None and attributes.get("affine_last", False)
        if affine_last and field is not None:
            source = [
                x + (field[..., k] * half_out[k] if half_out[k] else 0)
                for k, x in enumerate(source)
            ]
        parts = []
        for j in axes:
            if affine is None:
                ratio = half_in[j] / half_out[j] if half_out[j] else 0.0
                part = np.asarray(centre[j], dtype) + np.asarray(ratio, dtype) * source[j]
            else:
                row = jnp.expand_dims(affine[:, j], tuple(range(1, 1 + len(axes))))
                part = np.asarray(centre[j], dtype) + np.asarray(half_in[j], dtype) * row[..., -1]
                for k in axes:
                    scale = half_in[j] / half_out[k] if half_out[k] else 0.0
                    part = part + row[..., k] * np.asarray(scale, dtype) * source[k]
            if field is not None and not affine_last:
                part = part + np.asarray(half_in[j], dtype) * field[..., j]
            parts.append(part)
        shapes = [part.shape[0] for part in parts]
        shape = (max(shapes, key=lambda n: n != 1), *out_sizes[::-1])
        position = jnp.stack([jnp.broadcast_to(part, shape) for part in parts], -1)
    has_extent = np.asarray(half_in) > 0
    return jnp.where(has_extent, position, _per_axis(centre, dtype))


def _sampled(
    call: Call,
    image: jax.Array,
    affine: jax.Array | None,
    field: jax.Array | None,
    out_sizes: Sizes,
    sampling: Mapping[str, Any],
) -> jax.Array:
    attributes = {
        "affine_last": False,
        "out_shape": (),
        "mode": "bilinear",
        "grid_unit": "normalised",
        "grid_channels": "last",
        "grid_components": "xyz",
        **sampling,
        "is_displacement": False,
    }
    fields = [x for x in (affine, field) if x is not None]
    dtype = fields[0].dtype if fields else jnp.promote_types(image.dtype, np.float32)
    position = _positions(image.shape[:1:-1], out_sizes, affine, field, call.attributes, dtype)
    image, position = _alike(image, position)
    sampler = _Sampler(call.of("interpolate", attributes), image.shape)
    samples: jax.Array = apply_function(_Samples(sampler, False), image.astype(dtype), position)
    return samples.astype(image.dtype)


def _interpolate(call: Call, values: Values) -> jax.Array:
    attributes, image = call.attributes, values["image"]
    grid = values.get("grid")
    field = None if grid is None else _packed_field(grid, attributes)
    rank = image.ndim - 2
    out_sizes = image.shape[:1:-1]
    if field is not None:
        out_sizes = field.shape[-2:0:-1]
    elif attributes["out_shape"]:
        out_sizes = tuple(attributes["out_shape"][-rank:][::-1])
    same = ("mode", "padding_mode", "align_corners", "deterministic")
    sampling = {x: attributes[x] for x in same}
    return _sampled(call, image, values.get("affine"), field, out_sizes, sampling)


def _compose(call: Call, values: Values) -> jax.Array:
    attributes, u, v = call.attributes, values["u"], values["v"]
    same = ("mode", "padding_mode", "align_corners", "deterministic")
    sampling = {x: attributes[x] for x in same}
    image = jnp.moveaxis(u, -1, 1)
    out_sizes = v.shape[-2:0:-1]
    sampled = _sampled(call, image, values.get("affine"), v, out_sizes, sampling)
    moved = jnp.moveaxis(sampled, 1, -1)
    return v + moved if attributes["add"] else moved


# --- Losses ---------------------------------------------------------------------------------------


def _reduced(loss: jax.Array, reduction: str) -> jax.Array:
    if reduction == "none":
        return loss
    return jnp.mean(loss) if reduction == "mean" else jnp.sum(loss)


def _window(size: int, window: str, sigma: float | None) -> np.ndarray:
    """The weights of a window along an axis."""
    offsets = np.arange(size) - size // 2
    if window == "gaussian":
        return np.exp(-0.5 * (offsets / (size / 3 if sigma is None else sigma)) ** 2)
    if window == "triangular":
        half = (size + 1) // 2
        width = half - (half % 2 == 0)
        return np.maximum(width - abs(offsets), 0) / width**2
    return np.ones(size)


def _window_sums(sizes: Sequence[int], weights: Sequence[np.ndarray]) -> Callable[[Any], Any]:
    """Weighted sums over the window about every voxel of an image; there are zeros outside."""
    bands = []
    for size, along in zip(sizes, weights, strict=True):
        reach = len(along) // 2
        band = np.zeros((size, size))
        for offset, weight in enumerate(along, -reach):
            band += weight * np.eye(size, k=offset)
        bands.append(band)

    def sums(x: Any) -> Any:
        for axis, band in enumerate(bands, 2):
            lines = jnp.moveaxis(x, axis, -1)
            lines = jnp.matmul(lines, band.astype(x.dtype), precision=jax.lax.Precision.HIGHEST)
            x = jnp.moveaxis(lines, -1, axis)
        return x

    return sums


def _lncc_loss(call: Call, values: Values) -> jax.Array:
    attributes, images = call.attributes, (values["pred"], values["target"])
    dtype, sizes = images[0].dtype, images[0].shape[2:]
    widths = attributes["kernel_size"]
    widths = widths * len(sizes) if len(widths) == 1 else widths
    sigma = next(iter(attributes["sigma"]), None)
    weights = [_window(n, attributes["window"], sigma) for n in widths]
    sums = _window_sums(sizes, weights)
    mass = math.prod(float(along.sum()) for along in weights)
    common = mass * attributes["common_variance"]
    least = attributes["smooth_dr"]
    rounding = 1.5 * max(widths) * float(jnp.finfo(dtype).eps)

    # About the mean of each image, so that an offset costs no precision. The zeros outside are then
    # minus that, and weigh what is missing from a window.
    axes = tuple(range(2, images[0].ndim))
    pivots = [jax.lax.stop_gradient(x.mean(axes, keepdims=True)) for x in images]
    outside = mass - sums(jnp.ones((1, 1, *sizes), dtype))
    i, j = (x - pivot for x, pivot in zip(images, pivots, strict=True))
    p, q = pivots
    sum_i, sum_j = sums(i) - p * outside, sums(j) - q * outside
    sum_ii, sum_jj = sums(i * i) + p * p * outside, sums(j * j) + q * q * outside
    raw_i, raw_j = sum_ii - sum_i * sum_i / mass, sum_jj - sum_j * sum_j / mass
    raw_c = sums(i * j) + p * q * outside - sum_i * sum_j / mass
    flat_i, flat_j = ~(raw_i > rounding * sum_ii), ~(raw_j > rounding * sum_jj)

    def variance(raw: jax.Array, flat: jax.Array) -> jax.Array:
        raised: jax.Array = jnp.where(flat | (raw < least), least, raw) + common
        return raised

    # A flat window's covariance is rounding; its derivative is not.
    covariance = raw_c + jax.lax.stop_gradient(jnp.where(flat_i | flat_j, -raw_c, 0)) + common
    product = variance(raw_i, flat_i) * variance(raw_j, flat_j) + attributes["smooth_product"]
    ncc = (covariance * covariance + attributes["smooth_nr"]) / product
    if attributes["both_flat"]:
        ncc = jnp.where(flat_i & flat_j, attributes["both_flat"][0], ncc)
    mask = values.get("mask")
    if mask is None:
        return _reduced(-ncc, attributes["reduction"])
    weighted = -mask * ncc
    if attributes["reduction"] != "mean":
        return _reduced(weighted, attributes["reduction"])
    total = jnp.broadcast_to(mask, weighted.shape).sum()
    mean: jax.Array = jnp.where(total > 0, weighted.sum() / jnp.where(total > 0, total, 1), 0)
    return mean


def _parzen_weights(
    image: jax.Array, low: jax.Array, high: jax.Array, attributes: Mapping[str, Any]
) -> jax.Array:
    """How each sample is spread over the bins: ``(N, C, samples, bins)``. The range is constant."""
    bins = attributes["num_bins"]
    extent = high - low
    scale = jnp.where(extent > 0, 1 / jnp.where(extent > 0, extent, 1), 0)
    inside = (image >= low) & (image <= high)
    clamped = jnp.where(inside, image, jax.lax.stop_gradient(jnp.clip(image, low, high)))
    place = (clamped - low) * scale * bins - 0.5
    distance = place[..., None] - np.arange(bins, dtype=image.dtype)
    if attributes["kernel"] == "gaussian":
        width = attributes["sigma_ratio"] / 2
        return jax.nn.softmax(-0.5 * (distance / width) ** 2, axis=-1)
    t = jnp.abs(distance)
    tail = jnp.maximum(2 - t, 0) ** 3 / 6
    spline = jnp.where(t < 1, 2 / 3 - t**2 + t**3 / 2, tail)
    weights: jax.Array = spline / spline.sum(-1, keepdims=True)
    return weights


def _entropy(p: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    return -jnp.sum(p * jnp.log(jnp.where(p > 0, p, 1)), axes)


_LEAST_ENTROPY = 1e-10


def _mutual_information_loss(call: Call, values: Values) -> jax.Array:
    attributes = call.attributes
    samples = [values[x].reshape(*values[x].shape[:2], -1) for x in ("pred", "target")]
    scaling = values["scaling"][..., None]  # (N, C, 6, 1): the ranges, and more
    weights = jnp.ones((1, 1, 1), samples[0].dtype)
    if "mask" in values:
        mask = values["mask"]
        weights = mask.reshape(*mask.shape[:2], -1)
        lows = (scaling[:, :, 0], scaling[:, :, 2])
        samples = [jnp.where(weights == 0, x, y) for x, y in zip(lows, samples, strict=True)]
    of_pred, of_target = (
        _parzen_weights(x, scaling[:, :, k], scaling[:, :, k + 1], attributes)
        for x, k in zip(samples, (0, 2), strict=True)
    )
    weights = jnp.broadcast_to(weights, (*weights.shape[:2], samples[0].shape[2]))
    total = weights.sum(-1, keepdims=True)
    share = weights * jnp.where(total > 0, 1 / jnp.where(total > 0, total, 1), 0)
    spread = jnp.swapaxes(of_pred * share[..., None], -1, -2)
    joint = jnp.matmul(spread, of_target, precision=jax.lax.Precision.HIGHEST)
    p_a, p_b = joint.sum(-1, keepdims=True), joint.sum(-2, keepdims=True)
    if attributes["normalised"]:
        both = _entropy(joint, (-1, -2))
        separate = _entropy(p_a, (-1, -2)) + _entropy(p_b, (-1, -2))
        told = both >= _LEAST_ENTROPY
        information = jnp.where(told, separate / jnp.where(told, both, 1), 1)
    else:
        divisor = attributes["smooth_dr"]
        ratio = (joint + attributes["smooth_nr"]) / (p_a * p_b + divisor)
        information = jnp.sum(joint * jnp.log(ratio + divisor), (-1, -2))
    return _reduced(-information, attributes["reduction"])


# --- Fields ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _EnergyGradient:
    """The gradient of a quadratic energy: a linear map of the field, and its own transpose."""

    call: Call

    def forward(self, residuals: Arrays, vectors: Arrays) -> Arrays:
        (field,) = vectors
        op = self.call.op
        if self.call.attributes["reduction"] == "none":
            ones = vary_alike((jnp.ones(field.shape[:1], field.dtype), field))[0]
            assert ones is not None
            return (
                self.call.gradients({"displacement": field}, ones, ("displacement",))[
                    "displacement"
                ],
            )
        ((_, place),) = op.unit_gradients
        wanted = 1 << op.result | 1 << place
        outputs = self.call.run({"displacement": field}, wanted)
        return (outputs[op.output_names[place]],)

    def transpose(self, residuals: Arrays, cotangents: Arrays) -> Arrays:
        return tuple(linear_map(self, residuals, cotangents, [jax.typeof(cotangents[0])]))


def _slopes(field: jax.Array, align_corners: bool) -> list[list[jax.Array]]:
    """``du_k / da`` in voxels, by component and axis; as `jacobian_determinant` has them."""
    dim = field.shape[-1]
    halves = _half_extents(field.shape[-2:0:-1], align_corners)

    def slope(x: jax.Array, axis: int) -> jax.Array:
        if x.shape[axis] == 1:
            return jnp.zeros_like(x)
        lines = jnp.moveaxis(x, axis, 0)
        middle = (lines[2:] - lines[:-2]) / 2
        ends = lines[1:2] - lines[:1], lines[-1:] - lines[-2:-1]
        return jnp.moveaxis(jnp.concatenate([ends[0], middle, ends[1]]), 0, axis)

    return [
        [slope(field[..., k] * halves[k], dim - along) for along in range(dim)] for k in range(dim)
    ]


def _determinant(field: jax.Array, align_corners: bool) -> jax.Array:
    m = _slopes(field, align_corners)
    for k, row in enumerate(m):
        row[k] = row[k] + 1
    if len(m) == 2:
        return m[0][0] * m[1][1] - m[0][1] * m[1][0]
    cofactors = (
        m[1][(k + 1) % 3] * m[2][(k + 2) % 3] - m[1][(k + 2) % 3] * m[2][(k + 1) % 3]
        for k in range(3)
    )
    return sum(
        (m[0][k] * cofactor for k, cofactor in enumerate(cofactors)), jnp.zeros_like(m[0][0])
    )


def _jacobian_determinant(call: Call, values: Values) -> jax.Array:
    return _determinant(values["displacement"], call.attributes["align_corners"])


_LEAST_DETERMINANT = 0.05


def _field_energy(call: Call, values: Values) -> jax.Array:
    attributes, field = call.attributes, values["displacement"]
    axes = tuple(range(1, field.ndim))
    if attributes["kind"] != "jacobian":
        (gradient,) = linear_map(_EnergyGradient(call), [], [field], [jax.typeof(field)])
        energies = jnp.sum(field * gradient, axes) / 2
        return energies if attributes["reduction"] == "none" else energies.sum()
    determinant = _determinant(field, attributes["align_corners"])
    least = _LEAST_DETERMINANT
    tangent = math.log(least) ** 2 + 2 * math.log(least) / least * (determinant - least)
    logarithm = jnp.log(jnp.maximum(determinant, least))
    energies = jnp.where(determinant < least, tangent, logarithm**2)
    means = attributes["weight"] * energies.mean(axes[:-1])
    return _reduced(means, attributes["reduction"])


DEFINITIONS: dict[str, Definition] = {
    "interpolate": _interpolate,
    "compose": _compose,
    "lncc_loss": _lncc_loss,
    "mutual_information_loss": _mutual_information_loss,
    "field_energy": _field_energy,
    "jacobian_determinant": _jacobian_determinant,
}
