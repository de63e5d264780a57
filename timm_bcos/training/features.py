"""Features of photos: the pooled inputs of a model's classifier, computed once and cached on disk."""

import hashlib
import logging
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from .. import __version__
from ..data.class_folders import ClassFolders
from ..data.datasets import LabeledImages
from ..data.photos import photo_transform, to_photo
from ..distributed import distributed_map
from ..errors import InputError, ModelStateError
from ..files import atomic_path
from ..nn.module_utils import get_classifiers, hooked
from ..prefetch import prefetch

__all__ = ["FeatureCache", "Features", "compute_features", "find_classifier", "pooled_features"]

_logger = logging.getLogger(__name__)

MOST_CLASSES = 2**31


@dataclass(frozen=True)
class Features:
    """Features of the photos of a data set that could be read.

    Attributes:
        values: Features (N, C).
        labels: Classes (N,).
        indices: Index of each photo in the data set.
        digests: SHA-256 of the contents of each photo.
        failures: Messages about photos that could not be read.
    """

    values: Tensor
    labels: Tensor
    indices: list[int]
    digests: list[str]
    failures: list[str]


def find_classifier(model: nn.Module) -> tuple[str, nn.Module]:
    """The path and the module of a model's classifier.

    Raises:
        ModelStateError: If there is none, or several.
    """
    heads = get_classifiers(model)
    paths = [path for path, module in model.named_modules() if any(module is head for head in heads)]
    if len(heads) != 1 or len(paths) != 1:
        raise ModelStateError(
            f"{type(model).__name__} has {len(heads)} classifiers, one is needed: use a model of timm with a single one"
        )
    return paths[0], heads[0]


@torch.no_grad()
def pooled_features(model: nn.Module, x: Tensor) -> Tensor:
    """The inputs of the classifier (N, C), averaged over positions, for images (N, C, H, W) in [0, 1]."""
    _, classifier = find_classifier(model)
    seen: list[Tensor] = []
    with hooked([classifier], lambda _module, args, _output: seen.append(args[0])):
        model(x)
    if len(seen) != 1:
        raise ModelStateError(f"the classifier of {type(model).__name__} ran {len(seen)} times in a forward pass")
    features = seen[0].float()
    if features.ndim == 2:
        return features
    is_channels_first = features.ndim == 4 and features.shape[1] == getattr(
        classifier, "in_features", features.shape[1]
    )
    return features.flatten(2).mean(2) if is_channels_first else features.flatten(1, -2).mean(1)


