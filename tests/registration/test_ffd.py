"""Free-form deformations: control points, their field, and the stage that finds them."""

from __future__ import annotations

import functools
import itertools
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import SimpleITK as sitk  # noqa: N813
from command import run
from inputs import random_array
from scenes import header, physical_grid, scene, write_shifted_pair

from jaxreg import bending_energy_loss, convert_displacement, interpolate
from jaxreg.registration import (
    FFD,
    MSE,
    Affine,
    Bending,
    Greedy,
    register,
    register_images,
)
from jaxreg.registration.register_images import make_problem
from jaxreg.registration.stages.fields import cell_determinants
from jaxreg.registration.stages.iterative import Resolution, State
from jaxreg.registration.stages.problem import Problem
from jaxreg.registration.stages.splines import Lattice, expanded, refined
from regkernels import Volume, read_volume

Array = np.ndarray

LATTICES = {
    "plane": Lattice((13, 16), (4.0, 2.5)),
    "space": Lattice((7, 9, 8), (3.0, 4.0, 2.5)),
    "twice as far": Lattice((13, 16), (2.0, 1.5), 1),
    "one slice": Lattice((1, 9, 12), (2.0, 3.0, 3.0)),
    "farther than the image is long": Lattice((6, 7), (40.0, 40.0)),
}


def coefficients_of(lattice: Lattice, seed: int = 0, items: int = 2) -> Array:
    return random_array(seed, items, *lattice.shape, len(lattice.shape), dtype=np.float32)


def level_shape_of(lattice: Lattice) -> tuple[int, ...]:
    """A grid of the same extent with other voxels."""
    return tuple(max(1, round(0.7 * n)) for n in lattice.whole)


# --- control points and their field -------------------------------------------------------------


@pytest.mark.parametrize("name", LATTICES)
def test_a_field_is_the_sum_of_its_splines(name: str) -> None:
    lattice = LATTICES[name]
    coefficients = coefficients_of(lattice)
    for shape in (lattice.whole, level_shape_of(lattice)):
        expected = reference.spline_field(coefficients, lattice.spacing, lattice.whole, shape)
        actual = expanded(jnp.asarray(coefficients), lattice, shape)
        np.testing.assert_allclose(actual, expected, atol=2e-6)


@pytest.mark.parametrize("name", LATTICES)
def test_every_voxel_has_all_of_its_splines(name: str) -> None:
    """Otherwise a shift of all control points would not be one of the image."""
    lattice = LATTICES[name]
    for shape in (lattice.whole, level_shape_of(lattice)):
        for weights in lattice.weights(shape):
            np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-12)
            assert (weights >= 0).all()


def test_no_control_point_is_further_out_than_any_that_counts() -> None:
    for lattice in LATTICES.values():
        for weights in lattice.weights(lattice.whole):
            assert weights.max(axis=0).min() > 0
            np.testing.assert_allclose(weights, weights[::-1, ::-1], atol=1e-12)


@pytest.mark.parametrize("name", ["plane", "space"])
def test_a_field_is_what_the_sampling_of_b_splines_makes_of_its_coefficients(name: str) -> None:
    lattice = LATTICES[name]
    coefficients, ndim = coefficients_of(lattice), len(lattice.whole)
    # From the corners of the image to those of the lattice.
    share = [
        (n - 1) / 2 / step / reach
        for n, step, reach in zip(lattice.whole, lattice.spacing, lattice.reaches, strict=True)
    ]
    affine = np.concatenate([np.diag(share[::-1]), np.zeros((ndim, 1))], axis=1)
    sampled = interpolate(
        jnp.moveaxis(jnp.asarray(coefficients), -1, 1),
        jnp.asarray(affine[None], jnp.float32),
        out_shape=lattice.whole,
        mode="b-spline",
        prefilter=False,
    )
    actual = expanded(jnp.asarray(coefficients), lattice, lattice.whole)
    np.testing.assert_allclose(actual, jnp.moveaxis(sampled, 1, -1), atol=1e-5)


