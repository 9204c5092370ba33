"""What a measurement was made on: device, driver, versions, and a name for a folder of results."""

from __future__ import annotations

import datetime
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

from regkernels import _core
from regkernels.info import version_of

__all__ = ["describe_machine"]

_LIBRARIES = ("numpy", "jax", "jaxlib", "torch", "monai")


def describe_machine(gpu: str) -> dict[str, Any]:
    """Return what is to be known of a machine beside times that were measured on it.

    Parameters
    ----------
    gpu : str
        The name of the GPU; empty if it was the CPU that was measured.

    Returns
    -------
    dict
        ``device``, the GPU or the CPU with the threads that kernels use; ``card``, the same as the
        name of a folder; ``cpu``; ``driver`` of the GPU; ``versions``; ``date`` (UTC).
    """
    threads = _core.num_threads()
    cpu = f"{_cpu_model()}, {threads} thread{'s' if threads > 1 else ''}"
    device = gpu or cpu
    card = re.sub(r"[^a-z0-9]+", "-", (gpu or f"CPU {cpu}").lower()).strip("-")
    return {
        "device": device,
        "card": card,
        "cpu": cpu,
        **({"driver": _driver()} if gpu else {}),
        "versions": {
            "regkernels": _core.__version__,
            "python": platform.python_version(),
            **{name: version_of(name) for name in _LIBRARIES},
        },
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def _cpu_model() -> str:
    try:
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return " ".join(found[1].split()) if found else f"{platform.machine()} CPU"


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=30
        ).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"
