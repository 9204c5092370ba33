"""How long calls take in either framework, and what memory they take.

On CUDA, the time of a PyTorch call is what the GPU is busy (kernels, memsets and copies, summed by
the profiler) and that of a JAX call wall time over calls issued back to back. Inputs rotate among
sets, so that no call finds its own inputs in the cache. On the CPU, times are the fastest of
several. Everything is called before it is timed.
"""

from __future__ import annotations

import abc
import importlib
import importlib.util
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from regkernels import _core

__all__ = ["FRAMEWORKS", "SETS", "Framework", "Measured", "open_framework"]

SETS = 3
"""Sets of inputs that calls rotate among."""

Set = Mapping[str, Any]


class Measured(NamedTuple):
    """What was measured of a call.

    Attributes
    ----------
    ms
        Milliseconds a call.
    memory_mib
        MiB of results and scratch memory beside the operands; NaN if that is not known.
    """

    ms: float
    memory_mib: float


class Framework(abc.ABC):
    """A framework on a device, and how its calls are timed there.

    Parameters
    ----------
    device : str
        ``"cpu"`` or ``"cuda"``.
    repeats : int
        How many calls are timed.

    Raises
    ------
    ValueError
        If the framework sees no such device.
    """

    package: str
    """The package of ours that serves it."""

    def __init__(self, device: str, repeats: int) -> None:
        self.device, self.repeats = device, repeats

    @abc.abstractmethod
    def put(self, array: np.ndarray, dtype: str | None = None) -> Any:
        """Return an array on the device, of another dtype if one is named."""

    @abc.abstractmethod
    def copy_rate(self) -> float:
        """Return the bytes per second, read plus written, of a pass over a large array."""

    @abc.abstractmethod
    def device_name(self) -> str:
        """Return what the maker calls the device; of a CPU, nothing."""

    @abc.abstractmethod
    def measure(
        self,
        forward: Callable[..., Any],
        sets: Sequence[Set],
        names: Sequence[str],
        wrt: Sequence[str] = (),
        cotangent: str | None = None,
        derivative: str = "grad",
        along: Sequence[str] = (),
    ) -> Measured:
        """Measure a function and, if asked for, its gradients.

        Parameters
        ----------
        forward : callable
            Takes the operands in the order of ``names``.
        sets : sequence of mapping
            Sets of operands on the device.
        names : sequence of str
            Which of them it takes.
        wrt : sequence of str
            Those whose gradients are taken as well.
        cotangent : str, optional
            The operand that the gradients are of; without one, it is 1.
        derivative, along
            What is taken in place of gradients, as in `Work`.
        """

    def fastest(self, call: Callable[[int], Any]) -> float:
        """Return the milliseconds of the fastest of some calls, which are told their number."""
        best = float("inf")
        for i in range(self.repeats):
            start = time.perf_counter()
            call(i)
            best = min(best, time.perf_counter() - start)
        return best * 1e3

    @property
    def _large(self) -> int:
        """How many float32 numbers are more than any cache holds."""
        return 1 << (28 if self.device == "cuda" else 25)


