"""The steps of ``mutual_information_loss`` and ``joint_histogram``, for volumes that lie in parts.

Every device finds the extremes of its part and counts its samples; in between, all of them combine
the extremes by their maximum and the counts by their sum. No function of the packages is one of
these steps, so that they are called here as the packages call ops of the table.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import torch
from inputs import TOLERANCE, assert_same, random_array
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxreg import _ops as of_jax
from torchreg import _ops as of_torch

Array = np.ndarray
Tensor = torch.Tensor

DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
DTYPES = pytest.mark.parametrize("dtype", [np.float32, np.float64])
RANGES: dict[str, Any] = {
    "of each image": None,
    "of both": "joint",
    "given": np.array([[[-0.6, 0.7], [-0.9, 0.8]]]),
}

PLANES, CUTS = 11, (0, 1, 5, 11)  # along z
IN_PLANE = (31, 37)
BINNING = {"num_bins": 16, "kernel": "gaussian", "sigma_ratio": 1.0, "joint_range": False}
LOSS = {"normalised": False, "smooth_nr": 1e-7, "smooth_dr": 1e-7, "reduction": "mean"}
WHOLE = {"whole_samples": PLANES * IN_PLANE[0] * IN_PLANE[1]}
FOR_GRADIENT = ("output", "table", "scaling")


def images(dtype: object, device: str, channels: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """A pair that has something to do with each other, the second for both items; a mask."""
    pred = random_array(0, 2, channels, PLANES, *IN_PLANE)
    target = 0.5 * pred[:1] + random_array(1, 1, channels, PLANES, *IN_PLANE)
    mask = 3 * abs(random_array(2, 1, 1, PLANES, *IN_PLANE))
    pred, target, mask = (
        torch.tensor(x.astype(dtype), device=device) for x in (pred, target, mask)
    )
    return pred, target, mask


def options(value_range: Any, like: Tensor, **others: Any) -> tuple[Tensor | None, dict[str, Any]]:
    """The operand that is the range, and the attributes of the loss."""
    joint = isinstance(value_range, str)
    given = None if value_range is None or joint else torch.tensor(value_range).to(like)
    return given, {**BINNING, **LOSS, "joint_range": joint, **others}


def binning(attributes: dict[str, Any]) -> dict[str, Any]:
    return {name: attributes[name] for name in BINNING}


def differentiated(attributes: dict[str, Any]) -> bool:
    """Whether the results of a call include gradients: those of a loss that is one number."""
    return attributes["kernel"] != "delta" and attributes["reduction"] != "none"


def part(x: Tensor | None, begin: int, end: int) -> Tensor | None:
    return None if x is None else x[:, :, begin:end].contiguous()


def apply_loss_grad(
    operands: Sequence[Tensor | None], saved: Sequence[Tensor], attributes: dict[str, Any]
) -> tuple[Tensor, ...]:
    """Of ``operands``: pred, target, mask, own_planes."""
    *compared, own = operands
    cotangent = torch.ones((), dtype=saved[0].dtype, device=saved[0].device)
    return of_torch.apply_for(
        ("grad_pred", "grad_target"),
        "mutual_information_loss_grad",
        (*compared, *saved, own, cotangent),
        attributes,
    )


def of_whole(
    pred: Tensor,
    target: Tensor,
    mask: Tensor | None,
    given: Tensor | None,
    attributes: dict[str, Any],
) -> dict[str, Tensor]:
    """What one device makes of the whole volume."""
    compared = (pred, target, mask)
    operands = (*compared, given, None)
    has_gradient = differentiated(attributes)
    outputs = FOR_GRADIENT if has_gradient else ("output",)
    loss, *saved = of_torch.apply_for(outputs, "mutual_information_loss", operands, attributes)
    (histogram,) = of_torch.apply_for(("output",), "joint_histogram", operands, binning(attributes))
    results = {"loss": loss, "histogram": histogram}
    if has_gradient:
        gradients = apply_loss_grad((*compared, None), saved, attributes)
        results["scaling"] = saved[1]
        results["grad_pred"], results["grad_target"] = gradients
    return results


def of_parts(
    pred: Tensor,
    target: Tensor,
    mask: Tensor | None,
    given: Tensor | None,
    attributes: dict[str, Any],
    cuts: Sequence[int] = CUTS,
) -> dict[str, Tensor]:
    """What several make of it, each with the planes between two cuts."""
    compared = [
        tuple(part(x, *ends) for x in (pred, target, mask)) for ends in itertools.pairwise(cuts)
    ]
    extremes = None
    if given is None or mask is not None:
        found = [
            of_torch.apply_for(("output",), "value_extremes", (*x, given, None), {})[0]
            for x in compared
        ]
        extremes = torch.stack(found).amax(0)
    counts = torch.stack(
        [
            of_torch.apply_for(
                ("output",),
                "joint_counts",
                (*x, given, extremes, None),
                {**binning(attributes), **WHOLE},
            )[0]
            for x in compared
        ]
    ).sum(0)
    has_gradient = differentiated(attributes)
    outputs = (*FOR_GRADIENT, "histogram") if has_gradient else ("output", "histogram")
    loss, *saved, histogram = of_torch.apply_for(
        outputs, "mutual_information_of_counts", (counts, given, extremes), {**attributes, **WHOLE}
    )
    results = {"loss": loss, "histogram": histogram}
    if has_gradient:
        gradients = [apply_loss_grad((*x, None), saved, attributes) for x in compared]
        of_each = zip(*gradients, strict=True)
        results["scaling"] = saved[1]
        results["grad_pred"], results["grad_target"] = (torch.cat(x, 2) for x in of_each)
    return results


def assert_equal_to_rounding(
    actual: dict[str, Tensor], expected: dict[str, Tensor], least_tolerance: float = 0
) -> None:
    """In proportion to the largest of each."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype
        assert actual[name].shape == tensor.shape
        error = (actual[name] - tensor).abs().max() / tensor.abs().max()
        tolerance = TOLERANCE[np.dtype(str(tensor.dtype).removeprefix("torch."))]
        assert error <= max(tolerance, least_tolerance), name


