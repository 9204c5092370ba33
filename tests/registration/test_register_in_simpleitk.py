"""A whole registration, seen by SimpleITK."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import SimpleITK as sitk  # noqa: N813
from scenes import as_image, header, physical_grid, scene

from jaxreg.registration import (
    Affine,
    Greedy,
    register,
)
from regkernels import write_displacement


def test_simpleitk_resampling_through_our_field_gives_our_moved_image(tmp_path: Path) -> None:
    fixed = header((30, 32, 28), (4, 4.5, 5), turn=15)
    fixed = fixed.with_array(scene(physical_grid(fixed)))
    moving = header((34, 30, 36), (4.2, 4, 4), turn=-30)
    moving = moving.with_array(scene(physical_grid(moving) @ np.diag([1.1, 0.9, 1]) + [4, -6, 5]))
    result = register(fixed, moving, [Affine((1,), (20,)), Greedy((1,), (20,))])
    path = tmp_path / "displacement.nii.gz"
    write_displacement(result.transform.displacement_field(with_affine=True), fixed, path)

    field = sitk.ReadImage(str(path), sitk.sitkVectorFloat64)
    assert field.GetNumberOfComponentsPerPixel() == 3
    transform = sitk.DisplacementFieldTransform(field)
    moved = sitk.Resample(as_image(moving), as_image(fixed), transform, sitk.sitkLinear, 0.0)
    ones = result.transform.apply(moving.with_array(np.ones(moving.shape)))
    inside = ones.array > 0.999
    difference = np.abs(sitk.GetArrayFromImage(moved) - result.moved.array)[inside]
    assert inside.mean() > 0.5
    assert difference.max() < 1e-4 * np.ptp(moving.array)
