"""The pyramid: images and fields on coarser and finer grids."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreg.registration import (
    downsample,
    level_shape,
    resize_field,
)


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
