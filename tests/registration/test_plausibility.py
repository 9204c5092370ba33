"""Doubts: raised where a registration is probably wrong, and nowhere else."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from scenes import header, physical_grid, placed, scene

from jaxreg import convert_displacement
from jaxreg.registration import (
    Affine,
    Greedy,
    LevelRecord,
    Moments,
    Registration,
    Rigid,
    Stage,
    StageRecord,
    SyN,
    Transform,
    Translation,
    register,
)
from regkernels import Volume, rigid_motion


def picture(shape: tuple[int, ...] = (36, 40), shift: float = 0.0) -> Volume:
    """The scene, in pixels of 2.5 mm."""
    grid = header(shape, (2.5,) * len(shape))
    return grid.with_array(scene(physical_grid(grid) + shift))


def found(
    matrix: Any = None,
    displacement: Any = None,
    *,
    fixed: Volume | None = None,
    moving: Volume | None = None,
    stages: tuple[StageRecord, ...] = (),
    **more: Any,
) -> Registration:
    """A registration that came out so, of the scene with itself if nothing else is said."""
    fixed = picture() if fixed is None else fixed
    matrix = np.eye(fixed.ndim + 1) if matrix is None else matrix
    transform = Transform(fixed.grid, matrix, displacement)
    return Registration(fixed, fixed if moving is None else moving, transform, stages, **more)


def ran(stage: Stage, *losses: Any, converged: bool = False) -> tuple[StageRecord, ...]:
    """A record of a stage, its losses by level."""
    levels = tuple(
        LevelRecord(scale, (4, 4), np.asarray(level, np.float32), converged)
        for scale, level in zip(stage.scales, losses, strict=True)
    )
    return (StageRecord(stage.name, stage, levels, 0.0),)


def codes(result: Registration) -> list[str]:
    return [doubt.code for doubt in result.doubts]


def shifted(*millimetres: float) -> np.ndarray:
    matrix = np.eye(len(millimetres) + 1)
    matrix[:-1, -1] = millimetres
    return matrix


def scaled(*factors: float) -> np.ndarray:
    return np.diag([*factors, 1.0])


def test_a_good_registration_raises_no_doubt() -> None:
    stages = [Moments(), Affine((2, 1), (40, 40)), SyN((2, 1), (60, 60))]
    result = register(picture(), picture((38, 34), 6.0), stages)
    assert result.doubts == ()


@pytest.mark.parametrize("metric", ["mse", "ncc"])
def test_an_image_registered_to_itself_raises_no_doubt(metric: Any) -> None:
    fixed = picture()
    stages = [kind((1,), (20,), metric=metric, tolerance=0) for kind in (Rigid, Greedy)]
    assert register(fixed, fixed, stages).doubts == ()


# --- overlap ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "doubted"), [(0.5, False), (0.2, True)])
def test_little_overlap_is_doubted(share: float, doubted: bool) -> None:
    result = found(shifted((1 - share) * 40 * 2.5, 0))
    assert codes(result) == ["overlap"] * doubted
    if doubted:
        assert f" {100 * share:.2g} % " in result.doubts[0].text


@pytest.mark.parametrize("which", ["fixed", "moving"])
def test_a_slab_within_a_whole_image_is_not_doubted(which: str) -> None:
    whole = header((24, 20, 22), (5.0, 5.0, 5.0))
    slab = header((3, 20, 22), (5.0, 5.0, 5.0))
    fixed, moving = (slab, whole) if which == "fixed" else (whole, slab)
    assert codes(found(fixed=fixed, moving=moving)) == []
    assert codes(found(shifted(0, 0, 75), fixed=fixed, moving=moving)) == ["overlap"]


@pytest.mark.parametrize("which", ["fixed", "moving"])
def test_a_single_slice_within_a_volume_is_not_doubted(which: str) -> None:
    whole, slice_ = header((24, 20, 22), (5.0, 5.0, 5.0)), header((1, 20, 22), (5.0, 5.0, 5.0))
    fixed, moving = (slice_, whole) if which == "fixed" else (whole, slice_)
    assert codes(found(fixed=fixed, moving=moving)) == []


def test_a_coarse_image_overlaps_a_fine_one_as_it_does_the_other_way_round() -> None:
    coarse, fine = header((9, 10), (10.0, 10.0)), header((90, 20), (5.0, 1.0))
    for fixed, moving in ((coarse, fine), (fine, coarse)):
        assert codes(found(shifted(50, 0), fixed=fixed, moving=moving)) == []
        assert codes(found(shifted(80, 0), fixed=fixed, moving=moving)) == ["overlap"]


@pytest.mark.parametrize("weight", [1.0, 0.02, 200.0])
def test_the_overlap_is_that_of_the_masks_whatever_they_weigh(weight: float) -> None:
    image = picture()
    left, right, some = np.zeros((3, 36, 40))
    left[:, :20], right[:, 16:], some[:, 16:20] = weight, 1, 1
    mask = image.with_array

    def of(fixed: np.ndarray | None, moving: np.ndarray | None) -> list[str]:
        masks = (None if array is None else mask(array) for array in (fixed, moving))
        return codes(found(**dict(zip(("fixed_mask", "moving_mask"), masks, strict=True))))

    assert of(left, right) == of(right, left) == ["overlap"]
    assert of(left, some) == of(some, right) == []  # one lies within the other
    assert of(left, None) == of(None, left) == []


# --- the affine ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("factors", "doubted"),
    [((0.75, 1.35), False), ((1.0, 0.65), True), ((1.45, 1.0), True), ((0.5, 0.5), True)],
)
def test_scales_beyond_those_of_heads_are_doubted(
    factors: tuple[float, float], doubted: bool
) -> None:
    turn = rigid_motion(35, (0, 0, 1), (0, 0, 0), (0, 0, 0))[np.ix_([0, 1, 3], [0, 1, 3])]
    result = found(turn @ scaled(*factors))
    assert codes(result) == ["scale"] * doubted
    if doubted:
        assert f"{min(factors):.2f} to {max(factors):.2f}" in result.doubts[0].text


def test_scales_are_those_against_the_start() -> None:
    assert codes(found(scaled(0.5, 0.5), start=scaled(0.55, 0.55))) == []
    assert codes(found(np.eye(3), start=scaled(0.5, 0.5))) == ["scale"]
    image = picture()
    half = placed(image, spacing=image.grid.spacing / 2, origin=image.grid.origin / 2)
    started = register(image, half, [Rigid((1,), (10,))], initial=scaled(0.5, 0.5))
    assert started.doubts == ()


def test_a_mirrored_image_is_doubted() -> None:
    assert codes(found(scaled(-1, 1))) == ["reflection"]
    assert codes(found(scaled(-1, 1), start=scaled(-1, 1))) == []
    assert codes(found(scaled(-1, -1))) == []  # a turn by 180 degrees


# --- the deformation ----------------------------------------------------------------------------


def waves(amplitude: float, rows: int = 36) -> Any:
    """A displacement along x, in voxels, of some rows; it folds above an amplitude of 2."""
    vectors = np.zeros((1, 36, 40, 2), np.float32)
    vectors[:, :rows, :, 0] = amplitude * np.sin(np.arange(40) / 2)
    return convert_displacement(jnp.asarray(vectors), "voxel", "normalised")


@pytest.mark.parametrize(
    ("amplitude", "told"),
    [(1.0, None), (1.9, "changes volumes by less than 0.125 "), (3.0, "folds in ")],
)
def test_folds_and_extreme_determinants_are_doubted(amplitude: float, told: str | None) -> None:
    result = found(displacement=waves(amplitude))
    assert codes(result) == ["determinant"] * (told is not None)
    if told is not None:
        low, high = result.folds.minimum, result.folds.maximum
        assert f"the deformation {told}" in result.doubts[0].text
        assert f"{low:.3g} to {high:.3g}" in result.doubts[0].text


def test_a_few_extreme_determinants_are_not_doubted() -> None:
    field = np.zeros((1, 36, 40, 2), np.float32)
    field[0, 20, 20, 0] = 1.7  # half of it is what the pixels beside it lose in width
    result = found(displacement=convert_displacement(jnp.asarray(field), "voxel", "normalised"))
    assert result.folds.share == 0
    assert 0.1 < result.folds.minimum < 0.2
    assert codes(result) == []
    field[0, 20, 20, 0] = 1.8
    result = found(displacement=convert_displacement(jnp.asarray(field), "voxel", "normalised"))
    assert result.folds.minimum < 1 / 8
    assert codes(result) == []


def test_what_a_deformation_does_where_nothing_counts_is_not_doubted() -> None:
    weights = np.ones((36, 40))
    weights[:8] = 0
    mask = picture().with_array(weights)
    assert codes(found(displacement=waves(3, rows=6))) == ["determinant"]
    assert codes(found(displacement=waves(3, rows=6), fixed_mask=mask)) == []
    assert codes(found(displacement=waves(3, rows=6), moving_mask=mask)) == []


# --- losses -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("losses", "doubted"),
    [
        ([-0.8, -0.9, -0.7], True),
        ([-0.8, -0.9, -0.796], False),  # a rise by half a percent
        ([-0.8, -0.7, -0.85], False),
        ([0.2, 0.3], True),
    ],
)
def test_a_loss_worse_than_at_the_start_is_doubted(losses: list[float], doubted: bool) -> None:
    result = found(stages=ran(Greedy((1,), (3,)), losses))
    assert codes(result) == ["loss"] * doubted
    if doubted:
        assert f"at {losses[-1]:.4g}, worse than the {losses[0]:.4g}" in result.doubts[0].text


def test_the_losses_of_stages_with_one_metric_are_compared_at_one_scale() -> None:
    good = ran(Rigid((4, 2), (2, 2)), [-0.8, -0.9], [-0.85, -0.9])
    worse = ran(Affine((4,), (2,)), [-0.6, -0.7])
    assert codes(found(stages=good + worse)) == ["loss"]
    for other in (
        ran(Affine((8,), (2,)), [-0.6, -0.7]),
        ran(Affine((4,), (2,), metric="lncc"), [-0.6, -0.7]),
        ran(Affine((4,), (2,)), [-0.6, -0.82]),
    ):
        assert codes(found(stages=good + other)) == []


def test_a_block_of_iterations_that_was_undone_is_not_doubted() -> None:
    losses = [*np.linspace(-0.8, -0.9, 10), *np.linspace(-0.9, -0.5, 10)]
    stage = Greedy((1,), (40,))
    assert codes(found(stages=ran(stage, losses, converged=True))) == []
    assert codes(found(stages=ran(stage, losses, converged=False))) == ["loss"]


def test_steps_that_are_too_long_are_doubted_where_nothing_undoes_them() -> None:
    image = picture()
    stage = Translation((1,), (20,), learning_rate=10.0, tolerance=0)
    assert "loss" in codes(register(image, image, [stage]))
    undone = register(image, image, [dataclasses.replace(stage, tolerance=1e-4)])
    assert "loss" not in codes(undone)


# --- iterations ---------------------------------------------------------------------------------


def test_a_level_that_only_stopped_because_its_iterations_were_used_up_is_doubted() -> None:
    fixed, moving = picture(), picture(shift=20)
    few = register(fixed, moving, [Translation((1,), (20,), learning_rate=0.2)])
    (doubt,) = few.doubts
    assert doubt.code == "iterations"
    assert "translation used up its 20 iterations at 1/1 resolution" in doubt.text
    assert codes(register(fixed, moving, [Translation((1,), (200,))])) == []


@pytest.mark.parametrize(
    ("stage", "steepness", "doubted"),
    [
        (Greedy((1,), (40,)), 1.0, True),
        (Greedy((1,), (40,), tolerance=0), 1.0, False),  # so many were asked for
        (Greedy((1,), (40,), tolerance=0.1), 1.0, False),
        (Greedy((1,), (40,), window=30, block=40), 1.0, False),
        (Greedy((1,), (40,)), 4.0, False),  # it has slowed down
        (Rigid((1,), (40,)), 4.0, True),  # as a linear stage does by itself
        (Rigid((1,), (40,)), 400.0, False),
    ],
)
def test_iterations_are_missed_where_the_loss_still_falls(
    stage: Stage, steepness: float, doubted: bool
) -> None:
    losses = -0.5 - 0.4 * np.linspace(0, 1, 40) ** (1 / steepness)
    assert codes(found(stages=ran(stage, losses))) == ["iterations"] * doubted
    assert codes(found(stages=ran(stage, losses, converged=True))) == []


def test_what_a_coarse_level_has_not_reached_a_finer_one_may() -> None:
    falling, level = np.linspace(-0.5, -0.9, 40), np.full(40, -0.9)
    stage = Rigid((2, 1), (40, 40))
    assert codes(found(stages=ran(stage, falling, level))) == []
    assert codes(found(stages=ran(stage, level, falling))) == ["iterations"]


def test_every_kind_of_doubt_is_one_line_and_they_have_an_order() -> None:
    stages = ran(Affine((1,), (3,)), [-0.9, -0.8, -0.7])
    matrix = shifted(105, 0) @ scaled(-1.5, 1)
    result = found(matrix, waves(-3), stages=stages)
    assert codes(result) == ["overlap", "reflection", "scale", "determinant", "loss"]
    for doubt in result.doubts:
        assert "\n" not in doubt.text
        assert not doubt.text.endswith(".")
