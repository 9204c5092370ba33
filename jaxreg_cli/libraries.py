"""Libraries of CUDA, loaded while Python imports what a command computes with."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

__all__ = ["begin_to_load"]

_NVIDIA = (
    *("cudart", "nvrtc", "cublas", "cublasLt", "nccl", "cupti"),
    *("cusparse", "cusolver", "cufft", "nvshmem_host", "cudnn"),
)
"""Those that JAX loads when it starts its GPUs, in that order, from packages below ``nvidia``."""

_DRIVER = "libcuda.so.1"


def begin_to_load() -> None:
    """Begin to load the libraries that JAX starts a GPU with, if it is installed for one.

    JAX loads them itself, and finds them loaded: it does so later, when it has been imported, and
    holds Python's lock meanwhile, so that nothing else goes on. A function of a library is called
    without that lock, also the one that loads libraries. What cannot be loaded is left to JAX,
    which says what is missing.
    """
    asked = os.environ.get("JAX_PLATFORMS", "").lower()
    if sys.platform != "linux" or (asked and not {"cuda", "gpu"}.intersection(asked.split(","))):
        return
    plugins = list(_found("jax_plugins", "xla_cuda*/xla_cuda_plugin.so"))
    if not plugins:
        return
    for task in (_start_driver, lambda: _load([*_of_nvidia(), *plugins])):
        threading.Thread(target=task, name="libraries", daemon=True).start()


def _found(package: str, pattern: str) -> Iterator[Path]:
    """Return files below a package that is not imported for that."""
    with contextlib.suppress(ImportError, ValueError):
        spec = importlib.util.find_spec(package)
        for folder in (spec and spec.submodule_search_locations) or ():
            yield from sorted(Path(folder).glob(pattern))


def _of_nvidia() -> Iterator[Path]:
    for name in _NVIDIA:
        yield from _found("nvidia", f"*/lib/lib{name}.so.*")


def _load(paths: list[Path]) -> None:
    with contextlib.suppress(AttributeError):  # of a C library without the function
        load = ctypes.CDLL(None).dlopen
        load.argtypes, load.restype = (ctypes.c_char_p, ctypes.c_int), ctypes.c_void_p
        for path in paths:
            load(os.fsencode(path), os.RTLD_NOW)


def _start_driver() -> None:
    """Start the driver, which takes as long as the import of JAX; JAX then finds it started."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(_DRIVER).cuInit(0)
