"""Files of transforms, ours in SimpleITK's hands and SimpleITK's in ours."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from scenes import as_image
from transforms import (
    affine,
    assert_same_as_itk,
    deformation,
    inside,
    itk_affine,
    itk_composite,
    itk_field,
    volume,
    waves,
)

from jaxreg.registration import resample
from regkernels import (
    DisplacementField,
    move_points,
    read_transform,
    write_affine,
    write_displacement,
    write_transform,
)


@pytest.mark.parametrize("dim", [2, 3])
def test_simpleitk_resamples_through_our_files(tmp_path: Path, dim: int) -> None:
    transform, fixed, moving = deformation(dim)
    write_affine(transform.matrix, tmp_path / "affine.tfm")
    write_displacement(transform.displacement_field(), fixed, tmp_path / "warp.nii.gz")
    inverse = tmp_path / "inverse_warp.nii.gz"
    write_displacement(transform.inverse_displacement_field(), fixed, inverse)

    def itk_warp(path: Path) -> Any:
        return sitk.DisplacementFieldTransform(sitk.ReadImage(str(path), sitk.sitkVectorFloat64))

    linear = sitk.ReadTransform(str(tmp_path / "affine.tfm"))
    there = itk_composite(itk_warp(tmp_path / "warp.nii.gz"), linear)
    where = inside(fixed, moving, transform.parts)
    assert_same_as_itk(transform.apply(moving), moving, there, where, sitk.sitkLinear)
    back = itk_composite(linear.GetInverse(), itk_warp(inverse))
    where = inside(moving, fixed, transform.inverse_parts)
    moved = transform.apply_inverse(fixed, moving)
    assert_same_as_itk(moved, fixed, back, where, sitk.sitkLinear)


@pytest.mark.parametrize("dim", [2, 3])
def test_we_resample_through_simpleitks_files(tmp_path: Path, dim: int) -> None:
    reference, moving = volume(dim), volume(dim, turn=-35.0)
    euler = sitk.Euler2DTransform() if dim == 2 else sitk.Euler3DTransform()
    euler.SetCenter([5.0, -3.0, 8.0][:dim])
    euler.SetParameters([0.2, 0.1, -0.3][: 2 * dim - 3] + [1.5, -2.0, 0.5][:dim])
    field = itk_field(DisplacementField(reference.grid, waves(reference.grid)))
    linear = itk_affine(affine(dim))
    linear.SetCenter([1.0, 2.0, 3.0][:dim])
    composite = sitk.CompositeTransform([euler, linear, field])
    transforms = {
        "affine.mat": linear,
        "affine.txt": linear,
        "euler.tfm": euler,
        "shift.tfm": sitk.TranslationTransform(dim, [3.0, -2.0, 1.0][:dim]),
        "field.h5": field,
        "composite.h5": composite,
        "composite.tfm": composite,
    }
    for name, transform in transforms.items():
        sitk.WriteTransform(transform, str(tmp_path / name))
    image = field.GetDisplacementField()
    for name in ("field.nii.gz", "field.mha", "field.nrrd"):
        sitk.WriteImage(image, str(tmp_path / name))
        transforms[name] = field
    for name, transform in transforms.items():
        parts = read_transform(tmp_path / name)
        where = inside(reference, moving, parts)
        ours = resample(moving, reference, parts)
        assert_same_as_itk(ours, moving, transform, where, sitk.sitkLinear)


def test_displacement_images_are_as_ants_writes_them(tmp_path: Path) -> None:
    grid = volume(3).grid
    write_displacement(waves(grid), grid, tmp_path / "warp.nii.gz")
    content = gzip.decompress((tmp_path / "warp.nii.gz").read_bytes())
    assert struct.unpack("<6h", content[40:52]) == (5, *grid.shape[::-1], 1, 3)
    assert struct.unpack("<h", content[68:70]) == (1007,)  # NIFTI_INTENT_VECTOR
    start = int(struct.unpack("<f", content[108:112])[0])
    stored = np.frombuffer(content[start:], "<f4").reshape(3, *grid.shape)
    # LPS as it is, although the header's own coordinates are RAS.
    np.testing.assert_array_equal(stored, np.moveaxis(waves(grid), -1, 0).astype(np.float32))


@pytest.mark.parametrize("suffix", [".tfm", ".txt", ".mat", ".h5", ".hdf5"])
@pytest.mark.parametrize("dim", [2, 3])
def test_an_affine_comes_back_to_the_last_bit(tmp_path: Path, suffix: str, dim: int) -> None:
    write_transform(affine(dim), tmp_path / f"affine{suffix}")
    (found,) = read_transform(tmp_path / f"affine{suffix}")
    np.testing.assert_array_equal(found.matrix, affine(dim).matrix)


def test_a_field_comes_back(tmp_path: Path) -> None:
    field = DisplacementField(volume(2).grid, waves(volume(2).grid).astype(np.float32))
    write_transform(field, tmp_path / "warp.nrrd")
    (found,) = read_transform(tmp_path / "warp.nrrd")
    np.testing.assert_array_equal(found.vectors, field.vectors)
    np.testing.assert_allclose(found.grid.direction, field.grid.direction)


def test_what_is_no_transform_is_refused_by_name(tmp_path: Path) -> None:
    def write(name: str, transform: Any) -> None:
        sitk.WriteTransform(transform, str(tmp_path / name))

    (tmp_path / "text.tfm").write_text("no transform")
    write("spline.tfm", sitk.BSplineTransform(3))
    write("flat.tfm", sitk.AffineTransform([1, 0, 0, 0, 1, 0, 0, 0, 0], [0, 0, 0]))
    scalar = volume(3)
    sitk.WriteImage(as_image(scalar), str(tmp_path / "scalar.nrrd"))
    for value, name in ((np.nan, "nan.nrrd"), (np.inf, "infinite.nrrd")):
        field = DisplacementField(scalar.grid, np.full((*scalar.shape, 3), value))
        write_transform(field, tmp_path / name)
    for name, message in {
        "missing.tfm": "no such file",
        "missing.nii": "no such file",
        "text.tfm": "not a transform",
        "spline.tfm": "expected linear transforms and displacement fields, got a BSpline",
        "flat.tfm": "expected a transform with an inverse",
        "scalar.nrrd": "expected displacements, 3 values per voxel, got 1",
        "nan.nrrd": "expected finite displacements",
        "infinite.nrrd": "expected finite displacements",
    }.items():
        with pytest.raises((ValueError, FileNotFoundError), match=f"{name}: {message}"):
            read_transform(tmp_path / name)


@pytest.mark.parametrize("lines", [3, 4])
def test_a_text_without_its_last_lines_is_refused(tmp_path: Path, lines: int) -> None:
    path = tmp_path / "affine.tfm"
    write_affine(np.diag([2.0, 3, 4, 1]), path)
    path.write_text("\n".join(path.read_text().splitlines()[:lines]))
    # To ITK it is the identity.
    assert sitk.ReadTransform(str(path)).TransformPoint((1.0, 1, 1)) == (1, 1, 1)
    with pytest.raises(ValueError, match=r"affine\.tfm: cut short .* of 1 transforms, got .* 0"):
        read_transform(path)


@pytest.mark.parametrize("ending", ["tfm", "mat", "h5", "xfm"])
def test_a_transform_that_is_cut_short_is_refused(
    ending: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / f"affine.{ending}"
    transform = sitk.AffineTransform(3)
    transform.SetTranslation((1.5, 2.25, 3.125))
    transform.SetCenter((10.5, 20.25, 30.125))
    sitk.WriteTransform(transform, str(path))
    whole = path.read_bytes()
    for missing in range(2, len(whole), 1 + len(whole) // 40):
        path.write_bytes(whole[:-missing])
        with pytest.raises(ValueError, match=rf"affine\.{ending}: (cut short|not a transform)"):
            read_transform(path)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("rows", [2**31 - 1, 2**16])
def test_a_matrix_larger_than_its_file_is_refused(tmp_path: Path, rows: int) -> None:
    path = tmp_path / "affine.mat"
    path.write_bytes(struct.pack("<5i", 0, rows, rows, 0, 5) + b"name\0")
    with pytest.raises(ValueError, match=rf"affine\.mat: cut short .* {5 + 8 * rows**2} bytes"):
        read_transform(path)


def test_a_transform_goes_to_a_file_of_its_kind_or_to_none(tmp_path: Path) -> None:
    field = DisplacementField(volume(2).grid, waves(volume(2).grid))
    with pytest.raises(ValueError, match=r"warp\.tfm: expected the ending of an image"):
        write_transform(field, tmp_path / "warp.tfm")
    with pytest.raises(ValueError, match=r"affine\.nii: expected an ending of \.tfm"):
        write_transform(affine(2), tmp_path / "affine.nii")
    assert not list(tmp_path.iterdir())


def test_a_transform_of_minc_is_converted_from_ras(tmp_path: Path) -> None:
    path = tmp_path / "affine.xfm"
    linear = "Transform_Type = Linear;\nLinear_Transform =\n {};\n"
    shift, turn = "1 0 0 10\n 0 1 0 20\n 0 0 1 30", "0 -1 0 0\n 2 0 0 0\n 0 0 1 5"
    path.write_text(f"MNI Transform File\n% a comment\n\n{linear.format(shift)}")
    (part,) = read_transform(path)
    np.testing.assert_allclose(part.move(np.zeros(3)), [-10, -20, 30])
    # In RAS a point (1, 2, 3) goes to (11, 22, 33), and on to (-22, 22, 38).
    path.write_text(f"MNI Transform File\n\n{linear.format(shift)}{linear.format(turn)}")
    point = move_points([-1.0, -2, 3], read_transform(path))
    np.testing.assert_allclose(point, [22, -22, 38], atol=1e-6)


def test_an_inverted_transform_of_minc_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "affine.xfm"
    matrix = "Linear_Transform = 1 0 0 10 0 1 0 20 0 0 1 30;\n"
    start = "MNI Transform File\n\nTransform_Type = Linear;\n"
    path.write_text(f"{start}Invert_Flag = False;\n{matrix}")
    np.testing.assert_allclose(read_transform(path)[0].matrix[:3, 3], [-10, -20, 30])
    path.write_text(f"{start}Invert_Flag = True;\n{matrix}")
    with pytest.raises(ValueError, match=r"affine\.xfm: .*to be inverted, got Invert_Flag = True"):
        read_transform(path)


def test_the_affine_of_older_ants_is_read_with_its_centre(tmp_path: Path) -> None:
    path = tmp_path / "Affine.txt"
    path.write_text(
        "#Insight Transform File V1.0\n#Transform 0\n"
        "Transform: MatrixOffsetTransformBase_double_3_3\n"
        "Parameters: 2 0 0 0 1 0 0 0 1 1 2 3\nFixedParameters: 5 6 7\n"
    )
    (part,) = read_transform(path)
    # 2 (x - 5) + 5 + 1
    np.testing.assert_allclose(part.move(np.array([9.0, 9, 9])), [14, 11, 12])


def test_a_transform_for_minc_is_written_in_ras_and_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "affine.xfm"
    write_affine(affine(3), path)
    np.testing.assert_allclose(
        read_transform(path)[0].matrix, affine(3).matrix, rtol=1e-12, atol=1e-9
    )
    numbers = path.read_text().rpartition("=")[2].replace(";", "").split()
    ras = np.diag([-1.0, -1, 1]) @ affine(3).matrix[:3] @ np.diag([-1, -1, 1, 1])
    np.testing.assert_allclose(np.reshape(numbers, (3, 4)).astype(float), ras, rtol=1e-12)
    with pytest.raises(
        ValueError, match=r"plane\.xfm: expected a 3-D transform for \.xfm, got 2-D"
    ):
        write_affine(affine(2), tmp_path / "plane.xfm")


def test_displacements_of_minc_are_refused_with_what_to_use(tmp_path: Path) -> None:
    field = itk_field(DisplacementField(volume(3).grid, waves(volume(3).grid)))
    sitk.WriteTransform(field, str(tmp_path / "grid.xfm"))
    with pytest.raises(
        ValueError, match=r"grid\.xfm: expected linear .* got Grid_Transform; write"
    ):
        read_transform(tmp_path / "grid.xfm")
    with pytest.raises(ValueError, match=r"grid_grid_0\.mnc: expected displacements in NIfTI"):
        read_transform(tmp_path / "grid_grid_0.mnc")
