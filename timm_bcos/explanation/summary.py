"""An explanation in numbers and words, for logs: predictions, sums by region, and how exact it is."""

import math
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .rows import Rows
from .titles import class_name, title, unit_name

__all__ = ["REGIONS", "Json", "check_top", "predictions", "region_sums", "summary"]

Json = dict[str, Any]
REGIONS = (
    ("top left", "top", "top right"),
    ("left", "center", "right"),
    ("bottom left", "bottom", "bottom right"),
)


def predictions(explanation: Rows, top: int) -> list[tuple[str, float]]:
    """Names and probabilities of the most probable classes of one image, best first.

    Raises:
        InputError: For the explanation of a hidden unit, or a `top` below 1.
    """
    if explanation.layer is not None:
        raise InputError(
            f"predictions are the model's classes, this explains a unit of {explanation.layer!r}: explain the image "
            f"without layer="
        )
    return [(one["name"], one["probability"]) for one in _strongest(explanation, top)]


def summary(explanation: Rows, top: int) -> Json:
    """What `Explanation.summary` returns."""
    maps = explanation.contribution_map[0].detach().double().cpu()
    found: Json = {
        "title": title(explanation, 0),
        "target": _unit(explanation, int(explanation.target[0])),
        "versus": None if explanation.versus is None else _unit(explanation, int(explanation.versus[0])),
        "classes" if explanation.layer is None else "units": _strongest(explanation, top),
        "logit": float(explanation.logit[0]),
        "bias": float(explanation.bias[0]),
        "positive": float(maps.clamp_min(0).sum()),
        "negative": float(maps.clamp_max(0).sum()),
        "regions": region_sums(maps),
        "completeness_error": float(explanation.completeness_error[0]),
        "exact": not explanation.violations,
        "violations": [str(violation) for violation in explanation.violations],
        "image": {"width": maps.shape[1], "height": maps.shape[0]},
        "photo": _photo(explanation, maps),
    }
    return _finite(found)


def region_sums(values: Tensor) -> dict[str, float]:
    """Sums of a map (H, W) over the nine regions of a 3 × 3 grid, which a pixel belongs to by its center."""
    rows, columns = ((torch.arange(side) * 2 + 1) * 3 // (2 * side) for side in values.shape)
    sums = torch.zeros(9, dtype=torch.float64)
    sums.index_add_(0, (rows[:, None] * 3 + columns).flatten(), values.double().flatten())
    return dict(zip((name for row in REGIONS for name in row), sums.tolist(), strict=True))


def check_top(top: object) -> None:
    """Refuse what is not a number of classes.

    Raises:
        InputError: If it is not an integer of at least 1.
    """
    if not isinstance(top, Integral) or isinstance(top, bool) or top < 1:
        raise InputError(f"top={top!r}: give the number of classes, a whole number from 1")


def _strongest(explanation: Rows, top: int) -> list[Json]:
    check_top(top)
    values = _values(explanation)
    return [_unit(explanation, unit) for unit in values.topk(min(top, len(values))).indices.tolist()]


def _unit(explanation: Rows, unit: int) -> Json:
    is_class = explanation.layer is None
    name = class_name(explanation, unit) if is_class else unit_name("unit", unit)
    value = float(_values(explanation)[unit])
    return {"index": unit, "name": name, "probability" if is_class else "activation": value}


def _values(explanation: Rows) -> Tensor:
    return (explanation.probability if explanation.layer is None else explanation.logits)[0]


def _photo(explanation: Rows, maps: Tensor) -> Json | None:
    """The photo, the part of it that the model sees, and the padding."""
    if not explanation.photos:
        return None
    photo = explanation.photos[0]
    width, height = photo.image.size
    return {
        "name": photo.name,
        "width": width,
        "height": height,
        "box": [float(edge) for edge in photo.box],
        "padding": photo.padding,
        "padding_contribution": float((maps * (1 - photo.coverage(*maps.shape))).sum()),
    }


def _finite(value: Any) -> Any:
    """Numbers that JSON has; None for all others."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
