"""Sampling and composition: ours beside what one would otherwise use, in one run.

    python benchmarks/warp.py [--device cuda|cpu] [--size Z Y X] [--json FILE]

For each piece of work: milliseconds, the share of the floor (the bytes that must move, at the copy
rate measured in the same run), and the peak of extra memory.

On CUDA, times of PyTorch calls are what the GPU is busy (kernels, memsets and copies, summed by
the profiler) and those of JAX calls wall time over calls issued back to back.
Inputs rotate among three sets, so that no call finds its own inputs in the cache. On the CPU, times
are the fastest of several.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
import torch

import jaxreg
import torchreg

SETS = 3


def smooth_field(rng: np.random.Generator, size: tuple[int, ...], voxels: float) -> np.ndarray:
    """A displacement with a standard deviation of some voxels that varies over some 16 of them."""
    coarse = rng.normal(size=(1, 3, *(max(2, n // 16) for n in size))).astype(np.float32)
    fine = torch.nn.functional.interpolate(
        torch.from_numpy(coarse), size=size, mode="trilinear", align_corners=True
    )
    scale = torch.tensor([2 * voxels / max(n - 1, 1) for n in reversed(size)]).view(1, 3, 1, 1, 1)
    return (fine * scale).permute(0, 2, 3, 4, 1).contiguous().numpy()


class Bench:
    def __init__(
        self, device: str, size: tuple[int, int, int], repeats: int, only: str, work: str
    ) -> None:
        self.device, self.size, self.repeats = device, size, repeats
        self.only, self.work = only, work
        self.voxels = int(np.prod(size))
        rng = np.random.default_rng(0)
        angle = np.float32(0.1)
        affine = np.eye(3, 4, dtype=np.float32)
        affine[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
        self.host = [
            {
                "image": rng.normal(size=(1, 1, *size)).astype(np.float32),
                "u": smooth_field(rng, size, 2.0),
                "v": smooth_field(rng, size, 2.0),
                "affine": affine[None],
                "g": rng.normal(size=(1, 1, *size)).astype(np.float32),
                "gf": rng.normal(size=(1, *size, 3)).astype(np.float32),
            }
            for _ in range(SETS)
        ]
        self.torch = [{k: torch.from_numpy(v).to(device) for k, v in s.items()} for s in self.host]
        identity = torch.nn.functional.affine_grid(
            torch.eye(3, 4, device=device)[None], (1, 1, *size), align_corners=True
        )
        for s in self.torch:
            s["full_u"] = identity + s["u"]
            s["full_v"] = identity + s["v"]
            s["u_first"] = s["u"].permute(0, 4, 1, 2, 3).contiguous()
        self.jax: list[dict[str, Any]] = []
        if device == "cpu" or jax.default_backend() == "gpu":
            jax_device = jax.devices("cpu" if device == "cpu" else "gpu")[0]
            self.jax = [{k: jax.device_put(v, jax_device) for k, v in s.items()} for s in self.host]
        self.rows: list[dict[str, Any]] = []
        self.rate = self.copy_rate()

    def copy_rate(self) -> float:
        """Bytes per second, read plus written, of a large copy."""
        source = torch.empty(1 << (28 if self.device == "cuda" else 25), device=self.device)
        target = torch.empty_like(source)
        ms, _ = self.time_torch(lambda s: target.copy_(source))
        return 2 * source.numel() * 4 / (ms * 1e-3)

    def time_torch(self, call: Callable[[dict[str, torch.Tensor]], Any]) -> tuple[float, float]:
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

    def time_jax(self, function: Callable[..., Any], names: tuple[str, ...]) -> tuple[float, float]:
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

    def add(
        self, work: str, bytes_per_voxel: int, who: str, ms: float, memory: float, latency: float
    ) -> None:
        floor = bytes_per_voxel * self.voxels / self.rate * 1e3
        row = {"work": work, "who": who, "ms": ms, "floor_ms": floor, "share": floor / ms}
        row |= {"memory_mib": memory, "latency_ms": latency}
        self.rows.append(row)
        print(
            f"{work:<34} {who:<22} {ms:9.3f} ms  floor {floor:7.3f}  {100 * floor / ms:5.1f} %"
            f"  {memory:7.1f} MiB  latency {latency:7.3f} ms",
            flush=True,
        )

    def torch_work(
        self,
        work: str,
        bytes_per_voxel: int,
        who: str,
        forward: Callable[[dict[str, torch.Tensor]], torch.Tensor],
        wrt: tuple[str, ...] = (),
        cotangent: str = "g",
    ) -> None:
        if self.only not in who or self.work not in work:
            return

        def call(s: dict[str, torch.Tensor]) -> Any:
            if not wrt:
                with torch.no_grad():
                    return forward(s)
            leaves = {n: s[n].detach().requires_grad_() for n in wrt}
            result = forward({**s, **leaves})
            gradient = torch.autograd.grad(result, list(leaves.values()), s[cotangent])
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
        cotangent: str = "g",
    ) -> None:
        if not self.jax or self.only not in who or self.work not in work:
            return
        if not wrt:
            ms, memory = self.time_jax(forward, names)
        else:

            def both(*args: jax.Array) -> Any:
                *operands, g = args
                given = dict(zip(names, operands, strict=True))

                def of(*leaves: jax.Array) -> jax.Array:
                    return forward(
                        *(dict(given, **dict(zip(wrt, leaves, strict=True)))[n] for n in names)
                    )

                value, pull = jax.vjp(of, *(given[n] for n in wrt))
                return value, pull(g)

            ms, memory = self.time_jax(both, (*names, cotangent))
        self.add(work, bytes_per_voxel, who, ms, memory, float("nan"))


def jnp_interpolate(image: jax.Array, u: jax.Array) -> jax.Array:
    """What a JAX user has: map_coordinates."""
    size = image.shape[2:]
    index = jnp.meshgrid(*(jnp.arange(n, dtype=jnp.float32) for n in size), indexing="ij")
    points = [
        i + u[0, ..., 2 - k] * (n - 1) / 2 for k, (i, n) in enumerate(zip(index, size, strict=True))
    ]
    return jax.scipy.ndimage.map_coordinates(image[0, 0], points, order=1)[None, None]


def run(bench: Bench) -> None:
    def sample(image: torch.Tensor, grid: torch.Tensor, padding: str = "zeros") -> torch.Tensor:
        return torch.nn.functional.grid_sample(
            image, grid, padding_mode=padding, align_corners=True
        )

    ours, theirs = "torchreg", "torch grid_sample"
    for work, size, wrt in (
        ("interpolate u", 20, ()),
        ("interpolate u, + grad u", 52, ("u",)),
        ("interpolate u, + grad image", 44, ("image",)),
        ("interpolate u, + grad image, u", 56, ("image", "u")),
    ):
        their_wrt = tuple("full_u" if n == "u" else n for n in wrt)
        bench.torch_work(work, size, theirs, lambda s: sample(s["image"], s["full_u"]), their_wrt)
        bench.torch_work(
            work, size, ours, lambda s: torchreg.interpolate(s["image"], None, s["u"]), wrt
        )
        names = ("image", "u")
        bench.jax_work(work, size, "jnp map_coordinates", jnp_interpolate, names, wrt)
        bench.jax_work(
            work, size, "jaxreg", lambda i, u: jaxreg.interpolate(i, None, u), names, wrt
        )

    def affine_sample(s: dict[str, torch.Tensor]) -> torch.Tensor:
        grid = torch.nn.functional.affine_grid(s["affine"], s["image"].shape, align_corners=True)
        return sample(s["image"], grid)

    for work, size, wrt in (
        ("interpolate affine", 8, ()),
        ("interpolate affine, + grad affine", 16, ("affine",)),
    ):
        bench.torch_work(work, size, "torch affine_grid+sample", affine_sample, wrt)
        bench.torch_work(
            work, size, ours, lambda s: torchreg.interpolate(s["image"], s["affine"]), wrt
        )
        bench.jax_work(work, size, "jaxreg", jaxreg.interpolate, ("image", "affine"), wrt)

    def torch_compose(s: dict[str, torch.Tensor]) -> torch.Tensor:
        u = sample(s["u_first"], s["full_v"], "border")
        return s["v"] + u.permute(0, 2, 3, 4, 1)

    for work, size, wrt in (("compose", 36, ()), ("compose, + grad u, v", 96, ("u", "v"))):
        their_wrt = ("u_first", "full_v") if wrt else ()
        bench.torch_work(work, size, "torch grid_sample + v", torch_compose, their_wrt, "gf")
        bench.torch_work(work, size, ours, lambda s: torchreg.compose(s["u"], s["v"]), wrt, "gf")
        bench.jax_work(work, size, "jaxreg", jaxreg.compose, ("u", "v"), wrt, "gf")

    work = "smooth field, sigma 1"
    bench.torch_work(
        work, 24, ours, lambda s: torchreg.gaussian_smooth(s["u"], 1.0, channel_last=True)
    )
    bench.jax_work(
        work, 24, "jaxreg", lambda u: jaxreg.gaussian_smooth(u, 1.0, channel_last=True), ("u",)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", nargs=3, type=int, metavar=("Z", "Y", "X"))
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--only", help="measure only what has this in its name, such as torchreg")
    parser.add_argument("--work", help="measure only work with this in its name, such as affine")
    parser.add_argument("--json")
    args = parser.parse_args()
    cuda = args.device == "cuda"
    size = tuple(args.size or ((192, 160, 224) if cuda else (96, 96, 96)))
    bench = Bench(
        args.device, size, args.repeats or (30 if cuda else 7), args.only or "", args.work or ""
    )
    name = (
        torch.cuda.get_device_name()
        if cuda
        else f"{platform.machine()} CPU, {os.cpu_count()} cores"
    )
    about = {
        "device": name,
        "torch": torch.__version__,
        "jax": jax.__version__,
        "size": size,
        "copy_GB_per_s": bench.rate / 1e9,
    }
    print(about, flush=True)
    run(bench)
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"about": about, "rows": bench.rows}, file, indent=1)


if __name__ == "__main__":
    main()
