"""Calls of the extension on arrays that are spread over several devices.

The partitioner cannot look into a custom call and gathers what it is given. Groups and items do
not depend on each other, though, so each device can work on those that it holds; and many ops can
work on some of the planes of a volume, by the rules of `jaxreg._slabs`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from jaxreg._slabs import (
    SLAB_AXES,
    UNKNOWN,
    Cut,
    MeshAxes,
    Reach,
    Run,
    SlabOp,
    Slabs,
    axes_of_slabs,
)

Operands = tuple[jax.Array | None, ...]
Call = Callable[..., dict[str, jax.Array]]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Reduction:
    """What an op makes of its items: how devices that hold some of them each do it together."""

    kind: str = "none"  # "sum", "mean", or "none" if it is not known
    weight: str | None = None  # the result that a mean was divided by, if not by a count of items

    def parts(
        self, call: Call, names: Sequence[str], arrays: Sequence[jax.Array], over: MeshAxes
    ) -> dict[str, jax.Array]:
        """The call's results for the items of this device, such that those of all devices add up.

        As many items are on each. ``over``: the axes of the mesh that they are spread over.
        """
        if self.kind != "mean":
            return call(*arrays)
        share: Any = 1 / jax.lax.psum(1, over)
        if "grad_output" in names:  # which is smaller than what follows from it
            named = zip(names, arrays, strict=True)
            return call(*(x * share if name == "grad_output" else x for name, x in named))
        values = call(*arrays)
        if self.weight in values:
            own = values[self.weight]
            total = jax.lax.psum(own, over)
            share = jnp.where(total > 0, own / total, 0)

        def scaled(value: jax.Array) -> jax.Array:
            trailing = tuple(range(1, value.ndim))
            return value * (jnp.expand_dims(share, trailing) if self.weight in values else share)

        return {
            name: scaled(value) if name.startswith(("output", "grad_")) else value
            for name, value in values.items()
        }


Places = Mapping[int, str]
"""Which axes of an array are spread, by what lies along them.

