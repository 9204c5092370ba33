"""The two packages are one library: same names, same arguments, same numbers."""

from __future__ import annotations

import fcntl
import importlib
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from backends import BACKENDS, Backend
from examples import ALL_OPS, OPERANDS, example
from inputs import assert_close, assert_same, random_array, small_displacement
from parity_digests import cases

import jaxreg
import torchreg

THREADS = [1, 2, 5]

# What the docstrings of `torchreg` say in other words than those of `jaxreg`, and why they may.
_TYPE = "A dtype or an argument's type that is not supported."
_REFUSES = "Also an operand that requires a gradient"
_DETERMINISTIC = [  # PyTorch has a switch for it
    (
        "float32, coarser than float64.",
        "float32, coarser than float64. ``torch.use_deterministic_algorithms`` asks for the same.",
    )
]


def _no_gradient(operand: str) -> list[tuple[str, str]]:
    return [
        (
            f"Differentiating it is refused: ``jax.lax.stop_gradient({operand})`` makes a "
            "constant of it.",
            f"Operands that require a gradient are refused: pass ``{operand}.detach()``.",
        ),
        (
            "does not fit; the message names the argument.",
            f"does not fit; the message names the argument. {_REFUSES}.",
        ),
        (f"{_TYPE} Also an operand that is differentiated.", _TYPE),
    ]


IN_OTHER_WORDS: dict[str, list[tuple[str, str]]] = {
    "interpolate": _DETERMINISTIC,
    "compose": _DETERMINISTIC,
    "mutual_information_loss": [  # one has arrays, the other tensors
        ("a number or an array with one", "a number or a tensor with one"),
        ("what arrays hold", "what tensors hold"),
    ],
    # An operand that has no gradient is known by its type in JAX, and by its state in PyTorch.
    "interpolate_labels": [
        ("under ``jax.grad`` they are constants.", "they never require a gradient."),
        ("They refuse to be differentiated.", "Operands that require a gradient are refused."),
        (
            "cannot hold; the message names the argument.",
            f"cannot hold; the message names the argument. {_REFUSES}, with ``return_weights``.",
        ),
        (f"{_TYPE} Also an operand that is differentiated, with ``return_weights``.", _TYPE),
    ],
    "coverage": _no_gradient("affine"),
    "invert_displacement": _no_gradient("displacement"),
    "step_gradient": _no_gradient("moved"),
    "riemannian_adam_step": _no_gradient("gradient"),
}

Digests = dict[str, dict[str, dict[str, str]]]


@pytest.fixture(scope="session")
def digests(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Digests]:
    """What both packages compute on the CPU with each number of threads.

    It takes most of a minute, and all processes that share the tests share it.
    """
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    result = {}
    for threads in THREADS:
        file = folder / f"parity-{threads}.json"
        with file.open("a+") as shared:
            fcntl.flock(shared, fcntl.LOCK_EX)
            if not file.stat().st_size:
                shared.write(digests_in_a_process(threads))
                shared.flush()
            result[threads] = json.loads(file.read_text())
    return result


def digests_in_a_process(threads: int) -> str:
    script = Path(__file__).parents[1] / "support" / "parity_digests.py"
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "REGKERNELS_NUM_THREADS": str(threads), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("title", cases())
def test_jax_and_torch_agree_to_the_last_bit_on_the_cpu(
    title: str, digests: dict[int, Digests]
) -> None:
    """Values and gradients."""
    assert digests[1][title]["jax"] == digests[1][title]["torch"]


@pytest.mark.parametrize("title", cases())
def test_nothing_depends_on_the_number_of_threads(title: str, digests: dict[int, Digests]) -> None:
    for threads in THREADS[1:]:
        assert digests[threads][title] == digests[1][title], f"{threads} threads"


def in_tuple(values: Any) -> tuple[np.ndarray, ...]:
    """What a function returns, of which some return several arrays."""
    return values if isinstance(values, tuple) else (values,)


@pytest.mark.gpu
@pytest.mark.parametrize("title", cases())
def test_jax_and_torch_agree_on_the_gpu(title: str) -> None:
    """To the last bit, except for gradients that are sums of atomics."""
    case = cases()[title]
    results = []
    for framework in ("jax", "torch"):
        backend = BACKENDS[framework, "cuda"]
        values = in_tuple(backend.call(case.name, *case.operands, **case.options))
        wrt = case.differentiable
        gradients: tuple[np.ndarray, ...] = ()
        if wrt:
            cotangent = random_array(7, *values[0].shape, dtype=values[0].dtype)
            gradients = backend.vjp(case.name, case.operands, cotangent, wrt, **case.options)
        results.append((*values, *gradients))
    scattered = {("interpolate", "image"), ("compose", "u"), ("scaling_and_squaring", "velocity")}
    differentiated = [OPERANDS[case.name][k] for k in case.differentiable]
    names = ["value"] * (len(results[0]) - len(differentiated)) + differentiated
    for name, of_jax, of_torch in zip(names, *results, strict=True):
        if (case.name, name) in scattered:
            assert_close(of_jax, of_torch, of_torch.dtype)
        else:
            assert_same(of_jax, of_torch)


