"""Bad input is refused by both packages with one kind of error that says which argument is wrong.

The message names the argument, what was expected and what came. Most cases follow from the op
table, which says what the operands and attributes of each op are; those that need to know more of
an op are written down one by one.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from backends import BACKENDS, Backend, JaxBackend
from examples import ALL_OPS, FIELD_LOSSES, LOSSES, OPERANDS, example

from regkernels import _core

NAN, INFINITY = float("nan"), float("inf")
TABLE = _core.ops()
# Of functions that are called otherwise.
TABLE_NAMES = {
    "scaling_and_squaring": "scale_velocity",
    **dict.fromkeys(FIELD_LOSSES, "field_energy"),
}
SET_BY_ANOTHER = {"joint_range": "value_range"}  # attributes that an argument of another name sets
# Attributes that the function sets by itself.
VOLUMES = ["divergence_loss", "jacobian_loss"]
SETTLED = {
    # Only devices that share a volume say how much of it is theirs.
    **dict.fromkeys(("mutual_information_loss", "joint_histogram"), ("own_planes",)),
    **dict.fromkeys(FIELD_LOSSES, ("kind", "weight", "mu", "lam")),
    "elasticity_loss": ("kind", "weight"),
    **dict.fromkeys(VOLUMES, ("kind", "weight", "mu", "lam", "spacing")),
}

# Where nothing is sampled from a field, it may be empty.
MAY_BE_EMPTY = {
    ("interpolate", "grid"),
    ("interpolate_labels", "grid"),
    ("compose", "v"),
    ("affine_warp", "displacement"),
    ("convert_displacement", "displacement"),
    ("coverage", "displacement"),
}

# The axes of each operand: a small letter is a spatial axis, D has as many entries as those, S as
# many as in the other operands.
LAYOUTS = {
    **dict.fromkeys(["pred", "target", "moved", "slope"], "NSSSS"),
    **dict.fromkeys(["pull", "gradient", "mu", "nu"], "NSSSD"),
    **dict.fromkeys(["image", "x", "labels"], "NCzyx"),
    **dict.fromkeys(["grid", "u", "v", "displacement", "velocity"], "NzyxD"),
    "affine": "NDE",
}


def layout(op: str, operand: str) -> str:
    """The displacement of a step has the axes of the moved image."""
    return "NSSSD" if (op, operand) == ("step_gradient", "displacement") else LAYOUTS[operand]


def zeros(*shape: int, dtype: object = np.float32) -> np.ndarray:
    return np.zeros(shape, dtype)


def attributes(op: str) -> list[tuple[str, str]]:
    """The attributes of an op that its function takes, and their kinds."""
    found = TABLE[TABLE_NAMES.get(op, op)]["attributes"]
    settled = (*SET_BY_ANOTHER, *SETTLED.get(op, ()))
    return [(name, kind) for name, kind, _ in found if name not in settled]


@dataclass(frozen=True)
class Bad:
    """A call refused because of ``argument``; ``came`` is how the message tells its value."""

    op: str
    argument: str
    error: type[Exception]
    came: str
    changes: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        ((_, value), *_) = self.changes.items()
        text = f"{value.dtype}{value.shape}" if isinstance(value, np.ndarray) else repr(value)[:20]
        return f"{self.op}-{self.argument}-{text}"


def bad_value(op: str, argument: str, value: Any, came: str, **others: Any) -> Bad:
    return Bad(op, argument, ValueError, came, {argument: value, **others})


def bad_type(op: str, argument: str, value: Any, came: str, **others: Any) -> Bad:
    return Bad(op, argument, TypeError, came, {argument: value, **others})


def any_operand(op: str) -> str:
    """A pattern for the name of any operand: either of two that disagree may be at fault."""
    return "|".join(OPERANDS[op])


def numbers(*values: int) -> str:
    """A pattern for a shape, however it is punctuated."""
    return r"\D+".join(map(str, values))


def dtype_cases(op: str, operand: str, good: np.ndarray) -> Iterator[Bad]:
    integers, floats = ("int32", "uint8", "bool"), ("float32", "float16")
    for dtype in (*(floats if good.dtype == np.int32 else integers), "complex64"):
        yield bad_type(op, operand, good.astype(dtype), dtype)


def shape_cases(op: str, operand: str, good: np.ndarray) -> Iterator[Bad]:
    for shape in [(), (good.size,), (1, 1, *good.shape), (1,) * 5 + good.shape]:
        came = numbers(*shape) if len(shape) < 8 else str(len(shape))
        yield bad_value(op, operand, np.zeros(shape, good.dtype), came)
    others = len(OPERANDS[op]) > 1
    for axis, kind in enumerate(layout(op, operand)):
        wider = np.concatenate([good, good.take([0], axis)], axis)
        empty = good.take([], axis)
        if kind == "S" or (kind == "N" and others):
            for value in (wider, empty):
                came = f"2|{value.shape[axis]}"
                yield Bad(op, any_operand(op), ValueError, came, {operand: value})
        if kind in "DE":
            yield bad_value(op, operand, wider, numbers(*wider.shape))
        if kind not in "NCS" and not (kind in "zyx" and (op, operand) in MAY_BE_EMPTY):
            yield bad_value(op, operand, empty, numbers(*empty.shape))


def operand_cases(op: str) -> Iterator[Bad]:
    optional = {name: flag for name, flag, _ in TABLE[TABLE_NAMES.get(op, op)]["inputs"]}
    for operand, good in zip(OPERANDS[op], example(op, dtype=np.float32).operands, strict=True):
        yield from dtype_cases(op, operand, good)
        yield from shape_cases(op, operand, good)
        for value in (*([] if optional[operand] else [None]), "brain.nii", [[0.0]], 0.0):
            came = "None" if value is None else type(value).__name__
            yield bad_type(op, operand, value, came)


WRONG_TYPES = {
    "bool": [0, 1, 0.5, "no", None, (True,)],
    "int": [True, 2.5, 2.0, NAN, 1j, "six", None, (1,)],
    "float": [True, 1j, "far", None, (1.0,)],
    "choice": [0, True, b"zeros", None, ("zeros",)],
    "ints": [True, 2.5, "345", (3, 4.5, 5), (3, True, 5), (3, None, 5), ((3, 4, 5),), ()],
    "floats": [True, 1j, "wide", ("a", "b", "c"), (1.0, True, 1.0), (1.0, (1.0,), 1.0), ()],
}
WRONG_VALUES = {
    "bool": [],
    "int": [2**70, -(2**70)],
    "float": [NAN, INFINITY, -INFINITY, 10**400],
    "choice": ["", "zero", "ZEROS"],
    "ints": [(-3, 4, 5), (0, 0, 0), (2**70, 4, 5), (2**62, 2**62, 2**62), 3],
    "floats": [(1.0, NAN, 1.0), (1.0, INFINITY, 1.0), (1.0, -1.0, 1.0), (1.0, 2.0), 10**400],
}


def attribute_cases(op: str) -> Iterator[Bad]:
    parameters = inspect.signature(BACKENDS["torch", "cpu"].function(op)).parameters
    for name, kind in attributes(op):
        for value in WRONG_TYPES[kind]:
            if value is not None or parameters[name].default is not None:
                yield bad_type(op, name, value, r"\S")
        for value in WRONG_VALUES[kind]:
            if (name, value) != ("kernel_size", 3):  # one number is a size for every axis
                yield bad_value(op, name, value, r"\S")


FROM_THE_TABLE = [case for op in ALL_OPS for case in (*operand_cases(op), *attribute_cases(op))]

FIELDS = [(op, name) for op in ALL_OPS for name in OPERANDS[op] if layout(op, name) == "NzyxD"]
AFFINES = [(op, "affine") for op in ALL_OPS if "affine" in OPERANDS[op]]

# Of an operand without a gradient, which the examples do not have.
MASKS = [
    bad_value(op, "mask", zeros(*shape), numbers(*shape))
    for op in (*LOSSES, "joint_histogram")
    for shape in [(2, 3, 3, 4, 5), (2, 0, 3, 4, 5), (2, 2, 3, 4, 6), (2, 2, 4, 5)]
]

HISTOGRAMS = ["mutual_information_loss", "joint_histogram"]
STEPS = ["step_gradient", "riemannian_adam_step"]
RANGES: list[tuple[Any, type[Exception], str]] = [
    ("join", ValueError, "join"),
    (((0, 1),), ValueError, r"\(\(0, 1\),\)"),
    ((0, 1), ValueError, r"\(0, 1\)"),
    (((0, 1), (0, 1, 2)), ValueError, "2"),
    (((0, 1), (1, 0.5)), ValueError, "0.5"),
    (((0, 1), (0, NAN)), ValueError, "nan"),
    (((-INFINITY, 1), (0, 1)), ValueError, "inf"),
    (((0, 1e39), (0, 1)), ValueError, "e.39"),  # of float32
    (((0, 10**400), (0, 1)), ValueError, "100"),
    (3.5, TypeError, "3.5"),
    (True, TypeError, "True"),
    (zeros(2, 2), TypeError, "array"),
    (((0, 1), ("low", 1)), TypeError, "low"),
    (((0, 1), (None, 1)), TypeError, "None"),
    (((0, 1), (False, True)), TypeError, "False"),
    (((0, 1), ((0, 1), 1)), TypeError, "1"),
]

MODULI = [(-1.0, "-1"), (1e10, r"1e\+10")]
SPACINGS = [(0.0, "0"), (1e-7, "1e-07"), (1e7, r"1e\+07")]
IN_MM = [op for op in FIELD_LOSSES if "spacing" not in SETTLED[op]]

ONE_BY_ONE = [
    *MASKS,
    *[
        bad_value("invert_displacement", "initial", zeros(*shape), numbers(*shape))
        for shape in [(2, 3, 4, 6, 3), (2, 3, 4, 3), (2, 4, 5, 2)]
    ],
    bad_value("invert_displacement", "initial", zeros(3, 3, 4, 5, 3), "3"),
    bad_type("invert_displacement", "initial", zeros(2, 3, 4, 5, 3, dtype=np.int16), "int16"),
    bad_type("invert_displacement", "initial", "brain.nii", "str"),
    bad_value("lncc_loss", "mask", zeros(3, 1, 3, 4, 5), "3"),
    bad_type("lncc_loss", "mask", zeros(2, 2, 3, 4, 5, dtype=np.int16), "int16"),
    bad_type("lncc_loss", "mask", "brain.nii", "str"),
    *[
        Bad(op, "value_range", error, came, {"value_range": value})
        for op in HISTOGRAMS
        for value, error, came in RANGES
    ],
    *[bad_value(op, "num_bins", n, str(n)) for op in HISTOGRAMS for n in (-3, 0, 1, 257)],
    *[bad_value(op, "sigma_ratio", r, f"{r:g}") for op in HISTOGRAMS for r in (-1.0, 0.2, 4.1)],
    *[
        bad_value("mutual_information_loss", "smooth_nr", x, came)
        for x, came in ((-1.0, "-1"), (1e31, r"1e\+31"))
    ],
    *[bad_value("mutual_information_loss", "smooth_dr", x, f"{x:g}") for x in (-1.0, 0.0, 1e-31)],
    # Dimensions that do not fit each other.
    *[bad_value(op, name, zeros(2, 5, 3), numbers(2, 5, 3)) for op, name in FIELDS],
    *[bad_value(op, name, zeros(2, 2, 3), numbers(2, 2, 3)) for op, name in AFFINES],
    bad_value("interpolate", "grid", zeros(2, 4, 5, 2), numbers(2, 4, 5, 2)),
    bad_value("interpolate_labels", "grid", zeros(2, 4, 5, 2), numbers(2, 4, 5, 2)),
    bad_value("compose", "v", zeros(2, 4, 5, 2), numbers(2, 4, 5, 2)),
    bad_value(
        "convert_displacement",
        "displacement",
        zeros(2, 4, 5, 6, 3),
        numbers(2, 4, 5, 6, 3),
        source_channels="first",
    ),
    # Shapes asked for.
    bad_value("interpolate", "out_shape", (3, 4), numbers(3, 4), grid=None),
    bad_value("interpolate", "out_shape", (3, -4, 5), numbers(3) + r"\D+-4", grid=None),
    bad_type("interpolate", "out_shape", (3, 4.5, 5), "4.5", grid=None),
    bad_value("interpolate", "out_shape", (3, 4, 6), numbers(3, 4, 6)),  # the grid has another
    bad_value("interpolate", "grid", None, "None", is_displacement=False),
    bad_value("coverage", "source_shape", (4,), "4"),
    bad_value("coverage", "source_shape", (2, 3, 4, 5), numbers(2, 3, 4, 5)),
    bad_value("coverage", "source_shape", (3, 0, 5), numbers(3, 0, 5)),
    bad_value("coverage", "out_shape", (3, 4), numbers(3, 4), displacement=None),
    bad_value("coverage", "out_shape", (3, -4, 5), numbers(3) + r"\D+-4", displacement=None),
    bad_value("coverage", "out_shape", (3, 4, 6), numbers(3, 4, 6)),  # the field has another
    bad_value("coverage", "displacement", zeros(2, 4, 5, 2), numbers(2, 4, 5, 2)),
    bad_type("coverage", "affine", None, "None", displacement=None, margin=None, reach=None),
    *[bad_value("coverage", "margin", zeros(*s), numbers(*s)) for s in [(2, 2, 2), (1, 1, 3)]],
    bad_type("coverage", "margin", zeros(1, 1, 3, dtype=np.int32), "int32"),
    bad_type("coverage", "margin", "none", "str"),
    bad_value("coverage", "reach", zeros(2, 1, 1), numbers(2, 1, 1)),
    bad_type("coverage", "reach", zeros(2, 1, 1, dtype=np.uint8), "uint8"),
    bad_type("coverage", "reach", "far", "str"),
    # What came is told in full.
    bad_value("interpolate", "mode", "lanczos", "lanczos"),
    bad_value("compose", "mode", "nearest", "nearest"),
    *[bad_type(op, "prefilter", "no", "no", mode="b-spline") for op in ("interpolate", "compose")],
    *[bad_type(op, "prefilter", 1, "1") for op in ("interpolate", "compose")],
    bad_value("compose", "padding_mode", "wrap", "wrap"),
    bad_type("compose", "add", 0.5, "0.5"),
    bad_type("gaussian_smooth", "channel_last", "yes", "yes"),
    bad_value("scaling_and_squaring", "num_steps", 10**30, str(10**30)),
    # Numbers in a range of their own.
    bad_value("scaling_and_squaring", "num_steps", -1, "-1"),
    bad_value("scaling_and_squaring", "num_steps", 65, "65"),
    bad_value("gaussian_smooth", "sigma", -0.5, "-0.5"),
    bad_value("gaussian_smooth", "sigma", NAN, "nan"),
    bad_value("gaussian_smooth", "sigma", 1e300, "e.300"),
    bad_value("gaussian_smooth", "sigma", (1.0, 2.0), "2"),
    bad_value("gaussian_smooth", "truncate", -1.0, "-1"),
    bad_value("gaussian_smooth", "truncate", 0, "0"),
    *[bad_value("mind_ssc", "radius", n, str(n)) for n in (-1, 0, 5)],
    *[bad_value("mind_ssc", "dilation", n, str(n)) for n in (-1, 0, 17)],
    bad_value("convert_displacement", "spacing", None, "None"),
    bad_value("convert_displacement", "spacing", (1.0, 0.0, 2.0), "0"),
    bad_value("convert_displacement", "spacing", (1.0, 1e-60, 2.0), "1e-60"),
    *[bad_value("lncc_loss", "kernel_size", size, str(size)) for size in (-3, 0, 1, 4, 33)],
    *[bad_value("lncc_loss", "sigma", s, f"{s:g}") for s in (-1.0, 0.0, NAN, INFINITY)],
    bad_value("lncc_loss", "smooth_nr", -1.0, "-1"),
    *[bad_value("lncc_loss", "smooth_dr", x, f"{x:g}") for x in (-1.0, 0.0, 1e-19)],
    *[bad_value("lncc_loss", "common_variance", x, f"{x:g}") for x in (-1.0, NAN, INFINITY)],
    *[bad_value("lncc_loss", "both_flat", x, f"{x:g}") for x in (-0.1, 1.5)],
    *[bad_value("elasticity_loss", name, x, came) for name in ("mu", "lam") for x, came in MODULI],
    *[bad_value(op, "spacing", (1.0, x, 2.0), came) for op in IN_MM for x, came in SPACINGS],
    *[bad_value("invert_displacement", "tolerance", t, f"{t:g}") for t in (-1.0, NAN, INFINITY)],
    *[bad_value("invert_displacement", "max_iterations", n, str(n)) for n in (-1, 0, 10001)],
    *[bad_value("riemannian_adam_step", "learning_rate", r, f"{r:g}") for r in (-1.0, 0.0)],
    *[
        bad_value("riemannian_adam_step", name, x, f"{x:g}")
        for name in ("beta1", "beta2")
        for x in (-0.1, 1.0)
    ],
    *[bad_value("riemannian_adam_step", "epsilon", x, f"{x:g}") for x in (-1.0, 0.0, NAN)],
    bad_value("riemannian_adam_step", "epsilon", zeros(2, 2, 2), numbers(2, 2, 2)),
    bad_type("riemannian_adam_step", "epsilon", "small", "str"),
    bad_value("riemannian_adam_step", "scale", zeros(2, 3, 3), numbers(2, 3, 3)),
    bad_type("riemannian_adam_step", "scale", "large", "str"),
    bad_value("riemannian_adam_step", "count", zeros(2, 1, 1, dtype=np.int32), numbers(2, 1, 1)),
    bad_type("riemannian_adam_step", "count", zeros(2, 1, 1, dtype=np.uint8), "uint8"),
    bad_type("riemannian_adam_step", "count", 2.0, "float"),
    *[bad_value(op, "sigma", -0.5, "-0.5") for op in STEPS],
    *[bad_value(op, "sigma", (1.0, 2.0), "2") for op in STEPS],
    *[bad_value(op, "truncate", 0.0, "0") for op in STEPS],
    bad_value("step_gradient", "truncate", 0, "0"),
    bad_type("step_gradient", "pull", None, "None"),
    *[
        bad
        for name in ("slope_scale", "pull_scale")
        for bad in (
            bad_value("step_gradient", name, zeros(2, 3, 3), numbers(2, 3, 3)),
            bad_type("step_gradient", name, "large", "str"),
        )
    ],
    *[
        Bad("interpolate_labels", "background", ValueError, f"{label}", {"background": label} | x)
        for dtype, label in [("bool", 2), ("uint8", 256), ("uint16", -1), ("int8", -129)]
        for x in [{"labels": zeros(2, 2, 3, 4, 5, dtype=dtype)}]
    ],
    # A value that is still being computed.
    bad_type("gaussian_smooth", "sigma", np.array([[1.0]]), "1.0"),
    bad_type("scaling_and_squaring", "num_steps", np.array([3]), "3"),
    # Options of the squarings, where there are none.
    bad_value("scaling_and_squaring", "padding_mode", "wrap", "wrap", num_steps=0),
    bad_type("scaling_and_squaring", "align_corners", 1, "1", num_steps=0),
]

BAD = [*FROM_THE_TABLE, *ONE_BY_ONE]


def arguments_of(op: str, changes: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """Operands by position, everything else by name."""
    good = example(op, dtype=np.float32)
    operands = dict(zip(OPERANDS[op], good.operands, strict=True))
    merged = {**operands, **good.options, **changes}
    return [merged.pop(name) for name in OPERANDS[op]], merged


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_the_error_names_the_argument_and_what_came(backend: Backend, bad: Bad) -> None:
    operands, options = arguments_of(bad.op, bad.changes)
    with pytest.raises(bad.error) as caught:
        backend.call(bad.op, *operands, **options)
    message = str(caught.value)
    assert type(caught.value) in (ValueError, TypeError), "no subclass that means something else"
    assert re.search(rf"\b({bad.argument})\b: expected", message), message
    assert re.search(bad.came, message.split("got", 1)[1]), message


@pytest.mark.parametrize("op", ALL_OPS)
def test_every_operand_and_attribute_of_the_table_is_tried(op: str) -> None:
    entry = TABLE[TABLE_NAMES.get(op, op)]
    tried = {name for bad in BAD if bad.op == op for name in bad.changes}
    named = {name for name, *_ in (*entry["inputs"], *entry["attributes"])}
    assert tried >= {SET_BY_ANOTHER.get(name, name) for name in named - {*SETTLED.get(op, ())}}


@pytest.mark.parametrize("op", ALL_OPS)
def test_axes_that_are_free_may_have_any_size(backend: Backend, op: str) -> None:
    """The counterpart of the bad shapes: what is not refused there is accepted here."""
    for operand, good in zip(OPERANDS[op], example(op, dtype=np.float32).operands, strict=True):
        for axis, kind in enumerate(layout(op, operand)):
            if operand == "affine" and op in ("affine_warp", "coverage"):
                continue
            alone = len(OPERANDS[op]) == 1
            values = []
            if kind in "Czyx" or (kind == "N" and alone):
                values.append(np.concatenate([good, good.take([0], axis)], axis))
            empty = kind in "zyx" and (op, operand) in MAY_BE_EMPTY
            if empty or kind == "C" or (kind == "N" and alone):
                values.append(good.take([], axis))
            for value in values:
                operands, options = arguments_of(op, {operand: value})
                if op in FIELD_LOSSES:  # what is reduced over the items is a number, also of none
                    options["reduction"] = "none"
                result = backend.call(op, *operands, **options)
                assert np.isfinite(result).all()
                assert (result.size == 0) == (value.size == 0)


@pytest.mark.parametrize(
    "bad", [b for b in BAD if isinstance(b.changes.get(b.argument), np.ndarray)], ids=str
)
def test_jax_refuses_bad_arrays_when_it_traces(bad: Bad) -> None:
    """No computation is needed to find out: shapes and dtypes are enough."""
    import jax

    backend = JaxBackend("cpu")
    operands, options = arguments_of(bad.op, bad.changes)
    with backend.scope(operands), pytest.raises(bad.error, match=rf"\b{bad.argument}\b"):
        jax.eval_shape(lambda *a: backend.function(bad.op)(*a, **options), *operands)


@pytest.mark.parametrize("op", ALL_OPS)
def test_unknown_arguments_are_refused(backend: Backend, op: str) -> None:
    operands, options = arguments_of(op, {})
    with pytest.raises(TypeError, match="align_croners"):
        backend.call(op, *operands, align_croners=True, **options)


@pytest.mark.parametrize("op", ALL_OPS)
def test_numpy_numbers_are_as_good_as_python_ones(backend: Backend, op: str) -> None:
    """Also as arrays without axes; the result is the same."""
    numbers_of = {"bool": np.bool_, "int": np.int16, "float": np.float64, "choice": np.str_}
    operands, options = arguments_of(op, {})
    expected = backend.call(op, *operands, **options)
    parameters = inspect.signature(backend.function(op)).parameters
    for name, kind in attributes(op):
        value = options.get(name, parameters[name].default)
        if value is None:
            continue
        number = np.array if kind in ("ints", "floats") else numbers_of[kind]
        for given in (number(value), np.array(value)):
            actual = backend.call(op, *operands, **{**options, name: given})
            np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("op", ALL_OPS)
def test_torch_tensors_that_hold_no_plain_memory_are_refused(op: str) -> None:
    import torch

    function = BACKENDS["torch", "cpu"].function(op)
    good, options = arguments_of(op, {})
    for k, name in enumerate(OPERANDS[op]):
        plain = torch.tensor(good[k])
        for bad, came in [
            (plain.to_sparse(), "sparse"),
            (plain.to(torch.float8_e4m3fn), "float8"),
            (torch.nested.nested_tensor([plain, plain], layout=torch.jagged), "nested"),
        ]:
            operands = [bad if i == k else torch.tensor(x) for i, x in enumerate(good)]
            with pytest.raises((ValueError, TypeError), match=rf"\b{name}\b: expected.*{came}"):
                function(*operands, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("op", [op for op in ALL_OPS if len(OPERANDS[op]) > 1])
def test_torch_tensors_on_two_devices_are_refused(op: str) -> None:
    import torch

    operands, options = arguments_of(op, {})
    tensors = [torch.tensor(x) for x in operands]
    tensors[0] = tensors[0].cuda()
    with pytest.raises(ValueError, match=rf"\b({any_operand(op)})\b: expected.*cuda.*cpu"):
        BACKENDS["torch", "cpu"].function(op)(*tensors, **options)


def test_jax_refuses_arrays_that_hold_no_numbers() -> None:
    import jax

    function = BACKENDS["jax", "cpu"].function("gaussian_smooth")
    keys = jax.random.split(jax.random.key(0), (1, 1, 4, 5))
    for bad in (keys, np.full((1, 1, 4, 5), "a"), np.full((1, 1, 4, 5), None)):
        with pytest.raises(TypeError, match=r"\bx\b: expected an array of numbers, got"):
            function(bad, 1.0)


@pytest.mark.parametrize("op", ALL_OPS)
def test_jax_refuses_attributes_that_are_traced(op: str) -> None:
    """They choose the kernel; a program for all of their values does not exist."""
    import jax

    function = BACKENDS["jax", "cpu"].function(op)
    operands, options = arguments_of(op, {})
    for name, kind in attributes(op):
        if kind == "choice":
            continue  # no array holds a string
        with pytest.raises(TypeError, match=rf"\b{name}\b: expected"):
            jax.jit(lambda value, name=name: function(*operands, **{**options, name: value}))(1)
