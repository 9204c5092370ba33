"""Bringing a volume to another grid through a chain of transforms."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike, NDArray

from jaxreg import interpolate, interpolate_labels
from jaxreg.registration.across import across
from jaxreg.registration.intensities import background
from jaxreg.registration.programs import Program
from jaxreg.registration.stages.spread import spread
from jaxreg.registration.transforms.parts import (
    Step,
    affine_between,
    chain_on,
    displacements,
    fields_of,
    turned,
)
from regkernels import Grid, Volume
from regkernels.grid import inverse_matrix
from regkernels.maps import Part, as_part

__all__ = ["Interpolation", "Outside", "outside_values", "resample"]

Interpolation = Literal["linear", "nearest", "labels", "cubic", "b-spline"]

_Smooth = Literal["bilinear", "cubic", "b-spline"]

_SMOOTH: dict[Interpolation, _Smooth] = {
    "linear": "bilinear",
    "cubic": "cubic",
    "b-spline": "b-spline",
}
"""Interpolations that make up values, in float32, and the mode of `interpolate`."""

Outside = float | Sequence[float] | NDArray[Any] | Literal["background"] | None
"""What is outside of a volume: a number, one for each channel, its background, or the default."""

_IMAGE = 2
"""The axis of the planes of an image."""

_ROUNDING = 1e-6
"""So far from 1 may the weights of a sample within an image add up to."""


def resample(
    volume: Volume,
    reference: Volume | Grid,
    parts: Sequence[Part | ArrayLike] = (),
    interpolation: Interpolation = "linear",
    outside: Outside = None,
    *,
    devices: Sequence[jax.Device] | None = None,
) -> Volume:
    """Sample a volume where a chain of transforms sends the voxels of a grid.

    Parameters
    ----------
    volume
        What to sample.
    reference
        Gives the grid of the result.
    parts
        Affine maps (or their matrices) and displacement fields, in the order in which a point of
        the reference goes through them.
    interpolation
        ``"linear"``, ``"cubic"`` (convolution with Keys' kernel) or ``"b-spline"`` (the cubic
        spline through all values), with a result in float32; ``"nearest"``; or ``"labels"``, the
        label with the largest sum of linear weights. The latter two keep the dtype, and make up no
        values. Cubic ones are sharper than linear ones, and overshoot at edges.
    outside
        What is outside of the volume's grid, as `outside_values` takes it: by default the volume's
        own background where that is clear, else 0; of labels 0. Between the outermost voxels'
        centres it has no effect on linear interpolation; beyond, that gets to it over one voxel.
        Cubic ones get to it over two, from one before the outermost centres on.
    devices
        Which share the planes of volumes and fields in 3-D; one by default.

    Returns
    -------
    Volume
        On the reference's grid.

    Raises
    ------
    ValueError
        If the dimensions differ, a matrix cannot be inverted where it has to be, labels are
        not integers, or the volume cannot hold what is to be outside of it.
    TypeError
        If a part is neither an affine map, a displacement field nor a matrix, or what is to be
        outside is no number.
    """
    grid = reference.grid if isinstance(reference, Volume) else reference
    if grid.ndim != volume.ndim:
        raise ValueError(f"reference: expected {volume.ndim} dimensions as volume, got {grid.ndim}")
    around = outside_values(volume, outside, interpolation)
    chain = [as_part(part) for part in parts]
    fields = fields_of(chain)

    # Between outer edges an axis of one voxel has a length, and leaving it is noticed.
    to_physical = grid.normalised_to_physical(align_corners=False)
    on_grid = chain_on(chain, grid)
    way = _Way(
        affine_between(volume.grid, on_grid.matrix @ to_physical).astype(np.float32),
        inverse_matrix(to_physical)[:-1, :-1].astype(np.float32),
        on_grid.steps,
    )

    beyond = around if interpolation in _SMOOTH else None

    def sampled(sampler: _Sampler, image: NDArray[Any]) -> NDArray[Any]:
        """Sample an image ``(1, C, *S)`` with other types of values than the volume's, maybe."""

        def found(image: jax.Array, *fields: jax.Array) -> jax.Array:
            is_on_grid, shape = on_grid.is_on_grid, grid.shape
            return _sampled(
                image, fields, way, beyond, sampler=sampler, is_on_grid=is_on_grid, shape=shape
            )

        axes = [_IMAGE, *[0] * len(fields)]
        return np.asarray(across(devices, found, (image, *fields), axes, _IMAGE))

    values = np.asarray(volume.array)
    batch = values.reshape(1, volume.channels, *volume.shape)
    if interpolation in _SMOOTH:
        found = _sample_smooth(batch, around, sampled, _SMOOTH[interpolation])
    elif interpolation == "nearest":
        found = _sample_nearest(batch, around, sampled)
    else:
        found = _sample_labels(batch, around, sampled)
    return Volume.on_grid(grid, found.reshape(*values.shape[: -volume.ndim], *grid.shape))


