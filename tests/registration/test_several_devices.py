"""Registration of volumes whose planes are spread over devices (of the CPU: see conftest.py)."""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from device_cases import Shared, cases
from inputs import assert_same, random_array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import jaxreg
from jaxreg import _slabs
from jaxreg.registration import (
    Progress,
    Transform,
    across,
    intensities,
    outside_values,
    register,
    register_images,
    running,
)
from jaxreg.registration.intensities import matched
from jaxreg.registration.stages import fields, problem, spread
from jaxreg.registration.stages.deformable import Deformable
from jaxreg.registration.stages.ffd import FFD
from jaxreg.registration.stages.greedy import Greedy
from jaxreg.registration.stages.linear import Affine, Rigid
from jaxreg.registration.stages.moments import Moments
from jaxreg.registration.stages.pyramid import downsample
from jaxreg.registration.stages.svf import SVF
from jaxreg.registration.stages.syn import SyN
from jaxreg.warp import INVERSE_TOLERANCE
from regkernels import Volume

Array = np.ndarray


@pytest.fixture(autouse=True)
def _even_small_volumes_are_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spread, "LEAST_VOXELS", 10_000)
    with jax.default_device(jax.devices("cpu")[0]):
        yield


def volume(array: Array) -> Volume:
    return Volume.create(array, spacing=(1.0, 1.1, 1.2), origin=(5.0, -3.0, 7.0))


def pair(planes: int) -> tuple[Volume, Volume]:
    """Two smooth images, of which one is deformed and shifted a little."""
    shape = (planes, 28, 26)
    rng = np.random.default_rng(planes)
    fixed = scipy.ndimage.gaussian_filter(rng.normal(size=shape), 2.5)
    fixed = 3 + fixed / fixed.std()
    bump = 1.5 * scipy.ndimage.gaussian_filter(rng.normal(size=(3, *shape)), (0, 5, 5, 5))
    bump *= 1.5 / np.abs(bump).max()
    place = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij")) + bump + 0.4
    moving = scipy.ndimage.map_coordinates(fixed, place, order=1, mode="nearest")
    return volume(fixed.astype(np.float32)), volume(moving.astype(np.float32))


def settings(**changes: Any) -> dict[str, Any]:
    return {"scales": (2, 1), "iterations": (10, 5), **changes}


def largest_gathered(text: str) -> int:
    """How many elements the largest array has that is gathered in a program."""
    lines = re.findall(r"= (.*?) (?:all-gather|all-to-all)(?:-start)?\(", text)
    shapes = [shape for line in lines for shape in re.findall(r"\w+\[([\d,]*)\]", line)]
    return max((math.prod(map(int, shape.split(","))) for shape in shapes if shape), default=0)


STAGES: dict[str, Callable[[], list[Any]]] = {
    "moments, rigid and affine": lambda: [
        Moments(scale=1),
        Rigid(**settings()),
        Affine(**settings(metric="lncc")),
    ],
    "rigid and affine of second order": lambda: [
        Rigid(**settings(optimiser="levenberg-marquardt")),
        Affine(**settings(metric="lncc", optimiser="levenberg-marquardt")),
    ],
    "greedy": lambda: [Greedy(**settings())],
    "syn": lambda: [Affine(**settings()), SyN(**settings())],
    "svf": lambda: [SVF(**settings(metric="mse"))],
    "ffd": lambda: [Affine(**settings()), FFD(**settings())],
    "ffd in millimetres": lambda: [FFD(**settings(spacing=(5, 6, 7), unit="mm"))],
    "greedy with mind": lambda: [Greedy(**settings(metric="mind"))],
    "greedy with mi": lambda: [Affine(**settings(metric="mi")), Greedy(**settings(metric="mi"))],
}


def voxels_apart(one: Any, other: Any) -> float:
    sizes = np.array([(n - 1) / 2 for n in np.shape(one)[-2:0:-1]])
    return float(np.abs((np.asarray(one) - np.asarray(other)) * sizes).max())


CASES = [Shared(2, 24), Shared(3, 25), Shared(4, 26), Shared(2, 25, "gpu")]
CASES_OF_STAGES = [
    pytest.param(name, *case.values, id=f"{name}, {case.id}", marks=case.marks)
    for name in STAGES
    for case in cases(CASES)
    if name == "syn" or case.values[0] in (CASES[1], CASES[3])
]


