"""Two runs of a benchmark side by side, row by row, to see that nothing got slower.

    python benchmarks/compare.py BASE.json NEW.json [--slower PERCENT]

With ``--slower 5``, rows of ours that are slower by more than 5 % make it fail. Files that were
written before the rows had the names of `regkernels.bench` are read as well.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

Times = dict[tuple[str, str], float]


def read_times(path: Path) -> Times:
    """Return milliseconds by work and by who did it."""
    content = json.loads(path.read_text())
    if "rows" not in content:
        return old_registration(content)
    rows = [row for row in content["rows"] if row.get("ms") is not None]
    return {(new_name(row["work"]), row["who"]): row["ms"] for row in rows}


def new_name(work: str) -> str:
    """Return the name that a row has now, whichever it has in the file."""
    work = work.replace(", + ", " + ").replace("LNCC box k=", "lncc ")
    work = work.replace("LNCC gaussian k=", "lncc gaussian ").replace("MI gaussian ", "mi ")
    work = work.replace("MI b-spline ", "mi b-spline ").removesuffix(" loss")
    if work == "interpolate u, deterministic grads":
        return "interpolate u + grad image, u, deterministic"
    return work


def old_registration(content: dict[str, Any]) -> Times:
    """Return the times of a registration, which used to be written part by part."""
    whole = content["register"]
    times = {"register": whole["total_s"] * 1e3, "one program": content["program"]["total_s"] * 1e3}
    for name, part in whole.items():
        if isinstance(part, dict):
            times[f"register, {name} stage"] = part["s"] * 1e3
    for level in content["levels"]:
        name = f"iteration of {level['stage']} 1/{level['scale']:g}"
        times[name] = level["ms_per_iteration"]
    return {(work, "jaxreg"): ms for work, ms in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--slower", type=float, metavar="PERCENT", help="fail if ours got slower")
    options = parser.parse_args()
    base, new = read_times(options.base), read_times(options.new)
    slower = []
    print(f"{'work':<46} {'who':<28} {'base ms':>10} {'new ms':>10} {'new/base':>9}")
    for key in [key for key in base if key in new]:
        ratio = new[key] / base[key]
        print(f"{key[0]:<46} {key[1]:<28} {base[key]:10.3f} {new[key]:10.3f} {ratio:9.3f}")
        ours = re.match("jaxreg|torchreg", key[1])
        if ours and options.slower is not None and ratio > 1 + options.slower / 100:
            slower.append(f"{key[0]} {key[1]}: {ratio:.3f}")
    for name, only in (("base", base.keys() - new.keys()), ("new", new.keys() - base.keys())):
        for work, who in sorted(only):
            print(f"only in {name}: {work}, {who}")
    if slower:
        raise SystemExit("slower:\n" + "\n".join(slower))


if __name__ == "__main__":
    main()
