"""Transforms that bend, the volumes that they join, and both in SimpleITK's hands."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import SimpleITK as sitk  # noqa: N813
from scenes import as_image, header, physical_grid, scene

from jaxreg.registration import Transform, resample
from regkernels import (
    AffineMap,
    DisplacementField,
    Grid,
    Volume,
    move_points,
)


def affine(dim: int, seed: int = 0) -> AffineMap:
    """A turn, a shear and a shift."""
    rng = np.random.default_rng(seed)
    matrix = np.eye(dim + 1)
    matrix[:-1] += rng.uniform(-1, 1, (dim, dim + 1)) * [*[0.15] * dim, 4]
    return AffineMap(matrix)


def volume(dim: int, turn: float = 20.0) -> Volume:
    """A scene that fills an oblique grid."""
    empty = header((11, 12, 10)[-dim:], (3.0, 2.5, 3.5)[:dim], turn=turn)
    return empty.with_array(scene(physical_grid(empty) * 3))


def waves(grid: Grid, amplitude: float = 2.0) -> np.ndarray:
    """A smooth displacement in millimetres that does not vanish at the border."""
    points = physical_grid(Volume.on_grid(grid, np.zeros(grid.shape)))
    return amplitude * np.cos(points / 9 + np.arange(grid.ndim)) * [1, -0.7, 0.4][: grid.ndim]


def deformation(dim: int) -> tuple[Transform, Volume, Volume]:
    """A transform with an inverse, found by iteration, and volumes of its two spaces."""
    fixed, moving = volume(dim), volume(dim, turn=-35.0)
    matrix = affine(dim)
    there = DisplacementField(fixed.grid, waves(fixed.grid))
    points = physical_grid(fixed)
    back = points.copy()
    for _ in range(30):
        back += points - move_points(back, (there,))
    transform = Transform.from_parts(fixed.grid, (there, matrix))
    inverse = Transform.from_parts(
        fixed.grid, (DisplacementField(fixed.grid, back - points),)
    ).displacement
    return dataclasses.replace(transform, inverse_displacement=inverse), fixed, moving


def itk_affine(part: AffineMap) -> sitk.AffineTransform:
    transform = sitk.AffineTransform(part.ndim)
    transform.SetMatrix(part.matrix[:-1, :-1].ravel().tolist())
    transform.SetTranslation(part.matrix[:-1, -1].tolist())
    return transform


def itk_field(field: DisplacementField) -> sitk.DisplacementFieldTransform:
    image = sitk.GetImageFromArray(np.asarray(field.vectors, np.float64), isVector=True)
    empty = as_image(Volume.on_grid(field.grid, np.zeros(field.grid.shape)))
    image.CopyInformation(empty)
    return sitk.DisplacementFieldTransform(image)


def itk_composite(*in_the_order_of_points: Any) -> sitk.CompositeTransform:
    return sitk.CompositeTransform(list(reversed(in_the_order_of_points)))


def inside(reference: Volume, moving: Volume, parts: tuple[Any, ...]) -> np.ndarray:
    """Where all that is sampled lies in the volume: SimpleITK extends one by half a voxel."""
    return resample(moving.with_array(np.ones(moving.shape)), reference, parts).array > 1 - 1e-4


def assert_same_as_itk(
    ours: Volume, moving: Volume, transform: Any, where: np.ndarray, interpolator: int
) -> None:
    reference = as_image(ours)
    theirs = sitk.Resample(as_image(moving), reference, transform, interpolator, 0.0)
    assert where.mean() > 0.3
    difference = np.abs(ours.array - sitk.GetArrayFromImage(theirs))[where]
    assert difference.max() < 2e-5
