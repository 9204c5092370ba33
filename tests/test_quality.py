"""The benchmark of quality: what it makes of a folder, and how it measures what is inside out."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from scenes import header, physical_grid, scene

from regkernels import write_volume

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def quality(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("quality")


@pytest.mark.parametrize("dim", [2, 3])
def test_a_field_that_keeps_the_order_of_points_turns_nothing_inside_out(
    quality: ModuleType, dim: int
) -> None:
    shape = (5, 6, 7)[-dim:]
    index = np.stack(np.indices(shape)[::-1], axis=-1).astype(float)
    assert quality.non_diffeomorphic_volume(np.zeros_like(index)) == 0
    assert quality.non_diffeomorphic_volume(-0.9 * index) == 0  # all the smaller
    assert quality.non_diffeomorphic_volume(0.5 * index[..., ::-1]) >= 0


@pytest.mark.parametrize("dim", [2, 3])
def test_what_is_mirrored_is_inside_out_by_its_whole_volume(quality: ModuleType, dim: int) -> None:
    shape = (5, 6, 7)[-dim:]
    mirrored = np.zeros((*shape, dim))
    mirrored[..., 0] = -2 * np.indices(shape)[-1]
    assert quality.non_diffeomorphic_volume(mirrored) == pytest.approx(1)


def test_a_fold_between_voxels_is_found_where_central_differences_see_none(
    quality: ModuleType,
) -> None:
    field = np.zeros((6, 8, 2))
    field[:, ::2, 0] = 1.2  # voxels of each pair change places; across two of them nothing changes
    central = 1 + (field[:, 2:, 0] - field[:, :-2, 0]) / 2
    assert (central > 0).all()
    assert quality.non_diffeomorphic_volume(field) > 0.05


def write_pair(folder: Path, *sizes: int) -> None:
    """Two scenes in a folder, one shifted by 4 mm, with the labels and landmarks of their blob."""
    grid = header(sizes, (5,) * len(sizes))
    for name, shift in (("one", 0), ("other", 4)):
        image = scene(physical_grid(grid) + shift)
        write_volume(grid.with_array(image), folder / f"{name}.nii.gz")
        labels = np.where(image > 0.5, 7 if name == "one" else 9, 0)
        write_volume(grid.with_array(labels), folder / f"{name}_labels.nii.gz")
        points = ([-shift] * len(sizes), [5 - shift, *[-shift] * (len(sizes) - 1)])
        lines = (",".join(map(str, point)) + "\n" for point in points)
        (folder / f"{name}_points.csv").write_text("".join(lines))
    (folder / "regions.csv").write_text("region,one_labels,other_labels\nblob,7,9\n")


def test_every_pair_of_a_folder_is_judged_both_ways(
    quality: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pair(tmp_path, 28, 30)
    result = tmp_path / "quality.json"
    arguments = [str(tmp_path), "--settings", "rigid", "--repeats", "1", "--json", str(result)]
    monkeypatch.setattr("sys.argv", ["quality.py", *arguments])
    quality.main()
    rows = json.loads(result.read_text())["rows"]
    assert [row["work"] for row in rows] == ["other to one, given", "one to other, given"]
    for row in rows:
        assert row["Dice all"] > 0.9
        assert row["inverse Dice all"] > 0.9
        assert row["landmarks mm"] < 0.5
        assert row["there and back mm"] < 0.5


@pytest.mark.usefixtures("quality")
def test_one_registration_on_many_voxels_brings_labels_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = importlib.import_module("large")
    monkeypatch.setattr(large, "SCALES", (4, 2, 1))
    monkeypatch.setattr(large, "ITERATIONS", (20, 20, 10))
    write_pair(tmp_path, 20, 22, 24)
    result = tmp_path / "large.json"
    arguments = ["large.py", str(tmp_path), "--cube", "32", "--json", str(result)]
    monkeypatch.setattr("sys.argv", arguments)
    large.main()
    rows = json.loads(result.read_text())["rows"]
    assert [row["who"] for row in rows] == ["float32", "bfloat16"]
    for row in rows:
        assert row["shape"] == [32, 32, 32]
        assert row["dice"] > row["dice_before"] + 0.05
        assert row["seconds"] > row["stages_seconds"] > 0
