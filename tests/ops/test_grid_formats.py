"""Fields in voxels, with components first or in z, y, x order, sampled as they are."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import reference
from backends import Backend
from inputs import assert_close, assert_same, random_array

Array = np.ndarray

FORMATS = [
    {"grid_unit": unit, "grid_channels": channels, "grid_components": components}
    for unit, channels, components in itertools.product(
        ["normalised", "voxel"], ["last", "first"], ["xyz", "zyx"]
    )
]
# A row is longer than what vector code takes at once on the CPU, and not a multiple of it.
SIZES = {2: (5, 41), 3: (3, 4, 37)}
IDS = ["-".join(each.values()) for each in FORMATS]


def by_hand(field: Array, unit: str, channels: str, components: str, corners: bool = True) -> Array:
    """A normalised field, components last in x, y, z order, in another format."""
    sizes = np.array(field.shape[1:-1][::-1], np.float64)
    if unit == "voxel":
        field = field * ((sizes - 1) / 2 if corners else sizes / 2).astype(field.dtype)
    if components == "zyx":
        field = field[..., ::-1]
    return np.ascontiguousarray(np.moveaxis(field, -1, 1) if channels == "first" else field)


@pytest.mark.parametrize("corners", [True, False])
@pytest.mark.parametrize("form", FORMATS, ids=IDS)
@pytest.mark.parametrize("dim", [2, 3])
def test_samples_and_gradients_are_those_of_the_converted_field(
    backend: Backend, dim: int, form: dict[str, Any], corners: bool
) -> None:
    """The same bits as with `convert_displacement`, and the values of the definition."""
    sizes = SIZES[dim]
    image = random_array(0, 2, 2, *sizes, dtype=np.float32)
    affine = np.eye(dim, dim + 1, dtype=np.float32)[None]
    affine = affine + 0.1 * random_array(1, *affine.shape, dtype=np.float32)
    plain = 0.3 * random_array(2, 2, *sizes, dim, dtype=np.float32)
    unit, channels, components = form.values()
    field = by_hand(plain, unit, channels, components, corners)
    cotangent = random_array(3, 2, 2, *sizes, dtype=np.float32)
    options = {"align_corners": corners, "padding_mode": "border"}
    expected = reference.interpolate(image, affine, plain, **options)
    value, gradients = backend.value_and_vjp(
        "interpolate", (image, affine, field), cotangent, (0, 1, 2), **form, **options
    )
    assert_close(value, expected, np.float32)

    convert = {
        "source_channels": channels,
        "source_components": components,
        "align_corners": corners,
    }
    converted = backend.call("convert_displacement", field, unit, "normalised", **convert)
    twin, others = backend.value_and_vjp(
        "interpolate", (image, affine, converted), cotangent, (0, 1, 2), **options
    )
    assert_same(value, twin)
    if backend.device == "cpu":
        assert_same(gradients[0], others[0])
    assert_same(gradients[1], others[1])
    (through,) = backend.vjp(
        "convert_displacement", (field, unit, "normalised"), others[2], (0,), **convert
    )
    assert_same(gradients[2], through)


@pytest.mark.parametrize("form", FORMATS, ids=IDS)
def test_labels_are_those_of_the_converted_field(backend: Backend, form: dict[str, Any]) -> None:
    labels = np.random.default_rng(0).integers(0, 9, (1, 1, *SIZES[3])).astype(np.int16)
    plain = 0.2 * random_array(2, 1, *SIZES[3], 3, dtype=np.float32)
    field = by_hand(plain, *form.values())
    expected = backend.call("interpolate_labels", labels, None, plain)
    actual = backend.call("interpolate_labels", labels, None, field, **form)
    # In voxels a field is rounded before it is normalised.
    assert np.mean(actual != expected) <= (0.01 if form["grid_unit"] == "voxel" else 0)


def test_coordinates_may_have_any_order(backend: Backend) -> None:
    image = random_array(0, 1, 1, 6, 40, dtype=np.float32)
    points = random_array(1, 1, 4, 35, 2, dtype=np.float32)
    expected = backend.call("interpolate", image, None, points, is_displacement=False)
    turned = np.ascontiguousarray(np.moveaxis(points[..., ::-1], -1, 1))
    options = {"grid_channels": "first", "grid_components": "zyx", "is_displacement": False}
    assert_same(backend.call("interpolate", image, None, turned, **options), expected)


@pytest.mark.parametrize("place", [{"affine_last": True}, {}])
def test_a_field_that_items_share_gets_the_sum_of_their_gradients(
    backend: Backend, place: dict[str, Any]
) -> None:
    image = random_array(0, 3, 1, 4, 37, dtype=np.float32)
    affine = np.eye(2, 3, dtype=np.float32)[None]
    field = 3 * random_array(2, 1, 2, 4, 37, dtype=np.float32)
    form = {"grid_unit": "voxel", "grid_channels": "first", "grid_components": "zyx"}
    cotangent = random_array(3, *image.shape, dtype=np.float32)
    (shared,) = backend.vjp("interpolate", (image, affine, field), cotangent, (2,), **form, **place)
    assert shared.shape == field.shape
    every = np.concatenate([field] * 3)
    (own,) = backend.vjp("interpolate", (image, affine, every), cotangent, (2,), **form, **place)
    assert_close(shared, own.sum(axis=0, keepdims=True), np.float32)


def test_a_zero_displacement_returns_the_image(backend: Backend) -> None:
    image = random_array(0, 1, 1, 5, 6, 40, dtype=np.float16)
    zero = np.zeros((1, 3, 5, 6, 40), np.float32)
    form = {"grid_unit": "voxel", "grid_channels": "first", "grid_components": "zyx"}
    assert_same(backend.call("interpolate", image, None, zero, **form), image)


def test_a_whole_voxel_shifts_the_image_along_the_axis_that_is_named(backend: Backend) -> None:
    image = random_array(0, 1, 1, 5, 6, 7, dtype=np.float32)
    shift = np.zeros((1, 3, 5, 6, 7), np.float32)
    shift[:, 0] = 1
    form: dict[str, Any] = {"grid_unit": "voxel", "grid_channels": "first"}
    for components, axis in (("zyx", 2), ("xyz", 4)):
        moved = backend.call(
            "interpolate",
            image,
            None,
            shift,
            padding_mode="border",
            grid_components=components,
            **form,
        )
        there = np.minimum(np.arange(image.shape[axis]) + 1, image.shape[axis] - 1)
        assert_close(moved, np.take(image, there, axis=axis), np.float32)


def test_what_does_not_fit_is_refused_by_name(backend: Backend) -> None:
    image = random_array(0, 1, 1, 5, 6, dtype=np.float32)
    last, first = np.zeros((1, 5, 6, 2), np.float32), np.zeros((1, 2, 5, 6), np.float32)
    with pytest.raises(ValueError, match=r"grid: expected shape \(N, 2, Y, X\)"):
        backend.call("interpolate", image, None, last, grid_channels="first")
    with pytest.raises(ValueError, match=r"grid: expected shape \(N, Y, X, 2\)"):
        backend.call("interpolate", image, None, first)
    with pytest.raises(ValueError, match=r"grid_unit: .* is_displacement is False"):
        backend.call("interpolate", image, None, last, grid_unit="voxel", is_displacement=False)
    for name in ("grid_unit", "grid_channels", "grid_components"):
        with pytest.raises(ValueError, match=name):
            backend.call("interpolate", image, None, last, **{name: "mm"})


@pytest.mark.parametrize(
    ("source", "target"), list(itertools.product(["xyz", "zyx"], ["xyz", "zyx"]))
)
@pytest.mark.parametrize("channels", list(itertools.product(["last", "first"], repeat=2)))
def test_components_change_their_order(
    backend: Backend, channels: tuple[str, str], source: str, target: str
) -> None:
    """And each keeps the factor of its own axis."""
    plain = random_array(0, 2, 3, 4, 5, 3, dtype=np.float32)
    given = by_hand(plain, "normalised", channels[0], source)
    expected = by_hand(plain, "voxel", channels[1], target)
    options = {
        "source_channels": channels[0],
        "target_channels": channels[1],
        "source_components": source,
        "target_components": target,
    }
    cotangent = random_array(1, *expected.shape, dtype=np.float32)
    args = (given, "normalised", "voxel")
    value, (gradient,) = backend.value_and_vjp(
        "convert_displacement", args, cotangent, (0,), **options
    )
    assert_close(value, expected, np.float32)
    # Linear, and diagonal but for the order: the sum of products is the same on both sides.
    np.testing.assert_allclose(np.vdot(gradient, given), np.vdot(cotangent, value), rtol=1e-4)
    swapped = {
        "source_channels": channels[1],
        "target_channels": channels[0],
        "source_components": target,
        "target_components": source,
    }
    assert_close(
        gradient,
        backend.call("convert_displacement", cotangent, "normalised", "voxel", **swapped),
        np.float32,
    )
