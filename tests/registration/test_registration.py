"""``jaxreg.registration``: pyramids, global correlation, and a registration seen by SimpleITK."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from scenes import as_image, header, physical_grid, scene

from jaxreg.registration import (
    Affine,
    Greedy,
    downsample,
    level_shape,
    ncc,
    ncc_loss,
    register,
    resize_field,
)
from regkernels import write_displacement

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


# --- a whole registration, seen by others ---------------------------------------------------------


def test_simpleitk_resampling_through_our_field_gives_our_moved_image(tmp_path: Path) -> None:
    fixed = header((30, 32, 28), (4, 4.5, 5), turn=15)
    fixed = fixed.with_array(scene(physical_grid(fixed)))
    moving = header((34, 30, 36), (4.2, 4, 4), turn=-30)
    moving = moving.with_array(scene(physical_grid(moving) @ np.diag([1.1, 0.9, 1]) + [4, -6, 5]))
    result = register(fixed, moving, [Affine((1,), (20,)), Greedy((1,), (20,))])
    path = tmp_path / "displacement.nii.gz"
    write_displacement(result.transform.displacement_field(with_affine=True), fixed, path)

    field = sitk.ReadImage(str(path), sitk.sitkVectorFloat64)
    assert field.GetNumberOfComponentsPerPixel() == 3
    transform = sitk.DisplacementFieldTransform(field)
    moved = sitk.Resample(as_image(moving), as_image(fixed), transform, sitk.sitkLinear, 0.0)
    ones = result.transform.apply(moving.with_array(np.ones(moving.shape)))
    inside = ones.array > 0.999
    difference = np.abs(sitk.GetArrayFromImage(moved) - result.moved.array)[inside]
    assert inside.mean() > 0.5
    assert difference.max() < 1e-4 * np.ptp(moving.array)
