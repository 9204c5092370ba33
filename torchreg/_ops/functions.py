"""Functions whose derivatives are known, as PyTorch calls them: in both modes, as often as asked.

The rules of a function are made of functions that have derivatives themselves, so that theirs
follow. A function that is mapped is a function again, whose rules are those of the other, mapped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from torchreg._ops.torch_internals import at_primals

Tensors = tuple[torch.Tensor, ...]
Partial = Sequence[torch.Tensor | None]


class Function(Protocol):
    """A function of tensors whose derivatives are known."""

    def __call__(self, *tensors: torch.Tensor) -> Tensors:
        """The results. PyTorch does not look into how they are computed."""
        ...

    def pull_back(self, tensors: Tensors, needs: Sequence[bool], cotangents: Partial) -> Tensors:
        """The gradients of the tensors that need one, from cotangents of results, some absent."""
        ...

    def push_forward(self, tensors: Tensors, tangents: Partial) -> Tensors:
        """The tangents of the results, from those of some tensors."""
        ...


@dataclass(frozen=True)
class Mapped:
    """A function of tensors of which some have a further axis in front, and all results."""

    inner: Function
    size: int
    mapped: tuple[bool, ...]  # which have the axis

    @staticmethod
    def _axes(flags: Sequence[bool]) -> tuple[int | None, ...]:
        return tuple(0 if flag else None for flag in flags)

    def __call__(self, *tensors: torch.Tensor) -> Tensors:
        if True not in self.mapped:
            results = self.inner(*tensors)
            return tuple(x.expand(self.size, *x.shape) for x in results)
        function = torch.func.vmap(self.inner.__call__, self._axes(self.mapped))
        mapped: Tensors = function(*tensors)
        return mapped

    def pull_back(self, tensors: Tensors, needs: Sequence[bool], cotangents: Partial) -> Tensors:
        there = [x is not None for x in cotangents]

        def pull_back(tensors: Tensors, *given: torch.Tensor) -> Tensors:
            remaining = iter(given)
            all_of_them = [next(remaining) if present else None for present in there]
            return self.inner.pull_back(tensors, needs, all_of_them)

        given = [x for x in cotangents if x is not None]
        function = torch.func.vmap(pull_back, (self._axes(self.mapped), *[0] * len(given)))
        gradients = function(tensors, *given)
        needed = [mapped for mapped, need in zip(self.mapped, needs, strict=True) if need]
        return tuple(x if mapped else x.sum(0) for x, mapped in zip(gradients, needed, strict=True))

    def push_forward(self, tensors: Tensors, tangents: Partial) -> Tensors:
        there = [x is not None for x in tangents]

        def push_forward(tensors: Tensors, *given: torch.Tensor) -> Tensors:
            remaining = iter(given)
            all_of_them = [next(remaining) if present else None for present in there]
            return self.inner.push_forward(tensors, all_of_them)

        given = [x for x in tangents if x is not None]
        axes = self._axes(self.mapped)
        moving = [axis for axis, present in zip(axes, there, strict=True) if present]
        results: Tensors = torch.func.vmap(push_forward, (axes, *moving))(tensors, *given)
        return results


class _Apply(torch.autograd.Function):
    @staticmethod
    def forward(of: Function, *tensors: torch.Tensor) -> Tensors:
        return of(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.of, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor | None) -> tuple[Any, ...]:
        needs = ctx.needs_input_grad[1:]
        if True not in needs or all(x is None for x in cotangents):
            return (None,) * (1 + len(needs))
        gradients = iter(ctx.of.pull_back(tuple(ctx.saved_tensors), needs, cotangents))
        return (None, *[next(gradients) if need else None for need in needs])

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: torch.Tensor | None) -> Tensors:
        with at_primals(ctx.saved_tensors) as tensors:
            results: Tensors = ctx.of.push_forward(tensors, tangents)
        return results

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], of: Function, *tensors: torch.Tensor
    ) -> tuple[Tensors, tuple[int, ...]]:
        dims = in_dims[1:]
        moved = [
            x if dim is None else x.movedim(dim, 0) for x, dim in zip(tensors, dims, strict=True)
        ]
        mapped = Mapped(of, info.batch_size, tuple(dim is not None for dim in dims))
        results = apply_function(mapped, *moved)
        return results, (0,) * len(results)


def apply_function(of: Function, *tensors: torch.Tensor) -> Tensors:
    """Call a function."""
    results: Tensors = _Apply.apply(of, *tensors)
    return results
