"""What a user may write for an option, as the ops take it. Knows no framework."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

__all__ = [
    "broadcast_mask_shape",
    "check_flag",
    "check_positive",
    "intensity_bounds",
    "is_joint",
    "is_number",
    "optional_tuple",
    "plain_number",
    "static_tuple",
]

# A union of types would be made anew each time, and compilers cannot follow that.
_NUMPY = (np.generic, np.ndarray)


def static_tuple(value: Any) -> tuple[Any, ...]:
    """One value or several, as a tuple.

    An empty sequence is wrapped as it is, for the op's check to refuse: no values mean that the
    argument was not given.
    """
    if isinstance(value, np.ndarray):
        value = value.tolist()
    return tuple(value) if isinstance(value, list | tuple) and value else (value,)


def optional_tuple(value: Any) -> tuple[Any, ...]:
    """One value or several, as a tuple; no values for ``None``."""
    return () if value is None else static_tuple(value)


def plain_number(value: Any) -> Any:
    """Python's own number for a NumPy one; anything else as it is."""
    if type(value) in (bool, int, float, str):
        return value
    if isinstance(value, tuple):
        return tuple(plain_number(v) for v in value)
    is_scalar = isinstance(value, _NUMPY) and value.ndim == 0
    return value.item() if is_scalar else value


def is_number(value: Any) -> bool:
    """Whether a value is a number as Python or NumPy have it, and no array."""
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


def check_flag(op: str, name: str, value: Any) -> bool:
    """Return a truth value, or raise TypeError for anything else."""
    flag = plain_number(value)
    if not isinstance(flag, bool):
        raise TypeError(f"{op}: {name}: expected a bool, got {value!r}")
    return flag


def check_positive(op: str, name: str, value: Any) -> None:
    """Raise ValueError for a number that is not positive and finite."""
    if is_number(value) and not 0 < value < math.inf:
        raise ValueError(f"{op}: {name}: expected a positive finite number, got {value}")


def broadcast_mask_shape(mask: Sequence[int], image: Sequence[int]) -> tuple[int, ...] | None:
    """The shape of a mask with the spatial axes of an image.

    Returns
    -------
    tuple of int or None
        ``None`` for a mask that has them already, or that does not fit: an op's check says so.
    """
    sizes, wanted = tuple(mask[2:]), tuple(image[2:])
    if sizes == wanted or len(sizes) != len(wanted):
        return None
    fits = all(n in (1, m) for n, m in zip(sizes, wanted, strict=True))
    return (*mask[:2], *wanted) if fits else None


def is_joint(value_range: Any) -> bool:
    """Whether two images are to have one range of intensities, found in both."""
    return isinstance(value_range, str) and value_range == "joint"


def intensity_bounds(
    op: str,
    value_range: Any,
    largest: float,
    arrays: tuple[Any, ...],
    is_complex: Callable[[Any], bool],
) -> list[Any]:
    """The bounds of two images' intensities, checked: low and high of one, low and high of another.

    What arrays hold is not looked at: that would wait for the device.

    Parameters
    ----------
    op
        The name of the function that was called.
    value_range
        ``((low, high), (low, high))``, each a number, or an array with one for all items or one for
        each.
    largest
        The largest number that a bound may be.
    arrays
        The types of the framework's arrays.
    is_complex
        Whether one of them is complex.

    Returns
    -------
    list
        Four numbers or arrays.

    Raises
    ------
    ValueError, TypeError
        What is no such range.
    """
    expected = f"{op}: value_range: expected None, 'joint' or ((low, high), (low, high))"
    rows = value_range if isinstance(value_range, list | tuple) else ()
    if [len(row) if isinstance(row, list | tuple) else 0 for row in rows] != [2, 2]:
        error = ValueError if isinstance(value_range, str | list | tuple) else TypeError
        raise error(f"{expected}, got {value_range!r}")
    bounds: list[Any] = []
    sizes = set()
    for row in rows:
        numbers = []
        for bound in row:
            number = plain_number(bound)
            bounds.append(number)
            if isinstance(number, arrays):
                if number.ndim > 1 or is_complex(number):
                    raise ValueError(
                        f"{expected}, each a real number or one per item, got {bound!r}"
                    )
                sizes |= set(number.shape)
            elif isinstance(number, bool) or not isinstance(number, int | float):
                raise TypeError(f"{expected} of numbers, got {bound!r}")
            else:
                numbers.append(number)
        # Written so that what is not a number is refused, and so that a compiler can follow.
        in_order = not numbers or numbers[0] <= numbers[-1]
        if not all(abs(number) <= largest for number in numbers) or not in_order:
            raise ValueError(f"{expected} of finite numbers, the lower first, got {row!r}")
    if len(sizes - {1}) > 1:
        raise ValueError(f"{expected}, with one number for all items or for each, got {rows!r}")
    return bounds
