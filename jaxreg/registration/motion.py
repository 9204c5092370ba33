"""Frames of a series in time brought to one place: the motion of what they show."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from jaxreg import interpolate
from jaxreg.registration.intensities import Clip, check_clip
from jaxreg.registration.programs import Program, compiling, on_device
from jaxreg.registration.register_images import check_stages, register_images
from jaxreg.registration.stages.base import Stage
from jaxreg.registration.stages.linear import Linear, Rigid
from jaxreg.registration.stages.moments import Moments
from jaxreg.registration.stages.problem import Alignment
from jaxreg.registration.transforms.parts import affine_between
from jaxreg.registration.transforms.resampling import outside_values
from regkernels import Grid, Series, Volume

__all__ = ["DEFAULT_STAGES", "HEAD_RADIUS", "Motion", "align_frames"]

HEAD_RADIUS = 50.0
"""Millimetres: so far from the centre a head's surface is taken to be, to tell how far it moves."""

DEFAULT_STAGES = (Rigid((4, 2), (24, 16), optimiser="levenberg-marquardt"),)
"""Of frames that are nearly aligned the correlation is so near to 1 that it tells of a tenth of a
voxel in the fifth digit. At full resolution noise decides: between voxels interpolation smooths it,
which makes a frame more like a mean than where it is in place."""

_VOXELS_AT_ONCE = {"cpu": 2**20, "gpu": 2**25}
"""Frames are aligned in blocks of about so many voxels."""

_FRAMES_AT_ONCE = 64


@dataclasses.dataclass(frozen=True)
class Motion:
    """What `align_frames` finds.

    Attributes
    ----------
    series
        What was aligned.
    matrices
        ``(T, 4, 4)``, physical: where a point of the reference is in each frame.
    losses
        ``(T,)``, the loss of each frame at the end of the last stage.
    reference
        What the frames were aligned to.
    """

    series: Series
    matrices: NDArray[np.float64]
    losses: NDArray[np.float32]
    reference: Volume

    @functools.cached_property
    def aligned(self) -> Series:
        """The frames in the place of the reference, linearly interpolated, float32.

        Beyond what a frame shows is the background of the reference where that is clear, else 0.
        """
        return self.series._replace(frames=self._moved[0])

    @property
    def mean(self) -> Volume:
        """The mean of the aligned frames, at each place of those that show it."""
        return self._moved[1]

    @functools.cached_property
    def _moved(self) -> tuple[NDArray[np.float32], Volume]:
        return _moved(self.series, self.matrices, self.reference)

    @functools.cached_property
    def parameters(self) -> NDArray[np.float64]:
        """``(T, 6)``: how the object lies in each frame beside the reference.

        Three translations of the centre of the grid in millimetres, along x, y and z (LPS), and a
        rotation vector about it, in radians. Of other transforms than rigid ones the rotation is
        the nearest one.
        """
        centre = self.series.grid.centre()
        linear = self.matrices[:, :3, :3]
        left, _, right = np.linalg.svd(linear)
        shifts = linear @ centre + self.matrices[:, :3, 3] - centre
        turns = np.stack([_rotation_vector(turn) for turn in left @ right])
        return np.concatenate([shifts, turns], axis=1)

    def framewise_displacement(self, radius: float = HEAD_RADIUS) -> NDArray[np.float64]:
        """Return how far each frame has moved from the one before, millimetres, ``(T,)``.

        Parameters
        ----------
        radius
            Of the sphere on whose surface rotations are measured, millimetres.

        Returns
        -------
        ndarray
            The sum of the absolute differences of the six parameters, with angles as lengths of
            arcs on the sphere; 0 for the first frame. After Power et al., "Spurious but systematic
            correlations in functional connectivity MRI networks arise from subject motion",
            NeuroImage 2012.
        """
        steps = np.abs(np.diff(self.parameters, axis=0, prepend=self.parameters[:1]))
        return np.asarray(steps[:, :3].sum(axis=1) + radius * steps[:, 3:].sum(axis=1))


