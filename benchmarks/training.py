"""Steps of the training of a registration network: ours beside what one would otherwise use.

    python benchmarks/training.py [--device cuda|cpu] [--size Z Y X] [--steps N] [--json FILE]

A step is the forward and the backward pass of a U-Net, of what moves the image and of the loss, and
Adam's update. For each network, in float32 and with the network in bfloat16: milliseconds of a step
after three, the peak of memory in a step with all that is on the device, the loss that is told in
the last step, and the LNCC, in float32, of the image that was moved there.

Two networks. `VoxelMorph`: its layers, with its velocity integrated at half the resolution in 7
steps. `TransMorph`: not its Swin blocks, but a U-Net of its number of parameters (46 million) with
its convolutions at the two finest levels; what it returns is the displacement. Adam's step length
is 1e-3 for the former and 1e-4 for the latter: Adam moves every weight by about that much, and the
more of them an output sums, the further it goes. At 1e-3 the larger network diverges.

Who moves the image and compares it, in windows of 9 voxels:

    torch convolutions    grid_sample, and NCC by five dense convolutions, as VoxelMorph and
                          TransMorph have them, written from the formula
    MONAI                 DVF2DDF, Warp and LocalNormalizedCrossCorrelationLoss
    torchreg, jaxreg      ours; `checkpointed` keeps nothing of it for the backward pass
    jnp                   map_coordinates, and sums by reduce_window

In bfloat16 all of the PyTorch forward pass is under autocast, the loss too, which is how it is
written most often. JAX has no autocast: there the network alone is in bfloat16. The means of
squared slopes are added to every loss, with VoxelMorph's weight.

On a GPU all of it takes some five minutes, two thirds of which compile JAX's programs. PyTorch and
JAX have `--limit` seconds each, which include compilation.
"""

from __future__ import annotations

import argparse
import functools
import gc
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from harness import Record, add_file_arguments
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from warp import jnp_interpolate

import torchreg

WINDOW, SQUARINGS, WARM_UP = 9, 7, 3
PENALTY = 1 / 9
"""Ours sums over components and axes, of which VoxelMorph takes the mean, with a weight of 1."""
BACKGROUND = 0.1
"""The intensity of air: seldom 0 in a scan, and never once a scan is standardised."""
PRECISIONS = ("float32", "bfloat16")


class Shape(NamedTuple):
    """Channels of a U-Net's convolutions: by level, down, at the coarsest, up, and at the end."""

    down: Sequence[int]
    coarsest: Sequence[int]
    up: Sequence[Sequence[int]]
    head: Sequence[int]
    integrated: bool
    step_length: float

    def convolutions(self) -> Iterator[tuple[int, int]]:
        """Channels in and out of each convolution, in the order in which they are met."""
        chain = (2, *self.down, *self.coarsest)
        yield from itertools.pairwise(chain)
        channels = chain[-1]
        for beside, widths in zip(reversed(self.down), (*self.up, self.head), strict=True):
            yield from itertools.pairwise((channels + beside, *widths))
            channels = widths[-1]
        yield channels, 3


NETWORKS = {
    "VoxelMorph": Shape((16, 32, 32, 32), (32,), ((32,), (32,), (32,)), (32, 16, 16), True, 1e-3),
    "TransMorph": Shape(
        (16, 48, 96, 192, 384),
        (768, 768),
        ((384, 384), (192,), (96,), (48,)),
        (16, 16),
        False,
        1e-4,
    ),
}


def layers(shape: Shape, images: Any, convolve: Any, pool: Any, stretch: Any, join: Any) -> Any:
    """Run a U-Net in either framework: what is passed does it."""
    numbers = itertools.count()
    x, beside = images, []
    for _ in shape.down:
        x = convolve(next(numbers), x)
        beside.append(x)
        x = pool(x)
    for _ in shape.coarsest:
        x = convolve(next(numbers), x)
    for widths in (*shape.up, shape.head):
        x = join(stretch(x), beside.pop())
        for _ in widths:
            x = convolve(next(numbers), x)
    return convolve(next(numbers), x)


