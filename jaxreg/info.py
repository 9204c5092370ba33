"""``python -m jaxreg.info``: versions, build and devices, for bug reports."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import jax

from jaxreg._ops import build_facts


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def describe() -> dict[str, str]:
    """What there is, by name, as short texts."""
    devices = [f"{d.platform}:{d.id} ({d.device_kind})" for d in jax.devices()]
    return {
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": _version("jaxlib"),
        "torch": _version("torch"),
        "JAX devices": ", ".join(devices),
        **build_facts(),
    }


def main() -> None:
    """Print the description."""
    facts = describe()
    width = max(len(name) for name in facts)
    for name, value in facts.items():
        print(f"{name:<{width}}  {value}")


if __name__ == "__main__":
    main()
