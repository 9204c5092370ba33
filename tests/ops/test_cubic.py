"""Cubic sampling, in ``interpolate`` and ``compose``: Keys' kernel, and the cubic B-spline."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import reference
import scipy.ndimage
import torch
from backends import Backend
from inputs import (
    HALVES,
    SHAPES,
    assert_close,
    assert_same,
    coordinates_of,
    off_grid_displacement,
    off_grid_positions,
    random_affine,
    random_array,
    small_displacement,
)

MODES = ["cubic", "b-spline"]
PADDINGS = ["zeros", "border", "reflection"]
DTYPES = [np.float32, np.float64]


def check(
    backend: Backend,
    args: tuple[Any, ...],
    options: dict[str, Any],
    dtype: object,
    name: str = "interpolate",
) -> None:
    """The op's values and its gradients to every array among ``args`` are the reference's."""
    expected = getattr(reference, name)(*args, **options)
    cotangent = random_array(99, *expected.shape, dtype=dtype)
    wrt = [k for k, operand in enumerate(args) if operand is not None]
    expected_gradients = getattr(reference, f"{name}_vjp")(cotangent, *args, **options)
    value, gradients = backend.value_and_vjp(name, args, cotangent, wrt, **options)
    assert_close(value, expected, dtype)
    for k, gradient in zip(wrt, gradients, strict=True):
        assert_close(gradient, expected_gradients[k], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("padding_mode", PADDINGS)
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_and_padding_gives_the_reference_values_and_gradients(
    backend: Backend, mode: str, padding_mode: str, align_corners: bool, dim: int, dtype: object
) -> None:
    """With displacements that lead inside, across the border and well outside."""
    shape = SHAPES[dim]
    image = random_array(0, 2, 2, *shape, dtype=dtype)
    u = off_grid_displacement(1, 2, shape, align_corners=align_corners, reach=9, dtype=dtype)
    options = {"mode": mode, "padding_mode": padding_mode, "align_corners": align_corners}
    check(backend, (image, None, u), options, dtype)


TRANSFORMS = {
    "nothing": {"affine": False, "grid": False},
    "an affine": {"affine": True, "grid": False},
    "a displacement after an affine": {"affine": True, "grid": True},
    "an affine after a displacement": {"affine": True, "grid": True, "affine_last": True},
    "a full warp": {"affine": False, "grid": True, "is_displacement": False},
}


@pytest.mark.parametrize(("dim", "dtype"), [(2, np.float32), (2, np.float64), (3, np.float64)])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("mode", MODES)
def test_every_transform_samples_onto_an_output_of_another_shape(
    backend: Backend, mode: str, transform: str, dim: int, dtype: object
) -> None:
    shape, out = {2: (9, 10), 3: (6, 7, 8)}[dim], {2: (5, 38), 3: (4, 3, 37)}[dim]
    options = dict(TRANSFORMS[transform], mode=mode, padding_mode="border")
    affine = random_affine(1, 2, dim, dtype) if options.pop("affine") else None
    grid = 0.8 * random_array(2, 2, *out, dim) if options.pop("grid") else None
    if grid is None:
        options["out_shape"] = out
    else:
        grid = grid.astype(dtype)
    image = random_array(0, 2, 2, *shape, dtype=dtype)
    check(backend, (image, affine, grid), options, dtype)


@pytest.mark.parametrize("batches", list(itertools.product([1, 2], repeat=3)))
def test_an_operand_of_batch_one_serves_every_item_and_collects_their_gradients(
    backend: Backend, batches: tuple[int, int, int]
) -> None:
    shape = (5, 4, 6)
    image = random_array(0, batches[0], 3, *shape)
    affine, grid = random_affine(1, batches[1], 3), small_displacement(2, batches[2], shape)
    for mode in MODES:
        check(backend, (image, affine, grid), {"mode": mode}, np.float64)


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("shape", [(1, 6), (2, 1), (3, 2), (1, 6, 2), (2, 1, 5), (1, 1, 1)])
@pytest.mark.parametrize("padding_mode", PADDINGS)
@pytest.mark.parametrize("mode", MODES)
def test_axes_of_one_to_three_voxels(
    backend: Backend, mode: str, padding_mode: str, shape: tuple[int, ...], align_corners: bool
) -> None:
    image, affine = random_array(0, 1, 2, *shape), random_affine(1, 1, len(shape))
    u = off_grid_displacement(2, 2, shape, align_corners=align_corners)
    u = np.where(u == 0, random_array(3, *u.shape), u)  # along axes without extent, too
    options = {"align_corners": align_corners, "padding_mode": padding_mode, "mode": mode}
    check(backend, (image, affine, u), options, np.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("padding_mode", PADDINGS)
@pytest.mark.parametrize("align_corners", [True, False])
def test_a_zero_displacement_returns_the_image_bit_for_bit(
    backend: Backend, align_corners: bool, padding_mode: str, dtype: object
) -> None:
    """NaN and infinite voxels included: they do not spread to neighbours of weight 0."""
    image = random_array(0, 2, 2, 5, 6, 11, dtype=dtype)
    image[0, 0, 2, 3, 4], image[1, 1, 0, 0, 0] = np.nan, np.inf
    image[0, 1, 4, 5, 10] = -np.inf
    zero = np.zeros((1, 5, 6, 11, 3), dtype)
    options = {"padding_mode": padding_mode, "align_corners": align_corners, "mode": "cubic"}
    assert_same(backend.call("interpolate", image, None, zero, **options), image)


@pytest.mark.parametrize("padding_mode", PADDINGS)
@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("shape", [(6, 7, 5), (1, 6, 2)])
def test_a_spline_passes_through_the_values_of_the_image(
    backend: Backend, shape: tuple[int, ...], align_corners: bool, padding_mode: str
) -> None:
    image, zero = random_array(0, 1, 2, *shape), np.zeros((1, *shape, 3))
    options = {"padding_mode": padding_mode, "align_corners": align_corners, "mode": "b-spline"}
    assert_close(backend.call("interpolate", image, None, zero, **options), image, np.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("padding_mode", PADDINGS)
def test_in_the_plane_keys_kernel_is_bicubic_in_grid_sample(
    backend: Backend, padding_mode: str, align_corners: bool, dtype: object
) -> None:
    """Values and both gradients, at whole voxels as well, where both are differentiable."""
    shape, out = (6, 7), (8, 40)
    image, cotangent = random_array(0, 2, 2, *shape), random_array(2, 2, 2, *out)
    position = off_grid_positions(1, 2, shape, out, reach=12)
    warp = coordinates_of(position, shape, align_corners)
    options = {"padding_mode": padding_mode, "align_corners": align_corners}
    leaves = [torch.tensor(operand, requires_grad=True) for operand in (image, warp)]
    expected = torch.nn.functional.grid_sample(*leaves, mode="bicubic", **options)
    expected.backward(torch.tensor(cotangent))
    args = (image.astype(dtype), None, warp.astype(dtype))
    options |= {"is_displacement": False, "mode": "cubic"}
    value, gradients = backend.value_and_vjp(
        "interpolate", args, cotangent.astype(dtype), (0, 2), **options
    )
    assert_close(value, expected.detach().numpy(), dtype)
    for gradient, leaf in zip(gradients, leaves, strict=True):
        assert_close(gradient, leaf.grad.numpy(), dtype)


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize(
    ("padding_mode", "align_corners", "scipy_mode"),
    [("reflection", True, "mirror"), ("reflection", False, "reflect")],
)
def test_a_spline_is_map_coordinates(
    backend: Backend, padding_mode: str, align_corners: bool, scipy_mode: str, dim: int
) -> None:
    """SciPy's coefficients with ``reflect`` are exact to 0.27 to the power of twice the length."""
    shape = {2: (17, 19), 3: (16, 17, 18)}[dim]
    image = random_array(0, 1, 1, *shape)
    position = off_grid_positions(1, 1, shape, shape, reach=12)
    points = np.moveaxis(position[0], -1, 0)[::-1]
    expected = scipy.ndimage.map_coordinates(image[0, 0], points, order=3, mode=scipy_mode)
    found = backend.call(
        "interpolate",
        image,
        None,
        coordinates_of(position, shape, align_corners),
        is_displacement=False,
        mode="b-spline",
        padding_mode=padding_mode,
        align_corners=align_corners,
    )
    np.testing.assert_allclose(found[0, 0], expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("padding_mode", PADDINGS)
def test_far_from_the_border_every_padding_is_map_coordinates(
    backend: Backend, padding_mode: str
) -> None:
    """What a voxel has to do with coefficients falls by a factor of 4 with each voxel between."""
    shape = (48, 50)
    image = random_array(0, 1, 1, *shape)
    position = 20 + 8 * np.random.default_rng(1).random((1, 6, 7, 2))
    points = np.moveaxis(position[0], -1, 0)[::-1]
    expected = scipy.ndimage.map_coordinates(image[0, 0], points, order=3, mode="mirror")
    found = backend.call(
        "interpolate",
        image,
        None,
        coordinates_of(position, shape),
        is_displacement=False,
        mode="b-spline",
        padding_mode=padding_mode,
    )
    np.testing.assert_allclose(found[0, 0], expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("mode", MODES)
def test_beyond_a_border_is_its_value(backend: Backend, mode: str) -> None:
    # Of so many voxels, positions are the same numbers on any device.
    image = random_array(0, 1, 1, 1, 5)
    position = np.array([-9.0, -2.0, -1.0, 5.0, 6.5, 100.0])
    grid = np.zeros((1, 1, 6, 2))
    grid[..., 0] = position / 2 - 1
    options = {"is_displacement": False, "padding_mode": "border", "mode": mode}
    value, (to_grid,) = backend.value_and_vjp(
        "interpolate", (image, None, grid), np.ones((1, 1, 1, 6)), [2], **options
    )
    np.testing.assert_allclose(value[0, 0, 0], image[0, 0, 0, [0] * 3 + [4] * 3], atol=1e-12)
    assert_same(to_grid, np.zeros_like(grid))


@pytest.mark.parametrize("mode", MODES)
def test_coefficients_may_be_computed_before(backend: Backend, mode: str) -> None:
    shape = (5, 6, 7)
    image, u = random_array(0, 1, 2, *shape), small_displacement(1, 1, shape)
    check(backend, (image, None, u), {"mode": mode, "prefilter": False}, np.float64)
    options = {"padding_mode": "reflection", "align_corners": False}
    coefficients = backend.call("spline_coefficients", image, **options)
    options["mode"] = "b-spline"
    found = backend.call("interpolate", coefficients, None, u, prefilter=False, **options)
    assert_same(found, backend.call("interpolate", image, None, u, **options))
    field = random_array(2, 1, *shape, 3)
    check(backend, (field, u), {"mode": mode, "prefilter": False}, np.float64, "compose")


@pytest.mark.parametrize("padding_mode", PADDINGS)
@pytest.mark.parametrize("mode", MODES)
def test_the_gradient_of_a_sample_is_the_difference_of_its_neighbours(
    backend: Backend, mode: str, padding_mode: str
) -> None:
    """Cubic samples have continuous derivatives, also at voxels, at the border and outside."""
    image, step = random_array(0, 1, 1, 1, 5), 1e-6
    position = np.concatenate([np.arange(-4, 9), np.arange(-4, 9) + 0.3])
    grid = np.zeros((1, 1, len(position), 2))
    grid[..., 0] = position / 2 - 1
    options = {"is_displacement": False, "padding_mode": padding_mode, "mode": mode}

    def values(moved: float) -> np.ndarray:
        there = grid + np.array([moved, 0])
        return backend.call("interpolate", image, None, there, **options)[0, 0, 0]

    slope = (values(step) - values(-step)) / (2 * step)
    cotangent = np.ones((1, 1, 1, len(position)))
    (to_grid,) = backend.vjp("interpolate", (image, None, grid), cotangent, [2], **options)
    np.testing.assert_allclose(to_grid[0, 0, :, 0], slope, rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("with_affine", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_compositions_have_the_reference_values_and_gradients(
    backend: Backend, mode: str, with_affine: bool, dim: int, dtype: object
) -> None:
    shape = SHAPES[dim]
    u = random_array(0, 2, *shape, dim, dtype=dtype)
    v = off_grid_displacement(1, 2, shape, dtype=dtype)
    affine = random_affine(2, 2, dim, dtype) if with_affine else None
    for add in (True, False):
        check(backend, (u, v, affine), {"add": add, "mode": mode}, dtype, "compose")


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("padding_mode", PADDINGS)
@pytest.mark.parametrize("mode", MODES)
def test_compositions_of_every_padding_have_the_reference_values_and_gradients(
    backend: Backend, mode: str, padding_mode: str, align_corners: bool
) -> None:
    shape = SHAPES[3]
    u = random_array(0, 1, *shape, 3)
    v = off_grid_displacement(1, 1, shape, align_corners=align_corners, reach=8)
    options = {"padding_mode": padding_mode, "align_corners": align_corners, "mode": mode}
    check(backend, (u, v), options, np.float64, "compose")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row", [97, 100])
@pytest.mark.parametrize("name", ["interpolate", "compose"])
@pytest.mark.parametrize("mode", MODES)
def test_samples_near_together_apart_and_far_apart_have_the_reference_values(
    backend: Backend, mode: str, name: str, row: int, dtype: object
) -> None:
    """Well within the volume, in rows of any length: CUDA takes what lies together at once."""
    shape, rng = (27, 41, row), np.random.default_rng(0)
    z, y, x = np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")
    voxels = np.stack([2 * np.sin(y / 7 + z / 5), 1.5 * np.cos(x / 9), np.sin(x / 11 - y / 8)], -1)
    voxels[9:14] += rng.uniform(-3, 3, (5, *shape[1:], 3))
    voxels[20:] += rng.uniform(-15, 15, (7, *shape[1:], 3))
    scale = 2 / (np.array(shape[::-1]) - 1)
    u = np.repeat((voxels * scale)[None], 2, 0).astype(dtype)
    if name == "interpolate":
        args = (random_array(1, 2, 2, *shape, dtype=dtype), None, u)
    else:
        args = (random_array(1, 2, *shape, 3, dtype=dtype), u)
    options = {"mode": mode, "prefilter": False}
    value = backend.call(name, *args, **options)
    assert_close(value, getattr(reference, name)(*args, **options), dtype)
    one = [None if a is None else a[:1] for a in args]
    assert_same(backend.call(name, *one, **options), value[:1])


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("mode", MODES)
def test_images_in_half_precision_are_computed_with_in_float32(
    backend: Backend, mode: str, dtype: object
) -> None:
    """And rounded once: no coefficient is."""
    shape = (4, 6, 37)
    image = random_array(0, 1, 2, *shape, dtype=dtype)
    u = off_grid_displacement(1, 1, shape, dtype=np.float32)
    options = {"mode": mode}
    expected = reference.interpolate(image.astype(np.float64), None, u, **options)
    cotangent = random_array(2, *expected.shape, dtype=dtype)
    value, gradients = backend.value_and_vjp(
        "interpolate", (image, None, u), cotangent, [0, 2], **options
    )
    assert_close(value, expected, dtype)
    wide = (image.astype(np.float64), None, u)
    to_image, _, to_grid = reference.interpolate_vjp(cotangent.astype(np.float64), *wide, **options)
    assert_close(gradients[0], to_image, dtype)
    assert_close(gradients[1], to_grid, np.float32)


@pytest.mark.parametrize("name", ["interpolate", "compose"])
def test_a_spline_of_float32_at_float64_positions_is_computed_in_float64(
    backend: Backend, name: str
) -> None:
    shape = (5, 6)
    first = random_array(0, 1, *((2, *shape) if name == "interpolate" else (*shape, 2)))
    first, u = first.astype(np.float32), small_displacement(1, 1, shape)
    args = (first, None, u) if name == "interpolate" else (first, u)
    value = backend.call(name, *args, mode="b-spline")
    wide = tuple(None if x is None else x.astype(np.float64) for x in args)
    expected = backend.call(name, *wide, mode="b-spline")
    dtype = np.float32 if name == "interpolate" else np.float64
    assert_same(value, expected.astype(dtype))


CROWDS = {
    "where many samples lie between the same voxels": (0.05, 0.0),
    "where all samples are of one place": (0.0, 0.3),
    "where all samples lie beyond a corner": (0.0, 3.0),
}


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("crowd", CROWDS)
@pytest.mark.parametrize("mode", MODES)
def test_the_gradient_of_the_image_is_exact(
    backend: Backend, mode: str, crowd: str, dim: int, deterministic: bool
) -> None:
    scale, offset = CROWDS[crowd]
    affine = np.concatenate([scale * np.eye(dim), np.full((dim, 1), offset)], 1)[None]
    shape = (11, 19, 37)[-dim:]
    cotangent = random_array(1, 1, 1, *shape, dtype=np.float32)
    image = random_array(0, 1, 1, *(7 for _ in shape), dtype=np.float32)

    def gradient(dtype: object) -> np.ndarray:
        (gradient,) = backend.vjp(
            "interpolate",
            (image.astype(dtype), affine.astype(dtype)),
            cotangent.astype(dtype),
            [0],
            out_shape=shape,
            padding_mode="border",
            mode=mode,
            prefilter=False,
            deterministic=deterministic,
        )
        return gradient

    assert_close(gradient(np.float32), gradient(np.float64), np.float32)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("mode", MODES)
def test_there_is_room_for_all_that_meets_in_a_voxel(
    backend: Backend, mode: str, size: int
) -> None:
    """In fixed point: what a voxel adds to one place may be more than its cotangent."""
    shape = (8, 8, 32)
    image, affine = random_array(0, 1, 1, *[size] * 3), np.zeros((1, 3, 4))
    affine[..., 3] = 0.5
    options = {"out_shape": shape, "mode": mode, "prefilter": False, "deterministic": True}
    for padding_mode in PADDINGS:
        options |= {"padding_mode": padding_mode, "align_corners": False}
        plain = {key: options[key] for key in options if key != "deterministic"}
        cotangent = np.ones((1, 1, *shape))
        (gradient,) = backend.vjp("interpolate", (image, affine), cotangent, [0], **options)
        exact, _, _ = reference.interpolate_vjp(cotangent, image, affine, **plain)
        assert_close(gradient, exact, np.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("padding_mode", PADDINGS)
@pytest.mark.parametrize("mode", MODES)
def test_a_sample_does_not_depend_on_its_neighbours_in_the_row(
    backend: Backend, mode: str, padding_mode: str, dim: int, dtype: object
) -> None:
    """At voxel centres and at the ends, outside, and nowhere; some of the image is not finite."""
    rng = np.random.default_rng(0)
    image = random_array(1, 1, 1, *(9,) * dim, dtype=dtype)
    image[..., 4, 4], image[..., 5, 2] = np.nan, np.inf
    positions = [-3, -1, -0.5, -0.0, 0, 0.25, 1, 3.5, 5.125, 7.75, 8, 8.5, 9, 13, np.nan, np.inf]
    inside = rng.uniform(0, 8, (*{2: (6, 77), 3: (3, 4, 77)}[dim], dim))
    position = np.where(rng.random(inside.shape) < 0.4, rng.choice(positions, inside.shape), inside)
    grid = coordinates_of(position, (9,) * dim)[None].astype(dtype)
    options = {
        "is_displacement": False,
        "padding_mode": padding_mode,
        "mode": mode,
        "prefilter": False,
    }

    def values_and_gradient(grid: np.ndarray) -> list[np.ndarray]:
        value = backend.call("interpolate", image, None, grid, **options)
        cotangent = np.ones_like(value)
        (gradient,) = backend.vjp("interpolate", (image, None, grid), cotangent, (2,), **options)
        return [value[:, 0], gradient]

    parts = [values_and_gradient(grid[..., a : a + 11, :]) for a in range(0, 77, 11)]
    whole = values_and_gradient(grid)
    np.testing.assert_array_equal(whole[0], np.concatenate([p[0] for p in parts], axis=-1))
    np.testing.assert_array_equal(whole[1], np.concatenate([p[1] for p in parts], axis=-2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_coordinates_far_outside_or_not_finite_sample_as_outside(
    backend: Backend, mode: str, dtype: object
) -> None:
    image = np.array([3, 4, 5, 6], dtype).reshape(1, 1, 1, 4)
    position = [np.nan, -np.inf, np.inf, -3e38, -1e12, -5e9, 5e9, 1e12, 3e38]
    grid = np.zeros((1, 1, len(position), 2), dtype)
    grid[0, 0, :, 0] = position
    for padding_mode, expected in {
        "zeros": [0] * 9,
        "border": [3, 3, 6, 3, 3, 3, 6, 6, 6],
        "reflection": [3, 3, 3],
    }.items():
        options = {"is_displacement": False, "padding_mode": padding_mode, "mode": mode}
        value, gradients = backend.value_and_vjp(
            "interpolate", (image, None, grid), np.ones((1, 1, 1, 9), dtype), [0, 2], **options
        )
        assert all(np.isfinite(x).all() for x in gradients)
        found = value[0, 0, 0]
        np.testing.assert_allclose(found[: len(expected)], expected, rtol=1e-6, atol=0)
        assert ((found >= -0.5) & (found <= 6.5)).all()


@pytest.mark.parametrize("name", ["interpolate", "compose"])
@pytest.mark.parametrize(
    ("operands", "message"),
    [
        ((np.zeros((4, 5), np.float32),), "expected"),
        (("image",), "expected"),
        ((np.zeros((1, 4, 5, 2), np.int32),), "expected"),
    ],
    ids=["axes", "type", "dtype"],
)
def test_what_is_wrong_with_a_spline_is_told_by_the_name_of_the_argument(
    backend: Backend, name: str, operands: tuple[Any, ...], message: str
) -> None:
    others = (None,) if name == "interpolate" else (np.zeros((1, 4, 5, 2), np.float32),)
    argument = "image" if name == "interpolate" else "u"
    with pytest.raises((TypeError, ValueError), match=f"{name}: {argument}: {message}"):
        backend.call(name, *operands, *others, mode="b-spline")


@pytest.mark.parametrize("name", ["interpolate", "compose"])
@pytest.mark.parametrize("mode", MODES)
def test_compiled_mapped_and_both(mode: str, name: str) -> None:
    """A spline is two ops: values and gradients are those of single calls that are not compiled."""
    import jax

    import jaxreg
    import torchreg

    shape = (5, 6)
    first = random_array(0, 3, 1, *((2, *shape) if name == "interpolate" else (*shape, 2)))
    first = first.astype(np.float32)
    u = np.float32(0.1) * random_array(1, 3, 1, *shape, 2, dtype=np.float32)

    def value(package: Any, first: Any, u: Any) -> Any:
        function = getattr(package, name)
        operands = (first, None, u) if name == "interpolate" else (first, u)
        return (function(*operands, mode=mode) ** 2).sum()

    def in_jax(first: Any, u: Any) -> Any:
        return jax.value_and_grad(lambda *x: value(jaxreg, *x), (0, 1))(first, u)

    def in_torch(first: Any, u: Any) -> Any:
        return torch.func.grad_and_value(lambda *x: value(torchreg, *x), (0, 1))(first, u)

    one_by_one = [jax.tree.leaves(in_jax(a, b)) for a, b in zip(first, u, strict=True)]
    expected = [np.stack(x) for x in zip(*one_by_one, strict=True)]
    for function in (jax.vmap(in_jax), jax.jit(jax.vmap(in_jax)), jax.vmap(jax.jit(in_jax))):
        for actual, wanted in zip(jax.tree.leaves(function(first, u)), expected, strict=True):
            assert_close(np.asarray(actual), wanted, np.float32)
    tensors = (torch.tensor(first), torch.tensor(u))
    gradients, values = torch.func.vmap(in_torch)(*tensors)
    for actual, wanted in zip((values, *gradients), expected, strict=True):
        assert_close(actual.numpy(), wanted, np.float32)
    gradients, _ = torch.compile(in_torch, backend="aot_eager")(*(x[0] for x in tensors))
    for actual, wanted in zip(gradients, expected[1:], strict=True):
        assert_close(actual.numpy(), wanted[0], np.float32)
    compiled = torch.compile(lambda *x: value(torchreg, *x), backend="aot_eager")
    leaves = [x[0].clone().requires_grad_() for x in tensors]
    compiled(*leaves).backward()
    for leaf, wanted in zip(leaves, expected[1:], strict=True):
        assert_close(leaf.grad.numpy(), wanted[0], np.float32)
