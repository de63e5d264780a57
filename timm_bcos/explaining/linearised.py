"""A network at its images: one forward pass in explanation mode, from which any number of outputs are explained."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..dynamic.account import Account, Defect
from ..dynamic.mode import DynamicLinearMode, active
from ..errors import TargetError
from ..nn.channels import channel_axis
from ..nn.functional import encode_image
from ..nn.heads import BcosConvClassifier, BcosLinearClassifier
from ..nn.modules import first_output, isolate
from .explanation import Explanation
from .inputs import check_model

__all__ = ["Linearised", "linear_part"]

AT_ONCE = 64  # gradients of one image each that a backward pass computes together


@dataclass
class _Neurons:
    values: Tensor  # (N,) on the graph
    activations: Tensor  # (N, K) at the neurons' positions
    unit: Tensor  # (N,)
    position: Tensor | None  # (N, 2)


class Linearised:
    """A network for a batch of images.

    Args:
        model: A B-cos network in evaluation mode, as `check_model` wants it. Not changed.
        x: Images, as `check_images` wants them.
        layer: Of the neurons to explain; None explains logits.

    Raises:
        TargetError: For a layer that does not exist, does not run once, or whose output has no units.
        AmbiguousBatch: If constants cannot be told apart by image.
    """

    def __init__(self, model: nn.Module, x: Tensor, layer: str | None) -> None:
        self.model, self.layer = getattr(model, "_orig_mod", model), layer  # of `torch.compile`
        stem = check_model(model)
        with torch.no_grad():
            self.inputs = encode_image(x.detach(), stem.image_channels).to(stem.weight.dtype, copy=True)
        self.leaf = self.inputs.clone().requires_grad_()
        outputs: list[object] = []
        network = _network_to_run(self.model, layer, outputs)
        self.account = Account(network, len(x), self.leaf)
        self.mode = DynamicLinearMode(self.leaf, self.account)
        with torch.enable_grad(), active(self.mode):
            whole = network(self.leaf.clone())  # in which it may write
            outputs = [whole] if layer is None else outputs
        self.output = self._checked(outputs)

    def _checked(self, outputs: list[object]) -> Tensor:
        what = "the model" if self.layer is None else f"layer {self.layer!r}"
        if len(outputs) != 1:
            times = f"runs {len(outputs)} times in a forward pass: pick the module around it" if outputs else (
                "did not run for this input"
            )  # fmt: skip
            raise TargetError(f"{what} {times}")
        output = first_output(outputs[0])  # others are auxiliary heads
        dims = (2,) if self.layer is None else (2, 3, 4)
        if not isinstance(output, Tensor) or output.ndim not in dims or len(output) != len(self.leaf):
            shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise TargetError(f"{what} returns {shape}; one row of units per image is needed")
        if not output.requires_grad:
            raise TargetError(
                f"{what} ends in {self.mode.maker(output)}, a gate or a statistic that only scales the image's path: "
                f"pick another layer, or tell with timm_bcos.declare what it is"
            )
        return self.mode.seen(output)

    def best_classes(self, top: int) -> Tensor:
        """(N, top) the classes with the highest logits, best first.

        Raises:
            TargetError: For more than there are.
        """
        classes = self.output.shape[1]
        if not 1 <= top <= classes:
            raise TargetError(f"top={top}: the model has {classes} classes")
        return self.output.detach().topk(top, dim=1).indices

    def explain(self, units: Tensor | None, position: int | tuple[int, int] | None) -> Explanation:
        """One backward pass: images do not see each other, so the gradient of the sum holds each one's row of W.

        Args:
            units: (N,) classes or units; None for the strongest.
            position: Of the neurons; None for where they are most active.
        """
        with torch.enable_grad():
            neurons = self._neurons(units, position)
            part = linear_part(neurons.values.sum(), self.leaf, self.account)
        return self._explanation(neurons, part)

    def explain_classes(self, table: Tensor) -> list[Explanation]:
        """Explain T classes of each image, as many in one backward pass as memory allows.

        Args:
            table: (N, T) classes.
        """
        with torch.enable_grad():
            neurons = [self._neurons(column, None) for column in table.T]
            values = torch.stack([column.values.sum() for column in neurons])
            at_once = max(1, AT_ONCE // len(self.leaf))
            parts = [part for some in values.split(at_once) for part in linear_parts(some, self.leaf, self.account)]
        return [self._explanation(column, part) for column, part in zip(neurons, parts, strict=True)]

    def _explanation(self, neurons: _Neurons, part: "LinearPart") -> Explanation:
        return Explanation(
            logits=neurons.activations,
            target=neurons.unit,
            weights=part.weights,
            inputs=self.inputs,
            bias=part.constant_bias + part.gate_bias,
            constant_bias=part.constant_bias,
            defects=part.defects,
            logit_bias=_logit_bias(self.model) if self.layer is None else 0.0,
            layer=self.layer,
            position=neurons.position,
            probability_kind=_probability_kind(self.model),
        )

    def _neurons(self, units: Tensor | None, position: int | tuple[int, int] | None) -> _Neurons:
        """Look the neurons up: a unit and a position per image."""
        maps, grid = self._by_position(self.output)
        peaks = maps.detach()
        place = None if position is None else _position_index(position, grid)
        scores = peaks.amax(2) if place is None else peaks[:, :, place]
        unit = scores.argmax(1) if units is None else self._check_units(units.to(maps.device), maps.shape[1])
        rows = torch.arange(len(maps), device=maps.device)
        at = peaks[rows, unit].argmax(1) if place is None else torch.full_like(rows, place)
        where = torch.stack([at // grid[1], at % grid[1]], 1) if self.layer is not None else None
        return _Neurons(maps[rows, unit, at], peaks[rows, :, at], unit, where)

    def _by_position(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """(N, K, P) and the grid of the P positions."""
        if x.ndim == 2:
            return x[:, :, None], (1, 1)
        axis = 1 if self.layer is None else channel_axis(self.model.get_submodule(self.layer), x, self.model)
        x = x.movedim(axis, 1)
        return x.flatten(2), (1, x.shape[2]) if x.ndim == 3 else (x.shape[2], x.shape[3])

    def _check_units(self, units: Tensor, count: int) -> Tensor:
        what = "classes" if self.layer is None else f"units in layer {self.layer!r}"
        wrong = units[(units < 0) | (units >= count)]
        if len(wrong):
            raise TargetError(f"target={int(wrong[0])}: the model has {count} {what}, counted from 0")
        return units


@dataclass
class LinearPart:
    """What an output is made of: weights · image + constants, and what should not be there.

    Attributes:
        weights: The gradient by the encoded images.
        constant_bias: (N,) contribution of constants.
        gate_bias: (N,) contribution of image-dependent values that are added.
        defects: Where the network is not dynamic linear on the way to this output.
    """

    weights: Tensor
    constant_bias: Tensor
    gate_bias: Tensor
    defects: tuple[Defect, ...]


def linear_part(value: Tensor, leaf: Tensor, account: Account) -> LinearPart:
    """Take an output apart, with one backward pass; the graph stays for others.

    Args:
        value: A scalar: the sum over images of an output each.
        leaf: The encoded images.
        account: Of the forward pass.
    """
    factors = _factors(leaf, account)
    grads = torch.autograd.grad(value, factors, retain_graph=True, allow_unused=True)
    return _part_of(grads, factors, account)


def linear_parts(values: Tensor, leaf: Tensor, account: Account) -> list[LinearPart]:
    """The same of several outputs (T,), in one backward pass where the network's functions allow it."""
    if len(values) > 1:
        factors, each = _factors(leaf, account), torch.eye(len(values)).to(values)
        try:
            grads = torch.autograd.grad(
                values, factors, each, retain_graph=True, allow_unused=True, is_grads_batched=True
            )
        except RuntimeError:  # a function whose gradient cannot be taken for several outputs at once
            pass
        else:
            rows = ([None if g is None else g[i] for g in grads] for i in range(len(values)))
            return [_part_of(row, factors, account) for row in rows]
    return [linear_part(value, leaf, account) for value in values]


