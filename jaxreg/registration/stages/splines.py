r"""Fields of cubic B-splines: control points on a lattice, and their field on the grid of an image.

With control points :math:`h` apart, one of them at the middle :math:`x_0` of the grid,

.. math:: d(x) = \sum_k c_k \prod_a \beta^3\Bigl(\frac{x_a - x_{0,a}}{h_a} - k_a\Bigr),

where :math:`\beta^3` is the cubic B-spline. As it is a product over the axes, the field is what a
small matrix for each axis makes of the coefficients, one after the other, and the gradient with
respect to these is what their transposes make of the field's. A spline is also one of control
points half as far apart, exactly: :math:`\beta^3(x) = \sum_k p_k \beta^3(2x - k)` with
:math:`p = (1, 4, 6, 4, 1) / 8` for :math:`k = -2, \dots, 2`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from jaxreg.registration.stages.spread import spread

__all__ = ["Lattice", "expanded", "refined"]

_TWO_SCALE = {-2: 1 / 8, -1: 4 / 8, 0: 6 / 8, 1: 4 / 8, 2: 1 / 8}


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Lattice:
    """Where control points are: about the middle of a grid, as far out as any reaches into it.

    Attributes
    ----------
    whole
        Shape of the fixed grid at full resolution, ``([Z,] Y, X)``.
    finest
        Voxels of that grid from one control point to the next, in the order of the axes, on the
        finest lattice.
    doublings
        How often they are doubled here.
    """

    whole: tuple[int, ...]
    finest: tuple[float, ...]
    doublings: int = 0

    @property
    def spacing(self) -> tuple[float, ...]:
        """Voxels of the full resolution from one control point to the next."""
        return tuple(step * 2**self.doublings for step in self.finest)

    @property
    def reaches(self) -> tuple[int, ...]:
        """How many control points there are on either side of the middle one, for each axis.

        Along an axis of length 1 nothing varies: there is one.
        """
        return tuple(
            # What is a whole number but for rounding needs no point beyond it.
            math.ceil((size - 1) / 2 / step - 1e-6) + 1 if size > 1 else 0
            for size, step in zip(self.whole, self.spacing, strict=True)
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """How many control points there are along each axis, an odd number."""
        return tuple(2 * reach + 1 for reach in self.reaches)

    def halved(self) -> Lattice:
        """Return the lattice whose control points are half as far apart."""
        return dataclasses.replace(self, doublings=self.doublings - 1)

    def voxels(self, shape: Sequence[int]) -> float:
        """Return how many voxels of a grid of a shape, of the same extent, there are to a point."""
        axes = zip(self.whole, self.spacing, shape, strict=True)
        return math.prod(step * (n - 1) / (size - 1) for size, step, n in axes if size > 1)

    def weights(self, shape: Sequence[int]) -> list[NDArray[np.float64]]:
        """Return for each axis what the points count at the voxels of such a grid, ``(n, points)``.

        Each row has the sum 1.
        """
        matrices = []
        axes = zip(self.whole, self.spacing, self.reaches, shape, strict=True)
        for size, step, reach, n in axes:
            if reach == 0:
                matrices.append(np.ones((n, 1)))
                continue
            places = np.linspace(-1, 1, n) * ((size - 1) / 2 / step)
            matrices.append(_cubic(places[:, None] - np.arange(-reach, reach + 1)))
        return matrices


def _cubic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the cubic B-spline."""
    distance = np.abs(x)
    near = 2 / 3 - distance**2 + distance**3 / 2
    far = np.maximum(2 - distance, 0) ** 3 / 6
    return np.where(distance < 1, near, far)


def expanded(coefficients: jax.Array, lattice: Lattice, shape: tuple[int, ...]) -> jax.Array:
    """Return the field of control points on a grid.

    Parameters
    ----------
    coefficients
        ``(N, *lattice.shape, D)``.
    lattice
        Where the points are.
    shape
        Of the grid, ``([Z,] Y, X)``, which has the extent of that at full resolution.

    Returns
    -------
    Array
        ``(N, *shape, D)``; linear in the coefficients.
    """
    return spread(_along_axes(coefficients, lattice.weights(shape)), 1)


def refined(coefficients: jax.Array, lattice: Lattice) -> jax.Array:
    """Return the coefficients of the same spline on the lattice that is halved.

    Parameters
    ----------
    coefficients
        ``(N, *lattice.shape, D)``.
    lattice
        Where the points are.

    Returns
    -------
    Array
        ``(N, *lattice.halved().shape, D)``: mean values of the old ones, with positive weights.
    """
    matrices = []
    for old, new in zip(lattice.reaches, lattice.halved().reaches, strict=True):
        offsets = np.arange(-new, new + 1)[:, None] - 2 * np.arange(-old, old + 1)
        weights = sum((offsets == k) * share for k, share in _TWO_SCALE.items())
        matrices.append(np.asarray(weights, np.float64) if new else np.ones((1, 1)))
    return _along_axes(coefficients, matrices)


def _along_axes(field: jax.Array, matrices: Sequence[NDArray[np.float64]]) -> jax.Array:
    """Return what a matrix for each axis of a field makes of it.

    The first axis, of the planes, is the last: that product, by far the largest, is one of two
    plain matrices.
    """

    def along(field: jax.Array, axis: int) -> jax.Array:
        matrix = jnp.asarray(matrices[axis], field.dtype)
        product = jnp.tensordot(
            matrix, field, axes=(1, axis + 1), precision=jax.lax.Precision.HIGHEST
        )
        return jnp.moveaxis(product, 0, axis + 1)

    return functools.reduce(along, reversed(range(len(matrices))), field)