class _Sampler(NamedTuple):
    """How an image is sampled."""

    kind: Literal["bilinear", "nearest", "cubic", "b-spline", "labels", "coverage"]
    """A mode of `interpolate`; ``"labels"``; or ``"coverage"``, by the nearest voxels."""
    background: int = 0
    """What is outside of the image: the label, or for other kinds 0 or not 0."""


class _Way(NamedTuple):
    """From the voxels of a grid to an image."""

    affine: NDArray[np.float32]
    """As that of `interpolate`."""
    to_normalised: NDArray[np.float32]
    """From millimetres to the normalised coordinates of the grid, linear."""
    steps: tuple[Step, ...]


@functools.partial(Program, static=("sampler", "is_on_grid", "shape"))
def _sampled(
    image: jax.Array,
    fields: Sequence[jax.Array],
    way: _Way,
    outside: NDArray[np.float32] | None,
    *,
    sampler: _Sampler,
    is_on_grid: bool,
    shape: tuple[int, ...],
) -> jax.Array:
    """Sample an image for a grid of a shape; see `displacements`."""
    displacement = None
    if fields:
        vectors = displacements(fields, way.steps, is_on_grid=is_on_grid, shape=shape)
        displacement = turned(way.to_normalised, vectors)[None]
    where: dict[str, Any] = {
        "affine": jnp.asarray(way.affine),
        "grid": displacement,
        "affine_last": True,
        "out_shape": shape,
        "align_corners": False,
    }
    kind, background = sampler
    if kind == "labels":
        found = interpolate_labels(image, background=background, **where)
        assert isinstance(found, jax.Array)  # and no weights, which are not asked for
        return found
    if kind == "coverage":
        return _coverage(image, where, mode="nearest")
    found = interpolate(image, mode=kind, **where)
    if background == 0 or outside is None:
        return found
    # What the image covers is exact: the rounding of weights does not bring in the outside.
    missing = 1 - _coverage(image, where, mode=kind)
    around = outside.reshape(1, -1, *(1,) * (image.ndim - 2))
    return jnp.where(jnp.abs(missing) > _ROUNDING, found + around * missing, found)


def outside_values(
    volume: Volume, outside: Outside = None, interpolation: Interpolation = "linear"
) -> NDArray[Any]:
    """Return what `resample` finds outside of a volume's grid.

    Parameters
    ----------
    volume
        What is sampled.
    outside
        A number, or one for each channel. Or ``"background"``, the value that lies around the
        object: the median of the voxels on the faces of the volume, if at least half of them are no
        further from it than a twentieth of the image's range, in every channel. Otherwise the
        object reaches the border nearly everywhere, no background is clear, and it is 0. So it is
        of a constant image, of a mask, which holds 0 and 1 alone, and of integers beyond 2^24,
        which are labels. By default ``"background"``, and 0 with
        ``interpolation="labels"``.
    interpolation
        How it is sampled. If as ``"nearest"`` or ``"labels"``, the background is the volume's value
        nearest to the median, because no values are made up.

    Returns
    -------
    ndarray
        ``(C,)``; of the volume's dtype where no values are made up, otherwise float32.

    Raises
    ------
    ValueError
        If there are neither one finite number nor one for each channel, or the dtype does not hold
        them.
    TypeError
        If it is neither numbers nor ``"background"``.
    """
    array = np.asarray(volume.array)
    smooth = interpolation in _SMOOTH
    dtype = np.dtype(np.float32) if smooth else array.dtype
    if outside is None:
        outside = 0 if interpolation == "labels" else "background"
    if isinstance(outside, str) and outside == "background":
        voxels = array.reshape(1, volume.channels, *volume.shape)
        return _background(voxels, exact=not smooth).astype(dtype)
    return _checked(outside, volume.channels, dtype, whole=interpolation == "labels")


def _background(image: NDArray[Any], *, exact: bool) -> NDArray[Any]:
    """Return the background of an image where it is clear, else 0."""
    channels = image.reshape(image.shape[1], -1)
    nothing = np.zeros(len(channels), image.dtype)
    if (channels.min(axis=1) == channels.max(axis=1)).all() or _are_labels(channels):
        return nothing
    value, _, clear = map(np.asarray, background(np.asarray(image, np.float32)))
    if not clear.all():
        return nothing
    if not exact:
        return value
    return np.stack([_nearest(c, v) for c, v in zip(channels, value, strict=True)])


