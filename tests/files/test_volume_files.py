"""Files of volumes: what is written comes back, and what is damaged is refused."""

from __future__ import annotations

import gzip
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from scenes import as_image, header, placed

from jaxreg.registration import resample
from regkernels import (
    Volume,
    read_volume,
    write_displacement,
    write_volume,
)
from regkernels.files.images import read_grid


@pytest.mark.parametrize("name", ["volume.nii.gz", "volume.nii", "volume.mha", "volume.nrrd"])
@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("channels", [(), (3,), (4,)])
@pytest.mark.parametrize("dtype", [np.float32, np.uint8, np.int16, np.int32])
def test_a_volume_comes_back_from_its_file(
    tmp_path: Path, name: str, dim: int, channels: tuple[int, ...], dtype: type
) -> None:
    rng = np.random.default_rng(6)
    empty = header((4, 7, 6)[-dim:], (1.5, 0.8, 2.5)[:dim], turn=25)
    values = (100 * rng.uniform(size=(*channels, *empty.shape))).astype(dtype)
    volume = empty.with_array(values)
    write_volume(volume, tmp_path / name)
    again = read_volume(tmp_path / name)
    assert again.array.dtype == dtype
    np.testing.assert_array_equal(again.array, values)
    for part in ("spacing", "origin", "direction"):
        np.testing.assert_allclose(getattr(again.grid, part), getattr(volume.grid, part), atol=1e-5)
    assert (again.ndim, again.channels, again.shape) == (dim, *(channels or (1,)), empty.shape)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_labels_too_large_for_a_float_come_back(tmp_path: Path) -> None:
    labels = np.array([[2**53 + 1, -(2**62)], [0, 7]])
    write_volume(Volume.create(labels), tmp_path / "labels.nrrd")
    np.testing.assert_array_equal(read_volume(tmp_path / "labels.nrrd").array, labels)


@pytest.mark.parametrize("ending", ["nii.gz", "hdr", "nrrd", "mha", "h5"])
@pytest.mark.parametrize("dtype", [np.float64, np.uint32, np.int64, np.uint64])
def test_labels_keep_their_integers_in_every_stored_type(
    ending: str, dtype: type, tmp_path: Path
) -> None:
    ids = np.zeros((8, 8, 8), dtype)
    ids[2:4, 2:6, 2:6] = 614454277
    ids[4:6, 2:6, 2:6] = 614454278
    if np.issubdtype(dtype, np.integer):
        ids[6:, 2:6, 2:6] = np.iinfo(dtype).max - 1
    expected = [int(value) for value in np.unique(ids)]
    sitk.WriteImage(sitk.GetImageFromArray(ids), str(tmp_path / f"labels.{ending}"))
    volume = read_volume(tmp_path / f"labels.{ending}")
    for interpolation in ("labels", "nearest"):
        found = resample(volume, volume, (), interpolation)
        assert [int(value) for value in np.unique(found.array)] == expected
    write_volume(found, tmp_path / "again.nrrd")
    np.testing.assert_array_equal(read_volume(tmp_path / "again.nrrd").array, ids)


def test_what_is_not_an_image_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"missing\.nii"):
        read_volume(tmp_path / "missing.nii")
    text = tmp_path / "text.nii.gz"
    text.write_text("no image")
    with pytest.raises(ValueError, match=r"text\.nii\.gz: not an image"):
        read_volume(text)
    for name, values in [
        ("4d.nrrd", np.zeros((2, 3, 4, 5))),
        ("complex.nrrd", np.ones((2, 2)) * 1j),
    ]:
        sitk.WriteImage(sitk.GetImageFromArray(values, isVector=False), str(tmp_path / name))
    with pytest.raises(ValueError, match=r"4d\.nrrd: expected a 2-D or 3-D image, got 4-D"):
        read_volume(tmp_path / "4d.nrrd")
    with pytest.raises(ValueError, match=r"complex\.nrrd: expected real numbers"):
        read_volume(tmp_path / "complex.nrrd")


