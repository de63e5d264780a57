"""Metrics of many methods: values are written as they are computed, and an interrupted run continues where it stopped.

Rows are appended to `metrics.csv`; `metrics.md` summarizes them.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from ..attribution.registry import check_counts, method_name, method_names
from ..data.datasets import LabeledImages, image_loader
from ..data.regions import region_loader, region_masks
from ..distributed import distributed_map, on_main
from ..errors import MethodError
from ..files import atomic_path
from .metrics import evaluate
from .results import append_rows, drop_torn_line, read_rows

__all__ = ["evaluate_all", "read_values"]

FIELDS: dict[str, Callable[[str], Any]] = dict(metric=str, method=method_name, image=int, value=float)
Values = dict[tuple[str, str], list[float]]


def read_values(folder: Path, images: int) -> Values:
    """Values by metric and method, as far as they are complete for all images."""
    found: Values = {}
    for row in read_rows(folder / "metrics.csv", FIELDS):
        found.setdefault((row["metric"], row["method"]), []).append(row["value"])
    return {key: values[-images:] for key, values in found.items() if len(values) >= images}


def evaluate_all(
    model: nn.Module,
    dataset: LabeledImages,
    metrics: Sequence[str],
    methods: Sequence[str],
    folder: Path,
    *,
    images: int = 20,
    regions: Path | None = None,
) -> list[str]:
    """Compute all metrics of all methods that are not in the directory yet. Several processes share the pairs.

    Args:
        model: A B-cos model or a plain timm model, in eval mode.
        dataset: Labeled images.
        metrics: Names of metrics in `METRICS`.
        methods: Attribution methods, names in `timm_bcos.attribution.registry.METHODS`.
        folder: Directory of the results.
        images: Number of images, evenly spread over the data set.
        regions: Object regions, as in `region_loader`, for the metrics that need masks.

    Returns:
        The reasons why methods were left out.
    """
    check_counts(images=images)
    indices = np.linspace(0, len(dataset) - 1, min(images, len(dataset))).round().astype(int).tolist()
    x, targets = _load(model, dataset, indices)
    masks = None if regions is None else region_masks(region_loader(model, dataset, regions), indices).to(x.device)
    methods = method_names(methods)
    on_main(partial(drop_torn_line, folder / "metrics.csv"))
    read = partial(read_values, folder, len(indices))
    done = on_main(read)
    todo = [(metric, method) for metric in metrics for method in methods if (metric, method) not in done]

    def compute(own: Sequence[tuple[str, str]]) -> Iterator[list[float] | MethodError]:
        for metric, method in tqdm(own, "metrics", disable=None):
            try:
                yield evaluate(model, x, targets, metric, method, masks=masks).tolist()
            except MethodError as error:
                yield error

    left_out: dict[str, str] = {}
    for (metric, method), values in zip(todo, distributed_map(compute, todo), strict=True):
        if isinstance(values, MethodError):
            left_out[method] = str(values)
            continue
        rows = [(metric, method, i, f"{v:.6g}") for i, v in zip(indices, values, strict=True)]
        on_main(partial(append_rows, folder / "metrics.csv", list(FIELDS), rows))
    on_main(lambda: _write_table(folder / "metrics.md", read(), methods, metrics))
    return list(left_out.values())


def _write_table(path: Path, values: Values, methods: Sequence[str], metrics: Sequence[str]) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(_table(values, methods, metrics))


def _load(model: nn.Module, dataset: LabeledImages, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = zip(*map(image_loader(model, dataset), indices), strict=True)
    device = next(model.parameters()).device
    return torch.stack(images).to(device), torch.tensor(labels, device=device)


def _table(values: Values, methods: Sequence[str], metrics: Sequence[str]) -> str:
    lines = ["| method | " + " | ".join(metrics) + " |", "| --- |" + " ---: |" * len(metrics)]
    for method in methods:
        found = [values.get((metric, method)) for metric in metrics]
        if any(found):
            cells = [f"{np.nanmean(v):.3f} ± {np.nanstd(v):.3f}" if v else "" for v in found]
            lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
