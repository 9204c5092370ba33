"""Whether an error tells that memory did not suffice, on a device or beside it."""

from __future__ import annotations

import sys

__all__ = ["is_lack_of_memory"]


def is_lack_of_memory(error: Exception) -> bool:
    """Tell whether an error is of that kind, whoever has raised it."""
    if isinstance(error, MemoryError):
        return True
    # Without JAX, or half imported, no error is one of its own.
    of_jax = getattr(sys.modules.get("jax.errors"), "JaxRuntimeError", ())
    return isinstance(error, of_jax) and "RESOURCE_EXHAUSTED" in str(error)
