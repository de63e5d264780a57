"""A contact sheet of a class: photos, and below them what speaks for the class."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from ..explanation.api import explain
from ..explanation.visualization import drawable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_class"]


def plot_class(model: nn.Module, x: Tensor, target: int, name: str, probabilities: Sequence[float]) -> "Figure":
    """Plot photos of a class and the overlays of their contributions to its logit, at the default scale of figures.

    Args:
        model: A B-cos model in eval mode.
        x: Images (N, C, H, W) in [0, 1].
        target: Class.
        name: Name of the class.
        probabilities: Probability of the class for each image.
    """
    from matplotlib.figure import Figure

    overlays = explain(model, x, target).to_rgb("overlay").movedim(1, -1)
    photos = x.detach().cpu().expand(-1, 3, -1, -1).movedim(1, -1)
    figure = Figure(figsize=(max(1.8 * len(x), 3.6), 4.0), layout="constrained")
    title = f"{name}: photos with their probability, and contributions for (red) and against (blue) the class"
    figure.suptitle(drawable(title), fontsize=10, parse_math=False)
    axes = figure.subplots(2, len(x), squeeze=False)
    for row, pictures in zip(axes, (photos, overlays), strict=True):
        for ax, picture in zip(row, pictures, strict=True):
            ax.imshow(picture.clamp(0, 1).float().numpy())
            ax.axis("off")
    for ax, probability in zip(axes[0], probabilities, strict=True):
        ax.set_title(f"{probability:.2f}", fontsize=9)
    return figure
