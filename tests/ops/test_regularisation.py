"""The losses of a displacement field: diffusion, bending, curvature, elasticity, and volumes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import reference
from backends import Backend
from examples import FIELD_LOSSES
from inputs import SHAPES, assert_close, assert_same, random_array, small_displacement

Array = np.ndarray

IN_MM = ["diffusion_loss", "bending_energy_loss", "curvature_loss", "elasticity_loss"]
SPACING = (0.5, 2.0, 3.5)


def options_of(name: str, dim: int, *, align_corners: bool, in_mm: bool) -> dict[str, Any]:
    options: dict[str, Any] = {"align_corners": align_corners}
    if in_mm and name in IN_MM:
        options["spacing"] = SPACING[:dim]
    if name == "elasticity_loss":
        options |= {"mu": 0.7, "lam": 1.3}
    return options


def expected_gradient(name: str, u: Array, cotangent: Array, **options: Any) -> Array:
    """Of ``sum(cotangent * loss)``, where nothing is reduced."""
    if name == "jacobian_loss":
        options = {"align_corners": options["align_corners"]}
        determinant = reference.jacobian_determinant(u, **options)
        weight = np.reshape(cotangent, (-1, *[1] * (u.ndim - 2))) / math.prod(u.shape[1:-1])
        slope = weight * reference.jacobian_loss_slope(determinant)
        # A determinant is affine in any one number of the field: a large step is exact.
        return reference.vjp_by_central_differences(
            lambda field: reference.jacobian_determinant(field, **options), (u,), slope, (0,), 1.0
        )[0]
    # The others are quadratic, for which central differences are exact as well.
    return reference.vjp_by_central_differences(
        lambda field: getattr(reference, name)(field, reduction="none", **options),
        (u,),
        cotangent,
        (0,),
        1.0,
    )[0]


def check(backend: Backend, name: str, u: Array, **options: Any) -> None:
    """Values and gradients with every reduction."""
    dtype = u.dtype
    exact = u.astype(np.float64)
    each = random_array(1, len(u), dtype=dtype)
    shares = {"none": each, "sum": dtype.type(0.7), "mean": dtype.type(-1.3)}
    unit = [expected_gradient(name, exact[n : n + 1], np.ones(1), **options) for n in range(len(u))]
    for reduction, cotangent in shares.items():
        expected = getattr(reference, name)(exact, reduction=reduction, **options)
        value, (gradient,) = backend.value_and_vjp(
            name, (u,), np.asarray(cotangent), (0,), reduction=reduction, **options
        )
        assert_close(value, np.asarray(expected), dtype)
        weights = np.broadcast_to(cotangent / (len(u) if reduction == "mean" else 1), len(u))
        assert_close(
            gradient, np.concatenate([w * g for w, g in zip(weights, unit, strict=True)]), dtype
        )


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("name", FIELD_LOSSES)
def test_losses_have_the_reference_values_and_gradients(
    backend: Backend, name: str, dim: int, align_corners: bool, dtype: object
) -> None:
    u = small_displacement(0, 2, SHAPES[dim], 0.3, dtype)
    in_mm = align_corners == (dim == 3)
    check(backend, name, u, **options_of(name, dim, align_corners=align_corners, in_mm=in_mm))


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize(
    "shape", [(1, 6), (2, 1), (3, 2), (1, 6, 2), (3, 1, 4), (2, 3, 1), (1, 1, 1), (4, 1, 1)]
)
@pytest.mark.parametrize("name", FIELD_LOSSES)
def test_axes_of_one_to_three_voxels(
    backend: Backend, name: str, shape: tuple[int, ...], align_corners: bool
) -> None:
    u = random_array(0, 1, *shape, len(shape))
    options = options_of(name, len(shape), align_corners=align_corners, in_mm=True)
    check(backend, name, u, **options)


@pytest.mark.parametrize("name", FIELD_LOSSES)
@pytest.mark.parametrize(
    "shape",
    [(35, 11, 13), (3, 70), (40, 5, 41), (7, 6, 30), (9, 41), (19, 12, 36), (6, 17, 64), (5, 9, 4)],
)
def test_nothing_is_lost_where_the_work_is_divided(
    backend: Backend, name: str, shape: tuple[int, ...]
) -> None:
    """Planes, rows and columns are taken in pieces that these sizes are no multiples of."""
    check_slopes(backend, name, shape, seeds=3)


@pytest.mark.parametrize("name", ["diffusion_loss", "elasticity_loss"])
def test_nothing_is_lost_where_pieces_are_long(backend: Backend, name: str) -> None:
    """Of a volume that keeps a GPU busy they have more planes."""
    shape = (35, 1060, 65)
    check_slopes(backend, name, shape, seeds=1)
    u = small_displacement(0, 1, shape, 0.4 / max(shape))
    gradients = [
        backend.value_and_vjp(name, (u.astype(dtype),), np.ones((), dtype), (0,))[1][0]
        for dtype in (np.float32, np.float64)
    ]
    assert_close(gradients[0], gradients[1], np.float32)


def check_slopes(backend: Backend, name: str, shape: tuple[int, ...], seeds: int) -> None:
    """Compare the value with the reference, and the gradient with differences of it."""
    dim = len(shape)
    u = small_displacement(0, 2, shape, 0.4 / max(shape))
    options = options_of(name, dim, align_corners=True, in_mm=True) | {"reduction": "sum"}
    value, (gradient,) = backend.value_and_vjp(name, (u,), np.ones(()), (0,), **options)
    function = getattr(reference, name)
    assert_close(value, np.asarray(function(u, **options)), np.float64)
    for seed in range(seeds):
        step = small_displacement(2 + seed, 2, shape)
        # The difference is exact for what is quadratic, and here nearly so for the logarithm.
        size = 1e-5 if name == "jacobian_loss" else 1.0
        slope = (function(u + size * step, **options) - function(u - size * step, **options)) / (
            2 * size
        )
        tolerance = 1e-7 if name == "jacobian_loss" else 1e-11
        scale = np.abs(gradient * step).sum()
        assert abs((gradient * step).sum() - slope) <= tolerance * scale


def linear_field(matrix: Array, shape: tuple[int, ...], offset: float = 0.0) -> Array:
    """The displacement ``matrix x`` in voxels, as a normalised one: ``(1, *shape, D)``."""
    x = reference.offsets_from_centre(shape)
    return ((x @ matrix.T + offset) / reference.half_extent(shape, True))[None]


def turn(dim: int, angle: float) -> Array:
    matrix = np.eye(dim)
    matrix[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    return matrix


@pytest.mark.parametrize("dim", [2, 3])
def test_what_costs_nothing(backend: Backend, dim: int) -> None:
    shape = SHAPES[dim]
    matrix = random_array(0, dim, dim)
    shift = linear_field(np.zeros((dim, dim)), shape, offset=3.0)
    free = [(name, shift) for name in FIELD_LOSSES]
    free += [(name, linear_field(matrix, shape, 2.0)) for name in FIELD_LOSSES[1:3]]
    # A small turn strains nothing, and no turn changes a volume.
    free += [(name, linear_field(matrix - matrix.T, shape)) for name in FIELD_LOSSES[3:5]]
    free += [("jacobian_loss", linear_field(turn(dim, 0.3) - np.eye(dim), shape))]
    for name, field in free:
        assert backend.call(name, field) <= 1e-24, name


@pytest.mark.parametrize("dim", [2, 3])
def test_what_a_linear_map_costs(backend: Backend, dim: int) -> None:
    shape = SHAPES[dim]
    matrix = 0.2 * random_array(0, dim, dim)
    field = linear_field(matrix, shape)
    size = np.array(shape[::-1])
    strain = (matrix + matrix.T) / 2
    expected = {
        # The last voxel of an axis has no slope along it.
        "diffusion_loss": (matrix**2 * (size - 1) / size).sum(),
        "elasticity_loss": (strain**2).sum() + np.trace(strain) ** 2 / 2,
        "divergence_loss": np.trace(matrix) ** 2,
        "jacobian_loss": np.log(np.linalg.det(np.eye(dim) + matrix)) ** 2,
    }
    for name, value in expected.items():
        assert_close(backend.call(name, field), np.asarray(value), np.float64)


def test_to_half_a_volume_costs_as_much_as_to_double_it(backend: Backend) -> None:
    half, double = (
        backend.call("jacobian_loss", linear_field((factor - 1) * np.eye(2), (6, 7)))
        for factor in (math.sqrt(0.5), math.sqrt(2))
    )
    assert_close(half, double, np.float64)
    assert_close(half, np.asarray(math.log(2) ** 2), np.float64)


def test_a_fold_opens_along_the_gradient(backend: Backend) -> None:
    u = np.zeros((1, 5, 9, 2))
    u[0, :, 4, 0] = -0.6  # two voxels and more
    before = backend.call("jacobian_determinant", u).min()
    assert before < 0
    for _ in range(200):
        (gradient,) = backend.vjp("jacobian_loss", (u,), np.ones(()), (0,))
        assert np.isfinite(gradient).all()
        u -= 0.01 * gradient / np.abs(gradient).max()
    assert backend.call("jacobian_determinant", u).min() > 0.2


@pytest.mark.parametrize("name", IN_MM)
def test_lengths_are_in_mm_where_there_is_a_spacing(backend: Backend, name: str) -> None:
    u = small_displacement(0, 1, (4, 5, 6))
    in_voxels = backend.call(name, u)
    assert_same(backend.call(name, u, spacing=(1.0, 1.0, 1.0)), in_voxels)
    # A slope has no unit; a second derivative is one per mm.
    second = name in ("bending_energy_loss", "curvature_loss")
    expected = in_voxels / 9 if second else in_voxels
    assert_close(backend.call(name, u, spacing=(3.0, 3.0, 3.0)), expected, np.float64)


@pytest.mark.parametrize("name", FIELD_LOSSES)
def test_a_mirrored_field_costs_the_same(backend: Backend, name: str) -> None:
    u = small_displacement(0, 1, (4, 5, 6))
    mirrored = u[:, :, :, ::-1] * [-1, 1, 1]
    assert_close(backend.call(name, np.ascontiguousarray(mirrored)), backend.call(name, u), u.dtype)


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence:UserWarning")
@pytest.mark.parametrize("dim", [2, 3])
def test_monai_has_a_share_of_them(backend: Backend, dim: int) -> None:
    """As the docstrings say: where slopes or second derivatives are constant."""
    losses = pytest.importorskip("monai.losses")
    torch = pytest.importorskip("torch")
    shape = SHAPES[dim]
    size = np.array(shape[::-1])
    matrix, form = random_array(0, dim, dim), random_array(1, dim, dim, dim)
    form += np.swapaxes(form, 1, 2)
    x = reference.offsets_from_centre(shape)
    linear = x @ matrix.T
    quadratic = np.einsum("kab,...a,...b->...k", form, x, x) / 2

    def of_monai(loss: Any, in_voxels: Array) -> float:
        return float(loss(torch.tensor(np.moveaxis(in_voxels, -1, 0)[None])))

    def ours(name: str, in_voxels: Array) -> Array:
        return backend.call(name, (in_voxels / reference.half_extent(shape, True))[None])

    slopes = (size - 1) / size
    seconds = np.outer(slopes, slopes)
    np.fill_diagonal(seconds, (size - 2) / size)
    for name, loss, field, squares, share in [
        ("diffusion_loss", losses.DiffusionLoss(), linear, matrix**2, slopes),
        ("bending_energy_loss", losses.BendingEnergyLoss(), quadratic, form**2, seconds),
    ]:
        assert of_monai(loss, field) == pytest.approx(squares.sum() / dim)
        assert ours(name, field) == pytest.approx((squares * share).sum())


@pytest.mark.parametrize("name", FIELD_LOSSES)
def test_many_voxels_are_added_up_precisely(backend: Backend, name: str) -> None:
    u = small_displacement(0, 1, (48, 50, 70), 0.002, np.float32)
    expected = getattr(reference, name)(u)
    assert abs(backend.call(name, u) / expected - 1) < 1e-6


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", FIELD_LOSSES)
def test_an_empty_batch_costs_nothing(backend: Backend, name: str, reduction: str) -> None:
    u = np.zeros((0, 3, 4, 5, 3), np.float32)
    value = backend.call(name, u, reduction=reduction)
    assert_same(value, np.zeros((0,) if reduction == "none" else (), np.float32))
    (gradient,) = backend.vjp(name, (u,), value, (0,), reduction=reduction)
    assert_same(gradient, u)
