"""Programs that another process traces, and this one compiles.

To trace a program takes Python longer than XLA takes to compile it, and one thread of a process at
a time. So another process traces some of them, for the platform of this one. What it sends back is
the program as `jax.export` has it, which this process takes for a function: to trace a call of it
takes a twentieth of what the function took.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import os
import pickle
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.export
import numpy as np

from jaxreg import export_checks
from jaxreg.registration.kept_programs import Key, pickled

__all__ = ["answer", "jitted", "platform_of", "prepare", "request"]

_NO_MATTER = "cache", "jax_platforms", "jax_default_device"
"""What is in the names of settings that nothing is traced by."""


def platform_of(device: jax.Device) -> str | None:
    """Return what programs for a device are lowered for; `None` if nothing of ours is."""
    if device.platform == "gpu" and "cuda" in device.client.platform_version.lower():
        return "cuda"
    return "cpu" if device.platform == "cpu" else None


def _settings() -> str:
    """Return a digest of what decides how a program is traced, and where it comes from."""
    options = {
        name: repr(getattr(jax.config, name, value))
        for name, value in jax.config.values.items()
        if not any(part in name for part in _NO_MATTER)
    }
    flags = {name: value for name, value in os.environ.items() if name.startswith("XLA_")}
    files = [sys.modules[name].__file__ for name in ("jax", "jaxreg", "regkernels")]
    about = sorted(options.items()), sorted(flags.items()), files
    return hashlib.sha256(repr(about).encode()).hexdigest()


def request(program: Any, key: Key, platform: str) -> bytes | None:
    """Return what another process is asked for a program; `None` if it would not find it.

    Parameters
    ----------
    program
        A `Program`, which has to be one of a module.
    key
        What tells its call from all others.
    platform
        What it is lowered for.
    """
    if _found(key[0]) is not program:
        return None
    try:
        return pickled((_settings(), platform, key))
    except Exception:  # there is no list of what a class of a user raises
        return None


def _found(name: str) -> Any:
    module, _, function = name.rpartition(".")
    return getattr(sys.modules.get(module), function, None)


def answer(request: bytes) -> bytes:
    """Return what was asked for; nothing if it cannot be had, or not as the asker would have it."""
    try:
        settings, platform, key = pickle.loads(request)
        if settings != _settings():
            return b""
        return _answer(platform, *key)
    except Exception:  # the asker gets it again
        return b""


def _answer(
    platform: str,
    name: str,
    static: Sequence[tuple[str, Any]],
    tree: Any,
    kinds: Sequence[tuple[tuple[int, ...], str, bool]],
    _: bool,
) -> bytes:
    importlib.import_module(name.rpartition(".")[0])
    program, results = _found(name), None

    def flat(*leaves: Any) -> list[Any]:
        nonlocal results
        found = program.function(*jax.tree.unflatten(tree, leaves), **dict(static))
        leaves_of_it, results = jax.tree.flatten(found)
        return leaves_of_it

    exported = _export(flat, [_shape(*kind) for kind in kinds], platform)
    return pickle.dumps((exported, results))


def _export(function: Any, shapes: Sequence[Any], platform: str) -> jax.export.Exported:
    export = jax.export.export(
        jax.jit(function), platforms=(platform,), disabled_checks=export_checks()
    )
    exported = export(*shapes)
    # The derivative is a function within another one, of which there is no pickle, and not needed.
    fields = [field.name for field in dataclasses.fields(exported)]
    without: dict[str, Any] = {name: None for name in fields if callable(getattr(exported, name))}
    return dataclasses.replace(exported, **without)


def _shape(shape: tuple[int, ...], dtype: str, weak_type: bool) -> jax.ShapeDtypeStruct:
    found = jax.ShapeDtypeStruct(shape, np.dtype(dtype), weak_type=weak_type)  # type: ignore[no-untyped-call]
    return found


def prepare() -> None:
    """Do what JAX does once, and what stages import where they are traced."""
    importlib.import_module("jaxreg.registration")
    importlib.import_module("optax")
    _export(lambda x: (x @ x).sum(), [_shape((2, 2), "float32", False)], "cuda")


def jitted(program: Any, answer: bytes) -> Any:
    """Return a program that another process has traced, as `jax.jit` returns a function.

    Parameters
    ----------
    program
        The `Program`.
    answer
        What the other process has answered.
    """
    exported, results = pickle.loads(answer)

    used = set(exported.module_kept_var_idx)

    def run(*args: Any) -> Any:
        # What the program does not use is no argument of it, as ever.
        leaves = [
            leaf if place in used else jax.lax.full(leaf.shape, 0, leaf.dtype)
            for place, leaf in enumerate(jax.tree.leaves(args))
        ]
        return jax.tree.unflatten(results, exported.call(*leaves))

    run.__name__ = run.__qualname__ = program.function.__name__
    return jax.jit(run, donate_argnums=program.donated)
