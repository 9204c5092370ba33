"""What in a finished registration tells that it may be wrong.

A doubt is no error: images that hardly overlap, or differ in size by half, exist. What ordinary
registrations of brains do is far within the bounds here.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from jaxreg import interpolate, jacobian_determinant
from jaxreg.registration.across import across
from jaxreg.registration.programs import Program, on_device
from jaxreg.registration.stages.coverage import coverage
from jaxreg.registration.stages.deformable import Deformable
from jaxreg.registration.stages.iterative import Iterative, trend
from regkernels import Volume
from regkernels.grid import Grid, Matrix, inverse_matrix

if TYPE_CHECKING:
    from jaxreg.registration.register import LevelRecord, Registration, StageRecord

__all__ = ["Doubt", "find_doubts"]

_LEAST_OVERLAP = 1 / 3
"""A slab lies within the whole head nearly wholly, and so does one field of view of an organ within
another. With less than this, twice as much of the smaller image was left out as was compared."""

_SCALES = 0.7, 1.4
"""What one scanner images of two adults is far within. A newborn's head and an adult's are not:
somebody who registers them knows why."""

_DETERMINANTS = 1 / 8, 8
"""In space, each length halved or doubled."""

_EXTREME_SHARE = 1e-2
"""Between slices of two brains, which are never quite the same, up to 0.8 % of the pixels are
extreme; between whole brains hardly any; between a CT and an MR image, by a metric for one
contrast, 16 %."""

_FOLDED_SHARE = 1e-3
"""A few voxels at a rim fold in registrations that are good everywhere else."""

_WORSE = 1e-2
"""Losses that rise by less than this, relative to the loss, are as good as they were."""

_UNSEEN = 1e-3
"""Losses that rise by less than this, relative to the metric's scale, are as good as they were."""

_STILL_FALLING = 10.0
"""How many times more than a stage's tolerance a loss still falls where iterations are missing."""

_AS_FAST = 1 / 2
"""Which part of its mean slope the loss of a deformation still has where iterations are missing. At
full resolution losses go on to fall long after they have stopped to tell anything: between two
brains the presets end, by design, at 0.07 to 0.39 of the mean slope. Linear stages have nothing to
gain where they are right, and slow down by themselves."""


class Doubt(NamedTuple):
    """A reason why a registration may be wrong.

    Attributes
    ----------
    code
        What kind of reason: ``"overlap"``, ``"reflection"``, ``"scale"``, ``"determinant"``,
        ``"loss"`` or ``"iterations"``. There is at most one of a kind.
    text
        What was found, what it may mean and what to try: sentences in one line.
    """

    code: str
    text: str


def find_doubts(result: Registration) -> tuple[Doubt, ...]:
    """Return the reasons why a registration may be wrong, none if it looks plausible.

    Parameters
    ----------
    result
        From `register`.

    Returns
    -------
    tuple of Doubt
        Of different kinds, in the order in which `Doubt` lists them.
    """
    found = _found(result)
    return (
        *_overlap_doubts(found),
        *_scale_doubts(result),
        *_determinant_doubts(found, result.mended),
        *_loss_doubts(result),
        *_iteration_doubts(result),
    )


_IMAGE, _FIELD = 2, 1
"""The axis of the planes."""


# --- Overlap and determinants --------------------------------------------------------------------


class _Found(NamedTuple):
    """What the images have in common, and how the deformation changes volumes there."""

    overlap: float
    """Share of that image of which more overlaps, which is the smaller one."""
    folded: float
    extreme: float
    """Shares of the overlapping voxels; what is folded is extreme, too."""
    lowest: float
    highest: float


def _found(result: Registration) -> _Found:
    transform, fixed, moving = result.transform, result.fixed.grid, result.moving.grid
    matrix = np.asarray(transform.matrix, np.float64)
    chain = np.linalg.solve(
        moving.normalised_to_physical(), matrix @ fixed.normalised_to_physical()
    )
    measured = functools.partial(_measured, shape=fixed.shape, source=moving.shape)
    numbers = (
        on_device(chain[None, :-1].astype(np.float32)),
        on_device(np.float32(_voxels(matrix, fixed, moving))),
    )
    masks = _weights(result.fixed_mask), _weights(result.moving_mask)
    found = jax.device_get(
        across(
            transform.devices,
            lambda *volumes: measured(*numbers, *volumes),
            (*masks, transform.displacement),
            (_IMAGE, _IMAGE, _FIELD),
            None,
        )
    )
    return _Found(*map(float, found))


