"""Devices that share an image have their neighbours' planes at hand, and sample what they would."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from inputs import assert_same, random_array

from jaxreg import interpolate
from jaxreg.registration.stages import spread, windows
from jaxreg.registration.stages.spread import mesh_of

GRID = (48, 6, 7)
AFFINE = np.eye(3, 4, dtype=np.float32)[None] + 0.01


@pytest.fixture(autouse=True)
def _on_devices_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(spread, "LEAST_VOXELS", 1)
    with jax.default_device(jax.devices("cpu")[0]):
        yield


@pytest.mark.parametrize("devices", [2, 3, 4])
@pytest.mark.parametrize("shape", [GRID, (96, 5, 4)])
@pytest.mark.parametrize("affine", [None, AFFINE])
def test_samples_nearby_are_those_of_the_whole_image(
    devices: int, shape: tuple[int, ...], affine: np.ndarray | None
) -> None:
    image = jnp.asarray(random_array(0, 1, 2, *shape, dtype=np.float32))
    displacement = jnp.asarray(random_array(1, 1, *GRID, 3, dtype=np.float32) / 60)
    last = None if affine is None else jnp.asarray(affine)

    @jax.jit
    def of_window(image: jax.Array, displacement: jax.Array) -> tuple[jax.Array, jax.Array]:
        window = windows.window_of(spread.spread(image), GRID)
        assert window is not None
        found = windows.sample(window, shape, last, spread.spread(displacement, 1))
        return found, windows.own_planes(window, shape)

    with jax.set_mesh(mesh_of(jax.devices("cpu")[:devices])):
        moved, own = of_window(image, displacement)
    expected = interpolate(image, last, displacement, affine_last=True, padding_mode="border")
    assert_same(np.asarray(moved), np.asarray(expected))
    assert_same(np.asarray(own), np.asarray(image))


@pytest.mark.parametrize(
    ("devices", "shape", "grid"),
    [(1, GRID, GRID), (2, (49, 6, 7), GRID), (2, GRID, (47, 6, 7)), (4, (28, 6, 7), GRID)],
)
def test_without_as_many_planes_on_each_device_there_is_no_window(
    devices: int, shape: tuple[int, ...], grid: tuple[int, ...]
) -> None:
    with jax.set_mesh(mesh_of(jax.devices("cpu")[:devices])):
        found = jax.eval_shape(
            lambda image: windows.window_of(image, grid),
            jax.ShapeDtypeStruct((1, 1, *shape), np.float32),
        )
    assert found is None
