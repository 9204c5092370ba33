"""``jaxreg register --outputs``: the files that are wanted, and no others."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from command import run
from scenes import header, physical_grid, scene

from regkernels import write_volume


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("images")
    grid = header((24, 26), (2.5, 2.5))
    paths = []
    for name, shift in (("fixed", 0.0), ("moving", 3.0)):
        image = scene(physical_grid(grid) + shift).astype(np.float32)
        paths.append(folder / f"{name}.nii.gz")
        write_volume(grid.with_array(image), paths[-1])
    return paths


def written(images: list[Path], out: Path, *options: object) -> dict[str, bytes]:
    arguments = ["--stages", "translation,greedy", "--preset", "fast", "--device", "cpu"]
    assert run("register", *images, *arguments, "-o", out, *options) == 0
    return {path.name: path.read_bytes() for path in out.iterdir()}


@pytest.mark.parametrize(
    ("outputs", "names"),
    [
        ("transform", {"affine.tfm", "warp.nii.gz"}),
        ("inverse", {"affine.tfm", "inverse_warp.nii.gz"}),
        ("moved, record", {"moved.nii.gz", "registration.json"}),
        ("fixed_moved,report", {"fixed_moved.nii.gz", "report.html"}),
    ],
)
def test_what_is_named_is_written_as_ever_and_nothing_else(
    images: list[Path], tmp_path: Path, outputs: str, names: set[str]
) -> None:
    everything = written(images, tmp_path / "all", "--report")
    # In a folder with all of them, which belong to another registration.
    found = written(images, tmp_path / "all", "--outputs", outputs)
    assert found.keys() == names
    for name in names - {"registration.json", "report.html"}:
        assert found[name] == everything[name]


def test_the_report_may_be_asked_for_either_way(images: list[Path], tmp_path: Path) -> None:
    found = written(images, tmp_path / "out", "--outputs", "moved", "--report")
    assert found.keys() == {"moved.nii.gz", "report.html"}


def test_the_record_names_the_files_that_are_there_and_where_the_time_went(
    images: list[Path], tmp_path: Path
) -> None:
    found = written(images, tmp_path / "out", "--outputs", "transform,record")
    record = json.loads(found["registration.json"])
    assert record["transform"]["fixed to moving"] == ["warp.nii.gz", "affine.tfm"]
    assert record["transform"]["moving to fixed"] == []
    seconds = record["seconds"]
    assert list(seconds) == ["reading", "stages", "results", "writing", "compilation", "total"]
    total = seconds.pop("total")
    assert min(seconds.values()) >= 0
    assert 0.5 * total < sum(seconds.values()) < 1.01 * total + 0.01


@pytest.mark.parametrize("outputs", ["magic", "moved,magic", "", "moved,"])
def test_an_output_that_there_is_not_is_refused(
    images: list[Path], tmp_path: Path, outputs: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("register", *images, "-o", tmp_path / "out", "--outputs", outputs) == 2
    assert "--outputs: expected some of transform, inverse, moved" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
