"""Train a network that registers a brain to a template: VoxelMorph with torchreg.

    python examples/train_voxelmorph.py [--size Z Y X] [--steps N] [--resume] ...

A U-Net sees the fixed and the moving image and returns a stationary velocity in voxels. Its
exponential moves the moving image; the loss is LNCC plus a penalty on the slopes of the velocity.
The fixed image is the ICBM152 template that comes with regkernels; the moving ones are the Colin27
brain, warped at random, another way each time. `train_voxelmorph_jax.py` is the same in JAX.

Into the folder of `--output` go `checkpoint.pt`, from which `--resume` goes on as if nothing had
been in between, and at the end `picture.png`: a pair that the network has not seen.

Balakrishnan et al., "VoxelMorph: A Learning Framework for Deformable Medical Image Registration",
IEEE TMI 2019; Dalca et al., "Unsupervised Learning of Probabilistic Diffeomorphic Registration",
Medical Image Analysis 2019.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, Subset

import torchreg
from regkernels import normalised_affine, read_volume
from regkernels.data import load_pair_paths

UNSEEN = 2**31 - 1
"""The number of the pair that is left out of the training."""


class Found(NamedTuple):
    """What a training came to.

    Attributes
    ----------
    losses
        Of each step, those before it was resumed included.
    before, after
        The mean squared difference of the unseen pair, as it is and moved by the network.
    """

    losses: list[float]
    before: float
    after: float


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    option = parser.add_argument
    option("--size", nargs=3, type=int, default=(96, 112, 96), metavar=("Z", "Y", "X"))
    option("--widths", nargs="+", type=int, default=(16, 32, 32, 32), help="channels by level")
    option("--steps", type=int, default=1000, help="of the whole training, resumed or not")
    option("--batch-size", type=int, default=1)
    option("--learning-rate", type=float, default=1e-3)
    option("--kernel-size", type=int, default=9, help="voxels along a side of LNCC's window")
    option("--penalty", type=float, default=0.1, help="weight of the squared slopes")
    option("--squarings", type=int, default=6, help="steps of scaling and squaring")
    option("--deformation", type=float, default=2.0, help="voxels, of the moving images")
    option("--precision", choices=("bfloat16", "float32"), default="bfloat16", help="of the U-Net")
    option("--compile", action="store_true", help="by torch.compile")
    option("--workers", type=int, default=2, help="processes that warp images")
    option("--seed", type=int, default=0)
    option("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    option("--output", type=Path, default=Path("voxelmorph"), metavar="FOLDER")
    option("--every", type=int, default=100, help="steps from one checkpoint to the next")
    option("--resume", action="store_true", help="go on from the checkpoint in FOLDER")
    arguments = parser.parse_args(words)
    multiple = 2 ** len(arguments.widths)
    if any(n % multiple for n in arguments.size):
        parser.error(f"--size: expected multiples of {multiple}, got {tuple(arguments.size)}")
    return arguments


class Pairs(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """The template and the other brain, warped at random; a number always gives the same pair."""

    def __init__(self, size: Sequence[int], deformation: float, seed: int) -> None:
        fixed, moving = (read_volume(path) for path in load_pair_paths())
        # The headers say where the brains lie; one affine takes both to the grid of the template.
        affine = torch.from_numpy(normalised_affine(np.eye(4), fixed, moving)).float()
        self.fixed, self.moving = (
            torchreg.interpolate(
                torch.from_numpy(volume.batched()).float() / 255, matrix, out_shape=size
            )
            for volume, matrix in ((fixed, torch.eye(3, 4)[None]), (moving, affine))
        )
        self.size, self.deformation, self.seed = tuple(size), deformation, seed

    def __len__(self) -> int:
        return UNSEEN + 1

    def __getitem__(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed((self.seed << 32) + number)
        noise = torch.randn(1, *self.size, 3, generator=generator)
        velocity = torchreg.gaussian_smooth(noise, sigma=min(self.size) / 10, channel_last=True)
        velocity = self.deformation * velocity / velocity.std()
        velocity = torchreg.convert_displacement(velocity, "voxel", "normalised")
        warp = torchreg.scaling_and_squaring(velocity)
        return self.fixed[0], torchreg.interpolate(self.moving, grid=warp)[0]


class UNet(nn.Module):
    """Two images in, a velocity out, in voxels, components first: ``float[N, 3, Z, Y, X]``."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        outer = (widths[0], *widths[:-1])
        self.first = nn.Conv3d(2, widths[0], 3, padding=1)
        self.down = nn.ModuleList(
            nn.Conv3d(before, after, 3, padding=1, stride=2)
            for before, after in zip(outer, widths, strict=True)
        )
        self.up = nn.ModuleList(
            nn.Conv3d(below + beside, beside, 3, padding=1)
            for below, beside in zip(reversed(widths), reversed(outer), strict=True)
        )
        self.velocity = nn.Conv3d(widths[0], 3, 3, padding=1)
        nn.init.normal_(self.velocity.weight, std=1e-3)  # nearly the identity at first
        nn.init.zeros_(self.velocity.bias)

    def forward(self, fixed: torch.Tensor, moving: torch.Tensor) -> torch.Tensor:
        """The velocity that takes the fixed image's voxels to those of the moving one."""
        x = functional.leaky_relu(self.first(torch.cat([fixed, moving], dim=1)), 0.2)
        beside = []
        for convolution in self.down:
            beside.append(x)
            x = functional.leaky_relu(convolution(x), 0.2)
        for convolution in self.up:
            x = torch.cat([functional.interpolate(x, scale_factor=2.0), beside.pop()], dim=1)
            x = functional.leaky_relu(convolution(x), 0.2)
        return self.velocity(x)


