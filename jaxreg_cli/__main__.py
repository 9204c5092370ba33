"""``python -m jaxreg_cli`` is the ``jaxreg`` command."""

from jaxreg_cli import run_as_process

if __name__ == "__main__":
    run_as_process()
