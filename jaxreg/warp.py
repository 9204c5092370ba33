"""Sampling images through transforms, and composing transforms.

Conventions: images are ``float[N, C, *S]``, where ``*S`` stands for the D spatial axes ``Z, Y, X``
or ``Y, X`` (and ``*T`` for those of another size); vector fields are ``float[N, *S, D]``, channel
last, components in x, y, z order, in normalised coordinates: [-1, 1] spans the volume, between the
centres of the first and last voxel with ``align_corners=True``, between the outer edges otherwise,
as in ``torch.nn.functional.grid_sample``. Affines ``float[N, D, D+1]`` map output coordinates to
input coordinates. Each operand's batch size is 1 or N; 1 is broadcast without a copy, and its
gradient is the sum over the batch.

Operands are float64, float32, float16 or bfloat16 and need not agree. All is computed in float64
where an operand is float64, and in float32 otherwise, coordinates above all. Images are read and
written in half precision as they are; fields and affines are converted first. A gradient has the
dtype of its operand.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import jax

from jaxreg._ops import apply, static_tuple, widened

Unit = Literal["normalised", "voxel", "mm"]
Channels = Literal["first", "last"]
PaddingMode = Literal["zeros", "border", "reflection"]


def interpolate(
    image: jax.Array,
    affine: jax.Array | None = None,
    grid: jax.Array | None = None,
    *,
    affine_last: bool = False,
    is_displacement: bool = True,
    out_shape: Sequence[int] | None = None,
    mode: Literal["bilinear", "nearest"] = "bilinear",
    padding_mode: PaddingMode = "zeros",
    align_corners: bool = True,
    deterministic: bool = False,
) -> jax.Array:
    """Sample an image through an affine, a displacement field, or both.

    With ``x`` the normalised coordinates of the output grid, ``A`` the affine and ``u`` the grid:
    ``I(Ax + u)``, where an absent affine is the identity and an absent grid is 0;
    ``I(A(x + u))`` with ``affine_last``; ``I(u)`` with ``is_displacement=False``, when the affine
    is ignored. A zero displacement returns the image bit for bit.

    Parameters
    ----------
    image : float[N, C, *S]
        What is sampled.
    affine : float[N, D, D+1], optional
        From output to input coordinates, normalised.
    grid : float[N, *T, D], optional
        Normalised, components x, y, z.
    affine_last
        Apply the affine after the displacement instead of before.
    is_displacement
        Whether ``grid`` is added to coordinates or holds coordinates itself.
    out_shape
        Spatial sizes of the output, or a full shape of which the last D entries count. Without it
        the output has the grid's size, or without a grid the image's.
    mode
        ``"bilinear"`` (trilinear in 3-D) or ``"nearest"`` (rounding half to even; its gradient
        goes to the image only).
    padding_mode
        What lies outside the image: ``"zeros"``, its ``"border"`` or its ``"reflection"``. A
        coordinate that is not finite lies outside.
    align_corners
        Whether -1 and 1 are the centres of the first and last voxel or the outer edges.
    deterministic
        Whether the image gradient has the same bits every time on a GPU, too. That takes longer,
        and 8 bytes per element. Each contribution is rounded to a multiple of 2^(k-61) times the
        largest cotangent, with 2^k output voxels: finer than float32, coarser than float64.

    Returns
    -------
    float[N, C, *T]
        Of the image's dtype. Differentiable with respect to image, affine and grid; at integer
        positions the derivative is the right-sided one.

    Raises
    ------
    ValueError
        A shape, mode or size that does not fit; the message names the argument.
    TypeError
        A dtype or an argument's type that is not supported.

    Notes
    -----
    Boundary rules and rounding are those of ``torch.nn.functional.grid_sample``.
    """
    return apply(
        "interpolate",
        (image, affine, grid),
        {
            "affine_last": affine_last,
            "is_displacement": is_displacement,
            "out_shape": () if out_shape is None else static_tuple(out_shape),
            "mode": mode,
            "padding_mode": padding_mode,
            "align_corners": align_corners,
            "deterministic": deterministic,
        },
    )


def compose(
    u: jax.Array,
    v: jax.Array,
    affine: jax.Array | None = None,
    *,
    add: bool = True,
    padding_mode: PaddingMode = "border",
    align_corners: bool = True,
    deterministic: bool = False,
) -> jax.Array:
    """Compose displacement fields: ``v + u(Ax + v)``.

    The result ``w`` is the displacement with ``Ax + w = (id + u) o (Ax + v)``: sampling an image
    at ``Ax + w`` warps it by ``u``, then by the affine and ``v``.

    Parameters
    ----------
    u : float[N, *S, D]
        The displacement that is sampled, normalised.
    v : float[N, *T, D]
        The displacement that is applied first.
    affine : float[N, D, D+1], optional
        Normalised; the identity when absent.
    add
        ``False`` returns ``u(Ax + v)`` alone.
    padding_mode
        What ``u`` is outside its grid. ``"zeros"`` tears a composed field at the border.
    align_corners
        Whether -1 and 1 are the centres of the first and last voxel or the outer edges.
    deterministic
        Whether the gradient to ``u`` has the same bits every time on a GPU, too. That takes longer,
        and 8 bytes per element. Each contribution is rounded to a multiple of 2^(k-61) times the
        largest cotangent, with 2^k output voxels: finer than float32, coarser than float64.

    Returns
    -------
    float[N, *T, D]
        Differentiable with respect to u, v and affine. Of the operands' common dtype.

    Raises
    ------
    ValueError
        A shape or mode that does not fit; the message names the argument.
    TypeError
        A dtype or an argument's type that is not supported.
    """
    return apply(
        "compose",
        (u, v, affine),
        {
            "add": add,
            "padding_mode": padding_mode,
            "align_corners": align_corners,
            "deterministic": deterministic,
        },
    )


def affine_warp(
    affine: jax.Array, displacement: jax.Array, *, align_corners: bool = True
) -> jax.Array:
    """One field of coordinates from an affine and a displacement: ``Ax + u``.

    Parameters
    ----------
    affine : float[N, D, D+1]
        Normalised.
    displacement : float[N, *S, D]
        Normalised.
    align_corners
        Whether -1 and 1 are the centres of the first and last voxel or the outer edges.

    Returns
    -------
    float[N, *S, D]
        Coordinates for ``interpolate(..., is_displacement=False)``.
        Differentiable with respect to both. Of the operands' common dtype.

    Raises
    ------
    ValueError
        A shape that does not fit; the message names the argument.
    TypeError
        A dtype or an argument's type that is not supported.
    """
    return apply("affine_warp", (affine, displacement), {"align_corners": align_corners})


def scaling_and_squaring(
    velocity: jax.Array,
    num_steps: int = 6,
    *,
    padding_mode: PaddingMode = "border",
    align_corners: bool = True,
    deterministic: bool = False,
) -> jax.Array:
    """Integrate a stationary velocity field over unit time: its exponential.

    ``u <- v / 2^n``, then n times ``u <- compose(u, u)``.

    Parameters
    ----------
    velocity : float[N, *S, D]
        Normalised coordinates per unit time.
    num_steps
        The number n of squarings, 0 to 64.
    padding_mode
        What the field is outside its grid.
    align_corners
        Whether -1 and 1 are the centres of the first and last voxel or the outer edges.
    deterministic
        As in :func:`compose`.

    Returns
    -------
    float[N, *S, D]
        The displacement. Differentiable with respect to the velocity. Steps in between are not
        rounded to half precision.

    Raises
    ------
    ValueError
        A shape, mode or number of steps that does not fit; the message names the argument.
    TypeError
        A dtype or an argument's type that is not supported.

    Notes
    -----
    Arsigny et al., "A Log-Euclidean Framework for Statistics on Diffeomorphisms", MICCAI 2006.
    """
    # One rounding, at the end: every step would lose what the next one multiplies.
    displacement = apply(
        "scale_velocity",
        (widened(velocity),),
        {"num_steps": num_steps, "padding_mode": padding_mode, "align_corners": align_corners},
    )
    for _ in range(num_steps):
        displacement = compose(
            displacement,
            displacement,
            padding_mode=padding_mode,
            align_corners=align_corners,
            deterministic=deterministic,
        )
    return displacement.astype(velocity.dtype)


def jacobian_determinant(displacement: jax.Array, *, align_corners: bool = True) -> jax.Array:
    """Jacobian determinant of ``x + u(x)``: the local change of volume, not positive at a fold.

    In voxel units, by central differences inside the volume and one-sided ones at its border; an
    axis of length 1 contributes no derivative.

    Parameters
    ----------
    displacement : float[N, *S, D]
        Normalised.
    align_corners
        Whether -1 and 1 are the centres of the first and last voxel or the outer edges.

    Returns
    -------
    float[N, *S]
        Differentiable with respect to the displacement.

    Raises
    ------
    ValueError
        A shape that does not fit; the message names the argument.
    TypeError
        A dtype or an argument's type that is not supported.
    """
    return apply("jacobian_determinant", (displacement,), {"align_corners": align_corners})


def convert_displacement(
    displacement: jax.Array,
    source: Unit,
    target: Unit,
    *,
    spacing: Sequence[float] | None = None,
    align_corners: bool = True,
    source_channels: Channels = "last",
    target_channels: Channels = "last",
) -> jax.Array:
    """Change the unit of a displacement field and the place of its components.

    Parameters
    ----------
    displacement : float[N, *S, D] or float[N, D, *S]
        With the components, in x, y, z order, where ``source_channels`` says.
    source, target
        Units: ``"normalised"`` (half the volume is 1), ``"voxel"`` or ``"mm"`` (along the voxel
        axes).
    spacing
        mm per voxel in x, y, z order; needed to or from ``"mm"``.
    align_corners
        Whether -1 and 1 are the centres of the first and last voxel or the outer edges.
    source_channels, target_channels
        ``"last"`` or ``"first"``: where the components are and shall be.

    Returns
    -------
    float[N, *S, D] or float[N, D, *S]
        The field in the new unit and layout. Differentiable.

    Raises
    ------
    ValueError
        A shape, unit or spacing that does not fit; the message names the argument.
    TypeError
        A dtype or an argument's type that is not supported.
    """
    return apply(
        "convert_displacement",
        (displacement,),
        {
            "source": source,
            "target": target,
            "spacing": () if spacing is None else static_tuple(spacing),
            "align_corners": align_corners,
            "source_channels": source_channels,
            "target_channels": target_channels,
        },
    )
