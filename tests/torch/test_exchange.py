"""Calls on plain tensors, which the extension serves by itself, and the longer way of the rest."""

from __future__ import annotations

import gc
import resource
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from examples import ALL_OPS, OPS, Example, example
from inputs import assert_close

import torchreg
from regkernels.table import OPS as TABLE
from torchreg._ops import exchange

pytestmark = pytest.mark.skipif(
    not exchange.TENSOR_OPS, reason="PyTorch before 2.10 has no exchange of tensors in C"
)

Tensor = torch.Tensor
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]

# Besides conversions, which are array operations of PyTorch.
SERVED = [name for name in OPS if name != "convert_displacement"]


class Counting:
    """An op of the extension that counts the calls that it serves."""

    def __init__(self, op: Any) -> None:
        self.op, self.served = op, 0

    def _counted(self, outcome: Any) -> Any:
        self.served += outcome is not None
        return outcome

    def forward(self, *arguments: Any) -> Any:
        return self._counted(self.op.forward(*arguments))

    def launch(self, *arguments: Any) -> Any:
        return self._counted(self.op.launch(*arguments))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Counting]]:
    ops = {name: Counting(op) for name, op in exchange.TENSOR_OPS.items()}
    monkeypatch.setattr(exchange, "TENSOR_OPS", ops)
    yield ops


def served(counted: dict[str, Counting]) -> int:
    return sum(op.served for op in counted.values())


def leaves(case: Example, device: str) -> list[Tensor]:
    wrt = case.differentiable
    return [
        torch.tensor(op, device=device, requires_grad=k in wrt)
        for k, op in enumerate(case.operands)
    ]


def results(case: Example, device: str = "cpu") -> list[Tensor]:
    """The value, without and with a gradient recorded, and the gradients."""
    operands = leaves(case, device)
    function = case.bind(getattr(torchreg, case.name))
    with torch.no_grad():
        alone = function(*operands)
    value = function(*operands)
    if not value.requires_grad:
        return [alone, value]
    cotangent = torch.cos(torch.arange(value.numel(), dtype=value.dtype, device=device))
    gradients = torch.autograd.grad(value, operands, cotangent.reshape(value.shape))
    return [alone, value.detach(), *gradients]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", ALL_OPS)
