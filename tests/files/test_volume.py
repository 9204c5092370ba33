"""Volumes: where their voxels lie, and their files."""

from __future__ import annotations

import dataclasses
import gzip
import os
import re
import signal
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import jax
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from scenes import as_image, header, physical_grid, random_header, scene

from jaxreg.registration import resample
from regkernels import (
    AffineMap,
    Volume,
    centre_of_mass,
    normalised_affine,
    read_volume,
    rigid_motion,
    write_displacement,
    write_volume,
)
from regkernels.files.atomic import _uninterrupted, atomic_folder, atomic_path


def test_voxels_are_where_simpleitk_puts_them() -> None:
    volume = random_header(np.random.default_rng(2))
    image = as_image(volume)
    grid = physical_grid(volume)
    for x, y, z in [(0, 0, 0), (7, 8, 6), (3, 1, 5)]:
        np.testing.assert_allclose(image.TransformIndexToPhysicalPoint((x, y, z)), grid[z, y, x])
    corner = volume.grid.normalised_to_physical() @ [1, 1, 1, 1]
    np.testing.assert_allclose(corner[:3], grid[-1, -1, -1])


def test_a_normalised_affine_is_the_transform_between_the_two_grids() -> None:
    rng = np.random.default_rng(3)
    fixed, moving = random_header(rng), header((5, 1, 11), (2, 3, 1), turn=-70)
    transform = np.eye(4)
    transform[:3] += rng.normal(size=(3, 4)) * [0.2, 0.2, 0.2, 10]
    affine = normalised_affine(transform, fixed, moving)[0]
    point = np.array([0.3, -0.8, 0.6, 1.0])
    expected = transform @ fixed.grid.normalised_to_physical() @ point
    np.testing.assert_allclose(
        moving.grid.normalised_to_physical() @ [*(affine @ point), 1.0], expected, atol=1e-12
    )


def test_moving_a_header_moves_the_voxels_and_nothing_else() -> None:
    volume = random_header(np.random.default_rng(4))
    motion = rigid_motion(30, (1, 1, 0), (5, -6, 7), volume.grid.centre())
    moved = volume.moved_by(motion)
    expected = physical_grid(volume) @ motion[:3, :3].T + motion[:3, 3]
    np.testing.assert_allclose(physical_grid(moved), expected)
    np.testing.assert_allclose(moved.grid.centre(), volume.grid.centre() + np.array([5, -6, 7]))


def test_resampling_between_headers_agrees_with_simpleitk() -> None:
    fixed = header((18, 20, 22), (3, 2.5, 2), turn=20)
    moving = header((30, 28, 26), (2, 2.2, 2.4), turn=-35)
    moving = moving.with_array(scene(physical_grid(moving) * 2))
    transform = rigid_motion(10, (1, 2, 3), (3, -2, 1), (0, 0, 0))
    itk_transform = sitk.AffineTransform(3)
    itk_transform.SetMatrix(transform[:3, :3].ravel().tolist())
    itk_transform.SetTranslation(transform[:3, 3].tolist())
    expected = sitk.Resample(as_image(moving), as_image(fixed), itk_transform, sitk.sitkLinear, 0.0)
    ours = resample(moving, fixed, (AffineMap(transform),)).array
    # SimpleITK extends a volume by half a voxel; zeros padding fades it out there instead.
    ones = moving.with_array(np.ones(moving.shape))
    inside = resample(ones, fixed, (AffineMap(transform),)).array > 1 - 1e-5
    assert inside.mean() > 0.5
    assert np.abs(ours - sitk.GetArrayFromImage(expected))[inside].max() < 1e-5


def test_the_centre_of_mass_is_in_millimetres() -> None:
    volume = random_header(np.random.default_rng(5))
    array = np.full(volume.shape, 2.0)
    array[4, 2, 6] += 3
    array[2, 2, 6] += 3
    grid = physical_grid(volume)
    expected = (grid[4, 2, 6] + grid[2, 2, 6]) / 2
    np.testing.assert_allclose(centre_of_mass(volume.with_array(array)), expected)
    np.testing.assert_allclose(centre_of_mass(volume), volume.grid.centre())


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


def test_voxel_values_are_integers_or_float32() -> None:
    for given, kept in [(bool, np.uint8), (np.int64, np.int64), (float, np.float32)]:
        assert Volume.create(np.ones((2, 2), given)).array.dtype == kept
    assert Volume.create(np.ones((2, 2))).with_array([[1, 2], [3, 4]]).array.dtype == np.int64


