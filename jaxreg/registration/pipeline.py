"""Registration of two volumes, stage by stage."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike, NDArray

from jaxreg import jacobian_determinant
from jaxreg.registration.affine import Affine, register_affine
from jaxreg.registration.greedy import Greedy, register_greedy
from jaxreg.registration.progress import Callback
from jaxreg.registration.volume import Volume, displacement_to_physical, resample

__all__ = ["Folds", "Registration", "Stage", "StageRecord", "register"]

Stage = Affine | Greedy


class StageRecord(NamedTuple):
    """What a stage left behind.

    Attributes
    ----------
    settings
        The stage as it was asked for.
    losses
        The loss before each step.
    seconds
        Wall time, compilation included.
    """

    settings: Stage
    losses: NDArray[np.float32]
    seconds: float


class Folds(NamedTuple):
    """Summary of the Jacobian determinant of a diffeomorphism.

    Attributes
    ----------
    share
        Part of the voxels whose determinant is not positive, from 0 to 1.
    minimum, maximum
        Extremes of the determinant.
    """

    share: float
    minimum: float
    maximum: float


@dataclasses.dataclass(frozen=True)
class Registration:
    """The transform that takes the fixed volume's points to the moving volume's.

    A voxel of the fixed grid at the normalised position ``x`` is sampled at ``A(x + d(x))``.

    Attributes
    ----------
    fixed, moving
        The volumes.
    transform
        ``A`` in physical space: ``(D + 1, D + 1)``, fixed -> moving, millimetres, LPS.
    displacement
        ``d``: ``(1, [Z,] Y, X, D)`` on the fixed grid, normalised coordinates.
    stages
        One record for each stage that ran, in their order.
    """

    fixed: Volume
    moving: Volume
    transform: NDArray[np.float64]
    displacement: jax.Array
    stages: tuple[StageRecord, ...]

    @functools.cached_property
    def moved(self) -> Volume:
        """The moving volume on the fixed grid, through the whole transform."""
        return resample(self.moving, self.fixed, self.transform, self.displacement)

    @functools.cached_property
    def jacobian(self) -> NDArray[np.float32]:
        """Jacobian determinant of ``id + d`` at the fixed voxels, ``([Z,] Y, X)``."""
        determinant: NDArray[np.float32] = np.asarray(jacobian_determinant(self.displacement))[0]
        return determinant

    @property
    def folds(self) -> Folds:
        """Where ``id + d`` is not invertible; the affine is not counted."""
        determinant = self.jacobian
        return Folds(
            float(np.mean(determinant <= 0)), float(determinant.min()), float(determinant.max())
        )

    def displacement_field(self) -> NDArray[np.float64]:
        """Return the whole transform as one displacement, ``([Z,] Y, X, D)``, millimetres, LPS."""
        return displacement_to_physical(self.displacement[0], self.transform, self.fixed)


def register(
    fixed: Volume,
    moving: Volume,
    stages: Sequence[Stage] = (Affine(), Greedy()),
    *,
    initial: ArrayLike | None = None,
    callback: Callback | None = None,
) -> Registration:
    """Register a moving volume to a fixed one.

    Parameters
    ----------
    fixed, moving
        Volumes that may differ in size, spacing, origin and direction, of the same dimension.
    stages
        What to run: at most one `Affine`, at most one `Greedy`, in this order.
    initial
        ``(D + 1, D + 1)``, physical fixed -> physical moving, to start from. By default an affine
        stage starts from aligned centres of mass, a greedy one alone from the headers.
    callback
        Called with a `Progress` after each block of iterations.

    Returns
    -------
    Registration
        The transform and what the stages recorded.

    Raises
    ------
    ValueError
        If the dimensions differ, or for an order of stages that cannot be composed.
    """
    if fixed.ndim != moving.ndim:
        raise ValueError(f"moving: expected {fixed.ndim} dimensions as fixed, got {moving.ndim}")
    kinds = [type(stage) for stage in stages]
    if kinds not in ([], [Affine], [Greedy], [Affine, Greedy]):
        names = [kind.__name__ for kind in kinds]
        raise ValueError(f"stages: expected Affine, Greedy or Affine then Greedy, got {names}")

    transform = None if initial is None else np.asarray(initial, dtype=np.float64)
    displacement = jnp.zeros((1, *fixed.shape, fixed.ndim), jnp.float32)
    records = []
    for stage in stages:
        start = time.perf_counter()
        if isinstance(stage, Affine):
            transform, losses = register_affine(
                fixed, moving, stage, initial=transform, callback=callback
            )
        else:
            displacement, losses = register_greedy(
                fixed, moving, stage, transform=transform, callback=callback
            )
            displacement.block_until_ready()
        records.append(StageRecord(stage, losses, time.perf_counter() - start))
    if transform is None:
        transform = np.eye(fixed.ndim + 1)
    return Registration(fixed, moving, transform, displacement, tuple(records))
