"""Dependencies point inwards, and each layer knows only those below it."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[1] / "csrc"
LAYERS = ("core", "maths", "resample", "ops", "frontends")  # each may include those before it
FRAMEWORK_HEADERS = re.compile(r"^(xla|pybind11|torch|ATen|c10|Python\.h)(/|$)")

needs_sources = pytest.mark.skipif(not CSRC.is_dir(), reason="the C++ sources are not here")


def sources(layer: str) -> list[Path]:
    return [
        file for file in sorted((CSRC / layer).rglob("*")) if file.suffix in (".h", ".cpp", ".cu")
    ]


def included(file: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s+[<"]([^>"]+)[>"]', file.read_text(), re.MULTILINE)


def python_files(package: str) -> list[Path]:
    file = importlib.import_module(package).__file__
    assert file is not None
    return sorted(Path(file).parent.rglob("*.py"))


def imported(file: Path, root: Path) -> Iterator[str]:
    """Dotted names of what a module imports, wherever in it: `a.b` for `from a import b`, too."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = file.relative_to(root).parts[: -node.level] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{name.name}" for name in node.names)


def imports_of(package: str) -> list[tuple[Path, str]]:
    """(module's path from the folder of the packages, dotted name) of all imports of a package."""
    found = []
    for file in python_files(package):
        root = next(folder for folder in file.parents if folder.name == package).parent
        found += [(file.relative_to(root), name) for name in imported(file, root)]
    return found


def is_or_is_in(name: str, module: str) -> bool:
    return name == module or name.startswith(module + ".")


@needs_sources
def test_every_folder_of_the_sources_is_a_layer() -> None:
    assert {folder.name for folder in CSRC.iterdir() if folder.is_dir()} == set(LAYERS)


@needs_sources
@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_includes_only_itself_and_those_below(layer: str) -> None:
    assert sources(layer)
    above = LAYERS[LAYERS.index(layer) + 1 :]
    wrong = [
        f"{file.relative_to(CSRC)} includes {header}"
        for file in sources(layer)
        for header in included(file)
        if header.split("/")[0] in above
    ]
    assert wrong == []


@needs_sources
@pytest.mark.parametrize("layer", LAYERS[:-1])
def test_only_frontends_include_headers_of_a_framework(layer: str) -> None:
    wrong = [
        f"{file.relative_to(CSRC)} includes {header}"
        for file in sources(layer)
        for header in included(file)
        if FRAMEWORK_HEADERS.match(header)
    ]
    assert wrong == []


@needs_sources
def test_headers_are_included_by_their_path_from_the_folder_of_the_sources() -> None:
    """So that the rules above can be read off the lines."""
    wrong = [
        f"{file.relative_to(CSRC)} includes {header}"
        for layer in LAYERS
        for file in sources(layer)
        for header in re.findall(r'^\s*#\s*include\s+"([^"]+)"', file.read_text(), re.MULTILINE)
        if not (CSRC / header).is_file() and not FRAMEWORK_HEADERS.match(header)
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("package", "other"),
    [
        ("regkernels", "jaxreg"),
        ("regkernels", "torchreg"),
        ("jaxreg", "torchreg"),
        ("torchreg", "jaxreg"),
        ("regkernels", "jaxreg_cli"),
        ("torchreg", "jaxreg_cli"),
        ("jaxreg_cli", "torchreg"),
    ],
)
def test_a_package_never_imports_one_that_is_beside_or_above_it(package: str, other: str) -> None:
    wrong = [f"{file}: {name}" for file, name in imports_of(package) if is_or_is_in(name, other)]
    assert wrong == []


@pytest.mark.parametrize("package", ["jaxreg", "torchreg"])
def test_only_regkernels_imports_the_extension(package: str) -> None:
    """The one module, or folder, of a package that calls kernels is handed it by `regkernels`."""
    wrong = [
        f"{file}: {name}"
        for file, name in imports_of(package)
        if is_or_is_in(name, "regkernels._core") and file.parts[1].removesuffix(".py") != "_ops"
    ]
    assert wrong == []
