#!/usr/bin/env python3
r"""Make the two brain volumes that ship with ``jaxreg`` from packages that carry them at 1 mm.

Inputs
------
fixed
    The ICBM152 2009a symmetric T1 template, brain only. The Python package ``nilearn`` carries it
    as ``nilearn/datasets/data/mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz``.
moving
    Colin27, the average of 27 T1 scans of one person, brain only. The Debian package
    ``mricron-data`` carries it as ``/usr/share/mricron/templates/ch2bet.nii.gz``.

Outputs
-------
``icbm152_t1_2mm.nii.gz`` and ``colin27_t1_2mm.nii.gz``: 8 bit, 2 mm isotropic. Each volume is
cropped to its brain plus a margin, then averaged over blocks of 2 x 2 x 2 voxels: the block mean is
the anti-aliasing filter, and it puts the new voxel centres exactly between the old ones, which the
written origin says. Intensities keep their scale, the orientation its axes.

The files do not depend on when or where they were made: the gzip header carries no time and no
name, and the arithmetic is on integers.

Usage
-----
::

    pip download --no-deps nilearn && python -m zipfile -e nilearn-*.whl nilearn
    apt-get download mricron-data && dpkg -x mricron-data_*.deb mricron
    python scripts/make_data.py \
        nilearn/nilearn/datasets/data/mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz \
        mricron/usr/share/mricron/templates/ch2bet.nii.gz

It needs NumPy and SimpleITK. Both images are copyright of the Montreal Neurological Institute; the
notices beside the outputs (``jaxreg/data/NOTICE.txt``) have to travel with them.
"""

from __future__ import annotations

import argparse
import gzip
import tempfile
from pathlib import Path

import numpy as np
import SimpleITK as sitk  # noqa: N813

MARGIN_MM = 10.0
SHRINK = 2


def crop_to_brain(image: sitk.Image, margin_mm: float, multiple: int) -> sitk.Image:
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


def make(source: Path, target: Path) -> None:
    """Make one shipped volume from its 1 mm original, and say what came out."""
    image = sitk.ReadImage(str(source), sitk.sitkUInt8)
    image = block_mean(crop_to_brain(image, MARGIN_MM, SHRINK), SHRINK)
    write_reproducibly(image, target)
    print(f"{target}: size {image.GetSize()}, spacing {image.GetSpacing()}, ", end="")
    print(f"origin {image.GetOrigin()} (LPS), {target.stat().st_size / 1000:.0f} kB")


def main() -> None:
    """Parse the command line and make both files."""
    default = Path(__file__).resolve().parents[1] / "jaxreg" / "data"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("fixed", type=Path, help="ICBM152 2009a T1 at 1 mm, from nilearn")
    parser.add_argument("moving", type=Path, help="Colin27 (ch2bet) at 1 mm, from mricron-data")
    parser.add_argument("--output-dir", type=Path, default=default, help="default: %(default)s")
    arguments = parser.parse_args()
    make(arguments.fixed, arguments.output_dir / "icbm152_t1_2mm.nii.gz")
    make(arguments.moving, arguments.output_dir / "colin27_t1_2mm.nii.gz")


if __name__ == "__main__":
    main()
