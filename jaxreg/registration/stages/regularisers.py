"""What a deformable stage may be held back by: penalties of its field, with their weights."""

from __future__ import annotations

import abc
import dataclasses
import math
from typing import Any

import jax

from jaxreg.regularisation import (
    bending_energy_loss,
    curvature_loss,
    diffusion_loss,
    divergence_loss,
    elasticity_loss,
    jacobian_loss,
)

__all__ = [
    "Bending",
    "Curvature",
    "Diffusion",
    "Divergence",
    "Elasticity",
    "Jacobian",
    "Regulariser",
]


def _check_at_least_zero(name: str, value: Any) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value < 0:
        raise ValueError(f"{name}: expected a finite number of at least 0, got {value!r}")


@dataclasses.dataclass(frozen=True)
class Regulariser(abc.ABC):
    """A penalty for the ``regularisation`` of a deformable stage, as a function of its field.

    Lengths are voxels of the level: a field that looks the same on two grids costs about the same
    on both. One of your own derives from this class, is a frozen dataclass whose settings have a
    hash, and has an `energy`. It is a JAX pytree without leaves, and equal ones share their
    programs.

    Attributes
    ----------
    weight
        What the energy is multiplied by, at least 0, in units of the scale of the stage's metric
        (`Metric.scale`; without one, of the loss where the stage starts).

    Raises
    ------
    ValueError
        For a weight that is none.
    """

    weight: float

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        jax.tree_util.register_static(cls)

    def __post_init__(self) -> None:
        _check_at_least_zero("weight", self.weight)

    def __call__(self, field: jax.Array) -> jax.Array:
        """Return the penalty of a field, or the sum of those of several.

        Parameters
        ----------
        field
            Normalised displacements or velocities, ``(fields, [Z,] Y, X, D)``.

        Returns
        -------
        Array
            A scalar.
        """
        return self.weight * self.energy(field)

    @abc.abstractmethod
    def energy(self, field: jax.Array) -> jax.Array:
        """Return the penalty for a weight of 1: the mean over the voxels, summed over fields."""


@dataclasses.dataclass(frozen=True)
class Diffusion(Regulariser):
    """Squared slopes of the field; see `jaxreg.diffusion_loss`.

    Attributes
    ----------
    weight
        As for `Regulariser`.

    Raises
    ------
    ValueError
        As `Regulariser`.
    """

    def energy(self, field: jax.Array) -> jax.Array:
        """Return `diffusion_loss`, summed over fields."""
        return diffusion_loss(field, reduction="sum")


@dataclasses.dataclass(frozen=True)
class Bending(Regulariser):
    """Squared second derivatives of the field; see `jaxreg.bending_energy_loss`.

    Attributes
    ----------
    weight
        As for `Regulariser`.

    Raises
    ------
    ValueError
        As `Regulariser`.
    """

    def energy(self, field: jax.Array) -> jax.Array:
        """Return `bending_energy_loss`, summed over fields."""
        return bending_energy_loss(field, reduction="sum")


@dataclasses.dataclass(frozen=True)
class Curvature(Regulariser):
    """Squared Laplacian of the field; see `jaxreg.curvature_loss`.

    Attributes
    ----------
    weight
        As for `Regulariser`.

    Raises
    ------
    ValueError
        As `Regulariser`.
    """

    def energy(self, field: jax.Array) -> jax.Array:
        """Return `curvature_loss`, summed over fields."""
        return curvature_loss(field, reduction="sum")


@dataclasses.dataclass(frozen=True)
class Elasticity(Regulariser):
    """Energy of the field in an elastic body; see `jaxreg.elasticity_loss`.

    Attributes
    ----------
    weight
        As for `Regulariser`.
    mu, lam
        Lamé's parameters, at least 0: of the strain's size, and of the change of volume.

    Raises
    ------
    ValueError
        As `Regulariser`, or for parameters below 0.
    """

    mu: float = 1.0
    lam: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_at_least_zero("mu", self.mu)
        _check_at_least_zero("lam", self.lam)

    def energy(self, field: jax.Array) -> jax.Array:
        """Return `elasticity_loss`, summed over fields."""
        return elasticity_loss(field, mu=self.mu, lam=self.lam, reduction="sum")


@dataclasses.dataclass(frozen=True)
class Divergence(Regulariser):
    """Squared divergence of the field; see `jaxreg.divergence_loss`.

    Attributes
    ----------
    weight
        As for `Regulariser`.

    Raises
    ------
    ValueError
        As `Regulariser`.
    """

    def energy(self, field: jax.Array) -> jax.Array:
        """Return `divergence_loss`, summed over fields."""
        return divergence_loss(field, reduction="sum")


@dataclasses.dataclass(frozen=True)
class Jacobian(Regulariser):
    """Squared logarithm of the Jacobian determinant of the field; see `jaxreg.jacobian_loss`.

    Attributes
    ----------
    weight
        As for `Regulariser`.

    Raises
    ------
    ValueError
        As `Regulariser`.
    """

    def energy(self, field: jax.Array) -> jax.Array:
        """Return `jacobian_loss`, summed over fields."""
        return jacobian_loss(field, reduction="sum")
