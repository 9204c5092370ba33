"""What a deformable stage may be held back by: penalties of its field, with their weights."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, ClassVar

import jax

from jaxreg.regularisation import field_energy

__all__ = [
    "Bending",
    "Curvature",
    "Diffusion",
    "Divergence",
    "Elasticity",
    "Jacobian",
    "Regulariser",
]


_MOST = 1e9


def _check_factor(name: str, value: Any) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= _MOST:
        raise ValueError(f"{name}: expected a number from 0 to {_MOST:g}, got {value!r}")


@dataclasses.dataclass(frozen=True)
class Regulariser(abc.ABC):
    """A penalty for the ``regularisation`` of a deformable stage, as a function of its field.

    Lengths are voxels of the level. One of your own derives from this class, is a frozen dataclass
    whose settings have a hash, and has an `energy`. It is a JAX pytree without leaves, and equal
    ones share their programs.

    Attributes
    ----------
    weight
        What the energy is multiplied by, from 0 to 1e9, in units of the scale of the stage's metric
        (`Metric.scale`; without one, of the loss where the stage starts).

    Raises
    ------
    ValueError
        For another weight.
    """

    weight: float

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        jax.tree_util.register_static(cls)

    def __post_init__(self) -> None:
        _check_factor("weight", self.weight)

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


class _FieldEnergy(Regulariser):
    """One of the penalties that there are losses for, whose kernels take the weight as well."""

    kind: ClassVar[str]

    def __call__(self, field: jax.Array) -> jax.Array:
        return self._weighted(field, self.weight)

    def energy(self, field: jax.Array) -> jax.Array:
        return self._weighted(field, 1.0)

    def _weighted(self, field: jax.Array, weight: float) -> jax.Array:
        return field_energy(field, self.kind, "sum", True, weight=weight)


@dataclasses.dataclass(frozen=True)
class Diffusion(_FieldEnergy):
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

    kind: ClassVar[str] = "diffusion"


@dataclasses.dataclass(frozen=True)
class Bending(_FieldEnergy):
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

    kind: ClassVar[str] = "bending"


@dataclasses.dataclass(frozen=True)
class Curvature(_FieldEnergy):
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

    kind: ClassVar[str] = "curvature"


@dataclasses.dataclass(frozen=True)
class Elasticity(_FieldEnergy):
    """Energy of the field in an elastic body; see `jaxreg.elasticity_loss`.

    Attributes
    ----------
    weight
        As for `Regulariser`.
    mu, lam
        Lamé's parameters, from 0 to 1e9: of the strain's size, and of the change of volume.

    Raises
    ------
    ValueError
        As `Regulariser`, or for other parameters.
    """

    kind: ClassVar[str] = "elasticity"

    mu: float = 1.0
    lam: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_factor("mu", self.mu)
        _check_factor("lam", self.lam)

    def _weighted(self, field: jax.Array, weight: float) -> jax.Array:
        return field_energy(field, self.kind, "sum", True, weight=weight, mu=self.mu, lam=self.lam)


@dataclasses.dataclass(frozen=True)
class Divergence(_FieldEnergy):
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

    kind: ClassVar[str] = "divergence"


@dataclasses.dataclass(frozen=True)
class Jacobian(_FieldEnergy):
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

    kind: ClassVar[str] = "jacobian"
