"""Forward mode, and derivatives of derivatives, of ``jaxreg``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from derivative_cases import OTHERS, SAMPLES_TO_COMPILE, DerivativeCase
from examples import LOSSES, OPS, Example, example
from inputs import assert_close, random_array, small_displacement
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

import jaxreg

Array = np.ndarray
Function = Callable[..., Any]

TWICE = [name for name in OPS if name != "mind_ssc"]
CUBIC = ["cubic", "b-spline"]
OF_IMAGES = ["interpolate", "gaussian_smooth", *LOSSES]


@pytest.fixture(autouse=True, params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], ids=str)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every test runs in double precision on each kind of device."""
    with jax.enable_x64(True), jax.default_device(jax.devices(request.param)[0]):
        yield request.param


def bound(case: Example) -> Function:
    return case.bind(getattr(jaxreg, case.name))


def gentle(name: str, **options: Any) -> Example:
    """An example whose voxels keep their volume, more or less: its logarithm is steep near 0."""
    if name != "jacobian_loss":
        return example(name, **options)
    return Example(name, (small_displacement(1, 2, (3, 4, 5), 0.05, np.float64),))


STEP = 1e-6  # so small that no sample moves to another cell


def check(function: Function, *operands: Any) -> None:
    """Tangents and all kinds of second derivatives, along one direction, against differences."""
    along = tuple(random_array(k, *x.shape) for k, x in enumerate(operands))
    argnums = tuple(range(len(operands)))

    def loss(*operands: Any) -> Any:
        value = function(*operands)
        return jnp.sum(jnp.cos(jnp.arange(value.size)).reshape(value.shape) * value)

    gradient = jax.grad(loss, argnums)

    def slope(*operands: Any) -> Any:
        return sum(jnp.vdot(*pair) for pair in zip(gradient(*operands), along, strict=True))

    def derivatives(*operands: Any) -> Any:
        return (
            jax.jvp(function, operands, along)[1],
            jax.jvp(gradient, operands, along)[1],
            jax.grad(slope, argnums)(*operands),
            jax.grad(lambda *x: jax.jvp(loss, x, along)[1], argnums)(*operands),
        )

    sides = jax.jit(lambda *operands: (function(*operands), gradient(*operands)))
    after, before = (
        sides(*(x + step * t for x, t in zip(operands, along, strict=True)))
        for step in (STEP, -STEP)
    )
    tangent, moved = jax.tree.map(lambda a, b: (a - b) / (2 * STEP), after, before)
    pushed, *kinds = jax.jit(derivatives)(*operands)
    np.testing.assert_allclose(pushed, tangent, rtol=1e-5, atol=1e-7)
    for kind in kinds:
        for actual, expected in zip(kind, moved, strict=True):
            scale = max(1.0, float(abs(expected).max()))
            np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6 * scale)