def register(
    network: nn.Module, fixed: torch.Tensor, moving: torch.Tensor, arguments: argparse.Namespace
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the moved images, and the loss that a step makes less."""
    enabled = arguments.precision == "bfloat16"
    with torch.autocast(fixed.device.type, torch.bfloat16, enabled=enabled):
        velocity = network(fixed, moving)
    # What the kernels compute in is float32 whatever they are given. The velocity is widened before
    # it is integrated, as bfloat16 would round its exponential to 1/128 of a voxel or more.
    velocity = torchreg.convert_displacement(
        velocity.float(), "voxel", "normalised", source_channels="first"
    )
    displacement = torchreg.scaling_and_squaring(velocity, arguments.squarings)
    moved = torchreg.interpolate(moving, grid=displacement)
    similarity = torchreg.lncc_loss(moved, fixed, kernel_size=arguments.kernel_size)
    return moved, similarity + arguments.penalty * torchreg.diffusion_loss(velocity)


def save(
    file: Path, network: nn.Module, optimiser: torch.optim.Optimizer, losses: list[float]
) -> None:
    """Write a checkpoint, whole or not at all."""
    whole = {"network": network.state_dict(), "optimiser": optimiser.state_dict(), "losses": losses}
    torch.save(whole, file.with_suffix(".part"))
    os.replace(file.with_suffix(".part"), file)


def draw(
    file: Path, fixed: torch.Tensor, moving: torch.Tensor, moved: torch.Tensor, losses: list[float]
) -> None:
    """Write a picture of a pair, before and after, and of the losses."""
    figure = Figure(figsize=(15, 3.2), layout="constrained")
    axes = figure.subplots(1, 6)
    slices = [
        image[0, 0, :, image.shape[3] // 2].float().cpu().numpy()
        for image in (fixed, moving, moved)
    ]
    shown = [*slices, slices[1] - slices[0], slices[2] - slices[0]]
    titles = ("fixed", "moving", "moved", "moving - fixed", "moved - fixed")
    for axis, picture, title in zip(axes, shown, titles, strict=False):
        if "-" in title:
            axis.imshow(picture, cmap="RdBu", vmin=-1, vmax=1, origin="lower")
        else:
            axis.imshow(picture, cmap="gray", vmin=0, vmax=1, origin="lower")
        axis.set_title(title)
        axis.set_axis_off()
    axes[-1].plot(losses)
    axes[-1].set_title("loss of each step")
    figure.savefig(file)


def main(words: Sequence[str] | None = None) -> Found:
    """Train, and return what came of it."""
    arguments = parse_arguments(words)
    device = torch.device(arguments.device)
    torch.manual_seed(arguments.seed)
    network = UNet(arguments.widths).to(device)
    optimiser = torch.optim.Adam(network.parameters(), lr=arguments.learning_rate)
    step_of = torch.compile(register) if arguments.compile else register

    arguments.output.mkdir(parents=True, exist_ok=True)
    checkpoint = arguments.output / "checkpoint.pt"
    losses: list[float] = []
    if arguments.resume:
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        network.load_state_dict(state["network"])
        optimiser.load_state_dict(state["optimiser"])
        losses = state["losses"]

    pairs = Pairs(arguments.size, arguments.deformation, arguments.seed)
    # Pairs are numbered by step: a training that was resumed sees those that it had not seen.
    done = len(losses)
    numbers = range(done * arguments.batch_size, arguments.steps * arguments.batch_size)
    loader = DataLoader(
        Subset(pairs, numbers),
        batch_size=arguments.batch_size,
        num_workers=arguments.workers,
        pin_memory=device.type == "cuda",
    )
    began = time.perf_counter()
    for step, batch in enumerate(loader, done + 1):
        fixed, moving = (images.to(device, non_blocking=True) for images in batch)
        _, loss = step_of(network, fixed, moving, arguments)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
        if step % arguments.every == 0 or step == arguments.steps:
            save(checkpoint, network, optimiser, losses)
            mean = np.mean(losses[-arguments.every :])
            seconds = (time.perf_counter() - began) / (step - done)
            print(f"step {step}: loss {mean:.4f}, {1e3 * seconds:.1f} ms a step", flush=True)

    fixed, moving = (image[None].to(device) for image in pairs[UNSEEN])
    with torch.no_grad():
        moved, _ = register(network, fixed, moving, arguments)
    before, after = ((image - fixed).square().mean().item() for image in (moving, moved))
    print(f"an unseen pair differs by {before:.5f} squared, {after:.5f} once moved")
    draw(arguments.output / "picture.png", fixed, moving, moved, losses)
    return Found(losses, before, after)


if __name__ == "__main__":
    main()
