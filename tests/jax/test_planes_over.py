"""``jaxreg`` in ``shard_map`` on volumes whose planes devices (of the CPU) share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from device_cases import Shared, cases
from inputs import assert_close as assert_values_close
from inputs import assert_same, random_affine, random_array
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxreg

Array = np.ndarray
Function = Callable[..., Any]

IN_PLANE = (6, 7)
IMAGES, FIELDS, EVERYWHERE = P(None, None, "z"), P(None, "z"), P()
# One device, with the kernels of slabs all the same, and two.
GPUS = [Shared(1, 12, "gpu"), Shared(2, 13, "gpu")]
CASES = [Shared(2, 12), Shared(4, 13), Shared(4, 9), *GPUS]


@pytest.fixture(autouse=True)
def _double_precision_on_the_cpu() -> Iterator[None]:
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        yield


@pytest.fixture(params=cases(CASES))
def case(request: pytest.FixtureRequest) -> Shared:
    found: Shared = request.param
    return found


@pytest.fixture
def mesh(case: Shared) -> Iterator[Mesh]:
    with case.mesh() as mesh:
        yield mesh


@pytest.fixture
def planes(case: Shared) -> int:
    return case.planes


def mesh_of(devices: int) -> Mesh:
    return Mesh(np.array(jax.devices("cpu")[:devices]), ("z",), axis_types=(AxisType.Auto,))


def assert_close(found: Array, expected: Any) -> None:
    assert_values_close(np.asarray(found), np.asarray(expected), np.float64)


def padded(array: Array, spec: Any, devices: int) -> Array:
    """With as many planes on each device; what is beyond the end is not even a number."""
    axis = len(spec) - 1
    widths = [(0, -n % devices if i == axis else 0) for i, n in enumerate(array.shape)]
    beyond = np.nan if np.issubdtype(array.dtype, np.floating) else 99
    return np.pad(array, widths, constant_values=beyond) if spec else array


def in_shard_map(
    function: Function, mesh: Mesh, specs: Any, out_specs: Any, planes: int, **options: Any
) -> Function:
    """The function of whole volumes, which devices share."""

    def of_own_planes(*arrays: Any) -> Any:
        with jaxreg.planes_over("z", planes, **options):
            return function(*arrays)

    mapped = jax.jit(jax.shard_map(of_own_planes, mesh=mesh, in_specs=specs, out_specs=out_specs))

    def call(*arrays: Array) -> Any:
        given = [padded(x, spec, mesh.size) for x, spec in zip(arrays, specs, strict=True)]
        results = mapped(*given)
        is_one = not isinstance(results, tuple)
        cut = [
            np.asarray(x)[(*[slice(None)] * (len(spec) - 1), slice(planes))] if spec else x
            for x, spec in zip(
                (results,) if is_one else results,
                (out_specs,) if is_one else out_specs,
                strict=True,
            )
        ]
        return cut[0] if is_one else cut

    return call


def displacement(planes: int, size: float, seed: int = 3) -> Array:
    """Of up to ``size`` voxels along each axis."""
    shape = (planes, *IN_PLANE)
    voxels = np.array([(n - 1) / 2 for n in reversed(shape)])
    return size * random_array(seed, 1, *shape, 3) / voxels


def images(planes: int, count: int = 2) -> list[Array]:
    return [random_array(seed, 1, 2, planes, *IN_PLANE) for seed in range(count)]


@pytest.mark.parametrize("size", [0.8, 30.0])
def test_interpolate_gives_the_bits_of_the_whole_volume(
    mesh: Mesh, planes: int, size: float
) -> None:
    (image,), grid = images(planes, 1), displacement(planes, size)

    def function(image: Any, grid: Any) -> Any:
        return jaxreg.interpolate(image, grid=grid, padding_mode="border")

    shared = in_shard_map(function, mesh, (IMAGES, FIELDS), IMAGES, planes)
    assert_same(shared(image, grid), np.asarray(function(image, grid)))


@pytest.mark.parametrize("image_spec", [IMAGES, EVERYWHERE], ids=["shared", "everywhere"])
@pytest.mark.parametrize("size", [0.8, 30.0])
def test_gradients_of_interpolate_are_those_of_the_whole_volume(
    mesh: Mesh, planes: int, size: float, image_spec: Any
) -> None:
    """Taken inside of ``shard_map``: an operand that all devices have gets the sum."""
    (image,), grid, affine = images(planes, 1), displacement(planes, size), random_affine(5, 1, 3)

    def gradients(*operands: Any) -> Any:
        moved, transpose = jax.vjp(jaxreg.interpolate, *operands)
        return transpose(moved)

    specs = (image_spec, EVERYWHERE, FIELDS)
    shared = in_shard_map(gradients, mesh, specs, specs, planes)
    for found, expected in zip(
        shared(image, affine, grid), gradients(image, affine, grid), strict=True
    ):
        assert_close(found, expected)


def test_gradients_may_be_taken_outside_of_shard_map() -> None:
    mesh, planes = mesh_of(4), 12
    (moving, fixed), grid = images(planes), displacement(planes, 2.0)
    affine = random_affine(5, 1, 3)

    def loss(moving: Any, affine: Any, grid: Any, fixed: Any) -> Any:
        return jaxreg.lncc_loss(jaxreg.interpolate(moving, affine, grid), fixed)

    def of_own_planes(*operands: Any) -> Any:
        with jaxreg.planes_over("z"):
            return loss(*operands)

    specs = (IMAGES, EVERYWHERE, FIELDS, IMAGES)
    shared = jax.shard_map(of_own_planes, mesh=mesh, in_specs=specs, out_specs=P())
    operands = moving, affine, grid, fixed
    value, gradients = jax.jit(jax.value_and_grad(shared, (0, 1, 2)))(*operands)
    expected_value, expected = jax.value_and_grad(loss, (0, 1, 2))(*operands)
    assert_close(value, expected_value)
    for found, right in zip(gradients, expected, strict=True):
        assert_close(found, right)


def test_volumes_may_have_other_planes_than_what_is_sampled(mesh: Mesh, planes: int) -> None:
    image = random_array(1, 1, 1, 21, 5, 8)
    grid = displacement(planes, 1.0)

    def function(image: Any, grid: Any) -> Any:
        return jaxreg.interpolate(image, grid=grid)

    shared = in_shard_map(
        function, mesh, (IMAGES, FIELDS), IMAGES, planes, sampled_planes=image.shape[2]
    )
    assert_same(shared(image, grid), np.asarray(function(image, grid)))


def test_an_affine_alone_gives_the_planes_of_the_shape_asked_for(mesh: Mesh, planes: int) -> None:
    (image,), affine = images(planes, 1), random_affine(5, 1, 3)

    def function(image: Any, affine: Any) -> Any:
        alike = jaxreg.interpolate(image, affine)
        return alike, jaxreg.interpolate(image, affine, out_shape=(planes - 1, 5, 4))

    shared = in_shard_map(function, mesh, (IMAGES, EVERYWHERE), (IMAGES, IMAGES), planes)
    alike, other = shared(image, affine)
    expected_alike, expected = function(image, affine)
    assert_same(alike, np.asarray(expected_alike))
    assert_same(other[:, :, : planes - 1], np.asarray(expected))


FIELD_TO_FIELD: dict[str, Function] = {
    "compose": lambda u: jaxreg.compose(u, u),
    "scaling_and_squaring": jaxreg.scaling_and_squaring,
    "affine_warp": lambda u: jaxreg.affine_warp(jnp.asarray(random_affine(5, 1, 3)), u),
    "jacobian_determinant": jaxreg.jacobian_determinant,
    "convert_displacement": lambda u: jaxreg.convert_displacement(u, "normalised", "voxel"),
    "gaussian_smooth": lambda u: jaxreg.gaussian_smooth(u, 1.3, channel_last=True),
    "spline_coefficients": lambda u: jaxreg.spline_coefficients(u, channel_last=True),
    "compose, b-spline": lambda u: jaxreg.compose(u, u, mode="b-spline"),
    "invert_displacement": jaxreg.invert_displacement,
    "step_gradient": lambda u: jaxreg.step_gradient(u[..., 0][:, None], u[..., 1][:, None], u, u),
    "riemannian_adam_step": lambda u: jaxreg.riemannian_adam_step(
        u, 0.1 * u, 0.1 * u * u, 2, learning_rate=0.5
    )[0],
}


@pytest.mark.parametrize("function", FIELD_TO_FIELD.values(), ids=FIELD_TO_FIELD)
def test_ops_of_fields_give_the_bits_of_the_whole_volume(
    mesh: Mesh, planes: int, function: Function
) -> None:
    u = displacement(planes, 0.6)
    shared = in_shard_map(function, mesh, (FIELDS,), FIELDS, planes)
    assert_same(shared(u), np.asarray(jax.jit(function)(u)))


def test_coverage_gives_the_bits_of_the_whole_volume(mesh: Mesh, planes: int) -> None:
    u, affine = displacement(planes, 0.6), random_affine(5, 1, 3)

    def function(affine: Any, u: Any) -> Any:
        return jaxreg.coverage(affine, u, source_shape=(9, 5, 8), margin=0.5, reach=1.0)

    shared = in_shard_map(function, mesh, (EVERYWHERE, FIELDS), IMAGES, planes)
    assert_same(shared(affine, u), np.asarray(jax.jit(function)(affine, u)))


def test_interpolate_labels_gives_the_bits_of_the_whole_volume() -> None:
    labels = np.random.default_rng(2).integers(-3, 4, (1, 1, 12, *IN_PLANE)).astype(np.int16)
    grid = displacement(12, 30.0)

    def function(labels: Any, grid: Any) -> Any:
        return jaxreg.interpolate_labels(labels, grid=grid, background=7)

    shared = in_shard_map(function, mesh_of(3), (IMAGES, FIELDS), IMAGES, 12)
    assert_same(shared(labels, grid), np.asarray(function(labels, grid)))


LOSSES: dict[str, Function] = {
    "lncc": jaxreg.lncc_loss,
    "lncc, sum": functools.partial(jaxreg.lncc_loss, reduction="sum"),
    "mutual information": jaxreg.mutual_information_loss,
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("masked", [False, True])
def test_losses_of_images_are_those_of_the_whole_volume(
    mesh: Mesh, planes: int, loss: Function, masked: bool
) -> None:
    pred, target = images(planes)
    operands = [pred, target + 0.5 * pred]
    if masked:
        operands.append(np.abs(random_array(3, 1, 1, planes, *IN_PLANE)))

    def function(pred: Any, target: Any, *mask: Any) -> Any:
        def value(*compared: Any) -> Any:
            return 3 * loss(*compared, **({"mask": mask[0]} if mask else {}))

        found, gradients = jax.value_and_grad(value, (0, 1))(pred, target)
        return found, *gradients

    specs = (IMAGES,) * len(operands)
    shared = in_shard_map(function, mesh, specs, (P(), IMAGES, IMAGES), planes)
    for found, expected in zip(shared(*operands), jax.jit(function)(*operands), strict=True):
        assert_close(found, expected)


def test_energies_of_fields_are_those_of_the_whole_volume(mesh: Mesh, planes: int) -> None:
    function = jax.value_and_grad(jaxreg.elasticity_loss)
    u = displacement(planes, 1.0)
    shared = in_shard_map(function, mesh, (FIELDS,), (P(), FIELDS), planes)
    for found, expected in zip(shared(u), function(u), strict=True):
        assert_close(found, expected)


def test_descriptors_and_histograms_are_those_of_the_whole_volume(mesh: Mesh, planes: int) -> None:
    pred, target = images(planes)

    def function(pred: Any, target: Any) -> Any:
        return jaxreg.mind_ssc(pred), jaxreg.joint_histogram(pred, target, num_bins=16)

    shared = in_shard_map(function, mesh, (IMAGES, IMAGES), (IMAGES, P()), planes)
    for found, expected in zip(shared(pred, target), function(pred, target), strict=True):
        assert_close(found, expected)


def test_a_batch_may_be_spread_as_well() -> None:
    devices = np.array(jax.devices("cpu")[:4]).reshape(2, 2)
    mesh = Mesh(devices, ("batch", "z"), axis_types=(AxisType.Auto,) * 2)
    image = random_array(1, 2, 1, 12, *IN_PLANE)
    grid = np.concatenate([displacement(12, size) for size in (0.5, 30.0)])
    affine = random_affine(5, 1, 3)

    def gradients(*operands: Any) -> Any:
        moved, transpose = jax.vjp(jaxreg.interpolate, *operands)
        return transpose(moved)

    def of_own_planes(*operands: Any) -> Any:
        with jaxreg.planes_over("z"):
            return gradients(*operands)

    specs = (P("batch", None, "z"), P(), P("batch", "z"))
    shared = jax.shard_map(of_own_planes, mesh=mesh, in_specs=specs, out_specs=specs)
    operands = image, affine, grid
    for found, expected in zip(jax.jit(shared)(*operands), gradients(*operands), strict=True):
        assert_close(found, expected)


def test_a_map_over_volumes_shares_the_planes_of_each() -> None:
    image = random_array(1, 3, 1, 1, 12, *IN_PLANE)
    grid = np.stack([displacement(12, size) for size in (0.5, 2.0, 30.0)])

    def function(image: Any, grid: Any) -> Any:
        return jax.vmap(lambda image, grid: jaxreg.interpolate(image, grid=grid))(image, grid)

    specs = (P(None, None, None, "z"), P(None, None, "z"))
    shared = in_shard_map(function, mesh_of(3), specs, specs[0], 12)
    assert_same(shared(image, grid), np.asarray(function(image, grid)))


def test_what_shares_planes_can_be_exported() -> None:
    mesh, (image,), grid = mesh_of(3), images(12, 1), displacement(12, 30.0)

    def of_own_planes(image: Any, grid: Any) -> Any:
        with jaxreg.planes_over("z"):
            return jaxreg.interpolate(image, grid=grid)

    function = jax.jit(
        jax.shard_map(of_own_planes, mesh=mesh, in_specs=(IMAGES, FIELDS), out_specs=IMAGES)
    )
    given = [
        jax.device_put(x, NamedSharding(mesh, spec))
        for x, spec in zip((image, grid), (IMAGES, FIELDS), strict=True)
    ]
    stored = jax.export.export(function, disabled_checks=jaxreg.export_checks())(*given)
    found = jax.jit(jax.export.deserialize(stored.serialize()).call)(*given)
    assert_same(np.asarray(found), np.asarray(jaxreg.interpolate(image, grid=grid)))


def call_with(operands: Any, specs: Any, *planes: Any, **options: Any) -> None:
    def of_own_planes(*operands: Any) -> Any:
        with jaxreg.planes_over("z", *planes, **options):
            return jaxreg.interpolate(operands[0], *operands[2:], grid=operands[1])

    jax.shard_map(of_own_planes, mesh=mesh_of(2), in_specs=specs, out_specs=IMAGES)(*operands)


def test_what_does_not_fit_is_refused() -> None:
    image, grid = random_array(1, 1, 1, 12, *IN_PLANE), displacement(12, 1.0)
    both = (image, grid), (IMAGES, FIELDS)
    with pytest.raises(ValueError, match="planes: expected a number of planes from 1, got 0"):
        call_with(*both, 0)
    with pytest.raises(TypeError, match="sampled_planes: expected a number of planes, got str"):
        call_with(*both, sampled_planes="all")
    with pytest.raises(ValueError, match=r"grid: expected 7 planes on each device, as 13 .* got 6"):
        call_with(*both, 13)
    with pytest.raises(ValueError, match="image: expected 7 planes on each device, as 13"):
        call_with(*both, sampled_planes=13)
    with pytest.raises(ValueError, match="grid: expected the planes of each device"):
        call_with((image, grid), (IMAGES, EVERYWHERE))
    affines = np.concatenate([random_affine(seed, 1, 3) for seed in range(2)])
    with pytest.raises(ValueError, match="affine: expected the same on all devices"):
        call_with((image, grid, affines), (IMAGES, FIELDS, P("z")))
    flat = random_array(1, 1, 1, 12, 8), random_array(2, 1, 12, 8, 2)
    with pytest.raises(ValueError, match="image: expected a volume in 3-D"):
        call_with(flat, (IMAGES, FIELDS))
    with pytest.raises(NameError, match="axis name: z"), jaxreg.planes_over("z"):
        pass


def test_volumes_smaller_than_a_window_are_refused() -> None:
    image = random_array(1, 1, 1, 6, *IN_PLANE)
    function = in_shard_map(jaxreg.lncc_loss, mesh_of(2), (IMAGES, IMAGES), P(), 6)
    with pytest.raises(ValueError, match="pred: expected at least 7 planes to share, got 6"):
        function(image, image)


def test_what_all_devices_have_is_computed_by_all() -> None:
    (image,), affine = images(12, 1), random_affine(5, 1, 3)
    function = in_shard_map(
        jaxreg.interpolate, mesh_of(2), (EVERYWHERE, EVERYWHERE), EVERYWHERE, 12
    )
    assert_same(function(image, affine), np.asarray(jaxreg.interpolate(image, affine)))
