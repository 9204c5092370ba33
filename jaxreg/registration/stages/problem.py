"""What a stage works on: two images with their places in space, at one scale."""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxreg import compose, gaussian_smooth, interpolate
from jaxreg._shared_planes import samples_near
from jaxreg._slabs import lie_near
from jaxreg.registration.intensities import Clip, clipped, matched
from jaxreg.registration.programs import Program, changed_fields, on_device
from jaxreg.registration.stages import windows
from jaxreg.registration.stages.coverage import coverage, margins
from jaxreg.registration.stages.fields import longest
from jaxreg.registration.stages.matrices import inverse, matmul
from jaxreg.registration.stages.metrics import Metric, shrunk
from jaxreg.registration.stages.pyramid import FEW_CHANNELS, downsample, level_shape, resize_field
from jaxreg.registration.stages.spread import devices_of, spread

__all__ = [
    "Alignment",
    "Level",
    "Probe",
    "Problem",
    "Weighted",
    "charged",
    "sampled_near",
]


class Weighted(NamedTuple):
    """An image on the fixed grid, ``(1, C, [Z,] Y, X)``.

    Its voxels count as much as ``weight`` says, ``(1, 1, [Z,] Y, X)``.
    """

    image: jax.Array
    weight: jax.Array


class Alignment(NamedTuple):
    """Where the stages have come to: the moving image is sampled at ``A(x + d(x))``.

    Attributes
    ----------
    matrix
        ``A`` in physical space, ``(D + 1, D + 1)``, fixed -> moving.
    displacement
        ``d``: ``(1, [Z,] Y, X, D)`` on the fixed grid, normalised coordinates; `None` as long as
        nothing is deformed.
    inverse_displacement
        ``e`` with ``(id + d) o (id + e) = id``, likewise.
    mended
        The largest share of the cells between voxels that a stage had to smooth, a scalar; `None`
        as long as nothing is deformed.
    """

    matrix: jax.Array
    displacement: jax.Array | None = None
    inverse_displacement: jax.Array | None = None
    mended: jax.Array | None = None


class Probe(NamedTuple):
    """What the curvature of a loss is computed from: a grid of fewer points over a level.

    Attributes
    ----------
    counts
        What squared slopes of the moving image count there, ``(1, C, [Z,] Y, X)``, for a weight of
        the moving image of 1.
    is_scaled
        Whether what follows has the unit of the loss, a scalar.
    displacement
        That of the level there, ``(1, [Z,] Y, X, D)``, if any.
    """

    counts: jax.Array
    is_scaled: jax.Array
    displacement: jax.Array | None