@pytest.mark.parametrize(("name", "case"), CASES_OF_STAGES)
def test_the_result_is_that_of_one_device(name: str, case: Shared) -> None:
    fixed, moving = pair(case.planes)
    stages = STAGES[name]
    with case.mesh() as mesh:
        expected = register(fixed, moving, stages())
        found = register(fixed, moving, stages(), devices=mesh.devices.tolist())
    # On one device an image that differs in its last bits has changed the shift by 6e-5 mm.
    difference = np.abs(found.transform.matrix - expected.transform.matrix)
    assert difference[:3, :3].max() < 2e-5
    assert difference[:3, 3].max() < 5e-4
    if expected.transform.displacement is None:
        assert found.transform.displacement is None
        return
    assert voxels_apart(found.transform.displacement, expected.transform.displacement) < 2e-3
    # Each inverse is only as exact as it was asked to be, and where it stops rounding decides.
    inverses = found.transform.inverse_displacement, expected.transform.inverse_displacement
    assert voxels_apart(*inverses) < 2 * INVERSE_TOLERANCE
    for one, other in zip(found.stages, expected.stages, strict=True):
        for level, right in zip(one.levels, other.levels, strict=True):
            assert level.converged == right.converged
            np.testing.assert_allclose(level.losses, right.losses, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stage", [Greedy, SyN])
def test_images_that_are_sampled_near_or_far_give_what_they_give_on_one_device(
    monkeypatch: pytest.MonkeyPatch, stage: type[Deformable]
) -> None:
    fixed, moving = pair(40)
    told: list[bool] = []

    def lie_near(*arguments: Any) -> jax.Array:
        found = _slabs.lie_near(*arguments)
        jax.debug.callback(lambda x: told.append(bool(x)), found)
        return found

    monkeypatch.setattr(problem, "lie_near", lie_near)
    stages = [stage(scales=(1,), iterations=(20,))]
    for shift, is_near in ((0.0, True), (9.0, False)):  # by one program
        start = np.eye(4)
        start[2, 3] = shift
        told.clear()
        expected = register(fixed, moving, stages, initial=start)
        found = register(fixed, moving, stages, initial=start, devices=jax.devices("cpu")[:2])
        assert voxels_apart(found.transform.displacement, expected.transform.displacement) < 2e-3
        assert told
        assert all(told) == is_near


def test_an_image_that_is_turned_by_a_quarter_is_moved_as_on_one_device() -> None:
    """Each device then needs planes of all others."""
    fixed, moving = pair(25)
    about = np.eye(4)
    about[:3, 3] = fixed.grid.centre()
    turn = np.eye(4)
    turn[[0, 0, 2, 2], [0, 2, 0, 2]] = 0, -1, 1, 0  # of x and z
    start = about @ turn @ np.linalg.inv(about)
    stages = [Greedy(scales=(1,), iterations=(10,), tolerance=0)]
    expected = register(fixed, moving, stages, initial=start)
    found = register(fixed, moving, stages, initial=start, devices=jax.devices("cpu")[:3])
    displacements = found.transform.displacement, expected.transform.displacement
    assert voxels_apart(displacements[1], 0 * np.asarray(displacements[1])) > 0.5
    assert voxels_apart(*displacements) < 2e-3


def test_a_level_ends_early_where_it_does_on_one_device() -> None:
    fixed, moving = pair(25)
    stages = [Greedy(scales=(1,), iterations=(60,), tolerance=0.05)]
    expected = register(fixed, moving, stages).stages[0].levels[0]
    found = register(fixed, moving, stages, devices=jax.devices("cpu")[:3]).stages[0].levels[0]
    assert expected.converged
    assert len(expected.losses) < 60
    assert (found.converged, len(found.losses)) == (True, len(expected.losses))


def test_masks_and_a_start_count_as_on_one_device() -> None:
    fixed, moving = pair(25)
    inside = np.zeros(fixed.shape, np.float32)
    inside[3:-4, 4:-4, 5:-3] = 1
    mask = volume(inside)
    start = np.eye(4)
    start[0, 3] = 1.0
    options: dict[str, Any] = {"fixed_mask": mask, "moving_mask": mask, "initial": start}
    stages = [Affine(**settings()), Greedy(**settings())]
    expected = register(fixed, moving, stages, **options)
    found = register(fixed, moving, stages, **options, devices=jax.devices("cpu")[:2])
    assert voxels_apart(found.transform.displacement, expected.transform.displacement) < 2e-3


@pytest.mark.parametrize(("devices", "planes"), [(2, 24), (3, 25)])
def test_what_follows_from_the_transform_is_computed_on_all_devices(
    devices: int, planes: int
) -> None:
    fixed, moving = pair(planes)
    stages = [Affine(**settings()), SyN(**settings())]
    found = register(fixed, moving, stages, devices=jax.devices("cpu")[:devices], outside=-2.0)
    alone = dataclasses.replace(found, transform=dataclasses.replace(found.transform, devices=None))
    for name in ("moved", "fixed_moved"):
        one, other = getattr(found, name).array, getattr(alone, name).array
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)
    assert_same(found.jacobian, alone.jacobian)
    assert found.folds == alone.folds
    assert found.doubts == alone.doubts
    np.testing.assert_allclose(found.inverse_residual, alone.inverse_residual, atol=1e-5)
    there, back = found.transform, alone.transform
    for with_affine in (False, True):
        one, other = (x.displacement_field(with_affine=with_affine) for x in (there, back))
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)
    one, other = (x.inverse(moving.grid) for x in (there, back))
    assert voxels_apart(one.displacement, other.displacement) < 1e-4
    assert voxels_apart(one.inverse_displacement, other.inverse_displacement) < 1e-4
    one, other = (x.with_inverse().inverse_displacement for x in (there, back))
    assert voxels_apart(one, other) < 1e-4
    for kind in ("cubic", "b-spline"):
        one, other = (x.apply(moving, interpolation=kind).array for x in (there, back))
        np.testing.assert_allclose(one, other, atol=1e-3)
    labels = volume((fixed.array > 3).astype(np.int32) + 1)
    for kind in ("labels", "nearest"):
        one, other = (x.apply(labels, interpolation=kind, outside=7).array for x in (there, back))
        assert_same(one, other)


