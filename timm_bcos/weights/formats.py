"""State dicts of other formats, turned into those of this package's models: names, shapes, image channels.

Formats: the first paper's (`Sequential(network, pool, final)`, so names start with `0.`), the second paper's, both with
each convolution's weight one level deeper (`conv1.linear.weight`), and timm's plain models. A state dict that is in
our format passes unchanged.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from timm.models import adapt_input_conv
from torch import Tensor, nn

from ..conversion.settings import decode_settings, is_settings
from ..nn.heads import BcosConvClassifier, BcosLinearClassifier
from ..nn.layers import BcosConv2d, BcosLinear, ShiftedActivation
from ..nn.stems import BcosStem

__all__ = ["StateDict", "adapt_image_channels", "classifier_names", "convert_official_weights", "convert_plain_weights"]

StateDict = dict[str, Tensor]


@dataclass(frozen=True)
class Family:
    """How the official releases name a family's weights.

    Attributes:
        ours: A name that only this family has, in our format.
        patterns: Regular expressions for official names, and what replaces them; the first match counts.
        ordered: Prefixes, theirs and ours, under which layers match in their order: timm's sequences also count
            layers without weights.
    """

    ours: str
    patterns: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = ()
    ordered: tuple[str, str] | None = None


def _stage(path: str) -> Callable[[re.Match[str]], str]:
    """The release counts ConvNeXt's stem, stages and downsamplings as one: stage 0 is its 2, stage 1 its 3 and 4."""
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
        state_dict: In the format of either paper's release, or in ours.
        model: The model that it is for.

    Returns:
        A state dict in our format; names that nothing is known about stay as they are.
    """
    settings = {name: value for name, value in state_dict.items() if is_settings(name) or _says_settings(value)}
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


def _says_settings(value: Tensor) -> bool:
    """Under whatever name: weights are no bytes."""
    return value.dtype == torch.uint8 and bool(decode_settings(value))


INNER = re.compile(r"\.linear\.weight$")  # how the releases' names of convolutions' weights end
COUNTER = "num_batches_tracked"
MEAN = "running_mean"


def _strip(state_dict: StateDict, own: StateDict, is_nine_layers: bool) -> StateDict:
    """Names without the model's place in a Sequential and the inner `linear`; without what our model lacks."""
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
    """Classifiers and scales with or without trailing 1s; patches that were flattened as (rows, columns, channels)."""
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
    """Turn the weights of a plain model into those of its conversion; converted ones pass unchanged.

    Args:
        state_dict: From timm's architecture, or from the converted model.
        model: The converted model.

    Returns:
        A state dict that `model` loads. Gates' shifts, of which plain weights know nothing, stay the model's.
    """
    stems = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, BcosStem)}
    own = model.state_dict()
    if any(map(is_settings, state_dict)):
        return state_dict
    if all(key not in state_dict or state_dict[key].shape == own[key].shape for key in stems):
        return state_dict
    layers = {name: m for name, m in model.named_modules() if isinstance(m, BcosConv2d | BcosLinear)}
    units = {f"{name}.weight": m.max_out for name, m in layers.items() if m.max_out > 1}
    converted = {}
    for key, value in state_dict.items():
        if key not in own:
            continue  # biases and running means that the conversion dropped
        if key in stems:
            value = torch.cat([value, -value], 1) / 2
        if key in units:
            value = value.repeat_interleave(units[key], 0)
        if value.ndim == 2 and own[key].ndim == 4:  # a linear classifier that now votes per position
            value = value[:, :, None, None]
        converted[key] = value
    shifts = {f"{name}.shift" for name, m in model.named_modules() if isinstance(m, ShiftedActivation)}
    return {key: own[key] for key in shifts} | converted


def adapt_image_channels(state_dict: StateDict, model: nn.Module, channels: int) -> StateDict:
    """Fit stems to another number of image channels, as timm does: one channel sums, more repeat.

    Args:
        state_dict: In our format, for images with `channels` channels.
        model: The model that it is for.
        channels: Image channels of the weights.
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
    """Paths of the layers whose size is the number of classes, an auxiliary head's included."""
    return [name for name, m in model.named_modules() if isinstance(m, BcosConvClassifier | BcosLinearClassifier)]
