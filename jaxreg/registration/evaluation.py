"""How good a registration is: by labels and landmarks, of which it was not told, and by images."""

from __future__ import annotations

import collections
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike, NDArray

from jaxreg.loss import mutual_information_loss
from jaxreg.registration.stages.metrics import LNCC, mse_loss, ncc, shrunk
from jaxreg.registration.transforms.transform import Transform
from regkernels import AffineMap, Grid, Volume

__all__ = [
    "HausdorffDistance",
    "ImageSimilarity",
    "dice",
    "hausdorff_distance",
    "image_similarity",
    "target_registration_error",
]


def dice(labels_a: ArrayLike, labels_b: ArrayLike) -> dict[int, float]:
    r"""Dice coefficient of every label, :math:`2 |A \cap B| / (|A| + |B|)`.

    Parameters
    ----------
    labels_a, labels_b
        Label maps of the same shape, integers; 0 is the background.

    Returns
    -------
    dict
        Label -> coefficient from 0 to 1, for the labels above 0 of either map, in their order.

    Raises
    ------
    ValueError
        If the shapes differ, or for labels that are not integers of at least 0.

    Notes
    -----
    Dice, "Measures of the Amount of Ecologic Association Between Species", Ecology 26, 1945.
    """
    a, b = _labels("labels_a", labels_a), _labels("labels_b", labels_b)
    if a.shape != b.shape:
        raise ValueError(f"labels_b: expected shape {a.shape} as labels_a, got {b.shape}")
    in_a, in_b, in_both = (collections.Counter[int]() for _ in range(3))
    a, b = a.ravel(), b.ravel()
    for first in range(0, a.size, _AT_A_TIME):
        part_a, part_b = (x[first : first + _AT_A_TIME] for x in (a, b))
        in_a += _voxels_of_labels(part_a)
        in_b += _voxels_of_labels(part_b)
        in_both += _voxels_of_labels(part_a[part_a == part_b])
    return {
        label: 2 * in_both[label] / (in_a[label] + in_b[label])
        for label in sorted({*in_a, *in_b} - {0})
    }


_AT_A_TIME = 2**22
"""Voxels whose labels are counted together, so that little memory is needed for that."""


def _voxels_of_labels(labels: NDArray[Any]) -> collections.Counter[int]:
    """Count the voxels of each label that there is."""
    if labels.size == 0:
        return collections.Counter()
    if labels.max() < labels.size:  # to sort them takes longer
        voxels = np.bincount(labels.astype(np.intp))
        numbers = np.flatnonzero(voxels)
        voxels = voxels[numbers]
    else:
        numbers, voxels = np.unique(labels, return_counts=True)
    return collections.Counter(dict(zip(numbers.tolist(), voxels.tolist(), strict=True)))


class HausdorffDistance(NamedTuple):
    """How far the surfaces of a label are from each other in two label maps, in millimetres.

    Attributes
    ----------
    maximum
        The Hausdorff distance: how far the furthest voxel of either surface is from the other one.
    percentile_95
        The distance that 95 % of a surface's voxels do not exceed, of the worse of the two
        directions.
    """

    maximum: float
    percentile_95: float


def hausdorff_distance(labels_a: Volume, labels_b: Volume) -> dict[int, HausdorffDistance]:
    r"""Hausdorff distance of every label, :math:`\max(\sup_{a} d(a, B), \sup_{b} d(b, A))`.

    Parameters
    ----------
    labels_a, labels_b
        Label maps on one grid, integers; 0 is the background. Spacing and direction count, axes
        that are not at right angles included.

    Returns
    -------
    dict
        Label -> distances, for the labels above 0 of either map, in their order; NaN where one of
        the maps does not have the label.

    Raises
    ------
    ValueError
        If the grids differ, or for labels that are not integers of at least 0.

    Notes
    -----
    Distances are between the centres of voxels of the surfaces: those of a label with a neighbour
    across a face that is not of it, or at the border of the grid (of axes longer than one voxel).
    Huttenlocher, Klanderman and Rucklidge, "Comparing images using the Hausdorff distance", IEEE
    TPAMI 15, 1993.
    """
    from scipy.spatial import KDTree

    _check_same_grid("labels_b", "labels_a", labels_a.grid, labels_b.grid)
    a, b = (
        _surfaces(_labels(name, volume.array), volume.grid)
        for name, volume in (("labels_a", labels_a), ("labels_b", labels_b))
    )
    found = {label: HausdorffDistance(math.nan, math.nan) for label in sorted({*a, *b})}
    for label in {*a} & {*b}:
        there, back = (
            KDTree(to).query(of, workers=-1)[0]
            for of, to in ((a[label], b[label]), (b[label], a[label]))
        )
        found[label] = HausdorffDistance(
            float(max(there.max(), back.max())),
            float(max(np.percentile(there, 95), np.percentile(back, 95))),
        )
    return found


