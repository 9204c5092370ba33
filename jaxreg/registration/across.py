"""Work on volumes whose planes several devices hold, on what a registration leaves behind."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from numpy.typing import ArrayLike

from jaxreg.registration.programs import on_device
from jaxreg.registration.stages.spread import mesh_of, padded, placed, sharding

__all__ = ["LostProcessError", "across", "cut", "extended", "put", "together", "whole"]

Devices = Sequence[jax.Device] | None


class LostProcessError(RuntimeError):
    """A program of several processes failed, most likely because one of them is not there."""


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Say what it means if a program of several processes fails: one of them is not there.

    Programs run beside Python: their results have to be waited for within the context.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        raise LostProcessError(
            f"devices: the program of {jax.process_count()} processes failed, probably because one "
            f"of them has ended or cannot be reached; see what the others say. Here: {error}"
        ) from error


def across(
    devices: Devices,
    function: Callable[..., Any],
    arrays: Sequence[ArrayLike | None],
    axes: Sequence[int],
    result_axis: int | None,
) -> Any:
    """Call a function of volumes, of which no device has all the planes.

    Parameters
    ----------
    devices
        Which have some planes each; `None`: the function is called as it is, on one.
    function
        Of the arrays; its results are arrays in any container.
    arrays
        Volumes; `None` stays what it is.
    axes
        The axis of the planes of each.
    result_axis
        That of the results; `None`: they are numbers.

    Returns
    -------
    The function's results: on the devices if there are as many planes on each, otherwise in the
    memory of the host, and of every host if there are several.

    Raises
    ------
    LostProcessError
        If the devices belong to several processes, and one of them has ended.
    """
    if devices is None:
        given = [x if x is None or isinstance(x, jax.Array) else np.asarray(x) for x in arrays]
        return function(*(None if x is None else on_device(x) for x in given))
    mesh = mesh_of(devices)
    planes = [0 if x is None else np.shape(x)[axis] for x, axis in zip(arrays, axes, strict=True)]

    def on_slabs(*given: jax.Array | None) -> Any:
        results = function(
            *(
                None if array is None else cut(array, axis, count)
                for array, axis, count in zip(given, axes, planes, strict=True)
            )
        )
        if result_axis is None:
            return results
        return jax.tree.map(lambda result: extended(result, result_axis), results)

    given = [
        None if x is None else put(x, axis, mesh) for x, axis in zip(arrays, axes, strict=True)
    ]
    with together(), jax.set_mesh(mesh):
        shapes = jax.eval_shape(function, *arrays)
        results: Any = jax.block_until_ready(jax.jit(on_slabs)(*given))  # type: ignore[no-untyped-call]
        if result_axis is None:
            return results
        return jax.tree.map(
            lambda result, shape: whole(result, result_axis, shape.shape[result_axis]),
            results,
            shapes,
        )


def put(array: ArrayLike, axis: int, mesh: Mesh) -> jax.Array:
    """Spread the planes of an array over devices, of which none gets all, with more at the end."""
    there = np.shape(array)[axis]
    beyond = padded(there, mesh.size) - there
    if beyond or not isinstance(array, jax.Array):
        array = np.asarray(array)
        widths = [(0, beyond if i == axis else 0) for i in range(array.ndim)]
        array = np.pad(array, widths) if beyond else array
    spread: jax.Array = jax.device_put(array, sharding(mesh, axis))
    return spread


def cut(array: jax.Array, axis: int, planes: int) -> jax.Array:
    """Leave out the planes beyond the end, in a program under the mesh."""
    return placed(jax.lax.slice_in_dim(array, 0, planes, axis=axis), axis)


def extended(array: jax.Array, axis: int) -> jax.Array:
    """Add planes so that there are as many on each device, in a program under the mesh."""
    planes = array.shape[axis]
    beyond = padded(planes, jax.sharding.get_abstract_mesh().size) - planes
    widths = [(0, beyond if i == axis else 0) for i in range(array.ndim)]
    return placed(jnp.pad(placed(array, axis), widths), axis)


def whole(array: jax.Array, axis: int, planes: int) -> Any:
    """Return an array with ``planes`` planes, of those that a program had at the end.

    It stays spread where as many planes are on each device, and is in the memory of the host
    elsewhere.
    """
    if not array.is_fully_addressable:
        array = multihost_utils.process_allgather(array, tiled=True)
    elif array.shape[axis] == planes:
        return array
    return np.asarray(array)[(*[slice(None)] * axis, slice(planes))]
