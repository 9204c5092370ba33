"""What the commands read; what is wrong with it is told with the name of the argument."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxreg.registration import InverseResidual, invert_part
from jaxreg.registration.intensities import Clip, check_clip
from jaxreg.registration.transforms.resampling import Outside
from jaxreg.warp import INVERSE_TOLERANCE
from jaxreg_cli.telling import detail, warn
from regkernels import AffineMap, Grid, Volume, read_transform, read_volume
from regkernels.maps import Part

__all__ = [
    "format_values",
    "inverted",
    "naming",
    "parse_clip",
    "parse_outside",
    "parse_spacing",
    "read_chain",
    "read_image",
    "refuse_overwriting",
]

_INVERSE = ":inverse"


@contextmanager
def naming(argument: str) -> Iterator[None]:
    """Say which argument an error is about."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise ValueError(f"{argument}: {error}") from error


def read_chain(
    option: str,
    texts: Sequence[str],
    fixed: Grid | None = None,
    moving: Grid | None = None,
    *,
    ndim: int | None = None,
) -> tuple[Part, ...]:
    """Read transforms given on the command line.

    Parameters
    ----------
    option
        Its name.
    texts
        Files, in the order in which a point goes through them; ``:inverse`` after a name inverts.
    fixed, moving
        Grids of the images that affines of FSL and AFNI are between.
    ndim
        What they have to be; by default what `fixed` is, or else the first one.

    Returns
    -------
    tuple
        In the same order.

    Raises
    ------
    ValueError
        If one cannot be read, or has another dimension.
    """
    chain: list[Part] = []
    ndim = fixed.ndim if fixed is not None else ndim
    for text in texts:
        # What is inverted was found between the same images the other way round.
        is_inverted = text.endswith(_INVERSE)
        grids = (moving, fixed) if is_inverted else (fixed, moving)
        with naming(option):
            path = Path(text.removesuffix(_INVERSE))
            parts = read_transform(path, fixed=grids[0], moving=grids[1])
        detail(f"read {text}: {', then '.join(map(_kind, parts))}")
        for part in parts:
            ndim = ndim or part.ndim
            if part.ndim != ndim:
                raise ValueError(
                    f"{option}: {text}: expected a {ndim}-D transform, got {part.ndim}-D"
                )
        chain += inverted(parts, text)[0] if is_inverted else parts
    return tuple(chain)


def _kind(part: Part) -> str:
    if isinstance(part, AffineMap):
        return "an affine"
    return f"a displacement field of {' x '.join(map(str, part.grid.shape[::-1]))} voxels"


def inverted(
    parts: Sequence[Part], name: str
) -> tuple[tuple[Part, ...], tuple[InverseResidual, ...]]:
    """Invert a chain; say on stderr where a displacement field has no inverse.

    Parameters
    ----------
    parts
        As a point goes through them.
    name
        What they are called in the warning.

    Returns
    -------
    parts, residuals
        The inverses, in the order in which a point goes through them, and how exact each is.
    """
    result: list[Part] = []
    residuals: list[InverseResidual] = []
    for part in reversed(parts):
        inverse, residual = invert_part(part, tolerance=INVERSE_TOLERANCE)
        share = float(np.mean(residual > INVERSE_TOLERANCE))
        if share:
            warn(
                f"{name}: no inverse within {INVERSE_TOLERANCE:g} voxels found for "
                f"{100 * share:.3g} % of the voxels; the largest residual is "
                f"{residual.max():.3g} voxels"
            )
        result.append(inverse)
        residuals.append(InverseResidual(share, float(residual.mean()), float(residual.max())))
    return tuple(result), tuple(residuals)


def read_image(path: Path) -> Volume:
    """Read an image, and tell its size to those who ask for details."""
    began = time.perf_counter()
    volume = read_volume(path)
    size = " x ".join(map(str, volume.shape[::-1]))
    spacing = " x ".join(f"{s:.4g}" for s in np.asarray(volume.grid.spacing))
    channels = f", {volume.channels} channels" if volume.channels > 1 else ""
    detail(
        f"read {path}: {size} voxels of {spacing} mm{channels}, {volume.array.dtype}, in "
        f"{time.perf_counter() - began:.3f} s"
    )
    return volume


def parse_outside(text: str | None) -> Outside:
    """Return what is outside of an image, of a word or of numbers with commas between them."""
    if text is None or text == "background":
        return None if text is None else "background"
    numbers = _numbers(text)
    if numbers is None:
        raise ValueError(
            f"outside: expected background, or a number for all channels or for each, got {text!r}"
        )
    return numbers


def parse_spacing(text: str | None) -> float | tuple[float, ...] | None:
    """Return the size of voxels, of a number for all axes, or of one for each."""
    if text is None:
        return None
    numbers = _numbers(text)
    if numbers is None:
        raise ValueError(
            f"spacing: expected millimetres, one number or one for each axis, got {text!r}"
        )
    return numbers[0] if len(numbers) == 1 else numbers


def format_values(values: NDArray[Any]) -> str:
    """Write the values of all channels, as `parse_outside` takes them."""
    return ",".join(
        str(value) if isinstance(value, int) else f"{value:g}" for value in values.tolist()
    )


def parse_clip(text: str) -> Clip:
    """Return which intensities are clipped, of a word or of two numbers."""
    if text in ("none", "outliers"):
        return None if text == "none" else "outliers"
    try:
        return check_clip(_numbers(text) or ())
    except ValueError:
        raise ValueError(
            "clip: expected outliers, none, or two quantiles from 0 to 1 such as 0.005,0.995, got "
            f"{text!r}"
        ) from None


def _numbers(text: str) -> tuple[float, ...] | None:
    try:
        # Integers stay exact: a label may have more digits than a float.
        return tuple(int(t) if re.fullmatch(r"[+-]?\d+", t) else float(t) for t in text.split(","))
    except ValueError:
        return None


def refuse_overwriting(outputs: Iterable[Path], inputs: Iterable[tuple[str, Path | str]]) -> None:
    """See that no file is read and written, before any work is done.

    Parameters
    ----------
    outputs
        What will be written.
    inputs
        Names of arguments, and what is read.

    Raises
    ------
    ValueError
        If a file is both.
    """

    def place(path: Path) -> Path:
        # An image may consist of two files: whoever writes its header writes its voxels, too.
        whole = path.resolve()
        return whole.parent / re.sub(r"\.hdr(\.gz)?$", r".img\1", whole.name)

    written = {place(path) for path in outputs}
    for argument, path in inputs:
        path = Path(str(path).removesuffix(_INVERSE))
        if place(path) in written:
            raise ValueError(f"{argument}: {path} would be overwritten; write somewhere else")
