"""The result of explaining: one row of W(x) for each image, in numbers, pictures, words and files."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from os import PathLike
from typing import TYPE_CHECKING

from torch import Tensor
from typing_extensions import Self

from ..errors import InputError
from . import figures, storage
from .rows import Rows
from .scale import cell_sums, check_scale
from .summary import Json, predictions, summary
from .superpixels import Superpixels, superpixel_sums
from .titles import one_line
from .visualization import save_figure, weights_to_rgba

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

__all__ = ["Explanation"]


@dataclass(frozen=True, eq=False, repr=False)
class Explanation(Rows):
    """Why each image got its logit (or neuron its activation): exact, no approximation.

    It holds N images, and can be indexed like a tensor. Methods that return one picture or one summary are of a single
    image: call them on `explanation[0]` if there are more.

    Attributes:
        logits: (N, K) outputs; for an inner neuron its layer's activations at the neuron's position.
        target: (N,) the class or unit explained; of a direction, the one that it weighs most.
        weights: (N, 2C, H, W) row `target` of W(x), a picture in the input's encoding.
        inputs: (N, 2C, H, W) the encoded images.
        bias: (N,) what is added on the way contributes: constants (logit bias, layer biases, position embeddings,
            class tokens), and, in a model that is not dynamic linear, values that depend on the image. Computed as
            gradient · addend and never as the remainder.
        constant_bias: (N,) how much of `bias` comes from true constants (parameters, buffers, literals): all of it, or
            the explanation is not exact.
        violations: Parts of the model that are not dynamic linear, which make the explanation inexact; empty if exact.
        logit_bias: The classifier's fixed logit bias, which `bias` contains; 0 for inner neurons.
        layer: The explained neuron's layer, None for a logit.
        probability_kind: 'sigmoid' or 'softmax', as the model's config says.
        position: (N, 2) its row and column (row 0 for token sequences); None for a logit, and for a region.
        versus: (N,) the class that `contrast` subtracts; weights and biases are then differences. None for one class.
        direction: (N, K) coefficients of the outputs whose sum is explained; None for a class, or two.
        region: (N, rows, columns) weights of the positions of the output's map, which sum to 1; `logits` are then
            means over the region. None without one.
        rounding: Measured bound of the output's rounding errors, if a part of the model computes in a narrower data
            type than its input's (`x.float()` in float64); otherwise 0.
        class_names: Name of each class; empty if unknown.
        photos: The photo of each image and the part of it that the model's image shows; empty if images were given as
            tensors.
    """

    def __repr__(self) -> str:
        return one_line(self)

    def _repr_png_(self) -> bytes | None:
        """A small figure of the first images, for notebooks."""
        return figures.png_bytes(self) if len(self) else None

    def at_scale(self, scale: int) -> Tensor:
        """Contributions of cells of scale × scale pixels: sums, which are as exact as the pixels' contributions.

        Args:
            scale: Side of a cell in pixels; 1 for single pixels. Cells are counted from the top left; those at the
                right and bottom edge have fewer pixels if the scale does not divide the image.

        Returns:
            (N, ⌈H / scale⌉, ⌈W / scale⌉) in float64, with the same total as the contribution map.

        Raises:
            InputError: For a scale that is not an integer of at least 1.
        """
        return cell_sums(self.contribution_map, scale)

    def superpixels(self, count: int = 50) -> Superpixels:
        """Contributions of superpixels, i.e. segments that follow the edges of the image (SLIC).

        Args:
            count: Approximate number of superpixels per image.

        Returns:
            `labels` (N, H, W), the superpixel of each pixel, and `sums` (N, S) in float64, the contribution of each.

        Raises:
            InputError: For a count that is not an integer of at least 1.
            MissingError: If scikit-image is not installed.
        """
        return superpixel_sums(self.image, self.contribution_map, count)

    def photo_map(self, scale: int = 1) -> Tensor:
        """Contributions of the pixels of the original photo.

        Contributions of the model's pixels are spread evenly over the area that each shows, so the sum over a part of
        the photo is the sum over the same part of the model's image. Of one image.

        Args:
            scale: Side of the cells, in pixels of the model's image, over which contributions are summed first.

        Returns:
            (height, width) in float64, at the size of the photo, or of the image if there is no photo. Pixels that the
            model does not see are 0; contributions of padding are left out.

        Raises:
            InputError: For several images, or an invalid scale.
        """
        self._check_single("photo_map")
        return figures.photo_map(self, check_scale(scale))

    def overlay(self, scale: int | None = None) -> "Image":
        """The contribution map over the original photo in gray: red for, blue against. Of one image.

        Args:
            scale: Side of the cells that are shown, in pixels of the model's image, as in `at_scale`; 1 for single
                pixels. Default: a power of two near 1 / 11 of the image's shorter side, 16 for 224 × 224 pixels.

        Returns:
            RGB image of Pillow, at the size of the photo, or of the image if there is no photo. What the model does not
            see is pale.

        Raises:
            InputError: For several images, or an invalid scale.
        """
        self._check_single("overlay")
        return figures.overlay_picture(self, scale)

    def color_picture(self) -> "Image":
        """The explanation in color, as in `to_rgba`, at its place on the original photo. Of one image.

        Returns:
            RGBA image of Pillow, at the size of the photo, or of the image if there is no photo; transparent where the
            model does not see the photo.

        Raises:
            InputError: For several images, or images without colors.
        """
        self._check_single("color_picture")
        return figures.color_picture(self)

    def _check_single(self, method: str) -> None:
        if len(self) != 1:
            raise InputError(
                f"{method} is of one image, and this explanation has {len(self)}: choose one, as in "
                f"explanation[0].{method}(...)"
            )

    def predictions(self, top: int = 5) -> list[tuple[str, float]]:
        """The most probable classes of the image and their probabilities, best first. Of one image.

        Args:
            top: Number of classes.

        Raises:
            InputError: For several images, the explanation of a hidden unit, or a `top` below 1.
        """
        self._check_single("predictions")
        return predictions(self, top)

    def summary(self, top: int = 5) -> Json:
        """The explanation in numbers and words, ready for `json.dumps`. Of one image.

        Args:
            top: Number of classes.

        Returns:
            `title`: what is explained. `target`, `versus`: index, name and probability of the class (activation of the
            unit) explained, and of the one subtracted. `classes` (`units`): the most probable (active) ones. `logit`,
            `bias`. `positive`, `negative`: sums of the positive and the negative contributions. `regions`: sums over
            the nine parts of a 3 × 3 grid on the model's image, from 'top left' to 'bottom right'.
            `completeness_error`, `exact`, `violations`. `image`: its size. `photo`: name, size, the box that the model
            sees, the share of padding in the model's image and its contribution; None without a photo. Numbers that are
            not finite are None.

        Raises:
            InputError: For several images, or a `top` below 1.
        """
        self._check_single("summary")
        return summary(self, top)

    def to_rgba(self, smooth: int = 15, percentile: float = 99.5) -> Tensor:
        """(N, H, W, 4) pictures in [0, 1]: each pixel in the color that its weights look for, opaque where they are
        strong and speak for the target; see `timm_bcos.explanation.visualization.weights_to_rgba`."""
        figures.check_not_empty(self)
        return weights_to_rgba(self.weights, self.contribution_map, smooth, percentile)

    def to_rgb(self, kind: str = "color", scale: int | None = None) -> Tensor:
        """Pictures for TensorBoard's `add_images` and other loggers.

        Args:
            kind: 'color' for the explanation in color on white, 'map' for the contribution map, 'overlay' for the map
                over the image in gray.
            scale: Side of the cells of a map or overlay in pixels, as in `overlay`.

        Returns:
            (N, 3, H, W) in [0, 1], in float32 on the CPU.

        Raises:
            InputError: For another kind, an invalid scale, or images without colors.
        """
        return figures.to_rgb(self, kind, scale)

    def plot(self, class_names: Sequence[str] | None = None, top: int = 5, scale: int | None = None) -> "Figure":
        """A matplotlib figure: a row per image with the image, its explanation in color, the contributions of pixels
        and of cells of pixels, these over the image, and the most probable classes (or the most active units).

        Outside a region the image is pale. A difference has a second picture, of what speaks for the other side. In the
        contribution maps, what speaks for the target is red, and what speaks against it (for the other side) is blue.
        Images of neither one nor three channels are shown as the mean of their channels, without a picture in color.

        Args:
            class_names: Name of each class; None for those of the explanation.
            top: Number of classes to show.
            scale: Side of the cells in pixels, as in `overlay`; 1 for pixels only.

        Raises:
            InputError: For an explanation of no images, or an invalid scale.
        """
        return figures.plot(self, class_names, top, scale)

    def save(
        self, path: str | PathLike[str], class_names: Sequence[str] | None = None, scale: int | None = None
    ) -> None:
        """Write a file, whole or not at all; the suffix says the format.

        Args:
            path: With the suffix .npz, everything is written as arrays and JSON, for `load`. With that of a picture,
                `plot` is written.
            class_names: Name of each class; None for those of the explanation.
            scale: As in `plot`.

        Raises:
            InputError: For any other suffix; with .npz, for names of another number of classes.
        """
        if storage.is_archive(path):
            storage.write(self if class_names is None else replace(self, class_names=tuple(class_names)), path)
        else:
            storage.check_picture_suffix(path)
            save_figure(self.plot(class_names, scale=scale), path)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Self:
        """Read what `save` has written with the suffix .npz. Nothing is unpickled, so files of others are safe.

        Args:
            path: The file.

        Returns:
            The explanation, on the CPU.

        Raises:
            InputError: For a file that is missing, damaged, or not an explanation.
        """
        return storage.read(cls, path)