@pytest.mark.parametrize("name", LATTICES)
def test_the_gradient_of_coefficients_is_the_transpose(name: str) -> None:
    lattice = LATTICES[name]
    shape = level_shape_of(lattice)
    one, other = coefficients_of(lattice, 1), coefficients_of(lattice, 2)
    cotangent = reference.spline_field(other, lattice.spacing, lattice.whole, shape)
    field = functools.partial(expanded, lattice=lattice, shape=shape)
    _, transpose = jax.vjp(field, jnp.asarray(one))
    (gradient,) = transpose(jnp.asarray(cotangent, jnp.float32))
    expected = reference.spline_field(one, lattice.spacing, lattice.whole, shape)
    assert float((one * np.asarray(gradient)).sum()) == pytest.approx(
        float((expected * cotangent).sum()), rel=1e-4
    )


@pytest.mark.parametrize("name", LATTICES)
def test_control_points_half_as_far_apart_have_the_same_field(name: str) -> None:
    lattice = LATTICES[name]
    lattice = Lattice(lattice.whole, lattice.finest, lattice.doublings + 2)
    coefficients = jnp.asarray(coefficients_of(lattice))
    before = expanded(coefficients, lattice, lattice.whole)
    for _ in range(2):
        coefficients, lattice = refined(coefficients, lattice), lattice.halved()
        assert coefficients.shape[1:-1] == lattice.shape
        np.testing.assert_allclose(
            expanded(coefficients, lattice, lattice.whole), before, atol=2e-6
        )


@pytest.mark.parametrize("dim", [2, 3])
def test_a_field_is_that_of_itks_transform(dim: int) -> None:
    volume = header((14, 11, 12)[-dim:], (2.0, 3.0, 2.5)[:dim], turn=20)
    lattice = Lattice(volume.shape, (3.0, 4.0, 3.5)[-dim:])
    coefficients = 3 * coefficients_of(lattice, items=1)  # mm along the axes of the image
    spacing = np.array(lattice.spacing[::-1]) * np.asarray(volume.grid.spacing)
    inner = np.array(lattice.reaches[::-1]) - 1
    direction = np.asarray(volume.grid.direction)
    itk = sitk.BSplineTransform(dim, 3)
    itk.SetTransformDomainMeshSize([int(2 * n) for n in inner])
    itk.SetTransformDomainPhysicalDimensions((2 * inner * spacing).tolist())
    itk.SetTransformDomainDirection(direction.ravel().tolist())
    itk.SetTransformDomainOrigin((volume.grid.centre() - direction @ (inner * spacing)).tolist())
    shifts = coefficients[0] @ direction.T.astype(np.float32)  # mm in space
    itk.SetParameters(np.moveaxis(shifts, -1, 0).astype(np.float64).ravel().tolist())

    field = expanded(jnp.asarray(shifts[None]), lattice, volume.shape)[0]
    points = physical_grid(volume).reshape(-1, dim)
    moved = np.array([itk.TransformPoint(p.tolist()) for p in points])
    np.testing.assert_allclose(np.asarray(field).reshape(-1, dim), moved - points, atol=1e-4)


# --- the stage ----------------------------------------------------------------------------------


def problem_of(fixed: Volume, moving: Volume) -> Problem:
    return make_problem(
        fixed.batched()[0],
        moving.batched()[0],
        fixed_mask=None,
        moving_mask=None,
        fixed_to_physical=np.asarray(fixed.grid.normalised_to_physical()),
        moving_to_physical=np.asarray(moving.grid.normalised_to_physical()),
        moving_ratio=1,
        clip=None,
    )


def lattices(stage: FFD, shape: tuple[int, ...]) -> list[Lattice]:
    """Those of the levels of a stage."""
    volume = Volume.create(np.zeros(shape, np.float32))
    problem = problem_of(volume, volume)
    found, state = [], None
    for scale in stage.scales:
        level, resolution = problem.level(scale, problem.start()), Resolution(shape, scale)
        state = (
            stage.begin(level, resolution, None)
            if state is None
            else stage.resized(state, level.shape, resolution)
        )
        assert state.found.coefficients.shape[1:-1] == state.found.lattice.shape
        found.append(state.found.lattice)
    return found


