"""The only module of this package that talks to the extension.

An op of the extension's table is registered as ``torch.ops.torchreg.<op>`` and called through
:func:`apply`, which makes it differentiable and mappable. Inside the table every array has one more
axis in front, the group axis, which is where ``vmap`` puts its mapped axis; nothing is ever summed
across groups. A call with ``grouped=False`` leaves that axis out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.autograd import forward_ad

from regkernels import _core
from torchreg import _open_sizes
from torchreg._open_sizes import Spec, Specs

_TABLE = _core.ops()
_DTYPE_NAMES = {
    getattr(torch, name): name
    for name in (
        *("float16", "bfloat16", "float32", "float64", "bool", "complex64", "complex128"),
        *("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"),
    )
}
_DTYPES = {name: dtype for dtype, name in _DTYPE_NAMES.items()}
_HALVES = (torch.float16, torch.bfloat16)
_FLOATS = (*_HALVES, torch.float32, torch.float64)
_SCHEMA_TYPES = {
    "bool": "bool",
    "int": "int",
    "float": "float",
    "choice": "str",
    "ints": "int[]",
    "floats": "float[]",
}
_PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter)

# An output of an op for each output in the table; None where it is absent or a workspace.
_Outputs = list[torch.Tensor | None]

_library = torch.library.Library("torchreg", "DEF")


def _mask(flags: Sequence[bool]) -> int:
    return sum(1 << i for i, flag in enumerate(flags) if flag)


class _Signature:
    """An op's entry in the table, as this module needs it.

    The positional arguments of ``torch.ops.torchreg.<op>`` are the op's inputs, its attributes, the
    mask of wanted outputs, and whether there is a group axis. It returns the outputs of that mask.
    """

    def __init__(self, op: str) -> None:
        entry = _TABLE[op]
        self.op = op
        self.inputs = [name for name, *_ in entry["inputs"]]
        self.attributes = [name for name, _, _ in entry["attributes"]]
        self.outputs = [name for name, _ in entry["outputs"]]
        self.roles = [role for _, role in entry["outputs"]]
        self.result = self.roles.index("result")
        self.has_labels = any(kind == "labels" for *_, kind in entry["inputs"])
        self.saved = _mask([role == "saved" for role in self.roles])
        self.unused = [i for i, role in enumerate(self.roles) if role in ("workspace", "weight")]
        arguments = [
            f"Tensor{'?' if optional else ''} {name}" for name, optional, *_ in entry["inputs"]
        ]
        arguments += [f"{_SCHEMA_TYPES[kind]} {name}" for name, kind, _ in entry["attributes"]]
        arguments += ["int wanted", "bool grouped"]
        self.schema = f"{op}({', '.join(arguments)}) -> Tensor[]"
        # Pairs of an input's place and that of its gradient: among the outputs of the gradient op,
        # or among the op's own if it is a unit gradient. An input that has neither is constant.
        self.gradient = entry["gradient"] or ""
        backward = _TABLE[self.gradient] if self.gradient else {"inputs": (), "outputs": ()}
        self.gradients = self._places([name for name, _ in backward["outputs"]])
        self.unit_gradients = self._places(
            [name if role == "unit_gradient" else "" for name, role in entry["outputs"]]
        )
        variable = {i for i, _ in (*self.gradients, *self.unit_gradients)}
        self.constants = [i for i in range(len(self.inputs)) if i not in variable]
        # What the gradient op takes: places among the inputs and outputs, then the cotangent.
        self.values = [*self.inputs, *self.outputs, "grad_output"]
        self.gradient_inputs = [self.values.index(name) for name, *_ in backward["inputs"]]

    def _places(self, outputs: list[str]) -> list[tuple[int, int]]:
        gradients = [f"grad_{name}" for name in self.inputs]
        return [(i, outputs.index(name)) for i, name in enumerate(gradients) if name in outputs]

    def split(self, arguments: Sequence[Any]) -> tuple[Sequence[Any], dict[str, Any], int, bool]:
        count = len(self.inputs)
        attributes = dict(zip(self.attributes, arguments[count:-2], strict=True))
        return arguments[:count], attributes, arguments[-2], arguments[-1]

    def wanted(self, needs: Sequence[bool]) -> int:
        """The outputs to ask for when the gradients of some inputs may be needed."""
        wanted = 1 << self.result
        if True not in needs:
            return wanted
        wanted |= self.saved
        for i, place in self.unit_gradients:
            if needs[i]:
                wanted |= 1 << place
        return wanted


_SIGNATURES = {op: _Signature(op) for op in _TABLE}


def _spec(tensor: torch.Tensor, grouped: bool) -> Spec:
    shape = tensor.shape
    dtype = _DTYPE_NAMES.get(tensor.dtype) or str(tensor.dtype)
    return dtype, shape if grouped else (1, *shape)


def _infer(signature: _Signature, specs: Specs, attributes: dict[str, Any], wanted: int) -> Specs:
    """Dtypes and shapes of the outputs for those who listen in, with sizes left open."""
    return _open_sizes.infer(
        lambda numbers: _core.infer(signature.op, numbers, attributes, wanted),
        specs,
        signature.unused,
    )


def _allocate(
    signature: _Signature,
    specs: Specs,
    grouped: bool,
    device: torch.device,
) -> _Outputs:
    outputs: _Outputs = []
    for spec, role in zip(specs, signature.roles, strict=True):
        if spec is None:
            outputs.append(None)
            continue
        dtype, shape = spec
        # A workspace has whatever shape its op likes: the first axis need not be that of groups.
        if not grouped and role != "workspace":
            shape = shape[1:]
        outputs.append(torch.empty(shape, dtype=_DTYPES[dtype], device=device))
    return outputs


def _run(
    signature: _Signature,
    operands: Sequence[torch.Tensor | None],
    attributes: dict[str, Any],
    wanted: int,
    grouped: bool,
    *,
    only_shapes: bool = False,
) -> _Outputs:
    """Launch an op. The memory of the operands has to be plain."""
    specs = [None if x is None else _spec(x, grouped) for x in operands]
    output_specs: Specs
    if only_shapes:
        output_specs = _infer(signature, specs, attributes, wanted)
    else:
        output_specs = _core.infer(signature.op, specs, attributes, wanted)
    device = next(x for x in operands if x is not None).device
    outputs = _allocate(signature, output_specs, grouped, device)
    if not only_shapes and device.type != "meta":
        is_cuda = device.type == "cuda"
        _core.launch(
            signature.op,
            specs,
            [0 if x is None else x.data_ptr() for x in operands],
            attributes,
            wanted,
            output_specs,
            [0 if x is None else x.data_ptr() for x in outputs],
            device.index if is_cuda else -1,
            torch._C._cuda_getCurrentRawStream(device.index) if is_cuda else 0,
        )
    # Workspaces go back to the allocator as soon as the launch is queued: it hands them out again
    # only to work that comes later on this stream.
    for i in signature.unused:
        outputs[i] = None
    return outputs


# A registered op returns no None: an output that is absent is an empty tensor of a dtype that no
# output has.
_ABSENT = torch.complex64


def _pack(outputs: _Outputs, wanted: int, like: torch.Tensor) -> list[torch.Tensor]:
    return [
        like.new_empty(0, dtype=_ABSENT) if x is None else x
        for i, x in enumerate(outputs)
        if wanted >> i & 1
    ]


def _unpack(results: Sequence[torch.Tensor], wanted: int, count: int) -> _Outputs:
    remaining = iter(results)
    outputs = [next(remaining) if wanted >> i & 1 else None for i in range(count)]
    return [None if x is None or x.dtype is _ABSENT else x for x in outputs]


def _result(signature: _Signature, outputs: _Outputs) -> torch.Tensor:
    result = outputs[signature.result]
    assert result is not None
    return result


def _make_implementation(
    signature: _Signature, *, only_shapes: bool
) -> Callable[..., list[torch.Tensor]]:
    def implementation(*arguments: Any) -> list[torch.Tensor]:
        operands, attributes, wanted, grouped = signature.split(arguments)
        outputs = _run(signature, operands, attributes, wanted, grouped, only_shapes=only_shapes)
        return _pack(outputs, wanted, next(x for x in operands if x is not None))

    return implementation


def _register(signature: _Signature) -> None:
    _library.define(signature.schema)
    implementation = _make_implementation(signature, only_shapes=False)
    for key in ("CPU", "CUDA"):
        _library.impl(signature.op, implementation, key)
    torch.library.register_fake(
        f"torchreg::{signature.op}",
        _make_implementation(signature, only_shapes=True),
        lib=_library,
    )


for _signature in _SIGNATURES.values():
    _register(_signature)


_is_legacy_batch = torch._C._functorch.is_legacy_batchedtensor


def _is_eager(operands: Sequence[Any]) -> bool:
    """Whether nobody listens in: no compiler, transform, dual number, mode or subclass."""
    if torch.compiler.is_compiling():
        return False
    for x in operands:
        if x is not None and (type(x) not in _PLAIN_TYPES or _is_legacy_batch(x)):
            return False
    return (
        forward_ad._current_level < 0
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
    if x._is_zerotensor():
        return x.clone()
    return x.resolve_neg() if x.is_neg() else x


def _call(
    op: str, operands: Sequence[Any], attributes: dict[str, Any], wanted: int, grouped: bool
) -> _Outputs:
    signature = _SIGNATURES[op]
    # The dispatcher costs more than the rest of a call; it is for those who listen in.
    if _is_eager(operands):
        return _run(signature, operands, attributes, wanted, grouped)
    if not torch.compiler.is_compiling() and any(
        x is not None and _is_legacy_batch(x) for x in operands
    ):
        raise NotImplementedError(
            f"torchreg: {op}: several cotangents at once (is_grads_batched, vectorize) are not "
            "supported: use torch.func.vmap"
        )
    ordered = [attributes[name] for name in signature.attributes]
    results = getattr(torch.ops.torchreg, op)(*operands, *ordered, wanted, grouped)
    return _unpack(results, wanted, len(signature.outputs))


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
        operands, attributes, wanted, grouped = signature.split(arguments)
        dims = in_dims[: len(operands)]
        folded, groups = _fold(info.batch_size, dims, operands, grouped)
        outputs = _call(signature.op, folded, attributes, wanted, True)
        results = [
            None if x is None else _unfold(x, info.batch_size, groups, grouped) for x in outputs
        ]
        present = next(x for x in operands if x is not None)
        packed = _pack(results, wanted, present)
        return packed, [None if x.dtype is _ABSENT else 0 for x in packed]

    return rule


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
    signature: _Signature,
    attributes: dict[str, Any],
    needs: Sequence[bool],
    grouped: bool,
    operands: Sequence[torch.Tensor | None],
    outputs: _Outputs,
) -> None:
    """Prepare the backward pass: from unit gradients as far as they are there."""
    ctx.op, ctx.attributes, ctx.grouped = signature.op, attributes, grouped
    ctx.set_materialize_grads(False)
    values = (*operands, *outputs)
    kept: _Outputs = [None] * len(values)
    served = [(i, place) for i, place in signature.unit_gradients if outputs[place] is not None]
    if needs.count(True) > len(served):
        for place in signature.gradient_inputs:
            if place < len(values):
                kept[place] = values[place]
    for _, place in served:
        kept[len(operands) + place] = outputs[place]
    if signature.saved or signature.unit_gradients:
        # Outputs that are kept depend on these inputs: `_Once` has to know.
        for i, need in enumerate(needs):
            if need:
                kept[i] = values[i]
    ctx.save_for_backward(*kept)


def _scaled(unit: torch.Tensor, cotangent: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A unit gradient times the cotangent, which has one number for each of the leading axes."""
    if (
        cotangent.device.type == "cpu"
        and unit.dtype == dtype
        and _is_eager((unit, cotangent))
        and not torch._C._autograd._get_current_graph_task_keep_graph()
        and (cotangent == 1).all()
    ):
        # Of a plain `loss.backward()`. Nobody else will ask for the unit gradient, and a product
        # would cost a volume and, worse, wake PyTorch's threads, which then spin for milliseconds.
        return unit
    trailing = (1,) * (unit.ndim - cotangent.ndim)
    return (unit * cotangent.reshape(*cotangent.shape, *trailing)).to(dtype)


