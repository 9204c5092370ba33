"""What ITK and the libraries that it reads with print, told in a line that says what follows."""

from __future__ import annotations

import os
import re
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from regkernels.files.formats.reading import FileWarning

__all__ = ["collected_output", "tell_of_output", "telling_warnings"]

_STDERR = threading.Lock()


@contextmanager
def collected_output() -> Iterator[list[str]]:
    """Collect what is written to the standard error of the process, from C++ above all.

    ITK's own warnings alone could be had by a logger of SimpleITK. libpng, HDF5, OpenJPEG and
    MetaIO do not ask it. One thread at a time collects, since there is one standard error; nothing
    else should be called meanwhile, for what Python prints is collected, too.

    Yields
    ------
    list
        Filled at the end, with each message once.
    """
    said: list[str] = []
    with _STDERR, tempfile.TemporaryFile() as caught:
        try:
            kept = os.dup(2)
        except OSError:  # the process has none
            yield said
            return
        try:
            if sys.stderr is not None:
                sys.stderr.flush()
            os.dup2(caught.fileno(), 2)
            yield said
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            caught.seek(0)
            text = caught.read().decode(errors="replace")
            text = re.sub(r"(?m)^WARNING: In \S+, line \d+\n(\w+ \(0x[0-9a-f]+\): )?", "", text)
            said += dict.fromkeys(" ".join(line.split()) for line in text.splitlines())
            said[:] = filter(None, said)


def tell_of_output(path: str | os.PathLike[str], said: list[str]) -> None:
    """Make one `FileWarning` of what ITK has said of a file, if it has said anything."""
    if said:
        words = "; ".join(dict.fromkeys(said))
        warnings.warn(
            f"{path}: ITK warns of it, and goes on ({words}); see with jaxreg info or a viewer "
            "whether its voxels are what and where they should be",
            FileWarning,
            stacklevel=2,
        )


@contextmanager
def telling_warnings(path: str | os.PathLike[str]) -> Iterator[None]:
    """Tell what ITK says of a file that it reads or writes; an error is told alone."""
    with collected_output() as said:
        yield
    tell_of_output(path, said)
