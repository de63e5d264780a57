"""Gradio's HTML component twice over: a place for a photo, and a frame for a document. Neither writes files.

They are functions: beside a module with subclasses of its components, Gradio writes a file of its own.
"""

from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path

import gradio as gr

from .limits import LARGEST_PHOTO
from .uploads import encode_file, encode_picture
from .visits import Picture

__all__ = [
    "example_props",
    "frame",
    "framed",
    "notice",
    "page_theme",
    "photo_zone",
    "pictures_side_by_side",
    "static",
]


def notice(sentence: str) -> str:
    """What went wrong, where the answer would stand; nothing for an empty sentence."""
    return f'<p class="bcos-notice" role="alert">{escape(sentence)}</p>' if sentence else ""


def pictures_side_by_side(pictures: Iterable[Picture]) -> str:
    """A row that wraps where it does not fit."""
    return f'<div class="bcos-pictures">{"".join(map(_figure, pictures))}</div>'


def _figure(picture: Picture) -> str:
    title, note = escape(picture.title), escape(picture.note)
    if picture.pixels is None:
        shown = f'<p class="missing">{note}</p>'
        note = ""
    else:
        shown = f'<img src="{encode_picture(picture.pixels)}" alt="{title}">'
    return f"<figure><figcaption>{title}</figcaption>{shown}<small>{note}</small></figure>"


FONTS = ["Inter", "system-ui", "Segoe UI", "Roboto", "Noto Sans", "Helvetica Neue", "sans-serif"]
COLORS = {  # by Gradio's name: light, dark
    "body_background_fill": ("#fbfaf8", "#131417"),
    "background_fill_primary": ("#ffffff", "#1c1e22"),
    "block_background_fill": ("#ffffff", "#1c1e22"),
    "body_text_color": ("#1b1c1f", "#ececee"),
    "body_text_color_subdued": ("#64666d", "#9b9da5"),
    "block_info_text_color": ("#64666d", "#9b9da5"),
    "border_color_primary": ("#e4e2dd", "#2d3036"),
    "block_border_color": ("#e4e2dd", "#2d3036"),
    "input_background_fill": ("#f5f4f1", "#2a2c32"),
    "button_primary_background_fill": ("#b8172f", "#c22a40"),
    "button_primary_background_fill_hover": ("#9d1227", "#d33b51"),
    "button_primary_text_color": ("#ffffff", "#ffffff"),
}


def page_theme() -> gr.themes.Base:
    """A theme that asks no other host for fonts."""
    theme = gr.themes.Base(primary_hue="red", neutral_hue="stone", font=FONTS, font_mono=["ui-monospace", "monospace"])
    light = {name: color for name, (color, _) in COLORS.items()}
    dark = {f"{name}_dark": color for name, (_, color) in COLORS.items()}
    return theme.set(**light, **dark, block_radius="14px", button_large_radius="10px", input_radius="10px")


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