class TorchFramework(Framework):
    """PyTorch, eager."""

    package = "torchreg"

    def __init__(self, device: str, repeats: int) -> None:
        super().__init__(device, repeats)
        self.torch: Any = importlib.import_module("torch")
        if device == "cuda" and not self.torch.cuda.is_available():
            raise ValueError("device: expected cpu, as PyTorch sees no CUDA device, got cuda")

    def put(self, array: np.ndarray, dtype: str | None = None) -> Any:
        return self.torch.from_numpy(array).to(self.device, dtype and getattr(self.torch, dtype))

    def copy_rate(self) -> float:
        source = self.torch.empty(self._large, device=self.device).fill_(1)
        target = self.torch.empty_like(source)
        copied = self.time(lambda s: target.copy_(s["source"]), [{"source": source}])
        return float(2 * source.nbytes / (copied.ms * 1e-3))

    def device_name(self) -> str:
        return self.torch.cuda.get_device_name() if self.device == "cuda" else ""

    def call(
        self,
        forward: Callable[..., Any],
        names: Sequence[str],
        wrt: Sequence[str] = (),
        cotangent: str | None = None,
        derivative: str = "grad",
        along: Sequence[str] = (),
    ) -> Callable[[Set], Any]:
        """Return a function of a set: the value, with the gradients that are asked for.

        In place of these it may return the value and its tangent, or the gradients and theirs.
        """
        torch = self.torch

        def differentiate(s: Set) -> Any:
            leaves, vectors = (tuple(s[n].detach() for n in of) for of in (wrt, along))

            def value(*leaves: Any) -> Any:
                now = dict(zip(wrt, leaves, strict=True))
                return forward(*(now.get(n, s[n]) for n in names))

            def product(*leaves: Any) -> Any:
                result = value(*leaves)
                return result if cotangent is None else (result * s[cotangent]).sum()

            if derivative == "jvp":
                return torch.func.jvp(value, leaves, vectors)
            if derivative == "Hessian product":
                gradient = torch.func.grad(product, tuple(range(len(wrt))))
                return torch.func.jvp(gradient, leaves, vectors)
            for leaf in leaves:
                leaf.requires_grad_()
            gradients = torch.autograd.grad(product(*leaves), leaves, create_graph=True)
            return gradients, torch.autograd.grad(gradients, leaves, vectors)

        if derivative != "grad":
            return differentiate

        def call(s: Set) -> Any:
            if not wrt:
                with self.torch.no_grad():
                    return forward(*(s[n] for n in names))
            leaves = {n: s[n].detach().requires_grad_() for n in wrt}
            result = forward(*(leaves.get(n, s[n]) for n in names))
            seed = None if cotangent is None else s[cotangent]
            return result, self.torch.autograd.grad(result, list(leaves.values()), seed)

        return call

    def measure(
        self,
        forward: Callable[..., Any],
        sets: Sequence[Set],
        names: Sequence[str],
        wrt: Sequence[str] = (),
        cotangent: str | None = None,
        derivative: str = "grad",
        along: Sequence[str] = (),
    ) -> Measured:
        call = self.call(forward, names, wrt, cotangent, derivative, along)
        return self.time(call, sets)

    def time(self, call: Callable[[Set], Any], sets: Sequence[Set]) -> Measured:
        """Measure a function of a set."""
        for s in sets:
            call(s)
        if self.device == "cpu":
            return Measured(self.fastest(lambda i: call(sets[i % len(sets)])), float("nan"))
        cuda = self.torch.cuda
        cuda.synchronize()
        cuda.reset_peak_memory_stats()
        before = cuda.memory_allocated()
        result = call(sets[0])
        cuda.synchronize()
        memory = cuda.max_memory_allocated() - before
        del result
        profiler = self.torch.profiler
        with profiler.profile(activities=[profiler.ProfilerActivity.CUDA]) as profile:
            for i in range(self.repeats):
                call(sets[i % len(sets)])
            cuda.synchronize()
        on_gpu = self.torch.autograd.DeviceType.CUDA
        busy = sum(e.device_time_total for e in profile.events() if e.device_type == on_gpu)
        return Measured(busy / self.repeats / 1e3, memory / 2**20)

    def latency(self, call: Callable[[Set], Any], sets: Sequence[Set]) -> float:
        """Return the milliseconds from a call on an idle GPU to its end."""
        times = []
        for i in range(self.repeats):
            self.torch.cuda.synchronize()
            start = time.perf_counter()
            call(sets[i % len(sets)])
            self.torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return float(np.median(times)) * 1e3


