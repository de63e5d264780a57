"""Take the documentation's screenshots of the demo (docs/images/demo-*.webp) and of the viewer (viewer-desktop.webp).

    python scripts/maintenance/screenshots.py

Needs Chromium (apt-get install chromium) and the extras `demo`, `attribution` and `test`.
"""

import io
import shutil
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

import timm_bcos
from timm_bcos.cli.outputs import OutputPaths
from timm_bcos.cli.photo_writer import PhotoWriter
from timm_bcos.demo.app import build_app, demo_models, serving
from timm_bcos.files import atomic_path

ROOT = Path(__file__).parents[2]
MODEL = "bcos_efficientnet_lite0.clothing"
PHOTO = ROOT / "scripts" / "photos" / "coffee.jpg"
CLOTHES = ROOT / "scripts" / "photos" / "clothes" / "shoes.jpg"
WINDOWS = {"desktop": (1280, 1240), "phone": (390, 2090)}  # as high as the explanation, which scrolling would cut


def show(page: Any, is_phone: bool) -> None:
    """A photo, two classes, a rectangle."""
    explanation = page.frame_locator("#explanation iframe")
    explanation.locator("#bars button").first.wait_for()
    page.set_input_files("#photo input", PHOTO)
    explanation.locator("#target option:checked", has_text="espresso").wait_for(state="attached")
    if not is_phone:
        explanation.locator("#against").select_option(index=2)
    page.wait_for_timeout(300)
    box = explanation.locator("figure canvas").nth(1).bounding_box()
    page.mouse.move(box["x"] + 0.25 * box["width"], box["y"] + 0.2 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + 0.7 * box["width"], box["y"] + 0.45 * box["height"], steps=5)
    page.mouse.up()
    page.wait_for_timeout(300)


def demo(browser: Any) -> None:
    """The demo on a desktop and on a phone."""
    with serving(build_app(demo_models())) as address:
        for name, (width, height) in WINDOWS.items():
            is_phone = name == "phone"
            viewport: Any = dict(width=width, height=height)
            page = browser.new_page(viewport=viewport, device_scale_factor=1.5, has_touch=is_phone, is_mobile=is_phone)
            page.goto(address)
            show(page, is_phone)
            save(page, f"demo-{name}")


def viewer(browser: Any) -> None:
    """The HTML file that `timm-bcos explain --html` writes, with two classes, a rectangle and a pixel."""
    with tempfile.TemporaryDirectory() as folder:
        PhotoWriter(timm_bcos.Explainer(MODEL), OutputPaths(Path(folder)), html=True).write(CLOTHES)
        page = browser.new_page(viewport=dict(width=1280, height=980), device_scale_factor=1.5)
        page.goto(next(Path(folder).glob("*.html")).as_uri())
        page.locator("#against").select_option(index=2)
        box = page.locator("figure canvas").nth(3).bounding_box()
        page.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 0.2 * box["height"])
        page.mouse.down()
        page.mouse.move(box["x"] + 0.95 * box["width"], box["y"] + 0.95 * box["height"], steps=5)
        page.mouse.up()
        page.mouse.move(box["x"] + 0.85 * box["width"], box["y"] + 0.55 * box["height"])
        page.wait_for_timeout(300)
        save(page, "viewer-desktop")


def save(page: Any, name: str) -> None:
    with atomic_path(ROOT / "docs" / "images" / f"{name}.webp") as path:
        Image.open(io.BytesIO(page.screenshot())).save(path, quality=85)


def main() -> None:
    with sync_playwright() as playwright:
        options: Any = dict(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        browser = playwright.chromium.launch(**options)
        viewer(browser)
        demo(browser)


if __name__ == "__main__":
    main()
