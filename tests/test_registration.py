"""``jaxreg.registration``: pyramids, physical space, and transforms that are known beforehand."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from scenes import as_image, header, physical_grid, scene

from jaxreg import compose, convert_displacement, interpolate, lncc_loss
from jaxreg.registration import (
    AdamMoments,
    Affine,
    Greedy,
    Progress,
    Volume,
    align_centres_of_mass,
    downsample,
    level_shape,
    ncc,
    ncc_loss,
    register,
    register_affine,
    resample,
    resize_field,
    riemannian_adam_step,
    rigid_motion,
    step_gradient,
    write_displacement,
)


def similarity(fixed: Volume, other: Volume) -> float:
    return float(ncc(other.batched(), fixed.batched())[0, 0])


# --- pyramid ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(33, 20), (21, 16, 25), (1, 24, 40)])
@pytest.mark.parametrize("factor", [1, 1.5, 2, 3])
def test_the_pyramid_of_a_linear_ramp_is_the_same_ramp(
    shape: tuple[int, ...], factor: float
) -> None:
    def ramp(shape: tuple[int, ...]) -> np.ndarray:
        axes = [np.linspace(-1, 1, n) if n > 1 else np.zeros(1) for n in shape]
        slopes = (0.7, -1.3, 2.1)
        return sum(s * a for s, a in zip(slopes, np.meshgrid(*axes, indexing="ij"), strict=False))

    coarse = level_shape(shape, factor, minimum=4)
    level = downsample(jnp.asarray(ramp(shape), jnp.float32)[None, None], coarse)
    np.testing.assert_allclose(level[0, 0], ramp(coarse), atol=1e-5)


def test_the_pyramid_keeps_out_what_a_level_cannot_show() -> None:
    stripes = jnp.asarray(np.indices((64, 64))[1] % 2, jnp.float32)[None, None]
    level = downsample(stripes, (22, 22))
    assert float(level[..., 3:-3].std()) < 0.02
    assert float(stripes[..., ::3].std()) > 0.4  # what leaving voxels out would show


def test_the_full_resolution_is_left_alone() -> None:
    image = jax.random.normal(jax.random.key(0), (1, 1, 9, 8))
    np.testing.assert_array_equal(downsample(image, (9, 8)), image)


def test_a_level_keeps_short_axes() -> None:
    assert level_shape((101, 20, 10), 4, minimum=16) == (26, 16, 10)
    assert level_shape((83, 101, 88), 1) == (83, 101, 88)


def test_a_pyramid_only_gets_coarser() -> None:
    with pytest.raises(ValueError, match="factor"):
        level_shape((10, 10), 0.5)
    with pytest.raises(ValueError, match="shape"):
        downsample(jnp.zeros((1, 1, 8, 8)), (9, 8))


def test_a_constant_displacement_keeps_its_numbers_on_every_grid() -> None:
    field = jnp.broadcast_to(jnp.asarray([0.1, -0.2, 0.3]), (1, 6, 7, 8, 3))
    resized = resize_field(field, (11, 13, 15))
    assert resized.shape == (1, 11, 13, 15, 3)
    np.testing.assert_allclose(resized, np.broadcast_to(field[0, 0, 0, 0], resized.shape), 1e-6)


# --- similarity ---------------------------------------------------------------------------------


def test_ncc_is_pearsons_correlation_and_ignores_gain_and_offset() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 2, 3, 6, 7)).astype(np.float32)
    expected = [[np.corrcoef(x.ravel(), y.ravel())[0, 1] for x, y in zip(*p)] for p in zip(a, b)]  # noqa: B905
    np.testing.assert_allclose(ncc(a, b), expected, atol=1e-6)
    np.testing.assert_allclose(ncc(3 * a + 5, -2 * b + 1), -np.array(expected), atol=1e-5)
    assert float(ncc_loss(a, a)) == pytest.approx(-1)


def test_ncc_sees_only_what_the_mask_leaves() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(2, 1, 1, 8, 8)).astype(np.float32)
    mask = np.zeros((1, 1, 8, 8), np.float32)
    mask[..., :5] = 1
    np.testing.assert_allclose(ncc(a, b, mask), ncc(a[..., :5], b[..., :5]), rtol=1e-5)
    assert float(ncc(a, b, 0 * mask)[0, 0]) == 0


def test_a_constant_image_has_no_correlation_and_no_gradient() -> None:
    image = jax.random.normal(jax.random.key(0), (1, 1, 6, 6))
    value, gradient = jax.value_and_grad(ncc_loss)(jnp.ones_like(image), image)
    assert float(value) == 0
    np.testing.assert_array_equal(gradient, np.zeros_like(image))


# --- affine -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [2, 3])
def test_an_affine_known_by_construction_is_recovered(dim: int) -> None:
    fixed = header((40, 44, 36)[-dim:], (3.5, 3, 4)[:dim])
    fixed = fixed.with_array(scene(physical_grid(fixed)))
    truth = rigid_motion(18, (0, 0, 1), (12, -9, 7), (5, 5, 5))
    truth = truth @ np.diag([1.1, 0.93, 1.05, 1])
    truth = truth[np.ix_([*range(dim), 3], [*range(dim), 3])]
    # Another size, spacing, origin and direction; the same scene seen through the transform.
    moving = header((44, 38, 46)[-dim:], (3.3, 4, 3.4)[:dim], turn=25)
    moving = dataclasses.replace(moving, origin=moving.origin + truth[:-1, -1])
    inverse = np.linalg.inv(truth)
    points = physical_grid(moving) @ inverse[:-1, :-1].T + inverse[:-1, -1]
    moving = moving.with_array(7 * scene(points))

    found, losses = register_affine(fixed, moving, Affine((2, 1), (80, 80)))

    inner = 0.5 * physical_grid(fixed).reshape(-1, dim)
    error = inner @ (found - truth)[:-1, :-1].T + (found - truth)[:-1, -1]
    assert np.linalg.norm(error, axis=1).max() < 0.5  # mm, of voxels 3 to 4 mm wide
    assert losses.shape == (160,)
    assert losses[-1] < -0.9999


def test_an_affine_stage_starts_where_it_is_told() -> None:
    fixed = header((12, 14, 16), (8, 8, 8))
    fixed = fixed.with_array(scene(physical_grid(fixed)))
    initial = rigid_motion(5, (1, 0, 0), (2, 3, 4), (0, 0, 0))
    found, losses = register_affine(fixed, fixed, Affine((1,), (0,)), initial=initial)
    np.testing.assert_allclose(found, initial, atol=1e-4)
    assert losses.size == 0
    np.testing.assert_array_equal(align_centres_of_mass(fixed, fixed), np.eye(4))


# --- greedy -------------------------------------------------------------------------------------


def smooth_field(shape: tuple[int, ...], amplitude: float, seed: int) -> jax.Array:
    """A random smooth displacement, ``(1, [Z,] Y, X, D)``, at most ``amplitude`` voxels."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(-amplitude, amplitude, (1, *(5 for _ in shape), len(shape)))
    field = resize_field(jnp.asarray(coarse, jnp.float32), shape)
    return convert_displacement(field, "voxel", "normalised")


