"""A classifier for one's own classes on the features of a B-cos model, which stays exactly explainable."""

import copy
import warnings
from collections.abc import Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor, nn

from ..conversion.converted import BcosModel, replace_classifier
from ..data.class_folders import ClassFolders, read_splits
from ..data.datasets import LabeledImages
from ..data.photos import photo_transform
from ..distributed import on_main
from ..errors import InputError, ModelStateError
from ..models.loading import TimmBcosModel, load_model
from ..nn.module_utils import first_output
from ..weights.terms import derived_cfg, weights_name
from .features import FeatureCache, Features, compute_features, find_classifier, pooled_features
from .logistic import LogisticFit, cross_validate
from .probe_result import ProbeResult

__all__ = ["fit_probe"]

FEWEST = 3  # photos of a class: two to fit and one to hold out
TOLERANCE = 1e-3  # of logits, relative to the sum of their absolute terms


def fit_probe(
    model: nn.Module | str,
    dataset: LabeledImages | str | PathLike[str],
    validation: LabeledImages | str | PathLike[str] | None = None,
    *,
    class_names: Sequence[str] | None = None,
    cache: str | PathLike[str] | None = None,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = True,
) -> tuple[TimmBcosModel, ProbeResult]:
    """Fit a linear classifier for new classes on the features of a B-cos model.

    Features are the inputs of the model's classifier, averaged over positions. The new classifier is a logistic
    regression without bias: logits = W · features, so the whole model stays dynamic linear and explanations are exact.
    The weight decay is chosen by stratified cross-validation.

    Args:
        model: A B-cos model of timm or its name. It is not changed.
        dataset: Labeled photos, for instance from `timm.data.create_dataset`; or a directory with a folder per class,
            or with folders `train` and `validation` that have one.
        validation: Labeled photos of the same classes to measure the accuracy on, or a directory of them. None for the
            folder `validation` of a directory, or, without it, for cross-validation.
        class_names: Names of the classes. Default: those of the data set.
        cache: Directory in which features are cached, by the contents of photo, model and transform. None for none.
        batch_size: Number of photos per batch.
        seed: Random seed of the folds of cross-validation.
        progress: Show progress bars.

    Returns:
        A new model, and its predictions for photos that it was not fitted on.

    Raises:
        InputError: If there are fewer than two classes, or fewer than three photos of a class; if names are missing; or
            if a directory cannot be read.
        ModelStateError: If the model is no B-cos model of timm with one classifier.

    Examples:
        >>> model, result = timm_bcos.fit_probe("bcos_efficientnet_lite0", "photos")
        >>> result.accuracy, result.interval
        >>> timm_bcos.explain(model, images).save("why.png")
    """
    train_set, test_set = _data_sets(dataset, validation)
    names = list(class_names or _names_of(train_set))
    if isinstance(train_set, ClassFolders):  # before a model is loaded
        _refuse_few(torch.tensor(train_set.labels), names)
    backbone = _backbone(model)
    store = FeatureCache(None if cache is None else Path(cache), backbone)
    compute = partial(compute_features, backbone, cache=store, batch_size=batch_size)
    train = compute(train_set, bar="training photos" if progress else None)
    names = names or [f"class {i}" for i in range(int(train.labels.max()) + 1)]
    _refuse_few(train.labels, names)
    test = None if test_set is None else compute(test_set, bar="validation photos" if progress else None)
    _refuse_unknown(test, names)
    remarks = _remarks((train_set, train), (test_set, test))
    fit = on_main(partial(cross_validate, train.values, train.labels, len(names), seed=seed))
    probe = _with_classifier(backbone, fit.weight, names)
    _check_logits(probe, backbone, fit.weight, train_set[train.indices[0]][0])
    return probe, _result(names, train, test, fit, remarks)


def _result(
    names: Sequence[str], train: Features, test: Features | None, fit: LogisticFit, remarks: tuple[str, ...]
) -> ProbeResult:
    held_out = train if test is None else test
    return ProbeResult(
        class_names=tuple(names),
        labels=held_out.labels,
        logits=fit.held_out if test is None else test.values.double() @ fit.weight.T,
        indices=tuple(held_out.indices),
        held_out="cross-validation" if test is None else "validation",
        training_counts=tuple(torch.bincount(train.labels, minlength=len(names)).tolist()),
        decay=fit.decay,
        warnings=remarks,
    )


def _data_sets(
    dataset: LabeledImages | str | PathLike[str], validation: LabeledImages | str | PathLike[str] | None
) -> tuple[LabeledImages, LabeledImages | None]:
    """The data sets for training and validation; directories are read."""
    train, test = read_splits(Path(dataset)) if isinstance(dataset, str | PathLike) else (dataset, None)
    if isinstance(validation, str | PathLike):
        return train, ClassFolders(Path(validation), _names_of(train) or None)
    return train, test if validation is None else validation


def _names_of(dataset: Any) -> Sequence[str]:
    """Names of the classes, by index; empty if the data set has none."""
    if isinstance(dataset, ClassFolders):
        return dataset.class_names
    reader = getattr(dataset, "reader", None)  # of timm's data sets
    indices = getattr(reader, "class_to_idx", None) or getattr(dataset, "class_to_idx", None) or {}
    names = sorted(indices, key=indices.__getitem__)
    return [str(name) for name in names]