def _first_derivatives(
    ctx: Any,
    signature: _Signature,
    needs: Sequence[bool],
    saved: Sequence[torch.Tensor | None],
    grad_output: torch.Tensor,
) -> _Outputs:
    count = len(signature.inputs)
    gradients: _Outputs = [None] * count
    for i, place in signature.unit_gradients:
        unit, operand = saved[count + place], saved[i]
        if needs[i] and unit is not None and operand is not None:
            gradients[i] = _scaled(unit, grad_output, operand.dtype)
    remaining = [
        (i, place) for i, place in signature.gradients if needs[i] and gradients[i] is None
    ]
    if remaining:
        values = (*saved, _plain_memory(grad_output))
        operands = [values[place] for place in signature.gradient_inputs]
        wanted = sum([1 << place for _, place in remaining])
        results = _call(signature.gradient, operands, ctx.attributes, wanted, ctx.grouped)
        for i, place in remaining:
            gradients[i] = results[place]
    return gradients


def _refuse_dual_numbers(op: str, tensors: Sequence[torch.Tensor | None]) -> None:
    """A tangent that got lost would be a derivative of zero."""
    if forward_ad._current_level >= 0 and any(
        x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors
    ):
        raise NotImplementedError(f"torchreg: {op}: forward mode is not supported")


