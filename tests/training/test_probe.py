"""Probes: a classifier for one's own classes, exactly explainable, from Python and from the command line."""

import io
import os
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import ExifTags, Image
from torch import Tensor, nn

import timm_bcos
from tests.helpers import command
from timm_bcos import InputError, ModelStateError, bcosify, fit_probe
from timm_bcos.conversion.config import BcosConfig
from timm_bcos.data.class_folders import ClassFolders, read_splits
from timm_bcos.hub.repository import save_model
from timm_bcos.models.loading import load_model
from timm_bcos.training import features as feature_module
from timm_bcos.training.features import FeatureCache, Features, compute_features, pooled_features
from timm_bcos.training.logistic import cross_validate, fit_logistic, stratified_folds
from timm_bcos.training.probe_data import matched, names_of
from timm_bcos.training.probe_result import ProbeResult, wilson_interval

COLORS = {"blue": (40, 60, 220), "green": (50, 200, 60), "red": (220, 40, 50)}
SMALL = "bcos_cifar_resnet20"  # embedded, 32 × 32 pixels


def write_photos(root: Path, count: int = 5, names: tuple[str, ...] = tuple(COLORS), seed: int = 0) -> Path:
    """Noisy photos of one color per class."""
    generator = torch.Generator().manual_seed(seed)
    for name in names:
        (root / name).mkdir(parents=True)
        for i in range(count):
            noise = torch.randint(-30, 31, (48, 40, 3), generator=generator)
            pixels = (torch.tensor(COLORS[name]) + noise).clamp(0, 255).to(torch.uint8)
            Image.fromarray(pixels.numpy()).save(root / name / f"{i}.png")
    return root


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return write_photos(tmp_path / "photos")


# The classifier.


@pytest.mark.parametrize("count", [40, 12])
def test_the_fit_is_that_of_scikit_learn(count: int) -> None:
    """C of scikit-learn is 1 / (N · decay). With 12 examples of 20 features, the fit takes place in their span."""
    linear_model = pytest.importorskip("sklearn.linear_model", reason="needs scikit-learn")
    torch.manual_seed(0)
    x, y = torch.randn(count, 20, dtype=torch.float64) + 0.5, torch.arange(count) % 3
    scale = x.square().sum(1).mean().sqrt()
    fit = cross_validate(x, y, 3, decays=[0.01])
    expected = linear_model.LogisticRegression(C=1 / (count * 0.01), fit_intercept=False, tol=1e-10, max_iter=5000)
    expected.fit((x / scale).numpy(), y.numpy())
    torch.testing.assert_close(fit.weight * scale, torch.from_numpy(expected.coef_), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fit.weight.sum(0), torch.zeros(20, dtype=torch.float64), rtol=0, atol=1e-6)


def test_held_out_logits_are_of_fits_without_the_fold() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(15, 4, dtype=torch.float64), torch.arange(15) % 3
    fit = cross_validate(x, y, 3, decays=[0.1], seed=3)
    folds, scale = stratified_folds(y, 5, seed=3), x.square().sum(1).mean().sqrt()
    for fold in range(fit.folds):
        inside = folds == fold
        weight = fit_logistic(x[~inside] / scale, y[~inside], 0.1, 3)
        torch.testing.assert_close(fit.held_out[inside], x[inside] @ weight.T / scale, rtol=1e-4, atol=1e-6)


def test_folds_are_stratified() -> None:
    y = torch.tensor([0] * 7 + [1] * 3 + [2] * 11)
    folds = stratified_folds(y, 3)
    counts = torch.stack([torch.bincount(folds[y == c], minlength=3) for c in range(3)])
    assert counts.sum(1).tolist() == [7, 3, 11] and int((counts.amax(1) - counts.amin(1)).max()) <= 1
    assert not torch.equal(folds, stratified_folds(y, 3, seed=1))


