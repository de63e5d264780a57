"""Gradio's HTML component twice over: a place for a photo, and a frame for a document. Neither writes files.

They are functions: beside a module with subclasses of its components, Gradio writes a file of its own.
"""

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import gradio as gr

from .limits import LARGEST_PHOTO
from .uploads import encode_file

__all__ = ["example_props", "frame", "framed", "photo_zone", "static"]


def static(name: str) -> str:
    """A file for the browser."""
    return files(__package__).joinpath("static", name).read_text(encoding="utf-8")


def photo_zone(value: str, examples: Sequence[Path], elem_id: str) -> gr.HTML:
    """Where photos are dropped, pasted or chosen; its value is a data address, its event `input`."""
    return gr.HTML(
        value,
        html_template=static("photo.html"),
        css_template=static("photo.css"),
        js_on_load=static("photo.js"),
        elem_id=elem_id,
        largest=LARGEST_PHOTO,
        examples=example_props(examples),
    )


def example_props(photos: Sequence[Path]) -> list[dict[str, str]]:
    """Examples as the photo zone wants them: names and data addresses."""
    return [{"name": photo.stem, "address": encode_file(photo)} for photo in photos]


def frame(elem_id: str) -> gr.HTML:
    """A sandboxed frame; its value is what `framed` returns."""
    return gr.HTML(
        framed(""),
        html_template=static("frame.html"),
        css_template=static("frame.css"),
        js_on_load=static("frame.js"),
        elem_id=elem_id,
    )


def framed(document: str) -> dict[str, str]:
    """An HTML document as the frame's value; of a plain text Gradio would warn that its scripts do not run."""
    return {"document": document}
