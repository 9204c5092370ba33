"""How the stages run their loops: blocks of iterations on the device, and a word in between."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax

__all__ = ["BLOCK", "Callback", "Loss", "Progress", "blocks", "check_schedule"]

BLOCK = 10
"""Iterations that run on the device without the host being asked."""

Loss = Callable[[jax.Array, jax.Array], jax.Array]
"""``loss(pred, target)``: a scalar, the mean over whatever the images hold."""


class Progress(NamedTuple):
    """What a stage tells after a block of iterations.

    Attributes
    ----------
    stage
        ``"affine"`` or ``"greedy"``.
    scale
        How many times wider a voxel is than at full resolution.
    done, total
        Iterations of the stage, over all its levels.
    losses
        The losses of the block, still on the device: reading them waits for the block to end, not
        reading them lets the next one be queued behind it.
    """

    stage: str
    scale: float
    done: int
    total: int
    losses: jax.Array


Callback = Callable[[Progress], None]


def blocks(iterations: int) -> Iterator[tuple[int, int]]:
    """Split a number of iterations into blocks of at most `BLOCK`: ``(first, count)`` pairs."""
    for first in range(0, iterations, BLOCK):
        yield first, min(BLOCK, iterations - first)


def check_schedule(scales: tuple[float, ...], iterations: tuple[int, ...]) -> None:
    """Check the levels of a stage.

    Raises
    ------
    ValueError
        If there are no levels, if a scale is below 1, if a number of iterations is negative or if
        there is not one for each scale.
    """
    if not scales or any(not scale >= 1 for scale in scales):
        raise ValueError(f"scales: expected numbers of at least 1, got {scales}")
    if len(iterations) != len(scales) or any(count < 0 for count in iterations):
        raise ValueError(f"iterations: expected a count for each of {scales}, got {iterations}")
