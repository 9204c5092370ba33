"""The options that choose stages, of the commands that register."""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Sequence
from typing import Literal, cast

import jax
from rich.console import Console

from jaxreg.commands.inputs import naming
from jaxreg.registration import (
    Deformable,
    Diffeomorphic,
    Greedy,
    Metric,
    Moments,
    PerChannel,
    Rigid,
    Stage,
    preset,
    stage_from_name,
)
from jaxreg.registration.stages.metrics import MetricName, as_metric

__all__ = ["Preset", "choose_stages", "for_pairs", "parse_weights"]


class Preset(enum.StrEnum):
    """How much effort."""

    AFFINE = "affine"
    FAST = "fast"
    DEFAULT = "default"
    ACCURATE = "accurate"


def choose_stages(
    names: str | None,
    metric: str | None,
    effort: Preset,
    ndim: int,
    target: jax.Device,
    console: Console,
) -> tuple[Stage, ...]:
    """Choose the stages; those that the preset has too take its schedule.

    Where ``--metric`` names one for each of several pairs of images, the stages are chosen for all
    of them, and have the first; see `for_pairs`.
    """
    kind: Literal["cpu", "gpu"] = "cpu" if target.platform == "cpu" else "gpu"
    here, on_gpu = (preset(effort.value, ndim=ndim, device=where) for where in (kind, "gpu"))
    stages = here
    if names is not None:
        known = {stage.name: stage for stage in stages}
        with naming("--stages"):
            stages = tuple(
                known.get(name) or stage_from_name(name)
                for name in map(str.strip, names.split(","))
            )
    if any(stage in here and stage not in on_gpu for stage in stages):
        console.print("On the CPU this preset has fewer iterations than on a GPU.", style="dim")
    if metric is None:
        return stages
    metrics = metric_names(metric)
    if "mind" in metrics:
        stages = tuple(map(_for_descriptors, _rigid_first(stages) if names is None else stages))
    return tuple(stage.with_metric(_metric_of(stage, metrics[0])) for stage in stages)


def metric_names(metric: str) -> list[str]:
    """Return the names that ``--metric`` says, one or one for each pair of images."""
    return [name.strip() for name in metric.split(",")]


def parse_weights(text: str | None) -> tuple[float, ...] | None:
    """Return what each pair of images counts."""
    if text is None:
        return None
    try:
        weights = tuple(float(weight) for weight in text.split(","))
    except ValueError:
        weights = ()
    if not any(weights) or not all(0 <= weight < math.inf for weight in weights):
        raise ValueError(f"weights: expected numbers of at least 0, not all 0, got {text!r}")
    return weights


def for_pairs(
    stages: Sequence[Stage],
    metric: str | None,
    weights: Sequence[float] | None,
    channels: Sequence[int],
) -> tuple[Stage, ...]:
    """Return stages as they compare several pairs of images.

    Parameters
    ----------
    stages
        Those chosen.
    metric
        What ``--metric`` says: a name for all pairs, or one for each; `None`: that of the stage.
    weights
        What each pair counts; `None`: all of them alike.
    channels
        How many the images of each pair have, which share its weight.

    Raises
    ------
    ValueError
        For another number of metrics or weights, or weights for a metric that has its own.
    """
    pairs = len(channels)
    names = None if metric is None else metric_names(metric)
    if names is not None and len(names) == 1:
        names *= pairs
    for option, given in (("--metric", names), ("--weights", weights)):
        if given is not None and len(given) != pairs:
            raise ValueError(
                f"{option}: expected {pairs}, one for each pair of images, got {len(given)}"
            )
    shares = [
        weight / count
        for weight, count in zip(weights or [1.0] * pairs, channels, strict=True)
        for _ in range(count)
    ]

    def compared(stage: Stage) -> Stage:
        if isinstance(stage.metric, PerChannel):  # of --stage, --recipe or --like
            if weights is not None:
                raise ValueError(f"--weights: expected none beside {stage.metric}")
            return stage
        metrics = [
            stage.metric if names is None else _metric_of(stage, names[pair])
            for pair, count in enumerate(channels)
            for _ in range(count)
        ]
        if len(set(metrics)) == len(set(shares)) == 1:
            return stage.with_metric(metrics[0])
        return stage.with_metric(PerChannel(tuple(metrics), tuple(shares)))

    return tuple(map(compared, stages))


def _metric_of(stage: Stage, name: str) -> Metric:
    """Return what a name means for a stage: descriptors serve to deform alone."""
    linear = name == "mind" and not isinstance(stage, Deformable)
    return as_metric(cast(MetricName, "mi" if linear else name))


def _rigid_first(stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
    """Return what finds a deformation between two contrasts, in as many steps as these stages.

    By mutual information a size is not found as surely as a place is, where one image shows more of
    the head than the other, and what is left to one field is found better than what two share.
    """
    last = stages[-1]
    deforming = [Greedy(last.scales, last.iterations)] if isinstance(last, Deformable) else []
    return Moments(), Rigid(), *deforming


def _for_descriptors(stage: Stage) -> Stage:
    """Return a stage as it serves to deform between two contrasts.

    Descriptors say too little of where images are that are far from each other, and too much of
    noise for fields that are free to follow it. Of a spline the control points are far apart.
    """
    if isinstance(stage, Diffeomorphic):
        return dataclasses.replace(stage, gradient_sigma=3.0, field_sigma=2.0)
    return stage
