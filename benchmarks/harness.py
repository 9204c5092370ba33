"""What the benchmarks share: timing, memory, the floor, the table and the file.

For each piece of work: milliseconds, the rate at which the bytes that must move did so, that rate's
share of the copy rate measured in the same run (the floor), and the peak of extra memory.

On CUDA, times of PyTorch calls are what the GPU is busy (kernels, memsets and copies, summed by
the profiler) and those of JAX calls wall time over calls issued back to back or, where asked for,
over the turns of a loop inside one compiled call. Inputs rotate among the sets, so that no call
finds its own inputs in the cache. On the CPU, times are the fastest of several.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
import torch

__all__ = ["Bench", "parse_arguments"]

SETS = 3


def parse_arguments(description: str, axes: Sequence[str] = ("Z", "Y", "X")) -> argparse.Namespace:
    """Read the command line; the size keeps to the axes unless they are empty."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--size",
        nargs=len(axes) or "+",
        type=int,
        metavar=tuple(axes) or None,
        help=None if axes else "Y X, Z Y X, or N C and these",
    )
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--only", help="measure only what has this in its name, such as torchreg")
    parser.add_argument("--work", help="measure only work with this in its name, such as affine")
    parser.add_argument("--json")
    arguments = parser.parse_args()
    cuda = arguments.device == "cuda"
    arguments.size = tuple(arguments.size or ((192, 160, 224) if cuda else (96, 96, 96)))
    arguments.repeats = arguments.repeats or (30 if cuda else 7)
    arguments.only, arguments.work = arguments.only or "", arguments.work or ""
    return arguments


