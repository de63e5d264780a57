"""The attribution methods: the model's own explanation, captum's methods, LRP, LIME and RISE.

Each returns signed maps (N, H, W). Default options are those of the B-cos paper, if it states them (arXiv 2205.10268,
section 4 and supplement).
"""

import math
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._compat import private, timm_layers
from ..errors import MethodError
from ..explanation.api import explain, explain_targets
from ..nn.module_utils import channel_axis, first_output, get_classifiers, hooked
from .deep_lift import multiplied_contributions
from .registry import AttributionModel, check_counts, images_at_once, library, register

__all__: list[str] = []

RECTIFIERS = (nn.ReLU, nn.ReLU6)
WITHOUT_RELEVANCE = (
    nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, timm_layers.StdConv2d, timm_layers.StdConv2dSame,
    timm_layers.ScaledStdConv2d, timm_layers.ScaledStdConv2dSame,
)  # fmt: skip
TIMM_ACTIVATIONS = vars(timm_layers.activations).values()
ELEMENTWISE = (
    nn.ReLU6, nn.SiLU, nn.GELU, nn.Mish, nn.CELU, nn.SELU, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh,
    *(kind for kind in TIMM_ACTIVATIONS if isinstance(kind, type) and issubclass(kind, nn.Module)),
)  # fmt: skip


_library = cache(library)
CAPTUM = "captum.attr"


def _captum() -> Any:
    return _library(CAPTUM)


@register("bcos")
def bcos(subject: AttributionModel, x: Tensor, targets: Tensor) -> Tensor:
    """The contribution map of the model's own explanation, W(x) · x."""
    if not subject.is_bcos:
        raise MethodError(
            f"{subject.kind} is not a B-cos model and has no explanation of its own: convert it with bcosify"
        )
    given = subject.request.arguments()
    if len(x) > 1 and bool((x[1:] == x[:1]).all()):  # several classes of one image share a forward pass
        image = subject.model_input(subject.prepare(x[:1]))
        some = targets.split(images_at_once(x))
        found = [e for part in some for e in explain_targets(subject.model, image, part[None], **given)]
    else:
        found = [explain(subject.model, subject.model_input(subject.prepare(x)), targets, **given)]
    if found[0].position is not None and not subject.request.is_placed:
        raise subject.no_logits(subject.output(x))
    return torch.cat([explanation.contribution_map for explanation in found])


class _OfPixels(nn.Module):
    """Logits of images in [0, 1], so that gradients are those of pixels, before encoding or normalization."""

    def __init__(self, subject: AttributionModel) -> None:
        super().__init__()
        self.subject = subject

    def forward(self, x: Tensor) -> Tensor:
        return self.subject(self.subject.prepare(x))


@register("gradient", needs=CAPTUM)
def gradient(subject: AttributionModel, x: Tensor, targets: Tensor) -> Tensor:
    """Gradient of the logit with respect to the pixels, summed over colors."""
    return _captum().Saliency(_OfPixels(subject)).attribute(_pixels(x), targets, abs=False).sum(1)


@register("input_x_gradient", aliases=("ixg",), needs=CAPTUM)
def input_x_gradient(subject: AttributionModel, x: Tensor, targets: Tensor) -> Tensor:
    """Input times gradient."""
    return _captum().InputXGradient(subject).attribute(subject.leaf(x), targets).sum(1)


@register("integrated_gradients", aliases=("ig",), needs=CAPTUM)
def integrated_gradients(subject: AttributionModel, x: Tensor, targets: Tensor, *, n_steps: int = 50) -> Tensor:
    """Integrated Gradients from a baseline of zeros."""
    check_counts(n_steps=n_steps)
    method = _captum().IntegratedGradients(subject)
    at_once = max(len(x), images_at_once(x))
    return method.attribute(subject.prepare(x), target=targets, n_steps=n_steps, internal_batch_size=at_once).sum(1)


@register("deeplift")
def deep_lift(subject: AttributionModel, x: Tensor, targets: Tensor) -> Tensor:
    """DeepLIFT from a baseline of zeros; gradients for B-cos layers and norms."""
    return multiplied_contributions(subject, subject.leaf(x), targets, ELEMENTWISE).sum(1)


