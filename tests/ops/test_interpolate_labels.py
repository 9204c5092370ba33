"""``interpolate_labels``: label maps through a transform, by the largest sum of linear weights."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import torch
from backends import BACKENDS, Backend
from inputs import SHAPES, assert_same, off_grid_displacement, random_affine, random_array

import jaxreg
import torchreg

DTYPES = ["bool", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))]
PADDINGS = ["zeros", "border", "reflection"]
NAN, INFINITY = float("nan"), float("inf")


def random_labels(seed: int, *shape: int, dtype: object = np.int32, count: int = 5) -> np.ndarray:
    """The smallest and the largest labels of the dtype, and some in between."""
    rng = np.random.default_rng(seed)
    if np.dtype(dtype) == bool:
        return rng.random(shape) < 0.5
    limits = np.iinfo(dtype)
    between = rng.integers(limits.min, limits.max, count - 2, dtype, endpoint=True)
    return rng.choice(np.array([limits.min, limits.max, *between], dtype), shape)


def check(backend: Backend, *calls: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
    """Labels are the reference's, weights are so up to rounding."""
    weighed = [(operands, {**options, "return_weights": True}) for operands, options in calls]
    results = backend.calls("interpolate_labels", *weighed, *calls)
    for (labels, weights), alone, (operands, options) in zip(
        results[: len(calls)], results[len(calls) :], weighed, strict=True
    ):
        expected, share = reference.interpolate_labels(*operands, **options)
        assert_same(labels, expected)
        assert weights.dtype == np.float32
        np.testing.assert_allclose(weights, share, rtol=0, atol=2e-5)
        assert_same(alone, labels)


@pytest.mark.parametrize("dtype", DTYPES)
def test_labels_of_every_integer_dtype_have_the_reference_values(
    backend: Backend, dtype: str
) -> None:
    """Also those that no floating-point number holds, and their order among equals."""
    labels = random_labels(0, 2, 2, 4, 5, dtype=dtype)
    grid = off_grid_displacement(1, 2, (4, 5), dtype=np.float32)
    half_a_voxel = np.float32([0.5, 0.5]) / [2, 1.5] + 0 * grid
    check(backend, ((labels, None, grid), {"background": 1}), ((labels, None, half_a_voxel), {}))


@pytest.mark.parametrize("field", [np.float32, np.float64])
@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("padding_mode", PADDINGS)
@pytest.mark.parametrize("dim", [2, 3])
def test_samples_lie_where_interpolate_puts_them(
    backend: Backend, dim: int, padding_mode: str, align_corners: bool, field: object
) -> None:
    """With an affine and a displacement in either order, one of them, and a field of its own."""
    shape, out = SHAPES[dim], (3, 4, 5)[:dim]
    labels = random_labels(0, 2, 1, *shape)
    affine = random_affine(1, 2, dim, field)
    grid = off_grid_displacement(2, 1, shape, out, align_corners=align_corners, dtype=field)
    options = {"padding_mode": padding_mode, "align_corners": align_corners, "background": -7}
    check(
        backend,
        ((labels, affine, grid), options),
        ((labels, affine, grid), {**options, "affine_last": True}),
        ((labels, affine, None), {**options, "out_shape": out}),
        ((labels, None, grid), options),
        ((labels, affine, grid), {**options, "is_displacement": False}),
    )


@pytest.mark.parametrize("padding_mode", PADDINGS)
def test_they_are_the_argmax_of_interpolated_indicators(
    backend: Backend, padding_mode: str
) -> None:
    labels = random_labels(0, 1, 1, 5, 6, 7, dtype=np.uint8)
    affine = random_affine(1, 1, 3, np.float32)
    grid = off_grid_displacement(2, 1, (5, 6, 7), dtype=np.float32)
    candidates = np.unique([0, *labels.ravel()])
    indicators = (labels == candidates[:, None, None, None]).astype(np.float32)
    options = {"padding_mode": padding_mode}
    shares = np.array(backend.call("interpolate", indicators, affine, grid, **options))
    if padding_mode == "zeros":
        shares[:, candidates == 0] += 1 - shares.sum(1, keepdims=True)
    actual, weight = backend.call(
        "interpolate_labels", labels, affine, grid, return_weights=True, **options
    )
    ordered = np.sort(shares, axis=1)
    clear = ordered[:, -1:] - ordered[:, -2:-1] > 1e-5
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(actual[clear], candidates[shares.argmax(1)][:, None][clear])
    np.testing.assert_allclose(weight, shares.max(1, keepdims=True), atol=1e-5)


