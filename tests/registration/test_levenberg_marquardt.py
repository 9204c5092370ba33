"""The linear stages of second order: what they find, in how few steps, and what they refuse."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from scenes import grainy, header, physical_grid, placed, scene

from jaxreg.commands.schedules import read_schedule
from jaxreg.registration import (
    LNCC,
    MI,
    MIND,
    MSE,
    NCC,
    NMI,
    Affine,
    Greedy,
    Moments,
    PerChannel,
    Rigid,
    Similarity,
    Translation,
    align_frames,
    register,
    register_images,
    stage_from_name,
)
from jaxreg.registration.register_images import make_problem
from jaxreg.registration.stages.iterative import Resolution
from jaxreg.registration.stages.levenberg_marquardt import (
    Evaluation,
    judged,
    nothing_known,
    proposed,
    solved,
)
from jaxreg.registration.stages.linear import Linear
from regkernels import Series, Volume, read_volume, rigid_motion
from regkernels.data import load_pair_paths

SECOND_ORDER: dict[str, Any] = {"optimiser": "levenberg-marquardt"}


def plane(transform: np.ndarray, dim: int) -> np.ndarray:
    keep = [*range(dim), 3]
    return transform[np.ix_(keep, keep)]


def seen_through(grid: Volume, transform: np.ndarray) -> Volume:
    """The scene on a grid, every point of it moved by a transform."""
    inverse = np.linalg.inv(transform)
    return grid.with_array(scene(physical_grid(grid) @ inverse[:-1, :-1].T + inverse[:-1, -1]))


def error_in_mm(found: np.ndarray, truth: np.ndarray, fixed: Volume) -> float:
    """The largest distance between two transforms in the inner half of a volume."""
    inner = 0.5 * physical_grid(fixed).reshape(-1, fixed.ndim)
    difference = np.asarray(found) - truth
    return float(np.linalg.norm(inner @ difference[:-1, :-1].T + difference[:-1, -1], axis=1).max())


def pair(dim: int, kind: type[Linear]) -> tuple[Volume, Volume, np.ndarray]:
    angle, size = 0 if kind is Translation else 12, 1.08 if kind is Similarity else 1
    stretch = (1.1, 0.93, 1.05) if kind is Affine else (size, size, size)
    truth = rigid_motion(angle, (0, 0, 1) if dim == 2 else (1, 2, 2), (7, -6, 4), (0, 0, 0))
    truth = plane(truth @ np.diag([*stretch, 1]), dim)
    fixed = header((26, 30, 28)[-dim:], (4.5, 4.0, 4.2)[:dim])
    moving = header((28, 27, 29)[-dim:], (4.1, 4.4, 4.3)[:dim], turn=9)
    moving = placed(moving, origin=moving.grid.origin + truth[:-1, -1])
    return fixed.with_array(scene(physical_grid(fixed))), seen_through(moving, truth), truth


# --- what is found ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "dim", "metric"),
    [
        (Translation, 2, "ncc"),
        (Rigid, 2, "mi"),
        (Rigid, 3, "ncc"),
        (Similarity, 3, "mse"),
        (Affine, 3, "ncc"),
        (Affine, 2, "lncc"),
        (Similarity, 2, "nmi"),
    ],
)
def test_a_fifth_of_the_iterations_finds_a_transform_at_least_as_exactly(
    kind: type[Linear], dim: int, metric: Any
) -> None:
    fixed, moving, truth = pair(dim, kind)

    def run(counts: tuple[int, int], **settings: Any) -> tuple[float, float]:
        stage = kind((2, 1), counts, metric=metric, tolerance=0, **settings)
        found = register(fixed, moving, [stage])
        error = error_in_mm(found.transform.matrix, truth, fixed)
        return error, float(found.stages[0].levels[-1].losses[-1])

    error, loss = run((80, 40))
    faster_error, faster_loss = run((16, 8), **SECOND_ORDER)
    assert faster_loss <= loss + 1e-4 * abs(loss)
    assert faster_error <= error + 0.05 * 4.5  # a twentieth of a voxel
    assert faster_error < 0.25 * 4.5


def test_two_brains_are_as_alike_after_a_fifth_of_the_iterations() -> None:
    fixed, moving = map(read_volume, load_pair_paths())
    turned = rigid_motion(15, (1, 2, 3), (14, -7, 14), moving.grid.centre())
    for kind, metric in ((Affine, "ncc"), (Rigid, "mi")):
        adam, other = (
            register(fixed, moving, [Moments(), stage], initial=turned).stages[1].levels[-1].losses
            for stage in (
                kind((4,), (80,), metric=metric),
                kind((4,), (16,), metric=metric, **SECOND_ORDER),
            )
        )
        assert other.size <= 16
        assert other[-1] <= adam[-1] + 1e-3 * abs(adam[-1])


def test_the_minimum_is_that_of_adam() -> None:
    fixed, moving, _ = pair(3, Rigid)
    long = register(fixed, moving, [Rigid((2,), (300,), tolerance=0)]).transform.matrix
    short = register(fixed, moving, [Rigid((2,), (12,), tolerance=0, **SECOND_ORDER)])
    assert error_in_mm(short.transform.matrix, np.asarray(long), fixed) < 0.1
    losses = short.stages[0].levels[0].losses
    assert (np.diff(losses) <= 0).all()


def test_descriptors_and_functions_serve_as_well() -> None:
    fixed, moving, truth = pair(2, Translation)

    def absolute(pred: jax.Array, target: jax.Array) -> jax.Array:
        return 1e4 * jnp.sqrt((pred - target) ** 2 + 1e-4).mean()

    for metric in (absolute, MIND(radius=1)):
        stage = Translation((1,), (20,), metric=metric, tolerance=0, **SECOND_ORDER)
        start = Translation((2,), (10,), **SECOND_ORDER)
        found = register(fixed, moving, [start, stage]).transform.matrix
        assert error_in_mm(found, truth, fixed) < 0.1 * 4.5


def test_only_what_a_mask_leaves_in_counts() -> None:
    fixed, moving, truth = pair(3, Rigid)
    array = np.array(moving.array)
    array[:10] = np.roll(array[:10], 5, axis=2)
    spoilt, weights = moving.with_array(array), np.ones(moving.shape, np.float32)
    weights[:11] = 0
    stage = Rigid((2, 1), (12, 8), **SECOND_ORDER)
    plain = register(fixed, spoilt, [stage]).transform.matrix
    masked = register(fixed, spoilt, [stage], moving_mask=moving.with_array(weights))
    error = error_in_mm(masked.transform.matrix, truth, fixed)
    assert error < 0.2 * 4.5
    assert error_in_mm(plain, truth, fixed) > 1.5 * error


def test_images_that_are_alike_stay_where_they_are() -> None:
    fixed, _, _ = pair(3, Rigid)
    for metric in (NCC(), MSE(), LNCC()):
        found = register(fixed, fixed, [Affine((2, 1), (16, 8), metric=metric, **SECOND_ORDER)])
        assert error_in_mm(found.transform.matrix, np.eye(4), fixed) < 1e-2
        assert not found.doubts


@pytest.mark.parametrize("metric", [NCC(), MSE(), MI(), LNCC()])
def test_flat_images_give_numbers(metric: Any) -> None:
    flat = jnp.ones((1, 16, 18, 17))
    textured = grainy(flat, 0)
    stages = [Affine((1,), (5,), metric=metric, tolerance=0, **SECOND_ORDER)]
    for fixed, moving in ((flat, flat), (flat, textured), (textured, flat)):
        found = register_images(fixed, moving, stages)
        assert np.isfinite(found.alignment.matrix).all()
        assert np.isfinite(found.traces[0][0].losses).all()


def test_a_gradient_that_is_not_finite_is_told() -> None:
    fixed, _, _ = pair(2, Rigid)

    def root(pred: jax.Array, target: jax.Array) -> jax.Array:
        return jnp.sqrt(jnp.abs(pred - target)).mean()

    with pytest.raises(ValueError, match="metric: expected finite gradients"):
        register(fixed, fixed, [Rigid((1,), (5,), metric=root, **SECOND_ORDER)])


def test_any_unit_of_intensities_does() -> None:
    fixed, moving, truth = pair(3, Rigid)
    for factor in (1e-5, 1e7):
        scaled = (x.with_array(factor * np.asarray(x.array)) for x in (fixed, moving))
        found = register(*scaled, [Rigid((2, 1), (16, 8), metric="mse", **SECOND_ORDER)])
        assert error_in_mm(found.transform.matrix, truth, fixed) < 0.5


def in_units(volume: Volume, factor: float, offset: float) -> Volume:
    """The same image, its intensities times a factor; the offset is in units of their deviation."""
    array = np.asarray(volume.array, np.float64)
    return volume.with_array(np.asarray(factor * (array + offset * array.std()), np.float32))


@pytest.mark.parametrize(
    ("metric", "dim"),
    [(NCC(), 2), (LNCC(), 2), (MI(), 2), (NMI(), 2), (MIND(radius=1), 2), (LNCC(), 3), (MI(), 3)],
    ids=str,
)
def test_the_images_may_have_units_of_their_own(metric: Any, dim: int) -> None:
    fixed, moving, _ = pair(dim, Rigid)
    stage = Rigid((2, 1), (16, 8), metric=metric, **SECOND_ORDER)
    alike = register(fixed, moving, [stage]).transform.matrix
    # Beyond the grid a window has zeros, whatever the background: an offset is seen by LNCC.
    offsets = (0, 0, 0) if isinstance(metric, LNCC) else (0, -2, 1)
    for factor, offset in zip((1e3, 1e-3, 0.37), offsets, strict=True):
        for images in (
            (in_units(fixed, factor, offset), moving),
            (fixed, in_units(moving, factor, offset)),
            (in_units(fixed, factor, offset), in_units(moving, 1 / factor, -offset)),
        ):
            found = register(*images, [stage]).transform.matrix
            assert error_in_mm(found, np.asarray(alike), fixed) < 0.01 * 4.5  # of a voxel


def test_squared_differences_may_have_any_unit_in_common() -> None:
    fixed, moving, _ = pair(2, Rigid)
    stage = Rigid((2, 1), (16, 8), metric=MSE(), **SECOND_ORDER)
    alike = register(fixed, moving, [stage]).transform.matrix
    for factor, offset in ((1e3, 0), (1e-3, -2), (0.37, 1)):
        shift = offset * float(np.asarray(fixed.array).std())
        images = [x.with_array(np.float32(factor) * (x.array + shift)) for x in (fixed, moving)]
        found = register(*images, [stage]).transform.matrix
        assert error_in_mm(found, np.asarray(alike), fixed) < 0.01 * 4.5


@dataclasses.dataclass(frozen=True)
class Misjudged(NCC):
    """A metric that takes its curvature for something else."""

    factor: float = 1
    """What it is multiplied by."""
    above: float = 1
    """What it is multiplied by in the upper half."""

    def curvature(self, moved: jax.Array, weight: jax.Array) -> jax.Array:
        right = jnp.broadcast_to(super().curvature(moved, weight), moved.shape)
        upper = jnp.arange(moved.shape[2]) >= moved.shape[2] // 2
        parts = jnp.where(upper, self.above, 1.0)
        return self.factor * right * parts.reshape(-1, *[1] * (moved.ndim - 3))


@pytest.mark.parametrize("kind", [Rigid, Affine])
@pytest.mark.parametrize(("factor", "above"), [(1e6, 1), (30, 1), (1e-6, 1), (1e4, 1e2)])
def test_a_curvature_that_is_far_off_costs_steps_and_nothing_else(
    kind: type[Linear], factor: float, above: float
) -> None:
    fixed, moving, _ = pair(3, kind)
    right, found = (
        register(
            fixed,
            moving,
            [kind((2, 1), (32, 16), metric=metric, tolerance=1e-5, **SECOND_ORDER)],
        )
        for metric in (NCC(), Misjudged(factor=factor, above=above))
    )
    matrices = found.transform.matrix, np.asarray(right.transform.matrix)
    assert error_in_mm(*matrices, fixed) < 0.05 * 4.5  # of a voxel


def test_several_channels_count_by_their_weights_and_many_one_by_one() -> None:
    fixed, moving, truth = pair(2, Rigid)
    both = Volume.on_grid(fixed.grid, np.stack([fixed.array, fixed.array]))
    other = Volume.on_grid(moving.grid, np.stack([moving.array, moving.array]))
    for metric in (PerChannel(("ncc", "mse"), (1, 0.5)), PerChannel(("ncc", "mi")), "lncc"):
        stage = Rigid((2, 1), (12, 8), metric=metric, **SECOND_ORDER)
        found = register(both, other, [stage])
        assert error_in_mm(found.transform.matrix, truth, fixed) < 0.4
    stage = Rigid((2, 1), (12, 8), **SECOND_ORDER)
    one = register(fixed, moving, [stage]).transform.matrix
    five = [Volume.on_grid(x.grid, np.stack([x.array] * 5)) for x in (fixed, moving)]
    many = register(*five, [stage]).transform.matrix
    np.testing.assert_allclose(many, one, atol=2e-3)


def test_a_deformation_before_it_is_gone_through_first() -> None:
    fixed, moving, _ = pair(2, Affine)
    stages = [Rigid((2,), (10,), **SECOND_ORDER), Greedy((2,), (10,))]
    before = register(fixed, moving, stages)
    after = register(fixed, moving, [*stages, Affine((1,), (12,), metric="lncc", **SECOND_ORDER)])
    losses = after.stages[-1].levels[0].losses
    assert losses[-1] < losses[0] - 1e-3
    np.testing.assert_array_equal(before.transform.displacement, after.transform.displacement)


# --- how it gets there --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Rigid, Affine])
def test_the_matrix_is_that_of_gauss_and_newton(kind: type[Linear]) -> None:
    fixed, moving, _ = pair(3, kind)
    stage = kind((1,), (5,), metric=MSE(), **SECOND_ORDER)
    to_physical = [np.asarray(x.grid.normalised_to_physical()) for x in (fixed, moving)]
    problem = make_problem(
        fixed.batched()[0],
        moving.batched()[0],
        fixed_mask=None,
        moving_mask=None,
        fixed_to_physical=to_physical[0],
        moving_to_physical=to_physical[1],
        moving_ratio=1,
        clip=None,
    )
    level = stage.prepared(problem.level(1, problem.start(), stage.metric))
    state = stage.begin(level, Resolution(problem.shape, 1), stage.measured(level))
    flat, unravel = ravel_pytree(state.found.parameters)
    place = flat + 0.01

    def moved(parameters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        motion = state.found.matrix(unravel(jnp.asarray(parameters, jnp.float32)))
        found = level.moved(level.matrix @ motion, None)
        weight = found.weight * level.target().weight
        return np.asarray(found.image, np.float64).ravel(), np.asarray(weight, np.float64).ravel()

    step = 2e-3  # a tenth of a voxel
    columns = np.stack(
        [(moved(place + e)[0] - moved(place - e)[0]) / (2 * step) for e in step * np.eye(flat.size)]
    )
    weight = moved(place)[1]
    expected = 2 * (weight * columns) @ columns.T / weight.sum()
    found = stage._normal(level, level.probe, state.found, place)
    np.testing.assert_allclose(found, expected, atol=0.05 * np.abs(expected).max())


def test_a_positive_system_is_solved() -> None:
    rng = np.random.default_rng(3)
    root = rng.normal(size=(12, 12))
    matrix, vector = root @ root.T + 0.1 * np.eye(12), rng.normal(size=12)
    found = solved(jnp.asarray(matrix, jnp.float32), jnp.asarray(vector, jnp.float32))
    np.testing.assert_allclose(found, np.linalg.solve(matrix, vector), rtol=2e-3, atol=1e-3)


def test_a_level_ends_when_little_is_to_be_gained() -> None:
    fixed, moving, _ = pair(3, Rigid)
    heard = []
    stage = Rigid((2, 1), (30, 30), block=4, **SECOND_ORDER)
    found = register(fixed, moving, [stage], callback=heard.append)
    for level in found.stages[0].levels:
        assert level.converged
        assert level.losses.size < 15
    assert heard[-1].done == heard[-1].total == 60
    alone = register(fixed, moving, [stage])
    np.testing.assert_allclose(alone.transform.matrix, found.transform.matrix, atol=1e-5)


def test_steps_that_a_loss_is_too_coarse_to_judge_are_judged_by_the_gradient() -> None:
    """A parabola whose loss is rounded as if it were beside a large number."""
    hessian = np.diag([4.0, 1.0]).astype(np.float32)

    def seen(place: np.ndarray) -> Evaluation:
        gradient = hessian @ place
        loss = np.float32(-100) + np.float32(place @ gradient / 2)
        return Evaluation(*map(jnp.asarray, (loss, gradient, hessian)))

    start = np.array([5e-4, -1e-3], np.float32)  # 1e-6 above the minimum
    assert seen(start).loss == -100
    memory = nothing_known(jnp.asarray(start))
    near, scalars = jnp.asarray(True), {"longest": 1.0, "first": 0.1, "least": 0.0}
    for _ in range(8):
        memory = judged(memory, seen(np.asarray(memory.trial)), is_near=near)
        options = {name: jnp.asarray(x, jnp.float32) for name, x in scalars.items()}
        memory = proposed(memory, is_scaled=jnp.asarray(True), **options)
    assert np.abs(memory.best).max() < 1e-6


def test_frames_of_a_batch_are_aligned_as_each_alone() -> None:
    head = header((20, 22, 21), (3.0, 3.0, 3.0))
    motions = [
        rigid_motion(0.8 * n, (1, -2, 2), (0.9 * n, -n, 0.5 * n), (0, 0, 0)) for n in range(4)
    ]
    frames = np.stack([seen_through(head, motion).array for motion in motions])
    series = Series(np.asarray(500 * frames, np.float32), head.grid, 2.0)
    together, single = (align_frames(series, reference=0, block=block) for block in (4, 1))
    np.testing.assert_allclose(together.matrices, single.matrices, atol=2e-3)
    for found, motion in zip(together.matrices, motions, strict=True):
        assert error_in_mm(found, motion, head) < 0.1 * 3
    adam = align_frames(series, [Rigid((4, 2), (40, 60), tolerance=1e-6)], reference=0)
    errors = [
        max(error_in_mm(x, motion, head) for x, motion in zip(m.matrices, motions, strict=True))
        for m in (together, adam)
    ]
    assert errors[0] <= errors[1] + 0.02


# --- settings -----------------------------------------------------------------------------------


def test_an_optimiser_that_there_is_not_is_refused_by_name() -> None:
    with pytest.raises(
        ValueError, match=r"^optimiser: expected one of adam, levenberg-marquardt, got 'newton'"
    ):
        Rigid(optimiser="newton")  # type: ignore[arg-type]


def test_the_command_line_and_a_record_name_it(tmp_path: Path) -> None:
    text = "affine optimiser=levenberg-marquardt iterations=20,10,5 scales=4,2,1"
    schedule = read_schedule([text], None, None)
    expected = Affine((4, 2, 1), (20, 10, 5), **SECOND_ORDER)
    assert schedule is not None
    assert schedule.stages == (expected,)
    record = tmp_path / "registration.json"
    stages = [expected, Rigid()]
    told = [{"name": stage.name, "settings": stage.record()} for stage in stages]
    record.write_text(json.dumps({"stages": told}))
    again = read_schedule(None, None, record)
    assert again is not None
    assert again.stages == tuple(stages)
    with pytest.raises(ValueError, match="optimiser: expected one of adam"):
        read_schedule(["rigid optimiser=newton"], None, None)
    assert stage_from_name("rigid", **SECOND_ORDER) == dataclasses.replace(Rigid(), **SECOND_ORDER)