def test_a_registration_goes_on_from_another_one() -> None:
    fixed, moving = pair(26)
    devices = jax.devices("cpu")[:2]
    first = register(fixed, moving, [Greedy(**settings())], devices=devices)
    assert first.transform.displacement.sharding.num_devices == 2
    again = register(
        fixed, moving, [Greedy(**settings())], devices=devices, initial=first.transform
    )
    expected = register(fixed, moving, [Greedy(**settings())], initial=first.transform)
    assert voxels_apart(again.transform.displacement, expected.transform.displacement) < 2e-3
    # What follows from the transform is computed where its fields are.
    assert np.abs(again.moved.array - expected.moved.array).max() < 1e-3
    assert again.folds.share == 0


def test_a_start_on_another_grid_is_on_no_device_as_a_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fixed, moving = pair(26)
    devices = jax.devices("cpu")[:2]
    start = register(fixed, moving, [Greedy(**settings())]).transform
    start = dataclasses.replace(
        start,
        displacement=np.asarray(start.displacement),
        inverse_displacement=np.asarray(start.inverse_displacement),
    )
    coarser = Volume.create(
        np.ascontiguousarray(fixed.array[::2]), spacing=(1.0, 1.1, 2.4), origin=(5.0, -3.0, 7.0)
    )
    devices_of_calls = []

    def composed(*operands: Any, **options: Any) -> jax.Array:
        assert isinstance(operands[0], jax.core.Tracer)
        devices_of_calls.append(jax.sharding.get_abstract_mesh().size)
        result: jax.Array = jaxreg.compose(*operands, **options)
        return result

    expected = register(coarser, moving, [Greedy(**settings())], initial=start)
    # The module: its name is that of the function, too.
    monkeypatch.setattr(sys.modules[register.__module__], "compose", composed)
    found = register(coarser, moving, [Greedy(**settings())], initial=start, devices=devices)
    assert devices_of_calls
    assert set(devices_of_calls) == {2}
    assert voxels_apart(found.transform.displacement, expected.transform.displacement) < 2e-3


