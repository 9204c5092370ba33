"""Volumes whose planes are spread over several devices, within a registration.

The program of a stage is the same on any number of devices: the compiler divides it by where its
arrays are. This module says where they are, under a mesh with the axis `AXIS`, and nothing
elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

__all__ = ["AXIS", "devices_of", "mesh_of", "padded", "placed", "sharding", "spec", "spread"]

AXIS = "planes"
"""The axis of the mesh that planes are spread over."""

LEAST_VOXELS = 2**21
"""A volume of fewer voxels is on every device: to exchange its planes would take longer."""

_LEAST_PLANES = 4
"""On each device; of fewer, most of the work would be for the planes of neighbours."""


def mesh_of(devices: Sequence[jax.Device]) -> Mesh:
    """Return the mesh under which a registration is spread over devices."""
    return Mesh(np.asarray(devices), (AXIS,), axis_types=(AxisType.Auto,))


def sharding(mesh: Mesh, axis: int) -> NamedSharding:
    """Return how an array is spread whose planes lie along an axis."""
    return NamedSharding(mesh, spec(axis))


def padded(planes: int, devices: int) -> int:
    """Return the number of planes of an array that has as many on each device."""
    return -(-planes // devices) * devices


def spread(array: jax.Array, axis: int = 2) -> jax.Array:
    """Return a volume that is spread over the devices, or on each of them if it is small.

    Parameters
    ----------
    array
        Three spatial axes from ``axis`` on, and two others; any other array stays as it is.
    axis
        That of the planes.
    """
    if AXIS not in jax.sharding.get_abstract_mesh().axis_names or array.ndim != 5:
        return array
    is_spread = devices_of(array.shape[axis : axis + 3]) > 1
    return _constrained(array, spec(axis) if is_spread else spec(None))


def devices_of(shape: Sequence[int]) -> int:
    """Return over how many devices a volume is spread; 1 where each has all of it.

    Parameters
    ----------
    shape
        ``(Z, Y, X)``.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if AXIS not in mesh.axis_names or len(shape) != 3:
        return 1
    devices: int = mesh.shape[AXIS]
    small = math.prod(shape) < LEAST_VOXELS or shape[0] < _LEAST_PLANES * devices
    return 1 if small else devices


def placed(array: jax.Array, axis: int) -> jax.Array:
    """Return an array, under the mesh, whose planes lie along an axis and are spread."""
    return _constrained(array, spec(axis))


def spec(axis: int | None) -> PartitionSpec:
    """Return how an array is spread whose planes lie along an axis; `None`: each has all of it."""
    axes = () if axis is None else (*[None] * axis, AXIS)
    return PartitionSpec(*axes)  # type: ignore[no-untyped-call]


def _constrained(array: jax.Array, spec: PartitionSpec) -> jax.Array:
    result: jax.Array = jax.lax.with_sharding_constraint(array, spec)  # type: ignore[no-untyped-call]
    return result
