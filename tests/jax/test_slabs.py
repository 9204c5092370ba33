"""``jaxreg`` under ``jit`` on volumes whose planes are spread over devices (of the CPU)."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from device_cases import Shared, cases
from inputs import assert_close as assert_values_close
from inputs import assert_same, random_affine, random_array
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxreg
from jaxreg._shared_planes import samples_near, samples_within
from jaxreg._slabs import lie_near
from regkernels import table

Array = np.ndarray
Function = Callable[..., Any]

IN_PLANE = (6, 7)
IMAGE, FIELD = 2, 1  # the axis of the planes


@pytest.fixture(autouse=True)
def _double_precision_on_the_cpu() -> Iterator[None]:
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        yield


# Of the last but one on CPUs, a device has planes beyond the end of the volume alone; the last has
# slabs that are larger than what their ends need of their neighbours.
CASES = [
    *(Shared(2, 12), Shared(3, 13), Shared(4, 13), Shared(4, 9), Shared(2, 47)),
    *(Shared(2, 13, "gpu"), Shared(2, 48, "gpu")),
]


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


def spread_on(mesh: Mesh, axis: int) -> NamedSharding:
    return NamedSharding(mesh, P(*[None] * axis, "z"))


def on_slabs(function: Function, mesh: Mesh, axes: list[int | None], result_axes: Any) -> Function:
    """The function, jitted, of arrays that are spread along an axis each.

    Volumes whose planes do not divide come with zeros behind them, which are cut off inside: an
    array outside of ``jit`` cannot have shards of different sizes.
    """
    count = mesh.devices.size

    def padded(x: jax.Array, axis: int | None) -> jax.Array:
        if axis is None:
            return jnp.asarray(x)
        widths = [(0, -x.shape[axis] % count if i == axis else 0) for i in range(x.ndim)]
        return jnp.pad(x, widths)

    def call(*arrays: Array) -> Any:
        sizes = [
            x.shape[axis] if axis is not None else 0 for x, axis in zip(arrays, axes, strict=True)
        ]

        def inside(*given: jax.Array) -> Any:
            cut = []
            for x, axis, size in zip(given, axes, sizes, strict=True):
                if axis is not None:
                    x = jax.lax.slice_in_dim(x, 0, size, axis=axis)
                    x = jax.lax.with_sharding_constraint(x, spread_on(mesh, axis))
                cut.append(x)
            results = function(*cut)
            leaves, tree = jax.tree.flatten(results)
            flat = [
                x
                if axis is None
                else padded(jax.lax.with_sharding_constraint(x, spread_on(mesh, axis)), axis)
                for x, axis in zip(leaves, result_axes, strict=True)
            ]
            return jax.tree.unflatten(tree, flat)

        given = [
            jax.device_put(
                padded(x, axis),
                NamedSharding(mesh, P()) if axis is None else spread_on(mesh, axis),
            )
            for x, axis in zip(arrays, axes, strict=True)
        ]
        shapes = [x.shape for x in jax.tree.leaves(jax.eval_shape(function, *arrays))]
        compiled = jax.jit(inside).lower(*given).compile()
        call.text = compiled.as_text()  # type: ignore[attr-defined]
        leaves, tree = jax.tree.flatten(compiled(*given))
        cut = [
            np.asarray(x)[tuple(map(slice, shape))] for x, shape in zip(leaves, shapes, strict=True)
        ]
        return jax.tree.unflatten(tree, cut)

    return call


def assert_close(found: Array, expected: Any) -> None:
    assert_values_close(found, np.asarray(expected), np.float64)


def largest_message(text: str, name: str) -> int:
    """The elements of the largest array that devices send each other in this way."""
    found = re.findall(rf"= (.*?) {name}(?:-start)?\(", text)
    shapes = [re.findall(r"\w+\[([\d,]*)\]", shape) for shape in found]
    sizes = [
        int(np.prod([int(n) for n in shape.split(",") if n])) for group in shapes for shape in group
    ]
    return max(sizes, default=0)


def assert_nothing_is_gathered(text: str) -> None:
    assert largest_message(text, "all-gather") == 0
    assert largest_message(text, "all-to-all") == 0


def displacement(
    planes: int, size: float, seed: int = 3, in_plane: tuple[int, int] = IN_PLANE
) -> Array:
    """Of up to ``size`` voxels along each axis."""
    shape = (planes, *in_plane)
    voxels = np.array([(n - 1) / 2 for n in reversed(shape)])
    return size * random_array(seed, 1, *shape, 3) / voxels


SAMPLING = {
    "within a neighbour": 0.8,
    "far away": 30.0,
}


@pytest.mark.parametrize("reach", SAMPLING.values(), ids=SAMPLING)
@pytest.mark.parametrize("padding_mode", ["zeros", "border", "reflection"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_interpolate_gives_the_bits_of_one_device(
    mesh: Mesh, planes: int, reach: float, padding_mode: str, dtype: Any
) -> None:
    image = random_array(1, 1, 2, planes, *IN_PLANE, dtype=dtype)
    grid = displacement(planes, reach).astype(dtype)

    def function(image: Any, grid: Any) -> Any:
        return jaxreg.interpolate(image, grid=grid, padding_mode=padding_mode)

    spread = on_slabs(function, mesh, [IMAGE, FIELD], [IMAGE])
    assert_same(spread(image, grid), np.asarray(jax.jit(function)(image, grid)))
    assert_nothing_is_gathered(spread.text)  # type: ignore[attr-defined]


def of_the_ops(planes: int) -> dict[str, tuple[Function, list[tuple[Array, int]]]]:
    """Calls of arrays, each with the axis of its planes."""
    image, other = ((random_array(seed, 1, 2, planes, *IN_PLANE), IMAGE) for seed in (1, 2))
    labels = (np.round(3 * image[0]).astype(np.int16), IMAGE)
    u, v = ((displacement(planes, size), FIELD) for size in (0.7, 2.0))
    affine = random_affine(5, 1, 3)
    converted = functools.partial(jaxreg.convert_displacement, source="normalised", target="voxel")
    in_channels = functools.partial(jaxreg.gaussian_smooth, sigma=1.2, channel_last=True)
    return {
        "gaussian_smooth": (functools.partial(jaxreg.gaussian_smooth, sigma=1.2), [image]),
        "gaussian_smooth of a field": (in_channels, [u]),
        "jacobian_determinant": (jaxreg.jacobian_determinant, [u]),
        "lncc_loss": (functools.partial(jaxreg.lncc_loss, reduction="none"), [image, other]),
        "affine_warp": (lambda u: jaxreg.affine_warp(affine, u), [u]),
        "convert_displacement": (converted, [u]),
        "coverage": (
            lambda u: jaxreg.coverage(affine, u, source_shape=(9, 5, 8), margin=1.0, reach=2),
            [u],
        ),
        "interpolate": (lambda image, u: jaxreg.interpolate(image, grid=u), [image, u]),
        "interpolate by an affine": (lambda image: jaxreg.interpolate(image, affine), [image]),
        "interpolate on a grid of its own": (
            lambda image: jaxreg.interpolate(image, affine, out_shape=(2 * planes, 5, 8)),
            [image],
        ),
        "interpolate_labels": (
            lambda labels, u: jaxreg.interpolate_labels(labels, grid=u),
            [labels, u],
        ),
        "interpolate_labels by an affine": (
            lambda labels: jaxreg.interpolate_labels(labels, affine),
            [labels],
        ),
        "compose": (jaxreg.compose, [u, v]),
    }


@pytest.mark.parametrize("name", of_the_ops(12))
def test_results_are_spread_though_nothing_asks_for_it(name: str) -> None:
    function, operands = of_the_ops(12)[name]
    mesh = Mesh(np.array(jax.devices("cpu")[:4]), ("z",), axis_types=(AxisType.Auto,))
    given = [jax.device_put(x, spread_on(mesh, axis)) for x, axis in operands]
    compiled = jax.jit(function).lower(*given).compile()
    result = compiled(*given)
    axis = IMAGE if result.ndim == 5 and result.shape[-1] != 3 else FIELD
    assert result.sharding.is_equivalent_to(spread_on(mesh, axis), result.ndim)
    expected = jax.jit(function)(*(x for x, _ in operands))
    np.testing.assert_allclose(result, expected, rtol=1e-12, atol=1e-12)
    assert_nothing_is_gathered(compiled.as_text())
    assert largest_message(compiled.as_text(), "all-reduce") <= 1


QUARTER_TURN = np.array([[[0.0, 0, 1, 0], [0, 1, 0, 0], [-1, 0, 0, 0]]])
AFFINES = {"small": random_affine(5, 1, 3), "a quarter turn": QUARTER_TURN}


@pytest.mark.parametrize("affine", AFFINES.values(), ids=AFFINES)
@pytest.mark.parametrize("affine_last", [False, True])
@pytest.mark.parametrize("size", [0.8, 30.0])
def test_gradients_of_interpolate_are_those_of_one_device(
    mesh: Mesh, planes: int, affine: Array, affine_last: bool, size: float
) -> None:
    image = random_array(1, 1, 2, planes, *IN_PLANE)
    grid = displacement(planes, size)

    def function(image: Any, affine: Any, grid: Any) -> Any:
        def value(*operands: Any) -> Any:
            moved = jaxreg.interpolate(*operands, affine_last=affine_last)
            weights = jnp.sin(jnp.arange(moved.size)).reshape(moved.shape)
            return (weights * moved).sum()

        return jax.grad(value, (0, 1, 2))(image, affine, grid)

    spread = on_slabs(function, mesh, [IMAGE, None, FIELD], [IMAGE, None, FIELD])
    of_image, of_affine, of_grid = spread(image, affine, grid)
    expected = jax.jit(function)(image, affine, grid)
    assert_close(of_image, expected[0])
    assert_close(of_affine, expected[1])
    assert_close(of_grid, expected[2])
    assert_nothing_is_gathered(spread.text)  # type: ignore[attr-defined]


@pytest.mark.parametrize("padding_mode", ["zeros", "border", "reflection"])
@pytest.mark.parametrize("size", [0.8, 30.0])
def test_long_rows_give_the_values_and_gradients_of_one_device(
    mesh: Mesh, planes: int, size: float, padding_mode: str
) -> None:
    """They go through vector code; some samples lie on voxels, also on those of the last plane."""
    in_plane = (3, 41)
    image = random_array(1, 1, 2, planes, *in_plane)
    affine = np.eye(3, 4)[None]
    u, grid = (displacement(planes, size, seed, in_plane) for seed in (2, 3))
    grid[:, :, 0] = 0

    def values(image: Any, affine: Any, u: Any, grid: Any) -> Any:
        moved = jaxreg.interpolate(image, affine, grid, padding_mode=padding_mode)
        return moved, jaxreg.compose(u, grid)

    def gradients(*operands: Any) -> Any:
        def total(*operands: Any) -> Any:
            moved, composed = values(*operands)
            return (jnp.sin(moved) ** 2).sum() + (composed**3).sum()

        return jax.grad(total, (0, 1, 2, 3))(*operands)

    operands = (image, affine, u, grid)
    axes = [IMAGE, None, FIELD, FIELD]
    found = on_slabs(values, mesh, axes, [IMAGE, FIELD])(*operands)
    for one, other in zip(found, jax.jit(values)(*operands), strict=True):
        assert_same(one, np.asarray(other))
    found = on_slabs(gradients, mesh, axes, axes)(*operands)
    for one, other in zip(found, jax.jit(gradients)(*operands), strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("out_planes", [None, 9])
@pytest.mark.parametrize("affine", AFFINES.values(), ids=AFFINES)
def test_an_affine_alone_keeps_its_output_spread(
    mesh: Mesh, planes: int, affine: Array, out_planes: int | None
) -> None:
    image = random_array(1, 1, 1, planes, *IN_PLANE, dtype=np.float32)
    out_shape = None if out_planes is None else (out_planes, 5, 8)

    def function(image: Any, affine: Any) -> Any:
        return jaxreg.interpolate(image, affine, out_shape=out_shape)

    affine = affine.astype(np.float32)
    spread = on_slabs(function, mesh, [IMAGE, None], [IMAGE])
    assert_same(spread(image, affine), np.asarray(jax.jit(function)(image, affine)))
    assert_nothing_is_gathered(spread.text)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "nearest"},
        {"mode": "cubic"},
        {"mode": "b-spline"},
        {"mode": "cubic", "align_corners": False, "padding_mode": "reflection"},
        {"align_corners": False},
        {"is_displacement": False},
        {"grid_unit": "voxel"},
        {"grid_components": "zyx"},
    ],
    ids=str,
)
def test_all_ways_to_place_samples_give_the_bits_of_one_device(
    mesh: Mesh, planes: int, options: dict[str, Any]
) -> None:
    image = random_array(1, 1, 1, planes, *IN_PLANE)
    grid = 5 * displacement(planes, 0.5)

    def function(image: Any, grid: Any) -> Any:
        return jaxreg.interpolate(image, grid=grid, **options)

    spread = on_slabs(function, mesh, [IMAGE, FIELD], [IMAGE])
    assert_same(spread(image, grid), np.asarray(jax.jit(function)(image, grid)))


@pytest.mark.parametrize("padding_mode", ["zeros", "border", "reflection"])
@pytest.mark.parametrize("size", [0.8, 30.0])
@pytest.mark.parametrize("mode", ["cubic", "b-spline"])
def test_cubic_samples_and_their_gradients_are_those_of_one_device(
    mesh: Mesh, planes: int, mode: str, size: float, padding_mode: str
) -> None:
    """Of values or coefficients that are there: they stay spread."""
    image = random_array(1, 1, 2, planes, *IN_PLANE)
    affine = random_affine(5, 1, 3)
    u, grid = (displacement(planes, size, seed) for seed in (2, 3))
    grid[:, :, 0] = 0  # on voxels
    options = {"mode": mode, "padding_mode": padding_mode, "prefilter": False}

    def values(image: Any, affine: Any, u: Any, grid: Any) -> Any:
        moved = jaxreg.interpolate(image, affine, grid, **options)
        return moved, jaxreg.compose(u, grid, **options)

    def gradients(*operands: Any) -> Any:
        def total(*operands: Any) -> Any:
            moved, composed = values(*operands)
            return (jnp.sin(moved) ** 2).sum() + (composed**3).sum()

        return jax.grad(total, (0, 1, 2, 3))(*operands)

    operands = (image, affine, u, grid)
    axes = [IMAGE, None, FIELD, FIELD]
    spread = on_slabs(values, mesh, axes, [IMAGE, FIELD])
    for one, other in zip(spread(*operands), jax.jit(values)(*operands), strict=True):
        assert_same(one, np.asarray(other))
    assert_nothing_is_gathered(spread.text)  # type: ignore[attr-defined]
    found = on_slabs(gradients, mesh, axes, axes)(*operands)
    for one, other in zip(found, jax.jit(gradients)(*operands), strict=True):
        assert_close(one, other)


def test_a_grid_with_its_channels_first_stays_spread(mesh: Mesh, planes: int) -> None:
    image = random_array(1, 1, 1, planes, *IN_PLANE)
    grid = np.moveaxis(displacement(planes, 2.0), -1, 1).copy()

    def function(image: Any, grid: Any) -> Any:
        return jaxreg.interpolate(image, grid=grid, grid_channels="first")

    spread = on_slabs(function, mesh, [IMAGE, IMAGE], [IMAGE])
    assert_same(spread(image, grid), np.asarray(jax.jit(function)(image, grid)))
    assert_nothing_is_gathered(spread.text)  # type: ignore[attr-defined]


def test_a_displacement_of_zero_returns_the_image_bit_for_bit(mesh: Mesh, planes: int) -> None:
    image = random_array(1, 1, 1, planes, *IN_PLANE, dtype=np.float32)
    grid = np.zeros((1, planes, *IN_PLANE, 3), np.float32)
    spread = on_slabs(
        lambda image, grid: jaxreg.interpolate(image, grid=grid), mesh, [IMAGE, FIELD], [IMAGE]
    )
    assert_same(spread(image, grid), image)


def test_a_displacement_that_is_not_finite_is_no_different(mesh: Mesh, planes: int) -> None:
    image = random_array(1, 1, 1, planes, *IN_PLANE)
    grid = displacement(planes, 1.0)
    grid[0, 1, 2, 3] = np.nan
    grid[0, -1, 0, 0] = np.inf

    def function(image: Any, grid: Any) -> Any:
        return jaxreg.interpolate(image, grid=grid, padding_mode="border")

    spread = on_slabs(function, mesh, [IMAGE, FIELD], [IMAGE])
    assert_same(spread(image, grid), np.asarray(jax.jit(function)(image, grid)))


def test_an_image_that_every_device_has_is_not_sent(mesh: Mesh, planes: int) -> None:
    image = random_array(1, 1, 1, planes, *IN_PLANE)
    grid = displacement(planes, 30.0)

    def function(image: Any, grid: Any) -> Any:
        def value(image: Any, grid: Any) -> Any:
            return (jaxreg.interpolate(image, grid=grid) ** 2).sum()

        return jaxreg.interpolate(image, grid=grid), jax.grad(value, (0, 1))(image, grid)

    spread = on_slabs(function, mesh, [None, FIELD], [IMAGE, None, FIELD])
    moved, (of_image, of_grid) = spread(image, grid)
    expected, gradients = jax.jit(function)(image, grid)
    assert_same(moved, np.asarray(expected))
    assert_close(of_image, gradients[0])
    assert_same(of_grid, np.asarray(gradients[1]))
    assert largest_message(spread.text, "collective-permute") == 0  # type: ignore[attr-defined]


@pytest.mark.parametrize("size", [0.8, 30.0])
@pytest.mark.parametrize("background", [0, 7])
def test_interpolate_labels_gives_the_bits_of_one_device(
    mesh: Mesh, planes: int, size: float, background: int
) -> None:
    labels = np.random.default_rng(2).integers(-3, 4, (1, 1, planes, *IN_PLANE)).astype(np.int16)
    grid = displacement(planes, size)

    def function(labels: Any, grid: Any) -> Any:
        return jaxreg.interpolate_labels(
            labels, grid=grid, background=background, return_weights=True
        )

    spread = on_slabs(function, mesh, [IMAGE, FIELD], [IMAGE, IMAGE])
    moved, weight = spread(labels, grid)
    expected, expected_weight = jax.jit(function)(labels, grid)
    assert_same(moved, np.asarray(expected))
    assert_same(weight, np.asarray(expected_weight))
    assert_nothing_is_gathered(spread.text)  # type: ignore[attr-defined]


@pytest.mark.parametrize("size", [0.8, 30.0])
@pytest.mark.parametrize("add", [True, False])
@pytest.mark.parametrize("with_affine", [True, False])
def test_compose_gives_the_bits_of_one_device(
    mesh: Mesh, planes: int, size: float, add: bool, with_affine: bool
) -> None:
    u, v = displacement(planes, 2.0, seed=1), displacement(planes, size, seed=2)
    affine = random_affine(5, 1, 3) if with_affine else None

    def function(u: Any, v: Any) -> Any:
        return jaxreg.compose(u, v, affine, add=add)

    spread = on_slabs(function, mesh, [FIELD, FIELD], [FIELD])
    assert_same(spread(u, v), np.asarray(jax.jit(function)(u, v)))
    assert_nothing_is_gathered(spread.text)  # type: ignore[attr-defined]


@pytest.mark.parametrize("size", [0.8, 30.0])
def test_gradients_of_compose_are_those_of_one_device(mesh: Mesh, planes: int, size: float) -> None:
    u, v = displacement(planes, 2.0, seed=1), displacement(planes, size, seed=2)

    def function(u: Any, v: Any) -> Any:
        def value(u: Any, v: Any) -> Any:
            return (jaxreg.compose(u, v) ** 3).sum()

        return jax.grad(value, (0, 1))(u, v)

    spread = on_slabs(function, mesh, [FIELD, FIELD], [FIELD, FIELD])
    for gradient, expected in zip(spread(u, v), jax.jit(function)(u, v), strict=True):
        assert_close(gradient, expected)
    assert_nothing_is_gathered(spread.text)  # type: ignore[attr-defined]


@pytest.mark.parametrize("mode", ["bilinear", "cubic"])
@pytest.mark.parametrize("farthest", [1, 3])
def test_steps_of_a_known_length_are_composed_without_a_test_of_how_far_they_reach(
    mesh: Mesh, planes: int, farthest: int, mode: Any
) -> None:
    u = displacement(planes, 2.0, seed=1)
    v = jnp.clip(
        displacement(planes, 3.0 * farthest, seed=2) * (planes - 1) / 2, -farthest, farthest
    )
    v = v * 2 / (planes - 1)  # in voxels along z, many as long as they may be

    def function(u: Any, v: Any) -> Any:
        return jaxreg.compose(u, v, mode=mode)

    def known(u: Any, v: Any) -> Any:
        with samples_within(farthest):
            return function(u, v)

    def gradients(of: Function) -> Function:
        return jax.grad(lambda u, v: (of(u, v) ** 3).sum(), (0, 1))

    spread = on_slabs(known, mesh, [FIELD, FIELD], [FIELD])
    assert_same(spread(u, v), np.asarray(jax.jit(function)(u, v)))
    assert "conditional" not in spread.text  # type: ignore[attr-defined]
    spread = on_slabs(gradients(known), mesh, [FIELD, FIELD], [FIELD, FIELD])
    for gradient, expected in zip(spread(u, v), gradients(function)(u, v), strict=True):
        assert_close(gradient, expected)
    assert "conditional" not in spread.text  # type: ignore[attr-defined]
    assert_nothing_is_gathered(spread.text)  # type: ignore[attr-defined]


@pytest.mark.parametrize("turn", [0.0, 0.02, 0.3])
@pytest.mark.parametrize("length", [0.0, 2.0, 4.5, 9.0])
def test_samples_that_are_known_to_lie_near_are_taken_without_a_test(
    mesh: Mesh, planes: int, length: float, turn: float
) -> None:
    image = random_array(1, 1, 1, planes, *IN_PLANE)
    u = np.asarray(displacement(planes, 1.0, seed=2))
    u *= length * 2 / (planes - 1) / np.abs(u[..., 2]).max()  # voxels along z
    affine = np.eye(3, 4)[None] + turn * np.random.default_rng(3).uniform(-1, 1, (1, 3, 4))
    shape = (planes, *IN_PLANE)
    longest = np.abs(u).max((0, 1, 2, 3))

    def function(image: Any, u: Any) -> Any:
        return jaxreg.interpolate(
            image, jnp.asarray(affine), u, affine_last=True, padding_mode="border"
        )

    def known(image: Any, u: Any) -> Any:
        with samples_near():
            return function(image, u)

    near = bool(lie_near(jnp.asarray(affine), longest, shape, shape, mesh.devices.size))
    own = -(-planes // mesh.devices.size)
    assert near == (own >= 16 and length < 5 and turn < 0.1)
    if not near:
        return
    spread = on_slabs(known, mesh, [IMAGE, FIELD], [IMAGE])
    assert_same(spread(image, u), np.asarray(jax.jit(function)(image, u)))
    assert "conditional" not in spread.text  # type: ignore[attr-defined]
    assert_nothing_is_gathered(spread.text)  # type: ignore[attr-defined]


def test_scaling_and_squaring_gives_the_bits_of_one_device(mesh: Mesh, planes: int) -> None:
    velocity = displacement(planes, 4.0)
    spread = on_slabs(jaxreg.scaling_and_squaring, mesh, [FIELD], [FIELD])
    expected = jax.jit(jaxreg.scaling_and_squaring)(velocity)
    assert_same(spread(velocity), np.asarray(expected))
    assert_nothing_is_gathered(spread.text)  # type: ignore[attr-defined]


FIELD_TO_FIELD: dict[str, Function] = {
    "jacobian_determinant": jaxreg.jacobian_determinant,
    "convert_displacement": lambda u: jaxreg.convert_displacement(u, "normalised", "voxel"),
    "gaussian_smooth": lambda u: jaxreg.gaussian_smooth(u, (1.2, 0.7, 0.0), channel_last=True),
    "gaussian_smooth, wider than a slab": lambda u: jaxreg.gaussian_smooth(
        u, 2.5, channel_last=True
    ),
}


@pytest.mark.parametrize("function", FIELD_TO_FIELD.values(), ids=FIELD_TO_FIELD)
def test_ops_of_fields_give_the_bits_of_one_device(
    mesh: Mesh, planes: int, function: Function
) -> None:
    u = displacement(planes, 1.0)
    spread = on_slabs(function, mesh, [FIELD], [FIELD])
    assert_same(spread(u), np.asarray(jax.jit(function)(u)))
    assert_nothing_is_gathered(spread.text)  # type: ignore[attr-defined]

    def gradient(u: Any) -> Any:
        return jax.grad(lambda u: (function(u) ** 3).sum())(u)

    spread = on_slabs(gradient, mesh, [FIELD], [FIELD])
    assert_same(spread(u), np.asarray(jax.jit(gradient)(u)))
    assert_nothing_is_gathered(spread.text)  # type: ignore[attr-defined]


def test_gaussian_smooth_of_images_gives_the_bits_of_one_device(mesh: Mesh, planes: int) -> None:
    image = random_array(1, 2, 2, planes, *IN_PLANE, dtype=np.float32)

    def function(image: Any) -> Any:
        return jaxreg.gaussian_smooth(image, 1.5)

    spread = on_slabs(function, mesh, [IMAGE], [IMAGE])
    assert_same(spread(image), np.asarray(jax.jit(function)(image)))


@pytest.mark.parametrize("radius", [1, 2])
@pytest.mark.parametrize("dilation", [1, 3])
def test_descriptors_are_those_of_one_device(
    mesh: Mesh, planes: int, radius: int, dilation: int
) -> None:
    image = random_array(1, 2, 2, planes, *IN_PLANE)

    def function(image: Any) -> Any:
        def described(image: Any) -> Any:
            return jaxreg.mind_ssc(image, radius=radius, dilation=dilation)

        value, transpose = jax.vjp(described, image)
        return value, *transpose(jnp.sin(jnp.arange(value.size)).reshape(value.shape))

    spread = on_slabs(function, mesh, [IMAGE], [IMAGE, IMAGE])
    for found, expected in zip(spread(image), jax.jit(function)(image), strict=True):
        assert_close(found, expected)
    assert_nothing_is_gathered(spread.text)  # type: ignore[attr-defined]


def test_affine_warp_gives_the_bits_of_one_device(mesh: Mesh, planes: int) -> None:
    u, affine = displacement(planes, 1.0), random_affine(5, 1, 3)
    spread = on_slabs(jaxreg.affine_warp, mesh, [None, FIELD], [FIELD])
    assert_same(spread(affine, u), np.asarray(jax.jit(jaxreg.affine_warp)(affine, u)))

    def gradient(affine: Any, u: Any) -> Any:
        return jax.grad(lambda *x: (jaxreg.affine_warp(*x) ** 3).sum(), (0, 1))(affine, u)

    spread = on_slabs(gradient, mesh, [None, FIELD], [None, FIELD])
    of_affine, of_field = spread(affine, u)
    expected = jax.jit(gradient)(affine, u)
    assert_close(of_affine, expected[0])
    assert_same(of_field, np.asarray(expected[1]))
    assert_nothing_is_gathered(spread.text)  # type: ignore[attr-defined]


def test_coverage_gives_the_bits_of_one_device(mesh: Mesh, planes: int) -> None:
    u, affine = displacement(planes, 1.0), random_affine(5, 1, 3)
    options = {"source_shape": (planes + 2, 7, 4), "margin": 0.5, "reach": 1.5}
    function = functools.partial(jaxreg.coverage, **options)
    spread = on_slabs(function, mesh, [None, FIELD], [IMAGE])
    assert_same(spread(affine, u), np.asarray(jax.jit(function)(affine, u)))
    assert_nothing_is_gathered(spread.text)  # type: ignore[attr-defined]


def test_coverage_by_an_affine_is_spread_as_what_goes_on_with_it(mesh: Mesh, planes: int) -> None:
    """No operand has planes, and no device makes all of them."""
    image, affine = random_array(1, 1, 1, planes, *IN_PLANE), random_affine(5, 1, 3)

    def function(affine: Any, image: Any) -> Any:
        return image * jaxreg.coverage(affine, source_shape=image.shape[2:], reach=1.0)

    spread = on_slabs(function, mesh, [None, IMAGE], [IMAGE])
    assert_same(spread(affine, image), np.asarray(jax.jit(function)(affine, image)))
    text = spread.text  # type: ignore[attr-defined]
    assert_nothing_is_gathered(text)
    (call,) = [line for line in text.splitlines() if '"jaxreg.coverage"' in line]
    assert f"[1,1,{-(-planes // mesh.size)}," in call


LOSSES: list[tuple[Function, dict[str, Any]]] = [
    (jaxreg.lncc_loss, {}),
    (jaxreg.lncc_loss, {"kernel_size": (9, 3, 5)}),
    (jaxreg.lncc_loss, {"kernel_size": (1, 3, 5)}),
    (jaxreg.lncc_loss, {"window": "gaussian", "kernel_size": 5}),
    (jaxreg.mutual_information_loss, {}),
    (jaxreg.mutual_information_loss, {"kernel": "b-spline", "value_range": "joint"}),
    (jaxreg.mutual_information_loss, {"value_range": ((-1.5, 1.5), (-1.0, 2.0))}),
]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    ("loss", "options"), LOSSES, ids=[f"{loss.__name__} {options}" for loss, options in LOSSES]
)
def test_losses_of_images_are_those_of_one_device(
    mesh: Mesh,
    planes: int,
    masked: bool,
    reduction: str,
    loss: Function,
    options: dict[str, Any],
) -> None:
    pred = random_array(1, 2, 2, planes, *IN_PLANE)
    target = random_array(2, 1, 2, planes, *IN_PLANE) + 0.5 * pred[:1]
    mask = np.abs(random_array(3, 2, 1, planes, *IN_PLANE)) if masked else None

    def function(pred: Any, target: Any, *mask: Any) -> Any:
        given = {"mask": mask[0] if mask else None, "reduction": reduction, **options}
        value, transpose = jax.vjp(lambda *images: loss(*images, **given), pred, target)
        # Large values hardly change it: it tells of gradients, not of the rounding of values.
        return value, *transpose(2 + value / (1 + jnp.abs(value)))

    operands = [pred, target] if mask is None else [pred, target, mask]
    # Of LNCC each voxel has a value, of mutual information each channel.
    is_map = loss is jaxreg.lncc_loss and reduction == "none"
    axes = [IMAGE] * len(operands)
    spread = on_slabs(function, mesh, axes, [IMAGE if is_map else None, IMAGE, IMAGE])
    for found, expected in zip(spread(*operands), jax.jit(function)(*operands), strict=True):
        assert_close(found, expected)
    assert_nothing_is_gathered(spread.text)  # type: ignore[attr-defined]


ENERGIES: dict[str, Function] = {
    "diffusion": functools.partial(jaxreg.diffusion_loss, spacing=(0.8, 1.0, 2.5)),
    "bending": functools.partial(jaxreg.bending_energy_loss, spacing=(0.8, 1.0, 2.5)),
    "curvature": jaxreg.curvature_loss,
    "elasticity": functools.partial(jaxreg.elasticity_loss, spacing=(0.8, 1.0, 2.5)),
    "divergence": jaxreg.divergence_loss,
    "jacobian": jaxreg.jacobian_loss,
}


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("energy", ENERGIES.values(), ids=ENERGIES)
def test_energies_of_fields_are_those_of_one_device(
    mesh: Mesh, planes: int, energy: Function, reduction: str, align_corners: bool
) -> None:
    u = np.concatenate([displacement(planes, size) for size in (0.7, 2.0)])

    def loss(u: Any) -> Any:
        return energy(u, reduction=reduction, align_corners=align_corners)

    def function(u: Any) -> Any:
        value, transpose = jax.vjp(loss, u)
        return value, *transpose(jnp.ones_like(value) + jnp.sin(value))

    spread = on_slabs(function, mesh, [FIELD], [None, FIELD])
    for found, expected in zip(spread(u), jax.jit(function)(u), strict=True):
        assert_close(found, expected)
    assert_nothing_is_gathered(spread.text)  # type: ignore[attr-defined]

    alone = on_slabs(loss, mesh, [FIELD], [None])
    assert_close(alone(u), jax.jit(loss)(u))
    assert_nothing_is_gathered(alone.text)  # type: ignore[attr-defined]


@pytest.mark.parametrize("energy", ENERGIES.values(), ids=ENERGIES)
def test_gradients_of_energies_have_the_bits_of_one_device(
    mesh: Mesh, planes: int, energy: Function
) -> None:
    # Rows of this length are vector code where they are far from the border.
    shape = (planes, 6, 24)
    u = random_array(3, 1, *shape, 3, dtype=np.float32) / 10

    def gradient(u: Any) -> Any:
        return jax.grad(energy)(u)

    spread = on_slabs(gradient, mesh, [FIELD], [FIELD])
    assert_same(spread(u), np.asarray(jax.jit(gradient)(u)))


def test_an_energy_of_batches_and_planes_that_are_both_spread() -> None:
    devices = np.array(jax.devices("cpu")[:4]).reshape(2, 2)
    mesh = Mesh(devices, ("batch", "z"), axis_types=(AxisType.Auto,) * 2)
    u = np.concatenate([displacement(12, size) for size in (0.7, 2.0)])
    function = jax.value_and_grad(jaxreg.elasticity_loss)
    given = jax.device_put(u, NamedSharding(mesh, P("batch", "z")))
    compiled = jax.jit(function).lower(given).compile()
    assert_nothing_is_gathered(compiled.as_text())
    for found, expected in zip(compiled(given), jax.jit(function)(u), strict=True):
        assert_close(np.asarray(found), expected)


def test_batches_and_planes_may_both_be_spread() -> None:
    devices = np.array(jax.devices("cpu")[:4]).reshape(2, 2)
    mesh = Mesh(devices, ("batch", "z"), axis_types=(AxisType.Auto,) * 2)
    fixed = random_array(1, 2, 1, 12, *IN_PLANE)
    moving = random_array(2, 1, 1, 12, *IN_PLANE)
    grid = np.concatenate([displacement(12, size) for size in (0.5, 30.0)])

    def function(fixed: Any, moving: Any, grid: Any) -> Any:
        def loss(moving: Any, grid: Any) -> Any:
            return jaxreg.lncc_loss(jaxreg.interpolate(moving, grid=grid), fixed)

        return jax.value_and_grad(loss, (0, 1))(moving, grid)

    specs = [P("batch", None, "z"), P(None, None, "z"), P("batch", "z")]
    given = [
        jax.device_put(x, NamedSharding(mesh, spec))
        for x, spec in zip((fixed, moving, grid), specs, strict=True)
    ]
    compiled = jax.jit(function).lower(*given).compile()
    assert_nothing_is_gathered(compiled.as_text())
    value, gradients = compiled(*given)
    expected_value, expected = jax.jit(function)(fixed, moving, grid)
    assert_close(np.asarray(value), expected_value)
    for found, right in zip(gradients, expected, strict=True):
        assert_close(np.asarray(found), right)


def test_a_map_over_volumes_keeps_their_planes_spread(mesh: Mesh, planes: int) -> None:
    image = random_array(1, 3, 1, 1, planes, *IN_PLANE)
    grid = np.stack([displacement(planes, size) for size in (0.5, 2.0, 30.0)])

    def function(image: Any, grid: Any) -> Any:
        return jax.vmap(lambda image, grid: jaxreg.interpolate(image, grid=grid))(image, grid)

    spread = on_slabs(function, mesh, [IMAGE + 1, FIELD + 1], [IMAGE + 1])
    assert_same(spread(image, grid), np.asarray(jax.jit(function)(image, grid)))
    assert_nothing_is_gathered(spread.text)  # type: ignore[attr-defined]


def test_planes_are_spread_where_types_say_so() -> None:
    devices = np.array(jax.devices("cpu")[:4])
    mesh = Mesh(devices, ("z",), axis_types=(AxisType.Explicit,))
    image = random_array(1, 1, 1, 12, *IN_PLANE)
    grid = displacement(12, 5.0)
    given = (
        jax.device_put(image, spread_on(mesh, IMAGE)),
        jax.device_put(grid, spread_on(mesh, FIELD)),
    )

    def loss(image: Any, grid: Any) -> Any:
        moved = jaxreg.interpolate(image, grid=grid)
        return jaxreg.lncc_loss(moved, image), moved

    function = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    with jax.set_mesh(mesh):
        compiled = function.lower(*given).compile()
        (value, moved), gradients = compiled(*given)
    assert_nothing_is_gathered(compiled.as_text())
    assert moved.sharding.spec[IMAGE] == "z"
    (expected, expected_moved), expected_gradients = function(image, grid)
    assert_same(np.asarray(moved), np.asarray(expected_moved))
    assert_close(np.asarray(value), expected)
    for found, right in zip(gradients, expected_gradients, strict=True):
        assert_close(np.asarray(found), right)


@pytest.mark.parametrize("size", [0.4, 0.9])
@pytest.mark.parametrize("with_initial", [False, True])
def test_invert_displacement_gives_the_bits_of_one_device(
    mesh: Mesh, planes: int, size: float, with_initial: bool
) -> None:
    u = np.asarray(jaxreg.gaussian_smooth(displacement(planes, 2 * size), 0.8, channel_last=True))
    operands = [u, -u] if with_initial else [u]

    def function(u: Any, *initial: Any) -> Any:
        return jaxreg.invert_displacement(u, *initial, return_residual=True)

    spread = on_slabs(function, mesh, [FIELD] * len(operands), [FIELD, FIELD])
    for found, expected in zip(spread(*operands), jax.jit(function)(*operands), strict=True):
        assert_same(found, np.asarray(expected))
    assert_nothing_is_gathered(spread.text)  # type: ignore[attr-defined]


@pytest.mark.parametrize("sigma", [0.0, 0.7, 1.6])
def test_step_gradient_gives_the_bits_of_one_device(mesh: Mesh, planes: int, sigma: float) -> None:
    moved, slope = (random_array(k, 2, 2, planes, *IN_PLANE) for k in (1, 2))
    pull = random_array(3, 2, planes, *IN_PLANE, 3)
    every = moved, slope, pull, random_array(4, 1, planes, *IN_PLANE, 3)
    for operands in (every[:2], every):
        scales = {"slope_scale": 0.7, "pull_scale": 0.3} if operands is every else {}
        function = functools.partial(jaxreg.step_gradient, sigma=sigma, **scales)
        spread = on_slabs(function, mesh, [IMAGE, IMAGE, FIELD, FIELD][: len(operands)], [FIELD])
        assert_same(spread(*operands), np.asarray(jax.jit(function)(*operands)))
        assert_nothing_is_gathered(spread.text)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("plane", "dtype", "sigma"),
    [
        *((0, "float32", 0.0), (7, "bfloat16", 0.8), (-1, "float32", 1.25)),
        *((-1, "float64", 1.25), (-1, "float32", (0, 1, 2))),
    ],
)
def test_riemannian_adam_step_gives_the_bits_of_one_device(
    mesh: Mesh, planes: int, plane: int, dtype: str, sigma: Any
) -> None:
    """Whichever device has the longest vector."""
    gradient, mu, root = (random_array(k, 2, planes, *IN_PLANE, 3) for k in (1, 2, 3))
    gradient[:, plane] *= 10

    def function(gradient: Any, mu: Any, nu: Any) -> Any:
        # Beside moments in bfloat16 the rest is in float32. Of a conversion there and back XLA may
        # make none.
        gradient = gradient.astype("float32" if dtype == "bfloat16" else dtype)
        epsilon = jnp.asarray([1.0, 2.0, 0.1], gradient.dtype)
        options = {"learning_rate": 0.4, "epsilon": epsilon, "confined": True}
        mu, nu = mu.astype(dtype), nu.astype(dtype)
        step, mu, nu = jaxreg.riemannian_adam_step(gradient, mu, nu, 3, sigma=sigma, **options)
        assert step.dtype == gradient.dtype and mu.dtype == dtype
        return step, mu.astype(step.dtype), nu.astype(step.dtype)

    operands = gradient, mu, root**2
    spread = on_slabs(function, mesh, [FIELD] * 3, [FIELD] * 3)
    for found, expected in zip(spread(*operands), jax.jit(function)(*operands), strict=True):
        assert_same(found, np.asarray(expected))
    assert_nothing_is_gathered(spread.text)  # type: ignore[attr-defined]


@pytest.mark.parametrize("kernel", ["gaussian", "delta"])
def test_joint_histogram_is_that_of_one_device(mesh: Mesh, planes: int, kernel: str) -> None:
    pred = random_array(1, 1, 2, planes, *IN_PLANE)
    target = random_array(2, 1, 2, planes, *IN_PLANE)

    def function(pred: Any, target: Any) -> Any:
        return jaxreg.joint_histogram(pred, target, num_bins=16, kernel=kernel)

    spread = on_slabs(function, mesh, [IMAGE, IMAGE], [None])
    assert_close(spread(pred, target), jax.jit(function)(pred, target))
    assert_nothing_is_gathered(spread.text)  # type: ignore[attr-defined]


def test_an_op_that_knows_nothing_of_slabs_refuses_them() -> None:
    image = ("float32", (1, 1, 1, 8, 8, 8))
    attributes = {"radius": 1, "dilation": 1}
    with pytest.raises(ValueError, match="mind_ssc: takes whole volumes, not slabs"):
        table.infer("mind_ssc", [image], attributes, 1, (16, 16, 0))


@pytest.mark.parametrize("padding_mode", ["zeros", "border", "reflection"])
def test_splines_and_their_gradients_are_those_of_one_device(
    mesh: Mesh, planes: int, padding_mode: str
) -> None:
    """Coefficients depend on all planes, which every device gathers."""
    image, u = random_array(1, 1, 2, planes, *IN_PLANE), displacement(planes, 0.8)
    options = {"padding_mode": padding_mode, "mode": "b-spline"}

    def values(image: Any, u: Any) -> Any:
        return jaxreg.interpolate(image, grid=u, **options), jaxreg.compose(u, u, **options)

    def gradients(image: Any, u: Any) -> Any:
        def total(image: Any, u: Any) -> Any:
            moved, composed = values(image, u)
            return (jnp.sin(moved) ** 2).sum() + (composed**3).sum()

        return jax.grad(total, (0, 1))(image, u)

    axes = [IMAGE, FIELD]
    found = on_slabs(values, mesh, axes, axes)(image, u)
    for one, other in zip(found, jax.jit(values)(image, u), strict=True):
        assert_same(one, np.asarray(other))
    found = on_slabs(gradients, mesh, axes, axes)(image, u)
    for one, other in zip(found, jax.jit(gradients)(image, u), strict=True):
        assert_close(one, other)
