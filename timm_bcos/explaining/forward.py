"""Exact explanations: rows of the linear map that a B-cos network is for its input, logits = W(x) · x + constants.

Papers: https://arxiv.org/abs/2205.10268 (section 3.2), https://arxiv.org/abs/2306.10898 (section 3.1).
"""

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..dynamic.mode import explanation_mode
from ..errors import InputError, ModelStateError, TargetError
from ..explaining.explanation import Explanation
from ..nn.functional import encode_image
from ..nn.heads import BcosConvClassifier, BcosLinearClassifier
from ..nn.stems import BcosStem, ImageReader

__all__ = ["explain", "explain_targets"]

Targets = int | Sequence[int] | Tensor | None


def explain(
    model: nn.Module, x: Tensor, target: Targets = None, *, layer: str | None = None,
    position: int | tuple[int, int] | None = None,
) -> Explanation:  # fmt: skip
    """Explain one output per image, with one forward and one backward pass for the whole batch.

    Args:
        model: A B-cos network in evaluation mode. Its gradients, modes and hooks stay as they are.
        x: Images (N, C, H, W) in [0, 1], without mean/std normalisation, or already encoded (N, 2C, H, W). Unchanged.
        target: The class: None for the prediction, an int for all images, or N ints. With `layer`, the unit (channel);
            None takes the one that is most active.
        layer: Path of an inner module, as in `model.named_modules()`, to explain one of its neurons.
        position: The neuron's (row, column), or index for token sequences; None takes where the unit is most active.

    Returns:
        The explanation.

    Raises:
        InputError: For tensors that are no images as above.
        TargetError: For a class, layer, unit or position that does not exist.
        ModelStateError: For a model in training mode, or one that is no B-cos network.

    Example:
        >>> explanation = timm_bcos.explain(model, transform(photo)[None])
        >>> explanation.completeness_error, explanation.contribution_map
    """
    with _Pass(model, x, layer) as forward:
        neurons = forward.neurons(target, position)
        return forward.explain(neurons)


def explain_targets(
    model: nn.Module, x: Tensor, targets: Sequence[Sequence[int]] | Tensor | None = None, *, top: int = 3
) -> list[Explanation]:
    """Explain several classes of each image with one forward pass, and a backward pass per column of `targets`.

    Args:
        model: As in `explain`.
        x: As in `explain`.
        targets: (N, T) classes; None takes the `top` most probable ones of each image, best first.
        top: T where `targets` is None.

    Returns:
        T explanations, one per column of `targets`.
    """
    with _Pass(model, x, None) as forward:
        classes = forward.readout.shape[1]
        if targets is None:
            if not 1 <= top <= classes:
                raise TargetError(f"top={top}: the model has {classes} classes")
            targets = forward.readout.topk(top, dim=1).indices
        table = torch.as_tensor(targets)
        if table.ndim != 2 or len(table) != len(forward.inputs):
            raise TargetError(
                f"targets of shape {tuple(table.shape)}: give {len(forward.inputs)} rows (one per image) of classes"
            )
        return [forward.explain(forward.neurons(column, None)) for column in table.T]


class _Captured(Exception):  # noqa: N818  (a signal, no error)
    """Ends a forward pass once the layer wanted has answered."""


@dataclass
class _Neurons:
    values: Tensor  # (N,) on the graph
    activations: Tensor  # (N, K) at the neurons' positions
    unit: Tensor  # (N,)
    constants: Tensor  # (N,) derivative by all additive constants behind the stem
    position: Tensor | None  # (N, 2)


