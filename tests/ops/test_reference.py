"""The reference agrees with what others compute, and its gradients with its own differences."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import reference
import scipy.ndimage
import torch
from inputs import (
    SHAPES,
    coordinates_of,
    off_grid_positions,
    random_affine,
    random_array,
    small_displacement,
)

MODES = ["bilinear", "nearest"]
PADDINGS = ["zeros", "border", "reflection"]


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("padding_mode", PADDINGS)
@pytest.mark.parametrize("mode", MODES)
def test_interpolation_and_its_gradients_are_those_of_grid_sample(
    mode: str, padding_mode: str, align_corners: bool, dim: int
) -> None:
    shape, out = SHAPES[dim], SHAPES[dim][::-1]
    image = random_array(0, 2, 3, *shape)
    warp = coordinates_of(off_grid_positions(1, 2, shape, out, reach=12), shape, align_corners)
    cotangent = random_array(2, 2, 3, *out)
    options = {"mode": mode, "padding_mode": padding_mode, "align_corners": align_corners}

    image_torch = torch.tensor(image, requires_grad=True)
    warp_torch = torch.tensor(warp, requires_grad=True)
    expected = torch.nn.functional.grid_sample(image_torch, warp_torch, **options)
    expected.backward(torch.tensor(cotangent))

    options["is_displacement"] = False
    actual = reference.interpolate(image, None, warp, **options)
    to_image, _, to_warp = reference.interpolate_vjp(cotangent, image, None, warp, **options)
    np.testing.assert_allclose(actual, expected.detach().numpy(), atol=1e-12)
    np.testing.assert_allclose(to_image, image_torch.grad.numpy(), atol=1e-12)
    np.testing.assert_allclose(to_warp, warp_torch.grad.numpy(), atol=1e-12)


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("padding_mode", PADDINGS)
def test_cubic_interpolation_and_its_gradients_are_those_of_grid_sample(
    padding_mode: str, align_corners: bool
) -> None:
    shape, out = SHAPES[2], SHAPES[2][::-1]
    image = random_array(0, 2, 3, *shape)
    warp = coordinates_of(off_grid_positions(1, 2, shape, out, reach=12), shape, align_corners)
    cotangent = random_array(2, 2, 3, *out)
    options = {"padding_mode": padding_mode, "align_corners": align_corners}
    leaves = [torch.tensor(x, requires_grad=True) for x in (image, warp)]
    expected = torch.nn.functional.grid_sample(*leaves, mode="bicubic", **options)
    expected.backward(torch.tensor(cotangent))
    options |= {"is_displacement": False, "mode": "cubic"}
    actual = reference.interpolate(image, None, warp, **options)
    to_image, _, to_warp = reference.interpolate_vjp(cotangent, image, None, warp, **options)
    np.testing.assert_allclose(actual, expected.detach().numpy(), atol=1e-12)
    np.testing.assert_allclose(to_image, leaves[0].grad.numpy(), atol=1e-12)
    np.testing.assert_allclose(to_warp, leaves[1].grad.numpy(), atol=1e-12)


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize(("align_corners", "scipy_mode"), [(True, "mirror"), (False, "reflect")])
def test_splines_are_those_of_map_coordinates(
    align_corners: bool, scipy_mode: str, dim: int
) -> None:
    """SciPy's coefficients with ``reflect`` are exact to 0.27 to the power of twice the length."""
    shape = {2: (17, 19), 3: (16, 17, 18)}[dim]
    image = random_array(0, 1, 1, *shape)
    position = off_grid_positions(1, 1, shape, shape, reach=8)
    points = np.moveaxis(position[0], -1, 0)[::-1]
    options = {"padding_mode": "reflection", "align_corners": align_corners}
    expected = scipy.ndimage.spline_filter(image[0, 0], mode=scipy_mode)
    actual = reference.spline_coefficients(image, **options)
    np.testing.assert_allclose(actual[0, 0], expected, atol=1e-9)
    expected = scipy.ndimage.map_coordinates(image[0, 0], points, order=3, mode=scipy_mode)
    warp = coordinates_of(position, shape, align_corners)
    options |= {"is_displacement": False, "mode": "b-spline"}
    actual = reference.interpolate(image, None, warp, **options)
    np.testing.assert_allclose(actual[0, 0], expected, atol=1e-9)


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("padding_mode", PADDINGS)
@pytest.mark.parametrize("mode", ["cubic", "b-spline"])
def test_cubic_gradients_are_the_differences_of_values(
    mode: str, padding_mode: str, align_corners: bool
) -> None:
    """Outside as well."""
    image, affine = random_array(0, 2, 2, 2, 3, 4), random_affine(1, 1, 3)
    grid, cotangent = 1.4 * random_array(2, 2, 3, 2, 3, 3), random_array(3, 2, 2, 3, 2, 3)
    options = {"mode": mode, "padding_mode": padding_mode, "align_corners": align_corners}
    expected = reference.vjp_by_central_differences(
        lambda *args: reference.interpolate(*args, **options),
        (image, affine, grid),
        cotangent,
        (0, 1, 2),
    )
    actual = reference.interpolate_vjp(cotangent, image, affine, grid, **options)
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, e, atol=1e-8)


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize(
    ("padding_mode", "align_corners", "scipy_mode"),
    [
        ("zeros", True, "grid-constant"),
        ("border", True, "nearest"),
        ("reflection", True, "mirror"),
        ("reflection", False, "reflect"),
    ],
)
def test_interpolation_is_that_of_map_coordinates(
    padding_mode: str, align_corners: bool, scipy_mode: str, dim: int
) -> None:
    shape = SHAPES[dim]
    image = random_array(0, 1, 1, *shape)
    position = off_grid_positions(1, 1, shape, shape, reach=8)
    expected = scipy.ndimage.map_coordinates(
        image[0, 0], np.moveaxis(position[0], -1, 0)[::-1], order=1, mode=scipy_mode
    )
    actual = reference.interpolate(
        image,
        None,
        coordinates_of(position, shape, align_corners),
        is_displacement=False,
        padding_mode=padding_mode,
        align_corners=align_corners,
    )
    np.testing.assert_allclose(actual[0, 0], expected, atol=1e-12)


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("affine_last", [True, False])
def test_affine_and_displacement_combine_as_their_formulas_say(
    affine_last: bool, align_corners: bool
) -> None:
    shape, out = (4, 5, 6), (3, 6, 5)
    image, affine = random_array(0, 2, 1, *shape), random_affine(1, 2, 3)
    u = small_displacement(2, 2, out)
    x = reference.normalised_coordinates(out, align_corners)

    def apply(points: np.ndarray) -> np.ndarray:
        return (
            np.einsum("nrc,n...c->n...r", affine[:, :, :3], points)
            + affine[:, None, None, None, :, 3]
        )

    x = np.broadcast_to(x, u.shape)
    warp = apply(x + u) if affine_last else apply(x) + u
    actual = reference.interpolate(
        image, affine, u, affine_last=affine_last, align_corners=align_corners
    )
    expected = reference.interpolate(
        image, None, warp, is_displacement=False, align_corners=align_corners
    )
    np.testing.assert_allclose(actual, expected, atol=1e-12)


