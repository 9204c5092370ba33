"""Libraries of CUDA are loaded before JAX asks for them: here others take their places."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import regkernels._core

CODE = """
import os, sys, threading
from pathlib import Path
from jaxreg_cli.libraries import THREAD, begin_to_load

begin_to_load()
while working := [thread for thread in threading.enumerate() if thread.name == THREAD]:
    working[0].join()
assert os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1") == "1"  # what JAX sets when it is imported
assert not {"jax", "numpy", "nvidia", "jax_plugins"} & sys.modules.keys()
lines = Path("/proc/self/maps").read_text().splitlines()
print(*sorted({Path(line.split()[-1]).name for line in lines if sys.argv[1] in line}))
"""

PLUGIN, LIBRARY = "xla_cuda_plugin.so", "libcublas.so.99"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="CUDA is loaded ahead on Linux")


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A folder of packages with libraries in the places of those of CUDA."""
    packages = tmp_path / "packages"
    names = "jax_plugins/xla_cuda99", "nvidia/cublas/lib", "nvidia/other/lib"
    plugin, cublas, other = (packages / name for name in names)
    for folder in (plugin, cublas, other):
        folder.mkdir(parents=True)
    shutil.copy(regkernels._core.__file__, plugin / PLUGIN)
    shutil.copy(regkernels._core.__file__, cublas / LIBRARY)
    shutil.copy(regkernels._core.__file__, other / "libother.so.1")  # which JAX does not load
    (other / "libcudnn.so.9").write_text("no library")
    return packages


def loaded(packages: Path, platforms: str) -> list[str]:
    """Which of the libraries a process loads."""
    root = Path(__file__).parents[2]
    # Namespaces such as `nvidia` join what is in all folders: of others nothing may be loaded.
    code = f"import sys; sys.path[:0] = {[str(packages), str(root)]!r}\n{CODE}"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code, str(packages)],
        cwd=packages,
        env={**os.environ, "JAX_PLATFORMS": platforms},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize("platforms", ["", "cuda", "cpu,gpu"])
def test_what_jax_loads_for_a_gpu_is_loaded_and_nothing_is_imported(
    installed: Path, platforms: str
) -> None:
    assert loaded(installed, platforms) == [LIBRARY, PLUGIN]


def test_nothing_is_loaded_for_another_platform(installed: Path) -> None:
    assert loaded(installed, "cpu") == []


def test_nothing_is_loaded_where_jax_has_no_gpu(installed: Path) -> None:
    shutil.rmtree(installed / "jax_plugins")
    assert loaded(installed, "") == []