def _gradients(ctx: Any, grad_output: torch.Tensor | None) -> _Outputs:
    """The gradient of each input that is asked for it."""
    signature = _SIGNATURES[ctx.op]
    count = len(signature.inputs)
    needs = ctx.needs_input_grad[-count:]
    if grad_output is None or True not in needs:
        return [None] * count
    saved = ctx.saved_tensors
    _refuse_dual_numbers(ctx.op, (*saved, grad_output))
    if not torch.is_grad_enabled():
        return _first_derivatives(ctx, signature, needs, saved, grad_output)
    with torch.no_grad():
        gradients = _first_derivatives(ctx, signature, needs, saved, grad_output)
    present = [x for x in gradients if x is not None]
    sources = [x for x in (*saved, grad_output) if x is not None]
    tied = iter(_Once.apply(ctx.op, len(present), *present, *sources))
    return [None if x is None else next(tied) for x in gradients]


class _Apply(torch.autograd.Function):
    """Any op of the table, made differentiable.

    ``needs`` tells which inputs may be asked for their gradient, at this level of functional
    transforms or at another. Returns what :func:`_call` does.
    """

    @staticmethod
    def forward(
        op: str,
        attributes: tuple[Any, ...],
        needs: tuple[bool, ...],
        grouped: bool,
        *operands: torch.Tensor | None,
    ) -> tuple[torch.Tensor | None, ...]:
        signature = _SIGNATURES[op]
        named = dict(zip(signature.attributes, attributes, strict=True))
        return tuple(_call(op, operands, named, signature.wanted(needs), grouped))

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Any, ...], outputs: tuple[torch.Tensor | None, ...]
    ) -> None:
        op, attributes, needs, grouped, *operands = inputs
        signature = _SIGNATURES[op]
        extras = [None if i == signature.result else x for i, x in enumerate(outputs)]
        ctx.mark_non_differentiable(*[x for x in extras if x is not None])
        named = dict(zip(signature.attributes, attributes, strict=True))
        _keep(ctx, signature, named, needs, grouped, operands, extras)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor | None) -> tuple[Any, ...]:
        grad_output = grad_outputs[_SIGNATURES[ctx.op].result]
        return (None, None, None, None, *_gradients(ctx, grad_output))

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        op: str,
        attributes: tuple[Any, ...],
        needs: tuple[bool, ...],
        grouped: bool,
        *operands: torch.Tensor | None,
    ) -> tuple[tuple[torch.Tensor | None, ...], tuple[int | None, ...]]:
        folded, groups = _fold(info.batch_size, in_dims[4:], operands, grouped)
        outputs = _Apply.apply(op, attributes, needs, True, *folded)
        unfolded = tuple(
            None if x is None else _unfold(x, info.batch_size, groups, grouped) for x in outputs
        )
        return unfolded, tuple(None if x is None else 0 for x in unfolded)


