"""Bringing a volume to another grid through a chain of transforms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike, NDArray

from jaxreg import interpolate, interpolate_labels
from jaxreg.registration.transforms.parts import affine_between, compose_parts, rotate
from regkernels import Grid, Volume
from regkernels.grid import inverse_matrix
from regkernels.maps import Part

__all__ = ["Interpolation", "resample"]

Interpolation = Literal["linear", "nearest", "labels"]


def resample(
    volume: Volume,
    reference: Volume | Grid,
    parts: Sequence[Part | ArrayLike] = (),
    interpolation: Interpolation = "linear",
) -> Volume:
    """Sample a volume where a chain of transforms sends the voxels of a grid.

    Parameters
    ----------
    volume
        What to sample; zero outside of its grid, with a linear decline over one voxel.
    reference
        Gives the grid of the result.
    parts
        Affine maps (or their matrices) and displacement fields, in the order in which a point of
        the reference goes through them.
    interpolation
        ``"linear"``, with a result in float32; ``"nearest"``; or ``"labels"``, the label with the
        largest sum of linear weights. The latter two keep the dtype, and make up no values.

    Returns
    -------
    Volume
        On the reference's grid.

    Raises
    ------
    ValueError
        If the dimensions differ, a matrix cannot be inverted where it has to be, or labels are
        not integers.
    TypeError
        If a part is neither an affine map, a displacement field nor a matrix.
    """
    grid = reference.grid if isinstance(reference, Volume) else reference
    if grid.ndim != volume.ndim:
        raise ValueError(f"reference: expected {volume.ndim} dimensions as volume, got {grid.ndim}")
    # Between outer edges an axis of one voxel has a length, and leaving it is noticed.
    to_physical = grid.normalised_to_physical(align_corners=False)
    matrix, vectors = compose_parts(parts, grid)
    affine = affine_between(volume.grid, matrix @ to_physical)
    displacement = None if vectors is None else rotate(inverse_matrix(to_physical), vectors)[None]

    where: dict[str, Any] = {
        "affine": jnp.asarray(affine, jnp.float32),
        "grid": displacement,
        "affine_last": True,
        "out_shape": grid.shape,
        "align_corners": False,
    }
    values = np.asarray(volume.array)
    batch = values.reshape(1, volume.channels, *volume.shape)
    if interpolation == "linear":
        sampled = np.asarray(interpolate(jnp.asarray(batch, jnp.float32), **where))
    elif interpolation == "nearest":
        codes, decode = _encode(batch)
        sampled = decode(np.asarray(interpolate(jnp.asarray(codes), mode="nearest", **where)))
    else:
        sampled = _sample_labels(batch, where)
    return Volume.on_grid(grid, sampled.reshape(*values.shape[: -volume.ndim], *grid.shape))


def _sample_labels(labels: NDArray[Any], where: dict[str, Any]) -> NDArray[Any]:
    whole = labels
    if not np.issubdtype(labels.dtype, np.integer):
        whole = labels.astype(np.int64)
        if not np.array_equal(whole, labels):
            raise ValueError("volume: expected labels, which are integers, got other numbers")
    with jax.enable_x64(whole.dtype.itemsize == 8):
        sampled = interpolate_labels(jnp.asarray(whole), **where)
    return np.asarray(sampled).astype(labels.dtype)


def _encode(
    values: NDArray[Any],
) -> tuple[NDArray[np.float32], Callable[[NDArray[np.float32]], NDArray[Any]]]:
    """Write values in float32 without loss, 0 as 0, and give the way back.

    Where float32 does not hold all values of their dtype, they are numbered.
    """
    if np.can_cast(values.dtype, np.float32):
        return values.astype(np.float32), lambda codes: codes.astype(values.dtype)
    different = np.union1d(values, np.zeros(1, values.dtype))
    zero = np.searchsorted(different, 0)
    codes = np.searchsorted(different, values) - zero
    if different.size > 2**24:
        raise ValueError(f"volume: expected at most 2^24 different values, got {different.size}")
    return codes.astype(np.float32), lambda codes: different[codes.astype(np.int64) + zero]
