"""The ``--device`` and ``--devices`` options."""

from __future__ import annotations

import enum
import resource

import jax

from jaxreg_cli.telling import detail

__all__ = ["Device", "describe", "find", "find_several", "is_leader", "join", "peak_memory"]


class Device(enum.StrEnum):
    """Where to run."""

    AUTO = "auto"
    CPU = "cpu"
    GPU = "gpu"


def join() -> None:
    """Join the processes that srun, mpirun or the like has started together with this one.

    Raises
    ------
    ValueError
        If JAX does not find them.
    """
    try:
        jax.distributed.initialize()
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            "--distributed: expected to be started by srun, mpirun or another that JAX knows: "
            f"{error}"
        ) from error


def is_leader() -> bool:
    """Tell whether this is the process, of all that run together, that writes and speaks."""
    # A process by itself is; asking JAX for its number would wait until a device has started.
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def find(device: Device) -> jax.Device:
    """Return the JAX device of this process to run on.

    Raises
    ------
    ValueError
        If it asks for a GPU and JAX sees none, or if JAX cannot start at all.
    """
    try:
        found = jax.local_devices(backend=None if device is Device.AUTO else device.value)[0]
    except RuntimeError as error:
        reason = error if device is Device.AUTO else f"JAX sees no {device.value.upper()}"
        raise ValueError(f"--device {device.value}: {reason}") from error
    detail(f"device: {describe(found)}, with JAX {jax.__version__}")
    return found


def find_several(count: str, first: jax.Device, ndim: int) -> list[jax.Device] | None:
    """Return the devices that a volume is spread over, of the kind of the one to run on.

    Parameters
    ----------
    count
        How many, or ``"all"``.
    first
        The device to run on.
    ndim
        Spatial dimensions of the images.

    Returns
    -------
    list of jax.Device or None
        `None`: the one device does.

    Raises
    ------
    ValueError
        If it is no number, or of more devices than there are, or for images in 2-D.
    """
    there = jax.devices(first.platform)
    number = len(there) if count == "all" else int(count) if count.isdecimal() else 0
    if not 1 <= number <= len(there):
        raise ValueError(
            f"--devices: expected a number from 1 to {len(there)}, the devices that JAX sees, or "
            f"all, got {count!r}"
        )
    if number > 1 and ndim != 3:
        if count == "all":
            return None
        raise ValueError(f"--devices: expected 1 for images in {ndim}-D, got {number}")
    return there[:number] if number > 1 else None


def peak_memory() -> dict[str, float]:
    """Return the most that this process has used, in megabytes: of the host, and of a device.

    Where a device has no memory of its own, or JAX does not count it, nothing is said of it.
    """
    found = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3}
    used = [device.memory_stats() for device in jax.local_devices()]
    peaks = [stats["peak_bytes_in_use"] for stats in used if stats]
    if peaks:
        found["device"] = max(peaks) / 1e6
    return {name: round(value, 1) for name, value in found.items()}


def describe(device: jax.Device) -> str:
    """Return a device's name for people."""
    return (
        "CPU" if device.platform == "cpu" else f"{device.platform.upper()} ({device.device_kind})"
    )
