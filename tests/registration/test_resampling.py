"""What lies outside of images that are resampled."""

from __future__ import annotations

import numpy as np
import pytest

from jaxreg.registration import resample
from jaxreg.registration.transforms import resampling
from regkernels import AffineMap, Volume


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32])
@pytest.mark.parametrize("faces", ["of one value", "of two values as often"])
def test_nearest_voxels_have_a_background_that_the_image_has(faces: str, dtype: type) -> None:
    """The value of most voxels of the faces, or the one that is nearest to their median."""
    array = np.full((8, 8, 8), 20, dtype)
    array[2:6, 2:6, 2:6] = np.arange(64).reshape(4, 4, 4) + 30
    if faces != "of one value":
        array[:, :, :1] = array[:, :, -1:] = 21
    volume = Volume.create(array)
    away = AffineMap(np.array([[1.0, 0, 0, 100], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]))
    moved = resample(volume, volume.grid, [away], interpolation="nearest")
    assert moved.array.dtype == dtype
    expected = 20 if faces == "of one value" else 21
    assert (moved.array == expected).all()
    found = resampling._nearest(array.ravel(), np.float32(20.75))
    assert found == (20 if faces == "of one value" else 21) and found.dtype == dtype
