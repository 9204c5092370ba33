r"""The SVF stage: the flow of one stationary velocity field, and with it its inverse.

The diffeomorphism is :math:`\psi = \exp(v)`, the velocity's flow over unit time, by scaling and
squaring; its inverse is :math:`\exp(-v)`. As in the greedy stage the step :math:`\delta` is
composed from the right; to first order :math:`\exp(v) \circ \exp(\delta) = \exp(v + \delta)`, so
the velocity is updated by :math:`v \leftarrow v + \delta`, as in the log-domain demons (Vercauteren
et al., "Symmetric Log-Domain Diffeomorphic Registration", MICCAI 2008). Nothing is differentiated
through the squarings.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax

from jaxreg import scaling_and_squaring
from jaxreg.registration.stages.deformable import Regularisation
from jaxreg.registration.stages.diffeomorphic import Diffeomorphic
from jaxreg.registration.stages.iterative import State
from jaxreg.registration.stages.problem import Level, Weighted
from jaxreg.registration.stages.regularisers import Elasticity

__all__ = ["SVF"]

_ELASTICITY = Elasticity(0.2)


@dataclasses.dataclass(frozen=True)
class SVF(Diffeomorphic):
    """The flow of one stationary velocity field; the other settings are those of `Diffeomorphic`.

    Attributes
    ----------
    num_steps
        Squarings of the exponential, 0 to 64.
    regularisation
        Of the velocity; see `Deformable`.

    Raises
    ------
    ValueError
        As `Diffeomorphic`, or if there cannot be so many squarings.
    """

    name: ClassVar[str] = "svf"

    num_steps: int = 6
    regularisation: Regularisation | None = _ELASTICITY

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_steps not in range(65):
            raise ValueError(f"num_steps: expected an integer from 0 to 64, got {self.num_steps}")

    def step(self, level: Level, state: State, progress: jax.Array) -> tuple[State, jax.Array]:
        """Take one step; return the loss before it."""
        velocity = state.found
        displacement = scaling_and_squaring(velocity, self.num_steps)
        through = level.after(displacement)

        def pair(level: Level) -> tuple[Weighted, Weighted]:
            return level.moved(level.matrix, through), level.target()

        loss, gradient = self.loss_and_gradient(level, pair, (0,), velocity, through=False)
        step, moments = self.descend(level, gradient, state.moments)
        return State(self.smooth(velocity + step), moments), loss

    def transforms_of_fields(self, found: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the flows of the velocity and of its negative."""
        forward, backward = (scaling_and_squaring(v, self.num_steps) for v in (found, -found))
        return forward, backward