@pytest.mark.parametrize(
    ("scales", "times"),
    [
        ((4, 2, 1), [4, 2, 1]),
        ((8, 1), [8, 1]),
        ((3, 2, 1), [4, 2, 1]),
        ((4, 2), [2, 1]),
        ((2, 2), [1, 1]),
        ((1, 2), [1, 1]),
    ],
)
def test_control_points_come_nearer_as_voxels_become_finer(
    scales: tuple[float, ...], times: list[int]
) -> None:
    stage = FFD(scales, (1,) * len(scales), spacing=(6.0, 5.0))
    assert [x.spacing for x in lattices(stage, (40, 50))] == [(5 * k, 6 * k) for k in times]


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("before", [False, True])
def test_the_gradient_of_the_loss_is_exact(dim: int, before: bool) -> None:
    """Through an affine, a displacement before it and a penalty, with the step of Adam undone."""
    shape = (20, 22, 24)[-dim:]
    fixed = header(shape, (4, 4, 4)[:dim])
    points = physical_grid(fixed)
    fixed, moving = (
        fixed.with_array(scene(0.6 * points)),
        fixed.with_array(scene(0.65 * points + 3)),
    )
    problem = problem_of(fixed, moving)
    start = problem.start()
    start = start._replace(matrix=start.matrix.at[:-1, :-1].multiply(0.8))  # nothing leaves
    if before:
        lattice = Lattice(shape, (9.0,) * dim)
        earlier = expanded(0.05 * jnp.asarray(coefficients_of(lattice, 5, 1)), lattice, shape)
        start = start._replace(displacement=earlier)
    stage = FFD((1,), (1,), metric=MSE(), spacing=6.0, beta1=0.0, regularisation=Bending(0.3))
    level = stage.prepared(problem.level(1, start, stage.metric))
    state = stage.begin(level, Resolution(shape, 1), None)
    points_found = state.found
    coefficients = 0.05 * jnp.asarray(coefficients_of(points_found.lattice, 3, 1))

    @jax.jit
    def step(coefficients: Array) -> tuple[State, Array]:
        found = points_found._replace(coefficients=coefficients)
        return stage.step(level, state._replace(found=found), jnp.zeros(()))

    taken, loss = step(coefficients)
    # Adam has it by voxel and control point, and in units of the metric's scale.
    shares = math.prod(shape) / points_found.lattice.voxels(shape)
    per_voxel = (np.array(shape[::-1]) - 1) / 2
    gradient = taken.moments.mu * per_voxel * level.metric_scale / shares
    assert loss > 0
    for seed in range(3):
        direction = 0.01 * jnp.asarray(coefficients_of(points_found.lattice, 10 + seed, 1))
        expected = float(step(coefficients + direction)[1] - step(coefficients - direction)[1]) / 2
        assert float((gradient * direction).sum()) == pytest.approx(expected, rel=0.02)


def test_no_point_goes_further_in_a_step_than_half_a_voxel_times_the_learning_rate() -> None:
    fixed = header((20, 24), (5, 5))
    points = physical_grid(fixed)
    fixed, moving = fixed.with_array(scene(points)), fixed.with_array(scene(points + 8))
    result = register(fixed, moving, [FFD((1,), (1,), learning_rate=0.4)])
    step = convert_displacement(result.transform.displacement, "normalised", "voxel")
    assert 0.1 < float(jnp.linalg.norm(step, axis=-1).max()) <= 0.2 + 1e-5


