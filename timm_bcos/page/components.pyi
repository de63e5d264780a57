"""Gradio's HTML component twice over: a place for a photo, and a frame for a document. Neither writes files."""

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import gradio as gr

from .uploads import LARGEST, encode_file

__all__ = ["Frame", "PhotoZone", "example_props", "static"]


def static(name: str) -> str:
    """A file for the browser."""
    return files(__package__).joinpath("static", name).read_text(encoding="utf-8")


def example_props(photos: Sequence[Path]) -> list[dict[str, str]]:
    """Examples as the browser wants them: names and data addresses."""
    return [{"name": photo.stem, "address": encode_file(photo)} for photo in photos]

from gradio.events import Dependency

class PhotoZone(gr.HTML):
    """Where photos are dropped, pasted or chosen; its value is a data address, its event `input`."""

    def __init__(self, value: str = "", **props: Any) -> None:
        parts = dict(html_template=static("photo.html"), css_template=static("photo.css"), js_on_load=static("photo.js"))
        super().__init__(value, **parts, largest=LARGEST, **props)
    from typing import Callable, Literal, Sequence, Any, TYPE_CHECKING
    from gradio.blocks import Block
    if TYPE_CHECKING:
        from gradio.components import Timer
        from gradio.components.base import Component


class Frame(gr.HTML):
    """A sandboxed frame; its value is an HTML document."""

    def __init__(self, value: str = "", **props: Any) -> None:
        parts = dict(html_template=static("frame.html"), css_template=static("frame.css"), js_on_load=static("frame.js"))
        super().__init__(value, **parts, **props)

    def postprocess(self, value: str | None) -> str | None:
        """The document as it is; Gradio would warn of its scripts, which do run in a frame."""
        return value
    from typing import Callable, Literal, Sequence, Any, TYPE_CHECKING
    from gradio.blocks import Block
    if TYPE_CHECKING:
        from gradio.components import Timer
        from gradio.components.base import Component