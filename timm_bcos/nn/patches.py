"""Patches of images, as NaFlex models (`timm.models.naflexvit`) take them, and the same pixels as one image.

The image of a batch of patches is a strip: its L patches of P_h × P_w pixels below each other, (N, C, L · P_h, P_w).
"""

from dataclasses import dataclass

from torch import Tensor, nn

from .._compat import find
from ..errors import InputError

__all__ = ["PatchLayout", "find_embeds"]


@dataclass(frozen=True)
class PatchLayout:
    """The format of patches.

    Attributes:
        channels: Number of image channels, C, or 2C if the patches are encoded.
        size: Height and width of a patch in pixels, (P_h, P_w).
        channels_last: Whether the channels of a pixel lie next to each other, as by default in timm.
        is_flat: Whether patches are vectors, (N, L, P_h · P_w · C); else they are (N, L, P_h, P_w, C), or
            (N, L, C, P_h, P_w) if the channels come first.
    """

    channels: int
    size: tuple[int, int]
    channels_last: bool = True
    is_flat: bool = True

    @classmethod
    def of(cls, model: nn.Module, patches: Tensor, channels: int) -> "PatchLayout":
        """The layout of patches for a NaFlex model.

        Args:
            model: A NaFlex model, or a wrapper of one.
            patches: Patches, flat or not.
            channels: Number of image channels.

        Raises:
            InputError: If the model takes no patches, or patches of another size.
        """
        embeds = find_embeds(model)
        if embeds is None:
            raise InputError(
                f"{type(model).__name__} takes images (N, {channels}, H, W), no patches: only NaFlex models with a "
                f"linear patch embedding take patches"
            )
        height, width = embeds.patch_size  # type: ignore[misc]
        last = bool(embeds.channels_last)
        shape = tuple(patches.shape)
        for own in (channels, 2 * channels):
            if patches.ndim == 3 and shape[2] == height * width * own:
                return cls(own, (int(height), int(width)), last)
            if patches.ndim == 5 and shape[4 if last else 2] == own:
                return cls(own, (shape[2], shape[3]) if last else (shape[3], shape[4]), last, is_flat=False)
        raise InputError(
            f"patches of shape {shape}: {type(model).__name__} takes (N, L, {height * width * channels}), which is "
            f"{height} × {width} pixels of {channels} channels"
        )

    def to_image(self, patches: Tensor) -> Tensor:
        """(N, C, L · P_h, P_w): the patches below each other."""
        sizes = (*self.size, self.channels) if self.channels_last else (self.channels, *self.size)
        pixels = patches.unflatten(2, sizes) if self.is_flat else patches
        order = (0, 4, 1, 2, 3) if self.channels_last else (0, 2, 1, 3, 4)
        return pixels.permute(order).flatten(2, 3)

    def to_patches(self, image: Tensor) -> Tensor:
        """The inverse of `to_image`."""
        pixels = image.unflatten(2, (-1, self.size[0]))  # (N, C, L, P_h, P_w)
        patches = pixels.permute((0, 2, 3, 4, 1) if self.channels_last else (0, 2, 1, 3, 4))
        return patches.flatten(2) if self.is_flat else patches


def find_embeds(model: nn.Module) -> nn.Module | None:
    """The module of a NaFlex model that embeds patches; None if the model takes images only."""
    kind = find("timm.models.naflexvit.NaFlexEmbeds")
    return next((module for module in model.modules() if isinstance(module, kind) and module.is_linear), None)
