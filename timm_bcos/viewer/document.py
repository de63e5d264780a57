"""The explanation of one photo as an interactive HTML file that loads nothing and works in an <iframe srcdoc>.

Style, scripts and data are written into the template `viewer.html`: contribution maps in float32, from which the
scripts compute all sums in double precision, and images as PNG. A content security policy prevents anything else from
running or loading, whatever class names contain.
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
from ..explanation.result import Explanation
from ..explanation.scale import check_scale, default_scale
from ..explanation.titles import class_name
from ..explanation.visualization import EPS, weights_to_rgba
from ..files import AUTHOR, atomic_path

__all__ = ["is_own_page", "save_viewer", "viewer_html"]

TITLE = "B-cos explanation"
SCALES = (1, 2, 4, 8, 16, 32)  # sides of cells, in pixels
SCRIPTS = ("numbers.js", "pictures.js", "viewer.js")
HEAD = 4096  # number of characters that contain the signature
SIGNATURE = f'<meta name="generator" content="{AUTHOR}">'


def viewer_html(
    explanation: Explanation, class_names: Sequence[str] | None = None, title: str = "", versus: int | None = None,
    scale: int | None = None,
) -> str:  # fmt: skip
    """Create a self-contained interactive HTML document about one image.

    Args:
        explanation: Explanation of one image, with a row per class to choose from, best first:
            `Explanation.stack(explain_targets(model, image, top=5))`.
        class_names: Names of all classes of the model. Default: those of the explanation.
        title: Heading, for instance the names of photo and model. Default: the name of the photo.
        versus: Class, one of those explained, that is subtracted at first; None for none.
        scale: Side of the cells that are shown at first, in pixels: a power of two up to 32, and up to half of the
            image's shorter side. Default: as in `Explanation.overlay`.

    Returns:
        HTML document. An iframe must allow scripts and downloads. The document posts messages `{height}` in pixels to
        the embedding page.

    Raises:
        InputError: If the explanation is of several images, of units or of differences (the viewer subtracts classes
            itself), has numbers that are not finite, or images do not have 1 or 3 channels; or for another scale.
    """
    _check(explanation)
    class_names = class_names or explanation.class_names or None
    title = title or (explanation.photos[0].name if explanation.photos else "")
    style, script = _part("viewer.css"), "\n".join(map(_part, SCRIPTS))
    values = {
        "title": html.escape(_text(title) or TITLE),
        "style": style,
        "script": script,
        "style_hash": _hash(style),
        "script_hash": _hash(script),
        "data": _inert_json(_data(explanation, class_names, title, versus, scale)),
    }
    # one pass, so that inserted text is never read as a template
    return re.sub(r"{{(\w+)}}", lambda slot: values[slot[1]], _part("viewer.html"))


def save_viewer(
    explanation: Explanation,
    path: str | os.PathLike[str],
    class_names: Sequence[str] | None = None,
    title: str = "",
    versus: int | None = None,
    scale: int | None = None,
) -> None:
    """Write the document of `viewer_html` to a file.

    Args:
        explanation: Explanation, as in `viewer_html`.
        path: File to write, usually with the suffix .html.
        class_names: Names of all classes, as in `viewer_html`.
        title: Heading, as in `viewer_html`.
        versus: Subtracted class, as in `viewer_html`.
        scale: Side of the cells, as in `viewer_html`.
    """
    document = viewer_html(explanation, class_names, title, versus, scale)
    with atomic_path(path) as temporary:
        temporary.write_text(document, encoding="utf-8")


def is_own_page(path: Path) -> bool:
    """Whether this package wrote an HTML file."""
    try:
        with path.open(encoding="utf-8") as file:
            return SIGNATURE in file.read(HEAD)
    except (OSError, UnicodeDecodeError):
        return False


def _check(explanation: Explanation) -> None:
    if explanation.layer is not None:
        raise InputError(f"the viewer shows classes, not units of layer {explanation.layer!r}: use plot or save")
    if explanation.direction is not None or explanation.region is not None or explanation.position is not None:
        raise InputError("the viewer shows classes, not directions or parts of an output map: use plot or save")
    if explanation.versus is not None:
        raise InputError("the viewer subtracts classes itself: pass the explanation of each class")
    if not len(explanation):
        raise InputError("the viewer needs the explanation of at least one class")
    if not torch.equal(explanation.inputs, explanation.inputs[:1].expand_as(explanation.inputs)):
        raise InputError("the viewer shows one image, not several: create a document for each")
    numbers = (explanation.weights, explanation.logits, explanation.bias, explanation.constant_bias)
    if not all(bool(number.isfinite().all()) for number in numbers):
        raise InputError("the explanation has numbers that are not finite: check the model and the image")


def _data(
    explanation: Explanation, class_names: Sequence[str] | None, title: str, versus: int | None, scale: int | None
) -> dict[str, Any]:
    """The data of the document; `classes` has an entry for each explained class."""
    height, width = explanation.inputs.shape[-2:]
    classes = list(dict.fromkeys(explanation.target.tolist()))
    if versus is not None and versus not in classes[1:]:
        raise InputError(f"versus={versus}: choose one of the explained classes {classes} except the first")
    rows = [explanation.target.tolist().index(c) for c in classes]
    known = [_class(explanation[row], class_names) for row in rows]
    image = explanation.image[0].expand(3, -1, -1).movedim(0, -1)
    return {
        "title": title,
        "height": height,
        "width": width,
        "scale": _first_scale(height, width, scale),
        "scales": _scales(height, width),
        "photo": _png(image),
        "probability": explanation.probability_kind,
        "classCount": explanation.logits.shape[1],
        "logitBias": explanation.logit_bias,
        "violations": list(map(str, explanation.violations)),
        "classes": known,
        "against": None if versus is None else classes.index(versus),
    }


def _scales(height: int, width: int) -> list[int]:
    """The sides of cells to choose from: powers of two up to half of the shorter side."""
    return [side for side in SCALES if side == 1 or 2 * side <= min(height, width)]


def _first_scale(height: int, width: int, scale: int | None) -> int:
    scales = _scales(height, width)
    if scale is None:
        return min(default_scale(height, width), scales[-1])
    if check_scale(scale) not in scales:
        raise InputError(
            f"scale={scale}: for images of {width} × {height} pixels, the viewer's cells have a side of "
            f"{', '.join(map(str, scales))} pixels; choose one of these"
        )
    return int(scale)


def _class(one: Explanation, class_names: Sequence[str] | None) -> dict[str, Any]:
    target = int(one.target)
    contributions = one.contributions.double().sum(1)[0]
    colors = weights_to_rgba(one.weights, one.contribution_map)[0]
    strength = one.weights[0].norm(dim=0)
    return {
        "index": target,
        "name": class_name(one, target, class_names),
        "probability": float(one.probability[0, target]),
        "logit": float(one.logit),
        "bias": float(one.bias),
        "constantBias": float(one.constant_bias),
        "contributions": _base64(contributions.detach().cpu().numpy().astype("<f4").tobytes()),
        # separate images, because browsers drop the color of transparent pixels
        "color": _png(colors[..., :3]),
        "opacity": _png(colors[..., 3]),
        # square root, because most weights are far below the largest and 8 bits are few
        "strength": _png((strength / strength.max().clamp_min(EPS)).sqrt()),
    }


def _png(picture: Tensor) -> str:
    """An image (H, W) or (H, W, 3) in [0, 1] as a data URL."""
    from PIL import Image

    array = (picture.detach().cpu().clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return f"data:image/png;base64,{_base64(file.getvalue())}"


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _hash(text: str) -> str:
    """The hash of a script or style in a content security policy."""
    return f"sha256-{_base64(sha256(text.encode()).digest())}"


def _inert_json(data: dict[str, Any]) -> str:
    """JSON that cannot end the script element around it."""
    return json.dumps(data, allow_nan=False).replace("<", "\\u003c")


def _text(text: str) -> str:
    """Text without invalid bytes, which file names may contain."""
    return text.encode(errors="replace").decode()


def _part(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")
