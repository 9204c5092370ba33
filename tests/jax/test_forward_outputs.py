"""What an op of the table computes in its forward pass for the backward one, in ``jaxreg``.

The ops here are declared in Python, as the extension describes its own, and computed by JAX.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from inputs import assert_close, random_array

from jaxreg import _ops
from regkernels.table import read

Array = np.ndarray

OPERANDS = ("pred", "target", "mask")
TABLE: dict[str, dict[str, Any]] = {
    "difference": {
        "inputs": (("pred", False, "image"), ("target", False, "image"), ("mask", True, "image")),
        "outputs": (
            ("output", "result"),
            ("grad_pred", "unit_gradient"),
            ("difference", "saved"),
            ("grad_target", "unit_gradient"),
        ),
        "attributes": (("reduction", "choice", ("sum", "items", "none")),),
        "gradient": "difference_grad",
    },
    "difference_grad": {
        "inputs": (
            ("mask", True, "image"),
            ("difference", False, "image"),
            ("grad_output", False, "image"),
        ),
        "outputs": (("grad_pred", "result"), ("grad_target", "result")),
        "attributes": (("reduction", "choice", ("sum", "items", "none")),),
        "gradient": None,
    },
}


def difference(reduction: str, pred: Any, target: Any, mask: Any = 1.0) -> Any:
    """Squared differences: their sum, one per item, or all of them."""
    squares = mask * (pred - target) ** 2
    kept = {"sum": 0, "items": 1, "none": squares.ndim}[reduction]
    return squares.sum(tuple(range(kept, squares.ndim)))


class Recorder:
    """The op, and its calls: the names of what was called, each with the outputs asked for."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, set[str]]] = []

    def __call__(self, reduction: str, *operands: Any) -> Any:
        operands = (*operands, None)[:3]
        # As a part of the attributes it keeps the traces of one test from the others.
        return _ops._jitted(
            "difference", (reduction, self), ("output",), tuple(operands), around=_ops.setting()
        )[0]

    def loss(self, reduction: str) -> Callable[..., Any]:
        return lambda *operands: weighted_sum(self(reduction, *operands))

    def assert_gradients(
        self, transform: Callable[..., Any], reduction: str, *operands: Any
    ) -> None:
        """Those of JAX alone."""

        def plain(*operands: Any) -> Any:
            return weighted_sum(difference(reduction, *operands))

        actual, expected = (transform(loss)(*operands) for loss in (self.loss(reduction), plain))
        for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            assert_close(np.asarray(a), np.asarray(b), np.float64)


def kernel(
    op: str, attributes: tuple[str, Recorder], wanted: int, present: tuple[bool, ...], shared: None
) -> Callable[..., dict[str, jax.Array]]:
    reduction, recorder = attributes
    names = [name for i, (name, _) in enumerate(TABLE[op]["outputs"]) if wanted >> i & 1]
    recorder.calls.append((op, set(names)))

    def call(*arrays: jax.Array) -> dict[str, jax.Array]:
        remaining = iter(arrays)
        inputs = {
            name: next(remaining)
            for (name, *_), there in zip(TABLE[op]["inputs"], present, strict=True)
            if there
        }
        if op == "difference_grad":
            mask = inputs.get("mask", 1.0)
            gradient = 2 * mask * inputs["difference"] * inputs["grad_output"]
            outputs = {"grad_pred": gradient, "grad_target": -gradient}
        else:
            per_group = jax.vmap(lambda *operands: difference(reduction, *operands))
            gap = inputs["pred"] - inputs["target"]
            outputs = {"output": per_group(*arrays)}
            if reduction == "none":
                outputs["difference"] = gap
            else:
                # In more precision than the operands may have, for the product to come.
                unit = 2 * inputs.get("mask", 1.0) * gap.astype(jnp.float64)
                outputs |= {"grad_pred": unit, "grad_target": -unit}
        return {name: outputs[name] for name in names if name in outputs}

    return call


