"""Time that an eager PyTorch call takes beside its kernels, on one CPU core.

Volumes of 2x2x2 voxels, so that the kernels take next to nothing; microseconds of the calling
thread, the least of many rounds. The last line is an autograd function that does nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

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


def microseconds(call: Callable[[], Any]) -> float:
    least = float("inf")
    for _ in range(ROUNDS):
        start = time.thread_time()
        for _ in range(CALLS):
            call()
        least = min(least, time.thread_time() - start)
    return least / CALLS * 1e6


def main() -> None:
    torch.set_num_threads(1)
    image, affine = torch.rand(1, 1, 2, 2, 2), torch.eye(3, 4)[None]
    u, v = torch.zeros(1, 2, 2, 2, 3), torch.zeros(1, 2, 2, 2, 3)
    work: list[tuple[str, Callable[..., torch.Tensor], list[torch.Tensor]]] = [
        ("interpolate u, grad u", lambda u: torchreg.interpolate(image, grid=u), [u]),
        ("interpolate affine and u, grad all", torchreg.interpolate, [image, affine, u]),
        ("compose, grad u, v", torchreg.compose, [u, v]),
        ("nothing", Nothing.apply, [u]),
    ]
    print(f"{'':36}{'forward':>9}{'recorded':>10}{'and backward':>14}")
    for name, function, operands in work:
        leaves = [operand.clone().requires_grad_() for operand in operands]
        cotangent = torch.ones_like(function(*operands))
        times = [
            microseconds(lambda f=function, ops=operands: f(*ops)),
            microseconds(lambda f=function, ops=leaves: f(*ops)),
            microseconds(
                lambda f=function, ops=leaves, c=cotangent: torch.autograd.grad(f(*ops), ops, c)
            ),
        ]
        print(f"{name:36}{times[0]:9.1f}{times[1]:10.1f}{times[2]:14.1f}")


if __name__ == "__main__":
    main()
