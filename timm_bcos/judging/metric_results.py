"""The metrics measured into a folder, from which an interrupted run resumes.

`metrics.csv` has every value, appended as it comes; `metrics.md` has means and standard deviations.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from ..attribution.registry import check_counts
from ..data.datasets import LabelledImages, image_loader
from ..data.regions import region_loader, region_masks
from ..errors import MethodError
from ..files import atomic_path
from .metrics import evaluate
from .results import append_rows, drop_torn_line, read_rows

__all__ = ["evaluate_all", "read_values"]

FIELDS = dict(metric=str, method=str, image=int, value=float)
Values = dict[tuple[str, str], list[float]]


def read_values(folder: Path, images: int) -> Values:
    """Values by metric and method, where all images have one."""
    found: Values = {}
    for row in read_rows(folder / "metrics.csv", FIELDS):
        found.setdefault((row["metric"], row["method"]), []).append(row["value"])
    return {key: values[-images:] for key, values in found.items() if len(values) >= images}


def evaluate_all(
    model: nn.Module,
    dataset: LabelledImages,
    metrics: Sequence[str],
    methods: Sequence[str],
    folder: Path,
    *,
    images: int = 20,
    regions: Path | None = None,
) -> list[str]:
    """Measure each method by each metric, as far as the folder does not hold it already.

    Args:
        model: A B-cos network or a plain timm model, in eval mode.
        dataset: Labelled images.
        metrics: Of `timm_bcos.judging.metrics.METRICS`.
        methods: Of `timm_bcos.attribution.registry.METHODS`.
        folder: Of the results.
        images: How many, evenly spread over the data set.
        regions: Where the objects are, as `region_loader` takes it, for the metrics that need it.

    Returns:
        Why methods were left out.
    """
    check_counts(images=images)
    indices = np.linspace(0, len(dataset) - 1, min(images, len(dataset))).round().astype(int).tolist()
    x, targets = _load(model, dataset, indices)
    masks = None if regions is None else region_masks(region_loader(model, dataset, regions), indices).to(x.device)
    drop_torn_line(folder / "metrics.csv")
    done, left_out = read_values(folder, len(indices)), {}
    for metric, method in tqdm([(m, a) for m in metrics for a in methods], "metrics", disable=None):
        if (metric, method) in done:
            continue
        try:
            values = evaluate(model, x, targets, metric, method, masks=masks).tolist()
        except MethodError as error:
            left_out[method] = str(error)
            continue
        rows = ((metric, method, i, f"{v:.6g}") for i, v in zip(indices, values, strict=True))
        append_rows(folder / "metrics.csv", list(FIELDS), rows)
    with atomic_path(folder / "metrics.md") as path:
        path.write_text(_table(read_values(folder, len(indices)), methods, metrics))
    return list(left_out.values())


def _load(model: nn.Module, dataset: LabelledImages, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
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
