"""Base class of B-cos convolutions and linear layers: their response, and their fusion for inference."""

import torch
from torch import Tensor, nn
from typing_extensions import Self

from ..errors import InputError, ModelStateError
from . import autograd
from .execution import records_gradients
from .module_utils import clone
from .primitives import effective_weight, has_amplitude, row_norm

__all__ = ["BcosLayer", "check_units", "refuse_fused"]


def refuse_fused(module: nn.Module) -> None:
    """Refuse to train a layer that has been fused for inference.

    Raises:
        ModelStateError: If the layer is fused.
    """
    if getattr(module, "is_fused", False):
        raise ModelStateError("this model has been fused for inference: train the one that it was made from")


def check_units(b: float, max_out: int, normalize_weight: bool) -> None:
    """Refuse invalid settings of a B-cos layer.

    Raises:
        InputError: For b or max_out below 1, and for max_out above 1 without normalized weights.
    """
    if b < 1 or max_out < 1:
        raise InputError(f"B-cos layers need b >= 1 and max_out >= 1, got b={b}, max_out={max_out}")
    if max_out > 1 and not normalize_weight:
        raise InputError(f"max_out={max_out} compares units by their cosine: it needs normalize_weight=True")


class BcosLayer(nn.Module):
    """Base class of B-cos convolutions and linear layers; torch's layer is the next base class.

    Attributes:
        b: Exponent B.
        max_out: Number of units per output.
        gamma: Fixed output scale γ.
        normalize_weight: Whether rows of the weight are divided by their norm.
        is_fused: Whether `weight` is the effective weight, γ and neighboring norms included (`timm_bcos.fuse`).
        amplitude: An additional factor of a fused layer's outputs; or None.
    """

    weight: Tensor
    bias: Tensor | None
    amplitude: Tensor | None
    b: float
    max_out: int
    gamma: float
    normalize_weight: bool
    is_fused: bool

    def _init_bcos(
        self, outputs: int, bias: bool, b: float, max_out: int, gamma: float, normalize_weight: bool
    ) -> None:
        """Add bias and settings to torch's layer, which has max_out · outputs rows and no bias."""
        if bias:
            self.bias = nn.Parameter(self.weight.new_zeros(outputs))
        self.b = float(b)
        self.max_out = max_out
        self.gamma = float(gamma)
        self.normalize_weight = normalize_weight
        self.is_fused = False
        self.register_buffer("amplitude", None)

    def forward(self, x: Tensor) -> Tensor:
        return self.respond(x)

    def respond(self, x: Tensor) -> Tensor:
        """The B-cos response; a method of its own because TorchScript has no `super()`."""
        x = self.prepare(x)
        if torch.jit.is_scripting() or not self._needs_custom_backward(x):
            y = self.formula(x)
        else:
            y = self._respond_custom_backward(x)
        return y if self.bias is None else y + self.per_output(self.bias)

    def prepare(self, x: Tensor) -> Tensor:
        """The input as the linear transform reads it."""
        return x

    def formula(self, x: Tensor) -> Tensor:
        """The response to prepared input, by torch's own functions."""
        raise NotImplementedError

    def transform(self) -> autograd.Transform:
        """The linear transform, for the custom backward pass."""
        raise NotImplementedError

    def per_output(self, values: Tensor) -> Tensor:
        """Values (O,) in the shape that broadcasts to the outputs."""
        raise NotImplementedError

    @torch.jit.unused
    def _needs_custom_backward(self, x: Tensor) -> bool:
        return not self.is_fused and self.b != 1.0 and records_gradients(x, self.weight)

    @torch.jit.unused
    def _respond_custom_backward(self, x: Tensor) -> Tensor:
        """`formula` with a custom backward pass, which is faster and needs less memory."""
        unit = autograd.Unit(self.b, self.gamma, self.max_out, self.normalize_weight)
        return autograd.bcos_response(x, self.weight, self.transform(), unit)

    def fuse(self) -> Self:
        """For timm's `reparameterize_model`: the layer for inference, its weight computed once."""
        return self if self.is_fused else self.folded()

    @torch.no_grad()
    def folded(self, after: Tensor | None = None, before: Tensor | None = None) -> Self:
        """A copy for inference, computed in float64: effective weights, with the scales of norms folded in.

        Args:
            after: Scale of the layer's output to fold in, (O,).
            before: Scale of a convolution's input to fold in, (C,).

        Raises:
            ModelStateError: For a layer that has been fused.
        """
        if self.is_fused:
            raise ModelStateError("the model has been fused before: fuse the model that it was made from")
        weight, amplitude = self._folded_weight(after)
        members: dict[str, Tensor] = {}
        if amplitude is not None:
            members["amplitude"] = self.per_output(amplitude)
        if before is not None:
            weight = weight * self.per_input(before)
            members["channel_squares"] = before.square()
        if self.bias is not None:
            members["bias"] = self.bias.double() if after is None else self.bias.double() * after
        members = {name: value.to(self.weight.dtype) for name, value in dict(weight=weight, **members).items()}
        parameters = {
            name: nn.Parameter(members.pop(name), requires_grad=False) for name in {"weight", "bias"} & {*members}
        }
        new = clone(self, **members, **parameters)
        new.gamma, new.is_fused = 1.0, True
        return new.eval()

    def _folded_weight(self, after: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The effective weight in float64 with γ and the output's scale folded in.

        A scale s of the output is s · y = |vᵀx| / ‖x‖ · vᵀx with v = sign(s) · √(γ|s|) · ŵ if B is 2, and vᵀx with
        v = s · γ · ŵ if B is 1. A scale of the input, y(s ⊙ x), moves into the weight as v = s ⊙ ŵ, and into the norm
        as ‖s ⊙ x‖² = Σ s² x².

        Returns:
            The weight, and the scale (O,) where it cannot be folded in: for other B than 1 and 2, and where it is not
            positive although MaxOut takes the largest of several units.
        """
        free = self.weight.detach().double()
        weight = effective_weight(free, self.b, self.normalize_weight)
        scale = free.new_full((len(free) // self.max_out,), self.gamma)
        if has_amplitude(self.b, self.normalize_weight):
            scale = scale * row_norm(free)
        if after is not None:
            scale = scale * after
        if self.b not in (1.0, 2.0) or (self.max_out > 1 and not bool((scale > 0).all())):
            return weight, scale
        rows = scale.repeat_interleave(self.max_out).reshape([-1] + [1] * (weight.ndim - 1))
        return weight * (rows if self.b == 1.0 else rows.sign() * rows.abs().sqrt()), None

    def per_input(self, scale: Tensor) -> Tensor:
        """A scale of input channels (C,) in the shape of weights (O, C / G, ...) of G groups."""
        groups: int = getattr(self, "groups", 1)
        rows = scale.reshape(groups, -1).repeat_interleave(self.weight.shape[0] // groups, 0)
        return rows.reshape([*rows.shape, *[1] * (self.weight.ndim - 2)])

    def train(self, mode: bool = True) -> Self:
        if mode:
            refuse_fused(self)
        return super().train(mode)

    def extra_repr(self) -> str:
        free = "" if self.normalize_weight else ", normalize_weight=False"
        fused = ", is_fused=True" if self.is_fused else ""
        return f"{super().extra_repr()}, b={self.b:g}, max_out={self.max_out}, gamma={self.gamma:g}{free}{fused}"
