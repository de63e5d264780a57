"""One photo's explanation as a web page: a single document that needs no network and can stand in an <iframe srcdoc>.

The page is `viewer.html`; a style and the scripts are written into it, and so are the numbers: contribution maps
in float32, from which the page computes every sum in double precision, and pictures as PNG. Its content security policy
lets nothing else run or load, whatever the classes are called.
"""

import base64
import html
import io
import json
import os
import re
from collections.abc import Sequence
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..explanation.result import Explanation, unit_name
from ..explanation.visualization import EPS, weights_to_rgba
from ..files import AUTHOR, atomic_path

__all__ = ["is_own_page", "save_viewer", "viewer_html"]

TITLE = "B-cos explanation"
SCRIPTS = ("numbers.js", "pictures.js", "viewer.js")
HEAD = 4096  # characters, in which the signature stands
SIGNATURE = f'<meta name="generator" content="{AUTHOR}">'


def viewer_html(
    explanation: Explanation, class_names: Sequence[str] | None = None, title: str = "", versus: int | None = None
) -> str:
    """A self-contained interactive page about one image.

    Args:
        explanation: Of one image for each class to choose from, best first:
            `Explanation.stack(explain_targets(model, image, top=5))`.
        class_names: Name of each class of the network.
        title: Heading, for instance the photo's and the network's name.
        versus: The class, of those explained, that is subtracted when the page opens; None for none.

    Returns:
        An HTML document. In an iframe allow scripts and downloads; it posts messages `{height}` in pixels to what
        embeds it.

    Raises:
        InputError: For explanations of several images, of inner neurons or of differences (the page subtracts by
            itself), with numbers that are not finite, or of images with other than 1 or 3 channels.
    """
    _check(explanation)
    style, script = _part("viewer.css"), "\n".join(map(_part, SCRIPTS))
    values = {
        "title": html.escape(_text(title) or TITLE),
        "style": style,
        "script": script,
        "style_hash": _hash(style),
        "script_hash": _hash(script),
        "data": _inert_json(_data(explanation, class_names, title, versus)),
    }
    # one pass over the template: what is put in is never read as a template itself
    return re.sub(r"{{(\w+)}}", lambda slot: values[slot[1]], _part("viewer.html"))


def save_viewer(
    explanation: Explanation,
    path: str | os.PathLike[str],
    class_names: Sequence[str] | None = None,
    title: str = "",
    versus: int | None = None,
) -> None:
    """Write `viewer_html` to a file, whole or not at all.

    Args:
        explanation: As in `viewer_html`.
        path: Of the file, by custom ending in .html.
        class_names: As in `viewer_html`.
        title: As in `viewer_html`.
        versus: As in `viewer_html`.
    """
    document = viewer_html(explanation, class_names, title, versus)
    with atomic_path(path) as temporary:
        temporary.write_text(document, encoding="utf-8")


def is_own_page(path: Path) -> bool:
    """Whether this package wrote a page: its head says so."""
    try:
        with path.open(encoding="utf-8") as file:
            return SIGNATURE in file.read(HEAD)
    except (OSError, UnicodeDecodeError):
        return False


def _check(explanation: Explanation) -> None:
    if explanation.layer is not None:
        raise InputError(f"the page shows classes, these are neurons of layer {explanation.layer!r}: use plot or save")
    if explanation.direction is not None or explanation.region is not None or explanation.position is not None:
        raise InputError("the page shows whole classes, not directions or parts of an output's map: use plot or save")
    if explanation.versus is not None:
        raise InputError("the page subtracts classes by itself: give it the explanation of each class")
    if not len(explanation):
        raise InputError("the page needs the explanation of at least one class")
    if not torch.equal(explanation.inputs, explanation.inputs[:1].expand_as(explanation.inputs)):
        raise InputError("the page shows one image, these explanations are of several: make a page for each")
    numbers = (explanation.weights, explanation.logits, explanation.bias, explanation.constant_bias)
    if not all(bool(number.isfinite().all()) for number in numbers):
        raise InputError("the explanation holds numbers that are not finite: check the network and the image")


def _data(
    explanation: Explanation, class_names: Sequence[str] | None, title: str, versus: int | None
) -> dict[str, Any]:
    """What the page knows; one entry of `classes` for each class explained."""
    height, width = explanation.inputs.shape[-2:]
    classes = list(dict.fromkeys(explanation.target.tolist()))
    if versus is not None and versus not in classes[1:]:
        raise InputError(f"versus={versus}: the page explains the classes {classes}, of which the first is asked for")
    places = [explanation.target.tolist().index(c) for c in classes]
    known = [_class(explanation[place], class_names) for place in places]
    image = explanation.image[0].expand(3, -1, -1).movedim(0, -1)
    return {
        "title": title,
        "height": height,
        "width": width,
        "photo": _png(image),
        "probability": explanation.probability_kind,
        "classCount": explanation.logits.shape[1],
        "logitBias": explanation.logit_bias,
        "violations": list(map(str, explanation.violations)),
        "classes": known,
        "against": None if versus is None else classes.index(versus),
    }


def _class(one: Explanation, class_names: Sequence[str] | None) -> dict[str, Any]:
    target = int(one.target)
    contributions = one.contributions.double().sum(1)[0]
    colors = weights_to_rgba(one.weights, one.contribution_map)[0]
    strength = one.weights[0].norm(dim=0)
    return {
        "index": target,
        "name": unit_name("class", target, class_names),
        "probability": float(one.probability[0, target]),
        "logit": float(one.logit),
        "bias": float(one.bias),
        "constantBias": float(one.constant_bias),
        "contributions": _base64(contributions.detach().cpu().numpy().astype("<f4").tobytes()),
        # apart, since browsers lose the color of what is transparent
        "color": _png(colors[..., :3]),
        "opacity": _png(colors[..., 3]),
        # its root, which 8 bits can hold: most weights are far below the largest
        "strength": _png((strength / strength.max().clamp_min(EPS)).sqrt()),
    }


def _png(picture: Tensor) -> str:
    """(H, W) or (H, W, 3) in [0, 1] as a data address."""
    from PIL import Image

    array = (picture.detach().cpu().clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return f"data:image/png;base64,{_base64(file.getvalue())}"


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _hash(text: str) -> str:
    """How a content security policy names the script or style that may run."""
    return f"sha256-{_base64(sha256(text.encode()).digest())}"


def _inert_json(data: dict[str, Any]) -> str:
    """JSON that cannot end the script element in which it stands."""
    return json.dumps(data, allow_nan=False).replace("<", "\\u003c")


def _text(text: str) -> str:
    """Without the bytes that are no text, which names of files may hold."""
    return text.encode(errors="replace").decode()


def _part(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")
