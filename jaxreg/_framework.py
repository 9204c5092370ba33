"""What the definitions of `regkernels.definitions` need of a framework, from JAX."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxreg._primitives import Arrays, apply_function, linear_map
from jaxreg._sharding import vary_alike
from regkernels.definitions import Framework, Sampler


@dataclass(frozen=True)
class _InImage:
    """A sampler as a linear map of what is sampled, or its transpose."""

    sampler: Sampler
    transposed: bool

    def forward(self, residuals: Arrays, vectors: Arrays) -> Arrays:
        return (apply_function(_Samples(self.sampler, self.transposed), vectors[0], residuals[0]),)

    def transpose(self, residuals: Arrays, cotangents: Arrays) -> Arrays:
        return (
            apply_function(
                _Samples(self.sampler, not self.transposed), cotangents[0], residuals[0]
            ),
        )


@dataclass(frozen=True)
class _Samples:
    """What :meth:`Sampler.sample` gives, or its transpose, with derivatives."""

    sampler: Sampler
    transposed: bool

    def __call__(self, *arrays: jax.Array) -> jax.Array:
        function = self.sampler.spread if self.transposed else self.sampler.sample
        result: jax.Array = function(*arrays)
        return result

    def differentiate(self, arrays: Arrays, tangents: tuple[Any, ...]) -> tuple[jax.Array, Any]:
        (values, position), (moved_values, moved_position) = arrays, tangents
        sample = functools.partial(apply_function, self)
        result = sample(values, position)

        def in_image(moved: jax.Array, at: jax.Array) -> jax.Array:
            # What is linear in a tangent has to be a linear map for JAX, which may transpose it.
            of = _InImage(self.sampler, self.transposed)
            return linear_map(of, [at], [moved], [jax.typeof(result)])[0]

        parts = []
        if moved_values is not None:
            parts.append(in_image(moved_values, position))
        if moved_position is not None:
            for axis in self.sampler.axes:
                along = moved_position[:, None, ..., axis]
                if self.transposed:
                    slope = self.sampler.spread_slope(in_image, values * along, position, axis)
                    parts.append(slope)
                else:
                    parts.append(self.sampler.slope(sample, values, position, axis) * along)
        return result, functools.reduce(jnp.add, parts) if parts else None


@dataclass(frozen=True)
class _SelfAdjoint:
    """A linear function that is its own transpose, as a linear map."""

    of: Callable[[Any], Any]

    def forward(self, residuals: Arrays, vectors: Arrays) -> Arrays:
        return (self.of(vectors[0]),)

    def transpose(self, residuals: Arrays, cotangents: Arrays) -> Arrays:
        return tuple(linear_map(self, residuals, cotangents, [jax.typeof(cotangents[0])]))


def _constant(numbers: Any, like: jax.Array) -> jax.Array:
    array = np.asarray(numbers)
    return jnp.asarray(array if array.dtype == bool else array.astype(like.dtype))


def _sample(sampler: Sampler, image: jax.Array, position: jax.Array) -> Any:
    alike: Any = vary_alike((image, position))
    return apply_function(_Samples(sampler, False), *alike)


def _self_adjoint(of: Callable[[Any], Any], x: jax.Array) -> jax.Array:
    return linear_map(_SelfAdjoint(of), [], [x], [jax.typeof(x)])[0]


JAX = Framework(
    constant=_constant,
    fixed=jax.lax.stop_gradient,
    converted=lambda x, like: x.astype(like.dtype),
    widened=lambda x: x.astype(jnp.promote_types(x.dtype, np.float32)),
    epsilon=lambda like: float(jnp.finfo(like.dtype).eps),
    where=jnp.where,
    floor=jnp.floor,
    abs=jnp.abs,
    log=jnp.log,
    clip=jnp.clip,
    broadcast_to=jnp.broadcast_to,
    moveaxis=jnp.moveaxis,
    stack=jnp.stack,
    concatenate=jnp.concatenate,
    matmul=functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST),
    softmax=jax.nn.softmax,
    sample=_sample,
    self_adjoint=_self_adjoint,
)
"""JAX, as definitions see it."""
