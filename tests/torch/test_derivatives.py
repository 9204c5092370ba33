"""Forward mode, and derivatives of derivatives, of ``torchreg``."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import pytest
import torch
from derivative_cases import OTHERS, SAMPLES, DerivativeCase
from examples import LOSSES, OPS, Example, example
from inputs import assert_close, random_array, small_displacement
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

import jaxreg
import torchreg

Array = np.ndarray
Tensor = torch.Tensor
Function = Callable[..., Any]

TWICE = [name for name in OPS if name != "mind_ssc"]
SAME_AGAIN = 1e-12
"""How far gradients may differ from run to run: those of images add up in any order on a GPU."""
CUBIC = ["cubic", "b-spline"]
MAIN = ["interpolate", "compose", "affine_warp", "gaussian_smooth", *LOSSES]


@pytest.fixture(autouse=True, params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], ids=str)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every test runs on each kind of device."""
    with torch.device(request.param):
        yield request.param


def bound(case: Example) -> Function:
    return case.bind(getattr(torchreg, case.name))


def tensors(*arrays: Array) -> tuple[Tensor, ...]:
    return tuple(torch.tensor(x) for x in arrays)


def gentle(name: str, **options: Any) -> Example:
    """An example whose voxels keep their volume, more or less: its logarithm is steep near 0."""
    if name != "jacobian_loss":
        return example(name, **options)
    return Example(name, (small_displacement(1, 2, (3, 4, 5), 0.05, np.float64),))


def check(function: Function, *operands: Array) -> None:
    """Both modes and the second derivatives of all combinations, against differences."""
    leaves = [x.requires_grad_() for x in tensors(*operands)]
    # Batched ones need the older `vmap`, which is refused.
    options: dict[str, Any] = {
        "fast_mode": True,
        "check_batched_grad": False,
        "atol": 1e-5,
        "nondet_tol": SAME_AGAIN,
    }
    assert torch.autograd.gradcheck(
        function, leaves, check_forward_ad=True, check_batched_forward_grad=False, **options
    )
    assert torch.autograd.gradgradcheck(
        function, leaves, check_fwd_over_rev=True, check_rev_over_rev=True, **options
    )


def numbers(values: Any) -> list[Array]:
    leaves = values if isinstance(values, tuple | list) else [values]
    return [np.asarray(x.numpy(force=True) if isinstance(x, Tensor) else x) for x in leaves]


@pytest.mark.parametrize("name", TWICE)
def test_first_and_second_derivatives(name: str) -> None:
    case = gentle(name)
    check(bound(case), *case.operands)


@pytest.mark.parametrize("name", ["interpolate", "affine_warp", "lncc_loss"])
def test_every_second_derivative(name: str) -> None:
    """One by one, not along one direction."""
    case = example(name, shape=(2, 3))
    leaves = [x.requires_grad_() for x in tensors(*(x[:1] for x in case.operands))]
    assert torch.autograd.gradgradcheck(
        bound(case), leaves, check_fwd_over_rev=True, nondet_tol=SAME_AGAIN
    )


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("padding_mode", ["zeros", "border", "reflection"])
@pytest.mark.parametrize("name", ["interpolate", "compose"])
def test_of_samples_in_the_plane(name: str, padding_mode: str, align_corners: bool) -> None:
    case = example(
        name, shape=(4, 5), padding_mode=padding_mode, align_corners=align_corners, seed=1
    )
    check(bound(case), *case.operands)


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("padding_mode", ["zeros", "border", "reflection"])
def test_of_samples_in_space(padding_mode: str, align_corners: bool) -> None:
    """Of one image for two fields, where the affine comes last."""
    options = {"padding_mode": padding_mode, "align_corners": align_corners}
    case = example("interpolate", shape=(2, 3, 3), affine_last=True, seed=3, **options)
    image, affine, grid = case.operands
    check(bound(case), image[:1], affine, grid)


@pytest.mark.parametrize("case", [*OTHERS, *SAMPLES], ids=str)
def test_of_calls_with_few_operands_in_space_and_with_masks(case: DerivativeCase) -> None:
    function = case.bind(getattr(torchreg, case.name), torch.tensor)
    check(function, *case.operands().values())