@pytest.mark.parametrize(
    "name", ["interpolate", "compose", "affine_warp", "gaussian_smooth", *LOSSES]
)
def test_as_jax_checks_them(name: str) -> None:
    case = example(name, shape=(4, 5))
    function = jax.jit(bound(case))
    check_grads(function, case.operands, 2, ("fwd", "rev"), eps=STEP, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", TWICE)
def test_first_and_second_derivatives(name: str) -> None:
    case = gentle(name)
    check(bound(case), *case.operands)


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("padding_mode", ["zeros", "border", "reflection"])
@pytest.mark.parametrize("name", ["interpolate", "compose"])
def test_of_samples_in_the_plane(name: str, padding_mode: str, align_corners: bool) -> None:
    case = example(
        name, shape=(4, 5), padding_mode=padding_mode, align_corners=align_corners, seed=1
    )
    check(bound(case), *case.operands)


@pytest.mark.parametrize("case", [*OTHERS, *SAMPLES_TO_COMPILE], ids=str)
def test_of_calls_with_few_operands_in_space_and_with_masks(case: DerivativeCase) -> None:
    function = case.bind(getattr(jaxreg, case.name), jnp.asarray)
    check(function, *case.operands().values())


def sampling(**options: Any) -> tuple[Function, Array, Array, Array]:
    case = example("interpolate", shape=(4, 5), seed=2)
    return lambda *operands: jaxreg.interpolate(*operands, **options), *case.operands


def test_of_samples_of_one_image_for_many_fields_and_of_many_for_one() -> None:
    function, image, affine, grid = sampling()
    check(function, image[:1], affine[:1], grid)
    check(function, image, affine, grid[:1])


def test_of_samples_where_the_affine_comes_last() -> None:
    check(*sampling(affine_last=True))


def test_of_samples_by_an_affine_alone() -> None:
    function, image, affine, _ = sampling(out_shape=(3, 6))
    check(function, image, affine)


def test_of_samples_at_coordinates() -> None:
    function, image, _, grid = sampling(is_displacement=False)
    check(lambda image, grid: function(image, None, grid), image, grid)


def test_of_samples_by_a_field_in_another_format() -> None:
    formats = {"grid_unit": "voxel", "grid_channels": "first", "grid_components": "zyx"}
    function, image, affine, grid = sampling(**formats)
    check(function, image, affine, np.ascontiguousarray(np.moveaxis(grid, -1, 1)))


def test_of_samples_of_the_nearest_voxel() -> None:
    function, image, affine, grid = sampling(mode="nearest")
    check(function, image, affine, grid)


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("padding_mode", ["zeros", "border", "reflection"])
@pytest.mark.parametrize("name", ["interpolate", "compose"])
@pytest.mark.parametrize("mode", CUBIC)
def test_of_cubic_samples(mode: str, name: str, padding_mode: str, align_corners: bool) -> None:
    case = example(
        name, shape=(4, 5), mode=mode, padding_mode=padding_mode, align_corners=align_corners
    )
    check(bound(case), *case.operands)


@pytest.mark.parametrize("mode", CUBIC)
def test_of_cubic_samples_in_space(mode: str) -> None:
    case = example("interpolate", mode=mode)
    check(bound(case), *case.operands)


def test_of_cubic_samples_of_an_image_with_an_axis_of_one_voxel() -> None:
    for mode in ("cubic", "b-spline"):
        function, image, affine, grid = sampling(mode=mode)
        check(function, image[:, :, :1], affine, grid)


@pytest.mark.parametrize("mode", CUBIC)
def test_hessians_of_a_sample_are_the_differences_of_its_slopes(mode: str) -> None:
    image = random_array(0, 1, 1, 9, 9)
    position, step = np.array([0.25, -0.6]), 1e-5

    def value(position: Any) -> Any:
        return jaxreg.interpolate(
            image, grid=(position / 4)[None, None, None], is_displacement=False, mode=mode
        ).sum()

    slope = jax.grad(value)
    moved = [(slope(position + d) - slope(position - d)) / (2 * step) for d in step * np.eye(2)]
    np.testing.assert_allclose(jax.hessian(value)(position), np.stack(moved), rtol=0, atol=1e-8)


def test_of_samples_of_an_image_with_an_axis_of_one_voxel() -> None:
    function, image, affine, grid = sampling()
    check(function, image[:, :, :1], affine, grid)


LOSS_OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "map": ("lncc_loss", {"reduction": "none"}),
    "weighted-map": ("lncc_loss", {"reduction": "none", "mask": True}),
    "masked": ("lncc_loss", {"mask": True}),
    "gaussian": ("lncc_loss", {"window": "gaussian", "kernel_size": 5, "reduction": "sum"}),
    "noise": (
        "lncc_loss",
        {
            "window": "triangular",
            "kernel_size": (1, 3),
            "common_variance": 0.1,
            "smooth_product": 1e-3,
            "smooth_nr": 1e-3,
            "both_flat": 1.0,
        },
    ),
    "each": ("mutual_information_loss", {"reduction": "none"}),
    "masked-bins": ("mutual_information_loss", {"mask": True, "reduction": "none"}),
    "b-spline": ("mutual_information_loss", {"kernel": "b-spline", "reduction": "sum"}),
    "normalised": ("mutual_information_loss", {"normalised": True, "sigma_ratio": 2.0}),
    "energies": ("diffusion_loss", {"reduction": "none", "spacing": (0.5, 2.0)}),
}


@pytest.mark.parametrize("key", LOSS_OPTIONS)
def test_of_losses(key: str) -> None:
    name, options = LOSS_OPTIONS[key]
    if "mask" in options:
        options = options | {"mask": abs(random_array(7, 2, 1, 4, 5))}
    case = example(name, shape=(4, 5), **options)
    check(bound(case), *case.operands)
    if case.count > 1:
        pred, target = case.operands
        check(bound(case), pred[:1], target)


