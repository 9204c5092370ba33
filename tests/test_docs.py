"""The documentation: public names have whole docstrings and are listed; what pages show runs."""

from __future__ import annotations

import dataclasses
import doctest
import importlib
import inspect
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from command import run
from scenes import header, physical_grid, scene

from jaxreg import registration
from jaxreg.registration import stage_from_name
from regkernels import write_volume

PUBLIC = [
    (module, name)
    for module in (
        "jaxreg",
        "torchreg",
        "torchreg.fireants",
        "torchreg.monai",
        "torchreg.voxelmorph",
        "jaxreg.registration",
    )
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


@pytest.mark.parametrize("module", ["regkernels", *dict.fromkeys(module for module, _ in PUBLIC)])
def test_every_public_name_is_in_the_reference(module: str) -> None:
    told: set[str] = set()
    current = ""
    page = DOCS / "api" / f"{module.split('.')[-1]}.rst"
    for directive, name in re.findall(r"^\.\. (\w+):: (\S+)$", page.read_text(), re.MULTILINE):
        if directive == "currentmodule":
            current = name
        elif directive in ("autofunction", "autoclass", "autodata"):
            told.add(name if "." in name else f"{current}.{name}")
    names = set(importlib.import_module(module).__all__) - {"__version__"}
    assert told == {f"{module}.{name}" for name in names}


@pytest.mark.parametrize("module", ["jaxreg", "torchreg"])
def test_every_op_tells_its_errors(module: str) -> None:
    package = importlib.import_module(module)
    for name in package.__all__:
        thing = getattr(package, name)
        if not inspect.isfunction(thing) or not inspect.signature(thing).parameters:
            continue
        raises = sections(inspect.getdoc(thing) or "")["Raises"]
        assert "ValueError" in raises and "TypeError" in raises, name


ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
STAGES = ("moments", "translation", "rigid", "similarity", "affine", "greedy", "svf", "syn", "ffd")


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


def test_the_numbers_of_the_readme_are_those_of_the_benchmarks() -> None:
    text = (ROOT / "README.md").read_text()
    told = rows(text, "# regkernels")
    numbers = re.findall(r"\d+\.\d+", " ".join(cell for row in told for cell in row[1:]))
    numbers += re.findall(r"in (\d+) MiB where MONAI, compiled, takes (\d+)", text)[0]
    known = re.findall(r"\d+(?:\.\d+)?", (DOCS / "benchmarks.md").read_text())
    assert len(numbers) >= 8 and set(numbers) <= set(known)


def without_code(text: str) -> str:
    """A page without its blocks of code, in which brackets are no links."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def test_every_link_of_a_page_leads_somewhere() -> None:
    files = [ROOT / name for name in ("CONTRIBUTING.md", "csrc/README.md", "benchmarks/NOTES.md")]
    for page in (*PAGES, *files):
        text = without_code(page.read_text())
        for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(#[^)]*)?\)", text):
            linked = (page.parent / target) if target else page
            if target == "api/index":  # of Sphinx: not Markdown
                linked = linked.with_suffix(".rst")
            assert linked.exists(), f"{page}: {target}"
            if anchor:
                headings = re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE)
                anchors = {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}
                assert anchor[1:] in anchors, f"{page}: {target}{anchor}"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the pages assume: two images, mask and points of one, labels on the other."""
    folder = tmp_path_factory.mktemp("docs")
    fixed, moving = header((30, 32), (3, 3)), header((31, 29), (3.2, 3.1), turn=8)
    fixed = fixed.with_array(scene(physical_grid(fixed)))
    moving = moving.with_array(scene(physical_grid(moving) * 0.95 + 2))
    write_volume(fixed, folder / "fixed.nii.gz")
    write_volume(moving, folder / "moving.nii.gz")
    write_volume(fixed.with_array(np.asarray(fixed.array) > 0.1), folder / "mask.nii.gz")
    write_volume(moving.with_array(np.asarray(moving.array) > 0.5), folder / "labels.nii.gz")
    (folder / "points.csv").write_text("x,y,label\n0,0,middle\n18,-8,left\n")
    return folder


@pytest.fixture(scope="module")
def images_and_out(images: Path) -> Path:
    """With `out`, what `jaxreg register` makes of them."""
    arguments = ["fixed.nii.gz", "moving.nii.gz", "-o", "out", "--preset", "fast"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(images)
        assert run("register", *arguments) == 0
    return images


@pytest.fixture
def few_threads() -> Iterator[None]:
    """For tiny tensors: PyTorch's threads would wait for each other longer than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def blocks_of(page: Path) -> list[tuple[str, str]]:
    """What a page shows in fences, with the language of each."""
    text = page.read_text()
    found = re.findall(r"^```([^\n]*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert 2 * len(found) == len(re.findall(r"^ *```", text, re.MULTILINE)), "a fence is not closed"
    return found


def is_run(language: str) -> bool:
    return language in ("python", "sh")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_shows_is_run_or_said_to_be_something_else(page: Path) -> None:
    """Commands of other programs are `console` and sessions with them `pycon`."""
    others = {"", "console", "pycon", "cpp", "{toctree}"}
    assert {language for language, _ in blocks_of(page)} <= {"python", "sh"} | others


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if any(is_run(language) for language, _ in blocks_of(page))],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_the_examples_of_a_page_run_in_its_order(
    page: Path,
    images: Path,
    few_threads: None,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Python, with what it shows where there are prompts, and commands of ours."""
    monkeypatch.chdir(images)
    blocks = [(language, text) for language, text in blocks_of(page) if is_run(language)]
    if any("out/" in text for _, text in blocks):
        request.getfixturevalue("images_and_out")
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
