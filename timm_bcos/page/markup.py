"""Answers as HTML: pictures side by side, and sentences. Whatever is written into it is escaped."""

from collections.abc import Iterable
from html import escape

from .uploads import encode_picture
from .visits import Picture

__all__ = ["notice", "pictures_side_by_side"]


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
