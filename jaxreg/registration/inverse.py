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
    damping: jax.Array
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
    Voxels do not depend on each other, so each has a damping of its own, halved when a step would
    not bring it nearer: that also converges where space is stretched to a multiple.
    """

    def improve(state: _State, _: None) -> tuple[_State, None]:
        trial = state.inverse - state.damping * state.residual
        residual = compose(u, trial)
        nearer = _lengths(residual) < _lengths(state.residual)
        return _State(
            jnp.where(nearer, trial, state.inverse),
            jnp.where(nearer, residual, state.residual),
            jnp.where(nearer, jnp.minimum(1.25 * state.damping, 1), state.damping / 2),
            state.done + 1,
        ), None

    def unfinished(state: _State) -> jax.Array:
        return (_lengths(state.residual).max() > tolerance) & (state.done < max_iterations)

    start = jnp.zeros_like(u) if initial is None else initial
    damping = jnp.ones_like(u[..., :1])
    state = _State(start, compose(u, start), damping, jnp.zeros((), jnp.int32))
    return jax.lax.while_loop(
        unfinished, lambda state: jax.lax.scan(improve, state, length=_BLOCK)[0], state
    ).inverse


def _lengths(displacement: jax.Array) -> jax.Array:
    """Return the length of every vector in voxels, ``(N, [Z,] Y, X, 1)``."""
    voxels = convert_displacement(displacement, "normalised", "voxel")
    return jnp.linalg.norm(voxels, axis=-1, keepdims=True)
