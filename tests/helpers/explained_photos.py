"""Explanations that the tests of the page show."""

from functools import cache

import timm
from torch import Tensor, nn

from tests.helpers import PHOTOS, enliven, real_image
from timm_bcos import Explanation, explain_targets
from timm_bcos.data.photos import open_photo

NAMES = ["dress", "hat", "longsleeve", "outwear", "pants", "shirt", "shoes", "shorts", "skirt", "t-shirt"]
HOSTILE = '</script><img src="x" onerror="window.broken = true"><!-- {{data}}'


@cache
def clothes_network() -> nn.Module:
    return timm.create_model("bcos_efficientnet_lite0.clothing", pretrained=True).eval()


@cache
def photo_of_a_hat() -> Tensor:
    config = timm.data.resolve_model_data_config(clothes_network())
    transform = timm.data.create_transform(**config, is_training=False)
    return transform(open_photo(PHOTOS / "clothes" / "hat.jpg"))[None]


@cache
def explained_hat() -> Explanation:
    """A photo of a hat, explained for its four best classes."""
    return Explanation.stack(explain_targets(clothes_network(), photo_of_a_hat(), top=4))


def small(channels: int = 3, classes: int = 3) -> Explanation:
    """A network of random weights, explained for its best classes."""
    x = real_image(32)[:, :channels]
    model = enliven(timm.create_model("bcos_cnn9", in_chans=channels), x)
    return Explanation.stack(explain_targets(model, x, top=classes))
