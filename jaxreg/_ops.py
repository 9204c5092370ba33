"""The only module of this package that runs kernels.

An op of the table is called through :func:`apply`: jitted, differentiable, and mappable. Inside the
table every array has one more axis in front, the group axis, which is where ``vmap`` puts its
mapped axis; nothing is ever summed across groups.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from jaxreg._derivatives import of_gradient, of_op
from jaxreg._framework import JAX
from jaxreg._primitives import apply_function
from jaxreg._sharding import Operands, Reduction, align, spread_over_devices, vary_alike
from jaxreg._shared_planes import Setting, on_shared_planes, setting
from jaxreg._slabs import SLAB_OPS, axes_of_slabs
from regkernels import table
from regkernels.definitions import Framework
from regkernels.options import is_number, plain_number
from regkernels.table import HALVES, OPS, Attribute, Input, Op, bit_mask

_OLDEST_JAX = (0, 8, 2)
if jax.__version_info__ < _OLDEST_JAX:
    raise ImportError(
        f"jaxreg: expected jax {'.'.join(map(str, _OLDEST_JAX))} or newer, got {jax.__version__}"
    )

Attributes = tuple[Any, ...]
Results = tuple[str, ...]


def _target(op: str) -> str:
    return f"jaxreg.{op}"


def _register() -> None:
    for platform, name_in_jax in (("cpu", "cpu"), ("cuda", "CUDA")):
        for op, handler in table.xla_registrations(platform).items():
            jax.ffi.register_ffi_target(_target(op), handler, platform=name_in_jax)


_register()


def _spec(array: jax.Array | None) -> tuple[str, tuple[int, ...]] | None:
    return None if array is None else (np.dtype(array.dtype).name, array.shape)


def _ffi_attribute(declared: Attribute, value: Any) -> Any:
    if declared.kind == "choice":
        return np.int64(declared.choices.index(value))
    if declared.kind in ("bool", "int"):
        return np.int64(value)
    if declared.kind == "float":
        return np.float64(value)
    return np.asarray(value, np.int64 if declared.kind == "ints" else np.float64)


def _emit(
    op: Op,
    attributes: Mapping[str, Any],
    wanted: int,
    arrays: Mapping[str, jax.Array],
    slab: Sequence[int] = (),
    first: jax.Array | None = None,
    *,
    overwrites: bool = False,
) -> dict[str, jax.Array]:
    """Emit the custom call of an op for operands by name; for ``slab``, see `jaxreg._slabs`."""
    attributes = {name: attributes[name] for name in op.attribute_names}
    types = _infer(op, attributes, wanted, arrays, slab)
    ffi_attributes = {
        declared.name: _ffi_attribute(declared, attributes[declared.name])
        for declared in op.attributes
    }
    present = [name in arrays for name in op.input_names]
    ffi_attributes["wanted"] = np.int64(wanted)
    ffi_attributes["present"] = np.int64(bit_mask(present))
    ffi_attributes["slab"] = np.asarray(slab, np.int64)
    operands = [arrays[name] for name in op.input_names if name in arrays]
    like = jax.typeof(operands[0])  # which carries the axes of shard_map it varies over
    results = [
        like.update(shape=shape, dtype=jnp.dtype(dtype), weak_type=False)
        for dtype, shape in types.values()
    ]
    there = [name for name in op.input_names if name in arrays]
    aliases = _in_place(op, there, operands, types, overwrites)
    # XLA keeps what is in place where it is only if nothing, not even another shape, comes between.
    grouped = any(x.shape[0] != 1 for x in (*operands, *results))
    ffi_attributes["grouped"] = np.int64(grouped)
    if not grouped:
        operands = [jax.lax.squeeze(x, (0,)) for x in operands]
        results = [x.update(shape=x.shape[1:]) for x in results]
    if first is not None:
        operands.append(first)
    values = jax.ffi.ffi_call(
        _target(op.name), results, vmap_method=None, input_output_aliases=aliases
    )(*operands, **ffi_attributes)
    if not grouped:
        values = [jax.lax.expand_dims(x, (0,)) for x in values]
    by_name = dict(zip(types, values, strict=True))
    return {x: value for x, value in by_name.items() if x not in _workspaces(op)}


def _infer(
    op: Op,
    attributes: Mapping[str, Any],
    wanted: int,
    arrays: Mapping[str, Any],
    slab: Sequence[int] = (),
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The dtype and the shape of each output, by name."""
    inputs = [_spec(arrays.get(name)) for name in op.input_names]
    outputs = table.infer(op.name, inputs, attributes, wanted, slab)
    return {x: spec for x, spec in zip(op.output_names, outputs, strict=True) if spec}


