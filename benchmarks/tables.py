"""The tables of the documentation, made from the results that are kept.

    python benchmarks/tables.py [--check] [PAGE ...]

Writes what stands between ``<!-- table: warp-h100 -->`` and ``<!-- /table -->`` anew, from
``benchmarks/results/<card>/warp.json``: the name is that of a benchmark, and a word of the name of
a card or all of it. A table whose results are not kept stays as it is, and is told of. With
``--check`` nothing is written, and a table that is not up to date is an error. Without pages, all
of docs/ and the README are looked at.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

MARKED = re.compile(r"(<!-- table: ([\w.-]+) -->\n)(.*?)(<!-- /table -->)", re.DOTALL)
NOTHING = "\N{EN DASH}"

Result = Mapping[str, Any]

# Columns by their headings, and how the names of those begin whose times are in them; the fastest
# counts where several are.
WARP = {
    "torchreg": "torchreg",
    "jaxreg": "jaxreg",
    "PyTorch's own": "torch ",
    "jnp": "jnp ",
    "SciPy": "scipy ",
}
SIMILARITY = {
    "torchreg": "torchreg",
    "jaxreg": "jaxreg",
    "MONAI": "MONAI",
    "MONAI compiled": "MONAI compiled",
    "fused_lncc": "fused_lncc",
    "jnp": "jnp ",
}
OURS = ("torchreg", "jaxreg")
LOOP = " in a loop"


def find_result(name: str, results: Path) -> Result | None:
    """Return what is kept under the name of a table, None if nothing is.

    Raises
    ------
    ValueError
        If several cards have that word in their names.
    """
    benchmark, _, word = name.partition("-")
    benchmark = MADE_FROM.get(benchmark, benchmark)
    found = [
        path
        for path in sorted(results.glob(f"*/{benchmark}.json"))
        if word == path.parent.name or f"-{word}-" in f"-{path.parent.name}-"
    ]
    if len(found) > 1:
        raise ValueError(
            f"{name}: expected the name of one card, got that of "
            f"{' and '.join(path.parent.name for path in found)}"
        )
    return json.loads(found[0].read_text()) if found else None


def number(value: float | None) -> str:
    """Return three digits, or as many as there are after the point of a millisecond."""
    if value is None:
        return NOTHING
    decimals = next((d for d, least in enumerate((100, 10, 1)) if value >= least), 3)
    return f"{value:.{decimals}f}"


def line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(map(line, [heads, ["---"] * len(heads), *rows]))


def about(result: Result) -> str:
    """Return what the numbers were measured on, and how."""
    facts = result["about"]
    versions = facts["versions"]
    devices = max(row.get("devices", 1) for row in result["rows"])
    count = "One" if devices == 1 else f"Up to {devices}"
    where = [
        f"{count} {facts['device']}" if "driver" in facts else f"On the CPU ({facts['device']})"
    ]
    if "driver" in facts:
        where.append(f"driver {facts['driver']}")
    if "shape" in facts:
        where += [facts["dtype"], "\N{MULTIPLICATION SIGN}".join(map(str, facts["shape"]))]
    names = {"torch": "PyTorch", "jax": "JAX", "monai": "MONAI", "regkernels": "regkernels"}
    where += [
        f"{title} {versions[name]}"
        for name, title in names.items()
        if versions.get(name, "not installed") != "not installed"
    ]
    where += [f"commit {facts['commit']}", facts["date"]]
    text = f"{', '.join(where)}: `{facts['command']}`."
    if "copy_GB_per_s" in facts:
        text += f" Copy rate {number(facts['copy_GB_per_s'])} GB/s."
    if facts["missing"]:
        text += f" Not installed there: {', '.join(facts['missing'])}."
    return text


def peers_table(columns: Mapping[str, str]) -> Callable[[Result], str]:
    """Return a maker of tables of milliseconds and memory, one row for each work."""

    def make(result: Result) -> str:
        rows = [row for row in result["rows"] if not row["who"].endswith(LOOP)]
        works = list(dict.fromkeys(row["work"] for row in rows))
        fastest = {
            (work, head): best(rows, work, start, columns)
            for work in works
            for head, start in columns.items()
        }
        heads = [h for h in columns if any(fastest[work, h] is not None for work in works)]
        lines = []
        for work in works:
            found = [fastest[work, head] for head in heads]
            floor = next((row["floor_ms"] for row in found if row and "floor_ms" in row), None)
            cells = [cell(row, head in OURS) for row, head in zip(found, heads, strict=True)]
            memory = [number_of_mib(row) for row in found]
            lines.append([work, number(floor), *cells, ", ".join(memory)])
        return table(["milliseconds of a call", "floor", *heads, "memory of each (MiB)"], lines)

    return make


def best(
    rows: Sequence[Result], work: str, start: str, columns: Mapping[str, str]
) -> Result | None:
    """Return the fastest row of a work among those of a column."""
    if start.endswith(" "):
        found = [row for row in rows if row["work"] == work and row["who"].startswith(start)]
    else:
        found = [row for row in rows if row["work"] == work and row["who"] == start]
    return min(found, key=lambda row: row.get("ms", float("inf")), default=None)


def cell(row: Result | None, ours: bool) -> str:
    if row is None:
        return NOTHING
    if "error" in row:
        return "failed"
    return f"**{number(row['ms'])}**" if ours else number(row["ms"])


def number_of_mib(row: Result | None) -> str:
    memory = row.get("memory_mib") if row else None
    return NOTHING if memory is None else f"{memory:.0f}"


def registration_table(result: Result) -> str:
    """Seconds, milliseconds an iteration and memory of a registration and its parts."""
    lines = []
    for row in result["rows"]:
        once = row["work"].startswith("iteration")
        each = row["ms"] if once else row.get("ms_per_iteration")
        seconds = None if once else row["ms"] / 1e3
        lines.append([row["work"], number(seconds), number(each), number_of_mib(row)])
    return table(["what", "seconds", "milliseconds an iteration", "memory (MiB)"], lines)


def latency_table(result: Result) -> str:
    """Microseconds of the calling thread, one column for each step of a call."""
    steps = list(dict.fromkeys(row["who"].removeprefix("torchreg ") for row in result["rows"]))
    works = list(dict.fromkeys(row["work"] for row in result["rows"]))
    times = {(row["work"], row["who"].removeprefix("torchreg ")): row for row in result["rows"]}
    lines = [[work, *(f"{times[work, step]['ms'] * 1e3:.1f}" for step in steps)] for work in works]
    return table(["microseconds of a call", *steps], lines)


def quality_table(result: Result) -> str:
    """Means over the pairs and directions of what labels and Jacobians say, by setting."""
    found: dict[tuple[str, str], list[Result]] = {}
    for row in result["rows"]:
        start = row["work"].rpartition(", ")[2]
        found.setdefault((row["who"], start), []).append(row)
    groups = [key.removeprefix("Dice ") for key in result["rows"][0] if key.startswith("Dice ")]

    def mean(rows: Sequence[Result], key: str, digits: str) -> str:
        values = [row[key] for row in rows if row.get(key) is not None]
        return format(sum(values) / len(values), digits) if values else NOTHING

    lines = []
    for (who, start), rows in found.items():
        inside = [r for r in rows if "inverted ppm" in r]
        extremes = NOTHING
        if inside:
            least, largest = min(r["det min"] for r in inside), max(r["det max"] for r in inside)
            extremes = f"{least:.2g} to {largest:.2g}"
        lines.append(
            [
                who if start == "given" else f"{who}, {start}",
                *(mean(rows, f"Dice {group}", ".3f") for group in groups),
                *(mean(rows, f"inverse Dice {group}", ".3f") for group in groups),
                extremes,
                mean(inside, "log det spread", ".2f"),
                mean(inside, "inverted ppm", ".2g"),
                mean(rows, "there and back mm", ".2f"),
                mean(rows, "seconds", ".2f"),
            ]
        )
    heads = ["setting", *(f"Dice {g}" for g in groups), *(f"inverse, {g}" for g in groups)]
    heads += ["determinants", "spread of their logarithms", "inside out (ppm)"]
    return table([*heads, "there and back (mm)", "seconds"], lines)


def training_table(result: Result) -> str:
    """Milliseconds, memory and losses of a training, by network and precision."""
    lines = []
    for row in result["rows"]:
        losses = [row.get("loss"), row.get("lncc")]
        lines.append(
            [
                row["work"],
                row["who"],
                cell(row, row["who"] in OURS),
                number_of_mib(row),
                *(NOTHING if loss is None else f"{loss:.4g}" for loss in losses),
            ]
        )
    heads = ["network", "moved and compared by", "milliseconds a step", "peak of memory (MiB)"]
    return table([*heads, "loss told at the end", "LNCC of what was moved there"], lines)


def command_table(result: Result) -> str:
    """Seconds of whole processes, with an empty cache and with what that leaves, and of parts."""
    parts = list(dict.fromkeys(key for row in result["rows"] for key in row))
    parts = [part for part in parts if part not in ("work", "who", "ms", "cpu_ms")]
    lines = []
    for row in result["rows"]:
        seconds = [row["ms"] / 1e3, row["cpu_ms"] / 1e3, *(row.get(part) for part in parts)]
        cells = [NOTHING if value is None else f"{value:.2f}" for value in seconds]
        lines.append([row["work"], row["who"], *cells])
    return table(["seconds", "cache", "whole", "of all cores", *parts], lines)


def motion_table(result: Result) -> str:
    """Seconds of the alignment of a series, and milliseconds of each of its frames."""
    frames = result["about"].get("frames", FRAMES)
    lines = [
        [
            row["who"],
            str(frames),
            *(f"{seconds:.2f}" for seconds in (row["ms"] / 1e3, row["stages"])),
            number(1e3 * row["stages"] / frames),
        ]
        for row in result["rows"]
        if row["work"] == "jaxreg motion"
    ]
    heads = ["cache", "frames", "seconds of the command", "of these to align them"]
    return table([*heads, "milliseconds a frame"], lines)


FRAMES = 200
"""How many a series had as long as `command.py` did not keep that."""


def scaling_table(result: Result) -> str:
    """Milliseconds of an iteration and peak memory, by how many devices share a volume."""
    rows, lines = result["rows"], []
    for work in dict.fromkeys(row["work"] for row in rows):
        some = sorted((row for row in rows if row["work"] == work), key=lambda row: row["devices"])
        base = some[0]
        for row in some:
            more = row["devices"] / base["devices"] if work.startswith("strong") else 1
            lines.append(
                [
                    work,
                    str(row["devices"]),
                    "\N{MULTIPLICATION SIGN}".join(map(str, row["shape"])),
                    f"{row['ms']:.1f}",
                    f"{100 * base['ms'] / row['ms'] / more:.0f} %",
                    NOTHING if row["peak_gigabytes"] is None else f"{row['peak_gigabytes']:.1f}",
                ]
            )
    heads = ["scaling, stage", "devices", "voxels", "milliseconds an iteration", "efficiency"]
    return table([*heads, "peak of a device (GB)"], lines)


def large_table(result: Result) -> str:
    """Seconds, memory and overlap of a registration that fills a GPU, by its moments."""
    lines = []
    for row in result["rows"]:
        lines.append(
            [
                row["who"],
                "\N{MULTIPLICATION SIGN}".join(map(str, row["shape"])),
                f"{row['seconds']:.1f}",
                f"{row['stages_seconds']:.1f}",
                f"{row['peak_gigabytes']:.1f}",
                f"{row['bytes_per_voxel']:.1f}",
                *(f"{row[key]:.3f}" for key in ("similarity", "dice_before", "dice")),
            ]
        )
    heads = ["moments", "voxels", "seconds", "of the stages", "peak of memory (GB)"]
    return table([*heads, "bytes a voxel", "LNCC", "Dice before", "Dice"], lines)


# What a device sends to a neighbour in an iteration of greedy by LNCC with a window of 7, in bytes
# for each voxel of a plane: 16 planes of the moving image; 3 of two images, and 3 back of a
# gradient; 6 of what becomes the step, 8 components; 2, 3 and 2 of a field that is composed,
# smoothed and charged for its energy.
HALO_BYTES = 4 * (16 + 3 * 2 + 3 + 6 * 8 + (2 + 3 + 2) * 3)
# Bytes per second that a device sends to its neighbour: NVLink of one host, and InfiniBand (NDR)
# between hosts.
WITHIN_HOST, BETWEEN_HOSTS, HOST = 450e9, 50e9, 8
SIMULATED = [("2048\N{SUPERSCRIPT THREE}", 2048), ("1578\N{SUPERSCRIPT THREE}", 1578)]


def simulation_table(result: Result) -> str:
    """What two devices need for each of their voxels, and what links need for planes, added up."""
    lines = []
    for stage in dict.fromkeys(row["work"] for row in result["rows"]):
        if not stage.startswith("weak"):
            continue
        most = max(
            (row for row in result["rows"] if row["work"] == stage), key=lambda row: row["devices"]
        )
        depth, height, width = most["shape"]
        voxels = depth * height * width / most["devices"]
        for title, cube in SIMULATED:
            for devices in (4, 8, 64):
                share = math.ceil(cube / devices) * cube**2 / voxels
                rate = WITHIN_HOST if devices <= HOST else BETWEEN_HOSTS
                ms = share * most["ms"] + 1e3 * HALO_BYTES * cube**2 / rate
                memory = most["peak_gigabytes"]
                memory = NOTHING if memory is None else f"{share * memory:.0f}"
                name = stage.removeprefix("weak, ")
                lines.append([name, title, str(devices), f"{ms:.0f}", memory])
    heads = ["stage", "volume", "devices", "milliseconds an iteration, simulated"]
    return table([*heads, "GB of a device, simulated"], lines)


# Tables that are made from the results of another benchmark.
MADE_FROM = {"simulation": "scaling", "motion": "command"}

# Voxels of what a table is about, where most of the results are about something else.
SHAPES = {"motion": (36, 64, 64)}

TABLES: Mapping[str, Callable[[Result], str]] = {
    "warp": peers_table(WARP),
    "similarity": peers_table(SIMILARITY),
    "registration": registration_table,
    "latency": latency_table,
    "quality": quality_table,
    "training": training_table,
    "command": command_table,
    "motion": motion_table,
    "scaling": scaling_table,
    "large": large_table,
    "simulation": simulation_table,
}


def rewrite(text: str, results: Path = RESULTS) -> tuple[str, list[str]]:
    """Return a page with its tables made anew, and the names of those without results."""
    without = []

    def replace(found: re.Match[str]) -> str:
        start, name, _, end = found.groups()
        kind = name.partition("-")[0]
        make = TABLES.get(kind)
        if make is None:
            raise ValueError(f"{name}: expected a table of {', '.join(TABLES)}")
        result = find_result(name, results)
        if result is None:
            without.append(name)
            return found[0]
        facts = {**result["about"], **({"shape": SHAPES[kind]} if kind in SHAPES else {})}
        told = about({**result, "about": facts})
        return f"{start}\n{make(result)}\n\n{told}\n\n{end}"

    if len(MARKED.findall(text)) != text.count("<!-- table:"):
        raise ValueError("expected a <!-- /table --> behind every <!-- table: NAME -->")
    return MARKED.sub(replace, text), without


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pages", nargs="*", type=Path, default=PAGES, metavar="PAGE")
    parser.add_argument("--check", action="store_true", help="see that they are up to date")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    options = parser.parse_args(arguments)
    stale = []
    for page in options.pages:
        text = page.read_text()
        new, without = rewrite(text, options.results)
        for name in without:
            print(f"{page}: no results for {name}: left as it is", file=sys.stderr)
        if new != text:
            stale.append(page)
            if not options.check:
                page.write_text(new)
    if options.check and stale:
        raise SystemExit(f"run python benchmarks/tables.py: not up to date: {[*map(str, stale)]}")


if __name__ == "__main__":
    main()
