"""What samples images and composes warps, as FireANTs' ``fireants.interpolator`` does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from torchreg.warp import PaddingMode, affine_warp, compose, interpolate

__all__ = ["Interpolator", "fireants_interpolator"]


class Interpolator:
    """Samples images and composes warps; :data:`fireants_interpolator` is one.

    Examples
    --------
    >>> fi = fireants_interpolator
    >>> moved = fi(image, affine=affine, grid=displacement)
    """

    def __call__(
        self,
        image: torch.Tensor,
        affine: torch.Tensor | None = None,
        grid: torch.Tensor | None = None,
        *,
        mode: Literal["bilinear", "nearest"] = "bilinear",
        padding_mode: PaddingMode = "zeros",
        align_corners: bool = True,
        out_shape: Sequence[int] | None = None,
        is_displacement: bool = True,
    ) -> torch.Tensor:
        """Sample an image at ``x + u``, ``Ax`` or ``Ax + u``, or at given coordinates.

        :func:`torchreg.interpolate`, with arguments, values and errors of its own. FireANTs' takes
        ``mode="bicubic"`` in the plane, which there is not here.

        Parameters
        ----------
        image : float[N, C, *S]
            What is sampled.
        affine : float[N, D, D+1], optional
            ``A``, normalised; the identity when absent, and ignored with ``is_displacement=False``.
        grid : float[N, *T, D], optional
            ``u``, normalised, components x, y, z.
        mode
            "bilinear" (trilinear in 3-D) or "nearest".
        padding_mode
            What lies outside the image: "zeros", its "border" or its "reflection".
        align_corners
            Whether -1 and 1 are the centres of the first and last voxel or the outer edges.
        out_shape
            Spatial sizes of the output, or a full shape of which the last D entries count.
        is_displacement
            Whether ``grid`` is added to coordinates or holds coordinates itself.

        Returns
        -------
        float[N, C, *T]
            Of the image's dtype. Differentiable with respect to image, affine and grid.
        """
        return interpolate(
            image,
            affine,
            grid,
            is_displacement=is_displacement,
            out_shape=out_shape,
            mode=mode,
            padding_mode=padding_mode,
            align_corners=align_corners,
        )

    def warp_composer(
        self,
        u: torch.Tensor,
        affine: torch.Tensor | None = None,
        v: torch.Tensor | None = None,
        align_corners: bool = True,
        grid: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Sample a displacement field at ``Ax + v``: the value is ``u(Ax + v)``, without ``v``.

        :func:`torchreg.compose` with ``add=False`` and ``padding_mode="zeros"``, which is what
        FireANTs computes. It is not the displacement of the composed transform, which is
        ``v + u(Ax + v)``: :func:`torchreg.compose` as it is. Scaling and squaring by
        ``u = fi.warp_composer(u, v=u)``, as FireANTs' documentation has it, never doubles the
        displacement and ends at some ``v / 2**n``: use :func:`torchreg.scaling_and_squaring`.

        Parameters
        ----------
        u : float[N, *S, D]
            The displacement that is sampled, normalised, 0 outside its grid.
        affine : float[N, D, D+1], optional
            Normalised; the identity when absent.
        v : float[N, *T, D]
            A displacement, not coordinates.
        align_corners
            Whether -1 and 1 are the centres of the first and last voxel or the outer edges.
        grid
            Ignored, as FireANTs' own kernels do.

        Returns
        -------
        float[N, *T, D]
            Differentiable with respect to u, v and affine. Of the operands' common dtype.
        """
        if v is None:
            raise TypeError("warp_composer: v: expected a displacement field, got None")
        return compose(u, v, affine, add=False, padding_mode="zeros", align_corners=align_corners)

    def affine_warp(
        self, affine: torch.Tensor | None, grid: torch.Tensor, align_corners: bool = True
    ) -> torch.Tensor:
        """One field of coordinates from an affine and a displacement: ``Ax + u``.

        :func:`torchreg.affine_warp`.

        Parameters
        ----------
        affine : float[N, D, D+1], optional
            Normalised; the identity when ``None``.
        grid : float[N, *S, D]
            ``u``, normalised.
        align_corners
            Whether -1 and 1 are the centres of the first and last voxel or the outer edges.

        Returns
        -------
        float[N, *S, D]
            Coordinates for ``is_displacement=False``. Differentiable with respect to both.
        """
        if affine is None:
            axes = grid.shape[-1]
            affine = torch.eye(axes, axes + 1, dtype=grid.dtype, device=grid.device)[None]
        return affine_warp(affine, grid, align_corners=align_corners)


#: Samples images and composes warps; an :class:`Interpolator`.
fireants_interpolator = Interpolator()
