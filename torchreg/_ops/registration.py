"""The ops as ``torch.ops.torchreg.<op>``, for compilers, transforms and exported programs.

The positional arguments of a registered op are the inputs of its entry in the table, its
attributes, the mask of wanted outputs, and whether there is a group axis. It returns the outputs of
that mask.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from regkernels.table import OPS, Op
from torchreg._ops.autograd import (
    DifferentiableBothWays,
    check_constants,
    refuse_dual_numbers,
)
from torchreg._ops.calls import ABSENT, call, fold, pack, unfold
from torchreg._ops.launch import result, run
from torchreg._ops.torch_internals import BelowAutograd

_SCHEMA_TYPES = {
    "bool": "bool",
    "int": "int",
    "float": "float",
    "choice": "str",
    # None stands for no numbers: AOTInductor hands an empty list on as None.
    "ints": "int[]?",
    "floats": "float[]?",
}

# PyTorch forgets what a library has registered as soon as the library is gone.
_library = torch.library.Library("torchreg", "DEF")


def _schema(op: Op) -> str:
    arguments = [f"Tensor{'?' if x.is_optional else ''} {x.name}" for x in op.inputs]
    arguments += [f"{_SCHEMA_TYPES[x.kind]} {x.name}" for x in op.attributes]
    arguments += ["int wanted", "bool grouped"]
    return f"{op.name}({', '.join(arguments)}) -> Tensor[]"


def _split(op: Op, arguments: Sequence[Any]) -> tuple[Sequence[Any], dict[str, Any], int, bool]:
    count = len(op.inputs)
    attributes = {
        declared.name: () if value is None else value
        for declared, value in zip(op.attributes, arguments[count:-2], strict=True)
    }
    return arguments[:count], attributes, arguments[-2], arguments[-1]


def _make_implementation(op: Op, *, only_shapes: bool) -> Callable[..., list[torch.Tensor]]:
    def implementation(*arguments: Any) -> list[torch.Tensor]:
        operands, attributes, wanted, grouped = _split(op, arguments)
        if not only_shapes:
            # PyTorch writes lazy zeros to memory before it comes here, one for all elements.
            operands = [x if x is None else x.contiguous() for x in operands]
        outputs = run(op, operands, attributes, wanted, grouped, only_shapes=only_shapes)
        return pack(outputs, wanted, next(x for x in operands if x is not None))

    return implementation


def _make_vmap_rule(op: Op) -> Callable[..., Any]:
    def rule(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
        operands, attributes, wanted, grouped = _split(op, arguments)
        dims = in_dims[: len(operands)]
        folded, groups = fold(info.batch_size, dims, operands, grouped)
        outputs = call(op.name, folded, attributes, wanted, True)
        results = [
            None if x is None else unfold(x, info.batch_size, groups, grouped) for x in outputs
        ]
        present = next(x for x in operands if x is not None)
        packed = pack(results, wanted, present)
        return packed, [None if x.dtype is ABSENT else 0 for x in packed]

    return rule


def _make_derivative(op: Op) -> Callable[..., list[torch.Tensor]]:
    """For calls of the registered op itself, which is what exported programs are made of."""

    def derivative(*arguments: Any) -> list[torch.Tensor]:
        operands, attributes, wanted, grouped = _split(op, arguments)
        needs = tuple(x is not None and x.requires_grad for x in operands)
        if True not in needs or not torch.is_grad_enabled():
            refuse_dual_numbers(op.name, operands)
            with BelowAutograd():
                results: list[torch.Tensor] = getattr(torch.ops.torchreg, op.name)(*arguments)
            return results
        if op.gradient is None or wanted != op.wanted(()):
            raise RuntimeError(
                f"torch.ops.torchreg.{op.name} has no derivative of its own: "
                "call the function of the same name in torchreg"
            )
        check_constants(op, needs)
        ordered = tuple(attributes.values())
        outputs = DifferentiableBothWays.apply(op.name, ordered, needs, grouped, *operands)
        return [result(op, outputs)]

    return derivative


def _register(op: Op) -> None:
    _library.define(_schema(op))
    implementation = _make_implementation(op, only_shapes=False)
    for key in ("CPU", "CUDA"):
        _library.impl(op.name, implementation, key)
    name = f"torchreg::{op.name}"
    fake = _make_implementation(op, only_shapes=True)
    torch.library.register_fake(name, fake, lib=_library)
    torch.library.register_vmap(name, _make_vmap_rule(op), lib=_library)
    _library.impl(op.name, _make_derivative(op), "Autograd")


for _op in OPS.values():
    _register(_op)
