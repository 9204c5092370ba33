"""Train a network that registers a brain to a template: VoxelMorph with jaxreg.

    python examples/train_voxelmorph_jax.py [--size Z Y X] [--steps N] [--resume] ...

The twin of `train_voxelmorph.py`, with the same arguments, in equinox and optax. A U-Net sees the
fixed and the moving image and returns a stationary velocity in voxels. Its exponential moves the
moving image; the loss is LNCC plus a penalty on the slopes of the velocity. The fixed image is the
ICBM152 template that comes with regkernels; the moving ones are the Colin27 brain, warped at
random, another way each time.

All of a step is one compiled program, the random warps in it: there is no loader, and `--workers`
and `--compile` change nothing.

Into the folder of `--output` go `checkpoint.eqx`, from which `--resume` goes on as if nothing had
been in between, and at the end `picture.png`: a pair that the network has not seen.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import jaxreg
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
    option("--compile", action="store_true", help="always: there is no other way here")
    option("--workers", type=int, default=0, help="none: the step warps the images")
    option("--seed", type=int, default=0)
    option("--device", choices=("cuda", "cpu"), help="JAX's own choice if none is named")
    option("--output", type=Path, default=Path("voxelmorph"), metavar="FOLDER")
    option("--every", type=int, default=100, help="steps from one checkpoint to the next")
    option("--resume", action="store_true", help="go on from the checkpoint in FOLDER")
    arguments = parser.parse_args(words)
    multiple = 2 ** len(arguments.widths)
    if any(n % multiple for n in arguments.size):
        parser.error(f"--size: expected multiples of {multiple}, got {tuple(arguments.size)}")
    return arguments


def read_brains(size: Sequence[int]) -> tuple[jax.Array, jax.Array]:
    """Return the template and the other brain on its grid, ``float[1, 1, Z, Y, X]``."""
    fixed, moving = (read_volume(path) for path in load_pair_paths())
    # The headers say where the brains lie; one affine takes both to the grid of the template.
    affine = jnp.asarray(normalised_affine(np.eye(4), fixed, moving), jnp.float32)
    identity = jnp.eye(3, 4)[None]
    on_grid = (
        jaxreg.interpolate(
            jnp.asarray(volume.batched(), jnp.float32) / 255, matrix, out_shape=tuple(size)
        )
        for volume, matrix in ((fixed, identity), (moving, affine))
    )
    return next(on_grid), next(on_grid)


def warp_at_random(
    moving: jax.Array, numbers: jax.Array, arguments: argparse.Namespace
) -> jax.Array:
    """Warp an image once for each number; a number always gives the same image."""
    size = moving.shape[2:]
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(arguments.seed), numbers)
    noise = jax.vmap(lambda key: jax.random.normal(key, (*size, 3)))(keys)
    velocity = jaxreg.gaussian_smooth(noise, sigma=min(size) / 10, channel_last=True)
    velocity *= arguments.deformation / velocity.std((1, 2, 3, 4), keepdims=True)
    velocity = jaxreg.convert_displacement(velocity, "voxel", "normalised")
    return jaxreg.interpolate(moving, grid=jaxreg.scaling_and_squaring(velocity))


class UNet(eqx.Module):
    """Two images in, a velocity out, in voxels, components first: ``float[3, Z, Y, X]``."""

    first: eqx.nn.Conv3d
    down: list[eqx.nn.Conv3d]
    up: list[eqx.nn.Conv3d]
    velocity: eqx.nn.Conv3d

    def __init__(self, widths: Sequence[int], key: jax.Array) -> None:
        keys = iter(jax.random.split(key, 3 + 2 * len(widths)))
        outer = (widths[0], *widths[:-1])
        self.first = eqx.nn.Conv3d(2, widths[0], 3, padding=1, key=next(keys))
        self.down = [
            eqx.nn.Conv3d(before, after, 3, padding=1, stride=2, key=next(keys))
            for before, after in zip(outer, widths, strict=True)
        ]
        self.up = [
            eqx.nn.Conv3d(below + beside, beside, 3, padding=1, key=next(keys))
            for below, beside in zip(reversed(widths), reversed(outer), strict=True)
        ]
        last = eqx.nn.Conv3d(widths[0], 3, 3, padding=1, key=next(keys))
        # The velocity is nearly nothing at first.
        small = 1e-3 * jax.random.normal(next(keys), last.weight.shape)
        self.velocity = eqx.tree_at(
            lambda layer: (layer.weight, layer.bias), last, (small, jnp.zeros((3, 1, 1, 1)))
        )

    def __call__(self, images: jax.Array) -> jax.Array:
        """The velocity that takes the fixed image's voxels to those of the moving one."""
        x = jax.nn.leaky_relu(self.first(images), 0.2)
        beside = []
        for convolution in self.down:
            beside.append(x)
            x = jax.nn.leaky_relu(convolution(x), 0.2)
        for convolution in self.up:
            for axis in (1, 2, 3):
                x = jnp.repeat(x, 2, axis)
            x = jax.nn.leaky_relu(convolution(jnp.concatenate([x, beside.pop()])), 0.2)
        return self.velocity(x)