@pytest.mark.parametrize("padding_mode", PADDINGS)
@pytest.mark.parametrize("shape", [(6, 7), (5, 6, 7), (1, 4, 5), (1, 1)])
def test_no_transform_returns_the_labels(
    backend: Backend, shape: tuple[int, ...], padding_mode: str
) -> None:
    labels = random_labels(0, 2, 3, *shape, dtype=np.int64)
    zero = np.zeros((1, *shape, len(shape)), np.float32)
    identity = np.eye(len(shape), len(shape) + 1, dtype=np.float32)[None]
    options = {"padding_mode": padding_mode, "return_weights": True}
    calls = [(labels,), (labels, identity), (labels, None, zero), (labels, identity, zero)]
    for actual, weights in backend.calls(
        "interpolate_labels", *((operands, options) for operands in calls)
    ):
        assert_same(actual, labels)
        assert_same(weights, np.ones(labels.shape, np.float32))


def test_a_shift_by_whole_voxels_moves_labels_and_fills_in_the_background(
    backend: Backend,
) -> None:
    labels = random_labels(0, 1, 1, 5, 9, dtype=np.int16)
    grid = np.zeros((1, 5, 9, 2), np.float32)
    grid[..., 0], grid[..., 1] = 2 / 4, -1 / 2  # two voxels to the right, one up
    moved = backend.call("interpolate_labels", labels, None, grid, background=-5)
    expected = np.full_like(labels, -5)
    expected[..., 1:, :-2] = labels[..., :-1, 2:]
    assert_same(moved, expected)


def test_of_labels_that_weigh_the_same_the_smallest_wins(backend: Backend) -> None:
    """Half-way between voxels, in whatever order they come; the background is one of them."""
    for dtype, pairs in [(np.int8, [(-3, 2), (2, -3)]), (np.uint8, [(200, 3), (3, 200)])]:
        for pair in pairs:
            labels = np.array(pair, dtype).reshape(1, 1, 1, 2)
            middle = backend.call("interpolate_labels", labels, out_shape=(1, 3))
            assert_same(middle[..., 1], np.full((1, 1, 1), min(pair), dtype))
    labels = np.full((1, 1, 1, 2), 7, np.int64)
    outside = np.array([[[[-2.0, 0.0]]]])  # half a voxel outside
    for background, winner in [(6, 6), (8, 7)]:
        sample = backend.call(
            "interpolate_labels",
            labels,
            None,
            outside,
            is_displacement=False,
            background=background,
        )
        assert sample.item() == winner


def test_labels_win_together_where_each_alone_would_lose(backend: Backend) -> None:
    """Weights 0.09, 0.21, 0.21 and 0.49: two of 0.21 and one of 0.09 are more than 0.49."""
    labels = np.array([[4, 4], [4, 1]], np.uint8)[None, None]
    position = np.float32([[[[0.4, 0.4]]]])
    for field in (position, position.astype(np.float64)):
        label, weight = backend.call(
            *("interpolate_labels", labels, None, field),
            is_displacement=False,
            return_weights=True,
        )
        assert label.item() == 4
        assert weight.item() == pytest.approx(0.51, abs=1e-6)


@pytest.mark.parametrize("value", [NAN, INFINITY, -INFINITY])
def test_a_sample_at_no_position_lies_outside(backend: Backend, value: float) -> None:
    labels = random_labels(0, 1, 1, 4, 5)
    grid = np.zeros((1, 4, 5, 2), np.float32)
    grid[0, 2, 3, 0] = value
    expected = labels.copy()
    expected[..., 2, 3] = 9
    options = {"return_weights": True, "background": 9}
    actual, weights = backend.call("interpolate_labels", labels, None, grid, **options)
    assert_same(actual, expected)
    assert_same(weights, np.ones(labels.shape, np.float32))
    for padding_mode in ("border", "reflection"):
        options["padding_mode"] = padding_mode
        actual, _ = backend.call("interpolate_labels", labels, None, grid, **options)
        assert actual[0, 0, 2, 3] in labels
        assert (actual != labels).sum() <= 1


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_the_fields_dtype_does_not_matter_to_the_labels(backend: Backend, dtype: object) -> None:
    labels = random_labels(0, 1, 1, 5, 6, dtype=np.uint8)
    grid = off_grid_displacement(1, 1, (5, 6)).astype(np.float16).astype(dtype)
    check(backend, ((labels, np.eye(2, 3, dtype=np.float32)[None], grid), {}))


def test_an_empty_batch_gives_empty_labels(backend: Backend) -> None:
    labels = np.zeros((0, 2, 4, 5), np.int16)
    actual, weights = backend.call("interpolate_labels", labels, return_weights=True)
    assert_same(actual, labels)
    assert_same(weights, np.zeros(labels.shape, np.float32))


def test_a_row_longer_than_a_warp_and_several_threads(backend: Backend) -> None:
    labels = random_labels(0, 1, 2, 70, 131, dtype=np.int64)
    check(backend, ((labels, None, off_grid_displacement(1, 1, (70, 131))), {}))


