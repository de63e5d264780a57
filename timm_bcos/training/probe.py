"""A classifier for one's own classes on the features of a B-cos model, which stays exactly explainable."""

import copy
from collections.abc import Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor, nn

from ..conversion.converted import BcosModel, replace_classifier
from ..data.class_folders import ClassFolders
from ..data.datasets import LabeledImages
from ..data.photos import photo_transform, to_photo
from ..distributed import on_main
from ..errors import InputError, ModelStateError
from ..models.loading import TimmBcosModel, load_model
from ..nn.module_utils import first_output
from ..weights.terms import derived_cfg, weights_name
from .features import FeatureCache, Features, compute_features, find_classifier, pooled_features
from .logistic import LogisticFit, cross_validate
from .probe_data import checked_names, matched, names_of, numbered, read_data, refuse_few, remarks
from .probe_result import ProbeResult

__all__ = ["fit_probe"]

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
        model: A B-cos model of timm, which may be compiled, or its name. It is not changed.
        dataset: Labeled photos, for instance from `timm.data.create_dataset`; or a directory with a folder per class,
            or with folders `train` and `validation` that have one.
        validation: Labeled photos of the same classes to measure the accuracy on, or a directory of them. Classes are
            matched by name if both data sets have names, else by index. None for the folder `validation` of a
            directory, or, without it, for cross-validation.
        class_names: Names of the classes, all different. Default: those of the data set.
        cache: Directory in which features are cached, by the contents of photo, model and transform. None for none.
        batch_size: Number of photos per batch.
        seed: Random seed of the folds of cross-validation.
        progress: Show progress bars.

    Returns:
        A new model, and its predictions for photos that it was not fitted on.

    Raises:
        InputError: If there are fewer than two classes, or fewer than three photos of a class; if names are missing or
            occur twice; if validation photos have another class; or if a directory cannot be read.
        ModelStateError: If the model is no B-cos model of timm with one classifier, or its features are useless.

    Examples:
        >>> model, result = timm_bcos.fit_probe("bcos_efficientnet_lite0", "photos")
        >>> result.accuracy, result.interval
        >>> timm_bcos.explain(model, images).save("why.png")
    """
    _check_arguments(batch_size, seed, cache)
    given = checked_names(class_names)
    train_set, test_set = read_data(dataset, validation)
    known = names_of(train_set) or given  # by which validation classes are found
    if isinstance(train_set, ClassFolders):  # before a model is loaded
        refuse_few(torch.tensor(train_set.labels), given or known)
    backbone = _backbone(model)
    store = FeatureCache(None if cache is None else Path(cache), backbone)
    compute = partial(compute_features, backbone, cache=store, batch_size=batch_size)
    train = compute(train_set, bar="training photos" if progress else None)
    refuse_few(train.labels, given or known)
    names = given or known or numbered(train.labels)
    test = None if test_set is None else compute(test_set, bar="validation photos" if progress else None)
    if test is not None:
        test = matched(test, names_of(test_set), known or names)
    found = remarks((train_set, train), (test_set, test))
    fit = on_main(partial(cross_validate, train.values, train.labels, len(names), seed=seed))
    _refuse_degenerate(backbone, train, fit)
    probe = _with_classifier(backbone, fit.weight, names)
    _check_logits(probe, backbone, fit.weight, train_set[train.indices[0]][0])
    return probe, _result(names, train, test, fit, found)


def _check_arguments(batch_size: Any, seed: Any, cache: Any) -> None:
    if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
        raise InputError(f"batch_size={batch_size!r}: give a whole number of at least 1")
    if not isinstance(seed, int) or not -(2**63) <= seed < 2**63:
        raise InputError(f"seed={seed!r}: give a whole number of at most 63 bits")
    if not isinstance(cache, str | PathLike | None):
        raise InputError(f"cache={cache!r}: give the path of a directory, or None")


def _refuse_degenerate(model: nn.Module, train: Features, fit: LogisticFit) -> None:
    """Refuse features from which nothing can be learned, and classifiers with numbers beyond those of the model."""
    kind = next(model.parameters()).dtype
    is_finite = bool(fit.weight.to(kind).isfinite().all() and fit.held_out.isfinite().all())
    largest = float(train.values.abs().max())
    if largest == 0 or not is_finite:
        raise ModelStateError(
            f"no classifier can be fitted to the features of {type(model).__name__}: their largest absolute value is "
            f"{largest:g}. Load pretrained weights, or train or calibrate the model first"
        )


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


def _backbone(model: nn.Module | str) -> TimmBcosModel:
    """A copy of the model in eval mode, without `torch.compile`."""
    own: Any = load_model(model) if isinstance(model, str) else copy.deepcopy(getattr(model, "_orig_mod", model))
    if not isinstance(own, BcosModel):
        raise ModelStateError(f"{type(own).__name__} is not a B-cos model: convert it with timm_bcos.bcosify")
    if not hasattr(own, "reset_classifier"):
        raise ModelStateError(f"{type(own).__name__} has no reset_classifier: a model of timm is needed")
    return cast(TimmBcosModel, own).eval()


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
    own = next(backbone.parameters())
    return model.to(own.device, own.dtype).eval()


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
    if next(backbone.parameters()).dtype in (torch.float16, torch.bfloat16):  # too coarse for the comparison
        probe, backbone = copy.deepcopy(probe).float(), copy.deepcopy(backbone).float()
        classifier: Any = find_classifier(probe)[1]
        weight = classifier.weight.flatten(1).cpu().double()
    own = next(backbone.parameters())
    x = transform(to_photo(photo, mode))[None].to(own.device, own.dtype)
    features = pooled_features(backbone, x).cpu().double()
    expected, scale = features @ weight.T, features.abs() @ weight.abs().T
    found = first_output(probe(x)).cpu().double()
    if found.shape != expected.shape or float((found - expected).abs().max()) > TOLERANCE * float(scale.max()):
        raise ModelStateError(
            f"the logits of {type(backbone).__name__} are not linear in the pooled inputs of its classifier, so that "
            f"no probe can be fitted: fine-tune it instead"
        )
