"""A real browser for the tests of pages: Debian's Chromium, driven by Playwright."""

import importlib.util
import shutil
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Playwright

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

needs_browser = pytest.mark.skipif(
    CHROMIUM is None or importlib.util.find_spec("playwright") is None,
    reason="needs a browser: apt-get install chromium, pip install playwright",
)


def launch_chromium(playwright: "Playwright") -> "Browser":
    """Headless; without its sandbox, which root may not use."""
    return playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