def sampling(**options: Any) -> tuple[Function, Array, Array, Array]:
    case = example("interpolate", shape=(4, 5), seed=2)
    return lambda *operands: torchreg.interpolate(*operands, **options), *case.operands


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
    fixed = tensors(affine, grid)
    check(lambda image: function(image, *fixed), image)


def test_of_samples_of_an_image_with_an_axis_of_one_voxel() -> None:
    function, image, affine, grid = sampling()
    check(function, image[:, :, :1], affine, grid)


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
@pytest.mark.parametrize("name", ["interpolate", "compose"])
def test_of_cubic_samples_in_space(name: str, mode: str) -> None:
    case = example(name, mode=mode)
    check(bound(case), *case.operands)


@pytest.mark.parametrize("mode", CUBIC)
def test_of_cubic_samples_of_an_image_with_an_axis_of_one_voxel(mode: str) -> None:
    function, image, affine, grid = sampling(mode=mode)
    check(function, image[:, :, :1], affine, grid)


@pytest.mark.parametrize("mode", CUBIC)
def test_of_cubic_samples_where_the_affine_comes_last(mode: str) -> None:
    check(*sampling(mode=mode, affine_last=True))


def test_of_samples_of_coefficients() -> None:
    check(*sampling(mode="b-spline", prefilter=False))


@pytest.mark.parametrize("mode", CUBIC)
def test_hessians_of_a_sample_are_the_differences_of_its_slopes(mode: Any) -> None:
    """By all routes."""
    (image,) = tensors(random_array(0, 1, 1, 9, 9))
    position, step = torch.tensor([0.25, -0.6], dtype=torch.float64), 1e-5

    def value(position: Tensor) -> Tensor:
        return torchreg.interpolate(
            image, grid=(position / 4)[None, None, None], is_displacement=False, mode=mode
        ).sum()

    slope = grad(value)
    steps = step * torch.eye(2, dtype=torch.float64)
    moved = [(slope(position + d) - slope(position - d)) / (2 * step) for d in steps]
    expected = torch.stack(moved).numpy(force=True)
    for name, route in ROUTES.items():
        actual = route(value)(position).numpy(force=True)
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-8, err_msg=name)


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
    "masked-bins": ("mutual_information_loss", {"mask": True}),
    "b-spline": ("mutual_information_loss", {"kernel": "b-spline", "reduction": "sum"}),
    "normalised": ("mutual_information_loss", {"normalised": True, "sigma_ratio": 2.0}),
    "energies": ("diffusion_loss", {"reduction": "none", "spacing": (0.5, 2.0)}),
}


@pytest.mark.parametrize("key", LOSS_OPTIONS)
def test_of_losses(key: str) -> None:
    name, options = LOSS_OPTIONS[key]
    if "mask" in options:
        (mask,) = tensors(abs(random_array(7, 2, 1, 4, 5)))
        options = options | {"mask": mask}
    case = example(name, shape=(4, 5), **options)
    check(bound(case), *case.operands)
    if case.count > 1:
        pred, target = case.operands
        check(bound(case), pred[:1], target)
        (constant,) = tensors(target)  # which no gradient is asked for, and a second one is by
        check(lambda pred: bound(case)(pred, constant), pred)


def products(framework: Any, function: Function, operands: Any, tangents: Any) -> list[Any]:
    """A tangent, and a Hessian's product by forward over reverse mode, in either package."""
    everything = tuple(range(len(operands)))

    def loss(*operands: Any) -> Any:
        return (function(*operands) ** 2).sum()

    gradient = framework.grad(loss, everything)
    value, tangent = framework.jvp(function, operands, tangents)
    return [value, tangent, *framework.jvp(gradient, operands, tangents)[1]]


