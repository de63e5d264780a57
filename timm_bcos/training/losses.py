"""W(x) as a function of the parameters, for losses on explanations."""

import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ..dynamic_linear.dual_graph import DualGraph
from ..dynamic_linear.mode import DynamicLinearMode, active
from ..errors import InputError, ModelStateError, TargetError
from ..explanation.inputs import image_reader
from ..explanation.request import Targets, as_direction, check_target
from ..nn.functional import encode_image
from ..nn.module_utils import first_output, hooked

__all__ = [
    "DynamicWeights",
    "cosine_loss",
    "dynamic_weights",
    "energy_loss",
]


@dataclass(frozen=True, eq=False)
class DynamicWeights:
    """Outputs and the rows of W(x) of one class each, both on the graph.

    Attributes:
        logits: Outputs of the model (N, K), with the gradients of ordinary training.
        weights: Row of W(x) of the target of each image, (N, 2C, H, W), for encoded images.
        inputs: Encoded images (N, 2C, H, W), without gradients.
    """

    logits: Tensor
    weights: Tensor
    inputs: Tensor

    @property
    def contribution_map(self) -> Tensor:
        """Contribution of each pixel to the target's logit, (N, H, W)."""
        return (self.weights * self.inputs).sum(1)


def dynamic_weights(model: nn.Module, x: Tensor, target: Targets = None) -> DynamicWeights:
    """Compute outputs and rows of W(x) with gradients. `explain` computes the same values without gradients.

    It takes one forward pass, in which each function is computed twice (`timm_bcos.dynamic_linear.dual_graph`), and one
    differentiable backward pass. Norms in training mode use the statistics of the batch and update their running
    statistics once, as in an ordinary step.

    Args:
        model: B-cos model in training or evaluation mode, also one that is wrapped by `DistributedDataParallel`, whose
            processes then average their gradients, or by `torch.compile`, without which it runs here.
        x: Images (N, C, H, W) without mean/std normalization, or encoded (N, 2C, H, W).
        target: See `explain`; None for the predicted class.

    Raises:
        InputError: If x is not a batch of images for this model.
        ModelStateError: If the model is not a B-cos model, uses gradient checkpointing, is sharded (FSDP2), or is
            wrapped by `DataParallel` or by `DistributedDataParallel` with `static_graph`.
        TargetError: If a class does not exist, or if the model does not return logits (N, K).

    Example:
        >>> found = timm_bcos.dynamic_weights(model, images, labels)
        >>> loss = criterion(found.logits, labels) + timm_bcos.energy_loss(found.contribution_map, masks)
        >>> loss.backward()
    """
    part = _unwrapped(model)
    reader = image_reader(part)
    _check_trainable(part, x)
    inputs = encode_image(x.detach(), reader.image_channels).to(reader.weight.dtype)
    leaf = inputs.clone().requires_grad_()
    dual = DualGraph(leaf)
    with torch.enable_grad():
        with dual.active(), active(DynamicLinearMode(leaf)):
            outputs = _run(model, part, leaf.clone())
        logits = dual.counterpart(outputs)
        _check_logits(outputs, logits, len(x))
        value = (outputs * _direction(target, logits)).sum()
        (weights,) = torch.autograd.grad(value, leaf, create_graph=True)
    return DynamicWeights(logits, weights, inputs)


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside wrappers of torch.

    Raises:
        ModelStateError: If W(x) cannot be trained with a wrapper.
    """
    if isinstance(model, DataParallel):
        raise ModelStateError(
            "DataParallel copies the model in each step: use DistributedDataParallel, or model.module"
        )
    if isinstance(model, DistributedDataParallel):
        if model.static_graph:
            raise ModelStateError("W(x) cannot be trained with static_graph=True: leave the option out")
        return _unwrapped(model.module)
    inner = getattr(model, "_orig_mod", None)  # of `torch.compile`
    return model if inner is None else _unwrapped(inner)


def _run(model: nn.Module, part: nn.Module, x: Tensor) -> Tensor:
    """The output of a part of a model, which runs as a whole: DistributedDataParallel prepares its reduction there."""
    if not isinstance(model, DistributedDataParallel):
        return first_output(part(x))
    outputs: list[Tensor] = []
    with hooked([part], lambda module, args, output: outputs.append(first_output(output))):
        model(x)
    return outputs[0]


def _check_trainable(model: nn.Module, x: Tensor) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim != 4 or 0 in x.shape:
        found = f"{tuple(x.shape)} of {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        raise InputError(f"expected images (N, C, H, W) of floating point, got {found}")
    if torch.is_inference_mode_enabled() or x.is_inference():
        raise InputError("W(x) needs autograd, which torch.inference_mode() rules out")
    fsdp = sys.modules.get("torch.distributed.fsdp")  # without it, no model is sharded
    if fsdp is not None and any(isinstance(module, fsdp.FSDPModule) for module in model.modules()):
        raise ModelStateError("W(x) cannot be trained with fully_shard (FSDP2): use DistributedDataParallel")
    if any(getattr(module, "grad_checkpointing", False) is True for module in model.modules()):
        raise ModelStateError("gradient checkpointing is on: call model.set_grad_checkpointing(False) first")


def _check_logits(outputs: Tensor, logits: Tensor, images: int) -> None:
    if outputs is logits:
        raise TargetError("the model's outputs do not depend on the images")
    if outputs.ndim != 2 or len(outputs) != images:
        raise TargetError(f"the model returns {tuple(outputs.shape)}: logits ({images}, K) are needed")


def _direction(target: Targets, logits: Tensor) -> Tensor:
    """Coefficients of the outputs, (N, K)."""
    classes = check_target(target, len(logits))
    if classes is None:
        classes = logits.detach().argmax(1)
    return as_direction(classes, len(logits), logits.shape[1], "classes").to(logits)


def cosine_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """1 − cosine of the student's and the teacher's explanations, averaged over images (e2KD, section 3.1).

    Args:
        student: Explanations (N, ...), for instance rows of W(x), (N, 2C, H, W).
        teacher: Explanations of the same shape, which get no gradient.

    Returns:
        A scalar in [0, 2]. It is 0 if the explanations are equal up to a positive scale.

    Raises:
        InputError: If the shapes differ.
    """
    if student.shape != teacher.shape:
        raise InputError(f"explanations of shapes {tuple(student.shape)} and {tuple(teacher.shape)}: compare the same")
    cosines = F.cosine_similarity(student.flatten(1), teacher.detach().flatten(1).to(student), dim=1)
    return 1 - cosines.mean()


def energy_loss(maps: Tensor, masks: Tensor) -> Tensor:
    """1 − the share of positive contributions inside the masks, averaged over images (ICCV 2023, section 3.2).

    Args:
        maps: Contributions of pixels, (N, H, W).
        masks: Masks (N, H, W) that are 1 inside the object or its box and 0 outside.

    Returns:
        A scalar in [0, 1]. Images without positive contributions count as 1 and have no gradient.

    Raises:
        InputError: If masks have another shape, have values outside [0, 1], or are empty.
    """
    if maps.ndim != 3 or maps.shape != masks.shape:
        raise InputError(f"maps {tuple(maps.shape)} and masks {tuple(masks.shape)}: give both as (N, H, W)")
    if bool((masks < 0).any()) or bool((masks > 1).any()) or not bool(masks.flatten(1).any(1).all()):
        raise InputError("masks must lie in [0, 1], and each must hold a pixel that is inside")
    positive = maps.clamp_min(0)
    total = positive.sum((1, 2))
    inside = (positive * masks.to(positive)).sum((1, 2))
    return 1 - (inside / total.where(total > 0, 1)).mean()
