"""One small call of every op, for tests of how calls behave and not of what they compute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import reference
from inputs import random_affine, random_array, small_displacement

Array = np.ndarray


def first_result(results: Any) -> Any:
    """What an op without further results returns, or the first of them."""
    return results[0] if isinstance(results, tuple) else results


@dataclass(frozen=True)
class Example:
    """A call of the public function ``name`` with array operands and keyword options."""

    name: str
    operands: tuple[Array, ...]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def count(self) -> int:
        return len(self.operands)

    @property
    def differentiable(self) -> tuple[int, ...]:
        """The operands that it can be differentiated by."""
        return () if self.name in WITHOUT_GRADIENT else tuple(range(self.count))

    def bind(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function of the operands alone; of several results it returns the first."""
        return lambda *operands: first_result(function(*operands, **self.options))

    def reference(self) -> Array:
        return self.bind(getattr(reference, self.name))(*self.operands)


LOSSES = ["lncc_loss", "mutual_information_loss"]

# Kinds of one op of the table, `field_energy`.
FIELD_LOSSES = [
    "diffusion_loss",
    "bending_energy_loss",
    "curvature_loss",
    "elasticity_loss",
    "divergence_loss",
    "jacobian_loss",
]

OPS = [
    "interpolate",
    "compose",
    "affine_warp",
    "scaling_and_squaring",
    "spline_coefficients",
    "gaussian_smooth",
    "jacobian_determinant",
    "convert_displacement",
    "lncc_loss",
    "mutual_information_loss",
    *FIELD_LOSSES,
    "mind_ssc",
]

WITHOUT_GRADIENT = [
    "coverage",
    "joint_histogram",
    "interpolate_labels",
    "invert_displacement",
    "step_gradient",
    "riemannian_adam_step",
]

ALL_OPS = [*OPS, *WITHOUT_GRADIENT]

OPERANDS = {
    "interpolate": ("image", "affine", "grid"),
    "compose": ("u", "v", "affine"),
    "affine_warp": ("affine", "displacement"),
    "scaling_and_squaring": ("velocity",),
    "spline_coefficients": ("image",),
    "gaussian_smooth": ("x",),
    "jacobian_determinant": ("displacement",),
    "convert_displacement": ("displacement",),
    "coverage": ("affine", "displacement"),
    **dict.fromkeys(FIELD_LOSSES, ("displacement",)),
    **dict.fromkeys([*LOSSES, "joint_histogram"], ("pred", "target")),
    "mind_ssc": ("image",),
    "interpolate_labels": ("labels", "affine", "grid"),
    "invert_displacement": ("displacement",),
    "step_gradient": ("moved", "slope", "pull", "displacement"),
    "riemannian_adam_step": ("gradient", "mu", "nu"),
}


# Ops that compute a gradient to their second operand alone as that to the first one, with the two
# exchanged: it may differ in the last bits from what comes with both gradients.
EXCHANGEABLE = ["lncc_loss"]


def example(
    name: str,
    *,
    shape: tuple[int, ...] = (3, 4, 5),
    dtype: object = np.float64,
    seed: int = 0,
    **options: Any,
) -> Example:
    """The op with every operand that is no option, batch 2; further options are added.

    Seeds give different values. Labels are int32 whatever the dtype.
    """
    dim = len(shape)
    base = 10 * seed
    first = small_displacement(base + 1, 2, shape, 0.3, dtype)
    second = small_displacement(base + 2, 2, shape, 0.3, dtype)
    affine = random_affine(base + 3, 2, dim, dtype)
    image = random_array(base + 4, 2, 2, *shape, dtype=dtype)
    labels = np.random.default_rng(base + 4).integers(-3, 4, (2, 2, *shape), np.int32)
    gentle = small_displacement(base + 1, 2, shape, 0.25 / max(shape), dtype)
    other = random_array(base + 5, 2, 2, *shape, dtype=dtype)
    spacing = (0.5, 2.0, 3.5)[:dim]
    # Around all values: where a range is the images' own, differences would move it.
    binning = {"num_bins": 6, "value_range": ((-1.1, 1.2), (-1.3, 1.1))}
    case = {
        "interpolate": Example("interpolate", (image, affine, first)),
        "compose": Example("compose", (first, second, affine)),
        "affine_warp": Example("affine_warp", (affine, first)),
        "scaling_and_squaring": Example("scaling_and_squaring", (first,), {"num_steps": 3}),
        "spline_coefficients": Example("spline_coefficients", (image,)),
        "gaussian_smooth": Example("gaussian_smooth", (image,), {"sigma": 0.8}),
        "jacobian_determinant": Example("jacobian_determinant", (first,)),
        "convert_displacement": Example(
            "convert_displacement",
            (first,),
            {"source": "normalised", "target": "mm", "spacing": spacing},
        ),
        "coverage": Example(
            "coverage",
            (affine, first),
            {"source_shape": tuple(n + 1 for n in shape), "margin": 0.25, "reach": 1.0},
        ),
        **{name: Example(name, (first,)) for name in FIELD_LOSSES},
        "lncc_loss": Example("lncc_loss", (image, other), {"kernel_size": 3}),
        "mutual_information_loss": Example("mutual_information_loss", (image, other), binning),
        "mind_ssc": Example("mind_ssc", (image,), {"radius": 1, "dilation": 1}),
        "joint_histogram": Example("joint_histogram", (image, other), binning),
        "interpolate_labels": Example("interpolate_labels", (labels, affine, first)),
        "invert_displacement": Example("invert_displacement", (gentle,), {"tolerance": 0.0}),
        "step_gradient": Example("step_gradient", (image, other, first, second), {"sigma": 0.8}),
        "riemannian_adam_step": Example(
            "riemannian_adam_step",
            (first, 0.1 * second, 0.1 * first**2),
            {"count": 3, "learning_rate": 0.4, "epsilon": 1e-3, "confined": True, "sigma": 0.8},
        ),
    }[name]
    return replace(case, options={**case.options, **options})
