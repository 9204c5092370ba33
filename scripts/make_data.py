#!/usr/bin/env python3
r"""Make the volumes that ship with ``jaxreg`` from packages that carry them at 1 mm.

Inputs
------
template
    The ICBM152 2009a symmetric T1 template, brain only. The Python package ``nilearn`` carries it
    as ``nilearn/datasets/data/mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz``.
brain, head
    Colin27, the average of 27 T1 scans of one person, brain only and whole. The Debian package
    ``mricron-data`` carries them as ``ch2bet.nii.gz`` and ``ch2.nii.gz`` in
    ``/usr/share/mricron/templates``.
ct
    A CT template of the brain, in Hounsfield units, 0 outside of the brain. The Python package
    ``totalsegmentator`` carries it as ``totalsegmentator/resources/ct_brain_atlas_1mm.nii.gz``.

Outputs
-------
``icbm152_t1_2mm.nii.gz``, ``colin27_t1_2mm.nii.gz``, ``colin27_head_t1_2mm.nii.gz`` and
``ct_brain_2mm.nii.gz``: 8 bit, 2 mm isotropic. Each volume is cropped to what is not 0 plus a
margin, then averaged over blocks of 2 x 2 x 2 voxels: the block mean is the anti-aliasing filter,
and it puts the new voxel centres exactly between the old ones, which the written origin says.
Intensities of the T1 volumes keep their scale; the CT, clipped to 0 to 100 HU, is stored as twice
its Hounsfield units. The orientation keeps its axes.

The volumes do not depend on when or where they were made: the gzip header carries no time and no
name, and the arithmetic is on integers.

``colin27_head_to_ct.tfm``: an affine alignment of the head and the CT, by another program than
the one that is to be judged by it: SimpleITK's registration by Mattes' mutual information, at
1 mm. From the centres of the two brains it finds a rigid motion between the images that show
nothing else, and from there an affine one inside of Colin27's brain, 6 mm away from its surface:
the two images were cut out along different surfaces, which must not count. It runs on one thread;
on other machines it may differ by rounding, which the optimiser may amplify.

Usage
-----
::

    pip download --no-deps nilearn && python -m zipfile -e nilearn-*.whl nilearn
    pip download --no-deps totalsegmentator && python -m zipfile -e totalsegmentator-*.whl ct
    apt-get download mricron-data && dpkg -x mricron-data_*.deb mricron
    python scripts/make_data.py \
        nilearn/nilearn/datasets/data/mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz \
        mricron/usr/share/mricron/templates/ch2bet.nii.gz \
        mricron/usr/share/mricron/templates/ch2.nii.gz \
        ct/totalsegmentator/resources/ct_brain_atlas_1mm.nii.gz

It needs NumPy and SimpleITK. The notices beside the outputs (``jaxreg/data/NOTICE.txt``) have to
travel with them.
"""

from __future__ import annotations

import argparse
import gzip
import tempfile
from pathlib import Path

import numpy as np
import SimpleITK as sitk  # noqa: N813
from numpy.typing import NDArray

MARGIN_MM = 10.0
SHRINK = 2
HOUNSFIELD_WINDOW = (0, 100)
STEPS_PER_HOUNSFIELD_UNIT = 2
DEPTH_MM = 6
"""How far inside of the brain's surface the affine alignment looks."""


def crop_to_content(image: sitk.Image, margin_mm: float, multiple: int) -> sitk.Image:
    """Crop to the bounding box of the non-zero voxels, widened by a margin.

    The size along every axis is a multiple of `multiple`; where the volume ends too early for the
    margin, it is padded with zeros.
    """
    occupied = np.argwhere(sitk.GetArrayViewFromImage(image) > 0)[:, ::-1]  # (x, y, z)
    margin = np.ceil(margin_mm / np.array(image.GetSpacing())).astype(int)
    lower = occupied.min(axis=0) - margin
    upper = occupied.max(axis=0) + 1 + margin
    upper += -(upper - lower) % multiple
    size = np.array(image.GetSize())
    padding_low = np.maximum(-lower, 0)
    padding_high = np.maximum(upper - size, 0)
    image = sitk.ConstantPad(image, padding_low.tolist(), padding_high.tolist(), 0)
    lower, upper = lower + padding_low, upper + padding_low
    return sitk.RegionOfInterest(image, (upper - lower).tolist(), lower.tolist())


