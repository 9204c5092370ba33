"""What there is on this machine: versions, what was compiled, devices. For bug reports."""

from __future__ import annotations

import importlib
import importlib.util
import platform
from collections.abc import Collection
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from regkernels import _core, namesake

__all__ = ["describe", "version_of"]

_PLATFORMS = ("cpu", "cuda")
_LIBRARIES = ("numpy", "jax", "jaxlib", "torch", "SimpleITK")


def describe(frameworks: Collection[str] = ("jax", "torch")) -> dict[str, str]:
    """Return versions, the build and the devices of whichever frameworks are installed.

    Parameters
    ----------
    frameworks
        Whose devices are told; a framework has to be started for that, which takes a second.

    Returns
    -------
    dict
        Names and short texts. A framework that is installed but does not start tells why.
    """
    architectures = ", ".join(_core.cuda_architectures()) or "none (CPU-only build)"
    backends = [name for name in _PLATFORMS if _core.xla_registrations(name)]
    return {
        "regkernels": _core.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{name: version_of(name) for name in _LIBRARIES},
        "torchreg": _torchreg(),
        "XLA FFI API": ".".join(map(str, _core.xla_ffi_api_version())),
        "registered backends": ", ".join(backends),
        "CUDA architectures": architectures,
        "CUDA devices": str(_core.cuda_device_count()),
        "CPU threads": str(_core.num_threads()),
        **{
            title: _devices(framework, find)
            for framework, title, find in (
                ("jax", "JAX devices", _jax_devices),
                ("torch", "PyTorch devices", _torch_devices),
            )
            if framework in frameworks
        },
    }


def version_of(package: str) -> str:
    """Return the version of a distribution, or that it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _torchreg() -> str:
    """Whether what is imported by this name is ours: another package of PyPI has it, too."""
    ours = Path(__file__).resolve().parents[1] / "torchreg"
    spec = importlib.util.find_spec("torchreg")
    folders = [Path(folder) for folder in (spec and spec.submodule_search_locations) or ()]
    if not folders:
        return f"not found, although {ours} should be there"
    if folders[0].resolve() != ours:
        return f"another package of this name, {folders[0]}, hides ours, {ours}"
    return namesake.trouble(ours) or f"ours, {ours}"


def _devices(framework: str, find: Any) -> str:
    if importlib.util.find_spec(framework) is None:
        return f"{framework} is not installed"
    try:
        return ", ".join(find(importlib.import_module(framework)))
    # This is what one runs because something is broken: whatever it is, it is to be told.
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _jax_devices(jax: Any) -> list[str]:
    return [f"{d.platform}:{d.id} ({d.device_kind})" for d in jax.devices()]


def _torch_devices(torch: Any) -> list[str]:
    cuda = range(torch.cuda.device_count())
    return ["cpu", *(f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in cuda)]
