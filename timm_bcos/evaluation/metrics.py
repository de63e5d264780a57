"""Metrics of attribution methods.

| metric | description | better |
| --- | --- | --- |
| deletion | area under the probability while the most important pixels are replaced by the mean color | lower |
| insertion | area under the probability while they are inserted into an image of the mean color | higher |
| faithfulness_correlation | correlation of attribution and drop of the probability, over sets of pixels | higher |
| max_sensitivity | largest relative change of the map under small noise on the image | lower |
| randomization | rank correlation with the map of the model with random weights | nearer 0 |
| single_deletion | rank correlation of attribution and drop of the logit without a cell, over 4 × 4 cells | higher |
| energy | share of the positive attribution inside the object's box or mask | higher |

Sources: arXiv 1806.07421 (deletion, insertion), 2005.00631 (faithfulness correlation), 1901.09392 (sensitivity),
1810.03292 (randomization), 2407.11910 (single deletion: IDSDS, for a model fine-tuned on images without a cell, as
`timm_bcos.training.tasks.DeletionClassificationTask` does), 1910.01279 (energy). Batch norms of the model with random
weights use the statistics of the given images. A value is NaN if the metric is not defined for an image: a constant map
does not rank pixels, and a constant probability has no correlation.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..attribution.registry import (
    AttributionModel,
    Targets,
    attribute,
    checked_images,
    settled_model,
)
from ..data.regions import cell_masks, without_cell
from ..errors import InputError, MethodError
from ..explanation.inputs import Layer, layer_path
from ..explanation.regions import Position, Region

__all__ = [
    "METRICS",
    "NEEDING_MASKS",
    "check_metrics",
    "energy_shares",
    "evaluate",
]

STEPS = 50  # steps of deletion and insertion
SUBSETS, SUBSET_SHARE = 50, 16  # pixel sets of the faithfulness correlation, each with 1 / 16 of the pixels
NOISES, NOISE = 5, 0.02  # noisy images of the sensitivity, and the bound of the uniform noise
CELLS = 4  # cells per side of the single deletion score


@dataclass(frozen=True)
class _Call:
    """One metric of one method."""

    model: nn.Module
    subject: AttributionModel
    x: Tensor  # (N, C, H, W)
    targets: Tensor  # (N,)
    method: str
    options: dict[str, Any]
    generator: torch.Generator
    maps: Tensor  # (N, H, W), float64
    masks: Tensor | None = None  # (N, H, W), the objects

    def explain(self, model: nn.Module, x: Tensor) -> Tensor:
        return attribute(model, x, self.targets, self.method, **self.options).double()

    def probability(self, masks: Tensor) -> Tensor:
        """(N,) probabilities of the targets, with pixels outside the mask (N, H · W) in the image's mean color."""
        mask = masks.reshape(len(self.x), 1, *self.x.shape[2:])
        changed = torch.where(mask, self.x, self.x.mean((2, 3), keepdim=True))
        return self.subject.probability(changed).gather(1, self.targets[:, None])[:, 0].double()


def _deletion(call: _Call) -> Tensor:
    return _area_while_removing(call, call.maps)


def _insertion(call: _Call) -> Tensor:
    """Removing the least important pixels first is the reverse of inserting the most important ones first."""
    return _area_while_removing(call, -call.maps)