def _weights(mask: Volume | None) -> NDArray[np.float32] | None:
    return None if mask is None else np.asarray(mask.batched(), np.float32)


def _voxels(matrix: Matrix, fixed: Grid, moving: Grid) -> float:
    """Return how many voxels of the moving grid a voxel of the fixed one comes to fill."""
    chain = np.linalg.solve(moving.voxel_to_physical(), matrix @ fixed.voxel_to_physical())
    return float(abs(np.linalg.det(chain[:-1, :-1])))


@functools.partial(Program, static=("shape", "source"))
def _measured(
    affine: jax.Array,
    voxels: jax.Array,
    fixed_mask: jax.Array | None,
    moving_mask: jax.Array | None,
    displacement: jax.Array | None,
    *,
    shape: tuple[int, ...],
    source: tuple[int, ...],
) -> tuple[jax.Array, ...]:
    """Compare the images on the fixed grid, of a shape; return what `_Found` holds.

    What an image weighs lies within the other where that one weighs anything, however little.
    """
    covered = coverage(source, shape, jnp.zeros(len(shape), jnp.float32), affine, displacement)
    fixed = jnp.ones((1, 1, *shape), jnp.float32) if fixed_mask is None else fixed_mask
    moving, counts = covered, covered
    total = jnp.float32(np.prod(source))
    if moving_mask is not None:

        def sample(mask: jax.Array) -> jax.Array:
            return interpolate(
                mask,
                affine,
                displacement,
                affine_last=True,
                out_shape=shape,
                padding_mode="border",
            )

        moving = covered * sample(moving_mask)
        counts = covered * sample((moving_mask > 0).astype(jnp.float32))
        total = moving_mask.sum()
    determinant = jnp.ones((1, 1, *shape), jnp.float32)
    if displacement is not None:
        determinant = jacobian_determinant(displacement)[:, None]
    within = fixed > 0
    both = within & (counts > 0)
    of_fixed = (fixed * counts).sum() / fixed.sum()
    # A voxel of the fixed grid fills as many of the moving one as the transform stretches it to.
    of_moving = (moving * within * jnp.maximum(determinant, 0)).sum() * voxels / total
    low, high = _DETERMINANTS
    extreme = both & ~((determinant >= low) & (determinant <= high))
    voxels_in_common = jnp.maximum(both.sum(), 1)
    inside = jnp.where(both, determinant, 1)
    return (
        jnp.minimum(jnp.maximum(of_fixed, of_moving), 1),
        (both & (determinant <= 0)).sum() / voxels_in_common,
        extreme.sum() / voxels_in_common,
        inside.min(),
        inside.max(),
    )


def _overlap_doubts(found: _Found) -> Iterator[Doubt]:
    if found.overlap < _LEAST_OVERLAP:
        yield Doubt(
            "overlap",
            f"the images overlap by only {_percent(found.overlap)} of the smaller one, masks "
            "included; over so little they may look alike by chance: look at the moved image, and "
            "begin with the stage moments or from an initial transform",
        )


def _determinant_doubts(found: _Found, mended: float) -> Iterator[Doubt]:
    if found.folded > _FOLDED_SHARE:
        what = f"the deformation folds in {_percent(found.folded)} of the voxels"
    elif found.extreme > _EXTREME_SHARE:
        low, high = _DETERMINANTS
        what = (
            f"the deformation changes volumes by less than {low:g} or more than {high:g} times in "
            f"{_percent(found.extreme)} of the voxels"
        )
    elif mended > _FOLDED_SHARE:
        what = f"the deformation had to be smoothed in {_percent(mended)} of its cells"
    else:
        return
    yield Doubt(
        "determinant",
        f"{what} (Jacobian determinant {found.lowest:.3g} to {found.highest:.3g}), which tissue "
        "does not do: align the images better before, choose the metric mi for two contrasts, "
        "smooth more (gradient_sigma, field_sigma; of ffd the spacing), or mask what only one of "
        "the images shows",
    )


# --- The affine ----------------------------------------------------------------------------------


