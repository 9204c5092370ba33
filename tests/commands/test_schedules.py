"""Stages with their settings: ``--stage``, ``--recipe`` and ``--like`` of ``jaxreg register``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command import run
from scenes import write_shifted_pair

from jaxreg.commands.schedules import Schedule, read_schedule
from jaxreg.registration import (
    FFD,
    LNCC,
    MI,
    NCC,
    Affine,
    Bending,
    CoarseToFine,
    Greedy,
    Moments,
    Stage,
    SyN,
    preset,
)

STAGES: dict[str, Stage] = {
    "affine metric=MI(num_bins=64) scales=4,2,1 iterations=200,100,50": Affine(
        metric=MI(num_bins=64), scales=(4, 2, 1), iterations=(200, 100, 50)
    ),
    "affine metric=mi": Affine(metric="mi"),
    "greedy": Greedy(),
    "greedy metric=lncc(kernel_size=5, common_variance=0) regularisation=Bending(weight=2)": Greedy(
        metric=LNCC(kernel_size=5, common_variance=0), regularisation=Bending(weight=2)
    ),
    "syn  scales=2 iterations=5  regularisation=none": SyN(
        scales=(2,), iterations=(5,), regularisation=None
    ),
    "affine metric=CoarseToFine(coarse=NCC(), fine=LNCC(kernel_size=5), threshold=2)": Affine(
        metric=CoarseToFine(coarse=NCC(), fine=LNCC(kernel_size=5), threshold=2)
    ),
    "ffd spacing=10,10,2.5 unit=mm regularisation=Bending(weight=0.5)": FFD(
        spacing=(10, 10, 2.5), unit="mm", regularisation=Bending(weight=0.5)
    ),
    "ffd spacing=4": FFD(spacing=4),
    "greedy moments_dtype=bfloat16": Greedy(moments_dtype="bfloat16"),
    "moments rotation=false": Moments(rotation=False),
}


@pytest.mark.parametrize("text", STAGES)
def test_a_stage_is_written_with_its_settings(text: str) -> None:
    assert read_schedule([text], None, None) == Schedule((STAGES[text],))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("afine", "stage: expected one of moments, translation, .*got 'afine'"),
        ("affine scale=3", "stage affine: expected settings among scales, .*got scale"),
        ("affine metric=magic", "metric: .*expected numbers, or one of LNCC, MI, .*got magic"),
        ("greedy metric=LNCC(size=3)", "LNCC: expected settings among kernel_size, .*got size"),
        ("affine scales=4,,", "scales: expected a value, got '4,,'"),
        ("affine scales=4,2 iterations=3", r"iterations: expected a count for each of \(4, 2\)"),
        ("affine iterations 3", "expected settings as NAME=VALUE, got 'iterations 3'"),
        ("affine window=2 window=3", "expected each setting once"),
        ("affine learning_rate=(1,2)", "stage affine: "),
        ("ffd spacing=0", "spacing: expected a positive number, or one for each axis, got 0"),
        ("ffd spacing=wide", "spacing: .*expected numbers, or one of LNCC, .*got wide"),
        ("greedy moments_dtype=float16", "moments_dtype: expected float32 or bfloat16, got"),
        ("ffd unit=cm", "unit: expected one of voxel, mm, got 'cm'"),
        ("ffd gradient_sigma=1", "stage ffd: expected settings among .*got gradient_sigma"),
        ("affine metric=__import__('os')", "metric: expected a value"),
    ],
)
def test_what_is_no_stage_is_refused_by_its_name(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"--stage: .*{message}"):
        read_schedule([text], None, None)


@pytest.mark.parametrize("name", ["affine", "fast", "default", "accurate"])
@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_the_record_of_each_preset_can_be_fed_back(name: str, device: str, tmp_path: Path) -> None:
    stages = preset(name, ndim=3, device=device)
    record = {
        "stages": [{"name": stage.name, "settings": stage.record()} for stage in stages],
        "clip": [0.01, 0.99],
    }
    (tmp_path / "registration.json").write_text(json.dumps(record))
    found = read_schedule(None, None, tmp_path / "registration.json")
    assert found == Schedule(stages, "0.01,0.99")


RECIPE = """
clip = "0.005,0.995"

