"""``torchreg`` under PyTorch's autograd, dispatcher and storage."""

from __future__ import annotations

import concurrent.futures
import contextlib
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from examples import ALL_OPS, EXCHANGEABLE, OPS, WITHOUT_GRADIENT, Example, example
from inputs import assert_close, random_array
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ConstraintViolationError
from torch.utils._python_dispatch import TorchDispatchMode

import torchreg
from torchreg._ops import exchange

Tensor = torch.Tensor
Function = Callable[..., Tensor]

# The fused ops; conversions are ordinary array operations, with every derivative torch has.
FUSED = [name for name in OPS if name != "convert_displacement"]

# The op that can be differentiated once, in reverse mode.
ONCE = "mind_ssc"

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    """Without this, a function compiled often in other tests is not compiled any more."""
    torch._dynamo.reset()


@pytest.fixture(params=["short", "long"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain calls as this PyTorch has them served, and as one before 2.10 has."""
    if request.param == "long":
        monkeypatch.setattr(exchange, "TENSOR_OPS", {})


def bound(case: Example) -> Function:
    return case.bind(getattr(torchreg, case.name))


def leaves(case: Example, device: str = "cpu") -> list[Tensor]:
    wrt = case.differentiable
    return [
        torch.tensor(op, device=device, requires_grad=k in wrt)
        for k, op in enumerate(case.operands)
    ]


def weights_of(value: Tensor) -> Tensor:
    """A cotangent that tells every output element apart."""
    count = torch.arange(value.numel(), dtype=value.dtype, device=value.device)
    return torch.cos(count).reshape(value.shape)


def value_and_gradients(
    function: Function, operands: Sequence[Tensor], cotangent: Tensor | None = None
) -> list[Tensor]:
    value = function(*operands)
    if not value.requires_grad:
        return [value]
    cotangent = weights_of(value) if cotangent is None else cotangent
    return [value.detach(), *torch.autograd.grad(value, operands, cotangent)]


def assert_equal(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=0)


def assert_rounds_equal(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Up to the order of additions: GPU gradients of images are sums of atomics."""
    for a, e in zip(actual, expected, strict=True):
        assert_close(a.numpy(force=True), e.numpy(force=True), e.numpy(force=True).dtype)


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("name", OPS)
def test_gradients_pass_gradcheck(name: str) -> None:
    case = example(name, shape=(2, 3, 4))
    assert torch.autograd.gradcheck(bound(case), leaves(case))


@pytest.mark.parametrize("padding_mode", ["zeros", "border", "reflection"])
@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_sampling_passes_gradcheck_in_every_mode_and_padding(mode: str, padding_mode: str) -> None:
    image, affine, grid = leaves(example("interpolate", shape=(3, 4)))
    grid = (3 * grid.detach()).requires_grad_()

    def sample(*operands: Tensor) -> Tensor:
        return torchreg.interpolate(*operands, mode=mode, padding_mode=padding_mode)

    assert torch.autograd.gradcheck(sample, (image, affine, grid))


class Recorder(TorchDispatchMode):
    """Keeps every call of an op of this library, and lets it happen."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "torchreg":
            copies = [a.detach().clone() if isinstance(a, Tensor) else a for a in args]
            self.calls.append((func, tuple(copies), dict(kwargs)))
        return func(*args, **kwargs)


def recorded_calls(case: Example, device: str = "cpu") -> list[Any]:
    with Recorder() as recorder:
        value_and_gradients(bound(case), leaves(case, device))
    return recorder.calls


@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("name", ["interpolate", "compose", "scaling_and_squaring"])
def test_kernels_are_told_of_deterministic_algorithms(name: str, asked: bool) -> None:
    torch.use_deterministic_algorithms(asked)
    try:
        calls = recorded_calls(example(name))
    finally:
        torch.use_deterministic_algorithms(False)
    told = {}
    for op, arguments, _ in calls:
        names = [argument.name for argument in op._schema.arguments]
        if "deterministic" in names:
            told[op._schema.name] = arguments[names.index("deterministic")]
    assert len(told) == 2, "an op and its gradient"
    assert set(told.values()) == {asked}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in (*FUSED, *WITHOUT_GRADIENT)),
        *((name, {"reduction": "none"}) for name in ("lncc_loss", "diffusion_loss")),
    ],
)
def test_every_registered_op_passes_opcheck(
    name: str, options: dict[str, str], device: str
) -> None:
    """The forward and the backward ops that a call with gradients goes through.

    There is no backward op where the gradient comes with a scalar loss, or not at all.
    """
    case = example(name, dtype=np.float32, **options)
    calls = recorded_calls(case, device)
    count = 1 if case.reference().ndim == 0 or not case.differentiable else 2
    assert len({str(op) for op, _, _ in calls}) >= count
    for op, args, kwargs in calls:
        torch.library.opcheck(op, args, kwargs)


@pytest.mark.parametrize("name", FUSED)
def test_a_registered_op_has_the_right_gradients_or_refuses(name: str) -> None:
    """Exported programs call it; PyTorch's own default is zero gradients with a mere warning."""
    for op, args, _ in recorded_calls(example(name, shape=(2, 3))):
        tensors = [a.requires_grad_() for a in args if isinstance(a, Tensor)]

        def call(*values: Tensor, op: Any = op, args: tuple[Any, ...] = args) -> Tensor:
            remaining = iter(values)
            *operands, _, grouped = [next(remaining) if isinstance(a, Tensor) else a for a in args]
            return op(*operands, 1, grouped)[0]

        if op.name().endswith("_grad"):
            with pytest.raises(RuntimeError, match="no derivative"):
                call(*tensors)
            continue
        names = [argument.name for argument in op._schema.arguments]
        constants = [a for n, a in zip(names, args, strict=True) if n == "value_range"]
        if constants:
            with pytest.raises(ValueError, match=r"value_range: .*requires no gradient"):
                call(*tensors)
            constants[0].requires_grad_(False)
        assert torch.autograd.gradcheck(call, tensors)


class Module(torch.nn.Module):
    """An op whose last operand depends on a parameter."""

    def __init__(self, case: Example) -> None:
        super().__init__()
        self.function = bound(case)
        self.scale = torch.nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

    def forward(self, *operands: Tensor) -> Tensor:
        return self.function(*operands[:-1], self.scale * operands[-1])


def gradient_of_scale(module: torch.nn.Module, value: Tensor) -> Tensor:
    (parameter,) = module.parameters()
    (gradient,) = torch.autograd.grad((value * weights_of(value.detach())).sum(), parameter)
    return gradient


@pytest.mark.parametrize(("name", "strict"), [*((n, False) for n in FUSED), ("interpolate", True)])
def test_an_exported_program_has_the_same_values_and_gradients(name: str, strict: bool) -> None:
    case = example(name, shape=(3, 4))
    operands = tuple(op.detach() for op in leaves(case))
    module = Module(case)
    program = torch.export.export(module, operands, strict=strict).module()
    other = tuple(op.detach() for op in leaves(example(name, shape=(3, 4), seed=1)))
    actual, expected = program(*other), module(*other)
    assert_equal([actual], [expected])
    assert_equal([gradient_of_scale(program, actual)], [gradient_of_scale(module, expected)])
    with torch.no_grad():
        assert_equal([program(*other)], [expected])


@pytest.mark.parametrize("name", ["interpolate", "scaling_and_squaring"])
def test_a_module_can_be_called_functionally(name: str) -> None:
    case = example(name)
    operands = tuple(op.detach() for op in leaves(case))
    module = Module(case)

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        value = torch.func.functional_call(module, parameters, operands)
        return (value * weights_of(value)).sum()

    actual = torch.func.grad(loss)(dict(module.named_parameters()))["scale"]
    assert_equal([actual], [gradient_of_scale(module, module(*operands))])


def strided_copies(tensor: Tensor) -> dict[str, Tensor]:
    """The same values in other layouts of memory."""
    backwards = tuple(reversed(range(tensor.ndim)))
    permuted = tensor.permute(backwards).contiguous()
    spread = torch.zeros((*tensor.shape, 3), dtype=tensor.dtype, device=tensor.device)
    spread[..., 1] = tensor
    shifted = torch.zeros(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
    shifted[1:] = tensor.flatten()
    return {
        "permuted": permuted.permute(backwards),
        "with gaps": spread[..., 1],
        "not aligned": shifted[1:].view(tensor.shape),
    }


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["permuted", "with gaps", "not aligned"])
@pytest.mark.parametrize("name", ALL_OPS)
def test_operands_and_cotangents_may_have_any_strides(name: str, layout: str, device: str) -> None:
    case = example(name, dtype=np.float32)
    plain = leaves(case, device)
    cotangent = weights_of(bound(case)(*plain).detach())
    expected = value_and_gradients(bound(case), plain, cotangent)
    strided = [strided_copies(op.detach())[layout].requires_grad_(op.requires_grad) for op in plain]
    actual = value_and_gradients(bound(case), strided, strided_copies(cotangent)[layout])
    check = assert_equal if device == "cpu" else assert_rounds_equal
    check(actual, expected)


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", OPS)
def test_operands_and_cotangents_may_be_expanded(name: str, device: str) -> None:
    """With strides of 0, as ``expand`` and ``out.sum().backward()`` make them."""
    case = example(name, dtype=np.float32)
    single = [op[:1].detach() for op in leaves(case, device)]
    expanded = [op.expand(2, *op.shape[1:]).requires_grad_() for op in single]
    repeated = [op.repeat(2, *[1] * (op.ndim - 1)).requires_grad_() for op in single]
    bound(case)(*expanded).sum().backward()
    ones = torch.ones_like(bound(case)(*repeated).detach())
    expected = value_and_gradients(bound(case), repeated, ones)[1:]
    check = assert_equal if device == "cpu" else assert_rounds_equal
    check([op.grad for op in expanded], expected)


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("name", OPS)
def test_a_retained_graph_can_be_used_again(name: str) -> None:
    case = example(name)
    operands = leaves(case)
    value = bound(case)(*operands)
    value.backward(weights_of(value.detach()), retain_graph=True)
    once = [op.grad.clone() for op in operands]
    value.backward(weights_of(value.detach()))
    assert_equal([op.grad for op in operands], [2 * gradient for gradient in once])


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("name", OPS)
def test_gradients_may_be_written_to(name: str) -> None:
    """Also where the cotangent is one, and a gradient may be what was saved for it."""
    case = example(name)
    operands = leaves(case)
    value = bound(case)(*operands).sum()
    gradients = torch.autograd.grad(value, operands, retain_graph=True)
    expected = [gradient.clone() for gradient in gradients]
    for gradient in gradients:
        gradient.zero_()
    assert_equal(torch.autograd.grad(value, operands), expected)


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("name", OPS)
def test_several_cotangents_at_once_are_right_or_refused(name: str) -> None:
    case = example(name)
    operands = leaves(case)
    value = bound(case)(*operands)
    cotangents = torch.stack([weights_of(value.detach()), torch.ones_like(value)])
    one_by_one = [
        torch.autograd.grad(value, operands, each, retain_graph=True) for each in cotangents
    ]
    try:
        together = torch.autograd.grad(value, operands, cotangents, is_grads_batched=True)
    except NotImplementedError as error:
        assert "torch.func.vmap" in str(error)
    else:
        assert_equal(together, [torch.stack(both) for both in zip(*one_by_one, strict=True)])


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("cotangent_needs_gradient", [False, True])
def test_differentiating_twice_is_refused(cotangent_needs_gradient: bool) -> None:
    """Also where another term has a second derivative, and silence would mean a missing part."""
    case = example(ONCE)
    (operand,) = leaves(case)
    value = bound(case)(operand)
    cotangent = weights_of(value.detach()).requires_grad_(cotangent_needs_gradient)
    (slope,) = torch.autograd.grad(value, operand, cotangent, create_graph=True)
    with pytest.raises(RuntimeError, match="torchreg: mind_ssc can be differentiated once"):
        torch.autograd.grad(slope.square().sum() + operand.square().sum(), operand)


@pytest.mark.usefixtures("either_way")
def test_dual_numbers_are_refused() -> None:
    """A tangent that got lost would be a derivative of zero."""
    case = example(ONCE)
    (operand,) = leaves(case)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(operand.detach(), torch.ones_like(operand))
        with pytest.raises(NotImplementedError, match="torchreg: mind_ssc: forward mode"):
            bound(case)(dual)


def test_differentiating_the_gradient_by_its_cotangent_is_refused() -> None:
    case = example(ONCE)
    operands = leaves(case)
    value = bound(case)(*operands)
    cotangent = weights_of(value.detach()).requires_grad_()
    slopes = torch.autograd.grad(value, operands, cotangent, create_graph=True)
    penalty = sum(slope.sum() for slope in slopes) + cotangent.sum()
    with pytest.raises(RuntimeError, match="twice"):
        torch.autograd.grad(penalty, cotangent)


SUBSETS = [
    (name, chosen)
    for name in OPS
    for k in range(1, example(name).count + 1)
    for chosen in itertools.combinations(range(example(name).count), k)
]


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize(("name", "chosen"), SUBSETS)
def test_gradients_of_any_choice_of_operands_are_those_of_all(
    name: str, chosen: tuple[int, ...]
) -> None:
    case = example(name)
    everything = value_and_gradients(bound(case), leaves(case))[1:]
    operands = [op.requires_grad_(k in chosen) for k, op in enumerate(leaves(case))]
    value = bound(case)(*operands)
    value.backward(weights_of(value.detach()))
    check = assert_rounds_equal if name in EXCHANGEABLE else assert_equal
    for k, operand in enumerate(operands):
        if k in chosen:
            check([operand.grad], [everything[k]])
        else:
            assert operand.grad is None


class OutputShapes(TorchDispatchMode):
    """Shapes of all that the ops of this library return."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "torchreg":
            outputs = [result] if isinstance(result, Tensor) else result
            self.shapes += [tuple(o.shape) for o in outputs if isinstance(o, Tensor) and o.numel()]
        return result


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("chosen", [chosen for name, chosen in SUBSETS if name == "interpolate"])
def test_only_the_gradients_asked_for_are_computed(chosen: tuple[int, ...]) -> None:
    """No op of the backward pass returns the gradient of an operand that is held fixed."""
    operands = [
        op.requires_grad_(k in chosen) for k, op in enumerate(leaves(example("interpolate")))
    ]
    value = torchreg.interpolate(*operands)
    with OutputShapes() as outputs:
        value.sum().backward()
    for k, operand in enumerate(operands):
        assert (tuple(operand.shape) in outputs.shapes) == (k in chosen)


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("name", ALL_OPS)
def test_operands_stay_as_they_are(name: str) -> None:
    case = example(name)
    operands = leaves(case)
    value_and_gradients(bound(case), operands)
    for operand, before in zip(operands, case.operands, strict=True):
        np.testing.assert_array_equal(operand.numpy(force=True), before)


@pytest.mark.usefixtures("either_way")
def test_the_result_is_a_tensor_of_its_own() -> None:
    """Even where an op is the identity, writing to its result does not change the operand."""
    field, image = torch.ones(1, 3, 4, 2), torch.ones(1, 1, 3, 4)
    for operand, result in [
        (field, torchreg.scaling_and_squaring(field, 0)),
        (image, torchreg.gaussian_smooth(image, 0)),
        (image, torchreg.interpolate(image)),
    ]:
        result.zero_()
        assert operand.min() == 1


@pytest.mark.usefixtures("either_way")
def test_an_operand_overwritten_before_the_backward_pass_is_noticed() -> None:
    image, affine, grid = leaves(example("interpolate"))
    held = image.detach().clone()
    value = torchreg.interpolate(held, affine, grid)
    held.zero_()
    with pytest.raises(RuntimeError, match="inplace"):
        value.sum().backward()


@pytest.mark.usefixtures("either_way")
def test_no_gradient_is_recorded_where_none_is_wanted() -> None:
    operands = leaves(example("interpolate"))
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert not torchreg.interpolate(*operands).requires_grad
    assert not torchreg.interpolate(*[op.detach() for op in operands]).requires_grad


@pytest.mark.parametrize("name", ALL_OPS)
def test_a_compiled_call_gives_the_same_values_and_gradients(name: str) -> None:
    case = example(name, dtype=np.float32)
    compiled = torch.compile(bound(case), backend="aot_eager", fullgraph=True)
    actual = value_and_gradients(compiled, leaves(case))
    assert_equal(actual, value_and_gradients(bound(case), leaves(case)))


def refused_or_right(compute: Callable[[], Any], expected: Sequence[Tensor]) -> None:
    try:
        actual = compute()
    except (RuntimeError, NotImplementedError, TypeError):
        return
    assert_rounds_equal(actual if isinstance(actual, tuple) else (actual,), expected)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", FUSED)
def test_functional_transforms_are_refused_or_right(name: str, compiled: bool) -> None:
    case = example(name)
    operands = leaves(case)
    everything = tuple(range(case.count))
    value, *gradients = value_and_gradients(bound(case), operands)
    plain = [op.detach() for op in operands]

    def wrap(function: Function) -> Function:
        return torch.compile(function, backend="aot_eager") if compiled else function

    def loss(*args: Tensor) -> Tensor:
        result = bound(case)(*args)
        return (result * weights_of(value)).sum()

    refused_or_right(lambda: wrap(torch.func.grad(loss, everything))(*plain), gradients)
    stacked = [torch.stack([op, op]) for op in plain]
    refused_or_right(
        lambda: wrap(torch.func.vmap(bound(case)))(*stacked), [torch.stack([value, value])]
    )
    refused_or_right(
        lambda: wrap(torch.func.vmap(torch.func.grad(loss, everything)))(*stacked),
        [torch.stack([gradient, gradient]) for gradient in gradients],
    )


@pytest.mark.parametrize("compiled", [False, True])
def test_a_gradient_of_a_gradient_is_refused(compiled: bool) -> None:
    """``torch.func.grad`` of ``torch.func.grad``, traced or not, is no silent zero."""
    case = example(ONCE)
    plain = [op.detach() for op in leaves(case)]

    def slope(*operands: Tensor) -> Tensor:
        return torch.func.grad(lambda *ops: bound(case)(*ops).square().sum())(*operands).sum()

    second = torch.func.grad(slope)
    if compiled:
        second = torch.compile(second, backend="aot_eager")
    with pytest.raises(
        RuntimeError, match=f"torchreg: {ONCE} can be differentiated once, not twice"
    ):
        second(*plain)


@pytest.mark.parametrize("name", FUSED)
def test_differentiating_a_compiled_call_twice_is_refused(name: str) -> None:
    case = example(name)
    operands = leaves(case)
    compiled = torch.compile(bound(case), backend="aot_eager")
    (slope,) = torch.autograd.grad(
        compiled(*operands).square().sum(), operands[0], create_graph=True
    )
    with pytest.raises(RuntimeError, match=rf"torchreg: {name} .*twice|double backward"):
        torch.autograd.grad(slope.square().sum() + operands[0].sum(), operands[0])


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_call_can_be_compiled_where_no_gradient_is_wanted(context: Callable[[], Any]) -> None:
    case = example("interpolate")
    compiled = torch.compile(bound(case), backend="aot_eager", fullgraph=True)
    with context():
        actual = compiled(*leaves(case))
    assert not actual.requires_grad
    assert_equal([actual], [bound(case)(*leaves(case)).detach()])


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("name", ["interpolate", "gaussian_smooth"])
def test_a_compiled_call_follows_changing_shapes(name: str, dynamic: bool | None) -> None:
    function = example(name).bind(getattr(torchreg, name))
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for shape in [(3, 4), (5, 4), (6, 7)]:
        case = example(name, shape=shape)
        actual = value_and_gradients(compiled, leaves(case))
        assert_equal(actual, value_and_gradients(function, leaves(case)))


@pytest.mark.parametrize(
    "name",
    ["interpolate", "compose", "gaussian_smooth", "lncc_loss", "mutual_information_loss"],
)
def test_one_program_serves_all_sizes(name: str) -> None:
    function = example(name).bind(getattr(torchreg, name))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=True)
    programs = []
    # Axes as long as a vector has components, or an affine columns, would count as the same size.
    for shape in [(6, 7, 5), (7, 5, 8), (9, 6, 11)]:
        case = example(name, shape=shape)
        actual = value_and_gradients(compiled, leaves(case))
        assert_equal(actual, value_and_gradients(function, leaves(case)))
        programs.append(counter.frame_count)
    assert len(set(programs)) == 1


def test_a_batch_that_has_to_stay_open_does() -> None:
    compiled = torch.compile(lambda x: torchreg.gaussian_smooth(x, 1.0), backend="aot_eager")
    image = torch.rand(5, 1, 4, 6)
    torch._dynamo.mark_dynamic(image, 0)  # which raises where the size is settled all the same
    assert_equal([compiled(image)], [torchreg.gaussian_smooth(image, 1.0)])


def test_a_size_that_only_one_number_will_do_for_is_settled() -> None:
    compiled = torch.compile(torchreg.affine_warp, backend="aot_eager", dynamic=True)
    affine, displacement = torch.rand(1, 3, 4), torch.rand(5, 3, 4, 6, 3)
    for x in (displacement, displacement[:, :2, :1], displacement[:4]):
        assert_equal([compiled(affine, x)], [torchreg.affine_warp(affine, x)])
    torch._dynamo.reset()
    torch._dynamo.mark_dynamic(affine, 1)
    with pytest.raises(ConstraintViolationError, match="specialized"):
        compiled(affine, displacement)


def test_shapes_that_do_not_fit_are_named_as_they_came_by_a_compiled_call() -> None:
    compiled = torch.compile(torchreg.lncc_loss, backend="aot_eager", dynamic=True)
    with pytest.raises(Exception, match=r"target.*5, 1, 8, 7"):
        compiled(torch.rand(5, 1, 8, 6), torch.rand(5, 1, 8, 7))


def test_a_program_with_open_sizes_can_be_exported() -> None:
    class Warp(torch.nn.Module):
        def forward(self, image: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
            return torchreg.interpolate(image, grid=grid)

    items, rows = torch.export.Dim("items"), torch.export.Dim("rows")
    sizes = {"image": {0: items, 2: rows}, "grid": {0: items, 1: rows}}
    operands = torch.rand(5, 1, 7, 6), 0.1 * torch.rand(5, 7, 6, 2)
    program = torch.export.export(Warp(), operands, dynamic_shapes=sizes).module()
    for image, grid in (operands, (torch.rand(4, 1, 9, 6), 0.1 * torch.rand(4, 9, 6, 2))):
        assert_equal([program(image, grid)], [torchreg.interpolate(image, grid=grid)])


@pytest.mark.parametrize("argument", ["image", "affine", "grid"])
def test_numpy_arrays_are_not_tensors(argument: str) -> None:
    operands = dict(zip(["image", "affine", "grid"], leaves(example("interpolate")), strict=True))
    operands[argument] = operands[argument].numpy(force=True)
    with pytest.raises(TypeError, match=rf"\b{argument}\b"):
        torchreg.interpolate(**operands)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in OPS if example(name).count > 1])
def test_operands_on_different_devices_are_refused(name: str) -> None:
    case = example(name, dtype=np.float32)
    operands = leaves(case)
    operands[-1] = operands[-1].detach().cuda()
    with pytest.raises(ValueError, match=r"device|cuda"):
        bound(case)(*operands)


@pytest.mark.usefixtures("either_way")
@pytest.mark.gpu
@pytest.mark.parametrize("name", ALL_OPS)
def test_work_is_queued_on_the_current_stream(name: str) -> None:
    """A side stream that is busy first: work on another stream would read stale operands."""
    case = example(name, shape=(20, 24, 28), dtype=np.float32)
    expected = value_and_gradients(bound(case), leaves(case, "cuda"))
    stream = torch.cuda.Stream()
    fresh = leaves(case, "cuda")
    late = [torch.zeros_like(op) for op in fresh]
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        operands = [
            (a + b.detach()).requires_grad_(b.requires_grad)
            for a, b in zip(late, fresh, strict=True)
        ]
        actual = value_and_gradients(bound(case), operands)
    torch.cuda.synchronize()
    assert_rounds_equal(actual, expected)


@pytest.mark.usefixtures("either_way")
@pytest.mark.gpu
@pytest.mark.parametrize("name", ALL_OPS)
def test_a_cuda_graph_replays_values_and_gradients(name: str) -> None:
    case, other = (example(name, dtype=np.float32, seed=seed) for seed in (0, 1))
    operands = leaves(case, "cuda")
    value_and_gradients(bound(case), operands)  # whatever a first call sets up
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = value_and_gradients(bound(case), operands)
    with torch.no_grad():
        for operand, values in zip(operands, leaves(other, "cuda"), strict=True):
            operand.copy_(values)
    graph.replay()
    torch.cuda.synchronize()
    assert_rounds_equal(captured, value_and_gradients(bound(other), leaves(other, "cuda")))


@pytest.mark.parametrize("name", FUSED)
def test_vmap_of_a_gradient_is_that_of_each_item(name: str) -> None:
    """With every combination of mapped and unmapped operands."""
    case = example(name)
    plain = [op.detach() for op in leaves(case)]
    everything = tuple(range(case.count))

    def loss(*args: Tensor) -> Tensor:
        return bound(case)(*args).square().sum()

    slope = torch.func.grad(loss, everything)
    for mapped in itertools.product([False, True], repeat=case.count):
        if not any(mapped):
            continue
        operands = [
            torch.stack([op, 0.5 * op]) if m else op for op, m in zip(plain, mapped, strict=True)
        ]
        dims = tuple(0 if m else None for m in mapped)
        actual = torch.func.vmap(slope, in_dims=dims)(*operands)
        each = [
            slope(*(op[i] if m else op for op, m in zip(operands, mapped, strict=True)))
            for i in range(2)
        ]
        for k in everything:
            expected = torch.stack([gradients[k] for gradients in each])
            assert_close(actual[k].numpy(), expected.numpy(), np.float64)


@pytest.mark.parametrize("name", FUSED)
def test_the_gradient_of_a_vmap_is_that_of_each_item(name: str) -> None:
    """By the transform and by ``backward``, an operand that is not mapped included."""
    case = example(name)
    plain = [op.detach() for op in leaves(case)]
    everything = tuple(range(case.count))
    dims = (0,) * (case.count - 1) + (None,) if case.count > 1 else (0,)
    operands = [
        op if dim is None else torch.stack([op, 0.5 * op])
        for op, dim in zip(plain, dims, strict=True)
    ]

    def loss(*args: Tensor) -> Tensor:
        value = torch.func.vmap(bound(case), in_dims=dims)(*args)
        return (value * weights_of(value)).sum()

    def loop(*args: Tensor) -> Tensor:
        items = [
            bound(case)(*(a if dim is None else a[i] for a, dim in zip(args, dims, strict=True)))
            for i in range(2)
        ]
        value = torch.stack(items)
        return (value * weights_of(value)).sum()

    recorded = [op.clone().requires_grad_() for op in operands]
    expected = torch.autograd.grad(loop(*recorded), recorded)
    for actual in (
        torch.func.grad(loss, everything)(*operands),
        torch.autograd.grad(loss(*recorded), recorded),
    ):
        assert_rounds_equal(actual, expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", OPS)
def test_autocast_leaves_full_precision_as_it_is(name: str, device: str) -> None:
    case = example(name, dtype=np.float32)
    with torch.autocast(device, dtype=torch.bfloat16):
        actual = value_and_gradients(bound(case), leaves(case, device))
    assert_rounds_equal(actual, value_and_gradients(bound(case), leaves(case, device)))


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("name", ALL_OPS)
def test_threads_do_not_disturb_each_other(name: str) -> None:
    cases = [example(name, shape=(12, 13, 14), dtype=np.float32, seed=seed) for seed in range(4)]
    expected = [value_and_gradients(bound(case), leaves(case)) for case in cases]
    with concurrent.futures.ThreadPoolExecutor(len(cases)) as threads:
        for _ in range(3):
            for actual, one in zip(
                threads.map(lambda case: value_and_gradients(bound(case), leaves(case)), cases),
                expected,
                strict=True,
            ):
                assert_equal(actual, one)


class Subclass(torch.Tensor):
    """As MONAI's ``MetaTensor`` or torchvision's ``Image``."""


@pytest.mark.usefixtures("either_way")
def test_a_tensor_of_a_subclass_stays_one() -> None:
    case = example("interpolate")
    operands = [op.detach().as_subclass(Subclass).requires_grad_() for op in leaves(case)]
    value = bound(case)(*operands)
    assert type(value) is Subclass
    actual = value_and_gradients(bound(case), operands)
    expected = value_and_gradients(bound(case), leaves(case))
    assert_equal([a.as_subclass(Tensor) for a in actual], expected)


@pytest.mark.parametrize("name", ALL_OPS)
def test_shapes_can_be_had_without_computing(name: str) -> None:
    """With fake tensors and on the device "meta", gradients included."""
    case = example(name, dtype=np.float32)
    expected = [(x.shape, x.dtype) for x in value_and_gradients(bound(case), leaves(case))]
    for mode, device in ((FakeTensorMode(), "cpu"), (contextlib.nullcontext(), "meta")):
        with mode:
            operands = [
                torch.empty_like(op, device=device, requires_grad=op.requires_grad)
                for op in leaves(case)
            ]
            results = value_and_gradients(bound(case), operands)
        assert [(x.shape, x.dtype) for x in results] == expected
        assert all(x.device.type == device for x in results)


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Fills what is allocated with NaN, too: every element of an output has to be written."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("name", OPS)
def test_everything_is_deterministic_on_the_cpu(name: str, deterministic: None) -> None:
    case = example(name)
    results = value_and_gradients(bound(case), leaves(case))
    assert all(x.isfinite().all() for x in results)
    torch.use_deterministic_algorithms(False)
    assert_equal(results, value_and_gradients(bound(case), leaves(case)))


@pytest.mark.usefixtures("either_way")
@pytest.mark.gpu
@pytest.mark.parametrize("name", ALL_OPS)
def test_work_goes_to_the_device_of_the_tensors(name: str) -> None:
    """Whichever device is the current one."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    case = example(name, dtype=np.float32)
    expected = value_and_gradients(bound(case), leaves(case, "cuda:0"))
    with torch.cuda.device(0):
        actual = value_and_gradients(bound(case), leaves(case, "cuda:1"))
        assert torch.cuda.current_device() == 0
    assert {x.device.index for x in actual} == {1}
    assert_rounds_equal(actual, expected)


@pytest.mark.usefixtures("either_way")
def test_lazily_negated_and_zero_tensors_are_what_they_stand_for() -> None:
    image, grid = torch.rand(1, 1, 6, 7), 0.2 * torch.rand(1, 6, 7, 2)
    negated = torchreg.interpolate(torch._neg_view(image), grid=grid)
    assert torch.equal(negated, torchreg.interpolate(-image, grid=grid))
    zeros = torch._efficientzerotensor((1, 1, 6, 7))
    assert torch.equal(torchreg.interpolate(zeros, grid=grid), torch.zeros(1, 1, 6, 7))
    leaf = image.requires_grad_()
    value = torchreg.interpolate(leaf, grid=grid)
    cotangent = torch.rand_like(value)
    (plain,) = torch.autograd.grad(value, leaf, -cotangent, retain_graph=True)
    (lazy,) = torch.autograd.grad(value, leaf, torch._neg_view(cotangent), retain_graph=True)
    assert torch.equal(plain, lazy)


@pytest.mark.usefixtures("either_way")
def test_a_tensor_that_has_left_its_transform_is_a_plain_one() -> None:
    image, grid = torch.rand(1, 1, 6, 7, requires_grad=True), 0.2 * torch.rand(1, 6, 7, 2)
    left: list[Tensor] = []

    def loss(grid: Tensor) -> Tensor:
        left.append(grid)
        return torchreg.interpolate(image, grid=grid).sum()

    torch.func.grad(loss)(grid)
    actual = torchreg.interpolate(image, grid=left[0])
    expected = torchreg.interpolate(image, grid=grid)
    assert torch.equal(actual, expected)
    assert_equal(
        torch.autograd.grad(actual.sum(), image), torch.autograd.grad(expected.sum(), image)
    )


def test_a_traced_call_computes_anew() -> None:
    image, other = torch.rand(1, 1, 6, 7), torch.rand(1, 1, 6, 7)
    traced = torch.jit.trace(lambda x: torchreg.gaussian_smooth(x, 1.0), image, check_trace=False)
    assert torch.equal(traced(other), torchreg.gaussian_smooth(other, 1.0))


TWICE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "compose": lambda x: torchreg.compose(x[..., :2], x[..., :2]),
    "the same tensor": lambda x: torchreg.compose(x, x),
    "lncc_loss": lambda x: torchreg.lncc_loss(x[None], x[None]),
    "mutual_information_loss": lambda x: torchreg.mutual_information_loss(x[None], x[None]),
    "interpolate": lambda x: torchreg.interpolate(x.movedim(-1, 1).contiguous(), grid=x),
}


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("name", TWICE)
def test_one_tensor_may_be_passed_twice_to_a_compiled_call(name: str, compiler: str) -> None:
    """The gradient is the sum of both, as without a compiler."""
    function = TWICE[name]
    field = torch.tensor(0.1 * random_array(0, 1, 6, 7, 2, dtype=np.float32), requires_grad=True)
    compiled = torch.compile(function, fullgraph=True, backend=compiler)
    value, expected = compiled(field), function(field)
    torch.testing.assert_close(value, expected, rtol=0, atol=0)
    (gradient,) = torch.autograd.grad(value.sum(), field)
    (wanted,) = torch.autograd.grad(expected.sum(), field)
    torch.testing.assert_close(gradient, wanted)


def test_one_tensor_may_be_passed_twice_to_an_exported_or_mapped_call() -> None:
    field = torch.tensor(0.1 * random_array(0, 2, 6, 7, 2, dtype=np.float32))

    class Twice(torch.nn.Module):
        def forward(self, u: torch.Tensor) -> torch.Tensor:
            return torchreg.compose(u, u)

    expected = torchreg.compose(field, field)
    exported = torch.export.export(Twice(), (field,)).module()(field)
    torch.testing.assert_close(exported, expected, rtol=0, atol=0)
    mapped = torch.func.vmap(lambda u: torchreg.compose(u[None], u[None])[0])(field)
    torch.testing.assert_close(mapped, expected, rtol=0, atol=0)
    leaf = field.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(torchreg.compose(leaf, leaf).sum(), leaf)
    gradient = torch.func.grad(lambda u: torchreg.compose(u, u).sum())(field)
    torch.testing.assert_close(gradient, wanted)


def test_forward_mode_is_refused_in_our_words() -> None:
    case = example(ONCE)
    function, image = bound(case), leaves(case)[0].detach()
    for refused in (
        lambda: torch.func.jvp(function, (image,), (image,)),
        lambda: torch.func.linearize(function, image),
        lambda: torch.func.jacfwd(lambda x: function(x).sum())(image),
        lambda: torch.func.vmap(lambda x: torch.func.jvp(function, (x,), (x,)))(image[None]),
        lambda: torch.func.jvp(torch.func.vmap(function), (image[None],), (image[None],)),
    ):
        with pytest.raises(
            NotImplementedError, match=r"torchreg: mind_ssc: forward mode .* torch\.func\.grad"
        ):
            refused()


class Registering(torch.nn.Module):
    """Several ops, one of them with a tensor twice and one without the size of its output."""

    def forward(self, image: Tensor, u: Tensor) -> Tensor:
        smooth = torchreg.gaussian_smooth(image, 1.0)
        return torchreg.interpolate(smooth, grid=torchreg.compose(u, u))


def registering_operands(seed: int = 0) -> tuple[Tensor, Tensor]:
    image = torch.tensor(random_array(seed, 1, 1, 6, 7, dtype=np.float32))
    return image, torch.tensor(0.1 * random_array(seed + 1, 1, 6, 7, 2, dtype=np.float32))


def test_a_traced_model_can_be_saved_and_loaded(tmp_path: Path) -> None:
    """Also where nothing but this package has been imported, and with its gradients."""
    model, operands, others = Registering(), registering_operands(), registering_operands(5)
    torch.jit.trace(model, operands).save(tmp_path / "model.pt")
    torch.save((*others, model(*others)), tmp_path / "expected.pt")
    loaded = torch.jit.load(tmp_path / "model.pt")
    assert_equal([loaded(*others)], [model(*others)])
    leaves_of_both = [[x.clone().requires_grad_() for x in others] for _ in range(2)]
    gradients, expected = (
        torch.autograd.grad(function(*leaves).sum(), leaves)
        for function, leaves in zip((loaded, model), leaves_of_both, strict=True)
    )
    assert_equal(gradients, expected)
    program = (
        "import torch, torchreg\n"
        "image, u, expected = torch.load('expected.pt')\n"
        "assert torch.equal(torch.jit.load('model.pt')(image, u), expected)\n"
    )
    root = str(Path(torchreg.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root}
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, check=True)


def test_an_exported_program_is_compiled_ahead_of_time_by_inductor(tmp_path: Path) -> None:
    model, operands = Registering(), registering_operands()
    program = torch.export.export(model, operands)
    package = str(tmp_path / "model.pt2")
    torch._inductor.aoti_compile_and_package(program, package_path=package)
    compiled = torch._inductor.aoti_load_package(package)
    others = registering_operands(5)
    assert_equal([compiled(*others)], [model(*others)])


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        ("LNCCLoss", {"kernel_size": 4}, "kernel_size: .* got 4"),
        ("LNCCLoss", {"kernel_size": (3, 4)}, "kernel_size: .* got .*4"),
        ("LNCCLoss", {"window": "round"}, "window: .* got 'round'"),
        ("LNCCLoss", {"reduction": "average"}, "reduction: .* got 'average'"),
        ("LNCCLoss", {"smooth_dr": -1.0}, "smooth_dr: .* got -1"),
        ("MutualInformationLoss", {"num_bins": -1}, "num_bins: .* got -1"),
        ("MutualInformationLoss", {"kernel": "round"}, "kernel: .* got 'round'"),
        ("MutualInformationLoss", {"value_range": ((0, 1), (1, 0))}, r"value_range: .*\(1, 0\)"),
    ],
)
def test_a_module_refuses_options_where_it_is_made(
    module: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(torchreg, module)(**options)


def test_a_module_takes_what_its_function_takes() -> None:
    image = torch.rand(2, 1, 8, 9)
    loss = torchreg.LNCCLoss((3, 5))
    assert torch.equal(loss(image, image), torchreg.lncc_loss(image, image, kernel_size=(3, 5)))
    torchreg.LNCCLoss([3, 5, 3])
    ends = torch.ones(2)
    mutual = torchreg.MutualInformationLoss(value_range=((0, ends), (0, 1)))
    assert mutual(image, image).isfinite()


GRID_SAMPLE = torch.nn.functional.grid_sample


def sampled_along_x(
    function: Function, ndim: int, voxels: Tensor, mode: str, padding: str, align_corners: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Values, gradient of the image and of x, at voxel positions along x, elsewhere between voxels.

    The image has five voxels along x, so that positions in quarters are exact.
    """
    image = torch.tensor(random_array(0, 1, 1, *(4,) * (ndim - 1), 5)).requires_grad_()
    grid = torch.full((1, *(1,) * (ndim - 1), len(voxels), ndim), 0.137, dtype=torch.float64)
    grid[..., 0] = voxels / 2 - 1 if align_corners else (2 * voxels + 1) / 5 - 1
    grid.requires_grad_()
    value = function(image, grid, mode=mode, padding_mode=padding, align_corners=align_corners)
    grad_image, grad_grid = torch.autograd.grad(value.sum(), (image, grid))
    return value.detach(), grad_image, grad_grid[..., 0].flatten()


def ours(image: Tensor, grid: Tensor, **options: Any) -> Tensor:
    return torchreg.interpolate(image, grid=grid, is_displacement=False, **options)


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
@pytest.mark.parametrize("ndim", [2, 3])
def test_what_differs_from_grid_sample_is_the_gradient_at_integer_positions(
    ndim: int, padding: str, align_corners: bool
) -> None:
    """Values and image gradients agree everywhere, and all gradients between the voxels."""
    quarters = torch.arange(-40, 60, dtype=torch.float64) / 4
    results = [
        sampled_along_x(function, ndim, quarters, "bilinear", padding, align_corners)
        for function in (ours, GRID_SAMPLE)
    ]
    (value, image, slope), (torchs_value, torchs_image, torchs_slope) = results
    torch.testing.assert_close(value, torchs_value)
    torch.testing.assert_close(image, torchs_image)
    differs = (slope - torchs_slope).abs() > 1e-9
    assert (quarters[differs] % 1 == 0).all()
    # The derivative at an integer position is what there is a little to its right.
    whole = quarters[quarters % 1 == 0]
    at, right = (
        sampled_along_x(ours, ndim, where, "bilinear", padding, align_corners)[2]
        for where in (whole, whole + 1e-6)
    )
    if align_corners:  # where these positions are exact in normalised coordinates, too
        torch.testing.assert_close(at, right, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("padding", "first"), [("border", 0.0), ("reflection", 0.0)])
def test_grid_sample_has_no_gradient_where_it_clips_and_ours_is_right_sided(
    padding: str, first: float
) -> None:
    ends = torch.tensor([0.0, 4.0], dtype=torch.float64)
    _, _, slope = sampled_along_x(ours, 2, ends, "bilinear", padding, True)
    _, _, torchs = sampled_along_x(GRID_SAMPLE, 2, ends, "bilinear", padding, True)
    assert torchs.tolist() == [first, 0.0]
    assert slope[0].abs() > 1e-3
    assert (slope[1] == 0) == (padding == "border")


@pytest.mark.parametrize("align_corners", [True, False])
def test_ties_of_nearest_are_rounded_to_even_where_positions_are_exact(align_corners: bool) -> None:
    """`grid_sample` may round its position off a tie, as ours may where coordinates are given."""
    ours_differ = torchs_differ = False
    for size in range(2, 13):
        image = torch.arange(float(size)).expand(1, 1, 2, size)
        half = torch.zeros(1, 2, size, 2)
        half[..., 0] = 0.5
        even = torch.round(torch.arange(size) + 0.5).clamp(max=size - 1)
        options: dict[str, Any] = {
            "mode": "nearest",
            "padding_mode": "border",
            "align_corners": align_corners,
        }
        moved = torchreg.interpolate(image, grid=half, grid_unit="voxel", **options)
        assert torch.equal(moved, even.expand_as(moved))
        positions = torch.arange(size) + 0.5
        grid = torch.zeros(1, 1, size, 2)
        grid[..., 0] = (
            2 * positions / (size - 1) - 1 if align_corners else (2 * positions + 1) / size - 1
        )
        torchs_differ |= not torch.equal(GRID_SAMPLE(image, grid, **options)[0, 0, 0], even)
        ours_differ |= not torch.equal(ours(image, grid, **options)[0, 0, 0], even)
    assert ours_differ and torchs_differ
