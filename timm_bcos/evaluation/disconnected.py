"""Networks of which it is known what cannot have influenced a logit (arXiv 2205.10435, section 3.1).

In a grid of images each cell gets logits of its own. Fully disconnected (DiFull), each cell is seen by a network of its
own, so that a map outside the cell is wrong for certain. Partially disconnected (DiPart), one network sees the grid and
each cell's features have a classifier of their own: only receptive fields across the border connect cells.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..data.regions import cut_cells, join_cells
from ..errors import MethodError

__all__ = ["Disconnected", "Disconnection"]

Disconnection = Literal["none", "full", "part"]


class Disconnected(nn.Module):
    """A network with logits for each cell of a grid.

    Args:
        network: A B-cos network or a plain timm model, with timm's `forward_features` and `forward_head`.
        n: Cells per side.
        kind: 'full' or 'part'.

    Shape: (N, C, n · H, n · W) to (N, n² · K), cell by cell.

    Raises:
        MethodError: For a network without these two methods.
    """

    def __init__(self, network: Any, n: int, kind: Disconnection) -> None:
        super().__init__()
        if not (hasattr(network, "forward_features") and hasattr(network, "forward_head")):
            raise MethodError(f"{type(network).__name__} has no forward_features and forward_head to disconnect")
        self.network, self.n, self.kind = network, n, kind
        self.maps = nn.Identity()  # of the whole grid, for methods that look for a network's last map
        self.classes: int = network.num_classes
        self.num_classes = n * n * self.classes
        whole_size = dict(fixed_input_size=False) if kind == "full" else {}  # of the grid, not of its cells
        self.pretrained_cfg = dict(network.pretrained_cfg) | whole_size
        if hasattr(network, "bcos_config"):
            self.bcos_config = network.bcos_config
        self.train(network.training)

    def targets(self, classes: Tensor) -> Tensor:
        """(n²,) the logit of each cell for its class."""
        return classes + self.classes * torch.arange(self.n**2, device=classes.device)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of all cells."""
        features = self._apart(x) if self.kind == "full" else self._together(x)
        logits: Tensor = self.network.forward_head(features)
        return logits.unflatten(0, (len(x), -1)).flatten(1)

    def _apart(self, x: Tensor) -> Tensor:
        features: Tensor = self.network.forward_features(cut_cells(x, self.n))
        return cut_cells(self.maps(join_cells(features, self.n)), self.n) if self._are_maps(features) else features

    def _together(self, x: Tensor) -> Tensor:
        features: Tensor = self.network.forward_features(x)
        if not self._are_maps(features):
            raise MethodError(
                f"DiPart cuts maps (N, C, H, W); the features of {type(self.network).__name__} are "
                f"{tuple(features.shape)}: take 'full'"
            )
        return cut_cells(self.maps(features), self.n)

    def _are_maps(self, features: Tensor) -> bool:
        return features.ndim == 4 and getattr(self.network, "output_fmt", "NCHW") == "NCHW"
