"""A network at its images: one forward pass in explanation mode, from which any number of outputs are explained."""

import difflib
from collections.abc import Mapping, Sequence
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
from ..nn.modules import first_output, isolate, pick_output
from .explanation import Explanation
from .inputs import check_model
from .places import Grid
from .readout import Outputs, Readout
from .targets import Asked

__all__ = ["Linearised", "linear_part", "linear_parts"]

AT_ONCE = 64  # gradients of one image each that a backward pass computes together


class Linearised:
    """A network for a batch of images.

    Args:
        model: A B-cos network in evaluation mode, as `check_model` wants it. Not changed.
        x: Images, as `check_images` wants them.
        layer: Of the neurons to explain; None explains the network's outputs.
        output: Which of several outputs, by name or number; None takes the first.
        extra: Other arguments of the network, by name.

    Raises:
        TargetError: For a layer that does not exist, does not run once, or whose output has no units.
        AmbiguousBatch: If constants cannot be told apart by image.
    """

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        layer: str | None,
        output: str | int | None = None,
        extra: Mapping[str, object] | None = None,
    ) -> None:
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
            whole = network(self.leaf.clone(), **(extra or {}))  # a clone, in which it may write
        self._whole = whole
        self.tensor = self._checked([whole] if layer is None else outputs, output)
        self.outputs = self._outputs_of(self.tensor, layer)

    @property
    def final(self) -> Outputs:
        """What the network returns, whatever the layer is."""
        output = first_output(self._whole)
        return self._outputs_of(output, None)

    def _checked(self, outputs: list[object], name: str | int | None) -> Tensor:
        what = "the model" if self.layer is None else f"layer {self.layer!r}"
        if len(outputs) != 1:
            times = f"runs {len(outputs)} times in a forward pass: pick the module around it" if outputs else (
                "did not run for this input"
            )  # fmt: skip
            raise TargetError(f"{what} {times}")
        output = pick_output(outputs[0], name, what)
        if not isinstance(output, Tensor) or output.ndim not in (2, 3, 4) or len(output) != len(self.leaf):
            shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise TargetError(f"{what} returns {shape}; one row of units per image is needed")
        if not output.requires_grad:
            raise TargetError(
                f"{what} ends in {self.mode.maker(output)}, a gate or a statistic that only scales the image's path: "
                f"pick another layer, or tell with timm_bcos.declare what it is"
            )
        return self.mode.seen(output)

    def _outputs_of(self, x: Tensor, layer: str | None) -> Outputs:
        size = (self.leaf.shape[2], self.leaf.shape[3])
        what = "classes" if layer is None else f"units in layer {layer!r}"
        maps = self._channels_first(x, layer)
        if x.ndim == 2:
            grid = Grid(1, 1)
        elif x.ndim == 4:
            grid = Grid(maps.shape[2], maps.shape[3])
        else:
            grid = Grid.of_tokens(maps.shape[2], getattr(self.model, "num_prefix_tokens", 0), size)
        return Outputs(maps.flatten(2), grid, what, size, layer is not None or x.ndim > 2)

    def by_position(self, x: Tensor) -> Tensor:
        """(N, C, P), of a tensor in the format of the layer's output."""
        return self._channels_first(x, self.layer).flatten(2)

    def _channels_first(self, x: Tensor, layer: str | None) -> Tensor:
        if x.ndim == 2:
            return x[:, :, None]
        module = self.model if layer is None else self.model.get_submodule(layer)
        return x.movedim(channel_axis(module, x, self.model), 1)

    def best_classes(self, top: int) -> Tensor:
        """(N, top) the classes with the highest logits, best first.

        Raises:
            TargetError: For more than there are.
        """
        logits = self.outputs.maps.detach().amax(2)
        if not 1 <= top <= logits.shape[1]:
            raise TargetError(f"top={top}: the model has {logits.shape[1]} classes")
        return logits.topk(top, dim=1).indices

    def explain(self, target: Asked, versus: Asked, position: object, masks: Tensor | None) -> Explanation:
        """One backward pass: images do not see each other, so the gradient of the sum holds each one's row of W.

        Args:
            target: As `check_target` returns it.
            versus: What is subtracted, likewise.
            position: Where; None for where it is strongest.
            masks: Over what, as `check_region` returns it.
        """
        with torch.enable_grad():
            readout = self.outputs.read(target, versus, position, masks)
            part = linear_part(readout.values.sum(), self.leaf, self.account)
        return self.explanation(readout, part, self.layer)

    def explain_classes(self, table: Tensor) -> list[Explanation]:
        """Explain T classes of each image, as many in one backward pass as memory allows.

        Args:
            table: (N, T) classes.
        """
        with torch.enable_grad():
            readouts = [self.outputs.read(column, None, None, None) for column in table.T]
            values = torch.stack([readout.values.sum() for readout in readouts])
            parts = linear_parts(values, self.leaf, self.account)
        found = zip(readouts, parts, strict=True)
        return [self.explanation(readout, part, self.layer) for readout, part in found]

    def explanation(self, readout: Readout, part: "LinearPart", layer: str | None) -> Explanation:
        """Of what has been taken apart.

        Args:
            readout: The numbers.
            part: Their weights and constants.
            layer: Whose numbers they are; None for the network's outputs.
        """
        has_bias = layer is None and readout.versus is None
        return Explanation(
            logits=readout.activations,
            target=readout.unit,
            weights=part.weights,
            inputs=self.inputs,
            bias=part.constant_bias + part.gate_bias,
            constant_bias=part.constant_bias,
            defects=part.defects,
            logit_bias=_logit_bias(self.model) if has_bias else 0.0,
            layer=layer,
            position=readout.position,
            probability_kind=_probability_kind(self.model),
            versus=readout.versus,
            direction=readout.direction,
            region=readout.region,
        )


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
    """The same of several outputs (T,), as many in one backward pass as memory and the network's functions allow."""
    at_once = max(1, AT_ONCE // len(leaf))
    return [part for some in values.split(at_once) for part in _together(some, leaf, account)]


def _together(values: Tensor, leaf: Tensor, account: Account) -> list[LinearPart]:
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


def _logit_bias(model: Any) -> float:
    found = model.get_classifier() if hasattr(model, "get_classifier") else None
    heads = [found] if isinstance(found, nn.Module) else list(model.modules())
    biases = [m.logit_bias for m in heads if isinstance(m, BcosConvClassifier | BcosLinearClassifier)]
    return biases[-1] if biases else 0.0


def _probability_kind(model: nn.Module) -> str:
    config = getattr(model, "bcos_config", None)
    return config.probability if config is not None else "sigmoid"
