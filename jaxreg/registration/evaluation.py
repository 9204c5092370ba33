"""How good a registration is, by what it was not told: labels and landmarks."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from jaxreg.registration.transforms.transform import Transform

__all__ = ["dice", "target_registration_error"]


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
    counts = [dict(zip(*np.unique(m, return_counts=True), strict=True)) for m in (a, b, a[a == b])]
    return {
        int(label): float(2 * counts[2].get(label, 0) / sum(c.get(label, 0) for c in counts[:2]))
        for label in sorted({*counts[0], *counts[1]} - {0})
    }


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


def _labels(name: str, labels: ArrayLike) -> NDArray[np.int64]:
    array = np.asarray(labels)
    integers = array.astype(np.int64)
    if not np.array_equal(array, integers) or (integers < 0).any():
        raise ValueError(f"{name}: expected integers of at least 0")
    return integers