class TorchNetwork(nn.Module):
    """A U-Net that returns components first, in z, y, x order, in voxels."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.all = nn.ModuleList(nn.Conv3d(i, o, 3, padding=1) for i, o in shape.convolutions())
        nn.init.normal_(self.all[-1].weight, std=1e-3)
        nn.init.zeros_(self.all[-1].bias)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        def convolve(k: int, x: torch.Tensor) -> torch.Tensor:
            x = self.all[k](x)
            return x if k == len(self.all) - 1 else functional.leaky_relu(x, 0.2)

        return layers(
            self.shape,
            images,
            convolve,
            lambda x: functional.avg_pool3d(x, 2),
            lambda x: functional.interpolate(x, scale_factor=2.0),
            lambda x, y: torch.cat([x, y], dim=1),
        )


class Convolutions:
    """What VoxelMorph and TransMorph have."""

    def __init__(self, device: str) -> None:
        self.filter = torch.ones((1, 1, WINDOW, WINDOW, WINDOW), device=device)
        self.grids: dict[tuple[int, ...], torch.Tensor] = {}

    def warp(self, image: torch.Tensor, flow: torch.Tensor) -> torch.Tensor:
        size = flow.shape[2:]
        if size not in self.grids:  # they keep them
            axes = [torch.arange(n, device=flow.device, dtype=torch.float32) for n in size]
            self.grids[size] = torch.stack(torch.meshgrid(*axes, indexing="ij"))[None]
        position = self.grids[size] + flow
        scaled = [2 * position[:, k] / (n - 1) - 1 for k, n in enumerate(size)]
        return functional.grid_sample(image, torch.stack(scaled[::-1], -1), align_corners=True)

    def integrate(self, velocity: torch.Tensor) -> torch.Tensor:
        flow = velocity / 2**SQUARINGS
        for _ in range(SQUARINGS):
            flow = flow + self.warp(flow, flow)
        return flow

    def similarity(self, moved: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
        convolve = functools.partial(functional.conv3d, weight=self.filter, padding=WINDOW // 2)
        i, j, ii, jj, ij = map(
            convolve, (fixed, moved, fixed * fixed, moved * moved, fixed * moved)
        )
        mass = WINDOW**3
        mean_i, mean_j = i / mass, j / mass
        cross = ij - mean_j * i - mean_i * j + mean_i * mean_j * mass
        variance_i = ii - 2 * mean_i * i + mean_i * mean_i * mass
        variance_j = jj - 2 * mean_j * j + mean_j * mean_j * mass
        return -(cross * cross / (variance_i * variance_j + 1e-5)).mean()

    def penalty(self, flow: torch.Tensor) -> torch.Tensor:
        slopes = (flow.diff(dim=axis).square().sum() for axis in (2, 3, 4))
        return sum(slopes) / flow[:, 0].numel()


class Monai(Convolutions):
    """What MONAI has."""

    def __init__(self, device: str) -> None:
        from monai.losses import LocalNormalizedCrossCorrelationLoss
        from monai.networks.blocks import DVF2DDF, Warp

        self.warp = Warp("bilinear", "zeros")
        self.integrate = DVF2DDF(SQUARINGS, "bilinear", "zeros")
        self.similarity = LocalNormalizedCrossCorrelationLoss(3, WINDOW).to(device)


class Ours:
    """`torchreg`."""

    def __init__(self, device: str) -> None:
        pass

    def warp(self, image: torch.Tensor, flow: torch.Tensor) -> torch.Tensor:
        return torchreg.interpolate(
            image, grid=flow, grid_unit="voxel", grid_channels="first", grid_components="zyx"
        )

    def normalised(self, flow: torch.Tensor) -> torch.Tensor:
        return torchreg.convert_displacement(
            flow.float(), "voxel", "normalised", source_channels="first", source_components="zyx"
        )

    def integrate(self, velocity: torch.Tensor) -> torch.Tensor:
        flow = torchreg.scaling_and_squaring(
            self.normalised(velocity), SQUARINGS, padding_mode="zeros"
        )
        return torchreg.convert_displacement(
            flow, "normalised", "voxel", target_channels="first", target_components="zyx"
        )

    def similarity(self, moved: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
        return torchreg.lncc_loss(moved, fixed, kernel_size=WINDOW)

    def penalty(self, flow: torch.Tensor) -> torch.Tensor:
        return torchreg.diffusion_loss(self.normalised(flow))


class Checkpointed(Ours):
    """`torchreg`, computed again in the backward pass from what the network returned."""


OURS = ("torchreg", "torchreg checkpointed", "jaxreg")
TORCH = {
    "torch convolutions": Convolutions,
    "MONAI": Monai,
    "torchreg": Ours,
    "torchreg checkpointed": Checkpointed,
}


def resized(flow: torch.Tensor, factor: float) -> torch.Tensor:
    """A field in voxels, and they, of another size."""
    if factor > 1:
        flow = factor * flow
    flow = functional.interpolate(flow, scale_factor=factor, mode="trilinear", align_corners=True)
    return flow if factor > 1 else factor * flow


def torch_loss(parts: Any, network: TorchNetwork, fixed: Any, moving: Any) -> tuple[Any, Any]:
    """The moved image and the loss."""
    flow = network(torch.cat([moving, fixed], dim=1))

    def rest(flow: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        regularised = flow
        if network.shape.integrated:
            regularised = resized(flow, 0.5)
            flow = resized(parts.integrate(regularised), 2)
        moved = parts.warp(moving, flow)
        return moved, parts.similarity(moved, fixed) + PENALTY * parts.penalty(regularised)

    if isinstance(parts, Checkpointed):
        return checkpoint(rest, flow, use_reentrant=False)
    return rest(flow)


def train_in_torch(
    parts: Any, shape: Shape, precision: str, images: Sequence[torch.Tensor], steps: int
) -> dict[str, float]:
    """Return what a training of some steps shows."""
    device = images[0].device
    torch.manual_seed(0)
    network = TorchNetwork(shape).to(device)
    optimiser = torch.optim.Adam(network.parameters(), lr=shape.step_length)
    cuda = device.type == "cuda"
    for step in range(steps):
        if step == WARM_UP:
            if cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            moved, loss = torch_loss(parts, network, *images)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    if cuda:
        torch.cuda.synchronize()
    ms = (time.perf_counter() - began) / (steps - WARM_UP) * 1e3
    memory = torch.cuda.max_memory_allocated() / 2**20 if cuda else math.nan
    lncc = torchreg.lncc_loss(moved.detach().float(), images[0], kernel_size=WINDOW)
    return {"ms": ms, "memory_mib": memory, "loss": loss.item(), "lncc": lncc.item()}


def train_in_jax(
    who: str, shape: Shape, precision: str, images: Sequence[torch.Tensor], steps: int
) -> dict[str, float]:
    """Return what a training of some steps shows; the step is one compiled program."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from similarity import jnp_lncc, sum_by_windows

    import jaxreg

    # The weights that the training in PyTorch starts from.
    torch.manual_seed(0)
    weights = [
        (layer.weight.detach().numpy(), layer.bias.detach().numpy())
        for layer in TorchNetwork(shape).all
    ]
    device = jax.devices("gpu" if images[0].device.type == "cuda" else "cpu")[0]
    weights, (fixed, moving) = jax.device_put((weights, [x.cpu().numpy() for x in images]), device)

    def network(weights: Any, images: jax.Array) -> jax.Array:
        def convolve(k: int, x: jax.Array) -> jax.Array:
            weight, bias = (w.astype(x.dtype) for w in weights[k])
            x = jax.lax.conv(x, weight, (1, 1, 1), "SAME") + bias[:, None, None, None]
            return x if k == len(weights) - 1 else jax.nn.leaky_relu(x, 0.2)

        def stretch(x: jax.Array) -> jax.Array:
            for axis in (2, 3, 4):
                x = jnp.repeat(x, 2, axis)
            return x

        join = lambda x, y: jnp.concatenate([x, y], 1)  # noqa: E731
        return layers(shape, images.astype(precision), convolve, halved, stretch, join)

    def halved(x: jax.Array) -> jax.Array:
        n, c, *size = x.shape
        pairs = itertools.chain.from_iterable((length // 2, 2) for length in size)
        return x.reshape(n, c, *pairs).mean((3, 5, 7))

    def normalised(flow: jax.Array) -> jax.Array:
        return jaxreg.convert_displacement(
            flow, "voxel", "normalised", source_channels="first", source_components="zyx"
        )

    def warp(image: jax.Array, field: jax.Array) -> jax.Array:
        if who == "jaxreg":
            return jaxreg.interpolate(image, grid=field)
        channels = [jnp_interpolate(image[:, k, None], field) for k in range(image.shape[1])]
        return jnp.concatenate(channels, 1)

    def integrate(field: jax.Array) -> jax.Array:
        if who == "jaxreg":
            return jaxreg.scaling_and_squaring(field, SQUARINGS, padding_mode="zeros")
        field = field / 2**SQUARINGS
        for _ in range(SQUARINGS):
            field = field + jnp.moveaxis(warp(jnp.moveaxis(field, -1, 1), field), 1, -1)
        return field

    def penalty(field: jax.Array, flow: jax.Array) -> jax.Array:
        if who == "jaxreg":
            return jaxreg.diffusion_loss(field)
        slopes = (jnp.square(jnp.diff(flow, axis=axis)).sum() for axis in (2, 3, 4))
        return sum(slopes) / flow[:, 0].size

    def similarity(moved: jax.Array, fixed: jax.Array) -> jax.Array:
        if who == "jaxreg":
            return jaxreg.lncc_loss(moved, fixed, kernel_size=WINDOW)
        return jnp_lncc(moved, fixed, taps=[1.0] * WINDOW, window_sum=sum_by_windows)

    def total(weights: Any, fixed: jax.Array, moving: jax.Array) -> tuple[jax.Array, jax.Array]:
        flow = network(weights, jnp.concatenate([moving, fixed], 1)).astype("float32")
        if shape.integrated:
            flow = halved(flow) / 2
        field = normalised(flow)
        cost = PENALTY * penalty(field, flow)
        if shape.integrated:
            # What is normalised has no voxels whose size would have to follow.
            field = jax.image.resize(integrate(field), (1, *fixed.shape[2:], 3), "linear")
        moved = warp(moving, field)
        return similarity(moved, fixed) + cost, moved

    optimiser = optax.adam(shape.step_length)

    def step(weights: Any, state: Any, fixed: jax.Array, moving: jax.Array) -> Any:
        (loss, moved), slopes = jax.value_and_grad(total, has_aux=True)(weights, fixed, moving)
        updates, state = optimiser.update(slopes, state)
        return optax.apply_updates(weights, updates), state, loss, moved

    state = jax.jit(optimiser.init)(weights)
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(weights, state, fixed, moving).compile()
    for number in range(steps):
        if number == WARM_UP:
            jax.block_until_ready(weights)
            began = time.perf_counter()
        weights, state, loss, moved = compiled(weights, state, fixed, moving)
    jax.block_until_ready(weights)
    ms = (time.perf_counter() - began) / (steps - WARM_UP) * 1e3
    sizes = compiled.memory_analysis()
    memory = sizes.temp_size_in_bytes + sizes.argument_size_in_bytes
    memory += sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    moved = torch.from_numpy(np.array(moved))
    lncc = torchreg.lncc_loss(moved, images[0].cpu(), kernel_size=WINDOW)
    return {"ms": ms, "memory_mib": memory / 2**20, "loss": float(loss), "lncc": lncc.item()}


def make_pair(size: Sequence[int], device: str) -> list[torch.Tensor]:
    """A textured ellipsoid before a constant background, and the same moved by some voxels."""
    generator = torch.Generator().manual_seed(0)
    noise, field = (
        torch.randn(1, channels, *shape, generator=generator).to(device)
        for channels, shape in ((1, size), (3, [max(2, n // 16) for n in size]))
    )
    axes = [torch.linspace(-1, 1, n, device=device) for n in size]
    radius = torch.stack(torch.meshgrid(*axes, indexing="ij")).norm(dim=0)
    texture = torchreg.gaussian_smooth(noise, sigma=2)
    texture = torch.where(radius < 0.8, 0.6 + 0.15 * texture / texture.std(), BACKGROUND)
    flow = 3 * torchreg.interpolate(field, torch.eye(3, 4, device=device)[None], out_shape=size)
    # Zeros come in where nothing is: of what is above the background, that is nothing, too.
    return [texture, Ours(device).warp(texture - BACKGROUND, flow) + BACKGROUND]


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", nargs=3, type=int, metavar=("Z", "Y", "X"))
    parser.add_argument("--networks", nargs="+", default=[*NETWORKS], choices=NETWORKS)
    parser.add_argument("--precisions", nargs="+", default=[*PRECISIONS], choices=PRECISIONS)
    parser.add_argument("--steps", type=int, default=13, help=f"{WARM_UP} of them are not timed")
    parser.add_argument(
        "--only", nargs="+", default=[""], help="measure who has one of these in its name"
    )
    parser.add_argument(
        "--limit",
        type=float,
        default=200,
        help="seconds of each framework after which nothing more of it is begun",
    )
    add_file_arguments(parser)
    arguments = parser.parse_args()
    arguments.size = tuple(
        arguments.size or ((160, 192, 224) if arguments.device == "cuda" else (32, 32, 32))
    )
    if any(n % 32 for n in arguments.size) or arguments.steps <= WARM_UP:
        parser.error(f"expected a size of multiples of 32, and more steps than {WARM_UP}")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    device, steps = arguments.device, arguments.steps
    record = Record(
        "training",
        arguments,
        torch.cuda.get_device_name() if device == "cuda" else "",
        shape=[1, 1, *arguments.size],
        dtype="float32 and bfloat16",
        steps=steps,
    )
    images = make_pair(arguments.size, device)

    def measure(name: str, precision: str, who: str, train: Callable[..., dict[str, Any]]) -> None:
        work = f"{name}, {precision}"
        spent = time.perf_counter() - began
        if not any(part in who for part in arguments.only):
            return
        if spent > arguments.limit:
            print(f"{work:<24} {who:<20} not begun after {spent:.0f} s", flush=True)
            return
        try:
            found = train(NETWORKS[name], precision, images, steps)
        except Exception as error:
            if who in OURS or isinstance(error, ModuleNotFoundError):
                raise
            found = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
        record.add(work, who, **found)
        told = "  ".join(f"{k} {v:.6g}" if k != "error" else v for k, v in found.items())
        print(f"{work:<24} {who:<20} {told}", flush=True)
        gc.collect()
        torch.cuda.empty_cache()

    began = time.perf_counter()
    for name, precision in itertools.product(arguments.networks, arguments.precisions):
        for who, kind in TORCH.items():
            try:
                parts = kind(device)
            except ImportError:
                record.miss(who)
                continue
            measure(name, precision, who, functools.partial(train_in_torch, parts))
    # JAX has time of its own: its eight programs take some 20 s each to compile, which nothing of
    # PyTorch should use up.
    began = time.perf_counter()
    for name, who in itertools.product(arguments.networks, ("jaxreg", "jnp")):
        for precision in arguments.precisions:
            try:
                measure(name, precision, who, functools.partial(train_in_jax, who))
            except ModuleNotFoundError as error:
                record.miss(error.name or who)
    record.write()


if __name__ == "__main__":
    main()
