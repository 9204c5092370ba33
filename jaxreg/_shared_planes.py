"""What calls are told by the contexts that they are made in.

That is above all that devices share the planes of volumes in ``shard_map``, where the user says so.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from jaxreg._sharding import vary_alike, varying
from jaxreg._slabs import RANK, UNKNOWN, Cut, Reach, Run, SlabOp, Slabs
from regkernels.options import plain_number

__all__ = [
    "Setting",
    "SharedPlanes",
    "on_shared_planes",
    "overwriting",
    "planes_over",
    "samples_near",
    "samples_of_neighbours",
    "samples_within",
    "setting",
]


@dataclass(frozen=True)
class SharedPlanes:
    """What `planes_over` was told, and the number of devices."""

    axis: str
    devices: int
    planes: int | None
    sampled_planes: int | None

    def slabs(self, name: str, own: int, planes: int | None) -> Slabs:
        """How a volume is cut of which each device has ``own`` planes."""
        slabs = Slabs(own * self.devices if planes is None else planes, (self.axis,), self.devices)
        if slabs.own != own:
            raise ValueError(
                f"{name}: expected {slabs.own} planes on each device, as {planes} are shared by "
                f"{self.devices}, got {own}"
            )
        return slabs


_shared: contextvars.ContextVar[SharedPlanes | None] = contextvars.ContextVar(
    "shared", default=None
)


_reach: contextvars.ContextVar[Reach] = contextvars.ContextVar("reach", default=UNKNOWN)


_overwrites: contextvars.ContextVar[bool] = contextvars.ContextVar("overwrites", default=False)


@dataclass(frozen=True)
class Setting:
    """What calls are told by the contexts that they are made in.

    Parameters
    ----------
    shared
        How devices share volumes, if they do.
    reach
        What `samples_within` or `samples_near` was told.
    overwrites
        Whether results may take the memory of operands: see `overwriting`.
    """

    shared: SharedPlanes | None = None
    reach: Reach = UNKNOWN
    overwrites: bool = False


def setting() -> Setting:
    """What a call is told that is made here."""
    return Setting(_shared.get(), _reach.get(), _overwrites.get())


@contextlib.contextmanager
def overwriting() -> Iterator[None]:
    """Let results of calls in the context take the memory of operands that nobody needs after them.

    An operand that is needed all the same is copied first: results are the same. Outside of the
    context that would cost whoever calls an op by itself.
    """
    token = _overwrites.set(True)
    try:
        yield
    finally:
        _overwrites.reset(token)


@contextlib.contextmanager
def samples_within(planes: int) -> Iterator[None]:
    """Promise that calls in the context sample at most so many planes from where a sample is asked.

    Along the axis Z, on a grid like that of what is sampled, as where a field is composed with a
    short step. Devices that share the planes then need not find out how far samples lie. What lies
    farther all the same is sampled wrongly.
    """
    with _told(dataclasses.replace(_reach.get(), farthest=planes)):
        yield


@contextlib.contextmanager
def samples_near() -> Iterator[None]:
    """Promise that calls in the context sample where `jaxreg._slabs.lie_near` has said yes.

    What lies elsewhere all the same is sampled wrongly.
    """
    with _told(dataclasses.replace(_reach.get(), is_near=True)):
        yield


@contextlib.contextmanager
def samples_of_neighbours(planes: int) -> Iterator[None]:
    """Say that what calls in the context sample has so many planes of the neighbours at each end.

    In `planes_over`, and where `jaxreg._slabs.lie_near` has said yes.
    """
    with _told(dataclasses.replace(_reach.get(), is_near=True, beside=planes)):
        yield


@contextlib.contextmanager
def _told(reach: Reach) -> Iterator[None]:
    token = _reach.set(reach)
    try:
        yield
    finally:
        _reach.reset(token)


@contextlib.contextmanager
def planes_over(
    axis_name: str, planes: int | None = None, *, sampled_planes: int | None = None
) -> Iterator[None]:
    """Take the arrays of a device in ``shard_map`` for its planes of volumes in 3-D.

    In the function that ``jax.shard_map`` maps, calls of this package within the context work on
    volumes whose planes, along the axis Z, the devices share: each has as many, in their order, and
    the last may have some beyond the end, whose content does not matter. Results, and gradients,
    are those of the whole volumes. Planes of results have the place of those they are made from; a
    loss is that of the whole volume, on every device. Under ``jit`` the same goes without words.

    Parameters
    ----------
    axis_name
        The axis of the mesh that the planes are spread over.
    planes
        Those of the whole volume, by default as many as there are on all devices.
    sampled_planes
        Those of the volume that is sampled, ``image``, ``labels`` or ``u``, if they are others. One
        that every device has, because it is not spread over the axis, is sampled as it is.

    Returns
    -------
    context manager

    Raises
    ------
    NameError
        Outside of a ``jax.shard_map`` over the axis.
    ValueError
        No planes, here; in a call, arrays with other numbers of planes than those say, or volumes
        too small for their windows. The message names the argument.
    TypeError
        What is no number.

    Notes
    -----
    ``jax.shard_map`` has to know what differs between devices, as it does by default
    (``check_vma=True``). ``out_shape`` of `jaxreg.interpolate` is that of the whole volume.

    Examples
    --------
    >>> def moved(image, u):
    ...     with jaxreg.planes_over("z"):
    ...         return jaxreg.interpolate(image, grid=u)
    >>> on_images, on_fields = P(None, None, "z"), P(None, "z")
    >>> moved = jax.shard_map(
    ...     moved, mesh=mesh, in_specs=(on_images, on_fields), out_specs=on_images
    ... )
    """
    planes, sampled_planes = plain_number(planes), plain_number(sampled_planes)
    for name, value in (("planes", planes), ("sampled_planes", sampled_planes)):
        if value is not None and not isinstance(value, int):
            raise TypeError(f"{name}: expected a number of planes, got {type(value).__name__}")
        if value is not None and value < 1:
            raise ValueError(f"{name}: expected a number of planes from 1, got {value}")
    devices = jax.lax.axis_size(axis_name)
    token = _shared.set(SharedPlanes(axis_name, devices, planes, sampled_planes))
    try:
        yield
    finally:
        _shared.reset(token)


def on_shared_planes(
    run: Run,
    names: Sequence[str],
    attributes: Mapping[str, Any],
    slab_op: SlabOp,
    shared: SharedPlanes,
    reach: Reach,
) -> Callable[..., dict[str, jax.Array]]:
    """The call, made by every device for its planes.

    Parameters
    ----------
    run, attributes, slab_op
        As for `jaxreg._sharding.spread_over_devices`.
    names
        Of the operands.
    shared
        How devices share the volumes.
    reach
        What is known of where samples lie.
    """

    def call(*arrays: jax.Array) -> dict[str, jax.Array]:
        named = dict(zip(names, arrays, strict=True))
        cut = _cut(named, attributes, slab_op, shared, reach)
        if cut is None:
            return run(named)
        alike = zip(names, vary_alike(arrays, also=(shared.axis,)), strict=True)
        there = {name: array for name, array in alike if array is not None}
        return slab_op.rule(run, there, attributes, cut)

    return call


def _cut(
    arrays: Mapping[str, jax.Array],
    attributes: Mapping[str, Any],
    slab_op: SlabOp,
    shared: SharedPlanes,
    reach: Reach,
) -> Cut | None:
    """How the volumes of a call are cut; None: every device has all of them."""
    axes = {name: place for name, place in slab_op.axes(attributes).items() if name in arrays}
    spread = {name for name, x in arrays.items() if shared.axis in varying(x)}
    if not spread:
        return None
    own: dict[str, tuple[str, int]] = {}
    for name, array in arrays.items():
        if name not in axes:
            if name in spread:
                raise ValueError(f"{name}: expected the same on all devices, got different ones")
            continue
        if array.ndim != RANK:
            raise ValueError(f"{name}: expected a volume in 3-D to share its planes, got 2-D")
        role, axis = axes[name]
        if role == "planes" and name not in spread:
            raise ValueError(
                f"{name}: expected the planes of each device, got what all of them have"
            )
        own.setdefault(role, (name, array.shape[axis]))
    sampled = planes = None
    if "planes" in own:
        planes = shared.slabs(*own["planes"], shared.planes)
    if "sampled" in own:
        name, count = own["sampled"]
        count -= 2 * reach.beside
        if name not in spread:
            sampled = Slabs(count)
        else:
            alike = planes is None or planes.own == count
            default = shared.planes if alike else None
            sampled = shared.slabs(name, count, shared.sampled_planes or default)
    if planes is None:
        assert sampled is not None
        of_result = (attributes.get("out_shape") or (sampled.planes,))[0]
        planes = Slabs(of_result, (shared.axis,), shared.devices)
    least = slab_op.reach(attributes)
    if planes.planes < least:
        name = own["planes"][0]
        raise ValueError(f"{name}: expected at least {least} planes to share, got {planes.planes}")
    everywhere = frozenset().union(*map(varying, arrays.values()))
    return Cut(planes, sampled or planes, tuple(sorted(everywhere)), reach)