class JaxFramework(Framework):
    """JAX, compiled."""

    package = "jaxreg"

    def __init__(self, device: str, repeats: int) -> None:
        super().__init__(device, repeats)
        # Another framework in this process needs memory of the device too.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        self.jax: Any = importlib.import_module("jax")
        try:
            self.on = self.jax.devices("gpu" if device == "cuda" else "cpu")[0]
        except RuntimeError:
            raise ValueError("device: expected cpu, as JAX sees no CUDA device, got cuda") from None

    def put(self, array: np.ndarray, dtype: str | None = None) -> Any:
        if dtype == "float64":
            self.jax.config.update("jax_enable_x64", True)
        array = array if dtype is None else array.astype(self.jax.numpy.dtype(dtype))
        return self.jax.device_put(array, self.on)

    def copy_rate(self) -> float:
        # What would only copy, XLA leaves out. With fresh memory, a CPU would pay for its pages.
        negative = self.jax.jit(self.jax.numpy.negative, donate_argnums=0)
        x = negative(self.put(np.ones(self._large, np.float32)))
        rounds, calls = (self.repeats, 1) if self.device == "cpu" else (3, self.repeats)
        best = float("inf")
        for _ in range(rounds):
            x.block_until_ready()
            start = time.perf_counter()
            for _ in range(calls):
                x = negative(x)
            x.block_until_ready()
            best = min(best, (time.perf_counter() - start) / calls)
        return float(2 * x.nbytes / best)

    def device_name(self) -> str:
        return self.on.device_kind if self.device == "cuda" else ""

    def call(
        self,
        forward: Callable[..., Any],
        names: Sequence[str],
        wrt: Sequence[str] = (),
        cotangent: str | None = None,
        derivative: str = "grad",
        along: Sequence[str] = (),
    ) -> tuple[Callable[..., Any], tuple[str, ...]]:
        """Return a function, and the names of its operands: of the value, with the gradients."""
        if not wrt:
            return forward, tuple(names)
        if derivative != "grad":
            return self._differentiated(forward, names, wrt, cotangent, derivative, along)

        def both(*operands: Any) -> Any:
            given = dict(zip(names, operands, strict=False))

            def of(*leaves: Any) -> Any:
                now = given | dict(zip(wrt, leaves, strict=True))
                return forward(*(now[n] for n in names))

            value, pull = self.jax.vjp(of, *(given[n] for n in wrt))
            seed = self.jax.numpy.ones_like(value) if cotangent is None else operands[-1]
            return value, pull(seed)

        return both, tuple(names) if cotangent is None else (*names, cotangent)

    def _differentiated(
        self,
        forward: Callable[..., Any],
        names: Sequence[str],
        wrt: Sequence[str],
        cotangent: str | None,
        derivative: str,
        along: Sequence[str],
    ) -> tuple[Callable[..., Any], tuple[str, ...]]:
        """As `call`, of the value and its tangent, or of the gradients and theirs."""
        jax = self.jax
        inputs = tuple(dict.fromkeys((*names, *wrt, *along, *([cotangent] if cotangent else []))))

        def all_of_it(*operands: Any) -> Any:
            given = dict(zip(inputs, operands, strict=True))
            leaves, vectors = (tuple(given[n] for n in of) for of in (wrt, along))

            def value(*leaves: Any) -> Any:
                now = given | dict(zip(wrt, leaves, strict=True))
                return forward(*(now[n] for n in names))

            def product(*leaves: Any) -> Any:
                result = value(*leaves)
                return result if cotangent is None else (result * given[cotangent]).sum()

            if derivative == "jvp":
                return jax.jvp(value, leaves, vectors)
            gradient = jax.grad(product, tuple(range(len(wrt))))
            if derivative == "Hessian product":
                return jax.jvp(gradient, leaves, vectors)
            gradients, pull = jax.vjp(gradient, *leaves)
            return gradients, pull(vectors)

        return all_of_it, inputs

    def measure(
        self,
        forward: Callable[..., Any],
        sets: Sequence[Set],
        names: Sequence[str],
        wrt: Sequence[str] = (),
        cotangent: str | None = None,
        derivative: str = "grad",
        along: Sequence[str] = (),
    ) -> Measured:
        function, inputs = self.call(forward, names, wrt, cotangent, derivative, along)
        operands = [[s[n] for n in inputs] for s in sets]
        compiled = self.jax.jit(function).lower(*operands[0]).compile()
        plan = compiled.memory_analysis()
        memory = (plan.temp_size_in_bytes + plan.output_size_in_bytes) / 2**20
        wait = self.jax.block_until_ready
        wait([compiled(*o) for o in operands])
        if self.device == "cpu":
            fastest = self.fastest(lambda i: wait(compiled(*operands[i % len(operands)])))
            return Measured(fastest, memory)
        best = float("inf")
        for _ in range(3):
            start = time.perf_counter()
            for i in range(self.repeats):
                result = compiled(*operands[i % len(operands)])
            wait(result)
            best = min(best, (time.perf_counter() - start) / self.repeats)
        return Measured(best * 1e3, memory)

    def loop_ms(
        self,
        forward: Callable[..., Any],
        sets: Sequence[Set],
        names: Sequence[str],
        wrt: Sequence[str] = (),
        cotangent: str | None = None,
        derivative: str = "grad",
        along: Sequence[str] = (),
    ) -> float:
        """Return the milliseconds a call where a compiled loop makes many, on every set in turn.

        A number made of each call's result goes through a barrier with the inputs of the next: no
        call can be hoisted out of the loop or merged with another. All results leave the loop, so
        that none is dropped.
        """
        jax, jnp = self.jax, self.jax.numpy
        function, inputs = self.call(forward, names, wrt, cotangent, derivative, along)
        calls = [[s[n] for n in inputs] for s in sets]
        turns = -(-self.repeats // len(sets))

        def loop(calls: Any) -> Any:
            def turn(_: Any, state: tuple[Any, Any]) -> tuple[Any, Any]:
                chain, results = state[0], []
                for operands in calls:
                    operands, chain = jax.lax.optimization_barrier((operands, chain))
                    results.append(function(*operands))
                    chain += jax.tree.leaves(results[-1])[0].ravel()[0]
                return chain, results

            shapes = [jax.eval_shape(function, *operands) for operands in calls]
            blank = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
            return jax.lax.fori_loop(0, turns, turn, (jnp.zeros(()), blank))

        compiled = jax.jit(loop)
        jax.block_until_ready(compiled(calls))
        best = float("inf")
        for _ in range(3):
            start = time.perf_counter()
            jax.block_until_ready(compiled(calls))
            best = min(best, time.perf_counter() - start)
        return best / (turns * len(sets)) * 1e3


FRAMEWORKS: Mapping[str, type[Framework]] = {"torch": TorchFramework, "jax": JaxFramework}
"""The frameworks by the names of their modules."""


def open_framework(name: str, device: str, repeats: int) -> Framework:
    """Return a framework on a device.

    Parameters
    ----------
    name : str
        ``"jax"`` or ``"torch"``.
    device : str
        ``"cpu"`` or ``"cuda"``.
    repeats : int
        How many calls are timed.

    Raises
    ------
    ModuleNotFoundError
        If the framework is not installed.
    ValueError
        If it sees no such device, or the kernels were built without CUDA.
    """
    if importlib.util.find_spec(name) is None:
        raise ModuleNotFoundError(
            f"{name} is not installed: pip install 'regkernels[{name}]'", name=name
        )
    if device == "cuda" and not _core.cuda_architectures():
        raise ValueError("device: expected cpu, as regkernels was built without CUDA, got cuda")
    return FRAMEWORKS[name](device, repeats)