def _area_while_removing(call: _Call, importance: Tensor) -> Tensor:
    order = importance.flatten(1).argsort(dim=1, descending=True, stable=True)
    pixels = order.shape[1]
    step = next(
        s for s in range(max(pixels // STEPS, 1), 0, -1) if pixels % s == 0
    )  # so that all steps have the same size
    shown, curve = torch.ones_like(order, dtype=torch.bool), []
    for some in order.split(step, dim=1):
        shown.scatter_(1, some, False)
        curve.append(call.probability(shown))
    area = torch.trapezoid(torch.stack(curve, 1)) / max(len(curve) - 1, 1)
    flat = importance.flatten(1)
    return torch.where(flat.amax(1) > flat.amin(1), area, torch.nan)


def _faithfulness_correlation(call: _Call) -> Tensor:
    everything = torch.ones_like(call.maps, dtype=torch.bool).flatten(1)
    size = max(everything.shape[1] // SUBSET_SHARE, 1)
    before, sums, falls = call.probability(everything), [], []
    for _ in range(SUBSETS):
        chosen = torch.rand(everything.shape, generator=call.generator).topk(size).indices.to(call.x.device)
        sums.append(call.maps.flatten(1).gather(1, chosen).sum(1))
        falls.append(before - call.probability(everything.scatter(1, chosen, False)))
    return _correlation(torch.stack(sums, 1), torch.stack(falls, 1))


def _max_sensitivity(call: _Call) -> Tensor:
    changes = []
    for _ in range(NOISES):
        noise = NOISE * (2 * torch.rand(call.x.shape, generator=call.generator) - 1)
        noisy = (call.x + noise.to(call.x)).clamp(0, 1)
        changes.append((call.explain(call.model, noisy) - call.maps).flatten(1).norm(dim=1))
    return torch.stack(changes).amax(0) / call.maps.flatten(1).norm(dim=1)  # 0 / 0 is NaN


def _randomization(call: _Call) -> Tensor:
    other = copy.deepcopy(call.model)
    with _DrawingFrom(torch.Generator(call.x.device).manual_seed(call.generator.initial_seed())):
        modules: list[Any] = list(other.modules())
        for module in reversed(modules):
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    _estimate_statistics(AttributionModel(other, call.subject.request), call.x)
    return _correlation(*(_ranks(maps.flatten(1)) for maps in (call.maps, call.explain(other, call.x))))


RANDOM = {
    *(getattr(Tensor, name) for name in ("uniform_", "normal_", "bernoulli_", "exponential_", "random_")),
    *(getattr(nn.init, name) for name in ("uniform_", "normal_", "trunc_normal_", "kaiming_uniform_",
                                          "kaiming_normal_", "xavier_uniform_", "xavier_normal_", "orthogonal_")),
}  # fmt: skip


class _DrawingFrom(TorchFunctionMode):
    """Initializes weights from a given generator, so that the global one is not touched."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.generator = generator

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        given = kwargs or {}
        if func in RANDOM and given.get("generator") is None:
            given = given | {"generator": self.generator}
        return func(*args, **given)


@torch.no_grad()
def _estimate_statistics(subject: AttributionModel, x: Tensor) -> None:
    """Estimate batch norm statistics for random weights; with others the signal of a deep model vanishes.

    Args:
        subject: Model with random weights, which shares the memory of its statistics with the original.
        x: Images (N, C, H, W) in [0, 1].
    """
    norms: list[Any] = [module for module in subject.modules() if hasattr(module, "reset_running_stats")]
    for norm in norms:
        norm.reset_running_stats()
        norm.is_synchronized = False  # other processes compute other metrics
        norm.momentum = None  # the cumulative average, here of a single batch
        norm.train()
    subject(subject.prepare(x))


def _single_deletion(call: _Call) -> Tensor:
    def logit(x: Tensor) -> Tensor:
        with torch.no_grad():
            return call.subject(call.subject.prepare(x)).gather(1, call.targets[:, None])[:, 0].double()

    whole, falls = logit(call.x), []
    for cell in range(CELLS**2):
        falls.append(whole - logit(without_cell(call.x, torch.full_like(call.targets, cell), CELLS)))
    masks = cell_masks(call.x.shape[2], call.x.shape[3], CELLS).to(call.maps)
    sums = torch.einsum("nhw,chw->nc", call.maps, masks)
    return _correlation(_ranks(sums), _ranks(torch.stack(falls, 1)))


def _energy(call: _Call) -> Tensor:
    if call.masks is None:
        raise MethodError("energy needs masks of the objects: pass masks=, on the command line --regions")
    return energy_shares(call.maps, call.masks.to(call.maps))


def energy_shares(maps: Tensor, masks: Tensor) -> Tensor:
    """Share of the positive attribution inside masks: the energy-based pointing game (arXiv 1910.01279, section 4.3).

    Args:
        maps: Signed maps (N, H, W).
        masks: Masks (N, H, W) in [0, 1] of the objects or their boxes.

    Returns:
        Shares (N,) in [0, 1]; NaN for a map without positive attribution.
    """
    positive = maps.clamp_min(0)
    return (positive * masks).sum((1, 2)) / positive.sum((1, 2))


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    """(N,) Pearson correlation of the rows of two (N, P)."""
    a, b = (v - v.mean(1, keepdim=True) for v in (a, b))
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))


def _ranks(values: Tensor) -> Tensor:
    """(N, P) rank of each value in its row; equal values get their mean rank."""
    rows = []
    for row in values:
        _, places, counts = row.unique(return_inverse=True, return_counts=True)
        rows.append((counts.cumsum(0) - (counts - 1) / 2)[places])
    return torch.stack(rows).double()


METRICS: dict[str, Callable[[_Call], Tensor]] = {
    "deletion": _deletion,
    "insertion": _insertion,
    "faithfulness_correlation": _faithfulness_correlation,
    "max_sensitivity": _max_sensitivity,
    "randomization": _randomization,
    "single_deletion": _single_deletion,
    "energy": _energy,
}
NEEDING_MASKS = ("energy",)


def check_metrics(names: Sequence[str]) -> None:
    """Check the names of metrics.

    Raises:
        MethodError: If there is no metric of a name.
    """
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        raise MethodError(f"no metric {unknown[0]!r}: choose one of {', '.join(METRICS)}")


def evaluate(
    model: nn.Module,
    x: Tensor,
    targets: Targets,
    metric: str,
    method: str = "bcos",
    *,
    masks: Tensor | None = None,
    seed: int = 0,
    layer: Layer = None,
    output: str | int | None = None,
    position: Position = None,
    region: Region = None,
    extra: Mapping[str, object] | None = None,
    **options: Any,
) -> Tensor:
    """Compute a metric of an attribution method for each image.

    Args:
        model: A B-cos model or a plain timm model, in eval mode.
        x: Images (N, C, H, W) in [0, 1].
        targets: Classes, as in `attribute`.
        metric: Name of a metric in `METRICS`.
        method: Attribution method, a name in `timm_bcos.attribution.registry.METHODS`.
        masks: Masks (N, H, W) of the objects or their boxes, 1 inside and 0 outside, for metrics in `NEEDING_MASKS`.
        seed: Random seed of the metric.
        layer: As in `attribute`. Metrics of probabilities then use activations as they are.
        output: As in `attribute`.
        position: As in `attribute`. Modified images keep the positions of the given ones.
        region: As in `attribute`.
        extra: As in `attribute`.
        options: Other options of `attribute`.

    Returns:
        Values (N,) in float64.

    Raises:
        MethodError: If the metric or method is unknown, maps are zero everywhere or not finite, or masks are missing.
        InputError: If masks are empty or differ from the images in shape.
        TargetError: As in `attribute`.
    """
    check_metrics([metric])
    x = checked_images(model, x)
    _check_masks(masks, x)
    given: dict[str, Any] = dict(layer=layer, output=output, position=position, region=region, extra=extra)
    subject, x, targets = settled_model(model, x, targets, method, **given)
    own_layer = layer if isinstance(layer, str) else layer_path(model, layer)  # Grad-CAM's is none of the request's
    options |= subject.request.arguments() | dict(layer=own_layer)
    maps = attribute(model, x, targets, method, **options).double()
    if not bool(maps.isfinite().all()) or not bool(maps.any()):
        kind = "all equal to zero" if bool(maps.isfinite().all()) else "not finite"
        raise MethodError(f"{metric} of {method}: the maps are {kind}, so the metric is not defined")
    call = _Call(model, subject, x, targets, method, options, torch.Generator().manual_seed(seed), maps, masks)
    return METRICS[metric](call).cpu()


def _check_masks(masks: Tensor | None, x: Tensor) -> None:
    if masks is None:
        return
    if masks.shape != (len(x), *x.shape[2:]):
        raise InputError(f"masks {tuple(masks.shape)} of images {tuple(x.shape)}: give (N, H, W) of the images' size")
    if not bool(masks.flatten(1).any(1).all()):
        raise InputError("a mask is empty: each must have a pixel inside the object")
