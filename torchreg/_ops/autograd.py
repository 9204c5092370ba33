"""Derivatives of ops: what is kept for the backward pass, and what that makes of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd import forward_ad

from regkernels.table import OPS, Op
from torchreg._ops import exchange
from torchreg._ops.calls import call, fold, is_eager, plain_memory, unfold
from torchreg._ops.launch import Outputs, result, run
from torchreg._ops.torch_internals import (
    is_forward_mode_active,
    is_graph_kept,
    plain_apply,
    requires_gradient,
    transforms,
)


class _Once(torch.autograd.Function):
    """Gradients that must not be differentiated again, tied to what they were computed from.

    Without this tie PyTorch would take them for constants, and leave out a part of the second
    derivative without a word.
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
        raise RuntimeError(f"torchreg: {ctx.op} can be differentiated once, not twice")


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
        # Outputs that are kept depend on these inputs: `_Once` has to know.
        for i, need in enumerate(needs):
            if need:
                kept[i] = values[i]
    ctx.save_for_backward(*kept)


def _scaled(unit: torch.Tensor, cotangent: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A unit gradient times the cotangent, which has one number for each of the leading axes."""
    factor = cotangent.reshape(*cotangent.shape, *(1,) * (unit.ndim - cotangent.ndim))
    may_change = unit.dtype == dtype and is_eager((unit, cotangent)) and not is_graph_kept()
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
) -> Outputs:
    count = len(op.inputs)
    gradients: Outputs = [None] * count
    for i, place in op.unit_gradients:
        unit, operand = saved[count + place], saved[i]
        if needs[i] and unit is not None and operand is not None:
            gradients[i] = _scaled(unit, grad_output, operand.dtype)
    wanted = sum([1 << place for i, place in op.gradients if needs[i] and gradients[i] is None])
    if wanted and op.gradient is not None:
        results = _launch_gradient(ctx, op, op.gradient, (*saved, grad_output), wanted)
        for i, place in op.gradients:
            if wanted >> place & 1:
                gradients[i] = results[place]
    return gradients


def no_forward_mode(op: str) -> NotImplementedError:
    """Return the error that refuses forward mode."""
    return NotImplementedError(
        f"torchreg: {op}: forward mode is not supported; derivatives come in reverse mode, by "
        "backward(), torch.autograd.grad, torch.func.grad or torch.func.vjp"
    )


def refuse_dual_numbers(op: str, tensors: Sequence[torch.Tensor | None]) -> None:
    """Refuse forward mode: a tangent that got lost would be a derivative of zero."""
    if is_forward_mode_active() and any(
        x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors
    ):
        raise no_forward_mode(op)


def _gradients(ctx: Any, grad_output: torch.Tensor | None) -> Outputs:
    """The gradient of each input that is asked for it."""
    op = OPS[ctx.op]
    count = len(op.inputs)
    needs = ctx.needs_input_grad[-count:]
    if grad_output is None or True not in needs:
        return [None] * count
    saved = ctx.saved_tensors
    if is_forward_mode_active():
        refuse_dual_numbers(ctx.op, (*saved, grad_output))
    if not torch.is_grad_enabled():
        return _first_derivatives(ctx, op, needs, saved, grad_output)
    with torch.no_grad():
        gradients = _first_derivatives(ctx, op, needs, saved, grad_output)
    present = [x for x in gradients if x is not None]
    sources = [x for x in (*saved, grad_output) if x is not None]
    tied = iter(_Once.apply(ctx.op, len(present), *present, *sources))
    return [None if x is None else next(tied) for x in gradients]


class Differentiable(torch.autograd.Function):
    """Any op of the table, made differentiable.

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
        outputs = Differentiable.apply(name, attributes, needs, True, *folded)
        unfolded = tuple(
            None if x is None else unfold(x, info.batch_size, groups, grouped) for x in outputs
        )
        return unfolded, tuple(None if x is None else 0 for x in unfolded)


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
