"""``jaxreg compare``: two images, or two label maps, in numbers and pictures."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

import numpy as np
import pytest
from browser import needs_browser, opened
from command import run
from PIL import Image
from scenes import header, physical_grid, scene

from jaxreg.registration import dice, hausdorff_distance, image_similarity
from regkernels import Volume, read_volume, write_affine, write_volume

FILES = ["comparison.html", "comparison.json", "comparison.png"]

SHIFT = 6.0


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an image, the same scene shifted on another grid, and labels of both."""
    folder = tmp_path_factory.mktemp("compared")
    for name, volume, shift in (
        ("a", header((16, 18, 20), (4, 4, 5)), 0),
        ("b", header((17, 21, 15), (5, 3, 5), turn=15), SHIFT),
    ):
        values = scene(physical_grid(volume) - [shift, 0, 0])
        labels = (values > 0.4).astype(np.uint8) + (values > 0.9)
        labels[0, 0, :2] = {"a": 8, "b": 0}[name]
        write_volume(volume.with_array(values), folder / f"{name}.nii.gz")
        write_volume(volume.with_array(labels), folder / f"{name}_labels.nii.gz")
    shift_along_x = np.eye(4)
    shift_along_x[0, 3] = SHIFT
    write_affine(shift_along_x, folder / "shift.tfm")
    return folder


