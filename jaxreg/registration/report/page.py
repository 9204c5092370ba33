"""A registration as something to look at: one picture, or one page with all there is to know."""

from __future__ import annotations

import base64
import html
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jaxreg.registration.register import LevelRecord, Registration, StageRecord
from jaxreg.registration.report.pictures import (
    BACKGROUND,
    FAINT,
    TEXT,
    Shown,
    draw_losses,
    draw_slices,
)
from jaxreg.registration.report.viewer import VIEWER_STYLE, viewer
from jaxreg.warp import INVERSE_TOLERANCE
from regkernels.files.atomic import atomic_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["write_comparison", "write_report"]

_STYLE = f"""
body {{ background: {BACKGROUND}; color: {TEXT}; font: 14px/1.45 system-ui, sans-serif;
       max-width: 1430px; margin: 0 auto; padding: 8px 24px 40px; }}
img:not([hidden]) {{ width: 100%; }}
[hidden] {{ display: none !important; }}
h2 {{ font-size: 17px; margin: 28px 0 8px; }}
table {{ border-collapse: collapse; }}
th, td {{ text-align: left; vertical-align: top; padding: 3px 18px 3px 0; }}
th {{ color: {FAINT}; font-weight: normal; white-space: nowrap; }}
.number {{ text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }}
tr.rule > * {{ border-top: 1px solid #2a303a; }}
.doubts {{ border-left: 4px solid #e0a030; padding: 1px 16px; margin: 12px 0; }}
"""


def write_report(
    result: Registration,
    path: str | os.PathLike[str],
    *,
    title: str,
    subtitle: str = "",
    names: tuple[str, str] = ("", ""),
    tables: Mapping[str, Mapping[str, str]] | None = None,
    scores: Mapping[str, Sequence[Sequence[str]]] | None = None,
    dpi: int = 110,
) -> None:
    """Write a registration as a picture, or as a page that holds everything it needs.

    The picture is that of `draw_slices`. With the ending ``.html`` a page is written: the picture,
    sliders that swipe or fade between the fixed and the moved image through the slices, the loss
    curves of each stage and scale, the settings, the transform, and the tables. At its top are the
    reasons why the result may be wrong, if there are any.

    Parameters
    ----------
    result
        From `register`.
    path
        Where to write; the suffix chooses the format. The file appears complete or not at all.
    title, subtitle
        Printed above the panels. A page has a subtitle of its own where there is none.
    names
        What the fixed and the moving image show.
    tables
        What else there is to tell on the page: files, versions and the like. By their headings,
        names and values.
    scores
        What labels and landmarks say, for the page. By their headings, rows of cells; the first row
        has the names of the columns, and the first column those of the rows.
    dpi
        Resolution; the picture is 13 inches wide.
    """
    page = Path(path).suffix.lower() in (".html", ".htm")
    shown = Shown.of_registration(result)
    slices = draw_slices(
        result, shown, title=title, subtitle=subtitle or _subtitle(result), names=names
    )
    with atomic_path(path) as beside:
        if page:
            parts = _parts(result, shown, slices, tables or {}, scores or {}, dpi)
            beside.write_text(_document(title, parts), encoding="utf-8")
        else:
            slices.savefig(beside, dpi=dpi, facecolor=BACKGROUND)


def write_comparison(
    picture: Figure,
    path: str | os.PathLike[str],
    *,
    title: str,
    shown: Shown | None = None,
    names: tuple[str, str] = ("", ""),
    tables: Mapping[str, Mapping[str, str]] | None = None,
    scores: Mapping[str, Sequence[Sequence[str]]] | None = None,
    dpi: int = 110,
) -> None:
    """Write how two images compare as a page that holds everything it needs.

    Parameters
    ----------
    picture
        What is shown first, from `draw_comparison` or `draw_labels`.
    path
        Where to write; the file appears complete or not at all.
    title
        Of the page.
    shown
        The images, for sliders; without it there are none.
    names
        What they show.
    tables, scores, dpi
        As for `write_report`.
    """
    parts = [_image(picture, "slices of the images and what differs", dpi)]
    if shown is not None:
        first, second = (" · ".join(filter(None, (k, n))) for k, n in zip("AB", names, strict=True))
        parts += ["<h2>Slice by slice</h2>", viewer(shown, first, {second: 0})]
    parts += [*_score_tables(scores or {}), *_fact_tables(tables or {})]
    with atomic_path(path) as beside:
        beside.write_text(_document(title, parts), encoding="utf-8")


def _subtitle(result: Registration) -> str:
    stages = ", ".join(stage.name for stage in result.stages) or "no stages"
    seconds = sum(stage.seconds for stage in result.stages)
    folds = result.folds
    return (
        f"{stages}    |    {seconds:.1f} s    |    Jacobian determinant {folds.minimum:.2f} to "
        f"{folds.maximum:.2f}, {100 * folds.share:.4g} % of the voxels folded"
    )


def _document(title: str, parts: Iterable[str]) -> str:
    # The policy forbids browsers to load anything: what the page shows is in it.
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    head = [
        "<!doctype html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}; '
        "script-src 'unsafe-inline'\">",
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<style>{_STYLE}{VIEWER_STYLE}</style></head><body>",
    ]
    return "\n".join([*head, *parts, "</body></html>", ""])


