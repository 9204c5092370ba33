"""How good a registration is: the overlap of labels and the distance of landmarks."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import ArrayLike
from scenes import header

from jaxreg.registration import (
    dice,
    target_registration_error,
)
from jaxreg.registration.transforms.transform import Transform


def test_dice_is_twice_the_overlap_over_the_sizes() -> None:
    a = np.array([[1, 1, 2, 0], [1, 0, 2, 0]])
    b = np.array([[1, 1, 0, 0], [0, 5, 2, 0]])
    assert dice(a, b) == {1: pytest.approx(2 * 2 / 5), 2: pytest.approx(2 * 1 / 3), 5: 0.0}
    assert dice(0 * a, 0 * b) == {}


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (np.zeros((2, 2)), np.zeros((2, 3)), r"labels_b: expected shape \(2, 2\)"),
        (np.full((2, 2), 0.5), np.zeros((2, 2)), "labels_a: expected integers"),
        (np.zeros((2, 2)), np.full((2, 2), -1), "labels_b: expected integers"),
    ],
)
def test_what_are_no_labels_is_refused(a: np.ndarray, b: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dice(a, b)


class Shift(Transform):
    def transform_points(self, points: ArrayLike) -> np.ndarray:
        return np.asarray(points) + np.array([3, 4, 0])


def test_the_target_registration_error_is_a_distance_in_millimetres() -> None:
    transform = Shift(header((4, 5, 6), (2, 2, 2)).grid, np.eye(4))
    points = np.arange(12.0).reshape(4, 3)
    np.testing.assert_allclose(target_registration_error(transform, points, points), 5)
    np.testing.assert_allclose(
        target_registration_error(transform, points, points + np.array([3, 4, 0])), np.zeros(4)
    )
    with pytest.raises(ValueError, match=r"points_fixed: expected shape \(K, 3\)"):
        target_registration_error(transform, points[:, :2], points[:, :2])
    with pytest.raises(ValueError, match=r"points_moving: expected shape \(4, 3\)"):
        target_registration_error(transform, points, points[:2])