def test_noise_gets_more_decay_than_a_signal() -> None:
    torch.manual_seed(0)
    y = torch.arange(60) % 2
    noise = torch.randn(60, 10)
    signal = noise + 20 * torch.nn.functional.one_hot(y, 10)
    assert cross_validate(noise, y, 2).decay > 10 * cross_validate(signal, y, 2).decay


@pytest.mark.parametrize(("right", "count"), [(0, 5), (5, 5), (1, 3), (334, 372)])
def test_intervals_are_wilsons(right: int, count: int) -> None:
    stats = pytest.importorskip("scipy.stats", reason="needs SciPy")
    expected = stats.binomtest(right, count).proportion_ci(method="wilson")
    assert wilson_interval(right, count) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_results_by_hand() -> None:
    logits = torch.tensor([[2.0, 0, 0], [3, 0, 0], [0, 1, 0], [0, 1, 0], [0, 0, 1], [5, 0, 0]])
    labels = torch.tensor([0, 0, 0, 0, 2, 1])
    result = ProbeResult(("a", "b", "c"), labels, logits, tuple(range(6)), "validation", (3, 3, 3), 0.1)
    assert result.accuracy == pytest.approx(0.5)
    assert result.confusion.tolist() == [[2, 2, 0], [1, 0, 0], [0, 0, 1]]
    assert result.worst_confusion == (0, 1, 2)
    assert result.most_confident(0, 5) == [1, 0] and result.most_confident(1, 5) == []
    assert "2 of 4 photos of 'a' classified as 'b'" in str(result)
    perfect = ProbeResult(("a", "b"), torch.tensor([0, 1]), torch.eye(2), (0, 1), "validation", (3, 3), 0.1)
    assert perfect.worst_confusion is None and perfect.interval[0] < 0.5 < perfect.interval[1]


# Models.

MODELS = {
    "positions": lambda: load_model("bcos_cifar_resnet20"),
    "max-out": lambda: timm.create_model("bcos_cnn9", b=1.5),
    "normalized": lambda: bcosify(timm.create_model("test_convnext"), BcosConfig.v2()),
    "tokens": lambda: bcosify(timm.create_model("test_vit"), BcosConfig(b=1.5)),
    "biases": lambda: bcosify(timm.create_model("test_resnet"), BcosConfig.finetune(b=1, bias=True)),
    "no head": lambda: timm.create_model("bcosify", arch="test_resnet", b=1.25, num_classes=0),
}


@pytest.mark.parametrize("kind", MODELS)
def test_probes_are_exact_and_load_again(kind: str, photos: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    backbone: Any = MODELS[kind]().eval()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    model, result = fit_probe(backbone, photos, progress=False)
    assert result.class_names == ("blue", "green", "red") and len(result.labels) == 15
    assert result.held_out == "cross-validation" and result.accuracy > 0.9, kind
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())

    x = torch.rand(2, 3, *backbone.pretrained_cfg["input_size"][1:])
    explanation = timm_bcos.explain(model, x)
    assert explanation.completeness_error.max() <= 2e-6
    assert timm_bcos.explain(model.double(), x.double()).completeness_error.max() <= 1e-12
    model.float()
    head = model.get_classifier()  # type: ignore[operator]
    expected = pooled_features(backbone, x) @ head.weight.flatten(1).T
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max().detach()))
    assert explanation.probability_kind == "softmax"
    if not backbone.bcos_config.adds_bias:
        torch.testing.assert_close(model(x).sum(1), torch.zeros(2), atol=1e-3, rtol=0)  # the winner is never negative

    save_model(model, tmp_path / "mine")
    again = timm.create_model(f"local-dir:{tmp_path / 'mine'}", pretrained=True).eval()
    torch.testing.assert_close(again(x), model(x))
    assert list(again.pretrained_cfg["label_names"]) == ["blue", "green", "red"]