def _refuse_few(labels: Tensor, names: Sequence[str]) -> None:
    """Refuse data that no classifier can be fitted to and held out from."""
    if int(labels.max()) >= len(names):
        raise InputError(f"the photos have class {int(labels.max())}, but only {len(names)} names are given")
    counts = dict(zip(names, torch.bincount(labels, minlength=len(names)).tolist(), strict=True))
    if len(counts) < 2:
        raise InputError(f"only one class, {names[0]!r}: a classifier needs photos of at least two")
    few = [f"{name!r} has {count}" for name, count in counts.items() if count < FEWEST]
    if few:
        raise InputError(f"too few photos: {', '.join(few)}; give at least {FEWEST} of each class, better 5 or more")


def _refuse_unknown(test: Features | None, names: Sequence[str]) -> None:
    if test is not None and int(test.labels.max()) >= len(names):
        raise InputError(f"the validation photos have class {int(test.labels.max())}, the classes are {list(names)}")


def _backbone(model: nn.Module | str) -> TimmBcosModel:
    """A copy of the model in eval mode."""
    own = load_model(model) if isinstance(model, str) else copy.deepcopy(model)
    if not isinstance(own, BcosModel):
        raise ModelStateError(f"{type(own).__name__} is not a B-cos model: convert it with timm_bcos.bcosify")
    if not hasattr(own, "reset_classifier"):
        raise ModelStateError(f"{type(own).__name__} has no reset_classifier: a model of timm is needed")
    return cast(TimmBcosModel, own.eval())


def _with_classifier(backbone: TimmBcosModel, weight: Tensor, names: Sequence[str]) -> TimmBcosModel:
    """A copy of the model with a linear classifier without temperature and logit bias."""
    model: Any = copy.deepcopy(backbone)
    path, _ = find_classifier(model)
    linear = tuple(dict.fromkeys((*model.bcos_config.linear, path)))
    config = model.bcos_config.change(linear=linear, temperature=1.0, logit_bias=0.0, probability="softmax")
    replace_classifier(model, len(names), config)
    classifier: Any = find_classifier(model)[1]
    with torch.no_grad():
        classifier.weight.copy_(weight.reshape(classifier.weight.shape))
        if classifier.bias is not None:
            classifier.bias.zero_()
    model.pretrained_cfg = _cfg(backbone, names)
    model.default_cfg = model.pretrained_cfg
    return model.to(next(backbone.parameters()).device).eval()


def _cfg(backbone: Any, names: Sequence[str]) -> dict[str, Any]:
    """The pretrained cfg of the probe, with the terms of the weights that its features come from."""
    cfg = getattr(backbone, "pretrained_cfg", None) or {}
    arch = (getattr(backbone, "_model_args", None) or {}).get("arch")  # of a model that `bcosify` created by name
    tagged = ".".join(filter(None, (cfg.get("architecture"), cfg.get("tag"))))
    own = weights_name(arch) if arch else tagged or type(backbone).__name__
    description = f"linear probe of {len(names)} classes on features of {own}"
    return derived_cfg(cfg, own) | dict(num_classes=len(names), label_names=tuple(names), description=description)


@torch.no_grad()
def _check_logits(probe: TimmBcosModel, backbone: nn.Module, weight: Tensor, photo: Image.Image) -> None:
    """Refuse architectures whose logits are not linear in the features, for instance for another kind of pooling."""
    mode, transform = photo_transform(backbone)
    x = transform(photo.convert(mode))[None].to(next(backbone.parameters()).device)
    features = pooled_features(backbone, x).cpu().double()
    expected, scale = features @ weight.T, features.abs() @ weight.abs().T
    found = first_output(probe(x)).cpu().double()
    if found.shape != expected.shape or float((found - expected).abs().max()) > TOLERANCE * float(scale.max()):
        raise ModelStateError(
            f"the logits of {type(backbone).__name__} are not linear in the pooled inputs of its classifier, so that "
            f"no probe can be fitted: fine-tune it instead"
        )


def _remarks(*parts: tuple[Any, Features | None]) -> tuple[str, ...]:
    """Warnings about photos that cannot be read or occur twice, which makes the measured accuracy too high."""
    seen: dict[str, str] = {}
    twice, failures = [], []
    for dataset, features in parts:
        failures += features.failures if features else []
        for index, digest in zip(features.indices, features.digests, strict=True) if features else ():
            name = _filename(dataset, index)
            if digest in seen:
                twice.append(f"{seen[digest]} and {name}")
            seen.setdefault(digest, name)
    remarks = []
    if failures:
        remarks.append(f"{len(failures)} photos cannot be read and are left out: {_first(failures)}")
    if twice:
        remarks.append(f"{len(twice)} photos occur twice, which makes the accuracy look too high: {_first(twice)}")
    for remark in remarks:
        warnings.warn(remark, stacklevel=3)
    return tuple(remarks)


def _first(items: Sequence[str], shown: int = 3) -> str:
    return "; ".join([*items[:shown], *(["…"] if len(items) > shown else [])])


def _filename(dataset: Any, index: int) -> str:
    if isinstance(dataset, ClassFolders):
        return f"{dataset.root.name}/{dataset.filename(index)}"
    return str(dataset.filename(index, basename=False)) if hasattr(dataset, "filename") else f"photo {index}"