class _Pass:
    """One forward pass in explanation mode, from which any number of neurons are explained."""

    def __init__(self, model: nn.Module, x: Tensor, layer: str | None) -> None:
        self.model, self.layer = model, layer
        stem = _check_model(model)
        _check_images(x, stem)
        if layer is not None and layer not in dict(model.named_modules()):
            raise TargetError(f"no layer {layer!r}; {_suggest(layer, [name for name, _ in model.named_modules()])}")
        with torch.no_grad():
            self.inputs = encode_image(x.detach(), stem.image_channels).to(stem.weight.dtype, copy=True)

    def __enter__(self) -> "_Pass":
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            stack.enter_context(_uncompiled())
            stack.enter_context(explanation_mode(self.model))
            stack.enter_context(forward_ad.dual_level())
            self.leaf = self.inputs.clone().requires_grad_()
            self.offset_factor = self.leaf.new_ones(len(self.leaf), 1, 1, 1).requires_grad_()
            self.leaf.offset_factor = self.offset_factor  # type: ignore[attr-defined]
            output = self._forward()
            self._check_output(output)
            self.output, tangent = forward_ad.unpack_dual(output)
            self.tangent = torch.zeros_like(self.output) if tangent is None else tangent
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def _forward(self) -> Tensor:
        if self.layer is None:
            output = self.model(self.leaf)
            return output[0] if isinstance(output, tuple) else output  # the rest are auxiliary heads
        captured: list[Tensor] = []
        handle = self.model.get_submodule(self.layer).register_forward_hook(_capture_into(captured))
        try:
            self.model(self.leaf)
        except _Captured:
            pass
        finally:
            handle.remove()
        if not captured:
            raise TargetError(f"layer {self.layer!r} did not run for this input")
        return captured[0]

    def _check_output(self, output: Any) -> None:
        what = "the model" if self.layer is None else f"layer {self.layer!r}"
        dims = (2,) if self.layer is None else (2, 3, 4)
        if not isinstance(output, Tensor) or output.ndim not in dims or len(output) != len(self.leaf):
            shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise TargetError(f"{what} returns {shape}; one row of units per image is needed")
        if not output.requires_grad:
            raise TargetError(f"{what} only scales the image's path (a gate or a statistic): pick another layer")

    @property
    def readout(self) -> Tensor:
        """(N, K) outputs, off the graph."""
        return self.output.detach()

    def _by_position(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """(N, K, P) and the grid of the P positions."""
        if x.ndim == 2:
            return x[:, :, None], (1, 1)
        if x.ndim == 3:  # tokens (N, P, K)
            return x.transpose(1, 2), (1, x.shape[1])
        if getattr(self.model, "output_fmt", "NCHW") == "NHWC":
            x = x.permute(0, 3, 1, 2)
        return x.flatten(2), (x.shape[2], x.shape[3])

    def neurons(self, target: Targets, position: int | tuple[int, int] | None) -> _Neurons:
        """Look the neurons up: a unit and a position per image."""
        maps, grid = self._by_position(self.output)
        tangents, _ = self._by_position(self.tangent)
        peaks = maps.detach()
        place = None if position is None else _position_index(position, grid)
        scores = peaks.amax(2) if place is None else peaks[:, :, place]
        unit = scores.argmax(1) if target is None else self._check_target(target, maps.shape[1])
        rows = torch.arange(len(maps), device=maps.device)
        at = peaks[rows, unit].argmax(1) if place is None else torch.full_like(rows, place)
        where = torch.stack([at // grid[1], at % grid[1]], 1) if self.layer is not None else None
        return _Neurons(maps[rows, unit, at], peaks[rows, :, at], unit, tangents[rows, unit, at], where)

    def _check_target(self, target: int | Sequence[int] | Tensor, count: int) -> Tensor:
        what = "classes" if self.layer is None else f"units in layer {self.layer!r}"
        units = torch.as_tensor(target, device=self.leaf.device)
        if units.is_floating_point() or units.ndim > 1 or (units.ndim == 1 and len(units) != len(self.leaf)):
            raise TargetError(f"target={target!r}: give an int, or one int for each of the {len(self.leaf)} images")
        if bool(((units < 0) | (units >= count)).any()):
            raise TargetError(f"target={target!r}: the model has {count} {what}, counted from 0")
        return units.long().expand(len(self.leaf))

    def explain(self, neurons: _Neurons) -> Explanation:
        """One backward pass: images do not see each other, so the gradient of the sum holds each one's row of W."""
        weights, offset = torch.autograd.grad(
            neurons.values.sum(), [self.leaf, self.offset_factor], retain_graph=True, materialize_grads=True
        )
        return Explanation(
            logits=neurons.activations,
            target=neurons.unit,
            weights=weights,
            inputs=self.inputs,
            bias=neurons.constants.detach() + offset.flatten(),
            logit_bias=_logit_bias(self.model) if self.layer is None else 0.0,
            layer=self.layer,
            position=neurons.position,
            probability_kind=_probability_kind(self.model),
        )


def _capture_into(captured: list[Tensor]) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        captured.append(output[0] if isinstance(output, tuple) else output)
        raise _Captured

    return hook


def _uncompiled() -> AbstractContextManager[Any]:
    """What `torch.compile` has made of a model holds no explanation mode: meanwhile it runs as it was written."""
    is_loaded = "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance")
    return torch.compiler.set_stance("force_eager") if is_loaded else nullcontext()


def _check_model(model: nn.Module) -> BcosStem | ImageReader:
    stems = [m for m in model.modules() if isinstance(m, BcosStem | ImageReader)]
    if not stems:
        raise ModelStateError(
            f"{type(model).__name__} is no B-cos network: create one with timm.create_model('bcos_...'), "
            f"or convert it with timm_bcos.bcosify(model)"
        )
    training = [name or "the model" for name, m in model.named_modules() if m.training]
    if training:
        raise ModelStateError(f"{training[0]} is in training mode: call model.eval() first")
    return stems[0]


def _check_images(x: Tensor, stem: BcosStem | ImageReader) -> None:
    channels = stem.image_channels
    if not isinstance(x, Tensor):
        raise InputError(f"expected a tensor of images, got {type(x).__name__}: apply the model's transform first")
    if torch.is_inference_mode_enabled() or x.is_inference():
        raise InputError(
            "explanations need autograd, which torch.inference_mode() rules out: use torch.no_grad() instead, and "
            "clone() tensors that were made in it"
        )
    if x.ndim != 4 or x.shape[1] not in (channels, 2 * channels):
        encode_image(x, channels)  # raises, naming the shape
    if 0 in x.shape:
        raise InputError(f"images of shape {tuple(x.shape)} are empty")
    if x.device != stem.weight.device:
        raise InputError(f"images are on {x.device}, the model is on {stem.weight.device}: move one of them")
    if not x.is_floating_point():
        raise InputError(f"expected floating-point pixels in [0, 1], got {x.dtype}: divide by 255 first")
    _check_range(x)


def _check_range(x: Tensor) -> None:
    if not bool(x.isfinite().all()):
        raise InputError("images contain NaN or infinite pixels")
    low, high = x.detach().min().item(), x.detach().max().item()
    if low < -1e-4 or high > 1 + 1e-4:
        hint = (
            "divide by 255"
            if low >= 0 and high > 16
            else "it looks mean/std-normalised: leave that out (mean 0, std 1)"
        )
        raise InputError(f"pixels must lie in [0, 1], got [{low:.3g}, {high:.3g}]; {hint}")


def _suggest(name: str, known: list[str]) -> str:
    import difflib

    near = difflib.get_close_matches(name, known, n=3)
    return f"close names: {', '.join(near)}" if near else "see model.named_modules() for their names"


def _position_index(position: int | tuple[int, int], grid: tuple[int, int]) -> int:
    row, column = (0, position) if isinstance(position, int) else position
    if not (0 <= row < grid[0] and 0 <= column < grid[1]):
        raise TargetError(f"position={position!r}: the layer's map has {grid[0]} rows and {grid[1]} columns")
    return row * grid[1] + column


def _logit_bias(model: Any) -> float:
    found = model.get_classifier() if hasattr(model, "get_classifier") else None
    heads = [found] if isinstance(found, nn.Module) else list(model.modules())
    biases = [m.logit_bias for m in heads if isinstance(m, BcosConvClassifier | BcosLinearClassifier)]
    return biases[-1] if biases else 0.0


def _probability_kind(model: nn.Module) -> str:
    config = getattr(model, "bcos_config", None)
    return config.probability if config is not None else "sigmoid"
