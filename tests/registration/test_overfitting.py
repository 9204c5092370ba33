"""What keeps a registration from matching what is no anatomy: noise, and details of one image."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scenes import header, physical_grid, scene, smooth_field

from jaxreg import compose, convert_displacement, interpolate, lncc_loss
from jaxreg.registration import (
    FFD,
    LNCC,
    MSE,
    NCC,
    SVF,
    Affine,
    Bending,
    CoarseToFine,
    Elasticity,
    Greedy,
    Moments,
    SyN,
    mse_loss,
    preset,
    register,
)
from jaxreg.registration.stages.diffeomorphic import through_warp

DEFORMABLE = [Greedy, SVF, SyN, FFD]
SHAPE = (36, 40)


def textured(seed: int = 1) -> np.ndarray:
    """The scene with texture in one half; the other has little contrast."""
    noise = jax.random.normal(jax.random.key(seed), (1, 1, *(n // 3 for n in SHAPE)))
    texture = np.array(interpolate(noise, out_shape=SHAPE))[0, 0]
    texture[:, 22:] *= 0.05
    return scene(physical_grid(header(SHAPE, (5, 5)))) + 0.3 * texture


@pytest.mark.parametrize("stage", DEFORMABLE)
def test_with_noise_the_defaults_find_the_deformation_better_than_similarity_alone(
    stage: type,
) -> None:
    grid = header(SHAPE, (5, 5))
    warp = smooth_field(SHAPE, 1.0, seed=3)
    image = jnp.asarray(textured()[None, None], jnp.float32)
    warped = interpolate(image, grid=warp, padding_mode="border")
    noise = np.random.default_rng(0)
    moving, fixed = (
        grid.with_array(np.asarray(x)[0, 0] + 0.05 * noise.standard_normal(SHAPE))
        for x in (image, warped)
    )
    errors, spreads = [], []
    for settings in (
        {},
        {"regularisation": None, "metric": LNCC(common_variance=0)},
    ):
        result = register(fixed, moving, [stage((2, 1), (40, 40), tolerance=0, **settings)])
        error = convert_displacement(result.transform.displacement - warp, "normalised", "voxel")
        errors.append(float(jnp.linalg.norm(error, axis=-1).mean()))
        spreads.append(float(np.log(result.jacobian).std()))
    assert errors[0] < 0.8 * errors[1]
    assert spreads[0] < 0.6 * spreads[1]


@pytest.mark.parametrize("stage", DEFORMABLE)
def test_a_regularisers_weight_fits_metrics_of_any_size(stage: type) -> None:
    """The same images in another unit, whose mean squared difference is a million times larger."""
    grid = header((20, 24), (5, 5))
    points = physical_grid(grid)
    arrays = scene(points), scene(points + 4)

    def distance(pred: jax.Array, target: jax.Array) -> jax.Array:
        return mse_loss(pred, target)

    for metric in (MSE(), distance):
        fields = []
        for unit in (1.0, 1000.0):
            fixed, moving = (grid.with_array(unit * x) for x in arrays)
            settings = stage((1,), (20,), metric=metric, tolerance=0)
            fields.append(register(fixed, moving, [settings]).transform.displacement)
        assert jnp.abs(fields[0]).max() > 0.05
        np.testing.assert_allclose(*fields, atol=2e-3)


def test_lncc_does_not_depend_on_the_unit_of_either_image() -> None:
    grid = header((20, 24), (5, 5))
    points = physical_grid(grid)
    arrays = scene(points), scene(points + 4)
    losses = []
    for units in ((1, 1), (1000, 1e-3)):
        fixed, moving = (grid.with_array(u * x + u) for u, x in zip(units, arrays, strict=True))
        result = register(fixed, moving, [Greedy((1,), (10,), tolerance=0)])
        losses.append(result.stages[0].levels[0].losses)
    np.testing.assert_allclose(*losses, rtol=1e-3)


def test_the_unit_of_lncc_is_the_typical_contrast_of_a_window() -> None:
    """The geometric mean of the standard deviations in blocks that are not empty."""
    image = np.zeros((21, 28), np.float32)
    image[:, 7:] = np.random.default_rng(0).standard_normal((21, 21)) * np.repeat([1, 2, 4], 7)
    blocks = image[:, 7:].reshape(3, 7, 3, 7).std(axis=(1, 3))
    expected = np.exp(np.log(blocks).mean())
    metric = LNCC(7)
    np.testing.assert_allclose(
        np.squeeze(metric.unit(image[None, None], None)), expected, rtol=1e-5
    )
    left_out = np.ones((1, 1, 21, 28), np.float32)
    left_out[..., 14:] = 0
    np.testing.assert_allclose(
        np.squeeze(metric.unit(image[None, None], left_out)),
        np.exp(np.log(blocks[:, 0]).mean()),
        rtol=1e-5,
    )
    pair = image[None, None], image[None, None, ::-1]
    units = (metric.unit(x, None) for x in pair)
    scaled = [x / u for x, u in zip(pair, units, strict=True)]
    np.testing.assert_allclose(
        metric.loss(*pair, None),
        lncc_loss(*scaled, kernel_size=7, smooth_dr=1e-18, common_variance=0.5, both_flat=1),
        rtol=1e-5,
    )
    assert np.squeeze(metric.unit(0 * pair[0] + 3, None)) == 1  # nothing varies


@pytest.mark.parametrize("variance", [-1.0, float("nan"), float("inf")])
def test_a_common_variance_is_at_least_zero(variance: float) -> None:
    with pytest.raises(ValueError, match=f"common_variance: expected at least 0, got {variance}"):
        LNCC(common_variance=variance)


@pytest.mark.parametrize("shape", [(7, 8), (5, 6, 7), (1, 6, 7)])
def test_the_gradient_through_a_warp_is_that_of_composing_a_step(shape: tuple[int, ...]) -> None:
    """Of a linear displacement, of which every difference is the derivative."""
    ndim = len(shape)
    random = np.random.default_rng(0)
    axes = [np.linspace(-1, 1, n) if n > 1 else np.zeros(1) for n in shape]
    points = np.stack(np.meshgrid(*axes, indexing="ij")[::-1], -1)
    matrix = 0.2 * random.standard_normal((ndim, ndim))
    matrix[:, np.array(shape[::-1]) == 1] = 0
    displacement = jnp.asarray((points @ matrix.T)[None], jnp.float32)
    weights = jnp.asarray(random.standard_normal(displacement.shape), jnp.float32)

    def of_step(step: jax.Array) -> jax.Array:
        return (weights * compose(displacement, step)).sum()

    expected = jax.grad(of_step)(jnp.zeros_like(displacement))
    actual = through_warp(displacement, weights)
    inside = (slice(None), *(slice(1, -1) if n > 1 else slice(None) for n in shape))
    np.testing.assert_allclose(actual[inside], expected[inside], atol=1e-5)


def test_a_metric_changes_where_the_images_are_nearly_aligned() -> None:
    metric = CoarseToFine(fine=LNCC(5))
    assert metric.for_scale(4) == NCC()
    assert metric.for_scale(2) == metric.for_scale(1) == LNCC(5)
    assert CoarseToFine("ncc", "lncc") == CoarseToFine()
    grid = header((36, 40), (5, 5))
    points = physical_grid(grid)
    fixed, moving = grid.with_array(scene(points)), grid.with_array(2 + 3 * scene(points + 6))
    stage = Affine((4, 2, 1), (40, 30, 20), metric=metric)
    result = register(fixed, moving, [Moments(), stage])
    shift = result.transform.matrix[:-1, -1]
    np.testing.assert_allclose(shift, -6, atol=0.2)
    each = [dataclasses.replace(stage, scales=(s,), iterations=(1,)) for s in stage.scales]
    first = [register(fixed, moving, [one]).stages[0].levels[0].losses[0] for one in each]
    assert first[0] < first[1]  # the global correlation, and then the local one


def test_a_preset_stops_before_anything_is_deformed() -> None:
    for device in ("cpu", "gpu"):
        stages = preset("affine", device=device)
        assert stages == preset("default", device=device)[:-1]
        assert [stage.name for stage in stages] == ["moments", "affine"]


def test_the_default_deformations_are_held_back() -> None:
    for stage in DEFORMABLE:
        penalty = Bending if stage is FFD else Elasticity
        assert isinstance(stage().regularisation, penalty)
        assert stage(regularisation=None).regularisation is None
