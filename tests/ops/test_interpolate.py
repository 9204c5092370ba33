"""``interpolate``: an image sampled through a displacement, an affine, both, or a full warp."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import reference
from backends import Backend
from inputs import (
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

MODES = ["bilinear", "nearest"]
PADDINGS = ["zeros", "border", "reflection"]
DTYPES = [np.float32, np.float64]


def check_values_and_gradients(
    backend: Backend,
    args: tuple[Any, ...],
    options: dict[str, Any],
    dtype: object,
) -> None:
    """The op's values and its gradients to every array among ``args`` are the reference's."""
    expected = reference.interpolate(*args, **options)
    cotangent = random_array(99, *expected.shape, dtype=dtype)
    wrt = [k for k, operand in enumerate(args) if operand is not None]
    expected_gradients = reference.interpolate_vjp(cotangent, *args, **options)
    value, gradients = backend.value_and_vjp("interpolate", args, cotangent, wrt, **options)
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
    check_values_and_gradients(backend, (image, None, u), options, dtype)


TRANSFORMS = {
    "nothing": {"affine": False, "grid": False},
    "an affine": {"affine": True, "grid": False},
    "a displacement after an affine": {"affine": True, "grid": True},
    "an affine after a displacement": {"affine": True, "grid": True, "affine_last": True},
    "a full warp": {"affine": False, "grid": True, "is_displacement": False},
    "a full warp that ignores the affine": {"affine": True, "grid": True, "is_displacement": False},
}


@pytest.mark.parametrize(("dim", "dtype"), [(2, np.float64), (3, np.float32), (3, np.float64)])
@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_every_transform_samples_onto_an_output_of_another_shape(
    backend: Backend, transform: str, align_corners: bool, dim: int, dtype: object
) -> None:
    shape, out = SHAPES[dim], {2: (5, 8), 3: (4, 8, 5)}[dim]
    options = dict(TRANSFORMS[transform], align_corners=align_corners, padding_mode="border")
    affine = random_affine(1, 2, dim, dtype) if options.pop("affine") else None
    grid = 0.8 * random_array(2, 2, *out, dim) if options.pop("grid") else None
    if grid is None:
        options["out_shape"] = out
    else:
        grid = grid.astype(dtype)
    image = random_array(0, 2, 2, *shape, dtype=dtype)
    check_values_and_gradients(backend, (image, affine, grid), options, dtype)


# Long enough for the CPU to compute rows by vector code, but for what lies outside.
LONG = {2: (6, 77), 3: (3, 4, 77)}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("dim", "dtype"), [(2, np.float64), (3, np.float32), (3, np.float64)])
@pytest.mark.parametrize("padding_mode", PADDINGS)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_long_rows_have_the_reference_values_and_gradients(
    backend: Backend, transform: str, padding_mode: str, dim: int, dtype: object, channels: int
) -> None:
    options = dict(TRANSFORMS[transform], padding_mode=padding_mode)
    shape = LONG[dim]
    image = random_array(0, 1, channels, *shape, dtype=dtype)
    affine = random_affine(1, 1, dim, dtype) if options.pop("affine") else None
    grid = off_grid_displacement(2, 1, shape, dtype=dtype) if options.pop("grid") else None
    check_values_and_gradients(backend, (image, affine, grid), options, dtype)


def test_a_cotangent_that_is_not_finite_reaches_only_the_voxels_that_count(
    backend: Backend,
) -> None:
    """In a row that is long enough for vector code, of samples on voxels and between them."""
    image = random_array(0, 1, 1, 3, 3, 77, dtype=np.float32)
    u = np.zeros((1, 3, 3, 77, 3), np.float32)
    u[0, :, :, 60:, 0] = 0.5 / 38  # half a voxel along x
    cotangent = random_array(1, *image.shape, dtype=np.float32)
    cotangent[0, 0, 1, 1, [5, 33, 70]] = np.nan, np.inf, np.nan
    (gradient,) = backend.vjp("interpolate", (image, None, u), cotangent, [0])
    touched = np.argwhere(~np.isfinite(gradient[0, 0]))
    assert touched.tolist() == [[1, 1, x] for x in (5, 33, 70, 71)]


CROWDS = {
    "where many samples lie between the same voxels": (0.05, 0.0),
    "where all samples are of one place": (0.0, 0.3),
    "where all samples lie beyond a corner": (0.0, 3.0),
}


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("crowd", CROWDS)
def test_the_gradient_of_the_image_is_exact(
    backend: Backend, crowd: str, dim: int, deterministic: bool
) -> None:
    """On a GPU a block of voxels first adds up integers, of which a target has room for so many."""
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
            deterministic=deterministic,
        )
        return gradient

    assert_close(gradient(np.float32), gradient(np.float64), np.float32)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("size", [36, 37, 38, 52])
@pytest.mark.parametrize("dim", [2, 3])
def test_the_gradient_of_the_image_is_exact_whatever_the_length_of_its_rows(
    backend: Backend, dim: int, size: int, channels: int, deterministic: bool
) -> None:
    """On a GPU four numbers of a row are added at a time where rows have a multiple of four."""
    sampled, shape = (9, 22, size)[-dim:], (13, 21, 45)[-dim:]
    image = random_array(0, 2, channels, *sampled, dtype=np.float32)
    cotangent = random_array(1, 2, channels, *shape, dtype=np.float32)
    # As far as samples go beyond the ends of rows, and as wild as tiles do not hold them all.
    u = 0.3 * random_array(2, 2, *shape, dim, dtype=np.float32)
    u[..., :5, :] *= 4

    def gradient(dtype: object) -> np.ndarray:
        (gradient,) = backend.vjp(
            "interpolate",
            (image.astype(dtype), None, u.astype(dtype)),
            cotangent.astype(dtype),
            [0],
            deterministic=deterministic,
        )
        return gradient

    assert_close(gradient(np.float32), gradient(np.float64), np.float32)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("large", [1e2, 1e5, 1e30])
def test_a_large_cotangent_takes_no_digits_from_its_neighbours(
    backend: Backend, large: float, deterministic: bool
) -> None:
    shape = (5, 6, 40)
    image = random_array(0, 1, 1, *shape, dtype=np.float32)
    cotangent = random_array(1, 1, 1, *shape, dtype=np.float32)
    u = 0.3 / 20 * random_array(2, 1, *shape, 3, dtype=np.float32)

    def gradient(dtype: object) -> np.ndarray:
        (gradient,) = backend.vjp(
            "interpolate",
            (image.astype(dtype), None, u.astype(dtype)),
            cotangent.astype(dtype),
            [0],
            deterministic=deterministic and large < 1e20,
        )
        return gradient

    cotangent[0, 0, 2, 3, 20] = large
    actual, expected = gradient(np.float32), gradient(np.float64)
    far = np.ones(shape, bool)
    far[1:4, 2:5, 19:22] = False
    assert_close(actual[0, 0][far], expected[0, 0][far], np.float32)
    np.testing.assert_allclose(
        actual[0, 0][~far], expected[0, 0][~far], rtol=1e-5, atol=large * 1e-6
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("padding_mode", PADDINGS)
def test_a_sample_does_not_depend_on_its_neighbours_in_the_row(
    backend: Backend, padding_mode: str, align_corners: bool, dim: int, dtype: object
) -> None:
    """At voxel centres and at the ends, outside, and nowhere; some of the image is not finite."""
    rng = np.random.default_rng(0)
    image = random_array(1, 1, 1, *(9,) * dim, dtype=dtype)
    image[..., 4, 4], image[..., 5, 2] = np.nan, np.inf
    positions = [-3, -1, -0.5, -0.0, 0, 0.25, 1, 3.5, 5.125, 7.75, 8, 8.5, 9, 13, np.nan, np.inf]
    inside = rng.uniform(0, 8, (*LONG[dim], dim))
    position = np.where(rng.random(inside.shape) < 0.4, rng.choice(positions, inside.shape), inside)
    grid = coordinates_of(position, (9,) * dim, align_corners)[None].astype(dtype)
    options = {
        "is_displacement": False,
        "padding_mode": padding_mode,
        "align_corners": align_corners,
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


@pytest.mark.parametrize("batches", list(itertools.product([1, 2], repeat=3)))
def test_an_operand_of_batch_one_serves_every_item_and_collects_their_gradients(
    backend: Backend, batches: tuple[int, int, int]
) -> None:
    shape = (3, 4, 5)
    image = random_array(0, batches[0], 3, *shape)
    affine, grid = random_affine(1, batches[1], 3), small_displacement(2, batches[2], shape)
    check_values_and_gradients(backend, (image, affine, grid), {}, np.float64)


@pytest.mark.parametrize("channels", [1, 5])
@pytest.mark.parametrize("mode", MODES)
def test_every_channel_is_sampled_at_the_same_place(
    backend: Backend, mode: str, channels: int
) -> None:
    image = random_array(0, 1, channels, 5, 6)
    u = off_grid_displacement(1, 1, (5, 6))
    options = {"mode": mode, "padding_mode": "border"}
    check_values_and_gradients(backend, (image, None, u), options, np.float64)


@pytest.mark.parametrize("affine_last", [True, False])
@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("shape", [(1, 6), (2, 1), (1, 6, 2), (2, 1, 5), (1, 1, 1)])
def test_axes_of_one_and_two_voxels(
    backend: Backend, shape: tuple[int, ...], align_corners: bool, affine_last: bool
) -> None:
    dim = len(shape)
    image, affine = random_array(0, 1, 2, *shape), random_affine(1, 1, dim)
    u = off_grid_displacement(2, 2, shape, align_corners=align_corners)
    u = np.where(u == 0, random_array(3, *u.shape), u)  # along axes without extent, too
    padding_mode = "reflection" if affine_last else "border"
    options = {
        "affine_last": affine_last,
        "align_corners": align_corners,
        "padding_mode": padding_mode,
    }
    check_values_and_gradients(backend, (image, affine, u), options, np.float64)


@pytest.mark.parametrize("mode", MODES)
def test_a_displacement_along_an_axis_of_one_voxel_has_no_effect(
    backend: Backend, mode: str
) -> None:
    image = random_array(0, 1, 2, 1, 5, 6, dtype=np.float32)
    u = np.zeros((1, 1, 5, 6, 3), np.float32)
    u[..., 2] = 1e3 * random_array(1, 1, 1, 5, 6)
    assert_same(backend.call("interpolate", image, None, u, mode=mode), image)


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
    options = {"padding_mode": padding_mode, "align_corners": align_corners}
    assert_same(backend.call("interpolate", image, None, zero, **options), image)


@pytest.mark.parametrize("mode", MODES)
def test_no_transform_and_the_identity_affine_return_the_image_bit_for_bit(
    backend: Backend, mode: str
) -> None:
    image = random_array(0, 2, 1, 5, 6, 11, dtype=np.float32)
    identity = np.eye(3, 4, dtype=np.float32)[None]
    assert_same(backend.call("interpolate", image, mode=mode), image)
    assert_same(backend.call("interpolate", image, identity, mode=mode), image)


@pytest.mark.parametrize("affine_last", [True, False])
@pytest.mark.parametrize("out_shape", [(4, 1, 3), (1, 1, 1)])
def test_an_absent_affine_is_the_identity_also_on_output_axes_of_one_voxel(
    backend: Backend, out_shape: tuple[int, ...], affine_last: bool
) -> None:
    """There ``A(x + u)`` ignores the displacement, and ``Ax + u`` does not."""
    image, identity = random_array(0, 1, 2, 5, 6, 7), np.eye(3, 4)[None]
    u = small_displacement(1, 1, out_shape)
    options = {"affine_last": affine_last}
    check_values_and_gradients(backend, (image, None, u), options, np.float64)
    check_values_and_gradients(backend, (image, identity, u), options, np.float64)


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("padding_mode", PADDINGS)
def test_derivatives_at_voxel_centres_are_right_sided(
    backend: Backend, padding_mode: str, align_corners: bool
) -> None:
    """A registration starts at a zero displacement, where the left and right slopes differ."""
    image, zero = random_array(0, 1, 2, 4, 5), np.zeros((1, 4, 5, 2))
    options = {"padding_mode": padding_mode, "align_corners": align_corners}
    check_values_and_gradients(backend, (image, None, zero), options, np.float64)


@pytest.mark.parametrize("padding_mode", PADDINGS)
def test_derivatives_at_voxel_centres_outside_are_right_sided(
    backend: Backend, padding_mode: str
) -> None:
    image = random_array(0, 1, 1, 5, 3)
    voxels = np.arange(-9.0, 14.0)
    y, x = np.meshgrid(voxels, voxels, indexing="ij")
    grid = coordinates_of(np.stack([x, y], axis=-1)[None], (5, 3))  # exact: s is 1 and 2
    options = {"is_displacement": False, "padding_mode": padding_mode}
    check_values_and_gradients(backend, (image, None, grid), options, np.float64)


def test_nearest_rounds_half_to_even(backend: Backend) -> None:
    image = np.arange(9, dtype=np.float32).reshape(1, 1, 1, 9)
    position = np.array([-0.5, 0.5, 1.5, 2.5, 3.5, 7.5, 8.5], np.float32)
    grid = np.stack([position / 4 - 1, np.zeros_like(position)], axis=-1)[None, None]
    expected = np.array([0, 0, 2, 2, 4, 8, 8], np.float32)
    sampled = backend.call("interpolate", image, None, grid, is_displacement=False, mode="nearest")
    assert_same(sampled[0, 0, 0], expected)


def test_nearest_gives_no_gradient_to_where_it_samples(backend: Backend) -> None:
    image, affine = random_array(0, 1, 1, 5, 6), random_affine(1, 1, 2)
    u, cotangent = off_grid_displacement(2, 1, (5, 6)), random_array(3, 1, 1, 5, 6)
    args = (image, affine, u)
    to_affine, to_grid = backend.vjp("interpolate", args, cotangent, (1, 2), mode="nearest")
    assert_same(to_affine, np.zeros_like(affine))
    assert_same(to_grid, np.zeros_like(u))


def sampled_at(
    backend: Backend, image: np.ndarray, position: list[float], mode: str, padding_mode: str
) -> np.ndarray:
    """Values of a one-dimensional image ``(1, 1, 1, X)`` at these normalised coordinates."""
    grid = np.zeros((1, 1, len(position), 2), image.dtype)
    grid[0, 0, :, 0] = position
    options = {"is_displacement": False, "mode": mode, "padding_mode": padding_mode}
    sampled = backend.call("interpolate", image, None, grid, **options)[0, 0, 0]
    cotangent = np.ones((1, 1, 1, len(position)), image.dtype)
    for gradient in backend.vjp("interpolate", (image, None, grid), cotangent, (0, 2), **options):
        assert np.isfinite(gradient).all()
    return sampled


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_non_finite_coordinates_sample_as_outside(
    backend: Backend, mode: str, dtype: object
) -> None:
    image = np.array([3, 4, 5, 6], dtype).reshape(1, 1, 1, 4)
    nowhere = [np.nan, -np.inf, np.inf]
    for padding_mode, expected in {
        "zeros": [0, 0, 0],
        "border": [3, 3, 6],
        "reflection": [3, 3, 3],
    }.items():
        sampled = sampled_at(backend, image, nowhere, mode, padding_mode)
        assert_same(sampled, np.array(expected, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_coordinates_far_outside_are_no_different_from_those_nearby(
    backend: Backend, mode: str, dtype: object
) -> None:
    image = np.array([3, 4, 5, 6], dtype).reshape(1, 1, 1, 4)
    far = [-3e38, -1e12, -5e9, 5e9, 1e12, 3e38]
    for padding_mode, expected in {"zeros": [0] * 6, "border": [3, 3, 3, 6, 6, 6]}.items():
        sampled = sampled_at(backend, image, far, mode, padding_mode)
        assert_same(sampled, np.array(expected, dtype))
    sampled = sampled_at(backend, image, far, mode, "reflection")
    assert ((sampled >= 3) & (sampled <= 6)).all()


def test_one_nan_displacement_spoils_one_voxel_only(backend: Backend) -> None:
    image, u = random_array(0, 1, 1, 4, 5, 6), small_displacement(1, 1, (4, 5, 6))
    spoilt = u.copy()
    spoilt[0, 1, 2, 3, 0] = np.nan
    clean = backend.call("interpolate", image, None, u)
    expected = clean.copy()
    expected[0, 0, 1, 2, 3] = 0
    assert_same(backend.call("interpolate", image, None, spoilt), expected)


@pytest.mark.parametrize("full", [(4, 3, 8), (1, 1, 4, 3, 8), [4, 3, 8]])
def test_only_the_spatial_entries_of_out_shape_count(backend: Backend, full: Any) -> None:
    image, affine = random_array(0, 1, 2, 5, 6, 7), random_affine(1, 1, 3)
    sampled = backend.call("interpolate", image, affine, out_shape=full)
    expected = reference.interpolate(image, affine, out_shape=(4, 3, 8))
    assert_close(sampled, expected, np.float64)


@pytest.mark.parametrize("align_corners", [True, False])
def test_out_shape_alone_resizes(backend: Backend, align_corners: bool) -> None:
    import torch

    image = random_array(0, 1, 2, 5, 6, 7)
    resized = backend.call(
        "interpolate",
        image,
        out_shape=(4, 11, 9),
        padding_mode="border",
        align_corners=align_corners,
    )
    expected = torch.nn.functional.interpolate(
        torch.tensor(image), (4, 11, 9), mode="trilinear", align_corners=align_corners
    )
    assert_close(resized, expected.numpy(), np.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("padding_mode", PADDINGS)
def test_a_full_warp_is_grid_sample(
    backend: Backend, padding_mode: str, dim: int, dtype: object
) -> None:
    """Values and both gradients, both modes, both conventions for corners."""
    import torch

    shape, out = SHAPES[dim], SHAPES[dim][::-1]
    image, cotangent = random_array(0, 2, 2, *shape), random_array(2, 2, 2, *out)
    for mode, align_corners in itertools.product(MODES, [True, False]):
        warp = coordinates_of(off_grid_positions(1, 2, shape, out, 7), shape, align_corners)
        options = {"mode": mode, "padding_mode": padding_mode, "align_corners": align_corners}
        leaves = [torch.tensor(operand, requires_grad=True) for operand in (image, warp)]
        expected = torch.nn.functional.grid_sample(*leaves, **options)
        expected.backward(torch.tensor(cotangent))

        args = (image.astype(dtype), None, warp.astype(dtype))
        sampled = backend.call("interpolate", *args, is_displacement=False, **options)
        assert_close(sampled, expected.detach().numpy(), dtype)
        gradients = backend.vjp(
            "interpolate", args, cotangent.astype(dtype), (0, 2), is_displacement=False, **options
        )
        for gradient, leaf in zip(gradients, leaves, strict=True):
            assert_close(gradient, leaf.grad.numpy(), dtype)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("padding_mode", "align_corners", "jax_mode"),
    [
        ("zeros", True, "constant"),
        ("border", True, "nearest"),
        ("reflection", True, "mirror"),
        ("reflection", False, "reflect"),
    ],
)
def test_a_full_warp_is_map_coordinates(
    backend: Backend, padding_mode: str, align_corners: bool, jax_mode: str, mode: str
) -> None:
    import jax

    shape = (6, 7)
    image = random_array(0, 1, 1, *shape)
    position = off_grid_positions(1, 1, shape, shape, reach=5)
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        expected = jax.scipy.ndimage.map_coordinates(
            image[0, 0],
            list(np.moveaxis(position[0], -1, 0)[::-1]),
            order=1 if mode == "bilinear" else 0,
            mode=jax_mode,
        )
    sampled = backend.call(
        "interpolate",
        image,
        None,
        coordinates_of(position, shape, align_corners),
        is_displacement=False,
        mode=mode,
        padding_mode=padding_mode,
        align_corners=align_corners,
    )
    assert_close(sampled[0, 0], np.asarray(expected), np.float64)


def test_an_empty_batch_gives_an_empty_result_and_no_gradient(backend: Backend) -> None:
    image, affine = np.zeros((0, 2, 4, 5, 6), np.float32), np.ones((1, 3, 4), np.float32)
    u = np.zeros((0, 3, 5, 6, 3), np.float32)
    sampled = backend.call("interpolate", image, affine, u)
    assert_same(sampled, np.zeros((0, 2, 3, 5, 6), np.float32))
    gradients = backend.vjp("interpolate", (image, affine, u), sampled, (0, 1, 2))
    for gradient, operand in zip(gradients, (image, affine, u), strict=True):
        assert_same(gradient, np.zeros_like(operand))


def test_an_image_of_an_empty_batch_is_sampled_nowhere(backend: Backend) -> None:
    image, u = np.zeros((0, 1, 4, 5), np.float32), np.zeros((1, 4, 5, 2), np.float32)
    assert backend.call("interpolate", image, None, u).shape == (0, 1, 4, 5)


def test_float32_accuracy_does_not_depend_on_the_size_of_the_volume(backend: Backend) -> None:
    """A position far from the origin is as exact as its own rounding allows."""
    image = np.zeros((1, 1, 1, 4000), np.float32)
    image[0, 0, 0] = np.arange(4000) % 2
    u = np.zeros((1, 1, 4000, 2), np.float32)
    u[..., 0] = 0.25 / 1999.5
    sampled = backend.call("interpolate", image, None, u)
    expected = reference.interpolate(image, None, u)
    assert np.abs(sampled - expected).max() < 4000 * np.finfo(np.float32).eps
