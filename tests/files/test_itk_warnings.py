"""What ITK and its libraries print becomes one line of ours that says what follows from it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from png_files import write_png

from regkernels import read_grid, read_transform, read_volume
from regkernels.files.formats.reading import FileWarning
from regkernels.files.itk_warnings import collected_output, telling_warnings

PROFILE = b"bad\0\0" + zlib.compress(bytes(200))  # of which libpng complains


def test_what_the_libraries_of_itk_print_is_told_in_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "v.png"
    write_png(path, [bytes(range(5))], iCCP=PROFILE)
    sitk.ReadImage(str(path))
    assert "iCCP" in capfd.readouterr().err
    for read in (read_volume, read_grid):
        with pytest.warns(UserWarning) as told:
            read(path)
        (line,) = (str(one.message) for one in told)
        assert line.startswith(f"{path}: ITK warns of it, and goes on (libpng warning: iCCP")
        assert "\n" not in line
        assert capfd.readouterr().err == ""


def test_the_command_line_tells_it_once(tmp_path: Path) -> None:
    write_png(tmp_path / "v.png", [bytes(range(5))], iCCP=PROFILE)
    done = subprocess.run(
        [sys.executable, "-m", "jaxreg", "apply", "v.png", "-r", "v.png", "-o", "out.nrrd"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("jaxreg: warning: v.png: ITK warns of it, and goes on (libpng warning:")


def test_warnings_of_itk_itself_are_told_without_its_sources(
    capfd: pytest.CaptureFixture[str],
) -> None:
    text = "WARNING: In /build/itkNiftiImageIO.cxx, line 12\nNiftiImageIO (0x55d0): one\n thing\n\n"
    told = pytest.warns(UserWarning, match=r"^v\.nii: ITK warns of it, .*\(one; thing\)")
    with told, telling_warnings("v.nii"):
        os.write(2, text.encode())
    assert capfd.readouterr().err == ""


def test_an_error_is_told_alone(recwarn: pytest.WarningsRecorder) -> None:
    with pytest.raises(ValueError, match="wrong"), telling_warnings("v.nii"):
        os.write(2, b"noise\n")
        raise ValueError("wrong")
    assert not recwarn.list


def test_several_transforms_side_by_side_are_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    part = (
        "#Transform {0}\nTransform: AffineTransform_double_3_3\n"
        "Parameters: 1 0 0 0 1 0 0 0 1 {0} 2 3\nFixedParameters: 0 0 0\n"
    )
    path = tmp_path / "two.tfm"
    path.write_text("#Insight Transform File V1.0\n" + part.format(0))
    assert len(read_transform(path)) == 1
    path.write_text("#Insight Transform File V1.0\n" + part.format(0) + part.format(1))
    with pytest.raises(ValueError, match=r"two\.tfm: expected one transform or a composite, got"):
        read_transform(path)
    assert capfd.readouterr().err == ""


def test_threads_that_read_at_once_leave_standard_error_as_it_was(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sitk.WriteImage(sitk.GetImageFromArray(np.ones((4, 5), np.uint8)), str(tmp_path / "v.mha"))
    threads = [
        threading.Thread(target=lambda: [read_volume(tmp_path / "v.mha") for _ in range(20)])
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os.write(2, b"still here\n")
    assert capfd.readouterr().err == "still here\n"


def test_what_is_said_while_several_files_are_written_is_told_once_of_all_it_may_be_about(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with contextlib.ExitStack() as first, contextlib.ExitStack() as second:
        first.enter_context(telling_warnings("a.nii"))
        os.write(2, b"one\n")
        second.enter_context(telling_warnings("b.nii"))
        os.write(2, b"two\n")
        with pytest.warns(FileWarning) as told:
            first.close()
        lines = [str(one.message).partition(";")[0] for one in told]
        assert lines == [
            "a.nii: ITK warns of it, and goes on (one)",
            "a.nii or b.nii: ITK warns of it, and goes on (two)",
        ]
        os.write(2, b"three\n")
        with pytest.warns(FileWarning, match=r"^b\.nii: ITK .*\(three\)") as told:
            second.close()
        assert len(told) == 1
    os.write(2, b"still here\n")
    assert capfd.readouterr().err == "still here\n"


def test_what_is_said_while_a_file_fails_is_told_of_the_other_one() -> None:
    with contextlib.ExitStack() as other:
        other.enter_context(telling_warnings("b.nii"))
        with pytest.raises(ValueError, match="wrong"), telling_warnings("a.nii"):
            os.write(2, b"noise\n")
            raise ValueError("wrong")
        with pytest.warns(FileWarning, match=r"^b\.nii: ITK .*\(noise\)"):
            other.close()


def test_files_are_written_at_the_same_time_and_read_alone() -> None:
    both, order = threading.Barrier(2), []

    def write(name: str) -> None:
        with telling_warnings(name):
            both.wait(30)  # neither ends before the other one has begun
            order.append("written")

    def read() -> None:
        with collected_output() as said:
            order.append("read")
            os.write(2, b"of the reader\n")
        assert said == ["of the reader"]

    with ThreadPoolExecutor() as pool:
        writing = [pool.submit(write, name) for name in ("a.nii", "b.nii")]
        reading = pool.submit(read)
        for future in (*writing, reading):
            future.result()
    assert sorted(order) == ["read", "written", "written"]
    assert order != ["written", "read", "written"]


def test_threads_that_write_and_read_at_once_lose_no_warning(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    image = sitk.GetImageFromArray(np.ones((4, 5), np.uint8))
    sitk.WriteImage(image, str(tmp_path / "v.mha"))
    told: list[str] = []

    def write(number: int) -> None:
        for turn in range(20):
            with telling_warnings(f"{number}.nii"):
                os.write(2, f"warning {number} {turn}.\n".encode())
            read_volume(tmp_path / "v.mha")

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *_: told.append(str(message))
        with ThreadPoolExecutor() as pool:
            for future in [pool.submit(write, number) for number in range(4)]:
                future.result()
    for number in range(4):
        for turn in range(20):
            (line,) = (line for line in told if f"warning {number} {turn}." in line)
            assert f"{number}.nii" in line.partition(": ITK")[0]
    assert capfd.readouterr().err == ""


def test_a_process_without_standard_error_reads_too(tmp_path: Path) -> None:
    sitk.WriteImage(sitk.GetImageFromArray(np.ones((4, 5), np.uint8)), str(tmp_path / "v.mha"))
    code = "import os; os.close(2); import regkernels; print(regkernels.read_volume('v.mha').shape)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stdout == "(4, 5)\n"


def test_what_a_command_prints_is_not_taken_for_a_warning_of_a_file(tmp_path: Path) -> None:
    code = """
import os, sys
import jaxreg_cli.running
from regkernels.files.formats.reading import FileWarning
from regkernels.files.itk_warnings import collected_output
def run(arguments):
    with collected_output() as said:
        print("of another thread", file=sys.stderr)
        os.write(2, b"of a library")
    print(said)
    raise SystemExit(0)
jaxreg_cli.running._run = run
jaxreg_cli.main([])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("['of a library']\n", "of another thread\n")


def test_each_message_is_collected_once() -> None:
    with collected_output() as said:
        os.write(2, b"one\n\none\n  two  words\n")
    assert said == ["one", "two words"]
