"""``jaxreg`` under JAX's transformations."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.ad_checkpoint
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from examples import ALL_OPS, EXCHANGEABLE, OPS, WITHOUT_GRADIENT, Example, example
from inputs import assert_close, assert_same, random_array

import jaxreg

Array = np.ndarray
Function = Callable[..., Any]

# The fused ops; conversions are ordinary array operations, with every derivative JAX has.
FUSED = [name for name in OPS if name != "convert_displacement"]


@pytest.fixture(autouse=True, params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], ids=str)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every test runs in double precision on each kind of device."""
    with jax.enable_x64(True), jax.default_device(jax.devices(request.param)[0]):
        yield request.param


def assert_equal(actual: Any, expected: Any) -> None:
    """To the last bit on the CPU; on a GPU, gradients of images are sums of atomics."""
    actual, expected = jnp.asarray(actual), jnp.asarray(expected)
    if {d.platform for d in actual.devices()} == {"cpu"}:
        assert_same(np.asarray(actual), np.asarray(expected))
    else:
        assert_close(np.asarray(actual), np.asarray(expected), expected.dtype)


def bound(case: Example) -> Function:
    return case.bind(getattr(jaxreg, case.name))


def weighted_sum(case: Example) -> Function:
    """A scalar function of the operands whose gradients tell every output element apart."""
    function = bound(case)

    def loss(*operands: Any) -> Any:
        value = function(*operands)
        weight = np.cos(np.arange(value.size)).astype(value.dtype).reshape(value.shape)
        return jnp.sum(weight * value)

    return loss


def subsets(count: int) -> list[tuple[int, ...]]:
    """Every way to choose at least one of ``count`` operands."""
    return [s for k in range(1, count + 1) for s in itertools.combinations(range(count), k)]


CHOICES = [(name, chosen) for name in OPS for chosen in subsets(example(name).count)]


@pytest.mark.parametrize("name", ALL_OPS)
def test_jit_changes_nothing(name: str) -> None:
    case = example(name)
    function = bound(case)
    assert_equal(jax.jit(function)(*case.operands), function(*case.operands))


@pytest.mark.parametrize(("name", "chosen"), CHOICES)
def test_gradients_of_any_choice_of_operands_are_those_of_all(
    name: str, chosen: tuple[int, ...]
) -> None:
    case = example(name)
    loss = weighted_sum(case)
    everything = jax.grad(loss, argnums=tuple(range(case.count)))(*case.operands)
    gradients = jax.grad(loss, argnums=chosen)(*case.operands)
    for k, gradient in zip(chosen, gradients, strict=True):
        if name in EXCHANGEABLE:
            assert_close(np.asarray(gradient), np.asarray(everything[k]), np.float64)
        else:
            assert_equal(gradient, everything[k])
        assert np.any(gradient)


def shapes_from_kernels(jaxpr: Any) -> list[tuple[int, ...]]:
    """Shapes of all that foreign calls return, however deep in a traced function."""
    shapes = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "ffi_call":
            shapes += [output.aval.shape for output in equation.outvars]
        for parameter in equation.params.values():
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                shapes += shapes_from_kernels(inner)
    return shapes


@pytest.mark.parametrize("chosen", subsets(3))
def test_only_the_gradients_asked_for_are_computed(chosen: tuple[int, ...]) -> None:
    """No kernel of the backward pass returns the gradient of an operand that is held fixed."""
    image, affine, _ = example("interpolate").operands
    grid = example("interpolate", shape=(2, 6, 3)).operands[2]
    operands = (image, affine, grid)
    gradient = jax.grad(lambda *ops: jnp.sum(jaxreg.interpolate(*ops)), argnums=chosen)
    shapes = shapes_from_kernels(jax.make_jaxpr(gradient)(*operands).jaxpr)
    assert shapes
    for k, operand in enumerate(operands):
        produced = any(shape[-operand.ndim :] == operand.shape for shape in shapes)
        assert produced == (k in chosen), shapes


def mapped_operands(name: str, mapped: tuple[int, ...], size: int = 3) -> list[Array]:
    """The op's operands, those numbered ``mapped`` with a leading axis of ``size`` examples."""
    seeds = [example(name, seed=seed).operands for seed in range(size)]
    return [
        np.stack([operands[k] for operands in seeds]) if k in mapped else seeds[0][k]
        for k in range(len(seeds[0]))
    ]


def in_axes(count: int, mapped: tuple[int, ...]) -> tuple[int | None, ...]:
    return tuple(0 if k in mapped else None for k in range(count))


