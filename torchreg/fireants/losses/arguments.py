"""What the arguments of both losses need."""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["MASK_MODES", "check_choice", "without_masks"]

MASK_MODES = ("mult", "max")


def check_choice(op: str, name: str, value: object, choices: Sequence[str]) -> None:
    """Raise ``ValueError`` for a value that is none of the choices."""
    if value not in choices:
        expected = ", ".join(map(repr, choices))
        raise ValueError(f"{op}: {name}: expected one of {expected}, got {value!r}")


def without_masks(
    pred: torch.Tensor, target: torch.Tensor, mask_mode: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images of which the last channel is a mask: those without it, and the mask of both."""
    masks = pred[:, -1:].detach(), target[:, -1:].detach()
    both = torch.maximum(*masks) if mask_mode == "max" else masks[0] * masks[1]
    return pred[:, :-1], target[:, :-1], both
