"""Pictures of an explanation: the figure, and layers over the images or the original photos."""

from collections.abc import Sequence
from io import BytesIO
from typing import TYPE_CHECKING

from torch import Tensor

from ..errors import InputError
from .photo import Photo
from .rows import Rows
from .scale import cell_means, default_scale
from .summary import check_top
from .titles import class_name, title, unit_name
from .visualization import (
    Bars,
    Row,
    color_layer,
    draw_rows,
    faded,
    map_to_rgba,
    on_white,
    overlay,
    to_pil,
    weights_to_rgba,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

__all__ = [
    "RGB_KINDS",
    "check_not_empty",
    "color_picture",
    "overlay_picture",
    "photo_map",
    "plot",
    "png_bytes",
    "to_rgb",
]

COLOR_CHANNELS = (1, 3)  # of images whose weights can be read as colors
PNG_ROWS, PNG_DPI = 4, 50  # of the small figure in notebooks


def _scale_of(explanation: Rows, scale: int | None) -> int:
    """The given scale, or the default for the size of the images."""
    height, width = explanation.inputs.shape[-2:]
    return default_scale(height, width) if scale is None else scale


def check_not_empty(explanation: Rows) -> None:
    """Refuse an explanation of no images, which has no pictures.

    Raises:
        InputError: If there are no images.
    """
    if len(explanation) == 0:
        raise InputError("an explanation of no images has nothing to show")


def plot(explanation: Rows, names: Sequence[str] | None, top: int, scale: int | None) -> "Figure":
    """What `Explanation.plot` draws."""
    check_not_empty(explanation)
    check_top(top)
    scale = _scale_of(explanation, scale)
    return draw_rows([Row(_pictures(one, names, scale), _bars(one, names, top)) for one in explanation])


def _pictures(one: Rows, names: Sequence[str] | None, scale: int) -> list[tuple[str, Tensor]]:
    """Pictures of one image with their titles."""
    image, maps = _shown(one), one.contribution_map.detach().cpu()
    coarse = cell_means(maps, scale)
    shown = (image if one.region is None else faded(image, one.region.cpu() > 0)).movedim(1, -1)
    if _has_colors(one):
        sides = [one, one.opposite()] if one.is_difference else [one]
        found = [("image", shown), *((title(side, 0, names), on_white(_colors(side))) for side in sides)]
        pixels = "contributions of pixels"
    else:
        found = [(f"image (mean of {one.image.shape[1]} channels)", shown)]
        pixels = f"{title(one, 0, names)}: contributions of pixels"
    found.append((pixels, map_to_rgba(maps)))
    if scale > 1:
        found.append((f"contributions of cells of {scale} × {scale} pixels", map_to_rgba(coarse)))
    return [(name, pictures[0]) for name, pictures in (*found, ("overlay", overlay(image, coarse)))]


def _colors(explanation: Rows) -> Tensor:
    return weights_to_rgba(explanation.weights, explanation.contribution_map)


def _has_colors(explanation: Rows) -> bool:
    return explanation.image.shape[1] in COLOR_CHANNELS


def _shown(explanation: Rows) -> Tensor:
    """(N, 1 or 3, H, W) images on the CPU; the mean of the channels where they are no colors."""
    image = explanation.image.detach().cpu().float().clamp(0, 1)
    return image if _has_colors(explanation) else image.mean(1, keepdim=True)


def _bars(one: Rows, names: Sequence[str] | None, top: int) -> Bars:
    """The most probable classes of one image, or the most active units."""
    is_logit = one.layer is None
    values = (one.probability if is_logit else one.logits)[0]
    best = values.topk(min(top, len(values)))
    units, target = best.indices.tolist(), int(one.target[0])
    labels = [class_name(one, unit, names) if is_logit else unit_name("unit", unit) for unit in units]
    heading = f"probability ({one.probability_kind})" if is_logit else "activation"
    marked = units.index(target) if target in units and one.direction is None else None
    return Bars(heading, labels, best.values.tolist(), marked, 1.0 if is_logit else None)


def png_bytes(explanation: Rows) -> bytes:
    """A small figure of the first images, as a PNG file."""
    buffer = BytesIO()
    plot(explanation[:PNG_ROWS], None, 5, None).savefig(buffer, format="png", dpi=PNG_DPI)
    return buffer.getvalue()


def overlay_picture(explanation: Rows, scale: int | None) -> "Image":
    """The contribution map of one image over the photo in gray."""
    photo = _photo_of(explanation)
    layer = photo.enlarge(to_pil(color_layer(_on_photo(explanation, photo, _scale_of(explanation, scale))[None])[0]))
    picture = photo.gray().convert("RGB")
    picture.paste(layer, mask=layer)
    return picture


def color_picture(explanation: Rows) -> "Image":
    """The explanation of one image in color, at its place on the photo."""
    return _photo_of(explanation).enlarge(to_pil(_colors(explanation)[0]))


def _photo_of(explanation: Rows) -> Photo:
    """The photo of one image; the image itself if there is none."""
    if explanation.photos:
        return explanation.photos[0]
    image = _shown(explanation)[0]
    height, width = image.shape[-2:]
    return Photo(to_pil(image.expand(3, -1, -1).movedim(0, -1)), (0, 0, width, height))


def photo_map(explanation: Rows, scale: int) -> Tensor:
    """Contributions of the pixels of the photo of one image."""
    photo = _photo_of(explanation)
    return photo.spread(_on_photo(explanation, photo, scale))


def _on_photo(explanation: Rows, photo: Photo, scale: int) -> Tensor:
    """(H, W) means of cells of one image, which leave out what padding contributes."""
    maps = explanation.contribution_map[0].detach().double()
    return cell_means(maps, scale, photo.coverage(*maps.shape))


def to_rgb(explanation: Rows, kind: str, scale: int | None) -> Tensor:
    """What `Explanation.to_rgb` returns."""
    if kind not in RGB_KINDS:
        raise InputError(f"kind={kind!r}: choose one of {', '.join(RGB_KINDS)}")
    check_not_empty(explanation)
    return RGB_KINDS[kind](explanation, scale).cpu().float().clamp(0, 1).movedim(-1, 1)


def _rgb_color(explanation: Rows, scale: int | None) -> Tensor:
    return on_white(_colors(explanation))


def _rgb_map(explanation: Rows, scale: int | None) -> Tensor:
    return map_to_rgba(_coarse(explanation, scale))[..., :3]


def _rgb_overlay(explanation: Rows, scale: int | None) -> Tensor:
    return overlay(_shown(explanation), _coarse(explanation, scale))


def _coarse(explanation: Rows, scale: int | None) -> Tensor:
    return cell_means(explanation.contribution_map.detach().cpu(), _scale_of(explanation, scale))


RGB_KINDS = {"color": _rgb_color, "map": _rgb_map, "overlay": _rgb_overlay}
