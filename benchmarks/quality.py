"""How good registrations are by what they are not told: labels, landmarks, inverses.

    python benchmarks/quality.py DATA [--settings NAME ...] [--starts NAME ...] [--peers NAME ...]

DATA is a folder of labelled images; each is registered to each other, both ways:

    NAME.nii.gz          an image, of any format that is read
    NAME_labels.nii.gz   its labels, in the same space
    NAME_points.csv      landmarks in millimetres, as `read_points` takes them, as many for each; if
                         any
    regions.csv          which labels are the same region: a line for each, with the columns
                         `region`, `group` (optional) and `NAME_labels` with one or more labels of
                         that image, separated by spaces; without it, equal labels are the same

For every pair and setting: the mean Dice coefficient of each group of regions (nearest neighbour),
and of the fixed labels brought to the moving image through the inverse; the mean distance of
landmarks; the non-diffeomorphic volume, in millionths of the fixed one (each cell between voxels is
cut into simplices; volumes that come out negative add up); the extremes of the Jacobian
determinant, and the standard deviation of its logarithm inside of the labels; how far points are
from where they started after the registrations both ways; seconds of the stages, compiled before,
and peak memory (CUDA).

A start moves the fixed image: `given` trusts the headers, `turned` turns it by 15 degrees and
shifts it by 20 mm. `--peers` names what of ANTs and FireANTs runs beside, where `ants` and
`fireants` can be imported; FireANTs by the schedule of its documentation.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import itertools
import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import numpy as np
from harness import Record, add_file_arguments

from jaxreg.registration import (
    FFD,
    LNCC,
    Affine,
    Elasticity,
    Greedy,
    Moments,
    Registration,
    Rigid,
    Stage,
    SyN,
    preset,
    register,
    resample,
    target_registration_error,
)
from jaxreg.registration import dice as dice_of_labels
from jaxreg.registration.stages.linear import OptimiserName
from jaxreg.registration.stages.presets import PresetName
from regkernels import (
    Volume,
    move_points,
    read_points,
    read_transform,
    read_volume,
    rigid_motion,
    write_volume,
)

__all__ = ["Labelled", "judge", "non_diffeomorphic_volume", "read_folder"]

DEVICE = "gpu" if jax.default_backend() == "gpu" else "cpu"
SETTINGS: dict[str, Callable[[int], Sequence[Stage]]] = {
    "headers": lambda ndim: (),
    "rigid": lambda ndim: (Moments(), Rigid()),
    "affine": lambda ndim: preset("affine", ndim=ndim, device=DEVICE),
    "affine, second order": lambda ndim: of_second_order("affine", ndim),
    "affine, NCC": lambda ndim: (Moments(), Affine()),
    "fast": lambda ndim: preset("fast", ndim=ndim, device=DEVICE),
    "fast, second order": lambda ndim: of_second_order("fast", ndim),
    "default": lambda ndim: preset("default", ndim=ndim, device=DEVICE),
    "default, second order": lambda ndim: of_second_order("default", ndim),
    "accurate": lambda ndim: preset("accurate", ndim=ndim, device=DEVICE),
    "greedy": lambda ndim: deforming(ndim, Greedy),
    "free": lambda ndim: deforming(ndim, SyN, regularisation=None),
    "noise": lambda ndim: deforming(ndim, SyN, metric=LNCC(common_variance=0)),
    "neither": lambda ndim: deforming(
        ndim, SyN, regularisation=None, metric=LNCC(common_variance=0)
    ),
    "softer": lambda ndim: deforming(ndim, SyN, regularisation=Elasticity(0.2)),
    "stiffer": lambda ndim: deforming(ndim, SyN, regularisation=Elasticity(1.5)),
    "free-form": lambda ndim: deforming(ndim, FFD),
}
"""`free` has no penalty, `noise` no variance in common, `neither` none; `free-form` has splines."""
STARTS = ("given", "turned")
ANTS = {"ANTs affine": "Affine", "ANTs SyN": "SyN", "ANTs SyNCC": "antsRegistrationSyN[s]"}
FIREANTS = {"FireANTs greedy": "greedy", "FireANTs SyN": "syn"}


def of_second_order(name: PresetName, ndim: int) -> Sequence[Stage]:
    """Return a preset with its affine stage by Levenberg and Marquardt's method."""
    moments, affine, *others = preset(name, ndim=ndim, device=DEVICE)
    assert isinstance(affine, Affine)
    iterations = (16, 12, 6)[: len(affine.scales)]
    optimiser: OptimiserName = "levenberg-marquardt"
    affine = dataclasses.replace(affine, iterations=iterations, optimiser=optimiser)
    return moments, affine, *others


