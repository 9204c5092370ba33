"""What ITK and its libraries print becomes one line of ours that says what follows from it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from png_files import write_png

from regkernels import read_grid, read_transform, read_volume
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
import jaxreg_cli
from regkernels.files.itk_warnings import collected_output
def run(arguments):
    with collected_output() as said:
        print("of another thread", file=sys.stderr)
        os.write(2, b"of a library")
    print(said)
    raise SystemExit(0)
sys.modules["jaxreg_cli.main"]._run = run
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
