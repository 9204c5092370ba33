"""Registration of volumes in physical space, with loops that run inside ``jax.jit``.

>>> from jaxreg.data import load_pair_paths
>>> from jaxreg.registration import read_volume, register, write_volume
>>> fixed, moving = map(read_volume, load_pair_paths())  # doctest: +SKIP
>>> result = register(fixed, moving)  # doctest: +SKIP
>>> write_volume(result.moved, "moved.nii.gz")  # doctest: +SKIP

Needs optax, and SimpleITK to read and write files: ``pip install 'regkernels[jax,cli]'``.
"""

from __future__ import annotations

from jaxreg.registration.affine import Affine, align_centres_of_mass, register_affine
from jaxreg.registration.greedy import (
    AdamMoments,
    Greedy,
    register_greedy,
    riemannian_adam_step,
    step_gradient,
)
from jaxreg.registration.grid import Grid
from jaxreg.registration.itk_transforms import (
    read_transform,
    write_affine,
    write_displacement,
    write_transform,
)
from jaxreg.registration.pipeline import Folds, Registration, StageRecord, register
from jaxreg.registration.progress import Callback, Progress
from jaxreg.registration.pyramid import downsample, level_shape, resize_field, resize_image
from jaxreg.registration.similarity import ncc, ncc_loss
from jaxreg.registration.transform import DisplacementField, Transform, move_points, resample_by
from jaxreg.registration.volume import (
    Volume,
    centre_of_mass,
    displacement_to_physical,
    normalised_affine,
    read_volume,
    resample,
    rigid_motion,
    write_volume,
)

__all__ = [
    "AdamMoments",
    "Affine",
    "Callback",
    "DisplacementField",
    "Folds",
    "Greedy",
    "Grid",
    "Progress",
    "Registration",
    "StageRecord",
    "Transform",
    "Volume",
    "align_centres_of_mass",
    "centre_of_mass",
    "displacement_to_physical",
    "downsample",
    "level_shape",
    "move_points",
    "ncc",
    "ncc_loss",
    "normalised_affine",
    "read_transform",
    "read_volume",
    "register",
    "register_affine",
    "register_greedy",
    "resample",
    "resample_by",
    "resize_field",
    "resize_image",
    "riemannian_adam_step",
    "rigid_motion",
    "step_gradient",
    "write_affine",
    "write_displacement",
    "write_transform",
    "write_volume",
]
