"""`BcosConfig`, the options of a conversion, and its presets for the papers' models."""

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypeVar

from ..errors import InputError

__all__ = ["BcosConfig"]

T = TypeVar("T")

CHOICES = {
    "norm": ("keep", "uncentered", "remove"),
    "activation": ("keep", "remove"),
    "max_pool": ("keep", "average"),
    "stem": ("normalized", "encoded"),
    "probability": ("sigmoid", "softmax"),
    "classify_positions": ("never", "linear", "always"),
    "positions": ("keep", "attention"),
}

# Fields that are True or False, with their other values.
SWITCHES: dict[str, tuple[str, ...]] = {"normalize_weight": (), "bias": ("reference",), "antialias": ()}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _are_numbers(values: object, fits: Callable[[float], bool]) -> bool:
    return isinstance(values, tuple) and len(values) > 0 and all(_is_number(value) and fits(value) for value in values)


# Valid numbers, in words and as a test.
NUMBERS: dict[str, tuple[str, Callable[[float], bool]]] = {
    "b": ("a number with b >= 1", lambda value: value >= 1),
    "max_out": ("a whole number of at least 1", lambda value: isinstance(value, int) and value >= 1),
    "gamma": ("a positive number", lambda value: value > 0),
    "gamma_scale": ("a positive number or None", lambda value: value > 0),
    "temperature": ("a positive number", lambda value: value > 0),
    "logit_bias": ("a number or None", lambda value: True),
}
OPTIONAL = ("gamma_scale", "logit_bias")  # may also be None
# Valid numbers in tuples with one number per image channel or one for all.
PER_CHANNEL: dict[str, tuple[str, Callable[[float], bool]]] = {
    "mean": ("numbers", lambda value: True),
    "std": ("positive numbers", lambda value: value > 0),
}

# Names of the projections of attention in timm.
QKV = ("*qkv", "*in_proj", *(f"*.{name}{end}" for name in ("q", "k", "v", "kv") for end in ("", "_proj")))


