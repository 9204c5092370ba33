"""The only module of this package that talks to the extension.

An op of the extension's table is called through :func:`apply`: jitted, differentiable in reverse
mode, and mappable. Inside the table every array has one more axis in front, the group axis, which
is where ``vmap`` puts its mapped axis; nothing is ever summed across groups.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import _regcore
import jax
import jax.numpy as jnp
import numpy as np

_TABLE = _regcore.ops()
_PLATFORMS = ("cpu", "cuda")

Attributes = tuple[Any, ...]
Operands = tuple[jax.Array | None, ...]


def _target(op: str) -> str:
    return f"jaxreg.{op}"


def _register() -> None:
    for platform in _PLATFORMS:
        for op, handler in _regcore.xla_registrations(platform).items():
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
) -> Callable[..., tuple[jax.Array, ...]]:
    """A function of the operands that are present, with the group axis, to the wanted results."""
    entry = _TABLE[op]
    specs = entry["attributes"]
    named = {name: value for (name, _, _), value in zip(specs, attributes, strict=True)}
    ffi_attributes = {
        name: _ffi_attribute(value, kind, choices)
        for (name, kind, choices), value in zip(specs, attributes, strict=True)
    }
    ffi_attributes["wanted"] = np.int64(wanted)
    ffi_attributes["present"] = np.int64(_mask(present))

    def call(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        remaining = iter(arrays)
        inputs = [_spec(next(remaining)) if there else None for there in present]
        outputs = _regcore.infer(op, inputs, named, wanted)
        like = jax.typeof(arrays[0])  # which carries the axes of shard_map it varies over
        types = [
            like.update(shape=spec[1], dtype=np.dtype(spec[0]), weak_type=False)
            for spec in outputs
            if spec is not None
        ]
        values = jax.ffi.ffi_call(_target(op), types, vmap_method=None)(*arrays, **ffi_attributes)
        roles = [
            role
            for (_, role), spec in zip(entry["outputs"], outputs, strict=True)
            if spec is not None
        ]
        return tuple(
            value for value, role in zip(values, roles, strict=True) if role != "workspace"
        )

    mapped_call = jax.custom_batching.custom_vmap(call)

    @mapped_call.def_vmap
    def _fold(
        size: int, batched: Sequence[bool], *arrays: jax.Array
    ) -> tuple[tuple[jax.Array, ...], tuple[bool, ...]]:
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
        unfolded = tuple(r.reshape(size, groups, *r.shape[1:]) for r in results)
        return unfolded, (True,) * len(unfolded)

    # The custom_vjp below takes every first derivative. What gets here is a second one.
    once = jax.custom_jvp(mapped_call)

    @once.defjvp
    def _refuse(*_: Any) -> Any:
        raise NotImplementedError(
            f"jaxreg: {op.removesuffix('_grad')} can be differentiated once, not twice"
        )

    return once


def _run(op: str, attributes: Attributes, wanted: int, operands: Operands) -> tuple[jax.Array, ...]:
    """Call an op on arrays as the user has them, without the group axis."""
    present = tuple(operand is not None for operand in operands)
    arrays = [operand[None] for operand in operands if operand is not None]
    return tuple(result[0] for result in _kernel(op, attributes, wanted, present)(*arrays))


def _all_results(op: str) -> int:
    return _mask([role != "workspace" for _, role in _TABLE[op]["outputs"]])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _differentiable(op: str, attributes: Attributes, operands: Operands) -> tuple[jax.Array, ...]:
    return _run(op, attributes, _all_results(op), operands)


def _forward(op: str, attributes: Attributes, operands: Any) -> Any:
    values = tuple(None if x is None else x.value for x in operands)
    outputs = _run(op, attributes, _all_results(op), values)
    # Kept: what the gradient's op names among this op's inputs.
    gradient_inputs = {name for name, _ in _TABLE[_TABLE[op]["gradient"]]["inputs"]}
    kept = tuple(
        value if name in gradient_inputs else None
        for (name, _), value in zip(_TABLE[op]["inputs"], values, strict=True)
    )
    # Which gradients are asked for is known now and needed at the backward pass's trace. It travels
    # as the shape of an empty array: JAX may trace this rule for one choice, reuse it for another,
    # and keep the residuals' structure (also static values in it) of only one of them.
    perturbed = _mask([x is not None and x.perturbed for x in operands])
    return outputs, (kept, jnp.empty((perturbed, 0), jnp.int8))


def _backward(op: str, attributes: Attributes, residuals: Any, cotangents: Any) -> Any:
    kept, mask = residuals
    (cotangent,) = cotangents
    perturbed = [bool(mask.shape[0] >> i & 1) for i in range(len(kept))]
    if isinstance(cotangent, jax.custom_derivatives.SymbolicZero) or not any(perturbed):
        return ((None,) * len(kept),)
    gradient_op = _TABLE[op]["gradient"]
    entry = _TABLE[gradient_op]
    names = [name for name, _ in _TABLE[op]["inputs"]]
    values = dict(zip(names, kept, strict=True))
    values["grad_output"] = cotangent
    operands = tuple(values[name] for name, _ in entry["inputs"])
    asked = {f"grad_{name}" for name, p in zip(names, perturbed, strict=True) if p}
    outputs = [name for name, _ in entry["outputs"]]
    wanted = _mask([name in asked for name in outputs])
    results = _run(gradient_op, attributes, wanted, operands)
    by_name = dict(zip([name for name in outputs if name in asked], results, strict=True))
    return (tuple(by_name.get(f"grad_{name}") for name in names),)


_differentiable.defvjp(_forward, _backward, symbolic_zeros=True)

_jitted = jax.jit(_differentiable, static_argnums=(0, 1))


def static_tuple(value: Any) -> tuple[Any, ...]:
    """One value or several, as a tuple.

    An empty sequence is wrapped as it is, for the op's check to refuse: no values mean that the
    argument was not given.
    """
    if isinstance(value, np.ndarray):
        value = value.tolist()
    return tuple(value) if isinstance(value, list | tuple) and value else (value,)


def _plain(value: Any) -> Any:
    """Python's own number for a NumPy one."""
    if isinstance(value, tuple):
        return tuple(_plain(v) for v in value)
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


