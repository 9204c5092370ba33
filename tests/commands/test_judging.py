"""Labels and landmarks: ``jaxreg register`` judged by them, ``jaxreg apply-points``."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from command import run
from scenes import header, physical_grid, placed, scene

from jaxreg.registration import dice, hausdorff_distance
from regkernels import (
    Volume,
    move_points,
    read_points,
    read_transform,
    read_volume,
    rigid_motion,
    write_affine,
    write_displacement,
    write_volume,
)

SHIFT = np.array([4.0, -3.0])
"""Where points of the fixed image are in the moving one, beside themselves."""


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two images in the plane, their labels and their landmarks."""
    folder = tmp_path_factory.mktemp("judged")
    for name, volume, shift in (
        ("fixed", header((36, 40), (2.5, 2.0)), 0),
        ("moving", header((38, 34), (2.6, 2.7), turn=20), SHIFT),
    ):
        values = scene(physical_grid(volume) - shift)
        labels = (values > 0.4).astype(np.uint8) + (values > 0.9)
        labels[:2, :3] = 7 if name == "fixed" else 9
        write_volume(volume.with_array(values), folder / f"{name}.nii.gz")
        write_volume(volume.with_array(labels), folder / f"{name}_labels.nii.gz")
        points = np.array([[0.0, 0], [18, -8], [-15, 18], [200, 5]]) + shift
        write_table(folder / f"{name}.csv", points)
    return folder


def write_table(path: Path, points: np.ndarray, names: str = "ABCDEFGH") -> None:
    lines = [f"{','.join(map(str, p))},{name}" for p, name in zip(points, names, strict=False)]
    axes = ("x,y", "x,y,z")[points.shape[1] - 2]
    path.write_text("\n".join([f"{axes},label", *lines, ""]))


def registration(pair: Path, **judged_by: object) -> list[object]:
    options = [part for name, value in judged_by.items() for part in (f"--{name}", value)]
    stages = ["--stages", "translation", "--metric", "ncc", "--device", "cpu"]
    return ["register", pair / "fixed.nii.gz", pair / "moving.nii.gz", *stages, *options]


@pytest.fixture(scope="module")
def judged(pair: Path) -> Path:
    out = pair / "out"
    files = {
        "fixed-labels": pair / "fixed_labels.nii.gz",
        "moving-labels": pair / "moving_labels.nii.gz",
        "fixed-points": pair / "fixed.csv",
        "moving-points": pair / "moving.csv",
    }
    assert run(*registration(pair, **files), "-o", out, "--report") == 0
    return out


@pytest.mark.parametrize("when", ["before", "after"])
def test_the_record_has_dice_and_hausdorff_of_every_label(
    pair: Path, judged: Path, tmp_path: Path, when: str
) -> None:
    record = json.loads((judged / "registration.json").read_text())
    assert record["inputs"]["--fixed-labels"] == str(pair / "fixed_labels.nii.gz")
    # What `apply` makes of the labels is what was compared.
    command = ["apply", pair / "moving_labels.nii.gz", "-r", pair / "fixed.nii.gz", "--labels"]
    transform = ["-t", judged / "affine.tfm"] if when == "after" else []
    assert run(*command, *transform, "-o", tmp_path / "moved.nii.gz") == 0
    fixed, moved = read_volume(pair / "fixed_labels.nii.gz"), read_volume(tmp_path / "moved.nii.gz")
    overlaps, distances = dice(fixed.array, moved.array), hausdorff_distance(fixed, moved)
    each = {label["label"]: label for label in record["labels"]["each"]}
    assert list(each) == [1, 2, 7, 9]
    for label in (1, 2):
        assert each[label]["missing in"] is None
        assert each[label][when] == {
            "dice": overlaps[label],
            "hausdorff (mm)": pytest.approx(distances[label].maximum),
            "hausdorff, 95th percentile (mm)": pytest.approx(distances[label].percentile_95),
        }
    mean = record["labels"]["mean over labels that both have"][when]
    assert mean["dice"] == pytest.approx((overlaps[1] + overlaps[2]) / 2)
    assert (mean["dice"] > 0.94) == (when == "after")
    for label, missing in ((7, "moving"), (9, "fixed")):
        assert each[label]["missing in"] == missing
        assert each[label][when]["hausdorff (mm)"] is None
    assert each[7]["voxels"] == {"fixed": 6, "moving": 0}