# ------------------------------------------------------------------------------ parts and the whole


@DEVICES
@DTYPES
@pytest.mark.parametrize("kernel", ["gaussian", "b-spline", "delta"])
@pytest.mark.parametrize("value_range", RANGES.values(), ids=RANGES.keys())
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("normalised", [False, True])
def test_parts_make_up_the_whole(
    normalised: bool, masked: bool, value_range: Any, kernel: str, dtype: object, device: str
) -> None:
    """Ranges and the largest weight are the same; the sums of samples differ by their order."""
    pred, target, mask = images(dtype, device)
    given, attributes = options(value_range, pred, kernel=kernel, normalised=normalised)
    compared = (pred, target, mask if masked else None)
    whole = of_whole(*compared, given, attributes)
    parts = of_parts(*compared, given, attributes)
    # The outermost weights of a B-spline are as small as can be, and where one of them has a bin to
    # itself, p log p has a slope without bound: there it shows that counts are rounded to integers.
    bare = kernel == "b-spline" and normalised
    assert_equal_to_rounding(parts, whole, 1e-10 if bare else 0)
    if kernel != "delta":
        total = 4  # the place of the one number of the scaling that is a sum
        for places in (slice(total), slice(total + 1, None)):
            assert torch.equal(parts["scaling"][..., places], whole["scaling"][..., places])


@DEVICES
@DTYPES
@pytest.mark.parametrize("value_range", RANGES.values(), ids=RANGES.keys())
def test_whole_numbers_of_samples_add_up_without_rounding(
    value_range: Any, dtype: object, device: str
) -> None:
    """To the same bits, however a volume is cut: hard bins without a mask."""
    pred, target, _ = images(dtype, device)
    given, attributes = options(value_range, pred, kernel="delta")
    whole = of_whole(pred, target, None, given, attributes)
    for cuts in (CUTS, (0, PLANES), range(PLANES + 1)):
        parts = of_parts(pred, target, None, given, attributes, cuts)
        for name, expected in whole.items():
            assert torch.equal(parts[name], expected), name