_OVERWRITTEN = {
    "step_gradient": ("pull", "weights"),
    "riemannian_adam_step": ("gradient", "scratch"),
    "compose": ("v", ""),
    "invert_displacement": ("initial", ""),
}
"""The operand whose memory an op's result may take if asked to, as it is read before.

Not where there is a workspace of that name: then the op reads the operand elsewhere, too.
"""


def _in_place(
    op: Op,
    names: Sequence[str],
    operands: Sequence[jax.Array],
    results: Mapping[str, tuple[str, tuple[int, ...]]],
    overwrites: bool,
) -> dict[int, int]:
    """Which results may take the memory of which operands, by their places.

    What an op calls ``next_x`` it may write in the place of ``x``. In a loop whose state it is,
    neither is then copied.
    """
    pairs = {name: name[5:] for name in results if name.startswith("next_")}
    operand, unless = _OVERWRITTEN.get(op.name, ("", ""))
    if overwrites and operand and unless not in results:
        pairs["output"] = operand
    places = {name: place for place, name in enumerate(results)}
    return {
        names.index(operand): places[result]
        for result, operand in pairs.items()
        if operand in names and results[result] == _spec(operands[names.index(operand)])
    }


def _workspaces(op: Op) -> set[str]:
    return {op.output_names[place] for place in op.workspaces}


@dataclasses.dataclass(frozen=True)
class _Run:
    """Runs an op, or others that are steps of it: see `jaxreg._slabs.Run`."""

    op: Op
    attributes: Mapping[str, Any]
    wanted: int
    overwrites: bool = False

    @property
    def results(self) -> frozenset[str]:
        names = self.op.output_names
        return frozenset(name for i, name in enumerate(names) if self.wanted >> i & 1)

    def __call__(
        self,
        arrays: Mapping[str, jax.Array],
        *,
        attributes: Mapping[str, Any] | None = None,
        slab: Sequence[int] = (),
        first: jax.Array | None = None,
        step: str | None = None,
        results: Collection[str] = ("output",),
    ) -> dict[str, jax.Array]:
        changed = {**self.attributes, **(attributes or {})}
        if step is None:
            # Of a slab the ends are computed again, from the same operands.
            overwrites = self.overwrites
            return _emit(self.op, changed, self.wanted, arrays, slab, first, overwrites=overwrites)
        return _emit(OPS[step], changed, OPS[step].mask(results), arrays, slab, first)


