"""Arrays of more than 2**31 elements. Run on a GPU with room, by ``pytest -m large``.

What is sampled is linear and shifted by whole voxels, so that what comes out can be told without a
second computation of that size: a wrapped index would be off by far more than the rounding.
"""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.large]

SHIFT = (2, 1, -1)  # x, y, z
SLOPE = (1.0, 3.0, 7.0)
STEP = sum(a * b for a, b in zip(SHIFT, SLOPE, strict=True))


def ramp(shape: tuple[int, int, int]) -> Any:
    """``x + 3y + 7z``, exact in float32."""
    import torch

    z, y, x = (torch.arange(n, dtype=torch.float32, device="cuda") for n in shape)
    result = torch.empty(shape, device="cuda")
    torch.add(SLOPE[0] * x, (SLOPE[1] * y)[:, None] + (SLOPE[2] * z)[:, None, None], out=result)
    return result


def shift_in_normalised_units(shape: tuple[int, int, int]) -> list[float]:
    return [2 * s / (n - 1) for s, n in zip(SHIFT, reversed(shape), strict=True)]


def assert_near(actual: Any, expected: Any, tolerance: float) -> None:
    assert (actual - expected).abs().max().item() <= tolerance


def test_interpolate_reaches_the_last_voxel() -> None:
    import torch

    import torchreg

    shape = (1300, 1290, 1290)
    image = ramp(shape)
    assert image.numel() > 2**31
    affine = torch.eye(3, 4, device="cuda")[None]
    affine[0, :, 3] = torch.tensor(shift_in_normalised_units(shape))
    image.requires_grad_()
    affine.requires_grad_()
    value = torchreg.interpolate(image[None, None], affine)
    with torch.no_grad():
        # Away from the border, which rounding may cross. The first plane comes from outside.
        for z in (2, shape[0] // 2, shape[0] - 1):
            assert_near(value[0, 0, z, :-2, :-3], image[z, :-2, :-3] + STEP, 0.02)
        assert value[0, 0, 0].abs().max() < 2

    cotangent = torch.zeros_like(value)
    cotangent[0, 0, -1] = 1
    to_image, to_affine = torch.autograd.grad(value, (image, affine), cotangent)
    del value, cotangent
    assert_near(to_image[-2, 1:-1, 2:-1], torch.ones((), device="cuda"), 0.01)
    assert not to_image[: shape[0] - 3].any()
    inside = (shape[1] - 1) * (shape[2] - 2)
    assert to_image.sum(dtype=torch.float64).item() == pytest.approx(inside, rel=2e-3)
    # A shift along z crosses no border in the last plane.
    expected = inside * SLOPE[2] * (shape[0] - 1) / 2
    assert to_affine[0, 2, 3].item() == pytest.approx(expected, rel=5e-3)


def test_compose_reaches_the_last_voxel() -> None:
    import torch

    import torchreg

    shape = (900, 900, 900)
    u = torch.empty((1, *shape, 3), device="cuda")
    assert u.numel() > 2**31
    u.copy_(ramp(shape)[None, ..., None])
    shift = torch.tensor(shift_in_normalised_units(shape), device="cuda")
    v = torch.empty_like(u).copy_(shift)
    u.requires_grad_()
    v.requires_grad_()
    value = torchreg.compose(u, v)
    with torch.no_grad():
        for z in (2, shape[0] // 2, shape[0] - 1):
            assert_near(value[0, z, :-2, :-3], u[0, z, :-2, :-3] + STEP + shift, 0.02)

    cotangent = torch.zeros_like(value)
    cotangent[0, -1] = 1
    to_u, to_v = torch.autograd.grad(value, (u, v), cotangent)
    del value, cotangent
    assert_near(to_u[0, -2, 1:-1, 2:-1], torch.ones((), device="cuda"), 0.01)
    assert not to_u[0, : shape[0] - 3].any()
    half = torch.tensor([(n - 1) / 2 for n in reversed(shape)], device="cuda")
    expected = 1 + 3 * half * torch.tensor(SLOPE, device="cuda")
    inner = to_v[0, -1, :-2, :-3]
    assert ((inner - expected).abs() / expected).max() < 1e-3
    assert not to_v[0, : shape[0] - 1].any()


def test_a_joint_histogram_counts_every_voxel() -> None:
    """Nearly all are in one bin: more than float32 can count to, or 31 bits."""
    import torch

    import torchreg

    images = torch.zeros((2, 1, 1, 1300, 1290, 1290), device="cuda")
    voxels = images[0].numel()
    assert voxels > 2**31
    images[0, ..., -1, -1, -7:] = 1
    images[1, ..., -1, -1, -3:] = 1
    by_voxels = torch.tensor([[voxels - 7, 0], [4, 3]], dtype=torch.float64, device="cuda") / voxels
    for kernel in ("delta", "gaussian", "b-spline"):
        # The windows of 0 and of 1: the marginals of images of one voxel.
        options = {"num_bins": 2, "kernel": kernel, "value_range": ((0, 1), (0, 1))}
        windows = torch.stack(
            [
                torchreg.joint_histogram(x, x, **options)[0, 0].double().sum(0)
                for x in torch.tensor([0.0, 1.0], device="cuda").reshape(2, 1, 1, 1, 1)
            ]
        )
        expected = windows.T @ by_voxels @ windows
        actual = torchreg.joint_histogram(*images, **options)[0, 0].double()
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=0)
