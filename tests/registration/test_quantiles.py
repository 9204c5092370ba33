"""Quantiles that are found without sorting are those of sorted values, to the last bit."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreg.registration.quantiles import quantiles

SHARES = (0.0, 1e-4, 0.01, 1 / 3, 0.5, 0.99, 1.0)


def values(kind: str, count: int) -> np.ndarray:
    """Two rows of numbers."""
    rng = np.random.default_rng(count)
    found = rng.normal(0, 100, (2, count)).astype(np.float32)
    if kind == "rounded":
        return np.round(found)  # with many that are equal, and zeros of both signs
    if kind == "huge":
        found = found * np.float32(1e35)
        found[0, :: max(count // 3, 1)] = np.inf
        found[1, 0] = -np.inf
    if kind == "tiny":
        return found * np.float32(1e-42)  # not normalised
    if kind == "not numbers":
        found[1, count // 2] = np.nan
    return found


@pytest.mark.parametrize("kind", ["normal", "rounded", "huge", "not numbers"])
@pytest.mark.parametrize("count", [1, 2, 3, 100, 12655])
def test_quantiles_are_those_of_sorted_values(kind: str, count: int) -> None:
    array = values(kind, count)
    expected = jnp.quantile(array, jnp.asarray(SHARES, jnp.float32), axis=1)
    np.testing.assert_array_equal(quantiles(array, SHARES), expected)


def test_values_between_which_nothing_lies_are_values() -> None:
    # Some processors take what is not normalised for 0, and then sort it in any order.
    array = np.abs(values("tiny", 1001))
    found = np.asarray(quantiles(array, (0.0, 0.5, 1.0)))
    ordered = np.sort(array, axis=1)
    np.testing.assert_allclose(found, ordered[:, [0, 500, 1000]].T, rtol=0, atol=1.2e-38)


def test_integers_are_taken_as_numbers() -> None:
    array = np.arange(-500, 501, dtype=np.int16)[None]
    np.testing.assert_array_equal(quantiles(array, (0.0, 0.5, 1.0)), [[-500], [0], [500]])


def test_quantiles_of_many_items_are_those_of_each() -> None:
    array = np.stack([values("rounded", 100), values("not numbers", 100)])
    together = jax.vmap(lambda item: quantiles(item, SHARES))(array)
    for item, found in zip(array, together, strict=True):
        np.testing.assert_array_equal(found, quantiles(item, SHARES))
