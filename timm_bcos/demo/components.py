"""Gradio components and HTML of the demo: the photo input, the frame of the explanation, figures, the theme.

Both components are `gr.HTML` with templates of their own and write no files. They are functions because Gradio writes a
file beside a module with subclasses of its components.
"""

import base64
import io
import mimetypes
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path

import gradio as gr
import torch
from PIL import Image
from torch import Tensor

from .inference import Figure
from .limits import MAX_PHOTO_BYTES

__all__ = [
    "example_props",
    "figures_html",
    "file_url",
    "frame",
    "frame_value",
    "notice",
    "photo_input",
    "static",
    "theme",
]


def file_url(path: Path) -> str:
    """An image file as a data URL."""
    kind, _ = mimetypes.guess_type(path.name)
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def _image_url(image: Tensor) -> str:
    """An image (H, W, 3 or 4) in [0, 1] as a data URL, in PNG format."""
    array = (image.detach().cpu().clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def notice(message: str) -> str:
    """HTML of an error message; empty for an empty message."""
    return f'<p class="bcos-notice" role="alert">{escape(message)}</p>' if message else ""


def figures_html(figures: Iterable[Figure]) -> str:
    """HTML of figures side by side."""
    return f'<div class="bcos-figures">{"".join(map(_figure_html, figures))}</div>'


def _figure_html(figure: Figure) -> str:
    title, note = escape(figure.title), escape(figure.note)
    if figure.image is None:
        shown = f'<p class="missing">{note}</p>'
        note = ""
    else:
        shown = f'<img src="{_image_url(figure.image)}" alt="{title}">'
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


def theme() -> gr.themes.Base:
    """A Gradio theme that loads no fonts from other hosts."""
    base = gr.themes.Base(primary_hue="red", neutral_hue="stone", font=FONTS, font_mono=["ui-monospace", "monospace"])
    light = {name: color for name, (color, _) in COLORS.items()}
    dark = {f"{name}_dark": color for name, (_, color) in COLORS.items()}
    return base.set(**light, **dark, block_radius="14px", button_large_radius="10px", input_radius="10px")


def static(name: str) -> str:
    """The text of a file for the browser."""
    return files(__package__).joinpath("static", name).read_text(encoding="utf-8")


def photo_input(value: str, examples: Sequence[Path], elem_id: str) -> gr.HTML:
    """An input to drop, paste or choose a photo. Its value is a data URL, its event `input`."""
    return gr.HTML(
        value,
        html_template=static("photo.html"),
        css_template=static("photo.css"),
        js_on_load=static("photo.js"),
        elem_id=elem_id,
        largest=MAX_PHOTO_BYTES,
        examples=example_props(examples),
    )


def example_props(photos: Sequence[Path]) -> list[dict[str, str]]:
    """Names and data URLs of example photos, for the photo input."""
    return [{"name": photo.stem, "url": file_url(photo)} for photo in photos]


def frame(elem_id: str) -> gr.HTML:
    """A sandboxed frame for an HTML document; `frame_value` makes its value."""
    return gr.HTML(
        frame_value(""),
        html_template=static("frame.html"),
        css_template=static("frame.css"),
        js_on_load=static("frame.js"),
        elem_id=elem_id,
    )


def frame_value(document: str) -> dict[str, str]:
    """An HTML document as the value of a frame. For a plain string Gradio would warn that its scripts do not run."""
    return {"document": document}