def deforming(ndim: int, kind: type[Stage], **settings: Any) -> Sequence[Stage]:
    """Return the stages of the default preset with another deformation at their end."""
    *start, default = preset("default", ndim=ndim, device=DEVICE)
    schedule = {"scales": default.scales, "iterations": default.iterations}
    return *start, kind(**schedule, **settings)


class Labelled(NamedTuple):
    """An image whose labels are numbered by region, from 1 on; and its landmarks, if any."""

    name: str
    image: Volume
    regions: Volume
    points: np.ndarray | None


def read_folder(folder: Path) -> tuple[list[Labelled], dict[str, list[int]]]:
    """Return the images of a folder, and the numbers of the regions of each group."""
    found = sorted(folder.glob("*_labels.*"))
    names = [path.name.split("_labels.")[0] for path in found]
    endings = [path.name.split("_labels.")[1] for path in found]
    labels = [read_volume(path) for path in found]
    table = folder / "regions.csv"
    groups: dict[str, list[int]] = {}
    if table.exists():
        rows = list(csv.DictReader(table.open()))
        for number, row in enumerate(rows, start=1):
            groups.setdefault(row.get("group") or "all", []).append(number)
        codes = [[list(map(int, row[f"{name}_labels"].split())) for row in rows] for name in names]
    else:
        found_labels = (np.unique(np.asarray(x.array)).tolist() for x in labels)
        known = sorted(set().union(*found_labels) - {0})
        groups["all"] = list(range(1, len(known) + 1))
        codes = [[[int(code)] for code in known]] * len(names)
    images = []
    for name, ending, volume, of_regions in zip(names, endings, labels, codes, strict=True):
        numbers = np.zeros(volume.shape, np.int32)
        for number, own in enumerate(of_regions, start=1):
            numbers[np.isin(np.asarray(volume.array), own)] = number
        landmarks = folder / f"{name}_points.csv"
        points = read_points(landmarks).positions if landmarks.exists() else None
        image = read_volume(folder / f"{name}.{ending}")
        regions = resample(volume.with_array(numbers), image, (), "nearest")
        images.append(Labelled(name, image, regions, points))
    return images, groups


def placed(labelled: Labelled, start: str) -> Labelled:
    """Return an image where a start puts it."""
    if start == "given":
        return labelled
    grid = labelled.image.grid
    shift = (12.0, -12.0, 10.6)[: grid.ndim]
    axis = (1.0, 2.0, 3.0) if grid.ndim == 3 else (0.0, 0.0, 1.0)
    motion = rigid_motion(15, axis, (*shift, 0.0)[:3], (*grid.centre(), 0.0)[:3])
    keep = [*range(grid.ndim), 3]
    motion = motion[np.ix_(keep, keep)]

    def moved(volume: Volume) -> Volume:
        matrix = motion @ volume.grid.voxel_to_physical()
        direction = motion[:-1, :-1] @ np.asarray(volume.grid.direction)
        return Volume.create(volume.array, volume.grid.spacing, matrix[:-1, -1], direction)

    points = labelled.points
    return Labelled(
        labelled.name,
        moved(labelled.image),
        moved(labelled.regions),
        None if points is None else move_points(points, [motion]),
    )


def determinant_of(columns: Sequence[np.ndarray]) -> np.ndarray:
    """Return determinants of matrices by their two or three columns, faster than LAPACK."""
    if len(columns) == 2:
        (a, b), (c, d) = (np.moveaxis(column, -1, 0) for column in columns)
        return a * d - b * c
    first, second, third = columns
    return np.einsum("...i,...i", np.cross(first, second), third)