def _parts(
    result: Registration,
    shown: Shown,
    slices: Figure,
    tables: Mapping[str, Mapping[str, str]],
    scores: Mapping[str, Sequence[Sequence[str]]],
    dpi: int,
) -> list[str]:
    losses = draw_losses(result.stages)
    parts = [
        *_doubts(result),
        _image(slices, "slices of the images, the deformed grid and what differs", dpi),
        "<h2>Slice by slice</h2>",
        viewer(shown, "fixed", {"moved": 1, "moving as loaded": 0}),
        *_score_tables(scores),
    ]
    if losses is not None:
        parts += ["<h2>Losses</h2>", _image(losses, "loss curves", dpi)]
    parts += ["<h2>Stages</h2>", _stages(result), "<h2>Affine</h2>", _matrix(result)]
    if result.transform.displacement is not None:
        tables = {"Deformation": _deformation(result), **tables}
    return [*parts, *_fact_tables(tables)]


def _score_tables(scores: Mapping[str, Sequence[Sequence[str]]]) -> list[str]:
    return [f"<h2>{html.escape(heading)}</h2>{_scores(rows)}" for heading, rows in scores.items()]


def _fact_tables(tables: Mapping[str, Mapping[str, str]]) -> list[str]:
    parts = []
    for heading, facts in tables.items():
        rows = "".join(f"<tr>{_cells([name], 'th')}{_cells([v])}</tr>" for name, v in facts.items())
        parts += [f"<h2>{html.escape(heading)}</h2>", f"<table>{rows}</table>"]
    return parts


def _doubts(result: Registration) -> tuple[str, ...]:
    if not result.doubts:
        return ()
    items = "".join(
        f"<li><b>{html.escape(doubt.code)}</b>: {html.escape(doubt.text)}</li>"
        for doubt in result.doubts
    )
    return (f"<div class=doubts><h2>This may be wrong</h2><ul>{items}</ul></div>",)


def _image(figure: Figure, description: str, dpi: int) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, facecolor=BACKGROUND)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(description)}" src="data:image/png;base64,{data}">'


def _scores(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    lines = [f"<tr>{_cells(head[:1], 'th')}{_cells(head[1:], 'th', 'number')}</tr>"]
    lines += [f"<tr>{_cells(row[:1])}{_cells(row[1:], 'td', 'number')}</tr>" for row in body]
    return f"<table>{''.join(lines)}</table>"


def _stages(result: Registration) -> str:
    names = ("stage", "resolution", "grid", "iterations", "first loss", "last loss", "settings")
    numbers = _cells(names[1:-1], "th", "number")
    rows = [f"<tr>{_cells(names[:1], 'th')}{numbers}{_cells(names[-1:], 'th')}</tr>"]
    for stage in result.stages:
        settings = ", ".join(f"{name} = {value}" for name, value in stage.settings.record().items())
        span = len(stage.levels)
        for number, level in enumerate(stage.levels):
            values = (
                f"1/{level.scale:g}",
                " x ".join(map(str, level.shape[::-1])),
                _iterations(stage, level),
                *(f"{loss:.5g}" for loss in (*level.losses[:1], *level.losses[-1:]) or ("", "")),
            )
            cells = _cells(values, "td", "number")
            if number == 0:
                cells = (
                    f'<td rowspan="{span}">{html.escape(stage.name)}<br>{stage.seconds:.1f} s</td>'
                    f'{cells}<td rowspan="{span}">{html.escape(settings)}</td>'
                )
            rows.append(f"<tr{' class=rule' if number == 0 else ''}>{cells}</tr>")
    return f"<table>{''.join(rows)}</table>"


def _iterations(stage: StageRecord, level: LevelRecord) -> str:
    if not stage.settings.iterations:
        return ""
    return f"{len(level.losses)}{', converged' if level.converged else ''}"


def _matrix(result: Registration) -> str:
    rows = (
        f"<tr>{_cells([f'{value:.6f}' for value in row], 'td', 'number')}</tr>"
        for row in result.transform.matrix
    )
    return f"<p>Fixed to moving, millimetres, LPS.</p><table>{''.join(rows)}</table>"


def _deformation(result: Registration) -> dict[str, str]:
    folds, residual = result.folds, result.inverse_residual
    off = f"mean {residual.mean:.2g}, at most {residual.maximum:.2g} voxels"
    missed = f"no inverse to {INVERSE_TOLERANCE:g} voxels"
    return {
        "Jacobian determinant": f"{folds.minimum:.3f} to {folds.maximum:.3f}",
        "not positive": f"{100 * folds.share:.4g} % of the voxels",
        "residual of the inverse": off,
        missed: f"{100 * residual.share:.4g} % of the voxels",
    }


def _cells(texts: Sequence[str] | Iterable[str], tag: str = "td", kind: str = "") -> str:
    start = f"<{tag} class={kind}>" if kind else f"<{tag}>"
    return "".join(f"{start}{html.escape(text)}</{tag}>" for text in texts)