class FeatureCache:
    """Features in one file per photo, named by the contents of the photo, in a folder per model and transform.

    Files appear whole or not at all, and damaged ones are computed again. If the folder cannot be written, features are
    not cached.

    Args:
        folder: Directory of the cache; None for no cache.
        model: Model without changes since the features were computed; its classifier does not matter.
    """

    def __init__(self, folder: Path | None, model: nn.Module) -> None:
        self.folder = None if folder is None else folder / _fingerprint(model)
        self.length = _feature_count(model)

    def get(self, digest: str) -> Tensor | None:
        """The features (C,) of a photo; None if they are not cached."""
        if self.folder is None:
            return None
        try:
            values = np.load(self.folder / f"{digest}.npy", allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        is_whole = values.dtype == np.float32 and values.shape == (self.length,) and np.isfinite(values).all()
        return torch.from_numpy(values) if is_whole else None

    def put(self, digest: str, values: Tensor) -> None:
        """Store the features (C,) of a photo."""
        if self.folder is None:
            return
        try:
            with atomic_path(self.folder / f"{digest}.npy") as path:
                np.save(path, values.numpy(), allow_pickle=False)
        except OSError as error:
            _logger.warning("features are not cached, because %s cannot be written: %s", self.folder, error)
            self.folder = None


# Attributes of modules that features do not depend on, or that the fingerprint holds in another form.
IGNORED = ("training", "deferred", "num_classes", "pretrained_cfg", "default_cfg", "pretrained_model_args")


def _fingerprint(model: Any) -> str:
    """SHA-256 of everything that features depend on besides the photo: weights, structure, transform and versions."""
    head, _ = find_classifier(model)
    digest = hashlib.sha256(repr((__version__, timm.__version__, model.bcos_config)).encode())
    digest.update(repr(sorted(timm.data.resolve_model_data_config(model).items())).encode())
    for name, module in model.named_modules():
        if not f"{name}.".startswith(f"{head}."):
            digest.update(repr((name, _structure(module))).encode())
    for name, value in (dict(model.named_buffers()) | model.state_dict()).items():
        if not name.startswith(f"{head}."):
            contents = value.detach().cpu().contiguous().flatten().view(torch.uint8)
            digest.update(repr((name, value.dtype, tuple(value.shape))).encode() + contents.numpy().tobytes())
    return digest.hexdigest()[:32]


def _structure(module: nn.Module) -> object:
    """The class and the settings of a module without its children. Reprs of modules do not show all settings."""
    settings = {k: v for k, v in vars(module).items() if not k.startswith("_") and k not in IGNORED}
    return _name(type(module)), module.extra_repr(), sorted((k, _plain(v)) for k, v in settings.items())


def _plain(value: Any) -> str:
    """A text that is the same in each process, unlike reprs with addresses: numbers and texts in full, else names."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key!r}: {_plain(item)}' for key, item in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_plain, value))}]"
    if isinstance(value, partial):
        return f"{_plain(value.func)}({_plain(value.args)}, {_plain(value.keywords)})"
    if value is None or isinstance(value, int | float | complex | str | torch.dtype | np.generic):
        return repr(value)
    return _name(value if callable(value) and hasattr(value, "__qualname__") else type(value))


def _name(item: Any) -> str:
    return f"{item.__module__}.{item.__qualname__}"


def _feature_count(model: Any) -> int:
    """Length of the features; of a model without a classifier, the number that timm declares."""
    weight = getattr(find_classifier(model)[1], "weight", None)
    return int(model.head_hidden_size if weight is None else weight.shape[1])


@dataclass
class _Item:
    """A photo on its way: with cached features, an image (C, H, W) to compute them from, or a message why not."""

    index: int
    label: int = -1
    digest: str = ""
    features: Tensor | None = None
    image: Tensor | None = None
    failure: str = ""


def compute_features(
    model: nn.Module,
    dataset: LabeledImages,
    cache: FeatureCache,
    *,
    batch_size: int = 16,
    bar: str | None = None,
) -> Features:
    """Compute the features of all photos. An interrupted run continues where it stopped if there is a cache.

    Several processes share the batches (`timm_bcos.distributed`).

    Args:
        model: A B-cos model in eval mode.
        dataset: Photos with their classes. Photos without a class, or that cannot be read, are left out.
        cache: Cache of this model.
        batch_size: Number of photos per batch.
        bar: Title of the progress bar; None for no bar.

    Raises:
        InputError: If no photo can be read.
        ModelStateError: If features are not finite.
    """
    read, device = _reader(model, dataset, cache), next(model.parameters()).device
    parts = [range(i, min(i + batch_size, len(dataset))) for i in range(0, len(dataset), batch_size)]

    def compute(own: Sequence[range]) -> Iterator[list[_Item]]:
        batches = prefetch([read(i) for i in part] for part in own)
        for items in tqdm(batches, bar, len(own), unit="batch", disable=True if bar is None else None):
            _fill_in(model, items, cache, device)
            yield items

    done = [item for items in distributed_map(compute, parts) for item in items]
    good = [item for item in done if item.features is not None]
    failures = [item.failure for item in done if item.failure]
    if not good:
        raise InputError(f"no photo can be read{f': {failures[0]}' if failures else ''}")
    return Features(
        torch.stack([item.features for item in good if item.features is not None]),
        torch.tensor([item.label for item in good]),
        [item.index for item in good],
        [item.digest for item in good],
        failures,
    )


def _fill_in(model: nn.Module, items: Sequence[_Item], cache: FeatureCache, device: torch.device) -> None:
    """Compute the features that are not cached."""
    missing = [item for item in items if item.image is not None]
    if not missing:
        return
    images = torch.stack([item.image for item in missing if item.image is not None])
    features = pooled_features(model, images.to(device, next(model.parameters()).dtype)).cpu()
    if not bool(features.isfinite().all()):
        raise ModelStateError(f"the features of {type(model).__name__} are not finite: its weights are damaged")
    for item, values in zip(missing, features, strict=True):
        item.features, item.image = values.clone(), None
        cache.put(item.digest, item.features)


def _reader(model: nn.Module, dataset: LabeledImages, cache: FeatureCache) -> Callable[[int], _Item]:
    mode, transform = photo_transform(model)

    def read(index: int) -> _Item:
        try:
            label, digest, images = _open(dataset, index, mode)
            features = cache.get(digest)
            image = transform(next(images)) if features is None else None
            return _Item(index, label, digest, features, image)
        except (InputError, OSError) as error:
            return _Item(index, failure=str(error) or type(error).__name__)

    return read


def _open(dataset: LabeledImages, index: int, mode: str) -> tuple[int, str, Iterator[Image.Image]]:
    """The class and the digest of a photo, and an iterator that reads the photo."""
    if isinstance(dataset, ClassFolders):
        return dataset.labels[index], dataset.digest(index), (dataset[i][0].convert(mode) for i in [index])
    item: Any = dataset[index]
    if not isinstance(item, tuple | list) or len(item) != 2:
        raise InputError(f"item {index} of the data set is of type {type(item).__name__}, not a photo and its class")
    image, label = item
    if not isinstance(image, Image.Image):
        raise InputError(f"the data set returns {type(image).__name__}, not Pillow images: remove its transform")
    photo = to_photo(image, mode)
    pixels = repr((photo.mode, photo.size)).encode() + photo.tobytes()
    return _class_of(label, index), hashlib.sha256(pixels).hexdigest(), iter([photo])


def _class_of(label: Any, index: int) -> int:
    try:
        found = operator.index(label)
    except (TypeError, ValueError) as error:  # names, fractions, vectors
        raise InputError(f"photo {index} of the data set has the class {label!r}: give classes as integers") from error
    if found < 0:
        raise InputError(f"photo {index} of the data set has no class: put the photos into a folder per class")
    if found > MOST_CLASSES:
        raise InputError(f"photo {index} of the data set has the class {found}: number the classes 0, 1, 2, ...")
    return found
