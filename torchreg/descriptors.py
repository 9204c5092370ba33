"""Descriptors of images: what a voxel's surroundings look like, whatever the contrast."""

from __future__ import annotations

import torch

from torchreg._ops import apply


def mind_ssc(image: torch.Tensor, *, radius: int = 2, dilation: int = 2) -> torch.Tensor:
    r"""Modality-independent neighbourhood descriptors with self-similarity context (MIND-SSC).

    Each voxel is described by how alike the patches near it are to each other, which images of
    different contrasts agree about. A channel compares the patches around two of the voxel's
    neighbours ``x + p`` and ``x + q``, which lie ``dilation`` voxels away along two different axes:
    with :math:`D_k` the mean squared difference of the two patches,

    .. math:: \exp\left(-\frac{D_k - \min_j D_j}{V}\right),
              \qquad V = \operatorname{mean}_k \left(D_k - \min_j D_j\right).

    The local variance ``V`` is kept within 0.001 and 1000 times its mean over the voxels of the
    image's channel. Beyond its border the image is continued by its nearest voxel. Where all
    distances are 0, as in a constant background, all descriptors are 1 and have no gradient.
    Neither a gain nor an offset of the intensities makes a difference.

    Parameters
    ----------
    image : float[N, C, *S]
        ``*S`` stands for the spatial axes ``Z, Y, X`` or ``Y, X``. Half precision is computed with
        in float32, and the descriptors are rounded once, at the end.
    radius
        Of the patches, in voxels, from 1 to 4: they are ``2 * radius + 1`` wide.
    dilation
        Distance of the neighbours, in voxels, from 1 to 16.

    Returns
    -------
    float[N, K C, *S]
        In (0, 1], of the image's dtype; at least one channel in ``K`` is 1. ``K`` is 12 in 3-D, 4
        in 2-D, and each channel of the image has its descriptors side by side: for the axes x and
        y, then x and z, then y and z, those of ``(p, q)`` forwards along both, backwards along
        both, forwards along the first and backwards along the second, and the opposite.

        Differentiable. The gradient takes the bounds of the variance as given, and the least
        distance is that of the first channel that has it.

    Raises
    ------
    ValueError
        A shape, ``radius`` or ``dilation`` that does not fit; the message names the argument.
    TypeError
        A dtype or an argument's type that is not supported.

    References
    ----------
    M. P. Heinrich, M. Jenkinson, B. W. Papież, M. Brady, J. A. Schnabel: Towards realtime
    multimodal fusion for image-guided interventions using self-similarities. MICCAI 2013.
    """
    return apply("mind_ssc", (image,), {"radius": radius, "dilation": dilation})