def _factors(leaf: Tensor, account: Account) -> list[Tensor]:
    return [leaf, account.constants, *(factor for factor, _ in account.suspects)]


def _part_of(grads: Sequence[Tensor | None], factors: Sequence[Tensor], account: Account) -> LinearPart:
    weights, constants = (torch.zeros_like(f) if g is None else g for f, g in zip(factors[:2], grads[:2], strict=True))
    reached = [
        (defect, grad) for (_, defect), grad in zip(account.suspects, grads[2:], strict=True) if grad is not None
    ]
    added = [grad for defect, grad in reached if defect.kind == "added"]
    gate_bias = torch.stack(added).sum(0) if added else torch.zeros_like(constants)
    defects = tuple(dict.fromkeys([defect for defect, _ in reached] + account.certain))
    return LinearPart(weights, constants, gate_bias, defects)


def _network_to_run(model: nn.Module, layer: str | None, outputs: list[object]) -> nn.Module:
    """The model itself, or one whose layer of interest notes its outputs and which runs once, as it was written.

    A compiled program holds no explanation mode, and the backward pass would run checkpointed parts without it.
    """
    if layer is not None:
        _check_layer(model, layer)
    changed = [name for name, m in model.named_modules() if _is_compiled(m) or _is_checkpointing(m)]
    if layer is None and not changed:
        return model
    network = isolate(model, [name for name in (*changed, layer) if name])
    for name in changed:
        network.get_submodule(name).grad_checkpointing = False  # type: ignore[assignment]
    if layer is not None:
        network.get_submodule(layer).register_forward_hook(lambda module, args, output: outputs.append(output))
    return network


def _is_compiled(module: nn.Module) -> bool:
    return module.__dict__.get("_compiled_call_impl") is not None


def _is_checkpointing(module: nn.Module) -> bool:
    return getattr(module, "grad_checkpointing", False) is True


def _check_layer(model: nn.Module, layer: str) -> None:
    if layer == "":
        raise TargetError("layer='' is the network itself: leave `layer` out to explain its logits")
    names = dict(model.named_modules(remove_duplicate=False))
    if layer not in names:
        near = difflib.get_close_matches(layer, names, n=3)
        hint = f"close names: {', '.join(near)}" if near else "see model.named_modules() for their names"
        raise TargetError(f"no layer {layer!r}; {hint}")


def _position_index(position: int | tuple[int, int], grid: tuple[int, int]) -> int:
    is_index = isinstance(position, int) and not isinstance(position, bool) and grid[0] == 1
    place: object = (0, position) if is_index else position
    if not isinstance(place, tuple | list) or len(place) != 2:
        raise TargetError(f"position={position!r}: give (row, column); for token sequences an index will do")
    row, column = map(int, place)
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
