"""A contact sheet of a class: photos, and below them what speaks for the class."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from ..explanation.api import explain
from ..explanation.visualization import overlay

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_class"]

WINDOW = 15  # of the mean filter over contributions, in pixels, as in the first paper


def plot_class(model: nn.Module, x: Tensor, target: int, name: str, probabilities: Sequence[float]) -> "Figure":
    """Plot photos of a class and the overlays of their contributions to its logit, smoothed.

    Args:
        model: A B-cos model in eval mode.
        x: Images (N, C, H, W) in [0, 1].
        target: Class.
        name: Name of the class.
        probabilities: Probability of the class for each image.
    """
    from matplotlib.figure import Figure

    maps = F.avg_pool2d(explain(model, x, target).contribution_map[:, None], WINDOW, 1, WINDOW // 2)[:, 0]
    photos = x.detach().cpu().expand(-1, 3, -1, -1).movedim(1, -1)
    figure = Figure(figsize=(max(1.8 * len(x), 3.6), 4.0), layout="constrained")
    title = f"{name}: photos with their probability, and contributions for (red) and against (blue) the class"
    figure.suptitle(title, fontsize=10, parse_math=False)
    axes = figure.subplots(2, len(x), squeeze=False)
    for row, pictures in zip(axes, (photos, overlay(x, maps.detach().cpu())), strict=True):
        for ax, picture in zip(row, pictures, strict=True):
            ax.imshow(picture.clamp(0, 1).float().numpy())
            ax.axis("off")
    for ax, probability in zip(axes[0], probabilities, strict=True):
        ax.set_title(f"{probability:.2f}", fontsize=9)
    return figure
