"""Derivatives of calls: of ops, and of the ops that compute their gradients.

Every derivative of a result is a linear map (`jaxreg._primitives`), whose transpose is the gradient
op: reverse mode runs that, and uses what was computed for it with the value. Forward mode, and
derivatives of derivatives, go by the maths of an op where they are not calls of ops themselves:
see `jaxreg._definitions`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxreg._definitions import DEFINITIONS, Call, Values
from jaxreg._primitives import Arrays, linear_map

LINEAR = frozenset(
    {
        "affine_warp",
        "scale_velocity",
        "gaussian_smooth",
        "convert_displacement",
        "spline_coefficients",
    }
)
"""The ops that are linear in all operands together."""


def _no_forward_mode(call: Call) -> NotImplementedError:
    where = " where devices share planes" if call.shares_planes else ""
    return NotImplementedError(
        f"jaxreg: {call.op.name}: forward mode (jax.jvp, jax.linearize, jax.jacfwd) is not "
        f"supported{where}; derivatives come in reverse mode, by jax.grad, jax.vjp or jax.jacrev"
    )


def _not_twice(call: Call) -> NotImplementedError:
    where = " where devices share planes" if call.shares_planes else ""
    return NotImplementedError(
        f"jaxreg: {call.op.name} can be differentiated once, not twice{where}"
    )


def _scaled(unit_gradient: jax.Array, factor: jax.Array) -> jax.Array:
    """A unit gradient times what has one number for each of the leading axes."""
    axes = range(factor.ndim, unit_gradient.ndim)
    return unit_gradient * jnp.expand_dims(factor, tuple(axes))


def _dot(gradient: jax.Array, tangent: jax.Array, result: _Result) -> jax.Array:
    """Their products, summed over all but the axes of the result."""
    return jnp.sum(gradient * tangent, axis=tuple(range(result.rank, gradient.ndim)))


def _pushed_forward(call: Call, values: Values, tangents: Values, result: _Result) -> jax.Array:
    """The tangent of the result, from those of some inputs."""
    op, name = call.op, call.op.output_names[call.op.result]
    if op.name in LINEAR:
        moved = {
            x: tangents[x] if x in tangents else jnp.zeros_like(values[x]) for x in op.input_names
        }
        return call.run(moved, 1 << op.result)[name]
    if call.shares_planes:
        raise _no_forward_mode(call)
    if not result.rank:
        one = jnp.ones((), result.dtype)
        gradients = call.gradients(values, one, tuple(tangents))
        pushed: jax.Array = _sum([_dot(gradients[x], t, result) for x, t in tangents.items()])
        return pushed
    definition = DEFINITIONS.get(op.name)
    if definition is None:
        raise _no_forward_mode(call)
    parts = []
    if op.name == "interpolate" and "image" in tangents:
        sampled = call.run({**values, "image": tangents["image"]}, 1 << op.result)
        parts.append(sampled[name])
        tangents = {x: t for x, t in tangents.items() if x != "image"}
    if tangents:
        along = dict(tangents)
        at = {x: values[x] for x in along}
        defined = functools.partial(_with, functools.partial(definition, call), values)
        parts.append(jax.jvp(defined, (at,), (along,))[1])
    total: jax.Array = _sum(parts)
    return total


def _with(function: Callable[[Values], Any], values: Values, changed: Values) -> Any:
    return function({**values, **changed})


def _sum(parts: Sequence[Any]) -> Any:
    """Of arrays, or of structures of them."""
    return functools.reduce(lambda a, b: jax.tree.map(jnp.add, a, b), parts)


@dataclass(frozen=True)
class _Result:
    rank: int
    dtype: Any


@dataclass(frozen=True)
class _Derivative:
    """The tangent of a result, by those of some inputs. Its transpose is the gradient.

    Parameters
    ----------
    call
        Of the op.
    inputs
        The names of the inputs, and their dtypes, which the gradients have.
    kept
        The names of the residuals: what the gradient op takes, and unit gradients.
    result
        What it is the tangent of.
    """

    call: Call
    inputs: tuple[tuple[str, Any], ...]
    kept: tuple[str, ...]
    result: _Result

    def _unit_gradients(self, values: Values) -> dict[str, jax.Array]:
        op, names = self.call.op, {name for name, _ in self.inputs}
        units = {op.input_names[i]: op.output_names[place] for i, place in op.unit_gradients}
        return {x: values[y] for x, y in units.items() if x in names and y in values}

    def forward(self, residuals: Arrays, vectors: Arrays) -> Arrays:
        values = dict(zip(self.kept, residuals, strict=True))
        units = self._unit_gradients(values)
        named = dict(zip([name for name, _ in self.inputs], vectors, strict=True))
        if units and self.call.shares_planes:
            raise _no_forward_mode(self.call)
        parts = [_dot(unit, named.pop(x), self.result) for x, unit in units.items()]
        if named:
            parts.append(_pushed_forward(self.call, values, named, self.result))
        return (_sum(parts).astype(self.result.dtype),)

    def transpose(self, residuals: Arrays, cotangents: Arrays) -> Arrays:
        values = dict(zip(self.kept, residuals, strict=True))
        dtypes, (cotangent,) = dict(self.inputs), cotangents
        gradients = {
            x: _scaled(unit, cotangent).astype(dtypes[x])
            for x, unit in self._unit_gradients(values).items()
        }
        remaining = [x for x in dtypes if x not in gradients]
        if remaining:
            gradients |= self.call.gradients(values, cotangent, remaining)
        return tuple(gradients[x] for x in dtypes)


@dataclass(frozen=True)
class _Gradient:
    """The gradients of some inputs, by the cotangent. Its transpose is the tangent of the result.

    Parameters
    ----------
    call
        Of the op that the gradients are of.
    inputs
        The names of the inputs.
    kept
        Those of the residuals: what the gradient op takes but for the cotangent.
    result
        What the cotangent belongs to.
    """

    call: Call
    inputs: tuple[str, ...]
    kept: tuple[str, ...]
    result: _Result

    def forward(self, residuals: Arrays, vectors: Arrays) -> Arrays:
        values = dict(zip(self.kept, residuals, strict=True))
        gradients = self.call.gradients(values, vectors[0], self.inputs)
        return tuple(gradients[x] for x in self.inputs)

    def transpose(self, residuals: Arrays, cotangents: Arrays) -> Arrays:
        values = dict(zip(self.kept, residuals, strict=True))
        tangents = dict(zip(self.inputs, cotangents, strict=True))
        return (_pushed_forward(self.call, values, tangents, self.result),)


def _moved_gradients(
    call: Call, values: Values, cotangent: jax.Array, tangents: Values, inputs: Sequence[str]
) -> dict[str, jax.Array]:
    """The tangents of the gradients of some inputs, the cotangent held fixed."""
    definition = None if call.shares_planes else DEFINITIONS.get(call.op.name)
    if definition is None:
        raise _not_twice(call)
    defined = functools.partial(definition, call)

    def gradients(moving: Values) -> dict[str, jax.Array]:
        there = {**values, **moving}
        at = {x: there[x] for x in inputs}
        _, pull_back = jax.vjp(functools.partial(_with, defined, there), at)
        pulled: dict[str, jax.Array] = pull_back(cotangent)[0]
        return pulled

    moved: dict[str, jax.Array] = jax.jvp(
        gradients, ({x: values[x] for x in tangents},), (dict(tangents),)
    )[1]
    return moved


def _named(names: Sequence[str], values: Sequence[Any]) -> dict[str, Any]:
    return {x: value for x, value in zip(names, values, strict=True) if value is not None}


def of_op(
    call: Call, wanted: int, operands: Sequence[Any], tangents: Sequence[Any]
) -> tuple[dict[str, jax.Array], dict[str, Any]]:
    """The outputs of an op that are wanted, and their tangents.

    Parameters
    ----------
    call
        Of the op.
    wanted
        The bit mask of its outputs.
    operands, tangents
        Of its inputs; ``None``: there is none.

    Raises
    ------
    TypeError
        An input has a tangent of which there is no gradient.
    NotImplementedError
        What is wanted is a second derivative that is not there.
    """
    op = call.op
    needs = [tangent is not None for tangent in tangents]
    for place in op.constants:
        if needs[place]:
            raise TypeError(
                f"{op.name}: {op.input_names[place]}: expected an array that does not depend on "
                f"what is differentiated, as {op.name} has no gradient for it; got one that does. "
                "jax.lax.stop_gradient makes it a constant"
            )
    inputs, moving = _named(op.input_names, operands), _named(op.input_names, tangents)
    outputs = call.run(inputs, wanted | op.wanted(needs))
    values = {**inputs, **outputs}
    names = (*op.input_names, *op.output_names)
    places = op.kept(needs, [values.get(x) for x in names])
    kept = tuple(names[place] for place in places if names[place] in values)

    asked = {
        x: outputs[x] for i, x in enumerate(op.output_names) if wanted >> i & 1 and x in outputs
    }
    derivatives: dict[str, Any] = dict.fromkeys(asked)
    if not moving:
        return asked, derivatives
    result_name = op.output_names[op.result]
    value = outputs[result_name]
    result = _Result(value.ndim, value.dtype)
    derivative = _Derivative(call, tuple((x, inputs[x].dtype) for x in moving), kept, result)
    (derivatives[result_name],) = linear_map(
        derivative, [values[x] for x in kept], list(moving.values()), [jax.typeof(value)]
    )
    units = {op.output_names[place]: op.input_names[i] for i, place in op.unit_gradients}
    units = {x: of for x, of in units.items() if x in asked}
    if units:
        one = jnp.ones_like(value)
        moved = _moved_gradients(call, values, one, moving, tuple(units.values()))
        derivatives |= {x: moved[of].astype(asked[x].dtype) for x, of in units.items()}
    return asked, derivatives


def of_gradient(
    call: Call, wanted: int, operands: Sequence[Any], tangents: Sequence[Any]
) -> tuple[dict[str, jax.Array], dict[str, Any]]:
    """As :func:`of_op`, of the op that computes the gradients of a call."""
    op, gradient = call.op, call.op.gradient
    assert gradient is not None
    values = _named(gradient.input_names, operands)
    moving = _named(gradient.input_names, tangents)
    cotangent = values.pop("grad_output")
    inputs = tuple(op.input_names[i] for i, place in op.gradients if wanted >> place & 1)
    gradients = call.gradients(values, cotangent, inputs)
    parts = []
    along = moving.pop("grad_output", None)
    if along is not None:
        kept = tuple(values)
        result = _Result(cotangent.ndim, cotangent.dtype)
        by_cotangent = linear_map(
            _Gradient(call, inputs, kept, result),
            [values[x] for x in kept],
            [along],
            [jax.typeof(gradients[x]) for x in inputs],
        )
        parts.append(dict(zip(inputs, by_cotangent, strict=True)))
    # What the op saves for its gradient follows from the inputs, and the definition goes by those.
    moving = {x: t for x, t in moving.items() if x in op.input_names}
    if moving and op.name not in LINEAR:
        parts.append(_moved_gradients(call, values, cotangent, moving, inputs))
    outputs = {f"grad_{x}": value for x, value in gradients.items()}
    if not parts:
        return outputs, dict.fromkeys(outputs)
    total = _sum(parts)
    return outputs, {f"grad_{x}": total[x] for x in gradients}
