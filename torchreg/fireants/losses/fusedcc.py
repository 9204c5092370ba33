"""Local normalized cross-correlation, as FireANTs' ``fireants.losses.fusedcc`` has it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from torchreg.fireants.losses.arguments import MASK_MODES, check_choice, without_masks
from torchreg.loss import lncc_loss

__all__ = ["FusedLocalNormalizedCrossCorrelationLoss"]


def correlation(
    pred: torch.Tensor,
    target: torch.Tensor,
    *,
    kernel_size: int,
    kernel_type: str,
    sigma: float | None,
    smooth_nr: float,
    smooth_dr: float,
    reduction: str,
    masked: bool,
    mask_mode: str,
) -> torch.Tensor:
    """The loss of FireANTs' arguments, of which the smoothing is for means over a window."""
    mask = None
    if masked:
        pred, target, mask = without_masks(pred, target, mask_mode)
    width = None
    along_axis = float(kernel_size)
    if kernel_type == "gaussian":
        width = kernel_size / 3 if sigma is None else sigma
        reach = range(-(kernel_size // 2), kernel_size // 2 + 1)
        if width > 0:  # of any other width the op tells what is wrong
            along_axis = sum(math.exp(-0.5 * (d / width) ** 2) for d in reach)
    mass = along_axis ** (pred.ndim - 2)
    return lncc_loss(
        pred,
        target,
        kernel_size=kernel_size,
        window=kernel_type,
        sigma=width,
        smooth_nr=smooth_nr * mass**2,
        smooth_dr=smooth_dr * mass,
        smooth_product=smooth_dr * mass**2,
        mask=mask,
        reduction=reduction,
    )


class FusedLocalNormalizedCrossCorrelationLoss(torch.nn.Module):
    """Local normalized cross-correlation, by :func:`torchreg.lncc_loss`.

    Parameters
    ----------
    spatial_dims
        The number of spatial axes, 2 or 3.
    kernel_size
        Voxels along a side of the window, odd, from 3 to 31; or a list of them, one for each scale
        of a registration, of which the first holds until the scale is set.
    reduction
        "mean" or "sum" over everything, or "none".
    smooth_nr, smooth_dr
        Added to the squared covariance of a window, and to the product of its two variances, each
        of which is ``smooth_dr`` at least. Both are at least 0, ``smooth_dr`` above it.
    use_ants_gradient, use_separable
        Taken for FireANTs' sake. The gradient is always that of the number returned, and windows
        are always separable.
    kernel_type
        "rectangular" or "gaussian".
    sigma
        Of the Gaussian, in voxels.
    masked
        Whether the last channel of either image is a mask, of numbers of at least 0, and not
        something to compare. It weighs the correlations about its voxels, and has no gradient.
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
    Covariance and variances are means over the window. With the default smoothing a window with
    little contrast in either image has a correlation near 1.

    What differs from FireANTs: its gradient is by default ANTs' approximation, which regards the
    centre of each window alone. Of several channels with a mask, "mean" is the mean.

    Examples
    --------
    >>> loss = FusedLocalNormalizedCrossCorrelationLoss(kernel_size=7)
    >>> loss(moved, fixed).backward()
    """

    def __init__(
        self,
        spatial_dims: int = 3,
        kernel_size: int | Sequence[int] = 3,
        reduction: str = "mean",
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        use_ants_gradient: bool = True,
        use_separable: bool = True,
        kernel_type: str = "rectangular",
        sigma: float = 1.5,
        masked: bool = False,
        mask_mode: str = "mult",
    ) -> None:
        super().__init__()
        op = type(self).__name__
        if spatial_dims not in (2, 3):
            raise ValueError(f"{op}: spatial_dims: expected 2 or 3, got {spatial_dims!r}")
        for name, value in (("smooth_nr", smooth_nr), ("smooth_dr", smooth_dr)):
            if not isinstance(value, (int, float)):
                raise TypeError(f"{op}: {name}: expected a number, got {value!r}")
            if not 0 <= value < math.inf or (value == 0 and name == "smooth_dr"):
                least = "above 0" if name == "smooth_dr" else "of at least 0"
                raise ValueError(f"{op}: {name}: expected a finite number {least}, got {value!r}")
        check_choice(op, "kernel_type", kernel_type, ("rectangular", "gaussian"))
        check_choice(op, "mask_mode", mask_mode, MASK_MODES)
        sizes = list(kernel_size) if isinstance(kernel_size, Sequence) else [kernel_size]
        if not sizes or not all(isinstance(size, int) for size in sizes):
            raise TypeError(f"{op}: kernel_size: expected one integer or more, got {kernel_size!r}")
        self.kernel_sizes = sizes if isinstance(kernel_size, Sequence) else None
        self.kernel_size = sizes[0]
        self.spatial_dims = spatial_dims
        self.scales: list[float] | None = None
        self.iterations: list[int] | None = None
        self.options: dict[str, Any] = {
            "kernel_type": kernel_type,
            "sigma": sigma,
            "smooth_nr": smooth_nr,
            "smooth_dr": smooth_dr,
            "reduction": reduction,
            "masked": masked,
            "mask_mode": mask_mode,
        }
        # What is wrong with an argument is to be told here, by the op, and not by the first call.
        nothing = torch.empty((1, 2, *[1] * spatial_dims), device="meta")
        for size in sizes:
            correlation(nothing, nothing, kernel_size=size, **self.options)

    def set_scales(self, scales: Sequence[float]) -> None:
        """Tell the scales of a registration, coarsest first.

        Raises
        ------
        ValueError
            There is a list of kernel sizes, and it has another length.
        """
        if self.kernel_sizes is not None and len(scales) != len(self.kernel_sizes):
            raise ValueError(
                f"{type(self).__name__}: kernel_size: expected one for each of the scales "
                f"{list(scales)}, got {self.kernel_sizes}"
            )
        self.scales = list(scales)

    def set_iterations(self, iterations: Sequence[int]) -> None:
        """Tell the numbers of iterations of a registration, one for each scale."""
        self.iterations = list(iterations)

    def set_current_scale_and_iterations(self, scale: float, iters: int) -> None:
        """Go on to a scale, and to the kernel size that belongs to it.

        Raises
        ------
        ValueError
            There is a list of kernel sizes, and the scale is not among those that were set.
        """
        if self.kernel_sizes is None:
            return
        if self.scales is None or scale not in self.scales:
            raise ValueError(
                f"{type(self).__name__}: scale: expected one of those that were set, "
                f"{self.scales}, got {scale!r}"
            )
        self.kernel_size = self.kernel_sizes[self.scales.index(scale)]

    def forward(self, pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The loss of ``pred`` against ``target``, ``float[N, C, *S]`` both."""
        if pred.ndim != self.spatial_dims + 2:
            raise ValueError(
                f"{type(self).__name__}: pred: expected {self.spatial_dims} spatial axes, "
                f"as spatial_dims says, got shape {tuple(pred.shape)}"
            )
        return correlation(pred, target, kernel_size=self.kernel_size, **self.options)

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        sizes = self.kernel_sizes or self.kernel_size
        shown: dict[str, Any] = {"spatial_dims": self.spatial_dims, "kernel_size": sizes}
        return ", ".join(f"{name}={value!r}" for name, value in (shown | self.options).items())
