"""Functions whose derivatives are known, and linear maps whose transposes are, as JAX calls them.

A derivative is a linear map of tangents. JAX would transpose it by transposing each of its steps;
the maps here bring their transposes along: reverse mode runs those, and forward mode the maps.

A rule of ``jax.custom_jvp`` will not do for the functions: JAX lets go of it where it has split a
loop for reverse mode, and could not differentiate that again.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir
from jax.sharding import NamedSharding, PartitionSpec

Arrays = tuple[jax.Array, ...]


# --- Functions ------------------------------------------------------------------------------------


class Function(Protocol):
    """A function of arrays whose derivative is known. It is hashable."""

    def __call__(self, *arrays: jax.Array) -> Any:
        """The results, in any structure."""
        ...

    def differentiate(self, arrays: Arrays, tangents: tuple[Any, ...]) -> tuple[Any, Any]:
        """The results, and their tangents in the same structure; ``None`` stands for none."""
        ...


@dataclass(frozen=True)
class _MappedFunction:
    """A function of arrays of which some have a further axis in front, and all results."""

    inner: Function
    size: int
    arrays: tuple[bool, ...]  # which have the axis

    def __call__(self, *arrays: jax.Array) -> Any:
        return jax.vmap(self.inner, _axes(self.arrays), axis_size=self.size)(*arrays)

    def differentiate(self, arrays: Arrays, tangents: tuple[Any, ...]) -> tuple[Any, Any]:
        axes = _axes(self.arrays)
        moved = tuple(None if t is None else axis for t, axis in zip(tangents, axes, strict=True))
        mapped = jax.vmap(self.inner.differentiate, (axes, moved), axis_size=self.size)
        results: tuple[Any, Any] = mapped(arrays, tangents)
        return results


_function_p = Primitive("jaxreg_function")
_function_p.multiple_results = True


def apply_function(of: Function, *arrays: jax.Array) -> Any:
    """Call a function."""
    program, structure = jax.make_jaxpr(of, return_shape=True)(*arrays)
    results = _function_p.bind(*arrays, of=of, program=program)
    return jax.tree.unflatten(jax.tree.structure(structure), results)


def _differentiate(
    primals: Sequence[Any], tangents: Sequence[Any], *, of: Function, program: Any
) -> tuple[list[Any], list[Any]]:
    moving = tuple(None if type(t) is ad.Zero else t for t in tangents)
    results, moved = of.differentiate(tuple(primals), moving)
    results = jax.tree.leaves(results)
    moved = jax.tree.leaves(moved, is_leaf=lambda x: x is None)
    zeros = [ad.Zero(jax.typeof(x).to_tangent_aval()) for x in results]
    return results, [zero if t is None else t for zero, t in zip(zeros, moved, strict=True)]


def _batch_function(
    arrays: Sequence[Any], axes: Sequence[int | None], *, of: Function, program: Any
) -> tuple[list[Any], list[int]]:
    size, _, arrays, mapped = _in_front(arrays, axes)
    results = jax.tree.leaves(apply_function(_MappedFunction(of, size, mapped), *arrays))
    return results, [0] * len(results)


def _in_front(
    arrays: Sequence[Any], axes: Sequence[int | None]
) -> tuple[int, Any, list[Any], tuple[bool, ...]]:
    """The size of the mapped axis, over which axes of the mesh it is spread by the arrays' types,
    the arrays with that axis in front, and which have it.
    """
    size, over = next(
        (x.shape[axis], _spread_over(x, axis))
        for x, axis in zip(arrays, axes, strict=True)
        if axis is not None
    )
    moved = [
        x if axis is None else jnp.moveaxis(x, axis, 0)
        for x, axis in zip(arrays, axes, strict=True)
    ]
    return size, over, moved, tuple(axis is not None for axis in axes)


def _spread_over(array: Any, axis: int) -> Any:
    spec = jax.typeof(array).sharding.spec
    return spec[axis] if axis < len(spec) else None


def _axes(mapped: Sequence[bool]) -> tuple[int | None, ...]:
    return tuple(0 if there else None for there in mapped)


def _run_program(*arrays: jax.Array, program: Any, **_: Any) -> Any:
    return jaxpr_as_fun(program)(*arrays)


@functools.partial(jax.jit, static_argnames=("of",))
def _run_function(*arrays: jax.Array, of: Function) -> Any:
    return jax.tree.leaves(of(*arrays))


_function_p.def_impl(lambda *arrays, of, program: _run_function(*arrays, of=of))
_function_p.def_abstract_eval(lambda *_, program, **__: program.out_avals)
ad.primitive_jvps[_function_p] = _differentiate
batching.primitive_batchers[_function_p] = _batch_function
mlir.register_lowering(_function_p, mlir.lower_fun(_run_program, multiple_results=True))


# --- Linear maps ----------------------------------------------------------------------------------


class LinearMap(Protocol):
    """A linear map of vectors, which depends on residuals. It is hashable.

    Neither function sums over what is mapped. Both may be differentiated by the residuals.
    """

    def forward(self, residuals: Arrays, vectors: Arrays) -> Arrays:
        """What the map makes of the vectors."""
        ...

    def transpose(self, residuals: Arrays, cotangents: Arrays) -> Arrays:
        """What its transpose makes of cotangents of the results: one array for each vector."""
        ...


@dataclass(frozen=True)
class _MappedMap:
    """A map of arrays of which some have a further axis in front, and all results."""

    inner: LinearMap
    size: int
    residuals: tuple[bool, ...]  # which have the axis
    vectors: tuple[bool, ...]

    def forward(self, residuals: Arrays, vectors: Arrays) -> Arrays:
        axes = (_axes(self.residuals), _axes(self.vectors))
        results: Arrays = jax.vmap(self.inner.forward, axes, axis_size=self.size)(
            residuals, vectors
        )
        return results

    def transpose(self, residuals: Arrays, cotangents: Arrays) -> Arrays:
        axes = (_axes(self.residuals), 0)
        results: Arrays = jax.vmap(self.inner.transpose, axes, axis_size=self.size)(
            residuals, cotangents
        )
        return tuple(
            x if mapped else x.sum(0) for x, mapped in zip(results, self.vectors, strict=True)
        )


_linear_map_p = Primitive("jaxreg_linear_map")
_linear_map_p.multiple_results = True


@functools.cache
def _partitioned() -> Any:
    """A program with a call that the partitioner asks about.

    JAX looks for one before it compiles, also in the parameters of primitives, and tells only those
    programs their devices that have one. Those of a map are not there to be seen: JAX lays them out
    where it compiles, and in reverse mode not at all.
    """

    @custom_partitioning
    def same(x: jax.Array) -> jax.Array:
        return x

    def partition(mesh: Any, operands: Any, result: Any) -> Any:
        return mesh, lambda x: x, result.sharding, (operands[0].sharding,)

    same.def_partition(
        partition=partition,
        infer_sharding_from_operands=lambda mesh, operands, result: operands[0].sharding,
        sharding_rule="i -> i",
    )
    return jax.make_jaxpr(same)(jax.ShapeDtypeStruct((1,), jnp.float32))


def linear_map(
    of: LinearMap,
    residuals: Sequence[jax.Array],
    vectors: Sequence[jax.Array],
    types: Sequence[Any],
) -> list[jax.Array]:
    """Apply a map. ``types`` are those of its results, as ``jax.typeof`` has them."""
    results: list[jax.Array] = _linear_map_p.bind(
        *residuals,
        *vectors,
        of=of,
        count=len(residuals),
        types=tuple(types),
        partitioned=_partitioned(),
    )
    return results


def _forward(*arrays: jax.Array, of: LinearMap, count: int, **_: Any) -> list[jax.Array]:
    return list(of.forward(arrays[:count], arrays[count:]))


def _jvp(
    primals: Sequence[Any], tangents: Sequence[Any], *, of: LinearMap, count: int, **others: Any
) -> tuple[list[Any], list[Any]]:
    parameters = {"of": of, "count": count, **others}
    results = _linear_map_p.bind(*primals, **parameters)
    residuals, vectors = tuple(primals[:count]), tuple(primals[count:])
    parts: list[list[Any]] = []
    if any(type(t) is not ad.Zero for t in tangents[count:]):
        moved = map(ad.instantiate_zeros, tangents[count:])
        parts.append(_linear_map_p.bind(*residuals, *moved, **parameters))
    moving = [i for i, t in enumerate(tangents[:count]) if type(t) is not ad.Zero]
    if moving:

        def of_residuals(*those: jax.Array) -> Arrays:
            changed = dict(zip(moving, those, strict=True))
            there = tuple(changed.get(i, x) for i, x in enumerate(residuals))
            return of.forward(there, vectors)

        at, along = [residuals[i] for i in moving], [tangents[i] for i in moving]
        parts.append(list(jax.jvp(of_residuals, at, along)[1]))
    sums = [functools.reduce(jnp.add, those) for those in zip(*parts, strict=True)]
    return results, sums


def _transpose(
    cotangents: Sequence[Any], *arrays: Any, of: LinearMap, count: int, **_: Any
) -> list[Any]:
    results: list[Any] = [None] * len(arrays)
    if all(type(x) is ad.Zero for x in cotangents):
        return results
    pulled = of.transpose(tuple(arrays[:count]), tuple(map(ad.instantiate_zeros, cotangents)))
    for i, value in enumerate(pulled, count):
        if ad.is_undefined_primal(arrays[i]):
            results[i] = value
    return results


def _batch(
    arrays: Sequence[Any],
    axes: Sequence[int | None],
    *,
    of: LinearMap,
    count: int,
    types: Any,
    **others: Any,
) -> tuple[list[Any], list[int]]:
    size, over, arrays, mapped = _in_front(arrays, axes)
    results = _linear_map_p.bind(
        *arrays,
        of=_MappedMap(of, size, mapped[:count], mapped[count:]),
        count=count,
        types=tuple(_with_axis(kind, size, over) for kind in types),
        **others,
    )
    return results, [0] * len(types)


def _with_axis(kind: Any, size: int, over: Any) -> Any:
    sharding = kind.sharding
    spec = PartitionSpec(over, *sharding.spec)
    return kind.update(shape=(size, *kind.shape), sharding=NamedSharding(sharding.mesh, spec))


_linear_map_p.def_impl(jax.jit(_forward, static_argnames=("of", "count", "types", "partitioned")))
_linear_map_p.def_abstract_eval(lambda *_, types, **__: list(types))
ad.primitive_jvps[_linear_map_p] = _jvp
ad.primitive_transposes[_linear_map_p] = _transpose
batching.primitive_batchers[_linear_map_p] = _batch
mlir.register_lowering(_linear_map_p, mlir.lower_fun(_forward, multiple_results=True))
