"""A part of a page that shows two images over each other, slice by slice, with sliders.

The images travel in the page itself, each as one picture of all its slices side by side, from which
the script takes the slices of every plane. Nothing else is loaded, and without a script the rest of
the page is there all the same.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from jaxreg.registration.report.pictures import BACKGROUND, FAINT, TEXT, Shown

__all__ = ["VIEWER_STYLE", "viewer"]

_MOST_VOXELS = 4_000_000
"""A picture of so many takes one to two megabytes in the page."""

VIEWER_STYLE = f"""
.viewer {{ display: flex; flex-wrap: wrap; gap: 12px 32px; align-items: flex-start; }}
.viewer .stage {{ position: relative; flex: none; touch-action: none; cursor: col-resize; }}
.viewer canvas {{ display: block; width: 100%; height: 100%; background: #000; }}
.viewer .stage span {{ position: absolute; padding: 2px 6px; color: {TEXT}; pointer-events: none;
  text-shadow: 0 0 3px {BACKGROUND}, 0 0 3px {BACKGROUND}, 0 0 6px {BACKGROUND}; }}
.viewer .line {{ position: absolute; top: 0; bottom: 0; width: 2px; margin-left: -1px;
  background: #ff9a3d; pointer-events: none; }}
.viewer .controls {{ flex: 1 1 300px; max-width: 460px; display: grid; gap: 14px; }}
.viewer fieldset {{ border: 1px solid #2a303a; border-radius: 6px; margin: 0; padding: 6px 12px; }}
.viewer legend, .viewer .range span {{ color: {FAINT}; }}
.viewer label {{ margin-right: 16px; white-space: nowrap; }}
.viewer .range {{ display: grid; grid-template-columns: 1fr auto; gap: 4px 12px; margin: 0;
  white-space: normal; }}
.viewer .range input {{ grid-column: 1 / 3; width: 100%; margin: 0; }}
.viewer input {{ accent-color: #ff9a3d; }}
.viewer :focus-visible {{ outline: 2px solid #4aa3ff; outline-offset: 3px; }}
"""

_SCRIPT = """
(async () => {
  const about = JSON.parse(document.getElementById("viewer-about").textContent);
  const [width, depth, height] = about.size;  // left, posterior, superior
  const byId = (name) => document.getElementById("viewer-" + name);

  // All slices of an image lie side by side in one picture; of its grey values one channel is kept.
  const read = async (picture) => {
    await picture.decode();
    const sheet = document.createElement("canvas");
    sheet.width = picture.naturalWidth;
    sheet.height = picture.naturalHeight;
    const context = sheet.getContext("2d", { willReadFrequently: true });
    context.drawImage(picture, 0, 0);
    const values = new Uint8Array(width * depth * height);
    for (let k = 0; k < height; k++) {
      const left = (k % about.columns) * width, top = Math.floor(k / about.columns) * depth;
      const tile = context.getImageData(left, top, width, depth).data;
      for (let i = 0; i < width * depth; i++) values[k * width * depth + i] = tile[4 * i];
    }
    return values;
  };
  const images = await Promise.all(about.names.map((_, k) => read(byId("image-" + k))));

  // Of each plane: its size, the axis that it is cut across, and where a pixel's value stands.
  const planes = {
    axial: { across: 2, right: 0, down: 1, letters: ["R", "A"],
      at: (x, y, k) => (k * depth + y) * width + x },
    coronal: { across: 1, right: 0, down: 2, letters: ["R", "S"],
      at: (x, y, k) => ((height - 1 - y) * depth + k) * width + x },
    sagittal: { across: 0, right: 1, down: 2, letters: ["A", "S"],
      at: (x, y, k) => ((height - 1 - y) * depth + x) * width + k },
  };
  const chosen = (name) => document.querySelector(`input[name=viewer-${name}]:checked`).value;
  const canvas = byId("canvas"), context = canvas.getContext("2d");
  const slice = byId("slice"), blend = byId("blend"), stage = byId("stage");

  const layOut = () => {
    const plane = planes[chosen("plane")];
    canvas.width = about.size[plane.right];
    canvas.height = about.size[plane.down];
    const length = canvas.width * about.spacing[plane.right];
    const tall = canvas.height * about.spacing[plane.down];
    const scale = Math.min(620 / length, 620 / tall, (document.body.clientWidth - 48) / length);
    stage.style.width = length * scale + "px";
    stage.style.height = tall * scale + "px";
    slice.max = about.size[plane.across] - 1;
    slice.value = about.start[plane.across];
    byId("left").textContent = plane.letters[0];
    byId("top").textContent = plane.letters[1];
    slice.closest("label").hidden = about.flat;
    byId("planes").hidden = about.flat;
    byId("left").hidden = byId("top").hidden = about.flat;
    draw();
  };

  const draw = () => {
    const name = chosen("plane"), plane = planes[name], k = Number(slice.value);
    const fade = chosen("mode") === "fade", share = Number(blend.value) / 100;
    const which = Number(chosen("other"));
    const [below, above] = [images[0], images[which]];
    const picture = context.createImageData(canvas.width, canvas.height);
    const edge = Math.round(share * canvas.width);
    for (let y = 0, p = 0; y < canvas.height; y++) {
      for (let x = 0; x < canvas.width; x++, p += 4) {
        const at = plane.at(x, y, k);
        const value = fade ? (1 - share) * below[at] + share * above[at]
          : x < edge ? below[at] : above[at];
        picture.data[p] = picture.data[p + 1] = picture.data[p + 2] = value;
        picture.data[p + 3] = 255;
      }
    }
    context.putImageData(picture, 0, 0);
    byId("line").hidden = fade;
    byId("line").style.left = (100 * edge) / canvas.width + "%";
    const percent = blend.value + " %", number = `${k + 1} of ${about.size[plane.across]}`;
    const mixed = fade ? `${percent} ${about.names[which]}`
      : `${about.names[0]} left of ${percent}, ${about.names[which]} right of it`;
    byId("slice-text").value = number;
    byId("blend-text").value = percent;
    byId("blend-name").textContent = fade ? "Fade" : "Swipe";
    byId("below").textContent = about.names[0];
    byId("above").textContent = about.names[which];
    slice.setAttribute("aria-valuetext", "slice " + number);
    blend.setAttribute("aria-valuetext", mixed);
    canvas.setAttribute("aria-label",
      (about.flat ? "image" : `${name} slice ${number}`) + ": " + mixed);
    canvas.dataset.drawn = [name, k, fade ? "fade" : "swipe", blend.value, which].join(" ");
  };

  for (const input of document.querySelectorAll(".viewer input")) {
    input.addEventListener("input", input.name === "viewer-plane" ? layOut : draw);
  }
  window.addEventListener("resize", layOut);
  const follow = (event) => {
    if (!event.buttons) return;
    const box = canvas.getBoundingClientRect();
    const share = (event.clientX - box.left) / box.width;
    blend.value = Math.round(100 * Math.min(1, Math.max(0, share)));
    draw();
  };
  stage.addEventListener("pointerdown", (event) => {
    stage.setPointerCapture(event.pointerId);
    follow(event);
  });
  stage.addEventListener("pointermove", follow);
  const move = (slider, steps) => {
    slider.value = Number(slider.value) + steps;
    draw();
  };
  // The wheel scrolls the page until the image has the focus, by a click, say.
  stage.addEventListener("wheel", (event) => {
    if (about.flat || document.activeElement !== stage) return;
    event.preventDefault();
    move(slice, Math.sign(event.deltaY));
  }, { passive: false });
  const keys = { ArrowLeft: [blend, -1], ArrowRight: [blend, 1], PageDown: [slice, -10],
    ArrowDown: [slice, -1], ArrowUp: [slice, 1], PageUp: [slice, 10] };
  stage.addEventListener("keydown", (event) => {
    if (!(event.key in keys)) return;
    event.preventDefault();
    move(...keys[event.key]);
  });
  layOut();
})();
"""


def viewer(shown: Shown, fixed: str, others: Mapping[str, int]) -> str:
    """Return HTML that shows the fixed image and another one over each other.

    Parameters
    ----------
    shown
        The images.
    fixed
        What the fixed one is called.
    others
        What the others are called, with their numbers in `Shown.others`; the first is shown first.

    Returns
    -------
    str
        For the body of a page whose style has `VIEWER_STYLE`, once.
    """
    images = [shown.fixed, *(shown.others[number] for number in others.values())]
    small = [_shrunk(image, shown.view.spacing[::-1]) for image in images]
    names = [fixed, *others]
    sheets = [_sheet(image) for image, _ in small]
    image, spacing = small[0]
    columns = sheets[0][1]
    size = image.shape[::-1]
    about = {
        "names": names,
        "size": size,
        "spacing": spacing[::-1].tolist(),
        "columns": columns,
        "start": _middle(image)[::-1],
        "flat": shown.ndim == 2,
    }
    # In JSON "<" stands in texts alone; escaped, it cannot end the script.
    told = json.dumps(about).replace("<", "\\u003c")
    pictures = "".join(
        f'<img hidden id="viewer-image-{k}" alt="all slices of {html.escape(name)}" src="{source}">'
        for k, (name, (source, _)) in enumerate(zip(names, sheets, strict=True))
    )
    compared = _choice("other", f"Over {fixed}", {str(k): n for k, n in enumerate(others, 1)})
    mode = _choice("mode", "By", {"swipe": "swipe", "fade": "fade"})
    planes = _choice("plane", "Plane", {p: p for p in ("axial", "coronal", "sagittal")}, "planes")
    return f"""<section class="viewer" aria-label="Slices, with sliders">
<div class="stage" id="viewer-stage" tabindex="0" role="group"
aria-label="Image; arrows to the sides swipe or fade, up and down change the slice">
<canvas id="viewer-canvas" role="img"></canvas>
<div class="line" id="viewer-line"></div>
<span id="viewer-below" style="left: 0; bottom: 0"></span>
<span id="viewer-above" style="right: 0; bottom: 0"></span>
<span id="viewer-left" style="left: 0; top: 48%"></span>
<span id="viewer-top" style="left: 49%; top: 0"></span></div>
<div class="controls">
{_range("blend", '<span id="viewer-blend-name">Swipe</span>', 50, 100)}
{_range("slice", "<span>Slice</span>", 0, 0)}
{planes}
{mode}
{compared}
<p>Drag on the image to swipe or fade. After a click on it, or reached by Tab, arrow keys to the
sides do the same, and up, down and the wheel show other slices.</p>
<noscript>The sliders need JavaScript.</noscript>
</div>{pictures}</section>
<script type="application/json" id="viewer-about">{told}</script>
<script>{_SCRIPT}</script>"""


def _range(name: str, label: str, value: int, most: int) -> str:
    return (
        f'<label class="range">{label}<output id="viewer-{name}-text" for="viewer-{name}"></output>'
        f'<input type="range" id="viewer-{name}" min="0" max="{most}" value="{value}"></label>'
    )


def _choice(name: str, legend: str, options: Mapping[str, str], ident: str = "") -> str:
    inputs = "".join(
        f'<label><input type="radio" name="viewer-{name}" value="{value}"'
        f"{' checked' if number == 0 else ''}> {html.escape(text)}</label>"
        for number, (value, text) in enumerate(options.items())
    )
    own = f' id="viewer-{ident}"' if ident else ""
    own += " hidden" if len(options) == 1 else ""
    return f"<fieldset{own}><legend>{html.escape(legend)}</legend>{inputs}</fieldset>"


def _middle(image: NDArray[np.float32]) -> list[int]:
    """Return the middle of what is shown, as (superior, posterior, left)."""
    occupied = np.argwhere(image > 0.05)
    if not len(occupied):
        return [size // 2 for size in image.shape]
    return [int(value) for value in np.round(occupied.mean(axis=0))]


def _shrunk(
    image: NDArray[np.float32], spacing: NDArray[np.float64]
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Make an image small enough for a page by means over larger voxels; with their spacing."""
    sizes = np.array(image.shape)
    finest = float(spacing.min())

    def fewer(voxel: float) -> NDArray[np.int64]:
        parts: NDArray[np.int64] = np.floor(sizes * np.minimum(1, spacing / voxel)).astype(np.int64)
        return np.maximum(1, parts)

    while fewer(finest).prod() > _MOST_VOXELS:
        finest *= 1.02
    goal = fewer(finest)
    for axis, (size, less) in enumerate(zip(sizes, goal, strict=True)):
        if less < size:
            image = np.moveaxis(
                np.tensordot(_means(int(size), int(less)), image, (1, axis)), 0, axis
            )
    return image, spacing * sizes / goal


def _means(size: int, less: int) -> NDArray[np.float32]:
    """Return the weights ``(less, size)`` by which parts of an axis of that size are averaged."""
    edges = np.linspace(0, size, less + 1)
    low, high = np.arange(size), np.arange(1, size + 1)
    overlap = np.minimum(edges[1:, None], high) - np.maximum(edges[:-1, None], low)
    weights: NDArray[np.float32] = (np.maximum(overlap, 0) * less / size).astype(np.float32)
    return weights


def _sheet(image: NDArray[np.float32]) -> tuple[str, int]:
    """Return all axial slices side by side as a data URI, and how many stand in a row."""
    from PIL import Image

    height, depth, width = image.shape
    columns = max(1, min(height, round(math.sqrt(height * depth / width))))
    rows = -(-height // columns)
    tiles = np.zeros((rows * columns, depth, width), np.uint8)
    tiles[:height] = np.round(255 * np.clip(image, 0, 1))
    sheet = tiles.reshape(rows, columns, depth, width).swapaxes(1, 2)
    buffer = io.BytesIO()
    Image.fromarray(sheet.reshape(rows * depth, columns * width)).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}", columns
