"""MONAI's registration blocks and losses, with the kernels of this package.

The names, arguments and conventions are MONAI's: images ``(N, C, *S)``, displacements
``(N, D, *S)`` in voxels with components in the order of the array's axes, z, y, x. MONAI need not
be installed.
What differs is told in "Coming from MONAI" in the documentation.
"""

from __future__ import annotations

from typing import Any, Literal

import torch

from torchreg._flows import FLOW_GRID, integrate
from torchreg.loss import LNCCLoss, MutualInformationLoss
from torchreg.warp import interpolate

__all__ = [
    "DVF2DDF",
    "GlobalMutualInformationLoss",
    "LocalNormalizedCrossCorrelationLoss",
    "Warp",
]


def _name(option: object) -> str:
    """Return the text of an option, which may be a member of one of MONAI's enumerations."""
    return str(getattr(option, "value", option))


def _check_displacement(name: str, image: torch.Tensor, ddf: torch.Tensor) -> None:
    expected = (image.shape[0], image.dim() - 2, *image.shape[2:])
    if image.dim() not in (4, 5):
        raise ValueError(
            f"image: expected (N, C, Y, X) or (N, C, Z, Y, X), got {tuple(image.shape)}"
        )
    if ddf.shape != expected:
        raise ValueError(f"{name}: expected shape {expected}, got {tuple(ddf.shape)}")


def _check_alike(pred: torch.Tensor, target: torch.Tensor) -> None:
    if pred.shape != target.shape:
        raise ValueError(
            f"target: expected the shape of pred, {tuple(pred.shape)}, got {tuple(target.shape)}"
        )


class Warp(torch.nn.Module):
    """``monai.networks.blocks.Warp``: an image sampled where a displacement points.

    Parameters
    ----------
    mode
        ``"bilinear"``, ``"nearest"`` or ``"bicubic"``, which is there in 3-D, too.
    padding_mode
        ``"zeros"``, ``"border"`` or ``"reflection"``.
    jitter
        Whether points are moved by up to a voxel besides, at random but always alike.

    Raises
    ------
    ValueError
        For another mode.
    """

    def __init__(
        self, mode: str = "bilinear", padding_mode: str = "border", jitter: bool = False
    ) -> None:
        super().__init__()
        self.mode: Any = _name(mode)
        self.padding_mode: Any = _name(padding_mode)
        self.jitter = jitter
        if self.mode not in ("bilinear", "nearest", "bicubic"):
            raise ValueError(
                f"mode: expected 'bilinear', 'nearest' or 'bicubic', got {self.mode!r}"
            )
        if self.padding_mode not in ("zeros", "border", "reflection"):
            raise ValueError(
                "padding_mode: expected 'zeros', 'border' or 'reflection', got "
                f"{self.padding_mode!r}"
            )

    def forward(self, image: torch.Tensor, ddf: torch.Tensor) -> torch.Tensor:
        """Return ``image(x + ddf(x))``.

        Parameters
        ----------
        image : float[N, C, *S]
            What is sampled.
        ddf : float[N, D, *S]
            Voxels, components z, y, x.

        Returns
        -------
        float[N, C, *S]
            Differentiable with respect to both.

        Raises
        ------
        ValueError
            For shapes that do not fit each other.
        """
        _check_displacement("ddf", image, ddf)
        if self.jitter:
            generator = torch.Generator().manual_seed(0)
            offsets = torch.rand(ddf.shape[1:], generator=generator, dtype=torch.float32)
            ddf = ddf + offsets.to(ddf)
        mode: Any = "cubic" if self.mode == "bicubic" else self.mode
        return interpolate(image, grid=ddf, mode=mode, padding_mode=self.padding_mode, **FLOW_GRID)


class DVF2DDF(torch.nn.Module):
    """``monai.networks.blocks.DVF2DDF``: the displacement of a stationary velocity.

    Parameters
    ----------
    num_steps
        The number of squarings, 0 to 64.
    mode
        ``"bilinear"``.
    padding_mode
        What the field is outside its grid: ``"zeros"``, ``"border"`` or ``"reflection"``.

    Raises
    ------
    ValueError
        For another mode or number.
    """

    def __init__(
        self, num_steps: int = 7, mode: str = "bilinear", padding_mode: str = "zeros"
    ) -> None:
        super().__init__()
        if num_steps <= 0:
            raise ValueError(f"num_steps: expected a positive number, got {num_steps}")
        if _name(mode) != "bilinear":
            raise ValueError(f"mode: expected 'bilinear', got {_name(mode)!r}")
        self.num_steps = num_steps
        self.warp_layer = Warp(mode, padding_mode)

    def forward(self, dvf: torch.Tensor) -> torch.Tensor:
        """Return the displacement after unit time.

        Parameters
        ----------
        dvf : float[N, D, *S]
            Voxels per unit time, components z, y, x.

        Returns
        -------
        float[N, D, *S]
            Likewise in voxels. Differentiable.

        Raises
        ------
        ValueError
            For a shape that is not one of a field.
        """
        return integrate(dvf, self.num_steps, self.warp_layer.padding_mode)


