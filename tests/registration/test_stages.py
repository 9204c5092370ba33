"""The stages of a registration: what each finds, and how it gets there."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scenes import grainy, header, physical_grid, placed, scene, similarity, smooth_field
from scipy.spatial.transform import Rotation

from jaxreg import (
    compose,
    convert_displacement,
    interpolate,
    lncc_loss,
    mind_ssc,
    mutual_information_loss,
    step_gradient,
)
from jaxreg.registration import (
    FFD,
    LNCC,
    MI,
    MIND,
    MSE,
    NCC,
    NMI,
    SVF,
    Affine,
    Greedy,
    Metric,
    Moments,
    Progress,
    Rigid,
    Similarity,
    SyN,
    Translation,
    downsample,
    mse_loss,
    ncc_loss,
    register,
    register_images,
    riemannian_adam_step,
)
from jaxreg.registration.register_images import make_problem
from jaxreg.registration.stages.adam import no_moments
from jaxreg.registration.stages.iterative import Iterative, Resolution, State, block_length
from jaxreg.registration.stages.linear import rotation_matrix
from jaxreg.registration.stages.problem import Alignment, Level
from regkernels import Volume, rigid_motion

LINEAR = [Translation, Rigid, Similarity, Affine]
DIFFEOMORPHIC = [Greedy, SVF, SyN]
DEFORMABLE = [*DIFFEOMORPHIC, FFD]


def plane(transform: np.ndarray, dim: int) -> np.ndarray:
    """A transform of space, or what it does in the x-y plane."""
    keep = [*range(dim), 3]
    return transform[np.ix_(keep, keep)]


def seen_through(moving: Volume, transform: np.ndarray, gain: float = 1.0) -> Volume:
    """The scene on a grid, every point of it moved by a transform."""
    inverse = np.linalg.inv(np.asarray(transform))
    points = physical_grid(moving) @ inverse[:-1, :-1].T + inverse[:-1, -1]
    return moving.with_array(gain * scene(points))


def error_in_mm(found: np.ndarray, truth: np.ndarray, fixed: Volume) -> float:
    """The largest distance between two transforms in the inner half of a volume."""
    inner = 0.5 * physical_grid(fixed).reshape(-1, fixed.ndim)
    difference = np.asarray(found) - truth
    distances = np.linalg.norm(inner @ difference[:-1, :-1].T + difference[:-1, -1], axis=1)
    return float(distances.max())


def freely(stage: type) -> Callable[..., Any]:
    """A stage without a penalty, if it has one."""
    return functools.partial(stage, regularisation=None) if stage in DEFORMABLE else stage


def round_trip(one: jax.Array, other: jax.Array) -> np.ndarray:
    """How far points are, in voxels, after going through one field and then the other."""
    residual = convert_displacement(compose(one, other), "normalised", "voxel")
    return np.linalg.norm(np.asarray(residual), axis=-1)


# --- linear -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [2, 3])
def test_an_affine_known_by_construction_is_recovered(dim: int) -> None:
    fixed = header((32, 36, 30)[-dim:], (4.2, 3.6, 4.8)[:dim])
    fixed = fixed.with_array(scene(physical_grid(fixed)))
    truth = rigid_motion(18, (0, 0, 1), (12, -9, 7), (5, 5, 5)) @ np.diag([1.1, 0.93, 1.05, 1])
    truth = plane(truth, dim)
    # Another size, spacing, origin and direction; the same scene seen through the transform.
    moving = header((36, 32, 38)[-dim:], (4, 4.7, 4.1)[:dim], turn=25)
    moving = placed(moving, origin=moving.grid.origin + truth[:-1, -1])
    moving = seen_through(moving, truth, gain=7)

    result = register(fixed, moving, [Moments(), Affine((2, 1), (60, 50), tolerance=0)])

    # An eighth of a voxel of 4.8 mm. The optimum on this grid is 0.48 mm off, after 200 iterations
    # on each level; these leave 0.54. With voxels a sixth narrower they are 0.36 and 0.41.
    assert error_in_mm(result.transform.matrix, truth, fixed) < 0.6
    assert [level.losses.shape for level in result.stages[1].levels] == [(60,), (50,)]
    assert result.stages[1].levels[-1].losses[-1] < -0.9999
    assert result.transform.displacement is None
    np.testing.assert_array_equal(result.jacobian, np.ones(fixed.shape))


@pytest.mark.parametrize(
    ("stage", "dim"), [(Translation, 2), (Rigid, 2), (Rigid, 3), (Similarity, 3)]
)
def test_a_stage_finds_its_own_kind_of_transform(stage: type, dim: int) -> None:
    axis = (0, 0, 1) if dim == 2 else (1, 2, 2)
    angle, size = 0 if stage is Translation else 14, 1.1 if stage is Similarity else 1
    truth = rigid_motion(angle, axis, (6, -4, 3), (0, 0, 0)) @ np.diag([size, size, size, 1])
    truth = plane(truth, dim)
    fixed = header((22, 20, 24)[-dim:], (6, 6, 6)[:dim])
    moving = seen_through(fixed, truth)
    fixed = fixed.with_array(scene(physical_grid(fixed)))
    matrix = register(fixed, moving, [stage((1,), (80,), tolerance=0)]).transform.matrix
    assert error_in_mm(matrix, truth, fixed) < 0.9  # of voxels 6 mm wide
    turn = matrix[:-1, :-1]
    scale = np.linalg.det(turn) ** (1 / dim)
    np.testing.assert_allclose(turn @ turn.T, scale**2 * np.eye(dim), atol=1e-5)
    assert stage is Similarity or scale == pytest.approx(1, abs=1e-5)


def test_a_rotation_vector_makes_the_rotation_about_it() -> None:
    for vector in ([0.3, -1.2, 0.4], [0.01, 0.002, -0.003], [0.0, 0.0, 0.0], [2.0, 2.0, 1.0]):
        expected = Rotation.from_rotvec(vector).as_matrix()
        found = jax.jit(rotation_matrix)(jnp.asarray(vector))
        np.testing.assert_allclose(found, expected, atol=2e-6)
    slope = jax.jit(jax.jacobian(rotation_matrix))(jnp.zeros(3))
    np.testing.assert_allclose(slope[2, 1], [1, 0, 0], atol=1e-6)  # about x, y turns towards z
    np.testing.assert_allclose(
        rotation_matrix(jnp.asarray([0.3])), Rotation.from_rotvec([0, 0, 0.3]).as_matrix()[:2, :2]
    )


def test_a_linear_stage_starts_where_it_is_told() -> None:
    fixed = header((22, 20, 24), (8, 8, 8))
    fixed = fixed.with_array(scene(physical_grid(fixed)))
    initial = rigid_motion(5, (1, 0, 0), (2, 3, 4), (0, 0, 0))
    result = register(fixed, fixed, [Affine((1,), (0,))], initial=initial)
    np.testing.assert_allclose(result.transform.matrix, initial, atol=1e-4)
    assert result.stages[0].levels[0].losses.size == 0
    np.testing.assert_array_equal(
        register(fixed, fixed, [], initial=initial).transform.matrix, initial
    )


@pytest.mark.parametrize("dim", [2, 3])
def test_moments_undo_any_rotation(dim: int) -> None:
    fixed = header((30, 32, 34)[-dim:], (4, 4, 4)[:dim])
    # Longer than wide, and wider than high: a ball has no axes.
    shape = np.diag([*(0.8, 1.2, 1.6)[:dim], 1])
    fixed = seen_through(fixed, np.linalg.inv(shape))
    for angle in (100, 170):
        turn = rigid_motion(angle, (1, -1, 2) if dim == 3 else (0, 0, 1), (30, 9, 4), (0, 0, 0))
        truth = plane(turn, dim)
        moving = header((34, 34, 34)[-dim:], (4, 4, 4)[:dim])
        moving = placed(moving, origin=moving.grid.origin + truth[:-1, -1])
        moving = seen_through(moving, truth @ np.linalg.inv(shape))
        found = register(fixed, moving, [Moments(scale=2)])
        assert error_in_mm(found.transform.matrix, truth, fixed) < 4  # one voxel
        before, after = found.stages[0].levels[0].losses
        assert after < min(before, -0.98)
    shifted = register(fixed, moving, [Moments(rotation=False, scale=2)]).transform.matrix
    np.testing.assert_array_equal(shifted[:-1, :-1], np.eye(dim))


def test_moments_keep_a_start_that_is_better() -> None:
    fixed = header((36, 40), (4, 4))
    fixed = fixed.with_array(scene(physical_grid(fixed)))
    spoilt = np.array(fixed.array)
    spoilt[:8, :8] = 3  # draws the centre of mass away
    result = register(fixed, fixed.with_array(spoilt), [Moments(scale=1, metric="lncc")])
    np.testing.assert_array_equal(result.transform.matrix, np.eye(3))


# --- deformable ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [2, 3])
def test_the_gradient_is_that_of_composing_a_step_from_the_right(dim: int) -> None:
    shape = (36, 40, 44)[-dim:]
    fixed = header(shape, (4, 4, 4)[:dim])
    moving_image = jnp.asarray(scene(physical_grid(fixed) * 0.6), jnp.float32)[None, None]
    fixed_image = jnp.asarray(scene(physical_grid(fixed) * 0.66), jnp.float32)[None, None]
    field = smooth_field(shape, 2.0, seed=1)
    affine = jnp.eye(dim, dim + 1)[None] * 0.95

    @jax.jit
    def loss_after(step: jax.Array) -> jax.Array:
        warp = compose(field, step)
        return ncc_loss(interpolate(moving_image, affine, warp, affine_last=True), fixed_image)

    moved = interpolate(moving_image, affine, field, affine_last=True)
    gradient = jax.jit(lambda i: step_gradient(i, jax.grad(ncc_loss)(i, fixed_image)))(moved)
    for seed in range(3):
        # A step that fades out at the border, where differences are one-sided.
        window = np.prod(
            np.meshgrid(*(np.hanning(n) for n in shape), indexing="ij"), axis=0
        ).astype(np.float32)
        step = smooth_field(shape, 0.2, seed=10 + seed) * window[None, ..., None]
        expected = float(loss_after(step) - loss_after(-step)) / 2
        assert float((gradient * step).sum()) == pytest.approx(expected, rel=0.05, abs=1e-5)


def test_no_step_is_longer_than_half_a_voxel_times_the_learning_rate() -> None:
    shape = (2, 9, 10, 11, 3)
    gradient = (
        jax.random.normal(jax.random.key(0), shape)
        * jnp.asarray([1.0, 1e-3])[:, None, None, None, None]
    )
    moments = no_moments(gradient)
    take_step = jax.jit(functools.partial(riemannian_adam_step, learning_rate=0.4))
    for _ in range(3):
        step, moments = take_step(gradient, moments)
    lengths = jnp.linalg.norm(convert_displacement(step, "normalised", "voxel"), axis=-1)
    np.testing.assert_allclose(lengths.max(axis=(1, 2, 3)), 0.2, rtol=1e-5)  # each batch item
    assert float((gradient * step).sum()) < 0
    assert int(moments.count) == 3


def test_a_step_stays_in_single_precision_where_double_is_on() -> None:
    with jax.enable_x64(True):
        gradient = jnp.ones((1, 5, 6, 2), jnp.float32)
        step, moments = jax.jit(functools.partial(riemannian_adam_step, learning_rate=1.0))(
            gradient, no_moments(gradient)
        )
    dtypes = [x.dtype for x in (step, moments.mu, moments.nu, moments.count)]
    assert dtypes == [jnp.float32, jnp.float32, jnp.float32, jnp.int32]


def test_without_a_gradient_there_is_no_step() -> None:
    zero = jnp.zeros((1, 5, 6, 2))
    take_step = jax.jit(functools.partial(riemannian_adam_step, learning_rate=1.0))
    step, _ = take_step(zero, no_moments(zero))
    np.testing.assert_array_equal(step, zero)


@pytest.mark.parametrize("stage", DIFFEOMORPHIC)
@pytest.mark.parametrize("dim", [2, 3])
def test_a_random_smooth_deformation_is_found_without_folds_and_with_its_inverse(
    stage: type, dim: int
) -> None:
    shape = (22, 20, 24)[-dim:]
    fixed = header(shape, (5, 5, 5)[:dim])
    # More texture than the scene alone has, and a deformation of a few voxels.
    noise = jax.random.normal(jax.random.key(1), (1, 1, *(n // 3 for n in shape)))
    image = (
        scene(physical_grid(fixed)) + 0.3 * np.asarray(interpolate(noise, out_shape=shape))[0, 0]
    )
    warp = smooth_field(shape, 2.0, seed=3)
    moving = fixed.with_array(image)
    fixed = fixed.with_array(
        np.asarray(interpolate(moving.batched(), grid=warp, padding_mode="border"))[0, 0]
    )

    # A penalty would keep the field from what is there to be found; noise, against which it is
    # for, there is none.
    result = register(fixed, moving, [freely(stage)((2, 1), (30, 30), tolerance=0)])

    before, after = similarity(fixed, moving), similarity(fixed, result.moved)
    assert 1 - after < 0.15 * (1 - before)
    assert 1 - similarity(moving, result.fixed_moved) < 0.2 * (1 - before)
    assert result.folds.share == 0
    assert 0.05 < result.folds.minimum < 1 < result.folds.maximum
    forward, inverse = result.transform.displacement, result.transform.inverse_displacement
    for error in (round_trip(forward, inverse), round_trip(inverse, forward)):
        assert error.mean() < 0.1
        assert error.max() < 1


@pytest.mark.parametrize("stage", DIFFEOMORPHIC)
def test_moments_in_bfloat16_find_what_those_in_float32_do(stage: Any) -> None:
    fixed = header((36, 40), (5, 5))
    points = physical_grid(fixed)
    fixed = fixed.with_array(scene(points))
    moving = fixed.with_array(scene(points + 6 * np.sin(points[..., ::-1] / 18)))
    found = []
    for dtype in ("float32", "bfloat16"):
        one = stage((2, 1), (20, 20), metric="mse", tolerance=0, moments_dtype=dtype)
        found.append(register(fixed, moving, [one]))
        problem_shape = (36, 40)
        zero = jnp.zeros((one.fields, *problem_shape, 2))
        moments = no_moments(zero.astype(dtype))
        state = one.resized(State(zero, moments), (18, 20), Resolution(problem_shape, 2))
        assert {str(x.dtype) for x in (state.moments.mu, state.moments.nu)} == {dtype}
        assert state.found.dtype == np.float32
    exact, rounded = (result.stages[0].levels[1].losses for result in found)
    start = found[0].stages[0].levels[0].losses[0]
    assert exact[-1] < 0.1 * start  # else a step in any direction would do
    assert abs(rounded[-1] - exact[-1]) < 0.01 * start
    assert not np.array_equal(exact, rounded)


def test_syn_treats_both_images_alike() -> None:
    fixed = header((36, 40), (5, 5))
    points = physical_grid(fixed)
    fixed = fixed.with_array(scene(points))
    moving = fixed.with_array(scene(points + 6 * np.sin(points[..., ::-1] / 18)))
    stages = [SyN((2, 1), (20, 20), metric="mse", tolerance=0)]
    one, other = register(fixed, moving, stages), register(moving, fixed, stages)
    np.testing.assert_allclose(
        one.stages[0].levels[1].losses, other.stages[0].levels[1].losses, rtol=1e-3
    )
    difference = convert_displacement(
        one.transform.displacement - other.transform.inverse_displacement, "normalised", "voxel"
    )
    assert float(jnp.abs(difference).mean()) < 0.05


@pytest.mark.parametrize("stage", DIFFEOMORPHIC)
def test_no_point_leaves_the_volume(stage: type) -> None:
    fixed = header((20, 24), (5, 5))
    points = physical_grid(fixed)
    fixed, moving = fixed.with_array(scene(points + 9)), fixed.with_array(scene(points - 9))
    result = register(fixed, moving, [stage((1,), (40,), field_sigma=0, gradient_sigma=1)])
    field = np.asarray(result.transform.displacement)[0]
    assert np.abs(field[..., 0][:, [0, -1]]).max() < 1e-6
    assert np.abs(field[..., 1][[0, -1]]).max() < 1e-6
    assert np.abs(field[..., 1][:, [0, -1]]).max() > 1e-3  # along the border it may slide


@pytest.mark.parametrize("stage", DEFORMABLE)
def test_going_on_with_the_next_level_is_going_on(stage: type) -> None:
    """The field and Adam's moments are carried over: two levels of one shape are one level."""
    fixed = header((20, 24), (5, 5))
    points = physical_grid(fixed)
    fixed, moving = fixed.with_array(scene(points)), fixed.with_array(scene(points + 5))
    once, twice = (
        register(fixed, moving, [stage((1,) * n, (20 // n,) * n, tolerance=0, block=10)])
        for n in (1, 2)
    )
    np.testing.assert_array_equal(once.transform.displacement, twice.transform.displacement)


@pytest.mark.parametrize("stage", DEFORMABLE)
def test_a_penalty_holds_the_field_back(stage: type) -> None:
    fixed = header((20, 24), (5, 5))
    points = physical_grid(fixed)
    fixed, moving = fixed.with_array(scene(points)), fixed.with_array(scene(points + 5))

    def size(field: jax.Array) -> jax.Array:
        return 100 * (field**2).mean()

    free, held = (
        register(fixed, moving, [stage((1,), (20,), regularisation=penalty, tolerance=0)])
        for penalty in (None, size)
    )
    displacement = held.transform.displacement
    assert jnp.abs(displacement).mean() < 0.3 * jnp.abs(free.transform.displacement).mean()
    first = held.stages[0].levels[0].losses[0]
    assert first == pytest.approx(free.stages[0].levels[0].losses[0])  # no field yet, no penalty


# --- settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [Affine, *DEFORMABLE])
def test_a_stage_minimises_the_metric_that_it_is_given(stage: type) -> None:
    fixed = header((20, 24), (5, 5))
    points = physical_grid(fixed)
    fixed, moving = (fixed.with_array(grainy(scene(points + 5 * k), k)) for k in range(2))
    images = moving.batched(), fixed.batched()

    def absolute(pred: jax.Array, target: jax.Array) -> jax.Array:
        return jnp.abs(pred - target).mean()

    one = functools.partial(stage, (1,), (1,))
    cases = [
        (one(metric=LNCC(5, common_variance=0)), lncc_loss(*images, kernel_size=5)),
        (one(metric=absolute), absolute(*images)),
    ]
    if stage in (Affine, SyN):  # the others take the same way
        cases += [
            (one(metric="ncc"), ncc_loss(*images)),
            (one(metric="mse"), mse_loss(*images)),
            (one(metric=MI(num_bins=20)), mutual_information_loss(*images, num_bins=20)),
            (one(metric=MIND(radius=1)), mse_loss(*(mind_ssc(x, radius=1) for x in images))),
            (
                one(metric=NMI(num_bins=20)),
                mutual_information_loss(*images, num_bins=20, normalised=True),
            ),
        ]
    for settings, loss in cases:
        result = register(fixed, moving, [settings])
        np.testing.assert_allclose(result.stages[0].levels[0].losses, [loss], rtol=1e-4)


def other_contrast(image: np.ndarray) -> np.ndarray:
    """The same anatomy with intensities that neither rise nor fall with the old ones."""
    return 1 - np.cos(4 * image)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("metric", "finer"), [(MI(num_bins=16), 1), (NMI(num_bins=16), 2)])
def test_mutual_information_aligns_contrasts_that_do_not_correlate(
    metric: Metric, finer: int, masked: bool
) -> None:
    """The normalised one is largest there only where there are more voxels: here 2 mm beside it."""
    truth = plane(rigid_motion(9, (0, 0, 1), (6, -5, 0), (0, 0, 0)), 2)
    fixed = header((30 * finer, 32 * finer), (4 / finer, 4 / finer))
    same = seen_through(fixed, truth)
    moving = same.with_array(other_contrast(np.asarray(same.array)))
    fixed = fixed.with_array(scene(physical_grid(fixed)))
    masks = {}
    if masked:  # a coil that both have at the same place would keep them there
        spoilt_fixed, spoilt_moving = np.array(fixed.array), np.array(moving.array)
        rows = 7 * finer
        stripes = np.indices((rows, 32 * finer)).sum(axis=0) % 5
        spoilt_fixed[:rows], spoilt_moving[:rows] = stripes, stripes
        seen = np.ones(fixed.shape)
        seen[: rows + 1] = 0
        fixed, moving = fixed.with_array(spoilt_fixed), moving.with_array(spoilt_moving)
        masks = {"fixed_mask": fixed.with_array(seen), "moving_mask": moving.with_array(seen)}
    stage = Rigid((1,), (80,), metric=metric, tolerance=0)
    found = register(fixed, moving, [stage], **masks).transform.matrix
    assert error_in_mm(found, truth, fixed) < 1.5  # of voxels 4 or 2 mm wide
    other = dataclasses.replace(stage, metric="ncc")
    missed = register(fixed, moving, [other], **masks).transform.matrix
    assert error_in_mm(missed, truth, fixed) > 4


@pytest.mark.parametrize("stage", [Greedy, SyN])
def test_mutual_information_deforms_one_contrast_to_another(stage: type) -> None:
    shape = (36, 40)
    same = header(shape, (4, 4))
    same = same.with_array(scene(physical_grid(same)))
    window = np.sqrt(np.outer(*(np.hanning(n) for n in shape)))[None, ..., None]
    warp = smooth_field(shape, 6.0, seed=3) * jnp.asarray(window, jnp.float32)
    fixed = same.with_array(np.asarray(interpolate(same.batched(), grid=warp))[0, 0])
    moving = same.with_array(other_contrast(np.asarray(same.array)))
    # What the masks leave out says that nothing has moved.
    spoilt_fixed, spoilt_moving, seen = (
        np.array(fixed.array),
        np.array(moving.array),
        np.ones(shape),
    )
    spoilt_fixed[:6] = spoilt_moving[:6] = np.indices((6, 40)).sum(axis=0) % 5
    seen[:7] = 0
    # Where the field may be rough, noise can be bent until it seems to inform.
    settings = stage((2, 1), (30, 30), metric=MI(num_bins=16), gradient_sigma=3, field_sigma=2)
    result = register(
        fixed.with_array(spoilt_fixed),
        moving.with_array(spoilt_moving),
        [settings],
        fixed_mask=fixed.with_array(seen),
        moving_mask=moving.with_array(seen),
    )
    before, after = similarity(fixed, same), similarity(fixed, result.transform.apply(same))
    assert 1 - after < 0.2 * (1 - before)
    assert result.folds.share == 0


@pytest.mark.parametrize("stage", [Rigid, Greedy])
def test_what_a_mask_leaves_out_does_not_count(stage: type) -> None:
    fixed = header((20, 24), (5, 5))
    points = physical_grid(fixed)
    fixed, moving = fixed.with_array(scene(points)), fixed.with_array(scene(points + 4))
    spoilt_fixed, spoilt_moving = np.array(fixed.array), np.array(moving.array)
    spoilt_fixed[:6] = 2
    spoilt_moving[-6:] = 2
    fixed_mask, moving_mask = np.ones(fixed.shape), np.ones(fixed.shape)
    fixed_mask[:7], moving_mask[-7:] = 0, 0
    settings = freely(stage)((1,), (60,), metric="mse", tolerance=0)
    masked = register(
        fixed.with_array(spoilt_fixed),
        moving.with_array(spoilt_moving),
        [settings],
        fixed_mask=fixed.with_array(fixed_mask),
        moving_mask=moving.with_array(moving_mask),
    )
    losses = masked.stages[0].levels[0].losses
    assert losses[0] < 0.1
    assert losses[-1] < 0.15 * losses[0]
    unmasked = register(
        fixed.with_array(spoilt_fixed), moving.with_array(spoilt_moving), [settings]
    )
    assert unmasked.stages[0].levels[0].losses[-1] > 2 * losses[-1]


@pytest.mark.parametrize("stage", [Rigid, Greedy])
def test_losses_of_the_library_will_do_as_metrics(stage: type) -> None:
    fixed = header((20, 24), (5, 5))
    points = physical_grid(fixed)
    fixed, moving = (fixed.with_array(grainy(scene(points + 5 * k), k)) for k in range(2))
    mask = fixed.with_array(np.pad(np.ones((14, 18)), 3))
    for loss in (lncc_loss, mutual_information_loss, ncc_loss, mse_loss):
        for masks in ({}, {"moving_mask": mask}):
            (record,) = register(fixed, moving, [stage((1,), (15,), metric=loss)], **masks).stages
            assert record.levels[0].losses[-1] < record.levels[0].losses[0]


@pytest.mark.parametrize("stage", [Rigid, Greedy])
def test_the_unit_of_a_mask_does_not_matter(stage: type) -> None:
    fixed = header((20, 24), (5, 5))
    points = physical_grid(fixed)
    fixed, moving = (fixed.with_array(scene(points + 5 * k)) for k in range(2))
    losses = []
    for unit in (1, 2.0**-14):
        mask = fixed.with_array(unit * np.ones(fixed.shape))
        result = register(fixed, moving, [stage((1,), (20,), metric="ncc")], fixed_mask=mask)
        losses.append(result.stages[0].levels[0].losses)
    np.testing.assert_allclose(*losses, rtol=1e-4)


def test_a_metric_that_takes_no_mask_sees_no_difference_where_nothing_counts() -> None:
    fixed = header((16, 16), (5, 5)).with_array(np.eye(16))
    moving = fixed.with_array(np.eye(16) + np.pad(np.ones((6, 6)), 5))
    seen = fixed.with_array(1 - np.pad(np.ones((8, 8)), 4))
    stage = Greedy((1,), (5,), metric=lambda pred, target: ((pred - target) ** 2).mean())
    for masks in ({"fixed_mask": seen}, {"moving_mask": seen}):
        result = register(fixed, moving, [stage], **masks)
        np.testing.assert_array_equal(result.stages[0].levels[0].losses, 0)
        np.testing.assert_array_equal(result.transform.displacement, 0)


@pytest.mark.parametrize("stage", [Translation, SyN])
def test_every_channel_counts(stage: type) -> None:
    """The first channel shows nothing; what there is to see is in the second."""
    fixed = header((20, 24), (1, 1))
    points = physical_grid(fixed) * 5
    images = [np.stack([0 * i, i]) for i in (scene(points), scene(points + 5))]
    settings = freely(stage)((1,), (30,), metric="mse", tolerance=0)
    result = register_images(*images, [settings])
    (losses,) = (trace.losses for trace in result.traces[0])
    assert losses[0] == pytest.approx(float(mse_loss(*(i[None] for i in images))), rel=1e-5)
    assert losses[-1] < 0.05 * losses[0]


@pytest.mark.parametrize("stage", [Affine, *DEFORMABLE])
def test_a_level_stops_when_nothing_gets_better(stage: type) -> None:
    fixed = header((20, 24), (5, 5))
    fixed = fixed.with_array(scene(physical_grid(fixed)))
    schedule = ((2, 1), (60, 45)) if stage is Affine else ((1,), (45,))
    result = register(fixed, fixed, [stage(*schedule, metric="mse", block=5, tolerance=0.1)])
    for level, iterations in zip(result.stages[0].levels, schedule[1], strict=True):
        assert level.converged
        assert 10 <= level.losses.size < iterations
        assert level.losses.size % 5 == 0
    endless = register(fixed, fixed, [stage(*schedule, metric="mse", tolerance=0)])
    assert tuple(level.losses.size for level in endless.stages[0].levels) == schedule[1]
    assert not any(level.converged for level in endless.stages[0].levels)


def test_steps_that_are_too_long_do_not_spoil_the_start() -> None:
    fixed = header((20, 24), (5, 5))
    points = physical_grid(fixed)
    fixed, moving = fixed.with_array(scene(points)), fixed.with_array(scene(points + 5))
    for callback in (None, lambda _: None):
        settings = Affine((1,), (20,), learning_rate=8, metric="mse")
        result = register(fixed, moving, [settings], callback=callback)
        (level,) = result.stages[0].levels
        assert level.losses[-1] > 2 * level.losses[0]
        np.testing.assert_allclose(result.transform.matrix, np.eye(3), atol=1e-6)
        # They get shorter within a level, and with enough of them the way down is found.
        settings = dataclasses.replace(settings, iterations=(100,))
        result = register(fixed, moving, [settings], callback=callback)
        (level,) = result.stages[0].levels
        assert level.losses[10] > 2 * level.losses[0] > 200 * level.losses[-1]


@dataclasses.dataclass(frozen=True)
class Scripted(Iterative):
    """Counts its iterations; its losses are given."""

    name: ClassVar[str] = "scripted"
    stops_when_worse: ClassVar[bool] = True

    losses: tuple[float, ...] = ()

    def begin(self, level: Level, resolution: Resolution, measured: None) -> State:
        return State(jnp.zeros(()), no_moments(jnp.zeros(())))

    def resized(self, state: State, shape: tuple[int, ...], resolution: Resolution) -> State:
        return state

    def step(self, level: Level, state: State, progress: jax.Array) -> tuple[State, jax.Array]:
        loss = jnp.asarray(self.losses)[state.found.astype(int)]
        return state._replace(found=state.found + 1), loss

    def finish(self, shape: tuple[int, ...], alignment: Alignment, found: jax.Array) -> Alignment:
        return Alignment(found * alignment.matrix)


@pytest.mark.parametrize(("rise", "kept"), [(0.05, 30), (0.2, 20), (math.nan, 20)])
def test_a_block_that_loses_much_of_what_was_gained_is_undone(rise: float, kept: int) -> None:
    falling = np.linspace(2, 1, 20)
    losses = (*falling, *np.linspace(1, 1 + rise, 10), *falling)
    stage = Scripted((1,), (50,), losses=losses)
    image = jnp.zeros((1, 16, 16))
    result = register_images(image, image, [stage])
    assert int(result.traces[0][0].ran) == 30
    assert result.alignment.matrix[0, 0] == kept


@pytest.mark.parametrize("callback", [None, lambda _: None])
def test_what_spoils_a_level_at_once_is_undone_however_short_the_blocks(
    callback: Callable[[Progress], None] | None,
) -> None:
    stage = Scripted((1,), (40,), block=5, losses=(1.0, *np.linspace(2, 3, 39)))
    image = jnp.zeros((1, 16, 16))
    nothing = dict.fromkeys(
        ("fixed_mask", "moving_mask", "fixed_to_physical", "moving_to_physical", "clip")
    )
    problem = make_problem(image, image, moving_ratio=1, **nothing)
    alignment, (trace,) = stage.run(problem, problem.start(), callback)
    assert int(trace.ran) == 10
    assert alignment.matrix[0, 0] == 0  # iterations that are kept


def test_iterations_are_split_into_equal_blocks() -> None:
    for iterations, block, length in ((60, 10, 10), (45, 10, 9), (20, 7, 5), (7, 10, 7), (0, 5, 1)):
        assert block_length(iterations, block) == length
        assert iterations % length == 0
    assert block_length(45, 10, 10) == 15
    assert block_length(97, 10, 10) == 97
    assert math.gcd(block_length(97, 10), 97) > 1  # rather all of a prime than one by one


@pytest.mark.parametrize("stage", [Affine, *DEFORMABLE, Moments])
def test_a_metric_that_there_is_not_is_refused(stage: type) -> None:
    for metric in ("mutual", 7, LNCC):  # an instance, `LNCC()`, would do
        with pytest.raises(ValueError, match=f"metric: expected one of .* got {metric!r}"):
            stage(metric=metric)


def test_settings_of_a_metric_out_of_range_are_refused() -> None:
    for size in (8, 1, 33, 5.5):
        with pytest.raises(ValueError, match=f"kernel_size: expected an odd .* got {size}"):
            LNCC(kernel_size=size)
    for bins in (1, 257):
        message = f"num_bins: expected an integer from 2 to 256, got {bins}"
        with pytest.raises(ValueError, match=message):
            MI(num_bins=bins)
        with pytest.raises(ValueError, match=message):
            NMI(num_bins=bins)
    with pytest.raises(ValueError, match="radius: expected an integer from 1 to 4, got 5"):
        MIND(radius=5)
    with pytest.raises(ValueError, match="dilation: expected an integer from 1 to 16, got 0"):
        MIND(dilation=0)


@pytest.mark.parametrize("stage", [Affine, *DEFORMABLE, Moments])
def test_the_name_of_a_metric_stands_for_the_one_with_its_defaults(stage: type) -> None:
    metrics = {
        "lncc": LNCC(7),
        "mi": MI(32),
        "mind": MIND(2, 2),
        "mse": MSE(),
        "ncc": NCC(),
        "nmi": NMI(32),
    }
    for name, metric in metrics.items():
        assert stage(metric=name).metric == metric
        assert stage(metric=name) == stage(metric=metric) == stage().with_metric(name)
        assert hash(stage(metric=name)) == hash(stage(metric=metric))
    assert stage(metric=LNCC(5)) != stage(metric="lncc")


def test_a_record_of_a_stage_can_be_read() -> None:
    def absolute(pred: jax.Array, target: jax.Array) -> jax.Array:
        return jnp.abs(pred - target).mean()

    for metric, told in (
        (LNCC(5), "LNCC(kernel_size=5, common_variance=0.5)"),
        ("mse", "MSE"),
        (absolute, "absolute"),
    ):
        record = Greedy(metric=metric, regularisation=jnp.sum).record()
        assert record["metric"].endswith(told)
        assert record["regularisation"] == "sum"
        assert json.loads(json.dumps(record))["scales"] == [4, 2, 1]


@dataclasses.dataclass(frozen=True)
class WiderWhereFiner(Metric):
    """LNCC whose window depends on the level."""

    sizes: tuple[tuple[float, int], ...]

    def for_scale(self, scale: float) -> Metric:
        return LNCC(dict(self.sizes)[scale], common_variance=0)

    def loss(self, pred: jax.Array, target: jax.Array, mask: jax.Array | None) -> jax.Array:
        raise AssertionError("a level uses the metric for its scale")


@pytest.mark.parametrize("callback", [None, lambda _: None])
def test_a_metric_is_told_the_scale_of_each_level(
    callback: Callable[[Progress], None] | None,
) -> None:
    fixed = header((36, 40), (5, 5))
    points = physical_grid(fixed)
    fixed, moving = (fixed.with_array(grainy(scene(points + 3 * k), k)) for k in range(2))
    metric = WiderWhereFiner(((2, 3), (1, 9)))
    # Steps of a billionth of a voxel: the losses of both levels are those of the start.
    stages = [
        Moments(rotation=False, scale=2, metric=metric),
        Translation((2, 1), (1, 1), metric=metric, learning_rate=1e-9),
    ]
    for stage, expected in zip(stages, ([(2, 3)], [(2, 3), (1, 9)]), strict=True):
        result = register(fixed, moving, [stage], callback=callback)
        for level, (scale, size) in zip(result.stages[0].levels, expected, strict=True):
            assert level.scale == scale
            images = (downsample(v.batched(), level.shape) for v in (moving, fixed))
            counts = np.zeros(level.shape, np.float32)
            counts[(slice(1, -1),) * 2 if scale > 1 else ...] = 1  # a smoothed edge is no data
            loss = lncc_loss(*images, kernel_size=size, mask=counts[None, None])
            np.testing.assert_allclose(level.losses[0], loss, rtol=1e-4)
        assert result.stages[0].settings.metric == metric


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scales": (4, 2), "iterations": (10,)}, "iterations: expected a count for each"),
        ({"scales": (0.5,), "iterations": (10,)}, "scales: expected numbers of at least 1"),
        ({"learning_rate": 0}, "learning_rate: expected a positive number, got 0"),
        ({"window": 1}, "window: expected an integer of at least 2, got 1"),
        ({"tolerance": -1}, "tolerance: expected at least 0, got -1"),
        ({"block": 0}, "block: expected an integer of at least 1, got 0"),
        ({"block": 2.5}, "block: expected an integer of at least 1, got 2.5"),
        ({"scales": 1, "iterations": 10}, "scales: expected a number for each level, got 1"),
        ({"scales": (1,), "iterations": (2.5,)}, "iterations: expected a count for each"),
    ],
)
@pytest.mark.parametrize("stage", [Affine, Greedy])
def test_settings_out_of_range_are_refused(stage: type, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stage(**settings)


def test_settings_of_a_field_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="gradient_sigma: expected at least 0, got -1"):
        Greedy(gradient_sigma=-1)
    with pytest.raises(ValueError, match="beta2: expected 0 <= beta2 < 1, got 1"):
        Greedy(beta2=1)
    with pytest.raises(ValueError, match="epsilon: expected a positive number, got 0"):
        Greedy(epsilon=0)
    with pytest.raises(ValueError, match="num_steps: expected an integer from 0 to 64, got 65"):
        SVF(num_steps=65)
    with pytest.raises(ValueError, match="scale: expected a number of at least 1"):
        Moments(scale=0)
