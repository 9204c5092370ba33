"""Calls from several threads, before and after a fork, and cut short by an interrupt."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from backends import Backend
from examples import ALL_OPS, example, first_result
from inputs import assert_same, random_array

# Large enough for every loop to be divided among threads, and odd enough to be divided unevenly.
SHAPE = (19, 23, 31)


@pytest.mark.parametrize("op", ALL_OPS)
def test_calls_made_at_the_same_time_give_the_same_bits(backend: Backend, op: str) -> None:
    """As many threads as find room, each with operands of its own, forward and backward."""
    calls = [example(op, shape=SHAPE, dtype=np.float32, seed=seed) for seed in range(4)]

    def run(k: int) -> list[np.ndarray]:
        call = calls[k % len(calls)]
        result = first_result(backend.call(op, *call.operands, **call.options))
        cotangent = random_array(k % len(calls), *result.shape, dtype=np.float32)
        wrt = call.differentiable
        return [result, *backend.vjp(op, call.operands, cotangent, wrt, **call.options)]

    expected = [run(k) for k in range(len(calls))]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(run, range(16)))
    for k, actual in enumerate(results):
        for a, e in zip(actual, expected[k % len(calls)], strict=True):
            if backend.device == "cpu":
                assert_same(a, e)
            else:  # atomics add in any order
                np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-4)


def run_program(code: str, folder: Path) -> None:
    """Run Python code in a process of its own, with a few threads; it fails by an exception."""
    program = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, "REGKERNELS_NUM_THREADS": "3", "JAX_PLATFORMS": "cpu"},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        _, errors = program.communicate(timeout=60)
    finally:  # no child that hangs is left behind
        with contextlib.suppress(ProcessLookupError):
            os.killpg(program.pid, signal.SIGKILL)
    assert program.returncode == 0, errors


# One thread for PyTorch: its OpenMP threads do not survive a fork, and it hangs without them.
FORK = """
import os, sys, torch, torchreg
torch.set_num_threads(1)
image, u = torch.rand(1, 1, 40, 41, 42), 0.1 * torch.rand(1, 40, 41, 42, 3)
image.requires_grad_()

def run():
    value = torchreg.interpolate(image, None, u)
    return value.detach(), *torch.autograd.grad(value, image, value)

def check(expected):
    assert all(torch.equal(a, e) for a, e in zip(run(), expected, strict=True))

{before}
child = os.fork()
if child == 0:
    try:
        {in_child}
        check(expected)
        grandchild = os.fork()
        if grandchild == 0:
            check(expected)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(grandchild, 0)[1])
        os._exit(status)
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)
expected = run()
check(expected)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
check(expected)
"""


@pytest.mark.parametrize("calls_before", [True, False])
def test_calls_work_in_forked_children_and_in_the_parent_after(
    calls_before: bool, tmp_path: Path
) -> None:
    """Whether or not there was a pool of threads before: it does not survive a fork."""
    first_call = "expected = run()"
    places = (first_call, "pass") if calls_before else ("pass", first_call)
    run_program(FORK.format(before=places[0], in_child=places[1]), tmp_path)


DATA_LOADER = """
import torch, torchreg

class Warped(torch.utils.data.Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, k):
        generator = torch.Generator().manual_seed(k)
        image = torch.rand(1, 1, 40, 41, 42, generator=generator)
        u = 0.1 * torch.rand(1, 40, 41, 42, 3, generator=generator)
        return torchreg.gaussian_smooth(torchreg.interpolate(image, None, u), 1.0)[0]

data = Warped()
expected = [data[k] for k in range(len(data))]  # the pool exists when the workers fork
loader = torch.utils.data.DataLoader(
    data, batch_size=None, num_workers=2, multiprocessing_context="fork"
)
for _ in range(2):
    for actual, value in zip(loader, expected, strict=True):
        assert torch.equal(actual, value)
        assert torch.equal(data[0], expected[0])
"""


def test_calls_work_in_the_workers_of_a_data_loader(tmp_path: Path) -> None:
    run_program(DATA_LOADER, tmp_path)


INTERRUPT = """
import signal, threading, time
{framework}
# What a shell starts in the background ignores it.
signal.signal(signal.SIGINT, signal.default_int_handler)

expected = call(small)

def interrupt():
    time.sleep(0.1)
    signal.raise_signal(signal.SIGINT)

interrupted = 0
for _ in range(3):
    thread = threading.Thread(target=interrupt)
    try:
        thread.start()
        start = time.monotonic()
        while time.monotonic() < start + 10:
            call(large)
    except KeyboardInterrupt:
        interrupted += 1
    thread.join()
    assert same(call(small), expected)
    assert same(call(large), call(large))
assert interrupted == 3
"""

FRAMEWORKS = {
    "torch": """
import torch, torchreg
from torch import equal as same
small, large = torch.rand(1, 1, 20, 21, 22), torch.rand(1, 1, 90, 90, 90)
def call(x):
    return torchreg.gaussian_smooth(x, 3.0)
""",
    "jax": """
import jax, jaxreg, numpy as np
small = np.random.default_rng(0).random((1, 1, 20, 21, 22), np.float32)
large = np.random.default_rng(1).random((1, 1, 90, 90, 90), np.float32)
def call(x):
    return jaxreg.gaussian_smooth(x, 3.0).block_until_ready()
def same(a, b):
    return bool((a == b).all())
""",
}


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_an_interrupt_leaves_everything_in_order(framework: str, tmp_path: Path) -> None:
    """It arrives in the middle of a long call; what is called next is right."""
    run_program(INTERRUPT.format(framework=FRAMEWORKS[framework]), tmp_path)