@pytest.mark.parametrize(
    ("affine_last", "is_displacement"), [(False, True), (True, True), (False, False)]
)
@pytest.mark.parametrize("padding_mode", PADDINGS)
def test_interpolation_gradients_are_the_differences_of_its_values(
    padding_mode: str, affine_last: bool, is_displacement: bool
) -> None:
    shape, out = (2, 3, 4), (3, 2, 3)
    image, affine = random_array(0, 2, 2, *shape), random_affine(1, 1, 3)
    grid = 0.7 * random_array(2, 2, *out, 3)
    cotangent = random_array(3, 2, 2, *out)
    options = {
        "affine_last": affine_last,
        "is_displacement": is_displacement,
        "padding_mode": padding_mode,
        "align_corners": False,
    }
    expected = reference.vjp_by_central_differences(
        lambda *args: reference.interpolate(*args, **options),
        (image, affine, grid),
        cotangent,
        (0, 1, 2),
    )
    actual = reference.interpolate_vjp(cotangent, image, affine, grid, **options)
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, e, atol=1e-8)


@pytest.mark.parametrize("add", [True, False])
def test_composition_gradients_are_the_differences_of_its_values(add: bool) -> None:
    shape = (3, 4)
    u, v = small_displacement(0, 2, shape, 0.4), small_displacement(1, 1, shape, 0.4)
    affine, cotangent = random_affine(2, 1, 2), random_array(3, 2, *shape, 2)
    expected = reference.vjp_by_central_differences(
        lambda *args: reference.compose(*args, add=add), (u, v, affine), cotangent, (0, 1, 2)
    )
    actual = reference.compose_vjp(cotangent, u, v, affine, add=add)
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, e, atol=1e-8)


