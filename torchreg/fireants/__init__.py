"""The names that users of FireANTs' fused operations write, over the functions of this package.

What FireANTs' documentation shows runs with its imports changed, on the CPU as on CUDA::

    from torchreg.fireants.interpolator import fireants_interpolator as fi
    from torchreg.fireants.losses.fusedcc import FusedLocalNormalizedCrossCorrelationLoss
    from torchreg.fireants.losses.fusedmi import FusedGlobalMutualInformationLoss

:func:`install` makes an installed ``fireants`` compute with these kernels in registrations of its
own. Names, order and defaults of arguments are FireANTs'; layouts and coordinates are those of
:mod:`torchreg.warp`, which are the same. Tensors need not be contiguous.
"""

from torchreg.fireants.installation import install, uninstall
from torchreg.fireants.interpolator import Interpolator, fireants_interpolator
from torchreg.fireants.losses.fusedcc import FusedLocalNormalizedCrossCorrelationLoss
from torchreg.fireants.losses.fusedmi import FusedGlobalMutualInformationLoss

__all__ = [
    "FusedGlobalMutualInformationLoss",
    "FusedLocalNormalizedCrossCorrelationLoss",
    "Interpolator",
    "fireants_interpolator",
    "install",
    "uninstall",
]
