"""``jaxreg`` under JAX's transformations."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from examples import OPS, Example, example
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
        weight = jnp.cos(jnp.arange(value.size, dtype=value.dtype)).reshape(value.shape)
        return jnp.sum(weight * value)

    return loss


def subsets(count: int) -> list[tuple[int, ...]]:
    """Every way to choose at least one of ``count`` operands."""
    return [s for k in range(1, count + 1) for s in itertools.combinations(range(count), k)]


CHOICES = [(name, chosen) for name in OPS for chosen in subsets(example(name).count)]


@pytest.mark.parametrize("name", OPS)
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


@pytest.mark.parametrize("name", OPS)
def test_vmap_over_no_examples_is_empty(name: str) -> None:
    case = example(name)
    operands = [np.zeros((0, *operand.shape)) for operand in case.operands]
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


def test_remat_recomputes_the_same_gradient() -> None:
    case = example("compose")
    loss = weighted_sum(case)
    plain = jax.grad(loss, (0, 1, 2))(*case.operands)
    rematerialised = jax.jit(jax.grad(jax.checkpoint(loss), (0, 1, 2)))(*case.operands)
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


@pytest.mark.parametrize("name", OPS)
def test_numpy_arrays_are_arrays(name: str) -> None:
    case = example(name)
    from_jax = bound(case)(*[jnp.asarray(operand) for operand in case.operands])
    assert_equal(bound(case)(*case.operands), from_jax)


@pytest.mark.parametrize("name", FUSED)
def test_differentiating_twice_is_refused(name: str) -> None:
    """By the same or another operand: there is no wrong second derivative, and no silent zero."""
    case = example(name)
    loss = weighted_sum(case)
    for first, second in itertools.product(range(case.count), repeat=2):

        def slope(*operands: Any, first: int = first) -> Any:
            return jnp.sum(jnp.sin(jax.grad(loss, argnums=first)(*operands)))

        with pytest.raises((TypeError, NotImplementedError), match="twice"):
            jax.grad(slope, argnums=second)(*case.operands)


@pytest.mark.parametrize("name", FUSED)
def test_differentiating_the_gradient_by_its_cotangent_is_refused_or_right(name: str) -> None:
    case = example(name)
    cotangent = random_array(0, *case.reference().shape)

    def pulled_back(weight: Any) -> Any:
        _, pullback = jax.vjp(bound(case), *case.operands)
        return sum(jnp.sum(gradient) for gradient in pullback(weight))

    try:
        actual = jax.grad(pulled_back)(cotangent)
    except (TypeError, NotImplementedError) as error:
        assert "differentiat" in str(error).lower()
        return
    # The gradient is linear in its cotangent, so this difference is exact.
    direction = random_array(1, *cotangent.shape)
    expected = pulled_back(cotangent + direction) - pulled_back(cotangent)
    assert_close(np.asarray(jnp.sum(actual * direction)), np.asarray(expected), np.float64)


@pytest.mark.parametrize("name", FUSED)
def test_forward_mode_is_refused(name: str) -> None:
    case = example(name)
    with pytest.raises((TypeError, NotImplementedError), match=r"(?i)forward|jvp|differentiat"):
        jax.jvp(bound(case), case.operands, case.operands)


def test_an_option_that_is_traced_is_refused_by_name() -> None:
    """Options are part of the compiled function and cannot depend on its arguments."""
    (x,) = example("gaussian_smooth").operands
    with pytest.raises(TypeError, match=r"\bsigma\b"):
        jax.jit(lambda sigma: jaxreg.gaussian_smooth(x, sigma))(1.0)


SHARDED = """
import jax, jax.numpy as jnp, numpy as np, jaxreg
from jax.sharding import Mesh, PartitionSpec as P

keys = jax.random.split(jax.random.key(0), 2)
image = jax.random.uniform(keys[0], (4, 1, 4, 5))
grid = 0.2 * jax.random.normal(keys[1], (4, 4, 5, 2))
affine = jnp.eye(2, 3)[None] + 0.05
operands = (image, affine, grid)
split, everywhere = P("batch"), P()
mesh = Mesh(np.array(jax.devices()), ("batch",))
sharded = jax.shard_map(
    jaxreg.interpolate, mesh=mesh, in_specs=(split, everywhere, split), out_specs=split
)

def loss(function):
    return lambda *operands: jnp.sum(jnp.sin(function(*operands)))

assert len(jax.devices()) == 2
assert (jax.jit(sharded)(*operands) == jaxreg.interpolate(*operands)).all()
expected = jax.grad(loss(jaxreg.interpolate), (0, 1, 2))(*operands)
outside = jax.jit(jax.grad(loss(sharded), (0, 1, 2)))(*operands)
inside = jax.jit(jax.shard_map(
    jax.grad(loss(jaxreg.interpolate), (0, 1, 2)),
    mesh=mesh, in_specs=(split, everywhere, split), out_specs=(split, everywhere, split),
))(*operands)
for name, gradients in {"outside": outside, "inside": inside}.items():
    for gradient, wanted in zip(gradients, expected):
        np.testing.assert_allclose(gradient, wanted, atol=1e-5, err_msg=name)
"""


def test_shard_map_sums_what_replicated_operands_receive() -> None:
    """Over all devices, whether the gradient is taken outside of ``shard_map`` or inside."""
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
    done = subprocess.run(
        [sys.executable, "-c", SHARDED],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