def non_diffeomorphic_volume(displacement: np.ndarray) -> float:
    """Return the share of the volume that a displacement in voxels turns inside out.

    Parameters
    ----------
    displacement
        ``([Z,] Y, X, D)``, components in x, y, z order.

    Notes
    -----
    The linear interpolant on the simplices of Kuhn's triangulation: those of a cell follow the
    paths from its first corner to its last along the axes, in every order. After Liu, Chen, Liu,
    Carass and Prince, "On finite difference Jacobian computation in deformable image registration",
    IJCV 2024.
    """
    *sizes, ndim = displacement.shape
    index = np.stack(np.indices(sizes)[::-1], axis=-1)
    points = displacement + index
    inverted, cells = 0.0, math.prod(n - 1 for n in sizes)
    for order in itertools.permutations(range(ndim)):
        corner = [slice(0, -1)] * ndim
        edges, before = [], points[tuple(corner)]
        for axis in order:
            corner[axis] = slice(1, None)
            after = points[tuple(corner)]
            edges.append(after - before)
            before = after
        determinant = determinant_of(edges)
        # Components are in x, y, z order and axes in z, y, x: the sign of the identity is known.
        unit = np.stack([np.eye(ndim)[ndim - 1 - axis] for axis in order], axis=-1)
        determinant *= np.sign(np.linalg.det(unit))
        inverted += -np.minimum(determinant, 0).sum() / math.factorial(ndim)
    return float(inverted / cells)


def judge(
    fixed: Labelled,
    moving: Labelled,
    groups: Mapping[str, Sequence[int]],
    result: Registration,
    back: Registration | None = None,
) -> dict[str, float]:
    """Return what labels, landmarks and Jacobians say of a registration."""
    transform = result.transform
    there = transform.apply(moving.regions, fixed.regions, interpolation="nearest")
    home = transform.apply_inverse(fixed.regions, moving.regions, interpolation="nearest")
    found: dict[str, float] = {}
    for name, one, other in (
        ("Dice", there, fixed.regions),
        ("inverse Dice", home, moving.regions),
    ):
        overlaps = dice_of_labels(np.asarray(one.array), np.asarray(other.array))
        for group, numbers in groups.items():
            found[f"{name} {group}"] = float(np.mean([overlaps.get(n, 0.0) for n in numbers]))
    if fixed.points is not None and moving.points is not None:
        distances = target_registration_error(transform, fixed.points, moving.points)
        found["landmarks mm"] = float(distances.mean())
    inside = np.asarray(fixed.regions.array) > 0
    determinant = result.jacobian
    found["det min"], found["det max"] = float(determinant.min()), float(determinant.max())
    found["log det spread"] = float(np.log(np.maximum(determinant[inside], 1e-6)).std())
    if transform.displacement is not None:
        voxels = np.asarray(transform.displacement, np.float64)[0]
        voxels = voxels * (np.array(fixed.image.shape[::-1]) - 1) / 2
        found["inverted ppm"] = 1e6 * non_diffeomorphic_volume(voxels)
    if back is not None:
        index = np.argwhere(inside)[::97, ::-1]
        matrix = fixed.image.grid.voxel_to_physical()
        points = index @ matrix[:-1, :-1].T + matrix[:-1, -1]
        returned = back.transform.transform_points(transform.transform_points(points))
        found["there and back mm"] = float(np.linalg.norm(returned - points, axis=1).mean())
    return found


def timed(fixed: Volume, moving: Volume, stages: Sequence[Stage], repeats: int) -> tuple[Any, ...]:
    """Return a registration, the seconds of its stages, and the peak of memory in MB, if known."""
    for _ in range(repeats):
        result = register(fixed, moving, stages)
    seconds = sum(stage.seconds for stage in result.stages)
    statistics = jax.devices()[0].memory_stats() or {}
    return result, seconds, statistics.get("peak_bytes_in_use", math.nan) / 1e6


def register_with_ants(
    fixed: Labelled, moving: Labelled, kind: str
) -> dict[str, np.ndarray] | None:
    """Return the moved regions, and the fixed ones moved back, by ANTs; None without it."""
    try:
        import ants
    except ImportError:
        return None

    def image(volume: Volume) -> Any:
        grid = volume.grid
        return ants.from_numpy(
            np.asarray(volume.array, np.float32).T,
            grid.origin.tolist(),
            grid.spacing.tolist(),
            np.asarray(grid.direction),
        )

    began = time.perf_counter()
    found = ants.registration(image(fixed.image), image(moving.image), type_of_transform=kind)
    seconds = time.perf_counter() - began

    def moved(onto: Labelled, of: Labelled, transforms: Any, **options: Any) -> np.ndarray:
        array = ants.apply_transforms(
            image(onto.regions),
            image(of.regions),
            transforms,
            interpolator="nearestNeighbor",
            **options,
        )
        return np.rint(array.numpy().T).astype(np.int32)

    # Of an affine there is the matrix alone, on the way back, too.
    inverted = [name.endswith(".mat") for name in found["invtransforms"]]
    return {
        "there": moved(fixed, moving, found["fwdtransforms"]),
        "home": moved(moving, fixed, found["invtransforms"], whichtoinvert=inverted),
        "seconds": np.array(seconds),
    }


