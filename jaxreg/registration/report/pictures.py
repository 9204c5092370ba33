"""The pictures of a report: slices that show whether a registration worked, and loss curves."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from jaxreg.registration.intensities import background
from jaxreg.registration.register import Registration, StageRecord
from jaxreg.registration.transforms.resampling import resample
from regkernels import Volume

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

__all__ = [
    "BACKGROUND",
    "FAINT",
    "TEXT",
    "Shown",
    "View",
    "draw_comparison",
    "draw_contours",
    "draw_labels",
    "draw_losses",
    "draw_slices",
]

BACKGROUND = "#0e1116"
TEXT = "#e6e9ee"
FAINT = "#8b93a1"
_COLD, _WARM = "#4aa3ff", "#ff9a3d"
_DIVERGING = ("#d6ecff", _COLD, "#123456", BACKGROUND, "#5a2b0c", _WARM, "#ffe9d1")

# These lengths are parts of the longest side of what is shown.
_MARGIN = 1 / 24
_SQUARE = 1 / 12
_LINE_EVERY = 1 / 36


@dataclasses.dataclass(frozen=True)
class Shown:
    """Images as they are looked at: turned to the patient, in grey values from 0 to 1.

    Grey values span the background of an image and its object, of which a hundredth is left out.
    Of several channels the mean is shown.
    """

    view: View
    ndim: int
    fixed: NDArray[np.float32]
    """(superior, posterior, left), as all of them."""
    others: tuple[NDArray[np.float32], ...]

    @classmethod
    def of(cls, fixed: Volume, moving: Volume, others: Sequence[Volume]) -> Shown:
        """Prepare images.

        Parameters
        ----------
        fixed
            Gives the grid.
        moving
            On its own grid; what lies outside of it does not change how bright it is shown.
        others
            What it becomes on the fixed grid, by one transform or another.
        """
        view = View.of(fixed)
        window = _window(view.scalar(moving))
        return cls(
            view,
            fixed.ndim,
            np.clip(_scaled(view.scalar(fixed)), 0, 1),
            tuple(np.clip(_scaled(view.scalar(other), window), 0, 1) for other in others),
        )

    @classmethod
    def of_registration(cls, result: Registration) -> Shown:
        """Prepare a registration: the moving image as its header places it, and moved."""
        before = resample(result.moving, result.fixed, outside=result.outside)
        return cls.of(result.fixed, result.moving, (before, result.moved))

    def differences(self) -> list[NDArray[np.float32]]:
        """Return what differs, after matching gain and offset to the fixed image.

        All get those of the last one, or the differences could not be compared.
        """
        last = self.others[-1]
        gain, offset = np.polyfit(last.ravel(), self.fixed.ravel(), 1) if np.ptp(last) else (1, 0)
        return [gain * image + offset - self.fixed for image in self.others]


def draw_slices(
    result: Registration,
    shown: Shown,
    *,
    title: str,
    subtitle: str = "",
    names: tuple[str, str] = ("", ""),
) -> Figure:
    """Draw a registration in eight panels.

    The fixed image; the moving image as its header places it, and moved; the deformed grid on the
    logarithm of the Jacobian determinant (the affine left out); differences and checkerboards
    before and after. Of volumes each panel has an axial, a coronal and a sagittal slice through
    the middle of the fixed one, radiological (the patient's right on the left), and everything is
    true to scale in millimetres.

    Parameters
    ----------
    result
        From `register`.
    shown
        Its images.
    title, subtitle
        Printed above the panels.
    names
        What the fixed and the moving image show.

    Returns
    -------
    matplotlib.figure.Figure
        13 inches wide.
    """
    view, (before, moved) = shown.view, shown.others
    log_jacobian = np.log2(np.maximum(view.arrange(_in_space(result.jacobian)), 2.0**-8))
    slices = _middle_slices(shown.fixed, view.spacing, shown.ndim)
    growth: dict[str, Any] = {"cmap": _colours(*_DIVERGING), "vmin": -1, "vmax": 1}

    panels = _Panels(slices, title, subtitle)
    panels.image(_joined("Fixed", names[0]), shown.fixed, _gray(), letters=True)
    panels.image(_joined("Moving, as loaded", names[1]), before, _gray())
    panels.image("Moved", moved, _gray())
    axes, drawn = panels.image("Grid, log₂ Jacobian", log_jacobian, growth)
    if result.transform.displacement is not None:
        points = view.deformed_points(_in_space(np.asarray(result.transform.displacement[0]), 3))
        _draw_grid(axes, points, slices, _LINE_EVERY * _length(slices))
    panels.colourbar(drawn, "halved", "doubled")
    words = ("before", "after")
    panels.differences(shown, [f"Difference {w}" for w in words], ("fixed", "moving"))
    panels.checkerboards(shown, [f"Checkerboard {w}" for w in words], ("fixed", "moving"))
    return panels.figure


def draw_comparison(
    shown: Shown, *, title: str, subtitle: str = "", names: tuple[str, str] = ("", "")
) -> Figure:
    """Draw two images, A and B, in four panels: either, what differs, and a checkerboard.

    Parameters
    ----------
    shown
        The images; of the others, the only one.
    title, subtitle
        Printed above the panels.
    names
        What they show.

    Returns
    -------
    matplotlib.figure.Figure
        13 inches wide.
    """
    slices = _middle_slices(shown.fixed, shown.view.spacing, shown.ndim)
    panels = _Panels(slices, title, subtitle, number=4)
    panels.image(_joined("A", names[0]), shown.fixed, _gray(), letters=True)
    panels.image(_joined("B", names[1]), shown.others[0], _gray())
    panels.differences(shown, ["Difference"], ("A", "B"))
    panels.checkerboards(shown, ["Checkerboard"], ("A", "B"))
    return panels.figure


def draw_labels(
    labels: Volume,
    other: Volume,
    *,
    title: str,
    subtitle: str = "",
    names: tuple[str, str] = ("", ""),
) -> Figure:
    """Draw two label maps, A and B, in three panels: either, and where they differ.

    Parameters
    ----------
    labels, other
        On one grid; 0 is the background.
    title, subtitle
        Printed above the panels.
    names
        What they show.

    Returns
    -------
    matplotlib.figure.Figure
        13 inches wide.
    """
    from matplotlib import colormaps
    from matplotlib.colors import to_rgb

    view = View.of(labels)
    known = np.unique([*np.unique(labels.array), *np.unique(other.array), 0])
    a, b = (
        view.arrange(_in_space(np.searchsorted(known, np.asarray(volume.array))))
        for volume in (labels, other)
    )
    wheel = [to_rgb(colour) for colour in colormaps["tab20"].colors]  # type: ignore[attr-defined]
    colours = np.array(
        [to_rgb(BACKGROUND), *(wheel[k % len(wheel)] for k in range(len(known) - 1))], np.float32
    )
    agreement = np.zeros(a.shape, np.intp)
    for number, where in enumerate(
        ((a == b) & (a > 0), (a > 0) & (b == 0), (a == 0) & (b > 0), (a != b) & (a > 0) & (b > 0)),
        start=1,
    ):
        agreement[where] = number
    signs = np.array([*map(to_rgb, (BACKGROUND, "#4a515d", _COLD, _WARM, "white"))], np.float32)
    slices = _middle_slices(((a > 0) | (b > 0)).astype(np.float32), view.spacing, labels.ndim)
    panels = _Panels(slices, title, subtitle, number=3)
    style = {"interpolation": "nearest"}
    panels.image(_joined("A", names[0]), colours[a], style, letters=True)
    panels.image(_joined("B", names[1]), colours[b], style)
    panels.image("Where they differ", signs[agreement], style)
    panels.caption("alike grey, A alone blue, B alone orange, two labels white")
    return panels.figure


def draw_contours(
    fixed: Volume,
    placed: Mapping[str, Volume],
    reference: Volume,
    *,
    level: float,
    title: str,
    subtitle: str = "",
) -> Figure:
    """Draw one image with the contours of others, in a panel each.

    Parameters
    ----------
    fixed
        What is shown in grey.
    placed
        By the titles of their panels, the volumes of the contours, on the fixed grid.
    reference
        A volume whose contours every panel shows beneath the others, on the fixed grid.
    level
        The intensity of the contours.
    title, subtitle
        Printed above the panels.

    Returns
    -------
    matplotlib.figure.Figure
        13 inches wide.
    """
    view = View.of(fixed)
    image, beneath = view.scalar(fixed), view.scalar(reference)
    image = _scaled(image)
    slices = _middle_slices(image, view.spacing, fixed.ndim)
    panels = _Panels(slices, title, subtitle, number=len(placed))
    for number, (name, volume) in enumerate(placed.items()):
        axes, _ = panels.image(name, image, _gray(white=1.4), letters=number == 0)
        for contoured, colour in ((beneath, _COLD), (view.scalar(volume), _WARM)):
            for ax, cut in zip(axes, slices, strict=True):
                section = cut.of(contoured)
                if section.min() < level < section.max():
                    style: dict[str, Any] = {"colors": [colour], "linewidths": 1.1}
                    ax.contour(section, [level], origin="lower", extent=cut.extent, **style)
    return panels.figure


def draw_losses(stages: tuple[StageRecord, ...]) -> Figure | None:
    """Draw the losses of the stages that iterate, a curve for each scale.

    Parameters
    ----------
    stages
        The records of a registration.

    Returns
    -------
    matplotlib.figure.Figure or None
        13 inches wide; None if there is nothing to draw.
    """
    import matplotlib.figure
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    curves = [stage for stage in stages if max(len(level.losses) for level in stage.levels) > 2]
    if not curves:
        return None
    figure = matplotlib.figure.Figure(figsize=(13, 3.2), facecolor=BACKGROUND, layout="constrained")
    FigureCanvasAgg(figure)
    for ax, stage in zip(np.atleast_1d(figure.subplots(1, len(curves))), curves, strict=True):
        colours = _colours(_COLD, "white", _WARM)(np.linspace(0, 1, len(stage.levels)))
        first = 0
        for level, colour in zip(stage.levels, colours, strict=True):
            steps = first + np.arange(len(level.losses))
            ax.plot(steps, level.losses, color=colour, linewidth=1.6, label=f"1/{level.scale:g}")
            first += len(level.losses)
        ax.set_title(stage.name, color=TEXT, fontsize=10.5, loc="left")
        ax.set_xlabel("iteration", color=FAINT, fontsize=9)
        ax.set_ylabel("loss", color=FAINT, fontsize=9)
        ax.set_facecolor(BACKGROUND)
        ax.tick_params(colors=FAINT, labelsize=8)
        ax.grid(color=FAINT, alpha=0.2, linewidth=0.5)
        for side, spine in ax.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(FAINT)
        legend = ax.legend(title="resolution", fontsize=8, title_fontsize=8, frameon=False)
        for text in (legend.get_title(), *legend.get_texts()):
            text.set_color(TEXT)
    return figure


def _gray(white: float = 1.0) -> dict[str, Any]:
    return {"cmap": _colours(BACKGROUND, "white"), "vmin": 0, "vmax": white}


def _length(slices: Sequence[_Slice]) -> float:
    """Return the longest side of what is shown, in millimetres."""
    return max(abs(b - a) for cut in slices for a, b in (cut.window[:2], cut.window[2:]))


def _joined(*words: str) -> str:
    return " · ".join(filter(None, words))


def _in_space(array: NDArray[Any], components: int = 0) -> NDArray[Any]:
    """Turn ``(Y, X)`` into ``(1, Y, X)`` and ``(Y, X, 2)`` into ``(1, Y, X, 3)``."""
    if array.ndim == 3 + bool(components):
        return array
    padding = [(0, 0)] * array.ndim
    if components:
        padding[-1] = (0, components - array.shape[-1])
    return np.pad(array, padding)[None]


def _window(image: NDArray[np.float32]) -> tuple[np.float32, np.float32]:
    """Return two intensities between which nearly all of an object is, and its background."""
    (value,), (spread,), (clear,) = map(np.asarray, background(jnp.asarray(image)[None, None]))
    away = image[np.abs(image - value) > spread] if clear else image
    if not away.size:
        return value, value + 1
    low, high = np.percentile(away, (0.5, 99.5)).astype(np.float32)
    if clear:
        low, high = min(low, value), max(high, value)
    return low, high if high > low else low + 1


def _scaled(
    image: NDArray[np.float32], window: tuple[np.float32, np.float32] | None = None
) -> NDArray[np.float32]:
    """Map an image so that its window, or another one, becomes 0 to 1."""
    low, high = window or _window(image)
    scaled: NDArray[np.float32] = (image - low) / (high - low)
    return scaled


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
        """Find the turn that brings a volume's axes nearest to the patient's.

        An image in the plane becomes an axial slice, with x to the left.
        """
        direction, spacing = np.eye(3), np.ones(3)
        direction[: volume.ndim, : volume.ndim] = volume.grid.direction
        spacing[: volume.ndim] = volume.grid.spacing
        order = max(
            itertools.permutations(range(3)),
            key=lambda axes: sum(abs(direction[k, axis]) for k, axis in enumerate(axes)),
        )
        signs = tuple(1 if direction[k, axis] >= 0 else -1 for k, axis in enumerate(order))
        return cls(order, signs, spacing[list(order)])

    def arrange(self, array: NDArray[Any]) -> NDArray[Any]:
        """Turn ``(Z, Y, X, ...)`` to (superior, posterior, left, ...)."""
        axes = [2 - axis for axis in reversed(self.order)]
        array = array.transpose(*axes, *range(3, array.ndim))
        return array[tuple(slice(None, None, sign) for sign in reversed(self.signs))]

    def scalar(self, volume: Volume) -> NDArray[np.float32]:
        """Turn a volume's intensities, averaged over its channels."""
        values = np.asarray(volume.array, np.float32).reshape(-1, *volume.shape)
        return self.arrange(_in_space(values.mean(axis=0)))

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


def _middle_slices(
    image: NDArray[np.float32], spacing: NDArray[np.float64], ndim: int
) -> list[_Slice]:
    occupied = np.argwhere(image > 0.05)
    if occupied.size == 0:
        occupied = np.array([[0, 0, 0], np.array(image.shape) - 1])
    first, last = occupied.min(axis=0), occupied.max(axis=0)
    middle = np.round(occupied.mean(axis=0)).astype(int)
    step = spacing[::-1]
    margin = _MARGIN * ((last - first) * step).max()
    # Beside the plane between the hemispheres there is more to see than in it.
    middle[2] = min(middle[2] + round(0.9 * margin / step[2]), last[2])
    low, high = first * step - margin, last * step + margin
    edges = (np.array(image.shape) - 0.5) * step
    slices = []
    shown = ((0, ("R", "A")), (1, ("R", "S")), (2, ("A", "S")))
    for axis, letters in shown[: 1 if ndim == 2 else 3]:
        down, right = (a for a in range(3) if a != axis)
        box = (-step[right] / 2, edges[right], -step[down] / 2, edges[down])
        window = (low[right], high[right], low[down], high[down])
        if axis == 0:  # posterior grows downwards
            window = (*window[:2], window[3], window[2])
        slices.append(_Slice(axis, int(middle[axis]), box, window, letters))
    return slices


class _Panels:
    """A figure of equal panels; each shows all slices, at one scale.

    Two columns where a panel has three slices beside each other, four where it has one.
    """

    # These lengths are in inches.
    _WIDTH, _SIDE, _HEADER, _TITLE, _GAP, _SPACE = 13.0, 0.325, 0.88, 0.27, 0.39, 0.3

    def __init__(self, slices: list[_Slice], title: str, subtitle: str, number: int = 8) -> None:
        import matplotlib.figure
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        self.slices = slices
        self.columns = 2 if len(slices) > 1 else 4
        self.shown = 0
        between = self._GAP * (self.columns - 1)
        self.panel_width = (self._WIDTH - 2 * self._SIDE - between) / self.columns
        widths = [abs(s.window[1] - s.window[0]) for s in slices]
        heights = [abs(s.window[3] - s.window[2]) for s in slices]
        # The scale, inches per millimetre, is the same for all slices.
        scale = min(0.97 * self.panel_width / sum(widths), 5 / max(heights))
        self.sizes = [(w * scale, h * scale) for w, h in zip(widths, heights, strict=True)]
        self.panel_height = self._TITLE + self._SPACE + max(height for _, height in self.sizes)
        self.height = self._HEADER + math.ceil(number / self.columns) * self.panel_height

        self.figure = matplotlib.figure.Figure(
            figsize=(self._WIDTH, self.height), facecolor=BACKGROUND
        )
        FigureCanvasAgg(self.figure)
        self._text(self._SIDE, 0.36, title, color=TEXT, fontsize=17, fontweight="bold")
        self._text(self._SIDE, 0.67, subtitle, color=FAINT, fontsize=10.5)
        note = "radiological view (R on the left) · slices true to scale"
        if len(slices) > 1:
            self._text(self._WIDTH - self._SIDE, 0.67, note, color=FAINT, fontsize=9, ha="right")

    def image(
        self, title: str, volume: NDArray[Any], style: dict[str, Any], letters: bool = False
    ) -> tuple[list[Axes], Any]:
        """Show the slices of an arranged volume in the next panel; return axes and last image."""
        from matplotlib.patheffects import withStroke

        row, column = divmod(self.shown, self.columns)
        self.shown += 1
        left = self._SIDE + column * (self.panel_width + self._GAP)
        top = self._HEADER + row * self.panel_height
        self._text(left, top + self._TITLE / 2, title, color=TEXT, fontsize=10.5)
        gap = (self.panel_width - sum(w for w, _ in self.sizes)) / len(self.sizes)
        room = self.panel_height - self._TITLE - self._SPACE
        axes, drawn = [], None
        for cut, (width, height) in zip(self.slices, self.sizes, strict=True):
            ax = self._axes(left, top + self._TITLE + (room - height) / 2, width, height)
            drawn = ax.imshow(
                cut.of(volume),
                origin="lower",
                extent=cut.extent,
                **{"interpolation": "bicubic", **style},
            )
            ax.set_xlim(cut.window[:2])
            ax.set_ylim(cut.window[2:])
            ax.set_axis_off()
            if letters and len(self.slices) > 1:
                style_of_letters: dict[str, Any] = {
                    "color": TEXT,
                    "fontsize": 9,
                    "transform": ax.transAxes,
                    # A rim keeps letters readable on bright tissue.
                    "path_effects": [withStroke(linewidth=2.5, foreground=BACKGROUND)],
                }
                ax.text(0.01, 0.5, cut.letters[0], va="center", **style_of_letters)
                ax.text(0.5, 0.99, cut.letters[1], ha="center", va="top", **style_of_letters)
            axes.append(ax)
            left += width + gap
        return axes, drawn

    def colourbar(self, drawn: Any, low: str, high: str) -> None:
        """Put a slim colour bar below the last panel, between what its ends mean."""
        centre, top = self._below()
        half = 0.1 * self.panel_width if self.columns == 2 else 0.3
        bar = self._axes(centre - half, top - 0.035, 2 * half, 0.07)
        self.figure.colorbar(drawn, cax=bar, orientation="horizontal", ticks=[])
        bar.spines[:].set_visible(False)
        for child in bar.get_children():
            if hasattr(child, "set_edgecolor"):
                child.set_edgecolor("none")
        self._text(centre - half - 0.07, top, low, color=FAINT, fontsize=9, ha="right")
        self._text(centre + half + 0.07, top, high, color=FAINT, fontsize=9)

    def differences(self, shown: Shown, titles: Sequence[str], names: tuple[str, str]) -> None:
        """Show how far each of the other images is from the fixed one."""
        style: dict[str, Any] = {"cmap": _colours(*_DIVERGING), "vmin": -0.6, "vmax": 0.6}
        for title, difference in zip(titles, shown.differences(), strict=True):
            _, drawn = self.image(title, difference, style)
            self.colourbar(drawn, f"{names[0]} brighter", f"{names[1]} brighter")

    def checkerboards(self, shown: Shown, titles: Sequence[str], names: tuple[str, str]) -> None:
        """Show each of the other images in turn with the fixed one."""
        square = _SQUARE * _length(self.slices)
        board = _checkerboard(shown.fixed.shape, shown.view.spacing, square)
        for title, image in zip(titles, shown.others, strict=True):
            self.image(title, _interleave(shown.fixed, image, board), {})
            self.caption(f"{names[0]} grey, {names[1]} orange")

    def caption(self, text: str) -> None:
        """Put a line of text below the last panel."""
        self._text(*self._below(), text, color=FAINT, fontsize=9, ha="center")

    def _below(self) -> tuple[float, float]:
        """Return where the middle of the line below the last panel is."""
        row, column = divmod(self.shown - 1, self.columns)
        left = self._SIDE + column * (self.panel_width + self._GAP)
        width = sum(w for w, _ in self.sizes) if len(self.sizes) == 1 else self.panel_width
        return left + width / 2, self._HEADER + (row + 1) * self.panel_height - self._SPACE / 2

    def _text(self, left: float, top: float, text: str, **style: Any) -> None:
        self.figure.text(left / self._WIDTH, 1 - top / self.height, text, va="center", **style)

    def _axes(self, left: float, top: float, width: float, height: float) -> Axes:
        bottom = self.height - top - height
        return self.figure.add_axes(
            (
                left / self._WIDTH,
                bottom / self.height,
                width / self._WIDTH,
                height / self.height,
            )
        )


def _draw_grid(
    axes: list[Axes], points: NDArray[np.float64], slices: list[_Slice], spacing: float
) -> None:
    from matplotlib.collections import LineCollection

    for ax, cut in zip(axes, slices, strict=True):
        down, right = (a for a in range(3) if a != cut.axis)
        plane = cut.of(points)[..., [2 - right, 2 - down]]
        rows, columns = (
            max(1, round(spacing / (abs(b - a) / n)))
            for (a, b), n in zip((cut.extent[2:], cut.extent[:2]), plane.shape[:2], strict=True)
        )
        lines = [*plane[::rows], *plane[:, ::columns].swapaxes(0, 1)]
        ax.add_collection(LineCollection(lines, colors="white", linewidths=0.55, alpha=0.75))


def _checkerboard(
    shape: tuple[int, ...], spacing: NDArray[np.float64], square: float
) -> NDArray[np.bool_]:
    index = np.indices(shape)
    squares: NDArray[np.int_] = sum(
        np.floor(axis * step / square).astype(int)
        for axis, step in zip(index, spacing[::-1], strict=True)
    )
    even: NDArray[np.bool_] = squares % 2 == 0
    return even


def _interleave(
    fixed: NDArray[np.float32], image: NDArray[np.float32], board: NDArray[np.bool_]
) -> NDArray[np.float32]:
    """Return RGB: the fixed image in grey, the other one tinted, in alternating squares."""
    from matplotlib.colors import to_rgb

    black = np.array(to_rgb(BACKGROUND))
    tint = 0.45 + 0.55 * np.array(to_rgb(_WARM))
    brightness = np.clip(np.where(board, fixed, image), 0, 1)[..., None]
    colours: NDArray[np.float32] = black + brightness * (
        np.where(board[..., None], 1.0, tint) - black
    )
    return colours


def _colours(*stops: str) -> Colormap:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("", stops)