def test_channels_are_what_the_spacing_leaves() -> None:
    array = np.arange(24.0).reshape(2, 3, 4)
    assert Volume.create(array).channels == 1
    plane = Volume.create(array, spacing=(1, 2))
    assert (plane.ndim, plane.channels, plane.shape) == (2, 2, (3, 4))
    np.testing.assert_array_equal(plane.batched(), array[None])
    assert plane.with_array(array[0]).channels == 1
    with pytest.raises(ValueError, match=r"array: expected shape \(3, 4\), got \(4, 3\)"):
        plane.with_array(np.zeros((4, 3)))


def test_a_volume_is_a_pytree() -> None:
    volume = random_header(np.random.default_rng(9))
    doubled = jax.jit(lambda v: dataclasses.replace(v, array=v.batched()[0, 0] * 2 + 1))(volume)
    assert doubled.shape == volume.shape
    np.testing.assert_array_equal(doubled.array, np.ones(volume.shape))


@pytest.mark.parametrize(
    ("array", "options", "message"),
    [
        (np.zeros(3), {}, "array: expected 2 or 3 dimensions"),
        (np.zeros((0, 3)), {}, "array: expected voxels"),
        (np.full((2, 2), np.nan), {}, "array: expected finite"),
        (np.zeros((2, 2)), {"spacing": (1, 0)}, "spacing: expected positive"),
        (np.zeros((2, 2)), {"spacing": (1, 1, 1)}, "array: expected 3 dimensions as spacing"),
        (np.zeros((2, 2, 2, 2)), {}, "array: expected 2 or 3 dimensions, got 4"),
        (np.zeros((2, 2)), {"origin": (1, 1, 1)}, r"origin: expected \(2,\)"),
        (np.zeros((2, 2)), {"origin": (np.inf, 0)}, "origin: expected"),
        (np.zeros((2, 2)), {"direction": np.ones((2, 2))}, "direction: expected independent"),
    ],
)
def test_a_volume_that_cannot_be_is_refused(array: np.ndarray, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Volume.create(array, **options)


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


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "result.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_path(path) as beside:
        beside.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_filled_whole_or_not_at_all(tmp_path: Path) -> None:
    goal = tmp_path / "new" / "folder"
    with pytest.raises(RuntimeError), atomic_folder(goal) as beside:
        (beside / "a").write_text("half")
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    for text in ("first", "second"):
        with atomic_folder(goal) as beside:
            (beside / "a").write_text(text)
    (goal / "b").write_text("of someone else")
    with atomic_folder(goal) as beside:
        (beside / "a").write_text("third")
    assert {path.name: path.read_text() for path in goal.iterdir()} == {
        "a": "third",
        "b": "of someone else",
    }
    with pytest.raises(OSError, match="cannot write there"), atomic_folder(goal / "a"):
        pass
    (goal / "c").mkdir()
    with pytest.raises(OSError, match="expected a file"), atomic_folder(goal, owned=["c"]):
        pass
    with pytest.raises(OSError, match="expected a file"), atomic_folder(goal) as beside:
        for name in ("a", "c"):
            (beside / name).write_text("fourth")
    assert (goal / "a").read_text() == "third"


def test_an_interrupt_between_two_files_waits_for_the_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, default_signals: None
) -> None:
    replace = os.replace

    def interrupted(*paths: Path) -> None:
        signal.raise_signal(signal.SIGINT)
        replace(*paths)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path) as beside:
        for name in ("a", "b"):
            (beside / name).write_text(name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)  # which interrupts again


@pytest.fixture
def handled() -> Iterator[list[int]]:
    """The signals that handlers of the program have got; that of SIGHUP raises an exception."""
    got: list[int] = []

    def handle(number: int, _: object) -> None:
        got.append(number)
        if number == signal.SIGHUP:
            raise InterruptedError

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, handle) for number in numbers}
    yield got
    assert [signal.signal(number, handler) for number, handler in before.items()] == [handle] * 3


def test_every_signal_that_was_held_is_delivered_once(handled: list[int], tmp_path: Path) -> None:
    sent = [signal.SIGHUP, signal.SIGINT, signal.SIGTERM]

    def write() -> None:
        with atomic_path(tmp_path / "a"), _uninterrupted():
            for number in (*sent, *sent):
                signal.raise_signal(number)
            assert not handled

    with pytest.raises(InterruptedError):
        write()
    assert handled == sent


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_handlers_are_put_back_is_delivered_once(
    number: signal.Signals, handled: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    put = signal.signal
    restored = 0

    def interrupted(which: int, handler: object) -> object:
        nonlocal restored
        before = put(which, handler)
        if before.__name__ == "hold":
            restored += 1
            if restored == 2:  # one handler is still to be put back
                signal.raise_signal(number)
        return before

    monkeypatch.setattr(signal, "signal", interrupted)
    raised = pytest.raises(InterruptedError) if number == signal.SIGHUP else nullcontext()
    with raised, _uninterrupted():
        pass
    monkeypatch.undo()
    assert handled == [number]
