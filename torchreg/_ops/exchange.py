"""Calls on plain tensors by one call of the extension, which looks into tensors by itself.

From 2.10 on, PyTorch offers DLPack's functions that read a tensor, and the current stream, from C.
With them the extension checks the operands, makes the outputs and launches, all in one call from
here. It declines whatever is not plain, such as operands that have to be converted or copied or are
no tensors: the rest of this package serves those, as it serves all calls with an older PyTorch.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch

from regkernels.table import OPS, Op, TensorFramework, TensorOp
from torchreg._ops.launch import DTYPES, Outputs
from torchreg._ops.torch_internals import PLAIN_TYPES, dlpack_exchange, is_anyone_listening


def _wanted(op: Op) -> list[int | None]:
    """The outputs to ask for, by which inputs require a gradient; ``None`` where none is there.

    The first input is the lowest bit of an entry's number.
    """
    choices = (choice[::-1] for choice in itertools.product((False, True), repeat=len(op.inputs)))
    return [
        None if any(choice[i] for i in op.constants) else op.wanted(choice) for choice in choices
    ]


def _tensor_ops() -> dict[str, TensorOp]:
    if dlpack_exchange is None:
        return {}
    framework = TensorFramework(dlpack_exchange, PLAIN_TYPES, torch.empty, DTYPES)
    return {name: TensorOp(framework, name, _wanted(op)) for name, op in OPS.items()}


# By name. Without them all calls go the longer way.
TENSOR_OPS = _tensor_ops()


def _of(op: Op) -> TensorOp | None:
    """The op as the extension calls it, unless somebody listens in, whom it would not tell."""
    if torch.compiler.is_compiling() or is_anyone_listening():
        return None
    return TENSOR_OPS.get(op.name)


def forward(
    op: Op, operands: tuple[Any, ...], attributes: dict[str, Any]
) -> tuple[tuple[bool, ...], Outputs] | None:
    """Which operands are differentiated by, and the outputs; ``None`` for what is declined."""
    tensor_op = _of(op)
    if tensor_op is None:
        return None
    return tensor_op.forward(operands, attributes, torch.is_grad_enabled())


def launch(
    op: Op, operands: tuple[Any, ...], attributes: dict[str, Any], wanted: int
) -> Outputs | None:
    """The outputs, ``None`` where they are absent or internal; ``None`` for what is declined."""
    tensor_op = _of(op)
    return None if tensor_op is None else tensor_op.launch(operands, attributes, wanted)