def test_what_cannot_be_written_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    volume = Volume.create(np.zeros((3, 4)))
    # ITK writes some without an error, and loses slices, the origin or the direction.
    for name in ("v.foo", "v.png", "v.tif", "v.gipl", "v.mrc", "v.dcm", "v.vtk", "v.h5", "v"):
        with pytest.raises(ValueError, match=rf"{name}: cannot write it: expected one of \.nii, "):
            write_volume(volume, tmp_path / name)
        with pytest.raises(ValueError, match=rf"{name}: (cannot write it: )?expected"):
            write_displacement(np.zeros((3, 4, 2)), volume, tmp_path / name)
    with pytest.raises(OSError, match=r"missing/volume\.nii: cannot write there"):
        write_volume(volume, tmp_path / "missing" / "volume.nii")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["v.nii", "v.nii.gz", "v.hdr", "v.img", "v.mha", "v.nrrd"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_voxel_that_is_not_finite_is_refused_in_every_format(
    name: str, dtype: type, value: float, tmp_path: Path
) -> None:
    voxels = np.zeros((3, 4, 5), dtype)
    sitk.WriteImage(sitk.GetImageFromArray(voxels), str(tmp_path / name))
    np.testing.assert_array_equal(read_volume(tmp_path / name).array, voxels)
    voxels[-1, -1, -1] = value
    sitk.WriteImage(sitk.GetImageFromArray(voxels), str(tmp_path / name))
    with pytest.raises(ValueError, match=rf"{name}: .*expected finite values, got NaN or inf"):
        read_volume(tmp_path / name)


@pytest.mark.parametrize("turn", [0, 25])
def test_a_minc_image_is_converted_from_ras(turn: float, tmp_path: Path) -> None:
    path = tmp_path / "volume.mnc"
    empty = placed(header((4, 7, 6), (1.5, 0.8, 2.5), turn), origin=np.array([11.25, -22.5, 33.75]))
    values = np.zeros(empty.shape, np.float32)
    values[1, 5, 2] = 1
    sitk.WriteImage(as_image(empty.with_array(values)), str(path))
    read = read_volume(path)
    (index,) = np.argwhere(read.array == 1)
    # As nibabel reads this file with h5py: x to the right, y to the front, as its comments say.
    right, front, up, _ = empty.grid.voxel_to_physical() @ [2, 5, 1, 1]
    place = read.grid.voxel_to_physical() @ [*index[::-1], 1]
    np.testing.assert_allclose(place[:3], [-right, -front, up], atol=1e-5)
    assert read_grid(path).same_place(read.grid, 1e-9)
    if not turn:
        whole = path.read_bytes()
        assert b"X increases from patient left to right" in whole
        for start in (11.25, -22.5, 33.75):
            assert struct.pack("<d", start) in whole


@pytest.mark.filterwarnings("ignore:.*GIPL does not say which way")
@pytest.mark.parametrize("dtype", [np.float32, np.int16])
@pytest.mark.parametrize(
    "name",
    [
        *(f"packed.{kind}" for kind in ("mha", "mhd", "nrrd", "nhdr")),
        *(f"v.{kind}" for kind in ("mha", "mhd", "nrrd", "nhdr", "gipl", "gipl.gz", "mnc", "h5")),
        *(f"v.{kind}" for kind in ("nii", "nii.gz", "hdr", "img.gz")),
    ],
)
def test_a_file_that_is_cut_short_is_refused_in_every_format(
    name: str, dtype: type, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    values = np.random.default_rng(7).integers(1, 99, (8, 9, 7)).astype(dtype)
    packed = name.startswith("packed")
    sitk.WriteImage(sitk.GetImageFromArray(values), str(tmp_path / name), useCompression=packed)
    np.testing.assert_array_equal(read_volume(tmp_path / name).array, values)
    largest = max(tmp_path.iterdir(), key=lambda file: file.stat().st_size)
    whole = largest.read_bytes()
    for missing in (1, 8, 200):
        largest.write_bytes(whole[:-missing])
        with pytest.raises(ValueError, match=rf"{name}: cut short or damaged: \S"):
            read_volume(tmp_path / name)
    assert capfd.readouterr().err == ""  # libraries of ITK print what they find


@pytest.mark.parametrize("name", ["v.mha", "packed.mha", "v.nrrd", "v.nhdr", "v.png", "v.dcm"])
def test_there_is_no_place_where_a_cut_goes_unnoticed(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    image = sitk.GetImageFromArray(np.arange(20, dtype=np.uint8).reshape(4, 5))
    path = tmp_path / name
    sitk.WriteImage(image, str(path), useCompression=name.startswith("packed"))
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises((ValueError, FileNotFoundError), match=rf"{name}: \S"):
            read_volume(path)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("v.mha", b"BinaryData = True", b"BinaryData = False", "expected binary voxels, got text"),
        ("v.mha", b"LOCAL", b"LIST", "expected voxels in one file, got LIST"),
        ("v.mha", b"LOCAL", b"slice%02d.raw 1 4 1", "expected voxels in one file, got slice%02d"),
        ("v.mha", b"LOCAL", b"gone.raw", "no such file of its voxels: .*gone.raw"),
        ("v.mha", b"ElementT", b"HeaderSize = -1\nElementT", "expected where the voxels begin"),
        ("v.mha", b"ElementT", b"HeaderSize = x\nElementT", "HeaderSize: expected an integer"),
        ("v.mha", b"DimSize", b"Dim", "its header has no DimSize"),
        # ITK ended the process for some of these.
        ("v.mha", b"NDims = 3", b"NDims = -1", "expected a 2-D or 3-D image, got -1-D"),
        ("v.mha", b"NDims = 3", b"NDims = 99", "expected a 2-D or 3-D image, got 99-D"),
        ("v.mha", b"NDims = 3", b"NDims = 3\nNDims = 99", "expected one NDims in its header"),
        ("v.mha", b"DimSize = 5 4 3", b"DimSize = 5 4", "DimSize: expected 3 positive integers"),
        ("v.mha", b"DimSize = 5 4 3", b"DimSize = 5 4 -3", "DimSize: expected 3 positive integers"),
        ("v.mha", b"MET_SHORT", b"MET_STRING", "expected the ElementType to be one of MET_CHAR, "),
        ("v.nrrd", b"dimension: 3", b"dimension: 99", "expected a 2-D or 3-D image, got dim"),
        ("v.nrrd", b"dimension: 3", b"dimension: x", "dimension: expected an integer, got 'x'"),
        ("v.nrrd", b"sizes: 5 4 3", b"sizes: 5 4 0", "sizes: expected 3 positive integers"),
        ("v.nrrd", b"endian", b"kinds: " + 5000 * b"A" + b"\nendian", "at most 1000 characters"),
        (
            "v.nrrd",
            b"endian",
            b"line skip: 9999999999\nendian",
            "hit EOF skipping line 1",
        ),
        ("v.nrrd", b"encoding: raw", b"encoding: ascii", "expected the encoding raw or gzip"),
        ("v.nrrd", b"endian", b"byte skip: -1\nendian", "expected where the voxels begin"),
        ("v.nrrd", b"endian", b"data file: LIST\nendian", "expected voxels in one file, got LIST"),
        ("v.nrrd", b"endian", b"data file: gone\nendian", "no such file of its voxels: .*gone"),
    ],
)
def test_a_header_that_does_not_tell_where_all_voxels_are_is_refused(
    name: str, old: bytes, new: bytes, message: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    sitk.WriteImage(sitk.GetImageFromArray(np.ones((3, 4, 5), np.int16)), str(path))
    whole = path.read_bytes()
    assert whole.count(old) == 1
    path.write_bytes(whole.replace(old, new))
    with pytest.raises((ValueError, FileNotFoundError), match=rf"{name}: .*{message}"):
        read_volume(path)


def test_voxels_behind_other_bytes_are_found(tmp_path: Path) -> None:
    values = np.random.default_rng(8).integers(1, 99, (3, 4, 5)).astype(np.int16)
    for name, line, skipped in [
        ("v.mha", b"HeaderSize = 400\n", b""),
        ("v.nrrd", b"line skip: 1\nbyte skip: 2\n", b"a line\nab"),
    ]:
        path = tmp_path / name
        sitk.WriteImage(sitk.GetImageFromArray(values), str(path))
        header = path.read_bytes()[: -values.nbytes]
        start = max(header.rfind(b"ElementDataFile"), header.find(b"encoding"))
        header = header[:start] + line + header[start:] + skipped
        header = header.ljust(400) if name == "v.mha" else header
        path.write_bytes(header + values.tobytes())
        np.testing.assert_array_equal(read_volume(path).array, values)
        path.write_bytes(header + values.tobytes()[:-1])
        with pytest.raises(ValueError, match=rf"{name}: cut short .* 120 bytes .*, got 119"):
            read_volume(path)


@pytest.mark.parametrize("kind", ["vtk", "tif", "jpg", "bmp", "mrc"])
def test_formats_that_do_not_tell_whether_a_file_is_whole_are_refused(
    kind: str, tmp_path: Path
) -> None:
    path = tmp_path / f"v.{kind}"
    sitk.WriteImage(sitk.GetImageFromArray(np.ones((4, 5), np.uint8)), str(path))
    with pytest.raises(ValueError, match=r"one of NIfTI, MetaImage, .*, got [A-Z]{3}"):
        read_volume(path)


@pytest.mark.parametrize("name", ["v.img.gz", "v.mha", "v.nrrd", "v.png"])
def test_a_file_whose_checksum_is_wrong_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    values = np.ones((4, 5) if name == "v.png" else (3, 4, 5), np.uint8)
    sitk.WriteImage(sitk.GetImageFromArray(values), str(path), useCompression=True)
    damaged = bytearray(path.read_bytes())
    damaged[-13 if name == "v.png" else -3 if name == "v.mha" else -6] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=rf"{re.escape(name)}: cut short or damaged: .*check"):
        read_volume(path)


def test_neither_what_follows_the_voxels_nor_an_offset_of_0_is_damage(
    tmp_path: Path,
) -> None:
    values = np.ones((3, 4, 5), np.float32)
    path = tmp_path / "v.nii"
    sitk.WriteImage(sitk.GetImageFromArray(values), str(path))
    whole = bytearray(path.read_bytes())
    whole[108:112], whole[348:352] = bytes(4), b""  # no offset, and voxels behind the header
    whole += np.full(3, np.nan, np.float32).tobytes()
    path.write_bytes(whole)
    np.testing.assert_array_equal(read_volume(path).array, values)


@pytest.mark.parametrize("ending", ["nii", "nii.gz"])
@pytest.mark.parametrize(
    ("at", "field", "message"),
    [
        (72, np.int16(8), "expected bitpix 32 for the datatype 16, got 8"),
        (72, np.int16(64), "expected bitpix 32 for the datatype 16, got 64"),
        (70, np.int16(1), "expected a NIfTI datatype of whole bytes, got 1"),
        (108, np.float32(np.inf), "expected a finite vox_offset, got inf"),
        (108, np.float32(np.nan), "expected a finite vox_offset, got nan"),
        (108, np.float32(1e30), "cut short or damaged: expected 240 bytes of voxels, got 0"),
    ],
)
def test_a_header_of_nifti_that_cannot_be_right_is_refused(
    ending: str, at: int, field: np.generic, message: str, tmp_path: Path
) -> None:
    path = tmp_path / f"v.{ending}"
    sitk.WriteImage(sitk.GetImageFromArray(np.ones((3, 4, 5), np.float32)), str(path))
    packed = path.read_bytes()
    whole = bytearray(gzip.decompress(packed) if ending == "nii.gz" else packed)
    whole[at : at + field.nbytes] = field.tobytes()
    path.write_bytes(gzip.compress(whole) if ending == "nii.gz" else whole)
    with pytest.raises(ValueError, match=rf"v\.{ending}: {message}"):
        read_volume(path)


@pytest.mark.parametrize("step", [0, np.nan, np.inf])
def test_a_spacing_that_itk_takes_for_1_is_refused(tmp_path: Path, step: float) -> None:
    path = tmp_path / "v.nii"
    for ndim in (2, 3):
        sitk.WriteImage(sitk.GetImageFromArray(np.ones((3, 4, 5)[-ndim:])), str(path))
        whole = bytearray(path.read_bytes())
        whole[88:92] = np.float32(step).tobytes()  # along z
        path.write_bytes(whole)
        if ndim == 2:
            assert read_volume(path).shape == (4, 5)
            continue
        with pytest.raises(
            ValueError, match=r"v\.nii: expected a finite spacing other than 0, got \("
        ):
            read_volume(path)


@pytest.mark.parametrize(
    ("name", "data"),
    [("v.mhd", "v.zraw"), ("v.nhdr", "v.raw.gz"), ("v.hdr", "v.img"), ("v.img", "v.hdr")],
)
def test_a_header_and_its_data_in_two_files_stay_together(
    name: str, data: str, tmp_path: Path
) -> None:
    volume = Volume.create(np.arange(24).reshape(2, 3, 4))
    write_volume(volume, tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, data])
    moved = tmp_path.rename(tmp_path.with_name(f"{tmp_path.name} elsewhere"))
    np.testing.assert_array_equal(read_volume(moved / name).array, volume.array)