def _scale_doubts(result: Registration) -> Iterator[Doubt]:
    motion: Matrix = np.asarray(result.transform.matrix, np.float64)
    if result.start is not None:
        motion = inverse_matrix(result.start) @ motion
    linear = motion[:-1, :-1]
    if np.linalg.det(linear) < 0:
        yield Doubt(
            "reflection",
            "the affine mirrors the image, which no motion does: start nearer, by the stages "
            "moments and rigid, or leave the stage affine out",
        )
    scales = np.linalg.svd(linear, compute_uv=False)
    low, high = _SCALES
    if scales.min() < low or scales.max() > high:
        yield Doubt(
            "scale",
            f"the affine multiplies lengths by {scales.min():.2f} to {scales.max():.2f}, beyond "
            f"{low:g} to {high:g}; the images may have been squeezed onto each other: look at the "
            "moved image, check the voxel sizes of both files, and use the stage rigid where "
            "sizes are alike, or mask what only one of the images shows",
        )


# --- The course of the losses --------------------------------------------------------------------


def _loss_doubts(result: Registration) -> Iterator[Doubt]:
    for stage, level, began, ended in _comparisons(result.stages):
        rise = ended - began
        if rise <= _WORSE * max(abs(began), abs(ended)):
            continue
        # Of images that were the same from the start the loss is no measure of what it rises by.
        metric = stage.settings.for_scale(level.scale).metric
        images = (jnp.asarray(v.batched(), jnp.float32) for v in (result.fixed, result.moving))
        if rise <= _UNSEEN * float(metric.scale(*images)):
            continue
        yield Doubt(
            "loss",
            f"the loss of the stage {stage.name} at 1/{level.scale:g} resolution ended at "
            f"{ended:.4g}, worse than the {began:.4g} at the start; the images may have been "
            "aligned better before: lower the learning rate, or leave convergence to be tested "
            "(tolerance above 0)",
        )
        return


def _comparisons(
    stages: tuple[StageRecord, ...],
) -> Iterator[tuple[StageRecord, LevelRecord, float, float]]:
    """Return losses at a start and an end that can be compared, the last ones first.

    These are those of the last level, and of all levels with the same images and the same metric:
    the first loss and the last of them.
    """
    ran = [
        (stage, level, float(level.losses[0]), _kept(stage, number))
        for stage in stages
        for number, level in enumerate(stage.levels)
        if level.losses.size
    ]
    if not ran:
        return
    yield ran[-1]
    first: dict[object, float] = {}
    last = {}
    for stage, level, began, ended in ran:
        penalty = getattr(stage.settings, "regularisation", None)
        same = level.scale, stage.settings.for_scale(level.scale).metric, penalty
        first.setdefault(same, began)
        last[same] = stage, level, first[same], ended
    yield from reversed(last.values())


def _kept(stage: StageRecord, number: int) -> float:
    """Return the last loss of a level, without a block that was undone."""
    level, settings = stage.levels[number], stage.settings
    if isinstance(settings, Iterative):
        iterations = settings.iterations[number]
        returns = settings.tests(iterations) and not settings.stops_when_worse
        if level.converged or returns:
            return settings.kept_loss(level.losses, iterations)
    return float(level.losses[-1])


def _iteration_doubts(result: Registration) -> Iterator[Doubt]:
    """Look at the last level of each stage: what a coarser one has not reached the next one may."""
    for stage in reversed(result.stages):
        settings = stage.settings
        ran = [(level, level.losses) for level in stage.levels if level.losses.size]
        if not ran or not isinstance(settings, Iterative):
            continue
        level, losses = ran[-1]
        iterations, window = losses.size, settings.window
        # In less than two windows there is no slowing down to be seen.
        if level.converged or not settings.tests(iterations) or iterations < 2 * window:
            continue
        fall = float(trend(losses[-window:]))
        largest = float(np.abs(losses).max())
        least = _STILL_FALLING * settings.tolerance * largest
        if isinstance(settings, Deformable):
            mean = float(losses[0] - losses[-1]) * window / iterations
            least = max(least, _AS_FAST * mean)
        if fall > least:
            yield Doubt(
                "iterations",
                f"the stage {stage.name} used up its {iterations} iterations at "
                f"1/{level.scale:g} resolution while its loss still fell, by "
                f"{_percent(fall / largest)} in the last {window}; it may have stopped on its "
                "way: give it more iterations there, or a nearer start",
            )
            return


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %"
