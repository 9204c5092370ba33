"""Deformations between two contrasts: the shipped MR image of a head, and a CT of other brains."""

from __future__ import annotations

from jaxreg.commands.multimodal import load
from jaxreg.registration import MIND, Greedy, Moments, Rigid, register, target_registration_error
from jaxreg.registration.transforms.transform import Transform


def test_descriptors_lower_the_distance_that_a_rigid_alignment_leaves() -> None:
    """The two differ in size and shape, which a motion cannot account for.

    What is known is an affine alignment within the brain; landmarks are 20 mm apart there.
    """
    scene = load()
    aligned = Transform(scene.fixed.grid, scene.reference).transform_points(scene.landmarks)
    stages = [
        Moments(metric="mi"),
        Rigid((4, 2), (80, 40), metric="mi"),
        Greedy((4, 2), (60, 30), metric=MIND(), gradient_sigma=3, field_sigma=2),
    ]
    rigid = register(scene.fixed, scene.moving, stages[:2])
    result = register(scene.fixed, scene.moving, stages)
    before, after = (
        target_registration_error(x.transform, scene.landmarks, aligned) for x in (rigid, result)
    )
    assert 6 < before.mean() < 10  # 8.3 mm
    assert after.mean() < 3.3  # 2.9 mm
    assert after.max() < before.max() / 1.5
    assert result.folds.minimum > 0.35 and result.folds.maximum < 2.5  # 0.50 and 1.8
    assert not result.doubts