def _varying(array: Any) -> frozenset[str]:
    kind = jax.typeof(array)
    return kind.vma if hasattr(kind, "vma") else kind.manual_axis_type.varying


def _vary_alike(arrays: Operands) -> Operands:
    """Inside ``shard_map``: operands that are replicated join those that are not.

    Outside of the differentiated function, so that their gradients are summed over the devices.
    """
    axes = [frozenset() if x is None else _varying(x) for x in arrays]
    everywhere = frozenset().union(*axes)
    return tuple(
        x
        if x is None or own == everywhere
        else jax.lax.pcast(x, tuple(everywhere - own), to="varying")
        for x, own in zip(arrays, axes, strict=True)
    )


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
    entry = _TABLE[op]
    for (name, optional), value in zip(entry["inputs"], operands, strict=True):
        _check_operand(op, name, optional, value)
    arrays = tuple(None if x is None else jnp.asarray(x) for x in operands)
    attributes = {name: _plain(value) for name, value in attributes.items()}
    # The op's own checks come before jit: what they refuse may not even be hashable.
    specs = [None if x is None else (np.dtype(x.dtype).name, (1, *x.shape)) for x in arrays]
    _regcore.infer(op, specs, attributes, _all_results(op))
    ordered = tuple(attributes[name] for name, _, _ in entry["attributes"])
    (result,) = _jitted(op, ordered, _vary_alike(arrays))
    return result


def build_facts() -> dict[str, str]:
    """What the extension was built for and sees, by name, as short texts."""
    architectures = _regcore.cuda_architectures()
    backends = [platform for platform in _PLATFORMS if _regcore.xla_registrations(platform)]
    return {
        "regkernels": _regcore.__version__,
        "XLA FFI API": ".".join(str(part) for part in _regcore.xla_ffi_api_version()),
        "registered backends": ", ".join(backends),
        "CUDA architectures": ", ".join(architectures) or "none (CPU-only build)",
        "CUDA devices": str(_regcore.cuda_device_count()),
        "CPU threads": str(_regcore.num_threads()),
    }