@pytest.mark.parametrize(
    "name,options",
    [
        *(pytest.param(name, {}, id=name) for name in TWICE),
        *(
            pytest.param(name, {"mode": mode}, id=f"{name}-{mode}")
            for name in ("interpolate", "compose")
            for mode in CUBIC
        ),
    ],
)
def test_vmap_of_derivatives_and_derivatives_of_vmap(name: str, options: dict[str, Any]) -> None:
    """With operands that are not mapped."""
    case = gentle(name, **options)
    function = bound(case)
    first, *others = (operand[:1] for operand in case.operands)
    scales = np.array([0.5, 0.75, 1.0])

    def mapped(first: Any, *others: Any) -> Any:
        return jax.vmap(lambda scale: function(scale * first, *others))(scales)

    def loss(first: Any, *others: Any) -> Any:
        return jnp.sum(jnp.sin(mapped(first, *others)))

    def one_by_one(first: Any, *others: Any) -> Any:
        return sum(jnp.sum(jnp.sin(function(scale * first, *others))) for scale in scales)

    argnums = tuple(range(case.count))
    tangents = tuple(random_array(k, *x.shape) for k, x in enumerate((first, *others)))

    def products(loss: Function) -> Function:
        gradient = jax.grad(loss, argnums)
        return lambda *operands: (
            jax.jvp(loss, operands, tangents)[1],
            jax.jvp(gradient, operands, tangents)[1],
        )

    actual = jax.jit(products(loss))(first, *others)
    expected = jax.jit(products(one_by_one))(first, *others)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert_close(np.asarray(a), np.asarray(b), np.float64)

    def each(scale: Any) -> Any:
        return products(lambda *ops: jnp.sum(jnp.sin(function(scale * ops[0], *ops[1:]))))(
            first, *others
        )

    of_each = jax.jit(jax.vmap(each))(scales)
    for a, b in zip(jax.tree.leaves(of_each), jax.tree.leaves(expected), strict=True):
        assert_close(np.asarray(a.sum(0)), np.asarray(b), np.float64)


