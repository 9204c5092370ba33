"""Series in time: known motions are found, and nothing moves where nothing moves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scenes import header, physical_grid, scene

from jaxreg.registration import NCC, Affine, Greedy, Moments, Rigid, Translation, align_frames
from jaxreg.registration.motion import Motion
from regkernels import Grid, Series, Volume, rigid_motion

HEAD = header((28, 30, 29), (2.5, 2.5, 2.5), turn=5)
VOXEL = 2.5

AXIS = np.array((1.0, -2.0, 2.0)) / 3


def moved_by(number: int) -> np.ndarray:
    """Where a point of the first frame is in another one."""
    shift = np.array((0.8, -1.1, 0.6)) * number
    return rigid_motion(0.7 * number, AXIS, shift, HEAD.grid.centre())


def series_of(motions: list[np.ndarray], noise: float = 0.0) -> Series:
    points = physical_grid(HEAD)
    rng = np.random.default_rng(0)
    frames = []
    for motion in motions:
        back = np.linalg.inv(motion)
        image = 500 * scene(points @ back[:3, :3].T + back[:3, 3])
        frames.append(image + noise * rng.normal(size=image.shape))
    return Series(np.asarray(frames, np.float32), HEAD.grid, 2.0)


MOTIONS = [moved_by(number) for number in range(5)]
SERIES = series_of(MOTIONS, noise=2)


def errors(found: Motion, expected: list[np.ndarray]) -> np.ndarray:
    """How far points of the head are from where they belong, mm, for each frame."""
    points = physical_grid(HEAD)[::5, ::5, ::5].reshape(-1, 3)
    return np.array(
        [
            np.linalg.norm(points @ (m - e)[:3, :3].T + (m - e)[:3, 3], axis=1).max()
            for m, e in zip(found.matrices, expected, strict=True)
        ]
    )


def beside(reference: int) -> list[np.ndarray]:
    return [motion @ np.linalg.inv(MOTIONS[reference]) for motion in MOTIONS]


@pytest.fixture(scope="module")
def to_first() -> Motion:
    return align_frames(SERIES, reference=0)


def test_known_motions_are_found_within_a_tenth_of_a_voxel(to_first: Motion) -> None:
    assert errors(to_first, MOTIONS).max() < 0.1 * VOXEL
    np.testing.assert_allclose(to_first.matrices[0], np.eye(4), atol=1e-3)
    assert to_first.losses.shape == (5,)
    assert (to_first.losses < -0.99).all()


def test_the_parameters_are_those_of_the_motions(to_first: Motion) -> None:
    steps = np.arange(5)[:, None]
    shifts, turns = to_first.parameters[:, :3], np.rad2deg(to_first.parameters[:, 3:])
    np.testing.assert_allclose(shifts, steps * (0.8, -1.1, 0.6), atol=0.1 * VOXEL)
    np.testing.assert_allclose(turns, steps * 0.7 * AXIS, atol=0.5)
    exact = Motion(SERIES, np.stack(MOTIONS), to_first.losses, to_first.reference)
    np.testing.assert_allclose(exact.parameters[:, :3], steps * (0.8, -1.1, 0.6), atol=1e-9)
    np.testing.assert_allclose(exact.parameters[:, 3:], np.deg2rad(steps * 0.7 * AXIS), atol=1e-9)
    expected = 2.5 + 50 * np.deg2rad(0.7) * np.abs(AXIS).sum()
    found = exact.framewise_displacement()
    np.testing.assert_allclose(found, [0, *[expected] * 4], rtol=1e-9)
    wider = exact.framewise_displacement(radius=100)
    assert wider[1] - found[1] == pytest.approx(found[1] - 2.5)


def test_aligned_frames_are_alike(to_first: Motion) -> None:
    assert to_first.aligned.time_step == 2
    assert to_first.aligned.grid == SERIES.grid
    inside = (slice(None), slice(4, -4), slice(4, -4), slice(4, -4))
    before = SERIES.frames[inside].std(axis=0).mean()
    assert to_first.aligned.frames[inside].std(axis=0).mean() < 0.25 * before
    mean = np.asarray(to_first.mean.array)
    expected = to_first.aligned.frames.mean(axis=0)
    np.testing.assert_allclose(mean[inside[1:]], expected[inside[1:]], rtol=1e-5)
    # Where some frames show nothing it is the mean of the others: at the rim, too, a scene is.
    assert np.abs(mean - 500 * scene(physical_grid(HEAD))).max() < 20


def test_the_mean_lies_where_the_frame_in_the_middle_does() -> None:
    told: list[tuple[int, int]] = []
    found = align_frames(SERIES, reference="mean", block=3, callback=lambda *x: told.append(x))
    assert errors(found, beside(2)).max() < 0.1 * VOXEL
    assert told == [(3, 10), (5, 10), (8, 10), (10, 10)]


def test_blocks_change_nothing_but_rounding(to_first: Motion) -> None:
    found = align_frames(SERIES, reference=0, block=2)
    np.testing.assert_allclose(found.matrices, to_first.matrices, atol=2e-2)


def test_a_still_series_does_not_move() -> None:
    still = series_of([np.eye(4)] * 3)
    for reference in (1, "mean"):
        found = align_frames(still, reference=reference)  # type: ignore[arg-type]
        np.testing.assert_allclose(found.parameters, 0, atol=1e-4)
        np.testing.assert_allclose(found.framewise_displacement(), 0, atol=1e-3)


def test_any_linear_stages_do_and_a_mask_says_what_counts() -> None:
    only_shifts = [rigid_motion(0, AXIS, (0, 0, 0.7 * n), (0, 0, 0)) for n in range(3)]
    series = series_of(only_shifts)
    still = series_of([np.eye(4)]).frames[0]
    series.frames[:, :, :12] = still[:, :12]  # as what does not move with the head
    weights = np.ones(HEAD.shape, np.float32)
    weights[:, :15] = 0
    stages = [Moments(rotation=False), Translation((2, 1), (40, 30), tolerance=1e-6)]
    found = align_frames(series, stages, reference=0, mask=HEAD.with_array(weights))
    assert errors(found, only_shifts).max() < 0.1 * VOXEL
    assert errors(align_frames(series, stages, reference=0), only_shifts).max() > 0.1 * VOXEL
    affine = [Affine((2, 1), (60, 40), tolerance=1e-6)]
    found = align_frames(series_of(only_shifts), affine, reference=0)
    assert errors(found, only_shifts).max() < 0.3 * VOXEL


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": [Greedy()]}, "^stages: expected stages that are linear, got greedy"),
        ({"reference": 5}, "^reference: expected mean, or a frame from 0 to 4, got 5"),
        ({"block": 0}, "^block: expected at least 1, got 0"),
        ({"mask": header((3, 4, 5), (1, 1, 1))}, "^mask: expected the grid of the series"),
        ({"mask": HEAD}, "^mask: expected one channel of weights of at least 0, not all 0"),
        ({"clip": 3}, "^clip: expected"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        align_frames(SERIES, **changes)


def test_single_and_empty_frames_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^series: expected two frames or more, got 1"):
        align_frames(SERIES._replace(frames=SERIES.frames[:1]))
    frames = SERIES.frames.copy()
    frames[3] = 7
    with pytest.raises(ValueError, match=r"^series: frame 3: expected different intensities"):
        align_frames(SERIES._replace(frames=frames))


def test_one_slice_moves_within_its_plane() -> None:
    grid = header((1, 32, 30), (2.0, 2.0, 5.0))
    points = physical_grid(grid)
    frames = [scene(points - (1.5 * n, -0.5 * n, 0)) for n in range(3)]
    series = Series(np.asarray(frames, np.float32), grid.grid, 1.0)
    found = align_frames(
        series, [Rigid((2, 1), (40, 30), metric=NCC(), tolerance=1e-6)], reference=0
    )
    np.testing.assert_allclose(found.parameters[2, :2], (3, -1), atol=0.2)
    np.testing.assert_allclose(found.parameters[:, 2:5], 0, atol=1e-5)


def test_a_frame_is_a_volume() -> None:
    assert isinstance(SERIES.volume(2), Volume)
    assert isinstance(SERIES.volume(2).grid, Grid)