@DEVICES
def test_counts_are_the_histogram_in_units_of_the_whole(device: str) -> None:
    """A power of two for each sample, with room for as many as the whole volume has."""
    pred, target, _ = images(np.float64, device)
    given, attributes = options(RANGES["given"], pred)
    operands = (pred, target, None, given, None, None)
    for whole, units in ((0, 2.0**48), (2**20, 2.0**42), (2**20 + 1, 2.0**41)):
        (counts,) = of_torch.apply_for(
            ("output",), "joint_counts", operands, {**binning(attributes), "whole_samples": whole}
        )
        assert counts.dtype == torch.int64
        assert counts.shape == (2, 2, 16 * 16 + 1)
        assert not counts[..., -1].any()
        shares = (
            counts[..., :-1].cpu().numpy().reshape(2, 2, 16, 16) / units / WHOLE["whole_samples"]
        )
        expected = reference.joint_histogram(
            pred.cpu().numpy(),
            target.cpu().numpy(),
            num_bins=16,
            value_range=RANGES["given"][0].tolist(),
        )
        np.testing.assert_allclose(shares, expected, rtol=0, atol=1e-12)


@DEVICES
@DTYPES
@pytest.mark.parametrize("masked", [False, True])
def test_extremes_are_of_finite_values_and_combine_by_their_maximum(
    masked: bool, dtype: object, device: str
) -> None:
    pred, target, mask = images(dtype, device)
    pred[0, 0, 0, :3, 0] = torch.tensor([np.nan, np.inf, -np.inf])
    mask[0, 0, 0, 0, 0] = np.inf
    (extremes,) = of_torch.apply_for(
        ("output",), "value_extremes", (pred, target, mask if masked else None, None, None), {}
    )
    finite = torch.where(pred.isfinite(), pred, torch.zeros_like(pred))
    for item, channel in itertools.product(range(2), range(2)):
        first, second = finite[item, channel], target[0, channel]
        largest = mask[mask.isfinite()].max() if masked else 1.0
        expected = [-first.min(), first.max(), -second.min(), second.max(), largest]
        assert extremes[item, channel].tolist() == [float(x) for x in expected]


@DEVICES
def test_a_sample_that_is_not_a_number_shows_wherever_it_is(device: str) -> None:
    pred, target, _ = images(np.float32, device)
    given, attributes = options(None, pred, reduction="none")
    pred[1, 0, 7, 3, 4] = np.nan
    for results in (of_whole, of_parts):
        loss = results(pred, target, None, given, attributes)["loss"]
        assert loss.isnan().tolist() == [[False, False], [True, False]]


# ------------------------------------------------------------------------------------------ padding