@functools.lru_cache(maxsize=4096)
def _kernel(
    name: str,
    attributes: Attributes,
    wanted: int,
    present: tuple[bool, ...],
    around: Setting,
) -> Callable[..., dict[str, jax.Array]]:
    """A function of the operands that are present, with the group axis, to the wanted outputs."""
    op = OPS[name]
    named = dict(zip(op.attribute_names, attributes, strict=True))
    operand_names = [x for x, there in zip(op.input_names, present, strict=True) if there]

    run = _Run(op, named, wanted, around.overwrites)

    def result_shapes(*arrays: jax.Array) -> dict[str, tuple[int, ...]]:
        specs = _infer(op, named, wanted, dict(zip(operand_names, arrays, strict=True)))
        return {x: shape for x, (_, shape) in specs.items() if x not in _workspaces(op)}

    weight = next((x.name for x in op.outputs if x.role == "weight"), None)
    reduction = Reduction(named.get("reduction", "none"), weight)
    slab_op = SLAB_OPS.get(name.removesuffix("_grad"))
    shared, reach = around.shared, around.reach
    if shared is not None and slab_op is not None:
        spread = on_shared_planes(run, operand_names, named, slab_op, shared, reach)
    else:
        spread = spread_over_devices(
            run, operand_names, result_shapes, reduction, named, slab_op, reach
        )
    mapped_call = jax.custom_batching.custom_vmap(spread)

    @mapped_call.def_vmap
    def _fold(
        size: int, batched: Sequence[bool], *arrays: jax.Array
    ) -> tuple[dict[str, jax.Array], dict[str, bool]]:
        # (mapped, groups, ...) becomes (mapped * groups, ...). An operand with one group serves all
        # of them; only one that is mapped by some but not all of several nested maps is copied.
        groups = max(
            array.shape[1 if is_batched else 0]
            for array, is_batched in zip(arrays, batched, strict=True)
        )

        def fold(array: jax.Array, is_batched: bool) -> jax.Array:
            if not is_batched:
                if array.shape[0] == 1:
                    return array
                array = array[None]
            elif array.shape[1] == groups:
                return array.reshape(size * groups, *array.shape[2:])
            array = jnp.broadcast_to(array, (size, groups, *array.shape[2:]))
            return array.reshape(size * groups, *array.shape[2:])

        results = mapped_call(*(fold(a, b) for a, b in zip(arrays, batched, strict=True)))
        unfolded = {
            x: result.reshape(size, groups, *result.shape[1:]) for x, result in results.items()
        }
        return unfolded, dict.fromkeys(unfolded, True)

    return mapped_call


@dataclasses.dataclass(frozen=True)
class _Outputs:
    """The outputs of an op, by name, of the operands that are present, as the user has them.

    Those have no group axis.
    """

    name: str
    attributes: Attributes
    wanted: int
    around: Setting
    present: tuple[bool, ...]

    def __call__(self, *arrays: jax.Array) -> dict[str, jax.Array]:
        kernel = _kernel(self.name, self.attributes, self.wanted, self.present, self.around)
        outputs = kernel(*(array[None] for array in arrays))
        names = OPS[self.name].output_names
        asked = {x for i, x in enumerate(names) if self.wanted >> i & 1}
        return {x: output[0] for x, output in outputs.items() if x in asked}

    def differentiate(self, arrays: Any, tangents: Any) -> tuple[dict[str, jax.Array], Any]:
        differentiated = self.name.removesuffix("_grad")
        derivatives = of_op if differentiated == self.name else of_gradient
        call = _Call(differentiated, self.attributes, self.around)
        return derivatives(call, self.wanted, self._operands(arrays), self._operands(tangents))

    def _operands(self, arrays: Sequence[Any]) -> list[Any]:
        remaining = iter(arrays)
        return [next(remaining) if there else None for there in self.present]


def _run(
    name: str,
    attributes: Attributes,
    wanted: int,
    around: Setting,
    operands: Operands,
) -> dict[str, jax.Array]:
    present = tuple(operand is not None for operand in operands)
    outputs: dict[str, jax.Array] = apply_function(
        _Outputs(name, attributes, wanted, around, present),
        *(operand for operand in operands if operand is not None),
    )
    return outputs


@dataclasses.dataclass(frozen=True)
class _Call:
    """A call of an op but for its operands: see `jaxreg._derivatives.Call`."""

    name: str
    ordered: Attributes
    around: Setting

    @property
    def op(self) -> Op:
        return OPS[self.name]

    @property
    def attributes(self) -> dict[str, Any]:
        return dict(zip(self.op.attribute_names, self.ordered, strict=True))

    @property
    def framework(self) -> Framework:
        return JAX

    @property
    def shares_planes(self) -> bool:
        return self.around.shared is not None

    def _alike(self, operands: Operands) -> Operands:
        # What devices that share planes have in common stays so: see `align`.
        return operands if self.shares_planes else vary_alike(operands)

    def run(self, operands: Mapping[str, jax.Array], wanted: int) -> dict[str, jax.Array]:
        inputs = self._alike(tuple(map(operands.get, self.op.input_names)))
        outputs: dict[str, jax.Array] = _run(self.name, self.ordered, wanted, self.around, inputs)
        return outputs

    def gradients(
        self, values: Mapping[str, jax.Array], cotangent: jax.Array, names: Collection[str]
    ) -> dict[str, jax.Array]:
        gradient = self.op.gradient
        assert gradient is not None
        operands = {**values, "grad_output": cotangent}
        inputs = self._alike(tuple(map(operands.get, gradient.input_names)))
        wanted = gradient.mask([f"grad_{x}" for x in names])
        outputs = _run(gradient.name, self.ordered, wanted, self.around, inputs)
        return {x: outputs[f"grad_{x}"] for x in names}

    def of(self, op: str, attributes: Mapping[str, Any]) -> _Call:
        return _Call(op, tuple(attributes[x] for x in OPS[op].attribute_names), self.around)