def test_the_record_has_the_error_of_every_landmark(pair: Path, judged: Path) -> None:
    record = json.loads((judged / "registration.json").read_text())
    told = record["target registration error (mm)"]
    assert [point["point"] for point in told["each"]] == ["A", "B", "C", "D"]
    assert not any(point["outside of the fixed grid"] for point in told["each"])
    fixed, moving = (read_points(pair / f"{name}.csv").positions for name in ("fixed", "moving"))
    for when, transform in (("before", ()), ("after", read_transform(judged / "affine.tfm"))):
        errors = np.linalg.norm(move_points(fixed, transform) - moving, axis=1)
        np.testing.assert_allclose([point[when] for point in told["each"]], errors)
        assert told[when] == {
            "mean": pytest.approx(errors.mean()),
            "median": pytest.approx(np.median(errors)),
            "maximum": pytest.approx(errors.max()),
        }
    np.testing.assert_allclose([point["before"] for point in told["each"]], 5)
    assert told["after"]["maximum"] < 0.2


def test_the_report_has_tables_of_labels_and_landmarks(judged: Path) -> None:
    page = html.unescape((judged / "report.html").read_text())
    for text in (
        "<h2>Labels</h2>",
        "Hausdorff 95 % (mm) after",
        "<td>7 (not in the moving map)</td><td class=number>0.000</td>",
        "mean over labels that both have",
        "<h2>Target registration error</h2>",
        "<td>C</td><td class=number>5.00</td>",
        "<td>maximum</td>",
    ):
        assert text in page