@pytest.mark.parametrize("count", [2, 3, 4])
def test_a_coarser_level_is_made_where_the_image_is(
    monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """The planes beyond its ends are few, and no other ones are gathered for them."""
    monkeypatch.setattr(spread, "LEAST_VOXELS", 1)
    image, shape = random_array(1, 1, 1, 48, 28, 26, dtype=np.float32), (24, 14, 13)
    mesh = spread.mesh_of(jax.devices("cpu")[:count])
    given = jax.device_put(image, spread.sharding(mesh, 2))
    with jax.set_mesh(mesh):
        compiled = jax.jit(lambda image: downsample(image, shape)).lower(given).compile()
    assert_same(np.asarray(compiled(given)), np.asarray(downsample(jnp.asarray(image), shape)))
    assert largest_gathered(compiled.as_text()) <= image.size / 8
    if count > 2:  # or a slab with what it is padded by is as large as the image
        sizes = re.findall(r"f32\[([\d,]+)\]", compiled.as_text())
        assert max(math.prod(map(int, size.split(","))) for size in sizes) < image.size


def test_histograms_are_matched_where_images_are() -> None:
    """Also where the planes do not divide."""
    planes, mesh = 25, spread.mesh_of(jax.devices("cpu")[:3])
    images = [random_array(seed, 1, 2, planes, 28, 26, dtype=np.float32) for seed in (1, 2)]

    def function(image: jax.Array, reference: jax.Array) -> jax.Array:
        image, reference = (across.cut(x, 2, planes) for x in (image, reference))
        return across.extended(matched(image, reference), 2)

    given = [across.put(image, 2, mesh) for image in images]
    with jax.set_mesh(mesh):
        compiled = jax.jit(function).lower(*given).compile()
    found = np.asarray(compiled(*given))[:, :, :planes]
    np.testing.assert_allclose(found, matched(*map(jnp.asarray, images)), rtol=0, atol=1e-5)
    assert largest_gathered(compiled.as_text()) == 0


@pytest.mark.parametrize("axis", ["z", "planes"])
def test_arrays_that_are_spread_are_registered_where_they_are(axis: str) -> None:
    """By `register_images` under ``jit``, whatever the axis of the mesh is called."""
    fixed, moving = (jnp.asarray(image.array)[None] for image in pair(24))
    mask = jnp.zeros(fixed.shape[1:]).at[3:-4, 4:-4, 5:-3].set(1)
    stages = [Affine(**settings()), SyN(**settings())]

    def function(fixed: jax.Array, moving: jax.Array, mask: jax.Array) -> Any:
        return register_images(fixed, moving, stages, fixed_mask=mask)

    expected = jax.jit(function)(fixed, moving, mask)
    mesh = Mesh(np.array(jax.devices("cpu")[:3]), (axis,), axis_types=(AxisType.Auto,))
    images = NamedSharding(mesh, PartitionSpec(None, axis))
    given = (
        jax.device_put(fixed, images),
        jax.device_put(moving, images),
        jax.device_put(mask, NamedSharding(mesh, PartitionSpec(axis))),
    )
    compiled = jax.jit(function).lower(*given).compile()
    found = compiled(*given)
    field, right = found.alignment.displacement, expected.alignment.displacement
    assert field.sharding.is_equivalent_to(images, field.ndim)
    assert voxels_apart(field, right) < 2e-3
    # Faces and samples for the background are, but no volume of the largest level.
    assert largest_gathered(compiled.as_text()) < mask.size / 2


def test_progress_and_record_tell_of_each_level_where_it_ran() -> None:
    fixed, moving = pair(24)
    heard: list[Progress] = []
    found = register(
        fixed,
        moving,
        [Greedy(**settings())],
        devices=jax.devices("cpu")[:2],
        callback=heard.append,
    )
    told = [(one.scale, one.done, one.total, one.devices) for one in heard]
    assert told == [(2, 10, 15, 1), (1, 15, 15, 2)]
    assert [level.devices for level in found.stages[0].levels] == [1, 2]
    alone = register(fixed, moving, [Greedy(**settings())])
    assert [level.devices for level in alone.stages[0].levels] == [1, 1]


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        (lambda: [], "devices: expected devices"),
        (lambda: ["cpu"], "devices: expected devices"),
        (lambda: [jax.devices("cpu")[0]] * 2, "devices: expected each device once"),
    ],
)
def test_what_is_no_device_is_refused(devices: Callable[[], Any], message: str) -> None:
    fixed, moving = pair(24)
    with pytest.raises((TypeError, ValueError), match=message):
        register(fixed, moving, [Greedy(**settings())], devices=devices())


def test_what_is_outside_of_an_image_is_found_without_all_of_it_on_one_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    array = np.random.default_rng(1).normal(0, 0.01, (70, 80, 90)).astype(np.float32)
    array[20:50, 20:50, 20:50] += 3
    array += 5
    sent: list[int] = []

    def on_device(x: Array) -> jax.Array:
        sent.append(x.size)
        return jnp.asarray(x)

    monkeypatch.setattr(intensities, "on_device", on_device)
    found = outside_values(Volume.create(array))
    assert 0 < sum(sent) < 0.5 * array.size
    whole = intensities.background(jnp.asarray(array[None, None]))
    assert whole.clear.all()
    assert_same(found, np.asarray(whole.value))


