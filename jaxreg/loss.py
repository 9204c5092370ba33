"""How alike two images are, as losses with exact gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxreg._ops import apply
from regkernels.options import broadcast_mask_shape, intensity_bounds, is_joint, optional_tuple

ValueRange = str | Sequence[Sequence[ArrayLike]] | None

_ARRAYS = (jax.Array, np.ndarray)


def _weights(mask: Any, image: Any) -> Any:
    """A mask with the image's spatial axes, as numbers; what does not fit is left as it is."""
    if not isinstance(mask, _ARRAYS):
        return mask
    if mask.dtype == bool:
        mask = mask.astype(jnp.float32)
    shape = broadcast_mask_shape(mask.shape, np.shape(image))
    return mask if shape is None else jnp.broadcast_to(mask, shape)


def lncc_loss(
    pred: ArrayLike,
    target: ArrayLike,
    *,
    kernel_size: int | Sequence[int] = 7,
    window: str = "rectangular",
    sigma: float | None = None,
    smooth_nr: float = 0.0,
    smooth_dr: float = 1e-5,
    smooth_product: float = 0.0,
    common_variance: float = 0.0,
    both_flat: float | None = None,
    mask: ArrayLike | None = None,
    reduction: str = "mean",
) -> jax.Array:
    """Local normalized cross-correlation of two images, as a loss, with its exact gradient.

    About every voxel a window of ``kernel_size`` voxels a side, zero outside the image, with
    weights of sum m. From the weighted sums over it::

        cross = sum(I J) - sum(I) sum(J) / m
        v_I   = max(sum(I I) - sum(I)^2 / m, smooth_dr)         v_J likewise
        ncc   = (cross^2 + smooth_nr) / (v_I v_J + smooth_product)            loss = -mean(ncc)

    With a ``common_variance`` c, m c is added to cross, v_I and v_J: the images are compared as if
    they shared, besides what they show, a pattern of that variance.

    These are the values of MONAI's ``LocalNormalizedCrossCorrelationLoss``; its gradient is that of
    the number returned, clamped variances included. Sums are taken about a value near the image's,
    so that an offset costs no precision; a window that is constant to within rounding has no
    correlation and no gradient. The same bits come out every time.

    Parameters
    ----------
    pred : float[N, C, *S]
        ``*S`` stands for the spatial axes ``Z, Y, X`` or ``Y, X``. float64, float32, float16 or
        bfloat16; computed in float64 where an operand is float64, and in float32 otherwise.
    target : float[N, C, *S]
        The same channels and spatial axes. Each batch size is N or 1.
    kernel_size
        Voxels along a side of the window: odd, from 3 to 31. Or a size for each axis, ``([z,] y,
        x)``, odd, from 1 on, and 3 or more for some: it takes as long as the largest of them for
        all, and a value that is not finite counts as far as that, too.
    window
        "rectangular"; "gaussian" with weights ``exp(-d^2 / (2 sigma^2))`` along each axis; or
        "triangular" with weights ``max(f - |d|, 0) / f^2``, f being the largest odd number up to
        ``(kernel_size + 1) / 2``, as in MONAI.
    sigma
        Of the Gaussian, in voxels; a third of the window's size when ``None``.
    smooth_nr, smooth_dr
        Added to the numerator, at least 0; the least variance, at least 1e-18.
    smooth_product
        Added to the product of the variances, from 0 to 1e18. VoxelMorph's loss has 1e-5 there, and
        no least variance.
    common_variance
        In squared intensities, at least 0. Windows that vary by much less in both images are alike,
        so that noise where there is no contrast is not matched; one that varies by much more has
        the correlation that it has without. Images that are the same still have a correlation of 1.
    both_flat
        From 0 to 1: the correlation of windows that are constant in both images, where there is
        nothing to correlate. ``None``: what the formula gives, which is 0 without ``smooth_nr``.
    mask : float or bool [N, C, *S], optional
        Weights of at least 0, constant, broadcast against ``pred``. The mean is then
        ``sum(mask ncc) / sum(mask)``, or 0 if the mask is empty; "sum" and "none" multiply by it.
    reduction
        "mean" or "sum" over everything, or "none".

    Returns
    -------
    float[] or float[N, C, *S]
        float64 where an operand is float64, else float32. Differentiable with respect to pred and
        target; a gradient is computed only when asked for.

    Raises
    ------
    ValueError
        A shape or a number that does not fit; the message names the argument.
    TypeError
        A dtype or an argument's type that is not supported.
    """
    return apply(
        "lncc_loss",
        (pred, target, _weights(mask, pred)),
        {
            "kernel_size": optional_tuple(kernel_size),
            "window": window,
            "sigma": optional_tuple(sigma),
            "smooth_nr": smooth_nr,
            "smooth_dr": smooth_dr,
            "smooth_product": smooth_product,
            "common_variance": common_variance,
            "both_flat": optional_tuple(both_flat),
            "reduction": reduction,
        },
    )


