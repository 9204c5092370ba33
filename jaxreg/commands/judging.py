"""What judges a registration that was not told of it: labels and landmarks of both images."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from jaxreg.commands.doubts import listed
from jaxreg.commands.inputs import naming, read_image
from jaxreg.registration import (
    Transform,
    dice,
    hausdorff_distance,
    resample,
    target_registration_error,
)
from jaxreg_cli.telling import warn
from regkernels import DisplacementField, PointSet, Volume, read_points

__all__ = ["Judgement", "Judging", "LabelScore", "format_score", "label_table", "read_labels"]

_FIXED_LABELS, _MOVING_LABELS = "--fixed-labels", "--moving-labels"
_FIXED_POINTS, _MOVING_POINTS = "--fixed-points", "--moving-points"


class LabelScore(NamedTuple):
    """How well a label fits; distances in millimetres, NaN where there is none of it."""

    dice: float
    hausdorff: float
    hausdorff_95: float

    @classmethod
    def of_maps(cls, labels_a: Volume, labels_b: Volume) -> dict[int, LabelScore]:
        """Compare label maps on one grid."""
        distances = hausdorff_distance(labels_a, labels_b)
        overlaps = dice(np.asarray(labels_a.array), np.asarray(labels_b.array))
        return {label: cls(overlaps[label], *distances[label]) for label in overlaps}

    @classmethod
    def nowhere(cls) -> LabelScore:
        """Return the score of a label that neither map shows."""
        return cls(0.0, math.nan, math.nan)

    @classmethod
    def mean(cls, scores: Sequence[LabelScore]) -> LabelScore:
        """Return the means; those of distances over the labels that have one."""
        columns = np.array(scores, dtype=np.float64).reshape(-1, 3).T
        known = [column[np.isfinite(column)] for column in columns]
        return cls(*(float(c.mean()) if c.size else math.nan for c in known))

    def record(self) -> dict[str, float | None]:
        """Return the score for JSON, which has no NaN."""
        values = (None if math.isnan(value) else value for value in self)
        names = ("dice", "hausdorff (mm)", "hausdorff, 95th percentile (mm)")
        return dict(zip(names, values, strict=True))


class _Label(NamedTuple):
    number: int
    voxels: tuple[int, int]
    """In the map of the fixed and of the moving image."""
    before: LabelScore
    after: LabelScore

    @property
    def missing(self) -> str | None:
        return next(
            (n for n, v in zip(("fixed", "moving"), self.voxels, strict=True) if not v), None
        )


class _Point(NamedTuple):
    name: str
    before: float
    after: float
    covered: bool
    """Whether the deformation is known there."""


@dataclasses.dataclass(frozen=True)
class Judgement:
    """How good a registration is, before and after the stages; empty if nothing was given."""

    labels: tuple[_Label, ...] = ()
    points: tuple[_Point, ...] = ()

    @property
    def _means(self) -> tuple[LabelScore, LabelScore]:
        """Over the labels that both maps have."""
        both = [label for label in self.labels if label.missing is None]
        return LabelScore.mean([x.before for x in both]), LabelScore.mean([x.after for x in both])

    @property
    def _errors(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        return np.array([p.before for p in self.points]), np.array([p.after for p in self.points])

    def record(self) -> dict[str, Any]:
        """Return what is worth keeping, for JSON; nothing if there is nothing."""
        found: dict[str, Any] = {}
        if self.labels:
            before, after = self._means
            found["labels"] = {
                "mean over labels that both have": {
                    "before": before.record(),
                    "after": after.record(),
                },
                "each": [
                    {
                        "label": label.number,
                        "missing in": label.missing,
                        "voxels": dict(zip(("fixed", "moving"), label.voxels, strict=True)),
                        "before": label.before.record(),
                        "after": label.after.record(),
                    }
                    for label in self.labels
                ],
            }
        if self.points:
            errors = zip(("before", "after"), self._errors, strict=True)
            found["target registration error (mm)"] = {
                **{when: _summary(error) for when, error in errors},
                "each": [
                    {
                        "point": point.name,
                        "before": point.before,
                        "after": point.after,
                        "outside of the fixed grid": not point.covered,
                    }
                    for point in self.points
                ],
            }
        return found

    def tables(self) -> dict[str, list[list[str]]]:
        """Return tables for the report, by their headings: rows of cells, the names first."""
        found = {}
        if self.labels:
            rows = {
                str(label.number)
                + (f" (not in the {label.missing} map)" if label.missing else ""): (
                    label.before,
                    label.after,
                )
                for label in self.labels
            }
            rows["mean over labels that both have"] = self._means
            found["Labels"] = label_table(("before", "after"), rows)
        if self.points:
            outside = " (outside of the fixed grid)"
            found["Target registration error"] = [
                ["point", "before (mm)", "after (mm)"],
                *(
                    [p.name + ("" if p.covered else outside), f"{p.before:.2f}", f"{p.after:.2f}"]
                    for p in self.points
                ),
                *(
                    [name, *(f"{_summary(error)[name]:.2f}" for error in self._errors)]
                    for name in ("mean", "median", "maximum")
                ),
            ]
        return found

    def rows(self) -> list[tuple[str, str]]:
        """Return rows for the console."""
        found = []
        if self.labels:
            before, after = self._means
            number = sum(label.missing is None for label in self.labels)
            mean = f"mean of {number} labels"
            found += [
                (f"Dice, {mean}", f"{before.dice:.3f} → {after.dice:.3f}"),
                (f"Hausdorff, {mean}", f"{before.hausdorff:.2f} → {after.hausdorff:.2f} mm"),
                (
                    f"95th percentile of it, {mean}",
                    f"{before.hausdorff_95:.2f} → {after.hausdorff_95:.2f} mm",
                ),
            ]
        if self.points:
            before_errors, after_errors = map(_summary, self._errors)
            found += [
                (
                    f"Target registration error, {name} of {len(self.points)} points",
                    f"{before_errors[name]:.2f} → {after_errors[name]:.2f} mm",
                )
                for name in ("mean", "maximum")
            ]
        return found

    def tell(self) -> None:
        """Say on stderr what could not be judged."""
        for missing, argument, other in (
            ("fixed", _FIXED_LABELS, _MOVING_LABELS),
            ("moving", _MOVING_LABELS, _FIXED_LABELS),
        ):
            numbers = [str(x.number) for x in self.labels if x.missing == missing]
            if numbers:
                warn(f"{argument}: no voxel of {listed('label', numbers)}, which {other} has")
        lost = [
            str(x.number)
            for x in self.labels
            if x.missing is None and math.isnan(x.after.hausdorff)
        ]
        if lost:
            labels = listed("label", lost)
            warn(f"{_MOVING_LABELS}: after registration no voxel of {labels} is on the fixed grid")
        outside = [point.name for point in self.points if not point.covered]
        if outside:
            points = listed("point", outside)
            warn(f"{_FIXED_POINTS}: outside of the fixed grid nothing is deformed: {points}")


@dataclasses.dataclass(frozen=True)
class Judging:
    """Labels and landmarks of both images, read and checked; either may be missing."""

    labels: tuple[Volume, Volume] | None = None
    points: tuple[PointSet, PointSet] | None = None

    @classmethod
    def read(cls, files: Mapping[str, Path | None], fixed: Volume, moving: Volume) -> Judging:
        """Read what is given.

        Parameters
        ----------
        files
            By the names of the four options.
        fixed, moving
            The images.

        Raises
        ------
        ValueError
            If a file cannot be read, one is given without its counterpart, or they do not fit to
            each other or to the images.
        """
        labels = points = None
        for here, there in ((_FIXED_LABELS, _MOVING_LABELS), (_FIXED_POINTS, _MOVING_POINTS)):
            given = [name for name in (here, there) if files[name] is not None]
            if len(given) == 1:
                (lacking,) = {here, there} - {*given}
                raise ValueError(f"{lacking}: expected a file beside that of {given[0]}, got none")
        if files[_FIXED_LABELS] is not None:
            labels = (
                _labels_of(_FIXED_LABELS, files, fixed, "FIXED"),
                _labels_of(_MOVING_LABELS, files, moving, "MOVING"),
            )
        if files[_FIXED_POINTS] is not None:
            points = (
                _points_of(_FIXED_POINTS, files, fixed.ndim),
                _points_of(_MOVING_POINTS, files, fixed.ndim),
            )
            _check_pairs(*points)
        return cls(labels, points)

    def judge(self, before: Transform, after: Transform) -> Judgement:
        """Compare what belongs together.

        Parameters
        ----------
        before, after
            Where the stages started from, and what they found.
        """
        return Judgement(
            () if self.labels is None else _judge_labels(*self.labels, before, after),
            () if self.points is None else _judge_points(*self.points, before, after),
        )


def read_labels(path: Path) -> Volume:
    """Read a label map.

    Raises
    ------
    ValueError
        If the file cannot be read, has channels, other values than integers of at least 0, or no
        label.
    """
    labels = read_image(path)
    array = np.asarray(labels.array)
    if labels.channels != 1:
        raise ValueError(f"{path}: expected labels, got {labels.channels} channels")
    if (array % 1).any() or array.min() < 0:
        kind = "fractions" if (array % 1).any() else "negative numbers"
        raise ValueError(f"{path}: expected labels, integers of at least 0, got {kind}")
    if not array.any():
        raise ValueError(f"{path}: expected a label above 0, got none")
    return labels


def label_table(names: Sequence[str], rows: Mapping[str, Sequence[LabelScore]]) -> list[list[str]]:
    """Return scores as a table: for each label its row, by Dice and distances in all states.

    Parameters
    ----------
    names
        Of the states that are compared, such as before and after.
    rows
        By what stands at their beginning, a score for each state.
    """
    measures = ("Dice", "Hausdorff (mm)", "Hausdorff 95 % (mm)")
    head = ["label", *(" ".join(filter(None, (m, name))) for m in measures for name in names)]
    return [
        head,
        *(
            [first, *(format_score(k, score[k]) for k in range(3) for score in scores)]
            for first, scores in rows.items()
        ),
    ]


def format_score(field: int, value: float) -> str:
    """Write a field of a score; a dash where there is no such distance."""
    return "-" if math.isnan(value) else f"{value:.{2 if field else 3}f}"


def _labels_of(name: str, files: Mapping[str, Path | None], image: Volume, of: str) -> Volume:
    path = files[name]
    assert path is not None
    with naming(name):
        labels = read_labels(path)
        if labels.grid.ndim != image.ndim or labels.shape != image.shape:
            size, got = (" x ".join(map(str, v.shape[::-1])) for v in (image, labels))
            raise ValueError(f"{path}: expected {size} voxels as {of}, got {got}")
        if not labels.grid.same_place(image.grid):
            raise ValueError(
                f"{path}: expected spacing, origin and direction of {of}, got voxels that lie up "
                f"to {labels.grid.voxels_apart(image.grid):.3g} voxels from its"
            )
    return labels


def _points_of(name: str, files: Mapping[str, Path | None], ndim: int) -> PointSet:
    path = files[name]
    assert path is not None
    with naming(name):
        return read_points(path, ndim)


def _check_pairs(fixed: PointSet, moving: PointSet) -> None:
    if len(moving.names) != len(fixed.names):
        raise ValueError(
            f"{_MOVING_POINTS}: expected {len(fixed.names)} points as {_FIXED_POINTS}, one for "
            f"each, got {len(moving.names)}"
        )
    same = len({*fixed.names}) == len(fixed.names) and {*fixed.names} == {*moving.names}
    if same and moving.names != fixed.names:
        number = next(k for k, n in enumerate(fixed.names) if moving.names[k] != n)
        raise ValueError(
            f"{_MOVING_POINTS}: expected the order of {_FIXED_POINTS}, got "
            f"{moving.names[number]} where that has {fixed.names[number]}"
        )


def _judge_labels(
    fixed: Volume, moving: Volume, before: Transform, after: Transform
) -> tuple[_Label, ...]:
    counts = []
    for labels in (fixed, moving):
        numbers, voxels = np.unique(np.asarray(labels.array), return_counts=True)
        counts.append(dict(zip(map(int, numbers), map(int, voxels), strict=True)))
    scores = [
        LabelScore.of_maps(fixed, resample(moving, fixed, transform.parts, "labels"))
        for transform in (before, after)
    ]
    none = LabelScore.nowhere()
    return tuple(
        _Label(
            label,
            (counts[0].get(label, 0), counts[1].get(label, 0)),
            *(score.get(label, none) for score in scores),
        )
        for label in sorted({*counts[0], *counts[1]} - {0})
    )


def _judge_points(
    fixed: PointSet, moving: PointSet, before: Transform, after: Transform
) -> tuple[_Point, ...]:
    errors = [
        target_registration_error(transform, fixed.positions, moving.positions).tolist()
        for transform in (before, after)
    ]
    covered = np.ones(len(fixed.names), np.bool_)
    for part in after.parts:
        if isinstance(part, DisplacementField):
            covered &= part.covers(fixed.positions)
    return tuple(map(_Point, fixed.names, *errors, covered.tolist()))


def _summary(errors: NDArray[np.float64]) -> dict[str, float]:
    return {
        "mean": float(errors.mean()),
        "median": float(np.median(errors)),
        "maximum": float(errors.max()),
    }