def test_scaling_and_squaring_gradient_is_the_difference_of_its_values() -> None:
    velocity = small_displacement(0, 1, (4, 5), 0.5)
    cotangent = random_array(1, 1, 4, 5, 2)
    (expected,) = reference.vjp_by_central_differences(
        lambda v: reference.scaling_and_squaring(v, 3), (velocity,), cotangent, (0,)
    )
    actual = reference.scaling_and_squaring_vjp(cotangent, velocity, 3)
    np.testing.assert_allclose(actual, expected, atol=1e-8)


@pytest.mark.parametrize("padding_mode", PADDINGS)
@pytest.mark.parametrize("align_corners", [True, False])
def test_derivatives_at_voxel_centres_are_right_sided(
    align_corners: bool, padding_mode: str
) -> None:
    shape = (3, 4)
    image, zero = random_array(0, 1, 1, *shape), np.zeros((1, *shape, 2))
    cotangent = random_array(1, 1, 1, *shape)
    options = {"padding_mode": padding_mode, "align_corners": align_corners}
    _, _, actual = reference.interpolate_vjp(cotangent, image, None, zero, **options)
    step = 1e-6
    for axis in range(2):
        moved = zero.copy()
        moved[..., axis] += step
        slope = (reference.interpolate(image, None, moved, **options) - image) / step
        np.testing.assert_allclose(actual[..., axis], (cotangent * slope)[:, 0], atol=1e-5)


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("dim", [2, 3])
def test_affine_warp_is_affine_grid(dim: int, align_corners: bool) -> None:
    affine, shape = random_affine(0, 2, dim), SHAPES[dim]
    expected = torch.nn.functional.affine_grid(
        torch.tensor(affine), (2, 1, *shape), align_corners=align_corners
    )
    actual = reference.affine_warp(affine, np.zeros((1, *shape, dim)), align_corners=align_corners)
    np.testing.assert_allclose(actual, expected.numpy(), atol=1e-12)


@pytest.mark.parametrize("truncate", [1.0, 4.0])
def test_gaussian_smooth_is_gaussian_filter(truncate: float) -> None:
    x, sigma = random_array(0, 2, 3, 5, 6, 7), (0.5, 1.3, 3.0)
    expected = scipy.ndimage.gaussian_filter(
        x,
        (0, 0, *sigma),
        mode="constant",
        radius=[0, 0, *[int(np.ceil(truncate * s)) for s in sigma]],
    )
    actual = reference.gaussian_smooth(x, sigma, truncate=truncate)
    np.testing.assert_allclose(actual, expected, atol=1e-12)


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("dim", [2, 3])
def test_jacobian_determinant_of_a_linear_map_is_its_determinant(
    dim: int, align_corners: bool
) -> None:
    shape = SHAPES[dim]
    matrix = 0.3 * random_array(0, dim, dim)
    x = reference.normalised_coordinates(shape, align_corners)
    s = reference.half_extent(shape, align_corners)
    voxel_matrix = s[:, None] * matrix / s
    determinant = reference.jacobian_determinant((x @ matrix.T)[None], align_corners=align_corners)
    np.testing.assert_allclose(determinant, np.linalg.det(np.eye(dim) + voxel_matrix), atol=1e-12)


