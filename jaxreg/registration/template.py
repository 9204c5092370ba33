"""Templates: the mean shape and the mean intensity of several images, which favour none of them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike, NDArray

from jaxreg import compose, invert_displacement
from jaxreg.registration.intensities import Clip, check_clip
from jaxreg.registration.means import ExactSum, mean_grid, mean_motion, mean_of
from jaxreg.registration.plausibility import Doubt
from jaxreg.registration.progress import Progress
from jaxreg.registration.register import register
from jaxreg.registration.register_images import check_stages
from jaxreg.registration.stages.base import Stage
from jaxreg.registration.stages.deformable import Deformable
from jaxreg.registration.stages.moments import centre_and_covariance
from jaxreg.registration.stages.presets import preset
from jaxreg.registration.template_store import MemoryStore, TemplateStore
from jaxreg.registration.transforms.parts import turned
from jaxreg.registration.transforms.resampling import outside_values
from jaxreg.registration.transforms.transform import Transform
from regkernels import Volume, __version__
from regkernels.grid import Grid, Matrix, inverse_matrix

__all__ = ["RoundRecord", "Template", "TemplateProgress", "build_template"]

_SAMPLE = 2**18
"""At most so many voxels, evenly spread, are sorted for a quantile."""

_LABELS_AT_ONCE = 16
"""So many labels are counted in one pass over the images: their votes take 32 bytes per voxel."""


class TemplateProgress(NamedTuple):
    """What `build_template` tells while it runs.

    Attributes
    ----------
    round, rounds
        Which round it is, from 1 on, and of how many.
    image, images
        Which image is registered, from 1 on, and of how many.
    name
        Its name.
    block
        What its registration tells; `None` when it has ended, or had ended before an interruption.
    """

    round: int
    rounds: int
    image: int
    images: int
    name: str
    block: Progress | None


class RoundRecord(NamedTuple):
    """How far a round has moved the template.

    Attributes
    ----------
    number
        From 1 on.
    stages
        The names of the stages that ran.
    motion
        How far the mean affine was from the identity: root mean square over the voxels, mm.
    displacement
        Likewise how far the mean deformation was.
    change
        Root mean square difference of the template from the one before, as a share of the standard
        deviation of its intensities. Channels count together.
    """

    number: int
    stages: tuple[str, ...]
    motion: float
    displacement: float
    change: float


@dataclasses.dataclass(frozen=True)
class Template:
    """What `build_template` returns.

    Attributes
    ----------
    volume
        The template: the mean of the intensities where the images are the same.
    coverage
        Which share of the images has data at each voxel of it, from 0 to 1.
    names
        Those of the images.
    rounds
        How far each round moved the template.
    doubts
        For each image, why its last registration may be wrong; see `Registration.doubts`.
    """

    volume: Volume
    coverage: Volume
    names: tuple[str, ...]
    rounds: tuple[RoundRecord, ...]
    doubts: tuple[tuple[Doubt, ...], ...]
    _store: TemplateStore = dataclasses.field(repr=False)

    def transform(self, number: int) -> Transform:
        """Return the transform of an image.

        Parameters
        ----------
        number
            Of the image, from 0 on.

        Returns
        -------
        Transform
            From the template's space to that of the image, without the inverse of its deformation,
            which `Transform.with_inverse` adds. The mean of the deformations of all images is the
            identity, and so is that of their affines.

        Raises
        ------
        IndexError
            If there is no such image.
        """
        if not 0 <= number < len(self.names):
            raise IndexError(f"number: expected 0 to {len(self.names) - 1}, got {number}")
        grid = self.volume.grid
        update = _Update.read(_expected(self._store, "update"))
        return update.after(_read_transform(self._store, len(self.rounds), number, grid))

    def consensus(self, labels: Sequence[Volume]) -> Volume:
        """Return what most images say of each voxel of the template.

        Parameters
        ----------
        labels
            Label maps in the spaces of the images, one for each, in their order. They are asked for
            one after the other, and sixteen labels are counted in each pass over what they become:
            memory does not grow with the number of images or of labels.

        Returns
        -------
        Volume
            The label with the most votes, the smallest of several. Where an image has no label map
            it does not vote; where none has, the label is 0.

        Raises
        ------
        ValueError
            If there are not as many label maps as images, they are of another dimension, have
            several channels, or hold other numbers than integers.
        """
        if len(labels) != len(self.names):
            raise ValueError(
                f"labels: expected {len(self.names)} label maps, one for each image, got "
                f"{len(labels)}"
            )
        grid = self.volume.grid
        values: NDArray[Any] = np.zeros(0, np.int64)
        dtype: np.dtype[Any] | None = None
        for number, name in enumerate(self.names):
            volume = labels[number]
            if volume.ndim != grid.ndim or volume.channels != 1:
                raise ValueError(
                    f"labels: expected {grid.ndim} dimensions and 1 channel, got {volume.ndim} and "
                    f"{volume.channels} for {name}"
                )
            transform = self.transform(number)
            moved = np.asarray(transform.apply(volume, interpolation="labels").array)
            moved = moved.reshape(grid.shape)
            ones = volume.with_array(np.ones(volume.shape, np.uint8))
            votes = transform.apply(ones, interpolation="nearest", outside=0).array
            votes = np.asarray(votes).astype(bool)
            self._store.save(f"labels-{number}", {"labels": moved, "votes": votes})
            values = np.union1d(values, moved[votes])
            dtype = moved.dtype if dtype is None else np.result_type(dtype, moved.dtype)
        most = np.zeros(grid.shape, np.uint32)
        winner = np.zeros(grid.shape, dtype)
        for begin in range(0, len(values), _LABELS_AT_ONCE):
            some = values[begin : begin + _LABELS_AT_ONCE]
            counts = np.zeros((len(some), *grid.shape), np.uint16)
            for number in range(len(self.names)):
                kept = _expected(self._store, f"labels-{number}")
                for count, value in zip(counts, some, strict=True):
                    count += (kept["labels"] == value) & kept["votes"]
            best = counts.argmax(axis=0)
            largest = np.take_along_axis(counts, best[None], axis=0)[0]
            winner = np.where(largest > most, some[best], winner).astype(winner.dtype)
            most = np.maximum(most, largest)
        for number in range(len(self.names)):
            self._store.remove(f"labels-{number}")
        return Volume.on_grid(grid, winner)


def build_template(
    images: Sequence[Volume],
    stages: Sequence[Stage] | None = None,
    *,
    rounds: int = 4,
    linear_rounds: int = 1,
    grid: Grid | Volume | None = None,
    spacing: float | Sequence[float] | None = None,
    start: Literal["centres", "headers"] = "centres",
    normalise: bool = True,
    clip: Clip = "outliers",
    names: Sequence[str] | None = None,
    store: TemplateStore | None = None,
    callback: Callable[[TemplateProgress], None] | None = None,
) -> Template:
    """Build the template of several images: their mean shape and their mean intensity.

    The first template is the mean of the images as they start. In each round all images are
    registered to the template. Then its shape is changed by the inverse of the mean of the
    transforms, and the images are averaged in that shape, each interpolated once.

    Parameters
    ----------
    images
        At least two volumes of one dimension with the same channels; their grids may differ. They
        are asked for by their index, one at a time, at the beginning and twice in each round: a
        sequence that reads files only then keeps memory independent of their number. The order
        changes nothing, to the last bit, as long as all lie on one grid or one is given.
    stages
        What to run, as for `register`.
    rounds
        How many rounds run all stages.
    linear_rounds
        How many rounds before run those stages alone that do not deform, if there are any: the
        first means are blurred.
    grid
        The template's. By default that of all images, if it is one; otherwise it has their mean
        directions, voxel sizes and middle, and is as large as the largest of them.
    spacing
        Voxel size of such a mean grid, millimetres, one number or one for each axis, x first.
    start
        ``"centres"``: images are shifted so that their centres of mass meet, in the mean of these
        if that lies within the grid, else in its middle. ``"headers"``: they lie where they are
        said to lie. The mean of the affines is taken against this start.
    normalise
        Whether intensities are scaled before they are averaged, channel by channel, so that the
        background of the images (see `outside_values`; without one a dark quantile) and the median
        of what is not background are the same in all, the means of theirs.
    clip
        Which intensities the metrics see; see `register`.
    names
        What errors and records call the images; by default ``"image 1"`` and so on.
    store
        Where to keep the transforms, and what is needed to go on after an interruption: called
        again with the same arguments and the same store, the function goes on where it was, and
        the result has the same bits. By default a `MemoryStore`, which grows with the images;
        `FolderStore` does not.
    callback
        Called with a `TemplateProgress` after each block of iterations and after each image.

    Returns
    -------
    Template
        The template, and the transform of each image, which the store keeps.

    Raises
    ------
    ValueError
        If there are fewer than two images, or they do not fit together; for an image without
        contrast; for a number that is not positive; if both a grid and a spacing are given; if the
        store has been used with other arguments; if an affine mirrors or makes half a turn; and
        where `register` does.
    TypeError
        If an image is no volume, or where `register` does.

    Notes
    -----
    The deformations ``x + d(x)`` of the images have an arithmetic mean, and the shape of the
    template is changed by its exact inverse, found by `jaxreg.invert_displacement`. So the mean of
    the displacements is 0 afterwards. Of the affines the linear parts have a mean on their group,
    by logarithms, and their positions an arithmetic one. Where an image has no data it weighs
    nothing. The mean is not sharpened.

    References
    ----------
    Guimond, Meunier and Thirion, "Average Brain Models: A Convergence Study", 2000. Joshi, Davis,
    Jomier and Gerig, "Unbiased Diffeomorphic Atlas Construction for Computational Anatomy", 2004.
    Avants, Yushkevich, Pluta, Minkoff, Korczykowski, Detre and Gee, "The Optimal Template Effect in
    Hippocampus Studies of Diseased Populations", 2010.
    """
    count = len(images)
    if count < 2:
        raise ValueError(f"images: expected two or more, got {count}")
    called = tuple(names) if names is not None else tuple(f"image {k + 1}" for k in range(count))
    if len(called) != count:
        raise ValueError(f"names: expected {count}, one for each image, got {len(called)}")
    for argument, number, least in (("rounds", rounds, 1), ("linear_rounds", linear_rounds, 0)):
        if number < least:
            raise ValueError(f"{argument}: expected {least} or more, got {number}")
    if start not in ("centres", "headers"):
        raise ValueError(f"start: expected 'centres' or 'headers', got {start!r}")
    sizes = np.asarray(1.0 if spacing is None else spacing, np.float64)
    if grid is not None and spacing is not None:
        raise ValueError("spacing: expected none beside a grid, which has its own")
    if not (np.isfinite(sizes) & (sizes > 0)).all() or sizes.ndim > 1:
        raise ValueError(f"spacing: expected positive numbers, got {spacing}")
    clip = check_clip(clip)
    looked = _look_at(images, called)
    ndim = looked.grids[0].ndim
    if sizes.ndim and sizes.shape != (ndim,):
        raise ValueError(f"spacing: expected 1 or {ndim} numbers, got {len(sizes)}")
    given = grid.grid if isinstance(grid, Volume) else grid
    if given is not None and given.ndim != ndim:
        raise ValueError(f"grid: expected {ndim} dimensions as the images, got {given.ndim}")
    common = given if given is not None else mean_grid(looked.grids, spacing)
    if stages is None:
        platform = next(iter(jnp.zeros(()).devices())).platform
        stages = preset("default", ndim=ndim, device="cpu" if platform == "cpu" else "gpu")
    schedule = _schedule(check_stages(stages), rounds, linear_rounds)
    kept = MemoryStore() if store is None else store
    settings = {
        "images": looked.digests,
        "grid": {"shape": common.shape, "matrix": common.voxel_to_physical().tolist()},
        "stages": [[[stage.name, stage.record()] for stage in turn] for turn in schedule],
        "start": start,
        "normalise": normalise,
        "clip": clip,
        "version": __version__,
    }
    _check_same(kept, settings)
    work = _Construction(
        _Images(images, called, looked, normalise), common, start, clip, kept, callback
    )
    state = work.latest() or work.begin()
    for number in range(state.round + 1, len(schedule) + 1):
        state = work.advance(state, schedule[number - 1], len(schedule))
    return Template(
        Volume.on_grid(common, state.array),
        Volume.on_grid(common, (state.weights / count).astype(np.float32)),
        called,
        state.records,
        state.doubts,
        kept,
    )


def _schedule(
    stages: tuple[Stage, ...], rounds: int, linear_rounds: int
) -> tuple[tuple[Stage, ...], ...]:
    if not stages:
        raise ValueError("stages: expected one or more, got none")
    linear = tuple(stage for stage in stages if not isinstance(stage, Deformable))
    return ((linear,) * linear_rounds if linear else ()) + (stages,) * rounds


def _check_same(store: TemplateStore, settings: dict[str, Any]) -> None:
    """Refuse a store that has been used for another template; mark one that is new."""
    known = store.load("settings")
    text = json.dumps(settings)
    if known is None:
        store.save("settings", {"json": np.array(text)})
        return
    before, now = json.loads(str(known["json"])), json.loads(text)
    other = [key for key in now if before.get(key) != now[key]]
    if other:
        raise ValueError(
            f"store: expected the state of the same template, but {store} has that of one with "
            f"another: {', '.join(other)}; give the same arguments, or begin with an empty one"
        )


# --- The images ----------------------------------------------------------------------------------


class _Looked(NamedTuple):
    """What is known of the images before anything is registered."""

    grids: tuple[Grid, ...]
    centres: tuple[NDArray[np.float64], ...]
    """Of mass, physical."""
    dark: NDArray[np.float64]
    bright: NDArray[np.float64]
    """``(images, channels)``: the background, and how far the median of the rest is from it."""
    largest: NDArray[np.float64]
    """Of the intensities of each image, by their absolute values."""
    digests: tuple[str, ...]


def _look_at(images: Sequence[Volume], names: tuple[str, ...]) -> _Looked:
    grids: list[Grid] = []
    centres, dark, bright, largest, digests = [], [], [], [], []
    channels = 0
    for number, name in enumerate(names):
        volume = images[number]
        if not isinstance(volume, Volume):
            raise TypeError(f"images: expected volumes, got {type(volume).__name__} for {name}")
        if not grids:
            channels = volume.channels
        if volume.ndim != (ndim := (grids[0].ndim if grids else volume.ndim)):
            raise ValueError(
                f"images: expected {ndim} dimensions as {names[0]}, got {volume.ndim} in {name}"
            )
        if volume.channels != channels:
            raise ValueError(
                f"images: expected {channels} channels as {names[0]}, got {volume.channels} in "
                f"{name}"
            )
        array = np.asarray(volume.array)
        if array.min() == array.max():
            raise ValueError(
                f"images: expected different intensities, got {array.min():g} everywhere in {name}"
            )
        grids.append(volume.grid)
        centres.append(_centre(volume))
        levels = _levels(volume)
        dark.append(levels[0])
        bright.append(levels[1])
        largest.append(max(-float(array.min()), float(array.max())))
        digests.append(_digest(volume))
    return _Looked(
        tuple(grids),
        tuple(centres),
        np.array(dark),
        np.array(bright),
        np.array(largest),
        tuple(digests),
    )


def _centre(volume: Volume) -> NDArray[np.float64]:
    """Return the centre of mass, whose float32 is about the middle of the grid."""
    middle = np.eye(volume.ndim + 1)
    middle[:-1, -1] = volume.grid.centre()
    to_physical = np.linalg.solve(middle, volume.grid.normalised_to_physical())
    centre, _ = centre_and_covariance(
        jnp.asarray(volume.batched()), None, jnp.asarray(to_physical, jnp.float32)
    )
    position: NDArray[np.float64] = np.asarray(centre, np.float64) + middle[:-1, -1]
    return position


def _levels(volume: Volume) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the background of each channel, and how far the median of the rest is from it."""
    voxels = np.asarray(volume.batched(), np.float32).reshape(volume.channels, -1)
    step = -(-voxels.shape[1] // _SAMPLE)
    sample = voxels[:, :: step + (step + 1) % 2 if step > 1 else 1].astype(np.float64)
    dark = outside_values(volume, "background").astype(np.float64)
    clear = dark != 0
    low, high = np.quantile(sample, (0.01, 0.99), axis=1)
    # Where 0 is no value of the background, the object reaches the border.
    dark = np.where(clear | (low <= 0), dark, low)
    distances = np.abs(sample - dark[:, None])
    threshold = np.maximum(np.abs(high - dark), np.abs(low - dark)) / 20
    bright = [
        float(np.median(distance[distance > least])) if (distance > least).any() else 1.0
        for distance, least in zip(distances, threshold, strict=True)
    ]
    return dark, np.array(bright)


def _digest(volume: Volume) -> str:
    array = np.ascontiguousarray(volume.array)
    digest = hashlib.sha256(f"{array.dtype.str} {array.shape}".encode())
    digest.update(array.data.cast("B") if array.size else b"")
    digest.update(volume.grid.voxel_to_physical().tobytes())
    return digest.hexdigest()


class _Images(NamedTuple):
    """The images as they are registered and averaged."""

    volumes: Sequence[Volume]
    names: tuple[str, ...]
    looked: _Looked
    normalise: bool

    def read(self, number: int) -> Volume:
        """Return an image with the intensities that all have in common."""
        volume = self.volumes[number]
        values = volume.batched()[0]
        if not self.normalise:
            return volume.with_array(np.asarray(values).reshape(np.shape(volume.array)))
        dark, bright = self.looked.dark, self.looked.bright
        factor = mean_of(list(bright)) / bright[number]
        each = (-1, *(1,) * volume.ndim)
        scaled = (np.asarray(values, np.float64) - dark[number].reshape(each)) * factor.reshape(
            each
        ) + mean_of(list(dark)).reshape(each)
        return volume.with_array(scaled.astype(np.float32).reshape(np.shape(volume.array)))

    def background(self) -> NDArray[np.float64]:
        """Return what lies where no image has data, ``(C,)``."""
        return mean_of(list(self.looked.dark))

    def largest(self) -> float:
        """Return a bound of the intensities of all images."""
        dark, bright = np.abs(self.looked.dark), self.looked.bright
        if not self.normalise:
            return float(self.looked.largest.max())
        scaled = (self.looked.largest[:, None] + dark) * bright.max(axis=0) / bright
        return float((scaled + dark.max(axis=0)).max())


# --- Rounds --------------------------------------------------------------------------------------


class _State(NamedTuple):
    """All that a round needs of those before it."""

    round: int
    array: NDArray[np.float32]
    weights: NDArray[np.float64]
    affines: NDArray[np.float64]
    records: tuple[RoundRecord, ...]
    doubts: tuple[tuple[Doubt, ...], ...]


class _Update(NamedTuple):
    """The change of the template's shape: from the new to the old one, in this order."""

    grid: Grid
    motion: Matrix
    back: jax.Array | None
    """The inverse of the mean deformation, ``(1, *S, D)``, normalised."""

    @classmethod
    def read(cls, arrays: Any) -> _Update:
        shape = tuple(arrays["shape"].tolist())
        grid = Grid(shape, arrays["spacing"], arrays["origin"], arrays["direction"])
        return cls(grid, arrays["motion"], _field(arrays, "back"))

    def arrays(self) -> dict[str, NDArray[Any]]:
        grid = {key: getattr(self.grid, key) for key in ("spacing", "origin", "direction")}
        back = {} if self.back is None else {"back": np.asarray(self.back)}
        return {"shape": np.array(self.grid.shape), "motion": self.motion} | grid | back

    def after(self, transform: Transform) -> Transform:
        """Return the transform from the new template."""
        matrix = np.asarray(transform.matrix, np.float64) @ self.motion
        displacement = transform.displacement
        if displacement is None:
            return Transform(self.grid, matrix)
        field = jnp.asarray(displacement, jnp.float32)
        if self.back is not None:
            field = compose(field, self.back)
        if not np.array_equal(self.motion, np.eye(len(self.motion))):
            to_physical = self.grid.normalised_to_physical()
            chain = np.linalg.solve(to_physical, self.motion @ to_physical)
            still = jnp.zeros_like(field)
            sampled = compose(field, still, jnp.asarray(chain[None, :-1], jnp.float32), add=False)
            linear = jnp.asarray(inverse_matrix(chain)[:-1, :-1], jnp.float32)
            field = turned(linear, sampled)
        return Transform(self.grid, matrix, field)


def _field(arrays: Any, key: str) -> jax.Array | None:
    return jnp.asarray(arrays[key]) if key in arrays else None


def _expected(store: TemplateStore, name: str) -> Any:
    arrays = store.load(name)
    if arrays is None:
        raise ValueError(f"store: expected {name!r} in it, found nothing")
    return arrays


def _read_transform(store: TemplateStore, turn: int, number: int, grid: Grid) -> Transform:
    arrays = _expected(store, f"transform-{turn}-{number}")
    return Transform(grid, arrays["matrix"], _field(arrays, "displacement"))


class _Construction(NamedTuple):
    """What stays the same over all rounds."""

    images: _Images
    grid: Grid
    start: str
    clip: Clip
    store: TemplateStore
    callback: Callable[[TemplateProgress], None] | None

    def latest(self) -> _State | None:
        """Return where an earlier call has come to."""
        arrays = self.store.load("state")
        if arrays is None:
            return None
        told = json.loads(str(arrays["json"]))
        records = (RoundRecord(**{**r, "stages": tuple(r["stages"])}) for r in told["records"])
        doubts = (tuple(Doubt(*doubt) for doubt in some) for some in told["doubts"])
        return _State(
            int(told["round"]),
            arrays["array"],
            arrays["weights"],
            arrays["affines"],
            tuple(records),
            tuple(doubts),
        )

    def _keep(self, state: _State) -> None:
        told = {
            "round": state.round,
            "records": [record._asdict() for record in state.records],
            "doubts": state.doubts,
        }
        arrays: dict[str, NDArray[Any]] = {
            "array": state.array,
            "weights": state.weights,
            "affines": state.affines,
            "json": np.array(json.dumps(told)),
        }
        self.store.save("state", arrays)

    def begin(self) -> _State:
        """Return the mean of the images as they start."""
        starts = self._starts()
        array, weights = self._mean(Transform(self.grid, matrix) for matrix in starts)
        state = _State(0, array, weights, np.array(starts), (), ())
        self._keep(state)
        return state

    def _starts(self) -> list[Matrix]:
        """Return where the images lie: from the template's space to theirs."""
        starts = []
        centres = self.images.looked.centres
        goal = mean_of(centres)
        to_voxel = inverse_matrix(self.grid.voxel_to_physical())
        place = (to_voxel @ [*goal, 1.0])[:-1]
        if not ((place >= -0.5) & (place <= np.array(self.grid.shape[::-1]) - 0.5)).all():
            goal = self.grid.centre()
        for centre in centres:
            matrix = np.eye(self.grid.ndim + 1)
            if self.start == "centres":
                matrix[:-1, -1] = centre - goal
            starts.append(matrix)
        return starts

    def advance(self, state: _State, stages: tuple[Stage, ...], rounds: int) -> _State:
        """Register all images to a template; return the next one."""
        turn = state.round + 1
        count = len(self.images.names)
        for number in range(count):
            self._register(state, stages, rounds, number)
        update, displacement = self._update(turn)
        moved = (
            update.after(_read_transform(self.store, turn, number, self.grid))
            for number in range(count)
        )
        affines = []

        def noted() -> Iterator[Transform]:
            for transform in moved:
                affines.append(np.asarray(transform.matrix, np.float64))
                yield transform

        array, weights = self._mean(noted())
        record = RoundRecord(
            turn,
            tuple(stage.name for stage in stages),
            _motion_length(update.motion, self.grid),
            displacement,
            _change(state.array, array),
        )
        doubts = tuple(
            tuple(Doubt(*doubt) for doubt in json.loads(str(self._registered(turn, k)["doubts"])))
            for k in range(count)
        )
        self.store.save("update", update.arrays())
        after = _State(turn, array, weights, np.array(affines), (*state.records, record), doubts)
        self._keep(after)
        for number in range(count):
            self.store.remove(f"transform-{turn - 1}-{number}")
        return after

    def _registered(self, turn: int, number: int) -> Any:
        return _expected(self.store, f"transform-{turn}-{number}")

    def _register(self, state: _State, stages: tuple[Stage, ...], rounds: int, number: int) -> None:
        turn, name = state.round + 1, self.images.names[number]
        told = TemplateProgress(turn, rounds, number + 1, len(self.images.names), name, None)
        callback = self.callback
        if self.store.load(f"transform-{turn}-{number}") is None:
            # Where no image has data, the template has none, either.
            known = (state.weights > 0).astype(np.float32)
            mask = None if known.all() else Volume.on_grid(self.grid, known)
            try:
                result = register(
                    Volume.on_grid(self.grid, state.array),
                    self.images.read(number),
                    stages,
                    fixed_mask=mask,
                    initial=state.affines[number],
                    clip=self.clip,
                    callback=None
                    if callback is None
                    else (lambda block: callback(told._replace(block=block))),
                )
            except ValueError as error:
                raise ValueError(f"images: {name} to the template: {error}") from error
            transform = result.transform
            field = transform.displacement
            arrays: dict[str, NDArray[Any]] = {
                "matrix": np.asarray(transform.matrix, np.float64),
                "doubts": np.array(json.dumps([list(doubt) for doubt in result.doubts])),
            }
            if field is not None:
                arrays["displacement"] = np.asarray(field)
            self.store.save(f"transform-{turn}-{number}", arrays)
        if callback is not None:
            callback(told)

    def _update(self, turn: int) -> tuple[_Update, float]:
        """Return the inverse of the mean transform, and how long the mean displacement is, mm."""
        count = len(self.images.names)
        total: ExactSum | None = None
        motions = []
        starts = self._starts()
        for number in range(count):
            transform = _read_transform(self.store, turn, number, self.grid)
            motions.append(inverse_matrix(starts[number]) @ np.asarray(transform.matrix))
            if transform.displacement is not None:
                total = total or ExactSum(transform.displacement.shape)
                total.add(transform.displacement)
        try:
            motion = mean_motion(motions, self.grid.centre())
        except ValueError as error:
            raise ValueError(f"images: their affines have no mean: {error}") from error
        if total is None:
            return _Update(self.grid, motion, None), 0.0
        mean = jnp.asarray(total.value() / count, jnp.float32)
        vectors = Transform(self.grid, np.eye(self.grid.ndim + 1), mean).displacement_field()
        length = float(np.sqrt(np.mean(np.sum(np.square(vectors, dtype=np.float64), axis=-1))))
        return _Update(self.grid, motion, invert_displacement(mean)), length

    def _mean(
        self, transforms: Iterator[Transform]
    ) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
        """Return the mean of the images on the grid, and the sum of what they weigh there."""
        totals: ExactSum | None = None
        weights = ExactSum(self.grid.shape)
        for number, transform in enumerate(transforms):
            image = self.images.read(number)
            # Beyond an image are zeros: what is left is the sum over what it has data for.
            moved = transform.apply(image, outside=0)
            totals = totals or ExactSum(np.shape(moved.array), self.images.largest())
            totals.add(moved.array)
            ones = Volume.on_grid(image.grid, np.ones(image.shape, np.float32))
            weights.add(transform.apply(ones, outside=0).array)
        assert totals is not None
        weight = weights.value()
        # Less than rounding leaves of a weight is none.
        known = weight > 1e-6
        shape = (-1, *self.grid.shape)
        around = self.images.background().reshape(-1, *(1,) * self.grid.ndim)
        total = totals.value()
        mean = np.where(known, total.reshape(shape) / np.where(known, weight, 1.0), around)
        return mean.reshape(total.shape).astype(np.float32), np.where(known, weight, 0.0)


def _motion_length(motion: Matrix, grid: Grid) -> float:
    """Return how far a motion takes the voxels of a grid, root mean square, mm."""
    index = np.moveaxis(np.indices(grid.shape)[::-1], 0, -1)
    shift = (motion - np.eye(grid.ndim + 1)) @ grid.voxel_to_physical()
    vectors = index @ shift[:-1, :-1].T + shift[:-1, -1]
    return float(np.sqrt(np.mean(np.sum(vectors**2, axis=-1))))


def _change(before: ArrayLike, after: ArrayLike) -> float:
    one, other = np.asarray(before, np.float64), np.asarray(after, np.float64)
    spread = float(other.std())
    return float(np.sqrt(np.mean((other - one) ** 2))) / spread if spread else 0.0