@DEVICES
@DTYPES
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("own", [0, 3, PLANES])
def test_padding_is_not_looked_at(own: int, masked: bool, dtype: object, device: str) -> None:
    """Whatever is in it, and a gradient with respect to it is 0, also where items share it."""
    pred, target, mask = images(dtype, device)
    given, attributes = options(RANGES["given"], pred)
    saved = of_torch.apply_for(
        FOR_GRADIENT, "mutual_information_loss", (pred, target, None, given, None), attributes
    )[1:]
    padded = [x.clone() for x in (pred, target, mask)]
    for x in padded:
        x[:, :, own:] = np.nan
        x[:, :, own:, 0] = 1e9
    compared = (*padded[:2], padded[2] if masked else None)
    planes = torch.tensor([own], dtype=torch.int32, device=device)
    (extremes,) = of_torch.apply_for(("output",), "value_extremes", (*compared, None, planes), {})
    counting = {**binning(attributes), **WHOLE}
    (counts,) = of_torch.apply_for(
        ("output",), "joint_counts", (*compared, given, extremes, planes), counting
    )
    gradients = apply_loss_grad((*compared, planes), saved, attributes)
    for gradient in gradients:
        assert not gradient[:, :, own:].any()
    if own == 0:
        assert not counts.any()
        assert extremes[..., :4].isneginf().all()
        return
    cut = tuple(part(x, 0, own) for x in compared)
    (expected,) = of_torch.apply_for(("output",), "value_extremes", (*cut, None, None), {})
    assert torch.equal(extremes, expected)
    (expected,) = of_torch.apply_for(
        ("output",), "joint_counts", (*cut, given, extremes, None), counting
    )
    shares, expected_shares = (
        x.double() / x.double().sum(-1, keepdim=True) for x in (counts, expected)
    )
    error = (shares - expected_shares).abs().max()
    assert error <= TOLERANCE[np.dtype(dtype)]
    of_cut = apply_loss_grad((*cut, None), saved, attributes)
    for gradient, alone in zip(gradients, of_cut, strict=True):
        assert torch.equal(gradient[:, :, :own], alone)


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_the_whole_loss_leaves_padding_out_too(framework: str) -> None:
    """Value and gradients, by the ordinary backward pass of either package."""
    pred, target, _ = images(np.float32, "cpu")
    own = 4
    given, attributes = options(None, pred)
    cut = [part(x, 0, own) for x in (pred, target)]
    expected = of_whole(*cut, None, given, attributes)
    planes = np.array([own], np.int32)
    if framework == "jax":

        def loss(pred: Any, target: Any) -> Any:
            operands = (pred, target, None, None, planes)
            return of_jax.apply("mutual_information_loss", operands, attributes)

        value, gradients = jax.jit(jax.value_and_grad(loss, (0, 1)))(pred.numpy(), target.numpy())
    else:
        leaves = [pred.requires_grad_(), target.requires_grad_()]
        operands = (*leaves, None, None, torch.tensor(planes))
        value = of_torch.apply("mutual_information_loss", operands, attributes)
        gradients = torch.autograd.grad(value, leaves)
        value = value.detach()
    assert_same(np.asarray(value), expected["loss"].numpy())
    for gradient, name in zip(gradients, ("grad_pred", "grad_target"), strict=True):
        assert_same(np.asarray(gradient)[:, :, :own], expected[name].numpy())
        assert not np.asarray(gradient)[:, :, own:].any()


# ---------------------------------------------------------------------------------------- the calls


