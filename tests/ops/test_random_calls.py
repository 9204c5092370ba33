"""Calls drawn at random from all that is allowed together agree with the reference.

The other files walk along one option at a time; this one meets them in combination. It runs
through ``torchreg``, whose calls need no compilation; ``test_parity`` ties ``jaxreg`` to it.

Every launch is guarded: it is made twice more, into memory that holds something else each time. An
output that is not written completely, a workspace that is read before it is written, a write past
the end and a change of an input all show.

``make fuzz`` draws many more calls, other ones each time.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import numpy as np
import pytest
import reference
from backends import BACKENDS
from examples import FIELD_LOSSES, WITHOUT_GRADIENT
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from inputs import assert_close, assert_same, off_grid_displacement, random_affine, random_array

from regkernels import table

ON_EACH_DEVICE = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
)

LAUNCH = table.launch
ROLES = {op.name: [output.role for output in op.outputs] for op in table.OPS.values()}
ITEM_SIZES = {
    **{"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8},
    **{"uint8": 1, "int16": 2, "int32": 4, "int64": 8},
}
MARGIN = 8 * 13  # bytes; leaves addresses aligned to one element and not to a vector of them


def num_bytes(array: tuple[str, tuple[int, ...]]) -> int:
    dtype, shape = array
    return ITEM_SIZES[dtype] * math.prod(shape)


def guarded_launch(
    op: str,
    inputs: Any,
    input_addresses: Sequence[int],
    attributes: Any,
    wanted: int,
    outputs: Any,
    output_addresses: Sequence[int],
    device: int,
    stream: int,
) -> None:
    """Launch into three memories with different contents, of which the last is the caller's."""
    import torch

    def launch(addresses: Sequence[int]) -> None:
        LAUNCH(
            *(op, inputs, input_addresses, attributes, wanted),
            *(outputs, addresses, device, stream),
        )

    def contents() -> list[bytes]:
        return [
            ctypes.string_at(address, num_bytes(x))
            for x, address in zip(inputs, input_addresses, strict=True)
            if x and device < 0
        ]

    place = "cpu" if device < 0 else f"cuda:{device}"
    before = contents()
    runs: list[list[Any]] = []
    for content in (0xFF, 0x5A):  # NaN, and a number above 1e16
        memory = [
            torch.full(
                ((num_bytes(x) if x else 0) + 2 * MARGIN,),
                content,
                dtype=torch.uint8,
                device=place,
            )
            for x in outputs
        ]
        launch(
            [
                0 if x is None else space.data_ptr() + MARGIN
                for x, space in zip(outputs, memory, strict=True)
            ]
        )
        runs.append([])
        for x, space, role in zip(outputs, memory, ROLES[op], strict=True):
            if x is None:
                continue
            margins = torch.cat([space[:MARGIN], space[-MARGIN:]])
            assert (margins == content).all(), f"{op} writes outside of its {role}"
            if role != "workspace":
                written = space[MARGIN:-MARGIN].clone().view(getattr(torch, x[0]))
                runs[-1].append(written)
    for first, second in zip(*runs, strict=True):
        # Atomics may add in another order.
        tolerance = 0 if device < 0 else 1e-5
        same = torch.allclose(first, second, tolerance, tolerance, equal_nan=True)
        assert same, f"{op} depends on what its outputs or workspaces held before"
    launch(output_addresses)
    assert before == contents(), f"{op} changes an input"


@pytest.fixture(autouse=True, scope="module")
def guarded_launches() -> Iterator[None]:
    with mock.patch.object(table, "launch", guarded_launch):
        yield


DIMS = st.sampled_from([2, 3])
SEEDS = st.integers(0, 2**32 - 1)
FLAGS = st.booleans()
PADDINGS = st.sampled_from(["zeros", "border", "reflection"])
MODES = st.sampled_from(["bilinear", "nearest", "cubic", "b-spline"])
SMOOTH_MODES = st.sampled_from(["bilinear", "cubic", "b-spline"])


def shapes(dim: int) -> st.SearchStrategy[tuple[int, ...]]:
    return st.tuples(*[st.integers(1, 7)] * dim)


def batches(count: int) -> st.SearchStrategy[tuple[int, ...]]:
    """Batch sizes that go together."""
    return st.integers(1, 3).flatmap(lambda n: st.tuples(*[st.sampled_from([1, n])] * count))