# ------------------------------------------------------------------------------------ derivatives


def example() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    grid = off_grid_displacement(1, 1, (4, 5), dtype=np.float32)
    return random_labels(0, 1, 1, 4, 5), random_affine(2, 1, 2, np.float32), grid


def test_in_torch_labels_are_constants() -> None:
    """As those of ``torch.argmax``: a loss may contain them, and its other terms count."""
    labels, affine, grid = map(torch.tensor, example())
    expected = torchreg.interpolate_labels(labels, affine, grid)

    def loss(affine: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
        return torchreg.interpolate_labels(labels, affine, grid).sum() + 2 * grid.sum()

    grid.requires_grad_()
    result = torchreg.interpolate_labels(labels, affine.requires_grad_(), grid)
    assert result.grad_fn is None
    assert torch.equal(result, expected)
    (gradient,) = torch.autograd.grad(loss(affine, grid), grid)
    plain = affine.detach(), grid.detach()
    gradients = [gradient, torch.func.grad(loss, 1)(*plain)]
    for function in (loss, torch.func.grad(loss, 1)):
        compiled = torch.compile(function, backend="aot_eager")
        value = compiled(affine, grid) if function is loss else compiled(*plain)
        gradients.append(torch.autograd.grad(value, grid)[0] if function is loss else value)
    for gradient in gradients:
        assert torch.equal(gradient, torch.full_like(gradient, 2))
    tangent = torch.func.jvp(lambda g: loss(plain[0], g), (plain[1],), (plain[1],))[1]
    torch.testing.assert_close(tangent, 2 * plain[1].sum())


def test_in_jax_labels_are_constants() -> None:
    """As those of ``jnp.argmax``: their tangents are float0."""
    labels, affine, grid = example()

    def loss(affine: Any, grid: Any) -> Any:
        return jaxreg.interpolate_labels(labels, affine, grid).sum() + 2 * jnp.sum(grid)

    for transform in (lambda f: f, jax.jit, jax.checkpoint):
        to_affine, to_grid = jax.grad(transform(loss), (0, 1))(affine, grid)
        assert_same(np.asarray(to_affine), np.zeros_like(affine))
        assert_same(np.asarray(to_grid), np.full_like(grid, 2))
    _, tangent = jax.jvp(lambda g: jaxreg.interpolate_labels(labels, None, g), (grid,), (grid,))
    assert tangent.dtype == jax.dtypes.float0


@pytest.mark.parametrize("operand", ["affine", "grid"])
def test_weights_refuse_to_be_differentiated(operand: str) -> None:
    """They do vary with the transform, and a gradient of zero would be wrong."""
    labels, affine, grid = example()
    fixed = {"affine": affine, "grid": grid}

    def in_jax(value: Any) -> Any:
        operands = fixed | {operand: value}
        return jaxreg.interpolate_labels(labels, **operands, return_weights=True)[1].sum()

    for derivative in (jax.grad(in_jax), jax.jit(jax.grad(in_jax)), jax.jacfwd(in_jax)):
        with pytest.raises(TypeError, match=rf"interpolate_labels: {operand}: expected .*constant"):
            derivative(fixed[operand])

    def in_torch(value: torch.Tensor) -> torch.Tensor:
        operands = {name: torch.tensor(x) for name, x in fixed.items()} | {operand: value}
        labels_ = torch.tensor(labels)
        return torchreg.interpolate_labels(labels_, **operands, return_weights=True)[1].sum()

    value = torch.tensor(fixed[operand])
    message = rf"interpolate_labels: {operand}: expected .*no gradient"
    with pytest.raises(ValueError, match=message):
        in_torch(value.clone().requires_grad_())
    with pytest.raises(ValueError, match=message):
        torch.func.grad(in_torch)(value)
    with pytest.raises(ValueError, match=message):
        torch.func.vmap(torch.func.grad(in_torch))(value[None])
    with pytest.raises(NotImplementedError, match="forward mode"):
        torch.func.jvp(in_torch, (value,), (value,))


def test_without_double_precision_jax_holds_labels_in_32_bits() -> None:
    """As any array of integers."""
    labels = np.arange(20).reshape(1, 1, 4, 5)
    with jax.enable_x64(False):
        assert jaxreg.interpolate_labels(labels).dtype == np.int32


@pytest.mark.parametrize("package", ["jax", "torch"])
def test_floating_point_labels_are_refused_by_name(package: str) -> None:
    labels = random_array(0, 1, 1, 4, 5)
    with pytest.raises(TypeError, match="labels: expected an integer dtype or bool, got float64"):
        BACKENDS[package, "cpu"].call("interpolate_labels", labels)
