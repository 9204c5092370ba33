"""What the definitions of `regkernels.definitions` need of a framework, from PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from regkernels.definitions import Framework, Sampler
from torchreg._ops.functions import Partial, Tensors, apply_function


@dataclass(frozen=True)
class _Samples:
    """What :meth:`Sampler.sample` gives of values and positions, or its transpose."""

    sampler: Sampler
    transposed: bool

    def __call__(self, *tensors: torch.Tensor) -> Tensors:
        function = self.sampler.spread if self.transposed else self.sampler.sample
        return (function(*tensors),)

    def _of(self, transposed: bool, values: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        return apply_function(_Samples(self.sampler, transposed), values, position)[0]

    def pull_back(self, tensors: Tensors, needs: Sequence[bool], cotangents: Partial) -> Tensors:
        (values, position), (cotangent,) = tensors, cotangents
        assert cotangent is not None
        gradients = []
        if needs[0]:
            gradient = self._of(not self.transposed, cotangent, position)
            gradients.append(gradient.sum_to_size(values.shape))
        if needs[1]:
            image, factor = (cotangent, values) if self.transposed else (values, cotangent)
            along = [torch.zeros_like(position[..., 0])] * position.shape[-1]
            for axis in self.sampler.axes:
                slope = self.sampler.slope(self._sample, image, position, axis)
                along[axis] = (slope * factor).sum(1).sum_to_size(position.shape[:-1])
            gradients.append(torch.stack(along, -1))
        return tuple(gradients)

    def _sample(self, image: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        return self._of(False, image, position)

    def push_forward(self, tensors: Tensors, tangents: Partial) -> Tensors:
        (values, position), (moved_values, moved_position) = tensors, tangents

        def this(values: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
            return self._of(self.transposed, values, position)

        parts = []
        if moved_values is not None:
            parts.append(this(moved_values, position))
        if moved_position is not None:
            for axis in self.sampler.axes:
                along = moved_position[:, None, ..., axis]
                if self.transposed:
                    slope = self.sampler.spread_slope(this, values * along, position, axis)
                    parts.append(slope)
                else:
                    parts.append(self.sampler.slope(this, values, position, axis) * along)
        if not parts:
            parts.append(torch.zeros_like(this(values, position)))
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return (total,)


@dataclass(frozen=True)
class _SelfAdjoint:
    """A linear function that is its own transpose."""

    of: Callable[[Any], Any]

    def __call__(self, *tensors: torch.Tensor) -> Tensors:
        return (self.of(*tensors),)

    def pull_back(self, tensors: Tensors, needs: Sequence[bool], cotangents: Partial) -> Tensors:
        (cotangent,) = cotangents
        assert cotangent is not None
        return apply_function(self, cotangent)

    def push_forward(self, tensors: Tensors, tangents: Partial) -> Tensors:
        (tangent,) = tangents
        assert tangent is not None
        return apply_function(self, tangent)


def _constant(numbers: Any, like: torch.Tensor) -> torch.Tensor:
    array = np.asarray(numbers)
    dtype = torch.bool if array.dtype == bool else like.dtype
    return torch.tensor(array, dtype=dtype, device=like.device)


def _sample(sampler: Sampler, image: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    return apply_function(_Samples(sampler, False), image, position)[0]


def _self_adjoint(of: Callable[[Any], Any], x: torch.Tensor) -> torch.Tensor:
    return apply_function(_SelfAdjoint(of), x)[0]


def _widened(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


TORCH = Framework(
    constant=_constant,
    fixed=torch.Tensor.detach,
    converted=lambda x, like: x.to(like.dtype),
    widened=_widened,
    epsilon=lambda like: torch.finfo(like.dtype).eps,
    where=torch.where,
    floor=torch.floor,
    abs=torch.abs,
    log=torch.log,
    clip=torch.clip,
    broadcast_to=torch.broadcast_to,
    moveaxis=torch.moveaxis,
    stack=lambda tensors, axis: torch.stack([*tensors], axis),
    concatenate=lambda tensors, axis: torch.cat([*tensors], axis),
    matmul=torch.matmul,
    softmax=lambda x: torch.softmax(x, -1),
    sample=_sample,
    self_adjoint=_self_adjoint,
)
"""PyTorch, as definitions see it."""
