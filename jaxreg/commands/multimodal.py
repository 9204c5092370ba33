"""``jaxreg demo --multimodal``: what mutual information is for."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from jaxreg.commands.progress_bars import for_bars
from jaxreg.commands.timing import fact_table
from jaxreg.registration import Rigid, Transform, register, resample, target_registration_error
from jaxreg.registration.report.pictures import BACKGROUND, draw_contours
from regkernels import AffineMap, Volume, read_transform, read_volume, rigid_motion, write_volume
from regkernels.data import load_multimodal_paths
from regkernels.grid import Matrix

__all__ = ["STARTS", "Scene", "Start", "compare_metrics", "load"]

_Metric = Literal["mse", "ncc", "mi"]
_NAMES: dict[_Metric, str] = {
    "mse": "Squared differences",
    "ncc": "Cross-correlation",
    "mi": "Mutual information",
}


class Start(NamedTuple):
    """A rigid motion away from the reference alignment, about the middle of the fixed volume."""

    degrees: float
    axis: tuple[float, float, float]
    millimetres: float
    direction: tuple[float, float, float]

    def motion(self, centre: NDArray[np.float64]) -> Matrix:
        """Return the motion of the fixed space."""
        direction = np.array(self.direction) / np.linalg.norm(self.direction)
        return rigid_motion(self.degrees, self.axis, self.millimetres * direction, centre)


# The starts are oblique, so that no metric has it easy along an axis.
STARTS = (
    Start(10, (1, 2, 3), 15, (2, -1, 2)),
    Start(12, (-2, 1, 1), 20, (-1, 2, 2)),
    Start(15, (3, -1, 2), 20, (2, 2, -1)),
    Start(15, (0, -3, 1), 25, (-2, -1, 1)),
    Start(18, (1, -1, -2), 25, (1, -2, -2)),
    Start(20, (-2, -4, 1), 30, (-1, 1, -2)),
)

_HOUNSFIELD = 20
"""About halfway from the brain to the air around it in the file, and from grey matter to CSF."""
_BRAIN_SURFACE = 2.0 * _HOUNSFIELD
"""The same intensity in the unit of the file."""
_LANDMARK_DISTANCE = 20.0
"""Millimetres."""


class Scene(NamedTuple):
    """What there is to register, and what is known of it.

    Attributes
    ----------
    fixed, moving
        The MR and the CT, both from 0 to 1: squared differences compare intensities as they are.
    reference
        ``(4, 4)``, physical fixed -> physical moving.
    surface
        The moving volume's intensity at the surface of the brain.
    landmarks
        ``(K, 3)``, millimetres, LPS: a grid of points of the fixed space, all in the brain.
    """

    fixed: Volume
    moving: Volume
    reference: Matrix
    surface: float
    landmarks: NDArray[np.float64]

    def starts(self) -> list[Matrix]:
        """Return the matrices to start from."""
        centre = self.fixed.grid.centre()
        return [self.reference @ start.motion(centre) for start in STARTS]

    def error(self, matrix: Matrix) -> float:
        """Return how far from the reference a matrix takes the landmarks, mean, millimetres."""
        grid = self.fixed.grid
        aligned = Transform(grid, self.reference).transform_points(self.landmarks)
        transform = Transform(grid, matrix)
        return float(target_registration_error(transform, self.landmarks, aligned).mean())


class _Outcome(NamedTuple):
    matrix: Matrix
    error: float
    seconds: float


def load() -> Scene:
    """Read the shipped MR and CT, and choose the landmarks."""
    paths = load_multimodal_paths()
    fixed, moving = read_volume(paths.fixed), read_volume(paths.moving)
    reference = Transform.from_parts(fixed.grid, read_transform(paths.reference)).matrix
    surface = _BRAIN_SURFACE / _bright(moving)
    fixed, moving = (v.with_array(np.minimum(v.array / _bright(v), 1)) for v in (fixed, moving))
    every = round(_LANDMARK_DISTANCE / float(fixed.grid.spacing[0]))
    aligned = np.asarray(resample(moving, fixed, [AffineMap(reference)]).array)
    index = every * np.argwhere(aligned[::every, ::every, ::every] > surface)[:, ::-1]
    to_physical = fixed.grid.voxel_to_physical()
    landmarks = index @ to_physical[:3, :3].T + to_physical[:3, 3]
    return Scene(fixed, moving, reference, surface, landmarks)


def compare_metrics(
    folder: Path, console: Console, quick: bool
) -> tuple[Table, Table, dict[str, Any]]:
    """Register the shipped CT to the shipped MR by several metrics.

    Writes moved.nii.gz, the CT where mutual information brings it from the last start, in
    Hounsfield units (its brightest hundredth cut off), and multimodal.png.

    Parameters
    ----------
    folder
        Where to write.
    console
        Where to show what is going on.
    quick
        Whether to stop at 8 mm voxels.

    Returns
    -------
    errors, seconds, record
        How far from the reference each start and each metric is, how long it took, and both for
        JSON.
    """
    scene = load()
    outcomes: dict[_Metric, list[_Outcome]] = {}
    for metric in _NAMES:
        with for_bars(console).status(f"Registering: {_NAMES[metric].lower()}"):
            outcomes[metric] = [_register(scene, s, metric, quick) for s in scene.starts()]
    with for_bars(console).status("Writing the image and the picture"):
        _write(scene, outcomes, folder)
    facts = fact_table()
    for metric, each in outcomes.items():
        seconds = sum(outcome.seconds for outcome in each)
        facts.add_row(f"{len(each)} registrations by {_NAMES[metric].lower()}", f"{seconds:.1f} s")
    distances: dict[str, list[float]] = {"start": [scene.error(s) for s in scene.starts()]}
    times: dict[str, float] = {}
    for metric, each in outcomes.items():
        distances[metric] = [outcome.error for outcome in each]
        times[metric] = sum(outcome.seconds for outcome in each)
    record = {"distance from the reference (mm)": distances, "registrations (s)": times}
    return _error_table(scene, outcomes), facts, record


def _bright(volume: Volume) -> float:
    """Return an intensity that few voxels of what is shown exceed."""
    values = np.asarray(volume.array)
    return float(np.percentile(values[values > 0], 99))


def _register(scene: Scene, start: Matrix, metric: _Metric, quick: bool) -> _Outcome:
    # The reference has an affine part already, and the start keeps it: a motion is all there is
    # to find, and a metric cannot make up for a wrong place with a wrong size.
    stage = Rigid((4,), (80,), metric=metric) if quick else Rigid((4, 2), (80, 40), metric=metric)
    result = register(scene.fixed, scene.moving, [stage], initial=start)
    matrix = np.asarray(result.transform.matrix)
    return _Outcome(matrix, scene.error(matrix), result.stages[0].seconds)


def _write(scene: Scene, outcomes: dict[_Metric, list[_Outcome]], folder: Path) -> None:
    def placed(matrix: Matrix) -> Volume:
        return resample(scene.moving, scene.fixed, [AffineMap(matrix)])

    start = scene.starts()[-1]
    titles = {f"Start, {scene.error(start):.1f} mm away": placed(start)}
    for metric, each in outcomes.items():
        titles[f"{_NAMES[metric]}, {each[-1].error:.1f} mm away"] = placed(each[-1].matrix)
    last = STARTS[-1]
    figure = draw_contours(
        scene.fixed,
        titles,
        placed(scene.reference),
        level=scene.surface,
        title="A CT registered to an MR image, by three metrics",
        subtitle=(
            f"Start turned by {last.degrees:g}° and shifted by {last.millimetres:g} mm    |    "
            f"orange: contours of the CT at {_HOUNSFIELD} HU; blue: the same in the reference"
        ),
    )
    found = placed(outcomes["mi"][-1].matrix)
    hounsfield = found.array * (_HOUNSFIELD / scene.surface)
    write_volume(found.with_array(hounsfield), folder / "moved.nii.gz")
    figure.savefig(folder / "multimodal.png", dpi=110, facecolor=BACKGROUND)


def _error_table(scene: Scene, outcomes: dict[_Metric, list[_Outcome]]) -> Table:
    title = "CT registered to MR: distance from the reference (mm)"
    table = Table(title=title, title_style="bold")
    table.add_column("Start turned and shifted by")
    table.add_column("start", justify="right")
    for metric in outcomes:
        table.add_column(metric.upper(), justify="right")
    columns = [[scene.error(start) for start in scene.starts()]]
    columns += [[outcome.error for outcome in each] for each in outcomes.values()]
    for start, *errors in zip(STARTS, *columns, strict=True):
        label = f"{start.degrees:g}°, {start.millimetres:g} mm"
        table.add_row(label, *(f"{error:.1f}" for error in errors))
    table.add_section()
    table.add_row("Median", *(f"{np.median(column):.1f}" for column in columns), style="bold")
    return table
