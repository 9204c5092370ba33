"""Programs that JAX compiles: which, and how to have none."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax
import jax.monitoring
from jax.experimental.compilation_cache import compilation_cache


@contextlib.contextmanager
def compiled_programs() -> Iterator[list[str]]:
    """The names of the programs that JAX traces, compiles or loads meanwhile, in any thread."""
    names: list[str] = []

    def listen(event: str, seconds: float, **about: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(str(about.get("fun_name")))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@contextlib.contextmanager
def forgetting_programs() -> Iterator[None]:
    """JAX without what it has compiled, before and after, and with the options that it had."""
    names = (
        "jax_enable_compilation_cache",
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    )
    options = {name: getattr(jax.config, name) for name in names}
    jax.clear_caches()
    compilation_cache.reset_cache()
    yield
    for name, value in options.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
