"""What a registration tells while it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax

__all__ = ["Callback", "Progress"]


class Progress(NamedTuple):
    """What a stage tells after a block of iterations.

    Attributes
    ----------
    stage
        Name of the stage, as `stage_from_name` takes it.
    scale
        How many times wider a voxel is than at full resolution.
    done, total
        Iterations of the stage, over all its levels. Those that a level saves by stopping early
        count as done.
    losses
        The loss before each iteration of the block, still on the device: reading them waits for
        the block to end, not reading them lets the next one be queued behind it. A level that has
        stopped early repeats its last loss.
    devices
        Over how many devices the planes of the level are spread; 1: one has all of them, and of
        several each has.
    """

    stage: str
    scale: float
    done: int
    total: int
    losses: jax.Array
    devices: int = 1


Callback = Callable[[Progress], None]
