"""What most commands ask for: a network, and labelled images."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..data.datasets import LabelledImages

__all__ = ["DataChoice", "NetworkChoice"]


@dataclass(frozen=True)
class NetworkChoice:
    """Which network.

    Attributes:
        model: timm's name; None for the one of the checkpoint, or the one that comes with the package.
        checkpoint: Weights.
        plain: Take a plain timm model as it is.
    """

    model: str | None = None
    checkpoint: Path | None = None
    plain: bool = False

    def load(self, device: str = "cpu") -> Any:
        """The network in eval mode on its device.

        Raises:
            BcosError: For a network, checkpoint, weights or device that cannot be had.
        """
        from ..models.loading import load_model, load_plain_model
        from .devices import find_device

        place = find_device(device)
        load = load_plain_model if self.plain else load_model
        return load(self.model, self.checkpoint).eval().to(place)


@dataclass(frozen=True)
class DataChoice:
    """Which labelled images, as timm's scripts say it."""

    data_dir: str
    dataset: str = ""
    split: str = "validation"
    class_map: str = ""

    def load(self, num_classes: int) -> "LabelledImages":
        """The data set.

        Raises:
            InputError: For a data set that cannot be had, or with images of another number of classes.
        """
        from ..data.datasets import load_dataset

        return load_dataset(self.data_dir, num_classes, kind=self.dataset, split=self.split, class_map=self.class_map)
