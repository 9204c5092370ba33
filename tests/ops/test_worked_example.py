"""csrc/README.md: its example builds and computes, and its lists of files are complete."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "csrc" / "README.md"

needs_sources = pytest.mark.skipif(not PAGE.is_file(), reason="the C++ sources are not here")

# The extension with no other op than the example's, so that little has to be compiled, and without
# the frontend of XLA, whose headers come with jaxlib.
CMAKE_LISTS = """
cmake_minimum_required(VERSION 3.24)
project(worked_example LANGUAGES CXX)
set(CMAKE_CXX_STANDARD 17)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
find_package(Python REQUIRED COMPONENTS Interpreter Development.Module)
find_package(pybind11 CONFIG REQUIRED)
find_package(Threads REQUIRED)
file(GLOB_RECURSE sources csrc/*.cpp)
pybind11_add_module(_core MODULE NO_EXTRAS ${sources})
target_include_directories(_core PRIVATE csrc)
target_compile_definitions(_core PRIVATE REGKERNELS_VERSION="0")
target_compile_options(_core PRIVATE -Wall -Wextra -O0)
target_link_libraries(_core PRIVATE Threads::Threads)
"""
NO_XLA = """
#include "frontends/xla.h"
namespace regkernels {
std::vector<XlaHandler> xla_handlers(const std::string&) { return {}; }
std::pair<int, int> xla_ffi_api_version() { return {0, 0}; }
}  // namespace regkernels
"""
# Runs in the folder of the extension.
COMPUTE = """
import _core
import numpy as np

def call(op, *inputs):
    inputs = [np.ascontiguousarray(array[None]) for array in inputs]  # the group axis
    described = [(array.dtype.name, array.shape) for array in inputs]
    specs = _core.infer(op, described, {}, 1)
    (output,) = [np.full(shape, np.nan, dtype) for dtype, shape in specs]
    addresses = [array.ctypes.data for array in inputs]
    _core.launch(op, described, addresses, {}, 1, specs, [output.ctypes.data], -1, 0)
    return output[0]

assert list(_core.ops()) == ["magnitude", "magnitude_grad"]
assert _core.ops()["magnitude"]["gradient"] == "magnitude_grad"

rng = np.random.default_rng(0)
for sizes in [(3, 4, 5), (6, 7), (1, 2, 1)]:
    for dtype in (np.float32, np.float64):
        u = rng.normal(size=(2, *sizes, len(sizes))).astype(dtype)
        u[0, ..., 0, :] = 0  # no length, and no gradient
        g = rng.normal(size=(2, *sizes)).astype(dtype)
        length = np.sqrt((u.astype(np.float64) ** 2).sum(-1))
        gradient = g[..., None] * u / np.where(length == 0, 1, length)[..., None]
        tolerance = 8 * np.finfo(dtype).eps
        forward, backward = call("magnitude", u), call("magnitude_grad", u, g)
        assert forward.dtype == backward.dtype == dtype
        np.testing.assert_allclose(forward, length, rtol=tolerance)
        np.testing.assert_allclose(backward, gradient, rtol=tolerance, atol=tolerance)

try:
    call("magnitude", np.zeros((2, 4, 5, 3), np.float32))
except ValueError as error:
    assert str(error).startswith("magnitude: displacement: expected shape (N, Y, X, 2) or"), error
else:
    raise AssertionError("a field with a component too many is not refused")
"""


def example_code() -> dict[str, str]:
    """The code of the page by the path in its first line, `// csrc/...` or `// in csrc/...`."""
    first_line = r"// ((?:in )?csrc/\S+)\n"
    blocks = re.findall(rf"^```cpp\n{first_line}(.*?)^```$", PAGE.read_text(), re.M | re.S)
    code = dict(blocks)
    assert len(code) == len(blocks)
    return code


def write_sources(folder: Path) -> None:
    """What the page says to write, in a copy of the sources without any other op."""
    code = example_code()
    csrc = folder / "csrc"
    for layer in ("core", "maths"):
        shutil.copytree(ROOT / "csrc" / layer, csrc / layer)
    shutil.copytree(ROOT / "csrc" / "frontends", csrc / "frontends")
    (csrc / "frontends" / "xla.cpp").write_text(NO_XLA)

    (csrc / "ops" / "magnitude").mkdir(parents=True)
    declaration, line = code.pop("in csrc/ops/table.h"), code.pop("in csrc/ops/table.cpp")
    header = (ROOT / "csrc" / "ops" / "table.h").read_text()
    header, ends = re.subn(r"^(?=\n}  // namespace regkernels)", declaration, header, flags=re.M)
    table = (ROOT / "csrc" / "ops" / "table.cpp").read_text()
    table, others = re.subn(r"^ *add\(\w+_ops\(\)\);\n", "", table, flags=re.M)
    table, places = re.subn(r"^(?=    return all;$)", line, table, flags=re.M)
    assert ends == places == 1 and others > 1
    (csrc / "ops" / "table.h").write_text(header)
    (csrc / "ops" / "table.cpp").write_text(table)
    for path, text in code.items():
        (folder / path).write_text(text)
    (folder / "CMakeLists.txt").write_text(CMAKE_LISTS)


def run(command: list[str], folder: Path) -> None:
    scripts = Path(sys.executable).parent  # of the environment that has the extra `test`
    path = f"{scripts}{os.pathsep}{os.environ.get('PATH', '')}"
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


@needs_sources
def test_the_worked_example_builds_and_computes_lengths_and_their_gradient(tmp_path: Path) -> None:
    write_sources(tmp_path)
    settings = [
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    ]
    run(["cmake", "-S", ".", "-B", "build", "-G", "Ninja", *settings], tmp_path)
    run(["cmake", "--build", "build", "--parallel", "2"], tmp_path)
    run([sys.executable, "-c", COMPUTE], tmp_path / "build")


@needs_sources
def test_the_worked_example_shows_every_file_but_the_one_for_cuda() -> None:
    shown = {Path(path).name for path in example_code() if path.startswith("csrc/ops/magnitude/")}
    parts = {path.name for path in (ROOT / "csrc" / "ops" / "affine_warp").iterdir()}
    own = {name.replace("affine_warp", "magnitude") for name in parts}
    assert shown == own - {"cuda.cu"}


@needs_sources
@pytest.mark.parametrize("folder", ["core", "maths", "resample", "ops/losses"])
def test_the_page_lists_every_file_of_a_folder_that_ops_share(folder: str) -> None:
    heading = re.escape(f"**`{folder}/`**")
    section = re.search(rf"^{heading}.*?(?=^\*\*`|^#)", PAGE.read_text(), re.M | re.S)
    assert section is not None
    rows = re.findall(r"^\| (`.*?) \|", section[0], re.M)
    listed = [name for row in rows for name in re.findall(r"`([^`]+)`", row)]
    assert sorted(listed) == sorted(path.name for path in (ROOT / "csrc" / folder).iterdir())
