"""Registration of two volumes in physical space, stage by stage."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike, NDArray

from jaxreg import compose, jacobian_determinant
from jaxreg.registration.across import across, together
from jaxreg.registration.channels import on_one_grid
from jaxreg.registration.intensities import Clip, check_clip
from jaxreg.registration.plausibility import Doubt, find_doubts
from jaxreg.registration.programs import Program, compiling, on_device
from jaxreg.registration.progress import Callback
from jaxreg.registration.register_images import check_stages
from jaxreg.registration.running import OneDevice, SeveralDevices, check_devices, is_finite
from jaxreg.registration.stages.base import Stage, Trace
from jaxreg.registration.stages.presets import preset
from jaxreg.registration.stages.problem import Alignment
from jaxreg.registration.stages.pyramid import level_shape
from jaxreg.registration.transforms.parts import turned
from jaxreg.registration.transforms.resampling import Outside, outside_values
from jaxreg.registration.transforms.transform import Transform
from jaxreg.warp import INVERSE_TOLERANCE
from regkernels import Volume
from regkernels.grid import Grid, Matrix

__all__ = ["Folds", "InverseResidual", "LevelRecord", "Registration", "StageRecord", "register"]

_FIELD = 1
"""The axis of a field's planes."""

_LARGEST = 1e8
"""Intensities may not be larger: sums of squares over a volume, and what the slopes of NCC divide
by, have to stay within the range of float32."""

_NARROWEST = 1e-7
"""Images that vary by less than this in all are refused, because metrics cannot tell them from
constant ones; images that are constant are not."""


class LevelRecord(NamedTuple):
    """How a level of a stage went.

    Attributes
    ----------
    scale
        How many times wider a voxel is than at full resolution.
    shape
        Shape of the fixed grid of the level, ``([Z,] Y, X)``.
    losses
        The loss before each iteration that ran; of `Moments`, the loss at its start and its end.
    converged
        Whether the level stopped before its iterations were used up.
    devices
        Over how many devices the planes of its images and fields were spread; 1: one had all of
        them, and of several each had, because the level is small.
    """

    scale: float
    shape: tuple[int, ...]
    losses: NDArray[np.float32]
    converged: bool
    devices: int = 1


class StageRecord(NamedTuple):
    """What a stage left behind.

    Attributes
    ----------
    name
        Its name, as `stage_from_name` takes it.
    settings
        The stage as it was asked for.
    levels
        One record for each level, in the order in which they ran.
    seconds
        Wall time, compilation included.
    """

    name: str
    settings: Stage
    levels: tuple[LevelRecord, ...]
    seconds: float


class Folds(NamedTuple):
    """Summary of the Jacobian determinant of a diffeomorphism.

    Attributes
    ----------
    share
        Part of the voxels whose determinant is not positive, from 0 to 1.
    minimum, maximum
        Extremes of the determinant.
    """

    share: float
    minimum: float
    maximum: float


class InverseResidual(NamedTuple):
    """How far points are from where they started after the inverse and the deformation, in voxels.

    Attributes
    ----------
    share
        Part of the voxels for which no inverse was found to the default tolerance of
        `jaxreg.invert_displacement`, 0.01 voxels; from 0 to 1.
    mean, maximum
        Over the voxels of the fixed grid.
    """

    share: float
    mean: float
    maximum: float