def test_conversions_between_units_undo_each_other() -> None:
    field, spacing = random_array(0, 2, 1, 4, 5, 3), (0.5, 2.0, 3.0)
    units = ["normalised", "voxel", "mm"]
    for source, target in itertools.product(units, units):
        there = reference.convert_displacement(
            field, source, target, spacing=spacing, target_channels="first"
        )
        back = reference.convert_displacement(
            there, target, source, spacing=spacing, source_channels="first"
        )
        np.testing.assert_allclose(back, field, atol=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("window", ["rectangular", "gaussian"])
@pytest.mark.parametrize("common_variance", [0.0, 0.6])
@pytest.mark.parametrize("dim", [2, 3])
def test_lncc_loss_gradients_are_the_differences_of_its_values(
    dim: int, common_variance: float, window: str, reduction: str
) -> None:
    """With variances above and below the least one, and a target and a mask for all items."""
    shape = (2, 3, 4)[-dim:]
    pred, target = random_array(0, 2, 2, *shape), random_array(1, 1, 2, *shape)
    options = {
        "kernel_size": 3,
        "window": window,
        "smooth_nr": 0.2,
        "smooth_dr": 1.8,
        "common_variance": common_variance,
        "both_flat": 0.7,
        "mask": abs(random_array(2, 1, 1, *shape)),
        "reduction": reduction,
    }
    value = reference.lncc_loss(pred, target, **options)
    cotangent = random_array(3, *value.shape)
    expected = reference.vjp_by_central_differences(
        lambda *args: reference.lncc_loss(*args, **options), (pred, target), cotangent, (0, 1)
    )
    actual = reference.lncc_loss_vjp(cotangent, pred, target, **options)
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, e, atol=1e-8)


KERNELS = ["gaussian", "b-spline", "delta"]
RANGES = {
    "of each image": None,
    "joint": "joint",
    "given": ((-0.7, 0.8), (-1.5, 1.2)),
    "for each item": ((np.array([-0.7, -2.0]), 0.8), (-1.5, np.array([1.2, 0.9]))),
}


@pytest.mark.parametrize("value_range", RANGES.values(), ids=RANGES.keys())
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_joint_histogram_is_a_distribution(kernel: str, value_range: object) -> None:
    pred, target = random_array(0, 2, 3, 4, 5), random_array(1, 1, 3, 4, 5)
    joint = reference.joint_histogram(
        pred, target, num_bins=6, kernel=kernel, value_range=value_range
    )
    assert joint.shape == (2, 3, 6, 6)
    assert joint.min() >= 0
    np.testing.assert_allclose(joint.sum(axis=(2, 3)), 1, atol=1e-12)
    swapped = value_range if value_range in (None, "joint") else value_range[::-1]
    back = reference.joint_histogram(target, pred, num_bins=6, kernel=kernel, value_range=swapped)
    np.testing.assert_allclose(back, np.swapaxes(joint, 2, 3), atol=1e-12)


def test_the_joint_histogram_of_hard_bins_is_that_of_numpy() -> None:
    pred, target = random_array(0, 1, 1, 6, 7), random_array(1, 1, 1, 6, 7)
    value_range = ((-1.0, 1.0), (-2.0, 1.0))
    actual = reference.joint_histogram(
        pred, target, num_bins=5, kernel="delta", value_range=value_range
    )
    counts, _, _ = np.histogram2d(pred.ravel(), target.ravel(), bins=5, range=value_range)
    np.testing.assert_allclose(actual[0, 0], counts / counts.sum(), atol=1e-12)


