"""How long the command takes, as a user waits for it: whole processes, and what is in them.

    python benchmarks/command.py [--size Z Y X] [--preset NAME] [--work NAME ...] [--json FILE]

The images are the two brains that ship with `regkernels`, interpolated on 1 mm voxels, or on as
many voxels as `--size` says over the same volume. The cache of compiled programs is in a folder of
its own: cold, it is empty; warm, it is what the first process left. The shortest of `--repeats`
runs counts.

For registrations and motion there are parts: what `registration.json` and `motion.json` tell, and
as `start` the rest, which is the interpreter, imports, and the end of the process. `compilation` is
tracing, compiling and loading of programs, whichever part they are for.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from harness import Record, add_file_arguments

from jaxreg.registration import resample
from regkernels import (
    AffineMap,
    Grid,
    Series,
    Volume,
    read_volume,
    rigid_motion,
    write_series,
    write_volume,
)
from regkernels.data import load_pair_paths

__all__ = ["finer", "parts_of"]

COLD, WARM = "empty", "filled"


def main() -> None:
    # The processes that are measured have the device for themselves.
    jax.config.update("jax_platforms", "cpu")
    arguments = parse()
    record = Record("command", arguments, device_name(arguments.device), repeats=arguments.repeats)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shape = write_images(folder, arguments.size)
        record.about["shape"], record.about["dtype"] = shape, "int16"
        where = ["--device", arguments.device]
        register = ["register", "fixed.nii.gz", "moving.nii.gz", *where]
        preset = ["-o", "out", "--preset", arguments.preset]
        chain = ["-t", "found/warp.nii.gz", "-t", "found/affine.tfm"]
        through = ["-r", "fixed.nii.gz", *chain, *where]
        works: Mapping[str, Sequence[str]] = {
            "jaxreg --help": ["--help"],
            f"jaxreg register --preset {arguments.preset}": [*register, *preset],
            "jaxreg register --report": [*register, *preset, "--report"],
            "jaxreg apply": ["apply", "moving.nii.gz", *through, "-o", "moved.nii.gz"],
            "jaxreg apply --labels": [
                *("apply", "labels.nii.gz", *through, "-o", "moved_labels.nii.gz", "--labels")
            ],
            "jaxreg motion": ["motion", "series.nii", "-o", "still", *where],
            "jaxreg info IMAGE": ["info", "fixed.nii.gz"],
            "jaxreg info": ["info"],
        }
        wanted = {
            work: words
            for work, words in works.items()
            if any(part in work for part in arguments.work)
        }
        if any(words[0] == "motion" for words in wanted.values()):
            record.about["frames"] = arguments.frames
            write_frames(folder / "series.nii", arguments.frames)
        if any(words[0] == "apply" for words in wanted.values()):
            # What there is to apply need not be found with much effort.
            once = ["--stages", "moments,greedy", "--preset", "fast"]
            run([*register, "-o", "found", *once], folder, folder / "another-cache")
        run(["compare", "fixed.nii.gz", "fixed.nii.gz", *where], folder, folder / "another-cache")
        for work, words in wanted.items():
            measure(record, work, words, folder, arguments.repeats)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", nargs=3, type=int, metavar=("Z", "Y", "X"))
    parser.add_argument("--frames", type=int, default=200, help="of 64 x 64 x 36 voxels, in time")
    parser.add_argument("--preset", default="default")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "gpu"])
    parser.add_argument("--repeats", type=int, default=3, help="with the cache; it is made once")
    parser.add_argument(
        "--work", nargs="+", default=[""], help="measure work with one of these in its name"
    )
    add_file_arguments(parser)
    return parser.parse_args()


def device_name(device: str) -> str:
    """Return the name of the card, empty for the CPU, of another process: this one holds none."""
    code = "import jax; d = jax.devices({0!r} or None)[0]; print(d.platform, d.device_kind)"
    asked = code.format("" if device == "auto" else device)
    found = subprocess.run(
        [sys.executable, "-c", asked], capture_output=True, text=True, check=True
    ).stdout
    platform, _, kind = found.strip().partition(" ")
    return "" if platform == "cpu" else kind


def write_images(folder: Path, size: Sequence[int] | None) -> tuple[int, ...]:
    """Write the two brains and labels on the moving one; return the shape of the fixed image."""
    fixed, moving = (finer(read_volume(path), size and tuple(size)) for path in load_pair_paths())
    write_volume(fixed, folder / "fixed.nii.gz")
    write_volume(moving, folder / "moving.nii.gz")
    labels = (np.asarray(moving.array) // 20).astype(np.uint8)
    write_volume(moving.with_array(labels), folder / "labels.nii.gz")
    return fixed.shape


def write_frames(path: Path, count: int) -> None:
    """Write a series of a brain that moves, with noise, in voxels of 3.5 x 3.5 x 4 mm."""
    brain = read_volume(load_pair_paths().fixed)
    middle = brain.grid.centre()
    grid = Grid((36, 64, 64), np.array([3.5, 3.5, 4.0]), np.zeros(3), np.eye(3))
    grid = dataclasses.replace(grid, origin=middle - grid.centre())
    rng = np.random.default_rng(0)
    places = np.cumsum(rng.normal(0, 0.1, (count, 3)), axis=0)
    frames = []
    for place, angle in zip(places, np.cumsum(rng.normal(0, 0.1, count)), strict=True):
        motion = AffineMap(rigid_motion(angle, (1, 2, 3), place, middle))
        frame = np.asarray(resample(brain, grid, [motion]).array)
        frames.append(frame + rng.normal(0, 2, frame.shape))
    write_series(Series(np.round(frames).astype(np.int16), grid, 2.0), path)


def finer(volume: Volume, shape: tuple[int, ...] | None = None) -> Volume:
    """Return a volume on more voxels in the same place, twice as many along each axis by default.

    Its values are rounded to integers, as those of a scanner are.
    """
    grid = volume.grid
    shape = shape or tuple(2 * size for size in grid.shape)
    spacing = np.asarray(grid.spacing) * np.array(grid.shape[::-1]) / shape[::-1]
    corner = np.asarray(grid.direction) @ ((spacing - grid.spacing) / 2)
    values = resample(volume, Grid(shape, spacing, grid.origin + corner, grid.direction))
    return values.with_array(np.round(np.asarray(values.array)).astype(np.int16))


def measure(record: Record, work: str, words: Sequence[str], folder: Path, repeats: int) -> None:
    """Run a command with an empty cache and with what that leaves in it, and keep the rows."""
    cache = folder / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    for who, count in ((COLD, 1), (WARM, repeats)):
        best = min((run(words, folder, cache) for _ in range(count)), key=lambda row: row["ms"])
        record.add(work, who, **best)
        told = ", ".join(
            f"{name} {value:.2f}" for name, value in best.items() if name not in ("ms", "cpu_ms")
        )
        print(
            f"{work:<36} {who:<16} {best['ms'] / 1e3:7.2f} s, of the processor "
            f"{best['cpu_ms'] / 1e3:7.2f} s  {told}",
            flush=True,
        )


def run(words: Sequence[str], folder: Path, cache: Path) -> dict[str, float]:
    """Run a command; return its milliseconds, those of the processor, and seconds of its parts."""
    environment = {
        **os.environ,
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "XDG_CACHE_HOME": str(cache),
    }
    # What is installed is there as bytecode, too.
    for name in ("JAX_COMPILATION_CACHE_DIR", "PYTHONDONTWRITEBYTECODE"):
        environment.pop(name, None)
    before, began = os.times(), time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "jaxreg_cli", *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    seconds, after = time.perf_counter() - began, os.times()
    if done.returncode:
        raise SystemExit(f"jaxreg {' '.join(words)}: {done.stderr}")
    used = after.children_user + after.children_system
    used -= before.children_user + before.children_system
    found = {"ms": 1e3 * seconds, "cpu_ms": 1e3 * used}
    if words[0] in ("register", "motion"):
        out = folder / words[words.index("-o") + 1]
        name = "registration.json" if words[0] == "register" else "motion.json"
        told = json.loads((out / name).read_text())["seconds"]
        found |= parts_of(told, seconds)
    return found


def parts_of(told: Mapping[str, float], seconds: float) -> dict[str, float]:
    """Return the seconds of the parts of a process from those that its record tells."""
    parts = {name: value for name, value in told.items() if name != "total"}
    return {"start": seconds - sum(parts.values()), **parts}


if __name__ == "__main__":
    main()