@pytest.fixture
def op(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    monkeypatch.setattr(_ops, "OPS", read(TABLE))
    monkeypatch.setattr(_ops, "_kernel", kernel)
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        yield Recorder()


def operands(dtype: object = np.float64) -> tuple[Array, Array, Array]:
    pred, target, mask = (random_array(seed, 2, 3, 4, dtype=dtype) for seed in range(3))
    return pred, target, abs(mask)


def weighted_sum(value: Any) -> Any:
    """A scalar that tells the elements of the result apart."""
    weight = 1 + np.arange(value.size, dtype=value.dtype).reshape(value.shape)
    return jnp.sum(jnp.sin(weight * value))


REDUCTIONS = pytest.mark.parametrize("reduction", ["sum", "items", "none"])
CHOICES = [(0,), (1,), (0, 1)]


@REDUCTIONS
def test_a_value_alone_asks_for_nothing_else(op: Recorder, reduction: str) -> None:
    value = jax.jit(lambda *operands: op(reduction, *operands))(*operands())
    assert_close(np.asarray(value), np.asarray(difference(reduction, *operands())), np.float64)
    assert op.calls == [("difference", {"output"})]


@pytest.mark.parametrize("chosen", CHOICES)
@REDUCTIONS
def test_gradients(op: Recorder, reduction: str, chosen: tuple[int, ...]) -> None:
    """Asked for in the forward pass; there is a second call only where they did not come."""
    op.assert_gradients(lambda loss: jax.grad(loss, chosen), reduction, *operands())
    op.assert_gradients(lambda loss: jax.grad(loss, chosen), reduction, *operands()[:2])
    asked = {f"grad_{OPERANDS[k]}" for k in chosen}
    differentiated = [call for call in op.calls if call != ("difference", {"output"})]
    expected = [("difference", {"output", "difference"} | asked)]
    if reduction == "none":
        expected.append(("difference_grad", asked))
    assert differentiated == 2 * expected


@pytest.mark.parametrize("earlier", CHOICES)
@pytest.mark.parametrize("reduction", ["items", "none"])
def test_a_gradient_does_not_depend_on_which_were_asked_for_before(
    op: Recorder, reduction: str, earlier: tuple[int, ...]
) -> None:
    """Traces are kept and used again: what is kept for the backward pass must fit."""
    jax.grad(op.loss(reduction), earlier)(*operands())
    for later in CHOICES:
        op.assert_gradients(lambda loss, k=later: jax.grad(loss, k), reduction, *operands())
        op.assert_gradients(
            lambda loss, k=later: jax.grad(jax.checkpoint(loss), k), reduction, *operands()
        )


@REDUCTIONS
def test_vmap_of_gradients_and_gradients_of_vmap(op: Recorder, reduction: str) -> None:
    """With an operand that is not mapped."""
    pred, target, mask = operands()
    preds = np.stack([pred, 2 * pred, -pred])
    axes = (0, None, None)
    op.assert_gradients(
        lambda loss: jax.vmap(jax.grad(loss, (0, 1)), axes), reduction, preds, target, mask
    )
    op.assert_gradients(
        lambda loss: jax.grad(lambda *ops: jnp.sum(jax.vmap(loss, axes)(*ops)), (0, 1)),
        reduction,
        preds,
        target,
        mask,
    )


def test_empty_batches_have_empty_gradients(op: Recorder) -> None:
    empty = tuple(operand[:0] for operand in operands())
    op.assert_gradients(lambda loss: jax.grad(loss, (0, 1)), "items", *empty)
    assert "difference_grad" not in {name for name, _ in op.calls}


def test_a_gradient_has_the_dtype_of_its_operand(op: Recorder) -> None:
    """Also where the unit gradient is wider."""
    pred, target, mask = operands(np.float32)
    gradient = jax.grad(op.loss("sum"))(pred, target, mask)
    assert gradient.dtype == np.float32
    expected = jax.grad(lambda *ops: weighted_sum(difference("sum", *ops)))(pred, target, mask)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5)


def test_the_product_with_a_cotangent_of_one_is_dropped(op: Recorder) -> None:
    """A registration differentiates the loss itself: that must not cost another pass."""
    gradient = jax.jit(jax.grad(lambda pred, target: op("sum", pred, target)))
    alone = jax.jit(lambda pred, target: 2 * (pred - target))
    pred, target, _ = operands()
    counts = [
        function.lower(pred, target).compile().as_text().count(" multiply(")
        for function in (gradient, alone)
    ]
    assert counts == [1, 1]


def test_nothing_but_the_unit_gradient_is_held_for_the_backward_pass(op: Recorder) -> None:
    pred, target, mask = operands()
    _, pullback = jax.vjp(lambda pred: op("sum", pred, target, mask), pred)
    held = [leaf for leaf in jax.tree.leaves(pullback) if getattr(leaf, "size", 0) > 1]
    assert [leaf.shape for leaf in held] == [pred.shape]


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit, jax.checkpoint])
def test_an_operand_without_a_gradient_is_a_constant(op: Recorder, transform: Any) -> None:
    loss = transform(op.loss("sum"))
    with pytest.raises(TypeError, match=r"difference: mask: .*stop_gradient"):
        jax.grad(loss, (0, 2))(*operands())
    pred, target, mask = operands()
    jax.grad(lambda pred: loss(pred, target, jax.lax.stop_gradient(mask * pred)))(pred)
