"""``spline_coefficients``: those of the cubic B-spline that passes through all values."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import reference
import scipy.ndimage
from backends import Backend
from inputs import HALVES, SHAPES, assert_close, random_array

PADDINGS = ["zeros", "border", "reflection"]
DTYPES = [np.float32, np.float64]
CONTINUATIONS = [{"padding_mode": p, "align_corners": a} for p in PADDINGS for a in (True, False)]


def check_values_and_gradients(
    backend: Backend, image: np.ndarray, options: dict[str, Any], dtype: object
) -> None:
    expected = reference.spline_coefficients(image, **options)
    cotangent = random_array(99, *expected.shape, dtype=dtype)
    value, (gradient,) = backend.value_and_vjp(
        "spline_coefficients", (image,), cotangent, [0], **options
    )
    assert_close(value, expected, dtype)
    expected = reference.spline_coefficients_vjp(cotangent, image, **options)
    assert_close(gradient, expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("options", CONTINUATIONS, ids=str)
def test_every_continuation_has_the_reference_values_and_gradients(
    backend: Backend, options: dict[str, Any], dim: int, dtype: object
) -> None:
    image = random_array(0, 2, 3, *SHAPES[dim], dtype=dtype)
    check_values_and_gradients(backend, image, options, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(40, 70), (3, 40, 70), (41, 2, 37)])
@pytest.mark.parametrize("channel_last", [True, False])
def test_long_lines_have_the_reference_values_and_gradients(
    backend: Backend, channel_last: bool, shape: tuple[int, ...], dtype: object
) -> None:
    """Longer than the table of pivots, and more of them than are solved for together."""
    size = (2, *shape, 3) if channel_last else (2, 3, *shape)
    image = random_array(0, *size, dtype=dtype)
    for options in CONTINUATIONS:
        options = options | {"channel_last": channel_last}
        check_values_and_gradients(backend, image, options, dtype)


@pytest.mark.parametrize("sizes", list(itertools.product([1, 2, 3, 19, 20, 21, 22], [1, 2, 5])))
def test_short_lines(backend: Backend, sizes: tuple[int, ...]) -> None:
    image = random_array(0, 1, 1, *sizes)
    for options in CONTINUATIONS:
        check_values_and_gradients(backend, image, options, np.float64)


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize(("align_corners", "mode"), [(True, "mirror"), (False, "reflect")])
def test_they_are_those_of_scipy(
    backend: Backend, mode: str, align_corners: bool, dim: int
) -> None:
    image = random_array(0, 1, 1, *{2: (17, 19), 3: (16, 17, 18)}[dim])
    expected = scipy.ndimage.spline_filter(image[0, 0], mode=mode)
    found = backend.call(
        "spline_coefficients", image, padding_mode="reflection", align_corners=align_corners
    )
    np.testing.assert_allclose(found[0, 0], expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_becomes_float32(backend: Backend, dtype: object) -> None:
    image = random_array(0, 1, 2, 5, 6, dtype=dtype)
    expected = reference.spline_coefficients(image.astype(np.float32))
    cotangent = random_array(1, *image.shape, dtype=np.float32)
    value, (gradient,) = backend.value_and_vjp("spline_coefficients", (image,), cotangent, [0])
    assert_close(value, expected, np.float32)
    assert_close(gradient, reference.spline_coefficients_vjp(cotangent, image), dtype)


def test_a_constant_keeps_its_value_where_it_continues(backend: Backend) -> None:
    image = np.full((1, 1, 6, 7), 3.0)
    for options in CONTINUATIONS[2:]:
        assert_close(backend.call("spline_coefficients", image, **options), image, np.float64)


def test_an_empty_batch_and_no_channels_give_empty_results(backend: Backend) -> None:
    for size in ((0, 2, 4, 5), (2, 0, 4, 5)):
        image = np.zeros(size, np.float32)
        value, (gradient,) = backend.value_and_vjp("spline_coefficients", (image,), image, [0])
        assert value.shape == gradient.shape == size
