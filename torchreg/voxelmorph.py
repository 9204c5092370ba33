"""VoxelMorph's and TransMorph's layers and losses, with the kernels of this package.

The names, arguments and conventions are those of VoxelMorph's PyTorch layers, which TransMorph took
over: images ``(N, C, *S)``, displacements ``(N, D, *S)`` in voxels with components in the order of
the array's axes, z, y, x. Neither need be installed. What differs is told in "Coming from
VoxelMorph and TransMorph" in the documentation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from torchreg._flows import FLOW_GRID, integrate
from torchreg.loss import lncc_loss
from torchreg.warp import interpolate

__all__ = ["NCC", "SpatialTransformer", "VecInt"]


def _checked_size(name: str, size: Sequence[int]) -> tuple[int, ...]:
    sizes = tuple(int(n) for n in size)
    if len(sizes) not in (2, 3) or any(n < 1 for n in sizes):
        raise ValueError(f"{name}: expected two or three positive sizes, got {size!r}")
    return sizes


def _check_field(name: str, field: torch.Tensor, size: tuple[int, ...]) -> None:
    if tuple(field.shape[1:]) != (len(size), *size):
        raise ValueError(
            f"{name}: expected shape (N, {', '.join(map(str, (len(size), *size)))}), got "
            f"{tuple(field.shape)}"
        )


class SpatialTransformer(torch.nn.Module):
    """An image sampled where a flow points, with zeros outside.

    Parameters
    ----------
    size
        Spatial sizes, ``([Z,] Y, X)``.
    mode
        ``"bilinear"`` or ``"nearest"``.

    Raises
    ------
    ValueError
        For another size or mode.
    """

    def __init__(self, size: Sequence[int], mode: str = "bilinear") -> None:
        super().__init__()
        self.size = _checked_size("size", size)
        self.mode: Any = mode
        if mode not in ("bilinear", "nearest"):
            raise ValueError(f"mode: expected 'bilinear' or 'nearest', got {mode!r}")

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **options: Any
    ) -> None:
        # VoxelMorph's layer keeps the coordinates of all voxels in its checkpoints.
        state_dict.pop(f"{prefix}grid", None)
        super()._load_from_state_dict(state_dict, prefix, *args, **options)

    def forward(self, src: torch.Tensor, flow: torch.Tensor) -> torch.Tensor:
        """Return ``src(x + flow(x))``.

        Parameters
        ----------
        src : float[N, C, *S]
            What is sampled.
        flow : float[N, D, *S]
            Voxels, components z, y, x.

        Returns
        -------
        float[N, C, *S]
            Differentiable with respect to both.

        Raises
        ------
        ValueError
            For shapes that do not fit ``size``.
        """
        _check_field("flow", flow, self.size)
        if tuple(src.shape[2:]) != self.size:
            raise ValueError(
                f"src: expected spatial sizes {self.size}, got shape {tuple(src.shape)}"
            )
        return interpolate(src, grid=flow, mode=self.mode, **FLOW_GRID)


class VecInt(torch.nn.Module):
    """The displacement of a stationary velocity, by scaling and squaring, with zeros outside.

    Parameters
    ----------
    inshape
        Spatial sizes, ``([Z,] Y, X)``.
    nsteps
        The number of squarings, 0 to 64.

    Raises
    ------
    ValueError
        For another size or number.
    """

    def __init__(self, inshape: Sequence[int], nsteps: int) -> None:
        super().__init__()
        self.size = _checked_size("inshape", inshape)
        if not 0 <= nsteps <= 64:
            raise ValueError(f"nsteps: expected a number from 0 to 64, got {nsteps}")
        self.nsteps = nsteps

    def forward(self, vec: torch.Tensor) -> torch.Tensor:
        """Return the displacement after unit time.

        Parameters
        ----------
        vec : float[N, D, *S]
            Voxels per unit time, components z, y, x.

        Returns
        -------
        float[N, D, *S]
            Likewise in voxels. Differentiable.

        Raises
        ------
        ValueError
            For a shape that does not fit ``inshape``.
        """
        _check_field("vec", vec, self.size)
        return integrate(vec, self.nsteps, "zeros")


class NCC(torch.nn.Module):
    """Minus the mean of the squared local correlation, with 1e-5 added to its denominator.

    It is called as ``NCC(win).loss(y_true, y_pred)``, as in VoxelMorph, or as
    ``NCC(win)(y_true, y_pred)``, as in TransMorph.

    Parameters
    ----------
    win
        The window: a size for each axis, z, y, x, or one for all; 9 if it is not given.
    eps
        What is added to the product of the two variances.
    """

    def __init__(self, win: int | Sequence[int] | None = None, eps: float = 1e-5) -> None:
        super().__init__()
        self.win: Any = 9 if win is None else win if isinstance(win, int) else tuple(win)
        self.eps = eps

    def forward(self, y_true: torch.Tensor, y_pred: torch.Tensor) -> torch.Tensor:
        """Return the loss.

        Parameters
        ----------
        y_true, y_pred : float[N, C, *S]
            Of one shape.

        Returns
        -------
        scalar
            Differentiable with respect to both.

        Raises
        ------
        ValueError
            For shapes or windows that do not fit.
        """
        return lncc_loss(
            y_pred, y_true, kernel_size=self.win, smooth_dr=1e-18, smooth_product=self.eps
        )

    loss = forward
