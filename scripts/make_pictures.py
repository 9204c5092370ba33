"""Make the pictures of docs/when_it_goes_wrong.md and docs/choosing.md from the shipped volumes.

python scripts/make_pictures.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from scipy.ndimage import gaussian_filter

from jaxreg.registration import (
    LNCC,
    Elasticity,
    Moments,
    Rigid,
    SyN,
    preset,
    register,
    resample,
)
from regkernels import AffineMap, Volume, read_volume, rigid_motion
from regkernels.data import load_multimodal_paths, load_pair_paths

DOCS = Path(__file__).parent.parent / "docs"


def draw(name: str, panels: list[tuple[str, np.ndarray, np.ndarray | None]]) -> None:
    """Draw slices side by side; where there is a second array it lies over the first, in red."""
    figure, axes = plt.subplots(1, len(panels), figsize=(2.4 * len(panels), 2.9), dpi=80)
    for axis, (title, below, above) in zip(axes, panels, strict=True):
        axis.imshow(below, cmap="gray", origin="lower")
        if above is not None:
            axis.imshow(np.ma.masked_less(above, 0.1), cmap="autumn", alpha=0.5, origin="lower")
        axis.set_title(title, fontsize=9)
        axis.axis("off")
    figure.tight_layout()
    figure.savefig(DOCS / name, pil_kwargs={"optimize": True})
    plt.close(figure)


def field_of_view() -> None:
    """Show a slab of a brain on the whole brain, before and after registration."""
    brain = read_volume(load_pair_paths().moving)
    motion = rigid_motion(15, (1, 2, 3), (12, -10, 8), brain.grid.centre())
    turned = np.asarray(resample(brain, brain, [AffineMap(np.linalg.inv(motion))]).array)
    planes = slice(35, 56)
    corner = (brain.grid.voxel_to_physical() @ [0, 0, planes.start, 1])[:3]
    slab = Volume.create(turned[planes], brain.grid.spacing, corner, brain.grid.direction)
    result = register(brain, slab, [Moments(), Rigid()])
    row = brain.shape[1] // 2
    whole = np.asarray(brain.array)[:, row]

    def over(volume: Volume) -> np.ndarray:
        return np.asarray(volume.array)[:, row] / np.asarray(slab.array).max()

    before = over(resample(slab, brain))
    draw(
        "field_of_view.png",
        [("fixed", whole, None), ("before", whole, before), ("rigid", whole, over(result.moved))],
    )


def background() -> None:
    """Show a moved CT with 0 outside, and with its own background."""
    head = read_volume(load_multimodal_paths().fixed)
    array = np.asarray(head.array, float)
    inside = gaussian_filter((array > 25).astype(float), 2) > 0.5
    ct = head.with_array(gaussian_filter(np.where(inside, 20 + array / 2, -1024), 0.7))
    motion = [AffineMap(rigid_motion(15, (1, 2, 3), (24, -20, 30), head.grid.centre()))]
    row = head.shape[1] // 2
    shown = [
        (title, np.asarray(resample(ct, ct, motion, outside=outside).array)[:, row], None)
        for title, outside in (("outside 0", 0), ("its background", "background"))
    ]
    draw("background.png", [("a CT", np.asarray(ct.array)[:, row], None), *shown])


def volumes_changed() -> None:
    """Show by how much deformations of a person onto a template change volumes."""
    fixed, moving = (read_volume(path) for path in load_pair_paths())
    row = fixed.shape[1] // 2
    *start, default = preset("default")
    schedule = {"scales": default.scales, "iterations": default.iterations}
    free = SyN(**schedule, regularisation=None, metric=LNCC(common_variance=0))
    stages = {
        "similarity alone": free,
        "default": default,
        "Elasticity(1.5)": SyN(**schedule, regularisation=Elasticity(1.5)),
    }
    figure, axes = plt.subplots(1, 4, figsize=(9.6, 3.2), dpi=80, layout="constrained")
    axes[0].imshow(np.asarray(fixed.array)[:, row], cmap="gray", origin="lower")
    axes[0].set_title("fixed", fontsize=9)
    for axis, (title, last) in zip(axes[1:], stages.items(), strict=True):
        result = register(fixed, moving, [*start, last])
        logarithm = np.log2(np.maximum(result.jacobian, 1e-3))[:, row]
        shown = axis.imshow(logarithm, cmap="RdBu_r", vmin=-3, vmax=3, origin="lower")
        axis.set_title(title, fontsize=9)
        print(title, f"determinants {result.folds.minimum:.2g} to {result.folds.maximum:.2g}")
    for axis in axes:
        axis.axis("off")
    bar = figure.colorbar(shown, ax=axes, shrink=0.8, ticks=[-3, 0, 3])
    bar.ax.set_yticklabels(["1/8", "1", "8"], fontsize=8)
    figure.savefig(DOCS / "volumes_changed.png", pil_kwargs={"optimize": True})
    plt.close(figure)


if __name__ == "__main__":
    field_of_view()
    background()
    volumes_changed()
