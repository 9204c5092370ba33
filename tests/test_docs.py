"""The documentation: every public name has a whole docstring, and the examples in docs/ run."""

from __future__ import annotations

import dataclasses
import doctest
import importlib
import inspect
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from command import run
from scenes import header, physical_grid, scene

from jaxreg import registration
from jaxreg.registration import stage_from_name
from regkernels import write_volume

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


DOCS = Path(__file__).parent.parent / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
STAGES = ("moments", "translation", "rigid", "similarity", "affine", "greedy", "svf", "syn")


def rows(text: str, heading: str) -> list[list[str]]:
    """The cells of the table under a heading, without the backquotes, the head left out."""
    section = text.split(f"{heading}\n", 1)[1].split("\n## ")[0]
    table = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip().replace("`", "") for cell in line.split("|")[1:-1]] for line in table[2:]]


@pytest.mark.parametrize("name", STAGES)
def test_the_page_of_a_stage_tells_its_defaults(name: str) -> None:
    fields = dataclasses.fields(stage_from_name(name))
    told = rows((DOCS / "stages" / f"{name}.md").read_text(), "## Settings")
    assert [(row[0], eval(row[1], vars(registration))) for row in told] == [
        (field.name, field.default) for field in fields
    ]


def test_the_overview_tells_the_defaults_of_every_stage() -> None:
    table = rows((DOCS / "stages" / "README.md").read_text(), "# Stages of a registration")
    assert tuple(row[1] for row in table) == STAGES
    for _, name, _, scales, iterations, metric in table:
        stage = stage_from_name(name)
        assert scales == ", ".join(map(str, stage.scales))
        assert re.findall(r"\d+", iterations) == [*map(str, stage.iterations)]
        assert stage.with_metric(metric) == stage


def test_a_setting_is_explained_alike_on_every_page() -> None:
    told = {
        (row[0], *row[2:])
        for name in STAGES
        for row in rows((DOCS / "stages" / f"{name}.md").read_text(), "## Settings")
    }
    assert len(told) == len({setting for setting, *_ in told})


def test_every_link_of_a_page_leads_somewhere() -> None:
    for page in (*PAGES, DOCS.parent / "README.md", DOCS.parent / "CONTRIBUTING.md"):
        for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(#[^)]*)?\)", page.read_text()):
            linked = (page.parent / target) if target else page
            assert linked.exists(), f"{page}: {target}"
            if anchor:
                headings = re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE)
                anchors = {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}
                assert anchor[1:] in anchors, f"{page}: {target}{anchor}"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the pages assume: two images, a mask of one and labels on the other."""
    folder = tmp_path_factory.mktemp("docs")
    fixed, moving = header((30, 32), (3, 3)), header((31, 29), (3.2, 3.1), turn=8)
    fixed = fixed.with_array(scene(physical_grid(fixed)))
    moving = moving.with_array(scene(physical_grid(moving) * 0.95 + 2))
    write_volume(fixed, folder / "fixed.nii.gz")
    write_volume(moving, folder / "moving.nii.gz")
    write_volume(fixed.with_array(np.asarray(fixed.array) > 0.1), folder / "mask.nii.gz")
    write_volume(moving.with_array(np.asarray(moving.array) > 0.5), folder / "labels.nii.gz")
    arguments = ["fixed.nii.gz", "moving.nii.gz", "-o", "out", "--preset", "fast"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run("register", *arguments) == 0
    return folder


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_the_examples_of_a_page_run_in_its_order(
    page: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python, with what it shows where there are prompts, and commands of ours."""
    monkeypatch.chdir(images)
    blocks = re.findall(r"^```(python|sh)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    assert blocks
    names: dict[str, object] = {}
    for language, text in blocks:
        if language == "sh":
            for line in text.splitlines():
                program, *arguments = shlex.split(line)
                assert program == "jaxreg"
                assert run(*arguments) == 0, line
        elif ">>>" in text:
            run_session(text, names, page.name)
        else:
            exec(compile(text, page.name, "exec"), names)


def run_session(text: str, names: dict[str, object], name: str) -> None:
    """Run what stands behind prompts, compare what is shown, and keep the names."""
    examples = doctest.DocTestParser().get_doctest(text, names, name, name, 0)
    runner = doctest.DocTestRunner(
        optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE, verbose=False
    )
    report: list[str] = []
    runner.run(examples, out=report.append, clear_globs=False)
    assert not report, "".join(report)
    names.update(examples.globs)
