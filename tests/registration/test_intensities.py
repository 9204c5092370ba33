"""What a registration makes of intensities: any background, and a few voxels far from the rest."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scenes import header, physical_grid

from jaxreg.registration import Affine, Moments, Rigid, register, register_images
from jaxreg.registration.intensities import clipped
from jaxreg.registration.report.pictures import Shown, draw_slices
from regkernels import Volume, move_points, rigid_motion


def motion(degrees: float) -> np.ndarray:
    """A rotation about the origin, and a shift, in the plane."""
    whole = rigid_motion(degrees, (0, 0, 1), (6, -5, 0), (0, 0, 0))
    return whole[np.ix_([0, 1, 3], [0, 1, 3])]


def tissue(points: np.ndarray) -> np.ndarray:
    """What a section of about 50 x 35 absorbs, from 0 to 1, of points ``(..., 2)``."""
    x, y = points[..., 0], points[..., 1]
    angle = np.arctan2(y / 0.7, x)
    edge = 25 + 4 * np.cos(angle + 1) + 3 * np.cos(3 * angle)
    inside = 1 / (1 + np.exp(np.hypot(x, y / 0.7) - edge))
    return inside * (0.5 + 0.2 * np.sin(x / 3 + y / 8) + 0.2 * np.cos(y / 4 - x / 9))


def sections(degrees: float, contrast: Any = lambda absorbed: absorbed) -> tuple[Volume, Volume]:
    """Two images of one section, the second of which is turned and shifted."""
    empty = header((96, 96), (1, 1))
    points = physical_grid(empty)
    turned = move_points(points, [np.linalg.inv(motion(degrees))])
    fixed, moving = (contrast(tissue(p)) for p in (points, turned))
    return empty.with_array(fixed), empty.with_array(moving)


def error(found: Any, degrees: float) -> float:
    """How far points of the section end from where they belong on average, in pixels."""
    points = physical_grid(header((9, 9), (5, 4)))
    apart = found.transform_points(points) - move_points(points, [motion(degrees)])
    return float(np.linalg.norm(apart, axis=-1).mean())


def noisy(absorbed: np.ndarray) -> np.ndarray:
    """A CT whose background is noise."""
    return 1500 * absorbed - 1024 + np.random.default_rng(0).normal(0, 15, absorbed.shape)


CONTRASTS = {
    "dark": lambda absorbed: 200 * absorbed,
    "bright": lambda absorbed: 245 - 200 * absorbed,
    "CT": lambda absorbed: 1500 * absorbed - 1024,
    "noisy": noisy,
    "RGB": lambda absorbed: np.stack([245 - k * absorbed for k in (200, 150, 90)]),
}


# --- the background -----------------------------------------------------------------------------


@pytest.mark.parametrize("contrast", CONTRASTS)
def test_moments_do_not_depend_on_the_background(contrast: str) -> None:
    for degrees in (8, 60):
        known = register(*sections(degrees), [Moments()]).transform
        assert error(known, degrees) < 2
        found = register(*sections(degrees, CONTRASTS[contrast]), [Moments()]).transform
        np.testing.assert_allclose(found.matrix[:2, :2], known.matrix[:2, :2], atol=0.02)
        np.testing.assert_allclose(found.matrix[:2, 2], known.matrix[:2, 2], atol=0.3)


@pytest.mark.parametrize("degrees", [8, 20, 45, 90, 180])
@pytest.mark.parametrize("contrast", ["bright", "RGB"])
def test_a_bright_slide_is_found_however_it_is_turned(contrast: str, degrees: float) -> None:
    fixed, moving = sections(degrees, CONTRASTS[contrast])
    ones = fixed.with_array(np.ones(fixed.shape))
    for stage in (Rigid(), Affine()):
        for masks in ({}, {"fixed_mask": ones, "moving_mask": ones}):
            result = register(fixed, moving, [Moments(), stage], **masks)
            assert error(result.transform, degrees) < 0.3


@pytest.mark.parametrize(
    ("contrast", "outside", "expected"),
    [
        ("CT", "background", -1024),
        ("dark", "background", 0),
        ("RGB", "background", 245),
        ("CT", 7, 7),
        ("RGB", (1, 2, 3), (1, 2, 3)),
    ],
)
def test_both_moved_images_have_a_background_outside(
    contrast: str, outside: Any, expected: Any
) -> None:
    fixed, moving = sections(8, CONTRASTS[contrast])
    shift = np.eye(3)
    shift[0, 2] = 40
    result = register(fixed, moving, [], initial=shift, outside=outside)
    assert result.outside == outside
    there, back = result.moved.array[..., -38:], result.fixed_moved.array[..., :38]
    for strip in (there, back):
        values = strip.reshape(-1, strip.shape[-2] * strip.shape[-1]).T
        np.testing.assert_allclose(values, np.broadcast_to(expected, values.shape), atol=1e-3)
    with pytest.raises(ValueError, match=r"^outside: expected 1 number"):
        register(fixed, moving, [], outside=(1, 2))


def test_pictures_show_an_object_before_its_background_whatever_is_far_from_both() -> None:
    for contrast, around in (("dark", 0), ("CT", 0), ("noisy", 0), ("bright", 1)):
        fixed, moving = (hot(v) for v in sections(8, CONTRASTS[contrast]))
        away = moving.moved_by(motion(8))
        result = register(fixed, away, [])
        figure = draw_slices(result, Shown.of_registration(result), title="")
        panels = [np.asarray(ax.images[0].get_array()) for ax in figure.axes if ax.images][:3]
        for panel in panels:  # the fixed image, the moving one, and that one moved
            corner, middle = panel[:9, :9], panel[38:58, 38:58]
            np.testing.assert_allclose(np.median(corner), around, atol=0.05)
            assert 0.2 < np.median(middle) < 0.8


# --- outliers -----------------------------------------------------------------------------------


def hot(volume: Volume) -> Volume:
    """The same with five voxels far from all others."""
    array = np.array(volume.array, np.float32)
    for k, place in enumerate([(4, 7), (20, 80), (48, 50), (70, 12), (91, 90)]):
        array[(..., *place)] = 1e6 * (1 + k / 10)
    return volume.with_array(array)


@pytest.mark.parametrize("which", ["fixed", "moving", "both"])
@pytest.mark.parametrize("metric", [None, "ncc", "mi"])
def test_a_few_hot_voxels_spoil_nothing(metric: Any, which: str) -> None:
    fixed, moving = sections(8, CONTRASTS["CT"])
    fixed = fixed if which == "moving" else hot(fixed)
    moving = moving if which == "fixed" else hot(moving)
    stages = [Moments()] if metric is None else [Rigid(metric=metric, tolerance=0)]
    assert error(register(fixed, moving, stages).transform, 8) < (1 if metric is None else 0.3)


def test_a_few_hot_voxels_spoil_nothing_under_jit_and_vmap() -> None:
    volumes = [sections(degrees, CONTRASTS["bright"]) for degrees in (8, -6)]
    volumes.append((hot(volumes[0][0]), hot(volumes[0][1])))
    images = [jnp.stack([jnp.asarray(pair[k].batched()[0]) for pair in volumes]) for k in range(2)]
    stages = (Moments(), Rigid((4, 2), (40, 20), tolerance=0))
    together = jax.jit(jax.vmap(lambda f, m: register_images(f, m, stages)))(*images)
    matrices = together.alignment.matrix
    np.testing.assert_allclose(matrices[2], matrices[0], atol=0.1)
    alone = register_images(images[0][2], images[1][2], stages)
    np.testing.assert_allclose(alone.alignment.matrix, matrices[2], atol=2e-3)
    all_seen = register_images(images[0][2], images[1][2], stages, clip=None)
    assert np.abs(all_seen.alignment.matrix - matrices[0]).max() > 0.3


@pytest.mark.parametrize("contrast", CONTRASTS)
def test_without_outliers_not_a_bit_changes(contrast: str) -> None:
    volumes = sections(20, CONTRASTS[contrast])
    for volume in volumes:
        np.testing.assert_array_equal(clipped(volume.batched(), "outliers"), volume.batched())
    once, again = (register(*volumes, [Rigid()], clip=clip) for clip in ("outliers", None))
    np.testing.assert_array_equal(once.transform.matrix, again.transform.matrix)


def test_a_sparse_image_keeps_what_it_shows() -> None:
    rng = np.random.default_rng(0)
    for noise in (0, 1):
        image = np.abs(noise * rng.normal(size=(1, 1, 40, 50, 60))).astype(np.float32)
        places = rng.choice(image.size, image.size // 2000, replace=False)
        image.reshape(-1)[places] = rng.uniform(500, 1000, places.size)
        np.testing.assert_array_equal(clipped(jnp.asarray(image), "outliers"), image)
    few = np.zeros((1, 1, 64, 64), np.float32)
    few[..., 10:12, 20] = 1e4  # of two voxels nobody knows that they are not what there is to see
    np.testing.assert_array_equal(clipped(jnp.asarray(few), "outliers"), few)


def test_quantiles_bound_the_intensities_of_each_channel() -> None:
    ramp = np.arange(101, dtype=np.float32).reshape(1, 101)
    image = np.stack([ramp, 1000 - 10 * ramp])[None]
    found = np.asarray(clipped(jnp.asarray(image), (0.1, 0.7)))[0]
    np.testing.assert_allclose(found[0], np.clip(ramp, 10, 70))
    np.testing.assert_allclose(found[1], np.clip(1000 - 10 * ramp, 100, 700), rtol=1e-6)

    fixed, moving = (hot(v) for v in sections(8, CONTRASTS["RGB"]))
    found = register(fixed, moving, [Moments(), Rigid()], clip=(0.001, 0.999))
    assert error(found.transform, 8) < 0.3
    spoilt = register(fixed, moving, [Moments(), Rigid()], clip=None)
    assert error(spoilt.transform, 8) > 2


@pytest.mark.parametrize("clip", ["magic", 0.5, (0.1,), (0.9, 0.1), (0, 99), (0, np.nan), ("a", 1)])
def test_what_is_no_range_of_intensities_is_refused(clip: Any) -> None:
    fixed, moving = sections(8)
    with pytest.raises(ValueError, match=r"^clip: expected 'outliers', None, or two quantiles"):
        register(fixed, moving, [], clip=clip)
    with pytest.raises(ValueError, match=r"^clip: expected"):
        register_images(fixed.batched()[0], moving.batched()[0], [], clip=clip)