def in_shards(pred: Any, target: Any, given: Any, attributes: dict[str, Any]) -> Any:
    """Each device has as many planes, of which the last has padding: loss and gradients."""
    own = jnp.clip(PLANES - jax.lax.axis_index("z") * pred.shape[2], 0, pred.shape[2])
    planes = own.astype(jnp.int32)[None]
    with jax.enable_x64(True):  # without it arithmetic makes int32 of int64
        found = of_jax.apply("value_extremes", (pred, target, None, given, planes), {})
        extremes = jax.lax.pmax(found, "z")
        operands = (pred, target, None, given, extremes, planes)
        own_counts = of_jax.apply("joint_counts", operands, {**binning(attributes), **WHOLE})
        counts = jax.lax.psum(own_counts, "z")
        loss, table, scaling = of_jax.apply_for(
            FOR_GRADIENT,
            "mutual_information_of_counts",
            (counts, given, extremes),
            {**attributes, **WHOLE},
        )
        gradients = of_jax.apply_for(
            ("grad_pred", "grad_target"),
            "mutual_information_loss_grad",
            (pred, target, None, table, scaling, planes, jnp.ones_like(loss)),
            attributes,
        )
    return loss, *gradients


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("value_range", RANGES.values(), ids=RANGES.keys())
def test_devices_of_jax_add_up_their_counts(value_range: Any, mapped: bool) -> None:
    """Under ``jit`` of ``shard_map``, of ``vmap`` too, with 64-bit types disabled outside."""
    pred, target, _ = images(np.float32, "cpu")
    given, attributes = options(value_range, pred)
    pairs = [x.numpy() for x in (pred, target)]
    planes = -(-PLANES // 4) * 4
    pad = [(0, 0)] * 2 + [(0, planes - PLANES)] + [(0, 0)] * 2
    padded = [np.pad(x, pad, constant_values=np.nan) for x in pairs]
    range_operand = None if given is None else given.numpy()

    def call(pred: Any, target: Any) -> Any:
        return in_shards(pred, target, range_operand, attributes)

    spec = P(None, None, "z")
    if mapped:
        call, spec = jax.vmap(call), P(None, *spec)
        padded = [np.stack([x, 2 * x]) for x in padded]
    mesh = Mesh(np.array(jax.devices("cpu")[:4]), ("z",))
    sharded = jax.shard_map(call, mesh=mesh, in_specs=spec, out_specs=(P(), spec, spec))
    results = jax.jit(sharded)(*padded)
    for i in range(2 if mapped else 1):
        scaled = [torch.tensor((1 + i) * x) for x in pairs]
        whole = of_whole(*scaled, None, given, attributes)
        names = ("loss", "grad_pred", "grad_target")
        here = [np.array(x[i] if mapped else x) for x in results]
        for x in here[1:]:
            assert not x[:, :, PLANES:].any()
        cut = [here[0], *(x[:, :, :PLANES] for x in here[1:])]
        assert_equal_to_rounding(
            {name: torch.tensor(x) for name, x in zip(names, cut, strict=True)},
            {name: whole[name] for name in names},
        )


WRONG: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("joint_counts", {"extremes": None}, TypeError, "extremes: expected .*whole.*None"),
    ("joint_counts", {"extremes": np.zeros((2, 1, 5))}, ValueError, r"extremes: .*\(N, 2, 5\)"),
    ("joint_counts", {"own_planes": np.zeros(1)}, TypeError, "own_planes: expected an integer"),
    ("joint_counts", {"own_planes": np.zeros(1, np.int64)}, TypeError, "own_planes: .*int32"),
    ("joint_counts", {"own_planes": np.zeros(2, np.int32)}, ValueError, "own_planes: .*all items"),
    ("joint_counts", {"whole_samples": -1}, ValueError, "whole_samples: expected .* from 0"),
    ("of counts", {"whole_samples": 0}, ValueError, "whole_samples: expected .* from 1"),
    ("of counts", {"extremes": None}, TypeError, "extremes: expected .*None"),
    ("of counts", {"counts": np.zeros((2, 2, 257), np.int32)}, TypeError, "counts: .*int64"),
    ("of counts", {"counts": np.zeros((2, 2, 256), np.int64)}, ValueError, r"counts: .*257\)"),
]


@pytest.mark.parametrize(("op", "changes", "error", "message"), WRONG)
def test_what_does_not_fit_is_refused(
    op: str, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    pred, target, _ = images(np.float64, "cpu")
    operands: dict[str, Any] = {"pred": pred, "target": target, "mask": None}
    if op == "of counts":
        operands = {"counts": torch.zeros(2, 2, 257, dtype=torch.int64)}
    operands |= {"value_range": None, "extremes": torch.zeros(2, 2, 5, dtype=torch.float64)}
    if op != "of counts":
        operands["own_planes"] = None
    attributes = {**BINNING, **(LOSS if op == "of counts" else {}), **WHOLE}
    for name, value in changes.items():
        into = attributes if name in attributes else operands
        into[name] = torch.tensor(value) if isinstance(value, np.ndarray) else value
    name = "mutual_information_of_counts" if op == "of counts" else op
    with pytest.raises(error, match=message):
        of_torch.apply_for(("output",), name, tuple(operands.values()), attributes)
