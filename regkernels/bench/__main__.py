"""Measure a row of the benchmarks on this machine: ``python -m regkernels.bench "interpolate u"``.

The bytes that must move are each input read and each output written once; the floor is the time
that they take at the copy rate measured in the same run.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from regkernels.bench.frameworks import FRAMEWORKS, SETS, Framework, open_framework
from regkernels.bench.machine import describe_machine
from regkernels.bench.works import WORKS, Work, find_work

_IMAGES = ("image", "g", "pred", "target", "pred with background", "target with background")
_DTYPES = ("float32", "float64", "float16", "bfloat16")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(
        prog="python -m regkernels.bench", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("row", nargs="?", help="what is measured, such as 'compose'")
    parser.add_argument("--list", action="store_true", help="list the rows")
    parser.add_argument(
        "--size", nargs="+", type=int, metavar="N", help="Y X, Z Y X, or N C and these"
    )
    parser.add_argument("--framework", choices=tuple(FRAMEWORKS), help="default: each installed")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="default: cuda where a framework sees a GPU"
    )
    parser.add_argument(
        "--dtype",
        choices=_DTYPES,
        default="float32",
        help="of images; fields and affines are float32 unless it is float64",
    )
    parser.add_argument("--repeats", type=int, help="how many calls are timed")
    parser.add_argument("--json", action="store_true", help="as a JSON object")
    options = parser.parse_args(arguments)
    if options.list:
        print("\n".join(WORKS))
        return
    if options.row is None:
        parser.error("row: expected what to measure; --list shows what there is")
    try:
        result = measure(options)
    except (ValueError, ModuleNotFoundError) as error:
        parser.error(str(error))
    command = shlex.join(["python", "-m", "regkernels.bench", *(arguments or sys.argv[1:])])
    result["about"]["command"] = command
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        _show(result)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Return the row of each framework, and what it was measured on."""
    work = find_work(options.row)
    frameworks = _open(options)
    device = frameworks[0].device
    shape = _shape(options.size or ((192, 160, 224) if device == "cuda" else (96, 96, 96)))
    rng = np.random.default_rng(0)
    host = [
        {n: made[n] for n in work.needed} for made in (work.make(rng, shape) for _ in "x" * SETS)
    ]
    about = describe_machine(frameworks[0].device_name())
    about |= {"shape": shape, "dtype": options.dtype, "repeats": frameworks[0].repeats}
    rows = [_row(options.row, work, framework, host, options.dtype) for framework in frameworks]
    return {"about": about, "rows": rows}


def _row(
    name: str,
    work: Work,
    framework: Framework,
    host: Sequence[Mapping[str, np.ndarray]],
    dtype: str,
) -> dict[str, Any]:
    package = importlib.import_module(framework.package)
    sets = [{n: framework.put(x, _dtype_of(n, x, dtype)) for n, x in s.items()} for s in host]
    rate = framework.copy_rate()
    measured = framework.measure(
        lambda *operands: work.call(package, *operands),
        sets,
        work.operands,
        work.wrt,
        work.result,
        work.derivative,
        work.along,
    )
    moved = work.bytes_to_move({n: x.nbytes for n, x in sets[0].items()})
    floor = moved / rate * 1e3
    return {
        "work": name,
        "who": framework.package,
        "ms": measured.ms,
        "bytes": moved,
        "copy_GB_per_s": rate / 1e9,
        "floor_ms": floor,
        "share": floor / measured.ms,
        # There is no NaN in JSON.
        "memory_mib": None if np.isnan(measured.memory_mib) else measured.memory_mib,
    }


def _dtype_of(name: str, array: np.ndarray, dtype: str) -> str | None:
    """Return the dtype of an operand: labels stay integers, coordinates are never halves."""
    if array.dtype.kind != "f":
        return None
    return dtype if name in _IMAGES or dtype == "float64" else "float32"


def _shape(size: Sequence[int]) -> tuple[int, ...]:
    if len(size) not in (2, 3, 4, 5) or min(size) < 1:
        raise ValueError(f"size: expected Y X, Z Y X, or N C and these, got {tuple(size)}")
    return tuple(size) if len(size) > 3 else (1, 1, *size)


def _open(options: argparse.Namespace) -> list[Framework]:
    """Return the frameworks that are asked for, on the device that is asked for."""
    installed = [name for name in FRAMEWORKS if importlib.util.find_spec(name) is not None]
    names = [options.framework] if options.framework else installed
    if not names:
        raise ModuleNotFoundError(
            "neither jax nor torch is installed: pip install 'regkernels[jax]' or '[torch]'"
        )

    def on(name: str, device: str) -> Framework:
        repeats = options.repeats or (30 if device == "cuda" else 7)
        return open_framework(name, device, repeats)

    if options.device:
        return [on(name, options.device) for name in names]
    see_a_gpu = []
    for name in names:
        with contextlib.suppress(ValueError):
            see_a_gpu.append(on(name, "cuda"))
    return see_a_gpu or [on(name, "cpu") for name in names]


def _show(result: Mapping[str, Any]) -> None:
    about, rows = result["about"], result["rows"]
    versions = about["versions"]
    shape = "x".join(map(str, about["shape"]))
    print(f"{rows[0]['work']}, {shape}, {about['dtype']}, on {about['device']}")
    for row in rows:
        print(
            f"{row['who']:<8} {row['ms']:9.3f} ms; floor {row['floor_ms']:.3f} ms, "
            f"{100 * row['share']:.0f} %: {row['bytes'] / 1e6:.4g} MB must move, at "
            f"{row['copy_GB_per_s']:.4g} GB/s"
        )
    print(", ".join(f"{name} {found}" for name, found in versions.items()))


if __name__ == "__main__":
    main()