class Level(NamedTuple):
    """The two images at one scale, and the alignment that a stage starts from.

    Images are ``(1, C, [Z,] Y, X)``, masks ``(1, 1, [Z,] Y, X)``.
    """

    fixed: jax.Array
    moving: jax.Array
    fixed_mask: jax.Array | None
    moving_mask: jax.Array | None
    to_physical: jax.Array
    """``(D + 1, D + 1)``, fixed normalised -> physical."""
    to_moving: jax.Array
    """``(D + 1, D + 1)``, physical -> moving normalised."""
    matrix: jax.Array
    """``(D + 1, D + 1)``, physical fixed -> physical moving."""
    displacement: jax.Array | None
    fixed_margin: jax.Array
    moving_margin: jax.Array
    """Voxels at the ends of the axes that are not data, ``(D,)``; see `margins`."""
    reach: jax.Array | None
    """How many voxels around one have to be data, too, for it to count; a scalar, if any."""
    content: jax.Array | None
    """Where there is anything to compare; see `Metric.content`."""
    fixed_weight: jax.Array | None
    """What the voxels of the fixed image count, found out once for all iterations."""
    overlap: jax.Array
    """The sum of the weights at the alignment, a scalar: how many voxels count, of this grid."""
    metric_scale: jax.Array
    """How large losses are, a scalar; see `Metric.scale`."""
    loss_unit: jax.Array | None = None
    """What a penalty of a deformation is multiplied by, a scalar; see `Deformable.prepared`."""
    probe: Probe | None = None
    """For stages of second order; see `Linear.prepared`."""
    fixed_window: jax.Array | None = None
    moving_window: jax.Array | None = None
    """What devices that share the images sample of them nearby; see `window_of`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the fixed grid, ``([Z,] Y, X)``."""
        return self.fixed.shape[2:]

    @property
    def ndim(self) -> int:
        """Number of spatial dimensions."""
        return self.fixed.ndim - 2

    @property
    def has_many_channels(self) -> bool:
        """Whether it pays to have what an iteration computes for one channel at a time only."""
        return self.fixed.shape[1] > FEW_CHANNELS

    def channel(self, index: int | jax.Array) -> Level:
        """Return the level with one channel of both images alone."""
        images = self.fixed, self.moving, self.fixed_window, self.moving_window
        fixed, moving, fixed_window, moving_window = jax.tree.map(
            lambda image: jax.lax.dynamic_slice_in_dim(image, index, 1, axis=1), images
        )
        return self._replace(
            fixed=fixed, moving=moving, fixed_window=fixed_window, moving_window=moving_window
        )

    def voxel_size(self) -> jax.Array:
        """Return the largest distance between voxels of the fixed grid, in physical units."""
        edges = jnp.linalg.norm(self.to_physical[:-1, :-1], axis=0)
        voxels = jnp.asarray([max(n - 1, 1) for n in self.shape[::-1]], edges.dtype)
        largest: jax.Array = (2 * edges / voxels).max()
        return largest

    def plane(self) -> jax.Array | None:
        """Return two orthonormal vectors along the fixed image's slice, ``(3, 2)``, if it has one.

        They are for a volume of one slice that meets another such one: across it neither tells
        anything. With a volume of many slices the place and the tilt of the single one are seen.
        """
        single = [[n == 1 for n in image.shape[:1:-1]] for image in (self.fixed, self.moving)]
        if any(len(axes) != 3 or sum(axes) != 1 for axes in single):
            return None
        columns = (self.to_physical[:-1, k] for k in range(3) if not single[0][k])
        first, second = (column / jnp.linalg.norm(column) for column in columns)
        second = second - (first * second).sum() * first
        return jnp.stack([first, second / jnp.linalg.norm(second)], axis=1)

    def normalised(self, matrix: jax.Array) -> jax.Array:
        """Return a physical transform as the ``affine`` of `jaxreg.interpolate`."""
        chain: jax.Array = matmul(self.to_moving, matmul(matrix, self.to_physical))
        return chain[None, :-1]

    def after(self, step: jax.Array) -> jax.Array:
        """Return the displacement of going through ``step``, then through the one so far."""
        return step if self.displacement is None else compose(self.displacement, step)

    def moved(
        self,
        matrix: jax.Array,
        displacement: jax.Array | None,
        *,
        is_weight_constant: bool = False,
    ) -> Weighted:
        """Return the moving image at ``A(x + d(x))``, and what it weighs there.

        Where the weight is constant it has no gradient with respect to the matrix.
        """
        affine = self.normalised(matrix)
        # Before the weight is made of it: JAX would trace a derivative that nobody asks for.
        weighed_at = jax.lax.stop_gradient(affine) if is_weight_constant else affine
        return self._sample(
            *(self.moving, self.moving_window, self.moving_mask),
            margin=self.moving_margin,
            affine=affine,
            weighed_at=weighed_at,
            displacement=displacement,
        )

    def weight_of_moving(
        self, affine: jax.Array, shape: tuple[int, ...], displacement: jax.Array | None
    ) -> jax.Array:
        """Return what the moving image weighs on a grid of any shape, ``(1, 1, *shape)``.

        ``affine`` is that of `jaxreg.interpolate`, and the displacement is on that grid.
        """
        weight: jax.Array = coverage(
            self.moving.shape[2:], shape, self.moving_margin, affine, displacement, None
        )
        if self.moving_mask is None:
            return weight
        mask = interpolate(
            self.moving_mask,
            affine,
            displacement,
            affine_last=True,
            out_shape=shape,
            padding_mode="border",
        )
        return weight * mask

    def target(self) -> Weighted:
        """Return the fixed image, and what it weighs."""
        if self.fixed_weight is not None:
            return Weighted(self.fixed, self.fixed_weight)
        return self.fixed_moved(None)

    def fixed_moved(self, displacement: jax.Array | None) -> Weighted:
        """Return the fixed image at ``x + d(x)``, and what it weighs there."""
        found = self._sample(
            *(self.fixed, self.fixed_window, self.fixed_mask),
            margin=self.fixed_margin,
            affine=None,
            weighed_at=None,
            displacement=displacement,
        )
        weight = found.weight if self.content is None else found.weight * self.content
        return found._replace(weight=weight)

    def lies_near(self, displaced: jax.Array) -> jax.Array | None:
        """Return whether all devices have at hand what they sample of the images.

        Parameters
        ----------
        displaced
            How long displacements of both images are at most along x, y and z, before that of the
            level, in normalised coordinates, ``(3,)``.

        Returns
        -------
        bool[] or None
            For `sampled_near`; `None` where each device has all.
        """
        shapes = self.fixed.shape[2:], self.moving.shape[2:]
        devices = min(map(devices_of, (self.shape, *shapes)))
        if devices == 1:
            return None
        of_moving = displaced
        if self.displacement is not None:
            of_moving = displaced + longest(self.displacement)
        affine = self.normalised(self.matrix)
        return lie_near(None, displaced, shapes[0], self.shape, devices) & lie_near(
            affine, of_moving, shapes[1], self.shape, devices
        )

    def _sample(
        self,
        image: jax.Array,
        window: jax.Array | None,
        mask: jax.Array | None,
        margin: jax.Array,
        affine: jax.Array | None,
        weighed_at: jax.Array | None,
        displacement: jax.Array | None,
    ) -> Weighted:
        def sample(array: jax.Array, affine: jax.Array | None = affine) -> jax.Array:
            if affine is None and displacement is None:
                return array
            with samples_near() if _is_near.get() else contextlib.nullcontext():
                return interpolate(
                    array,
                    affine,
                    displacement,
                    affine_last=True,
                    out_shape=self.shape,
                    padding_mode="border",
                )

        shape = image.shape[2:]

        def weight(displacement: jax.Array | None) -> jax.Array:
            found: jax.Array = coverage(
                shape, self.shape, margin, weighed_at, displacement, self.reach
            )
            return found if mask is None else found * sample(mask, weighed_at)

        if window is None or displacement is None:
            return Weighted(sample(image), weight(displacement))
        if _is_near.get():
            sampled = windows.sample(window, shape, affine, displacement)
            return Weighted(sampled, weight(displacement))
        # The window, so that the image need not be there besides. What its samples need for a while
        # is gone when the weight is made.
        sampled = sample(windows.own_planes(window, shape))
        sampled, displacement = jax.lax.optimization_barrier(  # type: ignore[no-untyped-call]
            (sampled, displacement)
        )
        return Weighted(sampled, weight(displacement))