@register("smoothgrad", needs=CAPTUM)
def smooth_grad(
    subject: AttributionModel, x: Tensor, targets: Tensor, *, samples: int = 25, stdev: float = 0.1
) -> Tensor:
    """SmoothGrad: mean gradient over noisy copies of the image. All images get the same noise."""
    check_counts(samples=samples)
    if not 0 <= stdev < math.inf:
        raise MethodError(f"stdev={stdev!r}: give a number from 0")
    noise = (stdev * torch.randn(x.shape[1:], generator=subject.generator).to(x) for _ in range(samples))
    return sum((gradient(subject, x + one, targets) for one in noise), torch.zeros_like(x[:, 0])) / samples


@register("guided_backprop", needs=CAPTUM)
def guided_backprop(subject: AttributionModel, x: Tensor, targets: Tensor) -> Tensor:
    """Guided Backpropagation, for models with ReLU or ReLU6 modules."""
    if not any(isinstance(module, RECTIFIERS) for module in subject.modules()):
        raise MethodError("guided_backprop changes the gradient of ReLU modules; the model has none")
    method = _captum().GuidedBackprop(_OfPixels(subject))

    def hook_rectifier(module: nn.Module) -> None:
        if isinstance(module, RECTIFIERS):
            method.backward_hooks.extend(private.register_backward_hook(module, method._backward_hook, method))

    method._register_hooks = hook_rectifier  # captum's hooks ReLU only
    return method.attribute(_pixels(x), targets).sum(1)


@register("gradcam", needs=CAPTUM)
def grad_cam(subject: AttributionModel, x: Tensor, targets: Tensor, *, layer: str | None = None) -> Tensor:
    """Grad-CAM of the last feature map before the classifier, or of a named layer, upsampled."""
    model = subject.part
    if hasattr(model, "num_prefix_tokens") or getattr(model, "output_fmt", "NCHW") != "NCHW":
        raise MethodError(f"gradcam needs feature maps (N, C, H, W), which {subject.kind} does not have")
    z = subject.prepare(x)  # not a leaf: the layers before need no graph
    module = _last_spatial_layer(subject, z) if layer is None else _named_layer(subject, z, layer)
    maps = _captum().LayerGradCam(subject, module).attribute(z, targets)
    return F.interpolate(maps, x.shape[-2:], mode="bilinear").sum(1)


@register("lrp", needs=".lrp")
def lrp(subject: AttributionModel, x: Tensor, targets: Tensor) -> Tensor:
    """Layer-wise Relevance Propagation of the logit: z⁺ for convolutions, ε for linear, flat for first layers."""
    if subject.is_bcos:
        raise MethodError("lrp has rules for linear layers and activations; B-cos layers are neither")
    others = {type(module).__name__ for module in subject.modules() if isinstance(module, WITHOUT_RELEVANCE)}
    if others:
        listed = ", ".join(sorted(others))
        raise MethodError(f"lrp has rules for convolutions and batch norms; {subject.kind} has {listed}")
    relevance: Tensor = _library(".lrp").relevance(subject, subject.prepare(x), targets, ELEMENTWISE)
    return relevance.sum(1)