def _dtype_names(operands: Operands) -> list[str | None]:
    return [None if x is None else x.dtype.name for x in operands]


def _axes_of_planes(op: Op, attributes: Attributes, operands: Operands) -> list[int | None]:
    """For each operand the axis along which it may be a slab, as the user has it."""
    if op.name not in SLAB_OPS:
        return [None] * len(operands)
    named = dict(zip(op.attribute_names, attributes, strict=True))
    there = zip(op.input_names, operands, strict=True)
    shapes = {name: (1, *x.shape) for name, x in there if x is not None}
    axes = axes_of_slabs(SLAB_OPS[op.name], named, shapes)
    return [
        axes[name][1] - 1 if name in axes and name in shapes else None for name in op.input_names
    ]


@functools.partial(jax.jit, static_argnums=(0, 1, 2), static_argnames=("around",))
def _jitted(
    name: str,
    attributes: Attributes,
    results: Results,
    operands: Operands,
    around: Setting,
) -> tuple[jax.Array, ...]:
    # Conversions are outside of the differentiated function, so that JAX returns each gradient in
    # the dtype of its operand.
    dtypes, result_dtype = OPS[name].kernel_dtypes(_dtype_names(operands))
    converted = tuple(
        x if x is None else x.astype(d) for x, d in zip(operands, dtypes, strict=True)
    )
    planes = _axes_of_planes(OPS[name], attributes, converted)
    apart = () if around.shared is None else (around.shared.axis,)
    aligned = align(converted, planes, apart)
    outputs = _run(name, attributes, OPS[name].mask(results), around, aligned)
    first, *others = (outputs[result] for result in results)
    return (first if result_dtype is None else first.astype(result_dtype), *others)


def widened(array: Any) -> Any:
    """An array of half precision as float32, for results that other ops go on with."""
    if isinstance(array, jax.Array | np.ndarray) and array.dtype.name in HALVES:
        return jnp.asarray(array, jnp.float32)
    return array


def of_items(value: Any, like: Any, *sizes: int) -> Any:
    """Numbers for each item, ``(N, *sizes)``; what is neither a number nor an array stays as it is.

    A number and an array without the first axes are for all of them.
    """
    if is_number(value):
        is_double = getattr(like, "dtype", None) == np.float64
        return np.full((1, *sizes), value, np.float64 if is_double else np.float32)
    if not isinstance(value, jax.Array | np.ndarray) or value.ndim > len(sizes):
        return value
    return jnp.broadcast_to(value, (1, *sizes)) if value.ndim == 0 else jnp.asarray(value)[None]


def _check_operand(op: str, declared: Input, value: Any) -> None:
    if value is None and declared.is_optional:
        return
    if not isinstance(value, jax.Array | np.ndarray):
        raise TypeError(
            f"{op}: {declared.name}: expected a JAX or NumPy array"
            f"{' or None' if declared.is_optional else ''}, got {type(value).__name__}"
        )
    if value.dtype != bool and not jnp.issubdtype(value.dtype, np.number):
        raise TypeError(f"{op}: {declared.name}: expected an array of numbers, got {value.dtype}")


def _check_sizes(op: str, declared: Input, array: jax.Array | None) -> None:
    # The symbols of `jax.export.symbolic_shape` cannot be numbers for the op's own checks.
    if array is not None and not all(isinstance(size, int) for size in array.shape):
        sizes = ", ".join(map(str, array.shape))
        raise NotImplementedError(
            f"{op}: {declared.name}: expected sizes that are numbers, got ({sizes}): "
            "symbolic shapes are not supported, export the function once for each shape"
        )