_is_near: contextvars.ContextVar[bool] = contextvars.ContextVar("is_near", default=False)


@contextlib.contextmanager
def sampled_near() -> Iterator[None]:
    """Promise that images of levels are sampled, in the context, as `Level.lies_near` has told."""
    token = _is_near.set(True)
    try:
        yield
    finally:
        _is_near.reset(token)


def charged(loss: jax.Array, overlap: jax.Array, reference: jax.Array) -> jax.Array:
    """Return a loss of images of which less than half as much overlaps as could, made worse.

    A metric is a mean, and that over a small part of the images may be a good one by chance: the
    worse a loss gets by as much as is missing, so that losing overlap does not pay.

    Parameters
    ----------
    loss
        Any array; a negative one is a similarity.
    overlap, reference
        Sums of weights: of the voxels that count, and of those that could.

    Returns
    -------
    Array
        Of the shape of all of them together.
    """
    kept = jnp.minimum(1, 2 * overlap / jnp.where(reference > 0, reference, 1))
    return jnp.where(loss < 0, loss * kept, loss / jnp.maximum(kept, 1e-3))


@functools.partial(Program, static=("metric",))
def _attention(
    level: Level, displacement: jax.Array | None, *, metric: Metric | None
) -> dict[str, Any]:
    """Return what a metric looks at of a level: those fields that are others than before.

    Parameters
    ----------
    level
        The level.
    displacement
        Its displacement, if that is on another grid.
    metric
        `None`: nothing but what overlaps is asked for.
    """
    before = level
    if displacement is not None:
        level = level._replace(displacement=resize_field(displacement, level.shape))

    def overlap(level: Level) -> jax.Array:
        moved, target = level.moved(level.matrix, level.displacement), level.target()
        # Or the compiler would repeat, in one kernel, all that the weights are made of for each of
        # the voxels that a thread adds up.
        weight = jax.lax.optimization_barrier(  # type: ignore[no-untyped-call]
            moved.weight * target.weight
        )
        total: jax.Array = weight.sum()
        return total

    if metric is not None and metric.reach > 0:

        def narrowed(mask: jax.Array | None) -> jax.Array | None:
            return None if mask is None else shrunk(mask, metric.reach)

        wide = level._replace(
            fixed_mask=narrowed(level.fixed_mask),
            moving_mask=narrowed(level.moving_mask),
            reach=jnp.full((), metric.reach, jnp.float32),
        )
        level = level._replace(reach=jnp.zeros((), jnp.float32))
        # Where hardly any surroundings are covered as a whole, those count that are in part.
        enough = overlap(wide) >= 0.25 * overlap(level)
        chosen = (
            jax.tree.map(functools.partial(jnp.where, enough), one, other)
            for one, other in zip(_looked_at(wide), _looked_at(level), strict=True)
        )
        fixed_mask, moving_mask, reach = chosen
        level = level._replace(fixed_mask=fixed_mask, moving_mask=moving_mask, reach=reach)
    if metric is not None:
        level = level._replace(content=_content(level, metric))
    level = level._replace(fixed_weight=level.target().weight)
    if metric is not None:
        level = _in_units(level, metric)
        level = level._replace(metric_scale=metric.scale(level.fixed, level.moving))
    return changed_fields(before, level._replace(overlap=overlap(level)))


