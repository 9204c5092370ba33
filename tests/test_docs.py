"""The documentation: every public name has a whole docstring, and the examples in docs/ run."""

from __future__ import annotations

import doctest
import importlib
import inspect
import re
from pathlib import Path

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


PAGES = sorted((Path(__file__).parent.parent / "docs").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_examples_of_a_page_give_what_it_shows(page: Path) -> None:
    """What stands in its blocks of Python, one after the other."""
    blocks = re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    examples = doctest.DocTestParser().get_doctest("\n".join(blocks), {}, page.name, str(page), 0)
    assert examples.examples
    runner = doctest.DocTestRunner(
        optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE, verbose=False
    )
    report: list[str] = []
    runner.run(examples, out=report.append)
    assert not report, "".join(report)
