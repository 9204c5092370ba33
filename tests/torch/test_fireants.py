"""``torchreg.fireants``: what FireANTs' documentation shows, with its imports changed."""

from __future__ import annotations

import collections
import importlib
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import reference
import torch
from inputs import (
    SHAPES,
    assert_close,
    assert_same,
    off_grid_displacement,
    random_affine,
    random_array,
    small_displacement,
)
from scenes import header, physical_grid, scene
from torch.utils._python_dispatch import TorchDispatchMode

import torchreg
from regkernels import write_volume
from torchreg.fireants import install, uninstall
from torchreg.fireants.interpolator import fireants_interpolator as fi
from torchreg.fireants.losses.fusedcc import FusedLocalNormalizedCrossCorrelationLoss as FusedLNCC
from torchreg.fireants.losses.fusedmi import FusedGlobalMutualInformationLoss as FusedMI

Array = np.ndarray
Tensor = torch.Tensor

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DIMENSIONS = [2, 3]


def tensor(value: Array, device: str = "cpu", **options: Any) -> Tensor:
    return torch.tensor(value, device=device, **options)


def assert_is(actual: Tensor, expected: Array) -> None:
    assert_close(actual.numpy(force=True), np.asarray(expected), np.float64)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dim", DIMENSIONS)
def test_the_documented_calls_of_the_interpolator_have_the_values_they_are_said_to(
    dim: int, device: str
) -> None:
    shape, other = SHAPES[dim], tuple(n + 1 for n in SHAPES[dim])
    image, affine = random_array(1, 2, 3, *shape), random_affine(2, 2, dim)
    displacement = off_grid_displacement(3, 2, shape, other)
    i, a, u = (tensor(x, device) for x in (image, affine, displacement))

    assert_is(fi(i, grid=u), reference.interpolate(image, None, displacement))
    assert_is(fi(i, affine=a), reference.interpolate(image, affine))
    expected = reference.interpolate(image, affine, out_shape=other)
    assert_is(fi(i, affine=a, out_shape=other), expected)
    assert_is(fi(i, affine=a, out_shape=(2, 3, *other)), expected)
    assert_is(fi(i, affine=a, grid=u), reference.interpolate(image, affine, displacement))
    whole = displacement + reference.normalised_coordinates(other)
    expected = reference.interpolate(image, None, displacement)
    assert_is(fi(i, grid=tensor(whole, device), is_displacement=False), expected)
    assert_is(fi(i, affine=a, grid=tensor(whole, device), is_displacement=False), expected)


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("padding_mode", ["zeros", "border", "reflection"])
@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_the_interpolator_has_the_options_of_grid_sample(
    mode: str, padding_mode: str, align_corners: bool
) -> None:
    options = {"mode": mode, "padding_mode": padding_mode, "align_corners": align_corners}
    image = random_array(1, 1, 2, 5, 6)
    grid = off_grid_displacement(2, 1, (5, 6), align_corners=align_corners)
    expected = reference.interpolate(image, None, grid, **options)
    assert_is(fi(tensor(image), grid=tensor(grid), **options), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dim", DIMENSIONS)
def test_the_warp_composer_samples_one_field_at_the_affine_and_the_other(
    dim: int, device: str
) -> None:
    u, affine = small_displacement(1, 2, SHAPES[dim]), random_affine(2, 2, dim)
    v = off_grid_displacement(3, 2, SHAPES[dim])
    options = {"add": False, "padding_mode": "zeros"}
    given = [tensor(x, device) for x in (u, affine, v)]
    expected = reference.compose(u, v, affine, **options)
    assert_is(fi.warp_composer(given[0], affine=given[1], v=given[2]), expected)
    assert_is(fi.warp_composer(*given), expected)
    assert_is(fi.warp_composer(*given, grid=given[2]), expected)
    expected = reference.compose(u, v, **options)
    assert_is(fi.warp_composer(given[0], affine=None, v=given[2]), expected)
    expected = reference.compose(u, v, align_corners=False, **options)
    assert_is(fi.warp_composer(given[0], v=given[2], align_corners=False), expected)


def test_the_documented_scaling_and_squaring_runs_and_stays_small() -> None:
    """It is documented so; what its caller wants is ``torchreg.scaling_and_squaring``."""

    def scaling_and_squaring(v: Tensor, n: int = 6) -> Tensor:
        u = v / 2**n
        for _ in range(n):
            u = fi.warp_composer(u, affine=None, v=u)
        return u

    v = torch.full((1, 12, 13, 2), 0.05, dtype=torch.float64)
    inside = (slice(None), slice(2, -2), slice(2, -2))
    torch.testing.assert_close(scaling_and_squaring(v)[inside], v[inside] / 64)
    torch.testing.assert_close(torchreg.scaling_and_squaring(v)[inside], v[inside])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dim", DIMENSIONS)
def test_affine_and_displacement_become_one_field_of_coordinates(dim: int, device: str) -> None:
    affine, u = random_affine(1, 2, dim), random_array(2, 2, *SHAPES[dim], dim)
    a, given = tensor(affine, device), tensor(u, device)
    assert_is(fi.affine_warp(a, given), reference.affine_warp(affine, u))
    assert_is(fi.affine_warp(affine=a, grid=given), reference.affine_warp(affine, u))
    identity = np.eye(dim, dim + 1)[None]
    expected = reference.affine_warp(np.repeat(identity, 2, axis=0), u, align_corners=False)
    assert_is(fi.affine_warp(None, given, align_corners=False), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_reach_every_operand(device: str) -> None:
    image = tensor(random_array(1, 1, 1, 5, 6), device, requires_grad=True)
    affine = tensor(random_affine(2, 1, 2), device, requires_grad=True)
    grid = tensor(off_grid_displacement(3, 1, (5, 6)), device, requires_grad=True)
    assert torch.autograd.gradcheck(lambda i, a, u: fi(i, affine=a, grid=u), (image, affine, grid))
    u = tensor(small_displacement(4, 1, (5, 6)), device, requires_grad=True)
    assert torch.autograd.gradcheck(fi.warp_composer, (u, affine, grid))
    assert torch.autograd.gradcheck(fi.affine_warp, (affine, grid))


def images(dim: int, channels: int = 2, low: float = -1.0) -> tuple[Array, Array]:
    """Two images with something in common, between ``low`` and 1."""
    pred, other = (random_array(k, 2, channels, *SHAPES[dim]) for k in (1, 2))
    return tuple(low + (1 - low) * (x + 1) / 2 for x in (pred, 0.5 * (pred + other)))  # type: ignore[return-value]


def smoothing(mass: float) -> dict[str, float]:
    """Of a window of that weight 1e-5 in the numerator, and twice in the denominator, of means."""
    square = 1e-5 * mass**2
    return {"smooth_nr": square, "smooth_dr": 1e-5 * mass, "smooth_product": square}


LNCC_OPTIONS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"kernel_size": 7}, {"kernel_size": 7}),
    ({}, {"kernel_size": 3}),
    (
        {"kernel_size": 7, "kernel_type": "gaussian"},
        {"kernel_size": 7, "window": "gaussian", "sigma": 1.5},
    ),
    (
        {"kernel_size": 5, "kernel_type": "gaussian", "sigma": 2.0, "reduction": "sum"},
        {"kernel_size": 5, "window": "gaussian", "sigma": 2.0, "reduction": "sum"},
    ),
    ({"kernel_size": 5, "reduction": "none"}, {"kernel_size": 5, "reduction": "none"}),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dim", DIMENSIONS)
