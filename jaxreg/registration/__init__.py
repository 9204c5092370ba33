"""Registration of volumes in physical space, with loops that run inside ``jax.jit``.

>>> from regkernels.data import load_pair_paths
>>> from regkernels import read_volume, write_volume
>>> from jaxreg.registration import register
>>> fixed, moving = map(read_volume, load_pair_paths())  # doctest: +SKIP
>>> result = register(fixed, moving)  # doctest: +SKIP
>>> write_volume(result.moved, "moved.nii.gz")  # doctest: +SKIP

The names in ``__all__`` are what there is to import, from here: ``from jaxreg.registration import
LNCC, SyN, register``. In which submodule each of them stands is an implementation detail, and may
change in any release.

SimpleITK is needed to read and write files: ``pip install 'regkernels[jax,cli]'``.
"""

from __future__ import annotations

from jaxreg.registration import pytrees as pytrees
from jaxreg.registration.evaluation import (
    HausdorffDistance,
    ImageSimilarity,
    dice,
    hausdorff_distance,
    image_similarity,
    target_registration_error,
)
from jaxreg.registration.motion import Motion, align_frames
from jaxreg.registration.plausibility import Doubt
from jaxreg.registration.progress import Callback, Progress
from jaxreg.registration.register import (
    Folds,
    InverseResidual,
    LevelRecord,
    Registration,
    StageRecord,
    register,
)
from jaxreg.registration.register_images import ArrayRegistration, register_images
from jaxreg.registration.stages.adam import AdamMoments, riemannian_adam_step
from jaxreg.registration.stages.base import Stage, Trace
from jaxreg.registration.stages.deformable import Deformable
from jaxreg.registration.stages.diffeomorphic import Diffeomorphic
from jaxreg.registration.stages.ffd import FFD
from jaxreg.registration.stages.greedy import Greedy
from jaxreg.registration.stages.iterative import Iterative
from jaxreg.registration.stages.linear import Affine, Linear, Rigid, Similarity, Translation
from jaxreg.registration.stages.metrics import (
    LNCC,
    MI,
    MIND,
    MSE,
    NCC,
    NMI,
    CoarseToFine,
    Metric,
    PerChannel,
    mse_loss,
    ncc,
    ncc_loss,
)
from jaxreg.registration.stages.moments import Moments
from jaxreg.registration.stages.presets import preset, stage_from_name
from jaxreg.registration.stages.problem import Alignment
from jaxreg.registration.stages.pyramid import downsample, level_shape, resize_field, resize_image
from jaxreg.registration.stages.regularisers import (
    Bending,
    Curvature,
    Diffusion,
    Divergence,
    Elasticity,
    Jacobian,
    Regulariser,
)
from jaxreg.registration.stages.svf import SVF
from jaxreg.registration.stages.syn import SyN
from jaxreg.registration.template import (
    RoundRecord,
    Template,
    TemplateProgress,
    build_template,
)
from jaxreg.registration.template_store import FolderStore, MemoryStore, TemplateStore
from jaxreg.registration.transforms.parts import invert_part
from jaxreg.registration.transforms.resampling import outside_values, resample
from jaxreg.registration.transforms.transform import Transform

__all__ = [
    "FFD",
    "LNCC",
    "MI",
    "MIND",
    "MSE",
    "NCC",
    "NMI",
    "SVF",
    "AdamMoments",
    "Affine",
    "Alignment",
    "ArrayRegistration",
    "Bending",
    "Callback",
    "CoarseToFine",
    "Curvature",
    "Deformable",
    "Diffeomorphic",
    "Diffusion",
    "Divergence",
    "Doubt",
    "Elasticity",
    "FolderStore",
    "Folds",
    "Greedy",
    "HausdorffDistance",
    "ImageSimilarity",
    "InverseResidual",
    "Iterative",
    "Jacobian",
    "LevelRecord",
    "Linear",
    "MemoryStore",
    "Metric",
    "Moments",
    "Motion",
    "PerChannel",
    "Progress",
    "Registration",
    "Regulariser",
    "Rigid",
    "RoundRecord",
    "Similarity",
    "Stage",
    "StageRecord",
    "SyN",
    "Template",
    "TemplateProgress",
    "TemplateStore",
    "Trace",
    "Transform",
    "Translation",
    "align_frames",
    "build_template",
    "dice",
    "downsample",
    "hausdorff_distance",
    "image_similarity",
    "invert_part",
    "level_shape",
    "mse_loss",
    "ncc",
    "ncc_loss",
    "outside_values",
    "preset",
    "register",
    "register_images",
    "resample",
    "resize_field",
    "resize_image",
    "riemannian_adam_step",
    "stage_from_name",
    "target_registration_error",
]
