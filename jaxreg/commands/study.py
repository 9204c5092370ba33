"""Many pairs of images, registered by one process, several at once where memory holds them."""

from __future__ import annotations

import csv
import gc
import json
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from jaxreg.commands.inputs import naming
from jaxreg.commands.outputs import RECORD
from jaxreg_cli.memory import is_lack_of_memory
from regkernels.files.atomic import atomic_path

__all__ = ["ALSO", "Jobs", "Pair", "Pairs", "read_pairs", "register_pairs"]

_TABLE = "pairs.csv"
_SETTINGS = "pairs.json"
_LACKED = "lacked memory"
"""The status of a pair for which memory did not suffice, until it has run alone."""

_IMAGES = ("fixed", "moving")
_BESIDE = (
    *("fixed_mask", "moving_mask", "fixed_labels", "moving_labels"),
    *("fixed_points", "moving_points"),
)

ALSO = re.compile(r"(fixed|moving)_([2-9]|[1-9]\d+)")
"""The columns of further images of a pair."""

Pairs = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE.csv",
        help="Register many pairs instead of FIXED and MOVING, each into a folder of its own in "
        f"OUT_DIR: a table with the columns {' and '.join(_IMAGES)} and maybe name, initial, "
        f"{', '.join(_BESIDE)}, and fixed_2, moving_2 and so on for --also, of files beside it. "
        f"OUT_DIR/{_TABLE} tells how each went; the same command goes on where it was stopped.",
    ),
]
Jobs = Annotated[
    int,
    typer.Option(
        min=1,
        metavar="N",
        help="How many pairs at once, so that files are read and written while "
        "others are registered. Those for which memory lacks then are tried again alone.",
    ),
]


class Pair(NamedTuple):
    """A row of the table of pairs.

    Attributes
    ----------
    name
        Of its folder.
    files
        What the columns name, by their names.
    """

    name: str
    files: dict[str, Path]

    @property
    def also(self) -> list[tuple[Path, Path]]:
        """Further images of the two, in the order of their numbers."""
        matches = map(ALSO.fullmatch, self.files)
        numbers = sorted(int(match[2]) for match in matches if match and match[1] == "fixed")
        return [(self.files[f"fixed_{n}"], self.files[f"moving_{n}"]) for n in numbers]


