"""Launches on tensors with plain memory: the only module of this package that runs kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from regkernels import table
from regkernels.table import Op
from torchreg._ops import open_sizes
from torchreg._ops.open_sizes import Spec, Specs
from torchreg._ops.torch_internals import current_cuda_stream

DTYPE_NAMES = {
    getattr(torch, name): name
    for name in (
        *("float16", "bfloat16", "float32", "float64", "bool", "complex64", "complex128"),
        *("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"),
    )
}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}

# An output of an op for each output in the table; None where it is absent or internal.
Outputs = list[torch.Tensor | None]


def spec(tensor: torch.Tensor, grouped: bool) -> Spec:
    """The dtype and the shape of a tensor with the group axis, as the extension takes them."""
    shape = tensor.shape
    dtype = DTYPE_NAMES.get(tensor.dtype) or str(tensor.dtype)
    return dtype, shape if grouped else (1, *shape)


def infer(op: Op, specs: Specs, attributes: dict[str, Any], wanted: int) -> Specs:
    """Dtypes and shapes of the outputs for those who listen in, with sizes left open."""
    return open_sizes.infer(
        lambda numbers: table.infer(op.name, numbers, attributes, wanted), specs, op.internal
    )


def _allocate(op: Op, specs: Specs, grouped: bool, device: torch.device) -> Outputs:
    outputs: Outputs = []
    for place, known in enumerate(specs):
        if known is None:
            outputs.append(None)
            continue
        dtype, shape = known
        # A workspace has whatever shape its op likes: the first axis need not be that of groups.
        if not grouped and place not in op.workspaces:
            shape = shape[1:]
        outputs.append(torch.empty(shape, dtype=DTYPES[dtype], device=device))
    return outputs


def run(
    op: Op,
    operands: Sequence[torch.Tensor | None],
    attributes: dict[str, Any],
    wanted: int,
    grouped: bool,
    *,
    only_shapes: bool = False,
) -> Outputs:
    """Launch an op. The memory of the operands has to be plain."""
    specs = [None if x is None else spec(x, grouped) for x in operands]
    output_specs: Specs
    if only_shapes:
        output_specs = infer(op, specs, attributes, wanted)
    else:
        output_specs = table.infer(op.name, specs, attributes, wanted)
    device = next(x for x in operands if x is not None).device
    outputs = _allocate(op, output_specs, grouped, device)
    if not only_shapes and device.type != "meta":
        is_cuda = device.type == "cuda"
        table.launch(
            op.name,
            specs,
            [0 if x is None else x.data_ptr() for x in operands],
            attributes,
            wanted,
            output_specs,
            [0 if x is None else x.data_ptr() for x in outputs],
            device.index if is_cuda else -1,
            current_cuda_stream(device.index) if is_cuda else 0,
        )
    # Workspaces go back to the allocator as soon as the launch is queued: it hands them out again
    # only to work that comes later on this stream.
    for place in op.internal:
        outputs[place] = None
    return outputs


def result(op: Op, outputs: Outputs) -> torch.Tensor:
    """The one output that an op always has."""
    tensor = outputs[op.result]
    assert tensor is not None
    return tensor