def _nearest(values: NDArray[Any], value: np.floating[Any]) -> Any:
    """Return the one of some values that is nearest to another, which mostly is one of them."""
    same = values.dtype.type(value)
    if same == value and (values == same).any():
        return same
    return values[np.abs(values.astype(np.float64) - value).argmin()]


def _are_labels(values: NDArray[Any]) -> bool:
    """Return whether values are those of a mask, or integers that float32 may not hold."""
    low, high = values.min(), values.max()
    if low >= 0 and high <= 1:
        return bool(((values == 0) | (values == 1)).all())
    whole = np.issubdtype(values.dtype, np.integer)
    return bool(whole and max(-int(low), int(high)) > 2**24)


def _checked(outside: Any, channels: int, dtype: np.dtype[Any], *, whole: bool) -> NDArray[Any]:
    """Return numbers as an array that holds them, one for each channel."""
    outside = outside.tolist() if hasattr(outside, "tolist") else outside
    numbers = list(outside) if isinstance(outside, Sequence) else [outside]
    for number in numbers:
        if not isinstance(number, Real) or isinstance(number, bool | np.bool_):
            raise TypeError(f"outside: expected 'background' or numbers, got {outside!r}")
    if len(numbers) not in (1, channels):
        raise ValueError(
            f"outside: expected 1 number, or {channels} as channels, got {len(numbers)}"
        )
    first: float
    last: float
    if np.issubdtype(dtype, np.integer):
        whole = True
        first, last = int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)
    else:
        last = 2**24 if whole else float(np.finfo(dtype).max)
        first = -last
    for number in numbers:
        if not first <= number <= last or (whole and number % 1):
            kind = "an integer" if whole else "a finite number"
            raise ValueError(f"outside: expected {kind} that {dtype} holds, got {number}")
    return np.array([dtype.type(number) for number in numbers]).repeat(channels // len(numbers))


_Sampled = Callable[[_Sampler, NDArray[Any]], NDArray[Any]]


def _sample_smooth(
    image: NDArray[Any], outside: NDArray[np.float32], sampled: _Sampled, mode: _Smooth
) -> NDArray[np.float32]:
    sampler = _Sampler(mode, int(outside.any()))
    return sampled(sampler, np.asarray(image, np.float32))


def _sample_nearest(image: NDArray[Any], outside: NDArray[Any], sampled: _Sampled) -> NDArray[Any]:
    codes, decode = _encode(image)
    found = decode(sampled(_Sampler("nearest"), codes))
    if outside.any():
        around = outside.reshape(1, -1, *(1,) * (image.ndim - 2))
        covered = sampled(_Sampler("coverage"), codes[:, :1])
        found = np.where(covered > 0, found, around)
    return found


def _coverage(image: jax.Array, where: dict[str, Any], **options: Any) -> jax.Array:
    """Return the part of each sample's weights that lies within an image, ``(1, 1, *S)``."""
    ones = spread(jnp.ones((1, 1, *image.shape[2:]), jnp.float32))
    return interpolate(ones, **where, **options)


def _sample_labels(labels: NDArray[Any], outside: NDArray[Any], sampled: _Sampled) -> NDArray[Any]:
    whole = labels
    if not np.issubdtype(labels.dtype, np.integer):
        whole = labels.astype(np.int64)
        if not np.array_equal(whole, labels):
            raise ValueError("volume: expected labels, which are integers, got other numbers")

    with jax.enable_x64(whole.dtype.itemsize == 8):
        channels = [
            sampled(_Sampler("labels", int(o)), whole[:, [k]]) for k, o in enumerate(outside)
        ]
    return np.concatenate(channels, axis=1).astype(labels.dtype)


def _encode(
    values: NDArray[Any],
) -> tuple[NDArray[np.float32], Callable[[NDArray[np.float32]], NDArray[Any]]]:
    """Write values in float32 without loss, 0 as 0, and give the way back.

    Where float32 does not hold all values of their dtype, they are numbered.
    """
    if np.can_cast(values.dtype, np.float32):
        return values.astype(np.float32), lambda codes: codes.astype(values.dtype)
    different = np.union1d(values, np.zeros(1, values.dtype))
    zero = np.searchsorted(different, 0)
    codes = np.searchsorted(different, values) - zero
    if different.size > 2**24:
        raise ValueError(f"volume: expected at most 2^24 different values, got {different.size}")
    return codes.astype(np.float32), lambda codes: different[codes.astype(np.int64) + zero]
