"""Sampling images through transforms, and composing transforms.

Conventions: images are ``float[N, C, *S]``, where ``*S`` stands for the D spatial axes ``Z, Y, X``
or ``Y, X`` (and ``*T`` for those of another size); vector fields are ``float[N, *S, D]``, channel
last, components in x, y, z order, in normalised coordinates: [-1, 1] spans the volume, between the
centres of the first and last voxel with ``align_corners=True``, between the outer edges otherwise,
as in ``torch.nn.functional.grid_sample``. Affines ``float[N, D, D+1]`` map output coordinates to
input coordinates. Each operand's batch size is 1 or N; 1 is broadcast without a copy, and its
gradient is the sum over the batch.

Label maps are integers. All other operands are float64, float32, float16 or bfloat16 and need not
agree. All is computed in float64 where an operand is float64, and in float32 otherwise, coordinates
above all. Images are read and written in half precision as they are; fields and affines are
converted first. A gradient has the dtype of its operand.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

import jax
import numpy as np

from jaxreg._ops import apply, apply_for, apply_to_spline, of_items, widened
from regkernels.options import check_flag, optional_tuple, static_tuple

Unit = Literal["normalised", "voxel", "mm"]
Channels = Literal["first", "last"]
Components = Literal["xyz", "zyx"]
PaddingMode = Literal["zeros", "border", "reflection"]

INVERSE_TOLERANCE = 0.01
"""The residual, in voxels, to which `invert_displacement` solves where it is not told another."""


def interpolate(
    image: jax.Array,
    affine: jax.Array | None = None,
    grid: jax.Array | None = None,
    *,
    affine_last: bool = False,
    is_displacement: bool = True,
    out_shape: Sequence[int] | None = None,
    mode: Literal["bilinear", "nearest", "cubic", "b-spline"] = "bilinear",
    padding_mode: PaddingMode = "zeros",
    align_corners: bool = True,
    deterministic: bool = False,
    grid_unit: Literal["normalised", "voxel"] = "normalised",
    grid_channels: Channels = "last",
    grid_components: Components = "xyz",
    prefilter: bool = True,
) -> jax.Array:
    """Sample an image through an affine, a displacement field, or both.

    With ``x`` the normalised coordinates of the output grid, ``A`` the affine and ``u`` the grid:
    ``I(Ax + u)``, where an absent affine is the identity and an absent grid is 0;
    ``I(A(x + u))`` with ``affine_last``; ``I(u)`` with ``is_displacement=False``, when the affine
    is ignored. A zero displacement returns the image bit for bit; a B-spline passes through its
    values up to rounding.

    Parameters
    ----------
    image : float[N, C, *S]
        What is sampled.
    affine : float[N, D, D+1], optional
        From output to input coordinates, normalised.
    grid : float[N, *T, D], optional
        Normalised, components x, y, z, if nothing else is said below.
    affine_last
        Apply the affine after the displacement instead of before.
    is_displacement
        Whether ``grid`` is added to coordinates or holds coordinates itself.
    out_shape
        Spatial sizes of the output, or a full shape of which the last D entries count. Without it
        the output has the grid's size, or without a grid the image's. A size of 0, here or of the
        grid, gives an empty result, and gradients of zero.
    mode
        ``"bilinear"`` (trilinear in 3-D); ``"nearest"`` (rounding half to even; its gradient goes
        to the image only); ``"cubic"``, Keys' cubic convolution with a = -3/4 over 4 voxels along
        each axis, as bicubic in PyTorch; or ``"b-spline"``, the cubic spline through all values of
        the image, which is smoother. The last two overshoot at edges: their weights are not all
        positive.
    padding_mode
        What lies outside the image: ``"zeros"``, its ``"border"`` or its ``"reflection"``. A
        coordinate that is not finite lies outside. What a spline makes of it:
        :func:`spline_coefficients`.
    align_corners
        Whether -1 and 1 are the centres of the first and last voxel or the outer edges.
    deterministic
        Whether the image gradient has the same bits every time on a GPU, too. That takes longer,
        and 8 bytes per element. Each contribution is rounded to a multiple of 2^(k-61) times the
        largest cotangent, with 2^k output voxels, or 4 times as coarsely if
        ``mode`` is cubic: finer than float32, coarser than float64.
    grid_unit
        Of displacements: ``"normalised"``, or ``"voxel"`` for voxels of the grid.
    grid_channels
        ``"last"``, or ``"first"`` for a grid ``(N, D, *T)``.
    grid_components
        ``"xyz"``, or ``"zyx"``, which is yx in the plane: the order of the components.
    prefilter
        Of ``"b-spline"``: ``False`` if ``image`` holds coefficients already, those of
        :func:`spline_coefficients` with the same ``padding_mode`` and ``align_corners``, say.

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
    Boundary rules are those of ``torch.nn.functional.grid_sample``, and so are values and the
    image's gradient, up to the rounding of positions, which are computed in voxels here; "cubic" is
    its ``"bicubic"``, which has boundary rules for each of the 4 voxels and not for the position,
    in 3-D as well. A tie of
    "nearest" goes to the even voxel in both, but rounding may take a position off the tie in one of
    them alone.

    Gradients of the affine and the grid differ where a position is a whole number of voxels and the
    derivative jumps. Here it is the right-sided one, for every padding. With "border" and
    "reflection", ``grid_sample`` returns 0 at the first and at the last voxel; where a coordinate
    has been reflected, its derivative is the left-sided one.
    """
    attributes = {
        "affine_last": affine_last,
        "is_displacement": is_displacement,
        "out_shape": optional_tuple(out_shape),
        "mode": mode,
        "padding_mode": padding_mode,
        "align_corners": align_corners,
        "deterministic": deterministic,
        "grid_unit": grid_unit,
        "grid_channels": grid_channels,
        "grid_components": grid_components,
    }
    operands = (image, affine, grid)
    if check_flag("interpolate", "prefilter", prefilter) and mode == "b-spline":
        return apply_to_spline("interpolate", operands, attributes, channel_last=False)
    return apply("interpolate", operands, attributes)


def interpolate_labels(
    labels: jax.Array,
    affine: jax.Array | None = None,
    grid: jax.Array | None = None,
    *,
    affine_last: bool = False,
    is_displacement: bool = True,
    out_shape: Sequence[int] | None = None,
    padding_mode: PaddingMode = "zeros",
    align_corners: bool = True,
    background: int = 0,
    return_weights: bool = False,
    grid_unit: Literal["normalised", "voxel"] = "normalised",
    grid_channels: Channels = "last",
    grid_components: Components = "xyz",
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Sample a label map through an affine, a displacement field, or both.

    Each output voxel gets the label with the largest sum of linear weights among the 2^D voxels
    around its position, the smallest of several: the ``argmax`` of all labels' indicator images,
    each interpolated linearly, without making any of them. Positions are those of
    :func:`interpolate`, and no value appears that is neither a label nor the background.

    Parameters
    ----------
    labels : integer[N, C, *S] or bool[N, C, *S]
        Of 8 to 64 bits, signed or not. Channels are label maps of their own.
    affine : float[N, D, D+1], optional
        From output to input coordinates, normalised.
    grid : float[N, *T, D], optional
        Normalised, components x, y, z, if nothing else is said below.
    affine_last
        Apply the affine after the displacement instead of before.
    is_displacement
        Whether ``grid`` is added to coordinates or holds coordinates itself.
    out_shape
        Spatial sizes of the output, or a full shape of which the last D entries count. Without it
        the output has the grid's size, or without a grid the labels' own. A size of 0, here or of
        the grid, gives an empty result.
    padding_mode
        What lies outside the label map: with ``"zeros"`` the background, otherwise its
        ``"border"`` or its ``"reflection"``. A coordinate that is not finite lies outside.
    align_corners
        Whether -1 and 1 are the centres of the first and last voxel or the outer edges.
    background
        The label of what lies outside with ``padding_mode="zeros"``. It is a candidate like any
        other.
    return_weights
        Whether to return, beside the labels, the sum of the weights of each: how much of the
        sample agrees, from 2^-D to 1.
    grid_unit
        Of displacements: ``"normalised"``, or ``"voxel"`` for voxels of the grid.
    grid_channels
        ``"last"``, or ``"first"`` for a grid ``(N, D, *T)``.
    grid_components
        ``"xyz"``, or ``"zyx"``, which is yx in the plane: the order of the components.

    Returns
    -------
    integer[N, C, *T] or bool[N, C, *T]
        Of the labels' dtype. Integers have no derivative: under ``jax.grad`` they are constants.
    float32[N, C, *T]
        The weights, with ``return_weights``. They refuse to be differentiated.

    Raises
    ------
    ValueError
        A shape, mode or size that does not fit, or a background that the labels' dtype cannot
        hold; the message names the argument.
    TypeError
        A dtype or an argument's type that is not supported. Also an operand that is differentiated,
        with ``return_weights``.
    """
    attributes = {
        "affine_last": affine_last,
        "is_displacement": is_displacement,
        "out_shape": optional_tuple(out_shape),
        "padding_mode": padding_mode,
        "align_corners": align_corners,
        "background": background,
        "grid_unit": grid_unit,
        "grid_channels": grid_channels,
        "grid_components": grid_components,
    }
    operands = (labels, affine, grid)
    if not return_weights:
        return apply("interpolate_labels", operands, attributes)
    result, weight = apply_for(("output", "weight"), "interpolate_labels", operands, attributes)
    return result, weight


