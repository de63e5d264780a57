"""Explanations of photos: a model with its photo transform and the names of its classes."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .data.geometry import flatten_transform, transform_photo
from .data.photo_inputs import NamedPhoto, Photos, read_photos
from .data.photo_regions import regions_in_images
from .data.photos import photo_mode, photo_steps
from .errors import CheckpointError, InputError, TargetError
from .explanation.api import contrast, explain, explain_targets
from .explanation.inputs import check_images, check_model
from .explanation.photo import Photo
from .explanation.regions import Position
from .explanation.request import as_direction, check_target
from .explanation.result import Explanation
from .models.class_names import class_names, find_classes, read_class_names
from .models.devices import find_device
from .models.loading import load_model

__all__ = ["Explainer", "PreparedPhotos"]

CHUNK = 8  # photos per pass
CHECKPOINT_SUFFIXES = (".pth", ".pt", ".tar", ".bin", ".safetensors")

Target = int | str | Sequence[Any] | set[Any] | frozenset[Any] | Tensor | None


@dataclass(frozen=True, eq=False)
class PreparedPhotos:
    """Photos transformed for a model.

    Attributes:
        images: (N, C, H, W) images in [0, 1], on the model's device and in its data type.
        photos: The N photos, and the part of each that its image shows. Empty if images come without photos.
    """

    images: Tensor
    photos: tuple[Photo, ...] = ()

    def __len__(self) -> int:
        return len(self.images)


class Explainer:
    """Explains photos: reads, transforms and classifies them, and explains the classes.

    Args:
        model: Name of a model as in `timm.create_model`, also 'local-dir:PATH' or 'hf-hub:ORG/NAME'; path of a
            checkpoint of train.py, or of a directory that `timm_bcos.save_repository` has written; or a B-cos model in
            evaluation mode. Named models get their weights; plain timm models are converted.
        checkpoint: File with weights of the named model, instead of its published ones.
        class_names: Name of each class, or the path of a file or directory of names, as the command line's option
            --classes. Default: those of the model's weights.
        crop: How photos that are not square are brought to the shape of the model's image. 'center' is the transform
            of the model's pretrained cfg, which usually resizes the shorter side and crops the center. 'none' shows
            the whole photo: it resizes the longer side and pads the shorter one with gray. 'squash' also shows the
            whole photo, but changes its aspect ratio.
        transform: Evaluation transform of timm or torchvision that replaces the model's own. Its normalization is left
            out, because B-cos models read pixels in [0, 1].
        device: Device to compute on, to which the model is moved. Default: the CPU for named models, and the model's
            own for a module.

    Attributes:
        model: The model.
        class_names: Name of each class; empty if the number of classes is not known.

    Raises:
        InputError: If the model, transform, device or names cannot be used, or the model takes neither gray nor color
            images.
        TargetError: If timm does not know the name.
        CheckpointError: If weights cannot be loaded.
        ModelStateError: For a module in training mode, or one that is not a B-cos model.

    Examples:
        >>> explainer = timm_bcos.Explainer("bcos_efficientnet_lite0")
        >>> why = explainer("photo.jpg")
        >>> explainer("photo.jpg", target="tabby", versus="tiger cat").overlay().save("why.png")
    """

    def __init__(
        self,
        model: str | PathLike[str] | nn.Module,
        *,
        checkpoint: str | PathLike[str] | None = None,
        class_names: Sequence[str] | str | PathLike[str] | None = None,
        crop: str = "center",
        transform: Any = None,
        device: torch.device | str | None = None,
    ) -> None:
        if transform is not None and crop != "center":
            raise InputError(f"crop={crop!r} is for the model's own transform: leave it or the transform out")
        self.model = _load(model, checkpoint, device)
        self._reader = check_model(self.model)
        self._mode = photo_mode(self.model)
        self._steps = photo_steps(self.model, crop) if transform is None else flatten_transform(transform)
        self.class_names = _names_of(self.model, class_names)
        self.crop = crop

    def __repr__(self) -> str:
        cfg = getattr(self.model, "pretrained_cfg", None) or {}
        name = cfg.get("architecture") or type(self.model).__name__
        return f"Explainer({name}, {len(self.class_names)} classes, crop={self.crop!r})"

    def __call__(
        self,
        photos: Photos | PreparedPhotos,
        target: Target = None,
        *,
        versus: Target = None,
        layer: str | None = None,
        output: str | int | None = None,
        position: Position = None,
        region: Any = None,
        extra: Mapping[str, object] | None = None,
        chunk: int | None = CHUNK,
    ) -> Explanation:
        """Explain a class, or another output, of each photo.

        Args:
            photos: Path of an image file or of a directory of them, open file, Pillow image of any mode; NumPy array
                (H, W, 3) or (H, W), tensor (3, H, W) or (1, H, W), of uint8 or of floating-point numbers in [0, 1]; an
                iterable of these; or what `read` returns. Photos are rotated as their EXIF data says.
            target: Class to explain, by name or index; a list with a class for each photo; a set of classes, whose
                mean logit is explained; or a direction, as in `timm_bcos.explain`. Default: the predicted class.
            versus: Class whose logit is subtracted, in the same format. Without a target, it is subtracted from the
                most probable other class.
            layer: Layer whose unit `target` is explained, as in `timm_bcos.explain`.
            output: Output of the model, as in `timm_bcos.explain`.
            position: Position in a map, as in `timm_bcos.explain`.
            region: Part of the photo over which a map is averaged: a box (left, top, right, bottom) in pixels of the
                photo, a mask of its size (height, width), or one of these for each photo.
            extra: Other arguments of the model's forward, as in `timm_bcos.explain`.
            chunk: Number of photos per pass, which bounds memory; None for all at once.

        Returns:
            The explanation of all photos, with their names and classes.

        Raises:
            InputError: If a photo cannot be read or transformed; the message names it.
            TargetError: For a class, layer, output, position or region that does not exist.

        Warns:
            InexactWarning: If the model has parts that are not dynamic linear.
        """
        prepared = self.read(photos)
        first, second = (self._find(prepared, one, layer) for one in (target, versus))
        part = _region(region, prepared)
        options = dict(layer=layer, output=output, position=position, region=part, extra=extra, chunk=chunk)
        if second is None:
            found = explain(self.model, prepared.images, first, **options)
        else:
            first = self._best_other(prepared, second, options) if first is None else first
            found = contrast(self.model, prepared.images, first, second, **options)
        return self._with_names(found, prepared.photos)

    def explain_targets(
        self, photos: Photos | PreparedPhotos, targets: Sequence[Any] | Tensor | None = None, *, top: int = 3,
        chunk: int | None = CHUNK,
    ) -> list[Explanation]:  # fmt: skip
        """Explain several classes of each photo with one forward pass.

        Args:
            photos: Photos, as in `__call__`.
            targets: Classes by name or index, for all photos; or a list of them for each photo. Default: the most
                probable ones of each photo, best first.
            top: Number of most probable classes.
            chunk: Number of photos per pass.

        Returns:
            For each photo, an explanation with a row per class.

        Raises:
            InputError: As in `__call__`.
            TargetError: For classes that the model does not have.
        """
        prepared = self.read(photos)
        table = None if targets is None else _table(find_classes(targets, self.class_names), len(prepared))
        ranks = explain_targets(self.model, prepared.images, table, top=top, chunk=chunk)
        found = [Explanation.stack([rank[i] for rank in ranks]) for i in range(len(prepared))]
        photos_of = [(photo,) * len(ranks) for photo in prepared.photos] or [()] * len(found)
        return [self._with_names(one, own) for one, own in zip(found, photos_of, strict=True)]

    def top(self, photos: Photos | PreparedPhotos, count: int = 3, *, chunk: int | None = CHUNK) -> list[Explanation]:
        """Explain the most probable classes of each photo.

        Args:
            photos: Photos, as in `__call__`.
            count: Number of classes.
            chunk: Number of photos per pass.

        Returns:
            For each photo, an explanation with a row per class, best first.

        Raises:
            InputError: As in `__call__`.
            TargetError: If the model has fewer classes.
        """
        return self.explain_targets(photos, top=count, chunk=chunk)

    def read(self, photos: Photos | PreparedPhotos) -> PreparedPhotos:
        """Read photos and transform them for the model.

        Args:
            photos: Photos, as in `__call__`.

        Returns:
            Images for the model, and the photos. Every method of `Explainer` takes them in place of photos.

        Raises:
            InputError: If a photo cannot be read or transformed; the message names it.
        """
        if isinstance(photos, PreparedPhotos):
            return photos
        images, found = zip(*map(self._transform, read_photos(photos)), strict=True)
        try:
            batch = torch.stack(images)
        except RuntimeError as error:
            sizes = sorted({f"{image.shape[2]} × {image.shape[1]}" for image in images})
            raise InputError(
                f"the transform gives images of different sizes, {', '.join(sizes)}: add a crop"
            ) from error
        weight = self._reader.weight
        batch = batch.to(weight.device, weight.dtype if weight.is_floating_point() else None)
        check_images(batch, self._reader)
        return PreparedPhotos(batch, found)

    def _transform(self, photo: NamedPhoto) -> tuple[Tensor, Photo]:
        try:
            seen = photo.image if self._mode == "RGB" else photo.image.convert(self._mode)
            image, box = transform_photo(seen, self._steps)
        except InputError as error:
            raise InputError(f"{photo.label}: {error}") from error
        return image, Photo(photo.image, box, photo.name)

    def _find(self, prepared: PreparedPhotos, target: Target, layer: str | None) -> Any:
        """A target without class names."""
        target = list(target) if isinstance(target, Iterator) else target
        if isinstance(target, list | tuple) and len(target) != len(prepared):
            raise TargetError(
                f"{target!r} are {len(target)} classes for {len(prepared)} photos: give one for each photo; or use "
                f"explain_targets for several of each photo, or a set for the mean of several"
            )
        if layer is not None and _has_names(target):
            raise TargetError(f"{target!r}: the units of layer {layer!r} have no names; give an index")
        return find_classes(target, self.class_names)

    def _best_other(self, prepared: PreparedPhotos, versus: Any, options: Mapping[str, Any]) -> Tensor:
        """(N,) the most probable class of each photo that is not subtracted."""
        logits = explain(self.model, prepared.images, **options).logits
        asked = check_target(versus, len(logits), "versus")
        if asked is not None and not (isinstance(asked, Tensor) and asked.is_floating_point()):
            subtracted = as_direction(asked, len(logits), logits.shape[1], "classes") > 0
            if bool(subtracted.all(1).any()):
                raise TargetError("versus holds all classes: leave at least one out")
            logits = logits.masked_fill(subtracted.to(logits.device), -torch.inf)
        return logits.argmax(1)

    def _with_names(self, found: Explanation, photos: tuple[Photo, ...]) -> Explanation:
        fits = found.layer is None and len(self.class_names) == found.logits.shape[1]
        return replace(found, class_names=self.class_names if fits else found.class_names, photos=photos)


def _load(model: Any, checkpoint: Any, device: torch.device | str | None) -> nn.Module:
    found = None if device is None else find_device(device)  # first, so that a wrong name fails before a download
    if isinstance(model, nn.Module):
        if checkpoint is not None:
            raise InputError("checkpoint= is for the weights of a named model: load them into the module instead")
        return model if found is None else model.to(found)
    if not isinstance(model, str | PathLike):
        kind = type(model).__name__
        raise InputError(f"model of type {kind}: give the name of a model, the path of a checkpoint, or a B-cos model")
    loaded: nn.Module = load_model(*_source(Path(model), str(model), checkpoint)).eval()
    return loaded if found is None else loaded.to(found)


def _source(path: Path, name: str, checkpoint: Any) -> tuple[str | None, Path | None]:
    """Name and checkpoint for `load_model`."""
    if checkpoint is not None:
        return name, Path(checkpoint)
    if path.is_file():
        return None, path
    if (path / "config.json").is_file():
        return f"local-dir:{path}", None
    if ":" not in name and (path.is_absolute() or len(path.parts) > 1 or path.suffix in CHECKPOINT_SUFFIXES):
        raise CheckpointError(f"{path} is neither a checkpoint nor a directory with a config.json of timm")
    return name, None


def _names_of(model: nn.Module, given: Sequence[str] | str | PathLike[str] | None) -> tuple[str, ...]:
    if given is None:
        return tuple(class_names(model))
    count = getattr(model, "num_classes", None)
    if isinstance(given, str | PathLike):
        return tuple(read_class_names(Path(given), count))
    if isinstance(given, Mapping | set | frozenset) or not isinstance(given, Iterable):
        raise InputError(
            f"class_names of type {type(given).__name__}: give a list of names, or the path of a file of them"
        )
    names = tuple(map(str, given))
    if count is not None and len(names) != count:
        raise InputError(f"{len(names)} class names for a model of {count} classes: give one for each")
    return names


def _has_names(target: object) -> bool:
    several = target if isinstance(target, list | tuple | set | frozenset) else [target]
    return any(isinstance(one, str) for one in several)


def _table(targets: Any, images: int) -> Any:
    """(N, T) classes: a flat sequence is for all images."""
    if isinstance(targets, Integral):
        targets = [targets]
    if isinstance(targets, Tensor):
        return targets.expand(images, -1) if targets.ndim == 1 else targets
    is_flat = isinstance(targets, Iterable) and all(isinstance(one, Integral) for one in targets)
    return [list(targets)] * images if is_flat else targets


def _region(region: Any, prepared: PreparedPhotos) -> Any:
    """A region of the photos, or of the images if they come without photos, as `explain` takes it."""
    if region is None or not prepared.photos:
        return region
    return regions_in_images(region, prepared.photos, (prepared.images.shape[2], prepared.images.shape[3]))
