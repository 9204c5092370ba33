"""Time that an eager PyTorch call takes beside its kernels, on one thread of the host.

    python benchmarks/latency.py [--device cuda|cpu] [--only NAME ...] [--json FILE]

Volumes of 2x2x2 voxels, so that the kernels take next to nothing; microseconds of the calling
thread, the least of many rounds: without gradients, with what they need recorded, and with the
backward pass. The last lines are PyTorch's own `grid_sample`, and an autograd function that does
nothing.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from harness import Record, add_file_arguments

import torchreg

ROUNDS, CALLS = 50, 200


class Nothing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(ctx.saved_tensors[0])


def microseconds(call: Callable[[], Any], device: str) -> float:
    least = float("inf")
    for _ in range(ROUNDS):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.thread_time()
        for _ in range(CALLS):
            call()
        least = min(least, time.thread_time() - start)
    return least / CALLS * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", nargs="+", default=[""], help="measure what is called like this")
    add_file_arguments(parser)
    arguments = parser.parse_args()
    device = arguments.device
    torch.set_num_threads(1)
    image, affine = torch.rand(1, 1, 2, 2, 2, device=device), torch.eye(3, 4, device=device)[None]
    u, v = torch.zeros(2, 1, 2, 2, 2, 3, device=device)
    where = torch.nn.functional.affine_grid(affine, [1, 1, 2, 2, 2], align_corners=True)
    work: list[tuple[str, Callable[..., torch.Tensor], list[torch.Tensor]]] = [
        ("interpolate u + grad u", lambda u: torchreg.interpolate(image, grid=u), [u]),
        ("interpolate affine and u + grad all", torchreg.interpolate, [image, affine, u]),
        ("compose + grad u, v", torchreg.compose, [u, v]),
        ("gaussian_smooth + grad x", lambda x: torchreg.gaussian_smooth(x, 1.0), [image]),
        ("lncc_loss + grad pred", lambda x: torchreg.lncc_loss(x, image, kernel_size=3), [image]),
        (
            "grid_sample + grad grid",
            lambda grid: torch.nn.functional.grid_sample(image, grid, align_corners=True),
            [where],
        ),
        ("nothing", Nothing.apply, [u]),
    ]
    record = Record(
        "latency",
        arguments,
        torch.cuda.get_device_name() if device == "cuda" else "",
        shape=tuple(image.shape),
        dtype="float32",
        repeats=ROUNDS * CALLS,
    )
    print(f"{'':36}{'forward':>9}{'recorded':>10}{'and backward':>14}")
    for name, function, operands in work:
        if not any(part in name for part in arguments.only):
            continue
        leaves = [operand.clone().requires_grad_() for operand in operands]
        cotangent = torch.ones_like(function(*operands))
        calls: dict[str, Callable[[], Any]] = {
            "forward": lambda f=function, ops=operands: f(*ops),
            "recorded": lambda f=function, ops=leaves: f(*ops),
            "and backward": lambda f=function, ops=leaves, c=cotangent: torch.autograd.grad(
                f(*ops), ops, c
            ),
        }
        times = {step: microseconds(call, device) for step, call in calls.items()}
        for step, us in times.items():
            record.add(name, f"torchreg {step}", ms=us / 1e3)
        forward, recorded, backward = times.values()
        print(f"{name:36}{forward:9.1f}{recorded:10.1f}{backward:14.1f}", flush=True)


if __name__ == "__main__":
    main()
