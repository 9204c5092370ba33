"""What all stages have in common: what a registration asks of them."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, ClassVar, NamedTuple, Self

import jax
from jax.typing import ArrayLike

from jaxreg.registration.progress import Callback
from jaxreg.registration.stages.metrics import Metric, MetricLike, function_name
from jaxreg.registration.stages.problem import Alignment, Problem
from jaxreg.registration.stages.regularisers import Regulariser

__all__ = ["Stage", "Trace"]


class Trace(NamedTuple):
    """How the loss of a level went.

    Attributes
    ----------
    losses
        The loss before each iteration, ``(iterations,)``; after an early stop the last one is
        repeated. Those of a block that was undone are there, too. Of `Moments`, the loss at its
        start and its end.
    ran
        How many of the losses were computed.
    converged
        Whether the level stopped by itself.
    """

    losses: jax.Array
    ran: jax.Array
    converged: jax.Array


@dataclasses.dataclass(frozen=True)
class Stage(abc.ABC):
    """A step of a registration, by its settings: what `register` and `register_images` run.

    A stage is a frozen dataclass, and a JAX pytree without leaves: its settings are static, and
    functions that take it are compiled for them.
    """

    name: ClassVar[str]
    """What the stage is called, as `stage_from_name` takes it."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        jax.tree_util.register_static(cls)

    @property
    @abc.abstractmethod
    def metric(self) -> Metric:
        """What is minimised."""

    @property
    @abc.abstractmethod
    def scales(self) -> tuple[float, ...]:
        """How many times wider a voxel is than at full resolution, per level."""

    @property
    @abc.abstractmethod
    def iterations(self) -> tuple[int, ...]:
        """Steps per level, at most; empty for a stage that does not iterate."""

    @abc.abstractmethod
    def run(
        self, problem: Problem, alignment: Alignment, callback: Callback | None = None
    ) -> tuple[Alignment, tuple[Trace, ...]]:
        """Run the stage.

        Parameters
        ----------
        problem
            The images.
        alignment
            Where to start.
        callback
            Called with a `Progress` after each block of iterations.

        Returns
        -------
        alignment : Alignment
            What the stage has found.
        traces : tuple of Trace
            One for each of `scales`.
        """

    def for_scale(self, scale: float) -> Self:
        """Return the stage with the metric that its level of a scale uses; see `Metric`."""
        return self.with_metric(self.metric.for_scale(scale))

    def for_grid(self, shape: tuple[int, ...], to_physical: ArrayLike) -> Self:
        """Return the stage with settings that depend on where voxels are told in voxels.

        Parameters
        ----------
        shape
            Of the fixed grid, ``([Z,] Y, X)``.
        to_physical
            ``(D + 1, D + 1)``, from normalised to physical coordinates.
        """
        return self

    def with_metric(self, metric: MetricLike) -> Self:
        """Return the stage with another metric, given as to the stage itself."""
        changed: dict[str, Any] = {"metric": metric}
        return dataclasses.replace(self, **changed)

    def record(self) -> dict[str, Any]:
        """Return the settings by their names, with what JSON cannot hold as text."""
        settings = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: _plain(value) for name, value in settings.items()}


def _plain(setting: Any) -> Any:
    if isinstance(setting, Metric | Regulariser):
        return str(setting)
    return function_name(setting) if callable(setting) else setting
