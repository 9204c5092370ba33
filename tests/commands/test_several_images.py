"""``jaxreg register --also``: several images of each side, weights, and matched histograms."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from command import run
from rich.console import Console
from scenes import header, physical_grid, scene

from jaxreg.commands.schedules import Schedule, read_schedule
from jaxreg.commands.stage_options import Preset, choose_stages, for_pairs
from jaxreg.registration import (
    LNCC,
    MI,
    MIND,
    NCC,
    Affine,
    Deformable,
    Greedy,
    PerChannel,
    Rigid,
    SyN,
    Translation,
)
from regkernels import AffineMap, read_transform, read_volume, write_volume

Captured = pytest.CaptureFixture[str]

SHIFT = (4.0, -6.0)
REGISTER = ("register", "--stages", "translation", "--device", "cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of images that vary along x alone, and along y alone, on another grid, too."""
    folder = tmp_path_factory.mktemp("images")
    for name, axis, grid in (
        ("x", 0, header((36, 40), (2.0, 2.0))),
        ("y", 1, header((36, 40), (2.0, 2.0))),
        ("fine", 1, header((60, 66), (1.3, 1.3), turn=10)),
    ):
        for side, shift in (("fixed", 0.0), ("moving", SHIFT[axis])):
            along = physical_grid(grid)[..., axis] - shift
            image = np.exp(-(along**2) / 300).astype(np.float32)
            write_volume(grid.with_array(image), folder / f"{side}_{name}.nii.gz")
    return folder


def pair(folder: Path, name: str) -> tuple[Path, Path]:
    return folder / f"fixed_{name}.nii.gz", folder / f"moving_{name}.nii.gz"


def shift_of(out: Path) -> np.ndarray:
    (part,) = read_transform(out / "affine.tfm")
    assert isinstance(part, AffineMap)
    return np.asarray(part.matrix)[:2, 2]


