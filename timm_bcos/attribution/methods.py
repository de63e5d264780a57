"""The attribution methods: captum's, LIME, RISE, and the network's own. Each makes signed maps (N, H, W).

Settings are those of the B-cos paper's comparison (section 4 and supplement of arXiv 2205.10268) where it states them.
"""

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers import ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame, activations
from torch import Tensor, nn

from ..errors import MethodError
from ..explaining.forward import explain
from .registry import Subject, register

__all__: list[str] = []


RECTIFIERS = (nn.ReLU, nn.ReLU6)
WITHOUT_RELEVANCE = (
    nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, StdConv2d, StdConv2dSame, ScaledStdConv2d, ScaledStdConv2dSame,
)  # fmt: skip
ELEMENTWISE = (
    nn.ReLU6, nn.SiLU, nn.GELU, nn.Mish, nn.CELU, nn.SELU, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh,
    *(kind for kind in vars(activations).values() if isinstance(kind, type) and issubclass(kind, nn.Module)),
)  # fmt: skip


@cache
def _library(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MethodError(f"{name} is not installed: pip install 'timm_bcos[attribution]'") from error


def _captum() -> Any:
    return _library("captum.attr")


@register("bcos")
def bcos(subject: Subject, x: Tensor, targets: Tensor) -> Tensor:
    """The network's own explanation, W(x) · x."""
    if not subject.is_bcos:
        kind = type(subject.model).__name__
        raise MethodError(f"{kind} is no B-cos network and has no explanation of its own: convert it with bcosify")
    return explain(subject.model, x, targets).contribution_map


class _OfPixels(nn.Module):
    """Logits of images in [0, 1]: gradients of a pixel go through its encoding r and 1 - r, or its normalisation."""

    def __init__(self, subject: Subject) -> None:
        super().__init__()
        self.subject = subject

    def forward(self, x: Tensor) -> Tensor:
        return self.subject(self.subject.prepare(x))


@register("gradient")
def gradient(subject: Subject, x: Tensor, targets: Tensor) -> Tensor:
    """Gradient by the pixels, summed over colours."""
    return _captum().Saliency(_OfPixels(subject)).attribute(_pixels(x), targets, abs=False).sum(1)


@register("ixg")
def input_x_gradient(subject: Subject, x: Tensor, targets: Tensor) -> Tensor:
    """Input times gradient."""
    return _captum().InputXGradient(subject).attribute(_leaf(subject, x), targets).sum(1)


@register("ig")
def integrated_gradients(subject: Subject, x: Tensor, targets: Tensor, *, n_steps: int = 50) -> Tensor:
    """Integrated Gradients from a baseline of zeros."""
    method = _captum().IntegratedGradients(subject)
    z = subject.prepare(x)
    return method.attribute(z, target=targets, n_steps=n_steps, internal_batch_size=max(len(x), 32)).sum(1)


@register("deeplift")
def deep_lift(subject: Subject, x: Tensor, targets: Tensor) -> Tensor:
    """DeepLIFT from a baseline of zeros: the rescale rule for activations, the gradient for B-cos layers and norms."""
    captum = _library("captum.attr._core.deep_lift")  # whose table lacks most activations of timm's models
    known = captum.SUPPORTED_NON_LINEAR
    more = {kind: captum.nonlinear for kind in ELEMENTWISE if kind not in known}
    with mock.patch.dict(known, more):
        return captum.DeepLift(subject).attribute(_leaf(subject, x), target=targets).sum(1)


@register("smoothgrad")
def smooth_grad(subject: Subject, x: Tensor, targets: Tensor, *, samples: int = 25, stdev: float = 0.1) -> Tensor:
    """Gradient by the pixels, averaged over noisy images."""
    captum = _captum()
    method = captum.NoiseTunnel(captum.Saliency(_OfPixels(subject)))
    return method.attribute(
        _pixels(x), target=targets, nt_samples=samples, nt_samples_batch_size=1, stdevs=stdev, abs=False
    ).sum(1)


@register("guided_backprop")
def guided_backprop(subject: Subject, x: Tensor, targets: Tensor) -> Tensor:
    """Guided Backpropagation, for networks with ReLU or ReLU6 modules."""
    if not any(isinstance(module, RECTIFIERS) for module in subject.modules()):
        raise MethodError("guided_backprop changes the gradient of ReLU modules, of which the model has none")
    captum = _library("captum.attr._core.guided_backprop_deconvnet")  # which leaves ReLU6 as it is
    method = captum.GuidedBackprop(_OfPixels(subject))
    with mock.patch.object(method, "_register_hooks", partial(_hook_rectifier, captum, method)):
        return method.attribute(_pixels(x), targets).sum(1)


def _hook_rectifier(captum: Any, method: Any, module: nn.Module) -> None:
    if isinstance(module, RECTIFIERS):
        method.backward_hooks += captum._register_backward_hook(module, method._backward_hook, method)


@register("gradcam")
def grad_cam(subject: Subject, x: Tensor, targets: Tensor, *, layer: str | None = None) -> Tensor:
    """Grad-CAM of the last layer with spatial positions before the classifier, or of a named one, upsampled."""
    model = subject.model
    if hasattr(model, "num_prefix_tokens") or getattr(model, "output_fmt", "NCHW") != "NCHW":
        raise MethodError(f"gradcam needs maps (N, C, H, W), which {type(model).__name__} does not compute with")
    z = _leaf(subject, x)
    module = _module(subject, layer) if layer else _last_spatial_layer(subject, z)
    maps = _captum().LayerGradCam(subject, module).attribute(z, targets)
    return F.interpolate(maps, x.shape[-2:], mode="bilinear").sum(1)


@register("lrp")
def lrp(subject: Subject, x: Tensor, targets: Tensor) -> Tensor:
    """Layer-wise Relevance Propagation of the logit: z⁺ in convolutions, ε in linear ones, flat in the first layer."""
    if subject.is_bcos:
        raise MethodError("lrp has rules for linear layers between activations; a B-cos layer is neither")
    others = {type(module).__name__ for module in subject.modules() if isinstance(module, WITHOUT_RELEVANCE)}
    if others:
        kind = type(subject.model).__name__
        raise MethodError(f"lrp's rules are for convolutions and batch norms; {kind} has {', '.join(sorted(others))}")
    attributors, composites = _library("zennit.attribution"), _library("zennit.composites")
    from .lrp import MergeBatchNorms, RelevanceOfFunctions

    passed_on = [(ELEMENTWISE, _library("zennit.rules").Pass())]
    prepared = subject.prepare(x)
    composite = composites.EpsilonPlusFlat(layer_map=passed_on, canonizers=[MergeBatchNorms(prepared[:1])])
    wanted = F.one_hot(targets, subject.model.num_classes).to(x)
    propagate = attributors.Gradient(subject, composite, attr_output=lambda logits: wanted * logits)
    with propagate, RelevanceOfFunctions():
        _, relevance = propagate(prepared)
    return relevance.sum(1)


@register("attention_rollout")
def attention_rollout(subject: Subject, x: Tensor, targets: Tensor) -> Tensor:
    """Attention roll-out (arXiv 2005.00928) of a vision transformer; the same map for every class."""
    from timm.utils import AttentionExtract

    model: Any = subject.model
    if not all(hasattr(model, name) for name in ("num_prefix_tokens", "patch_embed", "blocks")):
        raise MethodError(f"attention_rollout is for vision transformers, not for {type(model).__name__}")
    with torch.no_grad(), _unfused(model):
        layers = list(AttentionExtract(model, method="hook")(subject.prepare(x)).values())
    rolled = identity = torch.eye(layers[0].shape[-1]).to(x)
    for attention in layers:
        rolled = (attention.mean(1) + identity) / 2 @ rolled
    prefix = model.num_prefix_tokens
    reads_token = prefix and getattr(model, "global_pool", "token") == "token"
    to_output = (
        rolled[:, 0] if reads_token else rolled[:, prefix:].mean(1)
    )  # the class token, or the average of patches
    grid = to_output[:, prefix:].unflatten(1, tuple(model.patch_embed.grid_size))
    return F.interpolate(grid[:, None], x.shape[-2:], mode="bilinear")[:, 0]


@contextmanager
def _unfused(model: nn.Module) -> Iterator[None]:
    """timm's fused attention never shows its weights."""
    fused: list[Any] = [m for m in model.modules() if getattr(m, "fused_attn", False)]
    try:
        for module in fused:
            module.fused_attn = False
        yield
    finally:
        for module in fused:
            module.fused_attn = True


@register("occlusion", slow=True)
def occlusion(
    subject: Subject, x: Tensor, targets: Tensor, *, window: int | None = None, stride: int | None = None
) -> Tensor:
    """How much the logit falls where a square of the input is zero; by default an eighth of the image, half apart."""
    window = window or max(x.shape[-1] // 8, 1)
    stride = stride or max(window // 2, 1)
    z = subject.prepare(x[:1])
    shape = (z.shape[1], window, window)
    with torch.no_grad():
        method = _captum().Occlusion(lambda one: subject(one)[0, targets])
        maps = method.attribute(z, shape, (z.shape[1], stride, stride))
    return maps.sum(1)


@register("lime", slow=True)
def lime(
    subject: Subject, x: Tensor, targets: Tensor, *, samples: int = 500, kernel_size: float = 4, features: int = 5
) -> Tensor:
    """LIME on quickshift segments: the weights of the strongest ones, of the image itself before any encoding."""
    lime_image = _library("lime.lime_image")
    seed = int(torch.randint(2**31 - 1, (1,)))
    segmentation = _library("lime.wrappers.scikit_image").SegmentationAlgorithm(
        "quickshift", kernel_size=kernel_size, max_dist=200, ratio=0.2, random_seed=seed
    )
    explainer = lime_image.LimeImageExplainer(random_state=seed, verbose=False)

    def classify(images: Sequence[Any]) -> Any:
        batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).to(x)
        return subject.probability(batch).cpu().numpy()

    pixels = x[0].permute(1, 2, 0).double().cpu().numpy()
    with mock.patch.object(lime_image, "tqdm", iter):  # its bar has no switch
        explanation = explainer.explain_instance(
            pixels, classify, labels=targets.tolist(), top_labels=None, num_samples=samples, num_features=features,
            segmentation_fn=segmentation, batch_size=32, random_seed=seed,
        )  # fmt: skip
    weights = np.zeros((len(x), explanation.segments.max() + 1))
    for row, target in enumerate(targets.tolist()):
        segments, values = zip(*explanation.local_exp[target], strict=True)
        weights[row, list(segments)] = values
    return torch.from_numpy(weights[:, explanation.segments]).to(x)


@register("rise", slow=True)
def rise(subject: Subject, x: Tensor, targets: Tensor, *, masks: int = 500, cells: int = 8, p: float = 0.1) -> Tensor:
    """RISE (arXiv 1806.07421): Σ probability · mask over all random masks, divided by masks · p."""
    total = torch.zeros_like(x[:, 0])
    for start in range(0, masks, 32):
        some = rise_masks(min(32, masks - start), cells, p, x.shape[-2:]).to(x)
        probability = subject.probability(x[0] * some[:, None])[:, targets]
        total += torch.einsum("mk,mhw->khw", probability, some)
    return total / (masks * p)


def rise_masks(count: int, cells: int, p: float, size: tuple[int, ...]) -> Tensor:
    """(count, H, W) smooth masks in [0, 1]: random grids, enlarged by one cell and cropped at random (section 3.2)."""
    height, width = (-(-s // cells) for s in size)
    grids = (torch.rand(count, 1, cells, cells) < p).float()
    large = F.interpolate(grids, ((cells + 1) * height, (cells + 1) * width), mode="bilinear")[:, 0]
    tops, lefts = torch.randint(height, (count,)).tolist(), torch.randint(width, (count,)).tolist()
    crops = [m[t : t + size[0], s : s + size[1]] for m, t, s in zip(large, tops, lefts, strict=True)]
    return torch.stack(crops)


def _pixels(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


def _leaf(subject: Subject, x: Tensor) -> Tensor:
    return subject.prepare(x).detach().requires_grad_()


def _module(subject: Subject, name: str) -> nn.Module:
    try:
        return subject.model.get_submodule(name)
    except AttributeError as error:
        raise MethodError(f"the model has no layer {name!r}") from error


def _last_spatial_layer(subject: Subject, z: Tensor) -> nn.Module:
    """The last module, in the order of execution, whose output is a map (N, C, H, W) of more than one position.

    A map has the image's proportions, but for rounding; heads × tokens × features inside attention has not.
    """
    found: list[nn.Module] = []
    heads = {id(m) for m in _classifiers(subject.model)}

    def record(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim == 4 and id(module) not in heads:
            (height, width), (rows, columns) = z.shape[-2:], output.shape[-2:]
            if min(rows, columns) > 1 and abs(rows * width - columns * height) <= max(height, width):
                found.append(module)

    leaves = [m for m in subject.model.modules() if not any(m.children())]
    handles = [m.register_forward_hook(record) for m in leaves]
    try:
        with torch.no_grad():
            subject(z[:1])
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        raise MethodError(f"{type(subject.model).__name__} has no layer with spatial positions (N, C, H, W): name one")
    return found[-1]


def _classifiers(model: Any) -> list[nn.Module]:
    head = model.get_classifier() if hasattr(model, "get_classifier") else None
    return list(head) if isinstance(head, tuple | list) else [head] if isinstance(head, nn.Module) else []