def one_by_one(function: Function, operands: list[Array], mapped: tuple[int, ...]) -> list[Any]:
    """The function on each example by itself."""
    size = len(operands[mapped[0]])
    return [
        function(*[op[i] if k in mapped else op for k, op in enumerate(operands)])
        for i in range(size)
    ]


@pytest.mark.parametrize(("name", "mapped"), CHOICES)
def test_vmap_is_a_loop_for_values_and_gradients(name: str, mapped: tuple[int, ...]) -> None:
    """``vmap`` of the op and of its gradients, over every choice of mapped operands.

    A gradient of an operand that is not mapped is still one per example.
    """
    case = example(name)
    everything = tuple(range(case.count))
    function = bound(case)
    gradient = jax.grad(weighted_sum(case), argnums=everything)

    def both(*operands: Any) -> Any:
        return function(*operands), *gradient(*operands)

    operands = mapped_operands(name, mapped)
    actual = jax.jit(jax.vmap(both, in_axes(case.count, mapped)))(*operands)
    expected = one_by_one(jax.jit(both), operands, mapped)
    for result, results in zip(actual, zip(*expected, strict=True), strict=True):
        assert_close(np.asarray(result), np.stack(results), np.float64)


@pytest.mark.parametrize(
    ("name", "mapped"),
    [(name, chosen) for name in WITHOUT_GRADIENT for chosen in subsets(example(name).count)],
)
def test_vmap_is_a_loop_for_ops_without_a_gradient(name: str, mapped: tuple[int, ...]) -> None:
    """Every result that it can be asked for."""
    more = {
        "interpolate_labels": {"return_weights": True},
        "invert_displacement": {"return_residual": True},
    }
    options = example(name, **more.get(name, {})).options
    function = functools.partial(getattr(jaxreg, name), **options)
    operands = mapped_operands(name, mapped)
    actual = jax.jit(jax.vmap(function, in_axes(len(operands), mapped)))(*operands)
    expected = one_by_one(jax.jit(function), operands, mapped)
    each = zip(*map(jax.tree.leaves, expected), strict=True)
    for result, results in zip(jax.tree.leaves(actual), each, strict=True):
        assert_same(np.asarray(result), np.stack(results))


@pytest.mark.parametrize(("name", "mapped"), CHOICES)
def test_the_gradient_of_a_vmap_sums_what_unmapped_operands_receive(
    name: str, mapped: tuple[int, ...]
) -> None:
    case = example(name)
    everything = tuple(range(case.count))
    loss = weighted_sum(case)
    operands = mapped_operands(name, mapped)

    def total(*args: Any) -> Any:
        return jnp.sum(jax.vmap(loss, in_axes(case.count, mapped))(*args))

    actual = jax.jit(jax.grad(total, argnums=everything))(*operands)
    expected = one_by_one(jax.jit(jax.grad(loss, argnums=everything)), operands, mapped)
    for k in everything:
        each = np.stack([gradients[k] for gradients in expected])
        assert_close(np.asarray(actual[k]), each if k in mapped else each.sum(axis=0), np.float64)


def test_vmap_with_an_operand_of_batch_one_among_batches_of_two() -> None:
    """The broadcast inside an example and the mapping over examples are two different axes."""
    image, affine, grid = example("interpolate").operands
    image, grid = image[:1], np.stack([grid, 0.5 * grid, -grid])

    def loss(image: Any, affine: Any, grid: Any) -> Any:
        return jnp.sum(jnp.sin(jaxreg.interpolate(image, affine, grid)))

    gradient = jax.grad(loss, argnums=(0, 1, 2))
    actual = jax.vmap(gradient, (None, None, 0))(image, affine, grid)
    expected = one_by_one(gradient, [image, affine, grid], (2,))
    for result, results in zip(actual, zip(*expected, strict=True), strict=True):
        assert_close(np.asarray(result), np.stack(results), np.float64)


def test_nested_vmaps_map_different_operands() -> None:
    case = example("interpolate")
    images = np.stack([example("interpolate", seed=s).operands[0] for s in range(2)])
    grids = np.stack([example("interpolate", seed=s).operands[2] for s in range(3)])
    gradient = jax.grad(weighted_sum(case), argnums=(0, 1, 2))
    inner = jax.vmap(gradient, (0, None, None))
    actual = jax.jit(jax.vmap(inner, (None, None, 0)))(images, case.operands[1], grids)
    for i, j in itertools.product(range(3), range(2)):
        expected = gradient(images[j], case.operands[1], grids[i])
        for k in range(3):
            assert_close(np.asarray(actual[k][i, j]), np.asarray(expected[k]), np.float64)