def test_images_are_compared_on_the_grid_of_the_first(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b, out = images / "a.nii.gz", images / "b.nii.gz", tmp_path / "new" / "out"
    assert run("compare", a, b, "-o", out, "--device", "cpu") == 0
    assert sorted(path.name for path in out.iterdir()) == FILES
    told = capsys.readouterr().out
    record = json.loads((out / "comparison.json").read_text())
    assert record["inputs"] == {"A": str(a), "B": str(b), "--transform": []}
    assert {"jax", "python"} <= set(record["versions"])
    # What `apply` makes of B, where B has data, is what was compared.
    ones = read_volume(b)
    write_volume(ones.with_array(np.ones(ones.shape)), tmp_path / "ones.nii.gz")
    for name, path in (("moved", b), ("inside", tmp_path / "ones.nii.gz")):
        options = ["-r", a, "--outside", "0", "-o", tmp_path / f"{name}.nii.gz"]
        assert run("apply", path, *options) == 0
    inside = read_volume(tmp_path / "inside.nii.gz").array > 0.999
    assert 0.5 < inside.mean() < 1
    expected = image_similarity(read_volume(a), read_volume(tmp_path / "moved.nii.gz"), inside)
    assert record["similarity"] == pytest.approx(expected._asdict(), rel=1e-4)
    assert f"{expected.ncc:.4f}" in told and f"{expected.mutual_information:.4f} nats" in told
    for name in FILES:
        assert str(out / name) in told


def test_an_image_is_like_itself_and_a_transform_brings_another_nearer(
    images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b, before = images / "a.nii.gz", images / "b.nii.gz", {*images.iterdir()}

    def ncc(*arguments: object) -> float:
        assert run("compare", *arguments, "--device", "cpu") == 0
        (found,) = re.findall(r" NCC +│ +([\d.]+)", capsys.readouterr().out)
        return float(found)

    assert ncc(a, a) == 1
    shifted = ncc(a, b)
    assert shifted < 0.97
    assert ncc(a, b, "-t", images / "shift.tfm") > 0.995
    assert ncc(a, b, "-t", f"{images / 'shift.tfm'}:inverse") < shifted
    assert {*images.iterdir()} == before  # numbers alone, without -o


def test_the_page_shows_pictures_numbers_and_sliders(images: Path, tmp_path: Path) -> None:
    a, b = images / "a.nii.gz", images / "b.nii.gz"
    assert run("compare", a, b, "-o", tmp_path) == 0
    page = html.unescape((tmp_path / "comparison.html").read_text())
    assert "<title>a.nii.gz and b.nii.gz</title>" in page
    assert page.count("data:image/png;base64,iVBOR") == 3  # the picture and two of the sliders
    for word in ("Mutual information", "A · a.nii.gz", "Slice by slice", str(b)):
        assert word in page
    picture = np.asarray(Image.open(tmp_path / "comparison.png"))
    assert picture.shape[1] == 1430 and np.ptp(picture[..., :3]) > 200


@needs_browser
def test_the_sliders_of_the_page_show_both_images(images: Path, tmp_path: Path) -> None:
    assert run("compare", images / "a.nii.gz", images / "b.nii.gz", "-o", tmp_path / "out") == 0
    with opened(tmp_path / "out" / "comparison.html", tmp_path / "profile") as page:
        page.wait_for("document.getElementById('viewer-canvas').dataset.drawn")
        label = page.evaluate("document.getElementById('viewer-canvas').getAttribute('aria-label')")
        assert label.endswith("A · a.nii.gz left of 50 %, B · b.nii.gz right of it")
        assert page.complaints == []


def test_labels_are_compared_by_overlap_and_surfaces(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = images / "a_labels.nii.gz", images / "b_labels.nii.gz"
    arguments = ["-t", images / "shift.tfm"]
    assert run("compare", a, b, "--labels", *arguments, "-o", tmp_path / "out") == 0
    told = capsys.readouterr()
    assert told.err == "jaxreg: warning: B: no voxel of label 8 on the grid of A\n"
    assert "Hausdorff 95" in told.out
    moved = tmp_path / "moved.nii.gz"
    assert run("apply", b, "-r", a, *arguments, "--labels", "-o", moved) == 0
    one, two = read_volume(a), read_volume(moved)
    overlaps, distances = dice(one.array, two.array), hausdorff_distance(one, two)
    record = json.loads((tmp_path / "out" / "comparison.json").read_text())["labels"]
    each = {label["label"]: label for label in record["each"]}
    assert list(each) == [1, 2, 8]
    for label in (1, 2):
        assert each[label] == {
            "label": label,
            "missing in": None,
            "dice": overlaps[label],
            "hausdorff (mm)": pytest.approx(distances[label].maximum),
            "hausdorff, 95th percentile (mm)": pytest.approx(distances[label].percentile_95),
        }
    assert each[8]["missing in"] == "B" and each[8]["hausdorff (mm)"] is None
    mean = record["mean over labels that both have"]["dice"]
    assert mean == pytest.approx((overlaps[1] + overlaps[2]) / 2) and mean > 0.85
    page = (tmp_path / "out" / "comparison.html").read_text()
    assert "<td>mean over labels that both have</td>" in page and "<script" not in page
    colours = np.unique(
        np.asarray(Image.open(tmp_path / "out" / "comparison.png"))[..., :3].reshape(-1, 3), axis=0
    )
    for rgb in ((31, 119, 180), (174, 199, 232)):  # the two labels
        assert (colours == rgb).all(axis=1).any()


@pytest.mark.parametrize(
    ("b", "options", "message"),
    [
        ("lost.nii.gz", [], "B: .*no such file"),
        ("flat.nii.gz", [], "B: .* expected a 3-D image as A, got 2-D"),
        ("channels.nii.gz", [], "B: .* expected 1 channels as A, got 2"),
        ("far.nii.gz", [], "B: expected an image that overlaps A"),
        ("b.nii.gz", ["--labels"], "A: .* expected labels, .* got fractions"),
        ("b.nii.gz", ["-t", "lost.tfm"], "--transform: lost.tfm: no such file"),
    ],
)
def test_what_cannot_be_compared_is_refused_by_name(
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    b: str,
    options: list[str],
    message: str,
) -> None:
    volume = read_volume(images / "a.nii.gz")
    away = Volume.create(volume.array, volume.grid.spacing, volume.grid.origin + 1000)
    write_volume(header((8, 9), (1, 1)), tmp_path / "flat.nii.gz")
    write_volume(volume.with_array(np.zeros((2, *volume.shape))), tmp_path / "channels.nii.gz")
    write_volume(away, tmp_path / "far.nii.gz")
    other = (images if (images / b).exists() else tmp_path) / b
    out = tmp_path / "out"
    assert run("compare", images / "a.nii.gz", other, *options, "-o", out) == 2
    assert re.search(f"jaxreg: error: {message}", capsys.readouterr().err)
    assert not out.exists()


def test_what_is_compared_is_not_overwritten(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "comparison.png"
    picture.write_bytes(b"")
    assert run("compare", images / "a.nii.gz", picture, "-o", tmp_path) == 2
    assert "B: " in capsys.readouterr().err
