"""The only folder of this package that runs kernels.

An op of the table is registered as ``torch.ops.torchreg.<op>`` and called through :func:`apply`,
which makes it differentiable and mappable. Inside the table every array has one more axis in front,
the group axis, which is where ``vmap`` puts its mapped axis; nothing is ever summed across groups.
A call with ``grouped=False`` leaves that axis out.

From the ground up: `torch_internals`, `open_sizes`, `launch`, `exchange`, `calls`, `functions`,
`framework`, `derivatives`, `autograd`, `registration`, and on top of them what is here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from regkernels.namesake import refuse_mixture
from regkernels.options import is_number, plain_number
from regkernels.table import OPS, Input, Op
from torchreg._ops import (
    exchange,
    registration,  # noqa: F401 - which registers the ops
)
from torchreg._ops.autograd import (
    Differentiable,
    DifferentiableBothWays,
    EagerDifferentiable,
    needed_gradients,
    record,
    refuse_dual_numbers,
)
from torchreg._ops.calls import call, is_eager, plain_memory
from torchreg._ops.derivatives import no_forward_mode, not_twice
from torchreg._ops.launch import DTYPE_NAMES, DTYPES, infer, result, run, spec
from torchreg._ops.torch_internals import is_tracing, transforms

# Every module of this package comes here, also if the package's own `__init__` is a stranger's.
refuse_mixture(Path(__file__).parents[1])

_HALVES = (torch.float16, torch.bfloat16)


def apply(name: str, operands: tuple[Any, ...], attributes: dict[str, Any]) -> torch.Tensor:
    """Call an op of the table.

    Parameters
    ----------
    name
        The op's.
    operands
        Its inputs in the order of the table, ``None`` where an optional one is absent.
    attributes
        All its attributes by name.

    Returns
    -------
    The op's result.

    Raises
    ------
    ValueError, TypeError
        What the op's checks find, naming the argument.
    """
    op = OPS[name]
    launched = exchange.forward(op, operands, attributes)
    if launched is not None:
        needs, outputs = launched
        if True not in needs:
            return result(op, outputs)
        return record(op, attributes, needs, outputs, *operands)
    prepared, result_dtype = _prepare(name, operands)
    value = _dispatch(name, prepared, attributes)
    return value if result_dtype is None else value.to(result_dtype)


def apply_for(
    results: tuple[str, ...], name: str, operands: Sequence[Any], attributes: dict[str, Any]
) -> tuple[torch.Tensor, ...]:
    """Call an op without a gradient for some of its results, by name, ``output`` the first.

    Otherwise as :func:`apply`.
    """
    operands, result_dtype = _prepare(name, operands)
    op = OPS[name]
    attributes = {key: plain_number(value) for key, value in attributes.items()}
    arguments = [x if x is None else plain_memory(x) for x in operands]
    if results == ("output",) and op.has_labels:
        # Integers do not vary with what they are computed from: as with any other function of
        # PyTorch that returns them, they are constants.
        arguments = [x if x is None else x.detach() for x in arguments]
    eager = is_eager(arguments)
    needed_gradients(op, arguments, eager)  # which refuses any
    refuse_dual_numbers(name, arguments)
    wanted = op.mask(results)
    if not eager and not torch.compiler.is_compiling():
        _check(op, arguments, attributes, wanted)
    outputs = call(name, arguments, attributes, wanted, False)
    values = [x for x, key in zip(outputs, op.output_names, strict=True) if key in results]
    first, *others = [x for x in values if x is not None]
    return (first if result_dtype is None else first.to(result_dtype), *others)


def apply_to_spline(
    name: str, operands: tuple[Any, ...], attributes: dict[str, Any], *, channel_last: bool
) -> torch.Tensor:
    """Call an op for the spline coefficients of what its first operand holds.

    Otherwise as :func:`apply`. The coefficients are computed, and sampled, in the dtype that the op
    computes in, and the result is rounded once.
    """
    op = OPS[name]
    prepared, result_dtype = _prepare(name, operands)
    if not torch.compiler.is_compiling():
        # What is wrong with an operand is told by the name that it has there.
        plain = {key: plain_number(value) for key, value in attributes.items()}
        _check(op, prepared, plain, op.wanted(()))
    first, *others = operands
    in_float64 = any(x is not None and x.dtype == torch.float64 for x in operands)
    padding = {key: attributes[key] for key in ("padding_mode", "align_corners")}
    coefficients = apply(
        "spline_coefficients",
        (first.double() if in_float64 else first,),
        padding | {"channel_last": channel_last},
    )
    value = apply(name, (coefficients, *others), attributes)
    return value.to(first.dtype if result_dtype is None else result_dtype)


def widened(tensor: Any) -> Any:
    """A tensor of half precision as float32, for results that other ops go on with."""
    if isinstance(tensor, torch.Tensor) and tensor.dtype in _HALVES:
        return tensor.float()
    return tensor


def of_items(value: Any, like: Any, *sizes: int) -> Any:
    """Numbers for each item, ``(N, *sizes)``; what is neither a number nor a tensor stays as it is.

    A number and a tensor without the first axes are for all of them.
    """
    if is_number(value) and isinstance(like, torch.Tensor):
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        return torch.full((1, *sizes), value, dtype=dtype, device=like.device)
    if not isinstance(value, torch.Tensor) or value.ndim > len(sizes):
        return value
    return value.expand(1, *sizes) if value.ndim == 0 else value[None]


def _check_operand(op: str, declared: Input, value: Any) -> None:
    if value is None and declared.is_optional:
        return
    if not isinstance(value, torch.Tensor):
        raise TypeError(
            f"{op}: {declared.name}: expected a tensor{' or None' if declared.is_optional else ''},"
            f" got {type(value).__name__}"
        )
    if value.device.type not in ("cpu", "cuda", "meta"):
        raise ValueError(
            f"{op}: {declared.name}: expected a tensor on cpu or cuda, got {value.device}"
        )
    if value.layout != torch.strided or value.is_nested:
        came = "a nested one" if value.is_nested else value.layout
        raise TypeError(f"{op}: {declared.name}: expected a dense tensor, got {came}")


def _convert(
    op: Op, operands: Sequence[torch.Tensor | None]
) -> tuple[list[torch.Tensor | None], torch.dtype | None]:
    """The operands in the dtypes that the kernels take, and what their result is to become.

    The conversions are outside of the differentiated function, so that autograd returns each
    gradient in the dtype of its operand.
    """
    names = [None if x is None else DTYPE_NAMES.get(x.dtype) or str(x.dtype) for x in operands]
    taken, result_name = op.kernel_dtypes(names)
    converted = [
        x if x is None or wanted is None or wanted == name else x.to(DTYPES[wanted])
        for x, name, wanted in zip(operands, names, taken, strict=True)
    ]
    return converted, None if result_name is None else DTYPES.get(result_name)


def _prepare(
    name: str, operands: Sequence[Any]
) -> tuple[Sequence[torch.Tensor | None], torch.dtype | None]:
    """Operands checked for what the kernels take for granted, in the dtypes that they take.

    Also the dtype that the result is to become; ``None``: as it is.
    """
    op = OPS[name]
    first_name, first, alike = "", None, True
    for declared, value in zip(op.inputs, operands, strict=True):
        _check_operand(name, declared, value)
        if value is None:
            continue
        if first is None:
            first_name, first = declared.name, value
            continue
        if value.device != first.device:
            raise ValueError(
                f"{name}: {declared.name}: expected a tensor on {first.device}, as {first_name}, "
                f"got {value.device}"
            )
        if value.dtype != first.dtype:
            alike = False
    if not alike or (first is not None and first.dtype in _HALVES):
        return _convert(op, operands)
    return operands, None


def _check(
    op: Op, operands: Sequence[torch.Tensor | None], attributes: dict[str, Any], wanted: int
) -> None:
    """The op's checks, ahead of those who would run it with shapes alone or out of sight."""
    specs = [None if x is None else spec(x, False) for x in operands]
    infer(op, specs, attributes, wanted)


