"""Whether an error tells that memory did not suffice, on a device or beside it."""

from __future__ import annotations

__all__ = ["is_lack_of_memory"]


def is_lack_of_memory(error: Exception) -> bool:
    """Tell whether an error is of that kind, whoever has raised it."""
    import jax

    return isinstance(error, MemoryError) or (
        isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
    )