def block_mean(image: sitk.Image, factor: int) -> sitk.Image:
    """Average blocks of ``factor`` voxels along every axis; the header follows the centres."""
    array = sitk.GetArrayFromImage(image).astype(np.uint32)
    z, y, x = (n // factor for n in array.shape)
    sums = array.reshape(z, factor, y, factor, x, factor).sum(axis=(1, 3, 5))
    volume = factor**3
    shrunk = sitk.GetImageFromArray(((sums + volume // 2) // volume).astype(np.uint8))
    shrunk.SetSpacing([s * factor for s in image.GetSpacing()])
    shrunk.SetDirection(image.GetDirection())
    shrunk.SetOrigin(image.TransformContinuousIndexToPhysicalPoint([(factor - 1) / 2] * 3))
    return shrunk


def write_reproducibly(image: sitk.Image, path: Path) -> None:
    """Write a ``.nii.gz`` whose bytes depend on the image alone."""
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "image.nii"
        sitk.WriteImage(image, str(plain))
        content = plain.read_bytes()
    with (
        path.open("wb") as file,
        gzip.GzipFile("", "wb", compresslevel=9, fileobj=file, mtime=0) as archive,
    ):
        archive.write(content)


def make(image: sitk.Image, target: Path, margin_mm: float = MARGIN_MM) -> None:
    """Make one shipped volume from its 1 mm original, and say what came out."""
    image = block_mean(crop_to_content(image, margin_mm, SHRINK), SHRINK)
    write_reproducibly(image, target)
    print(f"{target}: size {image.GetSize()}, spacing {image.GetSpacing()}, ", end="")
    print(f"origin {image.GetOrigin()} (LPS), {target.stat().st_size / 1000:.0f} kB")


def align(brain: sitk.Image, head: sitk.Image, ct: sitk.Image) -> sitk.AffineTransform:
    """Return the affine transform from the head's space to the CT's; see the top of the file."""
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    brain, head, ct = (sitk.Cast(image, sitk.sitkFloat32) for image in (brain, head, ct))
    inside = brain > 5
    centre, ct_centre = (_centroid(mask) for mask in (inside, ct > 5))
    rigid = sitk.Euler3DTransform()
    rigid.SetCenter(centre.tolist())
    rigid.SetTranslation((ct_centre - centre).tolist())
    _maximise_information(brain, ct, rigid, shrink=(4, 2))

    affine = sitk.AffineTransform(3)
    affine.SetCenter(rigid.GetCenter())
    affine.SetMatrix(rigid.GetMatrix())
    affine.SetTranslation(rigid.GetTranslation())
    # Sulci and ventricles are as good as brain here: only the outer surface is to be left out.
    deep = sitk.BinaryErode(sitk.BinaryFillhole(inside), [DEPTH_MM] * 3)
    _maximise_information(head, ct, affine, shrink=(3, 2), mask=deep)
    return affine


def _centroid(mask: sitk.Image) -> NDArray[np.float64]:
    statistics = sitk.LabelShapeStatisticsImageFilter()
    statistics.Execute(mask)
    return np.array(statistics.GetCentroid(1))


def _maximise_information(
    fixed: sitk.Image,
    moving: sitk.Image,
    transform: sitk.Transform,
    shrink: tuple[int, ...],
    mask: sitk.Image | None = None,
) -> None:
    """Change a transform in place so that Mattes' mutual information has a maximum."""
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(32)
    if mask is not None:
        method.SetMetricFixedMask(mask)
    method.SetInterpolator(sitk.sitkLinear)
    method.SetShrinkFactorsPerLevel(shrink)
    method.SetSmoothingSigmasPerLevel([factor / 2 for factor in shrink])
    method.SmoothingSigmasAreSpecifiedInPhysicalUnitsOn()
    method.SetOptimizerAsRegularStepGradientDescent(1.0, 1e-4, 200)
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetInitialTransform(transform, inPlace=True)
    method.Execute(fixed, moving)


def write_matrix(transform: sitk.AffineTransform, target: Path) -> None:
    """Write an affine transform about the centre 0, with as many digits as mean something."""
    matrix = np.array(transform.GetMatrix()).reshape(3, 3)
    offset = np.array(transform.TransformPoint((0.0, 0.0, 0.0)))
    about_zero = sitk.AffineTransform(3)
    about_zero.SetMatrix(matrix.round(6).ravel().tolist())
    about_zero.SetTranslation(offset.round(4).tolist())
    sitk.WriteTransform(about_zero, str(target))
    print(f"{target}: scales {np.linalg.svd(matrix)[1].round(3)}")


def main() -> None:
    """Parse the command line and make all files."""
    default = Path(__file__).resolve().parents[1] / "jaxreg" / "data"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("template", type=Path, help="ICBM152 2009a T1 at 1 mm, from nilearn")
    parser.add_argument("brain", type=Path, help="Colin27 (ch2bet) at 1 mm, from mricron-data")
    parser.add_argument("head", type=Path, help="Colin27 (ch2) at 1 mm, from mricron-data")
    parser.add_argument("ct", type=Path, help="CT of the brain at 1 mm, from totalsegmentator")
    parser.add_argument("--output-dir", type=Path, default=default, help="default: %(default)s")
    arguments = parser.parse_args()
    folder = arguments.output_dir
    template, brain, head = (
        sitk.ReadImage(str(path), sitk.sitkUInt8)
        for path in (arguments.template, arguments.brain, arguments.head)
    )
    ct = sitk.ReadImage(str(arguments.ct), sitk.sitkInt16)
    ct = sitk.Cast(
        STEPS_PER_HOUNSFIELD_UNIT * sitk.Clamp(ct, sitk.sitkInt16, *HOUNSFIELD_WINDOW),
        sitk.sitkUInt8,
    )
    make(template, folder / "icbm152_t1_2mm.nii.gz")
    make(brain, folder / "colin27_t1_2mm.nii.gz")
    # The scan ends within the head.
    make(head, folder / "colin27_head_t1_2mm.nii.gz", margin_mm=0)
    make(ct, folder / "ct_brain_2mm.nii.gz")
    write_matrix(align(brain, head, ct), folder / "colin27_head_to_ct.tfm")


if __name__ == "__main__":
    main()
