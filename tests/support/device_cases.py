"""Devices that tests spread volumes over: virtual ones of the CPU, and GPUs where they exist."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh


@dataclass(frozen=True)
class Shared:
    """A volume of so many planes, and the devices that share them."""

    devices: int
    planes: int
    platform: str = "cpu"

    def __str__(self) -> str:
        where = "" if self.platform == "cpu" else f" ({self.platform})"
        return f"{self.planes} planes on {self.devices} devices{where}"

    @contextmanager
    def mesh(self) -> Iterator[Mesh]:
        """Of the devices, along one axis ``z``; the first is the one that others compare with."""
        there = jax.devices(self.platform)
        if len(there) < self.devices:
            pytest.skip(f"{len(there)} devices ({self.platform}) are here, not {self.devices}")
        found = np.array(there[: self.devices])
        with jax.default_device(there[0]):
            yield Mesh(found, ("z",), axis_types=(AxisType.Auto,))


def cases(shared: Iterable[Shared]) -> list[Any]:
    """What `pytest.fixture` takes as its ``params``."""
    return [
        pytest.param(case, id=str(case), marks=[pytest.mark.gpu] if case.platform == "gpu" else [])
        for case in shared
    ]
