"""How alike two images are: the metrics that the stages minimise, and the losses behind them."""

from __future__ import annotations

import abc
import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from jaxreg.descriptors import mind_ssc
from jaxreg.loss import lncc_loss, mutual_information_loss
from jaxreg.registration.stages.neighbours import after

__all__ = [
    "LNCC",
    "MI",
    "MIND",
    "MSE",
    "NCC",
    "NMI",
    "CoarseToFine",
    "FunctionMetric",
    "Metric",
    "MetricField",
    "MetricLike",
    "MetricName",
    "PerChannel",
    "as_metric",
    "function_name",
    "mse_loss",
    "ncc",
    "ncc_loss",
    "shrunk",
]


def ncc(pred: jax.Array, target: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    r"""Global normalised cross-correlation (Pearson's correlation over the voxels).

    .. math:: \frac{\sum w\,(I - \bar I)(J - \bar J)}
                   {\sqrt{\sum w\,(I - \bar I)^2}\ \sqrt{\sum w\,(J - \bar J)^2}}

    with the means weighted by ``w`` as well. It is invariant to the gain and the offset of both
    images.

    Parameters
    ----------
    pred, target
        Images, ``(N, C, [Z,] Y, X)``.
    mask
        Weights ``w >= 0`` that broadcast to the images; 1 everywhere by default.

    Returns
    -------
    Array
        ``(N, C)``, from -1 to 1; 0 where an image is constant (its gradient is 0 too).
    """
    axes = tuple(range(2, pred.ndim))
    weight = jnp.ones((), pred.dtype) if mask is None else mask
    weight = jnp.broadcast_to(weight, jnp.broadcast_shapes(pred.shape, target.shape))
    total = weight.sum(axes, keepdims=True)
    total = jnp.where(total > 0, total, 1)  # so that the gradient is finite without any weight, too

    def centred(image: jax.Array) -> jax.Array:
        return image - (weight * image).sum(axes, keepdims=True) / total

    pred, target = centred(pred), centred(target)
    covariance = (weight * pred * target).sum(axes)
    pred_variance, target_variance = (weight * pred**2).sum(axes), (weight * target**2).sum(axes)
    varies = (pred_variance > 0) & (target_variance > 0)
    # The inner `where`s keep the square root's infinite slope at 0 out of the gradient.
    pred_scale = jnp.sqrt(jnp.where(varies, pred_variance, 1))
    target_scale = jnp.sqrt(jnp.where(varies, target_variance, 1))
    # The scales divide one after the other: the square of their product, which the gradient would
    # hold, may overflow.
    return jnp.where(varies, covariance / pred_scale / target_scale, 0)


def ncc_loss(pred: jax.Array, target: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Negative mean over items and channels of the global normalised cross-correlation.

    Parameters
    ----------
    pred, target, mask
        As in `ncc`.

    Returns
    -------
    jax.Array
        A scalar.
    """
    return -ncc(pred, target, mask).mean()


def mse_loss(pred: jax.Array, target: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    r"""Mean squared difference, :math:`\sum w\,(I - J)^2 / \sum w`.

    Parameters
    ----------
    pred, target, mask
        As in `ncc`.

    Returns
    -------
    jax.Array
        A scalar; 0 where the mask is empty.
    """
    squares = (pred - target) ** 2
    if mask is None:
        return squares.mean()
    weight = jnp.broadcast_to(mask, squares.shape)
    total = weight.sum()
    return (weight * squares).sum() / jnp.where(total > 0, total, 1)


@dataclasses.dataclass(frozen=True)
class Metric(abc.ABC):
    """How alike two images are: what a stage minimises, and the settings of it.

    A metric of your own derives from this class, is a frozen dataclass whose settings have a hash,
    and has a `loss`. Like a stage it is a JAX pytree without leaves: its settings are static,
    programs are compiled for them, and equal metrics share their programs.
    """

    has_gradient_of_mask: ClassVar[bool] = False
    """Whether the loss may be differentiated with respect to its mask, which `lncc_loss` and
    `mutual_information_loss` may not: if so, linear stages follow what is gained or lost by what
    the images cover."""

    mean_over_channels: ClassVar[bool] = False
    """Whether the loss of several channels is the mean of the losses of each alone, and the content
    is where that of any channel is: stages then take many channels one after the other, which needs
    the memory of one. A class with a loss of its own has to say so itself."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        own = vars(cls)
        if ("loss" in own or "loss_of_level" in own) and "mean_over_channels" not in own:
            cls.mean_over_channels = False
        jax.tree_util.register_static(cls)

    def __str__(self) -> str:
        # A metric without settings is called by its name alone in records: "NCC".
        return repr(self).removesuffix("()")

    @abc.abstractmethod
    def loss(self, pred: jax.Array, target: jax.Array, mask: jax.Array | None) -> jax.Array:
        """Return what is to be minimised.

        Parameters
        ----------
        pred, target
            Images, ``(1, C, [Z,] Y, X)``.
        mask
            What each voxel counts, at least 0, ``(1, 1, [Z,] Y, X)``; `None` if all count alike.

        Returns
        -------
        Array
            A scalar, the mean over the voxels: its size must not depend on that of the grid.
        """

    def unit(self, image: jax.Array, mask: jax.Array | None) -> jax.Array | None:
        """Return the unit of an image's intensities, asked for once at the start of a level.

        Parameters
        ----------
        image
            The fixed or the moving image on the grid of the level, ``(1, C, [Z,] Y, X)``.
        mask
            What both images cover there, ``(1, 1, [Z,] Y, X)``; `None` if all voxels count.

        Returns
        -------
        Array or None
            Broadcast against the image, by which it is divided for this level: what the other
            methods get has that unit. By default `None`: images are compared as they are.
        """
        return None

    @property
    def reach(self) -> int:
        """How many voxels around one the metric looks at, to judge that one; by default 0.

        Only voxels count whose surroundings of this size are data in both images.
        """
        return 0

    def content(
        self, pred: jax.Array, target: jax.Array, *, fixed: jax.Array, moving: jax.Array
    ) -> jax.Array | None:
        """Return where there is anything to compare, asked for once at the start of a level.

        Parameters
        ----------
        pred, target, fixed, moving
            As for `loss_of_level`.

        Returns
        -------
        Array or None
            ``(1, 1, [Z,] Y, X)``, by which weights are multiplied, as numbers or truth values; by
            default `None`: everywhere.
        """
        return None

    def loss_of_level(
        self,
        pred: jax.Array,
        target: jax.Array,
        mask: jax.Array,
        *,
        fixed: jax.Array,
        moving: jax.Array,
    ) -> jax.Array:
        """Return what a level minimises; by default `loss`.

        Override it where a setting follows from the images of the level, which stay the same, and
        is not to follow from what is seen of them at one iteration.

        Parameters
        ----------
        pred, target, mask
            As for `loss`: ``moving`` and ``fixed`` as the transform of the iteration brings them to
            the grid of the level.
        fixed, moving
            The images of the level, ``(1, C, [Z,] Y, X)``; each has its own grid.

        Returns
        -------
        Array
            A scalar.
        """
        return self.loss(pred, target, mask)

    def scale(self, fixed: jax.Array, moving: jax.Array) -> jax.Array:
        """Return how large losses are: by about so much do those of unlike and like images differ.

        Gradients that are smaller by orders of magnitude are taken for rounding, and followed by
        less than by a full step. Images that are the same already stay where they are so.

        Parameters
        ----------
        fixed, moving
            The images of a level, ``(1, C, [Z,] Y, X)``; each has its own grid.

        Returns
        -------
        Array
            A scalar of at least 0; by default 0: it is not known, and no gradient is too small.
        """
        return jnp.zeros((), fixed.dtype)

    def curvature(self, moved: jax.Array, weight: jax.Array) -> jax.Array | None:
        r"""Return how the loss is curved where the images are alike, asked for once per level.

        Stages of second order look at it; see `Linear`. What is only roughly right makes them
        slower, not wrong.

        Parameters
        ----------
        moved
            The moving image where the level starts, on the fixed grid, ``(1, C, [Z,] Y, X)``.
        weight
            What each voxel counts, ``(1, 1, [Z,] Y, X)``, at least 0.

        Returns
        -------
        Array or None
            :math:`k`, broadcast against the image: if the moving image's intensities change by
            :math:`e`, the loss grows by :math:`\sum w\,k\,e^2 / (2 \sum w)`. By default `None`: it
            is not known.
        """
        return None

    def for_scale(self, scale: float) -> Metric:
        """Return the metric that a level uses.

        A stage asks for it before each of its levels, outside of what is compiled. Override it
        where a setting depends on the level.

        Parameters
        ----------
        scale
            How many times wider a voxel of the level is than at full resolution.

        Returns
        -------
        Metric
            By default this one, at every scale. What is returned is not asked again.
        """
        return self

    def format_loss(self, loss: float) -> str:
        """Return a loss as it is shown while a registration runs, with the name of the measure."""
        return f"loss {loss:.4g}"


@dataclasses.dataclass(frozen=True)
class LNCC(Metric):
    """Local normalised cross-correlation, of the windows around all voxels; see `lncc_loss`.

    Attributes
    ----------
    kernel_size
        Width of the windows in voxels of the level, odd, from 3 to 31.
    common_variance
        At least 0, in units of the typical variance in a window of each image. The larger, the less
        is made of windows with little contrast: what correlates there is noise, and matching it
        costs what it tears apart. Images that are the same have a correlation of 1 in any case.

    Raises
    ------
    ValueError
        For another width, or a negative variance.
    """

    mean_over_channels: ClassVar[bool] = True

    kernel_size: int = 7
    common_variance: float = 0.5

    def __post_init__(self) -> None:
        if self.kernel_size not in range(3, 32, 2):
            raise ValueError(
                f"kernel_size: expected an odd number from 3 to 31, got {self.kernel_size!r}"
            )
        if not 0 <= self.common_variance < math.inf:
            raise ValueError(f"common_variance: expected at least 0, got {self.common_variance!r}")

    def loss(self, pred: jax.Array, target: jax.Array, mask: jax.Array | None) -> jax.Array:
        """Return minus the mean of the squared local correlations.

        Windows that are flat in both images are alike: they tell nothing, and if they counted as
        unlike, spreading the rim of an object over its empty surroundings would pay.
        """
        pred, target = (image / self.unit(image, mask) for image in (pred, target))
        return self._loss(pred, target, mask)

    def loss_of_level(
        self,
        pred: jax.Array,
        target: jax.Array,
        mask: jax.Array,
        *,
        fixed: jax.Array,
        moving: jax.Array,
    ) -> jax.Array:
        """Return the loss with the units of the whole images."""
        return self._loss(pred, target, mask)

    def _loss(self, pred: jax.Array, target: jax.Array, mask: jax.Array | None) -> jax.Array:
        # To the default of `smooth_dr` a faint image would be flat. What is flat as far as float32
        # can tell counts as such in any case.
        return lncc_loss(
            pred,
            target,
            kernel_size=self.kernel_size,
            smooth_dr=1e-18,
            common_variance=self.common_variance,
            both_flat=1,
            mask=mask,
        )

    def unit(self, image: jax.Array, mask: jax.Array | None) -> jax.Array:
        """Return the typical standard deviation in a window, ``(1, C, 1, ...)``."""
        return _typical_contrast(image, mask, self.kernel_size)

    @property
    def reach(self) -> int:
        """Half of a window: it counts if all that it spans is data."""
        return self.kernel_size // 2

    def content(
        self, pred: jax.Array, target: jax.Array, *, fixed: jax.Array, moving: jax.Array
    ) -> jax.Array:
        """Return what is less than two windows away from where either image varies."""
        varies = (_varies(pred, moving) | _varies(target, fixed)).any(axis=1, keepdims=True)
        for axis in range(2, varies.ndim):
            varies = _any_within(varies, axis, 2 * self.kernel_size, beyond=False)
        return varies

    def scale(self, fixed: jax.Array, moving: jax.Array) -> jax.Array:
        """Return 1."""
        return jnp.ones((), fixed.dtype)

    def curvature(self, moved: jax.Array, weight: jax.Array) -> jax.Array:
        """Return 2 over the variance in a window: 1 - LNCC is the square of what does not fit."""
        width = [min(self.kernel_size, size) for size in moved.shape[2:]]

        def mean(array: jax.Array) -> jax.Array:
            for axis, size in enumerate(width, start=2):
                window, strides = [1] * array.ndim, (1,) * array.ndim
                window[axis] = size
                array = jax.lax.reduce_window(
                    array, jnp.zeros((), array.dtype), jax.lax.add, tuple(window), strides, "same"
                )
            return array / math.prod(width)

        axes = tuple(range(2, moved.ndim))
        centred = moved - moved.mean(axes, keepdims=True)
        variance = jnp.maximum(mean(centred**2) - mean(centred) ** 2, 0) + self.common_variance
        least = 1e-3 * variance.max(axes, keepdims=True)
        return 2 / jnp.maximum(variance, jnp.where(least > 0, least, 1)) / moved.shape[1]

    def format_loss(self, loss: float) -> str:
        """Return the mean squared correlation, which is minus the loss."""
        return f"LNCC {-loss:.4f}"


def _variance(image: jax.Array, weight: jax.Array) -> jax.Array:
    """Return the weighted variance of each channel, ``(1, C, 1, ...)``, or 1 if it has none."""
    axes = tuple(range(2, image.ndim))
    total = weight.sum(axes, keepdims=True)
    total = jnp.where(total > 0, total, 1)
    centred = image - (weight * image).sum(axes, keepdims=True) / total
    variance = (weight * centred**2).sum(axes, keepdims=True) / total
    return jnp.where(variance > 0, variance, 1)


_EMPTY = 1e-4
"""Blocks whose variance is less than this share of the image's show nothing."""


def _typical_contrast(image: jax.Array, mask: jax.Array | None, width: int) -> jax.Array:
    """Return the geometric mean of the standard deviations in blocks of an image that vary.

    Neither an empty background nor a few very bright places change it much.
    """
    image = jax.lax.stop_gradient(image)
    axes = tuple(range(2, image.ndim))
    if mask is None:
        weight = jnp.ones((1,) * image.ndim, image.dtype)
        voxels = jnp.full((), math.prod(image.shape[2:]), image.dtype)
    else:
        weight = (mask > 0).astype(image.dtype)
        voxels = weight.sum()
    block = (1, 1, *(min(width, size) for size in image.shape[2:]))

    def mean(array: jax.Array) -> jax.Array:
        return (weight * array).sum(axes, keepdims=True) / jnp.maximum(voxels, 1)

    def in_blocks(array: jax.Array) -> jax.Array:
        zero = jnp.zeros((), array.dtype)
        sums: jax.Array = jax.lax.reduce_window(array, zero, jax.lax.add, block, block, "valid")
        return sums

    centred = weight * (image - mean(image))
    # A power of two, by which nothing is rounded: images in units that differ by one have units
    # that do so exactly.
    _, exponent = jnp.frexp(jnp.sqrt(mean(centred**2)))
    power = jnp.ldexp(jnp.ones_like(exponent, image.dtype), exponent)
    centred = centred / power
    # XLA would fold sums of ones while it compiles, for seconds.
    count = weight * math.prod(block) if mask is None else in_blocks(weight)
    first, second = (in_blocks(x) / jnp.maximum(count, 1) for x in (centred, centred**2))
    variance = second - first**2
    varies = (variance > _EMPTY * mean(centred**2)) & (2 * count >= math.prod(block))
    logarithm = jnp.where(varies, jnp.log(jnp.where(varies, variance, 1)), 0)
    blocks = jnp.maximum(varies.sum(axes, keepdims=True), 1)
    deviation: jax.Array = power * jnp.exp(logarithm.sum(axes, keepdims=True) / blocks / 2)
    return deviation


_FLAT = 1e-4
"""Neighbours that differ by less than this share of an image's range are alike: what smoothing
leaves of an edge a few voxels away is no structure."""


def _varies(image: jax.Array, whole: jax.Array) -> jax.Array:
    """Return whether the voxels between each one and the next differ, bool, the image's shape.

    They are the corners of a square or cube. ``whole`` has the range that they are compared with.
    """
    axes = tuple(range(2, image.ndim))
    low = high = jax.lax.stop_gradient(image)
    for axis in axes:
        low, high = jnp.minimum(low, after(low, axis)), jnp.maximum(high, after(high, axis))
    width = whole.max(axes, keepdims=True) - whole.min(axes, keepdims=True)
    return high - low > _FLAT * jax.lax.stop_gradient(width)


def _any_within(array: jax.Array, axis: int, reach: int, *, beyond: bool) -> jax.Array:
    """Return whether anything along an axis is true so far around each voxel."""
    pads = [(0, 0)] * array.ndim
    pads[axis] = (reach, reach)
    padded = jnp.pad(array, pads, constant_values=beyond)
    size, width = array.shape[axis], 2 * reach + 1
    spanned = 1
    while spanned < width:  # of so many voxels each holds whether any is true
        step = min(spanned, width - spanned)
        length = padded.shape[axis] - step
        padded = jax.lax.slice_in_dim(padded, 0, length, axis=axis) | jax.lax.slice_in_dim(
            padded, step, step + length, axis=axis
        )
        spanned += step
    return jax.lax.slice_in_dim(padded, 0, size, axis=axis)


def shrunk(mask: jax.Array, reach: int) -> jax.Array:
    """Return a mask without the voxels that lie up to ``reach`` voxels from what it leaves out.

    Parameters
    ----------
    mask
        ``(1, 1, [Z,] Y, X)``, at least 0. Beyond the grid nothing is left out.
    reach
        In voxels.
    """
    leaves_out = mask <= 0
    for axis in range(2, mask.ndim):
        leaves_out = _any_within(leaves_out, axis, reach, beyond=False)
    return jnp.where(leaves_out, 0, mask)


@dataclasses.dataclass(frozen=True)
class _Information(Metric):
    """What `MI` and `NMI` have in common."""

    mean_over_channels: ClassVar[bool] = True

    normalised: ClassVar[bool]
    """Whether the information is divided by the joint entropy."""

    num_bins: int = 32

    def __post_init__(self) -> None:
        if self.num_bins not in range(2, 257):
            raise ValueError(f"num_bins: expected an integer from 2 to 256, got {self.num_bins!r}")

    def loss(self, pred: jax.Array, target: jax.Array, mask: jax.Array | None) -> jax.Array:
        """Return minus the information, the mean over the channels."""
        return mutual_information_loss(
            pred, target, num_bins=self.num_bins, normalised=self.normalised, mask=mask
        )

    def loss_of_level(
        self,
        pred: jax.Array,
        target: jax.Array,
        mask: jax.Array,
        *,
        fixed: jax.Array,
        moving: jax.Array,
    ) -> jax.Array:
        """Return the loss with the ranges of the whole images.

        Between voxels the extremes are missed. With the range of the samples alone the bins would
        then be finer, and the information larger, for that reason only.
        """

        def extremes(image: jax.Array) -> tuple[jax.Array, jax.Array]:
            return image.min(), image.max()

        losses = [
            mutual_information_loss(
                pred[:, c : c + 1],
                target[:, c : c + 1],
                num_bins=self.num_bins,
                normalised=self.normalised,
                value_range=(extremes(moving[:, c]), extremes(fixed[:, c])),
                mask=mask,
            )
            for c in range(pred.shape[1])
        ]
        return jnp.stack(losses).mean()


@dataclasses.dataclass(frozen=True)
class MI(_Information):
    """Mutual information, for contrasts that differ; see `mutual_information_loss`.

    Attributes
    ----------
    num_bins
        Bins of each image's intensities, from 2 to 256.

    Raises
    ------
    ValueError
        For another number of bins.
    """

    normalised: ClassVar[bool] = False

    def scale(self, fixed: jax.Array, moving: jax.Array) -> jax.Array:
        """Return 1."""
        return jnp.ones((), fixed.dtype)

    def format_loss(self, loss: float) -> str:
        """Return the mutual information, which is minus the loss."""
        return f"MI {-loss:.4f}"


@dataclasses.dataclass(frozen=True)
class MIND(Metric):
    """Mean squared difference of descriptors, for deformations between contrasts; see `mind_ssc`.

    Attributes
    ----------
    radius
        Of the patches that descriptors compare, in voxels of the level, from 1 to 4.
    dilation
        How far from its voxel a descriptor's patches are, in voxels of the level, from 1 to 16.

    Raises
    ------
    ValueError
        For another radius or dilation.
    """

    has_gradient_of_mask: ClassVar[bool] = True
    mean_over_channels: ClassVar[bool] = True

    radius: int = 2
    dilation: int = 2

    def __post_init__(self) -> None:
        for name, value, most in (("radius", self.radius, 4), ("dilation", self.dilation, 16)):
            if value not in range(1, most + 1):
                raise ValueError(f"{name}: expected an integer from 1 to {most}, got {value!r}")

    def _describe(self, image: jax.Array) -> jax.Array:
        return mind_ssc(image, radius=self.radius, dilation=self.dilation)

    def loss(self, pred: jax.Array, target: jax.Array, mask: jax.Array | None) -> jax.Array:
        """Return the mean squared difference of the images' descriptors."""
        return mse_loss(self._describe(pred), self._describe(target), mask)

    @property
    def reach(self) -> int:
        """A descriptor looks as far as its patches do: it counts if all of them are data."""
        return self.radius + self.dilation

    def scale(self, fixed: jax.Array, moving: jax.Array) -> jax.Array:
        """Return the mean of the variances of the images' descriptors."""
        return (jnp.var(self._describe(fixed)) + jnp.var(self._describe(moving))) / 2

    def format_loss(self, loss: float) -> str:
        """Return the mean squared difference of descriptors."""
        return f"MIND {loss:.4g}"


@dataclasses.dataclass(frozen=True)
class NMI(_Information):
    """Normalised mutual information, for contrasts that differ; see `mutual_information_loss`.

    It depends less than `MI` on how much of the images overlaps, and on what they show there.

    Attributes
    ----------
    num_bins
        Bins of each image's intensities, from 2 to 256.

    Raises
    ------
    ValueError
        For another number of bins.
    """

    normalised: ClassVar[bool] = True

    def scale(self, fixed: jax.Array, moving: jax.Array) -> jax.Array:
        """Return 1/4: it is 1 + MI / H(A, B), and the joint entropy of images is about 4."""
        return jnp.full((), 0.25, fixed.dtype)

    def format_loss(self, loss: float) -> str:
        """Return the normalised mutual information, which is minus the loss."""
        return f"NMI {-loss:.4f}"


@dataclasses.dataclass(frozen=True)
class NCC(Metric):
    """Global normalised cross-correlation, which still pulls where little overlaps; see `ncc`."""

    has_gradient_of_mask: ClassVar[bool] = True
    mean_over_channels: ClassVar[bool] = True

    def loss(self, pred: jax.Array, target: jax.Array, mask: jax.Array | None) -> jax.Array:
        """Return minus the correlation, the mean over the channels."""
        return ncc_loss(pred, target, mask)

    def scale(self, fixed: jax.Array, moving: jax.Array) -> jax.Array:
        """Return 1."""
        return jnp.ones((), fixed.dtype)

    def curvature(self, moved: jax.Array, weight: jax.Array) -> jax.Array:
        """Return 1 over the variance: 1 - NCC is half the square of a normalised difference."""
        return 1 / _variance(moved, weight) / moved.shape[1]

    def format_loss(self, loss: float) -> str:
        """Return the correlation, which is minus the loss."""
        return f"NCC {-loss:.4f}"


@dataclasses.dataclass(frozen=True)
class MSE(Metric):
    """Mean squared difference, for intensities that mean the same; see `mse_loss`."""

    has_gradient_of_mask: ClassVar[bool] = True
    mean_over_channels: ClassVar[bool] = True

    def loss(self, pred: jax.Array, target: jax.Array, mask: jax.Array | None) -> jax.Array:
        """Return the mean squared difference."""
        return mse_loss(pred, target, mask)

    def scale(self, fixed: jax.Array, moving: jax.Array) -> jax.Array:
        """Return the mean of the images' variances."""
        return (jnp.var(fixed) + jnp.var(moving)) / 2

    def curvature(self, moved: jax.Array, weight: jax.Array) -> jax.Array:
        """Return 2: it is a square."""
        return jnp.full((1,) * moved.ndim, 2 / moved.shape[1], moved.dtype)

    def format_loss(self, loss: float) -> str:
        """Return the mean squared difference."""
        return f"MSE {loss:.4g}"


@dataclasses.dataclass(frozen=True)
class FunctionMetric(Metric):
    """A user's function of two images.

    Attributes
    ----------
    function
        ``function(pred, target)``, a scalar; it is called with ``mask=``, too, where there is one.
    """

    function: Callable[..., jax.Array]

    def __str__(self) -> str:
        return function_name(self.function)

    def loss(self, pred: jax.Array, target: jax.Array, mask: jax.Array | None) -> jax.Array:
        """Return what the function returns.

        One that does not take ``mask=`` sees the same in both images where nothing counts: there
        the first is the second.
        """
        if mask is None:
            return self.function(pred, target)
        parameters = inspect.signature(self.function).parameters.values()
        if any(p.name == "mask" or p.kind is p.VAR_KEYWORD for p in parameters):
            return self.function(pred, target, mask=mask)
        return self.function(target + mask * (pred - target), target)


def function_name(function: Callable[..., Any]) -> str:
    """Return a name that does not change from run to run, as the address of a function does."""
    return str(getattr(function, "__qualname__", function))


MetricName = Literal["lncc", "mi", "mind", "mse", "ncc", "nmi"]
"""Shorthand for a metric with its default settings."""

MetricLike = Metric | MetricName | Callable[..., jax.Array]
"""What a stage takes as its metric."""

_METRICS: dict[str, type[Metric]] = {
    "lncc": LNCC,
    "mi": MI,
    "mind": MIND,
    "mse": MSE,
    "ncc": NCC,
    "nmi": NMI,
}


def as_metric(metric: MetricLike) -> Metric:
    """Return a metric by what stands for it.

    Parameters
    ----------
    metric
        A metric; ``"lncc"``, ``"mi"``, ``"mind"``, ``"mse"``, ``"ncc"`` or ``"nmi"`` for one with
        its defaults; or a function ``loss(pred, target)``, ``loss(pred, target, mask=...)`` where
        there is a mask.

    Returns
    -------
    Metric
        The same one, if it is one.

    Raises
    ------
    ValueError
        If there is no such metric.
    """
    if isinstance(metric, Metric):
        return metric
    if isinstance(metric, str) and metric in _METRICS:
        return _METRICS[metric]()
    # A class can be called, too, but who gives `LNCC` means `LNCC()`.
    if callable(metric) and not isinstance(metric, type):
        return FunctionMetric(metric)
    raise ValueError(
        f"metric: expected one of {sorted(_METRICS)}, a Metric such as LNCC(kernel_size=5), or a "
        f"function of two images, got {metric!r}"
    )


class MetricField:
    """A field of a dataclass that takes what stands for a metric, and holds the metric.

    It is a descriptor, so that the types are right on both sides: ``Rigid(metric="mi")`` takes a
    name, and ``Rigid(metric="mi").metric`` is a `Metric`.

    Parameters
    ----------
    default
        The metric where none is given.
    """

    def __init__(self, default: Metric) -> None:
        self._default = default

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: object | None, owner: type | None = None) -> Metric:
        if instance is None:
            return self._default  # `dataclass` asks the class for it
        metric: Metric = vars(instance)[self._name]
        return metric

    def __set__(self, instance: object, value: MetricLike) -> None:
        vars(instance)[self._name] = as_metric(value)


@dataclasses.dataclass(frozen=True)
class CoarseToFine(Metric):
    """One metric where images are far apart, and another where they are nearly aligned.

    `NCC` pulls from afar; where it no longer tells more, `LNCC` still does.

    Attributes
    ----------
    coarse, fine
        The metrics of coarse and of fine levels; see `as_metric`.
    threshold
        The largest scale of a level that uses the fine one.
    """

    coarse: MetricField = MetricField(NCC())
    fine: MetricField = MetricField(LNCC())
    threshold: float = 2

    def for_scale(self, scale: float) -> Metric:
        """Return the one of the two that the level uses."""
        chosen = self.fine if scale <= self.threshold else self.coarse
        return chosen.for_scale(scale)

    def loss(self, pred: jax.Array, target: jax.Array, mask: jax.Array | None) -> jax.Array:
        """Return the loss of the fine metric: no scale is known."""
        return self.fine.loss(pred, target, mask)


@dataclasses.dataclass(frozen=True)
class PerChannel(Metric):
    r"""A metric for each channel, and what each counts: for images of several modalities.

    .. math:: \frac{\sum_c w_c\,L_c / s_c}{\sum_c w_c}

    with the loss :math:`L_c` of channel :math:`c` and its `scale` :math:`s_c` on the level, 1 where
    none is known, so that a weight means the same whatever the metric and the unit of the
    intensities.

    Attributes
    ----------
    metrics
        One for each channel; see `as_metric`.
    weights
        :math:`w_c`, numbers of at least 0, not all of them 0; by default all channels count alike.

    Raises
    ------
    ValueError
        For no metric, another number of weights or weights out of their range; of images with
        another number of channels, when they are compared.
    """

    metrics: tuple[MetricLike, ...]
    weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.metrics, Metric | str) or not self.metrics:
            raise ValueError(f"metrics: expected a metric for each channel, got {self.metrics!r}")
        metrics = tuple(map(as_metric, self.metrics))
        weights = tuple(float(weight) for weight in self.weights) or (1.0,) * len(metrics)
        if len(weights) != len(metrics):
            raise ValueError(
                f"weights: expected {len(metrics)}, one for each metric, got {len(weights)}"
            )
        if not all(0 <= weight < math.inf for weight in weights) or not any(weights):
            raise ValueError(f"weights: expected numbers of at least 0, not all 0, got {weights}")
        object.__setattr__(self, "metrics", metrics)
        object.__setattr__(self, "weights", weights)
        of_mask = all(metric.has_gradient_of_mask for metric in metrics)
        object.__setattr__(self, "has_gradient_of_mask", of_mask)

    @property
    def _metrics(self) -> tuple[Metric, ...]:
        return tuple(map(as_metric, self.metrics))

    def _channels(self, *images: jax.Array) -> list[tuple[jax.Array, ...]]:
        """Return the images of each channel, all with one."""
        for image in images:
            if image.shape[1] != len(self.metrics):
                raise ValueError(
                    f"metric: expected images of {len(self.metrics)} channels, one for each metric "
                    f"of PerChannel, got {image.shape[1]}"
                )
        return [tuple(image[:, c : c + 1] for image in images) for c in range(len(self.metrics))]

    def _weighted(self, losses: Sequence[jax.Array], scales: Sequence[jax.Array]) -> jax.Array:
        total = sum(self.weights)
        parts = [
            weight / total * loss / jnp.where(scale > 0, scale, 1)
            for weight, loss, scale in zip(self.weights, losses, scales, strict=True)
        ]
        return jnp.stack(parts).sum()

    def loss(self, pred: jax.Array, target: jax.Array, mask: jax.Array | None) -> jax.Array:
        """Return the weighted mean of the losses of the channels."""
        losses, scales = [], []
        for metric, (p, t) in zip(self._metrics, self._channels(pred, target), strict=True):
            losses.append(metric.loss(p, t, mask))
            scales.append(jax.lax.stop_gradient(metric.scale(t, p)))
        return self._weighted(losses, scales)

    def loss_of_level(
        self,
        pred: jax.Array,
        target: jax.Array,
        mask: jax.Array,
        *,
        fixed: jax.Array,
        moving: jax.Array,
    ) -> jax.Array:
        """Return the same, with what follows from the images of the level."""
        losses, scales = [], []
        each = self._channels(pred, target, fixed, moving)
        for metric, (p, t, f, m) in zip(self._metrics, each, strict=True):
            losses.append(metric.loss_of_level(p, t, mask, fixed=f, moving=m))
            scales.append(metric.scale(f, m))
        return self._weighted(losses, scales)

    def unit(self, image: jax.Array, mask: jax.Array | None) -> jax.Array | None:
        """Return the units of the channels, 1 for those of a metric that has none."""
        one = jnp.ones((1,) * image.ndim, image.dtype)
        units = [
            metric.unit(channel, mask)
            for metric, (channel,) in zip(self._metrics, self._channels(image), strict=True)
        ]
        if all(unit is None for unit in units):
            return None
        return jnp.concatenate([one if unit is None else unit for unit in units], axis=1)

    @property
    def reach(self) -> int:
        """The largest of the metrics that count."""
        both = zip(self._metrics, self.weights, strict=True)
        return max(metric.reach for metric, weight in both if weight > 0)

    def content(
        self, pred: jax.Array, target: jax.Array, *, fixed: jax.Array, moving: jax.Array
    ) -> jax.Array | None:
        """Return where any channel has something to compare."""
        found = []
        each = self._channels(pred, target, fixed, moving)
        for metric, (p, t, f, m) in zip(self._metrics, each, strict=True):
            content = metric.content(p, t, fixed=f, moving=m)
            if content is None:
                return None
            found.append(content)
        return functools.reduce(jnp.maximum, found)

    def scale(self, fixed: jax.Array, moving: jax.Array) -> jax.Array:
        """Return 1, or 0 if that of a metric is not known."""
        known = all(type(metric).scale is not Metric.scale for metric in self._metrics)
        return jnp.full((), float(known), fixed.dtype)

    def curvature(self, moved: jax.Array, weight: jax.Array) -> jax.Array | None:
        """Return those of the channels, times what each counts; `None` if one is not known."""
        found = []
        total = sum(self.weights)
        for metric, share, (m,) in zip(
            self._metrics, self.weights, self._channels(moved), strict=True
        ):
            curvature, scale = metric.curvature(m, weight), metric.scale(m, m)
            if curvature is None:
                return None
            part = share / total * curvature / jnp.where(scale > 0, scale, 1)
            found.append(jnp.broadcast_to(part, m.shape))
        return jnp.concatenate(found, axis=1)

    def for_scale(self, scale: float) -> Metric:
        """Return the one with the metrics that the level uses."""
        metrics = tuple(metric.for_scale(scale) for metric in self._metrics)
        return PerChannel(metrics, self.weights)
