"""Explanations outside training code: a model and its explanation as one program of plain tensor operations.

The model itself exports as timm's do (`torch.export`, ONNX, `torch.compile`). An explanation takes a backward pass,
which these formats do not hold; traced in explanation mode it becomes part of the program.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from .._compat import private
from ..dynamic_linear.mode import explanation_mode
from ..errors import InputError, ModelStateError
from ..nn.functional import encode_image
from ..nn.module_utils import first_output, frozen_copy

__all__ = ["export_explainer"]

Explained = tuple[Tensor, Tensor, Tensor]


def export_explainer(model: nn.Module, x: Tensor) -> ExportedProgram:
    """Export a model together with its explanation: (images, target) to (logits, weights, contribution map).

    The program needs torch alone, neither timm nor this package: `torch.export.save(program, "explainer.pt2")`, then
    `torch.export.load("explainer.pt2").module()(images, target)`. It runs on the device and in the dtype of the model.

    Args:
        model: A B-cos model in eval mode.
        x: Example images (N, C, H, W) in [0, 1], N at least 2; the batch size stays free, the image size is fixed.

    Returns:
        The program. Its inputs: images (N, C, H, W), and target (N,) of int64, a class of each image, or -1 for the
        predicted one. Its outputs: logits (N, K), weights (N, 2C, H, W), contribution map (N, H, W).

    Raises:
        InputError: For fewer than two example images, from which a trace would take the batch size to be fixed.
        ModelStateError: For a model in training mode.

    Examples:
        >>> program = export_explainer(model, torch.rand(2, 3, 224, 224))
        >>> logits, weights, contributions = program.module()(images, torch.full((len(images),), -1))
    """
    if model.training:
        raise ModelStateError("the model is in training mode: call model.eval() first")
    if x.ndim != 4 or len(x) < 2:
        raise InputError(f"example images of shape {tuple(x.shape)}: give (N, C, H, W) with N of at least 2")
    target = torch.full((len(x),), -1, device=x.device)
    batch = Dim("batch", min=1)
    traced = private.make_fx(_explained(frozen_copy(model)), tracing_mode="symbolic", _allow_non_fake_inputs=True)(
        x, target
    )
    return torch.export.export(traced, (x, target), dynamic_shapes=({0: batch}, {0: batch}))


def _explained(model: Any) -> Callable[[Tensor, Tensor], Explained]:
    channels = model.in_chans

    def forward(x: Tensor, target: Tensor) -> Explained:
        encoded = encode_image(x, channels).detach().requires_grad_()
        with torch.enable_grad(), explanation_mode(model):
            logits = first_output(model(encoded))
            chosen = torch.where(target < 0, logits.argmax(1), target)
            logit = logits.gather(1, chosen[:, None])
            (weights,) = torch.autograd.grad(logit.sum(), encoded)
        return logits.detach(), weights, (weights * encoded.detach()).sum(1)

    return forward
