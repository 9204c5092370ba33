"""What only one of the images shows says nothing, and never draws or pushes the other."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scenes import as_image, header, physical_grid, placed, scene
from scipy.ndimage import gaussian_filter, shift

from jaxreg.registration import (
    FFD,
    MI,
    SVF,
    Affine,
    Alignment,
    Greedy,
    Moments,
    Rigid,
    Similarity,
    SyN,
    Translation,
    downsample,
    ncc,
    preset,
    register,
)
from jaxreg.registration.register_images import make_problem
from jaxreg.registration.stages import problem as problem_module
from jaxreg.registration.stages.coverage import coverage, iteration
from jaxreg.registration.stages.iterative import Resolution
from jaxreg.registration.stages.problem import Level, Problem
from regkernels import Volume, move_points, read_volume, rigid_motion
from regkernels.data import load_multimodal_paths, load_pair_paths

VOXEL = 2.0
"""Width of the voxels of the shipped volumes, millimetres."""


@functools.cache
def brain() -> Volume:
    return read_volume(load_pair_paths()[1])


@functools.cache
def head() -> Volume:
    return read_volume(load_multimodal_paths().fixed)


@functools.cache
def head_in_hounsfield_units() -> Volume:
    """A head with air at -1024 about it."""
    array = np.asarray(head().array, float)
    inside = gaussian_filter((array > 25).astype(float), 2) > 0.5
    return head().with_array(gaussian_filter(np.where(inside, 20 + array / 2, -1024), 0.7))


def moved_copy(
    volume: Volume, degrees: float, shift: tuple[float, ...], outside: float = 0.0
) -> tuple[Volume, np.ndarray]:
    """The same picture elsewhere on the same grid, as another program resamples it.

    And the true transform, fixed -> moving.
    """
    import SimpleITK as sitk  # noqa: N813

    truth = rigid_motion(degrees, (1, 2, 3), shift, volume.grid.centre())
    back = np.linalg.inv(truth)
    transform = sitk.AffineTransform(3)
    transform.SetMatrix(back[:3, :3].ravel().tolist())
    transform.SetTranslation(back[:3, 3].tolist())
    image = as_image(volume.with_array(np.asarray(volume.array, np.float32)))
    resampled = sitk.Resample(image, image, transform, sitk.sitkLinear, outside)
    return volume.with_array(sitk.GetArrayFromImage(resampled)), truth


def some_points(volume: Volume, inside: np.ndarray) -> np.ndarray:
    """Every thousandth voxel of a region, in millimetres."""
    return physical_grid(volume)[inside][::997]


@functools.cache
def slab() -> tuple[Volume, Volume, np.ndarray, np.ndarray]:
    """A brain; 42 mm of it, moved; the truth; points of the brain that the slab shows."""
    moving, truth = moved_copy(brain(), 8, (6, -5, 4))
    array = np.asarray(moving.array)
    planes = slice(35, 56)
    corner = (moving.grid.voxel_to_physical() @ [0, 0, planes.start, 1])[:3]
    cut = Volume.create(array[planes], moving.grid.spacing, corner, moving.grid.direction)
    points = some_points(cut, array[planes] > array.mean())
    return brain(), cut, truth, move_points(points, [np.linalg.inv(truth)])


@functools.cache
def ct(offset: float) -> tuple[Volume, Volume, np.ndarray, np.ndarray]:
    """A head with air at -1024, which another scan shows moved; cut at the neck, as scans are."""
    fixed = head_in_hounsfield_units()
    moving, truth = moved_copy(fixed, 10, (14, -10, 12), -1024)
    points = some_points(fixed, np.asarray(fixed.array) > -500)
    fixed, moving = (v.with_array(np.asarray(v.array) + offset) for v in (fixed, moving))
    return fixed, moving, truth, points


@functools.cache
def whole_head() -> tuple[Volume, Volume, np.ndarray, np.ndarray]:
    """A head that is cut at the neck, elsewhere in the other image."""
    moving, truth = moved_copy(head(), 8, (6, -5, 4))
    return head(), moving, truth, some_points(head(), np.asarray(head().array) > 25)


PAIRS: dict[str, Callable[[], tuple[Volume, Volume, np.ndarray, np.ndarray]]] = {
    "slab": slab,
    "CT": functools.partial(ct, 0),
    "CT from 0 on": functools.partial(ct, 1024),
    "head cut at the neck": whole_head,
}


def error_of(result: Any, truth: np.ndarray, points: np.ndarray) -> float:
    """The mean distance in voxels between where points go and where they belong."""
    found = result.transform.transform_points(points)
    return float(np.linalg.norm(found - move_points(points, [truth]), axis=1).mean() / VOXEL)


@pytest.mark.parametrize("stage", [Rigid, Affine])
@pytest.mark.parametrize("name", PAIRS)
def test_the_right_transform_is_found_whatever_only_one_image_shows(name: str, stage: type) -> None:
    fixed, moving, truth, points = PAIRS[name]()
    ones = {
        "fixed_mask": fixed.with_array(np.ones(fixed.shape)),
        "moving_mask": moving.with_array(np.ones(moving.shape)),
    }
    settings: dict[str, dict[str, Any]] = {
        "": {},
        "masks of ones": ones,
        "from the truth": {"initial": truth},
    }
    for told, options in settings.items():
        result = register(fixed, moving, [Moments(), stage()], **options)
        assert error_of(result, truth, points) < 0.15, told


@pytest.mark.parametrize("metric", ["lncc", "mi", "mse", "nmi"])
@pytest.mark.parametrize(("name", "stage"), [("slab", Affine), ("head cut at the neck", Rigid)])
def test_no_metric_counts_what_only_one_image_shows(name: str, stage: type, metric: Any) -> None:
    """That both stages find either pair, the test of the right transform shows."""
    fixed, moving, truth, points = PAIRS[name]()
    result = register(fixed, moving, [Moments(), stage(metric=metric)])
    assert error_of(result, truth, points) < 0.3


def test_a_slab_may_be_the_fixed_image() -> None:
    moving, fixed, truth, points = slab()
    back = np.linalg.inv(truth)
    for stage in (Rigid(), Affine()):
        result = register(fixed, moving, [Moments(), stage])
        assert error_of(result, back, move_points(points, [truth])) < 0.15


@pytest.mark.parametrize(
    "stages",
    [
        [Moments(), Translation()],
        [Rigid()],
        [Similarity()],
        [Affine()],
        [Greedy()],
        [SyN()],
        [SVF()],
        [FFD()],
        [Greedy(metric=MI())],
        preset("default"),
    ],
    ids=lambda stages: " ".join(stage.name for stage in stages),
)
def test_an_image_stays_where_it_is_on_itself(stages: list[Any]) -> None:
    for image in (brain(), head()):
        points = some_points(image, np.asarray(image.array) > 0)
        result = register(image, image, stages)
        moved = np.linalg.norm(result.transform.transform_points(points) - points, axis=1)
        assert moved.max() < 0.01  # millimetres


@pytest.mark.parametrize("stage", [Greedy, SyN])
def test_a_part_of_an_image_is_not_deformed_onto_the_whole(stage: type) -> None:
    whole = header((40, 44), (5, 5))
    whole = whole.with_array(scene(physical_grid(whole)))
    rows = slice(12, 32)
    corner = (whole.grid.voxel_to_physical() @ [0, rows.start, 1])[:2]
    part = Volume.create(np.asarray(whole.array)[rows], whole.grid.spacing, corner)
    for fixed, moving in ((whole, part), (part, whole)):
        result = register(fixed, moving, [stage((1,), (40,))])
        inside = physical_grid(part)[2:-2, 2:-2]
        moved = np.linalg.norm(result.transform.transform_points(inside) - inside, axis=-1)
        assert moved.max() < 0.05


# --- weights ------------------------------------------------------------------------------------


def problem(fixed: np.ndarray, moving: np.ndarray, **masks: np.ndarray) -> Problem:
    return make_problem(
        fixed[None],
        moving[None],
        fixed_mask=masks.get("fixed_mask"),
        moving_mask=masks.get("moving_mask"),
        fixed_to_physical=None,
        moving_to_physical=None,
        moving_ratio=1.0,
        clip=None,
    )


def level_of(problem: Problem, scale: float, matrix: np.ndarray | None = None) -> Level:
    alignment = problem.start()
    if matrix is not None:
        alignment = Alignment(jnp.asarray(matrix, jnp.float32))
    return problem.level(scale, alignment)


def shifted_along_x(voxels: float, dim: int = 2) -> np.ndarray:
    matrix = np.eye(dim + 1)
    matrix[0, -1] = voxels
    return matrix


def test_a_voxel_covers_what_is_within_its_edges_and_weighs_nothing_beyond() -> None:
    image = np.random.default_rng(0).random((20, 24))
    for voxels, at_the_end in ((0, 1), (0.25, 0.5), (0.5, 0), (3, 0), (-0.25, 1)):
        level = level_of(problem(image, image), 1, shifted_along_x(voxels))
        weight = np.asarray(level.moved(level.matrix, None).weight)[0, 0]
        np.testing.assert_allclose(weight[:, -1], at_the_end, atol=1e-5)
        np.testing.assert_allclose(weight[:, 4:-4], 1, atol=1e-5)


def test_a_smoothed_edge_is_no_data() -> None:
    """Whatever lies beyond the edge of an image, a coarse level must not tell of it."""
    whole = np.random.default_rng(0).normal(size=(96, 96))
    part = whole[:, :64]
    coarse = np.asarray(downsample(jnp.asarray(part, jnp.float32)[None, None], (24, 16)))[0, 0]
    smooth = np.asarray(downsample(jnp.asarray(whole, jnp.float32)[None, None], (24, 24)))[0, 0]
    assert coarse.shape == (24, 16)
    level = level_of(problem(part, part), 4)
    weight = np.asarray(level.target().weight)[0, 0]
    np.testing.assert_array_equal(weight[:, [0, -1]], 0)
    np.testing.assert_array_equal(weight[[0, -1]], 0)
    np.testing.assert_allclose(weight[1:-1, 1:-1], 1, atol=1e-5)
    assert smooth.shape == (24, 24)
    moved = np.asarray(level.moved(level.matrix, None).weight)[0, 0]
    np.testing.assert_array_equal(moved > 0, weight > 0)


def test_the_edge_of_a_mask_is_no_data_on_a_coarse_level() -> None:
    """Where a mask leaves out a half of an image, that half has no say in the other."""
    rng = np.random.default_rng(0)
    image, spoilt = rng.normal(size=(2, 96, 96))
    spoilt[:, :48] = image[:, :48]
    mask = np.zeros((96, 96))
    mask[:, :48] = 1
    one, other = (level_of(problem(x, x, moving_mask=mask), 4) for x in (image, 1000 * spoilt))
    weight = np.asarray(one.moved(one.matrix, None).weight)[0, 0]
    values = (np.asarray(x.moved(x.matrix, None).image)[0, 0] for x in (one, other))
    difference = np.abs(next(values) - next(values) / 1000)
    assert weight.max() == pytest.approx(1)
    assert (weight * difference).max() < 0.05 * difference.max()
    np.testing.assert_array_equal(weight[:, 12:], 0)


def test_a_mask_thinner_than_a_coarse_voxel_is_not_lost() -> None:
    mask = np.zeros((96, 96))
    mask[10:80, 47] = 0.3
    image = np.random.default_rng(0).normal(size=(96, 96))
    level = level_of(problem(image, image, fixed_mask=mask), 4)
    assert level.target().weight.max() > 0


@pytest.mark.parametrize("dim", [2, 3])
def test_the_gradient_of_a_weight_is_the_difference_of_its_values(dim: int) -> None:
    shape = (9, 11, 12)[:dim]
    rng = np.random.default_rng(0)
    field = jnp.asarray(rng.uniform(-0.05, 0.05, (1, *shape, dim)))
    affine = jnp.asarray(1.1 * np.eye(dim, dim + 1)[None] + rng.uniform(-0.05, 0.05, (dim + 1,)))
    direction = rng.normal(size=affine.shape)

    def total(affine: jax.Array) -> jax.Array:
        margin = jnp.zeros(dim)
        return coverage(shape, shape, margin, affine, field).sum()

    with jax.enable_x64(True):
        slope = (jax.grad(total)(affine) * direction).sum()
        step = 1e-6
        difference = total(affine + step * direction) - total(affine - step * direction)
    np.testing.assert_allclose(slope, difference / (2 * step), rtol=1e-3)


def test_a_weight_has_derivatives_in_both_modes_also_where_it_is_mapped() -> None:
    """Of the operands that vary, and of no others."""
    shape, source = (5, 6, 7), (6, 5, 7)
    rng = np.random.default_rng(0)
    margin, reach = jnp.asarray([0.0, 1.0, 0.0]), jnp.float32(1)
    field = jnp.asarray(rng.uniform(-0.2, 0.2, (1, *shape, 3)), jnp.float32)
    affines = np.eye(3, 4) + rng.uniform(-0.1, 0.1, (4, 1, 3, 4))
    affines, direction = jnp.asarray(affines, jnp.float32), jnp.ones((1, 3, 4))

    def weight(affine: jax.Array) -> jax.Array:
        return coverage(source, shape, margin, affine, field, reach)

    def slope(affine: jax.Array) -> jax.Array:
        return (jax.grad(lambda affine: weight(affine).sum())(affine) * direction).sum()

    def change(affine: jax.Array) -> jax.Array:
        return jax.jvp(weight, (affine,), (direction,))[1].sum()

    backwards, forwards, values = (
        jax.jit(jax.vmap(function))(affines) for function in (slope, change, weight)
    )
    np.testing.assert_allclose(backwards, forwards, rtol=1e-4)
    np.testing.assert_allclose(backwards, [slope(affine) for affine in affines], rtol=1e-4)
    np.testing.assert_array_equal(values, [weight(affine) for affine in affines])


@pytest.mark.parametrize("reach", [None, 2.0])
def test_an_iteration_weighs_what_is_not_displaced_as_is_done_outside_of_it(
    reach: float | None,
) -> None:
    shape, source, margin = (5, 6, 7), (6, 5, 7), jnp.asarray([0.0, 1.0, 0.0])
    affine = jnp.asarray([[[0.9, 0.1, 0, 0.2], [-0.1, 1, 0.05, 0], [0, 0, 1.1, -0.1]]], jnp.float32)
    around = None if reach is None else jnp.float32(reach)
    for matrix in (None, affine):
        outside = coverage(source, shape, margin, matrix, None, around)
        with iteration():
            within = coverage(source, shape, margin, matrix, None, around)
        np.testing.assert_allclose(within, outside, atol=1e-5)
        assert 0 < outside.sum() < outside.size


@pytest.mark.parametrize("metric", ["ncc", "mse"])
def test_a_linear_stage_follows_the_gradient_of_its_loss_through_the_weights(metric: Any) -> None:
    rng = np.random.default_rng(0)
    fixed, moving = (gaussian_filter(rng.normal(size=(20, 24)), 2) for _ in range(2))
    mask = (gaussian_filter(rng.normal(size=(20, 24)), 3) > 0).astype(float)
    level = level_of(problem(fixed, moving, moving_mask=mask), 1)
    stage = Translation(metric=metric)

    def loss(shift: jax.Array) -> jax.Array:
        matrix = jnp.eye(3).at[:2, 2].set(shift)
        return stage.loss(level, level.moved(matrix, None), level.target())

    # Away from the edges between voxels, where interpolation has no derivative.
    at = jnp.asarray([3.3, 2.4])
    slope = jax.grad(loss)(at)
    for axis in range(2):
        step = jnp.zeros(2).at[axis].set(0.01)
        difference = (loss(at + step) - loss(at - step)) / 0.02
        np.testing.assert_allclose(slope[axis], difference, rtol=0.02, atol=1e-3 * abs(slope).max())


def test_a_good_match_of_a_corner_does_not_pay() -> None:
    """By chance a few voxels may match better than the images as a whole do."""
    rng = np.random.default_rng(0)
    fixed = gaussian_filter(rng.normal(size=(40, 40)), 2)
    moving = fixed + gaussian_filter(rng.normal(size=(40, 40)), 2)
    moving[:6, :6] = fixed[-6:, -6:]
    level = level_of(problem(fixed, moving), 1)
    stage = Translation()

    def loss(voxels: float) -> float:
        matrix = shifted_along_x(-voxels) @ np.array([[1, 0, 0], [0, 1, -voxels], [0, 0, 1]])
        moved = level.moved(jnp.asarray(matrix, jnp.float32), None)
        return float(stage.loss(level, moved, level.target()))

    assert loss(34) > loss(0)


# --- single slices ------------------------------------------------------------------------------


def slices(offset: float = 0.0) -> tuple[Volume, Volume, np.ndarray]:
    """Two oblique slices, 5 mm thick, of which one is shifted in its plane; their direction."""
    image = gaussian_filter(np.random.default_rng(0).normal(size=(1, 96, 96)), (0, 4, 4)) * 100
    cos, sin = np.cos(np.deg2rad(20)), np.sin(np.deg2rad(20))
    direction = np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]])
    arrays = image, shift(image, (0, 3, -4), order=1)
    fixed, moving = (Volume.create(a, (1, 1, 5), (-40, 30, 100), direction) for a in arrays)
    return fixed, placed(moving, origin=moving.grid.origin + offset * direction[:, 2]), direction


@pytest.mark.parametrize("stage", [Translation, Rigid, Similarity, Affine])
@pytest.mark.parametrize("offset", [0.0, 2.0])
def test_a_slice_is_not_turned_or_shifted_out_of_its_plane(offset: float, stage: type) -> None:
    fixed, moving, direction = slices(offset)
    for stages in ([stage()], [Moments(), stage()]):
        transform = register(fixed, moving, stages).transform
        turn = direction.T @ transform.matrix[:3, :3] @ direction
        np.testing.assert_allclose(turn[2], [0, 0, 1], atol=1e-5)
        np.testing.assert_allclose(turn[:, 2], [0, 0, 1], atol=1e-5)
        centre = fixed.grid.centre()
        moved = direction.T @ (transform.transform_points(centre) - centre)
        np.testing.assert_allclose(moved, [-4, 3, 0], atol=0.05)


@pytest.mark.parametrize("stages", [[Rigid()], [Moments(), Rigid()], [Greedy()]])
def test_slices_that_do_not_meet_are_an_error(stages: list[Any]) -> None:
    fixed, moving, _ = slices(10)
    with pytest.raises(ValueError, match="expected volumes that overlap"):
        register(fixed, moving, stages)


def test_a_slice_that_is_thick_enough_to_meet_another_is_seen_as_resampling_sees_it() -> None:
    fixed, moving, _ = slices(2)
    result = register(fixed, moving, [Rigid()])
    inside = np.s_[..., 8:-8, 8:-8]
    found, wanted = (v.batched()[inside] for v in (result.moved, fixed))
    assert ncc(found, wanted)[0, 0] > 0.999


def test_a_slice_finds_its_place_in_a_volume() -> None:
    """There it is seen how it has to be shifted and turned across its plane."""
    array = gaussian_filter(np.random.default_rng(0).normal(size=(24, 64, 64)), 4) * 100
    volume = Volume.create(array, (1, 1, 1))
    single = Volume.create(array[12:13], (1, 1, 1), (1, -2, 13.5))  # where it is: (0, 0, 12)
    stage = Rigid((1,), (150,), learning_rate=0.3, tolerance=0)
    transform = register(single, volume, [stage]).transform
    points = np.array([(x, y, 13.5) for x in (15, 30, 45) for y in (15, 30, 45)])
    moved = transform.transform_points(points) - points
    np.testing.assert_allclose(moved, np.broadcast_to([-1, 2, -1.5], moved.shape), atol=0.1)


@pytest.mark.parametrize(("metric", "follows"), [("lncc", False), ("ncc", True)])
def test_only_a_metric_that_follows_what_is_covered_is_differentiated_through_the_weight(
    metric: str, follows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is differentiated is traced for that, though it be thrown away in the end."""
    differentiated = []
    weight_of = problem_module.coverage

    def coverage(*operands: Any) -> jax.Array:
        @jax.custom_jvp
        def weight(affine: jax.Array) -> jax.Array:
            return weight_of(*operands[:3], affine, *operands[4:])

        @weight.defjvp
        def _(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
            differentiated.append(True)
            value = weight(*primals)
            return value, jnp.zeros_like(value)

        return weight(operands[3]) if operands[3] is not None else weight_of(*operands)

    monkeypatch.setattr(problem_module, "coverage", coverage)
    image = np.random.default_rng(0).random((20, 24)).astype(np.float32)
    stage = Affine((1,), (1,), metric=metric)
    level = level_of(problem(image, image), 1)
    state = stage.begin(level, Resolution((20, 24), 1), stage.measured(level))
    jax.make_jaxpr(lambda state: stage.step(level, state, jnp.zeros(())))(state)
    assert bool(differentiated) == follows
