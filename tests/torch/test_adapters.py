"""``torchreg.monai`` and ``torchreg.voxelmorph``: other libraries' names, arguments and values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import torchreg.monai
import torchreg.voxelmorph

DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
SIZES = {2: (9, 40), 3: (6, 7, 38)}


def images(dim: int, device: str, channels: int = 1, batch: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = torch.rand(2, batch, channels, *SIZES[dim], generator=generator, dtype=torch.float64)
    return [image.to(device).requires_grad_() for image in made]


def field(dim: int, device: str, voxels: float = 1.5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    made = torch.randn(2, dim, *SIZES[dim], generator=generator, dtype=torch.float64) * voxels
    return made.to(device).requires_grad_()


def alike(
    ours: Callable[..., torch.Tensor],
    theirs: Callable[..., torch.Tensor],
    *operands: torch.Tensor,
    tolerance: float = 1e-9,
) -> None:
    """Values, their shape, and gradients to all operands."""
    values, gradients = [], []
    for function in (ours, theirs):
        value = function(*operands)
        weight = torch.linspace(-1, 2, max(value.numel(), 1), dtype=value.dtype).to(value)
        total = (value.reshape(-1) * weight).sum()
        gradients.append(torch.autograd.grad(total, operands))
        values.append(value)
    torch.testing.assert_close(*values, rtol=tolerance, atol=tolerance)
    for own, other in zip(*gradients, strict=True):
        top = other.abs().max().clamp_min(1e-300)
        torch.testing.assert_close(own / top, other / top, rtol=0, atol=tolerance)


# ------------------------------------------------------------------------------------------ MONAI


@DEVICES
@pytest.mark.parametrize("padding_mode", ["zeros", "border", "reflection"])
@pytest.mark.parametrize(
    ("dim", "mode"),
    [(2, "bilinear"), (2, "nearest"), (2, "bicubic"), (3, "bilinear"), (3, "nearest")],
)
def test_warp_is_that_of_monai(mode: str, padding_mode: str, dim: int, device: str) -> None:
    theirs = pytest.importorskip("monai.networks.blocks").Warp(mode, padding_mode)
    ours = torchreg.monai.Warp(mode, padding_mode)
    (image, _), ddf = images(dim, device, channels=2), field(dim, device)
    if mode == "nearest":  # of which neither has a gradient to the field
        alike(lambda x: ours(x, ddf.detach()), lambda x: theirs(x, ddf.detach()), image)
    else:
        alike(ours, theirs, image, ddf)


@DEVICES
@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("padding_mode", ["zeros", "border", "reflection"])
def test_the_integral_of_a_velocity_is_that_of_monai(
    padding_mode: str, dim: int, device: str
) -> None:
    theirs = pytest.importorskip("monai.networks.blocks").DVF2DDF(4, "bilinear", padding_mode)
    ours = torchreg.monai.DVF2DDF(4, padding_mode=padding_mode)
    alike(ours, theirs, field(dim, device))


@DEVICES
@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("window", ["rectangular", "triangular", "gaussian"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_local_correlation_is_that_of_monai(
    reduction: str, window: str, dim: int, device: str
) -> None:
    losses = pytest.importorskip("monai.losses")
    arguments: dict[str, Any] = {
        "spatial_dims": dim,
        "kernel_size": 5,
        "kernel_type": window,
        "reduction": reduction,
    }
    ours = torchreg.monai.LocalNormalizedCrossCorrelationLoss(**arguments)
    theirs = losses.LocalNormalizedCrossCorrelationLoss(**arguments).to(device)
    theirs.kernel, theirs.kernel_vol = theirs.kernel.double(), theirs.kernel_vol.double()
    alike(ours, theirs, *images(dim, device), tolerance=1e-5)


@DEVICES
@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_mutual_information_is_that_of_monai(reduction: str, dim: int, device: str) -> None:
    """All channels fill one histogram, and what is beyond [0, 1] counts as at its ends."""
    losses = pytest.importorskip("monai.losses")
    ours = torchreg.monai.GlobalMutualInformationLoss(reduction=reduction, num_bins=11)
    theirs = losses.GlobalMutualInformationLoss(reduction=reduction, num_bins=11).to(device)
    theirs.bin_centers = theirs.bin_centers.double()
    wide = [(1.6 * x - 0.3).detach().requires_grad_() for x in images(dim, device, channels=3)]
    assert min(x.min() for x in wide) < 0
    assert max(x.max() for x in wide) > 1
    alike(ours, theirs, *wide, tolerance=1e-5)


def test_members_of_monais_enumerations_are_names() -> None:
    utils = pytest.importorskip("monai.utils")
    warp = torchreg.monai.Warp(utils.GridSampleMode.BILINEAR, utils.GridSamplePadMode.BORDER)
    assert (warp.mode, warp.padding_mode) == ("bilinear", "border")
    loss = torchreg.monai.LocalNormalizedCrossCorrelationLoss(reduction=utils.LossReduction.SUM)
    image, other = images(3, "cpu")
    assert loss(image, other).dim() == 0


def test_jitter_moves_points_by_less_than_a_voxel_and_always_alike() -> None:
    warp = torchreg.monai.Warp(jitter=True)
    ramp = torch.arange(40.0).expand(1, 1, 6, 7, 40)
    zero = torch.zeros(1, 3, 6, 7, 40)
    moved = warp(ramp, zero) - ramp
    assert moved[..., :-1].min() >= 0
    assert 0.3 < moved[..., :-1].mean() < 0.7
    assert moved.max() < 1
    torch.testing.assert_close(warp(ramp, zero) - ramp, moved, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torchreg.monai.Warp("cubic"), "mode"),
        (lambda: torchreg.monai.Warp(padding_mode="wrap"), "padding_mode"),
        (lambda: torchreg.monai.DVF2DDF(0), "num_steps"),
        (lambda: torchreg.monai.DVF2DDF(mode="nearest"), "mode"),
        (lambda: torchreg.monai.LocalNormalizedCrossCorrelationLoss(spatial_dims=4), "spatial"),
        (lambda: torchreg.monai.GlobalMutualInformationLoss(num_bins=1), "num_bins"),
        (lambda: torchreg.monai.GlobalMutualInformationLoss("delta"), "kernel_type"),
        (lambda: torchreg.monai.GlobalMutualInformationLoss(reduction="all"), "reduction"),
        (lambda: torchreg.voxelmorph.SpatialTransformer((4, 5), "cubic"), "mode"),
        (lambda: torchreg.voxelmorph.SpatialTransformer((4,)), "size"),
        (lambda: torchreg.voxelmorph.VecInt((4, 5), -1), "nsteps"),
        (lambda: torchreg.voxelmorph.VecInt((4, 0), 3), "inshape"),
    ],
)
def test_arguments_are_checked_where_they_are_given(
    make: Callable[[], object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_what_has_no_kernel_is_refused_by_name() -> None:
    with pytest.raises(NotImplementedError, match="b-spline"):
        torchreg.monai.GlobalMutualInformationLoss("b-spline")


def test_shapes_that_do_not_fit_are_refused_by_name() -> None:
    (image, other), ddf = images(3, "cpu"), field(3, "cpu")
    cases: list[tuple[Callable[..., object], tuple[torch.Tensor, ...], str]] = [
        (torchreg.monai.Warp(), (image, ddf[:, :2]), "ddf"),
        (torchreg.monai.Warp(), (image[0, 0], ddf), "image"),
        (torchreg.monai.LocalNormalizedCrossCorrelationLoss(2), (image, other), "pred"),
        (torchreg.monai.LocalNormalizedCrossCorrelationLoss(), (image, other[..., :9]), "target"),
        (torchreg.monai.GlobalMutualInformationLoss(), (image, other[..., :9]), "target"),
        (torchreg.voxelmorph.SpatialTransformer(SIZES[3]), (image[..., :9], ddf), "src"),
        (torchreg.voxelmorph.SpatialTransformer(SIZES[3]), (image, ddf[..., :9]), "flow"),
        (torchreg.voxelmorph.VecInt(SIZES[3], 3), (ddf[..., :9],), "vec"),
    ]
    for function, operands, name in cases:
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            function(*operands)


# ----------------------------------------------------------------------- VoxelMorph and TransMorph


def sampled(src: torch.Tensor, flow: torch.Tensor, mode: str = "bilinear") -> torch.Tensor:
    """The definition: voxels and a flow in voxels, normalised and turned for `grid_sample`."""
    sizes = src.shape[2:]
    axes = [torch.arange(n, dtype=flow.dtype, device=flow.device) for n in sizes]
    places = torch.stack(torch.meshgrid(axes, indexing="ij")) + flow
    normalised = [2 * places[:, k] / (n - 1) - 1 for k, n in enumerate(sizes)]
    grid = torch.stack(normalised[::-1], dim=-1)
    return torch.nn.functional.grid_sample(src, grid, mode=mode, align_corners=True)


@DEVICES
@pytest.mark.parametrize("dim", [2, 3])
def test_a_flow_moves_an_image_as_in_voxelmorph(dim: int, device: str) -> None:
    (image, _), flow = images(dim, device, channels=2), field(dim, device)
    alike(torchreg.voxelmorph.SpatialTransformer(SIZES[dim]), sampled, image, flow)
    nearest = torchreg.voxelmorph.SpatialTransformer(SIZES[dim], "nearest")
    expected = sampled(image, flow, "nearest")
    torch.testing.assert_close(nearest(image, flow), expected, rtol=0, atol=0)


@DEVICES
@pytest.mark.parametrize("dim", [2, 3])
def test_a_velocity_is_integrated_as_in_voxelmorph(dim: int, device: str) -> None:
    def integral(velocity: torch.Tensor) -> torch.Tensor:
        displacement = velocity / 2**5
        for _ in range(5):
            displacement = displacement + sampled(displacement, displacement)
        return displacement

    alike(torchreg.voxelmorph.VecInt(SIZES[dim], 5), integral, field(dim, device))


@DEVICES
@pytest.mark.parametrize(
    ("dim", "win"), [(2, None), (3, None), (3, [5, 5, 5]), (3, [3, 5, 9]), (2, (3, 7))]
)
def test_local_correlation_is_that_of_voxelmorph(dim: int, win: Any, device: str) -> None:
    """Sums in windows with zeros outside, and 1e-5 beside the product of the variances."""
    sizes = [9] * dim if win is None else win
    convolve = {2: torch.nn.functional.conv2d, 3: torch.nn.functional.conv3d}[dim]

    def definition(y_true: torch.Tensor, y_pred: torch.Tensor) -> torch.Tensor:
        ones = torch.ones(1, 1, *sizes, dtype=y_true.dtype, device=y_true.device)

        def sums(x: torch.Tensor) -> torch.Tensor:
            return convolve(x, ones, padding=[n // 2 for n in sizes])

        count = ones.numel()
        a, b = sums(y_true), sums(y_pred)
        cross = sums(y_true * y_pred) - a * b / count
        variances = [sums(x * x) - s * s / count for x, s in ((y_true, a), (y_pred, b))]
        return -(cross**2 / (variances[0] * variances[1] + 1e-5)).mean()

    loss = torchreg.voxelmorph.NCC(win)
    alike(loss.loss, definition, *images(dim, device), tolerance=1e-8)
    alike(loss, definition, *images(dim, device), tolerance=1e-8)


# ------------------------------------------------------------------------------------- citizenship


@pytest.mark.parametrize(
    "make",
    [
        torchreg.monai.Warp,
        torchreg.monai.DVF2DDF,
        torchreg.monai.LocalNormalizedCrossCorrelationLoss,
        torchreg.monai.GlobalMutualInformationLoss,
        lambda: torchreg.voxelmorph.SpatialTransformer(SIZES[3]),
        lambda: torchreg.voxelmorph.VecInt(SIZES[3], 3),
        torchreg.voxelmorph.NCC,
    ],
)
def test_they_compile_without_a_break(make: Callable[[], torch.nn.Module]) -> None:
    module = make()
    (image, other), flow = images(3, "cpu"), field(3, "cpu")
    name = type(module).__name__
    operands: tuple[torch.Tensor, ...] = (image, other)
    if name in ("Warp", "SpatialTransformer"):
        operands = (image, flow)
    elif name in ("DVF2DDF", "VecInt"):
        operands = (flow,)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    alike(compiled, module, *operands)


def test_a_checkpoint_of_voxelmorphs_layers_is_loaded_as_it_is() -> None:
    """Which holds the coordinates of all voxels, and is not changed by it."""
    network = torch.nn.Sequential(torchreg.voxelmorph.SpatialTransformer(SIZES[2]))
    assert not network.state_dict()
    saved = {"0.grid": torch.zeros(1, 2, *SIZES[2])}
    network.load_state_dict(saved)
    assert list(saved) == ["0.grid"]
