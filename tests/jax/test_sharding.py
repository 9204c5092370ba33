"""``jaxreg`` on arrays that are spread over several devices (of the CPU: see conftest.py)."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from examples import ALL_OPS, FIELD_LOSSES, LOSSES, example
from inputs import assert_close, assert_same, random_affine, random_array, small_displacement
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxreg
from jaxreg._sharding import Reduction, spread_over_devices

Array = np.ndarray
Function = Callable[..., Any]

ITEMS = 4
AXIS_TYPES = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}


@pytest.fixture(autouse=True)
def _double_precision_on_the_cpu() -> Iterator[None]:
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        yield


@pytest.fixture(params=AXIS_TYPES)
def axis_type(request: pytest.FixtureRequest) -> AxisType:
    """Whether the types of arrays say how they are spread."""
    return AXIS_TYPES[request.param]


def mesh(axis_type: AxisType = AxisType.Auto, **axes: int) -> Mesh:
    """Of four devices, along one axis ``batch`` by default."""
    axes = axes or {"batch": 4}
    devices = np.array(jax.devices("cpu")[:4]).reshape(tuple(axes.values()))
    return Mesh(devices, tuple(axes), axis_types=(axis_type,) * len(axes))


def put(array: Array, mesh: Mesh, *spec: Any) -> jax.Array:
    return jax.device_put(array, NamedSharding(mesh, P(*spec)))


def messages(text: str) -> set[tuple[str, str]]:
    """The ways in which devices communicate in a compiled function, each with what is sent."""
    names = (
        r"all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter|collective-broadcast"
    )
    found = re.findall(rf"= ([^=]*?) ({names})(?:-start)?\(", text)
    return {(name, re.sub(r"\{[^}]*\}", "", shape)) for shape, name in found}


def compiled(function: Function, *operands: Any) -> Any:
    return jax.jit(function).lower(*operands).compile()


def collectives(program: Any) -> set[str]:
    """The ways in which devices communicate in a compiled function."""
    return {name for name, _ in messages(program.as_text())}


def spec(array: jax.Array) -> tuple[Any, ...]:
    """How an array is spread, without the axes behind the last one that is."""
    entries = list(array.sharding.spec)
    while entries and entries[-1] is None:
        entries.pop()
    return tuple(entries)


def operands() -> tuple[Array, Array, Array]:
    """Of ``interpolate``: images and grids for every item, one affine for all."""
    return (
        random_array(0, ITEMS, 1, 4, 5),
        random_affine(1, 1, 2),
        small_displacement(2, ITEMS, (4, 5), 0.3),
    )


def loss(*operands: Any) -> Any:
    return jnp.sum(jnp.sin(jaxreg.interpolate(*operands)))


gradient = jax.grad(loss, (0, 1, 2))


def assert_all_close(actual: Any, expected: Any) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert_close(np.asarray(a), np.asarray(b), np.float64)


@pytest.mark.parametrize("name", ALL_OPS)
def test_each_device_works_on_its_own_items(name: str, axis_type: AxisType) -> None:
    """Forward and backward, without a word to the others, to the last bit."""
    options = {"reduction": "none"} if name in (*LOSSES, *FIELD_LOSSES) else {}
    cases = [example(name, seed=seed, **options) for seed in range(2)]
    batches = [np.concatenate(pair) for pair in zip(*(c.operands for c in cases), strict=True)]
    function = cases[0].bind(getattr(jaxreg, name))
    calls = [lambda *ops: (function(*ops),)]
    if cases[0].differentiable:
        loss = lambda *ops: jnp.sum(jnp.sin(function(*ops)))  # noqa: E731
        calls.append(jax.grad(loss, cases[0].differentiable))
    spread = [put(batch, mesh(axis_type), "batch") for batch in batches]
    for whole in calls:
        program = compiled(whole, *spread)
        assert not collectives(program)
        for result, expected in zip(program(*spread), jax.jit(whole)(*batches), strict=True):
            assert spec(result) == ("batch",)
            assert_same(np.asarray(result), np.asarray(expected))


def test_the_gradient_of_an_operand_for_all_items_is_summed_over_devices(
    axis_type: AxisType,
) -> None:
    image, affine, grid = operands()
    devices = mesh(axis_type)
    spread = put(image, devices, "batch"), put(affine, devices), put(grid, devices, "batch")
    program = compiled(gradient, *spread)
    assert collectives(program) == {"all-reduce"}
    results = program(*spread)
    assert [spec(result) for result in results] == [("batch",), (), ("batch",)]
    assert_all_close(results, jax.jit(gradient)(image, affine, grid))


def loss_batches(name: str) -> list[Array]:
    """Two images of four items, and a mask by which they weigh differently, one of them nothing."""
    cases = [example(name, seed=seed) for seed in range(2)]
    batches = [np.concatenate(pair) for pair in zip(*(c.operands for c in cases), strict=True)]
    mask = np.random.default_rng(3).random((ITEMS, 1, *batches[0].shape[2:]))
    return [*batches, mask * np.reshape([1, 0, 2, 3], (ITEMS, *[1] * (mask.ndim - 1)))]


def value_and_gradients(name: str, **options: Any) -> Function:
    """Of the loss of two images and, optionally, a mask, by both images."""

    def loss(pred: Any, target: Any, mask: Any = None) -> Any:
        function = example(name, mask=mask, **options).bind(getattr(jaxreg, name))
        return 1.5 * function(pred, target)

    return jax.value_and_grad(loss, (0, 1))


SCALAR = ("all-reduce", "f64[1]")


@pytest.mark.parametrize("masked", [False, True], ids=["", "mask"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", LOSSES)
def test_devices_tell_each_other_no_more_than_the_loss_of_their_items(
    name: str, reduction: str, masked: bool, axis_type: AxisType
) -> None:
    batches = loss_batches(name)[: 3 if masked else 2]
    both = value_and_gradients(name, reduction=reduction)
    spread = [put(batch, mesh(axis_type), "batch") for batch in batches]
    program = compiled(both, *spread)
    assert messages(program.as_text()) == {SCALAR}
    value, gradients = program(*spread)
    assert [spec(gradient) for gradient in gradients] == [("batch",)] * 2
    expected, expected_gradients = jax.jit(both)(*batches)
    assert_all_close([value, *gradients], [expected, *expected_gradients])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", ["diffusion_loss", "jacobian_loss"])
def test_devices_tell_each_other_no_more_than_what_their_fields_cost(
    name: str, reduction: str, axis_type: AxisType
) -> None:
    fields = np.concatenate([*(example(name, seed=seed).operands[0] for seed in range(2))])
    function = example(name, reduction=reduction).bind(getattr(jaxreg, name))
    both = jax.value_and_grad(lambda field: 1.5 * function(field))
    spread = put(fields, mesh(axis_type), "batch")
    program = compiled(both, spread)
    assert messages(program.as_text()) == {SCALAR}
    value, gradient = program(spread)
    assert spec(gradient) == ("batch",)
    assert_all_close([value, gradient], jax.jit(both)(fields))


@pytest.mark.parametrize("masked", [False, True], ids=["", "mask"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_against_one_target_for_all_devices(
    name: str, masked: bool, axis_type: AxisType
) -> None:
    """On a mesh with a second axis, which has no part in it."""
    devices = mesh(axis_type, batch=2, other=2)
    pred, target, mask = loss_batches(name)
    batches = [pred, target[:1], *([mask] if masked else [])]
    both = value_and_gradients(name)
    spread = [put(b, devices, *(["batch"] if len(b) > 1 else [])) for b in batches]
    program = compiled(both, *spread)
    shape = ",".join(str(size) for size in (1, *batches[1].shape))
    # The gradient of the target is a sum over all items. It may be sent along with the loss.
    ways, sent = zip(*messages(program.as_text()), strict=True)
    assert set(ways) == {"all-reduce"}
    sent = {array for arrays in sent for array in re.findall(r"f64\[[\d,]*\]", arrays)}
    assert sent == {"f64[1]", f"f64[{shape}]"}
    value, gradients = program(*spread)
    assert [spec(gradient) for gradient in gradients] == [("batch",), ()]
    expected, expected_gradients = jax.jit(both)(*batches)
    assert_all_close([value, *gradients], [expected, *expected_gradients])


def test_an_empty_mask_on_every_device_gives_no_loss() -> None:
    pred, target, mask = loss_batches("lncc_loss")
    spread = [put(batch, mesh(), "batch") for batch in (pred, target, 0 * mask)]
    value, gradients = jax.jit(value_and_gradients("lncc_loss"))(*spread)
    assert not value
    assert not any(map(np.any, gradients))


def test_a_weight_that_is_no_number_shows_where_it_does_on_one_device() -> None:
    batches = loss_batches("lncc_loss")
    batches[2][1, 0, 0, 0] = np.nan
    both = jax.jit(value_and_gradients("lncc_loss"))
    value, gradients = both(*[put(batch, mesh(), "batch") for batch in batches])
    expected, expected_gradients = both(*batches)
    assert np.isnan(value)
    assert np.isnan(expected)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        assert_same(np.asarray(gradient), np.asarray(wanted))


@pytest.mark.parametrize("name", LOSSES)
def test_devices_with_a_loss_each_do_not_talk(name: str, axis_type: AxisType) -> None:
    batches = loss_batches(name)
    both = value_and_gradients(name)
    mapped = jax.vmap(both)
    items = [put(batch[:, None], mesh(axis_type), "batch") for batch in batches]
    program = compiled(mapped, *items)
    assert not collectives(program)
    values, gradients = jax.tree.map(np.asarray, program(*items))
    for i, one in enumerate(zip(*(batch[:, None] for batch in batches), strict=True)):
        value, expected = both(*one)
        assert_all_close([values[i], *(g[i] for g in gradients)], [value, *expected])


def test_a_plain_array_joins_one_that_is_spread(axis_type: AxisType) -> None:
    image, affine, grid = operands()
    spread = put(image, mesh(axis_type), "batch")
    assert_all_close(
        jax.jit(gradient)(spread, affine, grid), jax.jit(gradient)(image, affine, grid)
    )


@pytest.mark.parametrize(
    "specs",
    [
        ((("a", "b"),), (), (("a", "b"),)),
        (("a",), (), ()),
        (("a",), (), ("b",)),
        (("a", None, "b"), (), ("a",)),
        ((None, None, "b"), (), ()),
    ],
    ids=["two mesh axes", "one operand", "different axes", "rows as well", "rows"],
)
def test_arrays_may_be_spread_in_any_way(axis_type: AxisType, specs: Any) -> None:
    arrays = operands()
    devices = mesh(axis_type, a=2, b=2)
    spread = [put(array, devices, *spec) for array, spec in zip(arrays, specs, strict=True)]
    assert_all_close(jax.jit(gradient)(*spread), jax.jit(gradient)(*arrays))


@pytest.mark.parametrize(
    ("axes", "groups", "talk"),
    [
        ({"items": 4}, None, {"all-reduce"}),
        ({"groups": 4}, "groups", set()),
        ({"groups": 2, "items": 2}, "groups", {"all-reduce"}),
    ],
    ids=["items", "examples", "both"],
)
def test_vmap_over_examples_of_several_items(
    axis_type: AxisType, axes: dict[str, int], groups: str | None, talk: set[str]
) -> None:
    """The gradient of an unmapped affine is one per example, each on the devices that have it."""
    image, affine, grid = operands()
    images, grids = (np.stack([scale * x for scale in (1, 2, 3, 4)]) for x in (image, grid))
    mapped = jax.vmap(gradient, (0, None, 0))
    devices = mesh(axis_type, **axes)
    items = "items" if "items" in axes else None
    spread = put(images, devices, groups, items), affine, put(grids, devices, groups, items)
    spread = spread[0], put(affine, devices), spread[2]
    program = compiled(mapped, *spread)
    assert collectives(program) == talk
    results = program(*spread)
    per_item = (groups, items) if items else (groups,)
    assert [spec(r) for r in results] == [per_item, (groups,) if groups else (), per_item]
    assert_all_close(results, mapped(images, affine, grids))


def test_examples_and_items_spread_over_the_same_devices() -> None:
    image, affine, grid = operands()
    images, grids = (np.stack([scale * x for scale in (1, 2, 3, 4)]) for x in (image, grid))
    spread = put(images, mesh(), "batch"), put(affine, mesh()), put(grids, mesh(), None, "batch")
    mapped = jax.vmap(gradient, (0, None, 0))
    assert_all_close(jax.jit(mapped)(*spread), mapped(images, affine, grids))


def test_items_that_devices_cannot_share_evenly() -> None:
    """A padded shard must add nothing to the gradient of what all items have in common."""
    image, affine, grid = operands()
    image, grid = image[:3], grid[:3]

    def constrained(image: Any, affine: Any, grid: Any) -> Any:
        sharding = NamedSharding(mesh(), P("batch"))
        image, grid = (jax.lax.with_sharding_constraint(x, sharding) for x in (image, grid))
        return gradient(jnp.exp(image), affine, grid)

    actual = jax.jit(constrained)(image, 1.5 * affine, grid)
    assert_all_close(actual, jax.jit(gradient)(np.exp(image), 1.5 * affine, grid))


def test_devices_share_the_items_of_a_result_that_is_to_be_spread() -> None:
    sharding = NamedSharding(mesh(), P("batch"))
    function = jax.jit(jaxreg.interpolate, out_shardings=sharding)
    program = function.lower(*operands()).compile()
    assert not collectives(program)
    result = program(*operands())
    assert spec(result) == ("batch",)
    assert_same(np.asarray(result), np.asarray(jaxreg.interpolate(*operands())))


def test_the_partitioner_before_shardy() -> None:
    arrays = operands()
    spread = [put(x, mesh(), *s) for x, s in zip(arrays, (("batch",), (), ("batch",)), strict=True)]
    jax.config.update("jax_use_shardy_partitioner", False)
    try:
        program = compiled(gradient, *spread)
        assert collectives(program) == {"all-reduce"}
        assert_all_close(program(*spread), jax.jit(gradient)(*arrays))
    finally:
        jax.config.update("jax_use_shardy_partitioner", True)


def test_a_mean_over_items_needs_all_of_them(axis_type: AxisType) -> None:
    """A device that takes the mean of its own items, or divides by their number, is wrong."""

    def mean(x: Any) -> dict[str, Any]:
        return {
            "output": jnp.mean(x, axis=(1, 2)),
            "grad_x": jnp.ones_like(x) / math.prod(x.shape[1:]),
        }

    def mean_grad(x: Any, grad_output: Any) -> dict[str, Any]:
        return {"grad_x": grad_output[:, None, None] * jnp.ones_like(x) / math.prod(x.shape[1:])}

    x = random_array(0, 2, 4, 5, dtype=np.float32)
    cotangent = random_array(1, 2, dtype=np.float32)
    for groups, items in ((None, "items"), ("groups", None), ("groups", "items")):
        devices = mesh(axis_type, groups=2, items=2)
        for call, arrays in ((mean, (x,)), (mean_grad, (x, cotangent))):
            names = ("x", "grad_output")[: len(arrays)]

            def shapes(*arrays: Any, call: Function = call) -> dict[str, Any]:
                return {name: r.shape for name, r in jax.eval_shape(call, *arrays).items()}

            specs = ((groups, items), (groups,))
            spread = [put(a, devices, *s) for a, s in zip(arrays, specs, strict=False)]

            def run(arrays: Any, call: Function = call) -> Any:
                return call(*arrays.values())

            function = spread_over_devices(run, names, shapes, Reduction(), {}, None)
            results = jax.jit(function)(*spread)
            expected = call(*arrays)
            assert results.keys() == expected.keys()
            for name, result in results.items():
                assert_close(np.asarray(result), np.asarray(expected[name]), np.float32)


SHARD_MAPS: dict[str, tuple[dict[str, int], dict[str, Any]]] = {
    "one axis": ({"batch": 4}, {}),
    "one axis of two": ({"batch": 2, "other": 2}, {}),
    "the other is automatic": ({"batch": 2, "other": 2}, {"axis_names": {"batch"}}),
}


@pytest.mark.parametrize("kind", SHARD_MAPS)
def test_shard_map_sums_what_replicated_operands_receive(kind: str, axis_type: AxisType) -> None:
    """Over all devices, whether the gradient is taken outside of ``shard_map`` or inside."""
    axes, options = SHARD_MAPS[kind]
    arrays, devices = operands(), mesh(axis_type, **axes)
    split, everywhere = P("batch"), P()
    specs = (split, everywhere, split)
    spread = [put(array, devices, *spec) for array, spec in zip(arrays, specs, strict=True)]
    function = jax.shard_map(
        jaxreg.interpolate, mesh=devices, in_specs=specs, out_specs=split, **options
    )
    assert_all_close([jax.jit(function)(*spread)], [jaxreg.interpolate(*arrays)])
    outside = jax.grad(lambda *operands: jnp.sum(jnp.sin(function(*operands))), (0, 1, 2))
    inside = jax.shard_map(gradient, mesh=devices, in_specs=specs, out_specs=specs, **options)
    expected = jax.jit(gradient)(*arrays)
    for sharded in (outside, inside):
        assert_all_close(jax.jit(sharded)(*spread), expected)


def exported(function: Function, *operands: Any) -> Any:
    """Stored, loaded and jitted."""
    export = jax.export.export(jax.jit(function), disabled_checks=jaxreg.export_checks())
    return jax.jit(jax.export.deserialize(export(*operands).serialize()).call)


def test_a_shard_map_can_be_exported() -> None:
    arrays, devices = operands(), mesh()
    specs = (P("batch"), P(), P("batch"))
    spread = [put(array, devices, *spec) for array, spec in zip(arrays, specs, strict=True)]
    function = jax.shard_map(gradient, mesh=devices, in_specs=specs, out_specs=specs)
    assert_all_close(exported(function, *spread)(*spread), jax.jit(gradient)(*arrays))


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_of_all_items_can_be_exported_under_shard_map(name: str) -> None:
    batches = loss_batches(name)[:2]
    spread = [put(batch, mesh(), "batch") for batch in batches]
    function = example(name).bind(getattr(jaxreg, name))
    of_all = jax.shard_map(
        lambda *images: jax.lax.pmean(function(*images), "batch"),
        mesh=mesh(),
        in_specs=P("batch"),
        out_specs=P(),
    )
    value, gradients = exported(jax.value_and_grad(of_all, (0, 1)), *spread)(*spread)
    expected, expected_gradients = jax.value_and_grad(function, (0, 1))(*batches)
    assert_all_close([value, *gradients], [expected, *expected_gradients])


def test_jax_refuses_to_export_what_jit_is_to_spread(axis_type: AxisType) -> None:
    """Documented with ``export_checks``: to be revised when this no longer holds."""
    image, affine, grid = operands()
    spread = put(image, mesh(axis_type), "batch"), affine, put(grid, mesh(axis_type), "batch")
    with pytest.raises(NotImplementedError, match="serialization of host_callbacks"):
        exported(gradient, *spread)


def test_a_scan_over_spread_arrays_keeps_them_where_they_are() -> None:
    """As the updates of a registration of several pairs at once."""
    image, affine, grid = operands()

    def descend(image: Any, affine: Any, grid: Any) -> Any:
        def step(grid: Any, _: Any) -> Any:
            return grid - 0.1 * jax.grad(loss, 2)(image, affine, grid), None

        return jax.lax.scan(step, grid, length=3)[0]

    spread = put(image, mesh(), "batch"), put(affine, mesh()), put(grid, mesh(), "batch")
    program = compiled(descend, *spread)
    assert not collectives(program)
    result = program(*spread)
    assert spec(result) == ("batch",)
    assert_same(np.asarray(result), np.asarray(jax.jit(descend)(image, affine, grid)))
