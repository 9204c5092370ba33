"""Calls of the extension on arrays that are spread over several devices.

The partitioner cannot look into a custom call and gathers what it is given. Groups and items do
not depend on each other, though, so each device can work on those that it holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

Call = Callable[..., dict[str, jax.Array]]
Shape = tuple[int, ...]
MeshAxes = tuple[str, ...]


@dataclass(frozen=True)
class _Batch:
    """Which arrays of a call have the common groups, on axis 0, and the common items, on axis 1.

    The others have one for all, or have summed over them.
    """

    operands: tuple[tuple[bool, bool], ...]
    results: dict[str, tuple[bool, bool]]
    summed: frozenset[str]  # results that are sums over the items

    @staticmethod
    def of(operands: Mapping[str, Shape], results: Mapping[str, Shape]) -> _Batch:
        sizes = [
            [shape[axis] for shape in operands.values() if len(shape) > axis] for axis in (0, 1)
        ]
        common = [next((n for n in along_axis if n != 1), 1) for along_axis in sizes]

        def has(shape: Shape, axis: int) -> bool:
            return len(shape) > axis and shape[axis] == common[axis] != 1

        # The gradient of an operand that serves all items is a sum that devices can share. Another
        # result without items, such as a mean, is known only to who sees all of them, and so is
        # what follows from the cotangent of one.
        summed = frozenset(
            f"grad_{name}" for name, shape in operands.items() if not has(shape, 1)
        ).intersection(results)
        by_item = all(name in summed or has(shape, 1) for name, shape in results.items())
        by_item = by_item and len(sizes[1]) == len(operands)

        def axes(shape: Shape) -> tuple[bool, bool]:
            return has(shape, 0), by_item and has(shape, 1)

        return _Batch(
            tuple(axes(shape) for shape in operands.values()),
            {name: axes(shape) for name, shape in results.items()},
            summed,
        )

    def can_be_split(self) -> bool:
        return any(map(any, self.operands))

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
            spec = [over if has and over else None for has, over in zip(shared, axes, strict=True)]
            return NamedSharding(mesh, PartitionSpec(*spec) if any(spec) else PartitionSpec())

        return (
            tuple(map(sharding, self.operands)),
            {name: sharding(shared) for name, shared in self.results.items()},
        )


def spread_over_batch(
    call: Call, names: Sequence[str], result_shapes: Callable[..., dict[str, Shape]]
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
    """

    def spread(*arrays: jax.Array) -> dict[str, jax.Array]:
        operands = [array.shape for array in arrays]
        results = result_shapes(*arrays)
        batch = _Batch.of(dict(zip(names, operands, strict=True)), results)

        def partition(mesh: Any, operands: Any, results: Any) -> Any:
            axes = batch.mesh_axes(mesh, operands, results)

            def local(*arrays: jax.Array) -> dict[str, jax.Array]:
                values = call(*arrays)
                over = {name for name in batch.summed if axes[1]}
                return {
                    name: jax.lax.psum(value, axes[1]) if name in over else value
                    for name, value in values.items()
                }

            of_operands, of_results = batch.shardings(mesh, axes)
            return mesh, local, of_results, of_operands

        def infer(mesh: Any, operands: Any, results: Any) -> Any:
            return batch.shardings(mesh, batch.mesh_axes(mesh, operands, results))[1]

        function = call
        # Inside shard_map the arrays are what one device holds.
        if batch.can_be_split() and not jax.sharding.get_abstract_mesh().manual_axes:
            function = custom_partitioning(call)
            function.def_partition(
                partition=partition,
                infer_sharding_from_operands=infer,
                sharding_rule=batch.rule(operands, results),
            )
        # Where shardings are part of the types, this is where the partitioner takes over from them.
        types = [jax.typeof(array) for array in arrays]
        mesh = types[0].sharding.mesh
        if mesh.explicit_axes:
            no_types = dict.fromkeys(results)
            axes = batch.mesh_axes(mesh, types, no_types)
            out_sharding = batch.shardings(mesh, axes)[1]
            function = jax.sharding.auto_axes(function, out_sharding=out_sharding)
        return function(*arrays)

    return spread
