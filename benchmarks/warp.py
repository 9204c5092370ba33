"""Sampling, composition and penalties: ours beside what one would otherwise use, in one run.

    python benchmarks/warp.py [--device cuda|cpu] [--size Z Y X] [--json FILE]

`harness.py` says what the columns are.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.ndimage
import torch
from harness import Bench, parse_arguments

from regkernels.bench import WORKS
from regkernels.bench.works import LABELS, PENALTIES, make_warp

# Of the fixed-point iteration. After 14 some voxels of these fields are above 0.01 voxels, the
# tolerance of ours; after 20 none is.
ITERATIONS = 20


def jnp_interpolate(image: jax.Array, u: jax.Array, padding: str = "constant") -> jax.Array:
    """What a JAX user has: map_coordinates."""
    size = image.shape[2:]
    index = jnp.meshgrid(*(jnp.arange(n, dtype=jnp.float32) for n in size), indexing="ij")
    points = [
        i + u[0, ..., 2 - k] * (n - 1) / 2 for k, (i, n) in enumerate(zip(index, size, strict=True))
    ]
    found = jax.scipy.ndimage.map_coordinates(image[0, 0], points, order=1, mode=padding)
    return found[None, None]


def jnp_interpolate_labels(labels: jax.Array, u: jax.Array) -> jax.Array:
    """The label with the largest sum of weights, label by label."""

    def compare(k: int, best: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        weight = jnp_interpolate((labels == k).astype(u.dtype), u)
        larger = weight > best[0]
        return jnp.where(larger, weight, best[0]), jnp.where(larger, k, best[1])

    # Outside of the map all is 0.
    background = 1 - jnp_interpolate((labels != 0).astype(u.dtype), u)
    return jax.lax.fori_loop(1, LABELS, compare, (background, jnp.zeros_like(labels)))[1]


def jnp_compose(u: jax.Array, v: jax.Array) -> jax.Array:
    parts = [jnp_interpolate(u[None, ..., k], v, "nearest")[0] for k in range(3)]
    return v + jnp.stack(parts, -1)


def jnp_invert(u: jax.Array) -> jax.Array:
    """The fixed-point iteration ``e <- -u(y + e)``."""
    size = u.shape[1:-1]
    index = jnp.meshgrid(*(jnp.arange(n, dtype=u.dtype) for n in size), indexing="ij")

    def step(_: int, e: jax.Array) -> jax.Array:
        points = [
            i + e[0, ..., 2 - k] * (n - 1) / 2
            for k, (i, n) in enumerate(zip(index, size, strict=True))
        ]
        parts = [
            jax.scipy.ndimage.map_coordinates(u[0, ..., k], points, order=1, mode="nearest")
            for k in range(3)
        ]
        return -jnp.stack(parts, -1)[None]

    return jax.lax.fori_loop(0, ITERATIONS, step, jnp.zeros_like(u))


def scipy_interpolate(image: torch.Tensor, u: torch.Tensor, prefilter: bool = True) -> torch.Tensor:
    """What a user of NumPy has for cubic splines, on one core."""
    size = image.shape[2:]
    points = np.stack(np.meshgrid(*(np.arange(n, dtype=np.float32) for n in size), indexing="ij"))
    for k, n in enumerate(size):
        points[k] += u[0, ..., 2 - k].numpy() * ((n - 1) / 2)
    found = scipy.ndimage.map_coordinates(
        image[0, 0].numpy(), points, order=3, mode="mirror", prefilter=prefilter
    )
    return torch.from_numpy(found)[None, None]


scipy_interpolate_coefficients = functools.partial(scipy_interpolate, prefilter=False)
"""The second half of that."""


def scipy_coefficients(image: torch.Tensor) -> torch.Tensor:
    """The first half of that."""
    found = scipy.ndimage.spline_filter(image[0, 0].numpy(), output=np.float32, mode="mirror")
    return torch.from_numpy(found)[None, None]


def sample(image: torch.Tensor, grid: torch.Tensor, padding: str = "zeros") -> torch.Tensor:
    """What a PyTorch user has: grid_sample."""
    return torch.nn.functional.grid_sample(image, grid, padding_mode=padding, align_corners=True)


def sample_labels(labels: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """The label with the largest sum of weights, label by label."""
    best = 1 - sample((labels != 0).float(), grid)
    found = torch.zeros_like(labels)
    for k in range(1, LABELS):
        weight = sample((labels == k).float(), grid)
        larger = weight > best
        best = torch.where(larger, weight, best)
        found = torch.where(larger, k, found)
    return found


def affine_sample(image: torch.Tensor, affine: torch.Tensor) -> torch.Tensor:
    grid = torch.nn.functional.affine_grid(affine, image.shape, align_corners=True)
    return sample(image, grid)


def torch_compose(u_first: torch.Tensor, full_v: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return v + sample(u_first, full_v, "border").permute(0, 2, 3, 4, 1)


def torch_invert(u_first: torch.Tensor, full_u: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """The fixed-point iteration ``e <- -u(y + e)``."""
    identity, e = full_u - u, torch.zeros_like(u)
    for _ in range(ITERATIONS):
        e = -sample(u_first, identity + e, "border").permute(0, 2, 3, 4, 1)
    return e


def in_voxels(u: Any) -> list[Any]:
    """The components of a displacement."""
    return [u[..., k] * ((u.shape[3 - k] - 1) / 2) for k in range(3)]


def difference(x: Any, axis: int) -> Any:
    """Of neighbours along an axis, in either framework."""
    return jnp.diff(x, axis=axis) if isinstance(x, jax.Array) else x.diff(dim=axis)


def diffusion(u: Any) -> Any:
    """The sum of all squared differences of neighbours, in array operations."""
    total = sum((difference(v, axis) ** 2).sum() for v in in_voxels(u) for axis in (1, 2, 3))
    return total / u[..., 0].size if isinstance(u, jax.Array) else total / u[..., 0].numel()


def bending(u: Any) -> Any:
    """The sum of all squared second differences, those along two axes twice."""
    total = 0
    for v in in_voxels(u):
        for a in (1, 2, 3):
            slope = difference(v, a)
            for b in range(a, 4):
                total = total + (1 if a == b else 2) * (difference(slope, b) ** 2).sum()
    return total / u[..., 0].size if isinstance(u, jax.Array) else total / u[..., 0].numel()


def run(bench: Bench) -> None:
    full_u = {"u": "full_u"}
    for work in WORKS:
        if not work.startswith("interpolate u") or WORKS[work].derivative != "grad":
            continue
        if "deterministic" not in work:
            bench.measure("torch", work, "torch grid_sample", sample, full_u)
            bench.measure("jax", work, "jnp map_coordinates", jnp_interpolate)
        bench.ours(work)

    for mode in ("cubic", "b-spline"):
        work = f"interpolate {mode} u"
        if mode == "b-spline" and bench.device == "cpu":
            bench.measure("torch", work, "scipy map_coordinates", scipy_interpolate)
        for gradients in ("", " + grad u", " + grad image, u"):
            bench.ours(work + gradients)
    work = "interpolate coefficients u"
    if bench.device == "cpu":
        bench.measure("torch", work, "scipy map_coordinates", scipy_interpolate_coefficients)
    bench.ours(work)
    work = "spline_coefficients image"
    if bench.device == "cpu":
        bench.measure("torch", work, "scipy spline_filter", scipy_coefficients)
    bench.ours(work)

    work = f"interpolate {LABELS} labels u"
    bench.measure("torch", work, "torch grid_sample per label", sample_labels, full_u)
    bench.measure("jax", work, "jnp per label", jnp_interpolate_labels)
    bench.ours(work)

    for work in ("interpolate affine", "interpolate affine + grad affine"):
        bench.measure("torch", work, "torch affine_grid+sample", affine_sample)
        bench.ours(work)

    instead = {"u": "u_first", "v": "full_v"}
    for work in ("compose", "compose + grad u, v"):
        bench.measure("torch", work, "torch grid_sample + v", torch_compose, instead, ("v",))
        bench.ours(work)

    for work, row in WORKS.items():
        if row.make is not make_warp or row.derivative == "grad":
            continue
        if work.startswith("interpolate u"):
            # PyTorch has no rule for the forward mode of grid_sample.
            if row.derivative == "double backward":
                bench.measure("torch", work, "torch grid_sample", sample, full_u)
            bench.measure("jax", work, "jnp map_coordinates", jnp_interpolate)
        elif work.startswith("interpolate affine") and row.derivative == "double backward":
            bench.measure("torch", work, "torch affine_grid+sample", affine_sample)
        elif work.startswith("compose"):
            bench.measure("jax", work, "jnp map_coordinates", jnp_compose)
        bench.ours(work)

    work = "invert_displacement u"
    bench.measure(
        "torch", work, "torch fixed point", torch_invert, {"u": "u_first"}, ("full_u", "u")
    )
    bench.measure("jax", work, "jnp fixed point", jnp_invert)
    bench.ours(work)

    bench.ours("smooth field, sigma 1")

    by_hand = {"diffusion": diffusion, "bending_energy": bending}
    for penalty in PENALTIES:
        for work in (f"{penalty}_loss u", f"{penalty}_loss u + grad u"):
            if penalty in by_hand:
                bench.measure("torch", work, "torch diff", by_hand[penalty])
                bench.measure("jax", work, "jnp diff", by_hand[penalty])
            bench.ours(work)


def main() -> None:
    arguments = parse_arguments(__doc__)
    shape = (1, 1, *arguments.size)
    bench = Bench("warp", arguments, shape, make_warp)
    identity = torch.nn.functional.affine_grid(
        torch.eye(3, 4, device=bench.device)[None], shape, align_corners=True
    )
    for s in bench.sets.get("torch", ()):
        s["full_u"] = identity + s["u"]
        s["full_v"] = identity + s["v"]
        s["u_first"] = s["u"].permute(0, 4, 1, 2, 3).contiguous()
    run(bench)


if __name__ == "__main__":
    main()