def test_the_console_tells_the_means_and_which_labels_are_missing(
    pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files: dict[str, object] = {
        "fixed-labels": pair / "fixed_labels.nii.gz",
        "moving-labels": pair / "moving_labels.nii.gz",
    }
    assert run(*registration(pair, **files), "-o", tmp_path) == 0
    told = capsys.readouterr()
    assert "Dice, mean of 2 labels" in told.out
    assert "Target registration error" not in told.out
    assert told.err.splitlines() == [
        "jaxreg: warning: --fixed-labels: no voxel of label 9, which --moving-labels has",
        "jaxreg: warning: --moving-labels: no voxel of label 7, which --fixed-labels has",
    ]
    assert "target registration error (mm)" not in json.loads(
        (tmp_path / "registration.json").read_text()
    )


def test_before_is_where_the_registration_started_from(pair: Path, tmp_path: Path) -> None:
    start = np.eye(3)
    start[:2, 2] = SHIFT + np.array([1, 0])
    write_affine(start, tmp_path / "start.tfm")
    points = {"fixed-points": pair / "fixed.csv", "moving-points": pair / "moving.csv"}
    command = [*registration(pair, **points), "--initial", tmp_path / "start.tfm"]
    assert run(*command, "-o", tmp_path / "out") == 0
    record = json.loads((tmp_path / "out" / "registration.json").read_text())
    assert record["target registration error (mm)"]["before"]["mean"] == pytest.approx(1)


def test_landmarks_beyond_the_deformation_are_told(
    pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    points = {"fixed-points": pair / "fixed.csv", "moving-points": pair / "moving.csv"}
    command = registration(pair, **points)
    command[command.index("--stages") + 1] = "translation,greedy"
    assert run(*command, "--preset", "fast", "-o", tmp_path) == 0
    told = "--fixed-points: outside of the fixed grid nothing is deformed: point D"
    assert told in capsys.readouterr().err
    record = json.loads((tmp_path / "registration.json").read_text())
    each = record["target registration error (mm)"]["each"]
    assert [point["outside of the fixed grid"] for point in each] == [False, False, False, True]


def broken(pair: Path, folder: Path) -> dict[str, Path]:
    """Files that do not fit to the pair, in a folder of their own."""
    labels = read_volume(pair / "fixed_labels.nii.gz")
    array = np.asarray(labels.array)
    volumes = {
        "shifted": placed(labels, origin=labels.grid.origin + 1),
        "cropped": Volume.create(array[1:], labels.grid.spacing),
        "fractions": labels.with_array(array + 0.5),
        "negative": labels.with_array(array.astype(np.int16) - 1),
        "channels": labels.with_array(np.stack([array, array])),
        "empty": labels.with_array(0 * array),
    }
    for name, volume in volumes.items():
        write_volume(volume, folder / f"{name}.nrrd")
    points = read_points(pair / "moving.csv").positions
    write_table(folder / "fewer.csv", points[:3])
    write_table(folder / "order.csv", points, names="BACD")
    write_table(folder / "space.csv", np.pad(points, ((0, 0), (0, 1)), constant_values=3))
    (folder / "micrometres.csv").write_text("x (um),y (um)\n1,2\n")
    return {path.stem: path for path in folder.iterdir()}


LABELS, POINTS = ("fixed-labels", "moving-labels"), ("fixed-points", "moving-points")


@pytest.mark.parametrize(
    ("options", "wrong", "message"),
    [
        (LABELS, {"fixed-labels": "shifted"}, "of FIXED, got voxels that lie up to 0.5 voxels"),
        (LABELS, {"fixed-labels": "cropped"}, "expected 40 x 36 voxels as FIXED, got 40 x 35"),
        (LABELS, {"moving-labels": "shifted"}, "expected 34 x 38 voxels as MOVING, got 40 x 36"),
        (LABELS, {"fixed-labels": "fractions"}, "expected labels, .* got fractions"),
        (LABELS, {"fixed-labels": "negative"}, "expected labels, .* got negative numbers"),
        (LABELS, {"fixed-labels": "channels"}, "expected labels, got 2 channels"),
        (LABELS, {"fixed-labels": "empty"}, "expected a label above 0, got none"),
        (LABELS, {"fixed-labels": "nothing"}, "no such file"),
        (LABELS[:1], {"moving-labels": ""}, "expected a file beside that of --fixed-labels, got"),
        (POINTS[1:], {"fixed-points": ""}, "expected a file beside that of --moving-points, got"),
        (POINTS, {"moving-points": "fewer"}, "expected 4 points as --fixed-points, .* got 3"),
        (POINTS, {"moving-points": "order"}, "expected the order of --fixed-points, got B where"),
        (POINTS, {"moving-points": "space"}, "expected points in the plane, got 3 coordinates"),
        (POINTS, {"moving-points": "micrometres"}, "expected millimetres, got the unit 'um'"),
    ],
)
def test_what_does_not_fit_is_refused_by_name_before_anything_is_written(
    pair: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    wrong: dict[str, str],
    message: str,
) -> None:
    (tmp_path / "files").mkdir()
    found = broken(pair, tmp_path / "files")
    files: dict[str, object] = {
        name: pair / (name.replace("-points", ".csv").replace("-labels", "_labels.nii.gz"))
        for name in options
    }
    ((name, which),) = wrong.items()
    if which:
        files[name] = found.get(which, tmp_path / which)
    assert run(*registration(pair, **files), "-o", tmp_path / "out") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"jaxreg: error: --{name}: ")
    assert re.search(message, line), line
    assert not (tmp_path / "out").exists()


def test_labels_and_points_are_not_overwritten(
    pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = tmp_path / "moved.nii.gz"
    labels.write_bytes((pair / "fixed_labels.nii.gz").read_bytes())
    files = {"fixed-labels": labels, "moving-labels": pair / "moving_labels.nii.gz"}
    assert run(*registration(pair, **files), "-o", tmp_path) == 2
    assert "--fixed-labels: " in capsys.readouterr().err


# --- apply-points -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def transforms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an affine, a field on an oblique grid, and both as a composite of ITK."""
    folder = tmp_path_factory.mktemp("transforms")
    motion = rigid_motion(12, (1, 2, 3), (5, -4, 3), (0, 0, 0))
    write_affine(motion, folder / "affine.tfm")
    grid = header((14, 16, 12), (4, 3, 5), turn=30)
    vectors = 3 * np.sin(physical_grid(grid)[..., ::-1] / 15)
    write_displacement(vectors, grid, folder / "warp.nii.gz")
    field = sitk.ReadImage(str(folder / "warp.nii.gz"), sitk.sitkVectorFloat64)
    parts: list[Any] = [
        sitk.ReadTransform(str(folder / "affine.tfm")),
        sitk.DisplacementFieldTransform(field),
    ]
    sitk.WriteTransform(sitk.CompositeTransform(parts), str(folder / "both.h5"))
    return folder


INSIDE = np.random.default_rng(0).uniform(-14, 14, (20, 3))


def by_simpleitk(transforms: Path, points: np.ndarray) -> np.ndarray:
    composite = sitk.ReadTransform(str(transforms / "both.h5"))
    return np.array([composite.TransformPoint(point) for point in points.tolist()])


@pytest.mark.parametrize(
    "chain", [("warp.nii.gz", "affine.tfm"), ("both.h5",)], ids=["two files", "a composite"]
)
def test_points_go_where_simpleitk_takes_them(
    transforms: Path, tmp_path: Path, chain: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    write_table(tmp_path / "points.csv", INSIDE, names="abcdefghijklmnopqrst")
    options = [part for name in chain for part in ("-t", transforms / name)]
    assert run("apply-points", tmp_path / "points.csv", *options, "-o", tmp_path / "out.csv") == 0
    moved = read_points(tmp_path / "out.csv")
    np.testing.assert_allclose(moved.positions, by_simpleitk(transforms, INSIDE), atol=1e-6)
    assert "".join(moved.names) == "abcdefghijklmnopqrst"
    assert capsys.readouterr().err == ""


def test_markups_in_ras_go_the_same_way_and_keep_their_fields(
    transforms: Path, tmp_path: Path
) -> None:
    ras = [-1, -1, 1]
    document = {
        "markups": [
            {
                "type": "Fiducial",
                "coordinateSystem": "RAS",
                "controlPoints": [
                    {"label": f"F-{k}", "position": point.tolist(), "locked": True}
                    for k, point in enumerate(INSIDE * ras)
                ],
                "display": {"opacity": 0.5},
            }
        ]
    }
    (tmp_path / "points.mrk.json").write_text(json.dumps(document))
    out = tmp_path / "out.mrk.json"
    assert (
        run("apply-points", tmp_path / "points.mrk.json", "-t", transforms / "both.h5", "-o", out)
        == 0
    )
    written = json.loads(out.read_text())
    found = np.array([p["position"] for p in written["markups"][0]["controlPoints"]])
    np.testing.assert_allclose(found * ras, by_simpleitk(transforms, INSIDE), atol=1e-6)
    for point, old in zip(
        written["markups"][0]["controlPoints"],
        document["markups"][0]["controlPoints"],
        strict=True,
    ):
        point["position"] = old["position"]  # type: ignore[index]
    assert written == document


def test_points_come_back_through_the_inverses(transforms: Path, tmp_path: Path) -> None:
    write_table(tmp_path / "points.csv", INSIDE / 2, names="abcdefghijklmnopqrst")
    warp, affine = transforms / "warp.nii.gz", transforms / "affine.tfm"
    there = ["apply-points", tmp_path / "points.csv", "-t", warp, "-t", affine]
    assert run(*there, "-o", tmp_path / "there.csv") == 0
    back = ["-t", f"{affine}:inverse", "-t", f"{warp}:inverse", "-o", tmp_path / "back.csv"]
    assert run("apply-points", tmp_path / "there.csv", *back) == 0
    np.testing.assert_allclose(read_points(tmp_path / "back.csv").positions, INSIDE / 2, atol=0.1)


def test_points_beyond_the_grid_of_a_field_are_told(
    transforms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    points = np.array([[1.0, 2, 3], [300, 0, 0], [0, 0, -400]])
    write_table(tmp_path / "points.csv", points)
    warp, out = transforms / "warp.nii.gz", tmp_path / "out.csv"
    assert run("apply-points", tmp_path / "points.csv", "-t", warp, "-o", out) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"jaxreg: warning: {warp} moves nothing beyond its grid: points B, C"
    np.testing.assert_array_equal(read_points(out).positions[1:], points[1:])


def test_points_in_the_plane_go_through_transforms_in_the_plane(
    pair: Path, judged: Path, tmp_path: Path
) -> None:
    for name, text in (("plane", "x,y\n1,2\n"), ("ants", "x,y,z,t\n1,2,0,4\n")):
        (tmp_path / f"{name}.csv").write_text(text)
        out = tmp_path / f"{name}_out.csv"
        affine = judged / "affine.tfm"
        assert run("apply-points", tmp_path / f"{name}.csv", "-t", affine, "-o", out) == 0
        expected = move_points([[1, 2]], read_transform(affine))
        np.testing.assert_array_equal(read_points(out, 2).positions, expected)
    assert out.read_text().endswith(",0,4\n")


@pytest.mark.parametrize(
    ("points", "options", "message"),
    [
        ("x,y\n1,2\n", ["-t", "affine.tfm", "-o", "out.csv"], "POINTS: .* 3 coordinates, got 2"),
        ("x,y,z\n1,2,3\n", ["-t", "affine.tfm", "-o", "out.fcsv"], "--output: .* expected the"),
        ("x,y,z\n1,2,3\n", ["-t", "affine.tfm", "-o", "points.csv"], "POINTS: .* overwritten"),
        ("x,y,z\n1,2,3\n", ["-t", "lost.tfm", "-o", "out.csv"], "--transform: lost.tfm: no such"),
        ("x,y,z\n1,2,3\n", ["-o", "out.csv"], "--transform"),
        ("i,j,k\n1,2,3\n", ["-t", "affine.tfm", "-o", "out.csv"], "POINTS: .* expected one set"),
    ],
)
def test_what_cannot_be_moved_is_refused_by_name(
    transforms: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    points: str,
    options: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("points.csv").write_text(points)
    Path("affine.tfm").write_bytes((transforms / "affine.tfm").read_bytes())
    assert run("apply-points", "points.csv", *options) == 2
    assert re.search(f"jaxreg: error: .*{message}", capsys.readouterr().err)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["affine.tfm", "points.csv"]
