"""The transform that a registration finds, and what can be done with it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from jaxreg.registration.grid import Grid

__all__ = ["Transform"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Transform:
    """Maps points of the fixed space to points of the moving space; a JAX pytree.

    A point goes through a diffeomorphism of the fixed space first, then through an affine:
    with ``x`` in normalised coordinates of `grid`, the moving image is sampled at ``A(x + d(x))``.
    Back, a point of the moving space goes through the inverse of ``A``, then through the inverse
    diffeomorphism ``y + e(y)``, which lives on the same grid.

    Attributes
    ----------
    grid
        The fixed grid.
    matrix
        ``A`` in physical space: ``(D + 1, D + 1)``, fixed -> moving, millimetres, LPS.
    displacement
        ``d``: ``(1, [Z,] Y, X, D)`` on the grid, normalised coordinates; `None`: no deformation.
    inverse_displacement
        ``e``, likewise; `None` where there is no deformation.
    """

    grid: Grid
    matrix: Any
    displacement: Any = None
    inverse_displacement: Any = None