@pytest.mark.parametrize("dim", [2, 3])
def test_a_smooth_deformation_known_by_construction_is_recovered(dim: int) -> None:
    shape = (33, 30, 32)[-dim:]
    grid = header(shape, (5, 5, 5)[:dim])
    noise = jax.random.normal(jax.random.key(1), (1, 1, *(n // 3 for n in shape)))
    image = scene(physical_grid(grid)) + 0.3 * np.asarray(interpolate(noise, out_shape=shape))[0, 0]
    lattice = Lattice(shape, (8.0,) * dim)
    points = random_array(2, 1, *lattice.shape, dim, dtype=np.float32)
    points = points / np.abs(points).max() * 3.5 / ((np.array(shape[::-1]) - 1) / 2)
    # At rest near the faces, beyond which there is nothing to see.
    inside = np.zeros(lattice.shape, np.float32)
    inside[tuple(slice(2, -2) for _ in shape)] = 1
    truth = expanded(jnp.asarray(points * inside[..., None], jnp.float32), lattice, shape)
    moving = grid.with_array(image)
    fixed = grid.with_array(np.asarray(interpolate(moving.batched(), grid=truth))[0, 0])

    stage = FFD((2, 1), (60, 60), spacing=8.0, regularisation=None, tolerance=0)
    result = register(fixed, moving, [stage])

    def length(field: Any) -> Array:
        return np.linalg.norm(convert_displacement(field, "normalised", "voxel"), axis=-1)

    assert length(truth).max() > 1.5
    error = length(result.transform.displacement - truth)
    assert error.mean() < 0.1 * length(truth).max()
    assert result.folds.share == 0
    assert result.inverse_residual.maximum < 0.011
    assert not result.doubts


def test_without_anything_that_holds_it_back_nothing_is_inside_out() -> None:
    noise = [jnp.asarray(random_array(k, 1, 1, 9, 9, dtype=np.float32)) for k in range(2)]
    fixed, moving = (
        Volume.create(np.asarray(interpolate(x, out_shape=(30, 30)))[0, 0]) for x in noise
    )
    found = {}
    for bound in (float("inf"), 10.0):
        stage = FFD((1,), (80,), regularisation=None, tolerance=0, volume_change=bound, spacing=3)
        result = register(fixed, moving, [stage])
        found[bound] = np.stack(cell_determinants(jnp.asarray(result.transform.displacement)))
    assert found[10.0].min() >= 0.1
    assert found[10.0].max() <= 10
    assert result.mended > 1e-3
    assert "determinant" in [doubt.code for doubt in result.doubts]


def test_bending_makes_it_smoother() -> None:
    fixed = header((30, 32), (5, 5))
    points = physical_grid(fixed)
    rng = np.random.default_rng(0)
    fixed, moving = (
        fixed.with_array(scene(points + k) + 0.1 * rng.normal(size=fixed.shape)) for k in (0, 8)
    )
    energies = []
    for weight in (0.02, 2.0, 200.0):
        stage = FFD((2, 1), (30, 30), regularisation=Bending(weight))
        result = register(fixed, moving, [stage])
        energies.append(float(bending_energy_loss(result.transform.displacement)))
        # A shift bends nothing: however strong the penalty, it is found.
        losses = result.stages[0].levels[0].losses
        assert losses[-1] < losses[0]
        shift = convert_displacement(result.transform.displacement, "normalised", "voxel")
        np.testing.assert_allclose(shift.mean(axis=(0, 1, 2)), -8 / 5, atol=0.5)
    assert all(after < 0.5 * before for before, after in itertools.pairwise(energies))


def test_it_goes_on_from_what_deforms_before_it() -> None:
    fixed = header((30, 32), (5, 5))
    points = physical_grid(fixed)
    fixed, moving = fixed.with_array(scene(points)), fixed.with_array(scene(points + 9))
    stages = [Affine((1,), (5,)), Greedy((2,), (20,)), FFD((2, 1), (20, 20))]
    first = register(fixed, moving, stages[:2])
    result = register(fixed, moving, stages)
    assert result.stages[2].levels[-1].losses[-1] < first.stages[1].levels[-1].losses[-1]
    again = register(fixed, moving, stages[2:], initial=first.transform)
    np.testing.assert_allclose(
        again.transform.displacement, result.transform.displacement, atol=1e-5
    )


# --- settings -----------------------------------------------------------------------------------


def test_millimetres_are_those_of_the_fixed_image() -> None:
    fixed = header((20, 40), (2.0, 5.0), turn=30)
    fixed = fixed.with_array(scene(physical_grid(fixed)))
    moving = fixed.with_array(scene(physical_grid(fixed) + 4))
    for voxels, millimetres in (((10.0, 4.0), 20.0), ((10.0, 2.0), (20.0, 10.0))):
        results = [
            register(fixed, moving, [FFD((2, 1), (10, 5), spacing=spacing, unit=unit)])
            for spacing, unit in ((voxels, "voxel"), (millimetres, "mm"))
        ]
        one, other = (result.transform.displacement for result in results)
        np.testing.assert_array_equal(one, other)
        assert results[1].stages[0].settings.spacing == millimetres


def test_millimetres_are_refused_where_they_are_not_known() -> None:
    image = jnp.zeros((1, 16, 18))
    stage = FFD((1,), (1,), spacing=4.0, unit="mm")
    assert register_images(image, image, [stage]).alignment.displacement.shape == (1, 16, 18, 2)
    geometry = jnp.diag(jnp.asarray([9.0, 8.0, 1.0]))

    def found(geometry: Array) -> Array:
        return register_images(image, image, [stage], fixed_to_physical=geometry).alignment.matrix

    with pytest.raises(ValueError, match=r"unit: expected 'voxel' within jax\.jit .*got 'mm'"):
        jax.jit(found)(geometry)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"spacing": 0}, "spacing: expected a positive number, or one for each axis, got 0"),
        ({"spacing": (5, -1)}, r"spacing: expected a positive number, .*got \(5, -1\)"),
        ({"spacing": float("nan")}, "spacing: expected a positive number, .*got nan"),
        ({"spacing": "5"}, "spacing: expected a positive number, .*got '5'"),
        ({"spacing": ()}, r"spacing: expected a positive number, .*got \(\)"),
        ({"spacing": True}, "spacing: expected a positive number, .*got True"),
        ({"unit": "cm"}, "unit: expected one of voxel, mm, got 'cm'"),
        ({"beta1": 1.0}, "beta1: expected 0 <= beta1 < 1, got 1"),
        ({"volume_change": 1.0}, "volume_change: expected more than 1, got 1"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FFD(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"spacing": (5, 5, 5)},
            r"spacing: expected one number, or 2 in xy order, got \(5, 5, 5\)",
        ),
        ({"spacing": 0.5}, "spacing: expected at least a voxel of the fixed image, got 0.5 voxel"),
        ({"spacing": 2, "unit": "mm"}, r"spacing: expected at least a voxel .* got 2 mm, that is"),
    ],
)
def test_a_spacing_that_does_not_fit_the_images_is_refused(
    settings: dict[str, Any], message: str
) -> None:
    fixed = header((16, 18), (3, 3))
    with pytest.raises(ValueError, match=message):
        register(fixed, fixed, [FFD((1,), (1,), **settings)])


