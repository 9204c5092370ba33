"""Compiled programs in files, found by what they follow from, without tracing them.

JAX's own cache asks for a program by what it was lowered to. Here it is the sources of this package
that stand for it, with the versions of what else takes part, the settings and the device.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import io
import os
import pickle
import platform
import re
import threading
import time
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import serialize_executable

import jaxreg
import regkernels
from regkernels.files.atomic import atomic_path

__all__ = [
    "SUFFIX",
    "Entry",
    "Executable",
    "Key",
    "digest",
    "pickled",
    "processor",
    "read",
    "write",
]

Executable = Callable[..., Any]

Key = tuple[Any, ...]
"""What tells a program from all others."""

SUFFIX = "-registration"
"""Of the names of files."""

_HEAD = b"programs of regkernels\n"
"""The first bytes of a file; then come a digest of the others, and those."""

_DIGEST = hashlib.sha256().digest_size

_PACKAGES = ("jax", "jaxlib", "numpy", "optax")
_KNOWN = {*_PACKAGES, "builtins", "collections", "copyreg", "jaxreg", "regkernels"}
"""Where what a program follows from may be defined: others may change and nothing would tell."""


class Entry(NamedTuple):
    """A compiled program as it is kept."""

    key: Key
    """Begins with the name of the function, in its module."""
    executable: bytes
    in_tree: Any
    out_tree: Any

    @property
    def name(self) -> str:
        """That of the function."""
        return str(self.key[0]).rpartition(".")[2]

    @classmethod
    def of(cls, key: Key, compiled: Any) -> Entry | None:
        """Return a program as it is kept; `None` if it cannot be."""
        try:
            entry = cls(key, *serialize_executable.serialize(compiled))
            pickled(entry)
        except Exception:  # there is no list of what a backend raises that has no bytes of it
            return None
        return entry

    def load(self, device: jax.Device) -> Executable:
        """Return the program for a device."""
        # On a CPU linear algebra is told where LAPACK is when it is lowered. SciPy has it, which
        # takes longer to import than the programs of a registration to load.
        if device.platform == "cpu" and b"lapack" in self.executable:
            _prepare()
        loaded: Executable = serialize_executable.deserialize_and_load(
            self.executable,
            self.in_tree,
            self.out_tree,
            backend=device.client,
            execution_devices=[device],
        )
        return loaded


def digest(about: Any, device: jax.Device) -> str | None:
    """Return a name for what a registration on a device follows from.

    Parameters
    ----------
    about
        Settings and shapes.
    device
        Where the programs run.

    Returns
    -------
    str or None
        `None` if it follows from functions or classes whose sources are not ours.
    """
    where = device.platform, device.device_kind, device.id, device.client.platform_version
    try:
        text = pickled((about, where, _surroundings(device)))
    except (pickle.PicklingError, AttributeError, TypeError):
        return None
    return hashlib.sha256(text).hexdigest()


_preparing = threading.Lock()


def _prepare() -> None:
    """Do, once, what JAX does when it lowers linear algebra, and what is loaded needs, too."""
    with _preparing:
        _find_lapack()


@functools.cache
def _find_lapack() -> None:
    jax.jit(jax.lax.linalg.cholesky).lower(np.ones((1, 1), np.float32))


def read(path: Path) -> dict[Key, Entry]:
    """Return the programs of a file; none if there is no such file, or it is damaged."""
    try:
        content = path.read_bytes()
        start = len(_HEAD) + _DIGEST
        text = memoryview(content)[start:]
        # XLA would take a program whose bytes have changed for one, and run it.
        if content[:start] != _HEAD + hashlib.sha256(text).digest():
            return {}
        entries = [Entry(*entry) for entry in pickle.loads(text)]
    except Exception:  # what a pickle refers to may be there no more, or be something else
        return {}
    with contextlib.suppress(OSError):  # what was used last is removed last
        os.utime(path, (time.time(), path.stat().st_mtime))
    return {entry.key: entry for entry in entries}


def write(path: Path, entries: Mapping[Key, Entry]) -> None:
    """Write programs into a file; do without where there is no writing."""
    text = pickled([tuple(entry) for entry in entries.values()])
    with contextlib.suppress(OSError), atomic_path(path) as beside:
        beside.write_bytes(_HEAD + hashlib.sha256(text).digest() + text)


class _Pickler(pickle.Pickler):
    """Refuses functions and classes that come from elsewhere."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, type | types.FunctionType | types.BuiltinFunctionType):
            module = str(obj.__module__).partition(".")[0]
            if module not in _KNOWN:
                raise pickle.PicklingError(f"{obj!r} is of {module}")
        return NotImplemented


def pickled(value: Any) -> bytes:
    """Return a pickle that refers to nothing whose sources are not ours, or raise an error."""
    with io.BytesIO() as file:
        _Pickler(file).dump(value)
        return file.getvalue()


def _surroundings(device: jax.Device) -> tuple[Any, ...]:
    """Return what else decides how a program is traced and compiled."""
    options = {name: repr(value) for name, value in jax.config.values.items()}
    flags = {name: value for name, value in os.environ.items() if name.startswith("XLA_")}
    in_file = flags.get("XLA_FLAGS", "-").strip()
    if not in_file.startswith("-"):
        with contextlib.suppress(OSError):
            flags["in file"] = Path(in_file).read_text(errors="replace")
    # For a CPU work is divided into as many parts as there are cores; for a GPU its driver may
    # take part in the compilation.
    cores, driver = len(os.sched_getaffinity(0)), ""
    if device.platform != "cpu":
        cores = 0
        with contextlib.suppress(OSError):
            driver = Path("/proc/driver/nvidia/version").read_text(errors="replace")
    about = processor(), cores, driver
    return _sources(), about, sorted(options.items()), sorted(flags.items())


@functools.cache
def _sources() -> tuple[str, ...]:
    """Return the versions of packages, and a digest of the sources of ours."""
    found = hashlib.sha256()
    for package in (jaxreg, regkernels):
        (folder,) = map(Path, package.__path__)
        for file in sorted(folder.rglob("*.py")):
            found.update(f"{file.relative_to(folder)}\n".encode())
            found.update(file.read_bytes())
        for file in sorted(folder.glob("*.so")):
            about = file.stat()
            found.update(f"{file.name} {about.st_size} {about.st_mtime_ns}\n".encode())
    versions = (f"{name} {importlib.metadata.version(name)}" for name in _PACKAGES)
    return (found.hexdigest(), platform.python_version(), *versions)


@functools.cache
def processor() -> str:
    """Return what programs for the processor depend on.

    Homes are shared by machines. A program for a processor may stop another one, which lacks some
    of its instructions, and JAX does not tell them apart.
    """
    found = platform.machine() + platform.processor()
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(errors="replace")
        found += "".join(re.findall(r"(?m)^(?:model name|flags|Features)\s*:.*", text)[:2])
    return found
