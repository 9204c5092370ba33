"""Where the stages of a registration run: on one device, or on several.

On several devices each holds some planes of the volumes, and the levels of a stage are one program
that they run together. Arrays that a program takes and returns have as many planes on each device,
the last of which may lie beyond the end of the volume; they are cut off inside, where the compiler
can do with parts of different sizes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from jaxreg.registration.across import cut, extended, put, together, whole
from jaxreg.registration.intensities import Clip
from jaxreg.registration.programs import (
    Fixed,
    Program,
    Work,
    compiling,
    rehearse,
    settled,
    shapes_of,
)
from jaxreg.registration.progress import Callback, Progress
from jaxreg.registration.register_images import make_problem
from jaxreg.registration.stages import windows
from jaxreg.registration.stages.base import Stage, Trace
from jaxreg.registration.stages.diffeomorphic import Diffeomorphic
from jaxreg.registration.stages.iterative import LastLevel
from jaxreg.registration.stages.problem import Alignment, Level, Problem
from jaxreg.registration.stages.pyramid import level_shape
from jaxreg.registration.stages.spread import devices_of, mesh_of, spread

__all__ = ["OneDevice", "SeveralDevices", "check_devices", "is_finite"]

_IMAGE, _MASK, _FIELD, _LEVEL = 1, 0, 1, 2
"""The axis of the planes; the last one is that of all images of a level."""


class _Inputs(NamedTuple):
    """What `make_problem` takes; images and masks with planes beyond their ends."""

    fixed: jax.Array | None
    moving: jax.Array | None
    """`None` when they are not needed any more."""
    fixed_mask: jax.Array | None
    moving_mask: jax.Array | None
    fixed_to_physical: jax.Array
    moving_to_physical: jax.Array


class _Settings(NamedTuple):
    """What the programs are compiled for."""

    planes: int
    plane: tuple[int, ...]
    """The shape of one, of the fixed image."""
    moving_planes: int
    moving_plane: tuple[int, ...]
    moving_ratio: float
    clip: Clip
    match_histogram: bool

    @property
    def fixed_shape(self) -> tuple[int, ...]:
        """``(Z, Y, X)`` of the fixed image."""
        return self.planes, *self.plane

    @property
    def moving_shape(self) -> tuple[int, ...]:
        """``(Z, Y, X)`` of the moving image."""
        return self.moving_planes, *self.moving_plane


def check_devices(devices: Sequence[jax.Device] | None, ndim: int) -> list[jax.Device] | None:
    """Return the devices if there are several; refuse what is none, and slices of images in 2-D."""
    if devices is None:
        return None
    found = list(devices)
    if not found or not all(isinstance(device, jax.Device) for device in found):
        raise TypeError(f"devices: expected devices, as of jax.devices(), got {devices!r}")
    if len(set(found)) != len(found):
        raise ValueError("devices: expected each device once, got one of them twice")
    if len(found) > 1 and ndim != 3:
        raise ValueError(f"devices: expected one for images in {ndim}-D, got {len(found)}")
    return found


class OneDevice:
    """Runs stages on the default device; the operands are those of `make_problem`."""

    def __init__(self, **operands: Any) -> None:
        self._operands = operands

    def begin(self, alignment: Alignment, stages: Sequence[Stage], *, watched: bool) -> Alignment:
        """Return the alignment; the programs of the stages are compiled from now on.

        Parameters
        ----------
        alignment
            Where to start.
        stages
            What will run.
        watched
            Whether there will be a callback.
        """
        _rehearse(self._operands, alignment, stages, watched)
        self._problem = make_problem(**self._operands)
        del self._operands
        self._stages_left = len(stages)
        return alignment

    def run(
        self, stage: Stage, alignment: Alignment, callback: Callback | None
    ) -> tuple[Alignment, tuple[Trace, ...]]:
        """Run a stage."""
        self._stages_left -= 1
        if self._stages_left == 0:
            self._problem.begin_last_stage()
        return stage.run(self._problem, alignment, callback)

    def overlap(self, alignment: Alignment) -> float:
        """Return how many voxels count at an alignment."""
        return float(_overlap_of(self._problem, alignment))

    def end(self, alignment: Alignment) -> Alignment:
        """Return the alignment."""
        return alignment

    def sharing(self, shape: tuple[int, ...]) -> int:
        """Return over how many devices the planes of a level of a shape are spread: one has all."""
        return 1


_ARRAYS = (
    *("fixed", "moving", "fixed_mask", "moving_mask"),
    *("fixed_to_physical", "moving_to_physical"),
)
"""The operands of `make_problem` that are arrays."""


class _Options(NamedTuple):
    """The other ones."""

    moving_ratio: float
    clip: Clip
    match_histogram: bool


def _rehearse(
    operands: dict[str, Any], alignment: Alignment, stages: Sequence[Stage], watched: bool
) -> None:
    """Have the programs of a registration compiled, or loaded if they are kept."""
    arrays = {name: operands[name] for name in _ARRAYS}
    options = _Options(**{name: operands[name] for name in _Options._fields})
    if any(getattr(x, "committed", False) for x in jax.tree.leaves((arrays, alignment))):
        return  # to devices that somebody has chosen
    shapes, start = shapes_of(arrays), shapes_of(alignment)
    shape, to_physical = shapes["fixed"].shape[1:], np.asarray(arrays["fixed_to_physical"])
    # As `make_problem` makes them, so that the programs are those that will be asked for.
    stages = tuple(stage.for_grid(shape, np.float32(to_physical)) for stage in stages)
    with compiling() as work:
        if not work.is_kept(shapes, options, start, stages, watched):
            of_all = functools.partial(_rehearse_all, work, shapes, options, start, stages, watched)
            work.rehearse(of_all)


def _rehearse_all(
    work: Work,
    shapes: dict[str, Any],
    options: _Options,
    start: Any,
    stages: Sequence[Stage],
    watched: bool,
) -> None:
    problem = rehearse(_make, shapes, Fixed(options))
    if stages:
        problem, start = _rehearse_stages(work, problem, start, stages, watched) or (None, None)
    if problem is None:
        return
    rehearse(_overlap_of, problem, start)
    if work.afterwards is not None and start is not None:
        work.afterwards(start.displacement, start.inverse_displacement)


def _rehearse_stages(
    work: Work, problem: Any, start: Any, stages: Sequence[Stage], watched: bool
) -> Any:
    """Return the shapes of what there is after the stages, `None` if one cannot be rehearsed."""
    *others, last = stages
    ended, expected, ahead = start, start, None
    if others and work.tracer is not None:
        # What is waited for is the last stage, whose programs take longest to be compiled. Stages
        # before it may leave the alignment one of other arrays, and then it is rehearsed again.
        ahead = _rehearse_last(last, problem, expected, watched)
    for stage in others:
        if problem is None:
            return None
        problem, ended = rehearse(_stage, stage, problem, ended, Fixed(watched)) or (None, None)
    if ahead is None or jax.tree.flatten(ended) != jax.tree.flatten(expected):
        ahead = _rehearse_last(last, problem, ended, watched)
    return ahead


def _rehearse_last(stage: Stage, problem: Any, start: Any, watched: bool) -> Any:
    """Return the shapes of what there is after the last stage, `None` if it cannot be rehearsed."""
    if problem is None:
        return None
    problem = jax.tree.map(lambda shape: shape, problem)  # others may be rehearsed with this one
    problem.begin_last_stage()
    return rehearse(_stage, stage, problem, start, Fixed(watched))


def _make(arrays: dict[str, Any], options: Fixed) -> Problem:
    return make_problem(**arrays, **options.value._asdict())


def _stage(
    stage: Stage, problem: Problem, alignment: Alignment, watched: Fixed
) -> tuple[Problem, Alignment]:
    alignment, _ = stage.run(problem, alignment, _ignore if watched.value else None)
    is_finite(alignment)
    return problem, alignment


def _ignore(progress: Progress) -> None:
    pass


def _overlap_of(problem: Problem, alignment: Alignment) -> jax.Array:
    return problem.overlap(alignment)


@Program
def is_finite(alignment: Alignment) -> jax.Array:
    """Return whether the matrix and the fields hold neither NaN nor infinity, a scalar."""
    return jnp.stack([jnp.isfinite(array).all() for array in jax.tree.leaves(alignment)]).all()


class SeveralDevices:
    """Runs stages on several devices; the operands are those of `make_problem`.

    Parameters
    ----------
    devices
        Which hold the planes, in this order.
    """

    def __init__(
        self,
        devices: Sequence[jax.Device],
        fixed: ArrayLike,
        moving: ArrayLike,
        *,
        fixed_mask: ArrayLike | None,
        moving_mask: ArrayLike | None,
        fixed_to_physical: ArrayLike,
        moving_to_physical: ArrayLike,
        moving_ratio: float,
        clip: Clip,
        match_histogram: bool,
    ) -> None:
        self._mesh = mesh_of(devices)
        # Known here, but not within a program, which is one for all places in space.
        self._to_physical = np.asarray(fixed_to_physical, np.float32)
        self._platform = devices[0].platform
        (_, planes, *plane), (_, moving_planes, *moving_plane) = map(np.shape, (fixed, moving))
        self._settings = _Settings(
            *(planes, tuple(plane), moving_planes, tuple(moving_plane)),
            *(moving_ratio, clip, match_histogram),
        )
        self._inputs = _Inputs(
            self._put(fixed, _IMAGE),
            self._put(moving, _IMAGE),
            None if fixed_mask is None else self._put(fixed_mask, _MASK),
            None if moving_mask is None else self._put(moving_mask, _MASK),
            jnp.asarray(fixed_to_physical, jnp.float32),
            jnp.asarray(moving_to_physical, jnp.float32),
        )

    def _put(self, array: ArrayLike, axis: int) -> jax.Array:
        """Spread an array over the devices, of which none gets all."""
        return put(np.asarray(array, np.float32), axis, self._mesh)

    def begin(self, alignment: Alignment, stages: Sequence[Stage], *, watched: bool) -> Alignment:
        """Return an alignment that is spread over the devices."""
        self._stages_left = len(stages)
        return _on_fields(lambda field: self._put(field, _FIELD), alignment)

    def run(
        self, stage: Stage, alignment: Alignment, callback: Callback | None
    ) -> tuple[Alignment, tuple[Trace, ...]]:
        """Run a stage; the callback hears of its levels when all of them have ended."""
        shape = self._settings.fixed_shape
        stage = stage.for_grid(shape, self._to_physical)
        with together(), jax.set_mesh(self._mesh):
            result = self._run(stage, alignment)
            alignment, traces = jax.block_until_ready(result)  # type: ignore[no-untyped-call]
        if callback is not None:
            total = sum(stage.iterations) or len(stage.scales)
            done = 0
            for scale, trace in zip(stage.scales, traces, strict=True):
                done += trace.losses.size if stage.iterations else 1
                sharing = self.sharing(level_shape(shape, scale))
                callback(Progress(stage.name, scale, done, total, trace.losses, sharing))
        return alignment, traces

    def _run(self, stage: Stage, alignment: Alignment) -> tuple[Alignment, tuple[Trace, ...]]:
        settings = self._settings
        self._stages_left -= 1
        if not _finds_slabs(stage, settings.fixed_shape):
            whole = _program(_run_stage, self._platform)
            result: tuple[Alignment, tuple[Trace, ...]] = whole(
                stage, self._inputs, alignment, settings
            )
            return result
        # In several programs, since a program uses the memory of its operands and its results for
        # nothing else, and the images need not be there any more once the last level is made.
        approach, arrive = (_program(x, self._platform) for x in (_approach, _arrive))
        last = settled(approach(stage, self._inputs, alignment, settings))
        if self._stages_left == 0:
            self._inputs = self._inputs._replace(fixed=None, moving=None)
        found, traces = settled(arrive(last, settings))
        del last
        is_displacement = found.shape[:-1] == (1, *settings.fixed_shape)
        complete = _program(_complete, self._platform, "found" if is_displacement else None)
        to_physical = self._inputs.fixed_to_physical
        return complete(stage, to_physical, alignment, found, settings), traces

    def overlap(self, alignment: Alignment) -> float:
        """Return how many voxels count at an alignment."""
        with together(), jax.set_mesh(self._mesh):
            masks = self._inputs._replace(fixed=None, moving=None)
            return float(_overlap(masks, alignment, self._settings))

    def end(self, alignment: Alignment) -> Alignment:
        """Return an alignment without planes beyond the end.

        Its fields stay spread where as many planes are on each device, and are in the memory of the
        host elsewhere.
        """
        with together():
            return _on_fields(lambda field: whole(field, _FIELD, self._settings.planes), alignment)

    def sharing(self, shape: tuple[int, ...]) -> int:
        """Return over how many devices the planes of a level of a shape are spread.

        1: every device has all of them, and does the same.
        """
        with jax.set_mesh(self._mesh):
            return devices_of(shape)


def _problem(inputs: _Inputs, settings: _Settings) -> Problem:
    assert inputs.fixed is not None and inputs.moving is not None  # as it is not the last stage yet

    def mask(array: jax.Array | None, planes: int) -> jax.Array | None:
        return None if array is None else cut(array, _MASK, planes)

    return make_problem(
        cut(inputs.fixed, _IMAGE, settings.planes),
        cut(inputs.moving, _IMAGE, settings.moving_planes),
        fixed_mask=mask(inputs.fixed_mask, settings.planes),
        moving_mask=mask(inputs.moving_mask, settings.moving_planes),
        fixed_to_physical=inputs.fixed_to_physical,
        moving_to_physical=inputs.moving_to_physical,
        moving_ratio=settings.moving_ratio,
        clip=settings.clip,
        match_histogram=settings.match_histogram,
    )


def _on_fields(function: Callable[[Any], Any], alignment: Alignment) -> Alignment:
    displacement, inverse = alignment.displacement, alignment.inverse_displacement
    return alignment._replace(
        displacement=None if displacement is None else function(displacement),
        inverse_displacement=None if inverse is None else function(inverse),
    )


def _run_stage(
    stage: Stage, inputs: _Inputs, alignment: Alignment, settings: _Settings
) -> tuple[Alignment, tuple[Trace, ...]]:
    problem = _problem(inputs, settings)
    whole = _on_fields(lambda field: cut(field, _FIELD, settings.planes), alignment)
    found, traces = stage.run(problem, whole)
    return _on_fields(lambda field: extended(field, _FIELD), found), traces


def _finds_slabs(stage: Stage, shape: tuple[int, ...]) -> bool:
    """Whether a stage finds fields of which each device has as many planes, or all of them."""
    if not isinstance(stage, Diffeomorphic):
        return False
    last = level_shape(shape, stage.scales[-1])
    return last[0] % devices_of(last) == 0


def _approach(
    stage: Diffeomorphic, inputs: _Inputs, alignment: Alignment, settings: _Settings
) -> LastLevel:
    whole = _on_fields(lambda field: cut(field, _FIELD, settings.planes), alignment)
    last = stage.approach(_problem(inputs, settings), whole).prepared()
    return last._replace(level=_sent(last.level))


def _arrive(last: LastLevel, settings: _Settings) -> tuple[jax.Array, tuple[Trace, ...]]:
    last = last._replace(level=_received(last, settings))
    found, traces = last.arrive(settings.fixed_shape)
    return spread(found, _FIELD), traces


_OF_MOVING = {"moving": "moving_window", "moving_mask": None}
_OF_FIXED = {"fixed": "fixed_window", "fixed_mask": None, "content": None, "fixed_weight": None}
"""The images of a level, and the windows that tell all about them."""


def _sent(level: Level) -> Level:
    """Return a level as a result of a program: without images that follow from windows.

    Of others there are as many planes on each device.
    """

    def sent(name: str, window: str | None) -> jax.Array | None:
        image: jax.Array | None = getattr(level, name)
        if image is None or (window is not None and getattr(level, window) is not None):
            return None
        return extended(image, _LEVEL) if devices_of(image.shape[_LEVEL:]) > 1 else image

    images: dict[str, Any] = {
        name: sent(name, window) for name, window in (_OF_FIXED | _OF_MOVING).items()
    }
    return level._replace(**images)


def _received(last: LastLevel, settings: _Settings) -> Level:
    """Return a level as it was before `_sent`."""
    level, scale = last.level, last.stage.scales[-1]
    fixed_shape = level_shape(settings.fixed_shape, scale)
    moving_shape = level_shape(settings.moving_shape, max(scale * settings.moving_ratio, 1.0))
    images: dict[str, Any] = {}
    for names, shape in ((_OF_FIXED, fixed_shape), (_OF_MOVING, moving_shape)):
        for name, window in names.items():
            image = getattr(level, name)
            if window is not None and getattr(level, window) is not None:
                image = windows.own_planes(getattr(level, window), shape)
            elif image is not None and devices_of(shape) > 1:
                image = cut(image, _LEVEL, shape[0])
            images[name] = image
    return level._replace(**images)


def _complete(
    stage: Diffeomorphic,
    to_physical: jax.Array,
    alignment: Alignment,
    found: jax.Array,
    settings: _Settings,
) -> Alignment:
    whole = _on_fields(lambda field: cut(field, _FIELD, settings.planes), alignment)
    completed = stage.complete(settings.fixed_shape, to_physical, whole, found)
    return _on_fields(lambda field: extended(field, _FIELD), completed)


@functools.cache
def _program(
    function: Callable[..., Any], platform: str, donated: str | None = None
) -> Callable[..., Any]:
    """Return a function of settings as a program for several devices.

    A result takes the memory of an operand that is donated.

    On GPUs messages go by themselves. Sending is a kernel there, which waits for that of the
    neighbour, and some of ours take all of a GPU from their beginning to their end: of two that
    begin together, one holds up the other, and so both devices, for as long. What is sent is small.
    """
    options = {"xla_gpu_disable_async_collectives": "ALLCOLLECTIVES"} if platform == "gpu" else None
    return jax.jit(
        function,
        static_argnames="settings",
        donate_argnames=donated,
        compiler_options=options,
    )


@functools.partial(jax.jit, static_argnames="settings")
def _overlap(inputs: _Inputs, alignment: Alignment, settings: _Settings) -> jax.Array:
    whole = _on_fields(lambda field: cut(field, _FIELD, settings.planes), alignment)
    of_shapes = inputs._replace(
        fixed=jnp.zeros((1, *settings.fixed_shape)), moving=jnp.zeros((1, *settings.moving_shape))
    )
    unseen = settings._replace(clip=None, match_histogram=False)
    return _problem(of_shapes, unseen).overlap(whole)