def compose(
    u: jax.Array,
    v: jax.Array,
    affine: jax.Array | None = None,
    *,
    add: bool = True,
    padding_mode: PaddingMode = "border",
    align_corners: bool = True,
    deterministic: bool = False,
    mode: Literal["bilinear", "cubic", "b-spline"] = "bilinear",
    prefilter: bool = True,
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
        largest cotangent, with 2^k output voxels, or 4 times as coarsely if
        ``mode`` is cubic: finer than float32, coarser than float64.
    mode
        How ``u`` is sampled: as :func:`interpolate` samples an image.
    prefilter
        Of ``"b-spline"``: ``False`` if ``u`` holds coefficients already.

    Returns
    -------
    float[N, *T, D]
        Differentiable with respect to u, v and affine. Of the operands' common dtype. An axis of
        size 0 in v gives an empty result.

    Raises
    ------
    ValueError
        A shape or mode that does not fit; the message names the argument.
    TypeError
        A dtype or an argument's type that is not supported.
    """
    attributes = {
        "add": add,
        "mode": mode,
        "padding_mode": padding_mode,
        "align_corners": align_corners,
        "deterministic": deterministic,
    }
    operands = (u, v, affine)
    if check_flag("compose", "prefilter", prefilter) and mode == "b-spline":
        return apply_to_spline("compose", operands, attributes, channel_last=True)
    return apply("compose", operands, attributes)


def spline_coefficients(
    image: jax.Array,
    *,
    padding_mode: PaddingMode = "zeros",
    align_corners: bool = True,
    channel_last: bool = False,
) -> jax.Array:
    """Coefficients of the cubic B-spline that passes through all values of an image.

    What ``interpolate(mode="b-spline")`` computes first: for an image that is sampled often,
    compute them once, and sample them with ``prefilter=False``.

    Parameters
    ----------
    image : float[N, C, *S] or float[N, *S, C]
        The second with ``channel_last``: a field, say.
    padding_mode
        How the coefficients continue outside. ``"zeros"``: they are 0, and so is the spline from 2
        voxels beyond the outermost ones on. ``"reflection"``: they are mirrored, at the centres of
        the outermost voxels or at their outer edges as ``align_corners`` says. ``"border"``: they
        are mirrored at these centres, and what is sampled beyond is sampled at the border, where
        the spline has no slope.
    align_corners
        As of what samples them.
    channel_last
        Where the channels are.

    Returns
    -------
    float[N, C, *S] or float[N, *S, C]
        Of the image's shape, in float32 where that is stored in half precision, else of its dtype.
        Differentiable. A value that is not finite spoils the lines through it.

    Raises
    ------
    ValueError
        A shape or mode that does not fit; the message names the argument.
    TypeError
        A dtype or an argument's type that is not supported.

    Notes
    -----
    Unser, Aldroubi and Eden, "B-spline signal processing", IEEE Trans. Signal Processing 41, 1993;
    here by elimination in the tridiagonal system of each line, which holds at the ends, too, and
    for short lines. ``scipy.ndimage.spline_filter`` computes the same with ``mode="mirror"``
    ("reflection" with ``align_corners``) and ``mode="reflect"`` (without).
    """
    return apply(
        "spline_coefficients",
        (image,),
        {
            "padding_mode": padding_mode,
            "align_corners": align_corners,
            "channel_last": channel_last,
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
        Differentiable with respect to both. Of the operands' common dtype. An axis of size 0
        gives an empty result.

    Raises
    ------
    ValueError
        A shape that does not fit; the message names the argument.
    TypeError
        A dtype or an argument's type that is not supported.
    """
    return apply("affine_warp", (affine, displacement), {"align_corners": align_corners})


def coverage(
    affine: jax.Array | None = None,
    displacement: jax.Array | None = None,
    *,
    source_shape: Sequence[int],
    out_shape: Sequence[int] | None = None,
    margin: float | jax.Array | None = None,
    reach: float | jax.Array | None = None,
) -> jax.Array:
    """How far an image covers the places where it is sampled: a weight from 0 to 1.

    The places are those of ``interpolate(..., affine_last=True, align_corners=True)``: with ``x``
    the normalised coordinates of the grid, ``A`` the affine and ``d`` the displacement,
    ``A(x + d(x))``. What is sampled beyond an image's data is its border, or made up; this says
    what it counts. It is a continuous function of the place, and the product of one for each axis.

    Parameters
    ----------
    affine : float[N, D, D+1], optional
        From the grid's coordinates to those of the image, normalised.
    displacement : float[N, *T, D], optional
        Normalised, components x, y, z.
    source_shape
        Spatial sizes of the image.
    out_shape
        Spatial sizes of the grid, or a full shape of which the last D entries count. Without it the
        grid has the displacement's size, or without one the image's. A size of 0 gives an empty
        result.
    margin : float or float[D] or float[N, D], optional
        How many voxels at either end of the image are no data, for all axes or one after the other
        in x, y, z order.
    reach : float or float[] or float[N], optional
        How many voxels of the grid around a place, along each of its axes, have to be covered, too:
        those of them that are on the grid, displaced as the voxel itself is. Along an axis of the
        image no more is asked for than a quarter of its voxels, from the place.

    Returns
    -------
    float[N, 1, *T]
        1 up to the centre of the image's last voxel, from where it falls to 0 at that voxel's outer
        edge. Where there is a margin, 1 up to the last voxel that is data, from where it falls to 0
        over one voxel. Across a single slice it falls to 0 over the thickness of that slice. 0 at a
        place that is not a number. Of the common dtype of the operands, of which there has to be
        one besides ``reach``. It has no gradient.
        Differentiating it is refused: ``jax.lax.stop_gradient(affine)`` makes a
        constant of it.

    Raises
    ------
    ValueError
        A shape or a size that does not fit; the message names the argument.
    TypeError
        A dtype or an argument's type that is not supported. Also an operand that is
        differentiated.
    """
    given = (displacement, affine, margin)
    like = next((x for x in given if isinstance(x, jax.Array | np.ndarray)), None)
    sizes = static_tuple(source_shape)
    numbers = of_items(margin, like, len(sizes)), of_items(reach, like)
    attributes = {"source_shape": sizes, "out_shape": optional_tuple(out_shape)}
    return apply("coverage", (affine, displacement, *numbers), attributes)


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


@overload
def invert_displacement(
    displacement: jax.Array,
    initial: jax.Array | None = None,
    *,
    tolerance: float = ...,
    max_iterations: int = ...,
    padding_mode: PaddingMode = ...,
    align_corners: bool = ...,
    return_residual: Literal[False] = ...,
) -> jax.Array: ...


@overload
def invert_displacement(
    displacement: jax.Array,
    initial: jax.Array | None = None,
    *,
    tolerance: float = ...,
    max_iterations: int = ...,
    padding_mode: PaddingMode = ...,
    align_corners: bool = ...,
    return_residual: Literal[True],
) -> tuple[jax.Array, jax.Array]: ...


def invert_displacement(
    displacement: jax.Array,
    initial: jax.Array | None = None,
    *,
    tolerance: float = INVERSE_TOLERANCE,
    max_iterations: int = 50,
    padding_mode: PaddingMode = "border",
    align_corners: bool = True,
    return_residual: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Find the displacement ``e`` that undoes ``u``: ``e(y) + u(y + e(y)) = 0``.

    That is ``compose(u, e) = 0``: ``id + e`` is the inverse of ``id + u``, which is interpolated
    linearly. Each voxel is solved for on its own, by Newton's method. Steps that do not bring the
    residual, the length of ``e(y) + u(y + e(y))``, down are shortened or replaced by those of the
    fixed-point iteration ``e <- -u(y + e)``. The result is the best ``e`` that was met.

    Parameters
    ----------
    displacement : float[N, *S, D]
        ``u``, normalised. Where it folds there may be several solutions, of which any is found, or
        none.
    initial : float[N, *S, D], optional
        Where to start, normalised: the inverse of a displacement that is nearly the same. Without
        it, at 0.
    tolerance
        The residual, in voxels, at which a voxel is done. Rounding sets a limit to it, which is
        some 1e-7 of the volume's size in float32.
    max_iterations
        How often a voxel may try another ``e``, from 1 to 10000.
    padding_mode
        What ``u`` is outside its grid.
    align_corners
        Whether -1 and 1 are the centres of the first and last voxel or the outer edges.
    return_residual
        Whether to return the residual of every voxel as well: ``(residual > tolerance).sum()``
        voxels did not converge.

    Returns
    -------
    float[N, *S, D]
        ``e``, normalised; 0 along an axis without extent. Not differentiable. Differentiating
        it is refused: ``jax.lax.stop_gradient(displacement)`` makes a constant of it.
    float32[N, *S]
        The residual in voxels, with ``return_residual``. It is infinite where no ``e`` was met
        at which ``u`` is finite; ``e`` is then ``initial``, or 0 where that is not finite.

    Raises
    ------
    ValueError
        A shape, mode or number that does not fit; the message names the argument.
    TypeError
        A dtype or an argument's type that is not supported. Also an operand that is differentiated.

    Notes
    -----
    By the implicit function theorem the derivative of ``e`` is ``de = -(I + Du)^-1 du``, with
    ``du`` and ``Du`` taken at ``y + e(y)``. A loss that compares ``compose(u, e)`` with 0, ``e``
    held constant, penalises inverse inconsistency without it.
    """
    attributes = {
        "tolerance": tolerance,
        "max_iterations": max_iterations,
        "padding_mode": padding_mode,
        "align_corners": align_corners,
    }
    operands = (displacement, initial)
    if not return_residual:
        return apply("invert_displacement", operands, attributes)
    inverse, residual = apply_for(
        ("output", "residual"), "invert_displacement", operands, attributes
    )
    return inverse, residual


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
    source_components: Components = "xyz",
    target_components: Components = "xyz",
) -> jax.Array:
    """Change the unit of a displacement field and the place of its components.

    Parameters
    ----------
    displacement : float[N, *S, D] or float[N, D, *S]
        With the components where ``source_channels`` and ``source_components`` say.
    source, target
        Units: ``"normalised"`` (half the volume is 1), ``"voxel"`` or ``"mm"`` (along the voxel
        axes).
    spacing
        mm per voxel in x, y, z order; needed to or from ``"mm"``.
    align_corners
        Whether -1 and 1 are the centres of the first and last voxel or the outer edges.
    source_channels, target_channels
        ``"last"`` or ``"first"``: where the components are and shall be.
    source_components, target_components
        ``"xyz"`` or ``"zyx"``, xy or yx in the plane: their order, and that of the result.

    Returns
    -------
    float[N, *S, D] or float[N, D, *S]
        The field in the new unit and layout. Differentiable. An axis of size 0 gives an empty
        result.

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
            "spacing": optional_tuple(spacing),
            "align_corners": align_corners,
            "source_channels": source_channels,
            "target_channels": target_channels,
            "source_components": source_components,
            "target_components": target_components,
        },
    )
