"""Templates: the mean shape and intensity of several images."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scenes import header, physical_grid, placed, scene, similarity, smooth_field

from jaxreg import invert_displacement
from jaxreg.registration import (
    Affine,
    FolderStore,
    Greedy,
    MemoryStore,
    Stage,
    Template,
    TemplateProgress,
    Transform,
    Translation,
    build_template,
    dice,
    downsample,
)
from jaxreg.registration.means import ExactSum, mean_grid, mean_motion
from regkernels import Grid, Volume, read_volume, rigid_motion
from regkernels.data import load_pair_paths

QUICK: tuple[Stage, ...] = (Affine((2,), (30,)), Greedy((2, 1), (40, 30)))


TRANSLATION: tuple[Stage, ...] = (Translation((2, 1), (40, 40)),)


def brain(ndim: int) -> Volume:
    """A shipped brain, or a slice of it, with voxels of 4 mm."""
    whole = read_volume(load_pair_paths().fixed)
    values = jnp.asarray(whole.batched())
    values = values if ndim == 3 else values[:, :, 42]
    small = downsample(values, tuple(n // 2 for n in values.shape[2:]))
    return Volume.create(np.asarray(small)[0, 0], (4,) * ndim)


def copies(
    volume: Volume, amplitude: float, numbers: Sequence[int] = (1, 2)
) -> tuple[list[Volume], list[jax.Array]]:
    """Warped copies, and the displacements that lead from the brain to them, whose mean is 0."""
    fields, warped = [], []
    for seed in numbers:
        for sign in (1, -1):
            field = sign * smooth_field(volume.shape, amplitude, seed)
            there = Transform(volume.grid, np.eye(volume.ndim + 1), invert_displacement(field))
            fields.append(field)
            warped.append(there.apply(volume))
    return warped, fields


def length(vectors: Any, where: np.ndarray) -> float:
    """Root mean square length of vectors at some voxels."""
    return float(np.sqrt(np.mean(np.sum(np.square(np.asarray(vectors)), axis=-1)[where])))


@pytest.fixture(scope="module")
def slices() -> tuple[Volume, list[Volume], list[jax.Array]]:
    original = brain(2)
    return original, *copies(original, 3)


@pytest.fixture(scope="module")
def built(slices: tuple[Volume, list[Volume], list[jax.Array]]) -> Template:
    return build_template(slices[1], QUICK, rounds=2)


def assert_recovers(
    template: Template, original: Volume, warped: list[Volume], fields: list[jax.Array]
) -> None:
    """The template is nearer to the original than any copy, in its intensities and its shape."""
    scale = float(np.asarray(original.array).std())
    inside = np.asarray(original.array) > 0.1 * np.asarray(original.array).max()

    def distance(volume: Volume) -> float:
        return float(np.sqrt(np.mean((np.asarray(volume.array) - original.array) ** 2))) / scale

    assert distance(template.volume) < 0.5 * min(map(distance, warped))
    for number, field in enumerate(fields):
        known = Transform(original.grid, np.eye(original.ndim + 1), field).displacement_field()
        found = template.transform(number).displacement_field(with_affine=True)
        assert length(np.asarray(found) - known, inside) < 0.5 * length(known, inside)


def test_the_template_of_warped_copies_is_nearer_to_the_original_than_any_of_them(
    slices: tuple[Volume, list[Volume], list[jax.Array]], built: Template
) -> None:
    assert_recovers(built, *slices)


def test_so_it_is_in_space() -> None:
    original = brain(3)
    warped, fields = copies(original, 2.5, (1,))
    # Copies without noise: a penalty would keep the fields from what is there to be found.
    stages = [Greedy((2, 1), (20, 12), regularisation=None)]
    template = build_template(warped, stages, rounds=2)
    assert_recovers(template, original, warped, fields)


def test_the_order_of_the_images_changes_no_bit(
    slices: tuple[Volume, list[Volume], list[jax.Array]], built: Template
) -> None:
    order = [2, 0, 3, 1]
    turned = build_template([slices[1][k] for k in order], QUICK, rounds=2)
    np.testing.assert_array_equal(turned.volume.array, built.volume.array)
    for number, k in enumerate(order):
        one, other = turned.transform(number), built.transform(k)
        np.testing.assert_array_equal(one.displacement, other.displacement)
        np.testing.assert_array_equal(one.matrix, other.matrix)


def test_the_mean_of_the_transforms_is_the_identity(built: Template) -> None:
    """To what is left of interpolating the mean at its own inverse."""
    grid = built.volume.grid
    found = [np.asarray(built.transform(k).displacement_field()) for k in range(4)]
    spacing = float(np.min(grid.spacing))
    assert length(np.mean(found, axis=0), np.ones(grid.shape, bool)) < 0.02 * spacing
    positions = [built.transform(k).matrix @ [*grid.centre(), 1.0] for k in range(4)]
    starts = np.mean(positions, axis=0)[:-1]
    np.testing.assert_allclose(starts, grid.centre(), atol=1e-6)


def test_later_rounds_change_less(built: Template) -> None:
    assert [record.stages for record in built.rounds] == [("affine",)] + 2 * [("affine", "greedy")]
    assert built.rounds[-1].displacement < built.rounds[1].displacement
    assert built.rounds[-1].change < built.rounds[1].change
    assert all(record.number == k + 1 for k, record in enumerate(built.rounds))


# --- Where the template lies ----------------------------------------------------------------------


def seen(volume: Volume, shift: tuple[float, float]) -> Volume:
    """The scene, shifted."""
    return volume.with_array(scene(physical_grid(volume) - np.asarray(shift)))


SHIFTS = [(6.0, 1.0), (-2.0, -5.0), (-4.0, 4.0)]


def test_translations_whose_mean_is_zero_lead_to_the_centre() -> None:
    empty = header((40, 44), (2, 2))
    images = [seen(empty, shift) for shift in SHIFTS]
    template = build_template(images, TRANSLATION, rounds=2, start="headers")
    assert similarity(template.volume, seen(empty, (0, 0))) > 0.9999
    for k, shift in enumerate(SHIFTS):
        np.testing.assert_allclose(template.transform(k).matrix[:2, 2], shift, atol=0.1)


def test_images_in_frames_of_their_own_meet_in_the_middle_of_a_mean_grid() -> None:
    """Half a metre apart, with other voxels and other axes."""
    images = []
    for place, shape, size, turn in ((300, (40, 44), 2.0, 10), (-200, (36, 34), 2.5, -10)):
        volume = header(shape, (size, size), turn)
        volume = volume.with_array(scene(physical_grid(volume)))
        images.append(placed(volume, origin=np.add(volume.grid.origin, (place, 0))))
    template = build_template(images, TRANSLATION, rounds=1, linear_rounds=0)
    grid = template.volume.grid
    np.testing.assert_allclose(grid.centre(), (50, 0), atol=1e-6)
    np.testing.assert_allclose(grid.direction, np.eye(2), atol=1e-12)
    np.testing.assert_allclose(grid.spacing, np.sqrt(5), rtol=1e-12)
    here = placed(template.volume, origin=np.asarray(grid.origin) - (50, 0))
    assert similarity(template.volume, here.with_array(scene(physical_grid(here)))) > 0.999
    assert similarity(template.transform(0).apply(images[0]), template.volume) > 0.999


def test_a_grid_far_away_has_the_template_in_its_middle() -> None:
    images = [seen(header((40, 44), (2, 2)), shift) for shift in SHIFTS]
    far = header((40, 44), (2, 2))
    far = placed(far, origin=np.asarray(far.grid.origin) + 1000)
    template = build_template(images, TRANSLATION, rounds=1, grid=far)
    middle = template.volume.grid.centre()
    np.testing.assert_allclose(middle, (1000, 1000), atol=1e-6)
    weights = np.asarray(template.volume.array)
    points = physical_grid(template.volume).reshape(-1, 2)
    index = np.average(points, axis=0, weights=weights.ravel())
    assert np.abs(index - middle).max() < 3


def test_a_mean_grid_has_the_voxels_it_is_asked_for() -> None:
    grids = [header((20, 30), (2, 3)).grid, header((30, 20), (3, 2)).grid]
    grid = mean_grid(grids, 1.5)
    np.testing.assert_allclose(grid.spacing, 1.5)
    assert grid.shape == (40, 40)
    assert mean_grid([grids[0], grids[0]]) is grids[0]


def test_axes_that_run_along_the_same_physical_axis_count_as_one() -> None:
    one = header((20, 30, 40), (1, 2, 3)).grid
    swapped = Grid((40, 30, 20), one.spacing[::-1], one.origin, one.direction[:, ::-1] * [1, -1, 1])
    grid = mean_grid([one, swapped])
    assert grid.shape == one.shape
    np.testing.assert_allclose(grid.spacing, one.spacing)
    np.testing.assert_allclose(grid.direction, np.eye(3), atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_a_mean_motion_takes_the_mean_away(seed: int) -> None:
    rng = np.random.default_rng(seed)
    matrices, centre = [], rng.normal(size=3) * 100
    for _ in range(5):
        turn = rigid_motion(rng.uniform(-90, 90), rng.normal(size=3), rng.normal(size=3), centre)
        turn[:3, :3] *= rng.uniform(0.7, 1.4)
        matrices.append(turn)
    motion = mean_motion(matrices, centre)
    places = [(one @ motion @ [*centre, 1.0])[:3] for one in matrices]
    np.testing.assert_allclose(np.mean(places, axis=0), centre, atol=1e-9)
    determinants = [np.linalg.det(one @ motion) for one in matrices]
    np.testing.assert_allclose(np.mean(np.log(determinants)), 0, atol=1e-9)
    once_more = mean_motion([one @ motion for one in matrices], centre)
    np.testing.assert_allclose(once_more, np.eye(4), atol=1e-9)


def test_of_turns_and_their_opposites_the_mean_is_the_identity() -> None:
    turns = [rigid_motion(angle, (1, 2, 3), (0, 0, 0), (5, 6, 7)) for angle in (70, -70)]
    np.testing.assert_allclose(mean_motion(turns, (5, 6, 7)), np.eye(4), atol=1e-12)


def test_affines_that_mirror_have_no_mean() -> None:
    with pytest.raises(ValueError, match="matrices: expected affines that neither mirror"):
        mean_motion([np.eye(3), np.diag([-1.0, 1.0, 1.0])], (0, 0))


# --- Intensities and coverage ---------------------------------------------------------------------


def test_a_slab_does_not_darken_the_mean() -> None:
    whole = header((40, 44), (2, 2))
    whole = whole.with_array(100 + 50 * scene(physical_grid(whole)))
    grid = whole.grid
    slab = Volume.create(
        np.asarray(whole.array)[12:28], grid.spacing, grid.voxel_to_physical()[:2] @ [0, 12, 1]
    )
    template = build_template(
        [whole, whole, slab],
        TRANSLATION,
        rounds=1,
        grid=whole,
        start="headers",
        normalise=False,
    )
    # As zeros it would make it darker by 33; what is left is that the images moved a little.
    np.testing.assert_allclose(template.volume.array, whole.array, atol=3)
    coverage = np.asarray(template.coverage.array)
    np.testing.assert_allclose(coverage[16:24, 2:-2], 1, atol=0.02)
    np.testing.assert_allclose(coverage[2:8, 2:-2], 2 / 3, atol=0.02)


def test_units_of_intensities_are_brought_together() -> None:
    volume = header((40, 44), (2, 2))
    values = scene(physical_grid(volume))
    images = [volume.with_array(100 + 200 * values), volume.with_array(100 + 400 * values)]
    template = build_template(images, TRANSLATION, rounds=1)
    np.testing.assert_allclose(template.volume.array, 100 + 300 * values, atol=15)
    plain = build_template(
        [images[0], images[0].with_array(7 * np.asarray(images[0].array))],
        TRANSLATION,
        rounds=1,
        normalise=False,
    )
    inner = np.s_[3:-3, 3:-3]  # at the rim one of them weighs less, because it has moved a little
    expected = 4 * np.asarray(images[0].array)
    np.testing.assert_allclose(plain.volume.array[inner], expected[inner], rtol=0.05)


def test_a_sum_has_the_same_bits_in_any_order() -> None:
    arrays = np.random.default_rng(0).normal(size=(50, 30)).astype(np.float32)
    sums = []
    for order in (range(50), range(49, -1, -1)):
        total = ExactSum((30,), 5.0)
        for k in order:
            total.add(arrays[k])
        sums.append(total.value())
    np.testing.assert_array_equal(*sums)
    np.testing.assert_allclose(sums[0], arrays.astype(np.float64).sum(axis=0), atol=1e-8)


# --- Interruption and memory ----------------------------------------------------------------------


class _StoppedError(Exception):
    pass


SMALL: tuple[Stage, ...] = (Translation((2,), (6,)), Greedy((2,), (6,)))


def small_images() -> list[Volume]:
    return [seen(header((40, 44), (2, 2)), shift) for shift in SHIFTS]


@pytest.mark.parametrize("last", [1, 3, 4, 8])
def test_what_goes_on_after_an_interruption_ends_with_the_same_bits(
    tmp_path: Path, last: int
) -> None:
    whole = build_template(small_images(), SMALL, rounds=2)
    done: list[TemplateProgress] = []

    def stop(told: TemplateProgress) -> None:
        if told.block is None:
            done.append(told)
            if len(done) == last:
                raise _StoppedError

    with pytest.raises(_StoppedError):
        build_template(small_images(), SMALL, rounds=2, store=FolderStore(tmp_path), callback=stop)
    worked: set[tuple[int, int]] = set()

    def watch(told: TemplateProgress) -> None:
        if told.block is not None:
            worked.add((told.round, told.image))

    resumed = build_template(
        small_images(), SMALL, rounds=2, store=FolderStore(tmp_path), callback=watch
    )
    assert len(worked) == 9 - last
    np.testing.assert_array_equal(resumed.volume.array, whole.volume.array)
    assert resumed.rounds == whole.rounds and resumed.doubts == whole.doubts
    for k in range(3):
        one, other = resumed.transform(k), whole.transform(k)
        np.testing.assert_array_equal(one.displacement, other.displacement)
        np.testing.assert_array_equal(one.matrix, other.matrix)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"start": "headers"}, "start"),
        ({"normalise": False}, "normalise"),
        ({"rounds": 2}, "stages"),
        ({"clip": None}, "clip"),
        ({"grid": header((20, 22), (4, 4))}, "grid"),
    ],
)
def test_a_store_of_another_template_is_refused(change: dict[str, Any], name: str) -> None:
    store = MemoryStore()
    options: dict[str, Any] = {"rounds": 1, "linear_rounds": 0, "store": store}
    with pytest.raises(_StoppedError):
        build_template(small_images(), SMALL, callback=_stop, **options)
    with pytest.raises(ValueError, match=f"^store: .* with another: {name};"):
        build_template(small_images(), SMALL, callback=_stop, **options | change)
    with pytest.raises(ValueError, match=r"^store: .* with another: images;"):
        build_template(small_images()[::-1], SMALL, callback=_stop, **options)


def _stop(_: TemplateProgress) -> None:
    raise _StoppedError


def test_a_damaged_file_of_a_store_is_told(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    store.save("state", {"array": np.zeros(100)})
    file = tmp_path / "state.npz"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"state\.npz: damaged"):
        store.load("state")
    store.clear()
    assert not tmp_path.exists()


class _Made(Sequence[Volume]):
    """Images that are made when they are asked for, and counted while they are there."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._made: list[weakref.ref[Volume]] = []

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        volume = small_images()[index % 3]
        self._made.append(weakref.ref(volume))
        return volume

    def alive(self) -> int:
        return sum(made() is not None for made in self._made)


