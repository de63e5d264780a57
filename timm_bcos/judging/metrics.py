"""Metrics of attribution methods, behind one call.

| metric | what it measures | better |
| --- | --- | --- |
| deletion | area under the probability while the most important pixels turn to the image's mean | lower |
| insertion | the same while they come back into an image of the mean colour | higher |
| faithfulness_correlation | correlation of attribution and fall of the probability, over sets of pixels | higher |
| max_sensitivity | largest relative change of the map under small noise on the image | lower |
| randomisation | rank correlation with the map of the network with random weights | nearer 0 |

Sources: arXiv 1806.07421 (deletion, insertion), 2005.00631 (faithfulness correlation), 1901.09392 (sensitivity),
1810.03292 (randomisation). Batch norms of the network with random weights have the statistics of the images at hand.
Where a metric is not defined for an image (a map without differences ranks no pixels, a probability that never changes
correlates with nothing) its value is NaN.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..attribution.registry import Subject, Targets, attribute, checked_images
from ..errors import MethodError

__all__ = ["METRICS", "check_metrics", "evaluate"]

STEPS = 50  # of deletion and insertion
SUBSETS, SUBSET_SHARE = 50, 16  # sets of pixels, and the part of the image that each is, for the faithfulness
NOISES, NOISE = 5, 0.02  # noisy images, and the bound of their uniform noise, for the sensitivity


@dataclass(frozen=True)
class _Call:
    """One metric of one method."""

    model: nn.Module
    subject: Subject
    x: Tensor  # (N, C, H, W)
    targets: Tensor  # (N,)
    method: str
    options: dict[str, Any]
    generator: torch.Generator
    maps: Tensor  # (N, H, W), of float64

    def explain(self, model: nn.Module, x: Tensor) -> Tensor:
        return attribute(model, x, self.targets, self.method, **self.options).double()

    def probability(self, masks: Tensor) -> Tensor:
        """(N,) of the targets, where an image shows its mean colour outside the pixels of its mask (N, H · W)."""
        mask = masks.reshape(len(self.x), 1, *self.x.shape[2:])
        changed = torch.where(mask, self.x, self.x.mean((2, 3), keepdim=True))
        return self.subject.probability(changed).gather(1, self.targets[:, None])[:, 0].double()


def _deletion(call: _Call) -> Tensor:
    return _area_while_removing(call, call.maps)


def _insertion(call: _Call) -> Tensor:
    """Removing the least important pixels first, read backwards, is inserting the most important ones."""
    return _area_while_removing(call, -call.maps)


def _area_while_removing(call: _Call, importance: Tensor) -> Tensor:
    order = importance.flatten(1).argsort(dim=1, descending=True, stable=True)
    pixels = order.shape[1]
    step = next(s for s in range(max(pixels // STEPS, 1), 0, -1) if pixels % s == 0)  # steps of equal size
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


def _randomisation(call: _Call) -> Tensor:
    other = copy.deepcopy(call.model)
    with _DrawingFrom(torch.Generator(call.x.device).manual_seed(call.generator.initial_seed())):
        modules: list[Any] = list(other.modules())
        for module in reversed(modules):
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    _estimate_statistics(other, call.x)
    return _correlation(*(_ranks(maps.flatten(1)) for maps in (call.maps, call.explain(other, call.x))))


RANDOM = {
    *(getattr(Tensor, name) for name in ("uniform_", "normal_", "bernoulli_", "exponential_", "random_")),
    *(getattr(nn.init, name) for name in ("uniform_", "normal_", "trunc_normal_", "kaiming_uniform_",
                                          "kaiming_normal_", "xavier_uniform_", "xavier_normal_", "orthogonal_")),
}  # fmt: skip


class _DrawingFrom(TorchFunctionMode):
    """Weights are initialised from a generator of our own: the global one is everybody's."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.generator = generator

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        given = kwargs or {}
        if func in RANDOM and given.get("generator") is None:
            given = given | {"generator": self.generator}
        return func(*args, **given)


@torch.no_grad()
def _estimate_statistics(network: nn.Module, x: Tensor) -> None:
    """Let batch norms take the statistics of random weights: with others a deep network's signal fades to nothing."""
    subject = Subject(network)  # whose statistics are the network's, in the same memory
    norms: list[Any] = [module for module in subject.modules() if hasattr(module, "reset_running_stats")]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the average, which is that of this one batch
        norm.train()
    subject(subject.prepare(x))


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    """(N,) of the rows of (N, P), after Pearson."""
    a, b = (v - v.mean(1, keepdim=True) for v in (a, b))
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))


def _ranks(values: Tensor) -> Tensor:
    """(N, P) rank of each value in its row; equal values share the mean of their ranks."""
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
    "randomisation": _randomisation,
}


def check_metrics(names: Sequence[str]) -> None:
    """Refuse unknown metrics.

    Raises:
        MethodError: Naming those that there are.
    """
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        raise MethodError(f"no metric {unknown[0]!r}: choose one of {', '.join(METRICS)}")


def evaluate(
    model: nn.Module, x: Tensor, targets: Targets, metric: str, method: str = "bcos", *, seed: int = 0, **options: Any
) -> Tensor:
    """One metric of one attribution method, for each image.

    Args:
        model: A B-cos network or a plain timm model, in eval mode.
        x: Images (N, C, H, W) in [0, 1].
        targets: As in `attribute`.
        metric: Of `METRICS`.
        method: Of `timm_bcos.attribution.METHODS`.
        seed: Of what the metric draws at random.
        options: Of `attribute`.

    Returns:
        (N,) of float64.

    Raises:
        MethodError: For an unknown metric or method, or for maps that are zero everywhere or not finite.
    """
    check_metrics([metric])
    x = checked_images(model, x)
    maps = attribute(model, x, targets, method, **options).double()
    if not bool(maps.isfinite().all()) or not bool(maps.any()):
        kind = "all equal to zero" if bool(maps.isfinite().all()) else "not finite"
        raise MethodError(f"{metric} of {method}: the maps are {kind}, which cannot be judged")
    subject, generator = Subject(model), torch.Generator().manual_seed(seed)
    call = _Call(model, subject, x, subject.classes(x, targets), method, options, generator, maps)
    return METRICS[metric](call).cpu()
