"""gzip is written by ISA-L where it is installed, and by ITK elsewhere."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from regkernels import Grid, Volume, write_displacement, write_volume
from regkernels.files import compression, images

needs_isal = pytest.mark.skipif(not compression.has_isal, reason="isal is not installed")


@needs_isal
@pytest.mark.parametrize("name", ["image.nii.gz", "image.hdr.gz", "image.img.gz"])
@pytest.mark.parametrize("vectors", [False, True])
def test_what_isal_compresses_are_the_files_that_itk_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, vectors: bool
) -> None:
    def write(folder: Path) -> dict[str, bytes]:
        folder.mkdir()
        rng = np.random.default_rng(0)
        if vectors:
            grid = Grid((4, 5, 6), np.ones(3), np.zeros(3), np.eye(3))
            write_displacement(rng.normal(size=(4, 5, 6, 3)), grid, folder / name)
        else:
            write_volume(Volume.create(rng.integers(0, 99, (4, 5, 6))), folder / name)
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    by_isal, again = write(tmp_path / "isal"), write(tmp_path / "again")
    assert again == by_isal  # no time of day in it
    monkeypatch.setattr(images, "has_isal", False)
    by_itk = write(tmp_path / "itk")
    assert by_isal != by_itk
    assert by_isal.keys() == by_itk.keys()
    for file, packed in by_isal.items():
        assert gzip.decompress(packed) == gzip.decompress(by_itk[file])


@needs_isal
def test_a_file_has_the_same_bytes_on_any_number_of_processors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = tmp_path / "plain"
    plain.write_bytes(np.random.default_rng(0).normal(size=700_000).astype(np.float32).tobytes())
    found = set()
    for processors in (1, 2, 7):
        monkeypatch.setattr("os.cpu_count", lambda processors=processors: processors)
        compression.compress(plain, tmp_path / "packed")
        found.add((tmp_path / "packed").read_bytes())
    (packed,) = found
    assert gzip.decompress(packed) == plain.read_bytes()


@needs_isal
def test_what_cannot_be_compressed_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "image.nii.gz").write_text("old")
    monkeypatch.setattr(images, "compress", full)
    with pytest.raises(OSError, match="No space left"):
        write_volume(Volume.create(np.ones((4, 5, 6))), tmp_path / "image.nii.gz")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]