def register(
    network: UNet, fixed: jax.Array, moving: jax.Array, arguments: argparse.Namespace
) -> tuple[jax.Array, jax.Array]:
    """Return the loss that a step makes less, and the moved images."""
    fixed = jnp.broadcast_to(fixed, moving.shape)
    rounded, images = jax.tree.map(
        lambda x: x.astype(arguments.precision) if eqx.is_inexact_array(x) else x,
        (network, jnp.concatenate([fixed, moving], axis=1)),
    )
    # The velocity is widened before it is integrated, as bfloat16 would round its exponential to
    # 1/128 of a voxel or more.
    velocity = jaxreg.convert_displacement(
        jax.vmap(rounded)(images).astype(jnp.float32),
        "voxel",
        "normalised",
        source_channels="first",
    )
    displacement = jaxreg.scaling_and_squaring(velocity, arguments.squarings)
    moved = jaxreg.interpolate(moving, grid=displacement)
    similarity = jaxreg.lncc_loss(moved, fixed, kernel_size=arguments.kernel_size)
    return similarity + arguments.penalty * jaxreg.diffusion_loss(velocity), moved


def save(file: Path, losses: list[float], trained: Any) -> None:
    """Write a checkpoint, whole or not at all."""
    with open(file.with_suffix(".part"), "wb") as part:
        part.write(json.dumps(losses).encode() + b"\n")
        eqx.tree_serialise_leaves(part, trained)
    os.replace(file.with_suffix(".part"), file)


def load(file: Path, trained: Any) -> tuple[list[float], Any]:
    """Read a checkpoint of what looks like this."""
    with open(file, "rb") as whole:
        losses = json.loads(whole.readline())
        return losses, eqx.tree_deserialise_leaves(whole, trained)


def draw(file: Path, images: Sequence[jax.Array], losses: list[float]) -> None:
    """Write a picture of a pair, before and after, and of the losses."""
    figure = Figure(figsize=(15, 3.2), layout="constrained")
    axes = figure.subplots(1, 6)
    slices = [np.asarray(image[0, 0, :, image.shape[3] // 2]) for image in images]
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
    if arguments.device is None:
        return train(arguments)
    with jax.default_device(jax.devices(arguments.device)[0]):
        return train(arguments)


def train(arguments: argparse.Namespace) -> Found:
    """Train where JAX is told to."""
    fixed, brain = read_brains(arguments.size)
    network = UNet(arguments.widths, jax.random.key(arguments.seed))
    optimiser = optax.adam(arguments.learning_rate)
    state = optimiser.init(eqx.filter(network, eqx.is_inexact_array))

    @eqx.filter_jit(donate="all-except-first")
    def step_of(images: Any, network: UNet, state: Any, numbers: jax.Array) -> Any:
        moving = warp_at_random(images[1], numbers, arguments)
        of = eqx.filter_value_and_grad(register, has_aux=True)
        (loss, _), slopes = of(network, images[0], moving, arguments)
        updates, state = optimiser.update(slopes, state)
        return eqx.apply_updates(network, updates), state, loss

    arguments.output.mkdir(parents=True, exist_ok=True)
    checkpoint = arguments.output / "checkpoint.eqx"
    losses: list[float] = []
    if arguments.resume:
        losses, (network, state) = load(checkpoint, (network, state))

    done = len(losses)
    began = time.perf_counter()
    for step in range(done + 1, arguments.steps + 1):
        # Pairs are numbered by step: a training that was resumed sees those that it had not seen.
        numbers = (step - 1) * arguments.batch_size + jnp.arange(arguments.batch_size)
        network, state, loss = step_of((fixed, brain), network, state, numbers)
        losses.append(float(loss))
        if step % arguments.every == 0 or step == arguments.steps:
            save(checkpoint, losses, (network, state))
            mean = np.mean(losses[-arguments.every :])
            seconds = (time.perf_counter() - began) / (step - done)
            print(f"step {step}: loss {mean:.4f}, {1e3 * seconds:.1f} ms a step", flush=True)

    moving = warp_at_random(brain, jnp.array([UNSEEN]), arguments)
    _, moved = register(network, fixed, moving, arguments)
    before, after = (float(jnp.square(image - fixed).mean()) for image in (moving, moved))
    print(f"an unseen pair differs by {before:.5f} squared, {after:.5f} once moved")
    draw(arguments.output / "picture.png", (fixed, moving, moved), losses)
    return Found(losses, before, after)


if __name__ == "__main__":
    main()