@dataclasses.dataclass(frozen=True)
class Registration:
    """What `register` returns: the transform, and what follows from it.

    Attributes
    ----------
    fixed, moving
        The volumes.
    transform
        Takes points of the fixed space to the moving space.
    stages
        One record for each stage that ran, in their order.
    outside
        What is outside of either volume where it is moved; see `outside_values`.
    start
        Matrix that the stages started from, ``(D + 1, D + 1)``, as that of the transform; `None`:
        the identity.
    fixed_mask, moving_mask
        The masks, `None` where there were none.
    mended
        Part of the cells between voxels that a deformation turned inside out, or changed by more
        than its stage's `Deformable.volume_change`, before it was smoothed there; from 0 to 1.
    also
        Pairs of images that were compared, too.
    """

    fixed: Volume
    moving: Volume
    transform: Transform
    stages: tuple[StageRecord, ...]
    outside: Outside = "background"
    start: Matrix | None = None
    fixed_mask: Volume | None = None
    moving_mask: Volume | None = None
    mended: float = 0.0
    also: tuple[tuple[Volume, Volume], ...] = ()

    @functools.cached_property
    def doubts(self) -> tuple[Doubt, ...]:
        """Why the result may be wrong, the gravest reason first; empty if it looks plausible.

        Little overlap, an affine that mirrors or scales much, extreme volume changes, a loss worse
        than at the start, a stage that stopped only because its iterations were used up. It is
        computed when it is first asked for.
        """
        return find_doubts(self)

    @functools.cached_property
    def moved(self) -> Volume:
        """The moving volume on the fixed grid, linearly interpolated."""
        return self.transform.apply(self.moving, outside=self.outside)

    @functools.cached_property
    def fixed_moved(self) -> Volume:
        """The fixed volume on the moving grid, through the inverse."""
        return self.transform.apply_inverse(self.fixed, self.moving, outside=self.outside)

    @functools.cached_property
    def jacobian(self) -> NDArray[np.float32]:
        """Jacobian determinant of the deformation at the fixed voxels, ``([Z,] Y, X)``.

        The affine is left out: where nothing is deformed it is 1.
        """
        if self.transform.displacement is None:
            return np.ones(self.fixed.shape, np.float32)
        determinant = across(
            self.transform.devices, _determinant, (self.transform.displacement,), (1,), 1
        )
        array: NDArray[np.float32] = np.asarray(determinant)[0]
        return array

    @functools.cached_property
    def folds(self) -> Folds:
        """Where the deformation is not invertible, and how much it changes volumes."""
        determinant = self.jacobian
        return Folds(
            float(np.mean(determinant <= 0)), float(determinant.min()), float(determinant.max())
        )

    @functools.cached_property
    def inverse_residual(self) -> InverseResidual:
        """How well the inverse of the deformation undoes it; see `Transform.inverse_residual`."""
        residual = self.transform.inverse_residual()
        # Rounding may lift a voxel that just converged above the tolerance.
        return InverseResidual(
            float(np.mean(residual > 1.01 * INVERSE_TOLERANCE)),
            float(residual.mean()),
            float(residual.max()),
        )


