"""The moments stage: centres of mass and principal axes, a start for the stages that iterate."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxreg.registration.intensities import background
from jaxreg.registration.programs import Program, on_device
from jaxreg.registration.progress import Callback, Progress
from jaxreg.registration.stages.base import Stage, Trace
from jaxreg.registration.stages.matrices import inverse, matmul, principal_axes
from jaxreg.registration.stages.metrics import NCC, MetricField
from jaxreg.registration.stages.problem import Alignment, Level, Problem, charged
from jaxreg.registration.stages.pyramid import FEW_CHANNELS

__all__ = ["Moments", "centre_and_covariance", "centre_of_mass", "moments_of_mass"]


@dataclasses.dataclass(frozen=True)
class Moments(Stage):
    """Settings of the stage that aligns centres of mass and, if asked for, principal axes.

    It looks at the transform that it starts from, at that one shifted so that the centres of mass
    meet, and at the rotations that also turn the principal axes onto each other: two in the plane,
    four in space, because an axis has no sign. The one with the lowest loss is the result. Where
    both volumes have a single slice, all of them stay within its plane.

    The mass of a voxel is how far its intensity is from that of the background, whichever that is,
    less a twentieth of the image's range, in which noise counts nothing; times the mask. Without a
    clear background (see `background`) it is the intensity above the image's minimum.

    Attributes
    ----------
    rotation
        Whether principal axes are tried.
    scale
        How many times wider a voxel is than at full resolution where all this is computed.
    metric
        What chooses among them; see `Iterative`.

    Raises
    ------
    ValueError
        For an unknown metric, or a number out of its range.
    """

    name: ClassVar[str] = "moments"

    rotation: bool = True
    scale: float = 4
    metric: MetricField = MetricField(NCC())

    def __post_init__(self) -> None:
        if not self.scale >= 1:
            raise ValueError(f"scale: expected a number of at least 1, got {self.scale}")

    @property
    def scales(self) -> tuple[float]:
        """The one scale at which the stage looks."""
        return (self.scale,)

    @property
    def iterations(self) -> tuple[()]:
        """Empty, because the stage does not iterate."""
        return ()

    def run(
        self, problem: Problem, alignment: Alignment, callback: Callback | None = None
    ) -> tuple[Alignment, tuple[Trace, ...]]:
        """Return the best alignment; its trace has the losses at the start and at the end."""
        stage = self.for_scale(self.scale)
        level = problem.level(self.scale, alignment, stage.metric)
        # One program for both images where they have one shape, and for a linear stage after this.
        of_fixed = moments_of_mass(level.fixed, level.fixed_mask)
        of_moving = moments_of_mass(level.moving, level.moving_mask)
        matrix, losses = _best(stage, level, of_fixed, of_moving)
        if callback is not None:
            callback(Progress(self.name, self.scale, 1, 1, losses))
        trace = Trace(losses, on_device(np.int32(2)), on_device(np.bool_(True)))
        return alignment._replace(matrix=matrix), (trace,)


@Program
def _best(
    stage: Moments, level: Level, of_fixed: MassMoments, of_moving: MassMoments
) -> tuple[jax.Array, jax.Array]:
    fixed = of_fixed.in_space(level.to_physical)
    moving = of_moving.in_space(inverse(level.to_moving))
    plane = level.plane()
    linear = level.matrix[:-1, :-1]
    if plane is None:
        turns = [linear, *(_rotations(fixed[1], moving[1]) if stage.rotation else ())]
        others = [_about(turn, fixed[0], moving[0]) for turn in turns]
    else:
        # Points of the fixed slice stay within it, and go on from there as they did before.
        along = matmul(linear, plane)
        eye = jnp.asarray(np.eye(2, dtype=along.dtype))
        turns = [eye]
        if stage.rotation:
            inside = (matmul(v.T, matmul(c, v)) for v, c in ((plane, fixed[1]), (along, moving[1])))
            turns += _rotations(*inside)
        aside = moving[0] - (linear * fixed[0]).sum(axis=1) - level.matrix[:-1, -1]
        shift = (along * aside[:, None]).sum(axis=0) / (along**2).sum(axis=0)
        goal = fixed[0] + (plane * shift).sum(axis=1)
        others = []
        for turn in turns:
            change = matmul(plane, matmul(turn - eye, plane.T))
            whole = jnp.asarray(np.eye(3, dtype=turn.dtype)) + change
            others.append(matmul(level.matrix, _about(whole, fixed[0], goal)))
    candidates = jnp.stack([level.matrix, *others])
    target = level.target()

    def evaluate(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
        moved = level.moved(matrix, level.displacement)
        weight = moved.weight * target.weight
        loss = stage.metric.loss_of_level(
            moved.image, target.image, weight, fixed=level.fixed, moving=level.moving
        )
        return loss.astype(jnp.float32), weight.sum()

    losses, overlaps = jax.lax.map(evaluate, candidates)
    losses = charged(losses, overlaps, overlaps.max())
    best = jnp.argmin(losses)
    return candidates[best], jnp.stack([losses[0], losses[best]])


def _about(turn: jax.Array, fixed: jax.Array, moving: jax.Array) -> jax.Array:
    """Return the transform with a linear part that takes one centre to the other."""
    ndim = fixed.size
    top = jnp.concatenate([turn, (moving - (turn * fixed).sum(axis=1))[:, None]], axis=1)
    transform: jax.Array = jnp.concatenate([top, np.eye(1, ndim + 1, ndim, dtype=top.dtype)])
    return transform


def _rotations(fixed: jax.Array, moving: jax.Array) -> list[jax.Array]:
    """Return the rotations that turn the principal axes of one covariance onto the other's."""
    source, target = jax.vmap(principal_axes)(jnp.stack([fixed, moving]))
    signs = (s for s in itertools.product((1, -1), repeat=len(fixed)) if math.prod(s) == 1)
    return [matmul(target * jnp.asarray(s, target.dtype), source.T) for s in signs]