def range_held_fixed(pred: np.ndarray, target: np.ndarray, value_range: object) -> object:
    """What a range that is taken from images of one channel comes to, as numbers for each item."""
    if value_range not in (None, "joint"):
        return value_range
    ends = [[bound(x, axis=(1, 2, 3)) for bound in (np.min, np.max)] for x in (pred, target)]
    if value_range == "joint":
        ends = [[np.minimum(ends[0][0], ends[1][0]), np.maximum(ends[0][1], ends[1][1])]] * 2
    return ends


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("value_range", RANGES.values(), ids=RANGES.keys())
@pytest.mark.parametrize("kernel", ["gaussian", "b-spline"])
@pytest.mark.parametrize("normalised", [False, True])
def test_mutual_information_loss_gradients_are_the_differences_of_its_values(
    normalised: bool, kernel: str, value_range: object, reduction: str
) -> None:
    """With the range held fixed, where it is the images' own, too; and a target for all items."""
    own_range = value_range is None or value_range == "joint"
    pred, target = random_array(0, 2, 1, 3, 4), random_array(1, 2 if own_range else 1, 1, 3, 4)
    options = {
        "num_bins": 5,
        "kernel": kernel,
        "sigma_ratio": 1.3,
        "mask": abs(random_array(2, 2, 1, 3, 4)),
        "normalised": normalised,
        "reduction": reduction,
        "smooth_nr": 1e-3,
        "smooth_dr": 1e-2,
    }
    fixed = range_held_fixed(pred, target, value_range)

    def loss(*images: np.ndarray) -> np.ndarray:
        return reference.mutual_information_loss(*images, value_range=fixed, **options)

    cotangent = random_array(3, *loss(pred, target).shape)
    expected = reference.vjp_by_central_differences(loss, (pred, target), cotangent, (0, 1))
    actual = reference.mutual_information_loss_vjp(
        cotangent, pred, target, value_range=value_range, **options
    )
    for image, bounds, a, e in zip((pred, target), fixed, actual, expected, strict=True):
        if own_range:
            # Beyond the ends of its range an intensity has no effect: one of the two sides counts,
            # and a one-sided difference is less exact.
            at_end = (image == bounds[0].reshape(-1, 1, 1, 1)) | (
                image == bounds[1].reshape(-1, 1, 1, 1)
            )
            np.testing.assert_allclose(a[at_end], 2 * e[at_end], atol=1e-6)
            a, e = a[~at_end], e[~at_end]
        np.testing.assert_allclose(a, e, atol=1e-8)


def test_mutual_information_counts_every_channel_by_itself() -> None:
    pred, target = random_array(0, 2, 3, 4, 5), random_array(1, 2, 3, 4, 5)
    each = reference.mutual_information_loss(pred, target, num_bins=6, reduction="none")
    gradients = reference.mutual_information_loss_vjp(
        np.ones(()), pred, target, num_bins=6, reduction="sum"
    )
    for c in range(3):
        part = [x[:, c : c + 1] for x in (pred, target)]
        one = reference.mutual_information_loss(*part, num_bins=6, reduction="none")
        np.testing.assert_allclose(one, each[:, c : c + 1], atol=1e-14)
        slopes = reference.mutual_information_loss_vjp(
            np.ones(()), *part, num_bins=6, reduction="sum"
        )
        for slope, gradient in zip(slopes, gradients, strict=True):
            np.testing.assert_allclose(slope, gradient[:, c : c + 1], atol=1e-14)


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("shape", [(5, 6), (3, 4, 3)])
def test_the_gradient_of_descriptors_is_that_of_central_differences(
    shape: tuple[int, ...], dilation: int
) -> None:
    image = random_array(0, 1, 2, *shape)
    image[..., -2:] *= 1e-3  # so faint that the bound counts
    options = {"radius": 1, "dilation": dilation}
    bounds = reference.variance_bounds(image, **options)
    cotangent = random_array(1, *reference.mind_ssc(image, **options).shape)
    (expected,) = reference.vjp_by_central_differences(
        lambda x: reference.mind_ssc(x, **options, bounds=bounds), (image,), cotangent, (0,), 1e-8
    )
    actual = reference.mind_ssc_vjp(cotangent, image, **options)
    np.testing.assert_allclose(actual, expected, atol=1e-5 * np.abs(expected).max())


def test_descriptors_compare_the_patches_that_their_definition_names() -> None:
    image, x, y = random_array(0, 1, 1, 12, 14), 6, 5

    def patch(across: int, down: int) -> np.ndarray:
        return image[0, 0, y + down - 1 : y + down + 2, x + across - 1 : x + across + 2]

    pairs = [((2, 0), (0, 2)), ((-2, 0), (0, -2)), ((2, 0), (0, -2)), ((-2, 0), (0, 2))]
    expected = [np.mean((patch(*p) - patch(*q)) ** 2) for p, q in pairs]
    np.testing.assert_allclose(reference.patch_distances(image, 1, 2)[0, 0, :, y, x], expected)
