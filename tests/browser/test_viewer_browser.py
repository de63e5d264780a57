"""The page about one photo in a browser: what it shows, and what it does."""

import html
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.helpers.browser import launch_chromium, needs_browser
from tests.helpers.explained_photos import HOSTILE, NAMES, clothes_network, explained_hat, photo_of_a_hat, small
from timm_bcos import Explanation, Violation, contrast
from timm_bcos.explanation.scale import default_scale
from timm_bcos.explanation.visualization import on_white
from timm_bcos.viewer.document import save_viewer

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = needs_browser


@pytest.fixture(scope="module")
def explanation() -> Explanation:
    return explained_hat()


@pytest.fixture(scope="module")
def chromium() -> "Iterator[Browser]":
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = launch_chromium(playwright)
        yield browser
        browser.close()


class Viewer:
    """A page in a browser that must neither complain nor ask for anything else."""

    def __init__(self, browser: "Browser", width: int) -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 900}, has_touch=width < 500)
        self.page: Page = self.context.new_page()
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))

    def open(self, path: Path, scale: int | None = 0) -> None:
        """`scale` is the binary logarithm of the side of the cells; None for that with which the page opens."""
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("html[data-ready]")
        if scale is not None:
            self.page.locator("#scale").fill(str(scale))

    def frame(self, number: int) -> dict[str, float]:
        """Where a picture lies in the window."""
        frame = self.page.locator(".frame").nth(number)
        frame.scroll_into_view_if_needed()
        box = frame.bounding_box()
        assert box is not None
        return dict(box)

    def point(self, number: int, row: int, column: int, size: int) -> tuple[float, float]:
        """The middle of a pixel in the window."""
        box = self.frame(number)
        return box["x"] + box["width"] * (column + 0.5) / size, box["y"] + box["height"] * (row + 0.5) / size

    def hover(self, number: int, row: int, column: int, size: int) -> None:
        self.page.mouse.move(*self.point(number, row, column, size))

    def drag(self, number: int, start: tuple[int, int], end: tuple[int, int], size: int) -> None:
        self.hover(number, *start, size)
        self.page.mouse.down()
        self.page.mouse.move(*self.point(number, *end, size), steps=5)
        self.page.mouse.up()

    def sums(self) -> dict[str, list[float]]:
        """Rows of the table of sums: their kind and the numbers that one reads there."""
        rows = self.page.locator("#sums tbody tr").all()
        texts = {str(row.get_attribute("class")): row.locator("data").all_inner_texts() for row in rows}
        return {kind: list(map(number, values)) for kind, values in texts.items()}

    def text(self, selector: str) -> str:
        return self.page.locator(selector).inner_text()

    def is_as_wide_as_the_window(self) -> bool:
        return self.page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def number(text: str) -> float:
    return float(text.replace("−", "-"))


def resolution(text: str) -> float:
    """Half a unit of the last digit shown."""
    return 0.51 * 10.0 ** -len(text.partition(".")[2])


@pytest.fixture
def viewer(chromium: "Browser", request: pytest.FixtureRequest) -> Iterator[Viewer]:
    viewer = Viewer(chromium, getattr(request, "param", 1280))
    yield viewer
    viewer.context.close()
    assert not viewer.complaints
    assert all(url.startswith(("file:", "data:", "blob:", "about:")) for url in viewer.requests)


