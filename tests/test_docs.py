"""The API reference (``make docs``) is made of docstrings: every public name has a whole one."""

from __future__ import annotations

import importlib
import inspect

import pytest

PUBLIC = [
    (module, name)
    for module in ("jaxreg", "torchreg", "jaxreg.registration")
    for name in importlib.import_module(module).__all__
]


def sections(documented: str) -> dict[str, str]:
    """The text of a numpydoc docstring by section, what comes before the first one left out."""
    lines = documented.splitlines()
    starts = [k - 1 for k, line in enumerate(lines) if k and line and set(line) == {"-"}]
    ends = [*starts, len(lines)][1:]
    return {
        lines[start]: "\n".join(lines[start + 2 : end])
        for start, end in zip(starts, ends, strict=True)
    }


@pytest.mark.parametrize("module,name", PUBLIC)
def test_every_public_name_is_documented(module: str, name: str) -> None:
    thing = getattr(importlib.import_module(module), name)
    if not isinstance(thing, type) and not inspect.isfunction(thing):
        return  # an alias of a type
    documented = inspect.getdoc(thing)
    assert documented
    if not inspect.isfunction(thing):
        return
    found, signature = sections(documented), inspect.signature(thing)
    if signature.parameters:
        described = found["Parameters"]
        names = {
            entry.strip().lstrip("*")
            for line in described.splitlines()
            if line and not line[0].isspace()
            for entry in line.split(":")[0].split(",")
        }
        assert names == set(signature.parameters)
    if signature.return_annotation not in (None, "None"):
        assert found["Returns"].strip()
    assert set(found) <= {"Parameters", "Returns", "Raises", "Notes", "References", "Examples"}


@pytest.mark.parametrize("module", ["jaxreg", "torchreg"])
def test_every_op_tells_its_errors(module: str) -> None:
    package = importlib.import_module(module)
    for name in package.__all__:
        thing = getattr(package, name)
        if not inspect.isfunction(thing) or not inspect.signature(thing).parameters:
            continue
        raises = sections(inspect.getdoc(thing) or "")["Raises"]
        assert "ValueError" in raises and "TypeError" in raises, name
