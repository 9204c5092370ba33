"""How alike two images are, as losses with exact gradients."""

from __future__ import annotations

from typing import Any

import torch

from torchreg._ops import apply, static_tuple


def _weights(mask: Any, image: Any) -> Any:
    """A mask with the image's spatial axes, as numbers; what does not fit is left as it is."""
    if not isinstance(mask, torch.Tensor) or not isinstance(image, torch.Tensor):
        return mask
    if mask.dtype == torch.bool:
        mask = mask.to(torch.float32)
    sizes, wanted = mask.shape[2:], image.shape[2:]
    if sizes != wanted and len(sizes) == len(wanted):
        fits = all(n in (1, m) for n, m in zip(sizes, wanted, strict=True))
        mask = mask.expand(*mask.shape[:2], *wanted) if fits else mask
    return mask


def lncc_loss(
    pred: torch.Tensor,
    target: torch.Tensor,
    *,
    kernel_size: int = 7,
    window: str = "rectangular",
    sigma: float | None = None,
    smooth_nr: float = 0.0,
    smooth_dr: float = 1e-5,
    mask: torch.Tensor | None = None,
    reduction: str = "mean",
) -> torch.Tensor:
    """Local normalized cross-correlation of two images, as a loss, with its exact gradient.

    About every voxel a window of ``kernel_size`` voxels a side, zero outside the image, with
    weights of sum m. From the weighted sums over it,

        cross = sum(I J) - sum(I) sum(J) / m
        v_I   = max(sum(I I) - sum(I)^2 / m, smooth_dr)         v_J likewise
        ncc   = (cross^2 + smooth_nr) / (v_I v_J)               loss = -mean(ncc)

    These are the values of MONAI's ``LocalNormalizedCrossCorrelationLoss``; its gradient is that of
    the number returned, clamped variances included. Sums are taken about a value near the image's,
    so that an offset costs no precision; a window that is constant to within rounding has no
    correlation and no gradient. The same bits come out every time.

    Parameters
    ----------
    pred : float[N, C, *S]
        ``*S`` stands for the spatial axes ``Z, Y, X`` or ``Y, X``. float64, float32, float16 or
        bfloat16; computed in float64 where an operand is float64, and in float32 otherwise.
    target : float[N, C, *S]
        The same channels and spatial axes. Each batch size is N or 1.
    kernel_size
        Voxels along a side of the window: odd, from 3 to 31.
    window
        "rectangular", or "gaussian" with weights ``exp(-d^2 / (2 sigma^2))`` along each axis.
    sigma
        Of the Gaussian, in voxels; a third of ``kernel_size`` when ``None``.
    smooth_nr, smooth_dr
        Added to the numerator, at least 0; the least variance, at least 1e-18.
    mask : float or bool [N, C, *S], optional
        Weights of at least 0, constant, broadcast against ``pred``. The mean is then
        ``sum(mask ncc) / sum(mask)``, or 0 if the mask is empty; "sum" and "none" multiply by it.
    reduction
        "mean" or "sum" over everything, or "none".

    Returns
    -------
    float[] or float[N, C, *S]
        float64 where an operand is float64, else float32. Differentiable with respect to pred and
        target; a gradient is computed only when asked for.

    Raises
    ------
    ValueError
        A shape or a number that does not fit; the message names the argument.
    TypeError
        A dtype or an argument's type that is not supported.
    """
    return apply(
        "lncc_loss",
        (pred, target, _weights(mask, pred)),
        {
            "kernel_size": kernel_size,
            "window": window,
            "sigma": () if sigma is None else static_tuple(sigma),
            "smooth_nr": smooth_nr,
            "smooth_dr": smooth_dr,
            "reduction": reduction,
        },
    )


class LNCCLoss(torch.nn.Module):
    """:func:`lncc_loss` as a module: its options are given once.

    Parameters
    ----------
    kernel_size, window, sigma, smooth_nr, smooth_dr, reduction
        As for :func:`lncc_loss`.

    Examples
    --------
    >>> loss = LNCCLoss(kernel_size=9)
    >>> loss(moved, fixed).backward()
    """

    def __init__(
        self,
        kernel_size: int = 7,
        *,
        window: str = "rectangular",
        sigma: float | None = None,
        smooth_nr: float = 0.0,
        smooth_dr: float = 1e-5,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        self.options: dict[str, Any] = {
            "kernel_size": kernel_size,
            "window": window,
            "sigma": sigma,
            "smooth_nr": smooth_nr,
            "smooth_dr": smooth_dr,
            "reduction": reduction,
        }

    def forward(
        self, pred: torch.Tensor, target: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The loss of ``pred`` against ``target``, weighted by ``mask``."""
        return lncc_loss(pred, target, mask=mask, **self.options)

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
