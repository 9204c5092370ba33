"""``deterministic=True``: gradients to what is sampled have the same bits every time.

On the CPU they always do. On a GPU they are sums of integers then.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from backends import BACKENDS, Backend
from inputs import HALVES, assert_close, assert_same, random_affine, random_array

import torchreg


@dataclass(frozen=True)
class Crowd:
    """A call in which many voxels sample the same few, and a cotangent for it."""

    name: str
    operands: tuple[np.ndarray, ...]
    cotangent: np.ndarray

    mode: str = "bilinear"

    def gradient(self, backend: Backend, *, deterministic: bool) -> np.ndarray:
        """The gradient to the first operand, the one that is sampled."""
        options = {"deterministic": deterministic, "mode": self.mode}
        (gradient,) = backend.vjp(self.name, self.operands, self.cotangent, (0,), **options)
        return gradient


def crowd(
    name: str, dtype: object = np.float32, *, shape: tuple[int, ...] = (6, 7, 8), sampled: int = 3
) -> Crowd:
    """Of batch 3; ``sampled`` is the batch size of the first operand."""
    dim = len(shape)
    wide = np.float64 if dtype == np.float64 else np.float32
    grid = 0.2 * random_array(1, 3, *shape, dim)
    affine = 0.3 * random_affine(2, 1, dim)
    if name == "compose":
        u = random_array(0, sampled, *shape, dim, dtype=dtype)
        cotangent = random_array(3, *grid.shape, dtype=dtype)
        return Crowd(name, (u, grid.astype(wide), affine.astype(wide)), cotangent)
    image = random_array(0, sampled, 2, *shape, dtype=dtype)
    cotangent = random_array(3, 3, 2, *shape, dtype=dtype)
    return Crowd(name, (image, affine.astype(wide), grid.astype(wide)), cotangent)


NAMES = ["interpolate", "compose"]
CALLS = [
    *itertools.product(NAMES, [np.float32, np.float64]),
    *itertools.product(["interpolate"], HALVES),
]


@pytest.mark.parametrize("sampled", [1, 3])
@pytest.mark.parametrize("shape", [(9, 7), (6, 7, 8)])
@pytest.mark.parametrize(
    ("name", "dtype"), CALLS, ids=lambda x: x if isinstance(x, str) else np.dtype(x).name
)
def test_it_is_the_gradient(
    backend: Backend, name: str, dtype: object, shape: tuple[int, ...], sampled: int
) -> None:
    """Of an array of one batch item, too, which sums over those that sample it."""
    call = crowd(name, dtype, shape=shape, sampled=sampled)
    exact = Crowd(
        name,
        tuple(operand.astype(np.float64) for operand in call.operands),
        call.cotangent.astype(np.float64),
    )
    expected = exact.gradient(backend, deterministic=False)
    assert_close(call.gradient(backend, deterministic=True), expected, dtype)


@pytest.mark.parametrize("name", NAMES)
def test_every_time_and_in_both_packages_it_has_the_same_bits(backend: Backend, name: str) -> None:
    call = crowd(name, shape=(29, 37, 43), sampled=1)
    first = call.gradient(BACKENDS["torch", backend.device], deterministic=True)
    for _ in range(3):
        assert_same(call.gradient(backend, deterministic=True), first)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_what_is_not_finite_stays_so_where_it_is_sampled(backend: Backend, dtype: object) -> None:
    call = crowd("interpolate", dtype)
    cotangent = call.cotangent.copy()
    cotangent[0, 0, 1, 2, 3], cotangent[0, 1, 3, 3, 3] = np.nan, np.inf
    cotangent[1, 0, 2, 2, 2], cotangent[1, 0, 2, 2, 3] = np.inf, -np.inf
    call = replace(call, cotangent=cotangent)
    expected = call.gradient(backend, deterministic=False)
    actual = call.gradient(backend, deterministic=True)
    finite = np.isfinite(expected)
    assert not finite.all(axis=(2, 3, 4))[[0, 0, 1], [0, 1, 0]].any()
    assert finite[2].all()
    np.testing.assert_array_equal(actual[~finite], expected[~finite])
    assert_close(actual[finite], expected[finite].astype(np.float64), dtype)


@pytest.mark.parametrize(
    ("scale", "dtype"), [(1e-30, np.float32), (1e37, np.float32), (1e-250, np.float64)]
)
def test_cotangents_of_any_size_keep_their_digits(
    backend: Backend, scale: float, dtype: object
) -> None:
    call = crowd("interpolate", dtype)
    scaled = replace(call, cotangent=call.cotangent * np.array(scale, dtype))
    actual = scaled.gradient(backend, deterministic=True).astype(np.float64) / scale
    expected = call.gradient(backend, deterministic=True).astype(np.float64)
    assert_close(actual.astype(dtype), expected, dtype)


def test_sums_beyond_the_largest_number_are_infinite(backend: Backend) -> None:
    image, grid = np.zeros((1, 1, 1, 1), np.float32), np.zeros((1, 8, 8, 2), np.float32)
    call = Crowd("interpolate", (image, np.eye(2, 3, dtype=np.float32)[None], grid), grid)
    for value, total in [(3e38, np.inf), (-3e38, -np.inf), (1.0, 64.0), (0.0, 0.0)]:
        cotangent = np.full((1, 1, 8, 8), value, np.float32)
        gradient = replace(call, cotangent=cotangent).gradient(backend, deterministic=True)
        assert_same(gradient, np.full((1, 1, 1, 1), total, np.float32))


def test_an_empty_batch_has_no_gradient(backend: Backend) -> None:
    image, grid = np.ones((1, 2, 4, 5), np.float32), np.zeros((0, 4, 5, 2), np.float32)
    affine = np.eye(2, 3, dtype=np.float32)[None]
    call = Crowd("interpolate", (image, affine, grid), np.zeros((0, 2, 4, 5), np.float32))
    assert_same(call.gradient(backend, deterministic=True), np.zeros_like(image))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_mapped_calls_do_not_share_a_scale(device: str) -> None:
    """A cotangent of 1e20 in one would leave nothing of 1e-20 in the other."""
    image, grid = torch.rand(2, 1, 1, 6, 7, device=device), torch.rand(1, 6, 7, 2, device=device)
    size = torch.tensor([1e-20, 1e20], device=device)

    def loss(image: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
        return size * torchreg.interpolate(image, grid=grid, deterministic=True).sum()

    mapped = torch.func.vmap(torch.func.grad(loss))(image, size)
    for k in range(2):
        torch.testing.assert_close(mapped[k], torch.func.grad(loss)(image[k], size[k]))


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_deterministic_algorithms_of_torch_are_repeatable(name: str) -> None:
    call = crowd(name, shape=(29, 37, 43), sampled=1)
    operands = [torch.tensor(operand, device="cuda") for operand in call.operands]
    cotangent = torch.tensor(call.cotangent, device="cuda")
    leaf = operands[0].requires_grad_()
    torch.use_deterministic_algorithms(True)
    try:
        values = [getattr(torchreg, name)(*operands) for _ in range(4)]
    finally:
        torch.use_deterministic_algorithms(False)
    first, *others = [torch.autograd.grad(value, leaf, cotangent)[0] for value in values]
    for other in others:
        assert torch.equal(other, first)
