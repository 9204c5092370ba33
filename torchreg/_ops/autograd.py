"""Derivatives of ops: what is kept for the backward pass, and what that makes of it."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from regkernels.definitions import LINEAR, Framework, Values
from regkernels.options import plain_number
from regkernels.table import OPS, Op
from torchreg._ops import exchange
from torchreg._ops.calls import call, fold, is_eager, plain_memory, unfold
from torchreg._ops.derivatives import (
    moved_gradients,
    no_forward_mode,
    not_twice,
    pulled_gradients,
    pushed_forward,
)
from torchreg._ops.framework import TORCH
from torchreg._ops.functions import Function, Mapped, Partial, Tensors, apply_function
from torchreg._ops.launch import Outputs, result, run
from torchreg._ops.torch_internals import (
    at_primals,
    has_tangent,
    is_forward_mode_active,
    is_graph_kept,
    plain_apply,
    requires_gradient,
    transforms,
)


class _Once(torch.autograd.Function):
    """Gradients that must not be differentiated again, tied to what they were computed from.

    For compilers, which would take them for constants without this tie, and leave out a part of the
    second derivative without a word.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(op: str, count: int, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(x.view_as(x) for x in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.op = inputs[0]

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise not_twice(ctx.op)


def _keep(
    ctx: Any,
    op: Op,
    attributes: dict[str, Any],
    needs: Sequence[bool],
    grouped: bool,
    operands: Sequence[torch.Tensor | None],
    outputs: Outputs,
) -> None:
    """Prepare the backward pass: from unit gradients as far as they are there."""
    ctx.op, ctx.attributes, ctx.grouped = op.name, attributes, grouped
    ctx.set_materialize_grads(False)
    values = (*operands, *outputs)
    kept: Outputs = [None] * len(values)
    for place in op.kept(needs, values):
        kept[place] = values[place]
    if op.for_backward:
        # Outputs that are kept depend on these inputs, which a second derivative goes by. Those
        # that need no gradient may change before a first one: their changes are counted.
        constants, is_compiling = [], torch.compiler.is_compiling()
        for i, need in enumerate(needs):
            x = values[i]
            if need:
                kept[i] = x
            elif x is not None and kept[i] is None and not is_compiling:
                constants.append((i, x, None if x.is_inference() else x._version))
        if constants:
            ctx.constants = constants
    ctx.save_for_backward(*kept)


def _scaled(
    unit: torch.Tensor, cotangent: torch.Tensor, dtype: torch.dtype, may_change: bool
) -> torch.Tensor:
    """A unit gradient times the cotangent, which has one number for each of the leading axes."""
    factor = cotangent.reshape(*cotangent.shape, *(1,) * (unit.ndim - cotangent.ndim))
    may_change = (
        may_change and unit.dtype == dtype and is_eager((unit, cotangent)) and not is_graph_kept()
    )
    if not may_change:
        return (unit * factor).to(dtype)
    # Nobody else will ask for the unit gradient. A factor of 1 is what a plain `loss.backward()`
    # asks for: on the CPU a product would cost a volume and, worse, wake PyTorch's threads, which
    # then spin for milliseconds. A GPU would have to be waited for to know.
    if cotangent.device.type == "cpu" and (
        cotangent.item() == 1 if cotangent.ndim == 0 else bool((cotangent == 1).all())
    ):
        return unit
    return unit.mul_(factor)


def _launch_gradient(
    ctx: Any, op: Op, gradient: Op, values: tuple[torch.Tensor | None, ...], wanted: int
) -> Outputs:
    operands = tuple([values[place] for place in op.gradient_inputs])
    if not ctx.grouped:
        results = exchange.launch(gradient, operands, ctx.attributes, wanted)
        if results is not None:
            return results
    cotangent = values[-1]
    plain = [plain_memory(x) if x is not None and x is cotangent else x for x in operands]
    return call(gradient.name, plain, ctx.attributes, wanted, ctx.grouped)


def _first_derivatives(
    ctx: Any,
    op: Op,
    needs: Sequence[bool],
    saved: Sequence[torch.Tensor | None],
    grad_output: torch.Tensor,
    may_change: bool = True,
) -> Outputs:
    """The gradients that are asked for, possibly in the memory of what was saved for them."""
    count = len(op.inputs)
    gradients: Outputs = [None] * count
    for i, place in op.unit_gradients:
        unit, operand = saved[count + place], saved[i]
        if needs[i] and unit is not None and operand is not None:
            gradients[i] = _scaled(unit, grad_output, operand.dtype, may_change)
    wanted = sum([1 << place for i, place in op.gradients if needs[i] and gradients[i] is None])
    if wanted and op.gradient is not None:
        results = _launch_gradient(ctx, op, op.gradient, (*saved, grad_output), wanted)
        for i, place in op.gradients:
            if wanted >> place & 1:
                gradients[i] = results[place]
    return gradients


def refuse_dual_numbers(op: str, tensors: Sequence[torch.Tensor | None]) -> None:
    """Refuse forward mode: a tangent that got lost would be a derivative of zero."""
    if is_forward_mode_active() and any(x is not None and has_tangent(x) for x in tensors):
        raise no_forward_mode(op)


@dataclass(frozen=True)
class _Call:
    """A call of an op but for its operands, with derivatives: see `regkernels.definitions.Call`."""

    name: str
    ordered: tuple[Any, ...]

    grouped = False

    @property
    def op(self) -> Op:
        return OPS[self.name]

    @property
    def attributes(self) -> dict[str, Any]:
        return dict(zip(self.op.attribute_names, self.ordered, strict=True))

    @property
    def framework(self) -> Framework:
        return TORCH

    def run(self, operands: Values, wanted: int) -> dict[str, torch.Tensor]:
        op = self.op
        inputs = [None if x is None else plain_memory(x) for x in map(operands.get, op.input_names)]
        if wanted == op.wanted(()):
            needs = needed_gradients(op, inputs, is_eager(inputs))
            outputs = DifferentiableBothWays.apply(self.name, self.ordered, needs, False, *inputs)
        else:  # within a function whose derivatives are known
            outputs = call(self.name, inputs, self.attributes, wanted, False)
        return _named(op.output_names, outputs)

    def gradients(
        self, values: Values, cotangent: torch.Tensor, names: Collection[str]
    ) -> dict[str, torch.Tensor]:
        """Also of what a call kept for its backward pass, by the names of its outputs."""
        values = {**values, "grad_output": cotangent}
        inputs = tuple(x for x in self.op.input_names if x in names)
        function = _Gradients(self, inputs, tuple(values))
        return _named(inputs, apply_function(function, *values.values()))

    def of(self, op: str, attributes: Mapping[str, Any]) -> _Call:
        return _Call(op, tuple(attributes[x] for x in OPS[op].attribute_names))


def _named(names: Sequence[str], tensors: Sequence[Any]) -> dict[str, Any]:
    return {x: value for x, value in zip(names, tensors, strict=True) if value is not None}


def _with_saved(call: _Call, values: Values, needs: Sequence[bool]) -> dict[str, Any]:
    """The values with what an op computes for its backward pass, if that is not there already."""
    op, count = call.op, len(call.op.inputs)
    of_number = call.attributes.get("reduction", "none") != "none"
    units = {i: op.output_names[place] for i, place in op.unit_gradients if of_number}
    taken = {units[i] for i, need in enumerate(needs) if need and i in units}
    if not all(i in units for i, need in enumerate(needs) if need):
        taken |= {op.output_names[i - count] for i in op.kept_for_gradient if i >= count}
    if taken <= values.keys():
        return dict(values)
    operands = {x: values[x].detach() for x in op.input_names if x in values}
    with torch.no_grad():
        outputs = call.run(operands, op.wanted(needs))
    return {**outputs, **values}


def _with_definition(call: _Call, values: Values) -> dict[str, Any]:
    """The values with what the op saves: definitions take some of it, held fixed."""
    op = call.op
    if all(name in values for i, name in enumerate(op.output_names) if op.saved >> i & 1):
        return dict(values)
    operands = {x: values[x].detach() for x in op.input_names if x in values}
    with torch.no_grad():
        outputs = call.run(operands, 1 << op.result | op.saved)
    return {**outputs, **values}


@dataclass(frozen=True)
class _Gradients:
    """The gradients of some inputs, as a function of a call's values and the cotangent.

    Parameters
    ----------
    call
        Of the op.
    inputs
        The names of the inputs whose gradients there are, in the order of the table.
    names
        Those of the tensors. What a call kept for its backward pass follows from its inputs, and
        counts as constant.
    """

    call: _Call
    inputs: tuple[str, ...]
    names: tuple[str, ...]

    def _values(self, tensors: Sequence[torch.Tensor]) -> tuple[dict[str, Any], torch.Tensor]:
        values = dict(zip(self.names, tensors, strict=True))
        cotangent = values.pop("grad_output")
        return values, cotangent

    def __call__(self, *tensors: torch.Tensor) -> Tensors:
        values, cotangent = self._values([plain_memory(x) for x in tensors])
        op = self.call.op
        needs = [x in self.inputs for x in op.input_names]
        values = _with_saved(self.call, values, needs)
        kept = [values.get(x) for x in (*op.input_names, *op.output_names)]
        gradients = _first_derivatives(self.call, op, needs, kept, cotangent, may_change=False)
        return tuple(x for x in gradients if x is not None)

    def pull_back(self, tensors: Tensors, needs: Sequence[bool], cotangents: Partial) -> Tensors:
        values, cotangent = self._values(tensors)
        moved = _named(self.inputs, cotangents)
        needed = [x for x, need in zip(self.names, needs, strict=True) if need]
        varying = [x for x in needed if x not in self.call.op.output_names]
        values = _with_definition(self.call, values)
        pulled = pulled_gradients(self.call, values, cotangent, moved, varying)
        return tuple(pulled[x] if x in pulled else torch.zeros_like(values[x]) for x in needed)

    def push_forward(self, tensors: Tensors, tangents: Partial) -> Tensors:
        values, cotangent = self._values(tensors)
        moving = _named(self.names, tangents)
        parts = []
        along = moving.pop("grad_output", None)
        if along is not None:
            pushed = self.call.gradients(values, along, self.inputs)
            parts.append([pushed[x] for x in self.inputs])
        moving = {x: t for x, t in moving.items() if x in self.call.op.input_names}
        if moving and self.call.op.name not in LINEAR:
            values = _with_definition(self.call, values)
            parts.append([*moved_gradients(self.call, values, cotangent, moving, self.inputs)])
        if not parts:
            return tuple(torch.zeros_like(values[x]) for x in self.inputs)
        return tuple(functools.reduce(operator.add, those) for those in zip(*parts, strict=True))


@dataclass(frozen=True)
class _Tangent:
    """The tangent of a result, as a function of a call's values and tangents of its inputs."""

    call: _Call
    names: tuple[str, ...]
    moving: tuple[str, ...]

    def __call__(self, *tensors: torch.Tensor) -> torch.Tensor:
        values = dict(zip(self.names, tensors[: len(self.names)], strict=True))
        tangents = dict(zip(self.moving, tensors[len(self.names) :], strict=True))
        values = _with_definition(self.call, values)
        return pushed_forward(self.call, values, tangents, no_forward_mode)


def _over_groups(function: Callable[..., Any], tensors: Sequence[torch.Tensor]) -> Any:
    """A function of tensors without the group axis, of some that have it, for every group."""
    groups = max(x.shape[0] for x in tensors)
    many = [x.shape[0] == groups for x in tensors]
    moved = [x if of_each else x[0] for x, of_each in zip(tensors, many, strict=True)]
    return torch.func.vmap(function, tuple(0 if of_each else None for of_each in many))(*moved)


def _gradients(ctx: Any, grad_output: torch.Tensor | None) -> Outputs:
    """The gradient of each input that is asked for it."""
    op = OPS[ctx.op]
    count = len(op.inputs)
    needs = ctx.needs_input_grad[-count:]
    if grad_output is None or True not in needs:
        return [None] * count
    saved = ctx.saved_tensors
    is_dual = is_forward_mode_active()
    if not torch.is_grad_enabled() and not is_dual:
        return _first_derivatives(ctx, op, needs, saved, grad_output)
    if torch.compiler.is_compiling():
        if is_dual:
            refuse_dual_numbers(ctx.op, (*saved, grad_output))
        with torch.no_grad():
            gradients = _first_derivatives(ctx, op, needs, saved, grad_output)
        present = [x for x in gradients if x is not None]
        sources = [x for x in (*saved, grad_output) if x is not None]
        tied = iter(_Once.apply(ctx.op, len(present), *present, *sources))
        return [None if x is None else next(tied) for x in gradients]
    return _differentiable_gradients(ctx, op, needs, saved, grad_output)


def _differentiable_gradients(
    ctx: Any,
    op: Op,
    needs: Sequence[bool],
    saved: Sequence[torch.Tensor | None],
    grad_output: torch.Tensor,
) -> Outputs:
    """The gradients as functions of what they are computed from."""
    ordered = tuple(plain_number(ctx.attributes[x]) for x in op.attribute_names)
    values = list(saved)
    for i, constant, version in getattr(ctx, "constants", ()):
        if version is not None and constant._version != version:
            raise RuntimeError(
                f"torchreg: {op.name}: {op.input_names[i]}: expected a tensor that stays as it is "
                "until it has been differentiated for the last time, got one that was modified by "
                "an inplace operation"
            )
        values[i] = constant
    named = _named((*op.input_names, *op.output_names), values)
    inputs = tuple(name for name, need in zip(op.input_names, needs, strict=True) if need)
    function: Function = _Gradients(_Call(op.name, ordered), inputs, (*named, "grad_output"))
    tensors = (*named.values(), grad_output)
    if ctx.grouped:
        groups = max(x.shape[0] for x in tensors)
        many = tuple(x.shape[0] == groups for x in tensors)
        moved = [x if of_each else x[0] for x, of_each in zip(tensors, many, strict=True)]
        gradients = apply_function(Mapped(function, groups, many), *moved)
    else:
        gradients = apply_function(function, *tensors)
    remaining = iter(gradients)
    return [next(remaining) if need else None for need in needs]


class Differentiable(torch.autograd.Function):
    """Any op of the table, made differentiable in reverse mode: for compilers.

    They take no function with a rule for forward mode, which `DifferentiableBothWays` has.
    ``needs`` tells which inputs may be asked for their gradient, at this level of functional
    transforms or at another. Returns what :func:`torchreg._ops.calls.call` does.
    """

    @staticmethod
    def forward(
        name: str,
        attributes: tuple[Any, ...],
        needs: tuple[bool, ...],
        grouped: bool,
        *operands: torch.Tensor | None,
    ) -> tuple[torch.Tensor | None, ...]:
        op = OPS[name]
        named = dict(zip(op.attribute_names, attributes, strict=True))
        return tuple(call(name, operands, named, op.wanted(needs), grouped))

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Any, ...], outputs: tuple[torch.Tensor | None, ...]
    ) -> None:
        name, attributes, needs, grouped, *operands = inputs
        op = OPS[name]
        extras = [None if i == op.result else x for i, x in enumerate(outputs)]
        ctx.mark_non_differentiable(*[x for x in extras if x is not None])
        named = dict(zip(op.attribute_names, attributes, strict=True))
        _keep(ctx, op, named, needs, grouped, operands, extras)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor | None) -> tuple[Any, ...]:
        grad_output = grad_outputs[OPS[ctx.op].result]
        return (None, None, None, None, *_gradients(ctx, grad_output))

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        name: str,
        attributes: tuple[Any, ...],
        needs: tuple[bool, ...],
        grouped: bool,
        *operands: torch.Tensor | None,
    ) -> tuple[tuple[torch.Tensor | None, ...], tuple[int | None, ...]]:
        folded, groups = fold(info.batch_size, in_dims[4:], operands, grouped)
        function = Differentiable if torch.compiler.is_compiling() else DifferentiableBothWays
        outputs = function.apply(name, attributes, needs, True, *folded)
        unfolded = tuple(
            None if x is None else unfold(x, info.batch_size, groups, grouped) for x in outputs
        )
        return unfolded, tuple(None if x is None else 0 for x in unfolded)


