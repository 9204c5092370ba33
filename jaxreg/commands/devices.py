"""The ``--device`` option."""

from __future__ import annotations

import enum

import jax

__all__ = ["Device", "describe", "find"]


class Device(enum.StrEnum):
    """Where to run."""

    AUTO = "auto"
    CPU = "cpu"
    GPU = "gpu"


def find(device: Device) -> jax.Device:
    """Return the JAX device to run on.

    Raises
    ------
    ValueError
        If it asks for a GPU and JAX sees none, or if JAX cannot start at all.
    """
    try:
        return jax.devices(None if device is Device.AUTO else device.value)[0]
    except RuntimeError as error:
        reason = error if device is Device.AUTO else f"JAX sees no {device.value.upper()}"
        raise ValueError(f"--device {device.value}: {reason}") from error


def describe(device: jax.Device) -> str:
    """Return a device's name for people."""
    return (
        "CPU" if device.platform == "cpu" else f"{device.platform.upper()} ({device.device_kind})"
    )