@pytest.mark.parametrize(("options", "plain"), LNCC_OPTIONS, ids=str)
def test_the_documented_correlations_are_those_of_the_definition(
    options: dict[str, Any], plain: dict[str, Any], dim: int, device: str
) -> None:
    pred, target = images(dim)
    _, mass = reference.correlation_window(
        plain["kernel_size"], plain.get("window", "rectangular"), plain.get("sigma"), dim
    )
    plain = {**plain, **smoothing(mass)}
    loss = FusedLNCC(spatial_dims=dim, **options)
    p, t = (tensor(x, device, requires_grad=True) for x in (pred, target))
    value = loss(p, t)
    assert_is(value, reference.lncc_loss(pred, target, **plain))
    value.sum().backward()
    expected = reference.lncc_loss_vjp(np.ones(value.shape), pred, target, **plain)
    for given, gradient in zip((p, t), expected, strict=True):
        assert_is(given.grad, gradient)  # type: ignore[arg-type]


MI_OPTIONS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"num_bins": 32}, {"num_bins": 32}),
    ({}, {"num_bins": 32}),
    ({"kernel_type": "b-spline", "num_bins": 16}, {"kernel": "b-spline", "num_bins": 16}),
    ({"sigma_ratio": 2.0, "reduction": "sum"}, {"sigma_ratio": 2.0, "reduction": "sum"}),
    ({"reduction": "none", "smooth_nr": 1e-4}, {"reduction": "none", "smooth_nr": 1e-4}),
]


