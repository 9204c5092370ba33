"""The ops' maths, in steps that a framework can differentiate as often as it likes.

Forward mode and derivatives of derivatives go by these, where they are not calls of ops themselves:
values and gradients never do. So what is here is exact, and as fast as it comes: it takes several
times as long as the op, and memory for what is in between.

It is written once, for any framework, over what `Framework` says that one has to have, and what the
arrays of all of them can do: arithmetic, comparisons, slices, `shape`, `reshape`, `sum`, `mean`.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from regkernels.table import Op

Array = Any  # of a framework
Values = Mapping[str, Array]
Sizes = tuple[int, ...]  # of spatial axes, in x, y, z order


@dataclass(frozen=True)
class Framework:
    """What definitions need of a framework. Most functions are NumPy's of the same name.

    Parameters
    ----------
    constant
        Of numbers and an array: the numbers in its dtype, or bool, and on its device.
    fixed
        What does not vary with what it is computed from, for any derivative.
    converted
        An array in the dtype of another one.
    widened
        An array of half precision as float32.
    epsilon
        From 1 to the next number of an array's dtype.
    where, floor, abs, log, clip, broadcast_to, moveaxis
        Of arrays, and of numbers where NumPy's take these.
    stack, concatenate
        Along the axis that is their second argument.
    matmul
        As exact as the dtype.
    softmax
        Exponentials over their sum, along the last axis.
    sample
        :meth:`Sampler.sample` of a sampler, with all derivatives that follow from its slopes.
    self_adjoint
        Of a hashable linear function that is its own transpose, and an array: the function of it.
    """

    constant: Callable[[Any, Array], Array]
    fixed: Callable[[Array], Array]
    converted: Callable[[Array, Array], Array]
    widened: Callable[[Array], Array]
    epsilon: Callable[[Array], float]
    where: Callable[[Array, Any, Any], Array]
    floor: Callable[[Array], Array]
    abs: Callable[[Array], Array]
    log: Callable[[Array], Array]
    clip: Callable[[Array, Array, Array], Array]
    broadcast_to: Callable[[Array, tuple[int, ...]], Array]
    moveaxis: Callable[[Array, int, int], Array]
    stack: Callable[[Sequence[Array], int], Array]
    concatenate: Callable[[Sequence[Array], int], Array]
    matmul: Callable[[Array, Array], Array]
    softmax: Callable[[Array], Array]
    sample: Callable[[Sampler, Array, Array], Array]
    self_adjoint: Callable[[Callable[[Array], Array], Array], Array]


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
    def framework(self) -> Framework:
        """Whose arrays the operands are."""
        ...

    def run(self, operands: Values, wanted: int) -> dict[str, Array]:
        """Run the op on operands by name: the outputs of a bit mask."""
        ...

    def gradients(
        self, values: Values, cotangent: Array, names: Collection[str]
    ) -> dict[str, Array]:
        """Run its gradient op, on what that takes of some values: gradients of inputs by name."""
        ...

    def of(self, op: str, attributes: Mapping[str, Any]) -> Call:
        """Return a call of another op."""
        ...


Definition = Callable[[Any, Values], Array]
"""The result of a call's op, in steps that a framework can differentiate as often as it likes."""

LINEAR = frozenset(
    {
        "affine_warp",
        "scale_velocity",
        "gaussian_smooth",
        "convert_displacement",
        "spline_coefficients",
    }
)
"""The ops that are linear in all operands together: no derivative of theirs needs a definition."""


def result_of(call: Call, operands: Values) -> Array:
    """Run the op for its result alone."""
    op = call.op
    return call.run(operands, 1 << op.result)[op.output_names[op.result]]


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


