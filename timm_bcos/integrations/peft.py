"""PEFT's adapters for B-cos layers: low-rank updates of the weight, so that merging them changes nothing.

PEFT adds an adapter's response to its layer's, Wx + BAx, which for a linear layer is (W + BA)x. A B-cos layer is not
linear in its weight: here the adapter changes the weight itself, and the layer responds with W + BA, before and after
merging. LoRA (arXiv 2106.09685), LoHa (2108.06098) and LoKr (2212.10650) do so. Adapters that leave the layer as it is,
and change what goes into or comes out of it, can be trained but not merged. All others are refused: most of them
compute with the layer's weight themselves, as a plain layer does.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from peft.tuners import loha, lokr, lora
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn

from ..errors import InputError, ModelStateError
from ..nn.base import BcosLayer
from ..nn.layers import BcosConv2d, BcosLinear
from ..nn.module_utils import clone
from .registration import marked, original

__all__ = ["register"]

# PEFT's classes that call the layer which they wrap, and change its input or response.
AROUND_THE_LAYER = {
    "adalora.SVDConv2d", "adalora.SVDLinear", "boft.Linear", "c3a.C3ALinear", "delora.DeloraLinear",
    "fourierft.FourierFTLinear", "gralora.Linear", "ia3.Conv2d", "ia3.Linear", "oft.Linear", "osf.Linear",
    "randlora.Linear", "road.Linear", "vblora.Linear", "vera.Linear", "waveft.WaveFTLinear",
}  # fmt: skip
Base: Any = BaseTunerLayer if TYPE_CHECKING else object


def plain_twin(layer: nn.Module) -> nn.Module:
    """A plain layer with the weight of a B-cos layer, for PEFT's methods that need the shape of the weight.

    Raises:
        InputError: If the layer already has an adapter of another kind.
    """
    if not isinstance(layer, BcosLayer):
        raise InputError(f"a {type(layer).__name__} around a B-cos layer: use one kind of adapter for each layer")
    rows, columns, *kernel = layer.weight.shape
    twin: nn.Module
    if isinstance(layer, BcosConv2d):
        twin = nn.Conv2d(columns, rows, kernel, bias=False, device="meta")  # type: ignore[arg-type]
    else:
        twin = nn.Linear(columns, rows, bias=False, device="meta")
    twin.weight = layer.weight
    return twin


class AdaptedWeight(Base):
    """A B-cos layer whose weight an adapter changes. The next base class is one of PEFT's adapted layers.

    Attributes:
        base_layer: The B-cos layer.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        super().__init__(plain_twin(base_layer), adapter_name, **kwargs)
        self.base_layer = base_layer

    @contextmanager
    def _as_plain(self) -> Iterator[None]:
        """Replace the layer by its plain twin for PEFT's methods that read its shape or write to its weight."""
        layer = self.base_layer
        self.base_layer = layer if type(layer) in (nn.Conv2d, nn.Linear) else plain_twin(layer)
        try:
            yield
        finally:
            self.base_layer = layer

    def update_layer(self, *args: Any, **kwargs: Any) -> None:
        with self._as_plain():
            super().update_layer(*args, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        with self._as_plain():
            super().merge(safe_merge, adapter_names)

    def unmerge(self) -> None:
        with self._as_plain():
            super().unmerge()

    def get_delta_weight(self, adapter_name: str, **kwargs: Any) -> Tensor:
        """What an adapter adds to the weight; in its shape."""
        if isinstance(self.base_layer, BcosLayer):  # a clone, because other threads may run this layer
            plain: Any = clone(self, base_layer=plain_twin(self.base_layer))
            return plain.get_delta_weight(adapter_name, **kwargs)
        return super().get_delta_weight(adapter_name, **kwargs)

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        if adapter_names is not None:
            raise InputError("adapter_names: the weights of B-cos layers are adapted for a whole batch, not by image")
        if self.disable_adapters and self.merged:
            self.unmerge()
        names = [name for name in self.active_adapters if name in self._available_adapters]
        if self.disable_adapters or self.merged or not names:
            return self.base_layer(x, *args, **kwargs)
        layer: Any = clone(self.base_layer)
        weight = layer.weight
        for name in names:
            weight = weight + self._update(name).to(weight.dtype)
        layer._parameters["weight"] = weight  # not a leaf, so `nn.Parameter` does not fit
        return layer(x, *args, **kwargs)

    def _update(self, name: str) -> Tensor:
        """What an adapter adds to the weight in a forward pass: with dropout, in training."""
        raise NotImplementedError


class AdaptedByLora(AdaptedWeight):
    """LoRA; its dropout leaves out inputs of the update, the same ones for all images of a batch."""

    @property
    def _available_adapters(self) -> set[str]:
        return {*self.lora_A}

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        rows, columns = module.weight.shape[:2]  # type: ignore[index]
        return columns, rows

    @property
    def lora_variants(self) -> dict[tuple[str, ...], None]:
        return {(): None}

    def resolve_lora_variant(self, *, config: Any, **kwargs: Any) -> None:
        if config.lora_bias:
            raise InputError("lora_bias=True: B-cos layers have no bias that an adapter's could be merged into")
        try:
            return super().resolve_lora_variant(config=config, **kwargs)
        except ValueError as error:
            chosen = "DoRA" if config.use_dora else "a variant of LoRA"
            raise InputError(
                f"{chosen} has no meaning for B-cos layers, whose weights have unit norm: use plain LoRA, as with "
                f"use_dora=False"
            ) from error

    def _update(self, name: str) -> Tensor:
        update = self.get_delta_weight(name)
        dropout: Any = self.lora_dropout[name]
        if not self.training or not isinstance(dropout, nn.Dropout):
            return update
        shape = [1, update.shape[1]] + [1] * (update.ndim - 2)
        return update * F.dropout(update.new_ones(shape), dropout.p)


class AdaptedByLycoris(AdaptedWeight):
    """LoHa and LoKr."""

    def _update(self, name: str) -> Tensor:
        drops_ranks = self.training and bool(self.rank_dropout[name])
        update = self.get_delta_weight(name, apply_rank_dropout=drops_ranks)
        is_left_out = self.training and torch.rand(()).item() < self.module_dropout[name]
        return torch.zeros_like(update) if is_left_out else update


class AdaptedByLoha(AdaptedByLycoris):
    """LoHa, computed by torch's own functions: explanation mode does not see into PEFT's `torch.autograd.Function`."""

    def get_delta_weight(self, adapter_name: str, *, apply_rank_dropout: bool = False, **kwargs: Any) -> Tensor:
        """What an adapter adds to the weight; in its shape."""
        product = self._factor(1, adapter_name) * self._factor(2, adapter_name) * self.scaling[adapter_name]
        update = product.reshape(self.get_base_layer().weight.shape)
        if not apply_rank_dropout:
            return update
        kept = (torch.rand(len(update), device=update.device) > self.rank_dropout[adapter_name]).to(update.dtype)
        kept = kept / kept.mean().clamp_min(1 / len(kept))
        return update * kept.view(-1, *[1] * (update.ndim - 1))

    def _factor(self, number: int, name: str) -> Tensor:
        """One of the two low-rank matrices, or kernels, whose elementwise product is the update."""
        a, b = (getattr(self, f"hada_w{number}_{side}")[name] for side in "ab")
        cores = getattr(self, f"hada_t{number}")
        if name in cores:
            return torch.einsum("ijkl,jr,ip->prkl", cores[name], b, a)
        return a @ b


class BcosLoraLinear(AdaptedByLora, lora.Linear):  # type: ignore[misc]
    """A `BcosLinear` with LoRA."""


class BcosLoraConv2d(AdaptedByLora, lora.Conv2d):  # type: ignore[misc]
    """A `BcosConv2d` with LoRA."""


class BcosLoHaLinear(AdaptedByLoha, loha.Linear):
    """A `BcosLinear` with LoHa."""


class BcosLoHaConv2d(AdaptedByLoha, loha.Conv2d):
    """A `BcosConv2d` with LoHa."""


class BcosLoKrLinear(AdaptedByLycoris, lokr.Linear):
    """A `BcosLinear` with LoKr."""


class BcosLoKrConv2d(AdaptedByLycoris, lokr.Conv2d):
    """A `BcosConv2d` with LoKr."""


def register() -> None:
    """Register B-cos layers in every `LoraConfig`, in the tables of LoHa and LoKr, and for the check before merging."""
    loras = {BcosLinear: BcosLoraLinear, BcosConv2d: BcosLoraConv2d}
    _then(lora.LoraConfig, "__post_init__", lambda config: config._register_custom_module(loras))
    tables = ((loha.LoHaModel, BcosLoHaLinear, BcosLoHaConv2d), (lokr.LoKrModel, BcosLoKrLinear, BcosLoKrConv2d))
    for tuner, linear, convolution in tables:
        ours = {BcosLinear: linear, BcosConv2d: convolution}
        tuner.layers_mapping = ours | tuner.layers_mapping  # PEFT takes the first match
    _then(BaseTuner, "_check_merge_allowed", _refuse_merge)
    _first(BaseTuner, "_replace_module", lambda tuner, parent, name, new, child: _refuse_bypass(new, name))


def _refuse_bypass(new: nn.Module, name: str) -> None:
    """Refuse adapters that may not call the B-cos layer which they wrap.

    Raises:
        InputError: Naming the layer and the adapter.
    """
    if not isinstance(new, BaseTunerLayer) or isinstance(new, AdaptedWeight):
        return
    layer, kind = new.get_base_layer(), type(new)
    package = kind.__module__.split(".")[-2]
    if isinstance(layer, BcosLayer) and f"{package}.{kind.__name__}" not in AROUND_THE_LAYER:
        raise InputError(
            f"{name}: the {kind.__name__} of peft.tuners.{package} may use the weight of a {type(layer).__name__} as "
            f"if it were a plain layer's: adapt this layer by LoRA, LoHa or LoKr, or leave it out of target_modules"
        )


def _then(kind: type, name: str, also: Callable[[Any], None]) -> None:
    """Call a function after a method of a class."""
    method = original(getattr(kind, name))

    @wraps(method)
    def both(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = method(self, *args, **kwargs)
        also(self)
        return found

    setattr(kind, name, marked(both))


def _first(kind: type, name: str, also: Callable[..., None]) -> None:
    """Call a function before a method of a class, with the same arguments."""
    method = original(getattr(kind, name))

    @wraps(method)
    def both(*args: Any) -> Any:
        also(*args)
        return method(*args)

    setattr(kind, name, marked(both))


def _refuse_merge(tuner: Any) -> None:
    """Refuse to merge adapters that add to the response of a B-cos layer.

    Raises:
        ModelStateError: Naming the layer.
    """
    for name, module in tuner.model.named_modules():
        if isinstance(module, BaseTunerLayer) and not isinstance(module, AdaptedWeight):
            layer = module.get_base_layer()
            if isinstance(layer, BcosLayer):
                raise ModelStateError(
                    f"{name}: {type(tuner).__name__.removesuffix('Model')} adds to the response of a "
                    f"{type(layer).__name__}, which is not linear in its weight: merging would change the outputs. "
                    f"Keep the adapter unmerged, or use LoRA, LoHa or LoKr"
                )
