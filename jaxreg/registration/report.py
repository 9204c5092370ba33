"""One picture that shows whether a registration worked."""

from __future__ import annotations

import dataclasses
import itertools
import os
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from jaxreg.registration.files import atomic_path
from jaxreg.registration.pipeline import Registration
from jaxreg.registration.transform import resample
from jaxreg.registration.volume import Volume

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

__all__ = ["View", "write_report"]

_BACKGROUND = "#0e1116"
_TEXT = "#e6e9ee"
_FAINT = "#8b93a1"
_COLD, _WARM = "#4aa3ff", "#ff9a3d"
_DIVERGING = ("#d6ecff", _COLD, "#123456", _BACKGROUND, "#5a2b0c", _WARM, "#ffe9d1")
_MARGIN_MM = 9.0
_SQUARE_MM = 18.0
_LINE_EVERY_MM = 6.0


def write_report(
    result: Registration,
    path: str | os.PathLike[str],
    *,
    title: str,
    subtitle: str = "",
    names: tuple[str, str] = ("fixed", "moving"),
    facts: dict[str, str] | None = None,
    dpi: int = 110,
) -> None:
    """Draw a registration of two 3-D volumes as orthogonal slices.

    Eight panels, each with an axial, a coronal and a sagittal slice through the middle of the
    fixed image: the fixed image; the moving image as its header places it, and moved; the deformed
    grid on the logarithm of the Jacobian determinant (the affine left out); differences and
    checkerboards before and after. Slices are radiological (the patient's right on the left) and
    true to scale in millimetres. Differences are taken after matching the moving image's gain and
    offset to the fixed image.

    Parameters
    ----------
    result
        From `register`.
    path
        Where to write; the suffix chooses the format. The file appears complete or not at all.
    title, subtitle
        Printed above the panels.
    names
        What the fixed and the moving image show.
    dpi
        Resolution; the picture is 13 x 10.4 inches.

    Raises
    ------
    ValueError
        If the volumes are not 3-D.
    """
    import matplotlib.figure
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    if result.fixed.ndim != 3:
        raise ValueError(f"result: expected 3-D volumes, got {result.fixed.ndim}-D")
    figure = matplotlib.figure.Figure(figsize=(13, 10.4), facecolor=_BACKGROUND)
    FigureCanvasAgg(figure)
    _draw(figure, result, title, subtitle, names)
    with atomic_path(path) as beside:
        figure.savefig(beside, dpi=dpi, facecolor=_BACKGROUND)


def _draw(
    figure: Figure, result: Registration, title: str, subtitle: str, names: tuple[str, str]
) -> None:
    view = View.of(result.fixed)
    fixed = view.scalar(result.fixed)
    top = np.percentile(fixed[fixed > fixed.min()], 99.5) if np.ptp(fixed) else 1.0
    fixed = fixed / top
    before = view.scalar(resample(result.moving, result.fixed))
    moved = view.scalar(result.moved)
    # One gain and offset for both, or the differences before and after could not be compared.
    gain, offset = np.polyfit(moved.ravel(), fixed.ravel(), 1) if np.ptp(moved) else (1.0, 0.0)
    before, moved = gain * before + offset, gain * moved + offset
    log_jacobian = np.log2(np.maximum(view.arrange(result.jacobian), 2.0**-8))
    points = view.deformed_points(np.asarray(result.transform.displacement[0]))
    slices = _middle_slices(fixed, view.spacing)
    board = _checkerboard(fixed.shape, view.spacing)

    gray: dict[str, Any] = {"cmap": _colours(_BACKGROUND, "white"), "vmin": 0, "vmax": 1}
    change: dict[str, Any] = {"cmap": _colours(*_DIVERGING), "vmin": -0.6, "vmax": 0.6}
    growth: dict[str, Any] = {"cmap": _colours(*_DIVERGING), "vmin": -1.5, "vmax": 1.5}

    figure.text(0.025, 0.965, title, color=_TEXT, fontsize=17, fontweight="bold", va="center")
    figure.text(0.025, 0.936, subtitle, color=_FAINT, fontsize=10.5, va="center")
    figure.text(
        0.975,
        0.936,
        "radiological view (R on the left) · slices true to scale",
        color=_FAINT,
        fontsize=9,
        va="center",
        ha="right",
    )
    panels = _Panels(figure, slices)
    panels.image(0, 0, f"Fixed · {names[0]}", fixed, gray, letters=True)
    panels.image(0, 1, f"Moving, as loaded · {names[1]}", before, gray)
    panels.image(1, 0, "Moved · affine and deformable", moved, gray)
    axes, drawn = panels.image(1, 1, "Deformed grid on log₂ Jacobian", log_jacobian, growth)
    _draw_grid(axes, points, slices)
    panels.colourbar(drawn, 1, ("halved", "kept", "doubled"), (-1, 0, 1))
    for column, (word, image) in enumerate((("before", before), ("after", moved))):
        _, drawn = panels.image(2, column, f"Difference {word}", image - fixed, change)
        panels.image(3, column, f"Checkerboard {word}", _interleave(fixed, image, board), {})
    panels.colourbar(drawn, 2, ("fixed brighter", "", "moving brighter"), (-0.5, 0, 0.5))


