"""The only module of this package that talks to the extension.

An op of the extension's table is registered as ``torch.ops.torchreg.<op>`` and called through
:func:`apply`, which makes it differentiable and mappable. Inside the table every array has one more
axis in front, the group axis, which is where ``vmap`` puts its mapped axis; nothing is ever summed
across groups. A call with ``grouped=False`` leaves that axis out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import _regcore
import numpy as np
import torch
from torch.autograd import forward_ad

_TABLE = _regcore.ops()
_DTYPE_NAMES = {
    getattr(torch, name): name
    for name in (
        *("float16", "bfloat16", "float32", "float64", "bool", "complex64", "complex128"),
        *("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"),
    )
}
_DTYPES = {name: dtype for dtype, name in _DTYPE_NAMES.items()}
_SCHEMA_TYPES = {
    "bool": "bool",
    "int": "int",
    "float": "float",
    "choice": "str",
    "ints": "int[]",
    "floats": "float[]",
}
_PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter)
_library = torch.library.Library("torchreg", "DEF")


def _mask(flags: Sequence[bool]) -> int:
    return sum(1 << i for i, flag in enumerate(flags) if flag)


class _Signature:
    """The positional arguments of ``torch.ops.torchreg.<op>``.

    The op's inputs, its attributes, the mask of wanted outputs, and whether there is a group axis.
    """

    def __init__(self, op: str) -> None:
        entry = _TABLE[op]
        self.op = op
        self.inputs = [name for name, _ in entry["inputs"]]
        self.attributes = [name for name, _, _ in entry["attributes"]]
        self.outputs = [name for name, _ in entry["outputs"]]
        self.is_workspace = [role == "workspace" for _, role in entry["outputs"]]
        self.gradient = entry["gradient"]
        self.all_results = _mask([not workspace for workspace in self.is_workspace])
        arguments = [
            f"Tensor{'?' if optional else ''} {name}" for name, optional in entry["inputs"]
        ]
        arguments += [f"{_SCHEMA_TYPES[kind]} {name}" for name, kind, _ in entry["attributes"]]
        arguments += ["int wanted", "bool grouped"]
        self.schema = f"{op}({', '.join(arguments)}) -> Tensor[]"

    def split(self, arguments: Sequence[Any]) -> tuple[Sequence[Any], dict[str, Any], int, bool]:
        count = len(self.inputs)
        attributes = dict(zip(self.attributes, arguments[count:-2], strict=True))
        return arguments[:count], attributes, arguments[-2], arguments[-1]


def _spec(tensor: torch.Tensor, grouped: bool) -> tuple[str, tuple[int, ...]]:
    shape = tuple(tensor.shape) if grouped else (1, *tensor.shape)
    return _DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype)), shape


def _allocate(
    specs: Sequence[tuple[str, tuple[int, ...]] | None], grouped: bool, device: torch.device
) -> list[torch.Tensor | None]:
    return [
        None
        if spec is None
        else torch.empty(spec[1] if grouped else spec[1][1:], dtype=_DTYPES[spec[0]], device=device)
        for spec in specs
    ]


def _results(signature: _Signature, outputs: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
    return [
        x
        for x, workspace in zip(outputs, signature.is_workspace, strict=True)
        if x is not None and not workspace
    ]


def _make_implementation(signature: _Signature) -> Callable[..., list[torch.Tensor]]:
    def implementation(*arguments: Any) -> list[torch.Tensor]:
        operands, attributes, wanted, grouped = signature.split(arguments)
        present = [x for x in operands if x is not None]
        if torch.is_grad_enabled() and any(x.requires_grad for x in present):
            raise RuntimeError(
                f"torch.ops.torchreg.{signature.op} has no derivative of its own: "
                "call the function of the same name in torchreg"
            )
        device = present[0].device
        inputs = [None if x is None else _spec(x, grouped) for x in operands]
        specs = _regcore.infer(signature.op, inputs, attributes, wanted)
        # Workspaces go back to the allocator as soon as the launch is queued: it hands them out
        # again only to work that comes later on this stream.
        outputs = _allocate(specs, grouped, device)
        is_cuda = device.type == "cuda"
        _regcore.launch(
            signature.op,
            [
                None if x is None else (x.data_ptr(), *spec)
                for x, spec in zip(operands, inputs, strict=True)
            ],
            attributes,
            wanted,
            [
                None if x is None else (x.data_ptr(), *spec)
                for x, spec in zip(outputs, specs, strict=True)
            ],
            device.index if is_cuda else -1,
            torch._C._cuda_getCurrentRawStream(device.index) if is_cuda else 0,
        )
        return _results(signature, outputs)

    return implementation


def _make_fake(signature: _Signature) -> Callable[..., list[torch.Tensor]]:
    def fake(*arguments: Any) -> list[torch.Tensor]:
        operands, attributes, wanted, grouped = signature.split(arguments)
        device = next(x.device for x in operands if x is not None)
        inputs = [None if x is None else _spec(x, grouped) for x in operands]
        specs = _regcore.infer(signature.op, inputs, attributes, wanted)
        return _results(signature, _allocate(specs, grouped, device))

    return fake


_SIGNATURES = {op: _Signature(op) for op in _TABLE}
_IMPLEMENTATIONS = {op: _make_implementation(s) for op, s in _SIGNATURES.items()}


def _register() -> None:
    for signature in _SIGNATURES.values():
        _library.define(signature.schema)
        for key in ("CPU", "CUDA"):
            _library.impl(signature.op, _IMPLEMENTATIONS[signature.op], key)
        torch.library.register_fake(
            f"torchreg::{signature.op}", _make_fake(signature), lib=_library
        )


_register()


def _is_eager(operands: Sequence[Any]) -> bool:
    """Whether nobody listens in: no compiler, transform, dual number, mode or subclass."""
    return (
        not torch.compiler.is_compiling()
        and forward_ad._current_level < 0
        and all(x is None or type(x) in _PLAIN_TYPES for x in operands)
        and not torch._C._are_functorch_transforms_active()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._len_torch_function_stack() == 0
        and torch._C._get_tracing_state() is None
    )


def _plain_memory(x: torch.Tensor) -> torch.Tensor:
    """The tensor with its elements in order in memory, as they are: no lazy sign, no lazy zeros."""
    x = x.contiguous()
    if torch.compiler.is_compiling():
        return x
    return (x.clone() if x._is_zerotensor() else x).resolve_neg()


def _call(
    op: str, operands: Sequence[Any], attributes: tuple[Any, ...], wanted: int, grouped: bool
) -> list[torch.Tensor]:
    # The dispatcher costs more than the rest of a call; it is for those who listen in.
    if _is_eager(operands):
        return _IMPLEMENTATIONS[op](*operands, *attributes, wanted, grouped)
    return getattr(torch.ops.torchreg, op)(*operands, *attributes, wanted, grouped)


def _fold(
    size: int, dims: Sequence[int | None], operands: Sequence[torch.Tensor | None], grouped: bool
) -> tuple[list[torch.Tensor | None], int]:
    """Put a mapped axis into the group axis; also returns how many groups there were.

    (mapped, groups, ...) becomes (mapped * groups, ...). An operand with one group serves all of
    them; only one that is mapped by some but not all of several nested maps is copied.
    """
    mapped = [dim is not None for dim in dims]
    moved = [
        x if x is None or dim is None else x.movedim(dim, 0)
        for x, dim in zip(operands, dims, strict=True)
    ]
    if not grouped:
        moved = [
            x if x is None else x.unsqueeze(1 if m else 0)
            for x, m in zip(moved, mapped, strict=True)
        ]
    groups = max(
        x.shape[1 if m else 0] for x, m in zip(moved, mapped, strict=True) if x is not None
    )

    def fold(x: torch.Tensor | None, is_mapped: bool) -> torch.Tensor | None:
        if x is None:
            return None
        if is_mapped or x.shape[0] > 1:
            if not is_mapped:
                x = x.unsqueeze(0)
            x = x.expand(size, groups, *x.shape[2:]).reshape(size * groups, *x.shape[2:])
        return x.contiguous()

    return [fold(x, m) for x, m in zip(moved, mapped, strict=True)], groups


def _unfold(result: torch.Tensor, size: int, groups: int, grouped: bool) -> torch.Tensor:
    result = result.reshape(size, groups, *result.shape[1:])
    return result if grouped else result.squeeze(1)


def _make_vmap_rule(signature: _Signature) -> Callable[..., Any]:
    def rule(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
        operands, _, wanted, grouped = signature.split(arguments)
        count = len(operands)
        folded, groups = _fold(info.batch_size, in_dims[:count], operands, grouped)
        results = _call(signature.op, folded, tuple(arguments[count:-2]), wanted, True)
        unfolded = [_unfold(result, info.batch_size, groups, grouped) for result in results]
        return unfolded, [0] * len(unfolded)

    return rule


for _signature in _SIGNATURES.values():
    torch.library.register_vmap(
        f"torchreg::{_signature.op}", _make_vmap_rule(_signature), lib=_library
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


class _Apply(torch.autograd.Function):
    """Any op of the table, with its gradient op as the backward pass."""

    @staticmethod
    def forward(
        op: str, attributes: tuple[Any, ...], grouped: bool, *operands: torch.Tensor | None
    ) -> torch.Tensor:
        (result,) = _call(op, operands, attributes, _SIGNATURES[op].all_results, grouped)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        op, attributes, grouped, *operands = inputs
        signature = _SIGNATURES[op]
        needed = _SIGNATURES[signature.gradient].inputs
        ctx.op, ctx.attributes, ctx.grouped = op, attributes, grouped
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            *(
                x if name in needed else None
                for name, x in zip(signature.inputs, operands, strict=True)
            )
        )

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor | None) -> tuple[Any, ...]:
        signature = _SIGNATURES[ctx.op]
        asked = {
            f"grad_{name}"
            for name, need in zip(signature.inputs, ctx.needs_input_grad[3:], strict=True)
            if need
        }
        if grad_output is None or not asked:
            return (None,) * (3 + len(signature.inputs))
        gradient = _SIGNATURES[signature.gradient]
        values = dict(zip(signature.inputs, ctx.saved_tensors, strict=True))
        values["grad_output"] = _plain_memory(grad_output)
        if forward_ad._current_level >= 0 and any(
            x is not None and forward_ad.unpack_dual(x).tangent is not None for x in values.values()
        ):
            raise NotImplementedError(f"torchreg: {ctx.op}: forward mode is not supported")
        operands = [values[name] for name in gradient.inputs]
        wanted = [name in asked for name in gradient.outputs]
        with torch.no_grad():
            results = _call(gradient.op, operands, ctx.attributes, _mask(wanted), ctx.grouped)
        if torch.is_grad_enabled():
            sources = (x for x in (*ctx.saved_tensors, grad_output) if x is not None)
            results = _Once.apply(ctx.op, len(results), *results, *sources)
        names = [name for name, want in zip(gradient.outputs, wanted, strict=True) if want]
        by_name = dict(zip(names, results, strict=True))
        return (None, None, None, *(by_name.get(f"grad_{name}") for name in signature.inputs))

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        op: str,
        attributes: tuple[Any, ...],
        grouped: bool,
        *operands: torch.Tensor | None,
    ) -> tuple[torch.Tensor, int]:
        folded, groups = _fold(info.batch_size, in_dims[3:], operands, grouped)
        result = _Apply.apply(op, attributes, True, *folded)
        return _unfold(result, info.batch_size, groups, grouped), 0


class _EagerApply(torch.autograd.Function):
    """`_Apply` in the older style, which knows no functional transforms and takes half the time."""

    @staticmethod
    def forward(
        ctx: Any,
        op: str,
        attributes: tuple[Any, ...],
        grouped: bool,
        *operands: torch.Tensor | None,
    ) -> torch.Tensor:
        result = _Apply.forward(op, attributes, grouped, *operands)
        _Apply.setup_context(ctx, (op, attributes, grouped, *operands), result)
        return result

    backward = staticmethod(_Apply.backward)


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
    if type(value) in (bool, int, float, str):
        return value
    if isinstance(value, tuple):
        return tuple(_plain(v) for v in value)
    is_scalar = isinstance(value, np.generic | np.ndarray) and value.ndim == 0
    return value.item() if is_scalar else value


def _check_operand(op: str, name: str, optional: bool, value: Any) -> None:
    if value is None and optional:
        return
    if not isinstance(value, torch.Tensor):
        raise TypeError(
            f"{op}: {name}: expected a tensor{' or None' if optional else ''}, "
            f"got {type(value).__name__}"
        )
    if value.device.type not in ("cpu", "cuda"):
        raise ValueError(f"{op}: {name}: expected a tensor on cpu or cuda, got {value.device}")
    if value.layout != torch.strided or value.is_nested:
        came = "a nested one" if value.is_nested else value.layout
        raise TypeError(f"{op}: {name}: expected a dense tensor, got {came}")


def _grad_levels() -> int:
    """How many ``torch.func.grad`` are being taken, one inside the other."""
    stack = torch._C._functorch.get_interpreter_stack() or []
    return sum(level.key() == torch._C._functorch.TransformType.Grad for level in stack)


# What torch.compiler.assume_constant_result sets, without importing the compiler for it (1 s).
_grad_levels._dynamo_marked_constant = True


def apply(op: str, operands: Sequence[Any], attributes: dict[str, Any]) -> torch.Tensor:
    """Call an op of the table.

    Parameters
    ----------
    op
        Its name.
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
    first_name, first = "", None
    for (name, optional), value in zip(_TABLE[op]["inputs"], operands, strict=True):
        _check_operand(op, name, optional, value)
        if value is None:
            continue
        if first is None:
            first_name, first = name, value
        elif value.device != first.device:
            raise ValueError(
                f"{op}: {name}: expected a tensor on {first.device}, as {first_name}, "
                f"got {value.device}"
            )
    signature = _SIGNATURES[op]
    attributes = {name: _plain(value) for name, value in attributes.items()}
    ordered = tuple(attributes[name] for name in signature.attributes)
    arguments = [x if x is None else _plain_memory(x) for x in operands]
    if torch.compiler.is_compiling():
        # The checks come with the fake implementation. A compiler traces a backward pass without
        # its tie to the second derivative.
        if _grad_levels() > 1:
            raise RuntimeError(f"torchreg: {op} can be differentiated once, not twice")
    elif _is_eager(arguments):
        # The checks come with the launch.
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in operands):
            return _EagerApply.apply(op, ordered, False, *arguments)
        (result,) = _call(op, arguments, ordered, signature.all_results, False)
        return result
    else:
        specs = [None if x is None else _spec(x, False) for x in operands]
        _regcore.infer(op, specs, attributes, signature.all_results)
    return _Apply.apply(op, ordered, False, *arguments)