def align_frames(
    series: Series,
    stages: Sequence[Stage] | None = None,
    *,
    reference: int | Literal["mean"] = "mean",
    mask: Volume | None = None,
    clip: Clip = "outliers",
    block: int | None = None,
    callback: Callable[[int, int], None] | None = None,
) -> Motion:
    """Align the frames of a series to one of them, or to their mean.

    Many frames are aligned at the same time, as one batch of one compiled program.

    Parameters
    ----------
    series
        Two frames or more.
    stages
        Linear stages, or moments; by default
        ``Rigid((4, 2), (24, 16), optimiser="levenberg-marquardt")``.
    reference
        The number of a frame, counted from 0. ``"mean"``: all are aligned to the one in the middle
        first, and then to the mean of what that gives; the place is that of the one in the middle.
    mask
        Weights of at least 0 of the voxels of the reference in the metric, on the series' grid.
    clip
        Which intensities the metric sees, as for `register`.
    block
        How many frames at the same time; by default about as many as are fast.
    callback
        Called with how many frames are aligned, and how many there are to be, pass by pass.

    Returns
    -------
    Motion
        The transforms, and what follows from them.

    Raises
    ------
    ValueError
        For a single frame, a reference that there is not, stages that deform, a mask of another
        grid, or a frame that is the same everywhere; or if a transform is not finite.
    TypeError
        If there is something else among the stages.
    """
    chosen = check_stages(DEFAULT_STAGES if stages is None else stages)
    for stage in chosen:
        if not isinstance(stage, Linear | Moments):
            raise ValueError(f"stages: expected stages that are linear, got {stage.name}")
    count = len(series.frames)
    if count < 2:
        raise ValueError(f"series: expected two frames or more, got {count}")
    if reference != "mean" and not 0 <= int(reference) < count:
        raise ValueError(
            f"reference: expected mean, or a frame from 0 to {count - 1}, got {reference}"
        )
    if block is not None and block < 1:
        raise ValueError(f"block: expected at least 1, got {block}")
    flat = series.frames.reshape(count, -1)
    constant = np.flatnonzero(flat.min(axis=1) == flat.max(axis=1))
    if constant.size:
        raise ValueError(f"series: frame {constant[0]}: expected different intensities, got one")
    weights = _weights(mask, series.grid)
    passes = _Passes(series, chosen, weights, check_clip(clip), block, callback)
    with compiling() as work:
        work.is_kept(align_frames.__name__, passes.shape, weights is not None, chosen, clip)
        return _in_passes(passes, series, reference)