def test_a_probe_knows_the_terms_of_its_base_model(photos: Path) -> None:
    model, _ = fit_probe(SMALL, photos, progress=False)
    cfg = model.pretrained_cfg
    assert cfg["license"] == "bsd-2-clause" and "Yerlan Idelbayev" in cfg["notes"][1]
    assert cfg["notes"][0] == "base model: bcos_cifar_resnet20.cifar10"
    assert not cfg["tag"] and "CIFAR" not in cfg["description"] and not cfg["file"]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (timm.create_model("test_resnet"), "is not a B-cos model: convert it"),
        (bcosify(nn.Sequential(nn.Conv2d(3, 4, 3)), BcosConfig(mean=(0.0,), std=(1.0,))), "no reset_classifier"),
    ],
    ids=["plain", "own"],
)
def test_refused_models(model: nn.Module, message: str, photos: Path) -> None:
    with pytest.raises(ModelStateError, match=message):
        fit_probe(model, photos, progress=False)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_probes_have_the_type_of_the_model(kind: torch.dtype) -> None:
    backbone: Any = load_model(SMALL)
    expected, _ = fit_probe(backbone, photos_in_memory(), progress=False)
    model, result = fit_probe(backbone.to(kind), photos_in_memory(), progress=False)
    assert {p.dtype for p in model.parameters()} == {kind} and result.accuracy > 0.9
    own, other = (m.get_classifier().weight.double() for m in (model, expected))  # type: ignore[operator]
    torch.testing.assert_close(own, other, rtol=0, atol=0.05 * float(other.abs().max().detach()))


def test_compiled_models_are_unwrapped() -> None:
    backbone: Any = load_model(SMALL)
    expected, _ = fit_probe(backbone, photos_in_memory(), progress=False)
    model, _ = fit_probe(torch.compile(backbone), photos_in_memory(), progress=False)  # type: ignore[arg-type]
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("factor", [0.0, 1e-42])
def test_features_that_teach_nothing_are_refused(factor: float) -> None:
    backbone: Any = load_model(SMALL)
    backbone.layer3.register_forward_hook(lambda _module, _args, output: output * factor)
    with pytest.raises(ModelStateError, match="no classifier can be fitted to the features"):
        fit_probe(backbone, photos_in_memory(), progress=False)


