"""``jaxreg register --pairs``: many pairs, a table of them, and going on after a stop."""

from __future__ import annotations

import csv
import importlib
import json
import re
import shutil
import weakref
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from command import run
from programs import compiled_programs, forgetting_programs
from scenes import header, physical_grid, scene

import jaxreg_cli
from regkernels import Volume, read_volume, write_volume

# The package's attribute of this name is the function in it.
register_command = importlib.import_module("jaxreg.commands.register")

Captured = pytest.CaptureFixture[str]

OPTIONS = ("--stages", "translation,greedy", "--preset", "fast", "--device", "cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images, and a table of two pairs."""
    grid = header((24, 26), (2.5, 2.5))
    for name, shift in (("atlas", 0.0), ("one", 3.0), ("two", -2.0)):
        image = scene(physical_grid(grid) + shift).astype(np.float32)
        write_volume(grid.with_array(image), tmp_path / f"{name}.nii.gz")
        labels = (image > image.mean()).astype(np.uint8) + 1
        write_volume(grid.with_array(labels), tmp_path / f"{name}_labels.nii.gz")
    write_pairs(tmp_path, "fixed,moving\natlas.nii.gz,one.nii.gz\natlas.nii.gz,two.nii.gz\n")
    return tmp_path


def write_pairs(folder: Path, text: str) -> None:
    (folder / "pairs.csv").write_text(text)


def study(folder: Path, *options: object) -> int:
    return run(
        "register", "--pairs", folder / "pairs.csv", "-o", folder / "out", *OPTIONS, *options
    )


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "out" / "pairs.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_each_pair_is_registered_as_it_would_be_alone(folder: Path, capsys: Captured) -> None:
    assert study(folder) == 0
    assert "2 of 2" in capsys.readouterr().out
    for name in ("one", "two"):
        alone = folder / f"{name}_alone"
        paths = folder / "atlas.nii.gz", folder / f"{name}.nii.gz"
        assert run("register", *paths, "-o", alone, *OPTIONS) == 0
        for file in ("affine.tfm", "warp.nii.gz", "moved.nii.gz"):
            assert (folder / "out" / name / file).read_bytes() == (alone / file).read_bytes()
    rows = table(folder)
    assert [(row["name"], row["status"]) for row in rows] == [("one", "done"), ("two", "done")]
    assert all(float(row["seconds"]) > 0 and float(row["greedy loss"]) < 0 for row in rows)


def write_round(folder: Path, count: int) -> None:
    """Write a table of the first pairs among the three images, all of one shape."""
    pairs = [("atlas", "one"), ("atlas", "two"), ("one", "two"), ("two", "atlas")][:count]
    rows = [f"{a}_{b},{a}.nii.gz,{b}.nii.gz" for a, b in pairs]
    write_pairs(folder, "\n".join(["name,fixed,moving", *rows, ""]))


def test_pairs_of_one_shape_are_compiled_once(folder: Path) -> None:
    compiled = []
    for count in (1, 4):
        write_round(folder, count)
        with forgetting_programs(), compiled_programs() as programs:
            assert study(folder, "--jobs", 2, "--no-cache") == 0
        compiled.append(sorted(programs))
        assert [row["status"] for row in table(folder)] == ["done"] * count
        shutil.rmtree(folder / "out")
    alone, several = compiled
    assert len(alone) > 5 and several == alone


def test_two_jobs_write_the_same_bytes_as_one(folder: Path) -> None:
    write_round(folder, 4)
    found = []
    for jobs in (1, 2):
        assert study(folder, "--jobs", jobs) == 0
        out = folder / "out"
        found.append(
            {
                str(path.relative_to(out)): path.read_bytes()
                for path in sorted(out.rglob("*"))
                if path.suffix in (".gz", ".tfm")
            }
        )
        shutil.rmtree(out)
    assert len(found[0]) == 4 * 5
    assert found[0] == found[1]


def test_the_same_command_goes_on_where_it_was_stopped(folder: Path) -> None:
    assert study(folder) == 0
    before = (folder / "out" / "one" / "warp.nii.gz").stat().st_mtime_ns
    (folder / "out" / "two" / "registration.json").unlink()
    assert study(folder) == 0
    assert [row["status"] for row in table(folder)] == ["kept", "done"]
    assert (folder / "out" / "one" / "warp.nii.gz").stat().st_mtime_ns == before


def test_a_pair_of_other_images_is_registered_anew(folder: Path) -> None:
    assert study(folder) == 0
    write_pairs(folder, "name,fixed,moving\none,atlas.nii.gz,two.nii.gz\n")
    assert study(folder) == 0
    assert [(row["name"], row["status"]) for row in table(folder)] == [("one", "done")]


def test_one_that_fails_does_not_stop_the_others(folder: Path, capsys: Captured) -> None:
    (folder / "two.nii.gz").write_bytes(b"no image")
    write_pairs(
        folder,
        "name,fixed,moving\nbad,atlas.nii.gz,two.nii.gz\ngood,atlas.nii.gz,one.nii.gz\n",
    )
    assert study(folder) == 2
    assert "1 of 2 pairs failed: bad; " in capsys.readouterr().err
    bad, good = table(folder)
    assert bad["status"] == "failed" and "two.nii.gz: not an image" in bad["error"]
    assert good["status"] == "done"
    assert not (folder / "out" / "bad").exists()


LACKS = {
    "device": jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nallocating 9 bytes."),
    "host": MemoryError("Unable to allocate 2 TiB"),
}


def lacking(monkeypatch: pytest.MonkeyPatch, error: Exception, times: dict[str, int]) -> list[str]:
    """Have memory lack for pairs, by their names, as often as said; return which are begun."""
    begun: list[str] = []
    watched = register_command.register_watched

    def register_watched(fixed: Any, moving: Any, *more: Any, **options: Any) -> Any:
        (name,) = (x for x in NAMES if np.array_equal(moving.array, NAMES[x]))
        begun.append(name)
        if begun.count(name) <= times.get(name, 0):
            raise error
        return watched(fixed, moving, *more, **options)

    monkeypatch.setattr(register_command, "register_watched", register_watched)
    return begun


NAMES: dict[str, Any] = {}
"""The images of the pairs that are counted."""


@pytest.fixture
def four(folder: Path) -> Path:
    """A folder with four pairs, each with a moving image of its own."""
    image = read_volume(folder / "one.nii.gz")
    NAMES.clear()
    for number in range(4):
        name = f"m{number}"
        NAMES[name] = np.asarray(image.array) + number
        write_volume(image.with_array(NAMES[name]), folder / f"{name}.nii.gz")
    rows = [f"atlas.nii.gz,{name}.nii.gz" for name in NAMES]
    write_pairs(folder, "\n".join(["fixed,moving", *rows, ""]))
    return folder


@pytest.mark.parametrize("where", LACKS)
def test_a_pair_for_which_memory_lacks_is_tried_again_alone_after_the_others(
    four: Path, where: str, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    begun = lacking(monkeypatch, LACKS[where], {"m1": 1, "m2": 1})
    assert study(four, "--jobs", 3, "--log", four / "log") == 0
    assert sorted(begun[:4]) == sorted(NAMES)
    assert sorted(begun[4:]) == ["m1", "m2"]
    assert [row["status"] for row in table(four)] == ["done"] * 4
    told, logged = capsys.readouterr().out, (four / "log").read_text()
    text = " ".join(str(LACKS[where]).split())
    for name in ("m1", "m2"):
        line = f"{name}: out of memory: {text}; it is tried again alone after the others"
        assert line in told
        assert line in logged


def test_a_pair_for_which_memory_lacks_alone_has_failed_and_stops_no_other(
    four: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    begun = lacking(monkeypatch, LACKS["device"], {"m0": 9, "m2": 9})
    assert study(four, "--jobs", 2) == 2
    assert begun.count("m0") == 1  # the first one is alone
    assert begun.count("m2") == 2
    assert [row["status"] for row in table(four)] == ["failed", "done", "failed", "done"]
    assert table(four)[2]["error"].startswith("out of memory: RESOURCE_EXHAUSTED: Out of memory ")
    assert "2 of 4 pairs failed: m0, m2; " in capsys.readouterr().err

    monkeypatch.undo()
    begun = lacking(monkeypatch, LACKS["device"], {"m2": 9})  # one after the other
    assert study(four, "--jobs", 1) == 2
    assert begun == ["m0", "m2"]
    assert [row["status"] for row in table(four)] == ["done", "kept", "failed", "kept"]


def test_what_a_pair_without_memory_had_is_let_go_before_it_is_tried_again(
    four: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[weakref.ref[Volume]] = []
    watched = register_command.register_watched

    def register_watched(fixed: Volume, moving: Volume, *more: Any, **options: Any) -> Any:
        if np.array_equal(moving.array, NAMES["m3"]):
            assert [reference() for reference in left] == [None] * len(left)
            left.append(weakref.ref(moving))
            if len(left) == 1:
                raise MemoryError("Unable to allocate 2 TiB")
        return watched(fixed, moving, *more, **options)

    monkeypatch.setattr(register_command, "register_watched", register_watched)
    assert study(four, "--jobs", 2) == 0
    assert len(left) == 2


def test_a_bug_in_a_pair_is_not_taken_for_a_lack_of_memory(
    four: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lacking(monkeypatch, RuntimeError("INTERNAL: a bug"), {"m1": 1})
    with pytest.raises(RuntimeError, match="INTERNAL: a bug"):
        jaxreg_cli.main(
            [
                *("register", "--pairs", str(four / "pairs.csv")),
                *("-o", str(four / "out"), *OPTIONS),
            ]
        )


def test_the_table_tells_how_labels_fit(folder: Path, capsys: Captured) -> None:
    columns = "fixed,moving,fixed_labels,moving_labels"
    write_pairs(
        folder, f"{columns}\natlas.nii.gz,one.nii.gz,atlas_labels.nii.gz,one_labels.nii.gz\n"
    )
    assert study(folder, "--json") == 0
    (row,) = table(folder)
    assert float(row["dice after"]) > float(row["dice before"])
    (printed,) = json.loads(capsys.readouterr().out)
    assert printed["dice after"] == float(row["dice after"])


def test_results_of_other_settings_are_not_taken_for_these(folder: Path, capsys: Captured) -> None:
    assert study(folder) == 0
    assert study(folder, "--metric", "mse") == 2
    assert "expected a folder without results of other settings" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fixed\na\n", "expected the columns fixed and moving, and maybe name"),
        ("fixed,moving,age\n", "expected the columns fixed and moving"),
        ("fixed,moving\n", "expected pairs, got none"),
        ("fixed,moving\natlas.nii.gz\n", "line 2: expected as many cells as columns"),
        ("fixed,moving\natlas.nii.gz,\n", "line 2: expected a file in the column moving"),
        ("fixed,moving\natlas.nii.gz,no.nii.gz\n", r"line 2: moving: .*no\.nii\.gz: no such file"),
        (
            "name,fixed,moving\na/b,atlas.nii.gz,one.nii.gz\n",
            "expected a name that can be a folder",
        ),
        (
            "fixed,moving\natlas.nii.gz,one.nii.gz\ntwo.nii.gz,one.nii.gz\n",
            "expected a name for each pair, got one twice",
        ),
    ],
)
def test_what_is_no_table_of_pairs_is_refused(
    folder: Path, text: str, message: str, capsys: Captured
) -> None:
    write_pairs(folder, text)
    assert study(folder) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "--pairs: " in error
    assert re.search(message, error)


def test_a_study_takes_its_images_from_the_table(folder: Path, capsys: Captured) -> None:
    assert study(folder, folder / "atlas.nii.gz", folder / "one.nii.gz") == 2
    assert "--pairs: expected no FIXED beside it" in capsys.readouterr().err
    assert run("register", folder / "atlas.nii.gz", "-o", folder / "out") == 2
    assert "missing argument MOVING" in capsys.readouterr().err