@dataclass(frozen=True)
class Sampler:
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
        """Of the image, in x, y, z order."""
        return self.shape[:1:-1]

    @property
    def axes(self) -> list[int]:
        """Those along which samples have a slope."""
        if self.call.attributes["mode"] == "nearest":
            return []
        return [axis for axis, half in enumerate(self._half_extents()) if half > 0]

    def _half_extents(self) -> list[float]:
        return _half_extents(self.sizes, self.call.attributes["align_corners"])

    def coordinates(self, position: Array) -> Array:
        """Positions, normalised."""
        constant = self.call.framework.constant
        centre = [(size - 1) / 2 for size in self.sizes]
        inverse = [1 / half if half else 0.0 for half in self._half_extents()]
        return (position - constant(centre, position)) * constant(inverse, position)

    def nodes(self, position: Array, axis: int) -> list[tuple[Any, Array]]:
        """Weights and positions of the samples that the slope along an axis is the sum of.

        Along it, the positions are constants.
        """
        framework = self.call.framework
        where = framework.where
        lower = framework.fixed(framework.floor(position))
        along = framework.constant(np.arange(position.shape[-1]) == axis, position)
        if self.call.attributes["mode"] == "bilinear":
            return [(1, where(along, lower + 1, position)), (-1, where(along, lower, position))]
        here, below = position[:, None, ..., axis], lower[:, None, ..., axis]
        # Nothing varies where a position is not finite.
        finite = here - here == 0
        t = where(finite, here, 0) - where(finite, below, 0)
        nodes: list[tuple[Any, Array]] = []
        for place, (a, b, c) in zip(_NODES.tolist(), _NODE_SLOPES.T.tolist(), strict=True):
            weight = where(finite, a + t * (b + t * c), 0)
            nodes.append((weight, where(along, lower + place, position)))
        return nodes

    def sample(self, image: Array, position: Array) -> Array:
        """The samples, ``(N, C, *out)``."""
        return result_of(self.call, {"image": image, "grid": self.coordinates(position)})

    def spread(self, values: Array, position: Array) -> Array:
        """The transpose of :meth:`sample`, an image."""
        image = self.call.framework.constant(np.zeros(self.shape), values)
        inputs = {"image": image, "grid": self.coordinates(position)}
        return self.call.gradients(inputs, values, ("image",))["image"]

    def slope(
        self, sample: Callable[[Array, Array], Array], image: Array, position: Array, axis: int
    ) -> Array:
        """The derivative of samples by their position along an axis; ``sample`` is for a method."""
        parts = [weight * sample(image, at) for weight, at in self.nodes(position, axis)]
        return functools.reduce(operator.add, parts)

    def spread_slope(
        self, spread: Callable[[Array, Array], Array], values: Array, position: Array, axis: int
    ) -> Array:
        """The transpose of :meth:`slope`, with ``spread`` for a method: an image."""
        parts = [spread(weight * values, at) for weight, at in self.nodes(position, axis)]
        return functools.reduce(operator.add, parts)


def _packed_field(call: Call, field: Array) -> Array:
    """The field with its components last, in x, y, z order, normalised."""
    framework, attributes = call.framework, call.attributes
    if attributes.get("grid_channels") == "first":
        field = framework.moveaxis(field, 1, -1)
    if attributes.get("grid_components") == "zyx":
        field = framework.stack([field[..., k] for k in reversed(range(field.shape[-1]))], -1)
    if attributes.get("grid_unit") == "voxel":
        align, sizes = attributes["align_corners"], field.shape[-2:0:-1]
        halves = _half_extents(tuple(max(n, 2) if align else n for n in sizes), align)
        field = field * framework.constant([1 / half for half in halves], field)
    return field


def _positions(
    call: Call,
    in_sizes: Sizes,
    out_sizes: Sizes,
    affine: Array | None,
    field: Array | None,
    like: Array,
) -> Array:
    """Where samples are taken, in voxels: ``(N, *out, D)``, in the dtype of another array.

    Rounded as in the kernels, as far as a position may be a whole number: it decides which cell a
    sample lies in.
    """
    framework, attributes = call.framework, call.attributes

    def constant(numbers: Any) -> Array:
        return framework.constant(numbers, like)

    align = attributes["align_corners"]
    half_in, half_out = _half_extents(in_sizes, align), _half_extents(out_sizes, align)
    centre = [(size - 1) / 2 for size in in_sizes]
    axes = range(len(in_sizes))
    if field is not None and not attributes.get("is_displacement", True):
        position = constant(centre) + constant(half_in) * field
    else:
        columns = [np.arange(n) - (n - 1) / 2 for n in out_sizes]
        source = [constant(x.reshape(1, *x.shape, *[1] * k)) for k, x in enumerate(columns)]
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
                part = centre[j] + ratio * source[j]
            else:
                row = affine[(slice(None), j, *[None] * len(axes))]
                part = centre[j] + half_in[j] * row[..., -1]
                for k in axes:
                    scale = half_in[j] / half_out[k] if half_out[k] else 0.0
                    part = part + row[..., k] * scale * source[k]
            if field is not None and not affine_last:
                part = part + half_in[j] * field[..., j]
            parts.append(part)
        shapes = [part.shape[0] for part in parts]
        shape = (max(shapes, key=lambda n: n != 1), *out_sizes[::-1])
        position = framework.stack([framework.broadcast_to(part, shape) for part in parts], -1)
    has_extent = constant(np.asarray(half_in) > 0)
    return framework.where(has_extent, position, constant(centre))