@register("occlusion", slow=True, needs=CAPTUM)
def occlusion(
    subject: AttributionModel, x: Tensor, targets: Tensor, *, window: int | None = None, stride: int | None = None
) -> Tensor:
    """Drop of the logit when a square of the input is zero. Default: 1 / 8 of the image, with a stride of 1 / 16."""
    window = max(x.shape[-1] // 8, 1) if window is None else window
    stride = max(window // 2, 1) if stride is None else stride
    check_counts(window=window, stride=stride)
    if window > min(x.shape[-2:]):
        raise MethodError(f"window={window}: the images are only {x.shape[-2]} × {x.shape[-1]}")
    z = subject.prepare(x[:1])
    shape = (z.shape[1], window, window)
    with torch.no_grad():
        method = _captum().Occlusion(lambda one: subject(one)[0, targets])
        maps = method.attribute(z, shape, (z.shape[1], stride, stride))
    return maps.sum(1)


@register("lime", slow=True, needs=".lime")
def lime(
    subject: AttributionModel,
    x: Tensor,
    targets: Tensor,
    *,
    samples: int = 500,
    kernel_size: float = 4,
    features: int = 5,
) -> Tensor:
    """LIME on quickshift segments: weights of the strongest segments."""
    check_counts(samples=samples, features=features)
    if not 1 <= kernel_size < math.inf:
        raise MethodError(f"kernel_size={kernel_size!r}: give a number from 1")
    lime = _library(".lime")
    segments = lime.quickshift_segments(x[0], kernel_size)
    background = lime.mean_colors(x[0], segments)
    masks = torch.randint(2, (samples, int(segments.max()) + 1), generator=subject.generator).to(x.device)
    masks[0] = 1
    answers = [
        subject.probability(torch.where(some[:, segments].bool()[:, None], x[0], background))[:, targets]
        for some in masks.split(images_at_once(x, has_graph=False))
    ]
    weights: Tensor = lime.local_weights(masks, torch.cat(answers), features)
    return weights[:, segments].to(x)


@register("rise", slow=True)
def rise(
    subject: AttributionModel, x: Tensor, targets: Tensor, *, masks: int = 500, cells: int = 8, p: float = 0.1
) -> Tensor:
    """RISE (arXiv 1806.07421): sum of probability · mask over random masks, divided by masks · p."""
    check_counts(masks=masks, cells=cells)
    if not 0 < p <= 1:
        raise MethodError(f"p={p!r}: give the visible share of the image, above 0 and up to 1")
    total = torch.zeros_like(x[:, 0])
    for start in range(0, masks, 32):
        some = rise_masks(min(32, masks - start), cells, p, x.shape[-2:], subject.generator).to(x)
        parts = some.split(images_at_once(x, has_graph=False))
        probability = torch.cat([subject.probability(x[0] * part[:, None]) for part in parts])[:, targets]
        total += torch.einsum("mk,mhw->khw", probability, some)
    return total / (masks * p)


def rise_masks(
    count: int, cells: int, p: float, size: tuple[int, ...], generator: torch.Generator | None = None
) -> Tensor:
    """(count, H, W) smooth masks in [0, 1]: random grids, upsampled and randomly cropped by one cell (section 3.2)."""
    height, width = (-(-s // cells) for s in size)
    grids = (torch.rand(count, 1, cells, cells, generator=generator) < p).float()
    large = F.interpolate(grids, ((cells + 1) * height, (cells + 1) * width), mode="bilinear")[:, 0]
    tops, lefts = (torch.randint(side, (count,), generator=generator).tolist() for side in (height, width))
    crops = [m[t : t + size[0], s : s + size[1]] for m, t, s in zip(large, tops, lefts, strict=True)]
    return torch.stack(crops)


def _pixels(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


def _named_layer(subject: AttributionModel, z: Tensor, name: str) -> nn.Module:
    """Find a layer by name; its output must be a feature map (N, C, H, W)."""
    module = dict(subject.model.named_modules()).get(name) if name else None
    if module is None:
        raise MethodError(f"the model has no layer {name!r}: see model.named_modules() for their names")
    outputs: list[object] = []
    with torch.no_grad(), hooked([module], lambda module, args, output: outputs.append(first_output(output))):
        subject(z[:1])
    if not outputs or not isinstance(outputs[0], Tensor):
        raise MethodError(f"layer {name!r} returns no tensor: name another")
    if outputs[0].ndim != 4 or channel_axis(module, outputs[0], subject.part) != 1:
        raise MethodError(f"gradcam needs feature maps (N, C, H, W): layer {name!r} returns {tuple(outputs[0].shape)}")
    return module


def _last_spatial_layer(subject: AttributionModel, z: Tensor) -> nn.Module:
    """The last module, in the order of execution, whose output is a feature map (N, C, H, W) with several positions.

    A feature map has the aspect ratio of the image, up to rounding. This excludes attention's (N, heads, tokens, dim).
    """
    found: list[nn.Module] = []
    heads = {id(m) for m in get_classifiers(subject.part)}

    def record(module: nn.Module, args: object, output: object) -> None:
        if isinstance(output, Tensor) and output.ndim == 4 and len(output) == 1 and id(module) not in heads:
            (height, width), (rows, columns) = z.shape[-2:], output.shape[-2:]
            if min(rows, columns) > 1 and abs(rows * width - columns * height) <= max(height, width):
                found.append(module)

    leaves = [m for m in subject.model.modules() if not any(m.children())]
    with torch.no_grad(), hooked(leaves, record):
        subject(z[:1])
    if not found:
        raise MethodError(f"{subject.kind} has no layer with a feature map (N, C, H, W): name one")
    return found[-1]
