"""What is installed: an extension that stands alone, and packages that do not need each other."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FRAMEWORKS = ("jax", "torch")
PACKAGES = {"regkernels": FRAMEWORKS, "jaxreg": ("torch",), "torchreg": ("jax",)}


def run_python(code: str, tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter, away from the source tree."""
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def extension_file() -> Path:
    file = importlib.import_module("regkernels._core").__file__
    assert file is not None
    return Path(file)


@pytest.mark.parametrize(("package", "others"), PACKAGES.items())
def test_importing_a_package_prints_nothing_and_leaves_other_frameworks_and_cuda_alone(
    package: str, others: tuple[str, ...], tmp_path: Path
) -> None:
    others = (*others, "SimpleITK", "matplotlib")
    code = (
        f"import {package}, sys\n"
        f"assert not [x for x in {others!r} if x in sys.modules]\n"
        "assert 'torch' not in sys.modules or not sys.modules['torch'].cuda.is_initialized()\n"
    )
    done = run_python(code, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# A platform that does not exist is an error as soon as JAX looks for devices.
NOWHERE = {"CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "nowhere"}


@pytest.mark.parametrize("package", PACKAGES)
def test_importing_a_package_needs_no_device_and_starts_no_backend(
    package: str, tmp_path: Path
) -> None:
    done = run_python(f"import {package}", tmp_path, **NOWHERE)
    assert done.returncode == 0, done.stderr


def test_a_backend_that_starts_would_be_noticed(tmp_path: Path) -> None:
    assert run_python("import jax; jax.devices()", tmp_path, **NOWHERE).returncode != 0


def test_the_middle_loads_without_any_framework(tmp_path: Path) -> None:
    absent = dict.fromkeys((*FRAMEWORKS, "SimpleITK"))
    done = run_python(f"import sys; sys.modules |= {absent!r}; import regkernels", tmp_path)
    assert done.returncode == 0, done.stderr


def needed_libraries(file: Path) -> list[str]:
    """The shared libraries that an ELF file asks the loader for."""
    done = subprocess.run(
        ["readelf", "-dW", str(file)],
        env={**os.environ, "LC_ALL": "C"},
        capture_output=True,
        text=True,
        check=True,
    )
    return re.findall(r"\(NEEDED\)\s+Shared library: \[([^\]]+)\]", done.stdout)


def test_the_extension_links_the_system_only() -> None:
    """No libtorch, no jaxlib, no CUDA runtime or driver: it imports where none is installed."""
    libraries = needed_libraries(extension_file())
    assert libraries
    system = r"(lib(c|m|gcc_s|stdc\+\+|pthread|dl|rt)\.so\.\d+|ld-linux.*\.so\.\d+)"
    assert [name for name in libraries if not re.fullmatch(system, name)] == []


def test_the_extension_has_no_path_into_the_machine_that_built_it() -> None:
    done = subprocess.run(
        ["readelf", "-dW", str(extension_file())], capture_output=True, text=True, check=True
    )
    for line in done.stdout.splitlines():
        if "RPATH" in line or "RUNPATH" in line:
            assert "$ORIGIN" in line, line


def names_in(stub: Path) -> set[str]:
    names = set()
    for node in ast.parse(stub.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


def test_the_extension_has_a_stub_with_its_every_public_name() -> None:
    module = importlib.import_module("regkernels._core")
    stub = extension_file().parent / "_core.pyi"
    public = {name for name in dir(module) if not name.startswith("_")}
    assert public
    assert {name for name in names_in(stub) if not name.startswith("_")} == public


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_are_typed(package: str) -> None:
    file = importlib.import_module(package).__file__
    assert file is not None
    assert (Path(file).parent / "py.typed").is_file()


def test_info_tells_versions_and_what_was_compiled(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "regkernels"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    facts = ["jax ", "jaxlib", "torch", "FFI API", "CUDA architectures", "devices", "backends"]
    for fact in facts:
        assert re.search(rf"^.*{fact}.*\S", done.stdout, re.MULTILINE), done.stdout


@pytest.mark.parametrize("setting", ["0", "-2", "many"])
def test_a_thread_count_that_makes_no_sense_is_an_error_or_ignored_but_never_a_crash(
    setting: str, tmp_path: Path
) -> None:
    code = (
        "import torch, torchreg\n"
        "try:\n    print(torchreg.gaussian_smooth(torch.ones(1, 1, 3, 4), 1.0).shape)\n"
        "except ValueError as error:\n    assert 'REGKERNELS_NUM_THREADS' in str(error)\n"
    )
    done = run_python(code, tmp_path, REGKERNELS_NUM_THREADS=setting)
    assert done.returncode == 0, done.stderr
