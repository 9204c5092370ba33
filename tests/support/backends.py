"""The two packages behind one NumPy interface, so that each case is written once."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from ml_dtypes import bfloat16

Array = np.ndarray

WIDE = (np.float64, np.int64, np.uint64)


def cuda_device_exists() -> bool:
    """Whether the CUDA driver has a device, whatever the frameworks make of it."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int(0)
    return (
        driver.cuInit(0) == 0
        and driver.cuDeviceGetCount(ctypes.byref(count)) == 0
        and count.value > 0
    )


class Backend:
    """The public functions of one package on one device, taking and returning NumPy arrays."""

    framework: str
    package: str

    def __init__(self, device: str) -> None:
        self.device = device

    def __repr__(self) -> str:
        return f"{self.framework}-{self.device}"

    def function(self, name: str) -> Callable[..., Any]:
        """The public function itself."""
        return getattr(importlib.import_module(self.package), name)

    def array(self, value: Any) -> Any:
        """A NumPy array as the framework's array on the device; anything else unchanged."""
        raise NotImplementedError

    def arrays(self, options: dict[str, Any]) -> dict[str, Any]:
        """Options, of which arrays with three axes or more are operands; others are numbers."""
        return {
            name: self.array(value) if isinstance(value, np.ndarray) and value.ndim > 2 else value
            for name, value in options.items()
        }

    def call(self, name: str, *args: Any, **options: Any) -> Any:
        """What the public function returns: an array, or a tuple of them."""
        raise NotImplementedError

    def calls(self, name: str, *calls: tuple[Sequence[Any], dict[str, Any]]) -> list[Any]:
        """What the function returns for several arguments and options, in one program if need be.

        To compile is most of what a small call takes in JAX.
        """
        return [self.call(name, *args, **options) for args, options in calls]

    def vjp(
        self, name: str, args: Sequence[Any], cotangent: Array, wrt: Sequence[int], **options: Any
    ) -> tuple[Array, ...]:
        """Gradients of ``sum(cotangent * function(*args))`` to the arguments numbered ``wrt``."""
        raise NotImplementedError

    def value_and_vjp(
        self, name: str, args: Sequence[Any], cotangent: Array, wrt: Sequence[int], **options: Any
    ) -> tuple[Any, tuple[Array, ...]]:
        """What ``call`` and ``vjp`` return, in one program if need be."""
        value = self.call(name, *args, **options)
        return value, self.vjp(name, args, cotangent, wrt, **options)


Settings = tuple[tuple[int, Any], ...]


def arrays_and_settings(leaves: Sequence[Any]) -> tuple[dict[int, Any], Settings]:
    """What a program of JAX takes as arguments, and what is settled when it is compiled."""
    import jax

    arrays = {k: leaf for k, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)}
    return arrays, tuple(item for item in enumerate(leaves) if item[0] not in arrays)


def merged(arrays: dict[int, Any], settings: Settings) -> list[Any]:
    """All leaves in their order."""
    return [leaf for _, leaf in sorted([*arrays.items(), *settings], key=lambda item: item[0])]


