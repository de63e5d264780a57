"""Metrics of attribution methods, by Quantus, behind one call.

| metric | what it measures | better |
| --- | --- | --- |
| deletion | area under the probability while the most important pixels turn to the image's mean | lower |
| insertion | the same while they come back into an image of the mean colour | higher |
| faithfulness_correlation | correlation of attribution and fall of the probability, over sets of pixels | higher |
| max_sensitivity | largest relative change of the map under small noise on the image | lower |
| randomisation | rank correlation with the map of the network with random weights | nearer 0 |

Batch norms of the network with random weights have the statistics of the images at hand.
"""

import importlib
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..attribution.registry import Subject, attribute
from ..errors import MethodError

__all__ = ["METRICS", "evaluate"]

STEPS = 50  # of deletion and insertion


class _Probability(nn.Module):
    """Images in [0, 1] to probabilities, as Quantus calls a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.network = model
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return Subject(self.network).probability(x.clamp(0, 1))


class _MaskedProbability(nn.Module):
    """Masks (N, 1, H, W) to the probabilities of N images: where the mask is 0 an image shows its mean colour.

    Quantus changes single numbers; of a mask these are whole pixels.
    """

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        super().__init__()
        self.network, self.x = model, x
        self.mean = x.mean((2, 3), keepdim=True)
        self.eval()

    def forward(self, mask: Tensor) -> Tensor:
        return Subject(self.network).probability(self.x * mask + self.mean * (1 - mask))


def _quantus() -> Any:
    try:
        return importlib.import_module("quantus")
    except ImportError as error:
        raise MethodError("quantus is not installed: pip install 'timm_bcos[attribution]'") from error


def _flipping(sign: int) -> Callable[..., Any]:
    """Replacing the least important pixels first, read backwards, is inserting the most important ones."""

    def values(call: "_Call") -> Any:
        pixels = call.x[0, 0].numel()
        step = next(s for s in range(max(pixels // STEPS, 1), 0, -1) if pixels % s == 0)  # Quantus wants equal steps
        metric = _quantus().PixelFlipping(features_in_step=step, perturb_baseline=0.0, disable_warnings=True)
        curve = np.asarray(call.on_masks(metric, _positive(sign * call.maps)))  # (N, steps)
        return np.trapezoid(curve, axis=1) / (curve.shape[1] - 1)  # Quantus' own calls what numpy has removed

    return values


def _faithfulness_correlation(call: "_Call") -> Any:
    pixels = call.x[0, 0].numel()
    metric = _quantus().FaithfulnessCorrelation(
        nr_runs=50, subset_size=pixels // 16, perturb_baseline=0.0, return_aggregate=False, disable_warnings=True
    )
    return call.on_masks(metric, _positive(call.maps))


def _positive(maps: Any) -> Any:
    """Shifted above 0, as Quantus wants them: neither order nor correlation over sets of equal size changes."""
    low, high = (f(maps, axis=(1, 2, 3), keepdims=True) for f in (np.min, np.max))
    return maps - low + 1e-6 * np.where(high > low, high - low, 1)


def _max_sensitivity(call: "_Call") -> Any:
    metric = _quantus().MaxSensitivity(nr_samples=5, lower_bound=0.02, disable_warnings=True)
    return call.on_images(metric)


def _randomisation(call: "_Call") -> Any:
    metric = _quantus().MPRT(skip_layers=True, return_last_correlation=True, abs=False, disable_warnings=True)
    return call.on_images(metric)


class _Call:
    """One metric for one method: what Quantus is handed."""

    def __init__(self, model: nn.Module, x: Tensor, targets: Tensor, method: str, options: dict[str, Any]) -> None:
        self.model, self.x, self.targets, self.method, self.options = model, x, targets, method, options
        self.maps = attribute(model, x, targets, method, **options)[:, None].cpu().numpy()

    def on_images(self, metric: Any) -> Any:
        return self._run(metric, _Probability(self.model), self.x, a_batch=self.maps, explain_func=self.explain)

    def on_masks(self, metric: Any, maps: Any) -> Any:
        ones = torch.ones_like(self.x[:, :1])
        return self._run(metric, _MaskedProbability(self.model, self.x), ones, a_batch=maps)

    def _run(self, metric: Any, model: nn.Module, inputs: Tensor, **kwargs: Any) -> Any:
        settings = dict(device=str(inputs.device), softmax=False, channel_first=True, batch_size=len(inputs))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return metric(model, inputs.cpu().numpy(), self.targets.cpu().numpy(), **settings, **kwargs)

    def explain(self, model: Any, inputs: Any, targets: Any, **_: Any) -> Any:
        """Quantus hands over noisy images, or a network with other weights."""
        x = torch.as_tensor(inputs).to(self.x).clamp(0, 1)
        classes = torch.as_tensor(targets, device=x.device)
        if model.network is not self.model:
            _estimate_statistics(model.network, x)
        return attribute(model.network, x, classes, self.method, **self.options)[:, None].cpu().numpy()


@torch.no_grad()
def _estimate_statistics(network: nn.Module, x: Tensor) -> None:
    """Let batch norms take the statistics of random weights: with others a deep network's signal fades to nothing."""
    subject = Subject(network)
    norms: list[Any] = [module for module in network.modules() if hasattr(module, "reset_running_stats")]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the average, which is that of this one batch
        norm.train()
    subject(subject.prepare(x))
    subject.eval()


METRICS: dict[str, Callable[["_Call"], Any]] = {
    "deletion": _flipping(1),
    "insertion": _flipping(-1),
    "faithfulness_correlation": _faithfulness_correlation,
    "max_sensitivity": _max_sensitivity,
    "randomisation": _randomisation,
}


def evaluate(
    model: nn.Module, x: Tensor, targets: Tensor, metric: str, method: str = "bcos", *, seed: int = 0, **options: Any
) -> Tensor:
    """One metric of one attribution method, for each image.

    Args:
        model: A B-cos network or a plain timm model, in eval mode.
        x: Images (N, C, H, W) in [0, 1].
        targets: (N,) classes.
        metric: Of `METRICS`.
        method: Of `timm_bcos.attribution.METHODS`.
        seed: Of what the metric draws at random.
        options: Of `attribute`.

    Returns:
        (N,) of float64.

    Raises:
        MethodError: For an unknown metric or method, for maps that Quantus refuses (all zero), or without Quantus.
    """
    if metric not in METRICS:
        raise MethodError(f"no metric {metric!r}: choose one of {', '.join(METRICS)}")
    _quantus()
    with torch.random.fork_rng(devices=[]):
        state = np.random.get_state()
        torch.manual_seed(seed)
        np.random.seed(seed)
        try:
            values = METRICS[metric](_Call(model, x, targets, method, options))
        except AssertionError as error:  # of Quantus
            raise MethodError(f"{metric} of {method}: {error}") from error
        finally:
            np.random.set_state(state)
    return torch.as_tensor(np.asarray(values, dtype=np.float64)).reshape(len(x))
