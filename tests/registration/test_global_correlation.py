"""``ncc``: the correlation of two images as a whole."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreg.registration import (
    ncc,
    ncc_loss,
)


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
