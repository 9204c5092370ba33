"""Similarity measures: ours beside what one would otherwise use, in one run.

    python benchmarks/similarity.py [--device cuda|cpu] [--size [N C] [Z] Y X] [--json FILE]

The value, with the gradient for the first image or for both, and for two losses forward mode and
second derivatives, beside what can be imported.

LNCC with box windows and a Gaussian one: MONAI's loss as it is and compiled (3-D and 2-D),
`fused_lncc` (3-D, CUDA, box), and separable sums in jnp under `jax.jit`, by `reduce_window` and by
adding shifted slices.

Mutual information of noise, and of images with half their voxels at one value, as the background
of a brain is: MONAI's loss as it is and compiled, of images scaled to [0, 1], and Parzen windows
as matrices in jnp under `jax.jit`, multiplied a chunk of voxels at a time.

The mean squared difference of MIND-SSC descriptors: their definition in PyTorch, box means by
`avg_pool`, as it is and compiled.

Before anything is timed, values are compared with ours. `harness.py` says what the columns are.
``--work 'lncc 7' 'mi 32'`` leaves out other work.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from harness import Bench, parse_arguments

from regkernels.bench.works import (
    BACKGROUNDS,
    DERIVATIVES,
    DESCRIPTORS,
    HISTOGRAMS,
    SMOOTH_DR,
    WINDOWS,
    WORKS,
    make_similarity,
)

TorchLoss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
JaxLoss = Callable[[jax.Array, jax.Array], jax.Array]


def imports(module: str) -> bool:
    """Whether a peer is there, and works with the other packages that are."""
    try:
        importlib.import_module(module)
    except Exception:
        return False
    return True


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
    pred_variance = jnp.maximum(ii - i * i / mass, SMOOTH_DR)
    target_variance = jnp.maximum(jj - j * j / mass, SMOOTH_DR)
    return -(cross * cross / (pred_variance * target_variance)).mean()


def torch_losses(kernel_size: int, window: str, dim: int, device: str) -> dict[str, TorchLoss]:
    """The peers in PyTorch."""
    losses: dict[str, TorchLoss] = {}
    if imports("monai.losses"):
        from monai.losses import LocalNormalizedCrossCorrelationLoss

        monai = LocalNormalizedCrossCorrelationLoss(
            dim, kernel_size, window, smooth_nr=0.0, smooth_dr=SMOOTH_DR
        ).to(device)
        losses["MONAI"] = monai
        losses["MONAI compiled"] = torch.compile(monai)
    suits_fused = device == "cuda" and dim == 3 and window == "rectangular"
    if suits_fused and imports("fused_lncc"):
        from fused_lncc import fused_lncc_loss

        losses["fused_lncc"] = functools.partial(fused_lncc_loss, kernel_size=kernel_size)
    return losses


def jax_losses(kernel_size: int, window: str) -> dict[str, JaxLoss]:
    """The peers in JAX."""
    taps = weights(kernel_size, window)
    losses: dict[str, JaxLoss] = {
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
    """The peers in PyTorch."""
    losses: dict[str, TorchLoss] = {}
    if imports("monai.losses"):
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
    """The peer in JAX."""
    most = 1 << (10 if device == "cpu" else 19)  # what fits the cache; what keeps a GPU busy
    return {
        "jnp matrices": functools.partial(
            jnp_mutual_information, num_bins=num_bins, kernel=kernel, most=most
        ),
    }


def torch_descriptors(image: torch.Tensor, radius: int, dilation: int) -> torch.Tensor:
    """MIND-SSC by its definition, in array operations."""
    dim, reach = image.ndim - 2, radius + dilation
    pad = torch.nn.functional.pad(image, (reach,) * 2 * dim, mode="replicate")
    average = torch.nn.functional.avg_pool3d if dim == 3 else torch.nn.functional.avg_pool2d

    def moved(axis: int, way: int) -> torch.Tensor:
        view = pad
        for a in range(dim):  # x is the last axis
            start = dilation * (1 + way) if a == axis else dilation
            view = view.narrow(-1 - a, start, image.shape[-1 - a] + 2 * radius)
        return view

    distances = torch.stack(
        [
            average((moved(i, p) - moved(j, q)) ** 2, 2 * radius + 1, stride=1)
            for i, j in itertools.combinations(range(dim), 2)
            for p, q in ((1, 1), (-1, -1), (1, -1), (-1, 1))
        ],
        dim=2,
    )
    beyond = distances - distances.amin(2, keepdim=True)
    variance = beyond.mean(2, keepdim=True)
    mean = variance.mean(tuple(range(2, variance.ndim)), keepdim=True)
    variance = torch.minimum(torch.maximum(variance, 0.001 * mean), 1000 * mean)
    return torch.exp(-beyond / variance).flatten(1, 2)


def torch_descriptor_losses(radius: int, dilation: int) -> dict[str, TorchLoss]:
    """The formula in PyTorch."""

    def formula(pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        first, second = (torch_descriptors(x, radius, dilation) for x in (pred, target))
        return ((first - second) ** 2).mean()

    return {"torch": formula, "torch compiled": torch.compile(formula)}


def check(
    bench: Bench,
    work: str,
    peers: Mapping[str, Mapping[str, TorchLoss | JaxLoss]],
    rtol: float,
) -> None:
    """Refuse to time what does not compute the same number."""
    row = WORKS[work]
    values = {}
    for name, framework in bench.frameworks.items():
        package = importlib.import_module(framework.package)
        losses = {framework.package: functools.partial(row.call, package), **peers[name]}
        for who, loss in losses.items():
            function = jax.jit(loss) if name == "jax" else loss
            try:
                values[who] = float(function(*(bench.sets[name][0][n] for n in row.operands)))
            except Exception:
                # A peer that cannot be called is told of where it is measured.
                if who == framework.package:
                    raise
    if not np.allclose(list(values.values()), next(iter(values.values())), rtol=rtol):
        raise ValueError(f"expected one value from all of them, got {values}")


def measure(
    bench: Bench,
    title: str,
    torch_peers: Callable[[], Mapping[str, TorchLoss]],
    jax_peers: Callable[[], Mapping[str, JaxLoss]],
    different: tuple[str, ...],
    rtol: float = 1e-3,
) -> None:
    """Measure a loss of two images: the value, and with derivatives for one or for both.

    Values are to agree to within ``rtol``, but for those of peers that compute a ``different``
    function.
    """
    endings = ["", " + grad pred", " + grad both", *(f" + {kind} pred" for kind in DERIVATIVES)]
    works = [f"{title}{ending}" for ending in endings if f"{title}{ending}" in WORKS]
    works = [work for work in works if any(part in work for part in bench.arguments.work)]
    if not works:
        return
    torch.compiler.reset()

    def asked(losses: Mapping[str, Any]) -> dict[str, Any]:
        return {
            who: loss
            for who, loss in losses.items()
            if any(bench.wanted(works[0], name) for name in (who, f"{who} in a loop"))
        }

    peers = {"torch": asked(torch_peers()), "jax": asked(jax_peers())}
    alike = {
        name: {who: loss for who, loss in losses.items() if who not in different}
        for name, losses in peers.items()
    }
    check(bench, works[0], alike, rtol)
    for work in works:
        bench.ours(work, loop=True)
        for name, losses in peers.items():
            for who, loss in losses.items():
                once = who == "fused_lncc"  # and by the first image alone
                if not (once and (WORKS[work].derivative != "grad" or work.endswith("both"))):
                    bench.measure(name, work, who, loss, loop=True)


def run(bench: Bench, dim: int) -> None:
    """Measure every window, every histogram and every kind of descriptors."""
    if not imports("monai.losses"):
        bench.record.miss("MONAI")
    for title, (kernel_size, window) in WINDOWS.items():
        measure(
            bench,
            title,
            functools.partial(torch_losses, kernel_size, window, dim, bench.device),
            functools.partial(jax_losses, kernel_size, window),
            different=("fused_lncc",),  # it returns another function of the same correlation
        )
    for title, (num_bins, kernel) in HISTOGRAMS.items():
        for background in BACKGROUNDS:
            measure(
                bench,
                f"{title}{background}",
                functools.partial(torch_information_losses, num_bins, kernel),
                functools.partial(jax_information_losses, num_bins, kernel, bench.device),
                # Its outermost centres are at the ends of the range; and it counts the target in
                # hard bins where pred is counted by B-splines.
                different=("MONAI", "MONAI compiled"),
                # On a GPU XLA multiplies matrices of float32 in fewer bits.
                rtol=1e-2,
            )
    for title, (radius, dilation) in DESCRIPTORS.items():
        measure(
            bench,
            title,
            functools.partial(torch_descriptor_losses, radius, dilation),
            dict,
            different=(),
        )


def main() -> None:
    arguments = parse_arguments(__doc__, axes=())
    size = arguments.size
    if len(size) not in (2, 3, 4, 5):
        raise SystemExit(f"--size: expected Y X, Z Y X, or N C and these, got {size}")
    shape = size if len(size) > 3 else (1, 1, *size)
    run(Bench("similarity", arguments, shape, make_similarity), len(shape) - 2)


if __name__ == "__main__":
    main()