def _intensity_ranges(op: str, value_range: Any, pred: Any, target: Any) -> Any:
    """Low and high of pred and of target, as the op takes them; ``None``: it looks for them."""
    if value_range is None or is_joint(value_range):
        return None
    # Its precision is the images', which it must not raise.
    wide = any(getattr(x, "dtype", None) == np.float64 for x in (pred, target))
    dtype = jnp.result_type(float) if wide else np.dtype(np.float32)
    largest = float(np.finfo(dtype).max)
    bounds = intensity_bounds(op, value_range, largest, _ARRAYS, jnp.iscomplexobj)
    on_host = not any(isinstance(bound, jax.Array) for bound in bounds)
    xp: Any = np if on_host else jnp
    ranges = xp.stack(xp.broadcast_arrays(*bounds), axis=-1).reshape(-1, 2, 2).astype(dtype)
    return ranges if on_host else jax.lax.stop_gradient(ranges)


def mutual_information_loss(
    pred: ArrayLike,
    target: ArrayLike,
    *,
    num_bins: int = 32,
    kernel: str = "gaussian",
    sigma_ratio: float = 1.0,
    value_range: ValueRange = None,
    mask: ArrayLike | None = None,
    normalised: bool = False,
    reduction: str = "mean",
    smooth_nr: float = 1e-7,
    smooth_dr: float = 1e-7,
) -> jax.Array:
    """Mutual information of two images' intensities, as a loss, with its exact gradient.

    Intensities are mapped to x in [0, 1] by ``value_range`` and clamped. A Parzen window spreads
    each over bins with the centres ``c_b = (b + 1/2) / num_bins``, with weights of sum 1. p_ab is
    the mean over the voxels of the product of the two images' weights, p_a and p_b are its sums
    over b and over a, and::

        MI = sum over a, b of p_ab log((p_ab + smooth_nr) / (p_a p_b + smooth_dr) + smooth_dr)

    for each item and channel; the loss is -MI, reduced. If ``normalised``, it is -NMI instead, with
    the entropies H of p_a, of p_b and of p_ab::

        NMI = (H(A) + H(B)) / H(A, B),    H = -sum p log p

    from 1 for independent images to 2 for those that tell all about each other. The gradient is
    that of the number returned, with the range held fixed: where the clamp acts there is none, at
    the very ends of the range there is one. The same bits come out every time.

    Parameters
    ----------
    pred : float[N, C, *S]
        ``*S`` stands for the spatial axes ``Z, Y, X`` or ``Y, X``. float64, float32, float16 or
        bfloat16; computed in float64 where an operand is float64, and in float32 otherwise.
    target : float[N, C, *S]
        The same channels and spatial axes. Each batch size is N or 1.
    num_bins
        From 2 to 256.
    kernel
        "gaussian", with weights ``exp(-((x - c_b) / sigma)^2 / 2)``; "b-spline", the cubic one of
        ``|x - c_b| num_bins``; or "delta", the nearest bin alone, which has no gradient.
    sigma_ratio
        From 0.25 to 4: the Gaussian's sigma is ``sigma_ratio / (2 num_bins)``.
    value_range
        Which intensities are mapped to 0 and 1. ``None``: the least and the largest of each image,
        for each item and channel. "joint": those of both images of an item and channel together.
        Or ``((low, high), (low, high))`` of pred and of target: each a number or an array with one
        for all items or one for each. Numbers are to be finite, the lower first; what arrays hold
        is not checked, and a bound that is not finite gives NaN. An empty range maps everything to
        0 and gives no gradient, so that a constant image tells nothing about another. Infinite
        voxels have no part in a range and count as at its ends; one that is NaN makes its item and
        channel NaN, unless it weighs nothing.
    mask : float or bool [N, C, *S], optional
        Weights of the voxels, at least 0, constant, broadcast against ``pred``: p_ab is then the
        weighted mean, and all is 0 where the mask is empty, but NMI 1. ``value_range=None`` and
        "joint" look at every voxel all the same.
    normalised
        Whether the loss is -NMI, Studholme's [#s]_, which depends less on how much two images
        overlap. Where H(A, B) is 0 (below 1e-10), both images are constant: NMI is 1 there and has
        no gradient.
    reduction
        "mean" or "sum" over items and channels, or "none".
    smooth_nr, smooth_dr
        Keep the logarithm finite, as above; from 0, and from 1e-30, to 1e30. NMI needs neither.

    Returns
    -------
    float[] or float[N, C]
        float64 where an image or the mask is, else float32. Differentiable with respect to pred and
        target; a gradient is computed only when asked for.

    Raises
    ------
    ValueError
        A shape, a number or a range that does not fit, or a gradient with the kernel "delta"; the
        message names the argument.
    TypeError
        A dtype or an argument's type that is not supported.

    Notes
    -----
    The B-spline is that of Mattes et al. [#m]_, here for both images. The sum is that of MONAI's
    ``GlobalMutualInformationLoss``, which clamps intensities to [0, 1] and puts the first and the
    last centre at 0 and 1. The values of its Gaussian are those of images that are clamped to
    [0, 1] beforehand and of ``value_range`` from -h to 1 + h for both, with
    ``h = 1 / (2 (num_bins - 1))``, and of twice its ``sigma_ratio``.

    References
    ----------
    .. [#m] D. Mattes, D. R. Haynor, H. Vesselle, T. K. Lewellen, W. Eubank: PET-CT image
       registration in the chest using free-form deformations. IEEE Transactions on Medical Imaging
       22(1), 2003.
    .. [#s] C. Studholme, D. L. G. Hill, D. J. Hawkes: An overlap invariant entropy measure of 3D
       medical image alignment. Pattern Recognition 32(1), 1999.
    """
    op = "mutual_information_loss"
    ranges = _intensity_ranges(op, value_range, pred, target)
    return apply(
        op,
        (pred, target, _weights(mask, pred), ranges, None),
        {
            "num_bins": num_bins,
            "kernel": kernel,
            "sigma_ratio": sigma_ratio,
            "joint_range": is_joint(value_range),
            "normalised": normalised,
            "smooth_nr": smooth_nr,
            "smooth_dr": smooth_dr,
            "reduction": reduction,
        },
    )


