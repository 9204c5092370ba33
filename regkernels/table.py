"""The op table as Python sees it: what each op takes and returns, and in which dtypes.

An op is declared once, in C++. What its declaration means to any framework is worked out here, once
for each op: which outputs a call asks for, what a backward pass takes, and the dtype rule. `infer`,
`launch`, `TensorFramework`, `TensorOp` and `xla_registrations` are the extension's own. Only this
package imports the extension.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from regkernels._core import TensorFramework, TensorOp, infer, launch, ops, xla_registrations

__all__ = [
    "HALVES",
    "OPS",
    "Attribute",
    "Input",
    "Op",
    "Output",
    "TensorFramework",
    "TensorOp",
    "bit_mask",
    "infer",
    "launch",
    "read",
    "xla_registrations",
]

HALVES = ("float16", "bfloat16")
_FLOATS = (*HALVES, "float32", "float64")
_INTEGERS = ("labels", "counts")  # kinds of inputs


def bit_mask(flags: Sequence[bool]) -> int:
    """Flags as a number, the first of them as its lowest bit."""
    return sum(1 << i for i, flag in enumerate(flags) if flag)


@dataclass(frozen=True)
class Input:
    """An array that an op takes."""

    name: str
    is_optional: bool
    # "image", "compared", "field", "labels" or "counts"; `Op.kernel_dtypes` says what follows.
    kind: str


@dataclass(frozen=True)
class Output:
    """An array that an op returns where it is asked to.

    Its role is "result"; "unit_gradient", the gradient of the named input for a cotangent of 1;
    "saved", what the gradient op goes on with; "weight", what a mean was divided by; or
    "workspace", which is of no use after the launch.
    """

    name: str
    role: str


@dataclass(frozen=True)
class Attribute:
    """A number, or a choice, or several numbers that an op takes."""

    name: str
    kind: str  # "bool", "int", "float", "choice", "ints" or "floats"
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Op:
    """An op's entry in the table, and what follows from it.

    A place is an index into the inputs or the outputs. Among the values of a call, the inputs come
    first, the outputs follow, and the last is the cotangent of the result, if there is one.
    """

    name: str
    inputs: tuple[Input, ...]
    outputs: tuple[Output, ...]
    attributes: tuple[Attribute, ...]
    gradient: Op | None = None

    input_names: tuple[str, ...] = field(init=False, repr=False)
    output_names: tuple[str, ...] = field(init=False, repr=False)
    attribute_names: tuple[str, ...] = field(init=False, repr=False)
    has_labels: bool = field(init=False, repr=False)
    # Places of outputs: the first result; workspaces; what only the op or devices that share its
    # items have a use for; what is computed for the backward pass alone.
    result: int = field(init=False, repr=False)
    workspaces: tuple[int, ...] = field(init=False, repr=False)
    internal: tuple[int, ...] = field(init=False, repr=False)
    for_backward: tuple[int, ...] = field(init=False, repr=False)
    saved: int = field(init=False, repr=False)  # a bit mask
    # Pairs of an input's place and that of its gradient, among the outputs of the gradient op and
    # among the op's own. An input that has neither is constant.
    gradients: tuple[tuple[int, int], ...] = field(init=False, repr=False)
    unit_gradients: tuple[tuple[int, int], ...] = field(init=False, repr=False)
    constants: tuple[int, ...] = field(init=False, repr=False)
    # What the gradient op takes: places among the values.
    gradient_inputs: tuple[int, ...] = field(init=False, repr=False)
    # Those of them that are there before the cotangent, which comes with the backward pass.
    kept_for_gradient: tuple[int, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        input_names = tuple(x.name for x in self.inputs)
        output_names = tuple(x.name for x in self.outputs)
        roles = [x.role for x in self.outputs]

        def places(*wanted: str) -> tuple[int, ...]:
            return tuple(i for i, role in enumerate(roles) if role in wanted)

        def gradients_among(names: Sequence[str]) -> tuple[tuple[int, int], ...]:
            pairs = [(i, f"grad_{name}") for i, name in enumerate(input_names)]
            return tuple((i, names.index(name)) for i, name in pairs if name in names)

        gradients = gradients_among(self.gradient.output_names) if self.gradient else ()
        unit_gradients = gradients_among(
            [x.name if x.role == "unit_gradient" else "" for x in self.outputs]
        )
        variable = {i for i, _ in (*gradients, *unit_gradients)}
        values = (*input_names, *output_names, "grad_output")
        taken = self.gradient.input_names if self.gradient else ()
        facts = {
            "input_names": input_names,
            "output_names": output_names,
            "attribute_names": tuple(x.name for x in self.attributes),
            "has_labels": any(x.kind == "labels" for x in self.inputs),
            "result": roles.index("result"),
            "workspaces": places("workspace"),
            "internal": places("workspace", "weight"),
            "for_backward": places("unit_gradient", "saved"),
            "saved": bit_mask([role == "saved" for role in roles]),
            "gradients": gradients,
            "unit_gradients": unit_gradients,
            "constants": tuple(i for i in range(len(input_names)) if i not in variable),
            "gradient_inputs": tuple(values.index(name) for name in taken),
            "kept_for_gradient": tuple(values.index(n) for n in taken if n != "grad_output"),
        }
        for name, fact in facts.items():
            object.__setattr__(self, name, fact)

    def mask(self, names: Collection[str]) -> int:
        """The bit mask of some outputs."""
        return bit_mask([name in names for name in self.output_names])

    def wanted(self, needs: Sequence[bool]) -> int:
        """The bit mask of outputs to ask for when the gradients of some inputs may be needed."""
        wanted = 1 << self.result
        if True not in needs:
            return wanted
        wanted |= self.saved
        for i, place in self.unit_gradients:
            if needs[i]:
                wanted |= 1 << place
        return wanted

    def kept(self, needs: Sequence[bool], values: Sequence[Any]) -> list[int]:
        """The places of the values that a backward pass takes.

        Where unit gradients serve all that is needed, nothing else is held for it.

        Parameters
        ----------
        needs
            Which inputs may be asked for their gradient, as :meth:`wanted` was told.
        values
            The inputs and the outputs, ``None`` for those that are absent.
        """
        count = len(self.inputs)
        kept = [
            count + place
            for i, place in self.unit_gradients
            if needs[i] and values[count + place] is not None
        ]
        if needs.count(True) > len(kept):
            kept += self.kept_for_gradient
        return kept

    def kernel_dtypes(self, dtypes: Sequence[str | None]) -> tuple[list[str | None], str | None]:
        """The dtypes that the kernels take the inputs in, and what the result is to become.

        Fields lead to coordinates and are computed with as they are; images may be stored in half
        precision; labels and counts are integers. The result is the image's again if that was
        converted, has the fields' common dtype where there is neither an image nor labels, and
        stays in what it was computed in where images are compared.

        Parameters
        ----------
        dtypes
            Names of the inputs' dtypes, ``None`` for those that are absent.

        Returns
        -------
        list of str or None
            Of the inputs, likewise.
        str or None
            Of the result; ``None``: it stays as it is.
        """
        floats = [x for x in dtypes if x in _FLOATS]
        arithmetic = "float64" if "float64" in floats else "float32"
        taken: list[str | None] = []
        result, has_image = None, False
        for declared, dtype in zip(self.inputs, dtypes, strict=True):
            if dtype is None:
                taken.append(None)
                continue
            kind = declared.kind
            stays = kind == "image" and dtype in HALVES and arithmetic == "float32"
            converts = dtype in _FLOATS and not stays and kind not in _INTEGERS
            taken.append(arithmetic if converts else dtype)
            if kind != "field" and not has_image:
                has_image = True
                result = None if stays or kind in ("compared", *_INTEGERS) else dtype
        if not has_image and floats:
            # The common dtype of two halves that differ is the next that holds both.
            is_half = arithmetic == "float32" and "float32" not in floats
            alike = all(x == floats[0] for x in floats)
            result = floats[0] if is_half and alike else arithmetic
        return taken, result


def read(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, Op]:
    """The ops of a table, by name.

    Parameters
    ----------
    entries
        What the extension's ``ops()`` returns. A gradient op has no gradient of its own.
    """
    table: dict[str, Op] = {}
    for has_gradient in (False, True):
        for name, entry in entries.items():
            if bool(entry["gradient"]) is has_gradient:
                table[name] = Op(
                    name,
                    tuple(Input(*x) for x in entry["inputs"]),
                    tuple(Output(*x) for x in entry["outputs"]),
                    tuple(Attribute(*x) for x in entry["attributes"]),
                    table[entry["gradient"]] if has_gradient else None,
                )
    return table


OPS = read(ops())
