"""What a plain network makes of a gray image: where activations that are gated by biases begin.

With additive biases features are those of a gray image (the mean that the images are normalized by) plus what the image
adds to them. `BcosConfig(bias="reference")` keeps what the image adds: a(x + r) - a(r) for an activation a that a gray
image gives r. At B = 1 that is the original, less its answer to gray, but at the borders, where zeros pad.
"""

from collections.abc import Mapping
from functools import partial

import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from .._compat import timm_layers
from ..errors import InputError
from ..files import first_line
from ..nn.layers import ShiftedActivation
from ..nn.module_utils import frozen_copy, image_size

__all__ = ["reference_activations", "set_reference_shifts"]

GATED_NORMS = (timm_layers.BatchNormAct2d, timm_layers.SyncBatchNormAct)


def reference_activations(model: nn.Module) -> dict[str, Tensor]:
    """What activations inside of batch norms are given in the middle of a gray image.

    The image is twice as large as the network's own, so that its middle hardly sees the borders; or of the network's
    own size, where it takes no other.

    Args:
        model: A plain network. Not changed.

    Returns:
        (C,) by the name of the norm; nothing on the meta device, and for a norm that has not run.

    Raises:
        InputError: For a network that does not run on images of the size that it says.
    """
    found: dict[str, Tensor] = {}
    parameter = next(model.parameters(), None)
    if parameter is None or parameter.is_meta or not any(map(_is_gated, model.modules())):
        return found
    network = frozen_copy(model).eval()

    def keep(name: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        found[name] = args[0][0, :, args[0].shape[2] // 2, args[0].shape[3] // 2].clone()

    for name, module in network.named_modules():
        if _is_gated(module):
            module.act.register_forward_pre_hook(partial(keep, name))
    channels: int = getattr(network, "in_chans", resolve_model_data_config(network)["input_size"][0])
    height, width = image_size(network)
    see = getattr(network, "forward_features", network)  # a head without pooling takes no map
    for scale in (2, 1):
        try:
            with torch.no_grad():
                see(parameter.new_zeros(1, channels, scale * height, scale * width))
            return found
        except Exception as error:  # networks of a fixed size raise errors of every kind
            found.clear()
            failure = error
    raise InputError(
        f"bias='reference' needs the network's answer to a gray image, but {type(model).__name__} does not run on "
        f"one of {height} × {width} pixels ({first_line(failure)}): tell its size, "
        f"model.pretrained_cfg = dict(input_size=...)"
    ) from failure


def _is_gated(module: nn.Module) -> bool:
    return type(module) in GATED_NORMS and not isinstance(module.act, nn.Identity | ShiftedActivation)


@torch.no_grad()
def set_reference_shifts(network: nn.Module, responses: Mapping[str, Tensor]) -> None:
    """Let a converted network's gates begin where those responses are."""
    for name, response in responses.items():
        act = getattr(network.get_submodule(name), "act", None)
        if isinstance(act, ShiftedActivation):
            act.shift.copy_(response)
