"""The private parts of PyTorch that this package leans on, each by what it is for.

PyTorch has no public way to ask these questions, and may rename what answers them with any release.
If it does, this is the one module to change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd import forward_ad

# The stream that the caller has made current on a CUDA device, by the device's index. A build of
# PyTorch without CUDA has no such function, and never asks for a stream.
current_cuda_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # type: ignore[assignment]

# DLPack's functions that look into a tensor from C, in a capsule. Another package may have put its
# own there for a PyTorch before 2.10, which has none.
dlpack_exchange: object | None = (
    torch.Tensor.__dlpack_c_exchange_api__ if hasattr(torch._C, "_dlpack_exchange_api") else None
)

# The types of tensors that are nothing but that.
PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter)

# Whether a tensor belongs to the older `vmap` behind `is_grads_batched` and `vectorize`, which no
# rule of a registered op can serve.
is_legacy_batched: Callable[[torch.Tensor], bool] = torch._C._functorch.is_legacy_batchedtensor

# A context in which a registered op's implementation is called, past the one for autograd.
BelowAutograd: Callable[[], Any] = torch._C._AutoDispatchBelowAutograd

# Whether the backward pass under way keeps its graph, so that it may be run again.
is_graph_kept: Callable[[], bool] = torch._C._autograd._get_current_graph_task_keep_graph

_are_transforms_active = torch._C._are_functorch_transforms_active
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_tracing_state = torch._C._get_tracing_state


def plain_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """What `apply` of an autograd function comes to for plain tensors, outside of transforms."""
    apply: Callable[..., Any] = super(torch.autograd.Function, function).apply  # type: ignore[misc]
    return apply


def is_anyone_listening() -> bool:
    """Whether dual numbers, functional transforms, modes or a tracer follow what is computed."""
    return (
        forward_ad._current_level >= 0
        or _are_transforms_active()
        or _dispatch_modes() != 0
        or _function_modes() != 0
        or _tracing_state() is not None
    )


def is_tracing() -> bool:
    """Whether `torch.jit.trace` notes what is computed."""
    return _tracing_state() is not None


def is_forward_mode_active() -> bool:
    """Whether tensors may be dual numbers."""
    return forward_ad._current_level >= 0


def has_tangent(x: torch.Tensor) -> bool:
    """Whether a tensor, or one that functional transforms have wrapped in it, is a dual number."""
    functorch = torch._C._functorch
    # There is no rule that would look into a tensor of `vmap` for it.
    while functorch.is_batchedtensor(x) or forward_ad.unpack_dual(x).tangent is None:
        if not functorch.is_functorch_wrapped_tensor(x):
            return False
        x = functorch.get_unwrapped(x)
    return True


@contextmanager
def at_primals(tensors: Sequence[torch.Tensor | None]) -> Iterator[tuple[Any, ...]]:
    """In the rule of an autograd function for forward mode: tensors without their own tangents.

    PyTorch switches off forward mode for such a rule, and so that of all transforms around the one
    that the rule is for: their tangents would be zero.
    """
    with forward_ad._set_fwd_grad_enabled(True):
        yield tuple([x if x is None else forward_ad.unpack_dual(x).primal for x in tensors])


def may_enter_forward_mode() -> bool:
    """Whether `torch.func.jvp` may be called, which `forward_ad.dual_level` refuses within it."""
    return forward_ad._current_level < 0 or transforms()[2] > 0


def is_lazy_zero(x: torch.Tensor) -> bool:
    """Whether a tensor stands for zeros that nobody has written to memory."""
    return x._is_zerotensor()


def transforms() -> tuple[int, int, int]:
    """How many functional transforms are under way, how many ``grad``, and how many ``jvp``."""
    keys = [level.key() for level in torch._C._functorch.get_interpreter_stack() or []]
    kinds = torch._C._functorch.TransformType
    return len(keys), keys.count(kinds.Grad), keys.count(kinds.Jvp)


# What torch.compiler.assume_constant_result sets, without importing the compiler for it (1 s).
transforms._dynamo_marked_constant = True  # type: ignore[attr-defined]


def requires_gradient(x: torch.Tensor) -> bool:
    """Whether a tensor, or one that functional transforms have wrapped in it, requires one."""
    while not x.requires_grad and torch._C._functorch.is_functorch_wrapped_tensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x.requires_grad


def example_size(size: torch.SymInt) -> int | None:
    """The number that a compiler traces an open size with, without settling it, if there is one."""
    return size.node.hint if size.node.has_hint() else None
