"""Whole registrations: how stages follow each other, what is compiled, batches, physical space."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest
from scenes import grainy, header, physical_grid, placed, scene, similarity

from jaxreg import compose, convert_displacement, lncc_loss
from jaxreg.commands.demo import load
from jaxreg.registration import (
    FFD,
    MSE,
    SVF,
    Affine,
    Alignment,
    Greedy,
    Moments,
    Progress,
    SyN,
    Translation,
    ncc,
    preset,
    register,
    register_images,
    stage_from_name,
)
from jaxreg.registration.transforms.transform import Transform
from regkernels import Volume, rigid_motion

# One set of shapes and settings for most tests, so that little is compiled.
STAGES = (Moments(), Affine((1,), (20,)), SyN((1,), (20,)))


def pair(shift: float = 5.0, dim: int = 2) -> tuple[Volume, Volume]:
    """Two volumes of one scene, the second of which is bent and shifted."""
    fixed = header((20, 24, 22)[:dim], (5, 5, 5)[:dim])
    points = physical_grid(fixed)
    return (
        fixed.with_array(scene(points)),
        fixed.with_array(scene(points + shift + 4 * np.sin(points[..., ::-1] / 15))),
    )


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """A test with it runs on each kind of device."""
    with jax.default_device(jax.devices(request.param)[0]):
        yield request.param


@pytest.fixture
def compilations() -> Any:
    """The programs that XLA has compiled since the test began."""
    seen: list[str] = []
    active = True

    def listen(event: str, seconds: float, **_: Any) -> None:
        if active and event == "/jax/core/compile/backend_compile_duration":
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    active = False


def test_a_size_and_its_settings_are_compiled_once(compilations: list[str]) -> None:
    fixed, moving = pair()
    register(fixed, moving, STAGES)
    assert compilations
    compilations.clear()
    other_fixed, other_moving = pair(shift=-3)
    moved_header = placed(other_moving, origin=other_moving.grid.origin + 2)
    register(other_fixed, moved_header, list(STAGES), initial=rigid_motion_2d(4))
    assert compilations == []


def test_a_level_is_one_program_however_many_blocks_it_has(compilations: list[str]) -> None:
    fixed, moving = pair()
    blocks: list[Progress] = []

    def count(iterations: int) -> int:
        blocks.clear()
        compilations.clear()
        stage = Greedy((1,), (iterations,), tolerance=0, block=4, epsilon=2e-8)
        register(fixed, moving, [stage], callback=blocks.append)
        return len(compilations)

    few, many = count(4), count(40)
    assert len(blocks) == 10
    assert many <= few  # what the first run compiled besides serves the second one, too


def rigid_motion_2d(shift: float) -> np.ndarray:
    motion = rigid_motion(10, (0, 0, 1), (shift, -shift, 0), (0, 0, 0))
    return motion[np.ix_([0, 1, 3], [0, 1, 3])]


def test_the_callback_sees_every_block_and_changes_nothing() -> None:
    fixed, moving = pair()
    stages = [Translation((2, 1), (20, 10), tolerance=0), SyN((1,), (20,), tolerance=0)]
    seen: list[Progress] = []
    watched = register(fixed, moving, stages, callback=seen.append)
    alone = register(fixed, moving, stages)
    np.testing.assert_array_equal(watched.transform.matrix, alone.transform.matrix)
    np.testing.assert_array_equal(watched.transform.displacement, alone.transform.displacement)
    assert [(p.stage, p.scale, p.done, p.total) for p in seen] == [
        ("translation", 2, 10, 30),
        ("translation", 2, 20, 30),
        ("translation", 1, 30, 30),
        ("syn", 1, 10, 20),
        ("syn", 1, 20, 20),
    ]
    assert all(isinstance(p.losses, jax.Array) for p in seen)  # nobody has read them
    losses = np.concatenate([level.losses for s in alone.stages for level in s.levels])
    np.testing.assert_array_equal(np.concatenate([p.losses for p in seen]), losses)


def test_a_level_that_has_stopped_repeats_its_last_loss_to_the_callback() -> None:
    fixed, _ = pair()
    seen: list[Progress] = []
    stage = Greedy((1,), (40,), metric="mse", tolerance=0.5)
    result = register(fixed, fixed, [stage], callback=seen.append)
    (level,) = result.stages[0].levels
    assert level.converged
    assert level.losses.size < 40
    assert [p.done for p in seen] == [10, 20, 30, 40]
    np.testing.assert_array_equal(seen[-1].losses, np.full(10, seen[-1].losses[0]))
    np.testing.assert_array_equal(
        register(fixed, fixed, [stage]).transform.displacement, result.transform.displacement
    )


@pytest.mark.parametrize("deformable", [Greedy, SVF, SyN, FFD])
@pytest.mark.usefixtures("device")
def test_the_same_input_gives_the_same_bits(deformable: type) -> None:
    fixed, moving = pair()
    stages = [*STAGES[:2], deformable((1,), (20,))]
    first, second = (register(fixed, moving, stages) for _ in range(2))
    for field in ("matrix", "displacement", "inverse_displacement"):
        np.testing.assert_array_equal(
            getattr(first.transform, field), getattr(second.transform, field)
        )


def test_double_precision_elsewhere_does_not_matter() -> None:
    fixed, moving = (v.with_array(grainy(v.array, k)) for k, v in enumerate(pair()))
    once = register(fixed, moving, STAGES)
    images = [np.asarray(volume.array)[None] for volume in (fixed, moving)]
    with jax.enable_x64(True):
        again = register(fixed, moving, STAGES)
        assert again.transform.displacement.dtype == jnp.float32
        arrays = register_images(*images, STAGES[1:2], initial=Alignment(jnp.eye(3)))
        assert arrays.alignment.matrix.dtype == jnp.float32
    np.testing.assert_allclose(again.moved.array, once.moved.array, atol=1e-4)


@pytest.mark.parametrize("power", [-20, 20])
@pytest.mark.parametrize("metric", ["lncc", "mi", "mind", "mse", "ncc", "nmi"])
def test_the_unit_of_the_intensities_does_not_matter(metric: Any, power: int) -> None:
    volumes = pair()
    scaled = [v.with_array(np.ldexp(v.array, power).astype(np.float32)) for v in volumes]
    stages = (Moments(metric=metric), SyN((2,), (15,), metric=metric))
    once, again = (register(*both, stages) for both in (volumes, scaled))
    assert np.abs(once.transform.displacement).max() > 0.01
    np.testing.assert_array_equal(again.transform.displacement, once.transform.displacement)


@pytest.mark.parametrize("on_device", [False, True])
def test_intensities_that_single_precision_cannot_compare_are_refused(on_device: bool) -> None:
    volumes = dict(zip(("fixed", "moving"), pair(), strict=True))
    for name, volume in volumes.items():
        for factor, message in (
            (1e9, "within ±1e\\+08"),
            (-1e9, "within ±1e\\+08"),
            (np.nan, "within ±1e\\+08, got nan"),
            (1e-8, "that differ by 1e-07 or more"),
        ):
            array = (factor * volume.array).astype(np.float32)
            other = volume.with_array(array)
            if on_device:
                other = dataclasses.replace(other, array=jnp.asarray(array))
            with pytest.raises(ValueError, match=f"{name}: expected intensities {message}"):
                register(**{**volumes, name: other}, stages=[])
    assert not register(*(v.with_array(np.zeros(v.shape)) for v in volumes.values()), []).stages


def test_volumes_that_never_overlap_are_an_error() -> None:
    fixed, moving = pair()
    away = placed(moving, origin=moving.grid.origin + 500)
    stages = [Translation((1,), (10,))]
    with pytest.raises(ValueError, match=r"moving: .* stages \(translation\) .* no voxel"):
        register(fixed, away, stages)
    back = np.eye(3)
    back[:2, 2] = 500
    assert register(fixed, away, stages, initial=back).stages
    assert register(fixed, away, [Moments(), *stages]).stages
    with pytest.raises(ValueError, match="initial: expected volumes that overlap"):
        register(fixed, moving, stages, initial=back)
    halves = [np.zeros(fixed.shape) for _ in range(2)]
    halves[0][:6], halves[1][-6:] = 1, 1
    masks = dict(zip(("fixed_mask", "moving_mask"), map(fixed.with_array, halves), strict=True))
    with pytest.raises(ValueError, match="no voxel of the fixed one that the masks leave in"):
        register(fixed, moving, stages, **masks)


@pytest.mark.parametrize("deformable", [Greedy, FFD])
def test_one_slice_of_a_volume_is_registered_like_a_plane(deformable: type) -> None:
    plane = pair()
    slices = [
        Volume.create(np.asarray(v.array)[None], (5, 5, 5), (*v.grid.origin, 0), np.eye(3))
        for v in plane
    ]
    stages = [deformable((1,), (20,), metric="mse", tolerance=0)]
    flat, thick = (register(*volumes, stages).transform for volumes in (plane, slices))
    np.testing.assert_allclose(thick.displacement[0, 0, ..., :2], flat.displacement[0], atol=1e-4)
    np.testing.assert_array_equal(thick.displacement[..., 2], 0)


def test_where_there_is_nothing_to_see_nothing_moves() -> None:
    shape = (1, 16, 18)  # one slice
    volume = header(shape, (2,) * len(shape))
    stages = [Moments(), Affine((1,), (5,)), *(s((1,), (5,)) for s in (Greedy, SVF, SyN, FFD))]
    result = register(volume, volume, stages)
    np.testing.assert_allclose(result.transform.matrix, np.eye(len(shape) + 1), atol=1e-5)
    np.testing.assert_array_equal(result.jacobian, np.ones(shape))
    np.testing.assert_array_equal(result.transform.inverse_displacement, 0)


@pytest.mark.parametrize("deformable", [Greedy, SVF, SyN, FFD])
def test_pairs_are_registered_together_by_vmap(deformable: type) -> None:
    stages: tuple[Any, ...] = (deformable((1,), (10,), tolerance=0),)
    if deformable is Greedy:
        stages = (Moments(), Affine((1,), (10,), tolerance=0), *stages)
    pairs = [pair(shift) for shift in (5.0, -4.0, 1.0)]
    images = [
        grainy(jnp.stack([jnp.asarray(p[k].array)[None] for p in pairs]), k) for k in range(2)
    ]
    together = jax.jit(jax.vmap(lambda f, m: register_images(f, m, stages)))(*images)
    assert together.alignment.displacement.shape == (3, 1, 20, 24, 2)
    for item in range(3):
        alone = register_images(images[0][item], images[1][item], stages)
        for ours, theirs in zip(jax.tree.leaves(alone), jax.tree.leaves(together), strict=True):
            np.testing.assert_allclose(ours, theirs[item], rtol=2e-3, atol=2e-4)


def test_a_batch_stops_pair_by_pair() -> None:
    fixed, moving = (np.asarray(v.array)[None] for v in pair())
    stages = (Greedy((1,), (60,), metric="mse", tolerance=0.02),)

    def ran(fixed: jax.Array, moving: jax.Array) -> jax.Array:
        return register_images(fixed, moving, stages).traces[0][0].ran

    alone = [int(ran(fixed, other)) for other in (moving, moving[:, ::-1])]
    together = jax.vmap(ran)(jnp.stack([fixed, fixed]), jnp.stack([moving, moving[:, ::-1]]))
    np.testing.assert_array_equal(together, alone)
    assert alone[0] != alone[1]


def test_a_metric_that_is_not_a_number_is_an_error() -> None:
    fixed, moving = pair()

    def undefined(pred: jax.Array, target: jax.Array) -> jax.Array:
        return jnp.log(-((pred - target) ** 2).mean())

    stage = Greedy((1,), (20,), metric=undefined)
    with pytest.raises(ValueError, match="metric: expected finite losses, got nan in the stage"):
        register(fixed, moving, [stage])


def test_a_gradient_that_is_not_a_number_is_an_error() -> None:
    """Even if no loss shows it: samples at places that are not a number are 0, in both images."""
    fixed, moving = (
        volume.with_array(np.where(volume.array > 0.3, volume.array, 0)) for volume in pair()
    )

    def undefined(pred: jax.Array, target: jax.Array) -> jax.Array:
        return jnp.sqrt((pred - target) ** 2).mean()

    with pytest.raises(ValueError, match=r"metric: expected finite gradients, .* the stage syn;"):
        register(fixed, moving, [SyN((1,), (20,), metric=undefined)])


def test_stages_are_pytrees_that_jit_takes_as_settings() -> None:
    fixed, moving = (jnp.asarray(v.array)[None] for v in pair())
    traced = 0

    def run(fixed: jax.Array, moving: jax.Array, stages: tuple[Any, ...]) -> Any:
        nonlocal traced
        traced += 1
        return register_images(fixed, moving, stages).alignment.matrix

    compiled = jax.jit(run)
    for stages in (STAGES[:2], (Moments(), Affine((1,), (20,)))):
        assert jax.tree.leaves(stages) == []
        np.testing.assert_allclose(
            compiled(fixed, moving, stages), run(fixed, moving, stages), atol=1e-3
        )
    assert traced == 3


def test_arrays_are_placed_by_their_matrices() -> None:
    """The same pixels, half as wide: the same alignment, half as far."""
    fixed, moving = (np.asarray(v.array)[None] for v in pair())
    stages = (Translation((1,), (30,), tolerance=0),)
    half = np.diag([23 / 4, 19 / 4, 1])
    wide = register_images(fixed, moving, stages)
    narrow = register_images(fixed, moving, stages, fixed_to_physical=half, moving_to_physical=half)
    wide_shift, narrow_shift = (np.asarray(r.alignment.matrix)[:2, 2] for r in (wide, narrow))
    np.testing.assert_allclose(narrow_shift, wide_shift / 2, rtol=1e-3)
    again = register_images(
        fixed, moving, (Translation((1,), (0,)),), initial=Alignment(wide.alignment.matrix)
    )
    np.testing.assert_allclose(again.alignment.matrix, wide.alignment.matrix, atol=1e-5)


def test_stages_may_follow_each_other_in_any_order() -> None:
    fixed, moving = pair()
    stages = [
        SyN((1,), (20,)),
        Affine((1,), (20,)),
        Greedy((1,), (20,)),
        SVF((1,), (20,), num_steps=4),
    ]
    before = similarity(fixed, moving)
    result = register(fixed, moving, stages)
    assert [record.name for record in result.stages] == ["syn", "affine", "greedy", "svf"]
    lncc = [float(lncc_loss(moving.batched(), fixed.batched()))]
    for k in range(1, 5):
        part = register(fixed, moving, stages[:k])
        lncc.append(float(lncc_loss(part.moved.batched(), fixed.batched())))
    assert lncc[4] < lncc[1] < lncc[0]
    assert 1 - similarity(fixed, result.moved) < 0.05 * (1 - before)
    assert 1 - similarity(moving, result.fixed_moved) < 0.1 * (1 - before)
    forward, back = result.transform.displacement, result.transform.inverse_displacement
    residual = convert_displacement(compose(forward, back), "normalised", "voxel")
    assert float(jnp.abs(residual).max()) < 0.1


@pytest.mark.parametrize("dim", [2, 3])
def test_volumes_may_differ_in_size_spacing_and_direction(dim: int) -> None:
    fixed = header((26, 28, 24)[:dim], (5, 4.5, 5.5)[:dim], turn=10)
    fixed = fixed.with_array(scene(physical_grid(fixed)))
    moving = header((50, 48, 52)[:dim], (2.6, 2.8, 2.4)[:dim], turn=-20)
    points = physical_grid(moving)
    moving = moving.with_array(5 * scene(points + 5 * np.sin(points[..., ::-1] / 18)))
    result = register(fixed, moving, [Greedy((1,), (40,), metric="ncc")])
    assert result.moved.shape == fixed.shape
    assert result.fixed_moved.shape == moving.shape
    np.testing.assert_allclose(result.fixed_moved.grid.direction, moving.grid.direction)
    assert similarity(fixed, result.moved) > 0.995
    # Where the moving grid sees the fixed one; outside the fixed image is 0.
    seen = (
        np.asarray(
            dataclasses.replace(
                result, fixed=fixed.with_array(np.ones(fixed.shape))
            ).fixed_moved.array
        )
        > 0.999
    )
    assert seen.mean() > 0.5
    assert np.corrcoef(result.fixed_moved.array[seen], moving.array[seen])[0, 1] > 0.99


def test_a_transform_is_gone_on_from_even_on_another_grid() -> None:
    fixed, moving = pair()
    start = register(fixed, moving, STAGES).transform
    same = register(fixed, moving, [], initial=start)
    np.testing.assert_array_equal(same.transform.displacement, start.displacement)
    np.testing.assert_array_equal(same.transform.matrix, start.matrix)

    finer = header((41, 49), (5 * 19 / 40, 5 * 23 / 48))  # the same corners
    finer = finer.with_array(scene(physical_grid(finer)))
    moved = register(finer, moving, [], initial=start).moved
    expected = register(fixed, moving, [], initial=start).moved
    assert 1 - similarity(finer, moved) < 2 * (1 - similarity(fixed, expected)) + 1e-3

    corner = np.array([fixed.grid.origin[0] + 115, fixed.grid.origin[1]])
    turned = placed(header((20, 24), (5, 5), turn=90), origin=corner)
    turned = register(turned, moving, [], initial=start)
    # The field turns with the grid: points go where they went.
    there, here = (points_after(t, p) for t, p in ((turned.transform, PROBE), (start, PROBE)))
    np.testing.assert_allclose(there, here, atol=0.3)


PROBE = np.array([[3.0, -5.0], [-12.0, 8.0], [20.0, 11.0]])


def points_after(transform: Transform, points: np.ndarray) -> np.ndarray:
    """Where a transform takes physical points of the plane, by linear interpolation."""
    from scipy.interpolate import RegularGridInterpolator

    grid = transform.grid
    to_physical = grid.normalised_to_physical()
    inverse = np.linalg.inv(to_physical)
    normalised = points @ inverse[:-1, :-1].T + inverse[:-1, -1]
    axes = [np.linspace(-1, 1, n) for n in grid.shape]
    field = RegularGridInterpolator(axes, np.asarray(transform.displacement)[0])
    normalised = normalised + field(normalised[:, ::-1])
    matrix = transform.matrix @ to_physical
    return normalised @ matrix[:-1, :-1].T + matrix[:-1, -1]


def test_the_default_preset_finds_the_shipped_brains_wherever_they_start() -> None:
    """The pair of the demo: turned by 15 degrees and shifted by 20 mm, and as it is."""
    scores = []
    for rotation, shift in ((15.0, 20.0), (0.0, 0.0)):
        fixed, moving = load(rotation, shift)
        result = register(fixed, moving)
        moved, target = result.moved.batched(), fixed.batched()
        scores.append(
            (float(ncc(moved, target)[0, 0]), -float(lncc_loss(moved, target, mask=target > 0)))
        )
        assert result.folds.share <= 1e-4
        forward, back = result.transform.displacement, result.transform.inverse_displacement
        for one, other in ((forward, back), (back, forward)):
            residual = convert_displacement(compose(one, other), "normalised", "voxel")
            lengths = np.linalg.norm(np.asarray(residual), axis=-1)
            assert lengths.mean() < 0.1
            assert lengths.max() < 1
    (ncc_turned, lncc_turned), (ncc_aligned, lncc_aligned) = scores
    assert ncc_turned > 0.99 * ncc_aligned > 0.97
    assert lncc_turned > 0.99 * lncc_aligned > 0.8


# --- presets and names --------------------------------------------------------------------------


def test_a_stage_has_a_name_and_takes_its_settings() -> None:
    names = (
        "moments",
        "translation",
        "rigid",
        "similarity",
        "affine",
        "greedy",
        "svf",
        "syn",
        "ffd",
    )
    for name in names:
        assert stage_from_name(name).name == name
        assert stage_from_name(name, metric="mse").metric == MSE()
    assert stage_from_name("syn", scales=(2,), iterations=(5,)) == SyN((2,), (5,))
    with pytest.raises(ValueError, match=f"stage: expected one of {', '.join(names)}, got 'sine'"):
        stage_from_name("sine")
    with pytest.raises(ValueError, match=r"stage rigid: expected settings among .* got flow"):
        stage_from_name("rigid", flow=1)


def test_presets_get_more_thorough() -> None:
    for device in ("cpu", "gpu"):
        for ndim in (2, 3):
            work = [
                sum(
                    n / s**ndim
                    for s, n in zip(stages[-1].scales, stages[-1].iterations, strict=True)
                )
                for stages in (
                    preset(name, ndim=ndim, device=device)
                    for name in ("fast", "default", "accurate")
                )
            ]
            assert sorted(set(work)) == work
    with pytest.raises(ValueError, match=r"preset: expected one of .* got 'best'"):
        preset("best")
    with pytest.raises(ValueError, match="ndim: expected 2 or 3, got 4"):
        preset("fast", ndim=4)
    with pytest.raises(ValueError, match="device: expected 'cpu' or 'gpu', got 'tpu'"):
        preset("fast", device="tpu")


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1.0, 4e-4])
def test_the_grid_of_a_mask_is_compared_in_voxels(size: float) -> None:
    fixed = header((20, 24), (size, size))
    ones = fixed.with_array(np.ones(fixed.shape))
    twice = Volume.create(ones.array, (2 * size, 2 * size), (0, 0), [[0, 1], [-1, 0]])
    for name in ("fixed_mask", "moving_mask"):
        for mask in (twice, placed(ones, origin=ones.grid.origin + 0.1 * size)):
            with pytest.raises(ValueError, match=rf"{name}: expected the image's spacing, .* got"):
                register(fixed, fixed, [], **{name: mask})
        register(fixed, fixed, [], **{name: placed(ones, origin=ones.grid.origin + 0.001 * size)})


def test_what_does_not_fit_together_is_refused_by_name() -> None:
    fixed, moving = pair()
    ones = fixed.with_array(np.ones(fixed.shape))
    for options, message in (
        ({"fixed_mask": fixed.with_array(np.zeros(fixed.shape))}, "fixed_mask: expected a voxel"),
        ({"moving_mask": ones.with_array(-np.ones(fixed.shape))}, "moving_mask: expected weights"),
        (
            {"fixed_mask": fixed.with_array(np.ones((2, *fixed.shape)))},
            "fixed_mask: expected 1 channel, got 2",
        ),
        ({"fixed_mask": header((20, 25), (5, 5))}, r"fixed_mask: expected shape \(20, 24\)"),
        ({"fixed_mask": header((20, 24), (5, 4))}, "fixed_mask: expected the image's spacing"),
        ({"initial": np.eye(4)}, r"initial: expected \(3, 3\) finite numbers, got shape \(4, 4\)"),
        ({"initial": np.full((3, 3), np.nan)}, "initial: expected"),
        ({"initial": np.diag([1, 0, 1])}, "initial: expected a matrix that can be inverted"),
        ({"initial": Transform(header((4, 4, 4), (1, 1, 1)).grid, np.eye(4))}, "initial: expected"),
    ):
        with pytest.raises(ValueError, match=message):
            register(fixed, moving, [], **options)
    with pytest.raises(ValueError, match="moving: expected 2 dimensions as fixed, got 3"):
        register(fixed, header((4, 4, 4), (1, 1, 1)))
    for stages in (["greedy"], "greedy", STAGES[1]):
        with pytest.raises(TypeError, match="stages: expected a sequence of stages"):
            register(fixed, moving, stages)
    ones = np.ones(fixed.shape)
    for name, value in (
        *(("fixed", value) for value in ("fixed.nii.gz", ones)),
        ("moving", ones),
        ("fixed_mask", ones),
        ("moving_mask", "mask.nii.gz"),
    ):
        given: dict[str, Any] = {"fixed": fixed, "moving": moving, name: value}
        kind = type(value).__name__
        with pytest.raises(TypeError, match=f"{name}: expected a Volume, .* got {kind}"):
            register(**given)
    for initial in ("a.tfm", moving):
        with pytest.raises(TypeError, match=r"initial: expected numbers \(3, 3\) or a Transform"):
            register(fixed, moving, [], initial=initial)
    array = np.zeros((1, 16, 16))
    for arrays, options, message in (
        ((array, np.zeros((2, 16, 16))), {}, "moving: expected 1 channels as fixed, got 2"),
        ((array, array[None]), {}, "moving: expected 2 dimensions as fixed, got 3"),
        ((array[0], array), {}, "fixed: expected an array"),
        ((array, array), {"fixed_mask": array}, r"fixed_mask: expected shape \(16, 16\)"),
        ((array, array), {"fixed_to_physical": np.eye(4)}, "fixed_to_physical: expected shape"),
    ):
        with pytest.raises(ValueError, match=message):
            register_images(*arrays, (), **options)