``groups`` and ``items`` are common to all arrays that have them. ``planes`` and ``sampled`` are
those of slabs: see `jaxreg._slabs`.
"""


@dataclass(frozen=True)
class _Spread:
    """Which axes of the arrays of a call devices may share.

    The arrays that lack a common axis have one entry for all, or have summed over them.
    """

    operands: tuple[Places, ...]
    results: dict[str, Places]
    summed: frozenset[str]  # results that are sums over the items
    by_item: bool  # whether those that have some of the items can do their part

    @staticmethod
    def of(
        operands: Mapping[str, Shape],
        results: Mapping[str, Shape],
        reduction: Reduction,
        slabs: Mapping[str, tuple[str, int]],
    ) -> _Spread:
        sizes = [
            [shape[axis] for shape in operands.values() if len(shape) > axis] for axis in (0, 1)
        ]
        common = [next((n for n in along_axis if n != 1), 1) for along_axis in sizes]

        def places(name: str, shape: Shape) -> Places:
            found = {
                axis: what
                for axis, what in enumerate(("groups", "items"))
                if len(shape) > axis and shape[axis] == common[axis] != 1
            }
            if name in slabs:
                what, axis = slabs[name]
                found[axis] = what
            return found

        of_operands = {name: places(name, shape) for name, shape in operands.items()}
        of_results = {name: places(name, shape) for name, shape in results.items()}
        # The gradient of an operand that serves all items is a sum that devices can share. So is
        # another result without items if it is known how it comes about, and so is what follows
        # from its cotangent. Otherwise only who sees all items knows it.
        without_items = {name for name, found in of_results.items() if 1 not in found}
        summed = {f"grad_{name}" for name, found in of_operands.items() if 1 not in found}
        is_known = reduction.kind != "none"
        return _Spread(
            tuple(of_operands.values()),
            of_results,
            frozenset(without_items if is_known else without_items & summed),
            is_known or (len(sizes[1]) == len(operands) and without_items <= summed),
        )

    def split(self) -> _Spread:
        """What the devices can share."""
        if self.by_item:
            return self

        def without_items(places: Places) -> Places:
            return {axis: what for axis, what in places.items() if what != "items"}

        return replace(
            self,
            operands=tuple(map(without_items, self.operands)),
            results={name: without_items(places) for name, places in self.results.items()},
        )

    def rule(self, operands: Iterable[Shape], results: Mapping[str, Shape]) -> str:
        """What Shardy has to know: which axes of operands and results are spread alike."""
        # With an affine alone nothing but the image that is sampled tells where results belong.
        leads = not any("planes" in places.values() for places in self.operands)
        names = {"sampled": "planes"} if leads else {}

        def axes(array: str, shape: Shape, places: Places) -> str:
            found = (places.get(axis, f"{array}_{axis}") for axis in range(len(shape)))
            return " ".join(names.get(name, name) for name in found)

        left = [
            axes(f"operand{i}", shape, places)
            for i, (shape, places) in enumerate(zip(operands, self.operands, strict=True))
        ]
        # A dictionary's values are flattened in the order of its sorted keys.
        right = [axes(name, results[name], self.results[name]) for name in sorted(results)]
        return f"{', '.join(left)} -> {', '.join(right)}"

    def mesh_axes(
        self, mesh: Any, operands: Sequence[Any], results: Mapping[str, Any]
    ) -> dict[str, MeshAxes]:
        """The axes of the mesh to spread each kind of axis over: those of the first array that is.

        Groups and items only where they divide them: a padded shard would add what is in the
        padding to the sums.
        """
        arrays = [*zip(operands, self.operands, strict=True)]
        arrays += [(results[name], places) for name, places in self.results.items()]

        def spread(what: str) -> MeshAxes:
            for array, places in arrays:
                spec = getattr(getattr(array, "sharding", None), "spec", ())
                for axis, found in places.items():
                    names = spec[axis] if found == what and axis < len(spec) else None
                    names = (names,) if isinstance(names, str) else tuple(names or ())
                    devices = math.prod(mesh.shape[name] for name in names)
                    divides = not names or array.shape[axis] % devices == 0
                    if devices > 1 and (divides or what in SLAB_AXES):
                        return names
            return ()

        items = spread("items")
        groups = spread("groups")
        taken = {"items": items, "groups": groups if set(groups).isdisjoint(items) else ()}
        planes, sampled = spread("planes"), spread("sampled")
        # Where both are spread they are so alike, and what is sampled leads if nothing else does.
        planes = planes or sampled
        used = {name for names in taken.values() for name in names}
        if not used.isdisjoint(planes):
            planes = ()
        taken["planes"] = planes
        taken["sampled"] = planes if sampled else ()
        return taken

    def shardings(
        self, mesh: Any, axes: Mapping[str, MeshAxes]
    ) -> tuple[tuple[NamedSharding, ...], dict[str, NamedSharding]]:
        """Of the operands and the results."""

        def sharding(places: Places) -> NamedSharding:
            spread = {axis: axes[what] for axis, what in places.items() if axes[what]}
            # An array without items may have no second axis to speak of.
            spec = [spread.get(axis) for axis in range(max(spread, default=-1) + 1)]
            return NamedSharding(mesh, PartitionSpec(*spec))

        return (
            tuple(map(sharding, self.operands)),
            {name: sharding(places) for name, places in self.results.items()},
        )

    def cut(
        self,
        mesh: Any,
        axes: Mapping[str, MeshAxes],
        operands: Sequence[Any],
        results: Mapping[str, Any],
        reach: Reach,
    ) -> Cut | None:
        """How volumes are cut; None: they are whole on each device."""
        if not axes["planes"]:
            return None
        arrays = [*zip(operands, self.operands, strict=True)]
        arrays += [(results[name], places) for name, places in self.results.items()]
        sizes = {
            what: array.shape[axis] for array, places in arrays for axis, what in places.items()
        }
        planes, sampled = (
            Slabs(
                sizes.get(what, sizes["planes"]),
                axes[what],
                math.prod(mesh.shape[name] for name in axes[what]),
            )
            for what in SLAB_AXES
        )
        return Cut(planes, sampled, tuple(mesh.axis_names), reach)


def spread_over_devices(
    run: Run,
    names: Sequence[str],
    result_shapes: Callable[..., dict[str, Shape]],
    reduction: Reduction,
    attributes: Mapping[str, Any],
    slab_op: SlabOp | None,
    reach: Reach = UNKNOWN,
) -> Call:
    """The call, made on each device for the groups, the items and the planes that the device holds.

    Parameters
    ----------
    run
        Takes arrays by name with groups on axis 0 and items on axis 1, each the common number or 1,
        and returns such arrays: with groups and items, or with the groups alone. One that is called
        ``grad_`` and the name of an operand is summed over the items if the operand has one.
    names
        Of the operands.
    result_shapes
        The shapes that ``run`` returns for given operands.
    reduction
        How results without items come about. If it is not known, no device gets only some items.
    attributes
        Of the call.
    slab_op
        How the op works on slabs of three-dimensional volumes, if it does.
    reach
        What is known of where samples lie.
    """

    def call(*arrays: jax.Array) -> dict[str, jax.Array]:
        return run(dict(zip(names, arrays, strict=True)))

    def spread(*arrays: jax.Array) -> dict[str, jax.Array]:
        operands = [array.shape for array in arrays]
        results = result_shapes(*arrays)
        named = dict(zip(names, operands, strict=True))
        slabs = {} if slab_op is None else axes_of_slabs(slab_op, attributes, named)
        whole = _Spread.of(named, results, reduction, slabs)
        split = whole.split()

        def partition(mesh: Any, operands: Any, results: Any) -> Any:
            axes = split.mesh_axes(mesh, operands, results)
            cut = split.cut(mesh, axes, operands, results, reach)

            def on_slabs(*arrays: jax.Array) -> dict[str, jax.Array]:
                assert slab_op is not None and cut is not None
                return slab_op.rule(run, dict(zip(names, arrays, strict=True)), attributes, cut)

            def local(*arrays: jax.Array) -> dict[str, jax.Array]:
                over = axes["items"]
                if not over and cut is None:
                    return call(*arrays)
                # The compiler asks for this where the user's choice is not known: without it,
                # arithmetic would silently make float32 of float64.
                with jax.enable_x64(True):
                    own = call if cut is None else on_slabs
                    if not over:
                        return own(*arrays)
                    parts = reduction.parts(own, names, arrays, over)
                    return {
                        name: jax.lax.psum(part, over) if name in split.summed else part
                        for name, part in parts.items()
                    }

            of_operands, of_results = split.shardings(mesh, axes)
            return mesh, local, of_results, of_operands

        def infer(mesh: Any, operands: Any, results: Any) -> Any:
            return split.shardings(mesh, split.mesh_axes(mesh, operands, results))[1]

        function = call
        if any(split.operands) or any(split.results.values()):
            function = custom_partitioning(call)
            function.def_partition(
                partition=partition,
                infer_sharding_from_operands=infer,
                sharding_rule=split.rule(operands, results),
            )
        # Where types say how arrays are spread, the partitioner takes over from them here.
        types = [jax.typeof(array) for array in arrays]
        mesh = _typed_mesh(types)
        if mesh is not None:
            axes = whole.mesh_axes(mesh, types, dict.fromkeys(results))
            out_sharding = whole.shardings(mesh, axes)[1]
            function = jax.sharding.auto_axes(
                function, axes=mesh.explicit_axes, out_sharding=out_sharding
            )
        return function(*arrays)

    return spread


def _typed_mesh(types: Iterable[Any]) -> Any:
    """The mesh over which arrays are spread by their types, if they are."""
    meshes = [kind.sharding.mesh for kind in types]
    return next((mesh for mesh in meshes if mesh.explicit_axes), None)


def _spread_alike(operands: Operands, planes: Sequence[int | None]) -> Operands:
    types = [jax.typeof(x) for x in operands if x is not None]
    mesh = _typed_mesh(types)
    if mesh is None:
        return operands
    items = next((kind.shape[0] for kind in types if kind.shape[0] != 1), 1)
    specs = [tuple(kind.sharding.spec) for kind in types if kind.shape[0] == items]
    over = next((spec[0] for spec in specs if spec and spec[0]), None)

    def reshard(x: jax.Array, axis: int | None) -> jax.Array:
        spec = [over if x.shape[0] == items else None, *[None] * (x.ndim - 1)]
        if axis is not None:
            spec[axis] = jax.typeof(x).sharding.spec[axis]
        moved: jax.Array = jax.sharding.reshard(x, NamedSharding(mesh, PartitionSpec(*spec)))
        return moved

    return tuple(
        None if x is None else reshard(x, axis) for x, axis in zip(operands, planes, strict=True)
    )


def varying(array: Any) -> frozenset[str]:
    """The axes of ``shard_map`` along which an array differs from device to device."""
    kind = jax.typeof(array)
    axes: frozenset[str] = kind.vma if hasattr(kind, "vma") else kind.manual_axis_type.varying
    return axes


def vary_alike(
    operands: Operands, *, apart: Iterable[str] = (), also: Iterable[str] = ()
) -> Operands:
    """Operands that differ along the same axes of ``shard_map``, ``also`` some, but ``apart``."""
    axes = [frozenset() if x is None else varying(x) for x in operands]
    everywhere = frozenset(also).union(*axes) - frozenset(apart)
    return tuple(
        x
        if x is None or own >= everywhere
        else jax.lax.pcast(x, tuple(everywhere - own), to="varying")
        for x, own in zip(operands, axes, strict=True)
    )


def align(operands: Operands, planes: Sequence[int | None], apart: Iterable[str] = ()) -> Operands:
    """Operands of one call, spread alike where their types say how they are spread.

    In ``shard_map`` those that are replicated join those that are not, but along axes ``apart``; on
    a mesh with explicit axes all keep their batch axis and that of ``planes``, for each operand,
    alone. This comes before what is differentiated, whose gradients have the types of its operands:
    JAX then sums and spreads them as they were.
    """
    return vary_alike(_spread_alike(operands, planes), apart=apart)