def test_vmap_over_axes_other_than_the_first() -> None:
    case = example("compose")
    operands = mapped_operands("compose", (0, 1))
    moved = [np.moveaxis(operands[0], 0, 2), np.moveaxis(operands[1], 0, -1), operands[2]]
    actual = jax.vmap(bound(case), in_axes=(2, -1, None), out_axes=1)(*moved)
    expected = np.stack(one_by_one(bound(case), operands, (0, 1)), axis=1)
    assert_close(np.asarray(actual), expected, np.float64)


@pytest.mark.parametrize("name", ALL_OPS)
def test_vmap_over_no_examples_is_empty(name: str) -> None:
    case = example(name)
    operands = [np.zeros((0, *operand.shape), operand.dtype) for operand in case.operands]
    value = jax.vmap(bound(case))(*operands)
    assert value.shape == (0, *case.reference().shape)


@pytest.mark.parametrize("name", OPS)
def test_scan_carries_values_and_gradients(name: str) -> None:
    """One step per scale of the operands, as a loop does it."""
    case = example(name)
    loss = weighted_sum(case)
    scales = np.array([0.5, 0.8, 1.0])

    def scanned(*operands: Any) -> Any:
        def step(total: Any, scale: Any) -> Any:
            return total + loss(*[scale * operand for operand in operands]), None

        return jax.lax.scan(step, 0.0, scales)[0]

    def looped(*operands: Any) -> Any:
        return sum(loss(*[scale * operand for operand in operands]) for scale in scales)

    everything = tuple(range(case.count))
    value, gradients = jax.jit(jax.value_and_grad(scanned, everything))(*case.operands)
    expected, expected_gradients = jax.value_and_grad(looped, everything)(*case.operands)
    assert_close(np.asarray(value), np.asarray(expected), np.float64)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert_close(np.asarray(gradient), np.asarray(expected_gradient), np.float64)


def test_a_registration_loop_lowers_its_loss_inside_jit() -> None:
    fixed = np.zeros((1, 1, 12, 12))
    fixed[..., 3:8, 4:9] = 1
    moving = np.roll(fixed, 1, axis=-1)
    fixed, moving = (np.asarray(jaxreg.gaussian_smooth(i, 1.0)) for i in (fixed, moving))

    def loss(velocity: Any) -> Any:
        displacement = jaxreg.scaling_and_squaring(velocity, 4)
        return jnp.sum((jaxreg.interpolate(moving, None, displacement) - fixed) ** 2)

    @jax.jit
    def register(velocity: Any) -> Any:
        def step(velocity: Any, _: Any) -> Any:
            value, gradient = jax.value_and_grad(loss)(velocity)
            gradient = jaxreg.gaussian_smooth(gradient, 1.0, channel_last=True)
            return velocity - 0.02 * gradient, value

        return jax.lax.scan(step, velocity, length=60)

    velocity, losses = register(jnp.zeros((1, 12, 12, 2)))
    assert losses[-1] < 0.1 * losses[0]
    assert jaxreg.jacobian_determinant(jaxreg.scaling_and_squaring(velocity)).min() > 0


POLICIES = {
    "everything": jax.checkpoint_policies.everything_saveable,
    "nothing": jax.checkpoint_policies.nothing_saveable,
    "products": jax.checkpoint_policies.dots_saveable,
    "by name": jax.checkpoint_policies.save_only_these_names("composed"),
}


@pytest.mark.parametrize("policy", POLICIES)
def test_remat_recomputes_the_same_gradient(policy: str) -> None:
    case = example("compose")

    def loss(*operands: Any) -> Any:
        composed = jax.ad_checkpoint.checkpoint_name(bound(case)(*operands), "composed")
        return jnp.sum(jnp.sin(composed @ jnp.eye(3)))

    plain = jax.grad(loss, (0, 1, 2))(*case.operands)
    checkpointed = jax.checkpoint(loss, policy=POLICIES[policy])
    rematerialised = jax.jit(jax.grad(checkpointed, (0, 1, 2)))(*case.operands)
    for a, b in zip(plain, rematerialised, strict=True):
        assert_equal(a, b)


