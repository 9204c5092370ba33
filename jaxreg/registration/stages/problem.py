"""What a stage works on: two images with their places in space, at one scale."""

from __future__ import annotations

import functools
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxreg import compose, interpolate
from jaxreg.registration.stages.pyramid import downsample, level_shape, resize_field

__all__ = ["Alignment", "Level", "Problem", "combined", "matmul", "overlap"]


@jax.custom_vjp
def matmul(one: jax.Array, other: jax.Array) -> jax.Array:
    """Return the product of two small matrices.

    Written out, and so that its gradient is such a product, too: XLA fuses that with what is around
    it, where on a GPU every call of a library costs more than it computes. The sums are in float32:
    TensorFloat-32, the default for products there, would move samples by a tenth of a voxel.
    """
    terms = (one[:, k, None] * other[k] for k in range(one.shape[1]))
    return functools.reduce(operator.add, terms)


def _matmul_forward(
    one: jax.Array, other: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return matmul(one, other), (one, other)


def _matmul_backward(
    operands: tuple[jax.Array, jax.Array], slope: jax.Array
) -> tuple[jax.Array, jax.Array]:
    one, other = operands
    return matmul(slope, other.T), matmul(one.T, slope)


matmul.defvjp(_matmul_forward, _matmul_backward)


class Alignment(NamedTuple):
    """Where the stages have come to: the moving image is sampled at ``A(x + d(x))``.

    Attributes
    ----------
    matrix
        ``A`` in physical space, ``(D + 1, D + 1)``, fixed -> moving.
    displacement
        ``d``: ``(1, [Z,] Y, X, D)`` on the fixed grid, normalised coordinates; `None` as long as
        nothing is deformed.
    inverse_displacement
        ``e`` with ``(id + d) o (id + e) = id``, likewise.
    """

    matrix: jax.Array
    displacement: jax.Array | None = None
    inverse_displacement: jax.Array | None = None


class Level(NamedTuple):
    """The two images at one scale, and the alignment that a stage starts from.

    Images are ``(1, C, [Z,] Y, X)``, masks ``(1, 1, [Z,] Y, X)``.
    """

    fixed: jax.Array
    moving: jax.Array
    fixed_mask: jax.Array | None
    moving_mask: jax.Array | None
    to_physical: jax.Array
    """``(D + 1, D + 1)``, fixed normalised -> physical."""
    to_moving: jax.Array
    """``(D + 1, D + 1)``, physical -> moving normalised."""
    matrix: jax.Array
    """``(D + 1, D + 1)``, physical fixed -> physical moving."""
    displacement: jax.Array | None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the fixed grid, ``([Z,] Y, X)``."""
        return self.fixed.shape[2:]

    @property
    def ndim(self) -> int:
        """Number of spatial dimensions."""
        return self.fixed.ndim - 2

    def voxel_size(self) -> jax.Array:
        """Return the largest distance between voxels of the fixed grid, in physical units."""
        edges = jnp.linalg.norm(self.to_physical[:-1, :-1], axis=0)
        voxels = jnp.asarray([max(n - 1, 1) for n in self.shape[::-1]], edges.dtype)
        largest: jax.Array = (2 * edges / voxels).max()
        return largest

    def normalised(self, matrix: jax.Array) -> jax.Array:
        """Return a physical transform as the ``affine`` of `jaxreg.interpolate`."""
        chain: jax.Array = matmul(self.to_moving, matmul(matrix, self.to_physical))
        return chain[None, :-1]

    def after(self, step: jax.Array) -> jax.Array:
        """Return the displacement of going through ``step``, then through the one so far."""
        return step if self.displacement is None else compose(self.displacement, step)

    def moved(
        self, matrix: jax.Array, displacement: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """Return the moving image at ``A(x + d(x))``, and its mask there."""
        return self._sample(self.moving, self.moving_mask, self.normalised(matrix), displacement)

    def fixed_moved(self, displacement: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Return the fixed image at ``x + d(x)``, and its mask there."""
        return self._sample(self.fixed, self.fixed_mask, None, displacement)

    def _sample(
        self,
        image: jax.Array,
        mask: jax.Array | None,
        affine: jax.Array | None,
        displacement: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array | None]:
        def sample(array: jax.Array) -> jax.Array:
            return interpolate(array, affine, displacement, affine_last=True, out_shape=self.shape)

        # A mask is a weight of the loss, not a part of what is minimised.
        weights = None if mask is None else jax.lax.stop_gradient(sample(mask))
        return sample(image), weights


@jax.jit
def overlap(level: Level) -> jax.Array:
    """Return whether any voxel of the fixed image has a weight, a scalar.

    It has one where the moving image covers it; and, if there are masks, where both leave it in.
    """
    weights = level.moving_mask
    if weights is None:
        weights = jnp.ones((1, 1, *level.moving.shape[2:]), level.moving.dtype)
    covered = level._replace(moving=weights, moving_mask=None).moved(
        level.matrix, level.displacement
    )[0]
    counts = combined(covered, level.fixed_mask)
    assert counts is not None
    return (counts > 0).any()


def combined(one: jax.Array | None, other: jax.Array | None) -> jax.Array | None:
    """Return the product of two masks, each of which may be absent."""
    if one is None or other is None:
        return other if one is None else one
    return one * other


_Images = tuple[jax.Array, jax.Array, jax.Array | None, jax.Array | None]
"""The fixed and the moving image, and their masks."""


class Problem:
    """Two images of one registration; makes a level of them for every scale.

    Parameters
    ----------
    fixed, moving
        ``(1, C, [Z,] Y, X)``, float32; each has its own spatial shape.
    fixed_mask, moving_mask
        ``(1, 1, [Z,] Y, X)`` of the same spatial shapes, at least 0, or `None`.
    fixed_to_physical, moving_to_physical
        ``(D + 1, D + 1)``, normalised -> physical.
    moving_ratio
        How many times wider the voxels of the fixed grid are than those of the moving one.
    """

    def __init__(
        self,
        fixed: jax.Array,
        moving: jax.Array,
        fixed_mask: jax.Array | None,
        moving_mask: jax.Array | None,
        fixed_to_physical: jax.Array,
        moving_to_physical: jax.Array,
        moving_ratio: float,
    ) -> None:
        self._fixed = fixed
        self._moving = moving
        self._masks = fixed_mask, moving_mask
        self._to_physical = fixed_to_physical
        self._to_moving = jnp.linalg.inv(moving_to_physical)
        self._moving_ratio = moving_ratio
        self._pyramids: dict[float, _Images] = {}

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the fixed grid at full resolution, ``([Z,] Y, X)``."""
        return self._fixed.shape[2:]

    def start(self) -> Alignment:
        """Return the alignment that trusts the places of the images: the identity."""
        return Alignment(jnp.eye(len(self.shape) + 1, dtype=jnp.float32))

    def level(self, scale: float, alignment: Alignment) -> Level:
        """Return the images at a scale; stages that ask for the same one share them."""
        shape = level_shape(self.shape, scale)
        if scale not in self._pyramids:
            other = level_shape(self._moving.shape[2:], max(scale * self._moving_ratio, 1.0))
            self._pyramids[scale] = (
                downsample(self._fixed, shape),
                downsample(self._moving, other),
                _smaller_mask(self._masks[0], shape),
                _smaller_mask(self._masks[1], other),
            )
        return self._level(self._pyramids[scale], shape, alignment)

    def whole(self, alignment: Alignment) -> Level:
        """Return the images as they are."""
        return self._level((self._fixed, self._moving, *self._masks), self.shape, alignment)

    def _level(self, images: _Images, shape: tuple[int, ...], alignment: Alignment) -> Level:
        displacement = alignment.displacement
        return Level(
            *images,
            self._to_physical,
            self._to_moving,
            alignment.matrix,
            None if displacement is None else resize_field(displacement, shape),
        )


def _smaller_mask(mask: jax.Array | None, shape: tuple[int, ...]) -> jax.Array | None:
    # The continuation by point reflection may undershoot, but a weight is at least 0.
    return None if mask is None else jnp.maximum(downsample(mask, shape), 0)