class JaxBackend(Backend):
    framework = "jax"
    package = "jaxreg"

    def scope(self, args: Sequence[Any]) -> contextlib.AbstractContextManager[Any]:
        """64-bit types exactly where an argument has them; the device for what is created."""
        import jax

        wide = any(isinstance(a, np.ndarray) and a.dtype in WIDE for a in args)
        stack = contextlib.ExitStack()
        stack.enter_context(jax.enable_x64(wide))
        stack.enter_context(jax.default_device(jax.devices(self.device)[0]))
        return stack

    def array(self, value: Any) -> Any:
        import jax

        if not isinstance(value, np.ndarray):
            return value
        return jax.device_put(value, jax.devices(self.device)[0])

    def call(self, name: str, *args: Any, **options: Any) -> Any:
        with self.scope((*args, *options.values())):
            result = self.function(name)(*map(self.array, args), **self.arrays(options))
            if isinstance(result, tuple):
                return tuple(map(np.asarray, result))
            return np.asarray(result)

    def calls(self, name: str, *calls: tuple[Sequence[Any], dict[str, Any]]) -> list[Any]:
        import jax

        with self.scope([a for args, options in calls for a in (*args, *options.values())]):
            function = self.function(name)
            given = [([self.array(a) for a in args], self.arrays(o)) for args, o in calls]
            leaves, structure = jax.tree.flatten(given)
            arrays, settings = arrays_and_settings(leaves)

            def results(arrays: dict[int, Any]) -> list[Any]:
                calls = jax.tree.unflatten(structure, merged(arrays, settings))
                return [function(*args, **options) for args, options in calls]

            return jax.tree.map(np.asarray, jax.jit(results)(arrays))

    def vjp(
        self, name: str, args: Sequence[Any], cotangent: Array, wrt: Sequence[int], **options: Any
    ) -> tuple[Array, ...]:
        if not wrt:
            return ()
        return self.run_differentiated(name, args, cotangent, wrt, options, with_value=False)[1]

    def value_and_vjp(
        self, name: str, args: Sequence[Any], cotangent: Array, wrt: Sequence[int], **options: Any
    ) -> tuple[Any, tuple[Array, ...]]:
        return self.run_differentiated(name, args, cotangent, wrt, options, with_value=True)

    def run_differentiated(
        self,
        name: str,
        args: Sequence[Any],
        cotangent: Array,
        wrt: Sequence[int],
        options: dict[str, Any],
        with_value: bool,
    ) -> tuple[Any, tuple[Array, ...]]:
        import jax

        with self.scope((*args, *options.values())):
            call = [self.array(a) for a in args], self.arrays(options)
            leaves, structure = jax.tree.flatten(call)
            arrays, settings = arrays_and_settings(leaves)
            program = self.differentiated(name, tuple(wrt), structure, settings, with_value)
            return jax.tree.map(np.asarray, program(self.array(cotangent), arrays))

    @functools.lru_cache(32)  # noqa: B019
    def differentiated(
        self,
        name: str,
        wrt: tuple[int, ...],
        structure: Any,
        settings: Settings,
        with_value: bool,
    ) -> Any:
        """Both passes, and a call that is not differentiated, as one program.

        It takes a cotangent and the arrays among the arguments.
        """
        import jax

        @jax.jit
        def program(cotangent: Any, arrays: dict[int, Any]) -> tuple[Any, Any]:
            operands, options = jax.tree.unflatten(structure, merged(arrays, settings))

            def function(*chosen: Any) -> Any:
                replaced = dict(zip(wrt, chosen, strict=True))
                given = [replaced.get(k, operand) for k, operand in enumerate(operands)]
                return self.function(name)(*given, **options)

            chosen = [operands[k] for k in wrt]
            value = function(*chosen) if with_value else None
            return value, jax.vjp(function, *chosen)[1](cotangent) if wrt else ()

        return program


class TorchBackend(Backend):
    framework = "torch"
    package = "torchreg"

    def array(self, value: Any) -> Any:
        import torch

        if not isinstance(value, np.ndarray):
            return value
        if value.dtype == bfloat16:
            bits = torch.tensor(value.view(np.int16), device=self.device)
            return bits.view(torch.bfloat16)
        return torch.tensor(value, device=self.device)

    @staticmethod
    def to_numpy(tensor: Any) -> Array:
        import torch

        tensor = tensor.detach()
        if tensor.dtype == torch.bfloat16:
            return tensor.view(torch.int16).numpy(force=True).view(bfloat16)
        return tensor.numpy(force=True)

    def call(self, name: str, *args: Any, **options: Any) -> Any:
        result = self.function(name)(*map(self.array, args), **self.arrays(options))
        results = result if isinstance(result, tuple) else (result,)
        assert all(r.device.type == self.device for r in results)
        arrays = tuple(map(self.to_numpy, results))
        return arrays if isinstance(result, tuple) else arrays[0]

    def vjp(
        self, name: str, args: Sequence[Any], cotangent: Array, wrt: Sequence[int], **options: Any
    ) -> tuple[Array, ...]:
        import torch

        if not wrt:
            return ()
        operands = [self.array(a) for a in args]
        chosen = [operands[k].requires_grad_() for k in wrt]
        result = self.function(name)(*operands, **self.arrays(options))
        # An operand that the result does not depend on may have no gradient: that is zero.
        gradients = torch.autograd.grad(
            result, chosen, self.array(cotangent), allow_unused=True, materialize_grads=True
        )
        return tuple(map(self.to_numpy, gradients))


BACKENDS: dict[tuple[str, str], Backend] = {
    ("jax", "cpu"): JaxBackend("cpu"),
    ("torch", "cpu"): TorchBackend("cpu"),
    ("jax", "cuda"): JaxBackend("cuda"),
    ("torch", "cuda"): TorchBackend("cuda"),
}