@pytest.mark.parametrize("name", TWICE)
def test_both_packages_have_the_same(name: str, device: str) -> None:
    case = gentle(name)
    along = tuple(random_array(k, *x.shape) for k, x in enumerate(case.operands))
    actual = products(torch.func, bound(case), tensors(*case.operands), tensors(*along))
    in_jax = case.bind(getattr(jaxreg, name))
    with jax.enable_x64(True), jax.default_device(jax.devices(device)[0]):
        call = jax.jit(functools.partial(products, jax, in_jax))
        expected = numbers(call(tuple(map(jax.numpy.asarray, case.operands)), along))
    for a, b in zip(numbers(actual), expected, strict=True):
        assert_close(a, b, np.float64)


@pytest.mark.parametrize("name", TWICE)
def test_values_are_those_of_a_call_without_derivatives(name: str) -> None:
    case = gentle(name)
    operands = tensors(*case.operands)
    expected = bound(case)(*operands)
    value, _ = jvp(bound(case), operands, operands)
    torch.testing.assert_close(value, expected, rtol=0, atol=0)
    leaves = [x.clone().requires_grad_() for x in operands]
    first = torch.autograd.grad(bound(case)(*leaves).sum(), leaves)
    again = torch.autograd.grad(bound(case)(*leaves).sum(), leaves, create_graph=True)
    for a, b in zip(again, first, strict=True):
        # On CUDA, gradients of images are sums of atomics.
        assert_close(a.numpy(force=True), b.numpy(force=True), np.float64)
        assert a.is_cuda or torch.equal(a, b)


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
    first, *others = tensors(*(operand[:1] for operand in case.operands))
    scales = torch.tensor([0.5, 0.75, 1.0], dtype=torch.float64)

    def mapped(first: Tensor, *others: Tensor) -> Tensor:
        return vmap(lambda scale: function(scale * first, *others))(scales).sin().sum()

    def one_by_one(first: Tensor, *others: Tensor) -> Tensor:
        return sum(function(scale * first, *others).sin().sum() for scale in scales)

    everything = tuple(range(case.count))
    tangents = tensors(*(random_array(k, *x.shape) for k, x in enumerate((first, *others))))

    def products(loss: Function) -> list[Tensor]:
        operands = (first, *others)
        gradient = grad(loss, everything)

        def slope(*operands: Tensor) -> Tensor:
            return sum((g * t).sum() for g, t in zip(gradient(*operands), tangents, strict=True))

        return [
            jvp(loss, operands, tangents)[1],
            *jvp(gradient, operands, tangents)[1],
            *grad(slope, everything)(*operands),
        ]

    expected = numbers(products(one_by_one))
    for a, b in zip(numbers(products(mapped)), expected, strict=True):
        assert_close(a, b, np.float64)

    def each(scale: Tensor) -> list[Tensor]:
        return products(lambda first, *others: function(scale * first, *others).sin().sum())

    for a, b in zip(numbers(vmap(each)(scales)), expected, strict=True):
        assert_close(a.sum(0), b, np.float64)


ROUTES: dict[str, Callable[[Function], Function]] = {
    "hessian": hessian,
    "reverse": lambda cost: jacrev(jacrev(cost)),
    "forward": lambda cost: jacfwd(jacfwd(cost)),
    "mixed": lambda cost: jacrev(jacfwd(cost)),
    "autograd": lambda cost: functools.partial(torch.autograd.functional.hessian, cost),
}


