"""Reference activations of a plain model: what a gray image gives each of its activations.

With additive biases, features are those of a gray image (the mean that images are normalized by) plus the change that
the image causes. `BcosConfig(bias="reference")` keeps that change: a(x + r) - a(r) for an activation a whose input is r
for a gray image. At B = 1 this is the original model minus its response to gray, except near the borders, where
convolutions pad with zeros.
"""

from functools import partial
from typing import Any

import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from .._compat import timm_layers
from ..errors import InputError
from ..files import first_line
from ..nn.activations import ShiftedActivation
from ..nn.module_utils import frozen_copy, image_size

__all__ = ["reference_activations"]

NORMS_WITH_ACTIVATION = (timm_layers.BatchNormAct2d, timm_layers.SyncBatchNormAct)


def reference_activations(model: nn.Module) -> dict[str, Tensor]:
    """Inputs of the activations inside batch norms, at the center of a gray image.

    The image is twice as large as the model's own input size, so that its center hardly sees the borders, or has that
    size if the model takes no other.

    Args:
        model: A plain model. Not changed.

    Returns:
        Tensors (C,) by the path of the norm. Norms that did not run are missing, and so are all on the meta device.

    Raises:
        InputError: If the model does not run on images of its own input size.
    """
    parameter = next(model.parameters(), None)
    if parameter is None or parameter.is_meta or not any(map(_has_activation, model.modules())):
        return {}
    found: dict[str, Tensor] = {}
    copy = frozen_copy(model).eval()
    for path, module in copy.named_modules():
        if _has_activation(module):
            module.act.register_forward_pre_hook(partial(_keep_center, found, path))  # type: ignore[union-attr]
    return _run_on_gray(copy, parameter, found)


def _has_activation(module: nn.Module) -> bool:
    return type(module) in NORMS_WITH_ACTIVATION and not isinstance(module.act, nn.Identity | ShiftedActivation)


def _keep_center(found: dict[str, Tensor], path: str, act: nn.Module, args: tuple[Tensor, ...]) -> None:
    """Forward pre-hook."""
    found[path] = args[0][0, :, args[0].shape[2] // 2, args[0].shape[3] // 2].clone()


@torch.no_grad()
def _run_on_gray(model: Any, like: Tensor, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """`found`, which the model's hooks fill."""
    channels: int = getattr(model, "in_chans", resolve_model_data_config(model)["input_size"][0])
    height, width = image_size(model)
    run = getattr(model, "forward_features", model)  # a head without pooling does not take larger maps
    for scale in (2, 1):
        try:
            run(like.new_zeros(1, channels, scale * height, scale * width))
            return found
        except Exception as error:  # models of a fixed input size raise errors of every kind
            found.clear()
            failure = error
    raise InputError(
        f"bias='reference' needs the model's response to a gray image, but {type(model).__name__} does not run on "
        f"one of {height} × {width} pixels ({first_line(failure)}): set its input size, "
        f"model.pretrained_cfg = dict(input_size=...)"
    ) from failure
