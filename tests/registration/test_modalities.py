"""Several images of one object at once, each with its own metric, and matched histograms."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scenes import as_image, header, physical_grid, placed, scene, similarity

from jaxreg.registration import (
    LNCC,
    MI,
    MIND,
    MSE,
    NCC,
    NMI,
    Affine,
    CoarseToFine,
    Greedy,
    PerChannel,
    Registration,
    Rigid,
    SyN,
    Translation,
    register,
)
from jaxreg.registration.intensities import matched
from regkernels import Volume

SHIFT = np.array((4.0, -6.0))
STAGES = [Translation((2, 1), (60, 40))]


def shown(grid: Volume, image: Any) -> Volume:
    return grid.with_array(np.asarray(image, np.float32))


def waves(grid: Volume, axis: int, shift: float = 0.0) -> Volume:
    """An image that varies along one axis alone, and says nothing of the other."""
    along = physical_grid(grid)[..., axis] - shift
    return shown(grid, np.exp(-(along**2) / 300))


GRID = header((36, 40), (2.0, 2.0))
ACROSS, MOVED_ACROSS = waves(GRID, 0), waves(GRID, 0, SHIFT[0])
DOWN, MOVED_DOWN = waves(GRID, 1), waves(GRID, 1, SHIFT[1])


def shift_of(result: Registration) -> np.ndarray:
    return np.asarray(result.transform.matrix)[:2, 2]


def test_two_images_tell_together_what_neither_tells_alone() -> None:
    alone = shift_of(register(ACROSS, MOVED_ACROSS, STAGES))
    assert abs(alone[0] - SHIFT[0]) < 0.1
    assert abs(alone[1]) < 0.5
    result = register(ACROSS, MOVED_ACROSS, STAGES, also=[(DOWN, MOVED_DOWN)])
    np.testing.assert_allclose(shift_of(result), SHIFT, atol=0.2)  # of voxels of 2
    assert result.also == ((DOWN, MOVED_DOWN),)
    assert result.moved.channels == 1  # the first image


def test_what_counts_nothing_moves_nothing() -> None:
    # Of an image that says nothing of one axis, rounding would decide where it lies along that.
    both, moved = (
        shown(GRID, one.array + other.array)
        for one, other in ((ACROSS, DOWN), (MOVED_ACROSS, MOVED_DOWN))
    )
    misleading = waves(GRID, 1, -SHIFT[1])
    only_first = PerChannel((NCC(), NCC()), (1, 0))
    stages = [Translation((2, 1), (60, 40), metric=only_first)]
    found = register(both, moved, stages, also=[(DOWN, misleading)])
    alone = register(both, moved, STAGES)
    np.testing.assert_allclose(shift_of(found), shift_of(alone), atol=0.05)
    np.testing.assert_allclose(shift_of(found), SHIFT, atol=0.2)


def test_the_more_an_image_counts_the_more_it_decides() -> None:
    other = waves(GRID, 0, -SHIFT[0])
    places = []
    for weight in (0.25, 4.0):
        metric = PerChannel((MSE(), MSE()), (1, weight))
        stages = [Translation((2, 1), (60, 40), metric=metric)]
        places.append(shift_of(register(ACROSS, MOVED_ACROSS, stages, also=[(ACROSS, other)]))[0])
    assert places[0] > 2 > -2 > places[1]


@pytest.mark.parametrize("stage", [Affine, Greedy, SyN])
@pytest.mark.parametrize("metrics", [("ncc", "mi"), (LNCC(5), "mind"), (CoarseToFine(), "mse")])
def test_each_image_may_have_a_metric_of_its_own(stage: Any, metrics: Any) -> None:
    """The second pair has other contrasts, of which its metric knows."""
    points = physical_grid(GRID)
    fixed, moving = (shown(GRID, scene(p)) for p in (points, points - SHIFT / 2))
    others = (shown(GRID, 1000 * np.cos(2 * scene(p))) for p in (points, points - SHIFT / 2))
    settings = stage((2, 1), (40, 30), metric=PerChannel(metrics))
    result = register(fixed, moving, [settings], also=[tuple(others)])
    assert similarity(fixed, result.moved) > similarity(fixed, moving) + 0.02
    assert similarity(fixed, result.moved) > 0.99
    assert {doubt.code for doubt in result.doubts} <= {"iterations"}


@pytest.mark.parametrize("metric", [LNCC(5), MI(16), MIND(), MSE(), NCC(), NMI(16), CoarseToFine()])
def test_alike_for_all_channels_it_is_the_metric_in_units_of_its_scale(metric: Any) -> None:
    rng = np.random.default_rng(3)
    pred, target = jnp.asarray(rng.normal(size=(2, 1, 2, 20, 24)), jnp.float32)
    mask = jnp.asarray(rng.uniform(size=(1, 1, 20, 24)), jnp.float32)
    level = metric.for_scale(2)
    both = PerChannel((metric, metric), (2, 2)).for_scale(2)
    images = {"fixed": target, "moving": pred}
    expected = [
        level.loss_of_level(
            pred[:, c, None],
            target[:, c, None],
            mask,
            **{name: image[:, c, None] for name, image in images.items()},
        )
        / level.scale(target[:, c, None], pred[:, c, None])
        for c in (0, 1)
    ]
    found = both.loss_of_level(pred, target, mask, **images)
    np.testing.assert_allclose(found, np.mean(expected), rtol=1e-5)
    assert both.has_gradient_of_mask == level.has_gradient_of_mask
    assert both.reach == level.reach
    assert float(both.scale(target, pred)) == 1


def test_an_image_on_another_grid_is_resampled_and_says_nothing_where_it_has_no_data() -> None:
    def of(grid: Volume) -> tuple[Volume, Volume]:
        points = physical_grid(grid)
        image = np.exp(-(points[..., 1] ** 2) / 300)
        moving = np.exp(-((points[..., 1] - SHIFT[1]) ** 2) / 300)
        return shown(grid, image), shown(grid, moving)

    finer = header((60, 66), (1.3, 1.3), turn=10)
    result = register(ACROSS, MOVED_ACROSS, STAGES, also=[of(finer)])
    np.testing.assert_allclose(shift_of(result), SHIFT, atol=0.2)
    # In half of the first image there is no second one: what is made up there must not count.
    half = header((36, 18), (2.0, 2.0))
    half = placed(half, origin=GRID.grid.origin)
    with_half = register(ACROSS, MOVED_ACROSS, STAGES, also=[of(half)])
    np.testing.assert_allclose(shift_of(with_half), SHIFT, atol=0.3)
    with pytest.raises(ValueError, match=r"^also \(fixed\): expected images in the place of the"):
        far = placed(half, origin=GRID.grid.origin + 1e4)
        register(ACROSS, MOVED_ACROSS, STAGES, also=[(far.with_array(DOWN.array[:, :18]), DOWN)])


def test_pairs_that_do_not_fit_are_refused_by_name() -> None:
    def refused(also: Any, stages: Any = STAGES) -> Any:
        return register(ACROSS, MOVED_ACROSS, stages, also=also)

    with pytest.raises(TypeError, match=r"^also: expected pairs of a fixed and a moving Volume"):
        refused([(DOWN,)])
    space = Volume.create(np.zeros((4, 5, 6)))
    with pytest.raises(ValueError, match=r"^also: expected 2 dimensions as fixed, got 3"):
        refused([(space, space)])
    two = GRID.with_array(np.zeros((2, 36, 40)))
    with pytest.raises(ValueError, match=r"^also: expected as many channels in both.*got 1 and 2"):
        refused([(DOWN, two)])
    with pytest.raises(ValueError, match=r"^also \(moving\): expected intensities within"):
        refused([(DOWN, shown(GRID, 1e9 * np.asarray(DOWN.array)))])
    three = [Rigid((2,), (2,), metric=PerChannel(("ncc", "ncc", "mi")))]
    with pytest.raises(ValueError, match=r"^metric: expected images of 3 channels.*got 2"):
        refused([(DOWN, MOVED_DOWN)], three)
    with pytest.raises(ValueError, match=r"^weights: expected 2, one for each metric, got 1"):
        PerChannel(("ncc", "mi"), (1,))
    with pytest.raises(ValueError, match=r"^weights: expected numbers of at least 0"):
        PerChannel(("ncc", "mi"), (0, 0))
    with pytest.raises(ValueError, match=r"^metrics: expected a metric for each channel"):
        PerChannel("ncc")  # type: ignore[arg-type]


# --- matched histograms -------------------------------------------------------------------------


@pytest.mark.parametrize(("power", "error"), [(1.0, 1e-5), (0.8, 0.03)])
def test_a_matched_image_has_the_histogram_of_the_other(power: float, error: float) -> None:
    image = scene(physical_grid(header((30, 32, 34), (2.5, 2.5, 2.5)))).astype(np.float32)
    changed = 300 * image**power + 20
    found = np.asarray(matched(jnp.asarray(changed[None, None]), jnp.asarray(image[None, None])))
    assert np.abs(found[0, 0] - image).max() < error * np.ptp(image)


def test_the_knots_are_those_that_itk_takes() -> None:
    import SimpleITK as sitk  # noqa: N813

    grid = header((30, 32, 34), (2.5, 2.5, 2.5))
    noise = np.random.default_rng(1).normal(0, 0.01, grid.shape)
    image = shown(grid, scene(physical_grid(grid)) + noise)
    other = shown(grid, 40 * scene(physical_grid(grid) + 6, 0.6) + noise)
    expected = sitk.GetArrayFromImage(
        sitk.HistogramMatching(as_image(other), as_image(image), 4096, 15, True)
    )
    found = matched(other.batched(), image.batched())[0, 0]
    difference = np.abs(np.asarray(found) - expected) / np.ptp(expected)
    assert difference.max() < 0.02
    assert difference.mean() < 0.002


def test_matching_leaves_constant_images_and_channels_alone() -> None:
    constant = jnp.full((1, 1, 8, 8), 3.0)
    ramp = jnp.linspace(0, 1, 64).reshape(1, 1, 8, 8)
    assert np.isfinite(matched(constant, ramp)).all()
    np.testing.assert_array_equal(matched(ramp, constant), constant)
    both = jnp.concatenate([ramp, 5 * ramp], axis=1)
    turned = jnp.concatenate([5 * ramp, ramp], axis=1)
    np.testing.assert_allclose(matched(both, turned), turned, atol=1e-5)


def test_squared_differences_do_with_intensities_that_mean_something_else() -> None:
    points = physical_grid(GRID)
    fixed = shown(GRID, scene(points))
    moving = shown(GRID, 3 * scene(points - SHIFT) ** 0.8 + 1)
    stages = [Translation((2, 1), (60, 40), metric=MSE())]
    lost = shift_of(register(fixed, moving, stages))
    result = register(fixed, moving, stages, match_histogram=True)
    assert np.abs(shift_of(result) - SHIFT).max() < 0.3 < np.abs(lost - SHIFT).max()
    # What follows from the transform has its own intensities.
    assert float(np.max(result.moved.array)) > 2
    matching = jax.tree.leaves(result.stages[0].levels[-1].losses)[-1]
    assert float(np.min(matching)) < 0.01
