"""``python -m jaxreg_cli`` is the ``jaxreg`` command."""

from jaxreg_cli import main

if __name__ == "__main__":
    main()
