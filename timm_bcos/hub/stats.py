"""What a network costs, in the figures that timm's model cards give: parameters, multiplications and activations."""

import math
from dataclasses import dataclass

import timm
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..explaining.checking import random_image
from ..models.interface import TimmModel

__all__ = ["ModelStats", "measure_stats"]

aten = torch.ops.aten
PRODUCTS = (aten.convolution, aten.mm, aten.addmm, aten.bmm, aten.baddbmm)  # what activations are the outputs of


@dataclass(frozen=True)
class ModelStats:
    """The size of a network and the work for one image.

    Attributes:
        parameters: How many numbers it has learnt.
        macs: Multiply-accumulates of convolutions, linear layers and matrix products.
        activations: Numbers that these put out.
        image_size: Height and width of the image, in pixels.
    """

    parameters: int
    macs: int
    activations: int
    image_size: tuple[int, int]

    def lines(self) -> dict[str, str]:
        """As timm's cards name them: in millions and billions."""
        return {
            "Params (M)": _short(self.parameters / 1e6),
            "GMACs": _short(self.macs / 1e9),
            "Activations (M)": _short(self.activations / 1e6),
            "Image size": " x ".join(map(str, self.image_size)),
        }


def measure_stats(model: TimmModel) -> ModelStats:
    """Count while one image of the network's own size passes through it.

    timm counts the arithmetic of norm layers too: its GMACs are a few per cent more, its activations the same.

    Args:
        model: In eval mode, plain or B-cos.
    """
    height, width = timm.data.resolve_model_data_config(model)["input_size"][-2:]
    image = random_image(model.in_chans, (height, width)).to(next(model.parameters()).device)
    operations = FlopCounterMode(display=False)
    outputs = FlopCounterMode(display=False, custom_mapping=dict.fromkeys(PRODUCTS, _count_outputs))
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), operations, outputs:  # attention as its matrix products
        model(image)
    return ModelStats(
        sum(parameter.numel() for parameter in model.parameters()),
        operations.get_total_flops() // 2,
        outputs.get_total_flops(),
        (height, width),
    )


def _count_outputs(*_: object, out_shape: torch.Size, **__: object) -> int:
    return math.prod(out_shape)


def _short(number: float) -> str:
    """One decimal, as timm; of small networks two digits."""
    return f"{number:.1f}" if number >= 1 else f"{number:.2g}"
