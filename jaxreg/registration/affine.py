"""The affine stage: gradient descent with Adam on a matrix and a shift, from coarse to fine."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpy.typing import NDArray

from jaxreg import interpolate
from jaxreg.registration.grid import normalised_to_voxel
from jaxreg.registration.progress import Callback, Loss, Progress, blocks, check_schedule
from jaxreg.registration.pyramid import downsample, level_shape
from jaxreg.registration.similarity import Similarity, find_loss
from jaxreg.registration.volume import Volume, centre_of_mass

__all__ = ["Affine", "align_centres_of_mass", "register_affine"]

# The product of a few small matrices costs nothing, but with TensorFloat-32, the default for
# float32 products on recent GPUs, it would move the samples by a tenth of a voxel.
_matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


@dataclasses.dataclass(frozen=True)
class Affine:
    """Settings of the affine stage.

    Attributes
    ----------
    scales
        How many times wider a voxel is than at full resolution, per level.
    iterations
        Steps per level.
    learning_rate
        How far, in voxels of the level, a step of one parameter moves the corners of the fixed
        volume at most. Within a level it decays to a tenth, along half a cosine.
    loss
        ``"ncc"``, the global one, which still pulls where little overlaps; ``"lncc"``; or
        ``loss(pred, target)``: a scalar to be minimised, any JAX function of two images
        ``(1, 1, [Z,] Y, X)``.
    kernel_size
        Window of ``"lncc"``, in voxels of the level, odd.

    Raises
    ------
    ValueError
        If scales and iterations do not make a schedule, or for an unknown loss or window.
    """

    scales: tuple[float, ...] = (4, 2)
    iterations: tuple[int, ...] = (80, 40)
    learning_rate: float = 0.5
    loss: Similarity = "ncc"
    kernel_size: int = 7

    def __post_init__(self) -> None:
        check_schedule(self.scales, self.iterations)
        find_loss(self.loss, self.kernel_size)


class _Parameters(NamedTuple):
    r"""An affine transform about the centres of mass of the two volumes.

    A fixed physical point :math:`p` goes to

    .. math:: c_m + B (p - c_f) + L s

    with the length :math:`L` of half the fixed volume's diagonal: a change of any parameter by
    :math:`\epsilon` moves no point of the volume by more than about :math:`\epsilon L`, so that one
    learning rate fits all of them.
    """

    matrix: jax.Array
    """:math:`B`, ``(D, D)``."""
    shift: jax.Array
    """:math:`s`, ``(D,)``."""


class _Frame(NamedTuple):
    """What turns parameters into an affine in normalised coordinates."""

    centre_fixed: jax.Array
    centre_moving: jax.Array
    length: jax.Array
    to_physical: jax.Array
    """``(D + 1, D + 1)``, fixed normalised -> physical."""
    to_normalised: jax.Array
    """``(D + 1, D + 1)``, physical -> moving normalised."""

    def physical(self, parameters: _Parameters) -> jax.Array:
        """Return the transform of physical points, ``(D + 1, D + 1)``."""
        offset = self.centre_moving + self.length * parameters.shift
        offset -= _matmul(parameters.matrix, self.centre_fixed)
        top = jnp.concatenate([parameters.matrix, offset[:, None]], axis=1)
        return jnp.concatenate([top, jnp.eye(1, top.shape[1], top.shape[1] - 1, dtype=top.dtype)])

    def normalised(self, parameters: _Parameters) -> jax.Array:
        """Return the ``affine`` of `jaxreg.interpolate`, ``(1, D, D + 1)``."""
        chain = _matmul(self.to_normalised, _matmul(self.physical(parameters), self.to_physical))
        return chain[None, :-1]


class _State(NamedTuple):
    parameters: _Parameters
    optimiser: optax.OptState


def align_centres_of_mass(fixed: Volume, moving: Volume) -> NDArray[np.float64]:
    """Return the shift that takes the fixed centre of mass to the moving one.

    Parameters
    ----------
    fixed, moving
        The volumes; see `centre_of_mass`.

    Returns
    -------
    ndarray
        ``(D + 1, D + 1)``, physical fixed -> physical moving, millimetres.
    """
    transform = np.eye(fixed.ndim + 1)
    transform[:-1, -1] = centre_of_mass(moving) - centre_of_mass(fixed)
    return transform


def register_affine(
    fixed: Volume,
    moving: Volume,
    settings: Affine | None = None,
    *,
    initial: NDArray[np.float64] | None = None,
    callback: Callback | None = None,
) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
    """Find the affine transform that makes the moving volume look like the fixed one.

    Each level runs in blocks of iterations, each block in one jitted call on the device; nothing
    is read back before the end unless the callback does.

    Parameters
    ----------
    fixed, moving
        Volumes that may differ in size, spacing, origin and direction. Outside of its grid the
        moving volume is 0.
    settings
        See `Affine`.
    initial
        ``(D + 1, D + 1)``, physical fixed -> physical moving, to start from; by default the
        centres of mass are aligned.
    callback
        Called with a `Progress` after each block of iterations.

    Returns
    -------
    transform
        ``(D + 1, D + 1)``, physical fixed -> physical moving, millimetres.
    losses
        ``(sum(iterations),)``, the loss before each step.
    """
    settings = settings or Affine()
    initial = align_centres_of_mass(fixed, moving) if initial is None else np.asarray(initial)
    frame = _make_frame(fixed, moving, initial)
    parameters = _Parameters(
        jnp.asarray(initial[:-1, :-1], jnp.float32), jnp.zeros(fixed.ndim, jnp.float32)
    )
    fixed_image, moving_image = fixed.batched(), moving.batched()
    loss = find_loss(settings.loss, settings.kernel_size)
    losses = []
    done, total = 0, sum(settings.iterations)
    for scale, iterations in zip(settings.scales, settings.iterations, strict=True):
        shape = level_shape(fixed.shape, scale)
        target = downsample(fixed_image, shape)
        source = downsample(moving_image, level_shape(moving.shape, scale))
        step = settings.learning_rate * _voxel_size(fixed, shape) / frame.length
        state = _State(parameters, _ADAM.init(parameters))
        for first, count in blocks(iterations):
            progress = np.arange(first, first + count) / max(iterations - 1, 1)
            rates = step * jnp.asarray(0.55 + 0.45 * np.cos(np.pi * progress), jnp.float32)
            state, values = _descend(state, frame, target, source, rates, loss)
            losses.append(values)
            done += count
            if callback is not None:
                callback(Progress("affine", scale, done, total, values))
        parameters = state.parameters
    transform = np.asarray(frame.physical(parameters), dtype=np.float64)
    return transform, np.concatenate([np.zeros(0, np.float32), *map(np.asarray, losses)])


_ADAM = optax.scale_by_adam(b1=0.9, b2=0.99)


@functools.partial(jax.jit, static_argnames="loss")
def _descend(
    state: _State,
    frame: _Frame,
    target: jax.Array,
    source: jax.Array,
    rates: jax.Array,
    loss: Loss,
) -> tuple[_State, jax.Array]:
    """Take one step per rate; return the losses before each of them."""

    def objective(parameters: _Parameters) -> jax.Array:
        moved = interpolate(source, frame.normalised(parameters), out_shape=target.shape[2:])
        return loss(moved, target)

    def step(state: _State, rate: jax.Array) -> tuple[_State, jax.Array]:
        value, gradient = jax.value_and_grad(objective)(state.parameters)
        direction, optimiser = _ADAM.update(gradient, state.optimiser)
        parameters = jax.tree.map(lambda p, d: p - rate * d, state.parameters, direction)
        return _State(parameters, optimiser), value

    return jax.lax.scan(step, state, rates)


def _make_frame(fixed: Volume, moving: Volume, initial: NDArray[np.float64]) -> _Frame:
    centre_fixed = centre_of_mass(fixed)
    centre_moving = initial[:-1, :-1] @ centre_fixed + initial[:-1, -1]
    extent = np.asarray(fixed.spacing) * np.array(fixed.shape[::-1])
    parts = (
        centre_fixed,
        centre_moving,
        np.linalg.norm(extent) / 2,
        fixed.normalised_to_physical(),
        np.linalg.inv(moving.normalised_to_physical()),
    )
    return _Frame(*(jnp.asarray(part, jnp.float32) for part in parts))


def _voxel_size(volume: Volume, shape: tuple[int, ...]) -> float:
    """Return the largest voxel spacing of a level, in millimetres."""
    coarser = np.diag(normalised_to_voxel(volume.shape)) / np.diag(normalised_to_voxel(shape))
    return float(np.max(np.asarray(volume.spacing) * coarser[:-1]))
