"""The report: one file that holds all it shows, with sliders that a person can use."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import Page, needs_browser, opened
from PIL import Image
from scenes import header, physical_grid, scene

from jaxreg.registration import Translation, register
from jaxreg.registration.report import viewer
from jaxreg.registration.report.page import write_report
from jaxreg.registration.report.pictures import Shown
from regkernels import Volume, rigid_motion


@pytest.fixture(scope="module", params=[3, 2], ids=["space", "plane"])
def report(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    fixed, moving = pair(request.param)
    result = register(fixed, moving, [Translation((2,), (20,))])
    write_report(result, path, title="<Moving> to fixed")
    return path


def pair(ndim: int) -> tuple[Volume, Volume]:
    volume = header((16, 18, 20)[3 - ndim :], (4.0, 4, 5)[:ndim])
    points = physical_grid(volume)
    return volume.with_array(scene(points)), volume.with_array(scene(points + 6))


class Elements(HTMLParser):
    """The elements of a page, with their attributes, and what its scripts and styles hold."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str]]] = []
        self.texts: dict[str, list[str]] = {}
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in ("meta", "img", "input", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.setdefault(self.open[-1] if self.open else "", []).append(data)

    def of(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.found if name == tag]


def test_the_page_is_well_formed_and_loads_nothing(report: Path) -> None:
    page = report.read_text()
    elements = Elements(page)
    assert elements.open == []
    for _, attributes in elements.found:
        assert not {"href", "srcset", "action"} & set(attributes)
        assert attributes.get("src", "data:").startswith("data:")
    assert not re.search(r"https?:|@import|url\(|import\(|fetch\(|XMLHttp", page)
    (policy,) = (meta["content"] for meta in elements.of("meta") if "http-equiv" in meta)
    assert "default-src 'none'; img-src data:" in policy
    assert len({a["id"] for _, a in elements.found if "id" in a}) == sum(
        "id" in a for _, a in elements.found
    )


def test_every_control_has_a_name_and_every_picture_a_description(report: Path) -> None:
    elements = Elements(report.read_text())
    assert all(image["alt"] for image in elements.of("img"))
    page = report.read_text()
    inputs = re.findall(r"<label[^>]*>(?:(?!</label>).)*<input", page, re.DOTALL)
    assert len(inputs) == len(elements.of("input")) == 2 + 3 + 2 + 2
    assert page.count("<legend>") == page.count("<fieldset") == 3
    assert {"viewer-blend", "viewer-slice"} == {
        control["id"] for control in elements.of("input") if control["type"] == "range"
    }


def decoded(page: str) -> tuple[dict[str, Any], list[np.ndarray]]:
    """What the page says of its images, and their pictures taken apart."""
    (text,) = re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', page)
    about = json.loads(text)
    width, depth, height = about["size"]
    images = []
    for source in re.findall(r'id="viewer-image-\d"[^>]*src="data:image/png;base64,([^"]*)"', page):
        sheet = np.asarray(Image.open(io.BytesIO(base64.b64decode(source))))
        tiles = sheet.reshape(-1, depth, about["columns"], width).swapaxes(1, 2)
        images.append(tiles.reshape(-1, depth, width)[:height])
    return about, images


def test_the_page_holds_the_images_in_grey_values() -> None:
    fixed, moving = pair(3)
    shown = Shown.of(fixed, moving, (moving, fixed))
    about, images = decoded(viewer.viewer(shown, "a </script> b", {"second": 1, "first": 0}))
    assert about["names"] == ["a </script> b", "second", "first"]
    assert about["size"] == [20, 18, 16]
    assert about["spacing"] == [4, 4, 5]
    for found, expected in zip(
        images, (shown.fixed, shown.others[1], shown.others[0]), strict=True
    ):
        np.testing.assert_array_equal(found, np.round(255 * expected))


def test_large_images_become_small_and_keep_their_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(viewer, "_MOST_VOXELS", 900)
    fixed, moving = pair(3)
    shown = Shown.of(fixed, moving, (moving,))
    about, (image, _) = decoded(viewer.viewer(shown, "A", {"B": 0}))
    size, spacing = np.array(about["size"]), np.array(about["spacing"])
    assert 500 < size.prod() <= 900
    np.testing.assert_allclose(size * spacing, [20 * 4, 18 * 4, 16 * 5])
    assert spacing.max() / spacing.min() < 1.4  # no axis is coarse alone
    # The centre of mass is where it was, from an outer edge.
    for array, voxel in ((image, spacing), (shown.fixed, np.array([4.0, 4, 5]))):
        weights = array.astype(np.float64)
        index = np.indices(array.shape)[::-1] + 0.5
        centre = [(axis * weights).sum() / weights.sum() for axis in index] * voxel
        if array is image:
            found = centre
    np.testing.assert_allclose(found, centre, atol=0.2)


def test_oblique_images_are_turned_to_the_patient() -> None:
    fixed, moving = pair(3)
    quarter = rigid_motion(90, (1, 0, 0), (0, 0, 0), (0, 0, 0))
    turned = [volume.moved_by(quarter) for volume in (fixed, moving)]
    shown = Shown.of(turned[0], turned[1], (turned[1],))
    about, _ = decoded(viewer.viewer(shown, "A", {"B": 0}))
    assert about["size"] == [20, 16, 18]


# --- in a browser -------------------------------------------------------------------------------

READ = """(() => {
  const canvas = document.getElementById("viewer-canvas");
  const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  return [canvas.width, canvas.height, Array.from(data).filter((_, k) => k % 4 === 0)];
})()"""
DRAWN = "document.getElementById('viewer-canvas').dataset.drawn"


def pixels(page: Page) -> np.ndarray:
    width, height, values = page.evaluate(READ)
    return np.array(values).reshape(height, width)


def choose(page: Page, name: str, value: str) -> None:
    """Click on a choice."""
    page.evaluate(f"document.querySelector('input[name=viewer-{name}][value=\"{value}\"]').click()")


def set_slider(page: Page, name: str, value: int) -> None:
    page.evaluate(
        f"(() => {{ const slider = document.getElementById('viewer-{name}');"
        f" slider.value = {value}; slider.dispatchEvent(new Event('input')); }})()"
    )


def cut(image: np.ndarray, plane: str, k: int) -> np.ndarray:
    """A slice of (superior, posterior, left) as it is shown: the head is up, the right is left."""
    axis = ("axial", "coronal", "sagittal").index(plane)
    section = image.take(k, axis)
    return section if plane == "axial" else section[::-1]


@needs_browser
def test_the_sliders_swipe_and_fade_through_the_slices(report: Path, tmp_path: Path) -> None:
    about, (fixed, moved, loaded) = decoded(report.read_text())
    flat = about["flat"]
    with opened(report, tmp_path) as page:
        page.wait_for(DRAWN)
        start = about["start"]
        assert page.evaluate(DRAWN) == f"axial {start[2]} swipe 50 1"
        for plane, across in (("axial", 2), ("coronal", 1), ("sagittal", 0)):
            if flat and plane != "axial":
                continue
            choose(page, "plane", plane)
            width = pixels(page).shape[1]
            for k in {start[across], 0, about["size"][across] - 1}:
                set_slider(page, "slice", k)
                under, over = cut(fixed, plane, k), cut(moved, plane, k)
                choose(page, "mode", "swipe")
                for share in (0, 30, 100):
                    set_slider(page, "blend", share)
                    left = np.arange(width) < round(share * width / 100 + 1e-9)
                    np.testing.assert_array_equal(pixels(page), np.where(left, under, over))
                choose(page, "mode", "fade")
                for share in (0, 30, 100):
                    set_slider(page, "blend", share)
                    mixed = (1 - share / 100) * under + share / 100 * over
                    np.testing.assert_allclose(pixels(page), mixed, atol=0.51)
        choose(page, "other", "2")
        np.testing.assert_array_equal(pixels(page), cut(loaded, plane if not flat else "axial", k))
        # True to scale: a millimetre is as wide as it is tall.
        box = page.evaluate(
            "(() => { const b = document.getElementById('viewer-stage').getBoundingClientRect();"
            " return [b.width, b.height]; })()"
        )
        right, down = (0, 1) if flat else (1, 2)
        lengths = [about["size"][axis] * about["spacing"][axis] for axis in (right, down)]
        assert box[0] / box[1] == pytest.approx(lengths[0] / lengths[1], rel=0.01)
        label = "document.getElementById('viewer-slice').closest('label')"
        assert page.evaluate(f"getComputedStyle({label}).display === 'none'") == flat
        assert page.complaints == []
        own = report.resolve().as_uri()
        assert [url for url in page.asked if not url.startswith(("data:", own))] == []


@needs_browser
def test_the_keyboard_is_enough(report: Path, tmp_path: Path) -> None:
    about, _ = decoded(report.read_text())
    flat = about["flat"]
    tab, left, up, right, down = 9, 37, 38, 39, 40
    with opened(report, tmp_path) as page:
        page.wait_for(DRAWN)
        reached = []
        for _ in range(8):
            page.press("Tab", tab)
            reached.append(
                page.evaluate("document.activeElement.id || document.activeElement.name")
            )
            if reached[-1] == "viewer-other":
                break
        controls = ["viewer-stage", "viewer-blend", "viewer-slice", "viewer-plane", "viewer-mode"]
        only = {"viewer-slice", "viewer-plane"} if flat else set()
        assert reached == [c for c in [*controls, "viewer-other"] if c not in only]
        # The image itself, then a slider, then a choice.
        k = about["start"][2]
        page.evaluate("document.getElementById('viewer-stage').focus()")
        for key, code in (("ArrowLeft", left), ("ArrowLeft", left), ("ArrowUp", up)):
            page.press(key, code)
        k += not flat
        assert page.evaluate(DRAWN) == f"axial {k} swipe 48 1"
        page.evaluate("document.getElementById('viewer-blend').focus()")
        page.press("ArrowRight", right)
        assert page.evaluate(DRAWN) == f"axial {k} swipe 49 1"
        label = page.evaluate("document.getElementById('viewer-canvas').getAttribute('aria-label')")
        where = "image" if flat else f"axial slice {k + 1} of 16"
        assert label == f"{where}: fixed left of 49 %, moved right of it"
        page.evaluate("document.querySelector('input[name=viewer-mode]').focus()")
        page.press("ArrowDown", down)
        assert page.evaluate(DRAWN) == f"axial {k} fade 49 1"
        assert page.evaluate("document.getElementById('viewer-line').hidden")


@needs_browser
def test_dragging_on_the_image_swipes_and_the_wheel_then_changes_the_slice(
    report: Path, tmp_path: Path
) -> None:
    about, _ = decoded(report.read_text())
    with opened(report, tmp_path) as page:
        page.wait_for(DRAWN)
        x, y, width, height = page.evaluate(
            "(() => { const stage = document.getElementById('viewer-stage');"
            " stage.scrollIntoView({block: 'center'}); const b = stage.getBoundingClientRect();"
            " return [b.x, b.y, b.width, b.height]; })()"
        )
        middle = y + height / 2
        page.mouse("mouseWheel", x + width / 2, middle, deltaX=0, deltaY=1)
        k = about["start"][2]
        assert page.evaluate(DRAWN) == f"axial {k} swipe 50 1"
        y = page.evaluate("document.getElementById('viewer-stage').getBoundingClientRect().y")
        middle = y + height / 2
        pressed: dict[str, Any] = {"button": "left", "buttons": 1}
        page.mouse("mousePressed", x + 0.8 * width, middle, clickCount=1, **pressed)
        page.mouse("mouseMoved", x + 0.25 * width, middle, **pressed)
        page.mouse("mouseReleased", x + 0.25 * width, middle, button="left", clickCount=1)
        page.wait_for(f"{DRAWN} === 'axial {k} swipe 25 1'")
        page.mouse("mouseWheel", x + width / 2, middle, deltaX=0, deltaY=1)
        page.wait_for(f"{DRAWN} === 'axial {k + (not about['flat'])} swipe 25 1'")