def test_both_ways_give_the_same(
    name: str, dtype: Any, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = example(name, dtype=dtype)
    short = results(case, device)
    monkeypatch.setattr(exchange, "TENSOR_OPS", {})
    for a, b in zip(short, results(case, device), strict=True):
        assert (a.dtype, a.stride(), a.device) == (b.dtype, b.stride(), b.device)
        if device == "cpu":
            assert torch.equal(a, b)
        else:
            assert_close(a.numpy(force=True), b.numpy(force=True), b.numpy(force=True).dtype)


@pytest.mark.parametrize("name", SERVED)
def test_plain_calls_and_their_gradients_are_served(
    name: str, counted: dict[str, Counting]
) -> None:
    results(example(name))
    # Without and with a gradient, and the backward pass, if it is more than a product.
    assert served(counted) >= 2
    gradient = TABLE[name].gradient if name in TABLE else None
    if gradient is not None and not TABLE[name].unit_gradients:
        assert counted[gradient.name].served == 1


def sample(*operands: Tensor, **options: Any) -> Tensor:
    return torchreg.interpolate(*operands, **options)


def _declined() -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    class Subclass(Tensor):
        pass

    return {
        "gaps": lambda image, u: sample(image.repeat(1, 1, 1, 2)[..., ::2], grid=u),
        "a half field": lambda image, u: sample(image, grid=u.half()),
        "two precisions": lambda image, u: sample(image.double(), grid=u),
        "a number of NumPy's": lambda image, u: sample(image, grid=u, out_shape=(np.int64(5), 6)),
        "a subclass": lambda image, u: sample(image.as_subclass(Subclass), grid=u).as_subclass(
            Tensor
        ),
        "a lazy sign": lambda image, u: sample(torch._neg_view(-image), grid=u),
        "zeros not written": lambda image, u: sample(
            torch._efficientzerotensor(image.shape), grid=u
        ),
        "a transform": lambda image, u: torch.func.vmap(lambda x: sample(x[None], grid=u)[0])(
            image
        ),
    }


@pytest.mark.parametrize("what", _declined())
def test_what_is_not_plain_goes_the_longer_way(
    what: str, counted: dict[str, Counting], monkeypatch: pytest.MonkeyPatch
) -> None:
    image, u = torch.rand(1, 2, 5, 6), 0.1 * torch.rand(1, 5, 6, 2)
    call = _declined()[what]
    value = call(image, u)
    assert served(counted) == 0
    monkeypatch.setattr(exchange, "TENSOR_OPS", {})
    assert torch.equal(value, call(image, u))


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_an_image_in_half_precision_is_served(
    half: torch.dtype, counted: dict[str, Counting]
) -> None:
    image, u = torch.rand(1, 2, 5, 6).to(half), 0.1 * torch.rand(1, 5, 6, 2)
    assert sample(image, grid=u).dtype == half
    assert served(counted) == 1


BAD: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "an array": lambda image, u: sample(image.numpy(), grid=u),
    "no image": lambda image, u: sample(None, grid=u),
    "a dtype": lambda image, u: sample(image.int(), grid=u),
    "a complex image": lambda image, u: sample(image.to(torch.complex64), grid=u),
    "a rank": lambda image, u: sample(image[0], grid=u),
    "nine axes": lambda image, u: sample(image[(None,) * 5], grid=u),
    "a size": lambda image, u: sample(image, grid=u[..., :1]),
    "a device": lambda image, u: sample(image, grid=u.to("meta")),
    "a flag": lambda image, u: sample(image, grid=u, align_corners=1),
    "a mode": lambda image, u: sample(image, grid=u, mode="lanczos"),
    "a sequence": lambda image, u: sample(image, grid=u, out_shape=(2.5, 3)),
    "a number": lambda image, u: torchreg.gaussian_smooth(image, float("nan")),
    "no number": lambda image, u: torchreg.gaussian_smooth(image, "one"),
    "a constant": lambda image, u: torchreg.lncc_loss(
        image, image, mask=torch.ones_like(image).requires_grad_()
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_both_ways_refuse_in_the_same_words(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def error() -> tuple[type[BaseException], str]:
        with pytest.raises((TypeError, ValueError)) as raised:
            BAD[what](torch.rand(1, 1, 5, 6), torch.zeros(1, 5, 6, 2))
        return raised.type, str(raised.value)

    short = error()
    monkeypatch.setattr(exchange, "TENSOR_OPS", {})
    assert error() == short


def _work(operands: Sequence[Tensor], cotangent: Tensor) -> tuple[Tensor, ...]:
    image, u = operands
    value = sample(image, grid=u)
    loss = torchreg.lncc_loss(value, image.detach(), kernel_size=3)
    with torch.no_grad():
        sample(image, grid=u)
    for bad in ("a mode", "a size", "a device"):
        with pytest.raises((TypeError, ValueError)):
            BAD[bad](image.detach(), u.detach())
    return (*torch.autograd.grad(value, operands, cotangent, retain_graph=True), loss)


def test_nothing_is_held_after_a_call() -> None:
    operands = [
        torch.rand(1, 1, 5, 6, requires_grad=True),
        torch.zeros(1, 5, 6, 2).requires_grad_(),
    ]
    cotangent = torch.ones(1, 1, 5, 6)
    shared = [*operands, cotangent, torch.float32, torch.empty]
    made = [weakref.ref(x) for x in _work(operands, cotangent)]
    gc.collect()
    assert all(x() is None for x in made)
    before = [sys.getrefcount(x) for x in shared]
    for _ in range(100):
        _work(operands, cotangent)
    gc.collect()
    after = [sys.getrefcount(x) for x in shared]
    assert after == before


def test_memory_does_not_grow_with_calls() -> None:
    image, u = torch.rand(1, 1, 5, 6), torch.zeros(1, 5, 6, 2, requires_grad=True)
    cotangent = torch.ones(1, 1, 5, 6)

    def resident_after_many() -> int:
        for _ in range(5000):
            torch.autograd.grad(sample(image, grid=u), u, cotangent)
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize()

    before = resident_after_many()
    # A forgotten tensor of each call would be two megabytes and more.
    assert resident_after_many() - before < 2**20
