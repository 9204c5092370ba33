"""``riemannian_adam_step``: from a gradient to a small displacement to compose with."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import torch
from backends import Backend
from inputs import SHAPES, assert_close, assert_same, random_array

import jaxreg
import torchreg
from jaxreg._shared_planes import overwriting

Array = np.ndarray
OP = "riemannian_adam_step"


def operands(
    shape: tuple[int, ...], batch: int = 2, dtype: object = np.float32
) -> tuple[Array, Array, Array]:
    """Gradients, of which the last item's are small, and moments as there may be."""
    gradient, mu, root = (random_array(k, batch, *shape, len(shape)) for k in (1, 2, 3))
    for x in (gradient[-1:], mu[-1:], root[-1:]):
        x *= 1e-3
    return tuple(x.astype(dtype) for x in (gradient, mu, root**2))


def assert_all_close(found: tuple[Array, ...], expected: tuple[Array, ...], dtype: object) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == (np.float64 if dtype == np.float64 else np.float32)
        assert_close(a, b, a.dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize("confined", [False, True])
@pytest.mark.parametrize("dim", [2, 3])
def test_steps_and_moments_have_the_reference_values(
    backend: Backend, dim: int, confined: bool, dtype: type
) -> None:
    given = operands(SHAPES[dim], dtype=dtype)
    wide = [x.astype(np.float64) for x in given]
    each = [
        {"count": 0, "learning_rate": 0.3},
        {"count": 7, "learning_rate": 1.0, "epsilon": 0.3, "scale": 20.0},
        {"count": 2, "learning_rate": 1.0, "epsilon": 30.0, "beta1": 0.0, "beta2": 0.0},
        {"count": 10**6, "learning_rate": 2.0, "beta1": 0.5, "beta2": 0.999},
    ]
    cases = [(given, {"confined": confined, **options}) for options in each]
    for (_, options), found in zip(cases, backend.calls(OP, *cases), strict=True):
        assert_all_close(found, reference.riemannian_adam_step(*wide, **options), dtype)


@pytest.mark.parametrize("shape", [(37, 70, 45), (1, 2, 1000), (300, 257)])
def test_large_fields_have_the_reference_values(backend: Backend, shape: tuple[int, ...]) -> None:
    given = operands(shape)
    options: dict[str, Any] = {"learning_rate": 0.5, "epsilon": 1e-2, "confined": True}
    found = backend.call(OP, *given, 3, **options)
    wide = [x.astype(np.float64) for x in given]
    assert_all_close(found, reference.riemannian_adam_step(*wide, 3, **options), np.float32)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("dim", [2, 3])
def test_a_gradient_is_smoothed_first(backend: Backend, dim: int, dtype: type) -> None:
    given = operands(SHAPES[dim], dtype=dtype)
    wide = [x.astype(np.float64) for x in given]
    cases = [
        (given, {"count": 2, "learning_rate": 0.4, "scale": 3.0, "sigma": sigma})
        for sigma in (0.7, (0.0, 1.3, 0.5)[:dim], 1.25, 4.0)
    ]
    cases.append((given, {"count": 2, "learning_rate": 0.4, "sigma": 1.5, "truncate": 2.0}))
    for (_, options), found in zip(cases, backend.calls(OP, *cases), strict=True):
        assert_all_close(found, reference.riemannian_adam_step(*wide, **options), dtype)


@pytest.mark.parametrize("sigma", [1.0, 1.25, 1.5, 2.0, 3.0, 6.0])
@pytest.mark.parametrize("shape", [(37, 70, 45), (3, 100, 70), (130, 150)])
def test_a_gradient_that_is_smoothed_gives_the_bits_of_a_smooth_one(
    backend: Backend, shape: tuple[int, ...], sigma: float
) -> None:
    """Whether one kernel does both or two."""
    gradient, mu, nu = operands(shape)
    smooth = backend.call("gaussian_smooth", gradient, sigma, channel_last=True)
    options = {"learning_rate": 0.5, "epsilon": 1e-2, "confined": True}
    found = backend.call(OP, gradient, mu, nu, 3, sigma=sigma, **options)
    for a, b in zip(found, backend.call(OP, smooth, mu, nu, 3, **options), strict=True):
        assert_same(a, b)


def test_a_smooth_step_is_no_longer_than_half_a_voxel_wherever_the_longest_lies(
    backend: Backend,
) -> None:
    """At corners, between tiles, and in the last plane."""
    shape = (13, 40, 70)
    for place in ((0, 0, 0), (12, 39, 69), (6, 31, 32), (12, 32, 31), (0, 8, 63)):
        gradient, mu, nu = (np.zeros((2, *shape, 3), np.float32) for _ in range(3))
        gradient[(1, *place)] = 100, -50, 30
        step, *_ = backend.call(
            OP, gradient, mu, nu, 0, learning_rate=0.4, epsilon=1.0, sigma=1.25, beta2=0.0
        )
        lengths = np.linalg.norm(step * reference.half_extent(shape, True), axis=-1)
        assert lengths[1].max() == pytest.approx(0.2, rel=1e-5)
        assert not lengths[0].any()


def test_numbers_may_differ_between_items_and_components(backend: Backend) -> None:
    given = operands((5, 6, 7), batch=3, dtype=np.float32)
    wide = [x.astype(np.float64) for x in given]
    count = np.array([0, 3, 50], np.int32)
    scale = np.array([1.0, 0.5, 300.0], np.float32)
    for epsilon in (random_array(4, 3), random_array(5, 1, 3), random_array(6, 3, 3)):
        positive = abs(epsilon).astype(np.float32)
        found = backend.call(
            OP,
            *given,
            backend.array(count),
            epsilon=backend.array(positive),
            scale=backend.array(scale),
            learning_rate=0.4,
        )
        expected = reference.riemannian_adam_step(
            *wide, count, epsilon=positive, scale=scale, learning_rate=0.4
        )
        assert_all_close(found, expected, np.float32)


def test_a_number_may_be_an_array_of_no_axes(backend: Backend) -> None:
    given = operands((5, 6))
    options = {"count": 3, "epsilon": 0.25, "scale": 0.5}
    expected = backend.call(OP, *given, **options, learning_rate=0.4)
    arrays = {
        name: backend.array(np.array(x, np.int32 if name == "count" else np.float32))
        for name, x in options.items()
    }
    for a, b in zip(backend.call(OP, *given, **arrays, learning_rate=0.4), expected, strict=True):
        assert_same(a, b)


def test_no_step_is_longer_than_half_a_voxel_times_the_learning_rate(backend: Backend) -> None:
    shape = (9, 10, 11)
    step, *_ = backend.call(OP, *operands(shape), 2, learning_rate=0.4)
    lengths = np.linalg.norm(step * reference.half_extent(shape, True), axis=-1)
    np.testing.assert_allclose(lengths.max(axis=(1, 2, 3)), 0.2, rtol=1e-5)  # each item


def test_small_directions_are_not_made_longer(backend: Backend) -> None:
    given = operands((5, 6, 7))
    large = {"epsilon": 1e3, "learning_rate": 0.4}
    step, *_ = backend.call(OP, *given, 2, **large)
    lengths = np.linalg.norm(step * reference.half_extent((5, 6, 7), True), axis=-1)
    assert lengths.max() < 0.1


def test_confined_steps_do_not_cross_the_faces_of_the_volume(backend: Backend) -> None:
    given = operands((4, 5, 6))
    free, *_ = backend.call(OP, *given, 2, learning_rate=0.4)
    step, *_ = backend.call(OP, *given, 2, learning_rate=0.4, confined=True)
    for component in range(3):
        axis = 3 - component
        across = np.moveaxis(step[..., component], axis, 0)
        assert not across[[0, -1]].any()
        assert_same(across[1:-1], np.moveaxis(free[..., component], axis, 0)[1:-1])


@pytest.mark.parametrize("shape", [(1, 6), (6, 1), (1, 6, 2), (2, 2, 1), (1, 1, 1)])
def test_there_is_no_step_along_an_axis_of_one_voxel(
    backend: Backend, shape: tuple[int, ...]
) -> None:
    given = operands(shape, dtype=np.float64)
    for confined in (False, True):
        options = {"learning_rate": 0.4, "confined": confined}
        found = backend.call(OP, *given, 2, **options)
        assert_all_close(found, reference.riemannian_adam_step(*given, 2, **options), np.float64)
        for component, size in enumerate(reversed(shape)):
            assert size > 1 or not found[0][..., component].any()


def test_without_a_gradient_there_is_no_step(backend: Backend) -> None:
    zero = np.zeros((1, 5, 6, 2), np.float32)
    for result in backend.call(OP, zero, zero, zero, 0, learning_rate=1.0):
        assert_same(result, zero)


@pytest.mark.parametrize("sigma", [0.0, 0.8])
@pytest.mark.parametrize("place", [0, 100])
def test_what_is_not_a_number_is_not_passed_over(
    backend: Backend, place: int, sigma: float
) -> None:
    """One item's largest vector is not known then; the other item is none the worse."""
    gradient, mu, nu = operands((5, 6, 7))
    options = {"learning_rate": 1.0, "sigma": sigma}
    expected = backend.call(OP, gradient, mu, nu, 1, **options)
    gradient[0].flat[place] = np.nan
    step, *_ = backend.call(OP, gradient, mu, nu, 1, **options)
    assert np.isnan(step[0]).all()
    assert_same(step[1], expected[0][1])


@pytest.mark.parametrize("sigma", [0.0, 0.8, 5.0])
def test_operands_of_batch_one_serve_all_items(backend: Backend, sigma: float) -> None:
    given = operands((5, 6, 7), batch=3)
    one = [x[:1] for x in given]
    whole = [np.repeat(x, 3, axis=0) for x in one]
    for k in range(3):
        mixed = [*one[:k], given[k], *one[k + 1 :]]
        expected = [*whole[:k], given[k], *whole[k + 1 :]]
        found, right = (
            backend.call(OP, *some, 2, learning_rate=0.4, sigma=sigma) for some in (mixed, expected)
        )
        for a, b in zip(found, right, strict=True):
            assert_same(a, b)


def test_an_empty_batch_gives_empty_results(backend: Backend) -> None:
    given = [np.zeros((0, 5, 6, 7, 3), np.float32)] * 3
    for sigma in (0.0, 0.8, 5.0):
        for result in backend.call(OP, *given, 2, learning_rate=0.4, sigma=sigma):
            assert result.shape == (0, 5, 6, 7, 3)


def test_the_same_bits_come_out_every_time(backend: Backend) -> None:
    given = operands((20, 30, 41))
    for sigma in (0.0, 1.25):
        options = {"learning_rate": 0.4, "sigma": sigma}
        first = backend.call(OP, *given, 2, **options)
        for _ in range(3):
            for a, b in zip(backend.call(OP, *given, 2, **options), first, strict=True):
                assert_same(a, b)


def test_operands_stay_as_they_are_although_moments_may_be_written_in_place() -> None:
    gradient, mu, nu = map(jnp.asarray, operands((5, 6, 7)))
    before = [np.array(x) for x in (gradient, mu, nu)]

    @jax.jit
    def twice(mu: Any, nu: Any) -> Any:
        first = jaxreg.riemannian_adam_step(gradient, mu, nu, 0, learning_rate=0.4)
        # The same moments once more, and one array in both places.
        again = jaxreg.riemannian_adam_step(gradient, mu, nu, 0, learning_rate=0.4)
        alike = jaxreg.riemannian_adam_step(gradient, nu, nu, 0, learning_rate=0.4)
        return first, again, alike

    first, again, alike = twice(mu, nu)
    for a, b in zip(first, again, strict=True):
        assert_same(np.asarray(a), np.asarray(b))
    separate = jaxreg.riemannian_adam_step(gradient, nu, nu + 0, 0, learning_rate=0.4)
    for a, b in zip(alike, separate, strict=True):
        assert_same(np.asarray(a), np.asarray(b))
    for after, x in zip((gradient, mu, nu), before, strict=True):
        assert_same(np.asarray(after), x)


def test_a_loop_carries_the_moments_without_copies() -> None:
    """They stay where they are: nothing of their size is there for a time."""
    state = tuple(map(jnp.asarray, operands((20, 30, 40), batch=1)))

    def loop(state: Any) -> Any:
        def step(count: Any, state: Any) -> Any:
            # Any other use of the last step will do for a gradient.
            return jaxreg.riemannian_adam_step(*state, count, learning_rate=0.4, confined=True)

        return jax.lax.fori_loop(0, 5, step, state)

    compiled = jax.jit(loop, donate_argnums=0).lower(state).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    assert temporary < 1.2 * state[0].nbytes  # the step, beside the gradient


@pytest.mark.parametrize("sigma", [0.0, 1.25])
def test_in_a_loop_the_step_may_take_the_place_of_the_gradient(
    backend: Backend, sigma: float
) -> None:
    """What else asks for the gradient has it all the same."""
    if backend.framework != "jax":
        pytest.skip("PyTorch has memory for each result")
    given = operands((20, 30, 40), batch=1)
    options = {"learning_rate": 0.4, "confined": True, "sigma": sigma}
    expected = backend.call(OP, *given, 3, **options)

    def step(gradient: Any, mu: Any, nu: Any) -> Any:
        with overwriting():
            return jaxreg.riemannian_adam_step(gradient, mu, nu, 3, **options)

    def arrays() -> list[Any]:
        return [backend.array(x) for x in given]

    compiled = jax.jit(step, donate_argnums=(0, 1, 2)).lower(*arrays()).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.1 * given[0].nbytes

    @jax.jit
    def both(gradient: Any, mu: Any, nu: Any) -> Any:
        return step(gradient, mu, nu), gradient + 0

    found, kept = both(*arrays())
    assert_same(np.asarray(kept), given[0])
    for each in (found, compiled(*arrays())):
        for a, b in zip(each, expected, strict=True):
            assert_same(np.asarray(a), b)


def test_a_map_takes_numbers_of_each_example() -> None:
    given = [np.stack([x, 2 * x]) for x in operands((5, 6))]
    count, scale = jnp.asarray([0, 5], jnp.int32), jnp.asarray([1.0, 3.0])

    def call(gradient: Any, mu: Any, nu: Any, count: Any, scale: Any) -> Any:
        return jaxreg.riemannian_adam_step(gradient, mu, nu, count, scale=scale, learning_rate=0.4)

    found = jax.vmap(call)(*given, count, scale)
    for k in range(2):
        expected = call(*(x[k] for x in given), count[k], scale[k])
        for a, b in zip(found, expected, strict=True):
            assert_same(np.asarray(a[k]), np.asarray(b))
    tensors = [torch.tensor(np.asarray(x)) for x in (*given, count, scale)]

    def of_torch(gradient: Any, mu: Any, nu: Any, count: Any, scale: Any) -> Any:
        return torchreg.riemannian_adam_step(
            gradient, mu, nu, count, scale=scale, learning_rate=0.4
        )

    for a, b in zip(torch.func.vmap(of_torch)(*tensors), found, strict=True):
        assert_same(a.numpy(), np.asarray(b))


def test_it_says_that_it_cannot_be_differentiated() -> None:
    gradient, mu, nu = operands((5, 6))

    def total(gradient: Any) -> Any:
        return jaxreg.riemannian_adam_step(gradient, mu, nu, 0, learning_rate=0.4)[0].sum()

    with pytest.raises(TypeError, match=rf"{OP}: gradient: expected .*differentiated"):
        jax.grad(total)(gradient)
    tensor = torch.tensor(mu, requires_grad=True)
    with pytest.raises(ValueError, match=rf"{OP}: mu: expected"):
        torchreg.riemannian_adam_step(
            torch.tensor(gradient), tensor, torch.tensor(nu), 0, learning_rate=0.4
        )


def stored(backend: Backend, *moments: np.ndarray) -> tuple[Any, ...]:
    """Moments in bfloat16 as the framework has them."""
    if backend.framework == "jax":
        return tuple(jnp.asarray(x, jnp.bfloat16) for x in moments)
    return tuple(backend.array(x).to(torch.bfloat16) for x in moments)


def as_float32(x: Any) -> np.ndarray:
    return x.float().cpu().numpy() if isinstance(x, torch.Tensor) else np.asarray(x, np.float32)


@pytest.mark.parametrize("shape", [(9, 40), (6, 7, 33)])
@pytest.mark.parametrize(("count", "sigma"), [(0, 0.0), (6, 0.0), (6, 1.25)])
def test_moments_in_bfloat16_are_those_of_float32_rounded(
    backend: Backend, shape: tuple[int, ...], count: int, sigma: float
) -> None:
    gradient, *moments = operands(shape, batch=1)
    exact = [as_float32(x) for x in stored(backend, *moments)]
    options = {"learning_rate": 0.4, "epsilon": 1e-3, "confined": True, "sigma": sigma}
    function = backend.function(OP)
    given = backend.array(gradient), *stored(backend, *moments)
    step, *found = function(*given, count, **options)
    assert str(step.dtype).endswith("float32")
    wanted = reference.riemannian_adam_step(gradient, *exact, count, **options)
    rounded = []
    for k in range(2):
        assert str(found[k].dtype).endswith("bfloat16")
        expected = reference.dithered_bfloat16(wanted[1 + k][0], count, first=k == 0)[None]
        value = as_float32(found[k])
        # Sums in float32 may lie on the other side of a number that rounding tells apart.
        assert (value == expected).mean() > 0.99
        assert np.abs(value - expected).max() <= (2**-7 * np.abs(expected)).max()
        rounded.append(value)
    # The step is that of the moments as they are stored.
    frozen = {"beta1": 0.9, "beta2": 0.99}
    scales = [(1 - frozen["beta1"] ** (count + 1)), (1 - frozen["beta2"] ** (count + 1))]
    direction = rounded[0] / scales[0] / (np.sqrt(rounded[1] / scales[1]) + 1e-3)
    longest = np.sqrt((direction**2).sum(-1)).max()
    voxel = np.array([2 / (n - 1) for n in reversed(shape)])
    expected = -0.4 * min(1, 0.5 / longest) * voxel * direction
    inside = (slice(None), *[slice(1, -1)] * len(shape))
    assert_close(as_float32(step)[inside], expected[inside], np.float32)


def test_moments_in_bfloat16_follow_what_changes_them_by_less_than_their_last_place(
    backend: Backend,
) -> None:
    """In a thousandth a step, which is an eighth of the last place; on average it arrives."""
    function = backend.function(OP)
    shape = (1, 20, 30, 2)
    gradient = backend.array(np.full(shape, 2.0, np.float32))
    mu, nu = stored(backend, np.full(shape, 1.0, np.float32), np.full(shape, 1.0, np.float32))
    steps = 400
    if backend.framework == "jax":
        function = jax.jit(function, static_argnames=("learning_rate", "beta1", "beta2"))
    options = {"learning_rate": 0.4, "beta1": 0.999, "beta2": 0.999}
    for count in range(steps):
        _, mu, nu = function(gradient, mu, nu, count, **options)
    share = 1 - 0.999**steps
    for moment, last in ((mu, 2.0), (nu, 4.0)):
        assert as_float32(moment).mean() == pytest.approx(1 + (last - 1) * share, rel=5e-3)


def test_moments_in_bfloat16_have_to_go_together(backend: Backend) -> None:
    gradient, mu, nu = operands((5, 6))
    half = stored(backend, mu)[0]
    function = backend.function(OP)
    found = function(backend.array(gradient), half, backend.array(nu), 0, learning_rate=0.4)
    assert all(str(x.dtype).endswith("float32") for x in found)


def test_what_is_not_finite_stays_so_in_bfloat16(backend: Backend) -> None:
    gradient, *moments = (np.zeros((1, 4, 5, 2), np.float32) for _ in range(3))
    gradient[0, 0, 0, 0], gradient[0, 1, 1, 1] = np.nan, np.inf
    _, mu, nu = backend.function(OP)(
        backend.array(gradient), *stored(backend, *moments), 3, learning_rate=0.4
    )
    for moment in map(as_float32, (mu, nu)):
        assert np.isnan(moment[0, 0, 0, 0]) and moment[0, 1, 1, 1] == np.inf
        assert np.isfinite(moment).sum() == moment.size - 2