@st.composite
def interpolations(draw: st.DrawFn) -> tuple[tuple[Any, ...], dict[str, Any]]:
    dim, seed = draw(DIMS), draw(SEEDS)
    shape, out, sizes = draw(shapes(dim)), draw(shapes(dim)), draw(batches(3))
    options = {
        "affine_last": draw(FLAGS),
        "is_displacement": True,
        "mode": draw(MODES),
        "padding_mode": draw(PADDINGS),
        "align_corners": draw(FLAGS),
    }
    image = random_array(seed, sizes[0], draw(st.integers(1, 4)), *shape)
    affine = random_affine(seed + 1, sizes[1], dim) if draw(FLAGS) else None
    if draw(FLAGS):
        grid = off_grid_displacement(
            seed + 2, sizes[2], shape, out, align_corners=options["align_corners"], reach=4
        )
        options["is_displacement"] = draw(FLAGS)
        return (image, affine, grid), options
    if affine is None:
        affine = random_affine(seed + 1, sizes[1], dim)
    return (image, affine, None), {**options, "out_shape": out}


@ON_EACH_DEVICE
@given(interpolations())
def test_interpolate(device: str, call: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
    args, options = call
    backend = BACKENDS["torch", device]
    expected = reference.interpolate(*args, **options)
    assert_close(backend.call("interpolate", *args, **options), expected, np.float64)
    cotangent = random_array(0, *expected.shape)
    wrt = [k for k, operand in enumerate(args) if operand is not None]
    gradients = backend.vjp("interpolate", args, cotangent, wrt, **options)
    expected_gradients = reference.interpolate_vjp(cotangent, *args, **options)
    for k, gradient in zip(wrt, gradients, strict=True):
        assert_close(gradient, expected_gradients[k], np.float64)


@st.composite
def label_interpolations(draw: st.DrawFn) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """As those of images."""
    (image, affine, grid), options = draw(interpolations())
    dtype = draw(st.sampled_from([np.uint8, np.int16, np.int32, np.int64]))
    del options["mode"]
    options["background"] = draw(st.integers(0, 3))
    return ((4 * abs(image)).astype(dtype), affine, grid), options


@ON_EACH_DEVICE
@given(label_interpolations())
def test_interpolate_labels(device: str, call: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
    """Where no other label comes within rounding of the one that wins."""
    args, options = call
    labels, weights = BACKENDS["torch", device].call(
        "interpolate_labels", *args, return_weights=True, **options
    )
    expected, share = reference.interpolate_labels(*args, return_weights=True, **options)
    np.testing.assert_allclose(weights, share, atol=1e-6)
    # Half of the weight or less may be a tie.
    clear = share > 0.5 + 1e-9
    assert_same(labels[clear], expected[clear])
    assert np.isin(labels, [options["background"], *args[0].ravel()]).all()


@st.composite
def inversions(draw: st.DrawFn) -> tuple[np.ndarray, dict[str, Any]]:
    dim, seed = draw(DIMS), draw(SEEDS)
    shape = draw(shapes(dim))
    options = {"padding_mode": draw(PADDINGS), "align_corners": draw(FLAGS)}
    u = random_array(seed, draw(st.integers(1, 3)), *shape, dim) * 0.25 / max(shape)
    return u, options


@ON_EACH_DEVICE
@settings(max_examples=max(20, settings().max_examples // 5))  # the reference is slow
@given(inversions())
def test_invert_displacement(device: str, call: tuple[np.ndarray, dict[str, Any]]) -> None:
    u, options = call
    inverse, residual = BACKENDS["torch", device].call(
        "invert_displacement", u, tolerance=1e-13, return_residual=True, **options
    )
    assert_close(inverse, reference.invert_displacement(u, **options), np.float64)
    assert residual.max() <= 1e-12


@st.composite
def compositions(draw: st.DrawFn) -> tuple[tuple[Any, ...], dict[str, Any]]:
    dim, seed = draw(DIMS), draw(SEEDS)
    shape, out, sizes = draw(shapes(dim)), draw(shapes(dim)), draw(batches(3))
    options = {"add": draw(FLAGS), "padding_mode": draw(PADDINGS), "align_corners": draw(FLAGS)}
    options["mode"] = draw(SMOOTH_MODES)
    u = random_array(seed, sizes[0], *shape, dim)
    v = off_grid_displacement(
        seed + 1, sizes[1], shape, out, align_corners=options["align_corners"], reach=4
    )
    affine = random_affine(seed + 2, sizes[2], dim) if draw(FLAGS) else None
    return (u, v, affine), options


@ON_EACH_DEVICE
@given(compositions())
def test_compose(device: str, call: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
    args, options = call
    backend = BACKENDS["torch", device]
    expected = reference.compose(*args, **options)
    assert_close(backend.call("compose", *args, **options), expected, np.float64)
    cotangent = random_array(0, *expected.shape)
    wrt = [k for k, operand in enumerate(args) if operand is not None]
    gradients = backend.vjp("compose", args, cotangent, wrt, **options)
    expected_gradients = reference.compose_vjp(cotangent, *args, **options)
    for k, gradient in zip(wrt, gradients, strict=True):
        assert_close(gradient, expected_gradients[k], np.float64)


@st.composite
def smoothings(draw: st.DrawFn) -> tuple[np.ndarray, Any, dict[str, Any]]:
    dim = draw(DIMS)
    shape, batch, channels = draw(shapes(dim)), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    channel_last = draw(FLAGS)
    x = random_array(
        draw(SEEDS), batch, *((*shape, channels) if channel_last else (channels, *shape))
    )
    sigma = st.one_of(st.just(0.0), st.floats(0.1, 4))
    options = {"channel_last": channel_last, "truncate": draw(st.floats(0.5, 5))}
    return x, draw(st.one_of(sigma, st.tuples(*[sigma] * dim))), options


@ON_EACH_DEVICE
@given(smoothings())
def test_gaussian_smooth(device: str, call: tuple[np.ndarray, Any, dict[str, Any]]) -> None:
    x, sigma, options = call
    backend = BACKENDS["torch", device]
    expected = reference.gaussian_smooth(x, sigma, **options)
    assert_close(backend.call("gaussian_smooth", x, sigma, **options), expected, np.float64)
    (gradient,) = backend.vjp("gaussian_smooth", (x, sigma), x, (0,), **options)
    assert_close(gradient, expected, np.float64)


@st.composite
def described(draw: st.DrawFn) -> tuple[np.ndarray, dict[str, Any]]:
    dim = draw(DIMS)
    image = random_array(
        draw(SEEDS), draw(st.integers(1, 3)), draw(st.integers(1, 3)), *draw(shapes(dim))
    )
    return image, {"radius": draw(st.integers(1, 4)), "dilation": draw(st.integers(1, 5))}


@ON_EACH_DEVICE
@given(described())
def test_mind_ssc(device: str, call: tuple[np.ndarray, dict[str, Any]]) -> None:
    image, options = call
    backend = BACKENDS["torch", device]
    expected = reference.mind_ssc(image, **options)
    assert_close(backend.call("mind_ssc", image, **options), expected, np.float64)
    distances = np.sort(reference.patch_distances(image, **options), axis=2)
    # Where two pairs are the nearest, either may be taken for it.
    assume(np.all(distances[:, :, 1] - distances[:, :, 0] > 1e-12))
    cotangent = random_array(0, *expected.shape)
    (gradient,) = backend.vjp("mind_ssc", (image,), cotangent, (0,), **options)
    expected_gradient = reference.mind_ssc_vjp(cotangent, image, **options)
    assert_close(gradient, expected_gradient, np.float64)


@st.composite
def losses(draw: st.DrawFn) -> tuple[tuple[np.ndarray, ...], dict[str, Any]]:
    dim, seed = draw(DIMS), draw(SEEDS)
    shape, sizes, channels = draw(shapes(dim)), draw(batches(3)), draw(st.integers(1, 3))
    options = {
        "kernel_size": draw(st.sampled_from([3, 5, 7, 9, 11, 15])),
        "window": draw(st.sampled_from(["rectangular", "gaussian"])),
        "sigma": draw(st.one_of(st.none(), st.floats(0.5, 4))),
        "smooth_nr": draw(st.sampled_from([0.0, 0.1])),
        "smooth_dr": draw(st.sampled_from([1e-5, 0.1])),
        "common_variance": draw(st.sampled_from([0.0, 0.3])),
        "both_flat": draw(st.sampled_from([None, 0.0, 1.0])),
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
    }
    if draw(FLAGS):
        one = draw(st.sampled_from([1, channels]))
        kept = [n if draw(FLAGS) else 1 for n in shape]
        options["mask"] = abs(random_array(seed + 2, sizes[2], one, *kept))
    operands = tuple(random_array(seed + k, sizes[k], channels, *shape) for k in range(2))
    return operands, options


@ON_EACH_DEVICE
@given(losses())
def test_lncc_loss(device: str, call: tuple[tuple[np.ndarray, ...], dict[str, Any]]) -> None:
    operands, options = call
    backend = BACKENDS["torch", device]
    expected = reference.lncc_loss(*operands, **options)
    assert_close(backend.call("lncc_loss", *operands, **options), expected, np.float64)
    cotangent = random_array(0, *expected.shape)
    gradients = backend.vjp("lncc_loss", operands, cotangent, (0, 1), **options)
    expected_gradients = reference.lncc_loss_vjp(cotangent, *operands, **options)
    for gradient, expected in zip(gradients, expected_gradients, strict=True):
        assert_close(gradient, expected, np.float64)


@st.composite
def field_losses(draw: st.DrawFn) -> tuple[str, np.ndarray, dict[str, Any]]:
    name, dim = draw(st.sampled_from(FIELD_LOSSES)), draw(DIMS)
    shape = draw(shapes(dim))
    u = random_array(draw(SEEDS), draw(st.integers(1, 3)), *shape, dim) / max(shape)
    options = {
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
        "align_corners": draw(FLAGS),
    }
    if name not in ("divergence_loss", "jacobian_loss") and draw(FLAGS):
        options["spacing"] = draw(st.tuples(*[st.floats(0.3, 3)] * dim))
    if name == "elasticity_loss":
        options |= {"mu": draw(st.floats(0, 3)), "lam": draw(st.floats(0, 3))}
    return name, u, options


@ON_EACH_DEVICE
@given(field_losses())
def test_losses_of_a_field(device: str, call: tuple[str, np.ndarray, dict[str, Any]]) -> None:
    name, u, options = call
    backend = BACKENDS["torch", device]
    function = getattr(reference, name)
    expected = function(u, **options)
    assert_close(backend.call(name, u, **options), np.asarray(expected), np.float64)
    cotangent = random_array(0, *expected.shape)
    (gradient,) = backend.vjp(name, (u,), cotangent, (0,), **options)
    if name == "jacobian_loss":
        return
    # The loss is quadratic: the difference over any step is its slope in the middle.
    step = random_array(1, *u.shape)
    sides = [np.sum(cotangent * function(u + h * step, **options)) for h in (0.5, -0.5)]
    error = abs((gradient * step).sum() - (sides[0] - sides[1]))
    assert error <= 1e-12 * max(1, *map(abs, sides))


KERNELS = st.sampled_from(["gaussian", "b-spline"])


@st.composite
def binnings(draw: st.DrawFn) -> dict[str, Any]:
    """How intensities between -1 and 1 may be counted."""
    given = st.tuples(*[st.tuples(st.floats(-1.5, -0.5), st.floats(-0.4, 1.5))] * 2)
    return {
        "num_bins": draw(st.one_of(st.integers(2, 20), st.sampled_from([32, 33, 64, 256]))),
        "kernel": draw(KERNELS),
        "sigma_ratio": draw(st.floats(0.25, 2.5)),
        "value_range": draw(st.one_of(st.none(), st.just("joint"), given)),
    }


@ON_EACH_DEVICE
@given(losses(), binnings(), FLAGS)
def test_mutual_information(
    device: str,
    call: tuple[tuple[np.ndarray, ...], dict[str, Any]],
    binning: dict[str, Any],
    normalised: bool,
) -> None:
    operands, others = call
    # Rounding of intensities counts in units of their range.
    spreads = np.array([np.ptp(x, axis=tuple(range(2, x.ndim))).min() for x in operands])
    assume(np.all((spreads == 0) | (spreads > 0.01)))
    options = {**binning, **{k: others[k] for k in ("mask",) if k in others}}
    backend = BACKENDS["torch", device]
    histogram = reference.joint_histogram(*operands, **options)
    assert_close(backend.call("joint_histogram", *operands, **options), histogram, np.float64)
    options["reduction"] = others["reduction"]
    options["normalised"] = normalised
    expected = reference.mutual_information_loss(*operands, **options)
    actual = backend.call("mutual_information_loss", *operands, **options)
    assert_close(actual, expected, np.float64)
    cotangent = random_array(0, *expected.shape)
    gradients = backend.vjp("mutual_information_loss", operands, cotangent, (0, 1), **options)
    slopes = reference.mutual_information_loss_vjp(cotangent, *operands, **options)
    for gradient, slope in zip(gradients, slopes, strict=True):
        assert_close(gradient, slope, np.float64)


# Finite inputs that are as far from ordinary as a result can bear: for each op, sizes of its
# operands. Larger ones overflow on the way. Images of 1e38 have slopes that no float32 holds, and
# from a difference of two infinities comes NaN.
SIZES = {
    "interpolate": [(1, 1, 1), (1e30, 1, 1), (1e-38, 1, 1e-38), (1, 1e20, 1), (1, 1, 1e30)],
    "compose": [(1, 1, 1), (1e30, 1, 1), (1e-38, 1e-38, 1), (1, 1e20, 1e10), (1e-4, 1e30, 1)],
    "affine_warp": [(1, 1), (1e30, 1e30), (1e-38, 1e-38)],
    "coverage": [(1, 1), (1e30, 1e30), (1e-38, 1e-38)],
    "scaling_and_squaring": [(1,), (30,), (1e-38,)],
    "spline_coefficients": [(1,), (1e30,), (1e-38,)],
    "gaussian_smooth": [(1,), (1e30,), (1e-38,)],
    "jacobian_determinant": [(1,), (1e9,), (1e-38,)],
    "convert_displacement": [(1,), (1e30,), (1e-38,)],
    **{name: [(1,), (1e30,), (1e-38,)] for name in FIELD_LOSSES},
    "jacobian_loss": [(1,), (1e9,), (1e-38,)],
    "lncc_loss": [(1, 1), (1e30, 1e30), (1e-38, 1), (1e19, 1e-30)],
    "mutual_information_loss": [(1, 1), (1e38, 1e38), (1e-38, 1), (1e38, 1e-38)],
    "mind_ssc": [(1,), (1e15,), (1e-14,), (1e-38,)],
    "joint_histogram": [(1, 1), (1e38, 1e38), (1e-38, 1), (1e38, 1e-38)],
    "interpolate_labels": [(9, 1, 1), (9, 1e20, 1e-38), (9, 1, 1e30)],
    "invert_displacement": [(1, 1), (30, 1), (1e30, 1e30), (1e-38, 1e-38)],
}


@st.composite
def extreme_calls(draw: st.DrawFn) -> tuple[str, tuple[Any, ...], dict[str, Any]]:
    """A call of any op with finite operands of any size in both senses, empty ones included."""
    name, dim = draw(st.sampled_from(sorted(SIZES))), draw(DIMS)
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    length = st.one_of(st.integers(1, 5), st.sampled_from([1, 2, 33]))
    shape, out = draw(st.tuples(*[length] * dim)), draw(st.tuples(*[length] * dim))
    batch = draw(st.sampled_from([0, 1, 2, 3]))
    rng = np.random.default_rng(draw(SEEDS))
    sizes = iter(draw(st.sampled_from(SIZES[name])))

    def values(*axes: int) -> np.ndarray:
        items = draw(st.sampled_from([1, batch]))
        value = rng.uniform(-1, 1, (items, *axes)) * next(sizes)
        # Also exact zeros and ones, which lead to voxel centres and to the border.
        return np.where(rng.random(value.shape) < 0.2, np.round(value), value).astype(dtype)

    def maybe(value: np.ndarray) -> np.ndarray | None:
        return value if draw(FLAGS) else None

    aligned = {"align_corners": draw(FLAGS)}
    padded = {**aligned, "padding_mode": draw(PADDINGS)}
    if name == "interpolate":
        image = values(draw(st.integers(0, 3)), *shape)
        affine, grid = maybe(values(dim, dim + 1)), maybe(values(*out, dim))
        options = {
            **padded,
            "mode": draw(MODES),
            "affine_last": draw(FLAGS),
            "is_displacement": grid is None or draw(FLAGS),
            "out_shape": None if grid is not None else draw(st.sampled_from([None, out])),
        }
        return name, (image, affine, grid), options
    if name == "interpolate_labels":
        labels = values(draw(st.integers(0, 3)), *shape).astype(np.int16)
        operands = (labels, maybe(values(dim, dim + 1)), maybe(values(*out, dim)))
        return name, operands, {**padded, "affine_last": draw(FLAGS)}
    if name == "invert_displacement":
        options = {**padded, "max_iterations": draw(st.integers(1, 60))}
        return name, (values(*shape, dim), maybe(values(*shape, dim))), options
    if name == "compose":
        operands = (values(*shape, dim), values(*out, dim), maybe(values(dim, dim + 1)))
        return name, operands, {**padded, "add": draw(FLAGS), "mode": draw(SMOOTH_MODES)}
    if name == "spline_coefficients":
        channel_last = draw(FLAGS)
        size = (*shape, 2) if channel_last else (draw(st.integers(0, 3)), *shape)
        return name, (values(*size),), {**padded, "channel_last": channel_last}
    if name == "affine_warp":
        return name, (values(dim, dim + 1), values(*shape, dim)), aligned
    if name == "coverage":
        options = {
            "source_shape": out,
            "margin": draw(st.sampled_from([None, 0.0, 0.5, 1.0])),
            "reach": draw(st.sampled_from([None, 0.0, 0.5, 3.0])),
        }
        return name, (values(dim, dim + 1), values(*shape, dim)), options
    if name == "scaling_and_squaring":
        return name, (values(*shape, dim),), {**padded, "num_steps": draw(st.integers(0, 3))}
    if name == "gaussian_smooth":
        channel_last = draw(FLAGS)
        channels = draw(st.integers(0, 3))
        options = {
            "sigma": draw(st.sampled_from([0, 1e-300, 0.3, 2.0, 1e5])),
            "truncate": draw(st.sampled_from([1e-3, 3.0, 9.0])),
            "channel_last": channel_last,
        }
        axes = (*shape, channels) if channel_last else (channels, *shape)
        return name, (values(*axes),), options
    if name == "jacobian_determinant":
        return name, (values(*shape, dim),), aligned
    if name in FIELD_LOSSES:
        reduction = draw(st.sampled_from(["mean", "sum", "none"]))
        return name, (values(*shape, dim),), {**aligned, "reduction": reduction}
    if name == "mind_ssc":
        options = {"radius": draw(st.integers(1, 4)), "dilation": draw(st.sampled_from([1, 2, 16]))}
        return name, (values(draw(st.integers(0, 3)), *shape),), options
    if name == "lncc_loss":
        channels = draw(st.integers(0, 3))
        options = {
            "kernel_size": draw(st.sampled_from([3, 9, 11, 31])),
            "window": draw(st.sampled_from(["rectangular", "gaussian"])),
            "reduction": draw(st.sampled_from(["sum", "none"])),  # there is no mean of nothing
            "smooth_nr": draw(st.sampled_from([0.0, 1.0])),
        }
        return name, (values(channels, *shape), values(channels, *shape)), options
    if name in ("mutual_information_loss", "joint_histogram"):
        channels = draw(st.integers(0, 3))
        options = {
            "num_bins": draw(st.sampled_from([2, 32, 33, 256])),
            "kernel": draw(KERNELS),
            "sigma_ratio": draw(st.sampled_from([0.25, 1.0, 4.0])),
            "value_range": draw(st.sampled_from([None, "joint", ((-0.5, 0.5), (0, 1e-30))])),
        }
        if name == "mutual_information_loss":
            options["normalised"] = draw(FLAGS)
            options["reduction"] = draw(st.sampled_from(["sum", "none"]))
        return name, (values(channels, *shape), values(channels, *shape)), options
    units, ends = st.sampled_from(["normalised", "voxel", "mm"]), st.sampled_from(["first", "last"])
    options = {
        **aligned,
        "source": draw(units),
        "target": draw(units),
        "spacing": (1e-3, 1.0, 1e3)[:dim],
        "source_channels": draw(ends),
        "target_channels": draw(ends),
    }
    first = options["source_channels"] == "first"
    return name, (values(*((dim, *shape) if first else (*shape, dim))),), options


@ON_EACH_DEVICE
@given(extreme_calls())
def test_finite_operands_give_no_nan(
    device: str, call: tuple[str, tuple[Any, ...], dict[str, Any]]
) -> None:
    """Values and all gradients, however large or small the operands; infinities may be right."""
    name, args, options = call
    backend = BACKENDS["torch", device]
    result = backend.call(name, *args, **options)
    assert not np.isnan(result).any()
    if name in WITHOUT_GRADIENT:
        return
    wrt = [k for k, operand in enumerate(args) if operand is not None]
    cotangent = random_array(0, *result.shape, dtype=result.dtype)
    for gradient in backend.vjp(name, args, cotangent, wrt, **options):
        assert not np.isnan(gradient).any()
