"""The documentation as a site, for Sphinx: `make docs`.

Whatever a reader's browser needs lies in the folder that is built, so that it opens from a disk and
without a network: formulas are MathML, which browsers set by themselves, and fonts the system's.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.domains.python import PyObject
from sphinx.util import logging

import regkernels

ROOT = Path(__file__).parent.parent

project = "regkernels"
copyright = "the authors of regkernels, Apache-2.0"
release = version = regkernels.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_static"]
default_role = "py:obj"  # `name` in a docstring is a link where there is such a thing

html_theme = "furo"
html_title = f"regkernels {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_math_renderer = "mathml"
# Light and dark alike keep the contrast of 4.5 that small text needs.
pygments_style = "default"
pygments_dark_style = "native"

myst_heading_anchors = 3
myst_enable_extensions = ["dollarmath"]
myst_fence_as_directive = ["math"]

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "description"  # where a docstring has no shape in their place
autodoc_typehints_description_target = "documented"
autodoc_type_aliases = {"ArrayLike": "ArrayLike"}
autodoc_preserve_defaults = True
autodoc_class_signature = "mixed"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
napoleon_google_docstring = False
napoleon_use_ivar = True
highlight_language = "none"  # of formulas; blocks of code say what they are


_PAGE_OF_A_FILE = re.compile(r"^This page is \[[^]]*\]\(([^)]*)\)\.$", re.MULTILINE)
_LINK = re.compile(r"\]\((?!https?:)([^)#\s]+)(#[^)]*)?\)")


def _file_of(page: Path) -> str | None:
    """The file, from the root of the repository, that a page stands for."""
    found = _PAGE_OF_A_FILE.search(page.read_text(encoding="utf-8"))
    return posixpath.normpath(f"docs/{found[1]}") if found else None


PAGES = {path: page.name for page in Path(__file__).parent.glob("*.md") if (path := _file_of(page))}


def put_file_in_place_of_page(app: Sphinx, docname: str, source: list[str]) -> None:
    """Read a page that stands for a file of the repository from that file, links adapted."""
    path = {page.removesuffix(".md"): path for path, page in PAGES.items()}.get(docname)
    if path is None:
        return

    def adapted(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(path), link[1]))
        page = PAGES.get(target) or posixpath.relpath(target, "docs")
        return f"]({page}{link[2] or ''})"

    app.env.note_dependency(str(ROOT / path))
    source[0] = _LINK.sub(adapted, (ROOT / path).read_text(encoding="utf-8"))


def lead_to_pages(app: Sphinx, docname: str, source: list[str]) -> None:
    """Let links to files that have a page here lead to it."""

    def adapted(link: re.Match[str]) -> str:
        folder = posixpath.dirname(f"docs/{docname}")
        page = PAGES.get(posixpath.normpath(posixpath.join(folder, link[1])))
        if page is None or f"{docname}.md" == page:
            return link[0]
        return f"]({posixpath.relpath(f'docs/{page}', folder)}{link[2] or ''})"

    source[0] = _LINK.sub(adapted, source[0])


def adapt_docstring(
    app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]
) -> None:
    """Put what numpydoc allows and the parser does not in a form that it understands."""
    text = "\n".join(lines)
    # A shape such as [N, C, *S] is no beginning of emphasis.
    text = re.sub(r"(``.*?``)|\*(?=[A-Z]\b)", lambda m: m[1] or r"\*", text)
    # An entry for several fields becomes several entries.
    head, heading, fields = text.partition("Attributes\n----------\n")
    fields = re.sub(
        r"^(\w+(?:, \w+)+)\n((?: .*\n?)+)",
        lambda m: "".join(f"{field}\n{m[2].rstrip()}\n" for field in m[1].split(", ")),
        fields,
        flags=re.MULTILINE,
    )
    lines[:] = (head + heading + fields).split("\n")


def leave_out_tuple_fields(
    app: Sphinx, what: str, name: str, thing: Any, skip: bool, options: Any
) -> bool | None:
    """A field of a named tuple is told in its class; by itself it says that it is an alias."""
    return True if (getattr(thing, "__doc__", None) or "").startswith("Alias for field") else None


def warn_of_formulas_set_as_text(app: Sphinx, doctree: nodes.document) -> None:
    """An indented formula in a docstring runs together unless `::` stands before it."""
    if app.env.docname.startswith("api/"):
        for quote in doctree.findall(nodes.block_quote):
            logging.getLogger(__name__).warning(
                "indented text without '::' before it: %s", quote.astext()[:60], location=quote
            )


def name_array_like(app: Sphinx, doctree: nodes.document) -> None:
    """Call the type `ArrayLike` by its name, in unions, too."""
    for text in list(doctree.findall(nodes.Text)):
        if "TypeAliasForwardRef" in text:
            named = re.sub(r"TypeAliasForwardRef\('(\w+)'\)", r"\1", text)
            text.parent.replace(text, nodes.Text(named))


def set_inline_formula(writer: Any, node: nodes.math) -> None:
    """Write a formula within a line as MathML."""
    writer.body.append(tex2mathml(node.astext()))
    raise nodes.SkipNode


def set_formula(writer: Any, node: nodes.math_block) -> None:
    """Write a formula of its own as MathML, which scrolls by itself where it is too wide."""
    writer.body.append(f'<div class="math">{tex2mathml(node.astext(), as_block=True)}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    next(field for field in PyObject.doc_field_types if field.name == "variable").label = "Fields"
    app.add_html_math_renderer("mathml", (set_inline_formula, None), (set_formula, None))
    app.connect("source-read", put_file_in_place_of_page)
    app.connect("source-read", lead_to_pages)
    # Before napoleon, which asks at the usual priority of 500.
    app.connect("autodoc-process-docstring", adapt_docstring, priority=400)
    app.connect("autodoc-skip-member", leave_out_tuple_fields)
    app.connect("doctree-read", name_array_like)
    app.connect("doctree-read", warn_of_formulas_set_as_text)
    return {"parallel_read_safe": True}
