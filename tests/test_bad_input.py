"""Bad input is refused by both packages with one kind of error that says which argument is wrong.

The message names the argument, what was expected and what came.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from backends import Backend, JaxBackend
from examples import OPERANDS, OPS

NAN, INFINITY = float("nan"), float("inf")


def zeros(*shape: int, dtype: object = np.float32) -> np.ndarray:
    return np.zeros(shape, dtype)


@dataclass(frozen=True)
class Good:
    """A call that is accepted, by argument name; bad cases replace some of the arguments."""

    arguments: dict[str, Any]


GOOD = {
    "interpolate": Good(
        {"image": zeros(2, 1, 3, 4, 5), "affine": zeros(1, 3, 4), "grid": zeros(2, 3, 4, 5, 3)}
    ),
    "compose": Good(
        {"u": zeros(2, 3, 4, 5, 3), "v": zeros(2, 3, 4, 5, 3), "affine": zeros(1, 3, 4)}
    ),
    "affine_warp": Good({"affine": zeros(2, 3, 4), "displacement": zeros(2, 3, 4, 5, 3)}),
    "scaling_and_squaring": Good({"velocity": zeros(2, 3, 4, 5, 3)}),
    "gaussian_smooth": Good({"x": zeros(2, 1, 3, 4, 5), "sigma": 1.0}),
    "jacobian_determinant": Good({"displacement": zeros(2, 3, 4, 5, 3)}),
    "convert_displacement": Good(
        {
            "displacement": zeros(2, 3, 4, 5, 3),
            "source": "normalised",
            "target": "mm",
            "spacing": (1.0, 2.0, 3.0),
        }
    ),
    "lncc_loss": Good(
        {
            "pred": zeros(2, 2, 3, 4, 5),
            "target": zeros(1, 2, 3, 4, 5),
            "mask": zeros(1, 1, 3, 4, 5),
        }
    ),
}


@dataclass(frozen=True)
class Bad:
    """A call refused because of ``argument``; ``came`` is how the message tells its value."""

    op: str
    argument: str
    error: type[Exception]
    came: str
    changes: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.op}-{self.argument}-{self.came}"


def bad_value(op: str, argument: str, value: Any, came: str, **others: Any) -> Bad:
    return Bad(op, argument, ValueError, came, {argument: value, **others})


def bad_type(op: str, argument: str, value: Any, came: str, **others: Any) -> Bad:
    return Bad(op, argument, TypeError, came, {argument: value, **others})


def numbers(*values: int) -> str:
    """A pattern for a shape, however it is punctuated."""
    return r"\D+".join(map(str, values))


FIELDS = [
    ("interpolate", "grid"),
    ("compose", "u"),
    ("compose", "v"),
    ("affine_warp", "displacement"),
    ("scaling_and_squaring", "velocity"),
    ("jacobian_determinant", "displacement"),
    ("convert_displacement", "displacement"),
]
AFFINES = [("interpolate", "affine"), ("compose", "affine"), ("affine_warp", "affine")]
IMAGES = [("interpolate", "image"), ("gaussian_smooth", "x"), ("lncc_loss", "pred")]
COMPARED = [("lncc_loss", "target"), ("lncc_loss", "mask")]  # with the shape of another operand
PADDED = ["interpolate", "compose", "scaling_and_squaring"]
ALIGNED = [op for op in OPS if op not in ("gaussian_smooth", "lncc_loss")]

BAD = [
    # Fields: (N, [Z,] Y, X, D).
    *[bad_value(op, name, zeros(2, 3, 4, 5, 2), numbers(2, 3, 4, 5, 2)) for op, name in FIELDS],
    *[bad_value(op, name, zeros(2, 5, 3), numbers(2, 5, 3)) for op, name in FIELDS],
    *[
        bad_value(op, name, zeros(2, 0, 4, 5, 3), numbers(2, 0, 4, 5, 3))
        for op, name in FIELDS
        if op != "convert_displacement"  # which scales nothing as well as anything
    ],
    *[bad_type(op, name, zeros(2, 3, 4, 5, 3, dtype=np.int32), "int32") for op, name in FIELDS],
    # Affines: (N, D, D+1).
    *[bad_value(op, name, zeros(2, 2, 4), numbers(2, 2, 4)) for op, name in AFFINES],
    *[bad_value(op, name, zeros(2, 4, 4), numbers(2, 4, 4)) for op, name in AFFINES],
    *[bad_value(op, name, zeros(3, 4), numbers(3, 4)) for op, name in AFFINES],
    *[bad_value(op, name, zeros(2, 2, 3), numbers(2, 2, 3)) for op, name in AFFINES],
    *[bad_type(op, name, zeros(2, 3, 4, dtype=np.int64), "int") for op, name in AFFINES],
    # Images: (N, C, [Z,] Y, X).
    *[bad_value(op, name, zeros(3, 4, 5), numbers(3, 4, 5)) for op, name in IMAGES],
    *[bad_value(op, name, zeros(1, 1, 1, 3, 4, 5), numbers(1, 3, 4, 5)) for op, name in IMAGES],
    *[bad_value(op, name, zeros(2, 1, 3, 0, 5), numbers(2, 1, 3, 0, 5)) for op, name in IMAGES],
    *[bad_type(op, name, zeros(2, 1, 3, 4, 5, dtype=np.uint8), "uint8") for op, name in IMAGES],
    *[bad_type(op, name, zeros(2, 1, 3, 4, 5, dtype=bool), "bool") for op, name in IMAGES],
    *[
        bad_type(op, name, zeros(2, 1, 3, 4, 5, dtype=np.complex64), "complex")
        for op, name in IMAGES
    ],
    # What is not an array at all.
    *[
        bad_type(op, name, value, came)
        for op, name in [(op, OPERANDS[op][0]) for op in OPS]
        for value, came in [(None, "None"), ("brain.nii", "str"), ([[0.0]], "list")]
    ],
    *[bad_type(op, name, "brain.nii", "str") for op, name in AFFINES],
    # Operands that do not fit each other.
    bad_value("interpolate", "affine", zeros(3, 3, 4), "3"),
    bad_value("interpolate", "grid", zeros(3, 3, 4, 5, 3), "3"),
    bad_value("interpolate", "grid", zeros(2, 4, 5, 2), numbers(2, 4, 5, 2)),
    bad_value("compose", "v", zeros(3, 3, 4, 5, 3), "3"),
    bad_value("compose", "v", zeros(2, 4, 5, 2), numbers(2, 4, 5, 2)),
    bad_value("compose", "affine", zeros(3, 3, 4), "3"),
    bad_value("affine_warp", "displacement", zeros(3, 3, 4, 5, 3), "3"),
    *[bad_value(op, name, zeros(3, 2, 3, 4, 5), "3") for op, name in COMPARED],
    *[
        bad_value(op, name, zeros(2, channels, 3, 4, 5), numbers(2, channels, 3, 4, 5))
        for op, name in COMPARED
        for channels in (0, 3)
    ],
    *[bad_value(op, name, zeros(2, 2, 3, 4, 6), numbers(2, 2, 3, 4, 6)) for op, name in COMPARED],
    *[bad_value(op, name, zeros(2, 2, 4, 5), numbers(2, 2, 4, 5)) for op, name in COMPARED],
    *[bad_type(op, name, zeros(2, 2, 3, 4, 5, dtype=np.int16), "int16") for op, name in COMPARED],
    *[bad_type(op, name, "brain.nii", "str") for op, name in COMPARED],
    bad_type("lncc_loss", "target", None, "None"),
    # Names of modes.
    bad_value("interpolate", "mode", "cubic", "cubic"),
    bad_type("interpolate", "mode", 1, "int|1"),
    *[bad_value(op, "padding_mode", "wrap", "wrap") for op in PADDED],
    *[bad_type(op, "padding_mode", None, "None") for op in PADDED],
    bad_value("convert_displacement", "source", "inch", "inch"),
    bad_value("convert_displacement", "target", "cm", "cm"),
    bad_type("convert_displacement", "target", None, "None"),
    bad_value("convert_displacement", "source_channels", "middle", "middle"),
    bad_value("convert_displacement", "target_channels", "middle", "middle"),
    bad_value("lncc_loss", "window", "triangular", "triangular"),
    bad_type("lncc_loss", "window", None, "None"),
    bad_value("lncc_loss", "reduction", "median", "median"),
    bad_type("lncc_loss", "reduction", 0, "int|0"),
    # Switches.
    *[bad_type(op, "align_corners", "no", "str|no") for op in ALIGNED],
    *[bad_type(op, "deterministic", value, str(value)) for op in PADDED for value in ("no", None)],
    bad_type("interpolate", "affine_last", "no", "str|no"),
    bad_type("interpolate", "is_displacement", None, "None"),
    bad_type("compose", "add", 0.5, "float|0.5"),
    bad_type("gaussian_smooth", "channel_last", "yes", "str|yes"),
    # Shapes asked for.
    bad_value("interpolate", "out_shape", (3, 4), numbers(3, 4), grid=None),
    bad_value("interpolate", "out_shape", (3, -4, 5), numbers(3) + r"\D+-4", grid=None),
    bad_value("interpolate", "out_shape", (3, 0, 5), numbers(3, 0, 5), grid=None),
    bad_type("interpolate", "out_shape", (3, 4.5, 5), "4.5|float", grid=None),
    bad_type("interpolate", "out_shape", "345", "str|345", grid=None),
    bad_value("interpolate", "out_shape", (3, 4, 6), numbers(3, 4, 6)),  # the grid has another
    # Numbers.
    bad_value("scaling_and_squaring", "num_steps", -1, "-1"),
    bad_type("scaling_and_squaring", "num_steps", 2.5, "2.5|float"),
    bad_type("scaling_and_squaring", "num_steps", "six", "str|six"),
    bad_value("gaussian_smooth", "sigma", -0.5, "-0.5"),
    bad_value("gaussian_smooth", "sigma", NAN, "nan"),
    bad_value("gaussian_smooth", "sigma", INFINITY, "inf"),
    bad_value("gaussian_smooth", "sigma", (1.0, 2.0), "2"),
    bad_value("gaussian_smooth", "sigma", (1.0, -2.0, 1.0), "-2"),
    bad_type("gaussian_smooth", "sigma", "wide", "str|wide"),
    bad_type("gaussian_smooth", "sigma", None, "None"),
    bad_value("gaussian_smooth", "truncate", -1.0, "-1"),
    bad_value("gaussian_smooth", "truncate", NAN, "nan"),
    bad_type("gaussian_smooth", "truncate", "far", "str|far"),
    *[bad_value("lncc_loss", "kernel_size", size, str(size)) for size in (-3, 0, 1, 4, 33)],
    bad_type("lncc_loss", "kernel_size", 5.0, "float|5"),
    bad_type("lncc_loss", "kernel_size", (5, 5, 5), "tuple|5"),
    *[bad_value("lncc_loss", "sigma", s, f"{s:g}") for s in (-1.0, 0.0, NAN, INFINITY)],
    bad_value("lncc_loss", "sigma", (1.0, 2.0, 3.0), "3"),
    bad_type("lncc_loss", "sigma", "wide", "str|wide"),
    *[bad_value("lncc_loss", "smooth_nr", x, f"{x:g}") for x in (-1.0, NAN, INFINITY)],
    *[bad_value("lncc_loss", "smooth_dr", x, f"{x:g}") for x in (-1.0, 0.0, 1e-19, NAN)],
    bad_type("lncc_loss", "smooth_dr", None, "None"),
    bad_value("convert_displacement", "spacing", None, "None"),
    bad_value("convert_displacement", "spacing", (1.0, 2.0), "2"),
    bad_value("convert_displacement", "spacing", (1.0, 0.0, 2.0), "0"),
    bad_value("convert_displacement", "spacing", (1.0, -3.0, 2.0), "-3"),
    bad_value("convert_displacement", "spacing", (1.0, NAN, 2.0), "nan"),
    bad_type("convert_displacement", "spacing", ("a", "b", "c"), "str|'a'"),
    bad_value(
        "convert_displacement",
        "displacement",
        zeros(2, 4, 5, 6, 3),
        numbers(2, 4, 5, 6, 3),
        source_channels="first",
    ),
]


def arguments_of(op: str, changes: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """Operands by position, everything else by name."""
    merged = {**GOOD[op].arguments, **changes}
    return [merged.pop(name) for name in OPERANDS[op]], merged


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_the_error_names_the_argument_and_what_came(backend: Backend, bad: Bad) -> None:
    operands, options = arguments_of(bad.op, bad.changes)
    with pytest.raises(bad.error) as caught:
        backend.call(bad.op, *operands, **options)
    message = str(caught.value)
    assert type(caught.value) in (ValueError, TypeError), "no subclass that means something else"
    assert re.search(rf"\b{bad.argument}\b", message), message
    assert re.search(bad.came, message), message
    assert "expected" in message, message


@pytest.mark.parametrize("op", OPS)
def test_the_call_that_the_bad_ones_vary_is_accepted(backend: Backend, op: str) -> None:
    operands, options = arguments_of(op, {})
    assert np.isfinite(backend.call(op, *operands, **options)).all()


@pytest.mark.parametrize(
    "bad", [b for b in BAD if isinstance(b.changes[b.argument], np.ndarray)], ids=str
)
def test_jax_refuses_bad_arrays_when_it_traces(bad: Bad) -> None:
    """No computation is needed to find out: shapes and dtypes are enough."""
    import jax

    backend = JaxBackend("cpu")
    operands, options = arguments_of(bad.op, bad.changes)
    with backend.scope(operands), pytest.raises(bad.error, match=rf"\b{bad.argument}\b"):
        jax.eval_shape(lambda *a: backend.function(bad.op)(*a, **options), *operands)


@pytest.mark.parametrize("op", OPS)
def test_unknown_arguments_are_refused(backend: Backend, op: str) -> None:
    operands, options = arguments_of(op, {})
    with pytest.raises(TypeError, match="align_croners"):
        backend.call(op, *operands, align_croners=True, **options)