def _check_constants(signature: _Signature, needs: Sequence[bool]) -> None:
    for i in signature.constants:
        if needs[i]:
            raise ValueError(
                f"{signature.op}: {signature.inputs[i]}: expected a tensor that requires no "
                "gradient, as it has none, got one that does"
            )


def _make_derivative(signature: _Signature) -> Callable[..., list[torch.Tensor]]:
    """For calls of the registered op itself, which is what exported programs are made of."""

    def derivative(*arguments: Any) -> list[torch.Tensor]:
        operands, attributes, wanted, grouped = signature.split(arguments)
        needs = tuple(x is not None and x.requires_grad for x in operands)
        if True not in needs or not torch.is_grad_enabled():
            with torch._C._AutoDispatchBelowAutograd():
                results: list[torch.Tensor] = getattr(torch.ops.torchreg, signature.op)(*arguments)
            return results
        if not signature.gradient or wanted != signature.wanted(()):
            raise RuntimeError(
                f"torch.ops.torchreg.{signature.op} has no derivative of its own: "
                "call the function of the same name in torchreg"
            )
        _check_constants(signature, needs)
        ordered = tuple(attributes.values())
        return [_result(signature, _Apply.apply(signature.op, ordered, needs, grouped, *operands))]

    return derivative


for _signature in _SIGNATURES.values():
    torch.library.register_vmap(
        f"torchreg::{_signature.op}", _make_vmap_rule(_signature), lib=_library
    )
    _library.impl(_signature.op, _make_derivative(_signature), "Autograd")