[[stages]]
name = "moments"

[[stages]]
name = "affine"
metric = "MI(num_bins=16)"
scales = [4, 2]
iterations = [20, 10]
"""


def test_a_recipe_has_a_table_for_each_stage(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(RECIPE)
    affine = Affine(metric=MI(num_bins=16), scales=(4, 2), iterations=(20, 10))
    expected = Schedule((Moments(), affine), "0.005,0.995")
    assert read_schedule(None, tmp_path / "recipe.toml", None) == expected


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("recipe", "stages = 3", "expected stages with their names and settings"),
        ("recipe", "[[stages]]\nscales = [1]", "expected stages with their names and settings"),
        ("recipe", "stages = []", "expected stages, got none"),
        ("recipe", "devices = 2", "expected some of stages, clip, match_histogram, got devices"),
        ("recipe", "not toml", "not a file in TOML"),
        ("recipe", '[[stages]]\nname = "affine"\nscale = 2', "expected settings among"),
        ("like", "[", "not a record of a registration"),
        ("like", "{}", "expected stages with their names and settings"),
    ],
)
def test_what_is_no_recipe_is_refused_by_its_name(
    name: str, text: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text(text)
    given = {"recipe": None, "like": None, name: tmp_path / "file"}
    with pytest.raises(ValueError, match=f"--{name}: .*file: .*{message}"):
        read_schedule(None, **given)


def test_one_way_to_say_it_is_enough(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--stage: expected no --like beside it"):
        read_schedule(["affine"], None, tmp_path)
    with pytest.raises(ValueError, match="--recipe: expected no --metric beside it"):
        read_schedule(None, tmp_path, None, stages=None, metric="mi")
    assert read_schedule(None, None, None, stages="affine", metric=None) is None


def test_a_registration_is_repeated_from_its_record(tmp_path: Path) -> None:
    paths = write_shifted_pair(tmp_path)
    stages = [
        "--stage",
        "translation scales=4,2 iterations=9,5",
        "--stage",
        "greedy scales=2 iterations=6",
    ]
    first, again = tmp_path / "first", tmp_path / "again"
    assert run("register", *paths, *stages, "--clip", "0.01,0.99", "-o", first) == 0
    record = first / "registration.json"
    assert [stage["name"] for stage in json.loads(record.read_text())["stages"]] == [
        "translation",
        "greedy",
    ]
    assert run("register", *paths, "--like", record, "-o", again) == 0
    for name in ("affine.tfm", "warp.nii.gz", "moved.nii.gz"):
        assert (first / name).read_bytes() == (again / name).read_bytes()


def test_steps_and_smoothing_that_are_typed_are_those_of_the_record_and_are_taken(
    tmp_path: Path,
) -> None:
    paths = write_shifted_pair(tmp_path)
    schedule = {"scales": [2], "iterations": [5]}
    linear, typed = {"learning_rate": 0.02}, {"learning_rate": 0.3, "field_sigma": 1.5}
    typed["gradient_sigma"] = 2.5

    def registered(name: str, *more: dict[str, float]) -> tuple[list[dict[str, Any]], bytes]:
        stages = []
        for stage, settings in zip(("affine", "greedy"), more, strict=True):
            words = [f"{key}={value}" for key, value in settings.items()]
            stages += ["--stage", " ".join([stage, "scales=2 iterations=5", *words])]
        out = tmp_path / name
        assert run("register", *paths, *stages, "--device", "cpu", "-o", out) == 0
        record = json.loads((out / "registration.json").read_text())
        return [x["settings"] for x in record["stages"]], (out / "warp.nii.gz").read_bytes()

    affine, greedy = registered("typed", linear, typed)[0]
    assert schedule.items() <= affine.items() and linear.items() <= affine.items()
    assert schedule.items() <= greedy.items() and typed.items() <= greedy.items()
    warps = [registered("typed again", linear, typed)[1], registered("default", {}, {})[1]]
    for name, value in typed.items():
        settings, warp = registered(name, linear, {name: value})
        assert settings[1][name] == value
        warps.append(warp)
    assert len(set(warps)) == len(warps)  # each of them counts
