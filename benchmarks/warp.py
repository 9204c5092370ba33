"""Sampling and composition: ours beside what one would otherwise use, in one run.

    python benchmarks/warp.py [--device cuda|cpu] [--size Z Y X] [--json FILE]

`harness.py` says what the columns are.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import torch
from harness import Bench, parse_arguments

import jaxreg
import torchreg

# Of a label map in blocks of 16 voxels a side.
LABELS = 8

# Of the fixed-point iteration. After 14 some voxels of these fields are above 0.01 voxels, the
# tolerance of ours; after 20 none is.
ITERATIONS = 20


def smooth_field(rng: np.random.Generator, size: tuple[int, ...], voxels: float) -> np.ndarray:
    """A displacement with a standard deviation of some voxels that varies over some 16 of them."""
    coarse = rng.normal(size=(1, 3, *(max(2, n // 16) for n in size))).astype(np.float32)
    fine = torch.nn.functional.interpolate(
        torch.from_numpy(coarse), size=size, mode="trilinear", align_corners=True
    )
    scale = torch.tensor([2 * voxels / max(n - 1, 1) for n in reversed(size)]).view(1, 3, 1, 1, 1)
    return (fine * scale).permute(0, 2, 3, 4, 1).contiguous().numpy()


def make_set(rng: np.random.Generator, size: tuple[int, ...]) -> Mapping[str, np.ndarray]:
    """Images, labels, smooth displacements, an affine and cotangents."""
    angle = np.float32(0.1)
    affine = np.eye(3, 4, dtype=np.float32)
    affine[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    return {
        "image": rng.normal(size=(1, 1, *size)).astype(np.float32),
        "u": smooth_field(rng, size, 2.0),
        "v": smooth_field(rng, size, 2.0),
        "affine": affine[None],
        "labels": rng.integers(0, LABELS, [-(-n // 16) for n in size], np.int32)
        .repeat(16, 0)
        .repeat(16, 1)
        .repeat(16, 2)[None, None, : size[0], : size[1], : size[2]]
        .copy(),
        "g": rng.normal(size=(1, 1, *size)).astype(np.float32),
        "gf": rng.normal(size=(1, *size, 3)).astype(np.float32),
    }


def jnp_interpolate(image: jax.Array, u: jax.Array) -> jax.Array:
    """What a JAX user has: map_coordinates."""
    size = image.shape[2:]
    index = jnp.meshgrid(*(jnp.arange(n, dtype=jnp.float32) for n in size), indexing="ij")
    points = [
        i + u[0, ..., 2 - k] * (n - 1) / 2 for k, (i, n) in enumerate(zip(index, size, strict=True))
    ]
    return jax.scipy.ndimage.map_coordinates(image[0, 0], points, order=1)[None, None]


def jnp_interpolate_labels(labels: jax.Array, u: jax.Array) -> jax.Array:
    """The label with the largest sum of weights, label by label."""

    def compare(k: int, best: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        weight = jnp_interpolate((labels == k).astype(u.dtype), u)
        larger = weight > best[0]
        return jnp.where(larger, weight, best[0]), jnp.where(larger, k, best[1])

    # Outside of the map all is 0.
    background = 1 - jnp_interpolate((labels != 0).astype(u.dtype), u)
    return jax.lax.fori_loop(1, LABELS, compare, (background, jnp.zeros_like(labels)))[1]


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


def run(bench: Bench) -> None:
    def sample(image: torch.Tensor, grid: torch.Tensor, padding: str = "zeros") -> torch.Tensor:
        return torch.nn.functional.grid_sample(
            image, grid, padding_mode=padding, align_corners=True
        )

    ours, theirs = "torchreg", "torch grid_sample"
    for work, size, wrt in (
        ("interpolate u", 20, ()),
        ("interpolate u, + grad u", 52, ("u",)),
        ("interpolate u, + grad image", 44, ("image",)),
        ("interpolate u, + grad image, u", 56, ("image", "u")),
    ):
        their_wrt = tuple("full_u" if n == "u" else n for n in wrt)
        bench.torch_work(work, size, theirs, lambda s: sample(s["image"], s["full_u"]), their_wrt)
        bench.torch_work(
            work, size, ours, lambda s: torchreg.interpolate(s["image"], None, s["u"]), wrt
        )
        names = ("image", "u")
        bench.jax_work(work, size, "jnp map_coordinates", jnp_interpolate, names, wrt)
        bench.jax_work(
            work, size, "jaxreg", lambda i, u: jaxreg.interpolate(i, None, u), names, wrt
        )

    work, wrt = "interpolate u, deterministic grads", ("image", "u")
    bench.torch_work(
        work,
        56,
        ours,
        lambda s: torchreg.interpolate(s["image"], None, s["u"], deterministic=True),
        wrt,
    )
    bench.jax_work(
        work,
        56,
        "jaxreg",
        lambda i, u: jaxreg.interpolate(i, None, u, deterministic=True),
        ("image", "u"),
        wrt,
    )

    def sample_labels(s: dict[str, torch.Tensor]) -> torch.Tensor:
        best = 1 - sample((s["labels"] != 0).float(), s["full_u"])
        found = torch.zeros_like(s["labels"])
        for k in range(1, LABELS):
            weight = sample((s["labels"] == k).float(), s["full_u"])
            larger = weight > best
            best = torch.where(larger, weight, best)
            found = torch.where(larger, k, found)
        return found

    work, names = f"interpolate {LABELS} labels u", ("labels", "u")
    bench.torch_work(work, 20, "torch grid_sample per label", sample_labels)
    bench.torch_work(
        work, 20, ours, lambda s: torchreg.interpolate_labels(s["labels"], None, s["u"])
    )
    bench.jax_work(work, 20, "jnp per label", jnp_interpolate_labels, names)
    bench.jax_work(work, 20, "jaxreg", lambda x, u: jaxreg.interpolate_labels(x, None, u), names)

    def affine_sample(s: dict[str, torch.Tensor]) -> torch.Tensor:
        grid = torch.nn.functional.affine_grid(s["affine"], s["image"].shape, align_corners=True)
        return sample(s["image"], grid)

    for work, size, wrt in (
        ("interpolate affine", 8, ()),
        ("interpolate affine, + grad affine", 16, ("affine",)),
    ):
        bench.torch_work(work, size, "torch affine_grid+sample", affine_sample, wrt)
        bench.torch_work(
            work, size, ours, lambda s: torchreg.interpolate(s["image"], s["affine"]), wrt
        )
        bench.jax_work(work, size, "jaxreg", jaxreg.interpolate, ("image", "affine"), wrt)

    def torch_compose(s: dict[str, torch.Tensor]) -> torch.Tensor:
        u = sample(s["u_first"], s["full_v"], "border")
        return s["v"] + u.permute(0, 2, 3, 4, 1)

    for work, size, wrt in (("compose", 36, ()), ("compose, + grad u, v", 96, ("u", "v"))):
        their_wrt = ("u_first", "full_v") if wrt else ()
        bench.torch_work(work, size, "torch grid_sample + v", torch_compose, their_wrt, "gf")
        bench.torch_work(work, size, ours, lambda s: torchreg.compose(s["u"], s["v"]), wrt, "gf")
        bench.jax_work(work, size, "jaxreg", jaxreg.compose, ("u", "v"), wrt, "gf")

    def torch_invert(s: dict[str, torch.Tensor]) -> torch.Tensor:
        identity, e = s["full_u"] - s["u"], torch.zeros_like(s["u"])
        for _ in range(ITERATIONS):
            e = -sample(s["u_first"], identity + e, "border").permute(0, 2, 3, 4, 1)
        return e

    work = "invert_displacement u"
    bench.torch_work(work, 24, "torch fixed point", torch_invert)
    bench.torch_work(work, 24, ours, lambda s: torchreg.invert_displacement(s["u"]))
    bench.jax_work(work, 24, "jnp fixed point", jnp_invert, ("u",))
    bench.jax_work(work, 24, "jaxreg", jaxreg.invert_displacement, ("u",))

    work = "smooth field, sigma 1"
    bench.torch_work(
        work, 24, ours, lambda s: torchreg.gaussian_smooth(s["u"], 1.0, channel_last=True)
    )
    bench.jax_work(
        work, 24, "jaxreg", lambda u: jaxreg.gaussian_smooth(u, 1.0, channel_last=True), ("u",)
    )


def main() -> None:
    arguments = parse_arguments(__doc__)
    size = arguments.size
    bench = Bench(arguments, int(np.prod(size)), lambda rng: make_set(rng, size))
    identity = torch.nn.functional.affine_grid(
        torch.eye(3, 4, device=bench.device)[None], (1, 1, *size), align_corners=True
    )
    for s in bench.torch:
        s["full_u"] = identity + s["u"]
        s["full_v"] = identity + s["v"]
        s["u_first"] = s["u"].permute(0, 4, 1, 2, 3).contiguous()
    run(bench)
    bench.finish()


if __name__ == "__main__":
    main()
