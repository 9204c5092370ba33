"""``convert_displacement``: displacements in normalised units, voxels and millimetres."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import reference
from backends import Backend
from inputs import SHAPES, assert_close, assert_same, random_array

UNITS = ["normalised", "voxel", "mm"]
SPACING = (0.5, 2.0, 3.5)


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize(("source", "target"), list(itertools.product(UNITS, UNITS)))
def test_every_pair_of_units_has_the_reference_values_and_gradient(
    backend: Backend, source: str, target: str, align_corners: bool
) -> None:
    field = random_array(0, 2, *SHAPES[3], 3)
    options = {"spacing": SPACING, "align_corners": align_corners}
    args = (field, source, target)
    expected = reference.convert_displacement(*args, **options)
    cotangent = random_array(1, *field.shape)
    value, (gradient,) = backend.value_and_vjp(
        "convert_displacement", args, cotangent, (0,), **options
    )
    assert_close(value, expected, np.float64)
    # A diagonal matrix: the gradient is the conversion itself.
    expected_gradient = reference.convert_displacement(cotangent, source, target, **options)
    assert_close(gradient, expected_gradient, np.float64)


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize(
    ("source_channels", "target_channels"), list(itertools.product(["first", "last"], repeat=2))
)
def test_components_move_between_the_first_and_the_last_axis(
    backend: Backend, source_channels: str, target_channels: str, dim: int
) -> None:
    shape = SHAPES[dim]
    shape = (2, dim, *shape) if source_channels == "first" else (2, *shape, dim)
    field = random_array(0, *shape, dtype=np.float32)
    options = {"source_channels": source_channels, "target_channels": target_channels}
    args = (field, "normalised", "voxel")
    expected = reference.convert_displacement(*args, **options)
    cotangent = random_array(1, *expected.shape, dtype=np.float32)
    value, (gradient,) = backend.value_and_vjp(
        "convert_displacement", args, cotangent, (0,), **options
    )
    assert_close(value, expected, np.float32)
    (expected_gradient,) = reference.vjp_by_central_differences(
        lambda f: reference.convert_displacement(f, *args[1:], **options),
        (field,),
        cotangent,
        (0,),
        step=1.0,  # linear: a large step is exact
    )
    assert_close(gradient, expected_gradient, np.float32)


@pytest.mark.parametrize("align_corners", [True, False])
def test_half_the_volume_is_one_normalised_unit(backend: Backend, align_corners: bool) -> None:
    one = np.ones((1, 5, 9, 21, 3), np.float32)
    voxels = backend.call(
        "convert_displacement", one, "normalised", "voxel", align_corners=align_corners
    )
    half = [10, 4, 2] if align_corners else [10.5, 4.5, 2.5]
    assert_same(voxels, np.broadcast_to(np.float32(half), one.shape))


def test_spacing_is_in_x_y_z_order(backend: Backend) -> None:
    one = np.ones((1, 2, 3, 4, 3), np.float32)
    mm = backend.call("convert_displacement", one, "voxel", "mm", spacing=(2.0, 0.5, 4.0))
    assert_same(mm, np.broadcast_to(np.float32([2, 0.5, 4]), one.shape))


@pytest.mark.parametrize("unit", UNITS)
def test_the_same_unit_and_layout_return_the_field_bit_for_bit(backend: Backend, unit: str) -> None:
    field = random_array(0, 2, 3, 4, 2, dtype=np.float32)
    assert_same(backend.call("convert_displacement", field, unit, unit, spacing=(0.7, 1.3)), field)


@pytest.mark.parametrize("align_corners", [True, False])
def test_an_axis_of_one_voxel_counts_as_one_voxel_long(
    backend: Backend, align_corners: bool
) -> None:
    field = random_array(0, 1, 1, 4, 1, 3)
    voxels = backend.call(
        "convert_displacement", field, "normalised", "voxel", align_corners=align_corners
    )
    expected = reference.convert_displacement(
        field, "normalised", "voxel", align_corners=align_corners
    )
    assert_close(voxels, expected, np.float64)
    back = backend.call(
        "convert_displacement", voxels, "voxel", "normalised", align_corners=align_corners
    )
    assert_close(back, field, np.float64)


def test_spacing_is_needed_for_millimetres_only(backend: Backend) -> None:
    field = random_array(0, 1, 4, 5, 2)
    backend.call("convert_displacement", field, "normalised", "voxel")
    for source, target in [("mm", "voxel"), ("normalised", "mm")]:
        with pytest.raises(ValueError, match="spacing"):
            backend.call("convert_displacement", field, source, target)


def test_an_empty_batch_gives_an_empty_result(backend: Backend) -> None:
    field = np.zeros((0, 4, 5, 2), np.float32)
    args = (field, "normalised", "voxel")
    converted = backend.call("convert_displacement", *args, target_channels="first")
    assert_same(converted, np.zeros((0, 2, 4, 5), np.float32))
