r"""Levenberg and Marquardt's method with a few parameters, for any loss.

About the best parameters so far the loss is taken for

.. math:: f + g \cdot p + \tfrac{1}{2}\, p \cdot B p

with its gradient :math:`g`, and :math:`B` the Gauss-Newton matrix, corrected so that it fits how
the gradient changed along the last steps (BFGS, in Powell's damped form, which keeps it positive).
A step solves :math:`(B + \lambda\,\mathrm{diag} B)\, p = -g`. If the loss falls it is taken and the
damping :math:`\lambda` becomes smaller; if it does not, the damping becomes larger, and what was
seen there corrects the matrix all the same. Near a minimum a loss is flat: long before the place is
known as well as float32 can tell it, two losses differ by less than what they are rounded by. Then
the gradient, which is small there and not flat, says by its work whether the step leads down.

It has converged when little is left to be gained, and the matrix that says so has just been right:
the trial before was foretold to gain little, too, and did not gain much more than that. Where the
matrix alone says so, before any trial, the first one goes a good way, to see whether it is true.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["Evaluation", "Memory", "judged", "nothing_known", "proposed", "solved"]

_PAIRS = 4
"""So many of the last steps correct the matrix."""

_DAMPING = 1e-2
"""At the start of a level."""

_LEAST_DAMPING = 1e-4
"""Keeps the matrix far from singular in float32."""

_MOST_DAMPING = 1e8

_SHORTEST = 0.2
"""So much of a first step goes one that is to see whether the matrix is right."""

_FLATTEST = 1e-3
"""A parameter along which the loss is hardly curved is damped as if it were by this share of the
most."""


_ROUNDING = 2e-6
"""Losses that differ by less than this share of the largest may differ by rounding alone."""


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
    left: jax.Array
    """By how much it should fall in all, from the best parameters so far, a scalar."""
    surprise: jax.Array
    """By how much more than foretold it fell at the last trial, a scalar."""
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
    converged: jax.Array
    """Whether little is left to be gained, and this has been seen to be true; a scalar."""


def nothing_known(start: jax.Array) -> Memory:
    """Return the memory before the first evaluation, at some parameters ``(P,)``."""
    size, dtype = start.size, start.dtype
    return Memory(
        jnp.copy(start),
        Evaluation(jnp.zeros((), dtype), jnp.zeros(size, dtype), jnp.zeros((size, size), dtype)),
        jnp.copy(start),
        jnp.zeros((), dtype),
        jnp.zeros((), dtype),
        jnp.zeros((), dtype),
        jnp.zeros((_PAIRS, size), dtype),
        jnp.zeros((_PAIRS, size), dtype),
        jnp.full((), _DAMPING, dtype),
        jnp.full((), 2.0, dtype),
        jnp.zeros((), jnp.int32),
        jnp.zeros((), dtype),
        jnp.zeros((), bool),
    )


def judged(
    memory: Memory, found: Evaluation, *, is_near: jax.Array, or_by_work: bool = False
) -> Memory:
    r"""Return what is known after the evaluation of the trial.

    Where the loss falls the trial is the best from now on. If nothing is finite where a level
    starts, the best is not, either: so it is told.

    Parameters
    ----------
    memory
        With the trial.
    found
        What was found there.
    is_near
        Whether the trial is so near, a scalar, that the gradients at both ends tell how the loss
        changes between: by the work along the step :math:`p`, by the trapezoidal rule
        :math:`-(g_0 + g_1) \cdot p / 2`. Where the losses differ by no more than rounding, that
        decides.
    or_by_work
        Whether it is enough in any case that the loss falls by the work, which leaves out what the
        gradient leaves out.
    """
    first = memory.evaluations == 0
    step, change = memory.trial - memory.best, found.gradient - memory.at_best.gradient
    work = -((memory.at_best.gradient + found.gradient) * step).sum() / 2
    fall = memory.at_best.loss - found.loss
    alike = is_near & (jnp.abs(fall) <= _ROUNDING * memory.largest)
    if or_by_work:
        fall = jnp.where(is_near, jnp.maximum(fall, work), fall)
    fall = jnp.where(alike, work, fall)
    finite = jnp.isfinite(found.loss) & jnp.isfinite(found.gradient).all()
    better = first | (finite & (fall > 0))
    # The damping after Nielsen, "Damping parameter in Marquardt's method", IMM-REP-1999-05.
    gain = fall / jnp.where(memory.foretold > 0, memory.foretold, 1)
    smaller = jnp.maximum(1 / 3, 1 - (2 * gain - 1) ** 3) * memory.damping
    larger = memory.growth * jnp.maximum(memory.damping, _DAMPING)
    damping = jnp.clip(jnp.where(better, smaller, larger), _LEAST_DAMPING, _MOST_DAMPING)
    damping = jnp.where(first, memory.damping, damping)
    growth = jnp.where(better, 2.0, 2 * memory.growth)
    known = finite & ~first
    # Of two losses that cannot be told apart either will do, and the trace does not rise.
    loss = jnp.where(known & alike, jnp.minimum(found.loss, memory.at_best.loss), found.loss)

    def pushed(rows: jax.Array, row: jax.Array) -> jax.Array:
        return jnp.where(known, jnp.concatenate([rows[1:], row[None]]), rows)

    best, at_best = jax.tree.map(
        lambda new, old: jnp.where(better, new, old),
        (memory.trial, found._replace(loss=loss)),
        (memory.best, memory.at_best),
    )
    return memory._replace(
        best=jnp.where(first & ~finite, jnp.nan, best),
        at_best=at_best,
        surprise=jnp.where(known, fall - memory.foretold, 0),
        steps=pushed(memory.steps, step),
        changes=pushed(memory.changes, change),
        damping=damping,
        growth=growth,
        evaluations=memory.evaluations + 1,
        largest=jnp.where(finite, jnp.maximum(memory.largest, jnp.abs(found.loss)), memory.largest),
    )


def proposed(
    memory: Memory,
    *,
    longest: jax.Array,
    first: jax.Array,
    is_scaled: jax.Array,
    least: jax.Array,
) -> Memory:
    """Return the memory with the next trial.

    Parameters
    ----------
    memory
        After `judged`.
    longest
        How long a step may be, a scalar: the Euclidean norm of the parameters.
    first
        How long the first step is, where the unit of the Gauss-Newton matrix is not that of the
        loss: how the gradient changes along it will tell. Where it is, and the matrix says that
        hardly anything is to be gained, a fifth of that.
    is_scaled
        Whether it is, a scalar.
    least
        A gain that is no longer worth an evaluation, a scalar.

    Returns
    -------
    Memory
        With the trial, by how much the loss should fall there, and whether the method has
        converged.
    """
    _, gradient, normal = memory.at_best
    # Without a step along which the loss was curved upwards there is no unit to be had.
    unit, has_unit = jnp.ones((), gradient.dtype), is_scaled
    for step, change in zip(memory.steps, memory.changes, strict=True):
        seen, expected = (step * change).sum(), _form(normal, step)
        usable = (seen > 0) & (expected > 0)
        unit = jnp.where(usable, seen / jnp.where(usable, expected, 1), unit)
        has_unit = has_unit | usable
    matrix = normal * unit
    for step, change in zip(memory.steps, memory.changes, strict=True):
        matrix = jnp.where(has_unit, _corrected(matrix, step, change), matrix)
    diagonal = jnp.diagonal(matrix)
    scale = jnp.maximum(diagonal, _FLATTEST * diagonal.max())
    scale = jnp.where(scale > 0, scale, 1)
    step = -solved(matrix + memory.damping * jnp.diag(scale), gradient)
    length = jnp.sqrt((step**2).sum())
    # A long way off the matrix that is damped says less than is left.
    left = -(1 + memory.damping) * (gradient * step).sum() / 2
    left = jnp.where(has_unit | ~(length > 0), left, jnp.inf)
    little = ~(left > least)  # a NaN is, too
    begins = memory.evaluations == 1
    at_once = has_unit & ~(begins & little)
    # As long as the loss falls and is not curved upwards, steps become longer.
    last = jnp.sqrt((memory.steps[-1] ** 2).sum())
    refused = memory.growth > 2
    next_one = jnp.where(last > 0, jnp.where(refused, 0.5, 2.0) * last, first)
    probing = jnp.where(has_unit, jnp.maximum(_SHORTEST * first, length), next_one)
    goal = jnp.minimum(jnp.where(at_once, length, probing), longest)
    goal = jnp.where(refused & (last > 0), jnp.minimum(goal, last / 2), goal)
    step = step * (goal / jnp.where(length > 0, length, 1))
    downhill = -(gradient * step).sum()
    foretold = jnp.where(at_once, downhill - _form(matrix, step) / 2, downhill / 2)
    confirmed = ~begins & ~(memory.left > least) & ~(memory.surprise > least)
    return memory._replace(
        trial=memory.best + step,
        foretold=foretold,
        left=left,
        converged=little & (confirmed | jnp.isnan(left)),
    )


def _form(matrix: jax.Array, vector: jax.Array) -> jax.Array:
    return (matrix * vector * vector[:, None]).sum()


def _corrected(matrix: jax.Array, step: jax.Array, change: jax.Array) -> jax.Array:
    """Return a matrix that maps a step to how the gradient changed along it.

    If the loss is hardly curved along the step, or the other way, it maps it to part of that, so
    that the matrix stays positive. After Powell, "A fast algorithm for nonlinearly constrained
    optimization calculations", 1978.
    """
    image = (matrix * step).sum(axis=1)
    expected, seen = (step * image).sum(), (step * change).sum()
    enough = seen >= 0.2 * expected
    share = jnp.where(enough, 1, 0.8 * expected / jnp.where(enough, 1, expected - seen))
    change = share * change + (1 - share) * image
    seen = (step * change).sum()
    usable = (expected > 0) & (seen > 0)
    # The roots divide first: of large or small losses the squares might overflow, or vanish.
    left = image / jnp.sqrt(jnp.where(usable, expected, 1))
    right = change / jnp.sqrt(jnp.where(usable, seen, 1))
    corrected = matrix - left[:, None] * left + right[:, None] * right
    return jnp.where(usable, corrected, matrix)


def solved(matrix: jax.Array, vector: jax.Array) -> jax.Array:
    """Return the solution of a small positive system, by Gauss and Jordan's elimination.

    Written out: on a GPU a call of a library costs more than it computes.

    Parameters
    ----------
    matrix, vector
        ``(P, P)``, symmetric and positive, and ``(P,)``.

    Returns
    -------
    Array
        ``(P,)``.
    """
    size = vector.size
    rows = jnp.concatenate([matrix, vector[:, None]], axis=1)
    for k in range(size):
        row = rows[k] / rows[k, k]
        others = np.arange(size)[:, None] != k
        rows = jnp.where(others, rows - rows[:, k, None] * row, row)
    return rows[:, -1]