class DifferentiableBothWays(Differentiable):
    """Any op of the table, made differentiable in reverse and in forward mode."""

    @staticmethod
    def forward(
        name: str,
        attributes: tuple[Any, ...],
        needs: tuple[bool, ...],
        grouped: bool,
        *operands: torch.Tensor | None,
    ) -> tuple[torch.Tensor | None, ...]:
        op = OPS[name]
        named = dict(zip(op.attribute_names, attributes, strict=True))
        if is_forward_mode_active():
            # A tangent takes what a gradient does, and nobody knows yet which of them there are.
            needs = tuple(x is not None and i not in op.constants for i, x in enumerate(operands))
        # A tangent of a tangent may be lazy zeros, in the wrappers of transforms until here.
        plain = [x if x is None else plain_memory(x) for x in operands]
        return tuple(call(name, plain, named, op.wanted(needs), grouped))

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Any, ...], outputs: tuple[torch.Tensor | None, ...]
    ) -> None:
        Differentiable.setup_context(ctx, inputs, outputs)
        if is_forward_mode_active():
            place = OPS[ctx.op].result
            ctx.save_for_forward(*inputs[4:], *outputs[:place], None, *outputs[place + 1 :])

    @staticmethod
    def jvp(ctx: Any, *tangents: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        op = OPS[ctx.op]
        count = len(op.inputs)
        moving = _named(op.input_names, tangents[-count:])
        for place in op.constants:
            if op.input_names[place] in moving:
                raise ValueError(
                    f"{op.name}: {op.input_names[place]}: expected a tensor without a tangent, as "
                    "it has no derivative, got one that has (forward mode)"
                )
        with at_primals(ctx.saved_tensors) as primals:
            values = _named((*op.input_names, *op.output_names), primals)
            ordered = tuple(ctx.attributes[x] for x in op.attribute_names)
            function = _Tangent(_Call(op.name, ordered), tuple(values), tuple(moving))
            tensors = (*values.values(), *moving.values())
            tangent = _over_groups(function, tensors) if ctx.grouped else function(*tensors)
        return tuple(tangent if i == op.result else None for i in range(len(op.outputs)))


class EagerDifferentiable(torch.autograd.Function):
    """`Differentiable` in the older style: half the time, and blind to functional transforms.

    An op that has been launched comes with its outputs.
    """

    @staticmethod
    def forward(
        ctx: Any,
        op: Op,
        attributes: dict[str, Any],
        needs: tuple[bool, ...],
        outputs: Outputs | None,
        *operands: torch.Tensor | None,
    ) -> torch.Tensor:
        if outputs is None:
            outputs = run(op, operands, attributes, op.wanted(needs), False)
        _keep(ctx, op, attributes, needs, False, operands, outputs)
        return result(op, outputs)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor | None) -> tuple[Any, ...]:
        return (None, None, None, None, *_gradients(ctx, grad_output))


# For plain tensors.
record: Callable[..., torch.Tensor] = plain_apply(EagerDifferentiable)


def check_constants(op: Op, needs: Sequence[bool]) -> None:
    """Refuse an operand that requires a gradient which its op does not have."""
    for i in op.constants:
        if needs[i]:
            raise ValueError(
                f"{op.name}: {op.input_names[i]}: expected a tensor that requires no "
                "gradient, as it has none, got one that does"
            )


def needed_gradients(
    op: Op, operands: Sequence[torch.Tensor | None], is_eager: bool
) -> tuple[bool, ...]:
    """Which operands the result may have to be differentiated by.

    ``is_eager``: no transform is under way, and no operand of one.
    """
    levels = 0 if is_eager else transforms()[0]
    if not levels and not torch.is_grad_enabled():
        return (False,) * len(operands)
    if not levels:
        needs = tuple([x is not None and x.requires_grad for x in operands])
    elif torch.compiler.is_compiling():
        # A compiler does not see through the wrappers.
        needs = tuple(
            x is not None and (x.requires_grad or i not in op.constants)
            for i, x in enumerate(operands)
        )
    else:
        needs = tuple(x is not None and requires_gradient(x) for x in operands)
    check_constants(op, needs)
    return needs