def test_memory_does_not_grow_with_the_number_of_images(tmp_path: Path) -> None:
    def most(count: int) -> tuple[int, int]:
        images, found = _Made(count), (0, 0)
        gc.collect()
        before = sum(array.nbytes for array in jax.live_arrays())

        def measure(told: TemplateProgress) -> None:
            nonlocal found
            if told.block is None:
                gc.collect()
                held = sum(array.nbytes for array in jax.live_arrays()) - before
                found = max(found[0], images.alive()), max(found[1], held)

        store = FolderStore(tmp_path / str(count))
        build_template(images, SMALL[1:], rounds=1, store=store, callback=measure)
        return found

    few, many = most(2), most(5)
    assert many[0] <= max(few[0], 1)
    assert many[1] <= few[1] + 2000  # constants of programs, and no image, which has 7040 bytes


# --- Labels ---------------------------------------------------------------------------------------


def test_the_consensus_of_labels_is_that_of_the_original(
    slices: tuple[Volume, list[Volume], list[jax.Array]], built: Template
) -> None:
    original, _, fields = slices
    values = np.asarray(original.array)
    levels = np.quantile(values[values > 0], (0.0, 0.3, 0.6))
    labels = original.with_array(np.digitize(values, levels).astype(np.int16) * 100)
    maps = []
    for field in fields:
        there = Transform(original.grid, np.eye(3), invert_displacement(field))
        maps.append(there.apply(labels, interpolation="labels"))
    agreed = built.consensus(maps)
    assert np.asarray(agreed.array).dtype == np.int16
    score = dice(agreed.array, labels.array)
    single = [dice(one.array, labels.array) for one in maps]
    assert all(score[label] > max(one[label] for one in single) for label in score)
    assert np.mean(list(score.values())) > 0.9