class _EagerApply(torch.autograd.Function):
    """`_Apply` in the older style, which knows no functional transforms and takes half the time."""

    @staticmethod
    def forward(
        ctx: Any,
        signature: _Signature,
        attributes: dict[str, Any],
        needs: tuple[bool, ...],
        *operands: torch.Tensor | None,
    ) -> torch.Tensor:
        outputs = _run(signature, operands, attributes, signature.wanted(needs), False)
        _keep(ctx, signature, attributes, needs, False, operands, outputs)
        return _result(signature, outputs)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor | None) -> tuple[Any, ...]:
        return (None, None, None, *_gradients(ctx, grad_output))


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
    if type(value) in (bool, int, float, str):
        return value
    if isinstance(value, tuple):
        return tuple(plain_number(v) for v in value)
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
    if value.device.type not in ("cpu", "cuda", "meta"):
        raise ValueError(f"{op}: {name}: expected a tensor on cpu or cuda, got {value.device}")
    if value.layout != torch.strided or value.is_nested:
        came = "a nested one" if value.is_nested else value.layout
        raise TypeError(f"{op}: {name}: expected a dense tensor, got {came}")


def _convert(
    op: str, operands: Sequence[torch.Tensor | None]
) -> tuple[list[torch.Tensor | None], torch.dtype | None]:
    """The operands in the dtypes that the kernels take, and what their result is to become.

    Fields lead to coordinates and are computed with as they are; images may be stored in half
    precision; labels are integers. The result is the image's again if that was converted, has the
    fields' common dtype where there is neither an image nor labels, and stays in what it was
    computed in where images are compared. ``None``: as it is. The conversions are outside of the
    differentiated function, so that autograd returns each gradient in the dtype of its operand.
    """
    known = [x.dtype for x in operands if x is not None and x.dtype in _FLOATS]
    arithmetic = torch.float64 if torch.float64 in known else torch.float32
    converted: list[torch.Tensor | None] = []
    result, has_image = None, False
    for (_, _, kind), x in zip(_TABLE[op]["inputs"], operands, strict=True):
        if x is None:
            converted.append(None)
            continue
        stays = kind == "image" and x.dtype in _HALVES and arithmetic == torch.float32
        converts = x.dtype in _FLOATS and not stays and kind != "labels"
        converted.append(x.to(arithmetic) if converts else x)
        if kind != "field" and not has_image:
            has_image = True
            result = None if stays or kind in ("compared", "labels") else x.dtype
    if not has_image and known:
        result = functools.reduce(torch.promote_types, known)
    return converted, result


def widened(tensor: Any) -> Any:
    """A tensor of half precision as float32, for results that other ops go on with."""
    if isinstance(tensor, torch.Tensor) and tensor.dtype in _HALVES:
        return tensor.float()
    return tensor


def _transforms() -> tuple[int, int]:
    """How many functional transforms are under way, and how many of them are ``grad``."""
    stack = torch._C._functorch.get_interpreter_stack() or []
    kind = torch._C._functorch.TransformType.Grad
    return len(stack), sum(level.key() == kind for level in stack)


# What torch.compiler.assume_constant_result sets, without importing the compiler for it (1 s).
_transforms._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _requires_gradient(x: torch.Tensor) -> bool:
    """Whether a tensor, or one that functional transforms have wrapped in it, requires one."""
    while not x.requires_grad and torch._C._functorch.is_functorch_wrapped_tensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x.requires_grad


