"""Several images of one object, as the channels of one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from jaxreg.registration.transforms.resampling import resample
from regkernels import Grid, Volume

__all__ = ["is_resampled", "on_one_grid"]

_INSIDE = 1 - 1e-3
"""What a sample of ones is at least where all that it was read from lies in the image."""


def is_resampled(volume: Volume, grid: Grid) -> bool:
    """Tell whether the voxels of a volume have to be made up to lie on a grid."""
    return volume.shape != grid.shape or not volume.grid.same_place(grid)


def on_one_grid(
    name: str, first: Volume, others: Sequence[Volume]
) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
    """Return the channels of images, on the grid of the first.

    Parameters
    ----------
    name
        That of the argument which holds the others.
    first, others
        Images with as many dimensions.

    Returns
    -------
    channels
        ``(C, [Z,] Y, X)``, of all of them in their order.
    covered
        ``([Z,] Y, X)``, 1 where all of them have data, else 0; `None` if they have it everywhere.

    Raises
    ------
    ValueError
        If one of them has no data in the first one's grid.
    """
    channels = [np.asarray(first.batched()[0])]
    covered = np.ones(first.shape, np.bool_)
    for volume in others:
        if not is_resampled(volume, first.grid):
            channels.append(np.asarray(volume.batched()[0]))
            continue
        ones = Volume.on_grid(volume.grid, np.ones(volume.shape, np.float32))
        covered &= np.asarray(resample(ones, first.grid, outside=0).array) >= _INSIDE
        channels.append(np.asarray(resample(volume, first.grid).batched()[0]))
    if not covered.any():
        raise ValueError(f"{name}: expected images in the place of the first, got none there")
    stacked = np.concatenate(channels).astype(np.float32, copy=False)
    return stacked, None if covered.all() else covered.astype(np.float32)
