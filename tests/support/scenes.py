"""Things to register: smooth scenes in physical space, volumes that show them, random fields."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxreg import convert_displacement
from jaxreg.registration import ncc, resize_field
from regkernels import Volume, rigid_motion, write_volume

if TYPE_CHECKING:
    import SimpleITK as sitk  # noqa: N813

BLOBS = np.array([(0, 0, 0, 20), (18, -8, 11, 10), (-15, 18, -9, 9), (-4, -20, 16, 8)], float)


def scene(points: np.ndarray, power: float = 1.0) -> np.ndarray:
    """A smooth function of physical points ``(..., D)``: a few Gaussian blobs near the origin."""
    dim = points.shape[-1]
    value = np.zeros(points.shape[:-1])
    for weight, (*centre, width) in zip((1.0, 0.8, -0.6, 0.9), BLOBS, strict=True):
        distance = ((points - np.array(centre)[:dim]) ** 2).sum(axis=-1)
        value += weight * np.exp(-distance / (2 * width**2))
    return np.abs(value) ** power


def physical_grid(volume: Volume) -> np.ndarray:
    """The physical positions of a volume's voxels, ``([Z,] Y, X, D)``."""
    index = np.stack(np.indices(volume.shape)[::-1], axis=-1)
    matrix = volume.grid.voxel_to_physical()
    return index @ matrix[:-1, :-1].T + matrix[:-1, -1]


def placed(volume: Volume, **header: Any) -> Volume:
    """The same voxels with another origin, spacing or direction."""
    return dataclasses.replace(volume, grid=dataclasses.replace(volume.grid, **header))


def header(shape: tuple[int, ...], spacing: tuple[float, ...], turn: float = 0.0) -> Volume:
    """An empty volume about the origin, its axes turned by an angle in degrees."""
    dim = len(shape)
    direction = rigid_motion(turn, (1, -2, 2), (0, 0, 0), (0, 0, 0))[:3, :3]
    if dim == 2:
        cos, sin = np.cos(np.deg2rad(turn)), np.sin(np.deg2rad(turn))
        direction = np.array([[cos, -sin], [sin, cos]])
    volume = Volume.create(np.zeros(shape), spacing, np.zeros(dim), direction)
    return placed(volume, origin=-volume.grid.centre())


def write_shifted_pair(folder: Path, shift: float = 3.0) -> list[Path]:
    """Write two small images in 2-D, ``fixed.nii.gz`` and ``moving.nii.gz``, of a shifted scene."""
    grid = header((24, 26), (2.5, 2.5))
    paths = [folder / "fixed.nii.gz", folder / "moving.nii.gz"]
    for path, offset in zip(paths, (0.0, shift), strict=True):
        image = scene(physical_grid(grid) + offset).astype(np.float32)
        write_volume(grid.with_array(image), path)
    return paths


def random_header(rng: np.random.Generator) -> Volume:
    """An empty oblique volume somewhere."""
    volume = header((7, 9, 8), (1.5, 0.8, 2.5), turn=40)
    return placed(volume, origin=rng.normal(size=3) * 20)


def as_image(volume: Volume) -> sitk.Image:
    """The volume in SimpleITK, without which the rest of the scenes can be made."""
    import SimpleITK as sitk  # noqa: N813

    array = np.asarray(volume.array)
    several = array.ndim > volume.ndim
    image = sitk.GetImageFromArray(np.moveaxis(array, 0, -1) if several else array, several)
    image.SetSpacing(volume.grid.spacing.tolist())
    image.SetOrigin(volume.grid.origin.tolist())
    image.SetDirection(volume.grid.direction.ravel().tolist())
    return image


def similarity(fixed: Volume, other: Volume) -> float:
    """The global correlation of two volumes on the same grid."""
    return float(ncc(other.batched(), fixed.batched())[0, 0])


def smooth_field(shape: tuple[int, ...], amplitude: float, seed: int) -> jax.Array:
    """A random smooth displacement, ``(1, [Z,] Y, X, D)``, at most ``amplitude`` voxels."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(-amplitude, amplitude, (1, *(5 for _ in shape), len(shape)))
    field = resize_field(jnp.asarray(coarse, jnp.float32), shape)
    return convert_displacement(field, "voxel", "normalised")


def grainy(images: Any, seed: int) -> Any:
    """Images that are flat nowhere: there LNCC and Adam make much of roundings."""
    noise = np.random.default_rng(seed).normal(0, 0.1, images.shape)
    return images + noise.astype(np.float32)