@pytest.mark.parametrize("loss", [jaxreg.lncc_loss, jaxreg.mutual_information_loss])
def test_the_hessian_of_a_small_affine(loss: Function) -> None:
    """By four routes, and by differences of gradients."""
    moving, fixed = (random_array(seed, 1, 1, 6, 7) for seed in (0, 1))
    affine = jnp.asarray([[[0.913, 0.052, 0.037], [-0.043, 0.957, 0.061]]])
    bounds = ((-1.5, 1.5), (-1.5, 1.5))
    options = {"value_range": bounds} if loss is jaxreg.mutual_information_loss else {}

    def cost(affine: Any) -> Any:
        return loss(jaxreg.interpolate(moving, affine), fixed, **options)

    routes = {
        "hessian": jax.hessian(cost),
        "reverse": jax.jacrev(jax.jacrev(cost)),
        "forward": jax.jacfwd(jax.jacfwd(cost)),
        "mixed": jax.jit(jax.jacrev(jax.jacfwd(cost))),
    }
    gradient, step = jax.jit(jax.grad(cost)), 1e-6
    columns = []
    for k in range(affine.size):
        moved = step * np.eye(affine.size)[k].reshape(affine.shape)
        columns.append((gradient(affine + moved) - gradient(affine - moved)) / (2 * step))
    expected = np.stack([np.ravel(column) for column in columns], -1)
    for name, route in routes.items():
        actual = np.asarray(route(affine)).reshape(affine.size, affine.size)
        np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-7, err_msg=name)
        np.testing.assert_allclose(actual, actual.T, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("name", TWICE)
def test_forward_and_reverse_mode_agree_at_kinks(name: str) -> None:
    """At whole numbers of voxels, where a field is 0 and an affine the identity."""
    case = gentle(name)
    still = {"affine": np.eye(3, 4)[None].repeat(2, 0), "grid": 0.0, "v": 0.0, "displacement": 0.0}
    names = {"interpolate": ("image", "affine", "grid"), "compose": ("u", "v", "affine")}
    operands = tuple(
        np.broadcast_to(still.get(x, operand), operand.shape)
        for x, operand in zip(names.get(name, ("",) * case.count), case.operands, strict=True)
    )
    function = bound(case)
    value, pull_back = jax.vjp(function, *operands)
    tangents = tuple(random_array(k, *x.shape) for k, x in enumerate(operands))
    _, pushed = jax.jvp(function, operands, tangents)
    cotangent = random_array(9, *value.shape)
    pulled = pull_back(jnp.asarray(cotangent))
    inner = sum(np.vdot(a, b) for a, b in zip(pulled, tangents, strict=True))
    assert_close(np.vdot(pushed, cotangent), np.asarray(inner), np.float64)


@pytest.mark.parametrize("name", TWICE)
def test_linearize_gives_the_tangents_of_jvp(name: str) -> None:
    case = gentle(name)
    function = jax.jit(bound(case))
    _, expected = jax.jvp(function, case.operands, case.operands)
    _, linear = jax.linearize(function, *case.operands)
    assert_close(np.asarray(linear(*case.operands)), np.asarray(expected), np.float64)


@pytest.mark.parametrize("name", OF_IMAGES)
def test_tangents_have_the_dtype_of_the_result(name: str) -> None:
    case = example(name)
    operands = [jnp.asarray(x, jnp.bfloat16 if x.ndim == 5 else np.float32) for x in case.operands]
    value, tangent = jax.jvp(bound(case), operands, operands)
    assert tangent.dtype == value.dtype
    gradient = jax.grad(lambda *ops: jnp.sum(bound(case)(*ops).astype(np.float32) ** 2))
    _, moved = jax.jvp(gradient, operands, operands)
    assert moved.dtype == operands[0].dtype
    assert jnp.isfinite(moved.astype(np.float32)).all()


def test_under_scan_and_checkpoint() -> None:
    """Also where JAX has split a loop for reverse mode, and differentiates that."""
    moving, fixed = (random_array(seed, 1, 1, 6, 7) for seed in (0, 1))
    field = 0.1 * random_array(2, 1, 6, 7, 2)

    def cost(u: Any) -> Any:
        return jaxreg.lncc_loss(jaxreg.interpolate(moving, grid=u), fixed, kernel_size=3)

    def product(cost: Function) -> Any:
        return jax.jvp(jax.grad(cost), (field,), (field,))[1]

    def steps(u: Any) -> Any:
        return jax.lax.scan(lambda v, _: (v - jax.grad(cost)(v), cost(v)), u, None, length=2)[
            1
        ].sum()

    def unrolled(u: Any) -> Any:
        v = u - jax.grad(cost)(u)
        return cost(u) + cost(v)

    for one, other in ((jax.checkpoint(cost), cost), (steps, unrolled)):
        actual, expected = (np.asarray(product(function)) for function in (one, other))
        assert_close(actual, expected, np.float64)


def test_of_the_items_of_each_device_in_shard_map() -> None:
    """The types of tangents say along which axes they differ from device to device."""
    devices = jax.devices()[:1]
    mesh = jax.make_mesh((1,), ("items",), (jax.sharding.AxisType.Auto,), devices=devices)
    case = example("interpolate")
    image, affine, grid = case.operands

    def cost(image: Any, affine: Any, grid: Any) -> Any:
        return jax.lax.psum(jnp.sum(jnp.sin(jaxreg.interpolate(image, affine, grid))), "items")

    spread = jax.shard_map(cost, mesh=mesh, in_specs=(P("items"), P(), P("items")), out_specs=P())
    operands = (image, affine[:1], grid)

    def plain(*operands: Any) -> Any:
        return jnp.sum(jnp.sin(jaxreg.interpolate(*operands)))

    argnums = (0, 1, 2)
    for function in (spread, jax.jit(spread)):
        _, tangent = jax.jvp(function, operands, operands)
        _, moved = jax.jvp(jax.grad(function, argnums), operands, operands)
        _, wanted = jax.jvp(plain, operands, operands)
        _, wanted_moved = jax.jvp(jax.grad(plain, argnums), operands, operands)
        for a, b in zip((tangent, *moved), (wanted, *wanted_moved), strict=True):
            assert_close(np.asarray(a), np.asarray(b), np.float64)


FORWARD_MODES: dict[str, Callable[[Function, Array], Any]] = {
    "jvp": lambda function, x: jax.jvp(function, (x,), (x,)),
    "jvp-jit": lambda function, x: jax.jit(lambda x: jax.jvp(function, (x,), (x,)))(x),
    "linearize": lambda function, x: jax.linearize(function, x)[1](x),
    "linearize-jit": lambda function, x: jax.linearize(jax.jit(function), x)[1](x),
    "jacfwd": lambda function, x: jax.jacfwd(function)(x),
    "vmap": lambda function, x: jax.vmap(lambda x: jax.jvp(function, (x,), (x,)))(x[None]),
}


@pytest.mark.parametrize("mode", FORWARD_MODES)
def test_forward_mode_of_what_has_none_is_refused_by_name(mode: str) -> None:
    (image,) = example("mind_ssc", shape=(4, 5)).operands
    with pytest.raises(NotImplementedError, match=r"jaxreg: mind_ssc: forward mode .* jax\.grad"):
        FORWARD_MODES[mode](jaxreg.mind_ssc, jnp.asarray(image))


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.vmap])
def test_second_derivatives_of_what_has_none_are_refused_by_name(wrap: Any) -> None:
    (image,) = example("mind_ssc", shape=(4, 5)).operands
    images = jnp.asarray(image)[None] if wrap is jax.vmap else jnp.asarray(image)
    slope = jax.grad(lambda x: jnp.sum(jaxreg.mind_ssc(x) ** 2))
    with pytest.raises(NotImplementedError, match="jaxreg: mind_ssc can be differentiated once"):
        wrap(jax.grad(lambda x: jnp.sum(slope(x) ** 2)))(images)


@pytest.mark.parametrize("mode", FORWARD_MODES)
def test_a_tangent_of_a_constant_is_refused_by_name(mode: str) -> None:
    case = example("lncc_loss", shape=(4, 5))
    pred, target = case.operands
    with pytest.raises(TypeError, match=r"lncc_loss: mask: .*stop_gradient"):
        FORWARD_MODES[mode](
            lambda mask: jaxreg.lncc_loss(pred, target, mask=mask), jnp.asarray(abs(pred))
        )
