r"""The SyN stage: both images are deformed and meet in the middle.

Two diffeomorphisms of the fixed space, :math:`\varphi_f` and :math:`\varphi_m`, make
:math:`F \circ \varphi_f` and :math:`M \circ A \circ \varphi_m` alike. Each grows by steps composed
from the right, as in the greedy stage, with the gradient of the same loss with respect to its own
image, so that neither image is preferred: exchanging the images (and inverting the affine)
exchanges the halves. In the end

.. math:: \psi = \varphi_m \circ \varphi_f^{-1}, \qquad
          \psi^{-1} = \varphi_f \circ \varphi_m^{-1}.

The halves are inverted once, when the stage ends: the iterations need no inverse. The idea of the
symmetric halves is that of Avants et al., "Symmetric diffeomorphic image registration with
cross-correlation", Medical Image Analysis 12, 2008.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax

from jaxreg import compose, invert_displacement
from jaxreg._shared_planes import overwriting
from jaxreg.registration.stages.deformable import Regularisation
from jaxreg.registration.stages.diffeomorphic import Diffeomorphic
from jaxreg.registration.stages.iterative import State
from jaxreg.registration.stages.problem import Level, Weighted
from jaxreg.registration.stages.regularisers import Elasticity
from jaxreg.registration.stages.windows import window_of
from jaxreg.warp import INVERSE_TOLERANCE

__all__ = ["SyN"]

_ELASTICITY = Elasticity(0.5)


@dataclasses.dataclass(frozen=True)
class SyN(Diffeomorphic):
    """Two diffeomorphisms that meet in the middle. The settings are those of `Diffeomorphic`.

    The steps are those of each half. The regularised field holds the displacements of both halves,
    ``(2, [Z,] Y, X, D)``, the fixed one first.
    """

    name: ClassVar[str] = "syn"
    fields: ClassVar[int] = 2

    regularisation: Regularisation | None = _ELASTICITY

    def prepared(self, level: Level) -> Level:
        """Return a level as `Deformable.prepared` does, with the windows of both images."""
        fixed, moving = (window_of(image, level.shape) for image in (level.fixed, level.moving))
        return super().prepared(level)._replace(fixed_window=fixed, moving_window=moving)

    def step(self, level: Level, state: State, progress: jax.Array) -> tuple[State, jax.Array]:
        """Take one step of both halves; return the loss before it."""
        halves = state.found
        through = level.after(halves[1:])

        def pair(level: Level) -> tuple[Weighted, Weighted]:
            return level.moved(level.matrix, through), level.fixed_moved(halves[:1])

        loss, gradient = self.loss_and_gradient(level, pair, (1, 0), halves, through=True)
        step, moments = self.descend(level, gradient, state.moments)
        return State(self.after_step(halves, step), moments), loss

    def transforms_of_fields(self, found: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the way from the fixed image through the middle, and the way back."""
        with overwriting():
            # What is composed with an inverse is to be more exact than inverses are asked to be:
            # where the search for one ends, rounding decides.
            inverses = invert_displacement(found, tolerance=INVERSE_TOLERANCE / 10)
            forward = compose(found[1:], inverses[:1])
            backward = compose(found[:1], inverses[1:])
        return forward, backward