def _needs(
    signature: _Signature, operands: Sequence[torch.Tensor | None], plain: bool
) -> tuple[bool, ...]:
    """Which operands the result may have to be differentiated by.

    ``plain``: no transform is under way, and no operand of one.
    """
    transforms = 0 if plain else _transforms()[0]
    if not transforms and not torch.is_grad_enabled():
        return (False,) * len(operands)
    if not transforms:
        needs = tuple([x is not None and x.requires_grad for x in operands])
    elif torch.compiler.is_compiling():
        # A compiler does not see through the wrappers.
        needs = tuple(
            x is not None and (x.requires_grad or i not in signature.constants)
            for i, x in enumerate(operands)
        )
    else:
        needs = tuple(x is not None and _requires_gradient(x) for x in operands)
    _check_constants(signature, needs)
    return needs


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
    operands, result_dtype = _prepare(op, operands)
    result = _dispatch(op, operands, attributes)
    return result if result_dtype is None else result.to(result_dtype)


def apply_for(
    results: tuple[str, ...], op: str, operands: Sequence[Any], attributes: dict[str, Any]
) -> tuple[torch.Tensor, ...]:
    """Call an op without a gradient for some of its results, by name, ``output`` the first.

    Otherwise as :func:`apply`.
    """
    operands, result_dtype = _prepare(op, operands)
    signature = _SIGNATURES[op]
    attributes = {name: plain_number(value) for name, value in attributes.items()}
    arguments = [x if x is None else _plain_memory(x) for x in operands]
    if results == ("output",) and signature.has_labels:
        # Integers do not vary with what they are computed from: as with any other function of
        # PyTorch that returns them, they are constants.
        arguments = [x if x is None else x.detach() for x in arguments]
    is_eager = _is_eager(arguments)
    _needs(signature, arguments, is_eager)  # which refuses any
    _refuse_dual_numbers(op, arguments)
    wanted = _mask([name in results for name in signature.outputs])
    if not is_eager and not torch.compiler.is_compiling():
        specs = [None if x is None else _spec(x, False) for x in arguments]
        _infer(signature, specs, attributes, wanted)
    outputs = _call(op, arguments, attributes, wanted, False)
    values = [x for x, name in zip(outputs, signature.outputs, strict=True) if name in results]
    first, *others = [x for x in values if x is not None]
    return (first if result_dtype is None else first.to(result_dtype), *others)


def _prepare(
    op: str, operands: Sequence[Any]
) -> tuple[Sequence[torch.Tensor | None], torch.dtype | None]:
    """Operands checked for what the kernels take for granted, in the dtypes that they take.

    Also the dtype that the result is to become; ``None``: as it is.
    """
    first_name, first, alike = "", None, True
    for (name, optional, _), value in zip(_TABLE[op]["inputs"], operands, strict=True):
        _check_operand(op, name, optional, value)
        if value is None:
            continue
        if first is None:
            first_name, first = name, value
            continue
        if value.device != first.device:
            raise ValueError(
                f"{op}: {name}: expected a tensor on {first.device}, as {first_name}, "
                f"got {value.device}"
            )
        if value.dtype != first.dtype:
            alike = False
    if not alike or (first is not None and first.dtype in _HALVES):
        return _convert(op, operands)
    return operands, None


def _dispatch(
    op: str, operands: Sequence[torch.Tensor | None], attributes: dict[str, Any]
) -> torch.Tensor:
    signature = _SIGNATURES[op]
    attributes = {name: plain_number(value) for name, value in attributes.items()}
    arguments = [x if x is None else _plain_memory(x) for x in operands]
    is_eager = _is_eager(arguments)
    needs = _needs(signature, arguments, is_eager)
    if is_eager:
        # The checks come with the launch.
        if True in needs:
            result: torch.Tensor = _EagerApply.apply(signature, attributes, needs, *arguments)
            return result
        outputs = _run(signature, arguments, attributes, signature.wanted(needs), False)
        return _result(signature, outputs)
    if not torch.compiler.is_compiling():
        specs = [None if x is None else _spec(x, False) for x in arguments]
        _infer(signature, specs, attributes, signature.wanted(needs))
    elif _transforms()[1] > 1:
        # A compiler traces a backward pass without its tie to the second derivative.
        raise RuntimeError(f"torchreg: {op} can be differentiated once, not twice")
    elif True not in needs or torch.compiler.is_exporting():
        # With autograd functions a strict export would detach the result without a word.
        outputs = _call(op, arguments, attributes, signature.wanted(()), False)
        return _result(signature, outputs)
    ordered = tuple(attributes[name] for name in signature.attributes)
    return _result(signature, _Apply.apply(op, ordered, needs, False, *arguments))
