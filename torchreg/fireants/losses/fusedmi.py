"""Mutual information, as FireANTs' ``fireants.losses.fusedmi`` has it."""

from __future__ import annotations

from typing import Any

import torch

from torchreg.fireants.losses.arguments import MASK_MODES, check_choice, without_masks
from torchreg.loss import mutual_information_loss

__all__ = ["FusedGlobalMutualInformationLoss"]


def _unit_range(image: torch.Tensor, normalise: bool) -> tuple[Any, Any]:
    """Intensities that are mapped to 0 and 1: these two, if an item's are all between them."""
    if not normalise or not image.shape[0]:
        return 0.0, 1.0
    low, high = image.detach().flatten(1).aminmax(dim=1)
    inside = (low >= 0) & (high <= 1)
    return low.masked_fill(inside, 0), high.masked_fill(inside, 1)


def information(
    pred: torch.Tensor,
    target: torch.Tensor,
    *,
    kernel_type: str,
    num_bins: int,
    sigma_ratio: float,
    normalise: bool,
    smooth_nr: float,
    smooth_dr: float,
    reduction: str,
    masked: bool,
    mask_mode: str,
) -> torch.Tensor:
    mask = None
    if masked:
        pred, target, mask = without_masks(pred, target, mask_mode)
    return mutual_information_loss(
        pred,
        target,
        num_bins=num_bins,
        kernel=kernel_type,
        sigma_ratio=sigma_ratio,
        value_range=(_unit_range(pred, normalise), _unit_range(target, normalise)),
        mask=mask,
        reduction=reduction,
        smooth_nr=smooth_nr,
        smooth_dr=smooth_dr,
    )


class FusedGlobalMutualInformationLoss(torch.nn.Module):
    """Mutual information, by :func:`torchreg.mutual_information_loss`.

    Of several channels, each is computed by itself.

    Parameters
    ----------
    kernel_type
        "gaussian", "b-spline", or "delta", which has no gradient.
    num_bins
        From 2 to 256.
    reduction
        "mean" or "sum" over items and channels, or "none": one number for each.
    normalize_image_if_required
        Whether an item of an image that has intensities outside [0, 1] is mapped there, from its
        least and largest. Without it, intensities are clamped to [0, 1].
    smooth_nr, smooth_dr
        As for :func:`torchreg.mutual_information_loss`.
    sigma_ratio
        From 0.25 to 4: the Gaussian's sigma is ``sigma_ratio / (2 num_bins)``.
    approximate_reduction, torch_compile, suppress_logging
        Taken for FireANTs' sake. Histograms are always exact, and nothing is logged.
    masked
        Whether the last channel of either image is a mask, of numbers of at least 0, and not
        something to compare. It weighs the voxels, and has no gradient.
    mask_mode
        What the weight of a voxel is: "mult", the product of the two masks, or "max".

    Raises
    ------
    ValueError
        When made, or of a call with a shape that does not fit; the message names the argument.
    TypeError
        An argument's type that is not supported.

    Notes
    -----
    What differs from FireANTs: it approximates the histogram by default; without
    ``normalize_image_if_required`` it raises for an image outside [0, 1], which takes a look at
    the image from the host.

    Examples
    --------
    >>> loss = FusedGlobalMutualInformationLoss(num_bins=32)
    >>> loss(moved, fixed).backward()
    """

    def __init__(
        self,
        kernel_type: str = "gaussian",
        num_bins: int = 32,
        reduction: str = "mean",
        normalize_image_if_required: bool = True,
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        sigma_ratio: float = 1.0,
        approximate_reduction: bool = True,
        torch_compile: bool = False,
        masked: bool = False,
        mask_mode: str = "mult",
        suppress_logging: bool = False,
    ) -> None:
        super().__init__()
        op = type(self).__name__
        check_choice(op, "kernel_type", kernel_type, ("gaussian", "b-spline", "delta"))
        check_choice(op, "mask_mode", mask_mode, MASK_MODES)
        self.options: dict[str, Any] = {
            "kernel_type": kernel_type,
            "num_bins": num_bins,
            "sigma_ratio": sigma_ratio,
            "normalise": normalize_image_if_required,
            "smooth_nr": smooth_nr,
            "smooth_dr": smooth_dr,
            "reduction": reduction,
            "masked": masked,
            "mask_mode": mask_mode,
        }
        # What is wrong with an argument is to be told here, by the op, and not by the first call.
        nothing = torch.empty((1, 2, 1, 1), device="meta")
        information(nothing, nothing, **self.options)

    def forward(self, pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The loss of ``pred`` against ``target``, ``float[N, C, *S]`` both."""
        return information(pred, target, **self.options)

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
