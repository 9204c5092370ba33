"""The options that choose stages, of the commands that register."""

from __future__ import annotations

import dataclasses
import enum
from typing import Literal, cast

import jax
from rich.console import Console

from jaxreg.commands.inputs import naming
from jaxreg.registration import (
    Deformable,
    Greedy,
    Moments,
    Rigid,
    Stage,
    preset,
    stage_from_name,
)
from jaxreg.registration.stages.metrics import MetricName

__all__ = ["Preset", "choose_stages"]


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
    """Choose the stages; those that the preset has too take its schedule."""
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
    if metric == "mind":
        return tuple(map(_for_descriptors, _rigid_first(stages) if names is None else stages))
    if metric is not None:
        stages = tuple(stage.with_metric(cast(MetricName, metric)) for stage in stages)
    return stages


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
    noise for fields that are free to follow it.
    """
    if isinstance(stage, Deformable):
        stage = dataclasses.replace(stage, gradient_sigma=3.0, field_sigma=2.0)
        return stage.with_metric("mind")
    return stage.with_metric("mi")