def register_with_fireants(
    fixed: Labelled, moving: Labelled, kind: str
) -> dict[str, np.ndarray] | None:
    """Return the moved regions, by FireANTs; None without it."""
    try:
        import torch
        from fireants.io import BatchedImages, Image
        from fireants.registration.affine import AffineRegistration
        from fireants.registration.greedy import GreedyRegistration
        from fireants.registration.syn import SyNRegistration
    except ImportError:
        return None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as folder:

        def loaded(volume: Volume, name: str) -> Any:
            path = Path(folder) / f"{name}.nii.gz"
            write_volume(volume, path)
            return BatchedImages([Image.load_file(str(path), device=device)])

        images = loaded(fixed.image, "fixed"), loaded(moving.image, "moving")
        began = time.perf_counter()
        affine = AffineRegistration(
            [8, 4, 2, 1],
            [200, 100, 50, 20],
            *images,
            optimizer="Adam",
            optimizer_lr=3e-3,
            cc_kernel_size=5,
        )
        affine.optimize()
        deformation = {"greedy": GreedyRegistration, "syn": SyNRegistration}[kind](
            scales=[4, 2, 1],
            iterations=[200, 100, 25],
            fixed_images=images[0],
            moving_images=images[1],
            cc_kernel_size=5,
            optimizer="Adam",
            optimizer_lr=0.5,
            smooth_grad_sigma=1.0,
            smooth_warp_sigma=0.5,
            init_affine=affine.get_affine_matrix().detach(),
        )
        deformation.optimize()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        warp = Path(folder) / "warp.nii.gz"
        deformation.save_as_ants_transforms(str(warp))
        there = resample(moving.regions, fixed.regions, read_transform(warp), "nearest")
    return {"there": np.asarray(there.array), "seconds": np.array(seconds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, metavar="DATA")
    parser.add_argument("--settings", nargs="+", default=["affine", "default"], choices=SETTINGS)
    parser.add_argument("--starts", nargs="+", default=["given"], choices=STARTS)
    parser.add_argument("--repeats", type=int, default=2, help="the first run compiles")
    parser.add_argument("--peers", nargs="+", default=[], choices=[*ANTS, *FIREANTS])
    add_file_arguments(parser)
    arguments = parser.parse_args()
    images, groups = read_folder(arguments.data)
    gpu = jax.devices()[0].device_kind if DEVICE == "gpu" else ""
    record = Record("quality", arguments, gpu)

    def tell(work: str, who: str, found: Mapping[str, float]) -> None:
        record.add(work, who, **found)
        print(f"{work}: {who}:", ", ".join(f"{k} {v:.4g}" for k, v in found.items()), flush=True)

    for start, name in itertools.product(arguments.starts, arguments.settings):
        for one, other in itertools.combinations(images, 2):
            both = ((placed(one, start), other), (placed(other, start), one))
            if start == "given":
                both = ((one, other), (other, one))
            done = [
                timed(f.image, m.image, SETTINGS[name](f.image.ndim), arguments.repeats)
                for f, m in both
            ]
            for k, (fixed, moving) in enumerate(both):
                result, seconds, memory = done[k]
                back = done[1 - k][0] if start == "given" else None
                found = judge(fixed, moving, groups, result, back)
                work = f"{moving.name} to {fixed.name}, {start}"
                tell(work, name, {**found, "seconds": seconds, "MB": memory})
    for fixed, moving in itertools.permutations(images, 2):
        for who in arguments.peers:
            if who in ANTS:
                package, peer = "ANTs", register_with_ants(fixed, moving, ANTS[who])
            else:
                package, peer = "FireANTs", register_with_fireants(fixed, moving, FIREANTS[who])
            if peer is None:
                record.miss(package)
                continue
            found = {"seconds": float(peer["seconds"])}
            for label, array, onto in (("Dice", "there", fixed), ("inverse Dice", "home", moving)):
                if array not in peer:
                    continue
                overlaps = dice_of_labels(peer[array], np.asarray(onto.regions.array))
                for group, numbers in groups.items():
                    key = f"{label} {group}"
                    found[key] = float(np.mean([overlaps.get(n, 0.0) for n in numbers]))
            tell(f"{moving.name} to {fixed.name}, given", who, found)


if __name__ == "__main__":
    main()
