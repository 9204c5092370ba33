"""Templates: the mean shape and intensity of several images."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scenes import header, physical_grid, placed, scene, similarity, smooth_field

from jaxreg import invert_displacement
from jaxreg.registration import (
    Affine,
    FolderStore,
    Greedy,
    MemoryStore,
    Moments,
    Rigid,
    Stage,
    SyN,
    Template,
    TemplateProgress,
    Transform,
    Translation,
    build_template,
    dice,
    downsample,
)
from jaxreg.registration.means import ExactSum, mean_grid, mean_motion
from regkernels import Grid, Volume, read_volume, rigid_motion
from regkernels.data import load_pair_paths

QUICK: tuple[Stage, ...] = (Affine((4, 2), (30, 20)), Greedy((4, 2, 1), (40, 30, 20)))


def brain(ndim: int) -> Volume:
    """A shipped brain: a slice of it, or all of it with voxels of 4 mm."""
    whole = read_volume(load_pair_paths().fixed)
    values = np.asarray(whole.batched())
    if ndim == 2:
        return Volume.create(values[0, 0, 42], whole.grid.spacing[:2], whole.grid.origin[:2])
    small = np.asarray(downsample(jnp.asarray(values), tuple(n // 2 for n in whole.shape)))
    return Volume.create(small[0, 0], (4, 4, 4))


def copies(
    volume: Volume, amplitude: float, numbers: Sequence[int] = (1, 2)
) -> tuple[list[Volume], list[jax.Array]]:
    """Warped copies, and the displacements that lead from the brain to them, whose mean is 0."""
    fields, warped = [], []
    for seed in numbers:
        for sign in (1, -1):
            field = sign * smooth_field(volume.shape, amplitude, seed)
            there = Transform(volume.grid, np.eye(volume.ndim + 1), invert_displacement(field))
            fields.append(field)
            warped.append(there.apply(volume))
    return warped, fields


def length(vectors: Any, where: np.ndarray) -> float:
    """Root mean square length of vectors at some voxels."""
    return float(np.sqrt(np.mean(np.sum(np.square(np.asarray(vectors)), axis=-1)[where])))


@pytest.fixture(scope="module")
def slices() -> tuple[Volume, list[Volume], list[jax.Array]]:
    original = brain(2)
    return original, *copies(original, 4)


@pytest.fixture(scope="module")
def built(slices: tuple[Volume, list[Volume], list[jax.Array]]) -> Template:
    return build_template(slices[1], QUICK, rounds=2)


def assert_recovers(
    template: Template, original: Volume, warped: list[Volume], fields: list[jax.Array]
) -> None:
    """The template is nearer to the original than any copy, in its intensities and its shape."""
    scale = float(np.asarray(original.array).std())
    inside = np.asarray(original.array) > 0.1 * np.asarray(original.array).max()

    def distance(volume: Volume) -> float:
        return float(np.sqrt(np.mean((np.asarray(volume.array) - original.array) ** 2))) / scale

    assert distance(template.volume) < 0.5 * min(map(distance, warped))
    for number, field in enumerate(fields):
        known = Transform(original.grid, np.eye(original.ndim + 1), field).displacement_field()
        found = template.transform(number).displacement_field(with_affine=True)
        assert length(np.asarray(found) - known, inside) < 0.5 * length(known, inside)


def test_the_template_of_warped_copies_is_nearer_to_the_original_than_any_of_them(
    slices: tuple[Volume, list[Volume], list[jax.Array]], built: Template
) -> None:
    assert_recovers(built, *slices)


def test_so_it_is_in_space() -> None:
    original = brain(3)
    warped, fields = copies(original, 2.5, (1,))
    stages = [Affine((2,), (20,)), SyN((2, 1), (20, 12))]
    template = build_template(warped, stages, rounds=2, linear_rounds=0)
    assert_recovers(template, original, warped, fields)