def test_a_list_of_spacings_is_a_tuple() -> None:
    stage = FFD(spacing=[5, 4])
    assert hash(stage) == hash(FFD(spacing=(5, 4)))
    assert json.loads(json.dumps(stage.record()))["spacing"] == [5, 4]


# --- the command --------------------------------------------------------------------------------


def test_the_command_runs_it_and_its_record_again(tmp_path: Path) -> None:
    paths = write_shifted_pair(tmp_path)
    first, again = tmp_path / "first", tmp_path / "again"
    text = (
        "ffd spacing=12.5,10 unit=mm scales=2,1 iterations=12,9 regularisation=Bending(weight=0.1)"
    )
    assert run("register", *paths, "--stage", text, "-o", first) == 0
    (record,) = json.loads((first / "registration.json").read_text())["stages"]
    assert record["name"] == "ffd"
    assert record["settings"]["spacing"] == [12.5, 10]
    assert run("register", *paths, "--like", first / "registration.json", "-o", again) == 0
    for name in ("warp.nii.gz", "inverse_warp.nii.gz", "moved.nii.gz"):
        assert (first / name).read_bytes() == (again / name).read_bytes()
    fixed, moving = map(read_volume, paths)
    moved = read_volume(first / "moved.nii.gz")
    before, after = (np.abs(x.array - fixed.array).mean() for x in (moving, moved))
    assert after < 0.5 * before


def test_a_recipe_may_have_it(tmp_path: Path) -> None:
    paths = write_shifted_pair(tmp_path)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        '[[stages]]\nname = "ffd"\nspacing = [6, 5]\nscales = [2]\niterations = [5]\n'
    )
    assert run("register", *paths, "--recipe", recipe, "-o", tmp_path / "out") == 0
    (record,) = json.loads((tmp_path / "out" / "registration.json").read_text())["stages"]
    assert record["settings"]["spacing"] == [6, 5]


def test_the_command_names_it_among_the_stages(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = write_shifted_pair(tmp_path)
    assert run("register", *paths, "--stages", "ffd", "-o", tmp_path / "out") == 0
    wrong = ["--stage", "ffd spacing=0.1", "-o", tmp_path / "wrong"]
    assert run("register", *paths, *wrong) != 0
    assert "spacing: expected at least a voxel" in capsys.readouterr().err.replace("\n", " ")
