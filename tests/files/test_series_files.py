"""Series in time as files: frames, places and the time step survive."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest
from scenes import header

from regkernels import Series, read_series, read_volume, write_series, write_volume

GRID = header((4, 6, 5), (2.0, 2.5, 3.0), turn=15).grid
VALUES = np.random.default_rng(0).integers(-900, 900, (7, 4, 6, 5)).astype(np.int16)


@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".hdr"])
@pytest.mark.parametrize("dtype", [np.int16, np.float32])
def test_a_series_comes_back_as_it_was_written(tmp_path: Path, ending: str, dtype: type) -> None:
    path = tmp_path / f"series{ending}"
    write_series(Series(VALUES.astype(dtype), GRID, 0.72), path)
    found = read_series(path)
    np.testing.assert_array_equal(found.frames, VALUES)
    assert found.frames.dtype == dtype
    assert found.grid.same_place(GRID)
    assert found.time_step == pytest.approx(0.72)
    np.testing.assert_array_equal(found.volume(3).array, VALUES[3])


def test_nibabel_finds_the_same(tmp_path: Path) -> None:
    path = tmp_path / "series.nii.gz"
    write_series(Series(VALUES, GRID, 2.5), path)
    image = nibabel.load(path)
    assert image.header.get_zooms()[3] == 2.5
    assert image.header.get_xyzt_units() == ("mm", "sec")
    np.testing.assert_array_equal(np.asarray(image.dataobj), VALUES.T)
    write_volume(Series(VALUES, GRID, 2.5).volume(0), tmp_path / "frame.nii.gz")
    frame = nibabel.load(tmp_path / "frame.nii.gz")
    np.testing.assert_allclose(image.affine, frame.affine, atol=1e-5)


@pytest.mark.parametrize(
    ("unit", "step", "seconds"),
    [("sec", 2.0, 2.0), ("msec", 800.0, 0.8), ("usec", 5e5, 0.5), ("hz", 3.0, 0.0)],
)
def test_the_time_step_is_in_seconds(
    tmp_path: Path, unit: str, step: float, seconds: float
) -> None:
    image = nibabel.Nifti1Image(VALUES.T, np.eye(4))
    image.header.set_zooms((1, 1, 1, step))
    image.header.set_xyzt_units("mm", unit)
    nibabel.save(image, tmp_path / "series.nii")
    assert read_series(tmp_path / "series.nii").time_step == pytest.approx(seconds)


def test_scaled_values_are_those_that_are_meant(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(VALUES.T, np.eye(4))
    image.header.set_slope_inter(0.5, 10)
    nibabel.save(image, tmp_path / "series.nii.gz")
    stored = np.asarray(nibabel.load(tmp_path / "series.nii.gz").dataobj).T
    found = read_series(tmp_path / "series.nii.gz").frames
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, stored, rtol=1e-6)


def test_what_is_no_series_is_refused_by_name(tmp_path: Path) -> None:
    volume = Series(VALUES, GRID, 1).volume(0)
    write_volume(volume, tmp_path / "one.nii.gz")
    write_volume(volume, tmp_path / "one.nrrd")
    nibabel.save(nibabel.Nifti1Image(VALUES[:1].T, np.eye(4)), tmp_path / "single.nii")
    nibabel.save(nibabel.Nifti1Image(VALUES.T[..., None, None] + 0j, np.eye(4)), tmp_path / "c.nii")
    for name, message in (
        ("missing.nii", "no such file"),
        ("one.nii.gz", "expected a series of 3-D images, two frames or more, got a 3-D image"),
        ("single.nii", "expected a series of 3-D images, two frames or more, got a 3-D image"),
        ("one.nrrd", "expected a series in a NIfTI file"),
        ("c.nii", "expected real numbers, got complex ones"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=f"{name}: {message}"):
            read_series(tmp_path / name)
    with pytest.raises(ValueError, match=r"a.nrrd: cannot write it: expected one of .nii, "):
        write_series(Series(VALUES, GRID, 1), tmp_path / "a.nrrd")
    write_series(Series(VALUES, GRID, 1), tmp_path / "series.nii")
    with pytest.raises(ValueError, match="expected a 2-D or 3-D image, got 4-D"):
        read_volume(tmp_path / "series.nii")