@pytest.mark.parametrize("dim", [2, 3])
def test_the_gradient_is_that_of_composing_a_step_from_the_right(dim: int) -> None:
    shape = (36, 40, 44)[-dim:]
    fixed = header(shape, (4, 4, 4)[:dim])
    moving_image = jnp.asarray(scene(physical_grid(fixed) * 0.6), jnp.float32)[None, None]
    fixed_image = jnp.asarray(scene(physical_grid(fixed) * 0.66), jnp.float32)[None, None]
    field = smooth_field(shape, 2.0, seed=1)
    affine = jnp.eye(dim, dim + 1)[None] * 0.95

    def loss_after(step: jax.Array) -> jax.Array:
        warp = compose(field, step)
        return ncc_loss(interpolate(moving_image, affine, warp, affine_last=True), fixed_image)

    moved = interpolate(moving_image, affine, field, affine_last=True)
    gradient = step_gradient(moved, jax.grad(ncc_loss)(moved, fixed_image))
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
    moments = AdamMoments.zeros(shape)
    for _ in range(3):
        step, moments = riemannian_adam_step(gradient, moments, learning_rate=0.4)
    lengths = jnp.linalg.norm(convert_displacement(step, "normalised", "voxel"), axis=-1)
    np.testing.assert_allclose(lengths.max(axis=(1, 2, 3)), 0.2, rtol=1e-5)  # each batch item
    assert float((gradient * step).sum()) < 0
    assert int(moments.steps) == 3


def test_without_a_gradient_there_is_no_step() -> None:
    shape = (1, 5, 6, 2)
    step, _ = riemannian_adam_step(jnp.zeros(shape), AdamMoments.zeros(shape), learning_rate=1.0)
    np.testing.assert_array_equal(step, np.zeros(shape))


@pytest.mark.parametrize(("loss", "least"), [("ncc", 0.999), ("lncc", 0.995)])
@pytest.mark.parametrize("dim", [2, 3])
def test_the_greedy_stage_raises_the_similarity_and_does_not_fold(
    dim: int, loss: str, least: float
) -> None:
    fixed = header((44, 48, 40)[-dim:], (3.2, 3, 3.5)[:dim])
    points = physical_grid(fixed)
    fixed = fixed.with_array(scene(points))
    bend = 6 * np.sin(points[..., ::-1] / 18)
    moving = fixed.with_array(scene(points + bend))
    before = similarity(fixed, moving)

    blocks: list[Progress] = []
    stage = Greedy((2, 1), (30, 25), loss=loss)
    result = register(fixed, moving, [stage], callback=blocks.append)

    assert before < 0.97
    assert similarity(fixed, result.moved) > least
    assert result.folds.share == 0
    assert result.folds.minimum > 0.1
    assert [b.done for b in blocks] == [10, 20, 30, 40, 50, 55]
    assert {b.total for b in blocks} == {55}
    assert result.stages[0].losses.shape == (55,)


