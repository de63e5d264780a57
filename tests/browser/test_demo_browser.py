"""The page that `timm-bcos demo` serves, in a browser: at the width of a desk and of a phone."""

import re
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlparse

import pytest

from tests.helpers import PHOTOS
from tests.helpers.browser import launch_chromium, needs_browser

if TYPE_CHECKING:
    from playwright.sync_api import Browser, FrameLocator, Locator, Page

pytest.importorskip("gradio")
pytestmark = needs_browser

CLOTHES = PHOTOS / "clothes"
DESK, PHONE = 1280, 390  # widths
ON_BOTH = pytest.mark.parametrize("width", [DESK, PHONE], ids=["desk", "phone"])
ON_PHONE_IF_SLOW = pytest.mark.parametrize(
    "width", [DESK, pytest.param(PHONE, marks=pytest.mark.slow)], ids=["desk", "phone"]
)


class Demo:
    """The demo in a browser.

    Attributes:
        page: Page of the browser.
        requests: URLs of its requests.
    """

    def __init__(self, page: "Page", address: str) -> None:
        self.page, self.address = page, address
        self.requests: list[str] = []
        page.on("request", lambda request: self.requests.append(request.url))
        page.goto(address)
        self.wait_for("outwear")  # the first example

    @property
    def explanation(self) -> "FrameLocator":
        return self.page.frame_locator("#explanation iframe")

    def wait_for(self, name: str) -> None:
        self.explanation.locator("#target option:checked", has_text=name).wait_for(state="attached")

    def upload(self, photo: Path) -> None:
        self.page.set_input_files("#photo input", photo)

    def press(self, button: str) -> None:
        self.page.locator(button).scroll_into_view_if_needed()
        self.page.wait_for_timeout(200)  # until the browser knows that the sandboxed frame has moved away
        self.page.click(button)

    def probabilities(self) -> dict[str, float]:
        rows = [row.inner_text().split("\n") for row in self.explanation.locator("#bars button").all()]
        return {name: float(share.rstrip("% \u00a0")) for name, share in rows}

    def sums(self) -> dict[str, list[float]]:
        """Rows of the table of sums: their numbers."""
        rows = self.explanation.locator("#sums tr:has(td)").all()
        return {
            row.locator("th").inner_text(): [number_of(cell) for cell in row.locator("td").all_inner_texts()]
            for row in rows
        }

    def drag(self, picture: int, start: tuple[float, float], end: tuple[float, float]) -> None:
        """From one place of a picture to another, in shares of its width and height."""
        canvas = self.explanation.locator("figure canvas").nth(picture)
        canvas.scroll_into_view_if_needed()
        box = canvas.bounding_box()
        assert box is not None
        (x0, y0), (x1, y1) = ((box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in (start, end))
        self.page.mouse.move(x0, y0)
        self.page.mouse.down()
        self.page.mouse.move(x1, y1, steps=4)
        self.page.mouse.up()


def number_of(text: str) -> float:
    return float(text.replace("\u2212", "-").replace("+", ""))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    from timm_bcos.demo.app import build_app, serving
    from timm_bcos.demo.inference import embedded_models

    with serving(build_app(embedded_models()[1:]), free_port()) as address:
        yield address


@pytest.fixture(scope="module")
def chromium() -> Iterator["Browser"]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = launch_chromium(playwright)
        yield browser
        browser.close()


@contextmanager
def opened(chromium: "Browser", address: str, width: int = DESK) -> Iterator[Demo]:
    is_phone = width < 600
    context = chromium.new_context(
        viewport=dict(width=width, height=900), has_touch=is_phone, is_mobile=is_phone, accept_downloads=True
    )
    yield Demo(context.new_page(), address)
    context.close()


@pytest.fixture
def demo(width: int, chromium: "Browser", address: str) -> Iterator[Demo]:
    with opened(chromium, address, width) as demo:
        yield demo


@ON_BOTH
def test_from_a_photo_to_a_rectangle(demo: Demo, tmp_path: Path) -> None:
    demo.upload(CLOTHES / "hat.jpg")
    demo.wait_for("hat")
    probabilities = demo.probabilities()
    assert next(iter(probabilities)) == "hat" and probabilities["hat"] > 90
    assert demo.explanation.locator("figure canvas").count() == 4
    sums = demo.sums()
    assert sum(sums["All pixels"] + sums["Constants"]) == pytest.approx(sums["Model’s logit"][0], abs=2e-4)

    second = list(probabilities)[1]
    demo.explanation.locator("#bars button").nth(1).click()
    demo.wait_for(second)
    with demo.page.expect_download() as download:
        demo.explanation.locator(".download").nth(1).click()
    download.value.save_as(tmp_path / "picture.png")
    assert download.value.suggested_filename.endswith(f"explanation-{second}.png")

    demo.explanation.locator("#against").select_option(label="and not hat")
    titles = demo.explanation.locator("figcaption .title").all_inner_texts()
    assert titles == ["Photo", f"For {second}", "For hat", "Difference", "Overlay"]
    demo.drag(3, (0.2, 0.3), (0.7, 0.6))
    rows = demo.sums()
    (inside,) = (values for name, values in rows.items() if name.startswith("Inside"))
    for k in range(3):
        parts = inside[k] + rows["Outside"][k] + rows["Constants"][k]
        assert parts == pytest.approx(rows["Model’s logit"][k], abs=3e-4)
    assert rows["Model’s logit"][2] == pytest.approx(rows["Model’s logit"][0] - rows["Model’s logit"][1], abs=2e-4)
    assert demo.page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "as wide as the window"


@ON_PHONE_IF_SLOW
def test_examples_models_and_further_classes(demo: Demo) -> None:
    demo.page.locator("#photo .examples button[title=shoes]").click()
    demo.wait_for("shoes")
    choose(demo.page.locator("#model input"), "bcos_cifar_resnet20")
    demo.wait_for("cat")  # its own first example
    choose(demo.page.locator("#more input"), "truck")
    demo.explanation.locator("#bars .name", has_text="truck").wait_for()
    assert len(demo.probabilities()) == 6


def choose(menu: "Locator", name: str) -> None:
    """In one of Gradio's menus."""
    menu.scroll_into_view_if_needed()
    menu.page.wait_for_timeout(300)  # as in `press`
    menu.click()
    menu.page.get_by_role("option", name=re.compile(name)).click()


@ON_PHONE_IF_SLOW
def test_other_methods_and_inner_units(demo: Demo) -> None:
    demo.press("#compare")
    demo.page.locator("#maps figure").nth(3).wait_for()
    assert demo.page.locator("#maps figcaption").all_inner_texts() == [
        "bcos",
        "input_x_gradient",
        "guided_backprop",
        "gradcam",
    ]
    demo.page.get_by_role("tab", name="Inner units").click()
    demo.press("#show")
    demo.page.locator("#units figure").nth(5).wait_for()
    assert all(title.startswith("unit ") for title in demo.page.locator("#units figcaption").all_inner_texts())


@ON_PHONE_IF_SLOW
def test_broken_files_get_a_message(demo: Demo, tmp_path: Path) -> None:
    broken, huge = tmp_path / "cut.jpg", tmp_path / "huge.jpg"
    broken.write_bytes((CLOTHES / "hat.jpg").read_bytes()[:9000])
    demo.upload(broken)
    notice = demo.page.locator("#notice .bcos-notice")
    notice.wait_for()
    assert "broken image" in notice.inner_text()
    huge.write_bytes(bytes(21_000_000))
    demo.upload(huge)
    error = demo.page.locator("#photo .error")
    error.wait_for()
    assert error.inner_text() == "The file has 21 MB, the limit is 20 MB: send a smaller one."
    demo.upload(CLOTHES / "pants.jpg")
    demo.wait_for("pants")
    notice.wait_for(state="detached")
    assert "Traceback" not in demo.page.content()


def test_two_pages_at_once(chromium: "Browser", address: str) -> None:
    """Each shows its own photo, also if their requests overlap."""
    with opened(chromium, address) as first, opened(chromium, address, PHONE) as second:
        for mine, yours in (("hat", "pants"), ("shoes", "jacket")):
            first.upload(CLOTHES / f"{mine}.jpg")
            second.upload(CLOTHES / f"{yours}.jpg")
            first.wait_for(mine)
            second.wait_for(dict(jacket="outwear").get(yours, yours))
            assert next(iter(first.probabilities())) == mine


def test_a_new_photo_ends_a_comparison(chromium: "Browser", address: str) -> None:
    with opened(chromium, address) as demo:
        choose(demo.page.locator("#methods input"), "rise")
        demo.page.keyboard.press("Escape")
        demo.press("#compare")
        demo.page.locator("#maps .missing", has_text="takes about").wait_for()
        demo.upload(CLOTHES / "pants.jpg")
        demo.wait_for("pants")
        demo.page.locator("#maps figure").first.wait_for(state="detached")
        assert next(iter(demo.probabilities())) == "pants"
        assert demo.page.locator("#maps figure").count() == 0


def test_no_other_host_is_contacted_and_nothing_is_stored(
    chromium: "Browser", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A session that uses every control."""
    from timm_bcos.demo.app import build_app, serving
    from timm_bcos.demo.inference import embedded_models

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "gradio"))
    with serving(build_app(embedded_models()[1:]), free_port()) as address:
        with opened(chromium, address) as demo:
            demo.upload(CLOTHES / "hat.jpg")
            demo.wait_for("hat")
            choose(demo.page.locator("#more input"), "pants")
            demo.page.keyboard.press("Escape")
            demo.explanation.locator("#bars .name", has_text="pants").wait_for()
            choose(demo.page.locator("#target input"), "shoes")
            demo.press("#compare")
            demo.page.locator("#maps figure").nth(3).wait_for()
            demo.page.get_by_role("tab", name="Inner units").click()
            choose(demo.page.locator("#layer input"), "blocks.2")
            demo.press("#show")
            demo.page.locator("#units figure").nth(5).wait_for()
            demo.page.locator("#photo .examples button[title=shoes]").scroll_into_view_if_needed()
            demo.press("#photo .examples button[title=shoes]")
            demo.wait_for("shoes")
            choose(demo.page.locator("#model input"), "bcos_cifar_resnet20")
            demo.wait_for("cat")
            kept = [path for path in tmp_path.rglob("*") if path.is_file()]
            hosts = {
                urlparse(url).hostname for url in demo.requests if not url.startswith(("data:", "blob:", "about:"))
            }
        kept += [path for path in tmp_path.rglob("*") if path.is_file()]
    kept += [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not kept
    assert hosts == {urlparse(address).hostname}
