"""``invert_displacement``: the displacement that undoes another one."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
import reference
import torch
from backends import Backend
from inputs import SHAPES, assert_close, assert_same, random_array, small_displacement

import jaxreg
import torchreg
from jaxreg._shared_planes import overwriting

NAN, INFINITY = float("nan"), float("inf")
PADDINGS = ["zeros", "border", "reflection"]


def gentle(seed: int, batch: int, shape: tuple[int, ...], dtype: object = np.float64) -> np.ndarray:
    """At random at every voxel, and yet a contraction: at most an eighth of a voxel."""
    return small_displacement(seed, batch, shape, 0.25 / max(shape), dtype)


def diffeomorphism(
    seed: int, shape: tuple[int, ...], voxels: float, smoothness: float
) -> np.ndarray:
    """The flow of a smooth random velocity, whose largest component is so many voxels."""
    half = reference.half_extent(shape, True)
    velocity = random_array(seed, 1, *shape, len(shape))
    velocity = reference.gaussian_smooth(velocity, smoothness, channel_last=True)
    velocity *= voxels / abs(velocity).max()
    return reference.scaling_and_squaring(velocity / half, 7)


def distance(displacement: np.ndarray, inverse: np.ndarray, **options: Any) -> np.ndarray:
    """From where a point starts to where it is after both, in voxels."""
    half = reference.half_extent(inverse.shape[1:-1], options.get("align_corners", True))
    error = half * reference.compose(displacement, inverse, **options)
    return np.linalg.norm(error, axis=-1)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("padding_mode", PADDINGS)
@pytest.mark.parametrize("dim", [2, 3])
def test_inverses_have_the_reference_values(
    backend: Backend, dim: int, padding_mode: str, align_corners: bool, dtype: object
) -> None:
    u = gentle(0, 2, SHAPES[dim], dtype)
    options = {"padding_mode": padding_mode, "align_corners": align_corners}
    expected = reference.invert_displacement(u, **options)
    inverse, residual = backend.call(
        "invert_displacement", u, tolerance=0.0, return_residual=True, **options
    )
    assert_close(inverse, expected, dtype)
    assert residual.dtype == np.float32
    assert residual.max() < 1e-5


@pytest.mark.parametrize(
    ("shape", "voxels", "smoothness"), [((48, 50), 8.0, 3.0), ((20, 24, 28), 5.0, 2.5)]
)
def test_displacements_of_many_voxels_are_undone(
    backend: Backend, shape: tuple[int, ...], voxels: float, smoothness: float
) -> None:
    """Also where the fixed-point iteration has no chance; every residual is what it says."""
    u = diffeomorphism(0, shape, voxels, smoothness)
    determinant = reference.jacobian_determinant(u)
    assert 0 < determinant.min() < 0.2
    assert determinant.max() > 2  # a slope above 1
    inverse, residual = backend.call(
        "invert_displacement", u.astype(np.float32), return_residual=True
    )
    assert (residual <= 0.01).all()
    np.testing.assert_allclose(distance(u, inverse), residual, atol=1e-4)
    tight = backend.call("invert_displacement", u, tolerance=1e-9)
    assert distance(u, tight).max() < 1e-8
    plain = np.zeros_like(u)
    for _ in range(50):
        plain = -reference.compose(u, plain, add=False)
    assert (distance(u, plain) > 0.01).any()


@pytest.mark.parametrize("dim", [2, 3])
def test_a_linear_map_has_the_inverse_of_its_matrix(backend: Backend, dim: int) -> None:
    """Where all of it happens inside the volume."""
    shape = (9, 11, 13)[:dim]
    x = reference.normalised_coordinates(shape)
    matrix = np.eye(dim) + 0.3 * random_array(0, dim, dim)
    inside = (abs(x @ np.linalg.inv(matrix).T) < 0.99).all(-1)
    assert inside.mean() > 0.2
    u = (x @ matrix.T - x)[None]
    inverse = backend.call("invert_displacement", u, tolerance=1e-12)
    expected = x @ np.linalg.inv(matrix).T - x
    np.testing.assert_allclose(inverse[0][inside], expected[inside], atol=1e-11)


def test_a_whole_shift_goes_back(backend: Backend) -> None:
    u = np.zeros((2, 5, 9, 2), np.float32)
    u[0, ..., 0], u[1, ..., 1] = 2 / 4, -1 / 2
    assert_same(backend.call("invert_displacement", u), -u)


@pytest.mark.parametrize("dim", [2, 3])
def test_the_inverse_of_the_inverse_is_the_displacement(backend: Backend, dim: int) -> None:
    """Up to the error of interpolating one of them linearly."""
    shape = (24, 25, 26)[:dim]
    u = diffeomorphism(1, shape, 0.6, 4.0)
    inverse = backend.call("invert_displacement", u, tolerance=1e-6)
    back = backend.call("invert_displacement", inverse, tolerance=1e-6)
    middle = (0, *[slice(4, -4)] * dim)
    error = (back - u)[middle] * reference.half_extent(shape, True)
    assert abs(error).max() < 0.05


@pytest.mark.parametrize("shape", [(1, 6), (2, 1), (1, 6, 2), (2, 2, 1), (1, 1, 1)])
@pytest.mark.parametrize("align_corners", [True, False])
def test_axes_of_one_and_two_voxels(
    backend: Backend, shape: tuple[int, ...], align_corners: bool
) -> None:
    u = gentle(0, 1, shape)
    expected = reference.invert_displacement(u, align_corners=align_corners)
    inverse = backend.call("invert_displacement", u, tolerance=0.0, align_corners=align_corners)
    assert_close(inverse, expected, np.float64)


@pytest.mark.parametrize("value", [5.0, NAN, INFINITY])
def test_an_axis_of_one_voxel_has_no_displacement(backend: Backend, value: float) -> None:
    u = gentle(0, 1, (1, 5, 6))
    spoilt = u.copy()
    spoilt[..., 2] = value
    plain, spoilt = (
        backend.call("invert_displacement", field, return_residual=True) for field in (u, spoilt)
    )
    for actual, expected in zip(spoilt, plain, strict=True):
        assert_same(actual, expected)
    assert (plain[0][..., 2] == 0).all()


def test_a_good_guess_needs_no_iterations(backend: Backend) -> None:
    u = diffeomorphism(0, (30, 31), 3.0, 3.0)
    inverse = backend.call("invert_displacement", u, tolerance=1e-3)
    options = {"tolerance": 2e-3, "max_iterations": 1}
    again = backend.call("invert_displacement", u, inverse, **options)
    np.testing.assert_allclose(again, inverse, atol=1e-12)
    from_nothing, residual = backend.call("invert_displacement", u, return_residual=True, **options)
    assert (from_nothing == 0).all()
    np.testing.assert_allclose(residual, distance(u, from_nothing), rtol=1e-5)


def test_more_iterations_never_make_it_worse(backend: Backend) -> None:
    u = diffeomorphism(2, (30, 31), 6.0, 3.0)
    last = np.full((1, 30, 31), INFINITY)
    for count in (1, 2, 3, 5, 8, 50):
        _, residual = backend.call(
            "invert_displacement", u, max_iterations=count, return_residual=True
        )
        assert (residual <= last).all()
        last = residual
    assert (last <= 0.01).all()


def test_folds_are_reported(backend: Backend) -> None:
    """Neighbours that are thrown past each other: not every voxel finds what comes to lie there."""
    u = random_array(0, 1, 20, 21, 2)  # of up to ten voxels
    inverse, residual = backend.call("invert_displacement", u, return_residual=True)
    assert np.isfinite(inverse).all()
    assert 0.1 < (residual > 0.01).mean() < 0.9
    np.testing.assert_allclose(distance(u, inverse), residual, rtol=1e-6, atol=1e-12)
    assert (residual <= distance(u, np.zeros_like(u)) + 1e-6).all(), "never worse than nothing"


def test_what_is_not_finite_is_reported_and_reaches_no_further(backend: Backend) -> None:
    u = gentle(0, 1, (7, 8))
    spoilt = u.copy()
    spoilt[0, 2, 5, 0] = NAN
    spoilt[0, 5, 1] = INFINITY
    expected = backend.call("invert_displacement", u)
    inverse, residual = backend.call("invert_displacement", spoilt, return_residual=True)
    for place in [(0, 2, 5), (0, 5, 1)]:  # a sample at the voxel itself, where all of them start
        assert residual[place] == INFINITY
        assert (inverse[place] == 0).all()
    assert np.isfinite(inverse).all()
    assert not np.isnan(residual).any()
    near = np.zeros((1, 7, 8), bool)
    near[0, 1:4, 4:7] = near[0, 4:7, 0:3] = True
    assert_same(inverse[~near], expected[~near])
    assert (residual[~near] <= 0.01).all()
    good = residual <= 0.01
    assert distance(u, inverse)[good].max() <= 0.011
    assert_same(backend.call("invert_displacement", u, np.full_like(u, NAN)), expected)


def test_an_empty_batch_gives_an_empty_result(backend: Backend) -> None:
    u = np.zeros((0, 3, 4, 5, 3), np.float32)
    inverse, residual = backend.call("invert_displacement", u, return_residual=True)
    assert_same(inverse, u)
    assert_same(residual, np.zeros((0, 3, 4, 5), np.float32))


def test_one_guess_serves_a_batch(backend: Backend) -> None:
    u, guess = gentle(0, 2, (5, 6)), gentle(1, 1, (5, 6))
    both = backend.call("invert_displacement", u, guess)
    each = [backend.call("invert_displacement", u[n : n + 1], guess) for n in range(2)]
    assert_same(both, np.concatenate(each))
    swapped = backend.call("invert_displacement", guess, u)
    assert swapped.shape == u.shape


def test_the_inverse_may_take_the_place_of_the_guess(backend: Backend) -> None:
    if backend.framework != "jax":
        pytest.skip("PyTorch has memory for each result")
    u, guess = (gentle(seed, 1, (9, 20, 37), np.float32) for seed in (0, 1))

    def invert(u: Any, guess: Any) -> Any:
        with overwriting():
            return jaxreg.invert_displacement(u, guess)

    compiled = jax.jit(invert, donate_argnums=1).lower(*map(backend.array, (u, guess))).compile()
    assert compiled.memory_analysis().alias_size_in_bytes == guess.nbytes
    found = np.asarray(compiled(*map(backend.array, (u, guess))))
    assert_same(found, backend.call("invert_displacement", u, guess))


@pytest.mark.parametrize("operand", ["displacement", "initial"])
def test_differentiating_is_refused_by_name(operand: str) -> None:
    fixed = {name: gentle(0, 1, (4, 5)) for name in ("displacement", "initial")}

    def in_jax(value: Any) -> Any:
        return jaxreg.invert_displacement(**(fixed | {operand: value})).sum()

    for derivative in (jax.grad(in_jax), jax.jit(jax.grad(in_jax)), jax.jacfwd(in_jax)):
        with pytest.raises(TypeError, match=rf"invert_displacement: {operand}: .*stop_gradient"):
            derivative(fixed[operand])

    def in_torch(value: torch.Tensor) -> torch.Tensor:
        operands = {name: torch.tensor(x) for name, x in fixed.items()} | {operand: value}
        return torchreg.invert_displacement(**operands).sum()

    value = torch.tensor(fixed[operand])
    message = rf"invert_displacement: {operand}: expected .*no gradient"
    with pytest.raises(ValueError, match=message):
        in_torch(value.clone().requires_grad_())
    slope = torch.func.grad(in_torch)
    for function in (slope, torch.compile(slope, backend="aot_eager")):
        with pytest.raises(ValueError, match=message):
            function(value)
    with pytest.raises(NotImplementedError, match="forward mode"):
        torch.func.jvp(in_torch, (value,), (value,))
    with torch.no_grad():
        assert in_torch(value.clone().requires_grad_()).isfinite()
