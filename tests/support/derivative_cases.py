"""Calls whose second derivatives both packages check, one list for the two."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from examples import OPERANDS, example
from inputs import random_array

Array = np.ndarray
Function = Callable[..., Any]

SIZES = {2: (4, 5), 3: (2, 3, 4)}
MODES = ("bilinear", "cubic", "b-spline")
PADDINGS = ("zeros", "border", "reflection")


@dataclass(frozen=True)
class DerivativeCase:
    """A call by the names of its operands, of two items with two channels.

    Parameters
    ----------
    name
        Of the public function.
    dim
        The number of spatial axes.
    by
        The operands of its example that it has, all of them if there are none here.
    single
        The operand that both items share.
    mask
        Whether voxels are weighed.
    options
        Further ones.
    """

    name: str
    dim: int
    by: tuple[str, ...] = ()
    single: str = ""
    mask: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        options = (
            f"{k}={v}" if isinstance(v, bool | int | float | tuple) else v
            for k, v in self.options.items()
        )
        parts = [self.name, f"{self.dim}d", *self.by, *(["mask"] if self.mask else []), *options]
        return "-".join(parts).replace(" ", "")

    def operands(self) -> dict[str, Array]:
        """The operands, by their names."""
        case = example(self.name, shape=SIZES[self.dim], seed=4)
        named = dict(zip(OPERANDS[self.name], case.operands, strict=True))
        names = self.by or tuple(named)
        return {x: named[x][:1] if x == self.single else named[x] for x in names}

    def bind(self, function: Function, array: Callable[[Array], Any]) -> Function:
        """The function of the operands alone; ``array`` makes an array of a mask."""
        options = example(self.name, shape=SIZES[self.dim]).options | self.options
        if self.mask:
            options["mask"] = array(abs(random_array(7, 2, 1, *SIZES[self.dim])))
        names = tuple(self.operands())
        return lambda *operands: function(**dict(zip(names, operands, strict=True)), **options)


def _samples(name: str, ways: dict[tuple[str, ...], tuple[int, ...]]) -> list[DerivativeCase]:
    """Calls for every way to say where samples are, number of axes and mode.

    They take turns in padding, so that every mode has every padding, in where the coordinates end,
    and in which operand the items share.
    """
    kinds = [(by, dim) for by, dims in ways.items() for dim in dims]
    cases = []
    for turn, (by, dim) in enumerate(kinds):
        for place, mode in enumerate(MODES):
            options = {
                "mode": mode,
                "padding_mode": PADDINGS[(turn + place) % 3],
                "align_corners": (turn + place) % 2 == 0,
            }
            single = (*by, "")[(turn + place) % (len(by) + 1)]
            cases.append(DerivativeCase(name, dim, by, single, options=options))
    return cases


SAMPLES = [
    *_samples(
        "interpolate",
        {("image", "affine"): (2, 3), ("image", "grid"): (2, 3), ("image", "affine", "grid"): (3,)},
    ),
    *_samples("compose", {("u", "v"): (2, 3), ("u", "v", "affine"): (3,)}),
]
"""Beside the calls with all operands in the plane, which have tests of their own."""

CUBIC_IN_SPACE = {("interpolate", ("image", "grid"), "cubic"), ("compose", ("u", "v"), "b-spline")}

SAMPLES_TO_COMPILE = [
    case
    for case in SAMPLES
    if case.options["mode"] == "bilinear"
    or (case.dim == 3 and (case.name, case.by, case.options["mode"]) in CUBIC_IN_SPACE)
]
"""Those that JAX checks, too. It takes five to ten seconds to compile cubic ones, each of which is
of the maths that PyTorch goes by as well (`regkernels.definitions`).
"""

OTHERS = [
    DerivativeCase("affine_warp", 2, single="affine", options={"align_corners": False}),
    DerivativeCase("affine_warp", 3, single="displacement"),
    DerivativeCase("gaussian_smooth", 2, options={"sigma": (0.6, 1.1)}),
    DerivativeCase("lncc_loss", 2, single="pred", mask=True),
    DerivativeCase("lncc_loss", 3, mask=True),
    DerivativeCase("lncc_loss", 3, single="target", mask=True, options={"reduction": "none"}),
    DerivativeCase("lncc_loss", 3, options={"window": "gaussian"}),
    DerivativeCase("mutual_information_loss", 2, single="pred", mask=True),
    DerivativeCase("mutual_information_loss", 3, mask=True),
    DerivativeCase("mutual_information_loss", 3, mask=True, options={"reduction": "none"}),
    DerivativeCase("mutual_information_loss", 3, options={"kernel": "b-spline"}),
]