def test_labels_are_counted_in_several_passes_and_ties_go_to_the_smallest() -> None:
    images = [seen(header((40, 44), (2, 2)), (0, 0))] * 2
    template = build_template(images, TRANSLATION, rounds=1)
    values = np.arange(40 * 44).reshape(40, 44) // 44
    maps = [images[0].with_array(values + shift) for shift in (0, 1)]
    np.testing.assert_array_equal(template.consensus(maps).array, values)
    np.testing.assert_array_equal(template.consensus(maps[::-1]).array, values)


def test_label_maps_that_do_not_fit_are_refused(built: Template) -> None:
    labels = built.volume.with_array(np.zeros(built.volume.shape, np.int32))
    with pytest.raises(
        ValueError, match="labels: expected 4 label maps, one for each image, got 3"
    ):
        built.consensus([labels] * 3)
    with pytest.raises(
        ValueError, match="labels: expected 2 dimensions and 1 channel, got 2 and 2"
    ):
        built.consensus(
            [labels, labels.with_array(np.zeros((2, *labels.shape), int)), labels, labels]
        )
    with pytest.raises(IndexError, match="number: expected 0 to 3, got 4"):
        built.transform(4)


# --- Bad input ------------------------------------------------------------------------------------

PLANE = seen(header((20, 22), (4, 4)), (0, 0))
SPACE = header((8, 9, 10), (9, 9, 9))
SPACE = SPACE.with_array(scene(physical_grid(SPACE)))


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        ([PLANE], {}, "images: expected two or more, got 1"),
        ([PLANE, SPACE], {}, "images: expected 2 dimensions as image 1, got 3 in image 2"),
        (
            [PLANE, PLANE.with_array(np.zeros((2, *PLANE.shape)))],
            {"names": ["a", "b"]},
            "images: expected 1 channels as a, got 2 in b",
        ),
        ([PLANE, PLANE.with_array(np.ones(PLANE.shape))], {}, "images: expected different"),
        ([PLANE] * 2, {"names": ["a"]}, "names: expected 2"),
        ([PLANE] * 2, {"rounds": 0}, "rounds: expected 1 or more, got 0"),
        ([PLANE] * 2, {"linear_rounds": -1}, "linear_rounds: expected 0 or more, got -1"),
        ([PLANE] * 2, {"start": "middle"}, "start: expected 'centres' or 'headers'"),
        ([PLANE] * 2, {"spacing": 0}, "spacing: expected positive numbers, got 0"),
        ([PLANE] * 2, {"spacing": (1, 1, 1)}, "spacing: expected 1 or 2 numbers, got 3"),
        ([PLANE] * 2, {"spacing": 1, "grid": PLANE}, "spacing: expected none beside a grid"),
        ([PLANE] * 2, {"grid": SPACE}, "grid: expected 2 dimensions as the images, got 3"),
        ([PLANE] * 2, {"clip": (1, 0)}, "clip: expected"),
        ([PLANE] * 2, {"stages": []}, "stages: expected one or more, got none"),
    ],
)
def test_bad_input_is_refused_by_name(
    images: list[Volume], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        build_template(images, **{"stages": SMALL, "callback": _stop} | options)


def test_what_is_no_volume_is_refused() -> None:
    with pytest.raises(TypeError, match="images: expected volumes, got ndarray for image 2"):
        build_template([PLANE, np.zeros((3, 3))])  # type: ignore[list-item]


def test_a_registration_that_is_doubtful_is_told_of_its_image() -> None:
    images = [*small_images(), small_images()[0]]
    half = images[-1].with_array(np.random.default_rng(0).normal(size=images[-1].shape))
    wild = Greedy((1,), (30,), gradient_sigma=0, field_sigma=0, learning_rate=4, tolerance=0)
    template = build_template([*images, half], [wild], rounds=1)
    assert template.doubts[-1] and len(template.doubts) == 5
