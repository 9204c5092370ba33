r"""The greedy stage: a diffeomorphism grown by composition of small steps, from coarse to fine.

The moving image :math:`M` is sampled at :math:`A(\psi(x))`, with an affine :math:`A` and
:math:`\psi = \mathrm{id} + d`. Each iteration composes a small step from the right,

.. math:: \psi \leftarrow \psi \circ (\mathrm{id} + \delta), \qquad
          \text{that is}\quad d \leftarrow \delta + d \circ (\mathrm{id} + \delta),

so :math:`\psi` stays invertible as long as every step is. The step minimises the loss to first
order; its gradient with respect to :math:`\delta` at 0 is

.. math:: \frac{\partial L}{\partial \delta(x)} = D\psi(x)^T \,\frac{\partial L}{\partial d(x)}
          = \frac{\partial L}{\partial I(x)} \nabla I(x), \qquad I = M \circ A \circ \psi .

It is *not* the gradient with respect to :math:`d`, which belongs to the additive update
:math:`d + \delta`: the two differ by :math:`D\psi^T`. The right-hand side needs the moved image
alone, no derivative of the warp. :math:`\nabla I` is taken by central differences. (The derivative
of the linear interpolant of :math:`I` at a voxel is its one-sided difference: it would drag the
image half a voxel to one side.)

Adam works in the tangent space at the identity, where :math:`\delta` lives, so its moments need no
transport from one :math:`\psi` to the next. The method is that of FireANTs: Jena, Chaudhari and
Gee, arXiv:2404.01249.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax

from jaxreg.registration.stages.deformable import Regularisation
from jaxreg.registration.stages.diffeomorphic import Diffeomorphic
from jaxreg.registration.stages.iterative import State
from jaxreg.registration.stages.problem import Level, Weighted
from jaxreg.registration.stages.regularisers import Elasticity
from jaxreg.registration.stages.windows import window_of

__all__ = ["Greedy"]

# About half of that of SyN, whose halves, each half as long, have together half the energy.
_ELASTICITY = Elasticity(0.2)


@dataclasses.dataclass(frozen=True)
class Greedy(Diffeomorphic):
    """One diffeomorphism, grown step by step. The settings are those of `Diffeomorphic`.

    The regularised field is its displacement.
    """

    name: ClassVar[str] = "greedy"

    regularisation: Regularisation | None = _ELASTICITY

    def prepared(self, level: Level) -> Level:
        """Return a level as `Deformable.prepared` does, without what only a moving target needs."""
        prepared = super().prepared(level)
        if level.fixed_mask is None:
            # What the target weighs follows from what takes a byte a voxel in place of four.
            prepared = prepared._replace(fixed_weight=None)
        else:
            prepared = prepared._replace(content=None)
        return prepared._replace(moving_window=window_of(level.moving, level.shape))

    def step(self, level: Level, state: State, progress: jax.Array) -> tuple[State, jax.Array]:
        """Take one step; return the loss before it."""
        displacement = state.found
        through = level.after(displacement)

        def pair(level: Level) -> tuple[Weighted, Weighted]:
            return level.moved(level.matrix, through), level.target()

        loss, gradient = self.loss_and_gradient(level, pair, (0,), displacement, through=True)
        step, moments = self.descend(level, gradient, state.moments)
        return State(self.after_step(displacement, step), moments), loss

    def transforms_of_fields(self, found: jax.Array) -> tuple[jax.Array, None]:
        """Return the displacement; nothing is known of its inverse."""
        return found, None