@dataclass(frozen=True, kw_only=True)
class BcosConfig:
    """Options of `bcosify`. The defaults are those of `BcosConfig.finetune` at B = 2.

    Args:
        b: Exponent B of each convolution and linear layer; 1 is linear.
        max_out: Number M of MaxOut units per output.
        gamma: Fixed output scale γ of each layer.
        gamma_scale: Number s that replaces `gamma` by γ = s / √d, d = kernel height · width · input channels.
        normalize_weight: Whether the rows of weights are normalized to unit norm (ŵ) or used as they are, as in
            pretrained models.
        bias: True keeps additive biases of layers and norms, which the image does not explain. 'reference' removes
            them, but the biases of batch norms with a built-in activation still act in its gate (`ShiftedActivation`):
            the image explains everything, and much of what the model has learned is preserved.
        norm: 'keep' (as a dynamic linear map), 'uncentered' (batch norms only divide) or 'remove'. Without biases,
            'keep' also uncenters batch norms, since the running mean is a bias.
        activation: 'keep' (as a dynamic linear map) or 'remove'.
        max_pool: 'keep' or 'average'.
        stem: 'normalized' normalizes the encoded image by mean and std, so that the first layer initially computes what
            the original one does; 'encoded' passes it unchanged to a first layer with twice the input channels.
        mean: Channel means for the 'normalized' stem, one for each channel of the image or one for all; None takes them
            from `model.pretrained_cfg`.
        std: Channel standard deviations for the 'normalized' stem, in the same form as `mean`.
        classify_positions: When to apply the classifier at each position, before average pooling: 'never', 'linear' (if
            only linear layers are between pooling and classifier; the function is the same at b = 1) or 'always' (norms
            between them act per position, too).
        temperature: Divisor T of the pooled outputs of the classifier.
        logit_bias: Constant added to each logit; None is log(p / (1 - p)) at p = 1 / num_classes.
        probability: Function from logits to probabilities: 'sigmoid' after training with binary cross-entropy, as is
            usual for B-cos models, or 'softmax' after training with cross-entropy.
        linear: Patterns of names of modules that stay linear (B = 1, weights not normalized), classifiers included. By
            default, projections to queries, keys and values, as in the B-cos transformers.
        positions: How a vision transformer uses position embeddings and class tokens: 'keep' adds them to the tokens,
            as in training, so that part of each logit is not explained by the image; 'attention' adds them to queries
            and keys only, so that the image explains the whole logit. This changes the function: train the model.
        antialias: Whether to filter by [1, 2, 1] / 4 before convolutions with a stride, except those that cut their
            input into patches without overlap, and after max pooling with a stride. Strides sample unevenly, which
            explanations show as checkerboard patterns. This changes the function: train the model.

    Raises:
        InputError: For a value outside its choices or its range.
    """

    b: float = 2.0
    max_out: int = 1
    gamma: float = 1.0
    gamma_scale: float | None = None
    normalize_weight: bool = False
    bias: bool | Literal["reference"] = False
    norm: Literal["keep", "uncentered", "remove"] = "keep"
    activation: Literal["keep", "remove"] = "keep"
    max_pool: Literal["keep", "average"] = "keep"
    stem: Literal["normalized", "encoded"] = "normalized"
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    classify_positions: Literal["never", "linear", "always"] = "linear"
    temperature: float = 1.0
    logit_bias: float | None = 0.0
    probability: Literal["sigmoid", "softmax"] = "sigmoid"
    linear: tuple[str, ...] = QKV
    positions: Literal["keep", "attention"] = "keep"
    antialias: bool = False

    def __post_init__(self) -> None:
        for name in ("mean", "std", "linear"):  # JSON and command lines make lists
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        for name, advice in self._problems():
            raise InputError(f"BcosConfig({name}={getattr(self, name)!r}): {advice}")

    def _problems(self) -> Iterator[tuple[str, str]]:
        """Fields with values outside their choices or ranges, each with advice."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, choices in CHOICES.items():
            if values[name] not in choices:
                yield name, f"choose one of {', '.join(choices)}"
        for name, others in SWITCHES.items():
            if not isinstance(values[name], bool) and values[name] not in others:
                yield name, f"give {' or '.join(('True', 'False', *map(repr, others)))}"
        for name, (kind, fits) in NUMBERS.items():
            is_left_out = values[name] is None and name in OPTIONAL
            if not is_left_out and not (_is_number(values[name]) and fits(values[name])):
                yield name, f"give {kind}"
        for name, (kind, fits) in PER_CHANNEL.items():
            if values[name] is not None and not _are_numbers(values[name], fits):
                yield name, f"give a tuple of {kind}, one for each channel of the image or one for all"
        if not isinstance(self.linear, tuple) or not all(isinstance(pattern, str) for pattern in self.linear):
            yield "linear", "give a tuple of patterns of module names"
        if self.max_out != 1 and not self.normalize_weight:
            yield "max_out", "units are compared by their cosine, which needs normalize_weight=True"

    @classmethod
    def paper(cls, *, gamma_scale: float | None = None, temperature: float = 1.0, **changes: Any) -> "BcosConfig":
        """Config of the first paper: MaxOut 2, no norms, activations or biases (section 4 of arXiv 2205.10268).

        Args:
            gamma_scale: Number s in γ = s / √d.
            temperature: Divisor T of the pooled outputs of the classifier.
            changes: Values of other fields.
        """
        preset: dict[str, Any] = dict(
            max_out=2, gamma_scale=gamma_scale, temperature=temperature, normalize_weight=True, norm="remove",
            activation="remove", max_pool="average", stem="encoded", logit_bias=math.log(0.01 / 0.99), linear=(),
        )  # fmt: skip
        return cls(**(preset | changes))

    @classmethod
    def v2(cls, **changes: Any) -> "BcosConfig":
        """Config of the second paper: unit norm, γ = 1, uncentered batch norm (section 3 of arXiv 2306.10898)."""
        preset: dict[str, Any] = dict(
            normalize_weight=True, norm="uncentered", activation="remove", max_pool="average", stem="encoded",
            logit_bias=None, classify_positions="always",
        )  # fmt: skip
        return cls(**(preset | changes))

    @classmethod
    def finetune(cls, *, b: float = 2.0, bias: bool | Literal["reference"] = False, **changes: Any) -> "BcosConfig":
        """Config to fine-tune a pretrained model, which keeps weights, norms and activations (B-cosification,
        https://arxiv.org/abs/2411.00715).

        With b = 1 and bias = True, and without `antialias`, the function is preserved: logits are those of the original
        model for the same image, and probabilities are their softmax.
        """
        preset = dict(probability="softmax" if b == 1 and bias is True else "sigmoid")
        return cls(b=b, bias=bias, **(preset | changes))

    @property
    def adds_bias(self) -> bool:
        """Whether additive biases are kept."""
        return self.bias is True

    def layer_gamma(self, fan_in: int) -> float:
        """γ of a layer with `fan_in` inputs per unit (kernel height · width · input channels)."""
        return self.gamma if self.gamma_scale is None else self.gamma_scale / math.sqrt(fan_in)

    def class_bias(self, num_classes: int) -> float:
        """The logit bias for a number of classes."""
        if self.logit_bias is None:
            return -math.log(max(num_classes - 1, 1))
        return self.logit_bias

    def for_new_classifier(self, chosen: Collection[str] = ()) -> "BcosConfig":
        """The config for a classifier with random weights, to be trained on other classes than the model's own.

        Each class starts at the probability 1 / num_classes (`logit_bias=None`), and probabilities are sigmoids, as in
        training with binary cross-entropy. With cross-entropy the logit bias has no effect, since it is the same for
        all classes. Classifiers with a bias of their own keep the config: they learn these constants.

        Args:
            chosen: Names of fields that the user chose, which stay.
        """
        changes = {} if self.adds_bias else dict(logit_bias=None, probability="sigmoid")
        return self.change(**{name: value for name, value in changes.items() if name not in chosen})

    @classmethod
    def split(cls, kwargs: dict[str, T]) -> tuple[dict[str, T], dict[str, T]]:
        """Split keyword arguments into fields of this class and others, which are for timm."""
        names = {f.name for f in fields(cls)}
        own = {name: value for name, value in kwargs.items() if name in names}
        return own, {name: value for name, value in kwargs.items() if name not in names}

    def change(self, **changes: Any) -> "BcosConfig":
        """Copy the config with other values; `gamma` also resets `gamma_scale`."""
        if "gamma" in changes:
            changes.setdefault("gamma_scale", None)
        return replace(self, **changes)
