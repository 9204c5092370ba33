"""Shapes with sizes that a compiler has left open, from an inference that knows numbers only.

`torch.compile` and `torch.export` trace with symbols for sizes that may change. Asked for its
number, a symbol is settled, and the program is compiled anew for another one.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch

from torchreg._ops.torch_internals import example_size

Spec = tuple[str, tuple[Any, ...]]  # a dtype and a shape
Specs = Sequence[Spec | None]


def infer(from_numbers: Callable[[Specs], Specs], specs: Specs, ignored: Collection[int]) -> Specs:
    """The dtypes and shapes of outputs. Sizes stay open as far as any number will do for them.

    Parameters
    ----------
    from_numbers
        From the inputs' dtypes and shapes to the outputs', ``None`` for those that are absent;
        raises for shapes that do not fit.
    specs
        Of the inputs, ``None`` for those that are absent.
    ignored
        Places of outputs that nobody asks for. They count as absent where sizes stay open.
    """
    symbols = {
        str(size): size
        for spec in specs
        if spec is not None
        for size in spec[1]
        if isinstance(size, torch.SymInt)
    }
    hints = {name: example_size(size) for name, size in symbols.items()}
    example = {name: hint for name, hint in hints.items() if hint is not None}
    if not symbols or len(example) < len(symbols):
        return from_numbers(specs)

    def with_open(names: dict[str, str]) -> Specs | None:
        return _open_shapes(from_numbers, specs, ignored, example, names, symbols)

    # Each open size by name, and the one that it has to be equal to.
    names = {name: name for name in symbols}
    outputs = with_open(names)
    if outputs is None:
        alone = {name: name for name in symbols if with_open({name: name}) is not None}
        others = [name for name in symbols if name not in alone]
        first_alike = {example[name]: name for name in reversed(others)}
        alike = {name: first_alike[example[name]] for name in others}
        # What does not even fit then is as long as a vector, say, or has the symbol of one.
        groups = [{n: m for n, m in alike.items() if m == first} for first in first_alike.values()]
        fitting = [group for group in groups if with_open(group) is not None]
        names = functools.reduce(operator.or_, fitting, alone)
        outputs = with_open(names)
    if outputs is None or not names:
        return from_numbers(specs)
    # A compiler notes what a program relies on when it is asked for it.
    for name, symbol in symbols.items():
        if name in names:
            bool(symbol == symbols[names[name]])
        else:
            int(symbol)
    return outputs


def _open_shapes(
    from_numbers: Callable[[Specs], Specs],
    specs: Specs,
    ignored: Collection[int],
    example: dict[str, int],
    names: dict[str, str],
    symbols: dict[str, torch.SymInt],
) -> Specs | None:
    """The outputs' shapes with some symbols open and the example's numbers for the others.

    ``None`` if shapes do not fit, or are not made of the inputs' sizes.
    """
    # Two trials tell which size of an output is which of an input: no two sizes differ by as much
    # in both.
    distinct = sorted(set(names.values()))
    trials = [
        {name: first + step * i for i, name in enumerate(distinct)}
        for first, step in ((101, 1), (211, 2))
    ]
    meaning = {tuple(trial[name] for trial in trials): symbols[name] for name in distinct}
    try:
        results = [
            _trial(
                from_numbers,
                specs,
                example | {name: trial[other] for name, other in names.items()},
            )
            for trial in trials
        ]
    except (TypeError, ValueError):  # which is to be raised with the numbers that came
        return None
    outputs: list[Spec | None] = []
    for i, (first, second) in enumerate(zip(*results, strict=True)):
        if i in ignored or (first is None and second is None):
            outputs.append(None)
            continue
        if first is None or second is None or len(first[1]) != len(second[1]):
            return None
        sizes = list(zip(first[1], second[1], strict=True))
        if any(a != b and (a, b) not in meaning for a, b in sizes):
            return None
        outputs.append((first[0], tuple(meaning.get((a, b), a) for a, b in sizes)))
    return outputs


def _trial(from_numbers: Callable[[Specs], Specs], specs: Specs, numbers: dict[str, int]) -> Specs:
    return from_numbers(
        [
            spec
            and (
                spec[0],
                tuple(numbers[str(n)] if isinstance(n, torch.SymInt) else n for n in spec[1]),
            )
            for spec in specs
        ]
    )
