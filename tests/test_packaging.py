"""What is installed: an extension that stands alone, and packages that do not need each other."""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from regkernels import namesake

FRAMEWORKS = ("jax", "torch")
FRONTS = ("jaxreg", "torchreg")
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


def test_python_beside_the_sources_is_told_that_they_are_not_compiled(tmp_path: Path) -> None:
    sources = extension_file().parent
    shutil.copytree(sources, tmp_path / "regkernels", ignore=shutil.ignore_patterns("_core*.so"))
    done = run_python("import regkernels", tmp_path, PYTHONPATH="")
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"ImportError: regkernels: {tmp_path / 'regkernels'} has no compiled")
    assert "Start it in another folder" in last


def test_the_middle_loads_without_any_framework(tmp_path: Path) -> None:
    absent = dict.fromkeys((*FRAMEWORKS, "SimpleITK"))
    done = run_python(f"import sys; sys.modules |= {absent!r}; import regkernels", tmp_path)
    assert done.returncode == 0, done.stderr


def test_without_simpleitk_a_file_is_refused_with_what_to_install(tmp_path: Path) -> None:
    Path(tmp_path / "image.nrrd").touch()
    code = (
        "import sys; sys.modules['SimpleITK'] = None\n"
        "import regkernels; regkernels.read_volume('image.nrrd')"
    )
    last = run_python(code, tmp_path).stderr.splitlines()[-1]
    assert last.startswith("ModuleNotFoundError: regkernels reads and writes files through")
    assert last.endswith("pip install 'regkernels[files]'")


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


@pytest.mark.parametrize("package", FRONTS)
def test_only_the_middle_imports_the_extension(package: str) -> None:
    file = importlib.import_module(package).__file__
    assert file is not None
    sources = list(Path(file).parent.rglob("*.py"))
    assert sources
    assert [source for source in sources if re.search(r"\b_core\b", source.read_text())] == []


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


def test_the_packages_have_one_version() -> None:
    versions = {importlib.import_module(package).__version__ for package in PACKAGES}
    assert len(versions) == 1
    # A checkout that was built by hand is not installed.
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        assert versions == {importlib.metadata.version("regkernels")}


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder of packages, searched before all others, with a copy of `torchreg`."""
    file = importlib.import_module("torchreg").__file__
    assert file is not None
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(file).parent, tmp_path / "site" / "torchreg", ignore=ignored)
    return tmp_path / "site"


def run_with(site: Path, code: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter that searches a folder of packages first."""
    paths = [str(site), os.environ.get("PYTHONPATH", "")]
    return run_python(code, site.parent, PYTHONPATH=os.pathsep.join(filter(None, paths)))


def test_a_copy_of_torchreg_is_sound(site: Path) -> None:
    done = run_with(site, "import torchreg; print(torchreg.__file__)")
    assert done.stdout.strip() == str(site / "torchreg" / "__init__.py"), done.stderr


@pytest.mark.parametrize("module", ["torchreg", "torchreg.loss"])
def test_torchreg_beside_the_files_of_its_namesake_is_an_error(module: str, site: Path) -> None:
    """Ours was installed after the other package of this name."""
    for name in ("affine.py", "utils.py"):
        (site / "torchreg" / name).touch()
    done = run_with(site, f"import {module}")
    assert done.returncode != 0
    assert "ImportError: torchreg: " in done.stderr
    assert "affine.py, utils.py" in done.stderr
    assert "pip uninstall torchreg regkernels" in done.stderr


def test_torchreg_beneath_its_namesake_is_an_error(site: Path) -> None:
    """Ours was installed first: what imports is the other, and only our modules can tell."""
    (site / "torchreg" / "affine.py").touch()
    (site / "torchreg" / "__init__.py").write_text("")
    assert run_with(site, "import torchreg").returncode == 0
    for module in ("descriptors", "loss", "smooth", "warp"):
        done = run_with(site, f"import torchreg.{module}")
        assert "pip uninstall torchreg regkernels" in done.stderr, module


def test_info_tells_whose_torchreg_is_imported(site: Path) -> None:
    tell = "from regkernels.info import describe; print(describe()['torchreg'])"
    assert run_python(tell, site.parent).stdout.startswith("ours, ")
    hidden = run_with(site, tell).stdout
    assert hidden.startswith("another package of this name") and str(site / "torchreg") in hidden


def test_what_a_folder_of_torchreg_lacks_or_has_too_much_is_told(site: Path) -> None:
    """A namesake that is uninstalled takes along the file that both had written."""
    folder = site / "torchreg"
    assert namesake.trouble(folder) is None
    (folder / "__init__.py").unlink()
    assert "has lost its __init__.py" in (namesake.trouble(folder) or "")
    (folder / "affine.py").touch()
    assert "affine.py" in (namesake.trouble(folder) or "")
    assert namesake.trouble(site / "archive.zip" / "torchreg") is None


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
