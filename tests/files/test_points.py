"""Points as files: their places in LPS, their names, and what else stands in the files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from regkernels import read_points, write_points

LPS = np.array([[1.5, -2.25, 30.0], [-40.125, 5.0, 6e-3]])
RAS = LPS * [-1, -1, 1]

ANTS = 'x,y,z,t,label,comment\n1.5,-2.25,30,0,7,"left, front"\n-40.125,5,0.006,0,8,\n'
SLICER_TABLE = (
    "label,r,a,s,defined,selected,visible,locked,description\n"
    "F-1,-1.5,2.25,30.0,1,1,1,0,\n"
    "F-2,40.125,-5.0,0.006,1,1,1,0,second\n"
)
FCSV = (
    "# Markups fiducial file version = 4.13\n"
    "# CoordinateSystem = {system}\n"
    "# columns = id,x,y,z,ow,ox,oy,oz,vis,sel,lock,label,desc,associatedNodeID\n"
    "0,{0},{1},{2},0,0,0,1,1,1,0,F-1,,\n"
    '1,{3},{4},{5},0,0,0,1,1,1,0,F-2,"a, b",vtkMRMLScalarVolumeNode1\n'
)


def markups(points: np.ndarray, **fields: Any) -> dict[str, Any]:
    """What 3D Slicer writes of a list of points."""
    return {
        "@schema": "https://raw.githubusercontent.com/slicer/slicer/master/markups-schema.json#",
        "markups": [
            {
                "type": "Fiducial",
                "coordinateSystem": "LPS",
                "coordinateUnits": "mm",
                "locked": False,
                "controlPoints": [
                    {
                        "id": str(number),
                        "label": f"F-{number}",
                        "description": "Zürich",
                        "position": point,
                        "orientation": [-1.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 1.0],
                        "positionStatus": "defined",
                    }
                    for number, point in enumerate(points.tolist(), start=1)
                ],
                "measurements": [{"name": "length", "enabled": True, "value": 50.3}],
                "display": {"color": [0.4, 1.0, 1.0]},
                **fields,
            }
        ],
    }


def files() -> dict[str, tuple[str, tuple[str, ...]]]:
    """By their names, files of the same two points, and what the points are called there."""
    numbered, slicer = ("1", "2"), ("F-1", "F-2")
    return {
        "ants.csv": (ANTS, ("7", "8")),
        "bare.csv": ("1.5,-2.25,30\n\n-40.125,5,0.006\n", numbered),
        "bare_more.csv": ("1.5,-2.25,30,tip\n-40.125,5,0.006,base\n", numbered),
        "slicer.csv": (SLICER_TABLE, slicer),
        "slicer.tsv": (SLICER_TABLE.replace(",", "\t"), slicer),
        "units.csv": ("name,l (mm),p [mm],s_mm\nA,1.5,-2.25,30\n,-40.125,5,.006\n", ("A", "2")),
        "numpy.csv": ("# x,y,z\n1.5,-2.25,30\n-40.125,5,0.006\n", numbered),
        "excel.csv": ("\ufeffZ,Y,X\r\n30,-2.25,1.5\r\n0.006,5,-40.125\r\n", numbered),
        "lps.fcsv": (FCSV.format(*LPS.ravel(), system="LPS"), slicer),
        "ras.fcsv": (FCSV.format(*RAS.ravel(), system="RAS"), slicer),
        "old.fcsv": (FCSV.format(*RAS.ravel(), system="0"), slicer),
        "lps.mrk.json": (json.dumps(markups(LPS)), slicer),
        "ras.mrk.json": (json.dumps(markups(RAS, coordinateSystem="RAS")), slicer),
        "coded.mrk.json": (
            json.dumps(markups(LPS, coordinateUnits=["mm", "UCUM", "millimeter"])),
            slicer,
        ),
    }


@pytest.mark.parametrize("name", files())
def test_every_kind_of_file_says_where_its_points_are(tmp_path: Path, name: str) -> None:
    text, names = files()[name]
    (tmp_path / name).write_text(text, encoding="utf-8")
    points = read_points(tmp_path / name)
    np.testing.assert_array_equal(points.positions, LPS)
    assert points.names == names


@pytest.mark.parametrize("name", files())
def test_moved_points_are_written_in_the_system_of_their_file_with_all_else_in_it(
    tmp_path: Path, name: str
) -> None:
    text, names = files()[name]
    (tmp_path / name).write_text(text, encoding="utf-8")
    points = read_points(tmp_path / name)
    moved = LPS + np.array([0.1, 1 / 3, -7])
    out = tmp_path / f"out_{name}"
    write_points(points.with_positions(moved), out)
    again = read_points(out)
    np.testing.assert_array_equal(again.positions, moved)
    assert again.names == names
    # Brought back, the file is what it was.
    write_points(again.with_positions(LPS), out)
    written = out.read_text(encoding="utf-8")
    if name.endswith(".json"):
        document = json.loads(text)
        del document["markups"][0]["measurements"][0]["value"]
        assert json.loads(written) == document
    else:
        numbers = {"30": "30.0", "5": "5.0", "-5": "-5.0", ".006": "0.006"}
        before, after = (
            [
                [numbers.get(cell, cell) for cell in line.replace("\t", ",").split(",")]
                for line in content.lstrip("\ufeff").splitlines()
            ]
            for content in (text, written)
        )
        assert after == before


def test_points_in_the_plane_have_two_coordinates(tmp_path: Path) -> None:
    path = tmp_path / "points.csv"
    path.write_text("x,y\n1,2\n3,4\n")
    assert read_points(path, 2).positions.tolist() == [[1, 2], [3, 4]]
    path.write_text("1,2\n3,4\n")
    assert read_points(path).positions.tolist() == [[1, 2], [3, 4]]
    path.write_text("r,a,label\n1,2,A\n")
    assert read_points(path).positions.tolist() == [[-1, -2]]
    with pytest.raises(ValueError, match="expected points with 3 coordinates, got 2"):
        read_points(path, 3)
    # ANTs writes a third one in any case.
    path.write_text("x,y,z,t\n1,2,0,5\n")
    points = read_points(path, 2)
    write_points(points.with_positions([[1.5, 2.5]]), path)
    assert path.read_text() == "x,y,z,t\n1.5,2.5,0,5\n"
    path.write_text("x,y,z\n1,2,3\n")
    with pytest.raises(ValueError, match="in the plane, got 3 coordinates of which the last"):
        read_points(path, 2)


UNPLACED = markups(LPS)
UNPLACED["markups"][0]["controlPoints"][1]["positionStatus"] = "undefined"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "1,2,3", "expected points in .csv, .tsv, .mrk.json or .fcsv"),
        ("a.csv", "", "expected points, got none"),
        ("a.csv", "x,y,z\n", "expected points, got none"),
        ("a.csv", "i,j,k\n1,2,3\n", "expected one set of columns x,y,z .* got 'i,j,k'"),
        ("a.csv", "x,y,z,r,a,s\n1,2,3,1,2,3\n", "expected one set of columns"),
        ("a.csv", "x (um),y (um),z (um)\n1,2,3\n", "expected millimetres, got the unit 'um'"),
        ("a.csv", "x,y,z\n1,2,3\n1,two,3\n", "line 3: expected a finite coordinate, got 'two'"),
        ("a.csv", "1,2,3\n1,2\n", "line 2: expected a finite coordinate, got ''"),
        ("a.csv", "x,y,z\n1,nan,3\n", "line 2: expected a finite coordinate, got 'nan'"),
        ("a.fcsv", "# columns = id,x,y,z\n1,2,3,4\n", "expected a line '# CoordinateSystem = LPS'"),
        ("a.fcsv", "# CoordinateSystem = IJK\n1,2,3,4\n", "LPS or RAS, got 'IJK'"),
        ("a.json", "{", "expected markups of 3D Slicer"),
        ("a.json", '{"markups": 3}', "expected markups of 3D Slicer"),
        ("a.json", json.dumps(markups(LPS, type="ROI")), "expected Fiducial, Line, .* got a ROI"),
        ("a.json", json.dumps(markups(LPS, coordinateUnits="um")), "millimetres, got .* 'um'"),
        ("a.json", json.dumps(markups(LPS, coordinateSystem="IJK")), "LPS or RAS, got 'IJK'"),
        ("a.json", json.dumps(UNPLACED), "point F-2: expected a position, got .* 'undefined'"),
        ("a.json", json.dumps(markups(LPS * np.nan)), "point F-1: expected a finite coordinate"),
    ],
)
def test_what_are_no_points_in_millimetres_is_refused(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message) as refused:
        read_points(tmp_path / name)
    assert str(tmp_path / name) in str(refused.value)


def test_a_file_of_points_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_points(tmp_path / "points.csv")


def test_points_are_written_to_the_kind_of_file_that_they_came_from(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(ANTS)
    points = read_points(tmp_path / "a.csv")
    for name in ("b.tsv", "b.fcsv", "b.mrk.json", "b.txt"):
        with pytest.raises(ValueError, match=f"{name}: expected"):
            write_points(points, tmp_path / name)
        assert not (tmp_path / name).exists()
    with pytest.raises(ValueError, match=r"expected \(2, 3\) finite numbers"):
        points.with_positions(LPS[:1])