@dataclasses.dataclass(frozen=True)
class View:
    """Arrays turned and flipped so that their axes run nearest to superior, posterior, left."""

    order: tuple[int, ...]
    """Voxel axis (x first) that runs along the left, posterior and superior direction."""
    signs: tuple[int, ...]
    """1, or -1 where that voxel axis runs the other way."""
    spacing: NDArray[np.float64]
    """Millimetres along left, posterior, superior."""

    @classmethod
    def of(cls, volume: Volume) -> View:
        """Find the turn that brings a volume's axes nearest to the patient's."""
        direction = np.asarray(volume.direction)
        order = max(
            itertools.permutations(range(3)),
            key=lambda axes: sum(abs(direction[k, axis]) for k, axis in enumerate(axes)),
        )
        signs = tuple(1 if direction[k, axis] >= 0 else -1 for k, axis in enumerate(order))
        return cls(order, signs, np.asarray(volume.spacing)[list(order)])

    def arrange(self, array: NDArray[Any]) -> NDArray[Any]:
        """Turn ``(Z, Y, X, ...)`` to (superior, posterior, left, ...)."""
        axes = [2 - axis for axis in reversed(self.order)]
        array = array.transpose(*axes, *range(3, array.ndim))
        return array[tuple(slice(None, None, sign) for sign in reversed(self.signs))]

    def scalar(self, volume: Volume) -> NDArray[np.float32]:
        """Turn a volume's intensities."""
        return self.arrange(np.asarray(volume.array))

    def deformed_points(self, displacement: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return ``x + d(x)`` in millimetres from the turned array's first voxel.

        ``(superior, posterior, left, 3)`` with components along left, posterior, superior.
        """
        size = np.array(displacement.shape[:3][::-1])
        voxels = displacement * (np.maximum(size - 1, 1) / 2)
        turned = self.arrange(voxels)[..., list(self.order)] * np.array(self.signs)
        axes = np.meshgrid(*(np.arange(n) for n in turned.shape[:3]), indexing="ij")
        moved: NDArray[np.float64] = (np.stack(axes[::-1], axis=-1) + turned) * self.spacing
        return moved


class _Slice(NamedTuple):
    """One of three slices: which axis of (superior, posterior, left) it fixes, where, and how."""

    axis: int
    position: int
    extent: tuple[float, float, float, float]
    """Left, right, bottom and top in millimetres, outer edges of the voxels."""
    window: tuple[float, float, float, float]
    """The part to show: left, right, bottom and top in millimetres."""
    letters: tuple[str, str]
    """What lies at the left and at the top."""

    def of(self, array: NDArray[Any]) -> NDArray[Any]:
        """Cut an array (superior, posterior, left, ...)."""
        section: NDArray[Any] = array.take(self.position, axis=self.axis)
        return section


def _middle_slices(image: NDArray[np.float32], spacing: NDArray[np.float64]) -> list[_Slice]:
    occupied = np.argwhere(image > 0.05)
    if occupied.size == 0:
        occupied = np.array([[0, 0, 0], np.array(image.shape) - 1])
    first, last = occupied.min(axis=0), occupied.max(axis=0)
    middle = np.round(occupied.mean(axis=0)).astype(int)
    # Beside the plane between the hemispheres there is more to see than in it.
    middle[2] = min(middle[2] + round(7 / spacing[0]), last[2])
    step = spacing[::-1]
    low, high = first * step - _MARGIN_MM, last * step + _MARGIN_MM
    edges = (np.array(image.shape) - 0.5) * step
    slices = []
    for axis, letters in ((0, ("R", "A")), (1, ("R", "S")), (2, ("A", "S"))):
        down, right = (a for a in range(3) if a != axis)
        box = (-step[right] / 2, edges[right], -step[down] / 2, edges[down])
        window = (low[right], high[right], low[down], high[down])
        if axis == 0:  # posterior grows downwards
            window = (*window[:2], window[3], window[2])
        slices.append(_Slice(axis, int(middle[axis]), box, window, letters))
    return slices


class _Panels:
    """Four rows and two columns of panels; each shows three slices at one scale."""

    _TOP, _BOTTOM, _LEFT, _RIGHT = 0.915, 0.004, 0.025, 0.975
    _GAP, _TITLE, _SPACE = 0.03, 0.026, 0.008

    def __init__(self, figure: Figure, slices: list[_Slice]) -> None:
        self.figure = figure
        self.slices = slices
        self.height = (self._TOP - self._BOTTOM) / 4
        self.width = (self._RIGHT - self._LEFT - self._GAP) / 2
        inches = figure.get_size_inches()
        widths = [abs(s.window[1] - s.window[0]) for s in slices]
        heights = [abs(s.window[3] - s.window[2]) for s in slices]
        # Figure fractions per millimetre, the same for all slices.
        across = min(
            0.97 * self.width / sum(widths),
            (self.height - self._TITLE - self._SPACE) / max(heights) * inches[1] / inches[0],
        )
        self.sizes = [
            (w * across, h * across * inches[0] / inches[1])
            for w, h in zip(widths, heights, strict=True)
        ]

    def image(
        self,
        row: int,
        column: int,
        title: str,
        volume: NDArray[Any],
        style: dict[str, Any],
        letters: bool = False,
    ) -> tuple[list[Axes], Any]:
        """Show three slices of an arranged volume; return their axes and the last image."""
        left = self._LEFT + column * (self.width + self._GAP)
        top = self._TOP - row * self.height
        self.figure.text(left, top - 0.013, title, color=_TEXT, fontsize=10.5, va="center")
        gap = (self.width - sum(w for w, _ in self.sizes)) / 2
        room = self.height - self._TITLE - self._SPACE
        axes, drawn = [], None
        for cut, (width, height) in zip(self.slices, self.sizes, strict=True):
            bottom = top - self._TITLE - room / 2 - height / 2
            ax = self.figure.add_axes((left, bottom, width, height))
            drawn = ax.imshow(
                cut.of(volume), origin="lower", extent=cut.extent, interpolation="bicubic", **style
            )
            ax.set_xlim(cut.window[:2])
            ax.set_ylim(cut.window[2:])
            ax.set_axis_off()
            if letters:
                faint: dict[str, Any] = {"color": _FAINT, "fontsize": 9, "transform": ax.transAxes}
                ax.text(0.01, 0.5, cut.letters[0], va="center", **faint)
                ax.text(0.5, 0.99, cut.letters[1], ha="center", va="top", **faint)
            axes.append(ax)
            left += width + gap
        return axes, drawn

    def colourbar(
        self, drawn: Any, row: int, labels: tuple[str, ...], ticks: tuple[float, ...]
    ) -> None:
        """Put a slim colour bar into the title line of the right-hand panel of a row."""
        top = self._TOP - row * self.height
        bar = self.figure.add_axes((self._RIGHT - 0.13, top - 0.0105, 0.1, 0.006))
        self.figure.colorbar(drawn, cax=bar, orientation="horizontal", ticks=ticks)
        bar.set_xticklabels(labels, fontsize=7, color=_FAINT)
        bar.tick_params(length=0, pad=1.5)
        bar.spines[:].set_visible(False)
        for child in bar.get_children():
            if hasattr(child, "set_edgecolor"):
                child.set_edgecolor("none")


def _draw_grid(axes: list[Axes], points: NDArray[np.float64], slices: list[_Slice]) -> None:
    from matplotlib.collections import LineCollection

    for ax, cut in zip(axes, slices, strict=True):
        down, right = (a for a in range(3) if a != cut.axis)
        plane = cut.of(points)[..., [2 - right, 2 - down]]
        rows, columns = (
            max(1, round(_LINE_EVERY_MM / (abs(b - a) / n)))
            for (a, b), n in zip((cut.extent[2:], cut.extent[:2]), plane.shape[:2], strict=True)
        )
        lines = [*plane[::rows], *plane[:, ::columns].swapaxes(0, 1)]
        ax.add_collection(LineCollection(lines, colors="white", linewidths=0.55, alpha=0.75))


def _checkerboard(shape: tuple[int, ...], spacing: NDArray[np.float64]) -> NDArray[np.bool_]:
    index = np.indices(shape)
    squares: NDArray[np.int_] = sum(
        np.floor(axis * step / _SQUARE_MM).astype(int)
        for axis, step in zip(index, spacing[::-1], strict=True)
    )
    even: NDArray[np.bool_] = squares % 2 == 0
    return even


def _interleave(
    fixed: NDArray[np.float32], image: NDArray[np.float32], board: NDArray[np.bool_]
) -> NDArray[np.float32]:
    """Return RGB: the fixed image in grey, the other one tinted, in alternating squares."""
    from matplotlib.colors import to_rgb

    black = np.array(to_rgb(_BACKGROUND))
    tint = 0.45 + 0.55 * np.array(to_rgb(_WARM))
    brightness = np.clip(np.where(board, fixed, image), 0, 1)[..., None]
    colours: NDArray[np.float32] = black + brightness * (
        np.where(board[..., None], 1.0, tint) - black
    )
    return colours


def _colours(*stops: str) -> Colormap:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("", stops)