@compiling()
def register(
    fixed: Volume,
    moving: Volume,
    stages: Sequence[Stage] | None = None,
    *,
    also: Sequence[tuple[Volume, Volume]] = (),
    fixed_mask: Volume | None = None,
    moving_mask: Volume | None = None,
    initial: ArrayLike | Transform | None = None,
    clip: Clip = "outliers",
    match_histogram: bool = False,
    outside: Outside = "background",
    callback: Callback | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Registration:
    """Register a moving volume to a fixed one.

    The stages run on JAX's default device. Each level of a stage is one compiled program; shapes
    and settings that were compiled before in this process are not compiled again.

    On several devices each has some planes of all volumes and fields in the stages, of which none
    has all, and the result is that of one device but for rounding. The levels of a stage are one
    program then.

    Parameters
    ----------
    fixed, moving
        Volumes that may differ in size, spacing, origin and direction, of the same dimension and
        with the same channels. Where one of them has no data, nothing is compared.
    stages
        What to run, one after the other; each goes on from where the one before has come to. By
        default the preset ``"default"`` for the device; see `preset`.
    also
        Further images of the same two objects in the same places, a fixed and a moving one each, of
        other contrasts, say. Their channels come after those of `fixed` and `moving`, and are
        compared as well: alike by default, by metrics and with weights of their own with
        `PerChannel`. An image on another grid than the first of its side is resampled onto it, and
        nothing is compared where it has no data.
    fixed_mask, moving_mask
        Weights of at least 0 of the voxels of each volume in the metric, on its grid. That of the
        moving volume is warped with it; where there are both, they are multiplied.
    initial
        Where to start: ``(D + 1, D + 1)``, physical fixed -> physical moving, millimetres, or a
        transform, whose grid may be another one. By default the headers are trusted.
    clip
        Which intensities the metrics see. ``"outliers"``: those further from nearly all others (all
        but one in ten thousand at either end, or eight) than twice the range of these are brought
        to that distance, so that a few hot voxels spoil nothing; few images have any. Two numbers
        from 0 to 1: the quantiles, of each channel, that bound them. `None`: all as they are.
    match_histogram
        Whether the metrics see each channel of the moving volume with the histogram of the fixed
        one's: a monotone function, linear between the minimum, the mean, fifteen quantiles of what
        is above the mean, and the maximum, brings the former to the latter. For one contrast whose
        intensities do not mean the same, and metrics such as `MSE` that take them to. What follows
        from the transform has the volume's own intensities.
    outside
        What is outside of the volumes in `Registration.moved` and `Registration.fixed_moved`: a
        number, one for each channel, or ``"background"``, for each volume its own background where
        that is clear, else 0; see `outside_values`.
    callback
        Called with a `Progress` after each block of iterations; on several devices, for each level
        when the stage has ended.
    devices
        Which volumes in 3-D are spread over, ``jax.devices()`` for all that there are. By default
        there is one.

    Returns
    -------
    Registration
        The transform and what the stages recorded. Its `doubts` tell where it may be wrong.

    Raises
    ------
    ValueError
        If the volumes do not fit together; for intensities that are larger than 1e8, or vary but
        by less than metrics can tell, 1e-7, in all (of a constant image nothing moves); for a mask
        of another grid, with several channels, with a negative weight or without a positive one;
        for a matrix that cannot be inverted; if, after the stages, the moving image
        covers no voxel of the fixed one that counts: then there was nothing to compare; if a
        metric or its gradient is not finite; for a `clip` or `outside` that does not fit; or for
        several devices and images in 2-D.
    RuntimeError
        If the devices belong to several processes of `jax.distributed`, and one of them has ended.
    TypeError
        If there is something else among the stages or the devices, if a volume or a mask is none,
        if `initial` is neither numbers nor a transform, or if `outside` is neither numbers nor
        ``"background"``.
    """
    _check_volumes(fixed=fixed, moving=moving)
    masks = {"fixed_mask": fixed_mask, "moving_mask": moving_mask}
    _check_volumes(**{name: mask for name, mask in masks.items() if mask is not None})
    if fixed.grid.ndim != moving.grid.ndim:
        raise ValueError(
            f"moving: expected {fixed.grid.ndim} dimensions as fixed, got {moving.grid.ndim}"
        )
    if stages is None:
        platform = next(iter(jnp.zeros(()).devices())).platform
        stages = preset(
            "default", ndim=fixed.grid.ndim, device="cpu" if platform == "cpu" else "gpu"
        )
    stages = check_stages(stages)
    devices = check_devices(devices, fixed.grid.ndim)
    also = _checked_pairs(also, fixed.ndim)
    _check_intensities(fixed=fixed, moving=moving)
    for pair in also:
        _check_intensities(**{"also (fixed)": pair[0], "also (moving)": pair[1]})
    if not isinstance(outside, str) or outside != "background":
        outside_values(fixed, outside)
    # About the middle of the fixed grid float32 holds coordinates to a fraction of a micrometre.
    centre = np.eye(fixed.grid.ndim + 1)
    centre[:-1, -1] = fixed.grid.centre()
    operands: dict[str, Any] = {
        "fixed": fixed.batched()[0],
        "moving": moving.batched()[0],
        "fixed_mask": _weights("fixed_mask", fixed_mask, fixed),
        "moving_mask": _weights("moving_mask", moving_mask, moving),
        "fixed_to_physical": np.linalg.solve(centre, fixed.grid.normalised_to_physical()),
        "moving_to_physical": np.linalg.solve(centre, moving.grid.normalised_to_physical()),
        "moving_ratio": _moving_ratio(fixed.grid, moving.grid),
        "clip": check_clip(clip),
        "match_histogram": bool(match_histogram),
    }
    if also:
        for side, first in enumerate((fixed, moving)):
            name = ("fixed", "moving")[side]
            others = [pair[side] for pair in also]
            operands[name], covered = on_one_grid(f"also ({name})", first, others)
            if covered is not None:
                mask = operands[f"{name}_mask"]
                operands[f"{name}_mask"] = covered if mask is None else mask * covered
    work: OneDevice | SeveralDevices = (
        OneDevice(**operands) if devices is None else SeveralDevices(devices, **operands)
    )
    matrix, *fields = _initial(initial, fixed.grid, devices)
    start = _float32(np.linalg.solve(centre, matrix @ centre))
    alignment = work.begin(Alignment(start, *fields), stages, watched=callback is not None)
    records = []
    for stage in stages:
        began = time.perf_counter()
        alignment, traces = work.run(stage, alignment, callback)
        with together():
            finite = is_finite(alignment).block_until_ready()
        seconds = time.perf_counter() - began
        # A loss that is finite at first and not later comes from places that are not. It may also
        # stay finite there: a sample whose place is not finite is 0, and a penalty may be none.
        lost = any(
            np.isfinite(losses[:1]).all() and not np.isfinite(losses).all()
            for losses in (np.asarray(trace.losses) for trace in traces)
        )
        if lost or (not finite and all(np.isfinite(trace.losses).all() for trace in traces)):
            raise ValueError(
                "metric: expected finite gradients, got a transform that is not finite from the "
                f"stage {stage.name}; choose a metric whose gradient is finite even where the "
                "images are equal or constant: that of a square root at 0 is not"
            )
        records.append(StageRecord(stage.name, stage, _levels(stage, fixed, traces, work), seconds))
    # Overlap is asked for after the stages only, because they may bring images together that have
    # nothing in common at the start.
    if stages and not work.overlap(alignment) > 0:
        masked = fixed_mask is not None or moving_mask is not None
        raise ValueError(
            f"{'moving' if initial is None else 'initial'}: expected volumes that overlap, but "
            f"after the stages ({', '.join(stage.name for stage in stages)}) the moving volume "
            f"covers no voxel of the fixed one{' that the masks leave in' if masked else ''}; "
            "moments as the first stage brings their centres together"
        )
    # Without a stage that turns or shifts, the matrix keeps all of its digits.
    found = matrix
    if not np.array_equal(alignment.matrix, start):
        found = centre @ np.asarray(alignment.matrix, np.float64) @ np.linalg.inv(centre)
    alignment = work.end(alignment)
    shared = None if devices is None else tuple(devices)
    transform = Transform(
        fixed.grid, found, alignment.displacement, alignment.inverse_displacement, devices=shared
    )
    mended = 0.0 if alignment.mended is None else float(alignment.mended)
    return Registration(
        fixed,
        moving,
        transform,
        tuple(records),
        outside,
        matrix,
        fixed_mask,
        moving_mask,
        mended,
        also,
    )


def _check_volumes(**volumes: object) -> None:
    for name, volume in volumes.items():
        if not isinstance(volume, Volume):
            raise TypeError(
                f"{name}: expected a Volume, as of read_volume or Volume.create, got "
                f"{type(volume).__name__}"
            )


def _checked_pairs(also: Any, ndim: int) -> tuple[tuple[Volume, Volume], ...]:
    """Return pairs of images that are compared, too; refuse what is none."""
    pairs = tuple(tuple(pair) for pair in also)
    for pair in pairs:
        if len(pair) != 2 or not all(isinstance(volume, Volume) for volume in pair):
            raise TypeError("also: expected pairs of a fixed and a moving Volume")
        fixed, moving = pair
        for volume in pair:
            if volume.ndim != ndim:
                raise ValueError(f"also: expected {ndim} dimensions as fixed, got {volume.ndim}")
        if fixed.channels != moving.channels:
            raise ValueError(
                f"also: expected as many channels in both of a pair, got {fixed.channels} and "
                f"{moving.channels}"
            )
    return pairs


def _check_intensities(**volumes: Volume) -> None:
    """Refuse images to which metrics are flat only for their unit: nothing would move."""
    arrays = {name: volume.array for name, volume in volumes.items()}
    # Both images are asked before one is waited for, so that the device is never idle.
    ranges = {name: (np.min(array), np.max(array)) for name, array in arrays.items()}
    for name, extremes in jax.device_get(ranges).items():
        low, high = map(float, extremes)
        if not max(-low, high) <= _LARGEST:
            raise ValueError(
                f"{name}: expected intensities within ±{_LARGEST:g}, got {low:g} to {high:g}; "
                "multiply them by a smaller number"
            )
        if 0 < high - low < _NARROWEST:
            raise ValueError(
                f"{name}: expected intensities that differ by {_NARROWEST:g} or more, got {low:g} "
                f"to {high:g}; multiply them by a larger number"
            )


@Program
def _determinant(displacement: jax.Array) -> jax.Array:
    return jacobian_determinant(displacement)


def _levels(
    stage: Stage, fixed: Volume, traces: tuple[Trace, ...], work: OneDevice | SeveralDevices
) -> tuple[LevelRecord, ...]:
    levels = tuple(
        LevelRecord(
            scale,
            level_shape(fixed.shape, scale),
            np.asarray(trace.losses)[: int(trace.ran)],
            bool(trace.converged),
            work.sharing(level_shape(fixed.shape, scale)),
        )
        for scale, trace in zip(stage.scales, traces, strict=True)
    )
    for level in levels:
        if not np.isfinite(level.losses).all():
            wrong = level.losses[~np.isfinite(level.losses)][0]
            raise ValueError(
                f"metric: expected finite losses, got {wrong} in the stage {stage.name} at scale "
                f"{level.scale:g}"
            )
    return levels


def _weights(name: str, mask: Volume | None, image: Volume) -> NDArray[np.float32] | None:
    if mask is None:
        return None
    grid, own = image.grid, mask.grid
    if own.shape != grid.shape:
        raise ValueError(f"{name}: expected shape {grid.shape} as the image, got {own.shape}")
    if not own.same_place(grid):
        raise ValueError(
            f"{name}: expected the image's spacing, origin and direction, got voxels that "
            f"lie up to {own.voxels_apart(grid):.3g} voxels from the image's"
        )
    if mask.channels != 1:
        raise ValueError(f"{name}: expected 1 channel, got {mask.channels}")
    weights: NDArray[np.float32] = np.asarray(mask.batched())[0, 0]
    if not weights.min() >= 0:
        raise ValueError(f"{name}: expected weights of at least 0, got {weights.min()}")
    if not weights.max() > 0:
        raise ValueError(f"{name}: expected a voxel above 0, got none")
    return weights


def _moving_ratio(fixed: Grid, moving: Grid) -> float:
    """Return the ratio of the voxel sizes in steps of a quarter of an octave.

    So headers that differ by a little have levels of the same shapes, and share their programs.
    """

    def size(grid: Grid) -> float:
        return float(np.mean(np.log2(np.asarray(grid.spacing, np.float64))))

    return float(2 ** (round(4 * (size(fixed) - size(moving))) / 4))


def _initial(
    initial: ArrayLike | Transform | None, grid: Grid, devices: Sequence[jax.Device] | None
) -> tuple[Matrix, Any, Any]:
    """Return the matrix to start from, and the fields on a grid, of which several share the planes.

    A field that several devices share is on none of them as a whole.
    """
    if initial is None:
        return np.eye(grid.ndim + 1), None, None
    if not isinstance(initial, Transform):
        return _checked(initial, grid.ndim), None, None
    if initial.grid.ndim != grid.ndim:
        raise ValueError(f"initial: expected {grid.ndim} dimensions, got {initial.grid.ndim}")
    forward, inverse = (
        None if field is None else _field_on(field, initial.grid, grid, devices)
        for field in (initial.displacement, initial.inverse_displacement)
    )
    return _checked(initial.matrix, grid.ndim), forward, inverse


def _checked(matrix: ArrayLike, ndim: int) -> Matrix:
    try:
        array = np.asarray(matrix, dtype=np.float64)
    except (TypeError, ValueError):
        raise TypeError(
            f"initial: expected numbers {(ndim + 1, ndim + 1)} or a Transform, got "
            f"{type(matrix).__name__}"
        ) from None
    if array.shape != (ndim + 1, ndim + 1) or not np.isfinite(array).all():
        raise ValueError(
            f"initial: expected {(ndim + 1, ndim + 1)} finite numbers, got shape {array.shape}"
        )
    if np.linalg.det(array[:-1, :-1]) == 0:
        raise ValueError("initial: expected a matrix that can be inverted, got a singular one")
    return array


def _field_on(
    field: ArrayLike, source: Grid, target: Grid, devices: Sequence[jax.Device] | None
) -> ArrayLike:
    """Sample a displacement on another grid; beyond its own it keeps the value at the border."""
    if devices is None:
        field = jnp.asarray(field, jnp.float32)
    if target.same_place(source, 1e-3):
        return field
    chain = np.linalg.solve(source.normalised_to_physical(), target.normalised_to_physical())
    there = chain[None, :-1].astype(np.float32)
    back = np.linalg.inv(chain[:-1, :-1]).astype(np.float32)

    def sampled(field: jax.Array) -> jax.Array:
        still = jnp.zeros((1, *target.shape, target.ndim), jnp.float32)
        vectors = compose(field, still, jnp.asarray(there), add=False)
        return turned(back, vectors)

    found: jax.Array = across(devices, sampled, (field,), (_FIELD,), _FIELD)
    return found


def _float32(array: NDArray[Any]) -> jax.Array:
    return on_device(array.astype(np.float32))
