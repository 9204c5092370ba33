r"""The FFD stage: a free-form deformation, whose field is a cubic B-spline of control points.

The displacement is :math:`d(x) = \sum_k c_k\, \beta^3(x / h - k)`, the tensor product of cubic
B-splines :math:`h` apart. What is looked for are the coefficients :math:`c`, by Adam, from the
exact gradient of the loss: the weights of a voxel times its gradient with respect to :math:`d`,
summed over the voxels. As the weights of a voxel have the sum 1, no point moves further in a step
than the control points do. Between levels the control points come to be half as far apart, and the
field stays what it is: a spline is one of the finer lattice, too.

Unlike the diffeomorphisms of the other stages, :math:`x + d(x)` may fold. The penalty holds it
back, and where it still does the field is smoothed in the end. The model is that of Rueckert,
Sonoda, Hayes, Hill, Leach and Hawkes, "Nonrigid registration using free-form deformations", IEEE
Transactions on Medical Imaging 18, 1999.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, Literal, NamedTuple, Self, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxreg.registration.stages.adam import AdamMoments
from jaxreg.registration.stages.deformable import Deformable, Loss, Regularisation
from jaxreg.registration.stages.iterative import Resolution, State
from jaxreg.registration.stages.problem import Level
from jaxreg.registration.stages.regularisers import Bending
from jaxreg.registration.stages.splines import Lattice, expanded, refined

__all__ = ["FFD", "SpacingUnit"]

SpacingUnit = Literal["voxel", "mm"]
"""What control points are apart: voxels of the full resolution, or millimetres."""

_BENDING = Bending(1.0)


class _ControlPoints(NamedTuple):
    """A field."""

    coefficients: jax.Array
    """``(1, *lattice.shape, D)``, normalised coordinates."""
    lattice: Lattice
    """Static."""


@dataclasses.dataclass(frozen=True)
class FFD(Deformable):
    """A free-form deformation by cubic B-splines; the other settings are those of `Deformable`.

    Attributes
    ----------
    spacing
        From one control point to the next on the finest level: a number, or one for each axis in x,
        y, z order. On a coarser level it is 2, 4, 8, ... times as much, whichever is nearest to how
        many times wider the voxels are.
    unit
        Of the spacing: ``"voxel"``, of the fixed image at full resolution, or ``"mm"``, which has
        to be known when a program is made: not within ``jax.jit`` or ``jax.vmap``.
    regularisation
        Of the displacement on the grid of the level; see `Deformable`.

    Raises
    ------
    ValueError
        As `Deformable`, or for another spacing or unit; when it runs, for a spacing that is less
        than a voxel or has not as many numbers as the images axes, or for millimetres that are not
        known.
    """

    name: ClassVar[str] = "ffd"

    learning_rate: float = 1.0
    spacing: float | tuple[float, ...] = 5.0
    unit: SpacingUnit = "voxel"
    regularisation: Regularisation | None = _BENDING

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.spacing, list):
            object.__setattr__(self, "spacing", tuple(self.spacing))  # a list has no hash
        steps = self.spacing if isinstance(self.spacing, tuple) else (self.spacing,)
        if not steps or not all(map(_is_length, steps)):
            raise ValueError(
                f"spacing: expected a positive number, or one for each axis, got {self.spacing!r}"
            )
        if self.unit not in get_args(SpacingUnit):
            raise ValueError(
                f"unit: expected one of {', '.join(get_args(SpacingUnit))}, got {self.unit!r}"
            )

    def for_grid(self, shape: tuple[int, ...], to_physical: ArrayLike) -> Self:
        """Return the stage with a spacing in voxels."""
        found, steps = self, self._steps(len(shape))
        if self.unit == "mm":
            if isinstance(to_physical, jax.core.Tracer):
                raise ValueError(
                    "unit: expected 'voxel' within jax.jit and jax.vmap, "
                    "where millimetres are not known when the program is made, got 'mm'"
                )
            edges = np.linalg.norm(np.asarray(to_physical, np.float64)[:-1, :-1], axis=0)
            widths = [2 * e / max(n - 1, 1) for e, n in zip(edges[::-1], shape, strict=True)]
            # So headers that differ by rounding share their programs.
            steps = tuple(float(f"{s / w:.5g}") for s, w in zip(steps, widths, strict=True))
            found = dataclasses.replace(self, spacing=steps[::-1], unit="voxel")
        if any(step < 1 and size > 1 for step, size in zip(steps, shape, strict=True)):
            raise ValueError(
                f"spacing: expected at least a voxel of the fixed image, got {self.spacing} "
                f"{self.unit}, that is {steps[::-1]} voxels"
            )
        return found

    def begin(self, level: Level, resolution: Resolution, measured: None) -> State:
        """Return control points that do not move anything."""
        spacing = tuple(map(float, self._steps(level.ndim)))
        lattice = Lattice(resolution.whole, spacing, self._doublings(resolution.scale))
        zero = jnp.zeros((1, *lattice.shape, level.ndim), jnp.float32)
        moments = AdamMoments(jnp.zeros((), jnp.int32), jnp.copy(zero), jnp.zeros((), jnp.float32))
        return State(_ControlPoints(zero, lattice), moments)

    def resized(self, state: State, shape: tuple[int, ...], resolution: Resolution) -> State:
        """Return the same field, and what is known of its gradient, for control points as near.

        They are not taken apart again where a level is coarser than the one before.
        """
        points: _ControlPoints = state.found
        moments: AdamMoments = state.moments
        while points.lattice.doublings > self._doublings(resolution.scale):
            coefficients, mu = (
                refined(field, points.lattice) for field in (points.coefficients, moments.mu)
            )
            points = _ControlPoints(coefficients, points.lattice.halved())
            moments = moments._replace(mu=mu)
        return State(points, moments)

    def step(self, level: Level, state: State, progress: jax.Array) -> tuple[State, jax.Array]:
        """Take one step; return the loss before it."""
        points: _ControlPoints = state.found

        def field(coefficients: jax.Array) -> jax.Array:
            return expanded(coefficients, points.lattice, level.shape)

        displacement, to_coefficients = jax.vjp(field, points.coefficients)
        penalty = self.penalty(level, displacement)
        loss, slope = self._loss_and_slope(level, displacement)
        (gradient,) = to_coefficients(slope if penalty.pull is None else slope + penalty.pull)
        step, moments = self._descend(level, points.lattice, gradient, state.moments)
        points = points._replace(coefficients=points.coefficients + step)
        return State(points, moments), loss + penalty.value

    def transforms(
        self, shape: tuple[int, ...], found: _ControlPoints
    ) -> tuple[jax.Array, jax.Array | None]:
        """Return the displacement on the grid; nothing is known of its inverse."""
        return expanded(found.coefficients, found.lattice, shape), None

    def _loss_and_slope(self, level: Level, displacement: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the loss, and its gradient with respect to the displacement.

        The weights are held fixed, as `loss_and_slopes` says.
        """
        through, to_displacement = jax.vjp(level.after, displacement)
        if self.takes_channels_singly(level):
            weight = level.channel(0).moved(level.matrix, through).weight * level.target().weight

            def of_channel(one: Level, loss: Loss) -> tuple[jax.Array, jax.Array]:
                def of_warp(warp: jax.Array) -> jax.Array:
                    return loss(one.moved(one.matrix, warp).image, one.target().image)

                return jax.value_and_grad(of_warp)(through)

            loss, slope = self.by_channels(level, weight, of_channel)
        else:

            def of_warp(warp: jax.Array) -> jax.Array:
                moved = level.moved(level.matrix, warp)
                weight = jax.lax.stop_gradient(moved.weight)
                return self.loss(level, moved._replace(weight=weight), level.target())

            loss, slope = jax.value_and_grad(of_warp)(through)
        (slope,) = to_displacement(slope)
        return loss, slope

    def _descend(
        self, level: Level, lattice: Lattice, gradient: jax.Array, moments: AdamMoments
    ) -> tuple[jax.Array, AdamMoments]:
        """Return the step for the gradient of a mean loss, and the moments after it.

        The first moment is Adam's; the second is that of the control point whose gradient is the
        longest. Were it each point's own, all would begin with steps of one length, and a strong
        penalty cannot bear what that does to neighbours.
        """
        # Per voxel of the full resolution, of the loss summed over the voxels of the level and
        # shared among the control points: its size does not depend on either.
        per_voxel = [
            np.asarray([max(n - 1, 1) / 2 for n in shape[::-1]], np.float32)
            for shape in (lattice.whole, level.shape)
        ]
        shares = math.prod(level.shape) / lattice.voxels(level.shape)
        wider = float((per_voxel[0] / per_voxel[1]).max())
        gradient, epsilon = self.in_scale(
            level, shares / per_voxel[0] * gradient, self.epsilon / wider
        )
        count = moments.count + 1
        mu = self.beta1 * moments.mu + (1 - self.beta1) * gradient
        nu = self.beta2 * moments.nu + (1 - self.beta2) * (gradient**2).sum(axis=-1).max()
        mean, square = mu / (1 - self.beta1**count), nu / (1 - self.beta2**count)
        direction = mean / (jnp.sqrt(square) + epsilon)
        longest = jnp.sqrt((direction**2).sum(axis=-1).max())
        rate = self.learning_rate * jnp.minimum(1, 0.5 / jnp.maximum(longest, 0.5))
        moves = np.asarray([n > 1 for n in level.shape[::-1]], np.float32)
        step = -rate * direction * (moves / per_voxel[1])
        return step, AdamMoments(count, mu, nu)

    def _doublings(self, scale: float) -> int:
        """Return how often the spacing is doubled on the level of a scale."""
        return max(0, round(math.log2(scale / min(self.scales))))

    def _steps(self, ndim: int) -> tuple[float, ...]:
        """Return the spacing on the finest level in the order of the axes, in its unit."""
        steps = self.spacing if isinstance(self.spacing, tuple) else (self.spacing,) * ndim
        if len(steps) != ndim:
            raise ValueError(
                f"spacing: expected one number, or {ndim} in {'xyz'[:ndim]} order, got {steps}"
            )
        return steps[::-1]


def _is_length(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and 0 < float(value) < math.inf