def test_what_further_images_show_is_compared_too(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = (*REGISTER, *pair(folder, "x"), "--also", *pair(folder, "y"), "-o", out)
    assert run(*command, "--report") == 0
    np.testing.assert_allclose(shift_of(out), SHIFT, atol=0.2)  # of voxels of 2 mm
    assert read_volume(out / "moved.nii.gz").channels == 1
    record = json.loads((out / "registration.json").read_text())
    assert record["inputs"]["--also"] == [[str(path) for path in pair(folder, "y")]]
    assert record["stages"][0]["settings"]["metric"] == "NCC"
    assert str(folder / "moving_y.nii.gz") in (out / "report.html").read_text()


def test_images_on_other_grids_are_resampled_and_named(
    folder: Path, tmp_path: Path, capsys: Captured
) -> None:
    out = tmp_path / "out"
    command = (*REGISTER, *pair(folder, "x"), "--also", *pair(folder, "fine"), "-o", out)
    assert run(*command, "--report") == 0
    np.testing.assert_allclose(shift_of(out), SHIFT, atol=0.2)
    told = capsys.readouterr().out
    for name, side in (("fixed", "FIXED"), ("moving", "MOVING")):
        path = folder / f"{name}_fine.nii.gz"
        assert f"{path} was resampled onto the grid of {side} to be compared." in told
    record = json.loads((out / "registration.json").read_text())
    assert len(record["resampled"]) == 2
    assert "was resampled" in (out / "report.html").read_text()


def test_each_pair_has_its_metric_and_its_weight_and_the_run_can_be_repeated(
    folder: Path, tmp_path: Path
) -> None:
    images = (*pair(folder, "x"), "--also", *pair(folder, "y"))
    options = ("--metric", "ncc,mse", "--weights", "1,0.5")
    assert run(*REGISTER, *images, *options, "-o", tmp_path / "one") == 0
    record = json.loads((tmp_path / "one" / "registration.json").read_text())
    metric = "PerChannel(metrics=(NCC(), MSE()), weights=(1.0, 0.5))"
    assert record["stages"][0]["settings"]["metric"] == metric
    assert record["weights"] == [1, 0.5]
    like = ("--like", tmp_path / "one" / "registration.json", "--device", "cpu")
    assert run("register", *images, *like, "-o", tmp_path / "other") == 0
    both = [(tmp_path / name / "affine.tfm").read_bytes() for name in ("one", "other")]
    assert both[0] == both[1]
    text = f"translation metric={metric}"
    assert read_schedule([text], None, None) == Schedule(
        (Translation(metric=PerChannel((NCC(), "mse"), (1, 0.5))),)
    )


def test_pairs_share_their_weight_among_their_channels() -> None:
    stages = (Rigid(), Greedy())
    assert for_pairs(stages, None, None, [1, 1]) == stages
    rigid, greedy = for_pairs(stages, None, (2, 1), [1, 2])
    assert rigid.metric == PerChannel((NCC(),) * 3, (2, 0.5, 0.5))
    assert greedy.metric == PerChannel((LNCC(),) * 3, (2, 0.5, 0.5))
    assert for_pairs(stages, "mi", None, [1, 1])[0] == Rigid(metric="mi")
    # A pair with more channels does not count more.
    assert for_pairs(stages, None, None, [1, 2])[0].metric == PerChannel(
        (NCC(),) * 3, (1, 0.5, 0.5)
    )


def test_descriptors_of_one_pair_deform_and_its_information_aligns() -> None:
    chosen = choose_stages(
        None, "lncc,mind", Preset.DEFAULT, 3, jax.devices("cpu")[0], Console(quiet=True)
    )
    stages = for_pairs(chosen, "lncc,mind", None, [1, 1])
    assert [stage.name for stage in stages] == ["moments", "rigid", "greedy"]
    assert stages[1].metric == PerChannel((LNCC(), MI()), (1, 1))
    assert stages[2].metric == PerChannel((LNCC(), MIND()), (1, 1))
    assert isinstance(stages[2], Deformable)
    assert stages[2].gradient_sigma == 3


def test_a_study_may_have_further_images(folder: Path, tmp_path: Path, capsys: Captured) -> None:
    table = folder / "pairs.csv"
    table.write_text(
        "name,fixed,moving,fixed_2,moving_2\n"
        "both,fixed_x.nii.gz,moving_x.nii.gz,fixed_y.nii.gz,moving_y.nii.gz\n"
        "alone,fixed_x.nii.gz,moving_x.nii.gz,,\n"
    )
    assert run(*REGISTER, "--pairs", table, "-o", tmp_path / "out") == 0
    np.testing.assert_allclose(shift_of(tmp_path / "out" / "both"), SHIFT, atol=0.2)
    assert abs(shift_of(tmp_path / "out" / "alone")[1]) < 1
    table.write_text(table.read_text().replace("_y.nii.gz", "_fine.nii.gz"))
    capsys.readouterr()
    assert run(*REGISTER, "--pairs", table, "-o", tmp_path / "out") == 0
    told = capsys.readouterr().out  # of other images than before one is registered again
    assert "both: done" in told and "alone: kept" in told
    table.write_text("fixed,moving,fixed_2\nfixed_x.nii.gz,moving_x.nii.gz,fixed_y.nii.gz\n")
    assert run(*REGISTER, "--pairs", table, "-o", tmp_path / "out") == 2
    assert "line 2: expected a file in the column moving_2, too" in capsys.readouterr().err


def test_histograms_are_matched_if_asked_for(folder: Path, tmp_path: Path) -> None:
    grid = header((36, 40), (2.0, 2.0))
    points = physical_grid(grid)
    images = tmp_path / "fixed.nii.gz", tmp_path / "moving.nii.gz"
    write_volume(grid.with_array(scene(points).astype(np.float32)), images[0])
    moving = 1000 * scene(points - SHIFT) - 50
    write_volume(grid.with_array(moving.astype(np.float32)), images[1])
    command = (*REGISTER, *images, "--metric", "mse")
    assert run(*command, "-o", tmp_path / "without") == 0
    assert run(*command, "-o", tmp_path / "matched", "--match-histogram") == 0
    error = np.abs(shift_of(tmp_path / "matched") - SHIFT).max()
    assert error < 0.2 < np.abs(shift_of(tmp_path / "without") - SHIFT).max()
    record = tmp_path / "matched" / "registration.json"
    assert json.loads(record.read_text())["match_histogram"] is True
    assert read_volume(tmp_path / "matched" / "moved.nii.gz").array.max() > 500
    schedule = read_schedule(None, None, record)
    assert schedule is not None and schedule.match_histogram
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('match_histogram = true\n[[stages]]\nname = "rigid"\n')
    assert read_schedule(None, recipe, None) == Schedule((Rigid(),), match_histogram=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            "--also fixed_y.nii.gz",
            "--also: expected a fixed and a moving image after it, got fixed_y.nii.gz -o",
        ),
        ("--also fixed_y.nii.gz missing.nii.gz", "--also: missing.nii.gz: no such file"),
        ("--metric ncc,mi", "--metric: expected 1, one for each pair of images, got 2"),
        (
            "--also fixed_y.nii.gz moving_y.nii.gz --weights 1,2,3",
            "--weights: expected 2, one for each pair of images, got 3",
        ),
        ("--weights 1,b", "--weights: expected numbers of at least 0, not all 0, got '1,b'"),
        ("--also fixed_y.nii.gz fixed_y.nii.gz --metric ncc,magic", "--metric: expected one of"),
    ],
)
def test_a_bad_pair_metric_or_weight_is_named(
    options: str,
    message: str,
    folder: Path,
    tmp_path: Path,
    capsys: Captured,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(folder)
    command = ("register", "fixed_x.nii.gz", "moving_x.nii.gz", *options.split())
    assert run(*command, "-o", tmp_path / "out") == 2
    assert message in capsys.readouterr().err


def test_affine_presets_take_weights_level_by_level() -> None:
    stages = choose_stages(
        "affine,syn", None, Preset.DEFAULT, 3, jax.devices("cpu")[0], Console(quiet=True)
    )
    affine, syn = for_pairs(stages, None, (1, 3), [1, 1])
    assert isinstance(affine, Affine) and isinstance(syn, SyN)
    assert affine.for_scale(4).metric == PerChannel((NCC(), NCC()), (1, 3))
    assert affine.for_scale(1).metric == PerChannel((LNCC(), LNCC()), (1, 3))
