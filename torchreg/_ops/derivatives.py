"""Derivatives of calls in forward mode, and of the ops that compute their gradients.

The tangent of a result is a call of a linear op, a dot product with a gradient, or comes from the
op's definition (`regkernels.definitions`); derivatives of gradients come from that, too.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from regkernels.definitions import DEFINITIONS, LINEAR, Call, Values, result_of
from torchreg._ops.functions import Tensors
from torchreg._ops.torch_internals import may_enter_forward_mode

Function = Callable[..., Any]


def no_forward_mode(op: str, where: str = "") -> NotImplementedError:
    """Return the error that refuses forward mode, if only somewhere."""
    return NotImplementedError(
        f"torchreg: {op}: forward mode is not supported{where}; derivatives come in reverse mode, "
        "by backward(), torch.autograd.grad, torch.func.grad or torch.func.vjp"
    )


def not_twice(op: str, where: str = "") -> RuntimeError:
    """Return the error that refuses a second derivative, if only somewhere."""
    return RuntimeError(f"torchreg: {op} can be differentiated once, not twice{where}")


# Its type allows for a third result, which nothing here asks for.
_vjp: Callable[..., tuple[Any, Callable[..., Any]]] = torch.func.vjp  # type: ignore[assignment]


def _sum(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return functools.reduce(operator.add, parts)


def _tangents(function: Function, primals: Tensors, tangents: Tensors) -> Any:
    """The tangents of a function's results."""
    if may_enter_forward_mode():
        return torch.func.jvp(function, primals, tangents)[1]
    # The pull-back is linear, and the transpose of that is the tangents.
    results, pull_back = _vjp(function, *primals)
    single = isinstance(results, torch.Tensor)

    def pulled(*cotangents: torch.Tensor) -> Any:
        return pull_back(cotangents[0] if single else cotangents)

    zeros = [torch.zeros_like(x) for x in ((results,) if single else results)]
    _, push_forward = _vjp(pulled, *zeros)
    pushed = push_forward(tangents)
    return pushed[0] if single else pushed


def _defined(call: Call, values: Values, names: Sequence[str]) -> Function:
    """The result by the op's definition, as a function of some inputs."""
    definition = DEFINITIONS[call.op.name]
    return lambda *those: definition(call, {**values, **dict(zip(names, those, strict=True))})


def pushed_forward(
    call: Call, values: Values, tangents: Values, refusal: Callable[[str], Exception]
) -> torch.Tensor:
    """The tangent of the result, from those of some inputs.

    Parameters
    ----------
    call
        Of the op.
    values
        Its inputs, and what its definition takes besides.
    tangents
        By the names of the inputs.
    refusal
        What to raise where there is no definition.
    """
    op = call.op
    if op.name in LINEAR:
        moved = {
            x: tangents[x] if x in tangents else torch.zeros_like(values[x]) for x in op.input_names
        }
        linear: torch.Tensor = result_of(call, moved)
        return linear
    if call.attributes.get("reduction", "none") != "none":
        like = next(iter(tangents.values()))
        one = torch.ones((), dtype=like.dtype, device=like.device)
        gradients = call.gradients(values, one, tuple(tangents))
        return _sum([(gradients[x] * t).sum() for x, t in tangents.items()])
    if op.name not in DEFINITIONS:
        raise refusal(op.name)
    parts = []
    if op.name == "interpolate" and "image" in tangents:
        parts.append(result_of(call, {**values, "image": tangents["image"]}))
        tangents = {x: t for x, t in tangents.items() if x != "image"}
    if tangents:
        primals = tuple(values[x] for x in tangents)
        defined = _defined(call, values, tuple(tangents))
        parts.append(_tangents(defined, primals, tuple(tangents.values())))
    return _sum(parts)


def _gradients_by_definition(call: Call, values: Values, inputs: Sequence[str]) -> Function:
    """The gradients of some inputs, as a function of operands by name and the cotangent."""

    def gradients(operands: Mapping[str, torch.Tensor], cotangent: torch.Tensor) -> Tensors:
        there = {**values, **operands}
        _, pull_back = _vjp(_defined(call, there, inputs), *[there[x] for x in inputs])
        pulled: Tensors = pull_back(cotangent)
        return pulled

    return gradients


def moved_gradients(
    call: Call, values: Values, cotangent: torch.Tensor, tangents: Values, inputs: Sequence[str]
) -> Tensors:
    """The tangents of the gradients of some inputs, the cotangent held fixed."""
    if call.op.name not in DEFINITIONS:
        raise not_twice(call.op.name)
    gradients = _gradients_by_definition(call, values, inputs)
    names = tuple(tangents)

    def of_operands(*those: torch.Tensor) -> Tensors:
        pulled: Tensors = gradients(dict(zip(names, those, strict=True)), cotangent)
        return pulled

    primals = tuple(values[x] for x in names)
    moved: Tensors = _tangents(of_operands, primals, tuple(tangents.values()))
    return moved


def pulled_gradients(
    call: Call, values: Values, cotangent: torch.Tensor, moved: Values, needed: Sequence[str]
) -> dict[str, torch.Tensor]:
    """The gradients of operands and the cotangent, ``needed``, from those of gradients, ``moved``.

    The second is ``grad_output`` by name.
    """
    results: dict[str, torch.Tensor] = {}
    op = call.op
    operands = tuple(x for x in needed if x != "grad_output")
    is_short = op.name in LINEAR or not cotangent.ndim
    if "grad_output" in needed and (is_short or not operands):
        results["grad_output"] = pushed_forward(call, values, moved, not_twice)
        needed = operands
    if not needed:
        return results
    if op.name in LINEAR:
        return results | {x: torch.zeros_like(values[x]) for x in needed}
    if op.name not in DEFINITIONS:
        raise not_twice(op.name)
    gradients = _gradients_by_definition(call, values, tuple(moved))

    def of_needed(*those: torch.Tensor) -> Tensors:
        named = dict(zip(needed, those, strict=True))
        pulled: Tensors = gradients(named, named.pop("grad_output", cotangent))
        return pulled

    there = {**values, "grad_output": cotangent}
    _, pull_back = _vjp(of_needed, *[there[x] for x in needed])
    pulled = pull_back(tuple(moved.values()))
    return results | dict(zip(needed, pulled, strict=True))
