"""The only module of this package that talks to the extension.

An op of the extension's table is called through :func:`apply`: jitted, differentiable in reverse
mode, and mappable. Inside the table every array has one more axis in front, the group axis, which
is where ``vmap`` puts its mapped axis; nothing is ever summed across groups.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from jaxreg._sharding import Operands, Reduction, align, spread_over_batch
from regkernels import _core

_OLDEST_JAX = (0, 8, 2)
if jax.__version_info__ < _OLDEST_JAX:
    raise ImportError(
        f"jaxreg: expected jax {'.'.join(map(str, _OLDEST_JAX))} or newer, got {jax.__version__}"
    )

_TABLE = _core.ops()
_PLATFORMS = ("cpu", "cuda")
_FLOAT32, _FLOAT64 = jnp.dtype("float32"), jnp.dtype("float64")
_HALVES = (jnp.dtype("float16"), jnp.dtype("bfloat16"))
_FLOATS = (*_HALVES, _FLOAT32, _FLOAT64)

Attributes = tuple[Any, ...]
Results = tuple[str, ...]


def _target(op: str) -> str:
    return f"jaxreg.{op}"


def _register() -> None:
    for platform in _PLATFORMS:
        for op, handler in _core.xla_registrations(platform).items():
            jax.ffi.register_ffi_target(
                _target(op), handler, platform="CUDA" if platform == "cuda" else platform
            )


_register()


def _spec(array: jax.Array | None) -> tuple[str, tuple[int, ...]] | None:
    return None if array is None else (np.dtype(array.dtype).name, array.shape)


def _ffi_attribute(value: Any, kind: str, choices: Sequence[str]) -> Any:
    if kind == "choice":
        return np.int64(choices.index(value))
    if kind in ("bool", "int"):
        return np.int64(value)
    if kind == "float":
        return np.float64(value)
    return np.asarray(value, np.int64 if kind == "ints" else np.float64)


def _mask(flags: Sequence[bool]) -> int:
    return sum(1 << i for i, flag in enumerate(flags) if flag)


@functools.lru_cache(maxsize=4096)
def _kernel(
    op: str, attributes: Attributes, wanted: int, present: tuple[bool, ...]
) -> Callable[..., dict[str, jax.Array]]:
    """A function of the operands that are present, with the group axis, to the wanted outputs."""
    entry = _TABLE[op]
    specs = entry["attributes"]
    named = {name: value for (name, _, _), value in zip(specs, attributes, strict=True)}
    ffi_attributes = {
        name: _ffi_attribute(value, kind, choices)
        for (name, kind, choices), value in zip(specs, attributes, strict=True)
    }
    ffi_attributes["wanted"] = np.int64(wanted)
    ffi_attributes["present"] = np.int64(_mask(present))

    names = [name for (name, *_), there in zip(entry["inputs"], present, strict=True) if there]

    def infer(*arrays: jax.Array) -> dict[str, tuple[str, tuple[int, ...]]]:
        remaining = iter(arrays)
        inputs = [_spec(next(remaining)) if there else None for there in present]
        outputs = _core.infer(op, inputs, named, wanted)
        return {
            name: spec
            for (name, _), spec in zip(entry["outputs"], outputs, strict=True)
            if spec is not None
        }

    roles = dict(entry["outputs"])

    def call(*arrays: jax.Array) -> dict[str, jax.Array]:
        like = jax.typeof(arrays[0])  # which carries the axes of shard_map it varies over
        specs = infer(*arrays)
        types = [
            like.update(shape=shape, dtype=jnp.dtype(dtype), weak_type=False)
            for dtype, shape in specs.values()
        ]
        values = jax.ffi.ffi_call(_target(op), types, vmap_method=None)(*arrays, **ffi_attributes)
        by_name = dict(zip(specs, values, strict=True))
        return {name: value for name, value in by_name.items() if roles[name] != "workspace"}

    def result_shapes(*arrays: jax.Array) -> dict[str, tuple[int, ...]]:
        specs = infer(*arrays)
        return {name: shape for name, (_, shape) in specs.items() if roles[name] != "workspace"}

    reduction = Reduction(
        named.get("reduction", "none"),
        next((name for name, role in entry["outputs"] if role == "weight"), None),
    )
    spread = spread_over_batch(call, names, result_shapes, reduction)
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
            name: result.reshape(size, groups, *result.shape[1:])
            for name, result in results.items()
        }
        return unfolded, dict.fromkeys(unfolded, True)

    # The custom_vjp below takes every first derivative. What gets here is a second one.
    once = jax.custom_jvp(mapped_call)

    @once.defjvp
    def _refuse(*_: Any) -> Any:
        raise NotImplementedError(
            f"jaxreg: {op.removesuffix('_grad')} can be differentiated once, not twice"
        )

    return once


def _run(op: str, attributes: Attributes, wanted: int, operands: Operands) -> dict[str, jax.Array]:
    """Call an op on arrays as the user has them, without the group axis: its outputs by name."""
    present = tuple(operand is not None for operand in operands)
    arrays = [operand[None] for operand in operands if operand is not None]
    outputs = _kernel(op, attributes, wanted, present)(*arrays)
    return {name: output[0] for name, output in outputs.items()}


def _asked_for(op: str, results: Sequence[str]) -> int:
    return _mask([name in results for name, _ in _TABLE[op]["outputs"]])


def _gradient_inputs(op: str) -> set[str]:
    gradient = _TABLE[op]["gradient"]
    return {name for name, *_ in _TABLE[gradient]["inputs"]} if gradient else set()


def _has_gradient(op: str, name: str) -> bool:
    outputs = _TABLE[op]["outputs"]
    if _TABLE[op]["gradient"]:
        outputs += _TABLE[_TABLE[op]["gradient"]]["outputs"]
    return f"grad_{name}" in dict(outputs)


def _extra_outputs(op: str) -> list[str]:
    """What an op computes for its backward pass."""
    return [name for name, role in _TABLE[op]["outputs"] if role in ("unit_gradient", "saved")]


def _times(unit_gradient: jax.Array, cotangent: jax.Array, dtype: Any) -> jax.Array:
    axes = range(cotangent.ndim, unit_gradient.ndim)
    return (unit_gradient * jnp.expand_dims(cotangent, tuple(axes))).astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _differentiable(
    op: str, attributes: Attributes, results: Results, operands: Operands
) -> tuple[jax.Array, ...]:
    outputs = _run(op, attributes, _asked_for(op, results), operands)
    return tuple(outputs[name] for name in results)


def _forward(op: str, attributes: Attributes, results: Results, operands: Any) -> Any:
    entry = _TABLE[op]
    values = {
        name: None if x is None else x.value
        for (name, *_), x in zip(entry["inputs"], operands, strict=True)
    }
    perturbed = [
        name
        for (name, *_), x in zip(entry["inputs"], operands, strict=True)
        if x is not None and x.perturbed
    ]
    for name in perturbed:
        if not _has_gradient(op, name):
            raise TypeError(
                f"{op}: {name}: expected an array that does not depend on what is differentiated, "
                f"as {op} has no gradient for it; got one that does. jax.lax.stop_gradient makes "
                "it a constant"
            )
    asked = {f"grad_{name}" for name in perturbed}
    wanted = [
        name in results
        or (role == "unit_gradient" and name in asked)
        or (role == "saved" and bool(perturbed))
        for name, role in entry["outputs"]
    ]
    outputs = _run(op, attributes, _mask(wanted), tuple(values.values()))
    # Where all it takes is unit gradients, nothing else is held for the backward pass.
    kept = asked.intersection(outputs)
    if kept != asked:
        kept |= _gradient_inputs(op)
    inputs = tuple(
        None if x is None else x if name in kept else jnp.empty((0,), x.dtype)
        for name, x in values.items()
    )
    extra = {name: outputs.get(name) if name in kept else None for name in _extra_outputs(op)}
    extras = tuple(jnp.empty((0,), jnp.int8) if x is None else x for x in extra.values())
    # What is asked for and kept is known now and needed at the backward pass's trace. It travels as
    # the shape of an empty array, and what is not kept as an empty array too: JAX may trace this
    # rule for one choice, reuse it for another, and keep the residuals' structure (also static
    # values in it) of only one of them.
    flags = (
        _mask([name in perturbed for name in values]),
        _mask([x is not None for x in extra.values()]),
    )
    values_of_results = tuple(outputs[name] for name in results)
    return values_of_results, (inputs, extras, jnp.empty((*flags, 0), jnp.int8))


def _backward(
    op: str, attributes: Attributes, results: Results, residuals: Any, cotangents: Any
) -> Any:
    inputs, extras, flags = residuals
    names = [name for name, *_ in _TABLE[op]["inputs"]]
    perturbed = [name for i, name in enumerate(names) if flags.shape[0] >> i & 1]
    cotangent = cotangents[0]  # an op with a gradient has one result
    if isinstance(cotangent, jax.custom_derivatives.SymbolicZero) or not perturbed:
        return ((None,) * len(names),)
    values = dict(zip(names, inputs, strict=True))
    extra = dict(zip(_extra_outputs(op), extras, strict=True))
    extra = {name: x for i, (name, x) in enumerate(extra.items()) if flags.shape[1] >> i & 1}
    gradients = {
        f"grad_{name}": _times(extra[f"grad_{name}"], cotangent, values[name].dtype)
        for name in perturbed
        if f"grad_{name}" in extra
    }
    asked = {f"grad_{name}" for name in perturbed} - set(gradients)
    if asked:
        gradient_op = _TABLE[op]["gradient"]
        entry = _TABLE[gradient_op]
        values |= extra | {"grad_output": cotangent}
        operands = tuple(values.get(name) for name, *_ in entry["inputs"])
        wanted = _mask([name in asked for name, _ in entry["outputs"]])
        gradients |= _run(gradient_op, attributes, wanted, operands)
    return (tuple(gradients.get(f"grad_{name}") for name in names),)


_differentiable.defvjp(_forward, _backward, symbolic_zeros=True)


def _kernel_dtypes(op: str, operands: Operands) -> tuple[list[jnp.dtype | None], jnp.dtype | None]:
    """The dtypes that the kernels take the operands in, and what their result is to become.

    Fields lead to coordinates and are computed with as they are; images may be stored in half
    precision; labels are integers. The result is the image's again if that was converted, has the
    fields' common dtype where there is neither an image nor labels, and stays in what it was
    computed in where images are compared. ``None``: as it is.
    """
    known = [x.dtype for x in operands if x is not None and x.dtype in _FLOATS]
    arithmetic = _FLOAT64 if _FLOAT64 in known else _FLOAT32
    taken: list[jnp.dtype | None] = []
    result, has_image = None, False
    for (_, _, kind), x in zip(_TABLE[op]["inputs"], operands, strict=True):
        if x is None:
            taken.append(None)
            continue
        stays = kind == "image" and x.dtype in _HALVES and arithmetic == _FLOAT32
        converts = x.dtype in _FLOATS and not stays and kind != "labels"
        taken.append(arithmetic if converts else x.dtype)
        if kind != "field" and not has_image:
            has_image = True
            result = None if stays or kind in ("compared", "labels") else x.dtype
    if not has_image and known:
        result = functools.reduce(jnp.promote_types, known)
    return taken, result


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _jitted(
    op: str, attributes: Attributes, results: Results, operands: Operands
) -> tuple[jax.Array, ...]:
    # Conversions are outside of the differentiated function, so that JAX returns each gradient in
    # the dtype of its operand.
    dtypes, result_dtype = _kernel_dtypes(op, operands)
    converted = tuple(
        x if x is None else x.astype(d) for x, d in zip(operands, dtypes, strict=True)
    )
    first, *others = _differentiable(op, attributes, results, align(converted))
    return (first if result_dtype is None else first.astype(result_dtype), *others)


def widened(array: Any) -> Any:
    """An array of half precision as float32, for results that other ops go on with."""
    if isinstance(array, jax.Array | np.ndarray) and array.dtype in _HALVES:
        return jnp.asarray(array, jnp.float32)
    return array


def static_tuple(value: Any) -> tuple[Any, ...]:
    """One value or several, as a tuple.

    An empty sequence is wrapped as it is, for the op's check to refuse: no values mean that the
    argument was not given.
    """
    if isinstance(value, np.ndarray):
        value = value.tolist()
    return tuple(value) if isinstance(value, list | tuple) and value else (value,)


def plain_number(value: Any) -> Any:
    """Python's own number for a NumPy one."""
    if isinstance(value, tuple):
        return tuple(plain_number(v) for v in value)
    is_scalar = isinstance(value, np.generic | np.ndarray) and value.ndim == 0
    return value.item() if is_scalar else value


