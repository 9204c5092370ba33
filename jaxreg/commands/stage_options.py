"""The options that choose stages, of the commands that register."""

from __future__ import annotations

import enum
from typing import Literal, cast

import jax
from rich.console import Console

from jaxreg.commands.inputs import naming
from jaxreg.registration import Stage, preset, stage_from_name
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
    if metric is not None:
        stages = tuple(stage.with_metric(cast(MetricName, metric)) for stage in stages)
    return stages