def test_an_affine_alone_has_no_field_on_one_device() -> None:
    grid = volume(np.zeros((4, 5, 6), np.float32)).grid
    transform = Transform(
        grid, np.diag([1.1, 0.9, 1.0, 1.0]), devices=tuple(jax.devices("cpu")[:2])
    )
    fields = (
        transform.displacement_field(),
        transform.displacement_field(with_affine=True),
        transform.inverse_displacement_field(),
    )
    assert all(isinstance(field, np.ndarray) for field in fields)


def test_several_devices_are_for_volumes() -> None:
    image = Volume.create(np.random.default_rng(0).normal(size=(20, 20)).astype(np.float32))
    with pytest.raises(ValueError, match="devices: expected one for images in 2-D, got 2"):
        register(image, image, [Greedy(**settings())], devices=jax.devices("cpu")[:2])


@pytest.mark.parametrize("planes", [24, 25])
@pytest.mark.parametrize("count", [2, 3])
def test_a_shared_field_is_confined_where_it_is_to_the_bits_of_one_device(
    count: int, planes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the planes do not divide."""
    monkeypatch.setattr(fields, "_MANY_VOXELS", 1)
    field = random_array(1, 2, planes, 28, 26, 3)
    field[..., 0] *= np.inf  # a face is 0 whatever was there

    def confined(field: jax.Array) -> jax.Array:
        return fields.confined_in_place(spread.spread(field, 1))

    with jax.set_mesh(spread.mesh_of(jax.devices("cpu")[:count])):
        found = jax.jit(confined)(field)
    assert_same(np.asarray(found), np.asarray(fields.confined(field)))


@pytest.mark.parametrize("planes", [24, 25])
@pytest.mark.parametrize("count", [2, 3])
def test_folds_of_a_shared_field_are_found_and_mended_to_the_bits_of_one_device(
    count: int, planes: int
) -> None:
    """Also between the last plane of a device and the first of the next."""
    field = random_array(1, 1, planes, 28, 26, 3, dtype=np.float32) * 0.02
    field[:, :, :3] = 0
    field[:, 12] *= 4

    def found(field: jax.Array) -> Any:
        shared = spread.spread(field, 1)
        return fields.cell_determinants(shared), fields.mended(shared, 10.0)

    with jax.set_mesh(spread.mesh_of(jax.devices("cpu")[:count])):
        determinants, (mended, share) = jax.jit(found)(field)
    expected, (alone, share_alone) = jax.jit(found)(field)
    assert share_alone > 0 and not np.array_equal(alone, field)
    for one, other in zip(determinants, expected, strict=True):
        assert one.shape == other.shape
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(share, share_alone, rtol=1e-5)
    assert voxels_apart(mended, alone) < 1e-4


@pytest.mark.parametrize("stage", [Greedy, SyN])
def test_a_moving_image_whose_planes_do_not_divide_and_masks_are_as_on_one_device(
    stage: type[Greedy] | type[SyN],
) -> None:
    fixed, _ = pair(24)
    _, moving = pair(25)
    masks = {}
    for name, image in (("fixed_mask", fixed), ("moving_mask", moving)):
        mask = np.ones(image.grid.shape, np.float32)
        mask[:, :, :5] = 0
        masks[name] = image.with_array(mask)
    found, alone = (
        register(fixed, moving, [stage(**settings())], devices=devices, **masks)
        for devices in (jax.devices("cpu")[:2], None)
    )
    assert voxels_apart(found.transform.displacement, alone.transform.displacement) < 2e-3
    for one, other in zip(found.stages[0].levels, alone.stages[0].levels, strict=True):
        np.testing.assert_allclose(one.losses, other.losses, rtol=1e-4, atol=1e-5)


def test_images_are_let_go_when_the_last_level_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fields take their place."""
    fixed, moving = pair(24)
    there = []
    program = running._program

    def watched(function: Callable[..., Any], *options: Any) -> Callable[..., Any]:
        call = program(function, *options)

        def counted(*operands: Any) -> Any:
            images = [x for x in jax.live_arrays() if x.shape == (1, *fixed.grid.shape)]
            there.append((function.__name__, len(images)))
            del images
            return call(*operands)

        return counted

    monkeypatch.setattr(running, "_program", watched)
    stages = [Greedy(**settings()), Greedy(**settings())]
    register(fixed, moving, stages, devices=jax.devices("cpu")[:2])
    names = ["_approach", "_arrive", "_complete"] * 2
    assert there == list(zip(names, [2, 2, 2, 2, 0, 0], strict=True))
