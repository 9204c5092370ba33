"""Steps of a registration: from the gradient of a loss to a small displacement."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from regkernels.options import check_positive, static_tuple
from torchreg._ops import apply_for, of_items


def _moments(moments: tuple[Any, Any], *others: Any) -> tuple[Any, Any]:
    """Moments as the op takes them: in bfloat16, or in the dtype that it computes in."""
    dtypes = [getattr(x, "dtype", None) for x in (*moments, *others)]
    is_wide = torch.float64 in dtypes
    if not is_wide and dtypes[0] == dtypes[1] == torch.bfloat16:
        return moments

    def widened(x: Any) -> Any:
        is_float = getattr(x, "dtype", None) in (torch.bfloat16, torch.float16, torch.float32)
        return x.to(torch.float64 if is_wide else torch.float32) if is_float else x

    return widened(moments[0]), widened(moments[1])


def riemannian_adam_step(
    gradient: torch.Tensor,
    mu: torch.Tensor,
    nu: torch.Tensor,
    count: int | torch.Tensor,
    *,
    learning_rate: float,
    beta1: float = 0.9,
    beta2: float = 0.99,
    epsilon: float | torch.Tensor = 1e-8,
    scale: float | torch.Tensor | None = None,
    confined: bool = False,
    sigma: float | Sequence[float] = 0.0,
    truncate: float = 4.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    r"""Turn a gradient into a small displacement to compose with, by Adam.

    .. math:: \delta = -\lambda\, \min\left(1, \frac{1/2}{\max_x \|a(x)\|}\right)\, a, \qquad
              a = \frac{\hat m}{\sqrt{\hat v} + \epsilon}

    with Adam's bias-corrected moments :math:`\hat m, \hat v` of every component. The direction
    :math:`a` has no unit; it is read in voxels. For each item, the longest step is at most half a
    voxel times the learning rate :math:`\lambda`.

    Parameters
    ----------
    gradient : float[N, *S, D]
        Gradient of the loss summed over voxels with respect to the step, in normalised coordinates.
    mu, nu : float[N, *S, D]
        Adam's running means of the gradient and of its square; zeros before the first step. In
        bfloat16, both of them, they take half the memory, and are computed with in float32.
    count : int or int32[] or int32[N]
        How many steps there have been.
    learning_rate
        A number of :math:`\lambda > 0`. Steps of a rate that varies are those of a rate of 1,
        multiplied.
    beta1, beta2
        Decay of the two moments, from 0 to below 1.
    epsilon : float or float[D] or float[N, D]
        What keeps the quotient finite, positive, for all components or one after the other in x, y,
        z order.
    scale : float or float[] or float[N], optional
        What the gradient is multiplied by first.
    confined
        Whether the component across each face of the volume is 0 there: along it points may slide,
        but none leaves the volume.
    sigma
        Standard deviation, in voxels, of the Gaussian that smooths the gradient first, as
        `gaussian_smooth` does: one number, or one per axis in (z, y, x) order. 0 leaves an axis as
        it is.
    truncate
        The window reaches ``ceil(truncate * sigma)`` voxels to either side.

    Returns
    -------
    float[N, *S, D]
        The step :math:`\delta`, in normalised coordinates; 0 along an axis of length 1. It has no
        gradient.
        Operands that require a gradient are refused: pass ``gradient.detach()``.
    float[N, *S, D]
        ``mu`` for the next step.
    float[N, *S, D]
        ``nu`` for the next step. All are float64 where an operand is, else float32, but moments
        that came in bfloat16 stay so. They are rounded up as often as their lower bits are large
        beside others that depend on the voxel and ``count``: to the nearest, what changes by less
        than half a last place in a step would stand still.

    Raises
    ------
    ValueError
        A shape or a number that does not fit; the message names the argument. Also an operand
        that requires a gradient.
    TypeError
        A dtype or an argument's type that is not supported.

    Notes
    -----
    Kingma and Ba, "Adam: A Method for Stochastic Optimization", ICLR 2015; Jena, Chaudhari and Gee,
    "FireANTs: Adaptive Riemannian Optimization for Multi-Scale Diffeomorphic Matching",
    arXiv:2404.01249.
    """
    op = "riemannian_adam_step"
    check_positive(op, "epsilon", epsilon)
    if (
        isinstance(count, int)
        and not isinstance(count, bool)
        and isinstance(gradient, torch.Tensor)
    ):
        steps: Any = torch.full((1,), count, dtype=torch.int32, device=gradient.device)
    else:
        steps = count
    if isinstance(steps, torch.Tensor) and steps.ndim == 0:
        steps = steps[None]
    components = gradient.shape[-1] if getattr(gradient, "ndim", 0) else 1
    numbers = of_items(epsilon, gradient, components), of_items(scale, gradient)
    operands = (gradient, *_moments((mu, nu), gradient, *numbers), steps, *numbers)
    attributes = {
        "learning_rate": learning_rate,
        "beta1": beta1,
        "beta2": beta2,
        "confined": confined,
        "sigma": static_tuple(sigma),
        "truncate": truncate,
    }
    step, mu, nu = apply_for(("output", "next_mu", "next_nu"), op, operands, attributes)
    return step, mu, nu


def step_gradient(
    moved: torch.Tensor,
    slope: torch.Tensor,
    pull: torch.Tensor | None = None,
    displacement: torch.Tensor | None = None,
    *,
    sigma: float | Sequence[float] = 0.0,
    truncate: float = 4.0,
    slope_scale: float | torch.Tensor | None = None,
    pull_scale: float | torch.Tensor | None = None,
) -> torch.Tensor:
    r"""Gradient of a loss with respect to a step that a warp is composed with, at the zero step.

    An image :math:`M` moved by a warp :math:`\psi` is :math:`I = M \circ \psi`. Composed from the
    right with a small displacement :math:`\delta`, :math:`\psi \circ (\mathrm{id} + \delta)`
    moves it to :math:`I \circ (\mathrm{id} + \delta)`, and the gradient of a loss :math:`L(I)` is

    .. math:: \frac{\partial L}{\partial \delta(x)} = \frac{\partial L}{\partial I(x)} \nabla I(x),

    summed over the channels. Differences are central, and one-sided at the borders. What comes out
    is smoothed as by `gaussian_smooth`.

    Parameters
    ----------
    moved : float[N, C, *S]
        The moved image :math:`I`.
    slope : float[N, C, *S]
        The loss's gradient with respect to it, :math:`\partial L/\partial I`.
    pull : float[N, *S, D], optional
        What is added before smoothing: the gradient of a penalty with respect to the step.
    displacement : float[N, *S, D], optional
        :math:`d`, normalised, of the warp :math:`\psi = \mathrm{id} + d`. With it, the pull is the
        gradient of a penalty with respect to :math:`d`, and :math:`D\psi^T` times it is added.
    sigma
        Standard deviation of the Gaussian in voxels: one number, or one per axis in (z, y, x)
        order. 0 leaves an axis as it is.
    truncate
        The window reaches ``ceil(truncate * sigma)`` voxels to either side.
    slope_scale, pull_scale : float or float[] or float[N], optional
        What the slope and the pull are multiplied by first.

    Returns
    -------
    float[N, *S, D]
        Per unit of normalised coordinates. 0 along an axis of length 1, but for the pull. float64
        where an operand is, else float32. It has no gradient.
        Operands that require a gradient are refused: pass ``moved.detach()``.

    Raises
    ------
    ValueError
        A shape, ``sigma`` or ``truncate`` that does not fit; the message names the argument. Also
        an operand that requires a gradient.
    TypeError
        A dtype or an argument's type that is not supported.
    """
    operands = (
        moved,
        slope,
        pull,
        displacement,
        of_items(slope_scale, moved),
        of_items(pull_scale, moved),
    )
    attributes = {"sigma": static_tuple(sigma), "truncate": truncate}
    return apply_for(("output",), "step_gradient", operands, attributes)[0]