def _in_passes(passes: _Passes, series: Series, reference: int | Literal["mean"]) -> Motion:
    """Align to the reference, or to the frame in the middle and then to the mean of that."""
    count = len(series.frames)
    if reference != "mean":
        target = series.volume(int(reference))
        matrices, losses = passes.align(target, np.tile(np.eye(4), (count, 1, 1)), 1)
        return Motion(series, matrices, losses, target)
    middle = series.volume(count // 2)
    matrices, _ = passes.align(middle, np.tile(np.eye(4), (count, 1, 1)), 2)
    _, target = _moved(series, matrices, middle)
    matrices, losses = passes.align(target, matrices, 2)
    return Motion(series, matrices, losses, target)


class _Passes:
    """Aligns all frames to a reference, block by block."""

    def __init__(
        self,
        series: Series,
        stages: tuple[Stage, ...],
        mask: NDArray[np.float32] | None,
        clip: Clip,
        block: int | None,
        callback: Callable[[int, int], None] | None,
    ) -> None:
        self._series, self._stages, self._mask, self._clip = series, stages, mask, clip
        self._block = min(block or _block(series), len(series.frames))
        self._callback, self._done = callback, 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the frames that are aligned at the same time."""
        return (self._block, *self._series.grid.shape)

    def align(
        self, reference: Volume, starts: NDArray[np.float64], passes: int
    ) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
        """Return the matrices of all frames, and their losses, of one of so many passes."""
        frames, grid = self._series.frames, self._series.grid
        count, length = len(frames), self._block
        # About the middle of the grid float32 holds coordinates to a fraction of a micrometre.
        centre = np.eye(4)
        centre[:-1, -1] = grid.centre()
        to_physical = np.linalg.solve(centre, grid.normalised_to_physical()).astype(np.float32)
        fixed = on_device(np.asarray(reference.batched()[0]))
        mask = None if self._mask is None else on_device(self._mask)
        shifted = (np.linalg.inv(centre) @ starts @ centre).astype(np.float32)
        found, losses = np.zeros((count, 4, 4)), np.zeros(count, np.float32)
        for first in range(0, count, length):
            # The last block is as long as the others, so that one program serves all.
            which = np.minimum(np.arange(first, first + length), count - 1)
            there = which[: min(length, count - first)]
            matrices, ended = _aligned(
                fixed,
                mask,
                on_device(to_physical),
                on_device(frames[which].astype(np.float32, copy=False)),
                on_device(shifted[which]),
                stages=self._stages,
                clip=self._clip,
            )
            found[there] = np.asarray(matrices, np.float64)[: len(there)]
            losses[there] = np.asarray(ended)[: len(there)]
            self._done += len(there)
            if self._callback is not None:
                self._callback(self._done, passes * count)
        lost = ~np.isfinite(found).all(axis=(1, 2))
        if lost.any():
            raise ValueError(
                f"metric: expected finite gradients, got a transform that is not finite for frame "
                f"{np.flatnonzero(lost)[0]}"
            )
        return centre @ found @ np.linalg.inv(centre), losses


@functools.partial(Program, static=("stages", "clip"))
def _aligned(
    fixed: jax.Array,
    mask: jax.Array | None,
    to_physical: jax.Array,
    frames: jax.Array,
    starts: jax.Array,
    *,
    stages: tuple[Stage, ...],
    clip: Clip,
) -> tuple[jax.Array, jax.Array]:
    """Align frames ``(N, Z, Y, X)`` to a fixed image ``(1, Z, Y, X)``, from matrices."""

    def one(frame: jax.Array, start: jax.Array) -> tuple[jax.Array, jax.Array]:
        found = register_images(
            fixed,
            frame[None],
            stages,
            fixed_mask=mask,
            fixed_to_physical=to_physical,
            moving_to_physical=to_physical,
            initial=Alignment(start),
            clip=clip,
        )
        return found.alignment.matrix, found.traces[-1][-1].losses[-1]

    return jax.vmap(one)(frames, starts)


def _moved(
    series: Series, matrices: NDArray[np.float64], reference: Volume
) -> tuple[NDArray[np.float32], Volume]:
    """Return the frames in the place of a reference, and their mean."""
    grid = series.grid
    # Between outer edges an axis of one voxel has a length, and leaving it is noticed.
    to_physical = grid.normalised_to_physical(align_corners=False)
    affines = np.concatenate([affine_between(grid, m @ to_physical) for m in matrices])
    around = outside_values(reference)[0]
    count = len(matrices)
    moved = np.empty(series.frames.shape, np.float32)
    total, weight = np.zeros((2, *grid.shape))
    length = min(_block(series), count)
    for first in range(0, count, length):
        which = np.minimum(np.arange(first, first + length), count - 1)
        there = min(length, count - first)
        frames = series.frames[which].astype(np.float32)
        shown, covered = (
            np.asarray(x)[:there]
            for x in _sampled(on_device(frames), on_device(np.float32(affines[which])))
        )
        moved[first : first + there] = shown + (1 - covered) * around
        total += shown.sum(axis=0)
        weight += covered.sum(axis=0)
    # A place that hardly any frame shows has what is around the image.
    enough = weight >= 0.5
    mean = np.where(enough, total / np.where(enough, weight, 1), around)
    return moved, Volume.on_grid(grid, mean)


@Program
def _sampled(frames: jax.Array, affines: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return frames ``(N, Z, Y, X)`` elsewhere, 0 where they show nothing, and what they cover."""

    def sampled(images: jax.Array) -> jax.Array:
        found = interpolate(
            images[:, None], affines, out_shape=frames.shape[1:], align_corners=False
        )
        return found[:, 0]

    return sampled(frames), sampled(jnp.ones_like(frames))


def _block(series: Series) -> int:
    platform = next(iter(jnp.zeros(()).devices())).platform
    voxels = _VOXELS_AT_ONCE["cpu" if platform == "cpu" else "gpu"]
    return int(np.clip(voxels // np.prod(series.grid.shape), 1, _FRAMES_AT_ONCE))


def _weights(mask: Volume | None, grid: Grid) -> NDArray[np.float32] | None:
    if mask is None:
        return None
    if mask.shape != grid.shape or not mask.grid.same_place(grid):
        raise ValueError("mask: expected the grid of the series, got another one")
    weights: Any = np.asarray(mask.batched())
    if mask.channels != 1 or weights.min() < 0 or not weights.any():
        raise ValueError("mask: expected one channel of weights of at least 0, not all 0")
    result: NDArray[np.float32] = weights[0, 0]
    return result


def _rotation_vector(turn: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the axis of a rotation times its angle, of its matrix ``(3, 3)``."""
    twice_sine = np.array(
        [turn[2, 1] - turn[1, 2], turn[0, 2] - turn[2, 0], turn[1, 0] - turn[0, 1]]
    )
    length = float(np.linalg.norm(twice_sine))
    angle = float(np.arctan2(length, np.trace(turn) - 1))
    # Motions of what is aligned by its images are far from half a turn, where the axis is lost.
    return twice_sine / 2 if length < 1e-12 else twice_sine * (angle / length)
