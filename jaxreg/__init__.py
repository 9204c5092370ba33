"""Fused image-registration kernels for JAX, on CUDA and CPU."""

from jaxreg._ops import export_checks
from jaxreg._shared_planes import planes_over
from jaxreg.descriptors import mind_ssc
from jaxreg.loss import joint_histogram, lncc_loss, mutual_information_loss
from jaxreg.regularisation import (
    bending_energy_loss,
    curvature_loss,
    diffusion_loss,
    divergence_loss,
    elasticity_loss,
    jacobian_loss,
)
from jaxreg.smooth import gaussian_smooth
from jaxreg.steps import riemannian_adam_step, step_gradient
from jaxreg.warp import (
    affine_warp,
    compose,
    convert_displacement,
    coverage,
    interpolate,
    interpolate_labels,
    invert_displacement,
    jacobian_determinant,
    scaling_and_squaring,
    spline_coefficients,
)
from regkernels import __version__

__all__ = [
    "__version__",
    "affine_warp",
    "bending_energy_loss",
    "compose",
    "convert_displacement",
    "coverage",
    "curvature_loss",
    "diffusion_loss",
    "divergence_loss",
    "elasticity_loss",
    "export_checks",
    "gaussian_smooth",
    "interpolate",
    "interpolate_labels",
    "invert_displacement",
    "jacobian_determinant",
    "jacobian_loss",
    "joint_histogram",
    "lncc_loss",
    "mind_ssc",
    "mutual_information_loss",
    "planes_over",
    "riemannian_adam_step",
    "scaling_and_squaring",
    "spline_coefficients",
    "step_gradient",
]