def test_probes_of_models_with_another_head_can_be_saved(tmp_path: Path) -> None:
    backbone = timm.create_model(SMALL, temperature=2.0, logit_bias=-3.0, probability="softmax")
    model, _ = fit_probe(backbone, photos_in_memory(), progress=False)
    save_model(model, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.rand(1, 3, 32, 32)
    torch.testing.assert_close(again(x), model(x))
    assert again.bcos_config == model.bcos_config


# Data.


def test_a_validation_folder_measures_the_accuracy(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos" / "train")
    write_photos(tmp_path / "photos" / "val", 2, ("blue", "red"), seed=1)
    train, validation = tmp_path / "photos" / "train", tmp_path / "photos" / "val"
    for data in ([tmp_path / "photos"], [train, validation], [str(train), ClassFolders(validation, sorted(COLORS))]):
        _, result = fit_probe(SMALL, *data, progress=False)
        assert result.held_out == "validation" and result.labels.tolist() == [0, 0, 2, 2]
        assert result.training_counts == (5, 5, 5) and result.confusion.sum() == 4


def test_photos_of_both_splits_are_told(tmp_path: Path) -> None:
    train = write_photos(tmp_path / "photos" / "train")
    shutil.copytree(train / "red", tmp_path / "photos" / "validation" / "red")
    with pytest.warns(UserWarning, match=r"5 photos occur twice.*train/red/0.png and validation/red/0.png"):
        fit_probe(SMALL, tmp_path / "photos", progress=False)


def test_timms_data_sets_give_the_same_probe(photos: Path) -> None:
    ours, _ = fit_probe(SMALL, photos, progress=False)
    theirs, result = fit_probe(SMALL, timm.data.create_dataset("", str(photos)), progress=False)
    assert result.class_names == ("blue", "green", "red")
    weights = [model.get_classifier().weight for model in (ours, theirs)]  # type: ignore[operator]
    torch.testing.assert_close(*weights)


def test_data_sets_of_tensors_are_refused(photos: Path) -> None:
    data = timm.data.create_dataset("", str(photos))
    data.transform = timm.data.create_transform(32)
    with pytest.raises(InputError, match="returns Tensor, not Pillow images: remove its transform"):
        fit_probe(SMALL, data, progress=False)


def test_trains_may_be_a_class(photos: Path) -> None:
    shutil.move(photos / "red", photos / "train")
    train, validation = read_splits(photos)
    assert train.class_names == ["blue", "green", "train"] and validation is None


def test_classes_of_validation_photos_are_matched_by_name(tmp_path: Path) -> None:
    """timm sorts names naturally, torchvision does not, and a data set that lacks a class numbers the others anew."""
    datasets = pytest.importorskip("torchvision.datasets", reason="needs torchvision")
    names = ("class2", "class10", "zebra")
    for root, present in (("train", names), ("all", names), ("some", names[1:])):
        for name in present:
            color = tuple(COLORS)[names.index(name)]
            write_photos(tmp_path / color, 3, (color,), seed=names.index(name))
            shutil.move(tmp_path / color / color, tmp_path / root / name)
    assert datasets.ImageFolder(tmp_path / "all").classes == ["class10", "class2", "zebra"]
    every, some = datasets.ImageFolder(tmp_path / "all"), timm.data.create_dataset("", str(tmp_path / "some"))
    for validation, numbers, labels in (
        (every, [0, 1, 2], [1, 0, 2]),
        (torch.utils.data.Subset(every, [0, 8]), [0, 2], [1, 2]),
        (some, [0, 1], [1, 2]),
        (ClassFolders(tmp_path / "some"), [0, 1], [1, 2]),
        ([], [0, 1, 2], [0, 1, 2]),  # without names
    ):
        features = Features(torch.zeros(len(numbers), 1), torch.tensor(numbers), [], [], [])
        assert matched(features, names_of(validation), names).labels.tolist() == labels
    with pytest.raises(InputError, match="the validation photos have class 'class10', the classes are"):
        matched(features, names_of(every), ("class2", "zebra"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the same photos
        _, result = fit_probe(SMALL, tmp_path / "train", some, class_names=["A", "B", "C"], progress=False)
    assert result.labels.tolist() == [1, 1, 1, 2, 2, 2] and result.accuracy == 1


def photos_in_memory(count: int = 6) -> list[tuple[Image.Image, int]]:
    generator = torch.Generator().manual_seed(0)
    shades = ((torch.arange(40) * 6)[:, None].expand(40, 40), (torch.arange(40) * 6).expand(40, 40))
    pixels = [shades[i % 2] + torch.randint(0, 15, (40, 40), generator=generator) for i in range(count)]
    return [(Image.fromarray(x.to(torch.uint8).numpy()).convert("RGB"), i % 2) for i, x in enumerate(pixels)]


def rotated(image: Image.Image) -> Image.Image:
    """The same photo as a camera stores it that was held upright."""
    exif, file = Image.Exif(), io.BytesIO()
    exif[ExifTags.Base.Orientation] = 6
    image.transpose(Image.Transpose.ROTATE_90).save(file, "png", exif=exif)
    return Image.open(file)


def sixteen_bits(image: Image.Image) -> Image.Image:
    return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)


@pytest.mark.parametrize("store", [rotated, sixteen_bits], ids=lambda store: store.__name__)
def test_pillow_images_are_read_as_explanations_read_them(store: Any) -> None:
    plain = photos_in_memory()
    stored = [(store(image), label) for image, label in plain]
    with pytest.warns(UserWarning, match="photos occur twice"):
        model, result = fit_probe(SMALL, stored, stored, progress=False)
    explained = timm_bcos.Explainer(model)([image for image, _ in stored])
    torch.testing.assert_close(explained.logits.double(), result.logits, rtol=1e-4, atol=1e-4)
    expected = timm_bcos.Explainer(model)([image for image, _ in plain]).logits
    torch.testing.assert_close(explained.logits, expected, rtol=1e-4, atol=1e-4)


LABELS: dict[str, Any] = {
    "has the class 'cat': give classes as integers": lambda i: ("cat", "dog")[i],
    r"has the class 0.5: give classes as integers": lambda i: i + 0.5,
    "has no class: put the photos into a folder per class": lambda i: -1,
    "6 photos have classes up to 1000000000: number the classes": lambda i: i * 10**9,
    f"has the class {2**70}: number the classes": lambda i: 2**70,
    "only one class": lambda i: 0,
}


@pytest.mark.parametrize("message", LABELS)
def test_refused_labels(message: str) -> None:
    with pytest.raises(InputError, match=message):
        fit_probe(SMALL, [(image, LABELS[message](label)) for image, label in photos_in_memory()], progress=False)


def test_labels_may_be_arrays() -> None:
    for kind in (torch.tensor, np.int64):
        _, result = fit_probe(SMALL, [(image, kind(i)) for image, i in photos_in_memory()], progress=False)  # type: ignore[operator, misc]
        assert result.class_names == ("class 0", "class 1") and result.training_counts == (3, 3)


ARGUMENTS: list[tuple[dict[str, Any], str]] = [
    (dict(dataset=5), "dataset=5: give a directory"),
    (dict(dataset=None), "dataset=None: give a directory"),
    (dict(dataset=[1, 2]), "item 0 of the data set is of type int, not a photo and its class"),
    (dict(dataset=[]), "no photo can be read"),
    (dict(validation=5), "validation=5: give a directory"),
    (dict(validation=[(photos_in_memory()[0][0], 2)]), "the validation photos have class 2, the classes are"),
    (dict(batch_size=0), "batch_size=0: give a whole number of at least 1"),
    (dict(batch_size=2.0), "batch_size=2.0: give a whole number"),
    (dict(seed="a"), "seed='a': give a whole number"),
    (dict(seed=2**70), f"seed={2**70}: give a whole number"),
    (dict(class_names=["a", "a"]), "class_names has 'a' twice"),
    (dict(class_names="ab"), "class_names='ab': give a list of names"),
    (dict(class_names=7), "class_names=7: give a list of names"),
    (dict(class_names=["a"]), "the photos have class 1, but only 1 names are given"),
    (dict(cache=5), "cache=5: give the path of a directory"),
]


@pytest.mark.parametrize(("arguments", "message"), ARGUMENTS, ids=[message for _, message in ARGUMENTS])
def test_refused_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        fit_probe(SMALL, **(dict(dataset=photos_in_memory(), progress=False) | arguments))


def empty(photos: Path) -> None:
    (photos / "black").mkdir()


def one_class(photos: Path) -> None:
    shutil.rmtree(photos / "blue")
    shutil.rmtree(photos / "green")


def two_photos(photos: Path) -> None:
    for i in range(2, 5):
        (photos / "red" / f"{i}.png").unlink()


def loose(photos: Path) -> None:
    for folder in list(photos.iterdir()):
        shutil.move(folder / "0.png", photos / f"{folder.name}.png")
        shutil.rmtree(folder)


def broken(photos: Path) -> None:
    for i in range(3):
        (photos / "red" / f"{i}.png").write_bytes(b"no photo")


def split_or_class(photos: Path) -> None:
    for name in ("steam", "diesel"):
        shutil.copytree(photos / "red", photos / "train" / name)


def no_training(photos: Path) -> None:
    for name in COLORS:
        shutil.move(photos / name, photos / "val" / name)


def unknown_class(photos: Path) -> None:
    (photos / "train").mkdir()
    for name in COLORS:
        shutil.move(photos / name, photos / "train" / name)
    shutil.copytree(photos / "train" / "red", photos / "validation" / "pink")


REFUSED = {
    empty: "no photos in .*black",
    one_class: "only one class, 'red'",
    two_photos: "too few photos: 'red' has 2; give at least 3 of each class",
    loose: "no folders in .*: put the photos of each class into a folder",
    broken: "too few photos: 'red' has 2",
    split_or_class: "has the folder 'train', which has folders of its own, beside photos in 'blue'",
    no_training: "has no folder 'train' beside val",
    unknown_class: "has a folder 'pink', which is none of the classes",
    shutil.rmtree: "cannot read .*No such file or directory; give a directory with a folder per class",
}


@pytest.mark.parametrize("spoil", REFUSED, ids=lambda spoil: spoil.__name__)
def test_refused_photos(spoil: Any, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil(photos)
    with pytest.raises(InputError, match=REFUSED[spoil]):
        fit_probe(SMALL, photos, progress=False)
    status = command("probe", photos, "--model", SMALL, "--out", tmp_path / "mine", "--cache", tmp_path / "cache")
    assert status == 2 and "Traceback" not in capsys.readouterr().err
    assert not (tmp_path / "mine").exists()


def test_photos_that_occur_twice_or_are_broken_are_told(photos: Path) -> None:
    shutil.copy(photos / "red" / "0.png", photos / "green" / "same.png")
    (photos / "blue" / "9.png").write_bytes((photos / "blue" / "0.png").read_bytes()[:100])
    with pytest.warns(UserWarning, match="photos") as caught:
        _, result = fit_probe(SMALL, photos, progress=False)
    texts = [str(one.message) for one in caught]
    assert tuple(texts) == result.warnings and len(texts) == 2
    assert "1 photos cannot be read and are left out: blue/9.png: broken image" in texts[0]
    assert "1 photos occur twice" in texts[1] and "photos/green/same.png and photos/red/0.png" in texts[1]
    assert result.training_counts == (5, 6, 5)


# Features on disk.


def test_features_are_computed_once(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, cache = load_model(SMALL).eval(), tmp_path / "cache"
    seen: list[int] = []

    def count(model: nn.Module, x: Tensor) -> Tensor:
        seen.append(len(x))
        return pooled_features(model, x)

    monkeypatch.setattr(feature_module, "pooled_features", count)
    data = ClassFolders(photos)
    first = compute_features(model, data, FeatureCache(cache, model), batch_size=4)
    files = sorted(cache.rglob("*.npy"))
    assert sum(seen) == len(files) == 15
    files[0].write_bytes(files[0].read_bytes()[:-8])  # torn
    files[1].write_bytes(b"")
    files[2].write_bytes(b"\x93NUMPY but no more")
    np.save(files[3], np.zeros(7, np.float32))  # of another length
    (photos / "red" / "0.png").rename(photos / "red" / "renamed.png")
    again = compute_features(model, ClassFolders(photos), FeatureCache(cache, model), batch_size=4)
    assert sum(seen) == 15 + 4
    by_digest = dict(zip(again.digests, again.values, strict=True))
    expected = dict(zip(first.digests, first.values, strict=True))
    assert by_digest.keys() == expected.keys()
    for digest, values in by_digest.items():
        torch.testing.assert_close(values, expected[digest])


def change_settings(model: Any, name: str, value: object) -> None:
    """Change a setting of the modules that have it, but not of the classifier."""
    found = [m for m in model.modules() if hasattr(m, name) and m is not model.get_classifier()]
    assert found, name
    for module in found:
        setattr(module, name, value)


CHANGES: dict[str, Any] = {
    "weight": lambda model: next(model.parameters()).data.flatten()[0].add_(1),
    "crop": lambda model: model.pretrained_cfg.update(crop_pct=0.5),
    "b": lambda model: change_settings(model, "b", 1.5),
    "eps": lambda model: change_settings(model, "eps", 1.0),
    "dilation": lambda model: change_settings(model, "dilation", (2, 2)),
    "activation": lambda model: setattr(model, "act1", nn.Identity()),
    "function": lambda model: setattr(model, "function", torch.tanh),
    "type": lambda model: model.double(),
}
NO_CHANGES: dict[str, Any] = {
    "classifier": lambda model: model.get_classifier().weight.data.add_(1),
    "a pass": lambda model: model(torch.rand(1, 3, 32, 32)),
    "training": lambda model: model.train(),
    "memory format": lambda model: model.to(memory_format=torch.channels_last),
    "description": lambda model: model.pretrained_cfg.update(description="another"),
}


@pytest.mark.parametrize("change", [*CHANGES, *NO_CHANGES])
def test_the_cache_knows_model_and_transform(change: str, tmp_path: Path) -> None:
    model: Any = load_model(SMALL).eval()
    model.pretrained_cfg = dict(model.pretrained_cfg)
    before = FeatureCache(tmp_path, model).folder
    (CHANGES | NO_CHANGES)[change](model)
    assert (FeatureCache(tmp_path, model).folder == before) == (change in NO_CHANGES)


@pytest.mark.parametrize(
    ("arch", "own", "other"),
    [
        ("bcos_cifar_resnet20", {}, dict(global_pool="max")),
        ("test_vit", dict(global_pool="avg", class_token=True), dict(global_pool="max", class_token=True)),
    ],
)
def test_the_cache_knows_the_structure(arch: str, own: dict[str, Any], other: dict[str, Any], tmp_path: Path) -> None:
    create = dict(model_name=arch) if arch == SMALL else dict(model_name="bcosify", arch=arch)
    first, second = (timm.create_model(**create, **kwargs).eval() for kwargs in (own, other))
    second.load_state_dict(first.state_dict())
    assert FeatureCache(tmp_path, first).folder != FeatureCache(tmp_path, second).folder


def test_a_cache_that_cannot_be_written_is_no_problem(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    _, result = fit_probe(SMALL, photos, cache=tmp_path / "file", progress=False)
    assert result.accuracy > 0.9


# The command.


def test_the_command_writes_a_model_that_explains_itself(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mine"
    shutil.copy(photos / "red" / "0.png", photos / "red" / "same.png")
    assert command("probe", photos, "--model", SMALL, "--out", out, "--cache", tmp_path / "cache") == 0
    text = capsys.readouterr()
    assert "16 training photos of 3 classes: blue 5, green 5, red 6" in text.out
    assert "accuracy 100.0 % (95 % interval 80.6 to 100.0; 16 photos, cross-validation)" in text.out
    assert "warning: 1 photos occur twice" in text.err
    assert {path.name for path in out.iterdir()} == {
        "config.json", "model.safetensors", "probe.json", "class_000_blue.png", "class_001_green.png",
        "class_002_red.png",
    }  # fmt: skip
    photo, why = photos / "green" / "1.png", tmp_path / "why"
    assert command("explain", photo, "--model", f"local-dir:{out}", "--out", why) == 0
    assert "green" in capsys.readouterr().out.splitlines()[1]


def test_names_of_folders_may_be_no_text(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        (photos / "red").rename(photos / os.fsdecode(b"r\xe9d"))
    except OSError:
        pytest.skip("file names are text on this system")
    out = tmp_path / "mine"
    assert command("probe", photos, "--model", SMALL, "--out", out, "--cache", tmp_path / "cache") == 0
    assert len(list(out.glob("class_*.png"))) == 3, capsys.readouterr().err


def test_the_model_does_not_go_among_the_photos(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("probe", photos, "--model", SMALL, "--out", photos / "mine") == 2
    assert "lies in" in capsys.readouterr().err
    assert command("probe", photos, "--model", SMALL, "--out", photos / "red" / "0.png") == 2
