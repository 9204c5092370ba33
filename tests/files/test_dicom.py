"""DICOM: slices lie where the file says, values are what is displayed, or a file is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from dicom_files import (
    BIG_ENDIAN,
    CT,
    DOSE,
    ENHANCED_CT,
    EXPLICIT,
    IMPLICIT,
    JPEG,
    RLE,
    SECONDARY_CAPTURE,
    decimals,
    frames_at,
    run_lengths,
    write_dicom,
)
from numpy.typing import NDArray

from regkernels import read_grid, read_volume

VALUES = np.arange(80, dtype=np.int16).reshape(4, 4, 5)
AXES = np.array([0.8, 0.6, 0, 0, 0, -1])
NORMAL = np.cross(AXES[:3], AXES[3:])
ORIGIN = np.array([31.0, -17, 9])
STEPS = np.arange(4)[:, None]


def _is_at(path: Path, positions: NDArray[Any]) -> None:
    for grid in (read_grid(path), read_volume(path).grid):
        matrix = grid.voxel_to_physical()
        for k, position in enumerate(positions):
            there = position + 2 * 1.2 * AXES[:3] + 3 * 0.8 * AXES[3:]
            np.testing.assert_allclose((matrix @ [2, 3, k, 1])[:3], there, atol=1e-5)


@pytest.mark.parametrize("syntax", [EXPLICIT, IMPLICIT])
@pytest.mark.parametrize(
    "step", [2.5 * NORMAL, -2.5 * NORMAL, 2.5 * NORMAL + [0.7, 0.2, 0.1]], ids=str
)
def test_frames_lie_where_the_file_says_also_with_a_tilted_gantry(
    tmp_path: Path, syntax: str, step: NDArray[Any]
) -> None:
    positions = ORIGIN + STEPS * step
    fields = frames_at(positions, AXES, (1.2, 0.8))
    write_dicom(tmp_path / "v.dcm", VALUES, fields, kind=ENHANCED_CT, syntax=syntax)
    _is_at(tmp_path / "v.dcm", positions)
    np.testing.assert_array_equal(read_volume(tmp_path / "v.dcm").array, VALUES)


@pytest.mark.parametrize("syntax", [EXPLICIT, IMPLICIT])
@pytest.mark.parametrize(
    ("places", "message"),
    [
        ((0, 1, 3, 4), "evenly on a line, got some up to 0.833 mm away"),  # one is missing
        ((0, 1, 2, 3.4), "evenly on a line, got some"),
        ((2, 0, 3, 1), "evenly on a line, got some"),
        ((0, 1, 0, 1), "evenly on a line, got some"),
        ((0, 0, 0, 0), "side by side, got the last one at the first"),
    ],
)
def test_frames_that_are_not_evenly_spaced_are_refused(
    tmp_path: Path, places: tuple[float, ...], message: str, syntax: str
) -> None:
    positions = ORIGIN + np.array(places)[:, None] * 2.5 * NORMAL
    fields = frames_at(positions, AXES, (1.2, 0.8))
    write_dicom(tmp_path / "v.dcm", VALUES, fields, kind=ENHANCED_CT, syntax=syntax)
    for read in (read_grid, read_volume):
        with pytest.raises(ValueError, match=rf"v\.dcm: .*{message}"):
            read(tmp_path / "v.dcm")


def test_frames_that_are_not_parallel_are_refused(tmp_path: Path) -> None:
    axes = np.tile(AXES, (4, 1))
    axes[3] = [1, 0, 0, 0, 1, 0]
    fields = frames_at(ORIGIN + STEPS * NORMAL, axes, (1.2, 0.8))
    write_dicom(tmp_path / "v.dcm", VALUES, fields, kind=ENHANCED_CT)
    with pytest.raises(ValueError, match=r"v\.dcm: expected parallel slices"):
        read_volume(tmp_path / "v.dcm")


def test_frames_without_places_are_no_volume(tmp_path: Path) -> None:
    one = {0x00200032: decimals(*ORIGIN), 0x00200037: decimals(*AXES)}
    for fields in ({}, one):
        write_dicom(tmp_path / "clip.dcm", VALUES, fields)
        with pytest.raises(
            ValueError, match=r"clip\.dcm: expected where each of its 4 slices lies"
        ):
            read_volume(tmp_path / "clip.dcm")


def test_a_mosaic_of_slices_is_refused(tmp_path: Path) -> None:
    write_dicom(tmp_path / "v.dcm", VALUES[0], {0x00080008: ("CS", "ORIGINAL\\PRIMARY\\M\\MOSAIC")})
    with pytest.raises(ValueError, match=r"v\.dcm: expected slices, got a mosaic"):
        read_volume(tmp_path / "v.dcm")


def _write_series(
    folder: Path,
    positions: NDArray[Any],
    values: NDArray[Any] = VALUES,
    series: str = "1.2.3",
    **changed: Any,
) -> None:
    """Slices in files of their own, whose names are in another order than their places."""
    for k, (position, slice_) in enumerate(zip(positions, values, strict=True)):
        fields = {
            0x00080018: ("UI", f"{series}.{k + 1}"),
            0x0020000E: ("UI", series),
            0x00200032: decimals(*position),
            0x00200037: decimals(*AXES),
            0x00280030: decimals(0.8, 1.2),
            0x00281052: decimals(-1000),
            0x00281053: decimals(1 + k % 2),
            **{int(tag, 16): field[k] for tag, field in changed.items()},
        }
        write_dicom(folder / f"{series}-{(k * 3) % 4}.dcm", slice_, fields, kind=CT)


@pytest.mark.parametrize("step", [2.5 * NORMAL, 2.5 * NORMAL + [0.7, 0.2, 0.1]], ids=str)
@pytest.mark.filterwarnings("error")
def test_a_series_in_a_folder_is_one_volume(tmp_path: Path, step: NDArray[Any]) -> None:
    positions = ORIGIN + STEPS * step
    _write_series(tmp_path, positions)
    (tmp_path / "notes.txt").write_text("Not DICOM.")
    _is_at(tmp_path, positions)
    slopes = np.array([1, 2, 1, 2])[:, None, None]  # each slice has its own
    np.testing.assert_array_equal(read_volume(tmp_path).array, VALUES * slopes - 1000)


def test_a_folder_without_one_whole_series_is_refused(tmp_path: Path) -> None:
    def refused(error: type[Exception], message: str) -> None:
        for read in (read_grid, read_volume):
            with pytest.raises(error, match=message):
                read(tmp_path)

    refused(FileNotFoundError, "expected a file, or a folder with a series of DICOM")
    places = np.array([0, 1, 3, 4])[:, None]
    _write_series(tmp_path, ORIGIN + places * 2.5 * NORMAL)
    refused(
        ValueError, r"expected slices that are spaced evenly on a line, got some up to 0\.833 mm"
    )
    turned = [("DS", "1\\0\\0\\0\\1\\0") if k == 3 else decimals(*AXES) for k in range(4)]
    _write_series(tmp_path, ORIGIN + STEPS * 2.5 * NORMAL, **{"0x00200037": turned})
    refused(ValueError, "slices")
    _write_series(tmp_path, ORIGIN + STEPS * 2.5 * NORMAL)
    _write_series(tmp_path, ORIGIN + STEPS * 2.5 * NORMAL, series="4.5.6")
    refused(ValueError, r"expected one series of DICOM, got slices of 2: 4 in .*move each to a")


def test_one_slice_in_a_folder_is_no_series(tmp_path: Path) -> None:
    write_dicom(tmp_path / "1.dcm", VALUES[0])
    for read in (read_grid, read_volume):
        with pytest.raises(
            ValueError, match=r"expected slices of a series, got one; give .*1\.dcm"
        ):
            read(tmp_path)


@pytest.mark.parametrize("kind", [CT, SECONDARY_CAPTURE])
@pytest.mark.parametrize(
    ("sizes", "thickness"),
    [({}, 1), ({0x00180050: "3"}, 3), ({0x00180050: "3", 0x00180088: "3.5"}, 3.5)],
)
def test_one_slice_lies_where_the_file_says_and_is_told(
    tmp_path: Path, kind: str, sizes: dict[int, str], thickness: float
) -> None:
    fields = {
        0x00200032: decimals(*ORIGIN),
        0x00200037: decimals(*AXES),
        0x00280030: decimals(0.8, 1.2),
        **{tag: ("DS", size) for tag, size in sizes.items()},
    }
    write_dicom(tmp_path / "v.dcm", VALUES[0], fields, kind=kind)
    with pytest.warns(UserWarning, match=r"v\.dcm: it holds one slice, of .* not read: give the"):
        _is_at(tmp_path / "v.dcm", ORIGIN[None])
        if kind == CT:
            assert read_grid(tmp_path / "v.dcm").spacing[2] == thickness


@pytest.mark.parametrize("places", [(0, 2.5, 5, 7.5), (9, 11.5, 14, 16.5), (0, -2.5, -5, -7.5)])
def test_the_slices_of_a_dose_grid_lie_at_their_offsets(
    tmp_path: Path, places: tuple[float, ...]
) -> None:
    def write(offsets: tuple[float, ...]) -> None:
        fields = {
            0x00200032: decimals(*ORIGIN),
            0x00200037: decimals(*AXES),
            0x00280030: decimals(0.8, 1.2),
            0x00280009: ("AT", b"\x04\x30\x0c\x00"),
            0x3004000C: decimals(*offsets),
            0x3004000E: decimals(1),
        }
        write_dicom(tmp_path / "dose.dcm", VALUES.astype(np.uint16), fields, kind=DOSE)

    write(places)
    along = np.array(places) - places[0]
    _is_at(tmp_path / "dose.dcm", ORIGIN + along[:, None] * NORMAL)
    write((*places[:3], places[3] + 2.5))
    with pytest.raises(ValueError, match=r"dose\.dcm: .*spaced evenly"):
        read_volume(tmp_path / "dose.dcm")


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_a_dose_grid_is_read_in_the_unit_of_the_dose(dtype: type, tmp_path: Path) -> None:
    stored = np.arange(1000, 1020, dtype=dtype).reshape(4, 5)
    write_dicom(tmp_path / "dose.dcm", stored, {0x3004000E: decimals(2.5e-3)}, kind=DOSE)
    dose = np.squeeze(read_volume(tmp_path / "dose.dcm").array)
    np.testing.assert_allclose(dose, stored * 2.5e-3, 1e-6)
    for wrong in ("0", "nan"):
        write_dicom(tmp_path / "dose.dcm", stored, {0x3004000E: ("DS", wrong)}, kind=DOSE)
        with pytest.raises(ValueError, match=r"dose\.dcm: expected a positive DoseGridScaling"):
            read_volume(tmp_path / "dose.dcm")


def test_dicom_whose_bytes_itk_would_swap_wrongly_is_refused(tmp_path: Path) -> None:
    values = np.arange(1000, 1020).reshape(4, 5)
    path = tmp_path / "big.dcm"
    write_dicom(path, values.astype(np.uint16), syntax=BIG_ENDIAN)
    np.testing.assert_array_equal(np.squeeze(read_volume(path).array), values)
    write_dicom(path, values.astype(np.uint32), syntax=BIG_ENDIAN)
    with pytest.raises(ValueError, match=r"big\.dcm: expected little-endian DICOM"):
        read_volume(path)


def _colours(dtype: type) -> NDArray[Any]:
    largest = np.iinfo(dtype).max
    return np.random.default_rng(1).integers(0, largest, (32, 36, 3), dtype, endpoint=True)


def _is_what_is_stored(path: Path, values: NDArray[Any]) -> None:
    read = np.squeeze(np.asarray(read_volume(path).array))
    np.testing.assert_array_equal(read, np.moveaxis(values, -1, 0) if values.ndim == 3 else values)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32])
@pytest.mark.parametrize("packing", ["none", "planes", "RLE"])
def test_colours_are_what_is_stored_or_refused(tmp_path: Path, dtype: type, packing: str) -> None:
    values = _colours(dtype)
    path = tmp_path / "v.dcm"
    options: dict[str, Any] = {"photometric": "RGB", "planes": packing == "planes"}
    if packing == "RLE":
        options |= {"syntax": RLE, "stream": run_lengths(values)}
    write_dicom(path, values, **options)
    wrong = {"none": (), "planes": (np.uint32,), "RLE": (np.uint16, np.uint32)}[packing]
    if dtype not in wrong:
        _is_what_is_stored(path, values)
        return
    with pytest.raises(
        ValueError, match=rf"expected colours of 8 bits.* RGB of {8 * dtype().itemsize}"
    ):
        read_volume(path)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32])
def test_grey_values_that_are_compressed_are_what_is_stored(tmp_path: Path, dtype: type) -> None:
    values = _colours(dtype)[..., 0]
    write_dicom(tmp_path / "v.dcm", values, syntax=RLE, stream=run_lengths(values))
    _is_what_is_stored(tmp_path / "v.dcm", values)


def test_brightness_and_colour_are_converted_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "v.dcm"
    values = _colours(np.uint8)
    write_dicom(path, values, photometric="YBR_FULL")
    y, b, r = np.moveaxis(values.astype(float), -1, 0) - np.array([0, 128, 128])[:, None, None]
    # DICOM's part 3, C.7.6.3.1.2
    rgb = np.stack([y + 1.402 * r, y - 0.344136 * b - 0.714136 * r, y + 1.772 * b])
    read = np.squeeze(np.asarray(read_volume(path).array, float))
    np.testing.assert_allclose(read, rgb.clip(0, 255), atol=1)
    write_dicom(path, _colours(np.uint16), photometric="YBR_FULL")
    with pytest.raises(ValueError, match=r"v\.dcm: .* got YBR_FULL of 16 bits"):
        read_volume(path)


def test_a_jpeg_image_of_other_colours_than_the_file_says_is_refused(tmp_path: Path) -> None:
    y, x = np.mgrid[:32, :36]
    values = np.stack([7 * x, 7 * y, 255 - 3 * x - 4 * y], -1).clip(0, 255).astype(np.uint8)
    sitk.WriteImage(sitk.GetImageFromArray(values, isVector=True), str(tmp_path / "v.jpg"))
    stream = (tmp_path / "v.jpg").read_bytes()
    assert b"JFIF" in stream[:20]  # so it holds brightness and colour
    path = tmp_path / "v.dcm"
    write_dicom(path, values, photometric="YBR_FULL_422", syntax=JPEG, stream=stream)
    read = np.moveaxis(np.asarray(read_volume(path).array, float), 0, -1).squeeze()
    assert abs(read - values).mean() < 5
    start = stream.index(b"\xff\xe0")
    silent = stream[:start] + stream[start + 18 :]  # which does not say, but for its sampling
    for packed in (stream, silent):
        write_dicom(path, values, photometric="RGB", syntax=JPEG, stream=packed)
        with pytest.raises(
            ValueError, match=r"PhotometricInterpretation RGB says, got a JPEG image"
        ):
            read_volume(path)


def test_values_that_no_slope_gives_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "v.dcm"
    table = {0x00283002: ("US", b"\x00\x01\0\0\x10\0"), 0x00283006: ("OW", bytes(512))}
    for syntax in (EXPLICIT, IMPLICIT):
        write_dicom(path, VALUES[0], {0x00283000: ("SQ", [table])}, syntax=syntax)
        with pytest.raises(ValueError, match=r"v\.dcm: .*got a Modality LUT"):
            read_volume(path)
    positions = ORIGIN + STEPS * NORMAL
    fields = frames_at(positions, AXES, (1.2, 0.8), slopes=(2, 2, 2, 2))
    write_dicom(path, VALUES, fields, kind=ENHANCED_CT)
    np.testing.assert_array_equal(read_volume(path).array, 2 * VALUES)
    fields = frames_at(positions, AXES, (1.2, 0.8), slopes=(1, 2, 2, 2))
    write_dicom(path, VALUES, fields, kind=ENHANCED_CT)
    with pytest.raises(ValueError, match=r"v\.dcm: expected one RescaleSlope"):
        read_volume(path)


@pytest.mark.parametrize(
    ("dtype", "stored", "high", "right"),
    [
        (np.uint16, 16, 15, True),
        (np.uint16, 12, 11, True),
        (np.uint16, 12, 15, False),
        (np.uint32, 32, 31, True),
        (np.uint32, 24, 23, False),
    ],
)
def test_values_that_are_not_in_the_low_bits_are_refused(
    tmp_path: Path, dtype: type, stored: int, high: int, right: bool
) -> None:
    values = _colours(dtype)[..., 0] & dtype(2**stored - 1)
    fields = {0x00280101: ("US", stored), 0x00280102: ("US", high)}
    write_dicom(tmp_path / "v.dcm", values << dtype(high + 1 - stored), fields)
    if right:
        _is_what_is_stored(tmp_path / "v.dcm", values)
        return
    with pytest.raises(ValueError, match=rf"BitsStored {stored} and HighBit {high}"):
        read_volume(tmp_path / "v.dcm")


def test_colours_that_are_neither_rgb_nor_ybr_or_are_scaled_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "v.dcm"
    values = _colours(np.uint8)
    write_dicom(path, values, photometric="HSV")
    with pytest.raises(ValueError, match=r"v\.dcm: expected grey values, RGB or YBR, got HSV"):
        read_volume(path)
    scale = {0x00281052: decimals(0), 0x00281053: decimals(2)}
    write_dicom(path, values, scale, photometric="RGB")
    with pytest.raises(ValueError, match=r"v\.dcm: expected MONOCHROME2 with a slope .* got RGB"):
        read_volume(path)


def test_small_values_that_are_bright_are_turned_over_unless_they_are_scaled(
    tmp_path: Path,
) -> None:
    path = tmp_path / "v.dcm"
    values = VALUES[0].astype(np.uint8)
    write_dicom(path, values, {0x00280004: ("CS", "MONOCHROME1")})
    _is_what_is_stored(path, 255 - values)
    scale = {0x00281052: decimals(-3), 0x00281053: decimals(2)}
    write_dicom(path, values, {0x00280004: ("CS", "MONOCHROME1"), **scale})
    with pytest.raises(ValueError, match=r"v\.dcm: expected MONOCHROME2"):
        read_volume(path)


def test_single_bits_are_0_and_1(tmp_path: Path) -> None:
    bits = np.random.default_rng(2).integers(0, 2, (4, 8)).astype(np.uint8)
    fields = {
        **{0x00280100: ("US", 1), 0x00280101: ("US", 1), 0x00280102: ("US", 0)},
        0x7FE00010: ("OB", np.packbits(bits, bitorder="little").tobytes()),
    }
    write_dicom(tmp_path / "v.dcm", bits, fields)
    _is_what_is_stored(tmp_path / "v.dcm", bits)