@pytest.fixture(scope="module")
def hat(explanation: Explanation, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pages") / "hat.html"
    save_viewer(explanation, path, NAMES, "hat.jpg, a network")
    return path


def assert_close(text: str, expected: float | Tensor) -> None:
    assert len(text.partition(".")[2]) >= 4
    assert number(text) == pytest.approx(float(expected), abs=resolution(text))


def test_opens_with_the_best_class_and_its_pictures(viewer: Viewer, hat: Path, explanation: Explanation) -> None:
    viewer.open(hat)
    assert viewer.page.title() == "hat.jpg, a network"
    assert viewer.page.locator("figcaption .title").all_inner_texts() == [
        "Photo", "Explanation", "Contributions", "Overlay",
    ]  # fmt: skip
    assert viewer.page.locator("#bars .name").all_inner_texts() == [NAMES[c] for c in explanation.target]
    assert viewer.text("#bars button:first-child .share") == f"{100 * explanation.probability[0].max():.1f}\u00a0%"
    sums = viewer.sums()
    assert sums["logit"] == [pytest.approx(explanation.logit[0].item(), abs=1e-4)]
    assert sums["outside"][0] + sums["constants"][0] == pytest.approx(sums["total"][0], abs=2e-4)
    assert sums["total"] == sums["logit"]
    assert viewer.page.locator("#violations").is_hidden()
    at = explanation.contribution_map[0].abs().argmax().item()
    assert viewer.text("#place") == f"Row {at // 160}, column {at % 160} (the strongest)"


@pytest.mark.parametrize("scale", [2, 4, 5])
def test_cells_are_sums_of_their_pixels(viewer: Viewer, hat: Path, explanation: Explanation, scale: int) -> None:
    viewer.open(hat, scale)
    side, (row, column) = 2**scale, (121, 47)
    assert viewer.text("#cells") == f"{side} × {side} pixels"
    viewer.hover(2, row, column, 160)
    top, left = row // side * side, column // side * side
    assert viewer.text("#pixel-title") == "Cell"
    assert viewer.text("#place") == f"Rows {top} to {top + side - 1}, columns {left} to {left + side - 1}"
    cells = explanation[:2].at_scale(side)
    assert_close(viewer.text("#contribution"), cells[0, row // side, column // side])
    assert viewer.page.locator(".tip:visible").all_inner_texts() == [viewer.text("#contribution")]
    viewer.page.select_option("#against", "1")
    assert_close(viewer.text("#contribution"), (cells[0] - cells[1])[row // side, column // side])
    box, frame = viewer.page.locator(".pixel").nth(2).bounding_box(), viewer.frame(2)
    assert box is not None
    assert box["width"] / frame["width"] == pytest.approx(side / 160, rel=0.1)
    assert sum(viewer.sums()[kind][2] for kind in ("outside", "constants")) == pytest.approx(
        viewer.sums()["logit"][2], abs=3e-4
    )


def test_opens_at_the_scale_of_figures(viewer: Viewer, hat: Path, explanation: Explanation) -> None:
    viewer.open(hat, None)
    side = default_scale(160, 160)
    assert viewer.text("#cells") == f"{side} × {side} pixels"
    cells = explanation[0].at_scale(side)[0]
    best = int(cells.abs().argmax())
    row, column = best // cells.shape[1] * side, best % cells.shape[1] * side
    place = f"Rows {row} to {row + side - 1}, columns {column} to {column + side - 1} (the strongest)"
    assert viewer.text("#place") == place
    assert_close(viewer.text("#contribution"), cells.flatten()[best])
    viewer.page.focus("#scale")
    for _ in range(9):
        viewer.page.keyboard.press("ArrowRight")
    assert viewer.text("#cells") == "32 × 32 pixels"
    for _ in range(9):
        viewer.page.keyboard.press("ArrowLeft")
    assert viewer.text("#cells") == "single pixels"
    assert viewer.text("#pixel-title") == "Pixel"


def test_a_click_explains_another_class(viewer: Viewer, hat: Path, explanation: Explanation) -> None:
    viewer.open(hat)
    viewer.page.click("#bars button:nth-child(2)")
    assert viewer.page.locator("#target option:checked").inner_text() == NAMES[explanation.target[1]]
    assert viewer.sums()["logit"] == [pytest.approx(explanation.logit[1].item(), abs=1e-4)]
    viewer.hover(1, 80, 70, 160)
    assert_close(viewer.text("#contribution"), explanation.contribution_map[1, 80, 70])


@pytest.mark.parametrize("picture", range(4))
def test_pointing_reads_a_pixel(viewer: Viewer, hat: Path, explanation: Explanation, picture: int) -> None:
    viewer.open(hat)
    viewer.hover(picture, 120, 47, 160)
    assert viewer.text("#place") == "Row 120, column 47"
    expected = explanation.contribution_map[0, 120, 47]
    assert_close(viewer.text("#contribution"), expected)
    assert viewer.page.locator(".tip:visible").all_inner_texts() == [viewer.text("#contribution")]
    color = viewer.page.locator(".swatch i").evaluate("e => getComputedStyle(e).backgroundColor")
    row = (explanation.to_rgba()[0, 120, 47, :3] * 255).round().int().tolist()
    assert color == f"rgb({row[0]}, {row[1]}, {row[2]})"
    strength = explanation.weights[0].norm(dim=0)
    shown = float(re.findall(r"[\d.]+", viewer.text(".swatch .note"))[0])
    assert shown == pytest.approx(100 * (strength[120, 47] / strength.max()).item(), rel=0.1, abs=0.06)


def test_a_rectangle_splits_the_sum(viewer: Viewer, hat: Path, explanation: Explanation) -> None:
    viewer.open(hat)
    viewer.drag(2, (100, 90), (20, 35), 160)
    sums = viewer.sums()
    inside = explanation.contribution_map[0, 20:101, 35:91].double().sum().item()
    assert sums["inside"] == [pytest.approx(inside, abs=1e-4)]
    assert viewer.text("#sums .inside th") == "Inside, 56\u00a0×\u00a081"
    parts = sums["inside"][0] + sums["outside"][0] + sums["constants"][0]
    assert parts == pytest.approx(sums["logit"][0], abs=2e-4)
    viewer.page.mouse.down()
    viewer.page.mouse.up()
    assert "inside" not in viewer.sums()


def test_why_one_and_not_another(viewer: Viewer, hat: Path, explanation: Explanation) -> None:
    a, b = explanation.target[:2].tolist()
    difference = contrast(clothes_network(), photo_of_a_hat(), a, b)
    viewer.open(hat)
    viewer.page.select_option("#against", label=f"and not {NAMES[b]}")
    assert viewer.page.locator("figcaption .title").all_inner_texts() == [
        "Photo", f"For {NAMES[a]}", f"For {NAMES[b]}", "Difference", "Overlay",
    ]  # fmt: skip
    viewer.drag(3, (40, 30), (110, 120), 160)
    assert_close(viewer.text("#contribution"), difference.contribution_map[0, 110, 120])
    sums = viewer.sums()
    inside = [
        m[40:111, 30:121].double().sum().item()
        for m in (*explanation.contribution_map[:2], difference.contribution_map[0])
    ]
    assert sums["inside"] == pytest.approx(inside, abs=2e-4)
    assert sums["logit"][2] == pytest.approx(difference.logit.item(), abs=2e-4)
    assert sums["constants"][2] == 0
    for i in range(3):
        parts = sum(sums[kind][i] for kind in ("inside", "outside", "constants"))
        assert parts == pytest.approx(sums["logit"][i], abs=3e-4)
    viewer.page.select_option("#against", "")
    assert viewer.page.locator("figure").count() == 4
    save_viewer(explanation, hat.with_name("difference.html"), NAMES, versus=b)
    viewer.open(hat.with_name("difference.html"))
    assert viewer.page.locator("figcaption .title").all_inner_texts()[3] == "Difference"


def test_keys_do_what_the_mouse_does(viewer: Viewer, hat: Path, explanation: Explanation) -> None:
    viewer.open(hat)
    viewer.hover(0, 50, 60, 160)
    viewer.page.focus("#pictures")
    viewer.page.keyboard.press("ArrowDown")
    viewer.page.keyboard.press("ArrowLeft")
    assert viewer.text("#place") == "Row 51, column 59"
    for _ in range(3):
        viewer.page.keyboard.press("Shift+ArrowRight")
    viewer.page.keyboard.press("Shift+ArrowUp")
    assert viewer.text("#sums .inside th") == "Inside, 4\u00a0×\u00a02"
    expected = explanation.contribution_map[0, 50:52, 59:63].double().sum().item()
    assert viewer.sums()["inside"] == [pytest.approx(expected, abs=1e-4)]
    viewer.page.keyboard.press("Escape")
    assert "inside" not in viewer.sums()
    viewer.page.focus("#bars button:nth-child(3)")
    viewer.page.keyboard.press("Enter")
    assert viewer.page.locator("#target option:checked").inner_text() == NAMES[explanation.target[2]]


def test_pictures_can_be_kept(viewer: Viewer, hat: Path, explanation: Explanation, tmp_path: Path) -> None:
    viewer.open(hat)
    for number_, name in enumerate(("photo", "explanation-hat", "contributions-hat", "overlay-hat")):
        with viewer.page.expect_download() as download:
            viewer.page.locator(".download").nth(number_).click()
        assert download.value.suggested_filename == f"hat-jpg-a-network-{name}.png"
        download.value.save_as(tmp_path / f"{name}.png")
    photo, drawn, maps = (
        torch.from_numpy(np.array(Image.open(tmp_path / f"{name}.png").convert("RGBA"))).double() / 255
        for name in ("photo", "explanation-hat", "contributions-hat")
    )
    torch.testing.assert_close(photo[..., :3].movedim(-1, 0), explanation.image[0].double(), atol=0.6 / 255, rtol=0)
    expected = on_white(explanation.to_rgba()[0]).double()
    torch.testing.assert_close(on_white(drawn), expected, atol=2 / 255, rtol=0)
    red, blue = maps[..., 0], maps[..., 2]
    strong = explanation.contribution_map[0].abs() > 0.1 * explanation.contribution_map[0].abs().max()
    assert torch.equal((red > blue)[strong], (explanation.contribution_map[0] > 0)[strong])


@pytest.mark.parametrize("viewer", [390, 1280], indirect=True)
def test_fits_its_window(viewer: Viewer, explanation: Explanation, tmp_path: Path) -> None:
    names = [f"{name}, a class with quite a long name" for name in NAMES]
    save_viewer(
        replace(explanation, violations=(Violation("a.path" * 30, "gelu", "unknown"),)),
        tmp_path / "page.html",
        names,
        "x" * 200,
    )
    viewer.open(tmp_path / "page.html")
    assert viewer.is_as_wide_as_the_window()
    viewer.page.select_option("#against", "2")
    viewer.drag(1, (20, 20), (90, 90), 160)
    assert "inside" in viewer.sums()
    assert viewer.is_as_wide_as_the_window()


@pytest.mark.parametrize("viewer", [390], indirect=True)
def test_a_tap_reads_a_pixel(viewer: Viewer, hat: Path, explanation: Explanation) -> None:
    viewer.open(hat)
    viewer.page.touchscreen.tap(*viewer.point(1, 90, 50, 160))
    row, column = map(int, re.findall(r"\d+", viewer.text("#place")))
    assert abs(row - 90) <= 1 and abs(column - 50) <= 1
    assert_close(viewer.text("#contribution"), explanation.contribution_map[0, row, column])
    assert viewer.page.locator(".tip:visible").count() == 1


@pytest.mark.parametrize("viewer", [390], indirect=True)
@pytest.mark.parametrize(("step", "draws"), [((4, 1), True), ((0, -6), False)])
def test_a_finger_draws_sideways_and_scrolls_downwards(
    viewer: Viewer, hat: Path, step: tuple[int, int], draws: bool
) -> None:
    viewer.open(hat)
    x, y = viewer.point(0, 70, 40, 160)
    before = viewer.page.evaluate("scrollY")
    touch = viewer.context.new_cdp_session(viewer.page)
    for i in range(21):
        points = [{"x": x + i * step[0], "y": y + i * step[1]}]
        touch.send("Input.dispatchTouchEvent", {"type": "touchMove" if i else "touchStart", "touchPoints": points})
    touch.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    assert ("inside" in viewer.sums()) == draws
    assert (viewer.page.evaluate("scrollY") > before) == (not draws)


def test_hostile_names_are_text(viewer: Viewer, tmp_path: Path) -> None:
    save_viewer(small(), tmp_path / "page.html", [HOSTILE] * 10, HOSTILE)
    viewer.open(tmp_path / "page.html")
    viewer.page.select_option("#against", "1")
    assert viewer.page.evaluate("window.broken") is None
    assert viewer.page.locator("img").count() == 0
    assert viewer.text(".eyebrow") == HOSTILE == viewer.text("#bars button:first-child .name")


def test_inexact_explanations_say_so(viewer: Viewer, tmp_path: Path) -> None:
    one = small()
    inexact = replace(one, violations=(Violation("head.<b>", "gelu", "added"),), constant_bias=one.constant_bias - 1)
    save_viewer(inexact, tmp_path / "page.html")
    viewer.open(tmp_path / "page.html")
    assert "This explanation is not exact" in viewer.text("#violations")
    assert "head.<b>: gelu adds a value" in viewer.text("#violations")
    assert viewer.page.locator("#promise").is_hidden()
    sums = viewer.sums()
    assert sums["rest"] == [pytest.approx(1, abs=1e-4)]
    assert sum(sums[k][0] for k in ("outside", "constants", "rest")) == pytest.approx(sums["total"][0], abs=1e-3)


def test_grey_networks(viewer: Viewer, tmp_path: Path) -> None:
    one = small(channels=1)
    save_viewer(one, tmp_path / "page.html")
    viewer.open(tmp_path / "page.html")
    assert viewer.page.locator("#bars .name").first.inner_text() == f"class {one.target[0]}"
    viewer.hover(1, 10, 20, 32)
    assert_close(viewer.text("#contribution"), one.contribution_map[0, 10, 20])
    color = viewer.page.locator(".swatch i").evaluate("e => getComputedStyle(e).backgroundColor")
    red, green, blue = re.findall(r"\d+", color)
    assert red == green == blue


def test_one_class_alone_has_nothing_to_compare(viewer: Viewer, tmp_path: Path) -> None:
    save_viewer(replace(small(classes=1), probability_kind="softmax"), tmp_path / "page.html")
    viewer.open(tmp_path / "page.html")
    assert viewer.page.locator("#against").is_hidden()
    assert viewer.text("#kind") == "1 of 10 classes, probabilities by softmax"


LISTENER = "onmessage = (e) => { document.querySelector('iframe').height = e.data.height; }"


@pytest.mark.parametrize("sandbox", ["", 'sandbox="allow-scripts allow-downloads"'])
def test_in_a_frame(viewer: Viewer, hat: Path, tmp_path: Path, sandbox: str) -> None:
    document = html.escape(hat.read_text(encoding="utf-8"))
    frame = f'<iframe {sandbox} width=1000 height=300 srcdoc="{document}"></iframe>'
    (tmp_path / "outer.html").write_text(f"<!doctype html>{frame}<script>{LISTENER}</script>")
    viewer.page.goto((tmp_path / "outer.html").as_uri())
    inner = viewer.page.frame_locator("iframe")
    inner.locator("html[data-ready]").wait_for()
    inner.locator("#bars button").nth(1).click()
    box = viewer.page.locator("iframe").bounding_box()
    assert box is not None
    assert box["height"] > 600, "as high as it says to be"
    with viewer.page.expect_download() as download:
        inner.locator(".download").first.click()
    assert download.value.suggested_filename.endswith("photo.png")