@pytest.mark.parametrize("earlier", subsets(3))
def test_a_gradient_does_not_depend_on_which_were_asked_for_before(
    earlier: tuple[int, ...],
) -> None:
    """Traces are kept and used again, by ``vmap`` and ``checkpoint`` in particular."""
    jax.clear_caches()
    case = example("interpolate")
    loss, operands = weighted_sum(case), case.operands
    expected = jax.grad(loss, (0, 1, 2))(*operands)
    jax.grad(loss, earlier)(*operands)
    transformed = {
        "plain": jax.grad(loss, (0, 1, 2)),
        "jit": jax.jit(jax.grad(loss, (0, 1, 2))),
        "checkpoint": jax.grad(jax.checkpoint(loss), (0, 1, 2)),
        "vmap": jax.grad(
            lambda i, a, g: jax.vmap(loss, (None, None, 0))(i, a, g[None])[0], (0, 1, 2)
        ),
    }
    for name, gradient in transformed.items():
        for actual, wanted in zip(gradient(*operands), expected, strict=True):
            message = f"{name} after gradients of operands {earlier}"
            np.testing.assert_allclose(actual, wanted, atol=1e-12, err_msg=message)


def test_shapes_and_dtypes_are_known_without_running() -> None:
    image = jax.ShapeDtypeStruct((2, 3, 5, 6, 7), np.float32)
    grid = jax.ShapeDtypeStruct((1, 4, 5, 6, 3), np.float32)
    out = jax.eval_shape(lambda i, g: jaxreg.interpolate(i, None, g), image, grid)
    assert (out.shape, out.dtype) == ((2, 3, 4, 5, 6), np.float32)


@pytest.mark.parametrize("name", OPS)
def test_single_precision_stays_single_where_double_is_enabled(name: str) -> None:
    case = example(name, dtype=np.float32)
    assert bound(case)(*case.operands).dtype == np.float32
    for gradient in jax.grad(weighted_sum(case), tuple(range(case.count)))(*case.operands):
        assert gradient.dtype == np.float32


@pytest.mark.parametrize("name", ALL_OPS)
def test_numpy_arrays_are_arrays(name: str) -> None:
    case = example(name)
    from_jax = bound(case)(*[jnp.asarray(operand) for operand in case.operands])
    assert_equal(bound(case)(*case.operands), from_jax)


@pytest.mark.parametrize("name", FUSED)
def test_differentiating_the_gradient_by_its_cotangent(name: str) -> None:
    case = example(name)
    cotangent = random_array(0, *case.reference().shape)

    def pulled_back(weight: Any) -> Any:
        _, pullback = jax.vjp(bound(case), *case.operands)
        return sum(jnp.sum(gradient) for gradient in pullback(weight))

    if name == "mind_ssc":
        with pytest.raises(NotImplementedError, match="mind_ssc: forward mode"):
            jax.grad(pulled_back)(cotangent)
        return
    actual = jax.grad(pulled_back)(cotangent)
    # The gradient is linear in its cotangent, so this difference is exact.
    direction = random_array(1, *cotangent.shape)
    expected = pulled_back(cotangent + direction) - pulled_back(cotangent)
    assert_close(np.asarray(jnp.sum(actual * direction)), np.asarray(expected), np.float64)


def test_an_option_that_is_traced_is_refused_by_name() -> None:
    """Options are part of the compiled function and cannot depend on its arguments."""
    (x,) = example("gaussian_smooth").operands
    with pytest.raises(TypeError, match=r"\bsigma\b"):
        jax.jit(lambda sigma: jaxreg.gaussian_smooth(x, sigma))(1.0)


def test_options_may_be_static_arguments_of_jit() -> None:
    image, affine, grid = example("interpolate").operands
    jitted = jax.jit(jaxreg.interpolate, static_argnames=("padding_mode", "out_shape", "mode"))
    for options in ({"padding_mode": "border"}, {"mode": "nearest", "out_shape": (3, 4, 5)}):
        actual = jitted(image, affine, grid, **options)
        assert_equal(actual, jaxreg.interpolate(image, affine, grid, **options))


def test_gradients_have_the_structure_of_the_parameters() -> None:
    image, affine, grid = example("interpolate").operands
    weighted = weighted_sum(example("interpolate"))

    def loss(parameters: dict[str, Any]) -> Any:
        return weighted(image, parameters["affine"], *parameters["fields"])

    gradient = jax.grad(loss)({"affine": affine, "fields": [grid]})
    _, expected_affine, expected_grid = jax.grad(weighted, (0, 1, 2))(image, affine, grid)
    assert_equal(gradient["affine"], expected_affine)
    assert_equal(gradient["fields"][0], expected_grid)