def _sampled(
    call: Call,
    image: Array,
    affine: Array | None,
    field: Array | None,
    out_sizes: Sizes,
    sampling: Mapping[str, Any],
) -> Array:
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
    framework = call.framework
    fields = [x for x in (affine, field) if x is not None]
    like = fields[0] if fields else framework.widened(image)
    position = _positions(call, image.shape[:1:-1], out_sizes, affine, field, like)
    sampler = Sampler(call.of("interpolate", attributes), tuple(image.shape))
    samples = framework.sample(sampler, framework.converted(image, like), position)
    return framework.converted(samples, image)


def _interpolate(call: Call, values: Values) -> Array:
    attributes, image = call.attributes, values["image"]
    grid = values.get("grid")
    field = None if grid is None else _packed_field(call, grid)
    rank = image.ndim - 2
    out_sizes = image.shape[:1:-1]
    if field is not None:
        out_sizes = field.shape[-2:0:-1]
    elif attributes["out_shape"]:
        out_sizes = tuple(attributes["out_shape"][-rank:][::-1])
    same = ("mode", "padding_mode", "align_corners", "deterministic")
    sampling = {x: attributes[x] for x in same}
    return _sampled(call, image, values.get("affine"), field, out_sizes, sampling)


def _compose(call: Call, values: Values) -> Array:
    attributes, u, v = call.attributes, values["u"], values["v"]
    same = ("mode", "padding_mode", "align_corners", "deterministic")
    sampling = {x: attributes[x] for x in same}
    image = call.framework.moveaxis(u, -1, 1)
    out_sizes = v.shape[-2:0:-1]
    sampled = _sampled(call, image, values.get("affine"), v, out_sizes, sampling)
    moved = call.framework.moveaxis(sampled, 1, -1)
    return v + moved if attributes["add"] else moved


# --- Losses ---------------------------------------------------------------------------------------


def _reduced(loss: Array, reduction: str) -> Array:
    if reduction == "none":
        return loss
    return loss.mean() if reduction == "mean" else loss.sum()


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


def _window_sums(
    framework: Framework, sizes: Sequence[int], weights: Sequence[np.ndarray]
) -> Callable[[Array], Array]:
    """Weighted sums over the window about every voxel of an image; there are zeros outside."""
    bands = []
    for size, along in zip(sizes, weights, strict=True):
        reach = len(along) // 2
        band = np.zeros((size, size))
        for offset, weight in enumerate(along, -reach):
            band += weight * np.eye(size, k=offset)
        bands.append(band)

    def sums(x: Array) -> Array:
        for axis, band in enumerate(bands, 2):
            lines = framework.moveaxis(x, axis, -1)
            lines = framework.matmul(lines, framework.constant(band, x))
            x = framework.moveaxis(lines, -1, axis)
        return x

    return sums


