"""What the deformable stages have in common: penalties, and how a deformation is finished."""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from jaxreg import compose, invert_displacement
from jaxreg._shared_planes import overwriting
from jaxreg.registration.stages.fields import mended
from jaxreg.registration.stages.iterative import (
    Iterative,
    mean_over_channels,
)
from jaxreg.registration.stages.metrics import Metric, as_metric
from jaxreg.registration.stages.problem import Alignment, Level, Weighted, charged
from jaxreg.registration.stages.regularisers import Regulariser

__all__ = ["Deformable", "Loss", "Penalty", "Regularisation"]

Regularisation = Callable[[jax.Array], jax.Array]
"""``penalty(field)``: a scalar that is added to the loss."""

Loss = Callable[[jax.Array, jax.Array], jax.Array]
"""``loss(pred, image)``: that of two images."""


class Penalty(NamedTuple):
    """The regularisation of a field.

    Attributes
    ----------
    value
        A scalar, in units of the loss.
    gradient
        That of the regularisation with respect to the field, `None` without one.
    unit
        What the gradient is multiplied by to have units of the loss, a scalar; `None`: 1. Whoever
        takes the gradient multiplies as it reads it: a pass over a field takes as long as some of
        the kernels.
    """

    value: jax.Array
    gradient: jax.Array | None = None
    unit: jax.Array | None = None

    @property
    def pull(self) -> jax.Array | None:
        """The gradient in units of the loss."""
        if self.gradient is None or self.unit is None:
            return self.gradient
        return self.unit * self.gradient


@dataclasses.dataclass(frozen=True)
class Deformable(Iterative):
    """Settings of the stages that deform; the others are those of `Iterative`.

    Attributes
    ----------
    learning_rate
        No step moves a point by more than half a voxel of the level times this.
    beta1, beta2
        Decay of Adam's two moments.
    epsilon
        Gradients that are small beside this lead to small steps: it is added to the root of Adam's
        second moment. In units of the metric's scale per voxel of the level, of the summed loss;
        where anything is to be gained gradients are about 0.1, and rounding is mostly below 1e-6.
    regularisation
        What is added to the loss: a `Regulariser` such as ``Diffusion(0.3)``, in units of the
        metric's scale; or ``penalty(field)``, a scalar in units of the loss, any JAX function of
        the stage's field ``(N, [Z,] Y, X, D)``, in normalised coordinates on the grid of the level.
    volume_change
        What lies between voxels becomes at most so many times larger or smaller, and never turns
        inside out: where it would, the deformation that the stage found is smoothed in the end.

    Raises
    ------
    ValueError
        As `Iterative`.
    """

    # To keep a field until the end of the level would cost as much memory again.
    stops_when_worse: ClassVar[bool] = True

    beta1: float = 0.9
    beta2: float = 0.99
    epsilon: float = 1e-5
    regularisation: Regularisation | None = None
    volume_change: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: expected 0 <= {name} < 1, got {getattr(self, name)}")
        if not self.epsilon > 0:
            raise ValueError(f"epsilon: expected a positive number, got {self.epsilon}")
        if not self.volume_change > 1:
            raise ValueError(f"volume_change: expected more than 1, got {self.volume_change}")

    def prepared(self, level: Level) -> Level:
        """Return a level with the unit of the regularisation.

        That is the metric's scale or, if it has none, the magnitude of its loss where the stage
        starts: so one weight fits metrics of any size.
        """
        if not isinstance(self.regularisation, Regulariser):
            return level
        if type(as_metric(self.metric)).scale is not Metric.scale:
            return level._replace(loss_unit=level.metric_scale)
        return level._replace(loss_unit=_first_loss(self, level))

    def penalty(self, level: Level, field: jax.Array) -> Penalty:
        """Return the regularisation of a field."""
        if self.regularisation is None:
            return Penalty(jnp.zeros((), field.dtype))
        penalty, pull = jax.value_and_grad(self.regularisation)(field)
        unit = level.loss_unit
        return Penalty(penalty if unit is None else unit * penalty, pull, unit)

    def loss_and_slopes(
        self, level: Level, moved: Weighted, target: Weighted, wrt: tuple[int, ...]
    ) -> tuple[jax.Array, tuple[jax.Array, ...], jax.Array]:
        """Return the loss of two images, and its gradients with respect to the images alone.

        The weights are held fixed: by their own gradient a field would push whatever does not match
        out of what is covered, and end with little that is.

        Parameters
        ----------
        level, moved, target
            The level and the two images.
        wrt
            With respect to which of them: 0 the moved image, 1 the target.

        Returns
        -------
        loss
            A scalar.
        slopes
            In the order of ``wrt``.
        rate
            What the slopes have still to be multiplied by, a scalar.
        """
        metric, weight = as_metric(self.metric), self.weight_of_both(moved, target)

        def of_images(pred: jax.Array, image: jax.Array) -> jax.Array:
            return metric.loss_of_level(pred, image, weight, fixed=level.fixed, moving=level.moving)

        loss, slopes = jax.value_and_grad(of_images, wrt)(moved.image, target.image)
        loss, rate = jax.value_and_grad(charged)(loss, weight.sum(), level.overlap)
        return loss, slopes, rate

    def by_channels(
        self,
        level: Level,
        weight: jax.Array,
        of_channel: Callable[[Level, Loss], tuple[jax.Array, jax.Array]],
    ) -> tuple[jax.Array, jax.Array]:
        """Return the loss of a level and its gradient, found channel by channel.

        Parameters
        ----------
        level
            The level.
        weight
            What the voxels of both images count together, ``(1, 1, [Z,] Y, X)``.
        of_channel
            ``of_channel(level, loss)``: the loss of one channel, which a level has alone, and its
            gradient, where ``loss(pred, image)`` is that of two images.
        """
        metric = as_metric(self.metric)

        def of(channel: jax.Array) -> tuple[jax.Array, jax.Array]:
            one = level.channel(channel)

            def of_images(pred: jax.Array, image: jax.Array) -> jax.Array:
                return metric.loss_of_level(pred, image, weight, fixed=one.fixed, moving=one.moving)

            return of_channel(one, of_images)

        loss, total = mean_over_channels(of, level.fixed.shape[1])
        loss, rate = jax.value_and_grad(charged)(loss, weight.sum(), level.overlap)
        return loss, rate * total

    @abc.abstractmethod
    def transforms(self, shape: tuple[int, ...], found: Any) -> tuple[jax.Array, jax.Array | None]:
        """Return the displacement of what was found, and what is known of its inverse.

        Both are on a grid of a shape.
        """

    def finish(self, shape: tuple[int, ...], alignment: Alignment, found: Any) -> Alignment:
        """Return the alignment with the deformation before it, and its inverse."""
        displacement, inverse = self.transforms(shape, found)
        if alignment.displacement is not None:
            displacement = compose(alignment.displacement, displacement)
            before = alignment.inverse_displacement
            inverse = None if inverse is None or before is None else compose(inverse, before)
        displacement, share = mended(displacement, self.volume_change)
        if alignment.mended is not None:
            share = jnp.maximum(share, alignment.mended)
        with overwriting():
            inverse = invert_displacement(displacement, inverse)
        return Alignment(alignment.matrix, displacement, inverse, share)


@functools.partial(jax.jit, static_argnames="stage")
def _first_loss(stage: Deformable, level: Level) -> jax.Array:
    """Return the magnitude of a stage's loss where it starts, a scalar."""
    moved = level.moved(level.matrix, level.displacement)
    return jnp.abs(stage.loss(level, moved, level.target()))
