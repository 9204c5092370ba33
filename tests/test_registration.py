"""``jaxreg.registration``: pyramids, physical space, and transforms that are known beforehand."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from scenes import header, physical_grid, scene

from jaxreg.registration import (
    Affine,
    Greedy,
    Volume,
    centre_of_mass,
    displacement_to_physical,
    downsample,
    level_shape,
    ncc,
    ncc_loss,
    normalised_affine,
    read_volume,
    register,
    resample,
    resize_field,
    rigid_motion,
    write_displacement,
    write_volume,
)
from jaxreg.registration.files import atomic_path


def random_header(rng: np.random.Generator) -> Volume:
    volume = header((7, 9, 8), (1.5, 0.8, 2.5), turn=40)
    return dataclasses.replace(volume, origin=rng.normal(size=3) * 20)


def as_image(volume: Volume) -> sitk.Image:
    image = sitk.GetImageFromArray(np.asarray(volume.array))
    image.SetSpacing(volume.spacing.tolist())
    image.SetOrigin(volume.origin.tolist())
    image.SetDirection(volume.direction.ravel().tolist())
    return image


# --- pyramid ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(33, 20), (21, 16, 25), (1, 24, 40)])
@pytest.mark.parametrize("factor", [1, 1.5, 2, 3])
def test_the_pyramid_of_a_linear_ramp_is_the_same_ramp(
    shape: tuple[int, ...], factor: float
) -> None:
    def ramp(shape: tuple[int, ...]) -> np.ndarray:
        axes = [np.linspace(-1, 1, n) if n > 1 else np.zeros(1) for n in shape]
        slopes = (0.7, -1.3, 2.1)
        return sum(s * a for s, a in zip(slopes, np.meshgrid(*axes, indexing="ij"), strict=False))

    coarse = level_shape(shape, factor, minimum=4)
    level = downsample(jnp.asarray(ramp(shape), jnp.float32)[None, None], coarse)
    np.testing.assert_allclose(level[0, 0], ramp(coarse), atol=1e-5)


def test_the_pyramid_keeps_out_what_a_level_cannot_show() -> None:
    stripes = jnp.asarray(np.indices((64, 64))[1] % 2, jnp.float32)[None, None]
    level = downsample(stripes, (22, 22))
    assert float(level[..., 3:-3].std()) < 0.02
    assert float(stripes[..., ::3].std()) > 0.4  # what leaving voxels out would show


def test_the_full_resolution_is_left_alone() -> None:
    image = jax.random.normal(jax.random.key(0), (1, 1, 9, 8))
    np.testing.assert_array_equal(downsample(image, (9, 8)), image)


def test_a_level_keeps_short_axes() -> None:
    assert level_shape((101, 20, 10), 4, minimum=16) == (26, 16, 10)
    assert level_shape((83, 101, 88), 1) == (83, 101, 88)


def test_a_pyramid_only_gets_coarser() -> None:
    with pytest.raises(ValueError, match="factor"):
        level_shape((10, 10), 0.5)
    with pytest.raises(ValueError, match="shape"):
        downsample(jnp.zeros((1, 1, 8, 8)), (9, 8))


def test_a_constant_displacement_keeps_its_numbers_on_every_grid() -> None:
    field = jnp.broadcast_to(jnp.asarray([0.1, -0.2, 0.3]), (1, 6, 7, 8, 3))
    resized = resize_field(field, (11, 13, 15))
    assert resized.shape == (1, 11, 13, 15, 3)
    np.testing.assert_allclose(resized, np.broadcast_to(field[0, 0, 0, 0], resized.shape), 1e-6)


# --- similarity ---------------------------------------------------------------------------------


def test_ncc_is_pearsons_correlation_and_ignores_gain_and_offset() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 2, 3, 6, 7)).astype(np.float32)
    expected = [[np.corrcoef(x.ravel(), y.ravel())[0, 1] for x, y in zip(*p)] for p in zip(a, b)]  # noqa: B905
    np.testing.assert_allclose(ncc(a, b), expected, atol=1e-6)
    np.testing.assert_allclose(ncc(3 * a + 5, -2 * b + 1), -np.array(expected), atol=1e-5)
    assert float(ncc_loss(a, a)) == pytest.approx(-1)


def test_ncc_sees_only_what_the_mask_leaves() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(2, 1, 1, 8, 8)).astype(np.float32)
    mask = np.zeros((1, 1, 8, 8), np.float32)
    mask[..., :5] = 1
    np.testing.assert_allclose(ncc(a, b, mask), ncc(a[..., :5], b[..., :5]), rtol=1e-5)
    assert float(ncc(a, b, 0 * mask)[0, 0]) == 0


def test_a_constant_image_has_no_correlation_and_no_gradient() -> None:
    image = jax.random.normal(jax.random.key(0), (1, 1, 6, 6))
    value, gradient = jax.value_and_grad(ncc_loss)(jnp.ones_like(image), image)
    assert float(value) == 0
    np.testing.assert_array_equal(gradient, np.zeros_like(image))


# --- physical space -----------------------------------------------------------------------------


def test_voxels_are_where_simpleitk_puts_them() -> None:
    volume = random_header(np.random.default_rng(2))
    image = as_image(volume)
    grid = physical_grid(volume)
    for x, y, z in [(0, 0, 0), (7, 8, 6), (3, 1, 5)]:
        np.testing.assert_allclose(image.TransformIndexToPhysicalPoint((x, y, z)), grid[z, y, x])
    corner = volume.normalised_to_physical() @ [1, 1, 1, 1]
    np.testing.assert_allclose(corner[:3], grid[-1, -1, -1])


def test_a_normalised_affine_is_the_transform_between_the_two_grids() -> None:
    rng = np.random.default_rng(3)
    fixed, moving = random_header(rng), header((5, 1, 11), (2, 3, 1), turn=-70)
    transform = np.eye(4)
    transform[:3] += rng.normal(size=(3, 4)) * [0.2, 0.2, 0.2, 10]
    affine = normalised_affine(transform, fixed, moving)[0]
    point = np.array([0.3, -0.8, 0.6, 1.0])
    expected = transform @ fixed.normalised_to_physical() @ point
    np.testing.assert_allclose(
        moving.normalised_to_physical() @ [*(affine @ point), 1.0], expected, atol=1e-12
    )


def test_moving_a_header_moves_the_voxels_and_nothing_else() -> None:
    volume = random_header(np.random.default_rng(4))
    motion = rigid_motion(30, (1, 1, 0), (5, -6, 7), volume.centre())
    moved = volume.moved_by(motion)
    expected = physical_grid(volume) @ motion[:3, :3].T + motion[:3, 3]
    np.testing.assert_allclose(physical_grid(moved), expected)
    np.testing.assert_allclose(moved.centre(), volume.centre() + np.array([5, -6, 7]))


def test_resampling_between_headers_agrees_with_simpleitk() -> None:
    fixed = header((18, 20, 22), (3, 2.5, 2), turn=20)
    moving = header((30, 28, 26), (2, 2.2, 2.4), turn=-35)
    moving = moving.with_array(scene(physical_grid(moving) * 2))
    transform = rigid_motion(10, (1, 2, 3), (3, -2, 1), (0, 0, 0))
    itk_transform = sitk.AffineTransform(3)
    itk_transform.SetMatrix(transform[:3, :3].ravel().tolist())
    itk_transform.SetTranslation(transform[:3, 3].tolist())
    expected = sitk.Resample(as_image(moving), as_image(fixed), itk_transform, sitk.sitkLinear, 0.0)
    ours = resample(moving, fixed, transform).array
    # SimpleITK extends a volume by half a voxel; zeros padding fades it out there instead.
    inside = resample(moving.with_array(np.ones(moving.shape)), fixed, transform).array > 1 - 1e-5
    assert inside.mean() > 0.5
    assert np.abs(ours - sitk.GetArrayFromImage(expected))[inside].max() < 1e-5


def test_the_centre_of_mass_is_in_millimetres() -> None:
    volume = random_header(np.random.default_rng(5))
    array = np.full(volume.shape, 2.0)
    array[4, 2, 6] += 3
    array[2, 2, 6] += 3
    grid = physical_grid(volume)
    expected = (grid[4, 2, 6] + grid[2, 2, 6]) / 2
    np.testing.assert_allclose(centre_of_mass(volume.with_array(array)), expected)
    np.testing.assert_allclose(centre_of_mass(volume), volume.centre())


def test_a_volume_comes_back_from_its_file(tmp_path: Path) -> None:
    rng = np.random.default_rng(6)
    volume = random_header(rng)
    volume = volume.with_array(rng.normal(size=volume.shape))
    for name in ("volume.nii.gz", "volume.mha", "volume.nrrd"):
        write_volume(volume, tmp_path / name)
        again = read_volume(tmp_path / name)
        np.testing.assert_array_equal(again.array, volume.array)
        for part in ("spacing", "origin", "direction"):
            np.testing.assert_allclose(getattr(again, part), getattr(volume, part), atol=1e-5)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "volume.mha",
        "volume.nii.gz",
        "volume.nrrd",
    ]


@pytest.mark.parametrize(
    ("array", "options", "message"),
    [
        (np.zeros(3), {}, "array: expected 2 or 3 dimensions"),
        (np.zeros((0, 3)), {}, "array: expected voxels"),
        (np.full((2, 2), np.nan), {}, "array: expected finite"),
        (np.zeros((2, 2)), {"spacing": (1, 0)}, "spacing: expected positive"),
        (np.zeros((2, 2)), {"spacing": (1, 1, 1)}, r"spacing: expected \(2,\)"),
        (np.zeros((2, 2)), {"origin": (np.inf, 0)}, "origin: expected"),
        (np.zeros((2, 2)), {"direction": np.ones((2, 2))}, "direction: expected independent"),
    ],
)
def test_a_volume_that_cannot_be_is_refused(array: np.ndarray, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Volume.create(array, **options)


def test_what_is_not_an_image_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"missing\.nii"):
        read_volume(tmp_path / "missing.nii")
    text = tmp_path / "text.nii.gz"
    text.write_text("no image")
    with pytest.raises(ValueError, match=r"text\.nii\.gz"):
        read_volume(text)


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "result.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_path(path) as beside:
        beside.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


# --- a whole registration, seen by others ---------------------------------------------------------


def test_simpleitk_resampling_through_our_field_gives_our_moved_image(tmp_path: Path) -> None:
    fixed = header((30, 32, 28), (4, 4.5, 5), turn=15)
    fixed = fixed.with_array(scene(physical_grid(fixed)))
    moving = header((34, 30, 36), (4.2, 4, 4), turn=-30)
    moving = moving.with_array(scene(physical_grid(moving) @ np.diag([1.1, 0.9, 1]) + [4, -6, 5]))
    result = register(fixed, moving, [Affine((1,), (20,)), Greedy((1,), (20,))])
    path = tmp_path / "displacement.nii.gz"
    displacement, matrix = result.transform.displacement, result.transform.matrix
    write_displacement(displacement_to_physical(displacement[0], matrix, fixed), fixed, path)

    field = sitk.ReadImage(str(path), sitk.sitkVectorFloat64)
    assert field.GetNumberOfComponentsPerPixel() == 3
    transform = sitk.DisplacementFieldTransform(field)
    moved = sitk.Resample(as_image(moving), as_image(fixed), transform, sitk.sitkLinear, 0.0)
    ones = resample(moving.with_array(np.ones(moving.shape)), fixed, matrix, displacement)
    inside = ones.array > 0.999
    difference = np.abs(sitk.GetArrayFromImage(moved) - result.moved.array)[inside]
    assert inside.mean() > 0.5
    assert difference.max() < 1e-4 * np.ptp(moving.array)
