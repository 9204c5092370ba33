"""Sequences of stages that serve brain MRI, and stages by their names."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

from jaxreg.registration.stages.base import Stage
from jaxreg.registration.stages.ffd import FFD
from jaxreg.registration.stages.greedy import Greedy
from jaxreg.registration.stages.linear import Affine, Rigid, Similarity, Translation
from jaxreg.registration.stages.metrics import CoarseToFine
from jaxreg.registration.stages.moments import Moments
from jaxreg.registration.stages.svf import SVF
from jaxreg.registration.stages.syn import SyN

__all__ = ["PresetName", "preset", "stage_from_name"]

PresetName = Literal["affine", "fast", "default", "accurate"]

_STAGES: dict[str, type[Stage]] = {
    stage.name: stage
    for stage in (Moments, Translation, Rigid, Similarity, Affine, Greedy, SVF, SyN, FFD)
}


def stage_from_name(name: str, **settings: Any) -> Stage:
    """Return a stage by its name.

    Parameters
    ----------
    name
        ``"moments"``, ``"translation"``, ``"rigid"``, ``"similarity"``, ``"affine"``,
        ``"greedy"``, ``"svf"``, ``"syn"`` or ``"ffd"``.
    **settings
        Those of the stage; the others have their defaults.

    Returns
    -------
    Stage
        With these settings.

    Raises
    ------
    ValueError
        If there is no such stage, or for a setting that it does not take.
    """
    if name not in _STAGES:
        raise ValueError(f"stage: expected one of {', '.join(_STAGES)}, got {name!r}")
    kind = _STAGES[name]
    known = [field.name for field in dataclasses.fields(kind)]
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise ValueError(
            f"stage {name}: expected settings among {', '.join(known)}, got {', '.join(unknown)}"
        )
    return kind(**settings)


def preset(
    name: PresetName, *, ndim: int = 3, device: Literal["cpu", "gpu"] = "cpu"
) -> tuple[Stage, ...]:
    """Return stages that serve brain MRI with skull stripped or not, of one contrast.

    Parameters
    ----------
    name
        ``"affine"``: without a deformation; ``"fast"``: a look, at half the resolution;
        ``"default"``; ``"accurate"``: longer steps, and more of them.
    ndim
        Number of spatial dimensions, 2 or 3. In the plane all iterations are cheap, so a level
        more than in space is run at full resolution.
    device
        ``"cpu"`` has fewer iterations at full resolution than ``"gpu"``, to end in a minute or two
        on volumes with voxels of 2 mm.

    Returns
    -------
    tuple of Stage
        For `register`.

    Raises
    ------
    ValueError
        If there is no such preset, dimension or device.
    """
    if name not in get_args(PresetName):
        raise ValueError(f"preset: expected one of {', '.join(get_args(PresetName))}, got {name!r}")
    if ndim not in (2, 3):
        raise ValueError(f"ndim: expected 2 or 3, got {ndim}")
    if device not in ("cpu", "gpu"):
        raise ValueError(f"device: expected 'cpu' or 'gpu', got {device!r}")
    lighter = device == "cpu" and ndim == 3
    if name == "fast":
        return Moments(), Affine(), Greedy((4, 2), (60, 30))
    refined = CoarseToFine()
    start: tuple[Stage, ...] = (
        Moments(),
        Affine((4, 2), (80, 60), metric=refined)
        if lighter
        else Affine((4, 2, 1), (80, 60, 30), metric=refined),
    )
    if name == "affine":
        return start
    if name == "default":
        return *start, SyN((4, 2, 1), (60, 40, 20) if lighter else (100, 70, 40))
    iterations = (100, 70, 40) if lighter else (150, 100, 80)
    return *start, SyN((4, 2, 1), iterations, learning_rate=0.7, tolerance=1e-5)
