"""The inverse of a displacement field."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxreg import compose, convert_displacement

__all__ = ["invert_displacement"]

_BLOCK = 5  # iterations between two tests, each of which reads a number on the host


class _State(NamedTuple):
    inverse: jax.Array
    residual: jax.Array
    length: jax.Array
    """Part of the residual that the next step subtracts."""
    best: jax.Array
    best_residual: jax.Array
    done: jax.Array


@functools.partial(jax.jit, static_argnames=("tolerance", "max_iterations"))
def invert_displacement(
    u: jax.Array,
    *,
    initial: jax.Array | None = None,
    tolerance: float = 0.01,
    max_iterations: int = 100,
) -> jax.Array:
    r"""Find the displacement ``e`` with ``(id + u) o (id + e) = id``.

    Parameters
    ----------
    u
        ``(N, [Z,] Y, X, D)``, normalised coordinates.
    initial
        Where to start; 0 by default.
    tolerance
        Largest distance in voxels by which a point may come back to another place.
    max_iterations
        When to give up; at a fold there is no inverse to be found.

    Returns
    -------
    jax.Array
        Shaped like ``u``.

    Notes
    -----
    The residual :math:`r(x) = e(x) + u(x + e(x))` is what `jaxreg.compose` returns. Subtracting
    it is the fixed-point iteration of Chen et al., "A simple fixed-point approach to invert a
    deformation field", Medical Physics 35, 2008, which needs a Lipschitz constant of ``u`` below 1.
    Here every voxel, for itself, subtracts a part of it that follows from its last step, as in
    Barzilai and Borwein, "Two-Point Step Size Gradient Methods", IMA J. Numer. Anal. 8, 1988: that
    also converges where space is stretched to a multiple. The best of all steps is returned.
    """

    def improve(state: _State, _: None) -> tuple[_State, None]:
        inverse = state.inverse - state.length * state.residual
        residual = compose(u, inverse)
        change = residual - state.residual
        moved = (-state.length * state.residual * change).sum(axis=-1, keepdims=True)
        length = moved / jnp.maximum((change**2).sum(axis=-1, keepdims=True), 1e-30)
        length = jnp.clip(jnp.where(moved > 0, length, 0.5), 0.1, 4)
        nearer = _lengths(residual) < _lengths(state.best_residual)
        best = jnp.where(nearer, inverse, state.best)
        best_residual = jnp.where(nearer, residual, state.best_residual)
        return _State(inverse, residual, length, best, best_residual, state.done + 1), None

    def unfinished(state: _State) -> jax.Array:
        return (_lengths(state.best_residual).max() > tolerance) & (state.done < max_iterations)

    start = jnp.zeros_like(u) if initial is None else initial
    residual = compose(u, start)
    length = jnp.full_like(u[..., :1], 0.5)
    state = _State(start, residual, length, start, residual, jnp.zeros((), jnp.int32))
    state = jax.lax.while_loop(
        unfinished, lambda state: jax.lax.scan(improve, state, length=_BLOCK)[0], state
    )
    return state.best


def _lengths(displacement: jax.Array) -> jax.Array:
    """Return the length of every vector in voxels, ``(N, [Z,] Y, X, 1)``."""
    voxels = convert_displacement(displacement, "normalised", "voxel")
    lengths: jax.Array = jnp.linalg.norm(voxels, axis=-1, keepdims=True)
    return lengths
