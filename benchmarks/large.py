"""One registration of volumes that fill a GPU: time, memory, similarity, and labels brought along.

    python benchmarks/large.py DATA [--cube N] [--moments float32 bfloat16] [--json FILE]

DATA is a folder as that of `quality.py`. Its first two images, and their labels, are sampled on
cubes of N voxels a side (1024 by default, on the CPU 64) over the same volumes, and the second is
registered to the first up to full resolution: centres of mass, an affine stage, and a greedy one by
LNCC with a window of 7, whose moments are kept in one type or the other. All iterations run: a test
of convergence keeps a field more, to return to.

For each: seconds in all, of the stages, with what they compile, and of bringing the labels along;
the peak of memory that XLA's allocator has handed out since the process began, in all and for a
voxel (CUDA only; give one type of moments to have its own); LNCC with its penalty at the end; and
the mean Dice coefficient of the regions before and after.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import numpy as np
from harness import Record, add_file_arguments
from quality import Labelled, read_folder

from jaxreg.registration import LNCC, Affine, Greedy, Moments, dice, register, resample
from regkernels import Grid, Volume

SCALES = (16, 8, 4, 2, 1)
ITERATIONS = (100, 100, 50, 30, 15)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, metavar="DATA")
    parser.add_argument("--cube", type=int, metavar="N", help="voxels along an axis")
    parser.add_argument(
        "--moments", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"]
    )
    add_file_arguments(parser)
    arguments = parser.parse_args()
    gpu = jax.default_backend() == "gpu"
    cube = arguments.cube or (1024 if gpu else 64)
    name = jax.devices()[0].device_kind if gpu else ""
    record = Record("large", arguments, name, cube=cube)
    images, groups = read_folder(arguments.data)
    fixed, moving = (on_cube(image, cube) for image in images[:2])
    numbers = [number for group in groups.values() for number in group]
    for moments in arguments.moments:
        found = measure(fixed, moving, numbers, moments)
        work = f"{moving.name} to {fixed.name}"
        record.add(work, moments, shape=[cube] * 3, **found)
        told = ", ".join(f"{key} {value:.4g}" for key, value in found.items())
        print(f"{work}, {cube}³, moments in {moments}: {told}", flush=True)


def on_cube(labelled: Labelled, size: int) -> Labelled:
    """Return an image and its regions on a cube of voxels over the same volume."""
    grid = labelled.image.grid
    shape = (size,) * grid.ndim
    spacing = np.asarray(grid.spacing) * np.array(grid.shape[::-1]) / size
    corner = np.asarray(grid.direction) @ ((spacing - grid.spacing) / 2)
    cube = Grid(shape, spacing, grid.origin + corner, grid.direction)

    def on_host(volume: Volume) -> Volume:
        return volume.with_array(np.asarray(volume.array))

    image = on_host(resample(labelled.image, cube))
    regions = on_host(resample(labelled.regions, cube, (), "nearest"))
    return labelled._replace(image=image, regions=regions)


def mean_dice(one: Volume, other: Volume, numbers: list[int]) -> float:
    overlaps = dice(np.asarray(one.array), np.asarray(other.array))
    return float(np.mean([overlaps.get(number, 0.0) for number in numbers]))


def measure(
    fixed: Labelled, moving: Labelled, numbers: list[int], moments: str
) -> dict[str, float]:
    """Register two images, and bring the regions of one to the other."""
    stages = [
        Moments(),
        Affine(scales=SCALES[:2], iterations=(50, 30)),
        Greedy(
            scales=SCALES,
            iterations=ITERATIONS,
            metric=LNCC(kernel_size=7),
            moments_dtype=moments,
            tolerance=0,
        ),
    ]
    before = resample(moving.regions, fixed.regions, (), "nearest")
    began = time.perf_counter()
    result = register(fixed.image, moving.image, stages)
    seconds = time.perf_counter() - began
    voxels = fixed.image.array.size
    stats = jax.devices()[0].memory_stats()
    peak = stats["peak_bytes_in_use"] if stats else float("nan")
    began = time.perf_counter()
    regions = result.transform.apply(moving.regions, fixed.regions, interpolation="nearest")
    there = np.asarray(regions.array)
    following = time.perf_counter() - began
    return {
        "seconds": seconds,
        "stages_seconds": sum(stage.seconds for stage in result.stages),
        "labels_seconds": following,
        "peak_gigabytes": peak / 1e9,
        "bytes_per_voxel": peak / voxels,
        "similarity": -float(result.stages[-1].levels[-1].losses[-1]),
        "dice_before": mean_dice(before, fixed.regions, numbers),
        "dice": mean_dice(regions.with_array(there), fixed.regions, numbers),
    }


if __name__ == "__main__":
    main()
