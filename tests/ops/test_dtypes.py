"""Half precision and mixed dtypes: what is stored in them, what is computed, what comes back."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import torch
from backends import Backend
from examples import FIELD_LOSSES, LOSSES, OPERANDS, OPS, WITHOUT_GRADIENT, example
from inputs import HALVES, assert_close, assert_same, random_array, small_displacement
from ml_dtypes import bfloat16

import jaxreg
import torchreg
from regkernels import _core

FLOAT32, FLOAT64 = np.float32, np.float64
HALF = pytest.mark.parametrize("dtype", HALVES, ids=lambda dtype: np.dtype(dtype).name)


def check_values_and_gradients(
    backend: Backend, name: str, operands: list[np.ndarray], dtype: object, **options: Any
) -> None:
    """The values that are stored count as exact; float64 tells what should come of them.

    The result has ``dtype``, each gradient its operand's.
    """
    exact = [operand.astype(FLOAT64) for operand in operands]
    expected = getattr(reference, name)(*exact, **options)
    cotangent = random_array(99, *expected.shape, dtype=dtype)
    wrt = () if name in WITHOUT_GRADIENT else range(len(operands))
    value, gradients = backend.value_and_vjp(name, operands, cotangent, wrt, **options)
    assert_close(value, expected, dtype)
    # That float64 gradients are the reference's is for the tests of each op.
    expected_gradients = backend.vjp(name, exact, cotangent.astype(FLOAT64), wrt, **options)
    for k, gradient, expected in zip(wrt, gradients, expected_gradients, strict=True):
        assert_close(gradient, expected, operands[k].dtype)


@HALF
@pytest.mark.parametrize("name", [*OPS, "invert_displacement"])
def test_half_precision_costs_one_rounding(backend: Backend, name: str, dtype: object) -> None:
    """All operands are half precision; coordinates are not, nor are losses and coefficients."""
    case = example(name, dtype=dtype)
    stays = (*LOSSES, *FIELD_LOSSES, "spline_coefficients")
    result = FLOAT32 if name in stays else dtype
    check_values_and_gradients(backend, name, list(case.operands), result, **case.options)


@pytest.mark.parametrize(
    ("image", "affine", "grid"),
    [
        (np.float16, FLOAT32, FLOAT32),
        (bfloat16, FLOAT32, FLOAT32),
        (bfloat16, np.float16, FLOAT32),
        (FLOAT32, FLOAT32, np.float16),
        (np.float16, FLOAT32, FLOAT64),
        (FLOAT32, FLOAT64, FLOAT32),
        (FLOAT64, bfloat16, FLOAT32),
    ],
    ids=lambda dtype: np.dtype(dtype).name,
)
def test_interpolate_returns_the_images_dtype_whatever_leads_to_it(
    backend: Backend, image: object, affine: object, grid: object
) -> None:
    operands = example("interpolate").operands
    dtypes = (image, affine, grid)
    mixed = [x.astype(dtype) for x, dtype in zip(operands, dtypes, strict=True)]
    check_values_and_gradients(backend, "interpolate", mixed, image)


@pytest.mark.parametrize(
    ("first", "second", "result"),
    [
        (np.float16, FLOAT32, FLOAT32),
        (np.float16, bfloat16, FLOAT32),
        (FLOAT64, FLOAT32, FLOAT64),
        (bfloat16, FLOAT64, FLOAT64),
    ],
    ids=lambda dtype: np.dtype(dtype).name,
)
@pytest.mark.parametrize("name", ["compose", "affine_warp"])
def test_fields_are_promoted_to_their_common_dtype(
    backend: Backend, name: str, first: object, second: object, result: object
) -> None:
    operands = example(name).operands[:2]
    mixed = [operands[0].astype(first), operands[1].astype(second)]
    check_values_and_gradients(backend, name, mixed, result)


def test_a_float64_field_places_the_samples_of_a_float32_image_exactly(backend: Backend) -> None:
    """By a ten-millionth of a voxel, which a float32 position far from the centre cannot hold."""
    image = (np.arange(4097, dtype=FLOAT32) % 2).reshape(1, 1, 1, -1)
    grid = np.zeros((1, 1, 4097, 2))
    grid[..., 0] = 1e-7 / 2048
    sampled = backend.call("interpolate", image, None, grid)
    np.testing.assert_allclose(sampled[..., 0:-1:2], 1e-7, rtol=1e-3)


@HALF
@pytest.mark.parametrize("mode", ["bilinear", "nearest", "cubic"])
def test_no_transform_returns_every_number_there_is(
    backend: Backend, mode: str, dtype: object
) -> None:
    """All 65,536: subnormal, infinite and not numbers."""
    image = np.arange(2**16, dtype=np.uint16).view(dtype).reshape(1, 1, 256, 256)
    sampled = backend.call("interpolate", image, mode=mode)
    numbers = ~np.isnan(image.astype(FLOAT32))
    assert_same(sampled[numbers].view(np.uint16), image[numbers].view(np.uint16))
    assert np.isnan(sampled[~numbers].astype(FLOAT32)).all()


@HALF
def test_results_are_rounded_to_the_nearest_even_number(backend: Backend, dtype: object) -> None:
    """Quarters of the way between all pairs of neighbours, which float32 holds exactly."""
    smallest = 0 if dtype is np.float16 else 0x80 * 16  # subnormal floats may count as 0
    largest = int(np.array(np.inf, dtype).view(np.uint16)) - 1
    lower = np.arange(smallest, largest, dtype=np.uint16)
    image = np.stack([lower, lower + np.uint16(1)], axis=-1).view(dtype)[None, None]
    sampled = backend.call("interpolate", image, out_shape=(len(lower), 5))
    ends = image[0, 0].astype(FLOAT32)
    for k, fraction in enumerate((0, 0.25, 0.5, 0.75, 1)):
        exact = (1 - np.float32(fraction)) * ends[:, 0] + np.float32(fraction) * ends[:, 1]
        assert_same(sampled[0, 0, :, k], exact.astype(dtype))


@HALF
def test_an_image_gradient_is_added_up_in_float32(backend: Backend, dtype: object) -> None:
    """In half precision 4096 ones stop adding up at 256 or 2048."""
    image, cotangent = np.zeros((1, 1, 1, 1), dtype), np.ones((2, 1, 32, 64), dtype)
    grid = np.zeros((2, 32, 64, 2), FLOAT32)
    (gradient,) = backend.vjp("interpolate", (image, None, grid), cotangent, (0,))
    assert_same(gradient, np.full((1, 1, 1, 1), 4096, dtype))


@HALF
@pytest.mark.parametrize("sigma", [0, (1.0, 0, 0), (1.0, 0, 2.0), 1.5])
def test_smoothing_is_rounded_once_however_many_axes(
    backend: Backend, sigma: Any, dtype: object
) -> None:
    x = random_array(0, 2, 1, 6, 5, 9, dtype=dtype)
    expected = reference.gaussian_smooth(x, sigma)
    assert_close(backend.call("gaussian_smooth", x, sigma), expected, dtype)


@HALF
def test_scaling_and_squaring_steps_are_not_rounded(backend: Backend, dtype: object) -> None:
    """After 24 halvings nothing would be left of a velocity in float16."""
    velocity = small_displacement(0, 1, (4, 5), 0.2, dtype)
    result = backend.call("scaling_and_squaring", velocity, 24)
    assert_close(result, reference.scaling_and_squaring(velocity, 24), dtype)


@HALF
def test_an_empty_batch_gives_an_empty_result_and_no_gradient(
    backend: Backend, dtype: object
) -> None:
    image, u = np.zeros((1, 2, 4, 5), dtype), np.zeros((0, 4, 5, 2), FLOAT32)
    sampled = backend.call("interpolate", image, None, u)
    assert_same(sampled, np.zeros((0, 2, 4, 5), dtype))
    (gradient,) = backend.vjp("interpolate", (image, None, u), sampled, (0,))
    assert_same(gradient, np.zeros_like(image))


INTERPOLATE = {
    "affine_last": False,
    "is_displacement": True,
    "out_shape": (),
    "mode": "bilinear",
    "padding_mode": "zeros",
    "align_corners": True,
    "deterministic": False,
    "grid_unit": "normalised",
    "grid_channels": "last",
    "grid_components": "xyz",
}


def test_only_half_precision_needs_memory_to_add_up_an_image_gradient() -> None:
    names = [name for name, _ in _core.ops()["interpolate_grad"]["outputs"]]
    sums = names.index("image_sums")
    needed = {}
    for dtype in ("float16", "float32", "float64"):
        image = (dtype, (1, 2, 1, 4, 5))
        inputs = [image, None, None, image]
        wanted = 1 << names.index("grad_image")
        needed[dtype] = _core.infer("interpolate_grad", inputs, INTERPOLATE, wanted)[sums]
    assert needed == {"float16": ("float32", (1, 2, 1, 4, 5)), "float32": None, "float64": None}


@pytest.mark.parametrize(
    ("image", "grid"),
    [
        ("float32", "float16"),
        ("float16", "bfloat16"),
        ("float16", "float64"),
        ("float64", "float32"),
    ],
)
def test_kernels_refuse_what_a_package_forgot_to_convert(image: str, grid: str) -> None:
    inputs = [(image, (1, 2, 1, 4, 5)), None, (grid, (1, 2, 4, 5, 2))]
    with pytest.raises(TypeError, match=rf"grid: expected float(32|64).*, got {grid}"):
        _core.infer("interpolate", inputs, INTERPOLATE, 1)


@pytest.mark.parametrize("operand", OPERANDS["interpolate"])
def test_an_integer_operand_is_named_among_half_precision_ones(
    backend: Backend, operand: str
) -> None:
    names = OPERANDS["interpolate"]
    operands = list(example("interpolate", dtype=np.float16).operands)
    operands[names.index(operand)] = operands[names.index(operand)].astype(np.int32)
    with pytest.raises(TypeError, match=rf"\b{operand}\b.*expected.*float16.*got int32"):
        backend.call("interpolate", *operands)


# ------------------------------------------------------------------- PyTorch

TORCH_HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


def mixed_tensors(dtype: torch.dtype) -> list[torch.Tensor]:
    image, affine, grid = map(torch.tensor, example("interpolate", dtype=FLOAT32).operands)
    return [x.requires_grad_() for x in (image.to(dtype), affine, grid)]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@TORCH_HALVES
@pytest.mark.parametrize("name", OPS)
def test_autocast_changes_nothing(name: str, dtype: torch.dtype, device: str) -> None:
    """Operands are computed with as they come, in the backward pass as well."""
    case = example(name, dtype=FLOAT32)
    function = case.bind(getattr(torchreg, name))
    results = []
    for enabled in (False, True):
        operands = [torch.tensor(x, device=device, requires_grad=True) for x in case.operands]
        with torch.autocast(device, dtype, enabled=enabled):
            value = function(*operands)
        results.append([value, *torch.autograd.grad(value.sum(), operands)])
    for plain, cast in zip(*results, strict=True):
        assert cast.dtype == torch.float32
        torch.testing.assert_close(cast, plain, rtol=0, atol=0 if device == "cpu" else 1e-4)


def test_a_compiled_call_with_mixed_dtypes_is_the_eager_one() -> None:
    operands = mixed_tensors(torch.float16)
    compiled = torch.compile(torchreg.interpolate, backend="aot_eager", fullgraph=True)
    results = []
    for function in (torchreg.interpolate, compiled):
        value = function(*operands)
        results.append([value, *torch.autograd.grad(value.float().square().sum(), operands)])
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager, rtol=0, atol=0)


@TORCH_HALVES
def test_vmap_of_a_gradient_keeps_every_dtype(dtype: torch.dtype) -> None:
    operands = [x.detach() for x in mixed_tensors(dtype)]
    operands[1] = operands[1].half()

    def loss(*args: torch.Tensor) -> torch.Tensor:
        return torchreg.interpolate(*args).float().square().sum()

    slopes = torch.func.grad(loss, (0, 1, 2))
    stacked = [torch.stack([x, 0.5 * x]) for x in operands]
    mapped = torch.func.vmap(slopes)(*stacked)
    for i, k in itertools.product(range(2), range(3)):
        each = slopes(*(x[i] for x in stacked))[k]
        assert mapped[k].dtype == operands[k].dtype
        torch.testing.assert_close(mapped[k][i], each, rtol=0, atol=0)


# ----------------------------------------------------------------------- JAX


@HALF
def test_transforms_of_jax_keep_every_dtype(dtype: object) -> None:
    """Under ``jit``, ``vmap`` and ``grad`` at once; known without running."""
    case = example("interpolate", dtype=FLOAT32)
    operands = [jnp.asarray(case.operands[0], dtype), *map(jnp.asarray, case.operands[1:])]

    def loss(*args: jax.Array) -> jax.Array:
        value = jaxreg.interpolate(*args)
        assert value.dtype == dtype
        return jnp.sum(value.astype(FLOAT32) ** 2)

    slopes = jax.jit(jax.vmap(jax.grad(loss, (0, 1, 2))))
    stacked = [jnp.stack([x, x * 0.5]) for x in operands]
    for known, mapped, each, operand in zip(
        jax.eval_shape(slopes, *stacked),
        slopes(*stacked),
        jax.grad(loss, (0, 1, 2))(*(x[1] for x in stacked)),
        operands,
        strict=True,
    ):
        assert known.dtype == mapped.dtype == operand.dtype
        np.testing.assert_array_equal(mapped[1], each)
