r"""Levenberg and Marquardt's method with a few parameters, for any loss.

About the best parameters so far the loss is taken for

.. math:: f + g \cdot p + \tfrac{1}{2}\, p \cdot B p

with its gradient :math:`g`, and :math:`B` the Gauss-Newton matrix, corrected so that it fits how the
gradient changed along the last steps (BFGS, in Powell's damped form, which keeps it positive). A
step solves :math:`(B + \lambda\,\mathrm{diag} B)\, p = -g`. If the loss falls it is taken and the
damping :math:`\lambda` becomes smaller; if it does not, the damping becomes larger, and what was
seen there corrects the matrix all the same.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

__all__ = ["Evaluation", "Memory", "judged", "nothing_known", "proposed"]

_PAIRS = 4
"""So many of the last steps correct the matrix."""

_DAMPING = 1e-2
"""At the start of a level."""

_LEAST_DAMPING = 1e-6
"""Keeps the matrix far from singular in float32."""


class Evaluation(NamedTuple):
    """What is known at some parameters."""

    loss: jax.Array
    """A scalar."""
    gradient: jax.Array
    """``(P,)``."""
    normal: jax.Array
    """The Gauss-Newton matrix, ``(P, P)``."""


class Memory(NamedTuple):
    """What the method knows between its iterations."""

    best: jax.Array
    """The best parameters so far, ``(P,)``."""
    at_best: Evaluation
    trial: jax.Array
    """Parameters that come next, ``(P,)``."""
    foretold: jax.Array
    """By how much the loss should fall there, a scalar."""
    steps: jax.Array
    changes: jax.Array
    """The last steps, and how the gradient changed along them, ``(pairs, P)``, the last one last;
    0 where there was none."""
    damping: jax.Array
    growth: jax.Array
    """What the damping is multiplied by if the next step fails."""
    evaluations: jax.Array
    """How often the loss was computed."""
    largest: jax.Array
    """The largest loss, in magnitude."""


def nothing_known(start: jax.Array) -> Memory:
    """Return the memory before the first evaluation, at some parameters ``(P,)``."""
    size, dtype = start.size, start.dtype
    return Memory(
        jnp.copy(start),
        Evaluation(jnp.zeros((), dtype), jnp.zeros(size, dtype), jnp.zeros((size, size), dtype)),
        jnp.copy(start),
        jnp.zeros((), dtype),
        jnp.zeros((_PAIRS, size), dtype),
        jnp.zeros((_PAIRS, size), dtype),
        jnp.full((), _DAMPING, dtype),
        jnp.full((), 2.0, dtype),
        jnp.zeros((), jnp.int32),
        jnp.zeros((), dtype),
    )


def judged(memory: Memory, found: Evaluation) -> Memory:
    """Return what is known after the evaluation of the trial."""
    first = memory.evaluations == 0
    fall = memory.at_best.loss - found.loss
    finite = jnp.isfinite(found.loss) & jnp.isfinite(found.gradient).all()
    better = first | (finite & (fall > 0))
    # The damping after Nielsen, "Damping parameter in Marquardt's method", IMM-REP-1999-05.
    gain = fall / jnp.where(memory.foretold > 0, memory.foretold, 1)
    smaller = jnp.maximum(1 / 3, 1 - (2 * gain - 1) ** 3) * memory.damping
    larger = memory.growth * memory.damping
    damping = jnp.clip(jnp.where(better, smaller, larger), _LEAST_DAMPING, 1e8)
    damping = jnp.where(first, memory.damping, damping)
    growth = jnp.where(better, 2.0, 2 * memory.growth)
    step, change = memory.trial - memory.best, found.gradient - memory.at_best.gradient
    known = finite & ~first

    def pushed(rows: jax.Array, row: jax.Array) -> jax.Array:
        return jnp.where(known, jnp.concatenate([rows[1:], row[None]]), rows)

    best, at_best = jax.tree.map(
        lambda new, old: jnp.where(better, new, old),
        (memory.trial, found),
        (memory.best, memory.at_best),
    )
    return memory._replace(
        best=best,
        at_best=at_best,
        steps=pushed(memory.steps, step),
        changes=pushed(memory.changes, change),
        damping=damping,
        growth=growth,
        evaluations=memory.evaluations + 1,
        largest=jnp.where(finite, jnp.maximum(memory.largest, jnp.abs(found.loss)), memory.largest),
    )


def proposed(memory: Memory, longest: jax.Array, first: jax.Array | None) -> Memory:
    """Return the memory with the next trial.

    Parameters
    ----------
    memory
        After `judged`.
    longest
        How long a step may be, a scalar: the Euclidean norm of the parameters.
    first
        How long the first step is, where the unit of the Gauss-Newton matrix is not that of the
        loss; `None` where it is.
    """
    _, gradient, normal = memory.at_best
    known = (memory.steps[-1] != 0).any()
    curved, along = memory.changes[-1] @ memory.steps[-1], _form(normal, memory.steps[-1])
    unit = jnp.where(
        known & (curved > 0) & (along > 0), curved / jnp.where(along > 0, along, 1), 1.0
    )
    matrix = unit * normal
    for step, change in zip(memory.steps, memory.changes, strict=True):
        matrix = _corrected(matrix, step, change)
    diagonal = jnp.diagonal(matrix)
    scale = jnp.maximum(diagonal, 1e-3 * diagonal.max())
    scale = jnp.where(scale > 0, scale, 1)
    damped = matrix + memory.damping * jnp.diag(scale)
    step = -solved(damped, gradient)
    length = jnp.sqrt((step**2).sum())
    if first is not None:
        longer = first / jnp.where(length > 0, length, 1)
        step = jnp.where(known, step, longer * step)
        length = jnp.where(known, length, longer * length)
    step = step * jnp.minimum(1, longest / jnp.where(length > 0, length, 1))
    foretold = -(gradient * step).sum() - _form(matrix, step) / 2
    if first is not None:
        foretold = jnp.where(known, foretold, -(gradient * step).sum() / 2)
    return memory._replace(trial=memory.best + step, foretold=foretold)


def _form(matrix: jax.Array, vector: jax.Array) -> jax.Array:
    return (matrix * vector * vector[:, None]).sum()


def _corrected(matrix: jax.Array, step: jax.Array, change: jax.Array) -> jax.Array:
    """Return a matrix that maps a step to how the gradient changed along it, if that is positive.

    Powell, "A fast algorithm for nonlinearly constrained optimization calculations", 1978.
    """
    image = (matrix * step).sum(axis=1)
    expected, seen = (step * image).sum(), (step * change).sum()
    share = jnp.where(
        seen >= 0.2 * expected, 1.0, 0.8 * expected / jnp.where(expected == seen, 1, expected - seen)
    )
    change = share * change + (1 - share) * image
    seen = (step * change).sum()
    usable = (expected > 0) & (seen > 0)
    left = image[:, None] * image / jnp.where(usable, expected, 1)
    right = change[:, None] * change / jnp.where(usable, seen, 1)
    return jnp.where(usable, matrix - left + right, matrix)


def solved(matrix: jax.Array, vector: jax.Array) -> jax.Array:
    """Return the solution of a small positive system, by Gauss and Jordan's elimination.

    Written out: on a GPU a call of a library costs more than it computes.
    """
    size = vector.size
    rows = jnp.concatenate([matrix, vector[:, None]], axis=1)
    others = 1 - jnp.eye(size, dtype=matrix.dtype)
    for k in range(size):
        row = rows[k] / rows[k, k]
        # The pivot's row becomes `row`; of each other one so much of it is taken that its column
        # vanishes.
        factor = others[k] * rows[:, k]
        rows = jnp.where(others[k][:, None] > 0, rows - factor[:, None] * row, row)
    return rows[:, -1]