def joint_histogram(
    pred: ArrayLike,
    target: ArrayLike,
    *,
    num_bins: int = 32,
    kernel: str = "gaussian",
    sigma_ratio: float = 1.0,
    value_range: ValueRange = None,
    mask: ArrayLike | None = None,
) -> jax.Array:
    """How often each pair of intensities occurs in two images at the same place.

    Intensities are spread over bins by Parzen windows as in :func:`mutual_information_loss`; what
    comes out is its p_ab, of sum 1 for each item and channel.

    Parameters
    ----------
    pred, target, num_bins, kernel, sigma_ratio, value_range, mask
        As for :func:`mutual_information_loss`.

    Returns
    -------
    float[N, C, num_bins, num_bins]
        The bins of pred, then those of target. float64 where an image or the mask is, else float32.
        Zero where the mask is empty. It has no gradient.

    Raises
    ------
    ValueError
        A shape, a number or a range that does not fit; the message names the argument.
    TypeError
        A dtype or an argument's type that is not supported.
    """
    op = "joint_histogram"
    ranges = _intensity_ranges(op, value_range, pred, target)
    return apply(
        op,
        (pred, target, _weights(mask, pred), ranges, None),
        {
            "num_bins": num_bins,
            "kernel": kernel,
            "sigma_ratio": sigma_ratio,
            "joint_range": is_joint(value_range),
        },
    )