@functools.partial(Program, static=("shapes",))
def _overlap(
    level: Level, displacement: jax.Array | None, *, shapes: tuple[tuple[int, ...], ...]
) -> jax.Array:
    """Return how many voxels count of images of which there are the shapes alone."""
    fixed, moving = (jnp.zeros((1, 1, *shape), jnp.float32) for shape in shapes)
    level = level._replace(fixed=fixed, moving=moving)
    overlap: jax.Array = _attention(level, displacement, metric=None)["overlap"]
    return overlap


def _in_units(level: Level, metric: Metric) -> Level:
    """Return a level whose images are in the units of a metric.

    The units are those of what both images cover at the alignment. What each of them shows besides
    may vary by more or less, and then the same would not be the same in both.
    """
    if type(metric).unit is Metric.unit:
        return level

    def units(level: Level) -> tuple[jax.Array, jax.Array]:
        moved, target = level.moved(level.matrix, level.displacement), level.target()
        weight = moved.weight * target.weight
        weight = jnp.where(weight.sum() > 0, weight, 1)
        of_fixed, of_moving = (metric.unit(x, weight) for x in (target.image, moved.image))
        one = jnp.ones((1,) * moved.image.ndim, moved.image.dtype)
        return (one if of_fixed is None else of_fixed), (one if of_moving is None else of_moving)

    if not (metric.mean_over_channels and level.has_many_channels):
        of_fixed, of_moving = units(level)
    else:
        channels = jnp.arange(level.fixed.shape[1])
        each = jax.lax.map(lambda channel: units(level.channel(channel)), channels)
        of_fixed, of_moving = (jnp.moveaxis(x[:, :, 0], 0, 1) for x in each)
    return level._replace(fixed=level.fixed / of_fixed, moving=level.moving / of_moving)


def _content(level: Level, metric: Metric) -> jax.Array | None:
    """Return where there is anything to compare, in any channel."""

    def of(level: Level) -> jax.Array | None:
        moved = level.moved(level.matrix, level.displacement).image
        return metric.content(moved, level.fixed, fixed=level.fixed, moving=level.moving)

    if not (metric.mean_over_channels and level.has_many_channels):
        return of(level)
    first = of(level.channel(0))
    if first is None:
        return None

    def join(channel: jax.Array, so_far: jax.Array) -> jax.Array:
        here = of(level.channel(channel))
        assert here is not None  # as of the first channel
        return jnp.maximum(so_far, here)

    content: jax.Array = jax.lax.fori_loop(1, level.fixed.shape[1], join, first)
    return content