@pytest.mark.gpu
@pytest.mark.parametrize("framework", ["jax", "torch"])
@pytest.mark.parametrize("name", ALL_OPS)
def test_the_gpu_agrees_with_the_cpu(name: str, framework: str) -> None:
    case = example(name, shape=(29, 37, 43), dtype=np.float32)
    values = [
        in_tuple(BACKENDS[framework, device].call(name, *case.operands, **case.options))
        for device in ("cpu", "cuda")
    ]
    for on_cpu, on_gpu in zip(*values, strict=True):
        if on_cpu.dtype == np.int32:  # rounding decides between labels that weigh the same
            assert (on_gpu != on_cpu).mean() < 1e-4
        else:
            assert_close(on_gpu, on_cpu, np.float32)


def test_both_packages_offer_the_same_functions() -> None:
    assert set(ALL_OPS) <= set(jaxreg.__all__)
    assert set(ALL_OPS) <= set(torchreg.__all__)


@pytest.mark.parametrize("name", ALL_OPS)
def test_functions_take_the_same_arguments_in_both_packages(name: str) -> None:
    """The same names, kinds and defaults."""
    in_jax, in_torch = (
        [
            (parameter.name, parameter.kind, parameter.default)
            for parameter in inspect.signature(getattr(package, name)).parameters.values()
        ]
        for package in (jaxreg, torchreg)
    )
    assert in_jax == in_torch


@pytest.mark.parametrize("module", ["loss", "regularisation", "smooth", "warp"])
def test_modules_describe_themselves_alike_in_both_packages(module: str) -> None:
    in_jax, in_torch = (
        importlib.import_module(f"{package}.{module}") for package in ("jaxreg", "torchreg")
    )
    assert in_jax.__doc__ == in_torch.__doc__


@pytest.mark.parametrize("name", ALL_OPS)
def test_functions_are_described_alike_in_both_packages(name: str) -> None:
    """In the same words, wherever their lines end, but for what the table says."""
    in_jax, in_torch = (
        " ".join((inspect.getdoc(getattr(package, name)) or "").split())
        for package in (jaxreg, torchreg)
    )
    for of_jax, of_torch in IN_OTHER_WORDS.get(name, []):
        assert in_jax.count(of_jax) == 1
        in_jax = in_jax.replace(of_jax, of_torch)
    assert in_jax == in_torch


def test_subnormal_numbers_are_numbers_whoever_calls() -> None:
    """XLA's threads take them for zeros, and so may any thread of the caller's."""
    image = np.full((1, 1, 40, 40, 40), 3e-40, np.float32)  # enough for several threads
    grid = small_displacement(1, 1, (40, 40, 40), 1e-3, np.float32)
    expected = reference.interpolate(image.astype(np.float64), None, grid, padding_mode="border")
    options = {"padding_mode": "border"}
    for package in ("jax", "torch"):
        actual = BACKENDS[package, "cpu"].call("interpolate", image, None, grid, **options)
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-44)
    flushes = torch.set_flush_denormal(True)
    try:
        again = BACKENDS["torch", "cpu"].call("interpolate", image, None, grid, **options)
    finally:
        torch.set_flush_denormal(False)
    assert flushes and np.array_equal(again.view(np.int32), actual.view(np.int32))


def test_numbers_and_shapes_may_come_from_numpy(backend: Backend) -> None:
    """With the same results as Python's own."""
    image, _, grid = example("interpolate", dtype=np.float32).operands

    def same(name: str, array: np.ndarray, plain: dict[str, Any], other: dict[str, Any]) -> None:
        assert_same(backend.call(name, array, **other), backend.call(name, array, **plain))

    same("gaussian_smooth", image, {"sigma": 1.5}, {"sigma": np.float32(1.5)})
    same("gaussian_smooth", image, {"sigma": (1.0, 0.5, 2.0)}, {"sigma": np.array([1.0, 0.5, 2.0])})
    same("gaussian_smooth", image, {"sigma": (1.0, 2.0, 3.0)}, {"sigma": [1, 2, 3]})
    same(
        "gaussian_smooth",
        image,
        {"sigma": 2.0, "truncate": 3.0},
        {"sigma": np.int64(2), "truncate": np.int32(3)},
    )
    same("scaling_and_squaring", grid, {"num_steps": 2}, {"num_steps": np.int64(2)})
    same("scaling_and_squaring", grid, {"align_corners": True}, {"align_corners": np.True_})
    same("interpolate", image, {"out_shape": (2, 3, 4)}, {"out_shape": np.array([2, 3, 4])})
    same("interpolate", image, {"out_shape": (2, 3, 4)}, {"out_shape": [np.int32(2), 3, 4]})
    same(
        "lncc_loss",
        image,
        {"target": 2 * image, "kernel_size": 5, "window": "gaussian", "sigma": 1.5},
        {
            "target": 2 * image,
            "kernel_size": np.int64(5),
            "window": "gaussian",
            "sigma": np.float32(1.5),
        },
    )
    same(
        "mutual_information_loss",
        image,
        {"target": 2 * image, "value_range": ((-1.0, 1.0), (-2.0, 2.0))},
        {"target": 2 * image, "value_range": [(np.int64(-1), np.array(1)), (np.float32(-2), 2)]},
    )
    units = {"source": "voxel", "target": "mm"}
    same(
        "convert_displacement",
        grid,
        {**units, "spacing": (1.0, 2.0, 3.0)},
        {**units, "spacing": np.array([1, 2, 3])},
    )
