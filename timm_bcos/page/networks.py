"""The networks that a page offers, each with what the page asks of it again and again."""

from collections.abc import Sequence
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from ..data.transforms import photo_transform
from ..models.classes import class_names
from ..models.interface import BcosNetwork
from ..models.loading import load_model
from ..nn.modules import first_output, frozen_copy, hooked
from ..nn.stems import image_channels
from .uploads import decode_photo

__all__ = ["PageNetwork", "embedded_networks"]

EXAMPLES = Path(__file__).parent / "examples"
# The networks that come with the package: what they know, and photos for them, the first being shown first.
EMBEDDED = {
    "bcos_efficientnet_lite0.in1k": ("photos", ("cat", "coffee", "shoes")),
    "bcos_efficientnet_lite0.clothing": ("clothes", ("jacket", "hat", "shoes", "pants")),
    "bcos_cifar_resnet20": ("CIFAR-10", ("cat", "rocket")),
}


class PageNetwork:
    """A network on the page.

    Args:
        label: What visitors choose it by.
        model: In eval mode.
        names: Of its classes.
        examples: Photos to begin with.

    Attributes:
        layers: Paths of the modules whose neurons the page explains.
        layer: The one that it explains first; None if there are none.
        seconds_per_image: That a pass took when a photo was shown to it last; None before the first.

    Raises:
        InputError: For a network that takes neither grey nor coloured images.
    """

    def __init__(self, label: str, model: BcosNetwork, names: Sequence[str], examples: Sequence[Path] = ()) -> None:
        self.label, self.model, self.names, self.examples = label, model, list(names), list(examples)
        self.mode, self.transform = photo_transform(model)
        self.seconds_per_image: float | None = None
        self.layers = _layers_with_positions(model)
        stages = [stage["module"] for stage in getattr(model, "feature_info", None) or [] if "module" in stage]
        self.layer = next((name for name in reversed([*self.layers, *stages[:-1]]) if name in self.layers), None)

    def read(self, address: object) -> Tensor:
        """A photo from a browser as the network takes it, (1, C, H, W) in [0, 1].

        Args:
            address: As in `decode_photo`.

        Raises:
            InputError: For what is no photo.
        """
        image = self.transform(decode_photo(address, self.mode))
        return image[None].to(self.device)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self.model.parameters()).device


def embedded_networks() -> list[PageNetwork]:
    """The networks that need no download."""
    return [
        PageNetwork(f"{known}: {name}", model, class_names(model), [EXAMPLES / f"{photo}.jpg" for photo in photos])
        for name, (known, photos) in EMBEDDED.items()
        for model in [load_model(name).eval()]
    ]


@torch.no_grad()
def _layers_with_positions(model: BcosNetwork) -> list[str]:
    """The network's larger parts whose output is a map, or tokens, in the order of execution.

    Those that run several times have no single activation to explain.
    """
    copy = frozen_copy(model)
    names = {module: name for name, module in copy.named_modules() if _is_large_part(name, module)}
    runs: list[nn.Module] = []

    def record(module: nn.Module, args: object, output: object) -> None:
        value = first_output(output)
        if (
            isinstance(value, Tensor)
            and value.ndim in (3, 4)
            and value[0].numel() > max(value.shape[1], value.shape[-1])
        ):
            runs.append(module)

    weight = next(copy.parameters())
    _, *size = timm.data.resolve_model_data_config(model)["input_size"]
    with hooked(names, record):
        copy(torch.rand(1, image_channels(model) or 3, *size, generator=torch.Generator().manual_seed(0)).to(weight))
    return [names[module] for module in dict.fromkeys(runs) if runs.count(module) == 1]


def _is_large_part(name: str, module: nn.Module) -> bool:
    return name != "" and name.count(".") <= 1 and not isinstance(module, nn.Identity)
