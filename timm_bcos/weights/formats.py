"""Conversion of state dicts of other formats to those of this package's models: names, shapes, image channels.

Formats are those of the first paper's release (`Sequential(network, pool, final)`, so names start with `0.`), of the
second paper's, both with the weight of convolutions one level deeper (`conv1.linear.weight`), and of timm's plain
models. A state dict in our format is returned unchanged.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from timm.models import adapt_input_conv
from torch import Tensor, nn

from ..conversion.settings import decode_settings, is_settings
from ..nn.base import BcosLayer
from ..nn.heads import BcosConvClassifier, BcosLinearClassifier
from ..nn.layers import ShiftedActivation
from ..nn.stems import BcosStem

__all__ = ["StateDict", "adapt_image_channels", "classifier_names", "convert_official_weights", "convert_plain_weights"]

StateDict = dict[str, Tensor]


@dataclass(frozen=True)
class Family:
    """Names of the weights of a family of architectures in the official releases.

    Attributes:
        ours: A name in our format that only this family has.
        patterns: Regular expressions for official names, and their replacements; the first match counts.
        ordered: An official prefix and ours, below which layers are matched by their order, because timm's indices also
            count layers without weights.
    """

    ours: str
    patterns: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = ()
    ordered: tuple[str, str] | None = None


def _stage(path: str) -> Callable[[re.Match[str]], str]:
    """The official index of a stage of ConvNeXt as ours: theirs also count the stem and downsampling layers."""
    return lambda match: f"stages.{(int(match[1]) - 1) // 2}." + match.expand(path)


FAMILIES = (
    Family(
        "stages.0.blocks.0.gamma",
        (
            (r"features\.([01])\.weight", r"stem.\1.weight"),
            (r"features\.([01])\.(running_var|num_batches_tracked)", r"stem.\1.\2"),
            (r"features\.(\d)\.(\d+)\.block\.0\.(\w+)", _stage(r"blocks.\2.conv_dw.\3")),
            (r"features\.(\d)\.(\d+)\.block\.1\.(\w+)", _stage(r"blocks.\2.norm.\3")),
            (r"features\.(\d)\.(\d+)\.block\.2\.(\w+)", _stage(r"blocks.\2.mlp.fc1.\3")),
            (r"features\.(\d)\.(\d+)\.block\.3\.(\w+)", _stage(r"blocks.\2.mlp.fc2.\3")),
            (r"features\.(\d)\.(\d+)\.layer_scale", _stage(r"blocks.\2.gamma")),
            (r"features\.(\d)\.([01])\.(\w+)", _stage(r"downsample.\2.\3")),
            (r"classifier\.0\.(\w+)", r"norm_pre.\1"),
            (r"classifier\.1\.weight", r"head.fc.weight"),
        ),
    ),
    Family(
        "blocks.0.attn.qkv.weight",
        (
            (r"to_patch_embedding\.linear\.weight", r"patch_embed.proj.weight"),
            (r"transformer\.encoder_(\d+)\.attn\.norm\.weight", r"blocks.\1.norm1.weight"),
            (r"transformer\.encoder_(\d+)\.attn\.to_qkv\.weight", r"blocks.\1.attn.qkv.weight"),
            (r"transformer\.encoder_(\d+)\.attn\.to_out\.weight", r"blocks.\1.attn.proj.weight"),
            (r"transformer\.encoder_(\d+)\.ff\.net\.norm\.weight", r"blocks.\1.norm2.weight"),
            (r"transformer\.encoder_(\d+)\.ff\.net\.linear([12])\.weight", r"blocks.\1.mlp.fc\2.weight"),
            (r"linear_head\.norm\.weight", r"fc_norm.weight"),
            (r"linear_head\.linear\.weight", r"head.weight"),
        ),
        ("to_patch_embedding.conv_stem.", "patch_embed.backbone."),
    ),
    Family(
        "pre_logits.fc1.weight",
        (
            (r"classifier\.([01])\.weight", lambda match: f"pre_logits.fc{int(match[1]) + 1}.weight"),
            (r"classifier\.2\.weight", r"head.fc.weight"),
        ),
        ("features.", "features."),
    ),
)
NINE_LAYERS = Family("", ((r"8\.weight", "fc.weight"), (r"(\d)\.weight", r"features.\1.weight")))


def convert_official_weights(state_dict: StateDict, model: nn.Module) -> StateDict:
    """Rename and reshape the weights of an official release for one of our models.

    Args:
        state_dict: State dict in the format of either paper's release, or in ours.
        model: The model that will load it.

    Returns:
        A state dict in our format. Unknown names are not changed.
    """
    settings = {name: value for name, value in state_dict.items() if is_settings(name) or _holds_settings(value)}
    state_dict = {name: value for name, value in state_dict.items() if name not in settings}
    if any(INNER.search(name) for name in state_dict):
        settings = {}  # releases have none
    own = {name: value for name, value in model.state_dict().items() if not is_settings(name)}
    if state_dict.keys() == own.keys():
        return state_dict | settings
    is_nine_layers = all(re.fullmatch(r"\d\.(linear\.)?weight", name) for name in state_dict)
    family = NINE_LAYERS if is_nine_layers else next((f for f in FAMILIES if f.ours in own), Family(""))
    weights = {_rename(name, family): value for name, value in _strip(state_dict, own, is_nine_layers).items()}
    if family.ordered is not None:
        weights = _match_in_order(weights, own, *family.ordered)
    weights = {name: _reshape(value, own[name]) if name in own else value for name, value in weights.items()}
    return {name: value for name, value in own.items() if name.endswith(COUNTER)} | weights | settings


def _holds_settings(value: Tensor) -> bool:
    """Whether a tensor contains settings, whatever its name; weights are not of bytes."""
    return value.dtype == torch.uint8 and bool(decode_settings(value))


INNER = re.compile(r"\.linear\.weight$")  # how the releases' names of convolutions' weights end
COUNTER = "num_batches_tracked"
MEAN = "running_mean"


def _strip(state_dict: StateDict, own: StateDict, is_nine_layers: bool) -> StateDict:
    """Remove the index in a Sequential and the inner `linear` from names, and the weights that our model lacks."""
    prefix = "0." if all(name.startswith("0.") for name in state_dict) and not is_nine_layers else ""
    lacks_means = not any(name.endswith(MEAN) for name in own)  # uncentered batch norm has none
    lacks_auxiliary_head = not any(name.startswith("AuxLogits.") for name in own)
    stripped = {}
    for name, value in state_dict.items():
        name = INNER.sub(".weight", name.removeprefix(prefix))
        is_useless = (lacks_means and name.endswith(MEAN)) or (lacks_auxiliary_head and name.startswith("AuxLogits."))
        if not is_useless and not name.endswith(COUNTER):
            stripped[name] = value
    return stripped


def _rename(name: str, family: Family) -> str:
    for pattern, replacement in family.patterns:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, replacement, name)
    return name


def _match_in_order(weights: StateDict, own: StateDict, theirs: str, ours: str) -> StateDict:
    old = sorted((name for name in weights if name.startswith(theirs)), key=_natural)
    new = sorted((name for name in own if name.startswith(ours) and not name.endswith(COUNTER)), key=_natural)
    if len(old) != len(new):
        return weights
    renamed = dict(zip(old, new, strict=True))
    return {renamed.get(name, name): value for name, value in weights.items()}


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _reshape(value: Tensor, own: Tensor) -> Tensor:
    """Reshape classifiers and scales with or without axes of length 1, and patches of (rows, columns, channels)."""
    if value.shape == own.shape:
        return value
    if value.ndim == 2 and own.ndim == 4 and own.shape[2] > 1 and value.shape[1] % own[0, 0].numel() == 0:
        return value.unflatten(1, (*own.shape[2:], -1)).permute(0, 3, 1, 2)
    if _squeezed(value) == _squeezed(own):
        return value.reshape(own.shape)
    return value


def _squeezed(tensor: Tensor) -> list[int]:
    return [size for size in tensor.shape if size != 1]


def convert_plain_weights(state_dict: StateDict, model: nn.Module) -> StateDict:
    """Convert the weights of a plain model to those of its conversion; converted weights are returned unchanged.

    Args:
        state_dict: State dict of timm's architecture, or of the converted model.
        model: The converted model.

    Returns:
        A state dict that `model` loads. Shifts of activations, which plain weights do not have, are the model's own.
    """
    own, modules = model.state_dict(), dict(model.named_modules())
    stems = {f"{name}.weight" for name, m in modules.items() if isinstance(m, BcosStem)}
    if any(map(is_settings, state_dict)):
        return state_dict
    if all(key not in state_dict or state_dict[key].shape == own[key].shape for key in stems):
        return state_dict
    layers = {f"{name}.weight": m for name, m in modules.items() if isinstance(m, BcosLayer)}
    kept = {key: value for key, value in state_dict.items() if key in own}  # the conversion drops biases and means
    converted = {key: _convert_plain_weight(value, own[key], layers.get(key)) for key, value in kept.items()}
    shifts = {f"{name}.shift" for name, m in modules.items() if isinstance(m, ShiftedActivation)}
    return {key: own[key] for key in shifts} | converted


def _convert_plain_weight(value: Tensor, own: Tensor, layer: BcosLayer | None) -> Tensor:
    """Encode the input channels of a stem, repeat rows for MaxOut, and let a classifier vote per position."""
    if isinstance(layer, BcosStem):
        value = torch.cat([value, -value], 1) / 2
    if layer is not None and layer.max_out > 1:
        value = value.repeat_interleave(layer.max_out, 0)
    return value[:, :, None, None] if value.ndim == 2 and own.ndim == 4 else value


def adapt_image_channels(state_dict: StateDict, model: nn.Module, channels: int) -> StateDict:
    """Adapt the weights of stems to another number of image channels, as timm does.

    Args:
        state_dict: State dict in our format, for images with `channels` channels.
        model: The model that will load it.
        channels: Number of image channels of the weights.
    """
    adapted = dict(state_dict)
    for name, stem in model.named_modules():
        key = f"{name}.weight"
        if not isinstance(stem, BcosStem) or stem.image_channels == channels or key not in state_dict:
            continue
        if state_dict[key].ndim == 4 and state_dict[key].shape[1] == 2 * channels:
            halves = state_dict[key].chunk(2, dim=1)  # of the image and of its complement
            adapted[key] = torch.cat([adapt_input_conv(stem.image_channels, half, channels) for half in halves], 1)
    return adapted


def classifier_names(model: nn.Module) -> list[str]:
    """Paths of the classifiers, including that of an auxiliary head."""
    return [name for name, m in model.named_modules() if isinstance(m, BcosConvClassifier | BcosLinearClassifier)]
