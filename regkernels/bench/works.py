"""The rows of the benchmarks: what is called, of which operands, and which gradients are taken."""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = [
    "BACKGROUNDS",
    "DERIVATIVES",
    "DESCRIPTORS",
    "HISTOGRAMS",
    "LABELS",
    "PENALTIES",
    "SMOOTH_DR",
    "WINDOWS",
    "WORKS",
    "Work",
    "find_work",
    "make_similarity",
    "make_warp",
]

Operands = dict[str, np.ndarray]

LABELS = 8
"""Labels of the label map, which has blocks of 16 voxels a side."""

PENALTIES = ("diffusion", "bending_energy", "curvature", "elasticity", "divergence", "jacobian")
"""Of a displacement: the losses whose names they begin."""

SMOOTH_DR = 1e-5

DERIVATIVES = {
    "jvp": "forward mode",
    "Hessian product": "forward mode over reverse mode",
    "double backward": "reverse mode over reverse mode",
}
"""Derivatives that rows take beside gradients, as they are called there, and how they are taken."""

WINDOWS = {f"lncc {k}": (k, "rectangular") for k in (7, 3, 5, 9, 11, 15)}
WINDOWS["lncc gaussian 7"] = (7, "gaussian")
"""Of the rows of LNCC: the length of the window and its kind."""

HISTOGRAMS = {f"mi {n}": (n, "gaussian") for n in (32, 16, 64, 128)}
HISTOGRAMS["mi b-spline 32"] = (32, "b-spline")
"""Of the rows of mutual information: the number of bins and the Parzen window."""

DESCRIPTORS = {f"mind {r}": (r, 2) for r in (2, 1)}
"""Of the rows of descriptors: the radius of the patches and the distance of the neighbours."""

BACKGROUNDS = ("", " with background")
"""Endings of the names of images and of rows: of noise, and of noise with half its voxels alike."""


@dataclass(frozen=True)
class Work:
    """One row of the benchmarks.

    Attributes
    ----------
    call
        Takes `jaxreg` or `torchreg`, whose functions have the same names, and the operands.
    operands
        Names of the operands, as `make` calls them.
    make
        Makes operands from a generator of random numbers and the shape ``(N, C, [Z,] Y, X)``.
    wrt
        Names of the operands whose gradients are taken.
    result
        Name of an operand that has the shape and the dtype of the result, and serves as its
        cotangent; None if the result is a number.
    reads
        How often every operand has to be read for the value, and once more for the gradients.
    derivative
        ``"grad"``: the gradients. Otherwise one of `DERIVATIVES`: the value and its tangent, the
        gradients and their tangents (products of the Hessian and a vector), or the gradients and
        those of their product with a vector, by the operands of ``wrt``.
    along
        Names of operands that serve as tangents, or as that vector, for those of ``wrt``.
    """

    call: Callable[..., Any]
    operands: tuple[str, ...]
    make: Callable[[np.random.Generator, Sequence[int]], Operands]
    wrt: tuple[str, ...] = ()
    result: str | None = None
    reads: tuple[int, int] = (1, 1)
    derivative: str = "grad"
    along: tuple[str, ...] = ()

    @property
    def needed(self) -> tuple[str, ...]:
        """The names of all operands that have to be on the device."""
        names = (*self.operands, *([self.result] if self.result else []), *self.along)
        return tuple(dict.fromkeys(names))

    def bytes_to_move(self, sizes: Mapping[str, int]) -> int:
        """Return the bytes that must move: every input read, every output written.

        Parameters
        ----------
        sizes : mapping of str to int
            Bytes of each operand that is `needed`.
        """
        operands = sum(sizes[name] for name in self.operands)
        result = sizes[self.result] if self.result else 0
        leaves = sum(sizes[name] for name in self.wrt)
        if self.derivative == "jvp":
            # The tangents are read; the value and its tangent are written.
            return sum(self.reads) * operands + leaves + 2 * result
        if self.derivative != "grad":
            # The cotangent and the vector are read; the gradients and their own are written.
            return sum(self.reads) * operands + result + 3 * leaves
        total = self.reads[0] * operands + result
        if self.wrt:
            total += self.reads[1] * operands + result + leaves
        return total


def find_work(name: str) -> Work:
    """Return the work of a row.

    Raises
    ------
    ValueError
        If there is no such row.
    """
    if name not in WORKS:
        similar = difflib.get_close_matches(name, WORKS)
        hint = f"; did you mean {' or '.join(map(repr, similar))}?" if similar else ""
        raise ValueError(f"row: expected one of those that --list shows, got {name!r}{hint}")
    return WORKS[name]