class Bench:
    """Inputs on the device, measurements of work on them, and the table of what came out."""

    def __init__(
        self,
        arguments: argparse.Namespace,
        voxels: int,
        make_set: Callable[[np.random.Generator], Mapping[str, np.ndarray]],
    ) -> None:
        self.device, self.repeats = arguments.device, arguments.repeats
        self.only, self.work, self.json = arguments.only, arguments.work, arguments.json
        self.voxels = voxels
        rng = np.random.default_rng(0)
        host = [make_set(rng) for _ in range(SETS)]
        self.torch = [{k: torch.from_numpy(v).to(self.device) for k, v in s.items()} for s in host]
        self.jax: list[dict[str, Any]] = []
        if self.device == "cpu" or jax.default_backend() == "gpu":
            jax_device = jax.devices("cpu" if self.device == "cpu" else "gpu")[0]
            self.jax = [{k: jax.device_put(v, jax_device) for k, v in s.items()} for s in host]
        self.rows: list[dict[str, Any]] = []
        self.rate = self.copy_rate()
        self.about = {
            "command": shlex.join([os.path.basename(sys.executable), *sys.argv]),
            "device": torch.cuda.get_device_name()
            if self.device == "cuda"
            else f"{platform.machine()} CPU, {os.cpu_count()} cores",
            "torch": torch.__version__,
            "jax": jax.__version__,
            "size": arguments.size,
            "repeats": self.repeats,
            "copy_GB_per_s": self.rate / 1e9,
        }
        print(self.about, flush=True)

    def wanted(self, work: str, who: str) -> bool:
        """Whether the command line asks for this row."""
        return self.only in who and self.work in work

    def copy_rate(self) -> float:
        """Bytes per second, read plus written, of a large copy."""
        source = torch.empty(1 << (28 if self.device == "cuda" else 25), device=self.device)
        target = torch.empty_like(source)
        ms, _ = self.time_torch(lambda s: target.copy_(source))
        return 2 * source.numel() * 4 / (ms * 1e-3)

    def time_torch(self, call: Callable[[dict[str, torch.Tensor]], Any]) -> tuple[float, float]:
        """Milliseconds a call, and MiB that the allocator hands out on top (CUDA only)."""
        for s in self.torch:
            call(s)
        if self.device == "cpu":
            times = []
            for i in range(self.repeats):
                start = time.perf_counter()
                call(self.torch[i % SETS])
                times.append(time.perf_counter() - start)
            return min(times) * 1e3, float("nan")
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call(self.torch[0])
        torch.cuda.synchronize()
        memory = torch.cuda.max_memory_allocated() - before
        del result
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as prof:
            for i in range(self.repeats):
                call(self.torch[i % SETS])
            torch.cuda.synchronize()
        busy = sum(
            e.device_time_total
            for e in prof.events()
            if e.device_type == torch.autograd.DeviceType.CUDA
        )
        return busy / self.repeats / 1e3, memory / 2**20

    def latency(self, call: Callable[[dict[str, torch.Tensor]], Any]) -> float:
        """Milliseconds from a call on an idle GPU to its end."""
        times = []
        for i in range(self.repeats):
            torch.cuda.synchronize()
            start = time.perf_counter()
            call(self.torch[i % SETS])
            torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return float(np.median(times)) * 1e3

    def time_jax(self, function: Callable[..., Any], names: Sequence[str]) -> tuple[float, float]:
        """Milliseconds a call, and MiB of results and of the space that XLA plans beside them."""
        compiled = jax.jit(function).lower(*(self.jax[0][n] for n in names)).compile()
        analysis = compiled.memory_analysis()
        memory = (analysis.temp_size_in_bytes + analysis.output_size_in_bytes) / 2**20
        calls = [[s[n] for n in names] for s in self.jax]
        jax.block_until_ready([compiled(*c) for c in calls])
        if self.device == "cpu":
            times = []
            for i in range(self.repeats):
                start = time.perf_counter()
                jax.block_until_ready(compiled(*calls[i % SETS]))
                times.append(time.perf_counter() - start)
            return min(times) * 1e3, memory
        best = float("inf")
        for _ in range(3):
            start = time.perf_counter()
            for i in range(self.repeats):
                result = compiled(*calls[i % SETS])
            jax.block_until_ready(result)
            best = min(best, (time.perf_counter() - start) / self.repeats)
        return best * 1e3, memory

    def time_jax_loop(self, function: Callable[..., Any], names: Sequence[str]) -> float:
        """Milliseconds a call where a compiled loop makes many, on every set in turn.

        A number made of each call's result goes through a barrier with the inputs of the next: no
        call can be hoisted out of the loop or merged with another. All results leave the loop, so
        that none is dropped.
        """
        calls = [[s[n] for n in names] for s in self.jax]
        turns = -(-self.repeats // SETS)

        @jax.jit
        def loop(inputs: Any) -> Any:
            def turn(_: Any, state: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
                chain, results = state[0], []
                for operands in inputs:
                    operands, chain = jax.lax.optimization_barrier((operands, chain))
                    results.append(function(*operands))
                    chain += jax.tree.leaves(results[-1])[0].ravel()[0]
                return chain, results

            shapes = [jax.eval_shape(function, *operands) for operands in inputs]
            blank = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
            return jax.lax.fori_loop(0, turns, turn, (jnp.zeros(()), blank))

        jax.block_until_ready(loop(calls))
        best = float("inf")
        for _ in range(3):
            start = time.perf_counter()
            jax.block_until_ready(loop(calls))
            best = min(best, time.perf_counter() - start)
        return best / (turns * SETS) * 1e3

    def add(
        self, work: str, bytes_per_voxel: int, who: str, ms: float, memory: float, latency: float
    ) -> None:
        """Record a row and print it."""
        total = bytes_per_voxel * self.voxels
        floor = total / self.rate * 1e3
        row = {"work": work, "who": who, "ms": ms, "GB_per_s": total / ms * 1e-6}
        row |= {"floor_ms": floor, "share": floor / ms}
        row |= {"memory_mib": memory, "latency_ms": latency}
        self.rows.append(row)
        print(
            f"{work:<34} {who:<28} {ms:9.3f} ms {row['GB_per_s']:8.1f} GB/s  floor {floor:7.3f}"
            f"  {100 * floor / ms:5.1f} %  {memory:7.1f} MiB  latency {latency:7.3f} ms",
            flush=True,
        )

    def torch_work(
        self,
        work: str,
        bytes_per_voxel: int,
        who: str,
        forward: Callable[[dict[str, torch.Tensor]], torch.Tensor],
        wrt: tuple[str, ...] = (),
        cotangent: str | None = "g",
    ) -> None:
        """Measure a PyTorch function of a set and its gradients; without a cotangent, of 1."""
        if not self.wanted(work, who):
            return

        def call(s: dict[str, torch.Tensor]) -> Any:
            if not wrt:
                with torch.no_grad():
                    return forward(s)
            leaves = {n: s[n].detach().requires_grad_() for n in wrt}
            result = forward({**s, **leaves})
            seed = None if cotangent is None else s[cotangent]
            gradient = torch.autograd.grad(result, list(leaves.values()), seed)
            return result, gradient

        ms, memory = self.time_torch(call)
        latency = self.latency(call) if self.device == "cuda" else float("nan")
        self.add(work, bytes_per_voxel, who, ms, memory, latency)

    def jax_work(
        self,
        work: str,
        bytes_per_voxel: int,
        who: str,
        forward: Callable[..., jax.Array],
        names: tuple[str, ...],
        wrt: tuple[str, ...] = (),
        cotangent: str | None = "g",
        loop: bool = False,
    ) -> None:
        """Measure a JAX function and its gradients, also inside a loop if asked for."""
        looped = f"{who} in a loop"
        if not self.jax or not (self.wanted(work, who) or (loop and self.wanted(work, looped))):
            return

        def both(*args: jax.Array) -> Any:
            given = dict(zip(names, args, strict=False))

            def of(*leaves: jax.Array) -> jax.Array:
                now = given | dict(zip(wrt, leaves, strict=True))
                return forward(*(now[n] for n in names))

            value, pull = jax.vjp(of, *(given[n] for n in wrt))
            return value, pull(jnp.ones_like(value) if cotangent is None else args[-1])

        function = both if wrt else forward
        inputs = (*names, cotangent) if wrt and cotangent is not None else names
        ms, memory = self.time_jax(function, inputs)
        self.add(work, bytes_per_voxel, who, ms, memory, float("nan"))
        if loop:
            ms = self.time_jax_loop(function, inputs)
            self.add(work, bytes_per_voxel, looped, ms, float("nan"), float("nan"))

    def finish(self) -> None:
        """Write the file that the command line asks for."""
        if self.json:
            with open(self.json, "w") as file:
                json.dump({"about": self.about, "rows": self.rows}, file, indent=1)
