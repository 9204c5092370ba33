"""Calls of the extension on arrays that are spread over several devices.

The partitioner cannot look into a custom call and gathers what it is given. Groups and items do
not depend on each other, though, so each device can work on those that it holds.
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

Operands = tuple[jax.Array | None, ...]
Call = Callable[..., dict[str, jax.Array]]
Shape = tuple[int, ...]
MeshAxes = tuple[str, ...]


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


@dataclass(frozen=True)
class _Batch:
    """Which arrays of a call have the common groups, on axis 0, and the common items, on axis 1.

    The others have one for all, or have summed over them.
    """

    operands: tuple[tuple[bool, bool], ...]
    results: dict[str, tuple[bool, bool]]
    summed: frozenset[str]  # results that are sums over the items
    by_item: bool  # whether those that have some of the items can do their part

    @staticmethod
    def of(
        operands: Mapping[str, Shape], results: Mapping[str, Shape], reduction: Reduction
    ) -> _Batch:
        sizes = [
            [shape[axis] for shape in operands.values() if len(shape) > axis] for axis in (0, 1)
        ]
        common = [next((n for n in along_axis if n != 1), 1) for along_axis in sizes]

        def has(shape: Shape) -> tuple[bool, bool]:
            groups, items = (
                len(shape) > axis and shape[axis] == common[axis] != 1 for axis in (0, 1)
            )
            return groups, items

        of_operands = {name: has(shape) for name, shape in operands.items()}
        of_results = {name: has(shape) for name, shape in results.items()}
        # The gradient of an operand that serves all items is a sum that devices can share. So is
        # another result without items if it is known how it comes about, and so is what follows
        # from its cotangent. Otherwise only who sees all items knows it.
        without_items = {name for name, (_, items) in of_results.items() if not items}
        summed = {f"grad_{name}" for name, (_, items) in of_operands.items() if not items}
        is_known = reduction.kind != "none"
        return _Batch(
            tuple(of_operands.values()),
            of_results,
            frozenset(without_items if is_known else without_items & summed),
            is_known or (len(sizes[1]) == len(operands) and without_items <= summed),
        )

    def split(self) -> _Batch:
        """What the devices can share."""
        if self.by_item:
            return self
        return replace(
            self,
            operands=tuple((groups, False) for groups, _ in self.operands),
            results={name: (groups, False) for name, (groups, _) in self.results.items()},
        )

    def rule(self, operands: Iterable[Shape], results: Mapping[str, Shape]) -> str:
        """What Shardy has to know: which axes of operands and results are spread alike."""

        def axes(array: str, shape: Shape, shared: tuple[bool, bool]) -> str:
            own = [f"{array}_{axis}" for axis in range(len(shape))]
            for axis, name in enumerate(("groups", "items")):
                if shared[axis]:
                    own[axis] = name
            return " ".join(own)

        left = [
            axes(f"operand{i}", shape, shared)
            for i, (shape, shared) in enumerate(zip(operands, self.operands, strict=True))
        ]
        # A dictionary's values are flattened in the order of its sorted keys.
        right = [axes(name, results[name], self.results[name]) for name in sorted(results)]
        return f"{', '.join(left)} -> {', '.join(right)}"

    def mesh_axes(
        self, mesh: Any, operands: Sequence[Any], results: Mapping[str, Any]
    ) -> tuple[MeshAxes, MeshAxes]:
        """The axes of the mesh to spread groups and items over: those of the first array that is.

        Only where they divide it: a padded shard would add what is in the padding to the sums.
        """
        arrays = [*zip(operands, self.operands, strict=True)]
        arrays += [(results[name], shared) for name, shared in self.results.items()]

        def spread(axis: int) -> MeshAxes:
            for array, shared in arrays:
                spec = getattr(getattr(array, "sharding", None), "spec", ())
                names = spec[axis] if shared[axis] and axis < len(spec) else None
                names = (names,) if isinstance(names, str) else tuple(names or ())
                if names and array.shape[axis] % math.prod(mesh.shape[n] for n in names) == 0:
                    return names
            return ()

        groups, items = spread(0), spread(1)
        return groups if set(groups).isdisjoint(items) else (), items

    def shardings(
        self, mesh: Any, axes: tuple[MeshAxes, MeshAxes]
    ) -> tuple[tuple[NamedSharding, ...], dict[str, NamedSharding]]:
        """Of the operands and the results."""

        def sharding(shared: tuple[bool, bool]) -> NamedSharding:
            groups, items = (over if has else () for has, over in zip(shared, axes, strict=True))
            # An array without items may have no second axis to speak of.
            spec = (groups or None, items) if items else (groups,) if groups else ()
            return NamedSharding(mesh, PartitionSpec(*spec))

        return (
            tuple(map(sharding, self.operands)),
            {name: sharding(shared) for name, shared in self.results.items()},
        )


def spread_over_batch(
    call: Call,
    names: Sequence[str],
    result_shapes: Callable[..., dict[str, Shape]],
    reduction: Reduction,
) -> Call:
    """The call, made on each device for the groups and items that the device holds.

    Parameters
    ----------
    call
        Takes arrays with groups on axis 0 and items on axis 1, each the common number or 1, and
        returns arrays by name: with groups and items, or with the groups alone. One that is called
        ``grad_`` and the name of an operand is summed over the items if the operand has one.
    names
        Of the operands.
    result_shapes
        The shapes that ``call`` returns for given operands.
    reduction
        How results without items come about. If it is not known, no device gets only some items.
    """

    def spread(*arrays: jax.Array) -> dict[str, jax.Array]:
        operands = [array.shape for array in arrays]
        results = result_shapes(*arrays)
        batch = _Batch.of(dict(zip(names, operands, strict=True)), results, reduction)
        split = batch.split()

        def partition(mesh: Any, operands: Any, results: Any) -> Any:
            axes = split.mesh_axes(mesh, operands, results)

            def local(*arrays: jax.Array) -> dict[str, jax.Array]:
                over = axes[1]
                if not over:
                    return call(*arrays)
                # The compiler asks for this where the user's choice is not known: without it,
                # arithmetic would silently make float32 of float64.
                with jax.enable_x64(True):
                    parts = reduction.parts(call, names, arrays, over)
                    return {
                        name: jax.lax.psum(part, over) if name in split.summed else part
                        for name, part in parts.items()
                    }

            of_operands, of_results = split.shardings(mesh, axes)
            return mesh, local, of_results, of_operands

        def infer(mesh: Any, operands: Any, results: Any) -> Any:
            return split.shardings(mesh, split.mesh_axes(mesh, operands, results))[1]

        function = call
        if any(map(any, split.operands)):
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
            axes = batch.mesh_axes(mesh, types, dict.fromkeys(results))
            out_sharding = batch.shardings(mesh, axes)[1]
            function = jax.sharding.auto_axes(
                function, axes=mesh.explicit_axes, out_sharding=out_sharding
            )
        return function(*arrays)

    return spread


def _typed_mesh(types: Iterable[Any]) -> Any:
    """The mesh over which arrays are spread by their types, if they are."""
    meshes = [kind.sharding.mesh for kind in types]
    return next((mesh for mesh in meshes if mesh.explicit_axes), None)


def _spread_alike(operands: Operands) -> Operands:
    types = [jax.typeof(x) for x in operands if x is not None]
    mesh = _typed_mesh(types)
    if mesh is None:
        return operands
    items = next((kind.shape[0] for kind in types if kind.shape[0] != 1), 1)
    specs = [tuple(kind.sharding.spec) for kind in types if kind.shape[0] == items]
    over = next((spec[0] for spec in specs if spec and spec[0]), None)

    def reshard(x: jax.Array) -> jax.Array:
        spec = [over if x.shape[0] == items else None, *[None] * (x.ndim - 1)]
        moved: jax.Array = jax.sharding.reshard(x, NamedSharding(mesh, PartitionSpec(*spec)))
        return moved

    return tuple(None if x is None else reshard(x) for x in operands)


def _varying(array: Any) -> frozenset[str]:
    kind = jax.typeof(array)
    axes: frozenset[str] = kind.vma if hasattr(kind, "vma") else kind.manual_axis_type.varying
    return axes


def _vary_alike(operands: Operands) -> Operands:
    axes = [frozenset() if x is None else _varying(x) for x in operands]
    everywhere = frozenset().union(*axes)
    return tuple(
        x
        if x is None or own == everywhere
        else jax.lax.pcast(x, tuple(everywhere - own), to="varying")
        for x, own in zip(operands, axes, strict=True)
    )


def align(operands: Operands) -> Operands:
    """Operands of one call, spread alike where their types say how they are spread.

    In ``shard_map`` those that are replicated join those that are not; on a mesh with explicit
    axes all keep their batch axis alone. This comes before what is differentiated, whose
    gradients have the types of its operands: JAX then sums and spreads them as they were.
    """
    return _vary_alike(_spread_alike(operands))
