"""Calls of the extension on volumes that several devices hold together, a run of planes each.

Such a run is a slab: every device has as many planes, along the slowest of three spatial axes, and
the last may have some beyond the end of the volume, whose content is arbitrary. For each op that
can work on slabs there is a rule here: which planes a device asks its neighbours for, how the op is
called on what it then has, and what becomes of the results. The kernels go by a voxel's place in
the whole volume, so that they compute what they would on one device.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

import jax
import jax.numpy as jnp

MeshAxes = tuple[str, ...]
Arrays = dict[str, jax.Array]
RANK = 6
"""Of images and fields in 3-D, with the group axis."""
Role = Literal["planes", "sampled"]
SLAB_AXES: tuple[Role, Role] = ("planes", "sampled")
_ITEMS = 1
"""The axis of the items of a batch."""


@dataclass(frozen=True)
class Slabs:
    """How the planes of a volume are cut.

    Parameters
    ----------
    planes
        Those of the whole volume.
    axes
        Of the mesh, which the planes are spread over; none: every device has them all.
    devices
        Along these axes.
    """

    planes: int
    axes: MeshAxes = ()
    devices: int = 1

    @property
    def own(self) -> int:
        """The planes that each device has, those beyond the end of the volume included."""
        return -(-self.planes // self.devices)

    @property
    def is_padded(self) -> bool:
        """Whether some device has planes beyond the end of the volume."""
        return self.own * self.devices != self.planes

    def first(self) -> jax.Array:
        """The first plane of this device."""
        if not self.axes:
            return jnp.zeros((), jnp.int32)
        return jax.lax.axis_index(self.axes).astype(jnp.int32) * self.own

    def sum(self, x: jax.Array) -> jax.Array:
        """The sum over the devices."""
        total: jax.Array = jax.lax.psum(x, self.axes) if self.axes else x  # type: ignore[no-untyped-call]
        return total

    def moved(self, x: jax.Array, steps: int, *, round_trip: bool = False) -> jax.Array:
        """What the device so many steps before this one has; zeros where there is none."""
        pairs = [(i, i + steps) for i in range(self.devices)]
        pairs = [(i, to % self.devices) for i, to in pairs if round_trip or 0 <= to < self.devices]
        moved: jax.Array = jax.lax.ppermute(x, self.axes, pairs)  # type: ignore[no-untyped-call]
        return moved

    def inside(self, x: jax.Array, axis: int) -> jax.Array:
        """The array with zeros for planes beyond the end of the volume."""
        if not self.is_padded:
            return x
        plane = jnp.arange(self.own, dtype=jnp.int32) + self.first()
        trailing = tuple(range(1, x.ndim - axis))
        return jnp.where(jnp.expand_dims(plane < self.planes, trailing), x, jnp.zeros((), x.dtype))

    def with_halo(self, x: jax.Array, axis: int, before: int, after: int) -> jax.Array:
        """A slab with the planes before and after it, zeros where the volume has none."""
        x = self.inside(x, axis)
        if before == after and 0 < before <= self.own:
            first = _planes_of(x, 0, after, axis)
            last = _planes_of(x, self.own - before, self.own, axis)
            lower, upper = self.swapped({"x": last}, {"x": first})
            return jnp.concatenate([lower["x"], x, upper["x"]], axis)
        parts = [x]
        for hops, count in self._hops(before):
            own_last = _planes_of(x, self.own - count, self.own, axis)
            parts.insert(0, self.moved(own_last, hops))
        for hops, count in self._hops(after):
            own_first = _planes_of(x, 0, count, axis)
            parts.append(self.moved(own_first, -hops))
        return jnp.concatenate(parts, axis) if len(parts) > 1 else x

    def swapped(self, to_next: Arrays, to_previous: Arrays) -> tuple[Arrays, Arrays]:
        """What the devices before and after this one send here; zeros where there is none.

        ``to_next`` and ``to_previous`` are alike: what this device sends. Neighbours swap in pairs,
        all arrays of a dtype at once, since a message takes as long as many planes do: first the
        even devices with those after them, then with those before them.
        """
        is_even = jax.lax.axis_index(self.axes) % 2 == 0

        def swap(first: int, to_upper: jax.Array, to_lower: jax.Array) -> jax.Array:
            lower = range(first, self.devices - 1, 2)
            pairs = [pair for i in lower for pair in ((i, i + 1), (i + 1, i))]
            is_lower = is_even if first == 0 else ~is_even
            sent = jnp.where(is_lower, to_upper, to_lower)
            if not pairs:
                return jnp.zeros_like(sent)
            found: jax.Array = jax.lax.ppermute(sent, self.axes, pairs)  # type: ignore[no-untyped-call]
            return found

        before: Arrays = {}
        after: Arrays = {}
        for dtype in sorted({x.dtype.name for x in to_next.values()}):
            names = [name for name, x in to_next.items() if x.dtype.name == dtype]
            shapes = [to_next[name].shape for name in names]
            up, down = (
                jnp.concatenate([arrays[name].ravel() for name in names])
                for arrays in (to_next, to_previous)
            )
            of_even, of_odd = swap(0, up, down), swap(1, up, down)
            ends = [math.prod(shape) for shape in shapes]
            splits = [sum(ends[: i + 1]) for i in range(len(ends) - 1)]
            for found, flat in (
                (before, jnp.where(is_even, of_odd, of_even)),
                (after, jnp.where(is_even, of_even, of_odd)),
            ):
                parts = jnp.split(flat, splits)
                found |= {
                    name: part.reshape(shape)
                    for name, part, shape in zip(names, parts, shapes, strict=True)
                }
        return before, after

    def ends(
        self, arrays: Arrays, axes: Mapping[str, int], reach: int, inner: int
    ) -> dict[str, tuple[jax.Array, jax.Array]]:
        """The first and the last ``inner`` planes of slabs with those before and after them.

        ``axes``: that of the planes, for each array. ``reach`` planes of a neighbour are put to
        each; none has to have more of its own.
        """
        inside = {name: self.inside(x, axes[name]) for name, x in arrays.items()}

        def planes(begin: int, end: int) -> Arrays:
            return {name: _planes_of(x, begin, end, axes[name]) for name, x in inside.items()}

        before, after = self.swapped(planes(self.own - reach, self.own), planes(0, reach))
        first, last = planes(0, inner), planes(self.own - inner, self.own)
        return {
            name: (
                jnp.concatenate([before[name], first[name]], axis),
                jnp.concatenate([last[name], after[name]], axis),
            )
            for name, axis in ((name, axes[name]) for name in arrays)
        }

    def add_halo(self, x: jax.Array, axis: int, before: int, after: int) -> jax.Array:
        """The transpose of :meth:`with_halo`: what devices have for planes of others joins them."""
        own = _planes_of(x, before, before + self.own, axis)
        if before == after and 0 < before <= self.own:
            to_previous = _planes_of(x, 0, before, axis)
            to_next = _planes_of(x, before + self.own, x.shape[axis], axis)
            lower, upper = self.swapped({"x": to_next}, {"x": to_previous})
            own = _added(own, upper["x"], axis, self.own - before)
            return self.inside(_added(own, lower["x"], axis, 0), axis)
        end = before
        for hops, count in self._hops(before):
            part = _planes_of(x, end - count, end, axis)
            own = _added(own, self.moved(part, -hops), axis, self.own - count)
            end -= count
        begin = before + self.own
        for hops, count in self._hops(after):
            part = _planes_of(x, begin, begin + count, axis)
            own = _added(own, self.moved(part, hops), axis, 0)
            begin += count
        return self.inside(own, axis)

    def whole(self, x: jax.Array, axis: int) -> jax.Array:
        """All planes, of one slab after the other, on every device: they come round a ring."""
        x = self.inside(x, axis)
        here = jax.lax.axis_index(self.axes)
        shape = [n * self.devices if i == axis else n for i, n in enumerate(x.shape)]
        joined = jnp.zeros_like(x, shape=shape)
        for hops in range(self.devices):
            begin = (here - hops) % self.devices * self.own
            slab = self.moved(x, hops, round_trip=True) if hops else x
            joined = jax.lax.dynamic_update_slice_in_dim(joined, slab, begin, axis)
        return joined

    def with_edges(self, x: jax.Array, axis: int, reach: int) -> jax.Array:
        """A slab with the planes before and after it, the volume's first and last ones repeated."""
        halo = self.with_halo(x, axis, reach, reach)
        return jnp.take(halo, self._nearest(reach), axis, mode="clip")

    def add_edges(self, x: jax.Array, axis: int, reach: int) -> jax.Array:
        """The transpose of :meth:`with_edges`."""
        place = (*[slice(None)] * axis, self._nearest(reach))
        return self.add_halo(jnp.zeros_like(x).at[place].add(x, mode="drop"), axis, reach, reach)

    def _nearest(self, reach: int) -> jax.Array:
        """For each plane of a slab and its halo the nearest one of the volume, by its place there.

        On a device with nothing but padding it may lie outside.
        """
        begin = self.first() - reach
        plane = begin + jnp.arange(self.own + 2 * reach, dtype=jnp.int32)
        return jnp.clip(plane, 0, self.planes - 1) - begin

    def alone(self, x: jax.Array, axis: int, reach: int) -> jax.Array:
        """A slab with zeros for the planes of others, which are theirs to count."""
        widths = [(reach, reach) if i == axis else (0, 0) for i in range(x.ndim)]
        return jnp.pad(self.inside(x, axis), widths)

    def _hops(self, planes: int) -> list[tuple[int, int]]:
        """How many planes lie with the nearest neighbour, the next, and so on."""
        hops = range(1, -(-planes // self.own) + 1)
        return [(hop, min(self.own, planes - (hop - 1) * self.own)) for hop in hops]


def _planes_of(x: jax.Array, begin: int, end: int, axis: int) -> jax.Array:
    """Some planes of a slab."""
    if x.shape[0] == 1 and axis > 0:
        # XLA joins this slice with one that the slab is itself, as half of the fields of SyN, if
        # no group axis was put between them. Otherwise the slab would be copied for its planes.
        planes = jax.lax.slice_in_dim(jax.lax.squeeze(x, (0,)), begin, end, axis=axis - 1)
        return jax.lax.expand_dims(planes, (0,))
    return jax.lax.slice_in_dim(x, begin, end, axis=axis)


_T = TypeVar("_T")


def _arrived(arrays: _T) -> _T:
    """The same arrays, after all of them are there: no message is under way when a call begins.

    Some kernels take all of a GPU from their beginning to their end. Sending is a kernel, too, and
    one that comes second on either of two GPUs would hold up both for as long.
    """
    there: _T = jax.lax.optimization_barrier(arrays)  # type: ignore[no-untyped-call]
    return there


def _with_ends(x: jax.Array, first: jax.Array, last: jax.Array, axis: int) -> jax.Array:
    """A slab with other planes at its ends, which are written in its place."""
    if x.shape[0] == 1:
        # The group axis is dropped in the end. XLA would do that in the kernel that writes the
        # planes, and copy the slab for it.
        x, first, last = (jax.lax.squeeze(part, (0,)) for part in (x, first, last))
        return jax.lax.expand_dims(_with_ends_of_group(x, first, last, axis - 1), (0,))
    return _with_ends_of_group(x, first, last, axis)


def _with_ends_of_group(x: jax.Array, first: jax.Array, last: jax.Array, axis: int) -> jax.Array:
    begin = x.shape[axis] - last.shape[axis]
    x = jax.lax.dynamic_update_slice_in_dim(x, first, 0, axis)
    return jax.lax.dynamic_update_slice_in_dim(x, last, begin, axis)


def _added(x: jax.Array, part: jax.Array, axis: int, begin: int) -> jax.Array:
    # What is written must not be read in the same pass, or XLA makes a copy of the slab.
    there = _arrived(_planes_of(x, begin, begin + part.shape[axis], axis))
    return jax.lax.dynamic_update_slice_in_dim(x, there + part, begin, axis)


class Run(Protocol):
    """Runs a kernel on the arrays of this device, which go by their names with the group axis."""

    @property
    def results(self) -> frozenset[str]:
        """The results that are wanted of the call."""
        ...

    @property
    def overwrites(self) -> bool:
        """Whether a result may be written over an operand: see `overwriting`."""
        ...

    def __call__(
        self,
        arrays: Mapping[str, jax.Array],
        *,
        attributes: Mapping[str, Any] | None = None,
        slab: Sequence[int] = (),
        first: jax.Array | None = None,
        step: str | None = None,
        results: Collection[str] = ("output",),
    ) -> Arrays:
        """Run the op of the call, or the op ``step`` for some ``results``.

        ``attributes``: those that differ from the call's. ``slab`` and ``first``: what the kernel
        has to be told of slabs; see ``Slab`` in ``csrc/core/op.h``.
        """
        ...


@dataclass(frozen=True)
class Reach:
    """What is known beforehand of where samples lie, so that devices need not find out.

    Parameters
    ----------
    farthest
        How many planes from its own a sample lies at most, where the planes that are sampled are
        those of the samples.
    is_near
        Whether :func:`lie_near` holds.
    beside
        What is sampled has so many planes of the neighbours on either side, `planes_beside` or
        more, and is not differentiated with respect to; then ``is_near`` holds.
    """

    farthest: int | None = None
    is_near: bool = False
    beside: int = 0


UNKNOWN = Reach()
"""Nothing is known."""


@dataclass(frozen=True)
class Cut:
    """The volumes of a call: of what is sampled, if anything is, and of everything else."""

    planes: Slabs
    sampled: Slabs
    everywhere: MeshAxes  # axes of the mesh over which devices have to take the same path
    reach: Reach

    @property
    def farthest(self) -> int | None:
        """How many planes from its own a sample lies at most, if that is known and near."""
        farthest = self.reach.farthest
        is_near = farthest is not None and farthest <= _LEAST_NEAR
        return farthest if is_near and self.sampled == self.planes else None


Rule = Callable[[Run, Arrays, Mapping[str, Any], Cut], Arrays]


@dataclass(frozen=True)
class SlabOp:
    """How an op works on slabs.

    Parameters
    ----------
    axes
        For the call's attributes, the arrays with planes, by name: their role and the axis that the
        planes are on, with the group axis in front.
    rule
        The op on one device.
    reach
        For the call's attributes, how many planes the volume must have at least.
    is_led_by_result
        Whether a call may have no array with planes but its result. It is spread then as those are
        that go on with it.
    """

    axes: Callable[[Mapping[str, Any]], dict[str, tuple[Role, int]]]
    rule: Rule
    reach: Callable[[Mapping[str, Any]], int] = lambda _: 1
    is_led_by_result: bool = False


def _first_planes(sampled: jax.Array, planes: jax.Array) -> jax.Array:
    return jnp.stack([sampled.astype(jnp.int32), planes.astype(jnp.int32)])


# --- Sampling -------------------------------------------------------------------------------------

_LEAST_NEAR, _MOST_NEAR = 8, 16
"""Planes of a neighbour that samples mostly stay within."""


def planes_beside(own: int) -> int:
    """How many planes of a neighbour samples mostly stay within, beside a slab of so many.

    Of large slabs they take little time.
    """
    return max(_LEAST_NEAR, min(own // 16, _MOST_NEAR))


def _bits(x: jax.Array) -> jax.Array:
    if x.dtype == bool:
        return x
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}[x.dtype.itemsize]
    return jax.lax.bitcast_convert_type(x, unsigned)


def _either(a: jax.Array, b: jax.Array) -> jax.Array:
    """The bits of one of two arrays, of which at most one is not 0 in each place."""
    both = _bits(a) | _bits(b)
    return both if a.dtype == bool else jax.lax.bitcast_convert_type(both, a.dtype)


def _vectors(field: jax.Array, attributes: Mapping[str, Any]) -> jax.Array:
    """A field with its components first, in x, y, z order: (3, G, N, Z, Y, X)."""
    first = attributes.get("grid_channels") == "first"
    vectors = jnp.moveaxis(field, 2 if first else -1, 0)
    return vectors[::-1] if attributes.get("grid_components") == "zyx" else vectors


def _half_extent(size: int, align_corners: bool) -> float:
    return (size - 1 if align_corners else size) / 2


def _taps(attributes: Mapping[str, Any]) -> tuple[int, int]:
    """How many planes a sample takes before the one at or below it, and how many after it."""
    return (1, 2) if attributes.get("mode") in ("cubic", "b-spline") else (0, 1)


def _sampled_planes(
    arrays: Mapping[str, jax.Array],
    field: jax.Array | None,
    attributes: Mapping[str, Any],
    in_sizes: tuple[int, int, int],
    out_sizes: tuple[int, int, int],
    cut: Cut,
) -> tuple[jax.Array, jax.Array]:
    """From which plane, and up to which, each plane of this device is sampled.

    They are counted from the first of the device's slab; infinitely far if it is not known.
    ``in_sizes`` and ``out_sizes`` are of the whole volumes, in x, y, z order.
    """
    align = bool(attributes["align_corners"])
    affine = arrays.get("affine") if attributes.get("is_displacement", True) else None
    affine_last = bool(attributes.get("affine_last", False))
    own, planes = cut.planes.own, cut.planes
    half_in, half_out = (
        [_half_extent(size, align) for size in sizes] for sizes in (in_sizes, out_sizes)
    )
    vectors = None if field is None else _vectors(field, attributes)
    if vectors is not None and attributes.get("grid_unit") == "voxel":
        scale = [1 / max(_half_extent(max(n, 2) if align else n, align), 0.5) for n in out_sizes]
        vectors = vectors * jnp.asarray(scale, vectors.dtype).reshape(3, 1, 1, 1, 1, 1)

    def coordinate(axis: int) -> jax.Array:
        """Normalised, along the axis x, y or z: it varies along that axis alone."""
        count = own if axis == 2 else out_sizes[axis]
        index = jnp.arange(count, dtype=jnp.float32)
        if axis == 2:
            index = index + planes.first().astype(jnp.float32)
        x = (index - (out_sizes[axis] - 1) / 2) / max(half_out[axis], 0.5)
        return x.reshape(x.shape + (1,) * axis)

    if not attributes.get("is_displacement", True) and vectors is not None:
        z = vectors[2]
    elif affine is None:
        z = coordinate(2) if vectors is None else coordinate(2) + vectors[2]
    else:
        row = affine[:, :, 2, :, None, None, None]
        z = row[:, :, 3]
        for axis in range(3):
            x = coordinate(axis)
            if affine_last and vectors is not None:
                x = x + vectors[axis]
            z = z + row[:, :, axis] * x
        if vectors is not None and not affine_last:
            z = z + vectors[2]
    position = (in_sizes[2] - 1) / 2 + half_in[2] * z
    last = in_sizes[2] - 1
    if attributes["padding_mode"] == "reflection":
        outside = (position < 0) | (position > last)
        position = jnp.where(outside, jnp.inf, position)
    else:
        position = jnp.clip(position, 0, last)
    if planes.is_padded:
        plane = (jnp.arange(own, dtype=jnp.int32) + planes.first())[:, None, None]
        middle = (cut.sampled.first() + 0.0).astype(position.dtype)
        position = jnp.where(plane < planes.planes, position, middle)
    position = position - cut.sampled.first().astype(position.dtype)
    others = tuple(i for i in range(position.ndim) if i != position.ndim - 3)
    lowest, highest = jnp.min(position, others), jnp.max(position, others)
    # A plane more on either side makes up for rounding. What is not a number is so of both.
    before, after = _taps(attributes)
    unknown = jnp.isnan(lowest)
    lowest = jnp.where(unknown, -jnp.inf, lowest - 1 - before)
    return lowest, jnp.where(unknown, jnp.inf, highest + 1 + after)


def _sampling(
    sampled: str, field: str, run: Run, arrays: Arrays, attributes: Mapping[str, Any], cut: Cut
) -> Arrays:
    """The rule of what samples ``sampled`` where ``field`` and an affine say."""
    is_image = sampled != "u"
    axis = 3 if is_image else 2
    shape = arrays[sampled].shape
    in_plane = shape[axis + 1 : axis + 3]
    vectors = arrays.get(field)
    if vectors is not None:
        field_axis = 3 if attributes.get("grid_channels") == "first" else 2
        out_plane = vectors.shape[field_axis + 1 : field_axis + 3]
        arrays = arrays | {field: cut.planes.inside(vectors, field_axis)}
    else:
        out_plane = tuple(attributes["out_shape"][-2:]) or in_plane
    changed: dict[str, Any] = {}
    if is_image:
        changed["out_shape"] = (cut.planes.own, *out_plane)
    if "grad_output" in arrays:
        cotangent = cut.planes.inside(arrays["grad_output"], axis)
        arrays = arrays | {"grad_output": cotangent}
    gradient = f"grad_{sampled}"
    own, whole = cut.sampled.own, cut.sampled.planes
    begin, first = cut.sampled.first(), cut.planes.first()

    def finished(results: Arrays) -> Arrays:
        if "grad_affine" in results:
            results["grad_affine"] = cut.planes.sum(results["grad_affine"])
        return results

    def visit(
        window: jax.Array, at: jax.Array, answering: int, others: Mapping[str, Any]
    ) -> Arrays:
        return run(
            arrays | {sampled: window},
            attributes=others,
            slab=(whole, cut.planes.planes, answering),
            first=_first_planes(at, first),
        )

    if not cut.sampled.axes:
        results = visit(arrays[sampled], begin, whole, changed)
        if gradient in results:
            results[gradient] = cut.planes.sum(results[gradient])
        return finished(results)

    def from_window(halo: int) -> Arrays:
        window = cut.sampled.with_halo(arrays[sampled], axis, halo, halo)
        results = visit(window, begin - halo, own + 2 * halo, changed)
        if gradient in results:
            results[gradient] = cut.sampled.add_halo(results[gradient], axis, halo, halo)
        return results

    if cut.reach.beside:
        results = visit(arrays[sampled], begin - cut.reach.beside, shape[axis], changed)
        if gradient in results:
            raise NotImplementedError(f"{sampled}: no gradient with planes of neighbours beside it")
        return finished(results)

    def around_the_ring() -> Arrays:
        """Every slab visits every device, which answers for the samples that lie in it."""
        # What is added to the samples is added once, at the end.
        added = attributes.get("add", False)
        others = changed | ({"add": False} if added else {})
        background = attributes.get("background", 0)

        def counted(results: Arrays) -> Arrays:
            if background and "output" in results:
                results["output"] = results["output"] ^ jnp.asarray(
                    background, results["output"].dtype
                )
            return results

        def apart(results: Arrays) -> tuple[jax.Array | None, Arrays]:
            grad = results.pop(gradient, None)
            if grad is not None and grad.dtype.itemsize == 2:
                grad = grad.astype(jnp.float32)
            return grad, counted(results)

        before, after = _taps(attributes)
        window = cut.sampled.with_halo(arrays[sampled], axis, before, after)
        at = begin - before
        dtype = window.dtype
        grad, results = apart(visit(window, at, own, others))

        def step(_: Any, state: Any) -> Any:
            window, at, grad, results = state
            window, at, grad = jax.tree.map(
                lambda x: cut.sampled.moved(x, 1, round_trip=True), (window, at, grad)
            )
            more, joining = apart(visit(window, at, own, others))
            grad = None if grad is None else grad + more
            results = {
                name: value + joining[name]
                if name == "grad_affine"
                else _either(value, joining[name])
                for name, value in results.items()
            }
            return window, at, grad, results

        state = (window, at, grad, results)
        _, _, grad, results = jax.lax.fori_loop(0, cut.sampled.devices - 1, step, state)
        if grad is not None:
            home = cut.sampled.moved(grad, 1, round_trip=True)
            results[gradient] = cut.sampled.add_halo(home, axis, before, after).astype(dtype)
        results = counted(results)
        if added and vectors is not None and "output" in results:
            results["output"] = results["output"] + vectors
        if added and "grad_v" in results:
            results["grad_v"] = results["grad_v"] + arrays["grad_output"]
        return results

    known, (before, after) = cut.farthest, _taps(attributes)
    # A sample that rounding takes to a plane before its own has its first tap there.
    near = planes_beside(own) if known is None else known + max(before + 1, after)
    inner = min(3 * near, own)

    def by_ends() -> Arrays:
        """The slab is sampled as it is, and for its first and last planes with a halo."""
        ends = cut.sampled.ends({sampled: arrays[sampled]}, {sampled: axis}, near, inner)[sampled]
        out_own = cut.planes.own
        first_planes = (0, out_own - near)
        inside = arrays
        field_parts: list[Arrays] = [{}, {}]
        if vectors is not None:
            field_parts = [
                {field: _planes_of(arrays[field], plane, plane + near, field_axis)}
                for plane in first_planes
            ]
            if run.overwrites:  # once they have been cut off, nobody needs the field any more
                inside, field_parts = _arrived((arrays, field_parts))
        parts = []
        for window, at, plane, of_field in zip(
            ends, (-near, own - inner), first_planes, field_parts, strict=True
        ):
            part = arrays | {sampled: window} | of_field
            parts.append(
                run(
                    part,
                    attributes={"out_shape": (near, *out_plane)} if is_image else {},
                    slab=(whole, cut.planes.planes, window.shape[axis]),
                    first=_first_planes(begin + at, first + plane),
                )
            )
        results = run(
            inside,
            attributes=changed,
            slab=(whole, cut.planes.planes, own),
            first=_first_planes(begin, first),
        )
        return {
            name: _with_ends(x, parts[0][name], parts[1][name], axis) for name, x in results.items()
        }

    has_ends = "grad_output" not in arrays and min(own, cut.planes.own) >= 2 * near
    if known is not None:
        return finished(by_ends() if has_ends else from_window(near))
    if cut.reach.is_near and has_ends:
        return finished(by_ends())
    in_sizes = (in_plane[1], in_plane[0], whole)
    out_sizes = (out_plane[1], out_plane[0], cut.planes.planes)
    planes = _sampled_planes(arrays, arrays.get(field), attributes, in_sizes, out_sizes, cut)
    farthest = jnp.maximum(-jnp.min(planes[0]), jnp.max(planes[1]) - own)
    farthest = jax.lax.pmax(farthest, cut.everywhere)  # type: ignore[no-untyped-call]
    reaches, tier = _tiers(farthest, cut.sampled)
    branches: list[Callable[[], Arrays]] = [
        functools.partial(from_window, reach) for reach in reaches
    ]
    if has_ends:
        stray = _strays(planes, near, inner, own)
        stray = jax.lax.pmax(stray, cut.everywhere)  # type: ignore[no-untyped-call]
        branches.insert(0, by_ends)
        tier = jnp.where(stray == 0, 0, 1 + tier)
    return finished(jax.lax.switch(tier, [*branches, around_the_ring]))


def _strays(planes: tuple[jax.Array, jax.Array], near: int, inner: int, own: int) -> jax.Array:
    """Whether samples of a device's first, last or other planes lie where those may not: 1, or 0.

    The first ``near`` planes may be sampled that far before the slab and in the first ``inner``
    planes of it, the last likewise, and all others within the slab.
    """
    lowest, highest = planes
    least, greatest = _allowed(jnp.arange(lowest.size), lowest.size, near, inner, own)
    fits = (lowest >= least) & (highest <= greatest)
    return (~fits).any().astype(jnp.int32)


def _allowed(
    plane: jax.Array, planes: int, near: int, inner: int, own: int
) -> tuple[jax.Array, jax.Array]:
    """Between which planes of a slab that is sampled those of a device may be: see `_strays`."""
    is_first, is_last = plane < near, plane >= planes - near
    least = jnp.where(is_first, -near, jnp.where(is_last, own - inner, 0))
    return least, jnp.where(is_first, inner, jnp.where(is_last, own + near, own))


def lie_near(
    affine: jax.Array | None,
    longest: jax.Array,
    in_shape: Sequence[int],
    out_shape: Sequence[int],
    devices: int,
) -> jax.Array:
    """Whether samples of an image lie where devices that share its planes have them at hand.

    Parameters
    ----------
    affine
        ``(1, 3, 4)``, as that of `jaxreg.interpolate`, which comes last; `None`: the identity.
    longest
        How long the displacement before it is at most along x, y and z, in normalised coordinates,
        ``(3,)``.
    in_shape, out_shape
        ``(Z, Y, X)`` of the image and of the samples.
    devices
        That share the planes of both.

    Returns
    -------
    bool[]
        Whether `jaxreg._shared_planes.samples_near` may be promised of linear samples, the corners
        aligned, that are those of the border outside of the image.
    """
    own, out_own = (-(-shape[0] // devices) for shape in (in_shape, out_shape))
    near = planes_beside(own)
    if min(own, out_own) < 2 * near:
        return jnp.zeros((), bool)
    plane = jnp.arange(out_shape[0])
    z = (plane - (out_shape[0] - 1) / 2) / max((out_shape[0] - 1) / 2, 0.5)
    if affine is None:
        middle, beside = z, longest[2]
    else:
        row = affine[0, 2].astype(jnp.float32)
        middle = row[2] * z + row[3]
        # Of a plane, the corners are sampled farthest away.
        beside = jnp.abs(row[0]) + jnp.abs(row[1]) + (jnp.abs(row[:3]) * longest).sum()
    half = (in_shape[0] - 1) / 2
    at = [jnp.clip(half * (middle + sign * beside + 1), 0, in_shape[0] - 1) for sign in (-1, 1)]
    first = plane // out_own * own
    least, greatest = _allowed(plane % out_own, out_own, near, min(3 * near, own), own)
    # A plane more on either side makes up for rounding; the upper tap is another one away.
    fits = (at[0] - 1 - first >= least) & (at[1] + 2 - first <= greatest)
    return fits.all()


def _tiers(farthest: jax.Array, slabs: Slabs) -> tuple[list[int], jax.Array]:
    """Halos that are tried, and how many of them do not reach as far as samples do."""
    near, wide = min(planes_beside(slabs.own), slabs.own), slabs.own // 2
    reaches = [near] if wide <= near else [near, wide]
    too_short = [(farthest > reach).astype(jnp.int32) for reach in reaches]
    return reaches, jnp.stack(too_short).sum()


def _inverse(run: Run, arrays: Arrays, attributes: Mapping[str, Any], cut: Cut) -> Arrays:
    """The rule of `invert_displacement`: no root is farther away than the longest displacement."""
    slabs, field = cut.planes, arrays["displacement"]
    first = slabs.first()
    along = slabs.inside(field, 2)[..., 2] * _half_extent(slabs.planes, attributes["align_corners"])
    longest = jnp.max(jnp.where(jnp.isnan(along), jnp.inf, jnp.abs(along))) + 2
    arrays = {"initial": jnp.zeros_like(field)} | arrays

    def from_window(halo: int, arrays: Arrays) -> Arrays:
        return run(
            arrays | {"displacement": slabs.with_halo(arrays["displacement"], 2, halo, halo)},
            slab=(slabs.planes, slabs.planes, slabs.own + 2 * halo),
            first=_first_planes(first - halo, first),
        )

    def from_whole(arrays: Arrays) -> Arrays:
        return run(
            arrays | {"displacement": slabs.whole(arrays["displacement"], 2)},
            slab=(slabs.planes, slabs.planes, slabs.own * slabs.devices),
            first=_first_planes(jnp.zeros((), jnp.int32), first),
        )

    def one_by_one(invert: Callable[[Arrays], Arrays]) -> Arrays:
        # So that no device needs as many planes of more than one item at a time.
        items = field.shape[_ITEMS]
        if items == 1:
            return invert(arrays)
        alone = {
            name: x.swapaxes(0, _ITEMS)[:, :, None]
            for name, x in arrays.items()
            if x.shape[_ITEMS] == items
        }
        shared = {name: x for name, x in arrays.items() if name not in alone}

        def of(item: Arrays) -> Arrays:
            return invert(shared | item)

        found = jax.lax.map(of, alone)
        return {name: x[:, :, 0].swapaxes(0, _ITEMS) for name, x in found.items()}

    farthest = jax.lax.pmax(longest, cut.everywhere)  # type: ignore[no-untyped-call]
    reaches, tier = _tiers(farthest, slabs)
    # A displacement across half a slab is seldom, and each device then needs most of the field.
    nearby, *wide = reaches
    far: list[Callable[[Arrays], Arrays]] = [functools.partial(from_window, x) for x in wide]
    far.append(from_whole)
    branches: list[Callable[[], Arrays]] = [
        functools.partial(from_window, nearby, arrays),
        *(functools.partial(one_by_one, invert) for invert in far),
    ]
    found: Arrays = jax.lax.switch(tier, branches)
    return found


def _sampling_op(sampled: str, field: str) -> SlabOp:
    axis = 2 if sampled == "u" else 3

    def axes(attributes: Mapping[str, Any]) -> dict[str, tuple[Role, int]]:
        of_field = 3 if attributes.get("grid_channels") == "first" else 2
        return {
            sampled: ("sampled", axis),
            f"grad_{sampled}": ("sampled", axis),
            field: ("planes", of_field),
            f"grad_{field}": ("planes", of_field),
            **dict.fromkeys(("output", "weight", "grad_output"), ("planes", axis)),
        }

    def rule(run: Run, arrays: Arrays, attributes: Mapping[str, Any], cut: Cut) -> Arrays:
        return _sampling(sampled, field, run, arrays, attributes, cut)

    return SlabOp(axes, rule)


# --- Voxel by voxel -------------------------------------------------------------------------------


def _affine_warp(run: Run, arrays: Arrays, _: Mapping[str, Any], cut: Cut) -> Arrays:
    slabs = cut.planes
    if "grad_output" in arrays:
        arrays = arrays | {"grad_output": slabs.inside(arrays["grad_output"], 2)}
    first = slabs.first()
    slab = (slabs.planes, slabs.planes, 0)
    results = run(arrays, slab=slab, first=_first_planes(first, first))
    if "grad_affine" in results:
        results["grad_affine"] = slabs.sum(results["grad_affine"])
    return results


def _coverage(run: Run, arrays: Arrays, attributes: Mapping[str, Any], cut: Cut) -> Arrays:
    displacement = arrays.get("displacement")
    in_plane = tuple(attributes["out_shape"] or attributes["source_shape"])[-2:]
    if displacement is not None:
        in_plane = displacement.shape[3:5]
    return run(arrays, attributes={"out_shape": (cut.planes.own, *in_plane)}, **_place(cut.planes))


def _scaled(run: Run, arrays: Arrays, _: Mapping[str, Any], cut: Cut) -> Arrays:
    planes = cut.planes.planes
    return run(arrays, slab=(planes, planes, 0), first=jnp.zeros((2,), jnp.int32))


def _voxel_by_voxel(run: Run, arrays: Arrays, _: Mapping[str, Any], cut: Cut) -> Arrays:
    return run(arrays)


def _place(slabs: Slabs, begin: int = 0) -> dict[str, Any]:
    """What a kernel is told that computes planes from ``begin`` on, of a slab."""
    first = slabs.first() + begin
    return {"slab": (slabs.planes, slabs.planes, 0), "first": _first_planes(first, first)}


_FUSED_RADIUS = {"float32": 12, "float64": 8}
"""As far as a Gaussian reaches that one kernel smooths with: see ``kFusedRadius``."""


def _adam_moments(run: Run, arrays: Arrays, attributes: Mapping[str, Any], cut: Cut) -> Arrays:
    """The moments of a slab, and as ``output`` the longest vector of its own."""
    slabs, own, gradient = cut.planes, cut.planes.own, arrays["gradient"]
    names = ("output", "next_mu", "next_nu")

    def moments(arrays: Arrays, begin: int = 0, uncounted: int = 0, **changed: Any) -> Arrays:
        attributes = {"sigma": (0.0,), "uncounted": uncounted, **changed}
        place = _place(slabs, begin)
        return run(arrays, step="adam_moments", attributes=attributes, results=names, **place)

    def smooth(arrays: Arrays) -> Arrays:
        return run(arrays, step="gaussian_smooth", attributes={"channel_last": True})

    if not any(attributes["sigma"]):
        return moments(arrays)
    widest = math.ceil(attributes["truncate"] * max(attributes["sigma"]))
    reach = min(math.ceil(attributes["truncate"] * attributes["sigma"][0]), slabs.planes - 1)
    if widest > _FUSED_RADIUS[str(gradient.dtype)] or own < 2 * reach:
        channel_last = {"channel_last": True}
        found = _gaussian_smooth(smooth, {"x": gradient}, {**attributes, **channel_last}, cut)
        return moments(arrays | {"gradient": found["output"]})
    fused = {name: attributes[name] for name in ("sigma", "truncate")}
    if reach == 0:
        return moments(arrays, **fused)
    # One kernel smooths the slab as it is on its way to moments. Those of its ends, for which there
    # are planes of the neighbours, are made once more, of what was there before. They are cut from
    # the gradient, not from what its parts are written from.
    arrays = _arrived(arrays)
    gradient = arrays["gradient"]
    fields = {name: arrays[name] for name in ("mu", "nu")}
    numbers = {name: x for name, x in arrays.items() if name not in ("gradient", *fields)}
    begins = (0, own - reach)
    ends = slabs.ends({"gradient": gradient}, {"gradient": 2}, reach, 2 * reach)["gradient"]
    before = [
        {name: _planes_of(x, begin, begin + reach, 2) for name, x in fields.items()}
        for begin in begins
    ]
    gradient = slabs.inside(gradient, 2)
    fields, gradient, ends, before = _arrived((fields, gradient, ends, before))
    parts = []
    for begin, end, of_end in zip(begins, ends, before, strict=True):
        smooth_end = _planes_of(smooth({"x": end})["output"], reach, 2 * reach, 2)
        parts.append(moments(numbers | of_end | {"gradient": smooth_end}, begin))
    found = moments(numbers | fields | {"gradient": gradient}, uncounted=reach, **fused)
    first, last = parts
    longest = jnp.maximum(found.pop("output"), jnp.maximum(first["output"], last["output"]))
    moments_of_slab = {name: _with_ends(x, first[name], last[name], 2) for name, x in found.items()}
    return {"output": longest, **moments_of_slab}


def _adam_step(run: Run, arrays: Arrays, attributes: Mapping[str, Any], cut: Cut) -> Arrays:
    """The rule of `riemannian_adam_step`: the longest vector is that of all devices."""
    slabs = cut.planes
    place = _place(slabs)
    moments = _adam_moments(run, arrays, attributes, cut)
    longest = jax.lax.pmax(moments.pop("output"), slabs.axes)  # type: ignore[no-untyped-call]
    found = {"mu": moments["next_mu"], "nu": moments["next_nu"], "longest": longest}
    step = run(arrays | found, step="adam_step_of_longest", **place)["output"]
    return {"output": step, **moments}


# --- Stencils -------------------------------------------------------------------------------------


def _by_ends(
    compute: Callable[[Arrays, int], Arrays],
    arrays: Arrays,
    axes: Mapping[str, int],
    reach: int,
    slabs: Slabs,
) -> Arrays:
    """What a stencil makes of a slab: it is computed as it is, and its ends again with halos.

    So no array is copied in order to have the planes of neighbours beside it.

    Parameters
    ----------
    compute
        ``compute(arrays, begin)``: results, of as many planes, from arrays that begin so many
        planes after the slab. Where they end, there are zeros, or whatever has no place in memory.
    arrays
        Of the slab.
    axes
        That of the planes, of the arrays and of the results.
    reach
        How many planes beyond its own a plane of a result depends on.
    """
    own = slabs.own
    if reach == 0:
        return compute(arrays, 0)
    if own < 2 * reach:
        halos = {name: slabs.with_halo(x, axes[name], reach, reach) for name, x in arrays.items()}
        return {
            name: _planes_of(x, reach, reach + own, axes[name])
            for name, x in compute(halos, -reach).items()
        }
    # So that the ends are cut from the slab, not from what its parts are written from.
    arrays = _arrived(arrays)
    inside = {name: slabs.inside(x, axes[name]) for name, x in arrays.items()}
    ends = slabs.ends(arrays, axes, reach, 2 * reach)
    inside, ends = _arrived((inside, ends))
    firsts = compute({name: first for name, (first, _) in ends.items()}, -reach)
    lasts = compute({name: last for name, (_, last) in ends.items()}, own - 2 * reach)
    results = {}
    for name, x in compute(inside, 0).items():
        axis = axes[name]
        first, last = (_planes_of(end[name], reach, 2 * reach, axis) for end in (firsts, lasts))
        results[name] = _with_ends(x, first, last, axis)
    return results


def _smoothing_axis(attributes: Mapping[str, Any]) -> int:
    return 2 if attributes["channel_last"] else 3


def _gaussian_smooth(
    run: Callable[[Arrays], Arrays], arrays: Arrays, attributes: Mapping[str, Any], cut: Cut
) -> Arrays:
    reach = min(math.ceil(attributes["truncate"] * attributes["sigma"][0]), cut.planes.planes - 1)
    axes = dict.fromkeys(_SMOOTHED, _smoothing_axis(attributes))
    return _by_ends(lambda part, _: run(part), arrays, axes, reach, cut.planes)


def _step_gradient(run: Run, arrays: Arrays, attributes: Mapping[str, Any], cut: Cut) -> Arrays:
    slabs = cut.planes
    # The Gaussian reaches so many planes, and the differences in the last of them one more.
    reach = min(math.ceil(attributes["truncate"] * attributes["sigma"][0]), slabs.planes - 1) + 1
    slab = (slabs.planes, slabs.planes, 0)
    axes = {name: axis for name, (_, axis) in _STEP_GRADIENT.items()}
    fields = {name: x for name, x in arrays.items() if name in axes}
    numbers = {name: x for name, x in arrays.items() if name not in axes}

    def compute(part: Arrays, begin: int) -> Arrays:
        first = slabs.first() + begin
        return run(part | numbers, slab=slab, first=_first_planes(first, first))

    return _by_ends(compute, fields, axes, reach, slabs)


def _jacobian_determinant(run: Run, arrays: Arrays, _: Mapping[str, Any], cut: Cut) -> Arrays:
    slabs = cut.planes
    cotangent = arrays.get("grad_output")
    reach = 1 if cotangent is None else 2
    halos = {"displacement": slabs.with_halo(arrays["displacement"], 2, reach, reach)}
    if cotangent is not None:
        halos["grad_output"] = slabs.with_halo(cotangent, 2, 1, 1)
    first = slabs.first()
    slab = (slabs.planes, slabs.planes, 0)
    return run(halos, slab=slab, first=_first_planes(first, first))


def _mind_ssc(run: Run, arrays: Arrays, attributes: Mapping[str, Any], cut: Cut) -> Arrays:
    """The rule of the descriptors: devices take the mean of the variances of all their voxels."""
    slabs, axis = cut.planes, 3
    reach = attributes["radius"] + attributes["dilation"]
    image = slabs.with_edges(arrays["image"], axis, reach)

    def own(x: jax.Array) -> jax.Array:
        return _planes_of(x, reach, reach + slabs.own, axis)

    if "grad_output" in arrays:
        cotangent = slabs.alone(arrays["grad_output"], axis, reach)
        results = run(arrays | {"image": image, "grad_output": cotangent})
        return {"grad_image": slabs.add_edges(results["grad_image"], axis, reach)}
    variances = run({"image": image}, step="mind_ssc_variances")["output"]
    voxels = slabs.planes * math.prod(image.shape[axis + 1 :])
    total = jnp.sum(slabs.inside(own(variances), axis), tuple(range(axis, image.ndim)))
    mean = slabs.sum(total) / voxels
    given = {"image": image, "mean_variance": mean}
    output = own(run(given, step="mind_ssc_of_variance")["output"])
    results = {"output": output, "mean_variance": mean}
    return {name: x for name, x in results.items() if name in run.results}


# --- Losses ---------------------------------------------------------------------------------------


def _lncc_reach(attributes: Mapping[str, Any]) -> int:
    return int(attributes["kernel_size"][0]) // 2


def _lncc_loss(run: Run, arrays: Arrays, attributes: Mapping[str, Any], cut: Cut) -> Arrays:
    slabs, axis, reach = cut.planes, 3, _lncc_reach(attributes)
    pred, mask = arrays["pred"], arrays.get("mask")
    if attributes["reduction"] == "none":
        if "grad_output" in arrays:
            return _lncc_of_halos(run, arrays, reach, slabs)
        axes = dict.fromkeys(_COMPARED, axis)
        return _by_ends(lambda part, _: run(part), arrays, axes, reach, slabs)
    counted = jnp.ones((1, 1, 1, *pred.shape[axis:]), pred.dtype) if mask is None else mask
    given = arrays | {"mask": counted}
    if attributes["reduction"] == "sum":
        results = _lncc_of_halos(run, given, reach, slabs)
        results["output"] = slabs.sum(results["output"])
        return results
    items = max(pred.shape[1], arrays["target"].shape[1], counted.shape[1])
    groups = max(x.shape[0] for x in given.values())
    if mask is None:
        voxels = slabs.planes * math.prod(pred.shape[axis + 1 :])
        total = jnp.full((groups,), items * pred.shape[2] * voxels, pred.dtype)
    else:
        per_group = jnp.sum(slabs.inside(mask, axis), tuple(range(1, mask.ndim)))
        copies = items * pred.shape[2] // (mask.shape[1] * mask.shape[2])
        total = jnp.broadcast_to(slabs.sum(per_group) * copies, (groups,))
    # What all devices divide by is known, so that none has to do so in another pass.
    share = functools.partial(run, step="lncc_loss_share", results=run.results - {"mask_sum"})
    results = _lncc_of_halos(share, given | {"mask_sum": total[:, None]}, reach, slabs)
    results["output"] = slabs.sum(results["output"])
    if mask is not None:
        results["mask_sum"] = total
    return results


def _lncc_of_halos(
    run: Callable[[Arrays], Arrays], arrays: Arrays, reach: int, slabs: Slabs
) -> Arrays:
    """What a slab's correlations add to a loss, if anything, and the gradients that follow from it.

    Each of them counts once, in the call in which its whole window is at hand: that for the slab as
    it is, or for one of its ends with a halo. What they contribute to gradients is added up.
    """
    axis, own = 3, slabs.own
    images = {name: arrays[name] for name in ("pred", "target")}
    weights = {name: arrays[name] for name in ("mask", "grad_output") if name in arrays}
    numbers = {name: x for name, x in arrays.items() if name not in images | weights}
    if reach == 0 or own < 2 * reach:
        halos = {name: slabs.with_halo(x, axis, reach, reach) for name, x in images.items()}
        halos |= {name: slabs.alone(x, axis, reach) for name, x in weights.items()}
        results = run(halos | numbers)
        return {
            name: slabs.add_halo(x, axis, reach, reach) if name.startswith("grad_") else x
            for name, x in results.items()
        }

    def placed(x: jax.Array, begin: int, end: int, before: int, after: int) -> jax.Array:
        """Some planes between zeros."""
        widths = [(before, after) if i == axis else (0, 0) for i in range(x.ndim)]
        return jnp.pad(_planes_of(x, begin, end, axis), widths)

    inside = {name: slabs.inside(x, axis) for name, x in (images | weights).items()}
    ends = slabs.ends(images, dict.fromkeys(images, axis), reach, 2 * reach)
    parts = [inside, *({name: end[k] for name, end in ends.items()} for k in range(2))]
    counted = [(reach, own - reach, reach, reach), (0, reach, reach, reach)]
    counted.append((own - reach, own, reach, reach))
    inner, first, last = (
        run(part | {name: placed(inside[name], *where) for name in weights} | numbers)
        for part, where in zip(parts, counted, strict=True)
    )
    results = {}
    gradients = [name for name in inner if name.startswith("grad_")]
    to_next = {x: _planes_of(last[x], 2 * reach, 3 * reach, axis) for x in gradients}
    to_previous = {x: _planes_of(first[x], 0, reach, axis) for x in gradients}
    before, after = slabs.swapped(to_next, to_previous)
    for name, x in inner.items():
        if name not in gradients:
            results[name] = x + first[name] + last[name]
            continue
        own_first = _planes_of(first[name], reach, 3 * reach, axis)
        own_first += placed(before[name], 0, reach, 0, reach)
        own_last = _planes_of(last[name], 0, 2 * reach, axis)
        own_last += placed(after[name], 0, reach, reach, 0)
        x = _added(x, own_first, axis, 0)
        results[name] = _added(x, own_last, axis, own - 2 * reach)
    return results


def _mutual_information(
    run: Run, arrays: Arrays, attributes: Mapping[str, Any], cut: Cut
) -> Arrays:
    """The rule of the loss, its gradient and the histogram: devices add up what they count."""
    slabs = cut.planes
    if slabs.is_padded:
        own_planes = jnp.clip(slabs.planes - slabs.first(), 0, slabs.own).astype(jnp.int32)
        arrays = arrays | {"own_planes": own_planes.reshape(1, 1)}
    if "grad_output" in arrays:
        return run(arrays)
    found = run(arrays, step="value_extremes")["output"]
    greatest = jax.lax.pmax(found, slabs.axes)  # type: ignore[no-untyped-call]
    extremes = {"extremes": greatest}
    whole = {"whole_samples": slabs.planes * math.prod(arrays["pred"].shape[4:])}
    counts = run(arrays | extremes, step="joint_counts", attributes=whole)["output"]
    value_range = {name: x for name, x in arrays.items() if name == "value_range"}
    is_histogram = "reduction" not in attributes
    results = run(
        {"counts": slabs.sum(counts)} | extremes | value_range,
        step="mutual_information_of_counts",
        attributes=whole | (_NO_LOSS if is_histogram else {}),
        results=("histogram",) if is_histogram else run.results,
    )
    return {"output": results["histogram"]} if is_histogram else results


_NO_LOSS = {"normalised": False, "smooth_nr": 1.0, "smooth_dr": 1.0, "reduction": "none"}
"""What else a loss of the counts takes, where only their histogram is asked for."""


def _spline_axis(attributes: Mapping[str, Any]) -> int:
    return 2 if attributes["channel_last"] else 3


def _spline_coefficients(
    run: Run, arrays: Arrays, attributes: Mapping[str, Any], cut: Cut
) -> Arrays:
    """The rule of `spline_coefficients`: all planes have a part in each.

    Every device gathers them and solves for all, which is cheap beside sampling.
    """
    slabs, axis = cut.planes, _spline_axis(attributes)
    if not slabs.axes:
        return run(arrays)

    def whole(x: jax.Array) -> jax.Array:
        planes = jax.lax.all_gather(x, slabs.axes, axis=axis, tiled=True)
        return _planes_of(planes, 0, slabs.planes, axis)

    def own(x: jax.Array) -> jax.Array:
        beyond = slabs.own * slabs.devices - slabs.planes
        x = jnp.pad(x, [(0, beyond if i == axis else 0) for i in range(x.ndim)])
        return jax.lax.dynamic_slice_in_dim(x, slabs.first(), slabs.own, axis)

    results = run({name: whole(x) for name, x in arrays.items()})
    return {name: own(x) for name, x in results.items()}


_ENERGY_HALO = 2
"""Planes that the gradient of an energy looks at beyond each end of a slab: see ``kEnergyHalo``."""


def _field_energy(run: Run, arrays: Arrays, _: Mapping[str, Any], cut: Cut) -> Arrays:
    """The rule of penalties: the planes of a slab that look at no others, and its ends with halos.

    Each plane's energy counts in one of these calls, which get two planes more on both sides.
    """
    slabs, halo = cut.planes, _ENERGY_HALO
    displacement, own = arrays["displacement"], slabs.own

    def energy(part: jax.Array, begin: int, *, has_room: bool = False) -> Arrays:
        """Of the planes from ``begin`` on; the gradient may have room for the others as well."""
        first = slabs.first() + begin
        return run(
            arrays | {"displacement": part},
            slab=(slabs.planes, slabs.planes, int(has_room)),
            first=_first_planes(first, first),
        )

    if own < 2 * halo + 1:
        results = energy(slabs.with_halo(displacement, 2, halo, halo), 0)
    else:
        ends = slabs.ends({"displacement": displacement}, {"displacement": 2}, halo, 2 * halo)
        inside, ends = _arrived((slabs.inside(displacement, 2), ends))
        first, last = ends["displacement"]
        firsts, lasts = energy(first, 0), energy(last, own - halo)
        results = energy(inside, halo, has_room=True)
        for name, x in results.items():
            if name == "output":
                results[name] = x + firsts[name] + lasts[name]
            else:
                results[name] = _with_ends(x, firsts[name], lasts[name], 2)
    if "output" in results:
        results["output"] = slabs.sum(results["output"])
    return results


def _all_planes(axis: int, *names: str) -> Callable[[Mapping[str, Any]], Any]:
    return lambda _: dict.fromkeys(names, ("planes", axis))


_SMOOTHED = ("x", "grad_x", "output", "grad_output")
_SMOOTHING = SlabOp(
    lambda attributes: dict.fromkeys(_SMOOTHED, ("planes", _smoothing_axis(attributes))),
    _gaussian_smooth,
)


_STEP_GRADIENT: dict[str, tuple[Role, int]] = {
    "moved": ("planes", 3),
    "slope": ("planes", 3),
    "pull": ("planes", 2),
    "displacement": ("planes", 2),
    "output": ("planes", 2),
}


def _converted(attributes: Mapping[str, Any]) -> dict[str, tuple[Role, int]]:
    source, target = (
        3 if attributes[name] == "first" else 2 for name in ("source_channels", "target_channels")
    )
    return {
        "displacement": ("planes", source),
        "grad_displacement": ("planes", source),
        "output": ("planes", target),
        "grad_output": ("planes", target),
    }


def _covered(attributes: Mapping[str, Any]) -> dict[str, tuple[Role, int]]:
    if len(attributes["source_shape"]) != RANK - 3:
        return {}
    return {"displacement": ("planes", 2), "output": ("planes", 3)}


_WARPED = ("displacement", "output", "grad_output", "grad_displacement")
_COMPARED = ("pred", "target", "mask", "output", "grad_output", "grad_pred", "grad_target")


def _lncc_axes(attributes: Mapping[str, Any]) -> dict[str, tuple[Role, int]]:
    # A single number has no planes.
    names = [x for x in _COMPARED if attributes["reduction"] == "none" or "output" not in x]
    return dict.fromkeys(names, ("planes", 3))


_INFORMATION = SlabOp(
    _all_planes(3, "pred", "target", "mask", "grad_pred", "grad_target"), _mutual_information
)

SLAB_OPS: dict[str, SlabOp] = {
    "interpolate": _sampling_op("image", "grid"),
    "interpolate_labels": _sampling_op("labels", "grid"),
    "compose": _sampling_op("u", "v"),
    "affine_warp": SlabOp(_all_planes(2, *_WARPED), _affine_warp),
    "coverage": SlabOp(_covered, _coverage, is_led_by_result=True),
    "convert_displacement": SlabOp(_converted, _scaled),
    "scale_velocity": SlabOp(
        _all_planes(2, "velocity", "grad_velocity", "output", "grad_output"), _voxel_by_voxel
    ),
    "spline_coefficients": SlabOp(
        lambda x: dict.fromkeys(
            ("image", "grad_image", "output", "grad_output"), ("planes", _spline_axis(x))
        ),
        _spline_coefficients,
    ),
    "gaussian_smooth": _SMOOTHING,
    "mind_ssc": SlabOp(_all_planes(3, "image", "output", "grad_output", "grad_image"), _mind_ssc),
    "jacobian_determinant": SlabOp(_all_planes(2, *_WARPED), _jacobian_determinant),
    "invert_displacement": SlabOp(
        _all_planes(2, "displacement", "initial", "output", "residual"), _inverse
    ),
    "riemannian_adam_step": SlabOp(
        _all_planes(2, "gradient", "mu", "nu", "output", "next_mu", "next_nu"), _adam_step
    ),
    "step_gradient": SlabOp(lambda _: _STEP_GRADIENT, _step_gradient),
    "mutual_information_loss": _INFORMATION,
    "joint_histogram": _INFORMATION,
    "field_energy": SlabOp(_all_planes(2, "displacement", "grad_displacement"), _field_energy),
    "lncc_loss": SlabOp(_lncc_axes, _lncc_loss, lambda x: 2 * _lncc_reach(x) + 1),
}
"""By the name of the op; its gradient works by the same rule."""


def axes_of_slabs(
    slab_op: SlabOp, attributes: Mapping[str, Any], operands: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[Role, int]]:
    """The arrays of a call that may be slabs: see :class:`SlabOp`. None of a call in 2-D.

    ``operands``: shapes by name, with the group axis.
    """
    axes = slab_op.axes(attributes)
    places = [(operands[name], axis) for name, (_, axis) in axes.items() if name in operands]
    reach = slab_op.reach(attributes)
    is_large = all(len(shape) == RANK and shape[axis] >= reach for shape, axis in places[:1])
    return axes if is_large and (places or slab_op.is_led_by_result) else {}
