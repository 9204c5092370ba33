"""One registration on several devices: how time and memory go with their number.

    python benchmarks/scaling.py [--device cuda|cpu] [--cube N] [--devices 1 2 4] [--json FILE]

Greedy and SyN by LNCC with a window of 7 at full resolution. Weak: N planes of N x N voxels for
each device. Strong: a cube of N voxels a side, whatever their number. Milliseconds of an iteration
are the difference between stages of 10 and of 110 iterations, divided by 100, of the shorter of two
runs of each; the one before these, which compiles, does not count, nor does a short rigid stage
before each, which waits until the images are on the devices. The efficiency is the time on the
fewest devices divided by that on more, for strong scaling times the ratio of their numbers.
Peak memory is the largest of what XLA's allocator has handed out on any device (CUDA only), in a
process of its own for each row. The loss at the end tells that the same was done.

Devices of the CPU share its cores: on them the figures tell only that all of it runs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
if "cpu" in sys.argv:
    os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")

import jax
import numpy as np
from harness import Record, add_file_arguments

from jaxreg.registration import LNCC, Greedy, Iterative, Registration, Rigid, SyN, register
from regkernels import Volume

FEW, MANY = 10, 110
STAGES: dict[str, type[Iterative]] = {"greedy": Greedy, "SyN": SyN}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = "cuda" if jax.default_backend() == "gpu" else "cpu"
    parser.add_argument("--device", choices=("cuda", "cpu"), default=default)
    parser.add_argument("--cube", type=int, metavar="N", help="voxels along an axis")
    parser.add_argument("--devices", nargs="+", type=int, metavar="COUNT")
    parser.add_argument("--only", nargs="+", choices=("weak", "strong"), default=["weak", "strong"])
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=[*STAGES])
    add_file_arguments(parser)
    arguments = parser.parse_args()
    cuda = arguments.device == "cuda"
    arguments.cube = arguments.cube or (512 if cuda else 32)
    there = len(devices_of(arguments.device))
    arguments.devices = arguments.devices or [n for n in (1, 2, 4, 8) if n <= there]
    return arguments


def devices_of(kind: str) -> list[jax.Device]:
    return jax.devices("gpu" if kind == "cuda" else "cpu")


def volumes(shape: tuple[int, int, int]) -> tuple[Volume, Volume]:
    """Two images with waves of a few voxels, of which one is shifted by a wave of its own."""
    axes = [np.arange(n, dtype=np.float32) for n in shape]
    z, y, x = np.meshgrid(*axes, indexing="ij", sparse=True)

    def image(shift: float) -> Volume:
        bent = shift * np.sin(y / 40) * np.sin(x / 50)
        array = np.sin((z + bent) / 5) * np.sin((y + bent) / 6) + np.sin((x - bent) / 7)
        return Volume.create(array.astype(np.float32))

    return image(0.0), image(2.0)


def run(
    stage: type[Iterative], iterations: int, pair: tuple[Volume, Volume], devices: list[jax.Device]
) -> Registration:
    settings = stage(scales=(1,), iterations=(iterations,), metric=LNCC(kernel_size=7), tolerance=0)
    arriving = Rigid(scales=(4,), iterations=(1,), tolerance=0, learning_rate=1e-6)
    spread = devices if len(devices) > 1 else None
    with jax.default_device(devices[0]):
        return register(*pair, [arriving, settings], devices=spread)


def peak_gigabytes(devices: list[jax.Device]) -> float:
    """The largest on any device since the process began; NaN where nobody counts it."""
    found = [device.memory_stats() for device in devices]
    return max((x["peak_bytes_in_use"] / 1e9 if x else np.nan for x in found), default=np.nan)


def measure(
    arguments: argparse.Namespace, record: Record, kind: str, name: str, count: int
) -> None:
    stage = STAGES[name]
    devices = devices_of(arguments.device)[:count]
    n = arguments.cube
    pair = volumes((n * count if kind == "weak" else n, n, n))
    seconds = {}
    for iterations in (FEW, MANY):
        run(stage, iterations, pair, devices)
        # Of a run nothing is kept, so that the next one has all the memory.
        stages = [run(stage, iterations, pair, devices).stages[1] for _ in range(2)]
        seconds[iterations] = min(found_stage.seconds for found_stage in stages)
    record.add(
        f"{kind}, {name}",
        f"{count} devices",
        devices=count,
        shape=list(pair[0].shape),
        ms=1e3 * (seconds[MANY] - seconds[FEW]) / (MANY - FEW),
        stage_seconds=seconds[MANY],
        peak_gigabytes=peak_gigabytes(devices),
        loss=float(stages[0].levels[-1].losses[-1]),
    )


def measure_apart(
    arguments: argparse.Namespace, record: Record, kind: str, name: str, count: int
) -> None:
    """Measure in a process of its own: a peak of memory is never forgotten."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "found.json")
        options = {"device": arguments.device, "cube": arguments.cube, "devices": count}
        options |= {"only": kind, "stages": name, "json": file}
        words = [str(word) for key, value in options.items() for word in (f"--{key}", value)]
        subprocess.run([sys.executable, __file__, *words], check=True)
        for row in json.loads(file.read_text())["rows"]:
            record.add(**row)


def tell(record: Record) -> None:
    """Print the efficiencies."""
    for work in dict.fromkeys(row["work"] for row in record.rows):
        rows = {row["devices"]: row["ms"] for row in record.rows if row["work"] == work}
        base = min(rows)
        for count, ms in rows.items():
            share = rows[base] / ms * (base / count if work.startswith("strong") else 1)
            print(f"{work}, {count} devices: {ms:.2f} ms an iteration, {100 * share:.0f} %")


def main() -> None:
    arguments = parse_arguments()
    first = devices_of(arguments.device)[0]
    gpu = first.device_kind if arguments.device == "cuda" else ""
    record = Record("scaling", arguments, gpu, cube=arguments.cube)
    wanted = [*itertools.product(arguments.only, arguments.stages, arguments.devices)]
    for what in wanted:
        (measure_apart if len(wanted) > 1 else measure)(arguments, record, *what)
    tell(record)


if __name__ == "__main__":
    main()
