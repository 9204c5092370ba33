"""Fused image-registration kernels for PyTorch, on CUDA and CPU."""

from regkernels import __version__
from torchreg.descriptors import mind_ssc
from torchreg.loss import (
    LNCCLoss,
    MutualInformationLoss,
    joint_histogram,
    lncc_loss,
    mutual_information_loss,
)
from torchreg.regularisation import (
    bending_energy_loss,
    curvature_loss,
    diffusion_loss,
    divergence_loss,
    elasticity_loss,
    jacobian_loss,
)
from torchreg.smooth import gaussian_smooth
from torchreg.steps import riemannian_adam_step, step_gradient
from torchreg.warp import (
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

__all__ = [
    "LNCCLoss",
    "MutualInformationLoss",
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
    "riemannian_adam_step",
    "scaling_and_squaring",
    "spline_coefficients",
    "step_gradient",
]