def target_registration_error(
    transform: Transform, points_fixed: ArrayLike, points_moving: ArrayLike
) -> NDArray[np.float64]:
    """Distance between landmarks that the transform moves and where they should come to.

    Parameters
    ----------
    transform
        From `register`.
    points_fixed
        ``(K, D)``, physical positions in the fixed space, millimetres, LPS.
    points_moving
        ``(K, D)``, the same landmarks in the moving space.

    Returns
    -------
    ndarray
        ``(K,)``, millimetres.

    Raises
    ------
    ValueError
        If there are not as many points on both sides, or of another dimension.
    """
    fixed, moving = (np.asarray(p, dtype=np.float64) for p in (points_fixed, points_moving))
    ndim = transform.grid.ndim
    if fixed.ndim != 2 or fixed.shape[1] != ndim:
        raise ValueError(f"points_fixed: expected shape (K, {ndim}), got {fixed.shape}")
    if moving.shape != fixed.shape:
        raise ValueError(f"points_moving: expected shape {fixed.shape}, got {moving.shape}")
    distances: NDArray[np.float64] = np.linalg.norm(
        transform.transform_points(fixed) - moving, axis=1
    )
    return distances


class ImageSimilarity(NamedTuple):
    """How alike two images are, where both have data.

    Attributes
    ----------
    ncc
        Global normalised cross-correlation, from -1 to 1; over channels the mean.
    lncc
        Mean squared local correlation in windows of 7 voxels, as `LNCC` has it, of the images less
        their means; from 0 to 1, NaN if no window is whole.
    mutual_information
        In nats, from 32 bins; over channels the mean.
    mean_squared_difference
        In the units of the intensities, squared.
    share
        Part of the voxels that were compared, from 0 to 1.
    """

    ncc: float
    lncc: float
    mutual_information: float
    mean_squared_difference: float
    share: float


def image_similarity(
    image: Volume, other: Volume, mask: ArrayLike | None = None
) -> ImageSimilarity:
    """Return how alike two images are, by what the stages minimise.

    Parameters
    ----------
    image, other
        Volumes on one grid with as many channels.
    mask
        ``([Z,] Y, X)``, true where both have data; everywhere by default.

    Returns
    -------
    ImageSimilarity
        Of the voxels that the mask leaves in; of LNCC those whose whole windows it does.

    Raises
    ------
    ValueError
        If the grids or channels differ, or the mask has another shape or leaves nothing in.
    """
    _check_same_grid("other", "image", image.grid, other.grid)
    if other.channels != image.channels:
        raise ValueError(
            f"other: expected {image.channels} channels as image, got {other.channels}"
        )
    inside = np.ones(image.shape, np.bool_) if mask is None else np.asarray(mask, np.bool_)
    if inside.shape != image.shape:
        raise ValueError(f"mask: expected shape {image.shape}, got {inside.shape}")
    if not inside.any():
        raise ValueError("mask: expected a voxel that both images have, got none")
    weights = jnp.asarray(inside, jnp.float32)[None, None]
    one, two = (jnp.asarray(volume.batched(), jnp.float32) for volume in (image, other))
    # Beyond the grid windows hold zeros: about the mean of an image that is no edge, so that a gain
    # and an offset change nothing.
    axes = tuple(range(2, weights.ndim))
    means = ((weights * x).sum(axes, keepdims=True) / weights.sum() for x in (one, two))
    centred_one, centred_two = (x - mean for x, mean in zip((one, two), means, strict=True))
    metric = LNCC()
    windows = shrunk(weights, metric.reach)
    whole = bool(windows.any())
    return ImageSimilarity(
        float(ncc(two, one, weights).mean()),
        -float(metric.loss(centred_two, centred_one, windows)) if whole else math.nan,
        -float(mutual_information_loss(two, one, mask=weights)),
        float(mse_loss(two, one, weights)),
        float(inside.mean()),
    )


def _check_same_grid(name: str, of: str, grid: Grid, other: Grid) -> None:
    if other.shape != grid.shape:
        raise ValueError(f"{name}: expected shape {grid.shape} as {of}, got {other.shape}")
    if not other.same_place(grid):
        raise ValueError(
            f"{name}: expected spacing, origin and direction of {of}, got voxels that lie up to "
            f"{other.voxels_apart(grid):.3g} voxels from those"
        )


def _surfaces(labels: NDArray[Any], grid: Grid) -> dict[int, NDArray[np.float64]]:
    """Return the positions of the voxels of each label's surface, ``(K, D)``, millimetres."""
    inner = np.ones(labels.shape, np.bool_)
    for axis, size in enumerate(labels.shape):
        if size == 1:
            continue
        first, last, before, after = (
            (*(slice(None),) * axis, part)
            for part in (slice(1), slice(-1, None), slice(-1), slice(1, None))
        )
        inner[first] = inner[last] = False
        same = labels[before] == labels[after]
        inner[before] &= same
        inner[after] &= same
    index = np.argwhere(~inner & (labels > 0))
    found = labels[tuple(index.T)]
    order = np.argsort(found, kind="stable")
    known, starts = np.unique(found[order], return_index=True)
    positions = AffineMap(grid.voxel_to_physical()).move(index[order, ::-1].astype(np.float64))
    parts = np.split(positions, starts[1:]) if known.size else []
    return dict(zip(known.tolist(), parts, strict=True))


def _labels(name: str, labels: ArrayLike) -> NDArray[Any]:
    """Return a label map as integers, of the type that it has if that is one of them."""
    array = np.asarray(labels)
    integers = array if array.dtype.kind in "iu" else array.astype(np.int64)
    if not np.array_equal(array, integers) or (integers.size and integers.min() < 0):
        raise ValueError(f"{name}: expected integers of at least 0")
    return integers
