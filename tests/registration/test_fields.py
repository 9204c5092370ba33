"""Deformations that are found are one to one, between voxels, too."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from inputs import assert_same, random_array
from scipy.ndimage import gaussian_filter

from jaxreg.registration import Greedy, SyN, register
from jaxreg.registration.stages import fields
from jaxreg.registration.stages.fields import cell_determinants, mended
from regkernels import Volume

Array = np.ndarray


def in_voxels(displacement: Array) -> Array:
    sizes = np.asarray(displacement.shape[1:-1][::-1])
    return displacement * (sizes - 1) / 2


def kuhn_determinants(displacement: Array) -> Array:
    """Of the simplices of every cell of one displacement, one cell after the other."""
    points = in_voxels(displacement)[0]
    *sizes, ndim = points.shape
    found = []
    for corner in itertools.product(*(range(n - 1) for n in sizes)):
        for order in itertools.permutations(range(ndim)):
            here, columns, unit = np.array(corner), [], []
            for axis in order:
                step = np.eye(ndim, dtype=int)[axis]
                moved = points[tuple(here + step)] - points[tuple(here)]
                columns.append(moved + step[::-1])
                unit.append(step[::-1])
                here = here + step
            found.append(np.linalg.det(columns) / np.linalg.det(unit))
    return np.array(found)


def rough(*sizes: int, voxels: float) -> Array:
    """A displacement of neighbours that know nothing of each other, at rest near the faces."""
    field = random_array(0, 1, *sizes, len(sizes), dtype=np.float32)
    inside = np.zeros(sizes, np.float32)
    inside[tuple(slice(3, -3) for _ in sizes)] = 1
    return field * inside[..., None] * voxels * 2 / (np.array(sizes[::-1], np.float32) - 1)


@pytest.mark.parametrize("sizes", [(6, 7), (4, 5, 6)])
def test_cells_grow_by_the_determinants_of_their_simplices(sizes: tuple[int, ...]) -> None:
    field = random_array(1, 1, *sizes, len(sizes), dtype=np.float32)
    actual = np.stack(cell_determinants(jnp.asarray(field)), axis=-1).ravel()
    np.testing.assert_allclose(actual, kuhn_determinants(field), rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
def test_to_look_for_folds_and_mend_them_takes_no_more_memory_than_two_fields() -> None:
    shape = (1, 192, 192, 192, 3)
    device = jax.sharding.SingleDeviceSharding(jax.devices("gpu")[0])
    field = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=device)
    planned = mended.lower(field, volume_change=10.0).compile().memory_analysis()
    assert planned.temp_size_in_bytes <= 2 * field.size * field.dtype.itemsize


def test_a_single_slice_has_the_determinants_of_its_plane() -> None:
    plane = random_array(1, 1, 6, 7, 2, dtype=np.float32)
    volume = np.concatenate([plane, np.zeros_like(plane[..., :1])], axis=-1)[:, None]
    for actual, expected in zip(
        cell_determinants(jnp.asarray(volume)), cell_determinants(jnp.asarray(plane)), strict=True
    ):
        np.testing.assert_array_equal(actual[:, 0], expected)
    point = jnp.zeros((1, 1, 1, 2))
    np.testing.assert_array_equal(mended(point, 10.0)[0], point)


@pytest.mark.parametrize("sizes", [(20, 22), (12, 13, 14), (1, 20, 22)])
def test_what_is_inside_out_is_smoothed(sizes: tuple[int, ...]) -> None:
    field = rough(*[n for n in sizes if n > 1], voxels=1.0)
    if sizes[0] == 1:
        field = np.concatenate([field, np.zeros_like(field[..., :1])], axis=-1)[:, None]
    before = np.stack(cell_determinants(jnp.asarray(field)))
    after = np.stack(cell_determinants(mended(jnp.asarray(field), 10.0)[0]))
    assert before.min() < 0
    assert after.min() >= 0.1
    assert after.max() <= 10


@pytest.mark.parametrize("seed", range(3))
def test_what_is_inside_out_at_a_face_that_points_cross_is_smoothed(seed: int) -> None:
    field = gaussian_filter(random_array(seed, 1, 90, 91, 2), (0, 4, 4, 0), mode="nearest")
    field *= 25 / np.abs(field).max() * 2 / (np.array([91, 90]) - 1)
    before, after = (
        np.stack(cell_determinants(x))
        for x in (jnp.asarray(field, jnp.float32), mended(jnp.asarray(field, jnp.float32), 10.0)[0])
    )
    assert before[..., 0, :].min() < 0  # in the outermost cells, too
    assert after.min() >= 0.1
    assert after.max() <= 10


def test_all_else_stays_bit_for_bit() -> None:
    sound = gaussian_filter(rough(12, 13, 14, voxels=1.0), (0, 2, 2, 2, 0))
    found, share = mended(jnp.asarray(sound), 10.0)
    np.testing.assert_array_equal(found, sound)
    assert share == 0
    torn = np.zeros((1, 40, 41, 2), np.float32)
    torn[0, 20, 20] = 0.2
    found, share = map(np.asarray, mended(jnp.asarray(torn), 10.0))
    assert np.any(found != torn)
    bad = np.any([(d <= 0.1) | (d > 10) for d in cell_determinants(jnp.asarray(torn))], axis=0)
    np.testing.assert_allclose(share, bad.mean())
    changed = np.argwhere((found != torn).any(axis=-1)[0])
    assert np.abs(changed - 20).max() < 12
    # Also where a transform that was given takes points across a face.
    shifted = np.float32(torn + 0.1)
    found = np.asarray(mended(jnp.asarray(shifted), 10.0)[0])
    changed = np.argwhere((found != shifted).any(axis=-1)[0])
    assert np.abs(changed - 20).max() < 12


def test_a_bound_may_be_chosen() -> None:
    """Growth alone, which turns nothing inside out, counts from the bound on."""
    ramp = np.zeros((1, 30, 30, 2), np.float32)
    ramp[0, :, :15, 0] = -4 * 2 / 29  # a gap of five voxels between two neighbours
    kept, _ = mended(jnp.asarray(ramp), 6.0)
    np.testing.assert_array_equal(kept, ramp)
    found = np.stack(cell_determinants(mended(jnp.asarray(ramp), 3.0)[0]))
    assert found.max() <= 3
    with pytest.raises(ValueError, match="volume_change"):
        SyN(volume_change=1.0)


@pytest.mark.parametrize("stage", [SyN, Greedy])
def test_a_stage_leaves_nothing_inside_out(stage: type[SyN] | type[Greedy]) -> None:
    """Without anything that holds the deformation back, on images that do not fit at all."""
    fixed, moving = (gaussian_filter(random_array(k, 24, 24), 1.5) for k in range(2))
    settings = {"field_sigma": 0.0, "gradient_sigma": 0.7, "regularisation": None}
    found = {}
    for bound in (float("inf"), 10.0):
        loose = stage((1,), (60,), tolerance=0.0, volume_change=bound, **settings)
        result = register(Volume.create(fixed), Volume.create(moving), [loose])
        displacement = jnp.asarray(result.transform.displacement)
        found[bound] = np.stack(cell_determinants(displacement))
    assert found[10.0].min() >= 0.1
    assert found[10.0].max() <= 10
    assert result.mended > 1e-3
    assert "determinant" in [doubt.code for doubt in result.doubts]
    assert found[float("inf")].min() > 0


@pytest.mark.parametrize("shape", [(5, 6), (1, 6), (4, 5, 6), (2, 1, 7), (1, 1, 1)])
def test_a_field_confined_where_it_is_has_the_bits_of_one_confined_in_a_pass(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fields, "_MANY_VOXELS", 1)
    field = random_array(1, 2, *shape, len(shape))
    field[..., 0] *= np.inf  # a face is 0 whatever was there
    for call in (fields.confined_in_place, jax.vmap(fields.confined_in_place)):
        given = field if call is fields.confined_in_place else field[None]
        expected = np.asarray(fields.confined(field)).reshape(given.shape)
        assert_same(np.asarray(jax.jit(call)(given)), expected)


def test_a_large_field_is_confined_without_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fields, "_MANY_VOXELS", 1000)
    lowered = [
        jax.jit(fields.confined_in_place, donate_argnums=0).lower(
            jax.ShapeDtypeStruct((1, planes, 10, 10, 3), np.float32)
        )
        for planes in (9, 10)
    ]
    assert ["dynamic_update_slice" in one.as_text() for one in lowered] == [False, True]
    assert lowered[1].compile().memory_analysis().temp_size_in_bytes < 10 * 10 * 10
