"""Flows as MONAI and VoxelMorph have them: ``(N, D, *S)`` in voxels, components z, y, x."""

from __future__ import annotations

from typing import Any

import torch

from torchreg.warp import PaddingMode, convert_displacement, scaling_and_squaring

FLOW_GRID: dict[str, Any] = {
    "grid_unit": "voxel",
    "grid_channels": "first",
    "grid_components": "zyx",
}
"""What `interpolate` has to be told of such a grid."""


def integrate(velocity: torch.Tensor, num_steps: int, padding_mode: PaddingMode) -> torch.Tensor:
    """Return `scaling_and_squaring` of a velocity in voxels.

    Parameters
    ----------
    velocity : float[N, D, *S]
        Voxels per unit time.
    num_steps, padding_mode
        As for `scaling_and_squaring`.

    Returns
    -------
    float[N, D, *S]
        The displacement in voxels.
    """
    normalised = convert_displacement(
        velocity, "voxel", "normalised", source_channels="first", source_components="zyx"
    )
    displacement = scaling_and_squaring(normalised, num_steps, padding_mode=padding_mode)
    return convert_displacement(
        displacement, "normalised", "voxel", target_channels="first", target_components="zyx"
    )
