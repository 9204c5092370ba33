"""Images that are sampled again and again, with the planes of neighbours beside each device's own.

They do not change while a field does, so that those planes travel once for all iterations of a
level, and a slab's samples are taken in one call.
"""

from __future__ import annotations

import jax

from jaxreg import interpolate
from jaxreg._shared_planes import planes_over, samples_of_neighbours
from jaxreg._slabs import Slabs, planes_beside
from jaxreg.registration.stages.spread import AXIS, devices_of, spec

__all__ = ["own_planes", "sample", "window_of"]

_PLANES = 2


def window_of(image: jax.Array, grid: tuple[int, ...]) -> jax.Array | None:
    """Return what each device may sample of an image nearby.

    Parameters
    ----------
    image
        ``(1, C, Z, Y, X)``.
    grid
        Shape of the grid that it will be sampled on, ``(Z, Y, X)``.

    Returns
    -------
    Array or None
        ``(1, C, W, Y, X)``: of each device its planes between some of its neighbours', zeros where
        there are none. `None` where one device has all, or not all have as many.
    """
    if not _divides(grid) or not _divides(image.shape[_PLANES:]):
        return None
    slabs = _slabs(image.shape[_PLANES:])
    beside = planes_beside(slabs.own)
    if slabs.own < beside:
        return None

    def of_slab(own: jax.Array) -> jax.Array:
        return slabs.with_halo(own, _PLANES, beside, beside)

    planes = spec(_PLANES)
    window: jax.Array = jax.shard_map(of_slab, in_specs=planes, out_specs=planes)(image)
    return window


def own_planes(window: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Return the image of a shape, ``(Z, Y, X)``, that a window was made of."""
    slabs = _slabs(shape)
    beside = planes_beside(slabs.own)

    def of_slab(part: jax.Array) -> jax.Array:
        return jax.lax.slice_in_dim(part, beside, beside + slabs.own, axis=_PLANES)

    planes = spec(_PLANES)
    image: jax.Array = jax.shard_map(of_slab, in_specs=planes, out_specs=planes)(window)
    return image


def sample(
    window: jax.Array,
    shape: tuple[int, ...],
    affine: jax.Array | None,
    displacement: jax.Array,
) -> jax.Array:
    """Return samples as by `jaxreg.interpolate`, with those of the border outside of the image.

    Parameters
    ----------
    window
        As of `window_of`.
    shape
        ``(Z, Y, X)`` of the image that it was made of.
    affine, displacement
        The affine comes last. That samples lie near is promised; see `jaxreg._slabs.lie_near`.
    """
    beside = planes_beside(_slabs(shape).own)
    planes = displacement.shape[1]

    def of_slab(part: jax.Array, own: jax.Array, *affine: jax.Array) -> jax.Array:
        over = planes_over(AXIS, planes=planes, sampled_planes=shape[0])
        with over, samples_of_neighbours(beside):
            return interpolate(
                part,
                affine[0] if affine else None,
                own,
                affine_last=True,
                padding_mode="border",
            )

    last = () if affine is None else (affine,)
    moved: jax.Array = jax.shard_map(
        of_slab,
        in_specs=(spec(_PLANES), spec(1), *(spec(None) for _ in last)),
        out_specs=spec(_PLANES),
    )(window, displacement, *last)
    return moved


def _divides(shape: tuple[int, ...]) -> bool:
    """Whether several devices share a volume, and each has as many planes."""
    return devices_of(shape) > 1 and shape[0] % devices_of(shape) == 0


def _slabs(shape: tuple[int, ...]) -> Slabs:
    return Slabs(shape[0], (AXIS,), devices_of(shape))
