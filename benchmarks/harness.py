"""What the benchmarks share: the command line, measurements in both frameworks, and the files.

For each piece of work: milliseconds, the rate at which the bytes that must move did so, that rate's
share of the copy rate measured in the same run (the floor), and the peak of extra memory.
`regkernels.bench` has the rows and says how they are timed; here they are measured beside what one
would otherwise use.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from regkernels.bench import FRAMEWORKS, SETS, WORKS, describe_machine, open_framework

__all__ = ["Bench", "Record", "add_file_arguments", "parse_arguments"]

OURS = ("jaxreg", "torchreg")


def add_file_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what says where the results go."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to this file")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="write them to FOLDER/<card>/<benchmark>.json, as in benchmarks/results",
    )


def parse_arguments(description: str, axes: Sequence[str] = ("Z", "Y", "X")) -> argparse.Namespace:
    """Read the command line; the size keeps to the axes unless they are empty."""
    import torch

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
    parser.add_argument(
        "--only", nargs="+", default=[""], help="measure who has one of these in its name"
    )
    parser.add_argument(
        "--without", nargs="+", default=[], help="leave out who has one of these in its name"
    )
    parser.add_argument(
        "--work", nargs="+", default=[""], help="measure work with one of these in its name"
    )
    add_file_arguments(parser)
    arguments = parser.parse_args()
    cuda = arguments.device == "cuda"
    arguments.size = tuple(arguments.size or ((192, 160, 224) if cuda else (96, 96, 96)))
    arguments.repeats = arguments.repeats or (30 if cuda else 7)
    return arguments


class Record:
    """What a benchmark finds, written as soon as it is found: a run that is cut short leaves it."""

    def __init__(
        self, benchmark: str, arguments: argparse.Namespace, gpu: str, **about: Any
    ) -> None:
        machine = describe_machine(gpu)
        self.about = {
            "benchmark": benchmark,
            "command": command(arguments),
            "commit": commit(),
            **machine,
            **about,
            "missing": [],
        }
        self.rows: list[dict[str, Any]] = []
        self.files = [arguments.json] if arguments.json else []
        if arguments.output:
            self.files.append(arguments.output / machine["card"] / f"{benchmark}.json")
        print(self.about, flush=True)

    def add(self, work: str, who: str, **found: Any) -> None:
        """Keep a row; there is no NaN in JSON."""
        known = {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in found.items()}
        self.rows.append({"work": work, "who": who, **known})
        self.write()

    def miss(self, who: str) -> None:
        """Keep that somebody could not be measured because it is not installed."""
        if who not in self.about["missing"]:
            self.about["missing"].append(who)
            print(f"{who} is not installed", flush=True)

    def write(self) -> None:
        for path in self.files:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"about": self.about, "rows": self.rows}, indent=1) + "\n")


def command(arguments: argparse.Namespace) -> str:
    """Return what was typed, without where the results went."""
    files = [path for path in (arguments.json, arguments.output) if path]
    words = [
        word
        for word in sys.argv[1:]
        if word.partition("=")[0] not in ("--json", "--output") and Path(word) not in files
    ]
    script = Path(sys.argv[0]).name
    return shlex.join(["python", f"benchmarks/{script}", *words])


def commit() -> str:
    """Return what REGKERNELS_COMMIT says; without it, the commit of the checkout."""
    told = os.environ.get("REGKERNELS_COMMIT")
    if told:
        return told
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


class Bench:
    """Inputs on the device, and measurements of work on them in both frameworks.

    Attributes
    ----------
    sets
        Of each framework that sees the device, sets of operands by their names. More may be added.
    """

    def __init__(
        self,
        benchmark: str,
        arguments: argparse.Namespace,
        shape: Sequence[int],
        make: Callable[[np.random.Generator, Sequence[int]], Mapping[str, np.ndarray]],
    ) -> None:
        self.device, self.arguments = arguments.device, arguments
        rng = np.random.default_rng(0)
        host = [make(rng, shape) for _ in range(SETS)]
        self.bytes = {name: array.nbytes for name, array in host[0].items()}
        self.frameworks, self.sets, absent = {}, {}, {}
        for name in FRAMEWORKS:
            try:
                self.frameworks[name] = open_framework(name, self.device, arguments.repeats)
            except (ValueError, ModuleNotFoundError) as error:
                absent[name] = error
                continue
            put = self.frameworks[name].put
            self.sets[name] = [{n: put(x) for n, x in s.items()} for s in host]
        if not self.frameworks:
            raise SystemExit("\n".join(map(str, absent.values())))
        first = next(iter(self.frameworks.values()))
        self.rate = first.copy_rate()
        self.record = Record(
            benchmark,
            arguments,
            first.device_name(),
            shape=shape,
            dtype="float32",
            repeats=arguments.repeats,
            copy_GB_per_s=self.rate / 1e9,
        )
        for name in absent:
            self.record.miss(name)

    def wanted(self, work: str, who: str) -> bool:
        """Whether the command line asks for this row."""
        return (
            any(part in who for part in self.arguments.only)
            and not any(part in who for part in self.arguments.without)
            and any(part in work for part in self.arguments.work)
        )

    def ours(self, work: str, loop: bool = False) -> None:
        """Measure a row of `regkernels.bench` in both packages."""
        for name, framework in self.frameworks.items():
            package = framework.package
            if any(self.wanted(work, who) for who in (package, f"{package} in a loop")):
                reg = importlib.import_module(package)

                def forward(*operands: Any, reg: Any = reg) -> Any:
                    return WORKS[work].call(reg, *operands)

                self.measure(name, work, package, forward, loop=loop)

    def measure(
        self,
        name: str,
        work: str,
        who: str,
        forward: Callable[..., Any],
        instead: Mapping[str, str] | None = None,
        extra: Sequence[str] = (),
        loop: bool = False,
    ) -> None:
        """Measure a function that does the work of a row, and its gradients if the row has them.

        Parameters
        ----------
        name
            ``"torch"`` or ``"jax"``; nothing is measured if that does not see the device.
        work, who
            The row, and who does it. What somebody else cannot do is told and kept in the row.
        forward
            Takes the operands of the row.
        instead
            Names of operands by the names of those of the row that they stand for.
        extra
            Names of operands that it takes behind these.
        loop
            Whether it is also measured in a compiled loop, if it is of JAX.
        """
        if name not in self.frameworks:
            return
        framework, sets, row = self.frameworks[name], self.sets[name], WORKS[work]
        stand_in = dict(instead or {})
        names, wrt = ([stand_in.get(n, n) for n in of] for of in (row.operands, row.wrt))
        names += extra
        call = (forward, sets, names, wrt, row.result, row.derivative, row.along)
        try:
            if self.wanted(work, who):
                ms, memory = framework.measure(*call)
                latency = float("nan")
                if name == "torch" and self.device == "cuda":
                    pure = framework.call(forward, names, wrt, *call[4:])
                    latency = framework.latency(pure, sets)
                self.add(work, who, ms, memory, latency)
            if loop and name == "jax" and self.wanted(work, f"{who} in a loop"):
                nan = float("nan")
                self.add(work, f"{who} in a loop", framework.loop_ms(*call), nan, nan)
        except Exception as error:
            if who in OURS:
                raise
            said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            print(f"{work:<34} {who:<28} {said}", flush=True)
            self.record.add(work, who, error=said)

    def add(self, work: str, who: str, ms: float, memory: float, latency: float) -> None:
        """Keep a row and print it."""
        total = WORKS[work].bytes_to_move(self.bytes)
        floor = total / self.rate * 1e3
        self.record.add(
            work,
            who,
            ms=ms,
            GB_per_s=total / ms * 1e-6,
            floor_ms=floor,
            share=floor / ms,
            memory_mib=memory,
            latency_ms=latency,
        )
        print(
            f"{work:<34} {who:<28} {ms:9.3f} ms {total / ms * 1e-6:8.1f} GB/s  floor {floor:7.3f}"
            f"  {100 * floor / ms:5.1f} %  {memory:7.1f} MiB  latency {latency:7.3f} ms",
            flush=True,
        )