def _looked_at(level: Level) -> tuple[jax.Array | None, jax.Array | None, jax.Array | None]:
    return level.fixed_mask, level.moving_mask, level.reach


_Images = tuple[jax.Array, jax.Array, jax.Array | None, jax.Array | None]
"""The fixed and the moving image, and their masks."""


class Problem:
    """Two images of one registration; makes a level of them for every scale.

    Parameters
    ----------
    fixed, moving
        ``(1, C, [Z,] Y, X)``, float32; each has its own spatial shape.
    fixed_mask, moving_mask
        ``(1, 1, [Z,] Y, X)`` of the same spatial shapes, at least 0, or `None`.
    fixed_to_physical, moving_to_physical
        ``(D + 1, D + 1)``, normalised -> physical.
    moving_ratio
        How many times wider the voxels of the fixed grid are than those of the moving one.
    clip
        Which intensities the metrics see; see `clipped`.
    match_histogram
        Whether they see the moving image with the histogram of the fixed one; see `matched`.
    """

    def __init__(
        self,
        fixed: jax.Array,
        moving: jax.Array,
        fixed_mask: jax.Array | None,
        moving_mask: jax.Array | None,
        fixed_to_physical: jax.Array,
        moving_to_physical: jax.Array,
        moving_ratio: float,
        clip: Clip = "outliers",
        match_histogram: bool = False,
    ) -> None:
        if clip is not None or match_histogram:
            fixed, moving = _seen(fixed, moving, clip=clip, match_histogram=match_histogram)
        self._images: tuple[jax.Array, jax.Array] | None = (spread(fixed), spread(moving))
        self._shapes = fixed.shape[2:], moving.shape[2:]
        self._is_last_stage = False
        self._masks = fixed_mask, moving_mask
        self._to_physical = fixed_to_physical
        self._to_moving = _inverse(moving_to_physical)
        self._moving_ratio = moving_ratio
        self._pyramids: dict[float, _Images] = {}

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the fixed grid at full resolution, ``([Z,] Y, X)``."""
        return self._shapes[0]

    @property
    def to_physical(self) -> jax.Array:
        """``(D + 1, D + 1)``, fixed normalised -> physical."""
        return self._to_physical

    def start(self) -> Alignment:
        """Return the alignment that trusts the places of the images: the identity."""
        return Alignment(jnp.eye(len(self.shape) + 1, dtype=jnp.float32))

    def begin_last_stage(self) -> None:
        """Let the images go as soon as the next stage has made its last level of them."""
        self._is_last_stage = True

    def level(
        self,
        scale: float,
        alignment: Alignment,
        metric: Metric | None = None,
        *,
        is_last: bool = False,
    ) -> Level:
        """Return the images at a scale; stages that ask for the same one share them.

        With a metric, the voxels count that it can judge.

        Parameters
        ----------
        scale
            How many times wider a voxel of the level is than at full resolution.
        alignment
            Where the stage starts.
        metric
            That of the stage, if any.
        is_last
            Whether the stage asks for no other level.
        """
        shape = level_shape(self.shape, scale)
        if scale not in self._pyramids:
            assert self._images is not None  # as there are levels to come
            other = level_shape(self._shapes[1], max(scale * self._moving_ratio, 1.0))
            fixed, fixed_mask = _coarser(self._images[0], self._masks[0], shape)
            moving, moving_mask = _coarser(self._images[1], self._masks[1], other)
            self._pyramids[scale] = fixed, moving, fixed_mask, moving_mask
        images = self._pyramids[scale]
        if is_last and self._is_last_stage:
            # The level has its own, in the units of a metric, which fill a device by themselves.
            self._images = None
            self._pyramids.clear()
        shapes = images[0].shape[2:], images[1].shape[2:]
        level, displacement = self._level(images, shapes, alignment)
        return level._replace(**_attention(level, displacement, metric=metric))

    def overlap(self, alignment: Alignment) -> jax.Array:
        """Return how many voxels of the whole images count at an alignment, a scalar."""
        none: Any = None
        level, displacement = self._level((none, none, *self._masks), self._shapes, alignment)
        found: jax.Array = _overlap(level, displacement, shapes=self._shapes)
        return found

    def _level(
        self,
        images: _Images,
        shapes: tuple[tuple[int, ...], ...],
        alignment: Alignment,
    ) -> tuple[Level, jax.Array | None]:
        """Return a level before a metric has looked at it, and its displacement on another grid."""
        displacement = alignment.displacement
        is_here = displacement is None or displacement.shape[1:-1] == shapes[0]
        level = Level(
            *images,
            self._to_physical,
            self._to_moving,
            alignment.matrix,
            displacement if is_here else None,
            margins(self._shapes[0], shapes[0]),
            margins(self._shapes[1], shapes[1]),
            reach=None,
            content=None,
            fixed_weight=None,
            overlap=on_device(np.float32(0)),
            metric_scale=on_device(np.float32(0)),
        )
        return level, None if is_here else displacement


def _flatten(problem: Problem) -> tuple[tuple[Any, ...], Any]:
    state = dict(vars(problem))
    pyramids = state.pop("_pyramids")
    fixed = tuple(map(state.pop, ("_moving_ratio", "_shapes", "_is_last_stage")))
    return (*state.values(), *pyramids.values()), (tuple(state), tuple(pyramids), *fixed)


def _unflatten(about: Any, children: Iterable[Any]) -> Problem:
    names, scales, ratio, shapes, is_last_stage = about
    problem = object.__new__(Problem)
    values = list(children)
    vars(problem).update(zip(names, values[: len(names)], strict=True))
    problem._moving_ratio = ratio
    problem._shapes = shapes
    problem._is_last_stage = is_last_stage
    problem._pyramids = dict(zip(scales, values[len(names) :], strict=True))
    return problem


jax.tree_util.register_pytree_node(Problem, _flatten, _unflatten)


@functools.partial(Program, static=("clip", "match_histogram"))
def _seen(
    fixed: jax.Array, moving: jax.Array, *, clip: Clip, match_histogram: bool
) -> tuple[jax.Array, jax.Array]:
    """Return the images with the intensities that metrics see."""
    fixed, moving = spread(clipped(fixed, clip)), clipped(moving, clip)
    return fixed, spread(matched(moving, fixed) if match_histogram else moving)


@Program
def _inverse(matrix: jax.Array) -> jax.Array:
    return inverse(matrix)


def _coarser(
    image: jax.Array, mask: jax.Array | None, shape: tuple[int, ...]
) -> tuple[jax.Array, jax.Array | None]:
    """Return an image on the grid of a level, and its mask."""
    # What is at full resolution stays the same array: it is large enough to be there once.
    if mask is not None and mask.shape[2:] != shape:
        mask = _coarser_mask(mask, shape=shape)
    if mask is None and image.shape[2:] == shape:
        return spread(image), None
    return _coarser_image(image, mask, shape=shape), mask


@functools.partial(Program, static=("shape",))
def _coarser_image(
    image: jax.Array, mask: jax.Array | None, *, shape: tuple[int, ...]
) -> jax.Array:
    coarser = downsample(image, shape)
    return spread(coarser if mask is None else _continued(coarser, mask))


def _continued(image: jax.Array, mask: jax.Array) -> jax.Array:
    """Return an image in which what a mask leaves out continues what is beside it.

    A sample that lies between a voxel that counts and one that does not mixes the two.
    """
    counts = (mask > 0).astype(image.dtype)
    sigma = [1.0 if size > 1 else 0.0 for size in image.shape[2:]]
    near = gaussian_smooth(counts, sigma, truncate=1)
    mean = gaussian_smooth(image * counts, sigma, truncate=1) / jnp.where(near > 0, near, 1)
    return jnp.where((counts > 0) | (near == 0), image, mean)


@functools.partial(Program, static=("shape",))
def _coarser_mask(mask: jax.Array, *, shape: tuple[int, ...]) -> jax.Array:
    # The continuation by point reflection may undershoot, but a weight is at least 0.
    weight = jnp.maximum(downsample(mask, shape), 0)
    # At the edge of a mask half of a smoothed voxel is what the mask leaves out. A mask that is
    # nowhere thicker than a voxel keeps what it has.
    inside = downsample((mask > 0).astype(mask.dtype), shape)
    return weight * jnp.clip(2 * inside / inside.max() - 1, 0, 1)