def _check_operand(op: str, name: str, optional: bool, value: Any) -> None:
    if value is None and optional:
        return
    if not isinstance(value, jax.Array | np.ndarray):
        raise TypeError(
            f"{op}: {name}: expected a JAX or NumPy array{' or None' if optional else ''}, "
            f"got {type(value).__name__}"
        )
    if value.dtype != bool and not jnp.issubdtype(value.dtype, np.number):
        raise TypeError(f"{op}: {name}: expected an array of numbers, got {value.dtype}")


def apply(op: str, operands: Sequence[Any], attributes: dict[str, Any]) -> jax.Array:
    """Call an op of the table.

    Parameters
    ----------
    op
        Its name.
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
    return apply_for(("output",), op, operands, attributes)[0]


def apply_for(
    results: Results, op: str, operands: Sequence[Any], attributes: dict[str, Any]
) -> tuple[jax.Array, ...]:
    """Call an op of the table for several results, by name, of which ``output`` is the first.

    Otherwise as :func:`apply`. An op with a gradient has one result.
    """
    entry = _TABLE[op]
    for (name, optional, _), value in zip(entry["inputs"], operands, strict=True):
        _check_operand(op, name, optional, value)
    arrays = tuple(None if x is None else jnp.asarray(x) for x in operands)
    attributes = {name: plain_number(value) for name, value in attributes.items()}
    # The op's own checks come before jit: what they refuse may not even be hashable.
    dtypes, _ = _kernel_dtypes(op, arrays)
    specs = [
        None if x is None or d is None else (d.name, (1, *x.shape))
        for x, d in zip(arrays, dtypes, strict=True)
    ]
    _core.infer(op, specs, attributes, _asked_for(op, results))
    if results == ("output",) and any(kind == "labels" for *_, kind in entry["inputs"]):
        # Integers do not vary with what they are computed from: as with any other function of JAX
        # that returns them, their tangent is float0.
        arrays = jax.lax.stop_gradient(arrays)
    ordered = tuple(attributes[name] for name, _, _ in entry["attributes"])
    values: tuple[jax.Array, ...] = _jitted(op, ordered, results, arrays)
    return values


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
    return [jax.export.DisabledSafetyCheck.custom_call(_target(op)) for op in _TABLE]
