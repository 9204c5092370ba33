"""Every case that takes ``backend`` runs through both packages, on the CPU and on a CUDA device."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator

# JAX must leave room on the device for the other framework in this process.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

# Several devices anywhere, for what is spread over devices.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
)

# Commands in this process keep nothing that others, or the user, would find.
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")

import hypothesis
import pytest
from backends import BACKENDS, cuda_device_exists

# Random calls: a few, the same every time; with `--hypothesis-profile=fuzz` many, others each time.
hypothesis.settings.register_profile(
    "quick", max_examples=100, deadline=None, derandomize=True, database=None
)
hypothesis.settings.register_profile("fuzz", max_examples=10_000, deadline=None, print_blob=True)
hypothesis.settings.load_profile("quick")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize(
            "backend",
            [
                pytest.param(
                    backend, id=repr(backend), marks=[pytest.mark.gpu] if device == "cuda" else []
                )
                for (_, device), backend in BACKENDS.items()
            ],
        )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without a CUDA device the cases marked ``gpu`` are deselected, and counted as such.

    Only the driver is asked: a framework that fails to see an existing device fails its cases.
    Cases marked ``large`` are deselected unless they are asked for by that name.
    """
    unwanted = [] if cuda_device_exists() else ["gpu"]
    if "large" not in config.option.markexpr:
        unwanted.append("large")
    out = [item for item in items if any(item.get_closest_marker(mark) for mark in unwanted)]
    if out:
        config.hook.pytest_deselected(items=out)
        items[:] = [item for item in items if item not in set(out)]


@pytest.fixture(autouse=True, scope="module")
def forget_programs() -> Iterator[None]:
    """JAX keeps all programs, a megabyte each; those of one file are of no use to the next."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()


@pytest.fixture
def default_signals() -> Iterator[None]:
    """Signals as a terminal leaves them: what starts the tests, such as nohup, may ignore some."""
    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