def make_warp(rng: np.random.Generator, shape: Sequence[int]) -> Operands:
    """Return images, labels, smooth displacements, an affine and cotangents.

    Parameters
    ----------
    rng : numpy.random.Generator
        What the numbers are drawn from.
    shape : sequence of int
        ``(N, C, [Z,] Y, X)``.

    Returns
    -------
    dict
        ``image`` and ``g`` have that shape; ``labels`` has it too, of int32; ``u``, ``v`` and
        ``gf`` are ``(N, [Z,] Y, X, D)``; ``affine`` is ``(N, D, D + 1)``.
    """
    batch, size = shape[0], tuple(shape[2:])
    ndim = len(size)
    turn = np.float32(0.1)
    affine = np.eye(ndim, ndim + 1, dtype=np.float32)
    affine[:2, :2] = [[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]
    return {
        "image": rng.normal(size=shape).astype(np.float32),
        "u": _smooth_field(rng, batch, size, 2.0),
        "v": _smooth_field(rng, batch, size, 2.0),
        "affine": affine[None].repeat(batch, 0),
        "labels": _label_map(rng, shape),
        "g": rng.normal(size=shape).astype(np.float32),
        "gf": rng.normal(size=(batch, *size, ndim)).astype(np.float32),
    }


def _label_map(rng: np.random.Generator, shape: Sequence[int]) -> np.ndarray:
    coarse = [*shape[:2], *(-(-n // 16) for n in shape[2:])]
    labels = rng.integers(0, LABELS, coarse, np.int32)
    for axis, length in enumerate(shape[2:], start=2):
        labels = labels.repeat(16, axis).take(range(length), axis)
    return labels


def _smooth_field(
    rng: np.random.Generator, batch: int, size: tuple[int, ...], voxels: float
) -> np.ndarray:
    """Return a displacement with a deviation of some voxels that varies over some 16 of them."""
    coarse = [max(2, n // 16) for n in size]
    field = rng.normal(size=(batch, len(size), *coarse)).astype(np.float32)
    for axis, length in enumerate(size, start=2):
        field = _stretched(field, length, axis)
    scale = [2 * voxels / max(n - 1, 1) for n in reversed(size)]
    return np.ascontiguousarray(np.moveaxis(field, 1, -1)) * np.array(scale, np.float32)


def _stretched(x: np.ndarray, length: int, axis: int) -> np.ndarray:
    """Interpolate linearly along an axis, its ends kept in place."""
    position = np.linspace(0, x.shape[axis] - 1, length, dtype=np.float32)
    low = np.minimum(position.astype(int), x.shape[axis] - 2)
    weight = (
        (position - low).astype(np.float32).reshape([-1 if a == axis else 1 for a in range(x.ndim)])
    )
    stretched: np.ndarray = x.take(low, axis) * (1 - weight) + x.take(low + 1, axis) * weight
    return stretched


def make_similarity(rng: np.random.Generator, shape: Sequence[int]) -> Operands:
    """Return two images that correlate in part, and these with half their voxels at one value.

    Parameters
    ----------
    rng : numpy.random.Generator
        What the numbers are drawn from.
    shape : sequence of int
        ``(N, C, [Z,] Y, X)``.

    Returns
    -------
    dict
        ``pred``, ``target``, ``pred with background`` and ``target with background``, which have
        that shape.
    """
    pred, noise = rng.normal(size=(2, *shape)).astype(np.float32)
    images = {"pred": pred, "target": 0.6 * pred + 0.8 * noise + np.float32(0.5)}
    for name, image in list(images.items()):
        masked = image.copy()
        masked[..., : shape[-2] // 2, :] = image.min()
        images[f"{name} with background"] = masked
    return images


def _make_works() -> dict[str, Work]:
    works: dict[str, Work] = {}

    def warp(name: str, operands: str, wrt: str, result: str, call: Callable[..., Any]) -> None:
        works[name] = Work(call, tuple(operands.split()), make_warp, tuple(wrt.split()), result)

    def by_field(reg: Any, image: Any, u: Any, **options: Any) -> Any:
        return reg.interpolate(image, None, u, **options)

    warp("interpolate u", "image u", "", "g", by_field)
    warp("interpolate u + grad u", "image u", "u", "g", by_field)
    warp("interpolate u + grad image", "image u", "image", "g", by_field)
    warp("interpolate u + grad image, u", "image u", "image u", "g", by_field)
    warp(
        "interpolate u + grad image, u, deterministic",
        "image u",
        "image u",
        "g",
        lambda reg, image, u: by_field(reg, image, u, deterministic=True),
    )
    for mode in ("cubic", "b-spline"):
        call = functools.partial(by_field, mode=mode)
        warp(f"interpolate {mode} u", "image u", "", "g", call)
        warp(f"interpolate {mode} u + grad u", "image u", "u", "g", call)
        warp(f"interpolate {mode} u + grad image, u", "image u", "image u", "g", call)
    warp(
        "interpolate coefficients u",
        "image u",
        "",
        "g",
        functools.partial(by_field, mode="b-spline", prefilter=False),
    )
    warp(
        "spline_coefficients image",
        "image",
        "",
        "g",
        lambda reg, image: reg.spline_coefficients(image),
    )
    by_affine = "interpolate affine"
    warp(by_affine, "image affine", "", "g", lambda reg, *o: reg.interpolate(*o))
    warp(f"{by_affine} + grad affine", "image affine", "affine", "g", works[by_affine].call)
    warp("compose", "u v", "", "gf", lambda reg, *o: reg.compose(*o))
    warp("compose + grad u, v", "u v", "u v", "gf", works["compose"].call)

    def derivatives(
        name: str, wrt: str, along: str, result: str | None, reads: tuple[int, int]
    ) -> None:
        first = works[name]
        for kind in DERIVATIVES:
            works[f"{name} + {kind} {', '.join(wrt.split())}"] = dataclasses.replace(
                first,
                wrt=tuple(wrt.split()),
                result=result,
                reads=reads,
                derivative=kind,
                along=tuple(along.split()),
            )

    # One pass could serve the value and all derivatives.
    derivatives("interpolate u", "image u", "g gf", "g", (1, 0))
    for mode in ("cubic", "b-spline"):
        derivatives(f"interpolate {mode} u", "u", "gf", "g", (1, 0))
    derivatives(by_affine, "affine", "affine", "g", (1, 0))
    derivatives("compose", "u v", "v u", "gf", (1, 0))
    warp(
        f"interpolate {LABELS} labels u",
        "labels u",
        "",
        "labels",
        lambda reg, labels, u: reg.interpolate_labels(labels, None, u),
    )
    warp("invert_displacement u", "u", "", "gf", lambda reg, u: reg.invert_displacement(u))
    warp(
        "smooth field, sigma 1",
        "u",
        "",
        "gf",
        lambda reg, u: reg.gaussian_smooth(u, 1.0, channel_last=True),
    )

    for penalty in PENALTIES:
        for suffix, wrt in (("", ()), (" + grad u", ("u",))):
            # One pass serves the value and the gradient.
            works[f"{penalty}_loss u{suffix}"] = Work(
                lambda reg, u, name=penalty: getattr(reg, f"{name}_loss")(u),
                ("u",),
                make_warp,
                wrt,
                None,
                (1, 0),
            )

    def similarity(
        title: str, reads: tuple[int, int], call: Callable[..., Any], background: str = ""
    ) -> None:
        names = (f"pred{background}", f"target{background}")
        for suffix, wrt in (("", ()), (" + grad pred", names[:1]), (" + grad both", names)):
            works[f"{title}{background}{suffix}"] = Work(
                call, names, make_similarity, wrt, None, reads
            )

    for title, (kernel_size, window) in WINDOWS.items():
        # One pass serves the value and the gradients.
        similarity(
            title,
            (1, 0),
            lambda reg, *images, k=kernel_size, w=window: reg.lncc_loss(
                *images, kernel_size=k, window=w, smooth_dr=SMOOTH_DR
            ),
        )
    for title, (num_bins, kernel) in HISTOGRAMS.items():
        for background in BACKGROUNDS:
            # Both images are read for their range, to be counted, and for the gradient.
            similarity(
                title,
                (2, 1),
                lambda reg, *images, n=num_bins, k=kernel: reg.mutual_information_loss(
                    *images, num_bins=n, kernel=k
                ),
                background,
            )
    derivatives("lncc 7", "pred", "target", None, (1, 0))
    derivatives("mi 32", "pred", "target", None, (2, 1))
    for title, (radius, dilation) in DESCRIPTORS.items():
        # A loss would not have to write descriptors, if it were one kernel.
        similarity(
            title,
            (1, 0),
            lambda reg, *images, r=radius, d=dilation: _squared_difference(
                *(reg.mind_ssc(image, radius=r, dilation=d) for image in images)
            ),
        )
    return works


def _squared_difference(first: Any, second: Any) -> Any:
    return ((first - second) ** 2).mean()


WORKS: Mapping[str, Work] = _make_works()
"""Every row by its name."""
