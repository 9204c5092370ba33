"""Calls of an op as it is, without a derivative: at once, or through PyTorch's dispatcher.

The dispatcher costs more than the rest of a call. It is for those who listen in: compilers,
functional transforms, modes, subclasses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from regkernels.table import OPS
from torchreg._ops.launch import Outputs, run
from torchreg._ops.torch_internals import (
    PLAIN_TYPES,
    is_anyone_listening,
    is_lazy_zero,
    is_legacy_batched,
)

# A registered op returns no None: an output that is absent is an empty tensor of a dtype that no
# output has.
ABSENT = torch.complex64


def is_eager(operands: Sequence[Any]) -> bool:
    """Whether nobody listens in: no compiler, transform, dual number, mode or subclass."""
    if torch.compiler.is_compiling():
        return False
    for x in operands:
        if x is not None and (type(x) not in PLAIN_TYPES or is_legacy_batched(x)):
            return False
    return not is_anyone_listening()


def plain_memory(x: torch.Tensor) -> torch.Tensor:
    """The tensor with its elements in order in memory, as they are: no lazy sign, no lazy zeros."""
    x = x.contiguous()
    if torch.compiler.is_compiling():
        return x
    if is_lazy_zero(x):
        return x.clone()
    return x.resolve_neg() if x.is_neg() else x


def pack(outputs: Outputs, wanted: int, like: torch.Tensor) -> list[torch.Tensor]:
    """The wanted outputs, as a registered op returns them."""
    return [
        like.new_empty(0, dtype=ABSENT) if x is None else x
        for i, x in enumerate(outputs)
        if wanted >> i & 1
    ]


def unpack(results: Sequence[torch.Tensor], wanted: int, count: int) -> Outputs:
    """All outputs, of which a registered op has returned the wanted ones."""
    remaining = iter(results)
    outputs = [next(remaining) if wanted >> i & 1 else None for i in range(count)]
    return [None if x is None or x.dtype is ABSENT else x for x in outputs]


def call(
    name: str, operands: Sequence[Any], attributes: dict[str, Any], wanted: int, grouped: bool
) -> Outputs:
    """The outputs of an op by their places in the table, ``None`` for those that are absent."""
    op = OPS[name]
    if is_eager(operands):
        return run(op, operands, attributes, wanted, grouped)
    if not torch.compiler.is_compiling() and any(
        x is not None and is_legacy_batched(x) for x in operands
    ):
        raise NotImplementedError(
            f"torchreg: {name}: several cotangents at once (is_grads_batched, vectorize) are not "
            "supported: use torch.func.vmap"
        )
    values = [attributes[attribute] for attribute in op.attribute_names]
    ordered = [None if isinstance(x, tuple | list) and not x else x for x in values]
    results = getattr(torch.ops.torchreg, name)(*operands, *ordered, wanted, grouped)
    return unpack(results, wanted, len(op.outputs))


def fold(
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

    def folded(x: torch.Tensor | None, is_mapped: bool) -> torch.Tensor | None:
        if x is None:
            return None
        if is_mapped or x.shape[0] > 1:
            if not is_mapped:
                x = x.unsqueeze(0)
            x = x.expand(size, groups, *x.shape[2:]).reshape(size * groups, *x.shape[2:])
        return plain_memory(x)

    return [folded(x, m) for x, m in zip(moved, mapped, strict=True)], groups


def unfold(result: torch.Tensor, size: int, groups: int, grouped: bool) -> torch.Tensor:
    """Take a mapped axis out of the group axis, to the front."""
    result = result.reshape(size, groups, *result.shape[1:])
    return result if grouped else result.squeeze(1)