def _lncc_loss(call: Call, values: Values) -> Array:
    framework, attributes = call.framework, call.attributes
    images = (values["pred"], values["target"])
    where, fixed, sizes = framework.where, framework.fixed, images[0].shape[2:]
    widths = attributes["kernel_size"]
    widths = widths * len(sizes) if len(widths) == 1 else widths
    sigma = next(iter(attributes["sigma"]), None)
    weights = [_window(n, attributes["window"], sigma) for n in widths]
    sums = _window_sums(framework, sizes, weights)
    mass = math.prod(float(along.sum()) for along in weights)
    common = mass * attributes["common_variance"]
    least = attributes["smooth_dr"]
    rounding = 1.5 * max(widths) * framework.epsilon(images[0])

    # About the mean of each image, so that an offset costs no precision. The zeros outside are then
    # minus that, and weigh what is missing from a window.
    axes = tuple(range(2, images[0].ndim))
    pivots = [fixed(x.mean(axes, keepdims=True)) for x in images]
    outside = mass - sums(framework.constant(np.ones((1, 1, *sizes)), images[0]))
    i, j = (x - pivot for x, pivot in zip(images, pivots, strict=True))
    p, q = pivots
    sum_i, sum_j = sums(i) - p * outside, sums(j) - q * outside
    sum_ii, sum_jj = sums(i * i) + p * p * outside, sums(j * j) + q * q * outside
    raw_i, raw_j = sum_ii - sum_i * sum_i / mass, sum_jj - sum_j * sum_j / mass
    raw_c = sums(i * j) + p * q * outside - sum_i * sum_j / mass
    flat_i, flat_j = ~(raw_i > rounding * sum_ii), ~(raw_j > rounding * sum_jj)

    def variance(raw: Array, flat: Array) -> Array:
        return where(flat | (raw < least), least, raw) + common

    # A flat window's covariance is rounding; its derivative is not.
    covariance = raw_c + fixed(where(flat_i | flat_j, -raw_c, 0)) + common
    product = variance(raw_i, flat_i) * variance(raw_j, flat_j) + attributes["smooth_product"]
    ncc = (covariance * covariance + attributes["smooth_nr"]) / product
    if attributes["both_flat"]:
        ncc = where(flat_i & flat_j, attributes["both_flat"][0], ncc)
    mask = values.get("mask")
    if mask is None:
        return _reduced(-ncc, attributes["reduction"])
    weighted = -mask * ncc
    if attributes["reduction"] != "mean":
        return _reduced(weighted, attributes["reduction"])
    total = framework.broadcast_to(mask, weighted.shape).sum()
    return where(total > 0, weighted.sum() / where(total > 0, total, 1), 0)


def _parzen_weights(call: Call, image: Array, low: Array, high: Array) -> Array:
    """How each sample is spread over the bins: ``(N, C, samples, bins)``. The range is constant."""
    framework, attributes = call.framework, call.attributes
    bins, where = attributes["num_bins"], framework.where
    extent = high - low
    scale = where(extent > 0, 1 / where(extent > 0, extent, 1), 0)
    inside = (image >= low) & (image <= high)
    clamped = where(inside, image, framework.fixed(framework.clip(image, low, high)))
    place = (clamped - low) * scale * bins - 0.5
    distance = place[..., None] - framework.constant(np.arange(bins), image)
    if attributes["kernel"] == "gaussian":
        width = attributes["sigma_ratio"] / 2
        return framework.softmax(-0.5 * (distance / width) ** 2)
    t = framework.abs(distance)
    tail = where(t < 2, 2 - t, 0) ** 3 / 6
    spline = where(t < 1, 2 / 3 - t**2 + t**3 / 2, tail)
    return spline / spline.sum(-1, keepdims=True)


def _entropy(framework: Framework, p: Array) -> Array:
    """Of distributions over the last two axes."""
    return -(p * framework.log(framework.where(p > 0, p, 1))).sum((-1, -2))


_LEAST_ENTROPY = 1e-10


