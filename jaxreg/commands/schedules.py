"""Stages with their settings, as text: of an option, a recipe or the record of a registration."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from jaxreg.commands.inputs import naming
from jaxreg.registration import (
    LNCC,
    MI,
    MIND,
    MSE,
    NCC,
    NMI,
    Bending,
    CoarseToFine,
    Curvature,
    Diffusion,
    Divergence,
    Elasticity,
    Jacobian,
    PerChannel,
    Stage,
    stage_from_name,
)

__all__ = ["Like", "Recipe", "Schedule", "StageTexts", "read_schedule"]

_METRICS = (LNCC, MI, MIND, MSE, NCC, NMI, CoarseToFine, PerChannel)
_PENALTIES = (Bending, Curvature, Diffusion, Divergence, Elasticity, Jacobian)
_KINDS: Mapping[str, type] = {kind.__name__.lower(): kind for kind in (*_METRICS, *_PENALTIES)}

StageTexts = Annotated[
    list[str] | None,
    typer.Option(
        "--stage",
        metavar='"NAME SETTING=VALUE ..."',
        help='A stage with its settings, "affine metric=MI(num_bins=64) scales=4,2,1 '
        'iterations=200,100,50", say; the others have their defaults, which the page of each stage '
        "lists. Give several in their order, instead of --stages, --metric and --preset.",
    ),
]
Recipe = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE.toml",
        help="The same in a file: for each stage a table [[stages]] with its name and settings; "
        "clip and match_histogram, as the options, before them.",
    ),
]
Like = Annotated[
    Path | None,
    typer.Option(
        metavar="registration.json",
        help="The stages of an earlier run, and what metrics saw of intensities, from its record.",
    ),
]


class Schedule(NamedTuple):
    """What to run.

    Attributes
    ----------
    stages
        In their order.
    clip
        As ``--clip`` takes it; `None`: nothing is said.
    match_histogram
        Whether histograms are matched.
    """

    stages: tuple[Stage, ...]
    clip: str | None = None
    match_histogram: bool = False


def read_schedule(
    texts: Sequence[str] | None, recipe: Path | None, like: Path | None, **others: object
) -> Schedule | None:
    """Return what one of the options says, or `None` if none of them was given.

    Parameters
    ----------
    texts, recipe, like
        What ``--stage``, ``--recipe`` and ``--like`` say.
    **others
        Options that cannot be beside one of them, by name, `None` where they were not given.

    Raises
    ------
    ValueError
        If two were given, a file is missing or says something else, or for a stage, a setting or a
        value that there is not.
    """
    ways = {"stage": texts or None, "recipe": recipe, "like": like}
    given = [name for name, value in {**ways, **others}.items() if value is not None]
    if not any(name in ways for name in given):
        return None
    if len(given) > 1:
        raise ValueError(f"--{given[0]}: expected no --{given[1]} beside it")
    with naming(f"--{given[0]}"):
        if recipe is not None:
            return _read_recipe(recipe)
        if like is not None:
            return _read_record(like)
        return Schedule(tuple(map(_stage_of_text, texts or ())))


_BRACKETS = r"\([^()]*\)"
for _ in range(2):
    _BRACKETS = rf"\((?:[^()]|{_BRACKETS})*\)"
_SETTING = re.compile(rf"\s+(\w+)=((?:{_BRACKETS}|[^\s()])+)")
"""A value has no spaces but within brackets, in which there may be brackets twice more."""


def _stage_of_text(text: str) -> Stage:
    name, _, rest = text.strip().partition(" ")
    found = list(_SETTING.finditer(f" {rest}"))
    left = _SETTING.sub("", f" {rest}").strip()
    if left:
        raise ValueError(f"{text}: expected settings as NAME=VALUE, got {left!r}")
    settings = {match[1]: match[2] for match in found}
    if len(settings) < len(found):
        raise ValueError(f"{text}: expected each setting once")
    try:
        return _stage(name, settings)
    except ValueError as error:
        raise ValueError(f"{text}: {error}") from error


def _read_recipe(path: Path) -> Schedule:
    try:
        recipe = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a file in TOML: {error}") from error
    known = ("stages", "clip", "match_histogram")
    unknown = sorted(set(recipe) - set(known))
    if unknown:
        raise ValueError(f"{path}: expected some of {', '.join(known)}, got {', '.join(unknown)}")
    return _schedule(path, recipe, lambda table: {k: v for k, v in table.items() if k != "name"})


def _read_record(path: Path) -> Schedule:
    try:
        record = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a record of a registration: {error}") from error
    return _schedule(path, record, lambda table: table["settings"])


def _schedule(
    path: Path, said: Any, settings: Callable[[dict[str, Any]], dict[str, Any]]
) -> Schedule:
    try:
        stages = tuple(_stage(table["name"], settings(table)) for table in said["stages"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected stages with their names and settings") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not stages:
        raise ValueError(f"{path}: expected stages, got none")
    clip = said.get("clip", ()) or "none"
    if isinstance(clip, list):
        clip = ",".join(map(str, clip))
    matching = said.get("match_histogram", False)
    if not isinstance(matching, bool):
        raise ValueError(f"{path}: match_histogram: expected true or false, got {matching!r}")
    return Schedule(stages, clip if "clip" in said else None, matching)


def _stage(name: str, settings: Mapping[str, Any]) -> Stage:
    """Return a stage of settings that may be text, with the types of its defaults."""
    defaults = stage_from_name(name)
    values = {
        key: value if isinstance(getattr(defaults, key, None), str) else _value(key, value)
        for key, value in settings.items()
    }
    for key, value in values.items():
        if isinstance(getattr(defaults, key, None), tuple) and not isinstance(value, tuple):
            values[key] = (value,)  # of one level
    try:
        return stage_from_name(name, **values)
    except TypeError as error:
        raise ValueError(f"stage {name}: {error}") from error


def _value(key: str, value: Any) -> Any:
    if isinstance(value, list):
        return tuple(value)
    if not isinstance(value, str):
        return value
    if value.lower() in ("none", "true", "false"):
        value = value.capitalize()
    try:
        return _built(ast.parse(value, mode="eval").body)
    except (SyntaxError, ValueError) as error:
        reason = "" if isinstance(error, SyntaxError) else f" ({error})"
        raise ValueError(f"{key}: expected a value, got {value!r}{reason}") from error


def _built(node: ast.expr) -> Any:
    """Return what an expression of literals, metrics and penalties stands for."""
    if isinstance(node, ast.Tuple | ast.List):
        return tuple(map(_built, node.elts))
    if isinstance(node, ast.Name):
        return _made(node.id, {})
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.args:
        return _made(node.func.id, {str(x.arg): _built(x.value) for x in node.keywords})
    return ast.literal_eval(node)


def _made(name: str, settings: dict[str, Any]) -> Any:
    if name.lower() not in _KINDS:
        known = ", ".join(kind.__name__ for kind in _KINDS.values())
        raise ValueError(f"expected numbers, or one of {known}, got {name}")
    kind = _KINDS[name.lower()]
    fields = [field.name for field in dataclasses.fields(kind)]
    unknown = ", ".join(sorted(set(settings) - set(fields)))
    if unknown:
        raise ValueError(
            f"{kind.__name__}: expected settings among {', '.join(fields)}, got {unknown}"
        )
    return kind(**settings)
