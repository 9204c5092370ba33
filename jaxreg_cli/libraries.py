"""Libraries of CUDA, loaded while Python imports what a command computes with."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

__all__ = ["THREAD", "begin_to_load"]

THREAD = "libraries"
"""The name of the threads that load them."""

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
    # As JAX does before it loads them: a library may read it when it is loaded.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")
    _in_thread(_load)


def _in_thread(task: Callable[[], None]) -> None:
    # Python waits for it: what ends a library must not run while that begins.
    threading.Thread(target=task, name=THREAD).start()


def _load() -> None:
    plugins = list(_found("jax_plugins", "xla_cuda*/xla_cuda_plugin.so"))
    if not plugins:
        return
    _in_thread(_start_driver)
    with contextlib.suppress(AttributeError):  # of a C library without the function
        load = ctypes.CDLL(None).dlopen
        load.argtypes, load.restype = (ctypes.c_char_p, ctypes.c_int), ctypes.c_void_p
        for path in (*_of_nvidia(), *plugins):
            load(os.fsencode(path), os.RTLD_NOW)


def _start_driver() -> None:
    """Start the driver, which takes a part of a second."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(_DRIVER).cuInit(0)


def _found(package: str, pattern: str) -> Iterator[Path]:
    """Return files below a package that is not imported for that."""
    with contextlib.suppress(ImportError, ValueError):
        spec = importlib.util.find_spec(package)
        for folder in (spec and spec.submodule_search_locations) or ():
            yield from sorted(Path(folder).glob(pattern))


def _of_nvidia() -> Iterator[Path]:
    for name in _NVIDIA:
        yield from _found("nvidia", f"*/lib/lib{name}.so.*")
