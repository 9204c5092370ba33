"""Similarity measures: ours beside what one would otherwise use, in one run.

    python benchmarks/similarity.py [--device cuda|cpu] [--size [N C] [Z] Y X] [--json FILE]

The value, and with the gradient for the first image or for both, beside what can be imported.

LNCC with box windows and a Gaussian one: MONAI's loss as it is and compiled (3-D and 2-D),
`fused_lncc` (3-D, CUDA, box), and separable sums in jnp under `jax.jit`, by `reduce_window` and by
adding shifted slices.

Mutual information of noise, and of images with half their voxels at one value, as the background
of a brain is: MONAI's loss as it is and compiled, of images scaled to [0, 1], and Parzen windows
as matrices in jnp under `jax.jit`, multiplied a chunk of voxels at a time.

Before anything is timed, values are compared with ours. `harness.py` says what the columns are.
``--work 'LNCC box k=7 '`` and ``--work 'MI gaussian 32'`` leave out other work.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from harness import Bench, parse_arguments

import jaxreg
import torchreg

WINDOWS = [(k, "rectangular") for k in (3, 5, 7, 9, 11, 15)] + [(7, "gaussian")]
SMOOTH = 1e-5
HISTOGRAMS = [(num_bins, "gaussian") for num_bins in (32, 16, 64, 128)] + [(32, "b-spline")]

TorchLoss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
JaxLoss = Callable[[jax.Array, jax.Array], jax.Array]


def make_set(rng: np.random.Generator, shape: tuple[int, ...]) -> Mapping[str, np.ndarray]:
    """Two images that correlate in part; and these with the first half of their voxels alike."""
    pred, noise = rng.normal(size=(2, *shape)).astype(np.float32)
    images = {"pred": pred, "target": 0.6 * pred + 0.8 * noise + np.float32(0.5)}
    for name, image in list(images.items()):
        masked = image.copy()
        masked[..., : shape[-2] // 2, :] = image.min()
        images[f"{name} with background"] = masked
    return images


def weights(kernel_size: int, window: str) -> list[float]:
    """Weights of a window along one axis."""
    if window == "rectangular":
        return [1.0] * kernel_size
    sigma, middle = kernel_size / 3, kernel_size // 2
    return [math.exp(-((d - middle) ** 2) / (2 * sigma**2)) for d in range(kernel_size)]


def sum_by_windows(x: jax.Array, taps: list[float]) -> jax.Array:
    """Box sums over the spatial axes, one axis at a time, by `reduce_window`."""
    for axis in range(2, x.ndim):
        shape = [1] * x.ndim
        shape[axis] = len(taps)
        x = jax.lax.reduce_window(x, 0.0, jax.lax.add, shape, [1] * x.ndim, "SAME")
    return x


def sum_by_slices(x: jax.Array, taps: list[float]) -> jax.Array:
    """Weighted sums over the spatial axes, one axis at a time, by adding shifted slices."""
    reach = len(taps) // 2
    for axis in range(2, x.ndim):
        size = x.shape[axis]
        padded = jnp.pad(x, [(reach, reach) if a == axis else (0, 0) for a in range(x.ndim)])
        x = sum(
            tap * jax.lax.slice_in_dim(padded, shift, shift + size, axis=axis)
            for shift, tap in enumerate(taps)
        )
    return x


def jnp_lncc(
    pred: jax.Array,
    target: jax.Array,
    *,
    taps: list[float],
    window_sum: Callable[[jax.Array, list[float]], jax.Array],
) -> jax.Array:
    """LNCC by its definition, in array operations."""
    mass = sum(taps) ** (pred.ndim - 2)
    sums = [
        window_sum(x, taps) for x in (pred, target, pred * pred, target * target, pred * target)
    ]
    i, j, ii, jj, ij = sums
    cross = ij - i * j / mass
    pred_variance = jnp.maximum(ii - i * i / mass, SMOOTH)
    target_variance = jnp.maximum(jj - j * j / mass, SMOOTH)
    return -(cross * cross / (pred_variance * target_variance)).mean()


def torch_losses(kernel_size: int, window: str, dim: int, device: str) -> dict[str, TorchLoss]:
    """Ours and its peers in PyTorch."""
    losses: dict[str, TorchLoss] = {
        "torchreg": functools.partial(
            torchreg.lncc_loss, kernel_size=kernel_size, window=window, smooth_dr=SMOOTH
        )
    }
    if importlib.util.find_spec("monai"):
        from monai.losses import LocalNormalizedCrossCorrelationLoss

        monai = LocalNormalizedCrossCorrelationLoss(
            dim, kernel_size, window, smooth_nr=0.0, smooth_dr=SMOOTH
        ).to(device)
        losses["MONAI"] = monai
        losses["MONAI compiled"] = torch.compile(monai)
    suits_fused = device == "cuda" and dim == 3 and window == "rectangular"
    if suits_fused and importlib.util.find_spec("fused_lncc"):
        from fused_lncc import fused_lncc_loss

        losses["fused_lncc"] = functools.partial(fused_lncc_loss, kernel_size=kernel_size)
    return losses


def jax_losses(kernel_size: int, window: str) -> dict[str, JaxLoss]:
    """Ours and its peers in JAX."""
    taps = weights(kernel_size, window)
    losses: dict[str, JaxLoss] = {
        "jaxreg": functools.partial(
            jaxreg.lncc_loss, kernel_size=kernel_size, window=window, smooth_dr=SMOOTH
        ),
        "jnp slices": functools.partial(jnp_lncc, taps=taps, window_sum=sum_by_slices),
    }
    if window == "rectangular":
        losses["jnp reduce_window"] = functools.partial(
            jnp_lncc, taps=taps, window_sum=sum_by_windows
        )
    return losses


def windows(x: jax.Array, low: jax.Array, high: jax.Array, num_bins: int, kernel: str) -> jax.Array:
    """The weights of every voxel on every bin."""
    position = num_bins * jnp.clip((x - low) / (high - low), 0, 1)[:, None]
    distance = jnp.abs(position - jnp.arange(num_bins) - 0.5)
    if kernel == "gaussian":
        weight = jnp.exp(-2 * distance**2)  # sigma is half a bin
    else:
        inner = (4 - 6 * distance**2 + 3 * distance**3) / 6
        weight = jnp.where(distance < 1, inner, jnp.maximum(2 - distance, 0) ** 3 / 6)
    return weight / weight.sum(axis=1, keepdims=True)


def jnp_mutual_information(
    pred: jax.Array, target: jax.Array, *, num_bins: int, kernel: str, most: int
) -> jax.Array:
    """Mutual information by its definition, in array operations; of one item and channel.

    At most so many voxels have their windows in memory at a time.
    """
    ends = [jax.lax.stop_gradient((x.min(), x.max())) for x in (pred, target)]
    chunk = next(size for size in range(most, 0, -1) if pred.size % size == 0)

    @jax.checkpoint
    def add(total: jax.Array, voxels: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        of_pred, of_target = (
            windows(x, low, high, num_bins, kernel)
            for x, (low, high) in zip(voxels, ends, strict=True)
        )
        return total + of_pred.T @ of_target, None

    chunks = (pred.reshape(-1, chunk), target.reshape(-1, chunk))
    joint = jax.lax.scan(add, jnp.zeros((num_bins, num_bins)), chunks)[0] / pred.size
    product = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0)
    return -(joint * jnp.log((joint + 1e-7) / (product + 1e-7) + 1e-7)).sum()


def torch_information_losses(num_bins: int, kernel: str) -> dict[str, TorchLoss]:
    """Ours and its peers in PyTorch."""
    losses: dict[str, TorchLoss] = {
        "torchreg": functools.partial(
            torchreg.mutual_information_loss, num_bins=num_bins, kernel=kernel
        )
    }
    if importlib.util.find_spec("monai"):
        from monai.losses import GlobalMutualInformationLoss

        monai = GlobalMutualInformationLoss(kernel, num_bins, sigma_ratio=0.5)

        def of_unit_images(pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            ends = [x.detach().aminmax() for x in (pred, target)]
            scaled = [
                (x - low) / (high - low)
                for x, (low, high) in zip((pred, target), ends, strict=True)
            ]
            value: torch.Tensor = monai(*scaled)
            return value

        losses["MONAI"] = of_unit_images
        losses["MONAI compiled"] = torch.compile(of_unit_images)
    return losses


def jax_information_losses(num_bins: int, kernel: str, device: str) -> dict[str, JaxLoss]:
    """Ours and its peer in JAX."""
    most = 1 << (10 if device == "cpu" else 19)  # what fits the cache; what keeps a GPU busy
    return {
        "jaxreg": functools.partial(
            jaxreg.mutual_information_loss, num_bins=num_bins, kernel=kernel
        ),
        "jnp matrices": functools.partial(
            jnp_mutual_information, num_bins=num_bins, kernel=kernel, most=most
        ),
    }


def check(
    bench: Bench,
    in_torch: Mapping[str, TorchLoss],
    in_jax: Mapping[str, JaxLoss],
    names: tuple[str, str],
    rtol: float,
) -> None:
    """Refuse to time what does not compute the same number."""
    values = {}
    for who, loss in in_torch.items():
        values[who] = float(loss(*(bench.torch[0][name] for name in names)))
    for who, loss in in_jax.items() if bench.jax else ():
        values[who] = float(jax.jit(loss)(*(bench.jax[0][name] for name in names)))
    if values and not np.allclose(list(values.values()), next(iter(values.values())), rtol=rtol):
        raise ValueError(f"expected one value from all of them, got {values}")


def measure(
    bench: Bench,
    title: str,
    bytes_per_voxel: tuple[int, int, int],
    in_torch: Callable[[], Mapping[str, TorchLoss]],
    in_jax: Callable[[], Mapping[str, JaxLoss]],
    names: tuple[str, str] = ("pred", "target"),
    another_number: Collection[str] = (),
    rtol: float = 1e-3,
) -> None:
    """Measure a loss of two images: the value, and with the gradient of one or of both.

    Values are to agree to within ``rtol``, but for those of ``another_number``.
    """
    works = [
        (f"{title} loss", bytes_per_voxel[0], ()),
        (f"{title} + grad pred", bytes_per_voxel[1], names[:1]),
        (f"{title} + grad both", bytes_per_voxel[2], names),
    ]
    works = [work for work in works if bench.work in work[0]]
    if not works:
        return
    torch.compiler.reset()
    torch_losses = {who: loss for who, loss in in_torch().items() if bench.only in who}
    jax_losses = {who: loss for who, loss in in_jax().items() if bench.only in f"{who} in a loop"}
    alike = {who: loss for who, loss in torch_losses.items() if who not in another_number}
    check(bench, alike, jax_losses, names, rtol)
    for work, size, wrt in works:
        for who, loss in torch_losses.items():
            if who == "fused_lncc" and len(wrt) == 2:
                continue

            def forward(s: Mapping[str, Any], loss: TorchLoss = loss) -> torch.Tensor:
                return loss(s[names[0]], s[names[1]])

            bench.torch_work(work, size, who, forward, wrt, None)
        for who, loss in jax_losses.items():
            bench.jax_work(work, size, who, loss, names, wrt, None, loop=True)


def run(bench: Bench, dim: int) -> None:
    """Measure every window and every histogram."""
    for kernel_size, window in WINDOWS:
        measure(
            bench,
            f"LNCC {'box' if window == 'rectangular' else window} k={kernel_size}",
            (8, 12, 16),
            functools.partial(torch_losses, kernel_size, window, dim, bench.device),
            functools.partial(jax_losses, kernel_size, window),
            another_number=["fused_lncc"],  # it returns another function of the same correlation
        )
    for num_bins, kernel in HISTOGRAMS:
        for background in ("", " with background"):
            measure(
                bench,
                f"MI {kernel} {num_bins}{background}",
                # Both images are read for their range, to be counted, and for the gradient.
                (16, 28, 32),
                functools.partial(torch_information_losses, num_bins, kernel),
                functools.partial(jax_information_losses, num_bins, kernel, bench.device),
                (f"pred{background}", f"target{background}"),
                # Its outermost centres are at the ends of the range; and it counts the target in
                # hard bins where pred is counted by B-splines.
                another_number=["MONAI", "MONAI compiled"],
                # On a GPU XLA multiplies matrices of float32 in fewer bits.
                rtol=1e-2,
            )


def main() -> None:
    arguments = parse_arguments(__doc__, axes=())
    size = arguments.size
    if len(size) not in (2, 3, 4, 5):
        raise SystemExit(f"--size: expected Y X, Z Y X, or N C and these, got {size}")
    shape = size if len(size) > 3 else (1, 1, *size)
    bench = Bench(arguments, math.prod(shape), lambda rng: make_set(rng, shape))
    run(bench, len(shape) - 2)
    bench.finish()


if __name__ == "__main__":
    main()
