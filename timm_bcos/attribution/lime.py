"""LIME (arXiv 1602.04938) for images: a local linear model of a probability as a function of the visible segments.

The settings are those of the authors' image explainer: cosine distance to the whole image, an exponential kernel of
width 0.25, forward selection of the strongest segments, and ridge regression on these.
"""

import torch
from skimage.segmentation import quickshift
from torch import Tensor

from ..explanation.superpixels import segment

__all__ = ["local_weights", "mean_colors", "quickshift_segments"]

KERNEL_WIDTH = 0.25
RIDGE = 1.0


def quickshift_segments(image: Tensor, kernel_size: float) -> Tensor:
    """(H, W) segment of each pixel of an image (C, H, W)."""
    return segment(quickshift, image, ratio=0.2, kernel_size=kernel_size, max_dist=200)


def mean_colors(image: Tensor, segments: Tensor) -> Tensor:
    """(C, H, W) image with each segment in its mean color."""
    places = segments.flatten()
    sums = image.new_zeros(len(image), int(places.max()) + 1, dtype=torch.double)
    sums.index_add_(1, places, image.flatten(1).double())
    return (sums / places.bincount()).to(image.dtype)[:, segments]


def local_weights(masks: Tensor, answers: Tensor, features: int) -> Tensor:
    """Fit the local linear model of each class.

    Args:
        masks: Samples (S, F), 1 where a segment is visible.
        answers: Probabilities (S, K) of the samples.
        features: Number of segments in the model of each class.

    Returns:
        Weights (K, F), 0 for segments that are not selected.
    """
    masks, answers = masks.double(), answers.double()
    distance = 1 - masks.mean(1).sqrt()  # cosine distance to a vector of ones
    closeness = torch.exp(-((distance / KERNEL_WIDTH) ** 2) / 2)
    columns, values = (_centered(x, closeness) for x in (masks, answers))
    weights = masks.new_zeros(values.shape[1], masks.shape[1])
    for row, value in zip(weights, values.T, strict=True):
        chosen = _forward_selection(columns, value, features)
        taken = columns[:, chosen]
        squares = taken.T @ taken + RIDGE * torch.eye(len(chosen)).to(taken)
        row[chosen] = torch.linalg.solve(squares, taken.T @ value)
    return weights


def _centered(x: Tensor, closeness: Tensor) -> Tensor:
    """Center and scale, so that plain least squares without intercept equals weighted least squares with intercept."""
    mean = (closeness[:, None] * x).sum(0) / closeness.sum()
    return closeness.sqrt()[:, None] * (x - mean)


def _forward_selection(columns: Tensor, value: Tensor, count: int) -> list[int]:
    """Select the columns with the best least-squares fit greedily, after projecting out those selected before."""
    chosen: list[int] = []
    least = 1e-10 * columns.square().sum(0).max()
    for _ in range(min(count, columns.shape[1])):
        power = columns.square().sum(0)
        gain = torch.where(power > least, (columns.T @ value) ** 2 / power.clamp(min=1e-300), -1)
        gain[chosen] = -1
        best = int(gain.argmax())
        if gain[best] < 0:
            break
        chosen.append(best)
        unit = columns[:, best] / power[best].sqrt()
        value = value - (unit @ value) * unit
        columns = columns - unit[:, None] * (unit @ columns)
    return chosen
