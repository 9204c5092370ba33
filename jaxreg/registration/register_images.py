"""Registration of arrays: what `register` does, without volumes, and under any transformation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from numpy.typing import NDArray

from jaxreg.registration.intensities import Clip, check_clip
from jaxreg.registration.programs import on_device
from jaxreg.registration.stages.base import Stage, Trace
from jaxreg.registration.stages.problem import Alignment, Problem
from regkernels.grid import normalised_to_voxel

__all__ = ["ArrayRegistration", "check_stages", "make_problem", "register_images"]


class ArrayRegistration(NamedTuple):
    """What `register_images` finds; a JAX pytree.

    Attributes
    ----------
    alignment
        The transform. Without a deformable stage its displacements are `None`.
    traces
        For each stage, for each of its levels, how the loss went.
    """

    alignment: Alignment
    traces: tuple[tuple[Trace, ...], ...]


def register_images(
    fixed: ArrayLike,
    moving: ArrayLike,
    stages: Sequence[Stage],
    *,
    fixed_mask: ArrayLike | None = None,
    moving_mask: ArrayLike | None = None,
    fixed_to_physical: ArrayLike | None = None,
    moving_to_physical: ArrayLike | None = None,
    initial: Alignment | None = None,
    moving_ratio: float = 1.0,
    clip: Clip = "outliers",
    match_histogram: bool = False,
) -> ArrayRegistration:
    """Register one array to another; for ``jax.jit``, and for ``jax.vmap`` over pairs.

    Parameters
    ----------
    fixed, moving
        ``(C, [Z,] Y, X)``; their spatial shapes may differ.
    stages
        What to run, one after the other; each goes on from where the one before has come to.
    fixed_mask, moving_mask
        ``([Z,] Y, X)``, weights of at least 0 of the voxels of each image in the metric. That of
        the moving image is warped with it; where there are both, they are multiplied.
    fixed_to_physical, moving_to_physical
        ``(D + 1, D + 1)``, from normalised to physical coordinates; by default voxels are 1 wide
        and both grids have their middle at 0. Physical coordinates are float32 here, so they should
        be about a point near the images.
    initial
        Where to start; the identity by default.
    moving_ratio
        How many times wider the voxels of the fixed grid are than those of the moving one. The
        moving image is made coarser by as much more, or less, than the fixed one.
    clip
        Which intensities the metrics see; see `register`.
    match_histogram
        Whether they see the moving image with the histogram of the fixed one; see `register`.

    Returns
    -------
    ArrayRegistration
        The transform, and how the losses went.

    Raises
    ------
    ValueError
        If the arrays do not fit together, or for a `clip` that does not say what is clipped.
    TypeError
        If there is something else among the stages.

    Notes
    -----
    Unlike `register` it cannot look at what it has found: where the images do not overlap, or a
    metric is not finite, there is no error, and there are no doubts about results that are not
    plausible.
    """
    stages = check_stages(stages)
    problem = make_problem(
        fixed,
        moving,
        fixed_mask=fixed_mask,
        moving_mask=moving_mask,
        fixed_to_physical=fixed_to_physical,
        moving_to_physical=moving_to_physical,
        moving_ratio=moving_ratio,
        clip=clip,
        match_histogram=match_histogram,
    )
    alignment = problem.start()
    if initial is not None:
        alignment = jax.tree.map(lambda array: jnp.asarray(array, jnp.float32), initial)
    traces = []
    for stage in stages:
        alignment, trace = stage.run(problem, alignment)
        traces.append(trace)
    return ArrayRegistration(alignment, tuple(traces))


def check_stages(stages: Iterable[Stage]) -> tuple[Stage, ...]:
    """Return the stages; refuse what is none."""
    if not isinstance(stages, Stage | str):
        found = tuple(stages)
        if all(isinstance(stage, Stage) for stage in found):
            return found
    raise TypeError(f"stages: expected a sequence of stages, as of stage_from_name, got {stages!r}")


def make_problem(
    fixed: ArrayLike,
    moving: ArrayLike,
    *,
    fixed_mask: ArrayLike | None,
    moving_mask: ArrayLike | None,
    fixed_to_physical: ArrayLike | None,
    moving_to_physical: ArrayLike | None,
    moving_ratio: float,
    clip: Clip,
    match_histogram: bool = False,
) -> Problem:
    """Check the operands of `register_images` and put them together."""
    clip = check_clip(clip)
    target, source = _image("fixed", fixed), _image("moving", moving)
    if source.ndim != target.ndim:
        raise ValueError(
            f"moving: expected {target.ndim - 2} dimensions as fixed, got {source.ndim - 2}"
        )
    if source.shape[1] != target.shape[1]:
        raise ValueError(
            f"moving: expected {target.shape[1]} channels as fixed, got {source.shape[1]}"
        )
    return Problem(
        target,
        source,
        _mask("fixed_mask", fixed_mask, target),
        _mask("moving_mask", moving_mask, source),
        _geometry("fixed_to_physical", fixed_to_physical, target),
        _geometry("moving_to_physical", moving_to_physical, source),
        moving_ratio,
        clip,
        match_histogram,
    )


def _image(name: str, image: ArrayLike) -> jax.Array:
    array = _float32(image)
    if array.ndim not in (3, 4) or array.size == 0:
        raise ValueError(f"{name}: expected an array (C, [Z,] Y, X), got shape {array.shape}")
    return on_device(array[None])


def _float32(array: ArrayLike) -> jax.Array | NDArray[np.float32]:
    """Convert an array where it is: on the host, what follows is no program of a device."""
    return (
        jnp.asarray(array, jnp.float32)
        if isinstance(array, jax.Array)
        else np.asarray(array, np.float32)
    )


def _mask(name: str, mask: ArrayLike | None, image: jax.Array) -> jax.Array | None:
    if mask is None:
        return None
    array = on_device(_float32(mask))
    if array.shape != image.shape[2:]:
        raise ValueError(f"{name}: expected shape {image.shape[2:]}, got {array.shape}")
    return array[None, None]


def _geometry(name: str, matrix: ArrayLike | None, image: jax.Array) -> jax.Array:
    ndim = image.ndim - 2
    if matrix is None:
        to_voxel = normalised_to_voxel(image.shape[2:])
        to_voxel[:-1, -1] = 0
        matrix = np.asarray(to_voxel)
    array = on_device(_float32(matrix))
    if array.shape != (ndim + 1, ndim + 1):
        raise ValueError(f"{name}: expected shape {(ndim + 1, ndim + 1)}, got {array.shape}")
    return array
