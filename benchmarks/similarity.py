"""Similarity measures: ours beside what one would otherwise use, in one run.

    python benchmarks/similarity.py [--device cuda|cpu] [--size [N C] [Z] Y X] [--json FILE]

LNCC with box windows and a Gaussian one: the value, and with the gradient for the first image or
for both. Beside it, each if it can be imported: MONAI's loss as it is and compiled (3-D and 2-D),
`fused_lncc` (3-D, CUDA, box), and separable sums in jnp under `jax.jit`, by `reduce_window` and by
adding shifted slices. Before anything is timed, values are compared with ours.

`harness.py` says what the columns are. ``--work 'k=7 '`` leaves out other windows.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import torch
from harness import Bench, parse_arguments

import jaxreg
import torchreg

WINDOWS = [(k, "rectangular") for k in (3, 5, 7, 9, 11, 15)] + [(7, "gaussian")]
SMOOTH = 1e-5

TorchLoss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
JaxLoss = Callable[[jax.Array, jax.Array], jax.Array]


def make_set(rng: np.random.Generator, shape: tuple[int, ...]) -> Mapping[str, np.ndarray]:
    """Two images that correlate in part."""
    pred, noise = rng.normal(size=(2, *shape)).astype(np.float32)
    return {"pred": pred, "target": 0.6 * pred + 0.8 * noise + np.float32(0.5)}


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


def check(bench: Bench, in_torch: Mapping[str, TorchLoss], in_jax: Mapping[str, JaxLoss]) -> None:
    """Refuse to time what does not compute the same number."""
    values = {}
    for who, loss in in_torch.items():
        if who != "fused_lncc":  # returns another function of the same correlation
            values[who] = float(loss(bench.torch[0]["pred"], bench.torch[0]["target"]))
    for who, loss in in_jax.items() if bench.jax else ():
        values[who] = float(jax.jit(loss)(bench.jax[0]["pred"], bench.jax[0]["target"]))
    if values and not np.allclose(list(values.values()), next(iter(values.values())), rtol=1e-3):
        raise ValueError(f"expected one value from all of them, got {values}")


def run(bench: Bench, dim: int) -> None:
    """Measure every window, and every gradient of it."""
    for kernel_size, window in WINDOWS:
        window_name = f"LNCC {'box' if window == 'rectangular' else window} k={kernel_size} "
        works = [
            (window_name + "loss", 8, ()),
            (window_name + "+ grad pred", 12, ("pred",)),
            (window_name + "+ grad both", 16, ("pred", "target")),
        ]
        works = [work for work in works if bench.work in work[0]]
        if not works:
            continue
        torch.compiler.reset()
        in_torch = {
            who: loss
            for who, loss in torch_losses(kernel_size, window, dim, bench.device).items()
            if bench.only in who
        }
        in_jax = {
            who: loss
            for who, loss in jax_losses(kernel_size, window).items()
            if bench.only in f"{who} in a loop"
        }
        check(bench, in_torch, in_jax)
        for work, size, wrt in works:
            for who, loss in in_torch.items():
                if who == "fused_lncc" and len(wrt) == 2:
                    continue
                bench.torch_work(
                    work, size, who, lambda s, f=loss: f(s["pred"], s["target"]), wrt, None
                )
            for who, loss in in_jax.items():
                names = ("pred", "target")
                bench.jax_work(work, size, who, loss, names, wrt, None, loop=True)


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