def _each_once(arguments: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """The same tensors, of which none is there twice: a compiler refuses autograd functions that.

    Another view of a tensor is another tensor, with a gradient of its own.
    """
    seen: list[torch.Tensor | None] = []
    for x in arguments:
        again = x is not None and any(x is other for other in seen)
        seen.append(x.view_as(x) if again and x is not None else x)
    return seen


_COMPILED = " within torch.compile"


def _dispatch(
    name: str, operands: Sequence[torch.Tensor | None], attributes: dict[str, Any]
) -> torch.Tensor:
    op = OPS[name]
    attributes = {key: plain_number(value) for key, value in attributes.items()}
    arguments = [x if x is None else plain_memory(x) for x in operands]
    eager = is_eager(arguments)
    needs = needed_gradients(op, arguments, eager)
    if eager:
        # The checks come with the launch.
        if True in needs:
            value: torch.Tensor = EagerDifferentiable.apply(op, attributes, needs, None, *arguments)
            return value
        return result(op, run(op, arguments, attributes, op.wanted(needs), False))
    if not torch.compiler.is_compiling():
        _check(op, arguments, attributes, op.wanted(needs))
        if is_tracing() and not transforms()[0]:
            # A traced program can be saved with calls of registered ops, which have derivatives,
            # and cannot with autograd functions.
            return result(op, call(name, arguments, attributes, op.wanted(()), False))
    elif transforms()[2]:
        raise no_forward_mode(name, _COMPILED)
    elif transforms()[1] > 1:
        # A compiler traces a backward pass without its tie to the second derivative.
        raise not_twice(name, _COMPILED)
    elif True not in needs or torch.compiler.is_exporting():
        # With autograd functions a strict export would detach the result without a word.
        return result(op, call(name, arguments, attributes, op.wanted(()), False))
    ordered = tuple(attributes[key] for key in op.attribute_names)
    if torch.compiler.is_compiling():
        once = _each_once(arguments)
        return result(op, Differentiable.apply(name, ordered, needs, False, *once))
    return result(op, DifferentiableBothWays.apply(name, ordered, needs, False, *arguments))
