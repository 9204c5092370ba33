"""What a shell starts as ``jaxreg``.

It is beside the package `jaxreg`, of which no part can be imported without JAX: what needs nothing
but the names of the commands, as ``jaxreg --help`` does, answers at once.
"""

from jaxreg_cli.main import main, run_as_process

__all__ = ["main", "run_as_process"]
