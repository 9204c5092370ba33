"""Registration of volumes in physical space, with loops that run inside ``jax.jit``.

>>> from jaxreg.data import load_pair_paths
>>> from jaxreg.registration import read_volume, register, write_volume
>>> fixed, moving = map(read_volume, load_pair_paths())  # doctest: +SKIP
>>> result = register(fixed, moving)  # doctest: +SKIP
>>> write_volume(result.moved, "moved.nii.gz")  # doctest: +SKIP

Needs SimpleITK to read and write files: ``pip install 'regkernels[jax,cli]'``.
"""

from __future__ import annotations

from jaxreg.registration.adam import AdamMoments, riemannian_adam_step
from jaxreg.registration.deformable import Deformable, step_gradient
from jaxreg.registration.engine import ArrayRegistration, Stage, register_images
from jaxreg.registration.evaluation import dice, target_registration_error
from jaxreg.registration.greedy import Greedy
from jaxreg.registration.grid import Grid
from jaxreg.registration.itk_transforms import (
    read_transform,
    write_affine,
    write_displacement,
    write_transform,
)
from jaxreg.registration.linear import Affine, Linear, Rigid, Similarity, Translation
from jaxreg.registration.moments import Moments
from jaxreg.registration.pipeline import (
    Folds,
    InverseError,
    LevelRecord,
    Registration,
    StageRecord,
    register,
)
from jaxreg.registration.presets import preset, stage_from_name
from jaxreg.registration.problem import Alignment
from jaxreg.registration.progress import Callback, Progress
from jaxreg.registration.pyramid import downsample, level_shape, resize_field, resize_image
from jaxreg.registration.similarity import mse_loss, ncc, ncc_loss
from jaxreg.registration.stage import Iterative, Trace
from jaxreg.registration.svf import SVF
from jaxreg.registration.syn import SyN
from jaxreg.registration.transform import DisplacementField, Transform, move_points, resample
from jaxreg.registration.volume import (
    Volume,
    centre_of_mass,
    normalised_affine,
    read_volume,
    rigid_motion,
    write_volume,
)

__all__ = [
    "SVF",
    "AdamMoments",
    "Affine",
    "Alignment",
    "ArrayRegistration",
    "Callback",
    "Deformable",
    "DisplacementField",
    "Folds",
    "Greedy",
    "Grid",
    "InverseError",
    "Iterative",
    "LevelRecord",
    "Linear",
    "Moments",
    "Progress",
    "Registration",
    "Rigid",
    "Similarity",
    "Stage",
    "StageRecord",
    "SyN",
    "Trace",
    "Transform",
    "Translation",
    "Volume",
    "centre_of_mass",
    "dice",
    "downsample",
    "level_shape",
    "move_points",
    "mse_loss",
    "ncc",
    "ncc_loss",
    "normalised_affine",
    "preset",
    "read_transform",
    "read_volume",
    "register",
    "register_images",
    "resample",
    "resize_field",
    "resize_image",
    "riemannian_adam_step",
    "rigid_motion",
    "stage_from_name",
    "step_gradient",
    "target_registration_error",
    "write_affine",
    "write_displacement",
    "write_transform",
    "write_volume",
]
