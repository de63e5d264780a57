"""Heads: classifiers with temperature and logit bias, and the pooling before or after them."""

from typing import Any

from torch import Tensor, nn

from .._compat import timm_layers
from .functional import to_logits
from .layers import BcosConv2d, BcosLinear

__all__ = ["BcosConvClassifier", "BcosFlatten", "BcosLinearClassifier", "BcosPool2d"]


class BcosConvClassifier(BcosConv2d):
    """Classifier that responds at each position, then averages: logits = mean(response) / T + logit bias.

    In the official code (package `bcos`) these are a `BcosConv2d`, global pooling and a `LogitLayer`.

    Averaging after the B-cos transform lets each position vote by its own alignment (section 3.2.3 of
    arXiv 2205.10268).

    Args:
        in_features: Number of channels of the feature map.
        num_classes: Number of classes, K.
        temperature: T, the divisor of the logits.
        logit_bias: Fixed constant added to every logit. log(p / (1 - p)) makes all initial probabilities p.
        pool: Whether to average; without it the layer returns a map of logits (N, K, H, W).

    Shape: (N, in_features, H, W) to (N, K).

    Raises:
        InputError: For settings that `BcosConv2d` refuses.
    """

    __jit_unused_properties__ = ("in_features", "out_features")

    def __init__(
        self, in_features: int, num_classes: int, *, temperature: float = 1.0, logit_bias: float = 0.0,
        pool: bool = True, **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(in_features, num_classes, 1, **kwargs)
        self.temperature = float(temperature)
        self.logit_bias = float(logit_bias)
        self.pool = pool

    @property
    def in_features(self) -> int:
        """Number of channels of the feature map, as linear layers call it."""
        return self.in_channels

    @property
    def out_features(self) -> int:
        """Number of classes, as linear layers call it."""
        return self.out_channels

    def forward(self, x: Tensor) -> Tensor:
        y = self.respond(x)  # (N, K, H, W)
        if self.pool:
            y = y.mean((2, 3))
        return to_logits(y, self.temperature, self.logit_bias)

    def extra_repr(self) -> str:
        return super().extra_repr() + f", temperature={self.temperature:g}, logit_bias={self.logit_bias:.4g}"


class BcosLinearClassifier(BcosLinear):
    """Classifier on feature vectors: logits = response / T + logit bias. See `BcosConvClassifier` for the arguments.

    Shape: (..., in_features) to (..., K).

    Raises:
        InputError: For settings that `BcosLinear` refuses.
    """

    def __init__(
        self, in_features: int, num_classes: int, *, temperature: float = 1.0, logit_bias: float = 0.0, **kwargs: Any
    ) -> None:
        super().__init__(in_features, num_classes, **kwargs)
        self.temperature = float(temperature)
        self.logit_bias = float(logit_bias)

    def forward(self, x: Tensor) -> Tensor:
        return to_logits(self.respond(x), self.temperature, self.logit_bias)

    def extra_repr(self) -> str:
        return super().extra_repr() + f", temperature={self.temperature:g}, logit_bias={self.logit_bias:.4g}"


class BcosPool2d(timm_layers.SelectAdaptivePool2d):
    """timm's global pooling, which passes feature maps on if the classifier behind it pools by itself.

    Attributes:
        deferred: Whether a `BcosConvClassifier` follows, which pools. A converted model updates it in each pass.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.deferred = False

    @classmethod
    def from_pool(cls, pool: Any) -> "BcosPool2d":
        """Adopt the settings of timm's pooling layer."""
        size = getattr(pool.pool, "output_size", 1)
        new = cls(size, pool_type=pool.pool_type, flatten=isinstance(pool.flatten, nn.Flatten))
        return new.train(pool.training)

    def forward(self, x: Tensor) -> Tensor:
        return x if self.deferred else self.pool_now(x)

    def pool_now(self, x: Tensor) -> Tensor:
        """Pool regardless of `deferred`: (N, C, H, W) to (N, C)."""
        return self.flatten(self.pool(x))


class BcosFlatten(nn.Flatten):
    """`torch.nn.Flatten` of a head, which passes feature maps on if the classifier pools; see `BcosPool2d`."""

    def __init__(self, start_dim: int = 1, end_dim: int = -1) -> None:
        super().__init__(start_dim, end_dim)
        self.deferred = False

    def forward(self, x: Tensor) -> Tensor:
        return x if self.deferred else x.flatten(self.start_dim, self.end_dim)