@jax.jit
def _mass(image: jax.Array) -> jax.Array:
    """Return what the voxels of an image weigh, the sum over its channels, ``([Z,] Y, X)``."""
    around = background(image)
    spatial = tuple(range(2, image.ndim))

    def each(values: jax.Array) -> jax.Array:  # of the channels
        return values.reshape(1, -1, *(1,) * len(spatial))

    away = jnp.maximum(jnp.abs(image - each(around.value)) - each(around.spread), 0)
    above = image - image.min(axis=spatial, keepdims=True)
    mass: jax.Array = jnp.where(each(around.clear), away, above).sum(axis=(0, 1))
    return mass


def centre_and_covariance(
    image: jax.Array, mask: jax.Array | None, to_physical: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return the centre of mass of an image and the covariance of its mass, in physical space.

    Parameters
    ----------
    image
        ``(1, C, [Z,] Y, X)``; the channels are added up.
    mask
        ``(1, 1, [Z,] Y, X)``, or `None`.
    to_physical
        ``(D + 1, D + 1)``, normalised -> physical.

    Returns
    -------
    centre, covariance
        ``(D,)`` and ``(D, D)``. An image without mass has its centre in the middle.
    """
    return moments_of_mass(image, mask).in_space(to_physical)


def centre_of_mass(mean: jax.Array, to_physical: jax.Array) -> jax.Array:
    """Return where normalised coordinates ``(D,)``, such as a mean, are in physical space."""
    centre: jax.Array = (to_physical[:-1, :-1] * mean).sum(axis=1) + to_physical[:-1, -1]
    return centre


class MassMoments(NamedTuple):
    """What the mass of an image has about it, in normalised coordinates."""

    mean: jax.Array
    """``(D,)``."""
    covariance: jax.Array
    """``(D, D)``."""

    def in_space(self, to_physical: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the centre of mass and the covariance in physical space."""
        linear = to_physical[:-1, :-1]
        covariance = matmul(linear, matmul(self.covariance, linear.T))
        return centre_of_mass(self.mean, to_physical), covariance


@Program
def moments_of_mass(image: jax.Array, mask: jax.Array | None) -> MassMoments:
    """Return the mean and the covariance of the mass of an image; see `centre_and_covariance`."""
    mass, coordinates, mean = _distribution(image, mask)
    centred = [c - m for c, m in zip(coordinates, mean, strict=True)]
    rows = [jnp.stack([(mass * a * b).sum() for b in centred]) for a in centred]
    return MassMoments(mean, jnp.stack(rows))


def _distribution(
    image: jax.Array, mask: jax.Array | None
) -> tuple[jax.Array, list[jax.Array], jax.Array]:
    """Return the mass of the voxels, 1 in all, their normalised coordinates, and their mean."""
    channels = image.shape[1]
    if channels <= FEW_CHANNELS:
        mass = _mass(image)
    else:  # of all at once there would be copies

        def add(channel: jax.Array, so_far: jax.Array) -> jax.Array:
            one = jax.lax.dynamic_slice_in_dim(image, channel, 1, axis=1)
            total: jax.Array = so_far + _mass(one)
            return total

        start = jnp.zeros(image.shape[2:], image.dtype)
        mass = jax.lax.fori_loop(0, channels, add, start)
    if mask is not None:
        mass = mass * mask[0, 0]
    mass = mass / jnp.maximum(mass.sum(), jnp.finfo(mass.dtype).tiny)
    ndim = mass.ndim
    coordinates = []
    for axis in reversed(range(ndim)):  # x first
        size = mass.shape[axis]
        along = jnp.linspace(-1, 1, size, dtype=mass.dtype) if size > 1 else jnp.zeros(1)
        coordinates.append(along.reshape([-1 if a == axis else 1 for a in range(ndim)]))
    return mass, coordinates, jnp.stack([(mass * c).sum() for c in coordinates])
