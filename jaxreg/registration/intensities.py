"""What the intensities of an image say of it as a whole: its background, and its outliers."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from jaxreg.registration.programs import Program, on_device, rehearse
from jaxreg.registration.quantiles import quantiles

__all__ = [
    "Background",
    "Clip",
    "background",
    "check_clip",
    "clipped",
    "matched",
    "rehearse_background",
]

Clip = Literal["outliers"] | tuple[float, float] | None
"""Which intensities the metrics see: ``"outliers"`` are moved to a bound, so are those beyond two
quantiles, or none."""

_SAMPLE = 2**18
"""At most so many voxels, evenly spread, are looked at for a quantile."""

_OUTLIERS = 1e-4
"""The share of the voxels, at either end, that may be outliers; 8 of them in a small image."""


class Background(NamedTuple):
    """What lies around the object of an image.

    Attributes
    ----------
    value
        ``(C,)``: the median of the voxels on the faces of the volume, for each channel.
    spread
        ``(C,)``: a twentieth of the range of the image; noise in the background stays within it.
    clear
        ``(C,)``, bool: whether half of those voxels lie within the spread of the value. Otherwise
        the object reaches the border nearly everywhere, and nothing is known of a background.
    """

    value: jax.Array
    spread: jax.Array
    clear: jax.Array


def background(image: jax.Array | NDArray[Any]) -> Background:
    """Return the background of an image.

    Parameters
    ----------
    image
        ``(1, C, [Z,] Y, X)``. Of one in the memory of the host no more than what tells its
        background comes to a device.
    """
    if isinstance(image, np.ndarray):
        return _background_of(on_device(_border(image)), on_device(image[0][_places(image, np)]))
    return _background(image)


def rehearse_background(shape: tuple[int, ...]) -> None:
    """Have the program compiled that tells the background of an image in the memory of the host.

    Parameters
    ----------
    shape
        Of the image, ``(1, C, [Z,] Y, X)``. Its voxels are not looked at.
    """
    image = jax.ShapeDtypeStruct(shape, jnp.float32)  # type: ignore[no-untyped-call]
    looked_at = jax.eval_shape(lambda image: (_border(image), _sample(image)), image)
    rehearse(_background_of, *looked_at)


@Program
def _background(image: jax.Array) -> Background:
    return _background_of(_border(image), _sample(image))


@Program
def _background_of(border: jax.Array, sample: jax.Array) -> Background:
    """Return the background that the voxels on the faces tell, and some of all, ``(C, n)``."""
    (value,) = quantiles(border, (0.5,))
    low, high = quantiles(sample, (0.01, 0.99))
    spread = 0.05 * (high - low)
    near = jnp.abs(border - value[:, None]) <= spread[:, None]
    return Background(value, spread, near.mean(axis=1) >= 0.5)


def _border(image: Any) -> Any:
    """Return the voxels on the faces of the volume, ``(C, n)``; edges are in two of them."""
    channels = image.shape[1]
    faces = []
    for axis in range(1, image.ndim - 1):
        if image.shape[axis + 1] > 1:
            for end in (0, -1):
                faces.append(image[(0, *[slice(None)] * axis, end)].reshape(channels, -1))
    if not faces:
        return image[0].reshape(channels, -1)
    numbers = np if isinstance(image, np.ndarray) else jnp
    return numbers.concatenate(faces, axis=1)


def clipped(image: jax.Array, clip: Clip) -> jax.Array:
    """Return an image with the intensities that a metric is to see.

    Parameters
    ----------
    image
        ``(1, C, [Z,] Y, X)``.
    clip
        ``"outliers"``: intensities further from nearly all others (all but one in ten thousand at
        either end, or eight) than twice the range of those are brought to that distance. Few images
        have any. Two numbers: the quantiles, from 0 to 1, that bound the intensities. `None`: they
        stay as they are.

    Returns
    -------
    Array
        Shaped like the image.
    """
    if clip is None:
        return image
    sample = _sample(image)
    if clip == "outliers":
        share = min(max(_OUTLIERS, 8 / sample.shape[1]), 0.25)
        low, high = quantiles(sample, (share, 1 - share))
        without: jax.Array = _without_outliers(image, low, high)
        return without
    low, high = quantiles(sample, clip)
    bounded: jax.Array = _bounded(image, low, high)
    return bounded


@jax.jit
def matched(image: jax.Array, reference: jax.Array) -> jax.Array:
    """Return an image with the histogram of another, channel by channel.

    Parameters
    ----------
    image, reference
        ``(1, C, [Z,] Y, X)``; each has its own spatial shape.

    Returns
    -------
    Array
        Shaped like the image.

    Notes
    -----
    Knots are the minimum, the mean, fifteen quantiles (1/16 to 15/16) of what is above the mean,
    and the maximum. Those of the image go to those of the reference, and what is between to what is
    between, linearly. Above the mean is mostly the object: how much background there is around it
    does not count. It is what ITK's filter for this does (after Nyul and Udupa, "On standardizing
    the MR image intensity scale", 1999), with quantiles of the voxels in place of a histogram.
    """

    def knots(image: jax.Array) -> jax.Array:
        sample = _sample(image)
        mean = sample.mean(axis=1, keepdims=True)
        above = jnp.where(sample > mean, sample, jnp.nan)
        quantiles = jnp.nanquantile(above, jnp.linspace(0, 1, 17)[1:-1], axis=1).T
        axes = tuple(range(1, image.ndim - 1))
        low, high = (f(image[0], axes)[:, None] for f in (jnp.min, jnp.max))
        found = jnp.concatenate([low, mean, quantiles, high], axis=1)
        return jnp.where(jnp.isnan(found), low, found)  # of a constant image

    # Not flat: the planes of an image that is spread over devices would all be gathered for that.
    result: jax.Array = jax.vmap(jnp.interp)(image[0], knots(image), knots(reference))[None]
    return result


@jax.jit
def _without_outliers(image: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    reach = 2 * (high - low)
    # Where nearly all voxels are alike the few others are the object.
    reach = jnp.where(reach > 0, reach, jnp.inf)
    bounded: jax.Array = _bounded(image, low - reach, high + reach)
    return bounded


@jax.jit
def _bounded(image: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    bounds = (b.reshape(1, -1, *(1,) * (image.ndim - 2)) for b in (low, high))
    return jnp.clip(image, *bounds)


def check_clip(clip: Any) -> Clip:
    """Return what says which intensities are clipped; refuse what does not."""
    if clip is None:
        return None
    if isinstance(clip, str) and clip == "outliers":
        return "outliers"
    numbers = isinstance(clip, tuple | list) and all(isinstance(q, Real) for q in clip)
    if numbers and len(clip) == 2 and 0 <= clip[0] < clip[1] <= 1:
        return float(clip[0]), float(clip[1])
    raise ValueError(
        f"clip: expected 'outliers', None, or two quantiles such as (0.005, 0.995), got {clip!r}"
    )


@jax.jit
def _sample(image: jax.Array) -> jax.Array:
    """Return evenly spread voxels, ``(C, n)``."""
    return image[0][_places(image, jnp)]


def _places(image: Any, numbers: Any) -> tuple[Any, ...]:
    """Return the indices of evenly spread voxels of an item, as arrays of NumPy or JAX."""
    shape = image.shape[2:]
    count = math.prod(shape)
    # An odd step does not stay in the same column of an even grid.
    step = -(-count // _SAMPLE)
    step += (step + 1) % 2 if step > 1 else 0
    # Places in the volume, since an image that is spread over devices is flat on none of them.
    number = numbers.arange(-(-count // step), dtype=np.uint32) * np.uint32(step)
    places: list[Any] = []
    for size in reversed(shape):
        places.insert(0, number % np.uint32(size))
        number = number // np.uint32(size)
    return (slice(None), *places)