def test_loops_and_branches_with_a_condition_on_the_result() -> None:
    """A field is halved until the image it gives is close to the unwarped one."""
    image, _, grid = example("interpolate").operands

    def distance(grid: Any) -> Any:
        return jnp.mean((jaxreg.interpolate(image, None, grid) - image) ** 2)

    scales = [0.5**k for k in range(8)]
    limit = float(distance(scales[4] * grid)) * 1.01
    halved = jax.jit(
        lambda grid: jax.lax.while_loop(lambda g: distance(g) > limit, lambda g: g / 2, grid)
    )(grid)
    assert_equal(halved, scales[4] * grid)

    shrunk = jax.lax.fori_loop(0, 3, lambda _, g: g - jax.grad(distance)(g), grid)
    expected = grid
    for _ in range(3):
        expected = expected - jax.grad(distance)(expected)
    assert_close(np.asarray(shrunk), np.asarray(expected), np.float64)

    def branched(grid: Any, branch: Any) -> Any:
        return jax.lax.cond(branch, distance, lambda g: 2 * distance(g), grid)

    slope = jax.jit(jax.grad(branched))
    assert_close(np.asarray(slope(grid, True)), np.asarray(jax.grad(distance)(grid)), np.float64)
    assert_equal(slope(grid, False), 2 * slope(grid, True))


def test_a_donated_buffer_may_hold_the_result() -> None:
    image, _, grid = example("interpolate").operands

    def step(grid: Any) -> Any:
        return grid - jax.grad(lambda g: jnp.sum(jaxreg.interpolate(image, None, g) ** 2))(grid)

    expected = jax.jit(step)(grid)
    donated = jnp.array(grid)
    assert_equal(jax.jit(step, donate_argnums=0)(donated), expected)
    assert donated.is_deleted()


@pytest.mark.parametrize("name", OPS)
def test_without_double_precision_numpy_arrays_become_single(name: str) -> None:
    """As for every function of JAX."""
    case, single = example(name), example(name, dtype=np.float32)
    with jax.enable_x64(False):
        gradient = jax.grad(weighted_sum(case), tuple(range(case.count)))
        assert_equal(bound(case)(*case.operands), bound(case)(*single.operands))
        for a, b in zip(gradient(*case.operands), gradient(*single.operands), strict=True):
            assert a.dtype == np.float32
            assert_equal(a, b)


@pytest.mark.parametrize("name", OPS)
def test_an_exported_function_can_be_stored_called_and_differentiated(name: str) -> None:
    case = example(name)
    loss = jax.jit(weighted_sum(case))
    exported = jax.export.export(loss, disabled_checks=jaxreg.export_checks())(*case.operands)
    loaded = jax.export.deserialize(exported.serialize(vjp_order=1)).call
    assert_equal(loaded(*case.operands), loss(*case.operands))
    everything = tuple(range(case.count))
    gradients = jax.grad(loaded, everything)(*case.operands)
    expected = jax.grad(loss, everything)(*case.operands)
    for gradient, wanted in zip(gradients, expected, strict=True):
        assert_close(np.asarray(gradient), np.asarray(wanted), np.float64)


def test_a_function_can_be_exported_for_a_device_that_is_not_there() -> None:
    case = example("compose")
    gradient = jax.jit(jax.grad(weighted_sum(case), (0, 1, 2)))
    exported = jax.export.export(
        gradient, platforms=["cpu", "cuda"], disabled_checks=jaxreg.export_checks()
    )(*case.operands)
    assert exported.platforms == ("cpu", "cuda")
    assert "@jaxreg.compose_grad(" in exported.mlir_module()
    only_here = jax.export.deserialize(exported.serialize()).call(*case.operands)
    for a, b in zip(only_here, gradient(*case.operands), strict=True):
        assert_equal(a, b)


def test_one_array_may_be_passed_twice() -> None:
    """The gradient is then the sum of both, also under jit and vmap."""
    field = 0.1 * jnp.asarray(random_array(0, 2, 5, 6, 2, dtype=np.float32))

    def loss(u: jax.Array, v: jax.Array) -> jax.Array:
        return jaxreg.compose(u[None], v[None]).sum()

    both = jax.vmap(jax.grad(loss, (0, 1)))(field, field)
    for gradient in (
        jax.vmap(jax.grad(lambda u: loss(u, u)))(field),
        jax.jit(jax.vmap(jax.grad(lambda u: loss(u, u))))(field),
    ):
        np.testing.assert_allclose(gradient, both[0] + both[1], rtol=1e-5, atol=1e-5)


def test_symbolic_shapes_are_refused_in_one_sentence() -> None:
    (size,) = jax.export.symbolic_shape("n")
    function = jax.jit(lambda x: jaxreg.gaussian_smooth(x, 1.0))
    image = jax.ShapeDtypeStruct((1, 1, size, 6), np.float32)
    message = r"gaussian_smooth: x: .* got \(1, 1, n, 6\): symbolic shapes are not supported"
    with pytest.raises(NotImplementedError, match=message):
        jax.export.export(function, disabled_checks=jaxreg.export_checks())(image)
