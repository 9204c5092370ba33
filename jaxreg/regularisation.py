"""How far a displacement field is from smooth, as losses with exact gradients."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from jax.typing import ArrayLike

from jaxreg._ops import apply
from regkernels.options import optional_tuple


def field_energy(
    displacement: ArrayLike,
    kind: str,
    reduction: str,
    align_corners: bool,
    *,
    spacing: Sequence[float] | None = None,
    mu: float = 1.0,
    lam: float = 1.0,
    weight: float = 1.0,
) -> jax.Array:
    """The loss of a kind, times a weight.

    The kernel multiplies by it: outside, the gradient would be gone over once more.
    """
    return apply(
        "field_energy",
        (displacement,),
        {
            "kind": kind,
            "spacing": optional_tuple(spacing),
            "mu": mu,
            "lam": lam,
            "weight": weight,
            "align_corners": align_corners,
            "reduction": reduction,
        },
    )


def diffusion_loss(
    displacement: ArrayLike,
    *,
    spacing: Sequence[float] | None = None,
    reduction: str = "mean",
    align_corners: bool = True,
) -> jax.Array:
    """Squared slopes of a displacement field: how far it is from a translation.

    ::

        sum over components k and axes a of ((v_k(i + a) - v_k(i)) / h_a)^2

    and its mean over all voxels i, where v is the displacement in voxels with steps h of 1, or in
    mm with steps of ``spacing``. The last voxel of an axis has no slope along it, and an axis of
    length 1 contributes none.

    Parameters
    ----------
    displacement : float[N, *S, D]
        Normalised. float64, float32, float16 or bfloat16; computed in float64 where it is float64,
        and in float32 otherwise.
    spacing
        mm per voxel in x, y, z order. ``None``: the unit of length is the voxel.
    reduction
        "mean" or "sum" over the items of their means over the voxels, or "none".
    align_corners
        Whether -1 and 1 are the centres of the first and last voxel or the outer edges.

    Returns
    -------
    float[] or float[N]
        float64 where the displacement is, else float32. Differentiable.

    Raises
    ------
    ValueError
        A shape or a number that does not fit; the message names the argument.
    TypeError
        A dtype or an argument's type that is not supported.

    Notes
    -----
    MONAI's ``DiffusionLoss`` takes central differences of voxels that are not at a border, and its
    mean over these and the components: for a linear field, a D-th of what a voxel with all slopes
    contributes here.
    """
    return field_energy(displacement, "diffusion", reduction, align_corners, spacing=spacing)


def bending_energy_loss(
    displacement: ArrayLike,
    *,
    spacing: Sequence[float] | None = None,
    reduction: str = "mean",
    align_corners: bool = True,
) -> jax.Array:
    """Squared second derivatives of a displacement field: how far it is from an affine map.

    ::

        sum over components and axes of ((v(i + a) - 2 v(i) + v(i - a)) / h_a^2)^2
        + 2 sum over components and pairs of axes
              of ((v(i + a + b) - v(i + a) - v(i + b) + v(i)) / (h_a h_b))^2

    and its mean over all voxels i, where v is the displacement in voxels with steps h of 1, or in
    mm with steps of ``spacing``. A difference that would need a voxel outside is left out: an axis
    of length 1 contributes none.

    Parameters
    ----------
    displacement : float[N, *S, D]
        Normalised. float64, float32, float16 or bfloat16; computed in float64 where it is float64,
        and in float32 otherwise.
    spacing
        mm per voxel in x, y, z order. ``None``: the unit of length is the voxel.
    reduction
        "mean" or "sum" over the items of their means over the voxels, or "none".
    align_corners
        Whether -1 and 1 are the centres of the first and last voxel or the outer edges.

    Returns
    -------
    float[] or float[N]
        float64 where the displacement is, else float32. Differentiable.

    Raises
    ------
    ValueError
        A shape or a number that does not fit; the message names the argument.
    TypeError
        A dtype or an argument's type that is not supported.

    Notes
    -----
    This is the energy of a thin plate, as Rueckert et al. [#r]_ regularise with. MONAI's
    ``BendingEnergyLoss`` takes central differences, of voxels that are not at a border, and its
    mean over these and the components: of a field whose second derivatives are constant, a D-th of
    what a voxel that has them all contributes here.

    References
    ----------
    .. [#r] D. Rueckert, L. I. Sonoda, C. Hayes, D. L. G. Hill, M. O. Leach, D. J. Hawkes: Nonrigid
       registration using free-form deformations: application to breast MR images. IEEE Transactions
       on Medical Imaging 18(8), 1999.
    """
    return field_energy(displacement, "bending", reduction, align_corners, spacing=spacing)


def curvature_loss(
    displacement: ArrayLike,
    *,
    spacing: Sequence[float] | None = None,
    reduction: str = "mean",
    align_corners: bool = True,
) -> jax.Array:
    """Squared Laplacian of a displacement field.

    ::

        sum over components of (sum over axes a of (v(i + a) - 2 v(i) + v(i - a)) / h_a^2)^2

    and its mean over all voxels i, where v is the displacement in voxels with steps h of 1, or in
    mm with steps of ``spacing``. The first and the last voxel of an axis have no second derivative
    along it, and an axis of length 1 contributes none.

    Parameters
    ----------
    displacement : float[N, *S, D]
        Normalised. float64, float32, float16 or bfloat16; computed in float64 where it is float64,
        and in float32 otherwise.
    spacing
        mm per voxel in x, y, z order. ``None``: the unit of length is the voxel.
    reduction
        "mean" or "sum" over the items of their means over the voxels, or "none".
    align_corners
        Whether -1 and 1 are the centres of the first and last voxel or the outer edges.

    Returns
    -------
    float[] or float[N]
        float64 where the displacement is, else float32. Differentiable.

    Raises
    ------
    ValueError
        A shape or a number that does not fit; the message names the argument.
    TypeError
        A dtype or an argument's type that is not supported.

    Notes
    -----
    Affine maps cost nothing, and neither does any other harmonic field [#f]_.

    References
    ----------
    .. [#f] B. Fischer, J. Modersitzki: Curvature based image registration. Journal of Mathematical
       Imaging and Vision 18, 2003.
    """
    return field_energy(displacement, "curvature", reduction, align_corners, spacing=spacing)


def elasticity_loss(
    displacement: ArrayLike,
    *,
    mu: float = 1.0,
    lam: float = 1.0,
    spacing: Sequence[float] | None = None,
    reduction: str = "mean",
    align_corners: bool = True,
) -> jax.Array:
    """Energy of a displacement field in an elastic body.

    ::

        mu sum over k, a of e_ka^2 + lam / 2 (sum over k of e_kk)^2
        e_ka = (dv_k / da + dv_a / dk) / 2

    and its mean over all voxels, where v is the displacement in voxels, or in mm by ``spacing``.
    The derivatives are those of :func:`jacobian_determinant`: central differences inside the volume
    and one-sided ones at its border; an axis of length 1 contributes none.

    Parameters
    ----------
    displacement : float[N, *S, D]
        Normalised. float64, float32, float16 or bfloat16; computed in float64 where it is float64,
        and in float32 otherwise.
    mu, lam
        Lamé's parameters, from 0 to 1e9: of the strain's size, and of the change of volume.
    spacing
        mm per voxel in x, y, z order. ``None``: the unit of length is the voxel.
    reduction
        "mean" or "sum" over the items of their means over the voxels, or "none".
    align_corners
        Whether -1 and 1 are the centres of the first and last voxel or the outer edges.

    Returns
    -------
    float[] or float[N]
        float64 where the displacement is, else float32. Differentiable.

    Raises
    ------
    ValueError
        A shape or a number that does not fit; the message names the argument.
    TypeError
        A dtype or an argument's type that is not supported.

    Notes
    -----
    This is the potential of Navier and Lamé for small displacements: what is penalised is strain,
    and turning by a small angle costs nothing. Central differences do not see what alternates from
    voxel to voxel; whatever descends along this gradient has to be smooth by other means, as the
    steps of a registration are, or by a little of :func:`diffusion_loss`.
    """
    return field_energy(
        displacement, "elasticity", reduction, align_corners, mu=mu, lam=lam, spacing=spacing
    )


def divergence_loss(
    displacement: ArrayLike,
    *,
    reduction: str = "mean",
    align_corners: bool = True,
) -> jax.Array:
    """Squared divergence of a displacement field: to first order, how it changes volumes.

    ::

        (sum over k of dv_k / dk)^2

    and its mean over all voxels, where v is the displacement in voxels; in mm the number is the
    same. The derivatives are those of :func:`jacobian_determinant`: central differences inside the
    volume and one-sided ones at its border; an axis of length 1 contributes none.

    Parameters
    ----------
    displacement : float[N, *S, D]
        Normalised. float64, float32, float16 or bfloat16; computed in float64 where it is float64,
        and in float32 otherwise.
    reduction
        "mean" or "sum" over the items of their means over the voxels, or "none".
    align_corners
        Whether -1 and 1 are the centres of the first and last voxel or the outer edges.

    Returns
    -------
    float[] or float[N]
        float64 where the displacement is, else float32. Differentiable.

    Raises
    ------
    ValueError
        A shape or a number that does not fit; the message names the argument.
    TypeError
        A dtype or an argument's type that is not supported.

    Notes
    -----
    For the velocity of a flow this is exact: one without divergence keeps every volume. For a
    displacement, :func:`jacobian_loss` is.
    """
    return field_energy(displacement, "divergence", reduction, align_corners)


def jacobian_loss(
    displacement: ArrayLike,
    *,
    reduction: str = "mean",
    align_corners: bool = True,
) -> jax.Array:
    """Squared logarithm of the Jacobian determinant of ``x + u(x)``: how it changes volumes.

    The mean over all voxels of ``log(det)^2``, where det is that of :func:`jacobian_determinant`:
    to half a volume costs as much as to double it. Where det is less than 0.05, and where the field
    folds, the curve goes on as its tangent at 0.05::

        log(0.05)^2 + 2 log(0.05) / 0.05 (det - 0.05)

    so that there is a finite value, and a gradient by which a fold opens.

    Parameters
    ----------
    displacement : float[N, *S, D]
        Normalised. float64, float32, float16 or bfloat16; computed in float64 where it is float64,
        and in float32 otherwise.
    reduction
        "mean" or "sum" over the items of their means over the voxels, or "none".
    align_corners
        Whether -1 and 1 are the centres of the first and last voxel or the outer edges.

    Returns
    -------
    float[] or float[N]
        float64 where the displacement is, else float32. Differentiable.

    Raises
    ------
    ValueError
        A shape or a number that does not fit; the message names the argument.
    TypeError
        A dtype or an argument's type that is not supported.
    """
    return field_energy(displacement, "jacobian", reduction, align_corners)