def _mutual_information_loss(call: Call, values: Values) -> Array:
    framework, attributes = call.framework, call.attributes
    where = framework.where
    samples = [values[x].reshape(*values[x].shape[:2], -1) for x in ("pred", "target")]
    scaling = values["scaling"][..., None]  # (N, C, 6, 1): the ranges, and more
    weights = framework.constant(np.ones((1, 1, 1)), samples[0])
    if "mask" in values:
        mask = values["mask"]
        weights = mask.reshape(*mask.shape[:2], -1)
        lows = (scaling[:, :, 0], scaling[:, :, 2])
        samples = [where(weights == 0, x, y) for x, y in zip(lows, samples, strict=True)]
    of_pred, of_target = (
        _parzen_weights(call, x, scaling[:, :, k], scaling[:, :, k + 1])
        for x, k in zip(samples, (0, 2), strict=True)
    )
    weights = framework.broadcast_to(weights, (*weights.shape[:2], samples[0].shape[2]))
    total = weights.sum(-1, keepdims=True)
    share = weights * where(total > 0, 1 / where(total > 0, total, 1), 0)
    spread = framework.moveaxis(of_pred * share[..., None], -1, -2)
    joint = framework.matmul(spread, of_target)
    p_a, p_b = joint.sum(-1, keepdims=True), joint.sum(-2, keepdims=True)
    if attributes["normalised"]:
        both = _entropy(framework, joint)
        separate = _entropy(framework, p_a) + _entropy(framework, p_b)
        told = both >= _LEAST_ENTROPY
        information = where(told, separate / where(told, both, 1), 1)
    else:
        divisor = attributes["smooth_dr"]
        ratio = (joint + attributes["smooth_nr"]) / (p_a * p_b + divisor)
        information = (joint * framework.log(ratio + divisor)).sum((-1, -2))
    return _reduced(-information, attributes["reduction"])


# --- Fields ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _EnergyGradient:
    """The gradient of a quadratic energy: a linear map of the field, and its own transpose."""

    call: Call

    def __call__(self, field: Array) -> Array:
        call, op = self.call, self.call.op
        if call.attributes["reduction"] == "none":
            ones = call.framework.constant(np.ones(field.shape[:1]), field)
            return call.gradients({"displacement": field}, ones, ("displacement",))["displacement"]
        ((_, place),) = op.unit_gradients
        outputs = call.run({"displacement": field}, 1 << op.result | 1 << place)
        return outputs[op.output_names[place]]


def _slopes(framework: Framework, field: Array, align_corners: bool) -> list[list[Array]]:
    """``du_k / da`` in voxels, by component and axis; as `jacobian_determinant` has them."""
    dim = field.shape[-1]
    halves = _half_extents(field.shape[-2:0:-1], align_corners)

    def slope(x: Array, axis: int) -> Array:
        if x.shape[axis] == 1:
            return 0 * x
        lines = framework.moveaxis(x, axis, 0)
        middle = (lines[2:] - lines[:-2]) / 2
        ends = lines[1:2] - lines[:1], lines[-1:] - lines[-2:-1]
        slopes = framework.concatenate([ends[0], middle, ends[1]], 0)
        return framework.moveaxis(slopes, 0, axis)

    return [
        [slope(field[..., k] * halves[k], dim - along) for along in range(dim)] for k in range(dim)
    ]


def _determinant(call: Call, field: Array) -> Array:
    m = _slopes(call.framework, field, call.attributes["align_corners"])
    for k, row in enumerate(m):
        row[k] = row[k] + 1
    if len(m) == 2:
        return m[0][0] * m[1][1] - m[0][1] * m[1][0]
    x, y, z = (
        m[1][(k + 1) % 3] * m[2][(k + 2) % 3] - m[1][(k + 2) % 3] * m[2][(k + 1) % 3]
        for k in range(3)
    )
    return m[0][0] * x + m[0][1] * y + m[0][2] * z


def _jacobian_determinant(call: Call, values: Values) -> Array:
    return _determinant(call, values["displacement"])


_LEAST_DETERMINANT = 0.05


def _field_energy(call: Call, values: Values) -> Array:
    framework, attributes, field = call.framework, call.attributes, values["displacement"]
    axes = tuple(range(1, len(field.shape)))
    if attributes["kind"] != "jacobian":
        gradient = framework.self_adjoint(_EnergyGradient(call), field)
        energies = (field * gradient).sum(axes) / 2
        return energies if attributes["reduction"] == "none" else energies.sum()
    determinant = _determinant(call, field)
    least = _LEAST_DETERMINANT
    is_less = determinant < least
    tangent = math.log(least) ** 2 + 2 * math.log(least) / least * (determinant - least)
    logarithm = framework.log(framework.where(is_less, least, determinant))
    energies = framework.where(is_less, tangent, logarithm**2)
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