def read_pairs(path: Path) -> list[Pair]:
    """Read a table of pairs.

    Parameters
    ----------
    path
        With commas, and the names of the columns in the first row. Without the column ``name`` a
        pair is called like its moving image.

    Returns
    -------
    list of Pair
        In their order.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is no such table, names a file that there is not, or calls two pairs alike.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            columns, rows = list(reader.fieldnames or ()), list(reader)
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a table with commas: {error}") from error
    known = (*_IMAGES, "name", "initial", *_BESIDE)
    unknown = [column for column in columns if column not in known and not ALSO.fullmatch(column)]
    missing = [column for column in _IMAGES if column not in columns]
    if unknown or missing or len(set(columns)) < len(columns):
        raise ValueError(
            f"{path}: expected the columns fixed and moving, and maybe {', '.join(known[2:])}, "
            f"fixed_2, moving_2 and so on, each once, got {', '.join(columns)}"
        )
    if not rows:
        raise ValueError(f"{path}: expected pairs, got none")
    pairs = [_pair(row, f"{path}: line {line}", path.parent) for line, row in enumerate(rows, 2)]
    names = [pair.name for pair in pairs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(
            f"{path}: expected a name for each pair, got {twice} twice; a column name tells them "
            "apart"
        )
    return pairs


def _pair(row: Mapping[str | None, Any], where: str, folder: Path) -> Pair:
    if None in row or None in row.values():
        raise ValueError(f"{where}: expected as many cells as columns")
    cells = {str(column): text.strip() for column, text in row.items()}
    name = cells.pop("name", "")
    for column in _IMAGES:
        if not cells[column]:
            raise ValueError(f"{where}: expected a file in the column {column}, got none")
    files = {column: folder / text for column, text in cells.items() if text}
    for column, file in files.items():
        if column != "initial" and not file.exists():
            raise ValueError(f"{where}: {column}: {file}: no such file")
    for side, number in (match.groups() for match in map(ALSO.fullmatch, files) if match):
        other = f"{'moving' if side == 'fixed' else 'fixed'}_{number}"
        if other not in files:
            raise ValueError(f"{where}: expected a file in the column {other}, too, got none")
    if not name:
        name = files["moving"].name.split(".")[0]
    if name in (".", "..") or name != Path(name).name:
        raise ValueError(f"{where}: expected a name that can be a folder's, got {name!r}")
    return Pair(name, files)


def register_pairs(
    pairs: Sequence[Pair],
    folder: Path,
    register: Callable[[Pair, Path], dict[str, Any]],
    settings: Mapping[str, Any],
    jobs: int,
) -> list[dict[str, Any]]:
    """Register pairs into folders of their own; one that fails does not stop the others.

    Parameters
    ----------
    pairs
        Which; those whose folder has a record of the same images already are left as they are.
    folder
        Where to.
    register
        Registers a pair into a folder and returns the record.
    settings
        All that results depend on beside the pairs, for JSON: what is there already must have been
        made with the same.
    jobs
        How many at once. The first runs alone, so that the others find its programs. Those for
        which memory did not suffice beside others run again in the end, alone.

    Returns
    -------
    list of dict
        A row of the table for each pair.

    Raises
    ------
    ValueError
        If the folder has results with other settings, or if pairs have failed.
    """
    with naming("--output"):
        _settle(folder, json.loads(json.dumps(dict(settings))))
    rows: dict[str, dict[str, Any]] = {}

    def tell(pair: Pair, row: dict[str, Any]) -> None:
        rows[pair.name] = {"name": pair.name, **row}
        _write_table(folder / _TABLE, [rows[x.name] for x in pairs if x.name in rows])
        print(f"{len(rows)} of {len(pairs)}  {pair.name}: {row.get('error') or row['status']}")

    def run(pair: Pair) -> dict[str, Any]:
        # Of an error nothing is kept but its text: it holds on to all that the pair had.
        try:
            return _row("done", register(pair, folder / pair.name))
        except (OSError, ValueError) as error:
            return {"status": "failed", "error": " ".join(str(error).split())}
        except Exception as error:
            if not is_lack_of_memory(error):
                raise
            return {"status": _LACKED, "error": f"out of memory: {' '.join(str(error).split())}"}

    def run_alone(pair: Pair) -> dict[str, Any]:
        row = run(pair)
        return {**row, "status": "failed"} if row["status"] == _LACKED else row

    left = []
    for pair in pairs:
        record = _record_of(pair, folder)
        if record is None:
            left.append(pair)
        else:
            tell(pair, _row("kept", record))
    for pair in left[:1]:
        tell(pair, run_alone(pair))
    lacked = []
    with ThreadPoolExecutor(jobs) as pool:
        running = {pool.submit(run, pair): pair for pair in left[1:]}
        try:
            for done in as_completed(running):
                pair, row = running[done], done.result()
                if row["status"] != _LACKED:
                    tell(pair, row)
                elif jobs == 1:
                    tell(pair, {**row, "status": "failed"})
                else:
                    lacked.append(pair)
                    print(f"{pair.name}: {row['error']}; it is tried again alone after the others")
        except BaseException:  # after an interrupt no other pair begins
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    for pair in lacked:
        gc.collect()  # what errors held in cycles, of this pair and of the one before
        tell(pair, run_alone(pair))
    found = [rows[pair.name] for pair in pairs]
    failed = [row["name"] for row in found if row["status"] == "failed"]
    if failed:
        raise ValueError(
            f"{len(failed)} of {len(pairs)} pairs failed: {', '.join(failed)}; {folder / _TABLE} "
            "tells why, and the same command tries them again"
        )
    return found


def _record_of(pair: Pair, folder: Path) -> dict[str, Any] | None:
    """Return the record of a pair that was registered before, of the same images."""
    path = folder / pair.name / RECORD
    if not path.is_file():
        return None
    record: dict[str, Any] = json.loads(path.read_text())
    images = [str(pair.files[name]) for name in _IMAGES]
    inputs = record["inputs"]
    before = [inputs.get(name) for name in ("FIXED", "MOVING")]
    also = [[str(path) for path in paths] for paths in pair.also]
    return record if images == before and also == inputs.get("--also", []) else None


def _settle(folder: Path, settings: Any) -> None:
    """Note the settings of a study, or see that they are those of what is there."""
    folder.mkdir(parents=True, exist_ok=True)
    note = folder / _SETTINGS
    if note.is_file():
        try:
            before = json.loads(note.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{note}: not the settings of a study: {error}") from error
        other = [name for name in settings if before.get(name) != settings[name]]
        if other:
            raise ValueError(
                f"{folder}: expected a folder without results of other settings, but they differ "
                f"in {', '.join(other)}; choose another folder"
            )
        return
    with atomic_path(note) as beside:
        beside.write_text(f"{json.dumps(settings, indent=2)}\n")


def _row(status: str, record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a row of the table tells of a registration."""
    row: dict[str, Any] = {"status": status, "seconds": record["seconds"]["total"]}
    row["folded share"] = record["jacobian"]["share"]
    row["doubts"] = "; ".join(doubt["code"] for doubt in record["doubts"])
    for stage in record["stages"]:
        losses = stage["levels"][-1]["losses"]
        if losses:
            row[f"{stage['name']} loss"] = losses[-1]
    if "labels" in record:
        mean = record["labels"]["mean over labels that both have"]
        row |= {f"dice {when}": mean[when]["dice"] for when in ("before", "after")}
    errors = record.get("target registration error (mm)", {})
    row |= {
        f"target registration error {when} (mm)": errors[when]["mean"]
        for when in ("before", "after")
        if errors
    }
    return row


def _write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    columns = dict.fromkeys(column for row in rows for column in row)
    with atomic_path(path) as beside, beside.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(columns), restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
