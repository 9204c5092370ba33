"""A whole registration, from two volumes to the transform and its inverse.

    python benchmarks/registration.py [--device cuda|cpu] [--size Z Y X] [--json FILE]

An affine stage, then a greedy one, both by LNCC with a window of 5, at a quarter, half and full
resolution; no test of convergence. The moving image is a turned and bent copy of the fixed one. The
first run compiles; the others are timed, with both images on the device when they begin.

For every stage: seconds, and milliseconds per iteration. For every level of it: milliseconds per
iteration, with the level alone, less what the stage takes without iterations; the same for a volume
of 64x64x64. Peak memory is what XLA's allocator has handed out at once, images included, in the
timed runs and the first one (CUDA only). Then the same in one compiled program, `register_images`
under ``jax.jit``: seconds, and the memory that XLA plans for it. The correlation with the fixed
image tells that work was done.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
from harness import Record, add_file_arguments

from jaxreg import convert_displacement, interpolate
from jaxreg.registration import (
    LNCC,
    Affine,
    Greedy,
    Iterative,
    Registration,
    ncc,
    register,
    register_images,
    resize_field,
    resize_image,
)
from regkernels import Volume

SCALES = (4.0, 2.0, 1.0)
PARTS = ("register", "levels", "small", "program")
SMALL = (64, 64, 64)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = "cuda" if jax.default_backend() == "gpu" else "cpu"
    parser.add_argument("--device", choices=("cuda", "cpu"), default=default)
    parser.add_argument("--size", nargs=3, type=int, metavar=("Z", "Y", "X"))
    parser.add_argument("--iterations", nargs=3, type=int, metavar=("QUARTER", "HALF", "FULL"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    add_file_arguments(parser)
    arguments = parser.parse_args()
    cuda = arguments.device == "cuda"
    arguments.size = tuple(arguments.size or ((192, 232, 256) if cuda else (48, 58, 64)))
    arguments.iterations = tuple(arguments.iterations or ((200, 100, 50) if cuda else (40, 20, 10)))
    return arguments


def make_pair(size: Sequence[int]) -> tuple[Volume, Volume]:
    """Return noise of several widths, and the same turned, stretched and bent."""
    rng = np.random.default_rng(0)
    image = jnp.zeros((1, 1, *size))
    for width in (16, 8, 4):
        noise = rng.normal(size=(1, 1, *(n // width + 2 for n in size)))
        image += resize_image(jnp.asarray(noise, jnp.float32), tuple(size))
    # Fading out, so that nothing of it leaves the volume.
    fade = np.prod(np.meshgrid(*(np.hanning(n) for n in size), indexing="ij"), axis=0) ** 0.5
    image *= jnp.asarray(fade, jnp.float32)
    voxels = rng.uniform(-1, 1, (1, 5, 5, 5, 3)) * min(size) / 40
    bend = resize_field(jnp.asarray(voxels, jnp.float32), tuple(size))
    cos, sin = np.cos(0.05), np.sin(0.05)
    affine = [[1.02 * cos, -sin, 0, 0.02], [sin, 0.98 * cos, 0, -0.03], [0, 0, 1, 0.02]]
    moving = interpolate(
        image,
        jnp.asarray([affine], jnp.float32),
        convert_displacement(bend, "voxel", "normalised"),
        affine_last=True,
    )
    return Volume.create(image[0, 0]), Volume.create(moving[0, 0])


def seconds(call: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """Return the least wall time of several calls, after one that is not counted."""
    result = jax.block_until_ready(call())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return min(times), result


def peak_mib(device: jax.Device) -> float:
    statistics = device.memory_stats() or {}
    return statistics.get("peak_bytes_in_use", float("nan")) / 2**20


def measure_register(
    record: Record,
    pair: tuple[Volume, Volume],
    stages: Sequence[Iterative],
    repeats: int,
    device: jax.Device,
) -> Registration:
    """Time `register`, and each of its stages, in the fastest run; return the last result."""
    result = register(*pair, stages)
    runs = []
    for _ in range(repeats):
        del result  # two fields, which would count as memory of the next run
        start = time.perf_counter()
        result = register(*pair, stages)  # which waits for its stages
        runs.append((time.perf_counter() - start, result.stages))
    total, parts = min(runs, key=lambda run: run[0])
    memory = peak_mib(device)
    record.add("register", "jaxreg", ms=total * 1e3, memory_mib=memory)
    print(f"register           {total:8.3f} s  peak {memory:7.1f} MiB", flush=True)
    for part in parts:
        ms = part.seconds * 1e3
        each = ms / sum(level.losses.size for level in part.levels)
        record.add(f"register, {part.name} stage", "jaxreg", ms=ms, ms_per_iteration=each)
        print(f"{part.name:<18} {part.seconds:8.3f} s  {each:8.3f} ms/iteration", flush=True)
    return result


def measure_levels(
    record: Record,
    pair: tuple[Volume, Volume],
    stages: Sequence[Iterative],
    repeats: int,
    of: str = "",
) -> None:
    """Measure an iteration of each level of each stage; name what of, if not the scale."""
    for stage in stages:
        for scale, iterations in zip(stage.scales, stage.iterations, strict=True):
            with_and_without = []
            for count in (iterations, 0):
                level = dataclasses.replace(stage, scales=(scale,), iterations=(count,))
                register(*pair, [level])
                with_and_without.append(
                    min(register(*pair, [level]).stages[0].seconds for _ in range(repeats))
                )
            ms = (with_and_without[0] - with_and_without[1]) / iterations * 1e3
            name = f"{stage.name} {of or f'1/{scale:g}'}"
            record.add(f"iteration of {name}", "jaxreg", ms=ms)
            print(f"{name:<18} {'':8}    {ms:8.3f} ms/iteration", flush=True)


def measure_program(
    record: Record, pair: tuple[Volume, Volume], stages: Sequence[Iterative], repeats: int
) -> None:
    """Time the registration as one compiled program."""
    images = [jnp.asarray(volume.batched()[0]) for volume in pair]
    program = jax.jit(lambda fixed, moving: register_images(fixed, moving, stages).alignment)
    start = time.perf_counter()
    compiled = program.lower(*images).compile()
    compilation = time.perf_counter() - start
    total, _ = seconds(lambda: compiled(*images), repeats)
    plan = compiled.memory_analysis()
    planned = plan.temp_size_in_bytes + plan.output_size_in_bytes + plan.argument_size_in_bytes
    planned /= 2**20
    record.add(
        "one program", "jaxreg", ms=total * 1e3, memory_mib=planned, compilation_s=compilation
    )
    print(
        f"one program        {total:8.3f} s  planned {planned:7.1f} MiB"
        f"  compiled in {compilation:.1f} s",
        flush=True,
    )


def check(pair: tuple[Volume, Volume], result: Registration) -> dict[str, Any]:
    """Return the correlation before and after, and the share of folds, of what was aligned."""
    before, after = (
        float(ncc(volume.batched(), pair[0].batched())[0, 0]) for volume in (pair[1], result.moved)
    )
    folded = result.folds.share
    print(f"correlation {before:.3f} -> {after:.3f}, folded {folded:.2g}", flush=True)
    if not after > 0.9:
        raise SystemExit(f"expected the images to be aligned, got a correlation of {after:.3f}")
    return {"correlation": [before, after], "folded": folded}


def main() -> None:
    arguments = parse_arguments()
    device = jax.devices("gpu" if arguments.device == "cuda" else "cpu")[0]
    stages = [
        stage(SCALES, arguments.iterations, metric=LNCC(kernel_size=5), tolerance=0)
        for stage in (Affine, Greedy)
    ]
    record = Record(
        "registration",
        arguments,
        device.device_kind if arguments.device == "cuda" else "",
        shape=(1, 1, *arguments.size),
        dtype="float32",
        iterations=arguments.iterations,
        repeats=arguments.repeats,
    )
    with jax.default_device(device):
        pair = make_pair(arguments.size)
        if "register" in arguments.only:
            result = measure_register(record, pair, stages, arguments.repeats, device)
            record.about |= check(pair, result)
            del result
        if "levels" in arguments.only:
            measure_levels(record, pair, stages, arguments.repeats)
        if "small" in arguments.only:
            # What is launched, and not the voxels, takes the time of a volume as small as this.
            full = [
                dataclasses.replace(stage, scales=(1.0,), iterations=(arguments.iterations[0],))
                for stage in stages
            ]
            of = "at " + "x".join(map(str, SMALL))
            measure_levels(record, make_pair(SMALL), full, arguments.repeats, of)
        if "program" in arguments.only:
            measure_program(record, pair, stages, arguments.repeats)
    record.write()


if __name__ == "__main__":
    main()
