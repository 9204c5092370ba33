"""How good a registration is: by labels, by landmarks, and by how alike the images are."""

from __future__ import annotations

import numpy as np
import pytest
from monai.metrics import compute_hausdorff_distance
from numpy.typing import ArrayLike
from scenes import header, physical_grid, placed, random_header
from scipy.spatial.distance import cdist

from jaxreg.registration import (
    HausdorffDistance,
    dice,
    evaluation,
    hausdorff_distance,
    image_similarity,
    target_registration_error,
)
from jaxreg.registration.transforms.transform import Transform
from regkernels import Volume


def test_dice_is_twice_the_overlap_over_the_sizes() -> None:
    a = np.array([[1, 1, 2, 0], [1, 0, 2, 0]])
    b = np.array([[1, 1, 0, 0], [0, 5, 2, 0]])
    assert dice(a, b) == {1: pytest.approx(2 * 2 / 5), 2: pytest.approx(2 * 1 / 3), 5: 0.0}
    assert dice(0 * a, 0 * b) == {}


@pytest.mark.parametrize("largest", [40, 10**12])
@pytest.mark.parametrize("dtypes", [(np.int16, np.int64), (np.uint64, np.uint64)])
def test_dice_of_large_maps_is_counted_part_by_part(
    dtypes: tuple[type, type], largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "_AT_A_TIME", 1000)
    rng = np.random.default_rng(3)
    a, b = (rng.integers(0, 12, (9, 20, 31)) * (largest // 12) for _ in range(2))
    if largest > np.iinfo(dtypes[0]).max:
        dtypes = np.uint64, np.int64
    expected = {
        int(n): 2 * ((a == n) & (b == n)).sum() / ((a == n).sum() + (b == n).sum())
        for n in np.unique([a, b])
        if n > 0
    }
    assert dice(a.astype(dtypes[0]), b.astype(dtypes[1])) == expected


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


def blocks(volume: Volume) -> tuple[Volume, Volume]:
    """Two label maps on a grid: 2 touches the border of it, 9 is in one of them alone."""
    a, b = np.zeros((2, *volume.shape), np.int16)
    a[1:5, 2:7, 1:5] = 1
    b[2:6, 2:6, 2:7] = 1
    a[:3, :2, 5:] = b[1:4, :3, 5:] = 2
    a[-1, -1, -1] = 9
    return volume.with_array(a), volume.with_array(b)


def surface(volume: Volume, label: int) -> np.ndarray:
    inside = np.pad(np.asarray(volume.array) == label, 1)
    all_around = inside.copy()
    for axis in range(inside.ndim):
        for step in (1, -1):
            all_around &= np.roll(inside, step, axis)
    rim = (inside & ~all_around)[(slice(1, -1),) * inside.ndim]
    return physical_grid(volume)[rim]


@pytest.mark.parametrize("sheared", [False, True])
def test_the_hausdorff_distance_is_in_millimetres_on_oblique_anisotropic_grids(
    sheared: bool,
) -> None:
    volume = random_header(np.random.default_rng(3))
    if sheared:
        direction = volume.grid.direction @ np.array([[1, 0.3, 0], [0, 1, 0], [0, 0, 1]])
        volume = placed(volume, direction=direction / np.linalg.norm(direction, axis=0))
    a, b = blocks(volume)
    found = hausdorff_distance(a, b)
    assert list(found) == [1, 2, 9]
    assert np.isnan(found[9]).all()
    for label in (1, 2):
        distances = cdist(surface(a, label), surface(b, label))
        there, back = distances.min(axis=1), distances.min(axis=0)
        assert found[label].maximum == pytest.approx(max(there.max(), back.max()))
        directed = (np.percentile(d, 95) for d in (there, back))
        assert found[label].percentile_95 == pytest.approx(max(directed))


def test_the_hausdorff_distance_is_that_of_monai() -> None:
    volume = header((9, 8, 10), (0.7, 1.3, 2.9), turn=25)
    a, b = blocks(volume)
    one, other = (np.stack([np.asarray(v.array) == k for k in (1, 2)])[None] for v in (a, b))
    found = hausdorff_distance(a, b)
    for percentile, field in ((None, "maximum"), (95, "percentile_95")):
        theirs = compute_hausdorff_distance(
            one, other, include_background=True, percentile=percentile, spacing=(2.9, 1.3, 0.7)
        )
        ours = [getattr(found[label], field) for label in (1, 2)]
        np.testing.assert_allclose(ours, theirs[0], rtol=1e-5)


def test_equal_labels_have_no_distance_and_a_single_slice_is_a_plane() -> None:
    for shape in ((9, 8, 10), (1, 8, 10)):
        a, _ = blocks(header((9, 8, 10), (1, 2, 3)))
        volume = header(shape, (1, 2, 3))
        labels = volume.with_array(np.asarray(a.array)[: shape[0]])
        assert set(hausdorff_distance(labels, labels).values()) <= {HausdorffDistance(0, 0)}
    square = np.zeros((1, 8, 10), np.uint8)
    square[:, 1:6, 1:6] = 1
    hole = square.copy()
    hole[:, 3, 3] = 0  # seen only where the inside of a slice is not its surface
    flat = header((1, 8, 10), (1, 1, 5))
    found = hausdorff_distance(flat.with_array(square), flat.with_array(hole))
    assert found[1].maximum == pytest.approx(1)
    assert hausdorff_distance(flat, flat) == {}


def test_surfaces_on_different_grids_are_not_compared() -> None:
    a, b = blocks(header((9, 8, 10), (1, 2, 3)))
    with pytest.raises(ValueError, match="labels_b: expected spacing, origin and direction"):
        hausdorff_distance(a, placed(b, spacing=2 * b.grid.spacing))
    with pytest.raises(ValueError, match=r"labels_b: expected shape \(9, 8, 10\)"):
        hausdorff_distance(a, header((9, 8, 9), (1, 2, 3)))
    with pytest.raises(ValueError, match="labels_a: expected integers"):
        hausdorff_distance(a.with_array(np.asarray(a.array) / 2), b)


def test_images_are_compared_where_the_mask_says() -> None:
    volume = header((14, 15, 16), (1, 2, 3))
    rng = np.random.default_rng(0)
    image = rng.normal(size=(2, *volume.shape)).astype(np.float32)
    other = 3 * image + 5
    inside = np.zeros(volume.shape, np.bool_)
    inside[:, :10] = True
    other[:, :, 10:] = rng.normal(size=other[:, :, 10:].shape)
    one, two = volume.with_array(image), volume.with_array(other)
    found = image_similarity(one, two, inside)
    assert found.ncc == pytest.approx(1, abs=1e-5)
    assert found.lncc == pytest.approx(1, abs=1e-4)
    assert found.share == pytest.approx(10 / 15)
    expected = np.mean((image - other)[:, inside].astype(np.float64) ** 2)
    assert found.mean_squared_difference == pytest.approx(expected, rel=1e-5)
    whole = image_similarity(one, two)
    assert whole.ncc < 0.9 and whole.lncc < 0.8 and whole.share == 1
    assert whole.mutual_information < found.mutual_information
    thin = np.zeros(volume.shape, np.bool_)
    thin[3] = True
    assert np.isnan(image_similarity(one, two, thin).lncc)


def test_images_that_cannot_be_compared_are_refused() -> None:
    volume = header((8, 9, 10), (1, 2, 3))
    with pytest.raises(ValueError, match=r"other: expected shape \(8, 9, 10\) as image"):
        image_similarity(volume, header((8, 9, 9), (1, 2, 3)))
    with pytest.raises(ValueError, match="other: expected spacing, origin and direction of image"):
        image_similarity(volume, placed(volume, origin=volume.grid.origin + 1))
    with pytest.raises(ValueError, match="other: expected 1 channels as image, got 2"):
        image_similarity(volume, volume.with_array(np.zeros((2, *volume.shape))))
    with pytest.raises(ValueError, match=r"mask: expected shape \(8, 9, 10\)"):
        image_similarity(volume, volume, np.ones((8, 9)))
    with pytest.raises(ValueError, match="mask: expected a voxel that both images have"):
        image_similarity(volume, volume, np.zeros(volume.shape))


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
