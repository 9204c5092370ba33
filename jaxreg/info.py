"""``python -m jaxreg.info``: versions, build and devices, for bug reports."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import _regcore
import jax

import jaxreg._ops  # noqa: F401  registers the kernels


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def describe() -> dict[str, str]:
    """What there is, by name, as short texts."""
    architectures = _regcore.cuda_architectures()
    devices = [f"{d.platform}:{d.id} ({d.device_kind})" for d in jax.devices()]
    backends = ["cpu"] + (["cuda"] if architectures else [])
    return {
        "regkernels": _regcore.__version__,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": _version("jaxlib"),
        "torch": _version("torch"),
        "XLA FFI API": ".".join(str(part) for part in _regcore.xla_ffi_api_version()),
        "CUDA architectures": ", ".join(architectures) or "none (CPU-only build)",
        "CUDA devices": str(_regcore.cuda_device_count()),
        "JAX devices": ", ".join(devices),
        "registered backends": ", ".join(backends),
        "CPU threads": str(_regcore.num_threads()),
    }


def main() -> None:
    """Print the description."""
    facts = describe()
    width = max(len(name) for name in facts)
    for name, value in facts.items():
        print(f"{name:<{width}}  {value}")


if __name__ == "__main__":
    main()