@pytest.mark.parametrize("loss", [torchreg.lncc_loss, torchreg.mutual_information_loss])
def test_the_hessian_of_a_small_affine(loss: Function) -> None:
    """By all routes, and by differences of gradients."""
    moving, fixed = tensors(*(random_array(seed, 1, 1, 6, 7) for seed in (0, 1)))
    affine = torch.tensor([[[0.913, 0.052, 0.037], [-0.043, 0.957, 0.061]]], dtype=torch.float64)
    bounds = ((-1.5, 1.5), (-1.5, 1.5))
    options = {"value_range": bounds} if loss is torchreg.mutual_information_loss else {}

    def cost(affine: Tensor) -> Tensor:
        return loss(torchreg.interpolate(moving, affine), fixed, **options)

    gradient, step = grad(cost), 1e-6
    columns = []
    for k in range(affine.numel()):
        moved = torch.zeros_like(affine)
        moved.view(-1)[k] = step
        columns.append((gradient(affine + moved) - gradient(affine - moved)) / (2 * step))
    expected = torch.stack([column.ravel() for column in columns], -1).numpy(force=True)
    for name, route in ROUTES.items():
        actual = route(cost)(affine).reshape(affine.numel(), -1).numpy(force=True)
        np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-7, err_msg=name)
        np.testing.assert_allclose(actual, actual.T, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("name", [*MAIN, "jacobian_determinant"])
def test_third_derivatives(name: str) -> None:
    """Nested forward modes, of which PyTorch's rule for one would lose those around it.

    The tangents of tangents are zeros that nobody has written to memory.
    """
    case = example(name, shape=(3, 4))
    operands = tensors(*case.operands)
    along = tensors(*(random_array(k, *x.shape) for k, x in enumerate(case.operands)))

    def along_line(step: Tensor) -> Tensor:
        moved = [x + step * t for x, t in zip(operands, along, strict=True)]
        return bound(case)(*moved).square().sum()

    at = torch.zeros((), dtype=torch.float64)
    third = jacfwd(jacfwd(jacfwd(along_line)))(at)
    step, second = 1e-5, jacfwd(jacfwd(along_line))
    expected = (second(at + step) - second(at - step)) / (2 * step)
    torch.testing.assert_close(third, expected, rtol=1e-5, atol=1e-5)
    for route in (jacrev(jacfwd(jacrev(along_line))), grad(grad(grad(along_line)))):
        torch.testing.assert_close(route(at), third, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", TWICE)
def test_forward_and_reverse_mode_agree_at_kinks(name: str) -> None:
    """At whole numbers of voxels, where a field is 0 and an affine the identity."""
    case = gentle(name)
    still = {"affine": np.eye(3, 4)[None].repeat(2, 0), "grid": 0.0, "v": 0.0, "displacement": 0.0}
    names = {"interpolate": ("image", "affine", "grid"), "compose": ("u", "v", "affine")}
    operands = tensors(
        *(
            np.broadcast_to(still.get(x, operand), operand.shape)
            for x, operand in zip(names.get(name, ("",) * case.count), case.operands, strict=True)
        )
    )
    tangents = tensors(*(random_array(k, *x.shape) for k, x in enumerate(operands)))
    value, pushed = jvp(bound(case), operands, tangents)
    (cotangent,) = tensors(random_array(9, *value.shape))
    pulled = torch.func.vjp(bound(case), *operands)[1](cotangent)
    inner = sum((a * b).sum() for a, b in zip(pulled, tangents, strict=True))
    torch.testing.assert_close((pushed * cotangent).sum(), inner, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", MAIN)
def test_dual_numbers_have_the_tangents_of_jvp(name: str) -> None:
    case = example(name)
    operands = tensors(*case.operands)
    for chosen in range(case.count):
        tangent = torch.cos(operands[chosen])

        def of_one(x: Tensor, chosen: int = chosen) -> Tensor:
            return bound(case)(*operands[:chosen], x, *operands[chosen + 1 :])

        _, expected = jvp(of_one, (operands[chosen],), (tangent,))
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(operands[chosen], tangent)
            actual = forward_ad.unpack_dual(of_one(dual)).tangent
        assert actual is not None
        assert_close(actual.numpy(force=True), expected.numpy(force=True), np.float64)


@pytest.mark.parametrize("name", MAIN)
def test_linearize_gives_the_tangents_of_jvp(name: str) -> None:
    case = example(name)
    operands = tensors(*case.operands)
    _, expected = jvp(bound(case), operands, operands)
    _, linear = torch.func.linearize(bound(case), *operands)
    torch.testing.assert_close(linear(*operands), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["interpolate", "gaussian_smooth", *LOSSES])
def test_tangents_have_the_dtype_of_the_result(name: str) -> None:
    case = example(name)
    operands = tuple(
        x.to(torch.bfloat16 if x.ndim == 5 else torch.float32) for x in tensors(*case.operands)
    )
    value, tangent = jvp(bound(case), operands, operands)
    assert tangent.dtype == value.dtype
    gradient = grad(lambda *ops: bound(case)(*ops).float().square().sum())
    _, moved = jvp(gradient, operands, operands)
    assert moved.dtype == operands[0].dtype
    assert moved.float().isfinite().all()


def test_a_constant_that_was_changed_is_noticed() -> None:
    """Where a first derivative does without it, it may change before that."""
    pred, target = tensors(*example("lncc_loss").operands)
    pred.requires_grad_()
    value = torchreg.lncc_loss(pred, target, kernel_size=3)
    target.zero_()
    (slope,) = torch.autograd.grad(value, pred, retain_graph=True)
    assert slope.abs().max() > 0
    with pytest.raises(RuntimeError, match=r"lncc_loss: target: .*inplace"):
        torch.autograd.grad(value, pred, create_graph=True)


def test_one_tensor_may_be_passed_twice() -> None:
    (field,) = tensors(0.1 * random_array(0, 1, 4, 5, 2))
    check(lambda u: torchreg.compose(u, u), field.numpy(force=True))


REFUSED = (
    "torchreg: {}(: forward mode is not supported| can be differentiated once, not twice) "
    r"within torch\.compile"
)


@pytest.mark.parametrize("name", MAIN)
def test_compiled_derivatives_are_refused_or_right(name: str) -> None:
    torch._dynamo.reset()
    case = example(name)
    operands = tensors(*case.operands)

    def loss(*operands: Tensor) -> Tensor:
        return bound(case)(*operands).square().sum()

    derivatives: dict[str, Function] = {
        "forward": lambda *x: jvp(bound(case), x, x)[1],
        "second": grad(lambda *x: grad(loss)(*x).sum()),
        "product": lambda *x: jvp(grad(loss), x, x)[1],
    }
    for function in derivatives.values():
        expected = function(*operands)
        for whole in (False, True):
            compiled = torch.compile(function, backend="aot_eager", fullgraph=whole)
            try:
                actual = compiled(*operands)
            except (RuntimeError, NotImplementedError) as error:
                # PyTorch tells what the error is that it has met; not all of its releases do.
                if "torchreg: " in str(error) or torch.__version__ >= (2, 13):
                    assert re.search(REFUSED.format(name), str(error))
                continue
            torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def refused_tangents(function: Function, x: Tensor) -> dict[str, Function]:
    return {
        "jvp": lambda: jvp(function, (x,), (x,)),
        "of-vmap": lambda: jvp(vmap(function), (x[None],), (x[None],)),
        "vmap": lambda: vmap(lambda x: jvp(function, (x,), (x,)))(x[None]),
        "of-grad": lambda: jvp(
            lambda x: grad(lambda y: (function(x).sum() * y).sum())(x), (x,), (x,)
        ),
    }


@pytest.mark.parametrize("mode", ["jvp", "of-vmap", "vmap", "of-grad"])
def test_a_tangent_of_a_constant_is_refused_by_name(mode: str) -> None:
    pred, target = tensors(*example("lncc_loss", shape=(4, 5)).operands)

    def of_mask(mask: Tensor) -> Tensor:
        return torchreg.lncc_loss(pred, target, mask=mask)

    with pytest.raises(ValueError, match=r"lncc_loss: mask: expected a tensor without a tangent"):
        refused_tangents(of_mask, pred.abs())[mode]()


@pytest.mark.parametrize("mode", ["jvp", "of-vmap", "vmap", "of-grad"])
def test_forward_mode_of_what_has_no_derivative_is_refused(mode: str) -> None:
    """In every place among transforms: a tangent that got lost would be zero."""
    pred, target = tensors(*example("joint_histogram", shape=(4, 5)).operands)

    def histogram(x: Tensor) -> Tensor:
        return torchreg.joint_histogram(x, target, num_bins=6)

    with pytest.raises(NotImplementedError, match="joint_histogram: forward mode"):
        refused_tangents(histogram, pred)[mode]()