def ranges_of(image: Array) -> tuple[Array, Array]:
    """The least and the largest intensity of every item."""
    flat = image.reshape(len(image), -1)
    return flat.min(axis=1), flat.max(axis=1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dim", DIMENSIONS)
@pytest.mark.parametrize("low", [0.1, -2.0])
@pytest.mark.parametrize(("options", "plain"), MI_OPTIONS, ids=str)
def test_the_documented_mutual_information_is_that_of_the_definition(
    options: dict[str, Any], plain: dict[str, Any], low: float, dim: int, device: str
) -> None:
    """Intensities within [0, 1] stay as they are; of other images each item is mapped there."""
    pred, target = images(dim, low=low)
    unit = ((0.0, 1.0), (0.0, 1.0))
    value_range = unit if low > 0 else (ranges_of(pred), ranges_of(target))
    plain = {"smooth_nr": 1e-5, "smooth_dr": 1e-5, **plain, "value_range": value_range}
    p, t = (tensor(x, device, requires_grad=True) for x in (pred, target))
    value = FusedMI(**options)(p, t)
    assert_is(value, reference.mutual_information_loss(pred, target, **plain))
    value.sum().backward()
    cotangent = np.ones(value.shape)
    expected = reference.mutual_information_loss_vjp(cotangent, pred, target, **plain)
    for given, gradient in zip((p, t), expected, strict=True):
        assert_is(given.grad, gradient)  # type: ignore[arg-type]


def test_without_being_normalised_intensities_are_clamped() -> None:
    pred, target = images(2, low=-2.0)
    loss = FusedMI(normalize_image_if_required=False)
    expected = FusedMI()(*(tensor(x.clip(0, 1)) for x in (pred, target)))
    torch.testing.assert_close(loss(tensor(pred), tensor(target)), expected)


@pytest.mark.parametrize("mask_mode", ["mult", "max"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_last_channel_may_be_a_mask(reduction: str, mask_mode: str) -> None:
    pred, target = images(3, low=0.1)
    masks = [0.5 * (random_array(k, 2, 1, *SHAPES[3]) > 0) for k in (3, 4)]
    mask = np.maximum(*masks) if mask_mode == "max" else masks[0] * masks[1]
    given = [
        tensor(np.concatenate(pair, axis=1), requires_grad=True)
        for pair in zip((pred, target), masks, strict=True)
    ]
    options = {"masked": True, "mask_mode": mask_mode, "reduction": reduction}

    correlation = FusedLNCC(kernel_size=3, **options)(*given)
    plain = {"kernel_size": 3, "reduction": reduction, **smoothing(27)}
    assert_is(correlation, reference.lncc_loss(pred, target, mask=mask, **plain))

    information = FusedMI(**options)(*given)
    plain = {"smooth_nr": 1e-5, "smooth_dr": 1e-5, "reduction": reduction}
    unit = ((0.0, 1.0), (0.0, 1.0))
    expected = reference.mutual_information_loss(pred, target, mask=mask, value_range=unit, **plain)
    assert_is(information, expected)
    (correlation + information).backward()
    for operand in given:
        assert operand.grad is not None
        assert operand.grad[:, :-1].abs().max() > 0 and not operand.grad[:, -1].any()


def test_flat_windows_correlate_as_the_smoothing_says() -> None:
    flat = torch.zeros(1, 1, 6, 7)
    whole = FusedLNCC(spatial_dims=2)(flat, flat)
    torch.testing.assert_close(whole, torch.tensor(-1 / (1 + 1e-5)))
    half = FusedLNCC(spatial_dims=2, smooth_nr=0.5e-5)(flat, flat)
    torch.testing.assert_close(half, torch.tensor(-0.5 / (1 + 1e-5)))
    assert FusedLNCC(spatial_dims=2, smooth_nr=0.0)(flat, flat) == 0


def test_each_scale_has_its_kernel_size() -> None:
    pred, target = (tensor(x) for x in images(2))
    loss = FusedLNCC(spatial_dims=2, kernel_size=[3, 5, 7])
    values = {k: FusedLNCC(spatial_dims=2, kernel_size=k)(pred, target) for k in (3, 5, 7)}
    assert loss(pred, target) == values[3]
    loss.set_scales([4, 2, 1])
    loss.set_iterations([100, 50, 20])
    for scale, iterations, size in ((4, 100, 3), (2, 50, 5), (1, 20, 7)):
        loss.set_current_scale_and_iterations(scale, iterations)
        assert loss(pred, target) == values[size]
    assert "kernel_size=[3, 5, 7]" in repr(loss)


def test_one_kernel_size_is_that_of_all_scales() -> None:
    loss = FusedLNCC(kernel_size=5)
    loss.set_scales([4, 1])
    loss.set_current_scale_and_iterations(4, 10)
    assert loss.kernel_size == 5


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: FusedLNCC(kernel_size=4), ValueError, "kernel_size: .*odd.* got 4"),
        (lambda: FusedLNCC(kernel_size=[3, 6]), ValueError, "kernel_size: .* got 6"),
        (lambda: FusedLNCC(kernel_size=[]), TypeError, r"kernel_size: .* got \[\]"),
        (lambda: FusedLNCC(kernel_size=2.5), TypeError, "kernel_size: .* got 2.5"),  # type: ignore[arg-type]
        (lambda: FusedLNCC(spatial_dims=1), ValueError, "spatial_dims: expected 2 or 3, got 1"),
        (lambda: FusedLNCC(kernel_type="triangular"), ValueError, "kernel_type: .*'triangular'"),
        (lambda: FusedLNCC(kernel_type="gaussian", sigma=0.0), ValueError, "sigma: .* got 0"),
        (lambda: FusedLNCC(reduction="max"), ValueError, "reduction: .* got 'max'"),
        (lambda: FusedLNCC(smooth_nr=-1.0), ValueError, "smooth_nr: .* got -1"),
        (lambda: FusedLNCC(smooth_dr=0.0), ValueError, "smooth_dr: .* got 0"),
        (lambda: FusedLNCC(smooth_dr="0"), TypeError, "smooth_dr: .* got '0'"),  # type: ignore[arg-type]
        (lambda: FusedLNCC(mask_mode="sum"), ValueError, "mask_mode: .* got 'sum'"),
        (lambda: FusedMI(kernel_type="box"), ValueError, "kernel_type: .* got 'box'"),
        (lambda: FusedMI(num_bins=1), ValueError, "num_bins: .* got 1"),
        (lambda: FusedMI(sigma_ratio=9.0), ValueError, "sigma_ratio: .* got 9"),
        (lambda: FusedMI(reduction="max"), ValueError, "reduction: .* got 'max'"),
        (lambda: FusedMI(mask_mode="sum"), ValueError, "mask_mode: .* got 'sum'"),
        (lambda: FusedLNCC(kernel_size=[3]).set_scales([2, 1]), ValueError, r"\[2, 1\], got \[3\]"),
        (
            lambda: FusedLNCC(kernel_size=[3]).set_current_scale_and_iterations(2, 9),
            ValueError,
            "scale: .*None, got 2",
        ),
        (
            lambda: FusedLNCC()(*[torch.zeros(1, 1, 5, 6)] * 2),
            ValueError,
            r"pred: expected 3 spatial axes.*\(1, 1, 5, 6\)",
        ),
        (lambda: fi(torch.zeros(1, 1, 5, 6), mode="bicubic"), ValueError, "mode: .* got 'bicubic'"),  # type: ignore[arg-type]
        (lambda: fi(torch.zeros(1, 1, 5, 6), out_shape=(5,)), ValueError, "out_shape: "),
        (lambda: fi.warp_composer(torch.zeros(1, 5, 6, 2)), TypeError, "v: .*got None"),
    ],
)
def test_what_is_wrong_is_named(
    make: Callable[[], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make()


def test_losses_are_modules_that_are_compiled_whole() -> None:
    pred, target = (tensor(x, dtype=torch.float32) for x in images(2))
    for loss in (FusedLNCC(spatial_dims=2), FusedMI()):
        compiled = torch.compile(loss, fullgraph=True)
        torch.testing.assert_close(compiled(pred, target), loss(pred, target))


# install(), with a package of the names of FireANTs'.


class Dispatcher:
    """Says that it was called."""

    def __call__(self, *args: Any, **named: Any) -> str:
        return "theirs: sampled"

    def warp_composer(self, *args: Any, **named: Any) -> str:
        return "theirs: composed"

    def affine_warp(self, *args: Any, **named: Any) -> str:
        return "theirs: combined"


class TheirLoss(torch.nn.Module):
    """Holds its options, as FireANTs' losses do."""

    defaults: dict[str, Any]

    def __init__(self, **options: Any) -> None:
        super().__init__()
        shared = {
            "reduction": "mean",
            "masked_reduction": "mean",
            "smooth_nr": 1e-5,
            "smooth_dr": 1e-5,
            "masked": False,
            "mask_mode": "mult",
        }
        for name, value in {**shared, **self.defaults, **options}.items():
            setattr(self, name, value)


def their_loss(name: str, **defaults: Any) -> type[TheirLoss]:
    """A class of losses of its own ``forward``."""

    def forward(self: TheirLoss, pred: Tensor, target: Tensor) -> str:
        return f"theirs: {name}"

    return type(name, (TheirLoss,), {"defaults": defaults, "forward": forward})


PLAIN_CC, PLAIN_MI = "LocalNormalizedCrossCorrelationLoss", "GlobalMutualInformationLoss"


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """A package ``fireants``, without fused kernels: what its modules hold, by dotted name."""
    for name in [name for name in sys.modules if name.split(".")[0] == "fireants"]:
        monkeypatch.delitem(sys.modules, name)
    cc = their_loss(PLAIN_CC, kernel_type="rectangular", kernel_size=3, unsigned=True)
    mi = their_loss(PLAIN_MI, kernel_type="gaussian", num_bins=32, sigma_ratio=1.0)
    contents: dict[str, dict[str, Any]] = {
        "fireants": {},
        "fireants.interpolator": {"fireants_interpolator": Dispatcher()},
        "fireants.losses": {PLAIN_CC: cc, PLAIN_MI: mi},
        "fireants.losses.cc": {PLAIN_CC: cc},
        "fireants.losses.mi": {PLAIN_MI: mi},
    }
    for name, content in contents.items():
        add_module(monkeypatch, name, content)
    yield {key: value for content in contents.values() for key, value in content.items()}
    uninstall()


def add_module(monkeypatch: pytest.MonkeyPatch, name: str, content: dict[str, Any]) -> ModuleType:
    module = ModuleType(name)
    module.__path__ = []
    vars(module).update(content)
    monkeypatch.setitem(sys.modules, name, module)
    return module


def test_installed_kernels_are_called_by_whoever_holds_an_object_of_fireants(
    fake: dict[str, Any],
) -> None:
    """Also one that was imported, or made, before."""
    interpolator, loss = fake["fireants_interpolator"], fake[PLAIN_CC](kernel_size=5)
    pred, target = (tensor(x) for x in images(3))
    u = tensor(off_grid_displacement(3, 2, SHAPES[3]))
    install()
    assert_same(interpolator(pred, grid=u).numpy(), fi(pred, grid=u).numpy())
    composed = interpolator.warp_composer(u, None, u, align_corners=True)
    assert_same(composed.numpy(), fi.warp_composer(u, v=u).numpy())
    assert_same(interpolator.affine_warp(None, u).numpy(), fi.affine_warp(None, u).numpy())
    assert loss(pred, target) == FusedLNCC(kernel_size=5)(pred, target)
    information = FusedMI(smooth_nr=1e-7, smooth_dr=1e-7)(pred, target)
    assert fake[PLAIN_MI](smooth_nr=1e-7, smooth_dr=1e-7)(pred, target) == information
    uninstall()
    assert interpolator(pred, grid=u) == "theirs: sampled"
    assert interpolator.warp_composer(u, v=u) == "theirs: composed"
    assert interpolator.affine_warp(None, u) == "theirs: combined"
    assert loss(pred, target) == f"theirs: {PLAIN_CC}"


def test_what_is_not_offered_stays_with_fireants(
    fake: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    image = torch.zeros(1, 1, 5, 6, 7)
    with install():
        interpolator = fake["fireants_interpolator"]
        assert interpolator(image, mode="bicubic") == "theirs: sampled"
        assert interpolator(image, output=image) == "theirs: sampled"
        assert interpolator(image, None, None, image) == "theirs: sampled"
        assert interpolator(image, mode="nearest", output=None, out_shape=None).shape == image.shape
        field = torch.zeros(1, 5, 6, 7, 3)
        assert interpolator.warp_composer(field, v=field, min_coords=field) == "theirs: composed"
        for options in ({"kernel_type": "triangular"}, {"unsigned": False}):
            assert fake[PLAIN_CC](**options)(image, image) == f"theirs: {PLAIN_CC}"
        assert fake[PLAIN_MI](kernel_type="box")(image, image) == f"theirs: {PLAIN_MI}"
        state = {"is_initialized": lambda: True}
        add_module(monkeypatch, "fireants.registration.distributed.parallel_state", state)
        for name in (PLAIN_CC, PLAIN_MI):
            assert fake[name]()(image, image) == f"theirs: {name}"


def test_masked_losses_of_fireants_are_reduced_as_they_were_to_be(fake: dict[str, Any]) -> None:
    pred, target = (tensor(x) for x in images(3, channels=3, low=0.1))
    with install():
        for name, ours in ((PLAIN_CC, FusedLNCC()), (PLAIN_MI, FusedMI())):
            ours.options["masked"] = True
            theirs = fake[name](reduction="none", masked=True)
            assert theirs(pred, target) == ours(pred, target)


def test_fused_losses_of_fireants_are_replaced_where_there_are_any(
    fake: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = {name: object() for name in ("gaussian", "delta")}
    volume = 3**3
    cc = their_loss(
        "FusedLocalNormalizedCrossCorrelationLoss",
        kernel_type="gaussian",
        kernel_size=3,
        sigma=1.5,
        smooth_nr=1e-5 * volume,
        smooth_dr=1e-5 * volume,
    )
    mi = their_loss(
        "FusedGlobalMutualInformationLoss",
        kernel_type=kernels["gaussian"],
        num_bins=32,
        sigma_ratio=1.0,
        normalize_image_if_required=False,
    )
    add_module(monkeypatch, "fireants.losses.fusedcc", {cc.__name__: cc})
    content = {mi.__name__: mi, "kernel_type_dict": kernels}
    add_module(monkeypatch, "fireants.losses.fusedmi", content)
    pred, target = (tensor(x) for x in images(3))
    with install():
        ours = FusedLNCC(kernel_type="gaussian")(pred, target)
        torch.testing.assert_close(cc()(pred, target), ours)
        ours = FusedMI(normalize_image_if_required=False)(pred, target)
        assert mi()(pred, target) == ours
    assert cc()(pred, target) == f"theirs: {cc.__name__}"


def test_kernels_are_installed_once_and_go_with_what_installed_them(fake: dict[str, Any]) -> None:
    image = torch.zeros(1, 1, 5, 6)
    interpolator = fake["fireants_interpolator"]
    with install():
        with install():
            pass
        assert isinstance(interpolator(image), Tensor)
    assert interpolator(image) == "theirs: sampled"
    uninstall()
    install()
    assert isinstance(interpolator(image), Tensor)


def test_without_fireants_there_is_nothing_to_install_into(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fireants", None)
    with pytest.raises(ModuleNotFoundError, match="the package fireants is not installed"):
        install()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("fireants.interpolator", "fireants_interpolator"),
        ("fireants.losses.cc", PLAIN_CC),
        ("fireants.losses.mi", PLAIN_MI),
        ("fireants.losses.mi", None),
    ],
)
def test_a_fireants_of_other_names_is_left_as_it_is(
    module: str, name: str | None, fake: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if name is None:
        monkeypatch.delitem(sys.modules, module)
    else:
        monkeypatch.delattr(sys.modules[module], name)
    with pytest.raises(ImportError, match=rf"expected .*{name or module}.*FireANTs 1\.5\.0"):
        install()
    assert fake["fireants_interpolator"](None) == "theirs: sampled"


def test_a_loss_of_other_attributes_is_told(fake: dict[str, Any]) -> None:
    del fake[PLAIN_CC].defaults["kernel_size"]
    with pytest.raises(ImportError, match=f"expected kernel_size in {PLAIN_CC}"):
        install()


class Calls(TorchDispatchMode):
    """Counts the calls of ops of this library."""

    def __init__(self) -> None:
        super().__init__()
        self.count: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "torchreg":
            self.count[func._schema.name.removeprefix("torchreg::")] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """Images as FireANTs holds them, within [0, 1] and with contrast in every window."""
    pytest.importorskip("fireants")
    from fireants.io import BatchedImages, Image

    folder, grid = tmp_path_factory.mktemp("fireants"), header((34, 38, 36), (3, 3, 3))
    rough = np.random.default_rng(1).uniform(0, 0.5, (34, 38, 36))
    found = []
    for name, shift in (("fixed", 0), ("moving", 3)):
        shape = scene(physical_grid(grid) + shift)
        array = np.clip(shape / 3 + np.roll(rough, shift // 3, axis=2), 0, 1)
        write_volume(grid.with_array(array.astype(np.float32)), folder / f"{name}.nii.gz")
        image = Image.load_file(str(folder / f"{name}.nii.gz"), device="cpu")
        found.append(BatchedImages([image]))
    return found[0], found[1]


@pytest.mark.parametrize("loss_type", ["cc", "mi", "mse"])
@pytest.mark.parametrize("kind", ["affine.Affine", "greedy.Greedy", "syn.SyN"])
def test_registrations_of_fireants_call_these_kernels_and_find_the_same(
    kind: str, loss_type: str, pair: tuple[Any, Any]
) -> None:
    module, name = kind.split(".")
    registration = getattr(
        importlib.import_module(f"fireants.registration.{module}"), f"{name}Registration"
    )
    options: dict[str, Any] = {"loss_type": loss_type, "optimizer": "Adam", "progress_bar": False}
    options["optimizer_lr"] = 3e-3 if name == "Affine" else 0.2
    if loss_type == "cc":
        options["cc_kernel_size"] = 5

    def registered() -> tuple[list[float], Tensor]:
        run = registration([2, 1], [3, 2], *pair, **options)
        losses: list[float] = []
        run.loss_fn.register_forward_hook(lambda module, given, value: losses.append(value.item()))
        run.optimize()
        return losses, run.evaluate(*pair).detach()

    theirs, expected = registered()
    with install(), Calls() as calls:
        ours, moved = registered()
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)
    # Steps have a length that does not depend on the gradient's, so that rounding may decide.
    assert (moved - expected).square().mean().sqrt() < 1e-4
    assert calls.count["interpolate"] > len(ours) == 5
    losses = {"cc": "lncc_loss", "mi": "mutual_information_loss"}
    if loss_type in losses:
        assert calls.count[losses[loss_type]] == len(ours)
    assert name == "Affine" or calls.count["compose"] >= len(ours)
    with Calls() as calls:
        assert registered()[0] == theirs
    assert not calls.count


def test_a_list_of_kernel_sizes_is_followed_by_a_registration_of_fireants(
    pair: tuple[Any, Any],
) -> None:
    from fireants.registration.greedy import GreedyRegistration

    sizes: list[int] = []

    def note(module: Any, given: Any) -> None:
        sizes.append(module.kernel_size)

    loss = FusedLNCC(kernel_size=[5, 3])
    loss.register_forward_pre_hook(note)
    options: dict[str, Any] = {"loss_type": "custom", "custom_loss": loss, "progress_bar": False}
    GreedyRegistration([2, 1], [2, 3], *pair, **options).optimize()
    assert sizes == [5, 5, 3, 3, 3]