class LocalNormalizedCrossCorrelationLoss(torch.nn.Module):
    """``monai.losses.LocalNormalizedCrossCorrelationLoss``: see `torchreg.lncc_loss`.

    Parameters
    ----------
    spatial_dims
        1, 2 or 3.
    kernel_size
        Odd, 3 to 31.
    kernel_type
        ``"rectangular"``, ``"triangular"`` or ``"gaussian"``: `torchreg.lncc_loss`'s window.
    reduction
        ``"mean"``, ``"sum"`` or ``"none"``.
    smooth_nr, smooth_dr
        As for `torchreg.lncc_loss`.

    Raises
    ------
    ValueError
        For another number or name.
    """

    def __init__(
        self,
        spatial_dims: int = 3,
        kernel_size: int = 3,
        kernel_type: str = "rectangular",
        reduction: str = "mean",
        smooth_nr: float = 0.0,
        smooth_dr: float = 1e-5,
    ) -> None:
        super().__init__()
        if spatial_dims not in (1, 2, 3):
            raise ValueError(f"spatial_dims: expected 1, 2 or 3, got {spatial_dims}")
        self.ndim = spatial_dims
        self.kernel_size = kernel_size
        self.loss = LNCCLoss(
            (1, kernel_size) if spatial_dims == 1 else kernel_size,
            window=_name(kernel_type),
            smooth_nr=smooth_nr,
            smooth_dr=smooth_dr,
            reduction=_name(reduction),
        )

    def forward(self, pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return minus the squared local correlation.

        Parameters
        ----------
        pred, target : float[N, C, *S]
            Of one shape.

        Returns
        -------
        scalar or float[N, C, *S]
            As ``reduction`` says. Differentiable with respect to both.

        Raises
        ------
        ValueError
            For shapes that do not fit.
        """
        for name, image in (("pred", pred), ("target", target)):
            if image.dim() != self.ndim + 2:
                raise ValueError(
                    f"{name}: expected {self.ndim} spatial axes, got shape {tuple(image.shape)}"
                )
        _check_alike(pred, target)
        if self.ndim > 1:
            loss: torch.Tensor = self.loss(pred, target)
            return loss
        # A line is a plane of a single row.
        line: torch.Tensor = self.loss(pred[:, :, None], target[:, :, None])
        return line.squeeze(2) if line.dim() else line


class GlobalMutualInformationLoss(torch.nn.Module):
    """``monai.losses.GlobalMutualInformationLoss``: see `torchreg.mutual_information_loss`.

    All channels of an item fill one histogram. Intensities are those of [0, 1]; what is outside
    counts as at its ends.

    Parameters
    ----------
    kernel_type
        ``"gaussian"``.
    num_bins
        At least 2; the first and the last are centred at 0 and 1.
    sigma_ratio
        Width of the Gaussian, in bins.
    reduction
        ``"mean"``, ``"sum"`` or ``"none"``.
    smooth_nr, smooth_dr
        As for `torchreg.mutual_information_loss`.

    Raises
    ------
    ValueError
        For another number or name.
    NotImplementedError
        For ``"b-spline"``, by which MONAI spreads the prediction and puts the target in hard bins:
        `torchreg.MutualInformationLoss` has B-splines for both.
    """

    def __init__(
        self,
        kernel_type: str = "gaussian",
        num_bins: int = 23,
        sigma_ratio: float = 0.5,
        reduction: str = "mean",
        smooth_nr: float = 1e-7,
        smooth_dr: float = 1e-7,
    ) -> None:
        super().__init__()
        if num_bins <= 1:
            raise ValueError(f"num_bins: expected at least 2, got {num_bins}")
        if kernel_type == "b-spline":
            raise NotImplementedError(
                "kernel_type: 'b-spline' spreads pred by a B-spline and puts target in hard bins, "
                "for which there is no kernel here; MutualInformationLoss(kernel='b-spline') of "
                "torchreg has B-splines for both"
            )
        if kernel_type != "gaussian":
            raise ValueError(f"kernel_type: expected 'gaussian', got {kernel_type!r}")
        half = 0.5 / (num_bins - 1)
        self.loss = MutualInformationLoss(
            num_bins,
            sigma_ratio=2 * sigma_ratio,
            value_range=((-half, 1 + half), (-half, 1 + half)),
            reduction="none",
            smooth_nr=smooth_nr,
            smooth_dr=smooth_dr,
        )
        self.reduction: Literal["mean", "sum", "none"] | str = _name(reduction)
        if self.reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction: expected 'mean', 'sum' or 'none', got {self.reduction!r}")

    def forward(self, pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return minus the mutual information.

        Parameters
        ----------
        pred, target : float[N, C, *S]
            Of one shape.

        Returns
        -------
        scalar or float[N]
            As ``reduction`` says. Differentiable with respect to both.

        Raises
        ------
        ValueError
            For shapes that do not fit.
        """
        _check_alike(pred, target)
        # A histogram has no neighbours, so that channels may lie side by side.
        flat = (image.clamp(0, 1).reshape(image.shape[0], 1, 1, -1) for image in (pred, target))
        values: torch.Tensor = self.loss(*flat).reshape(-1)
        if self.reduction == "sum":
            return values.sum()
        if self.reduction == "mean":
            return values.mean()
        return values