@pytest.mark.parametrize("stage", [Affine, Greedy])
def test_a_stage_minimises_the_loss_that_it_is_given(stage: type) -> None:
    fixed = header((24, 28), (5, 5))
    fixed = fixed.with_array(scene(physical_grid(fixed)))
    moving = fixed.with_array(scene(physical_grid(fixed) + 5))
    images = moving.batched(), fixed.batched()

    def squares(pred: jax.Array, target: jax.Array) -> jax.Array:
        return ((pred - target) ** 2).mean()

    for settings, loss in (
        (stage((1,), (1,), loss="ncc"), ncc_loss(*images)),
        (stage((1,), (1,), loss="lncc"), lncc_loss(*images, kernel_size=7)),
        (stage((1,), (1,), loss="lncc", kernel_size=5), lncc_loss(*images, kernel_size=5)),
        (stage((1,), (1,), loss=squares), squares(*images)),
    ):
        result = register(fixed, moving, [settings], initial=np.eye(3))
        np.testing.assert_allclose(result.stages[0].losses, [loss], rtol=1e-4)


def test_the_same_input_gives_the_same_bits() -> None:
    fixed = header((24, 28), (5, 5))
    fixed = fixed.with_array(scene(physical_grid(fixed)))
    moving = fixed.with_array(scene(physical_grid(fixed) + 5))
    stages = [Affine((1,), (15,)), Greedy((1,), (15,))]
    first, second = (register(fixed, moving, stages) for _ in range(2))
    np.testing.assert_array_equal(first.transform, second.transform)
    np.testing.assert_array_equal(first.displacement, second.displacement)


def test_simpleitk_resampling_through_our_field_gives_our_moved_image(tmp_path: Path) -> None:
    fixed = header((30, 32, 28), (4, 4.5, 5), turn=15)
    fixed = fixed.with_array(scene(physical_grid(fixed)))
    moving = header((34, 30, 36), (4.2, 4, 4), turn=-30)
    moving = moving.with_array(scene(physical_grid(moving) @ np.diag([1.1, 0.9, 1]) + [4, -6, 5]))
    result = register(fixed, moving, [Affine((1,), (20,)), Greedy((1,), (20,))])
    path = tmp_path / "displacement.nii.gz"
    write_displacement(result.displacement_field(), fixed, path)

    field = sitk.ReadImage(str(path), sitk.sitkVectorFloat64)
    assert field.GetNumberOfComponentsPerPixel() == 3
    transform = sitk.DisplacementFieldTransform(field)
    moved = sitk.Resample(as_image(moving), as_image(fixed), transform, sitk.sitkLinear, 0.0)
    ones = resample(
        moving.with_array(np.ones(moving.shape)), fixed, result.transform, result.displacement
    )
    inside = ones.array > 0.999
    difference = np.abs(sitk.GetArrayFromImage(moved) - result.moved.array)[inside]
    assert inside.mean() > 0.5
    assert difference.max() < 1e-4 * np.ptp(moving.array)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([Greedy(), Affine()], "stages: expected"),
        ([Affine(), Affine()], "stages: expected"),
    ],
)
def test_stages_that_cannot_follow_each_other_are_refused(stages: list, message: str) -> None:
    volume = Volume.create(np.zeros((4, 4, 4)))
    with pytest.raises(ValueError, match=message):
        register(volume, volume, stages)


def test_volumes_of_different_dimension_are_refused() -> None:
    with pytest.raises(ValueError, match="moving: expected 2 dimensions"):
        register(Volume.create(np.zeros((4, 4))), Volume.create(np.zeros((4, 4, 4))))


@pytest.mark.parametrize("stage", [Affine, Greedy])
def test_a_loss_that_there_is_not_is_refused(stage: type) -> None:
    with pytest.raises(ValueError, match=r"loss: expected .* got 'mutual'"):
        stage(loss="mutual")
    for size in (8, 1, 33):
        with pytest.raises(ValueError, match=f"kernel_size: expected an odd .* got {size}"):
            stage(loss="lncc", kernel_size=size)


@pytest.mark.parametrize("stage", [Affine, Greedy])
def test_a_stage_needs_a_count_for_each_scale(stage: type) -> None:
    with pytest.raises(ValueError, match="iterations"):
        stage((4, 2), (10,))
    with pytest.raises(ValueError, match="scales"):
        stage((0.5,), (10,))