def _checked(
    op: Op, operands: Sequence[Any], attributes: dict[str, Any], results: Results
) -> tuple[Operands, dict[str, Any]]:
    """The operands as arrays, and the attributes as plain numbers, after the op's checks."""
    for declared, value in zip(op.inputs, operands, strict=True):
        _check_operand(op.name, declared, value)
    arrays = tuple(None if x is None else jnp.asarray(x) for x in operands)
    for declared, array in zip(op.inputs, arrays, strict=True):
        _check_sizes(op.name, declared, array)
    attributes = {key: plain_number(value) for key, value in attributes.items()}
    # The op's own checks come before jit: what they refuse may not even be hashable.
    dtypes, _ = op.kernel_dtypes(_dtype_names(arrays))
    specs = [
        None if x is None or dtype is None else (dtype, (1, *x.shape))
        for x, dtype in zip(arrays, dtypes, strict=True)
    ]
    table.infer(op.name, specs, attributes, op.mask(results))
    return arrays, attributes


def apply(name: str, operands: Sequence[Any], attributes: dict[str, Any]) -> jax.Array:
    """Call an op of the table.

    Parameters
    ----------
    name
        The op's.
    operands
        Its inputs in the order of the table, ``None`` where an optional one is absent.
    attributes
        All its attributes by name, as plain Python values.

    Returns
    -------
    The op's result.

    Raises
    ------
    ValueError, TypeError
        What the op's checks find, naming the argument.
    """
    return apply_for(("output",), name, operands, attributes)[0]


def apply_for(
    results: Results, name: str, operands: Sequence[Any], attributes: dict[str, Any]
) -> tuple[jax.Array, ...]:
    """Call an op of the table for several results, by name, of which ``output`` is the first.

    Otherwise as :func:`apply`. An op with a gradient has one result.
    """
    op = OPS[name]
    arrays, attributes = _checked(op, operands, attributes, results)
    if results == ("output",) and op.has_labels:
        # Integers do not vary with what they are computed from: as with any other function of JAX
        # that returns them, their tangent is float0.
        arrays = jax.lax.stop_gradient(arrays)
    ordered = tuple(attributes[key] for key in op.attribute_names)
    values: tuple[jax.Array, ...] = _jitted(name, ordered, results, arrays, around=setting())
    return values


def apply_to_spline(
    name: str, operands: Sequence[Any], attributes: dict[str, Any], *, channel_last: bool
) -> jax.Array:
    """Call an op for the spline coefficients of what its first operand holds.

    Otherwise as :func:`apply`. The coefficients are computed, and sampled, in the dtype that the op
    computes in, and the result is rounded once.
    """
    # What is wrong with an operand is told by the name that it has there.
    (first, *others), _ = _checked(OPS[name], operands, attributes, ("output",))
    assert first is not None
    dtypes = _dtype_names((first, *others))
    _, result = OPS[name].kernel_dtypes(dtypes)
    padding = {key: attributes[key] for key in ("padding_mode", "align_corners")}
    wide = first.astype(np.float64) if "float64" in dtypes else first
    coefficients = apply("spline_coefficients", (wide,), padding | {"channel_last": channel_last})
    value = apply(name, (coefficients, *others), attributes)
    return value.astype(first.dtype if result is None else result)


def export_checks() -> list[jax.export.DisabledSafetyCheck]:
    """What ``jax.export`` has to be told to take a function that calls this package.

    It cannot know whether the kernels will stay as they are, and asks for a word on each. They are
    those of one version of this package: import that where the exported function is called.

    A function over several devices has to be exported under ``jax.shard_map``. The rules by which
    ``jit`` splits a call among them are Python functions that the compiler calls; JAX, 0.10.2 too,
    stores none and says "serialization of host_callbacks is not yet implemented". In
    ``jax.shard_map`` a loss is that of the device's own items: ``jax.lax.pmean`` makes a mean of
    them, as ``jax.lax.psum`` a sum.

    Returns
    -------
    list of jax.export.DisabledSafetyCheck
        To be passed as ``disabled_checks``.

    Examples
    --------
    >>> exported = jax.export.export(jax.jit(function), disabled_checks=jaxreg.export_checks())
    """
    return [jax.export.DisabledSafetyCheck.custom_call(_target(op)) for op in OPS]
