"""Prints, as JSON, a digest of every result and gradient of every op in both packages.

A program and not a test: the number of threads is settled at the first call of a process.
"""

from __future__ import annotations

import hashlib
import itertools
import json

import numpy as np
from backends import BACKENDS
from examples import ALL_OPS, FIELD_LOSSES, OPERANDS, Example, example
from inputs import HALVES, random_array

# Large enough for every loop to be divided among threads, and odd enough to be divided unevenly.
SHAPES = {2: (181, 203), 3: (29, 37, 43)}


def cases() -> dict[str, Example]:
    """Calls by a name that says what is special about them."""
    result = {}
    for name, dim in itertools.product(ALL_OPS, SHAPES):
        result[f"{name} {dim}-D"] = example(name, shape=SHAPES[dim], dtype=np.float32)
    for name in ("interpolate", "compose", "lncc_loss", "mutual_information_loss"):
        result[f"{name} float64"] = example(name, shape=SHAPES[3])
    # What is converted, and to what, is the same for all kinds of one op of the table.
    for name, dtype in itertools.product([x for x in ALL_OPS if x not in FIELD_LOSSES[1:]], HALVES):
        case = example(name, shape=SHAPES[3], dtype=dtype)
        result[f"{name} {np.dtype(dtype).name}"] = case
    for padding, align in [("border", True), ("reflection", False)]:
        case = example("interpolate", shape=SHAPES[3], dtype=np.float32)
        case.options.update(padding_mode=padding, align_corners=align, affine_last=True)
        result[f"interpolate {padding}, align_corners={align}, affine last"] = case
    case = example("interpolate", shape=SHAPES[3], dtype=np.float32)
    case.options.update(mode="nearest")
    result["interpolate nearest"] = case
    for name, mode in itertools.product(("interpolate", "compose"), ("cubic", "b-spline")):
        case = example(name, shape=SHAPES[3], dtype=np.float32)
        case.options.update(mode=mode, padding_mode="reflection")
        result[f"{name} {mode}"] = case
    image, affine, grid = example("interpolate", shape=SHAPES[3], dtype=np.float32).operands
    result["interpolate with broadcast image and affine"] = Example(
        "interpolate", (image[:1], affine[:1], grid)
    )
    result["interpolate with half an image"] = Example(
        "interpolate", (image.astype(np.float16), affine, grid)
    )
    u, v, affine = example("compose", shape=SHAPES[3], dtype=np.float32).operands
    result["compose with a broadcast field"] = Example("compose", (u[:1], v, affine))
    case = example("lncc_loss", shape=SHAPES[3], dtype=np.float32)
    case.options.update(kernel_size=11, window="gaussian")
    result["lncc_loss gaussian, kernel_size=11"] = case
    case = example("lncc_loss", shape=SHAPES[3], dtype=np.float32)
    mask = abs(random_array(0, 2, 1, *SHAPES[3], dtype=np.float32))
    case.options.update(kernel_size=7, reduction="none", mask=mask)
    result["lncc_loss map with a mask"] = case
    pred, target = case.operands
    result["lncc_loss with a broadcast target and a mask"] = Example(
        "lncc_loss", (pred, target[:1]), {"kernel_size": 9, "mask": mask}
    )
    name = "mutual_information_loss"
    shared = (pred, target[:1])
    result[f"{name} with a broadcast target and a mask"] = Example(name, shared, {"mask": mask})
    result[f"{name} b-spline, joint range, 64 bins"] = Example(
        name, shared, {"kernel": "b-spline", "value_range": "joint", "num_bins": 64}
    )
    result[f"{name} normalised, with a broadcast target and a mask"] = Example(
        name, shared, {"normalised": True, "mask": mask}
    )
    result[f"{name} of each item, wide windows"] = Example(
        name, (pred, target), {"sigma_ratio": 4.0, "reduction": "none"}
    )
    result["joint_histogram of hard bins"] = Example(
        "joint_histogram", (pred, target), {"kernel": "delta", "num_bins": 100}
    )
    return result


def digest(array: np.ndarray) -> str:
    return hashlib.sha256(f"{array.dtype}{array.shape}".encode() + array.tobytes()).hexdigest()[:16]


def main() -> None:
    digests: dict[str, dict[str, dict[str, str]]] = {}
    for title, case in cases().items():
        digests[title] = {}
        for framework in ("jax", "torch"):
            backend = BACKENDS[framework, "cpu"]
            results = backend.call(case.name, *case.operands, **case.options)
            value, *others = results if isinstance(results, tuple) else (results,)
            assert all(np.isfinite(x).all() for x in (value, *others))
            cotangent = random_array(7, *value.shape, dtype=value.dtype)
            wrt = case.differentiable
            gradients = backend.vjp(case.name, case.operands, cotangent, wrt, **case.options)
            digests[title][framework] = (
                {"value": digest(value)}
                | {f"result {k}": digest(other) for k, other in enumerate(others, 2)}
                | {
                    f"gradient of {OPERANDS[case.name][k]}": digest(gradient)
                    for k, gradient in zip(wrt, gradients, strict=True)
                }
            )
    print(json.dumps(digests))


if __name__ == "__main__":
    main()
