"""What users put in the place of a classifier, or around it."""

import copy
import pickle
from collections.abc import Callable

import pytest
import timm
import torch
from timm.task import ClassificationTask, TrainingTask
from torch import Tensor, nn

import timm_bcos
from tests.helpers import real_image
from timm_bcos import GuidedClassificationTask
from timm_bcos.cli import script_runner
from timm_bcos.training.tasks import DeletionClassificationTask

ARCHITECTURES = {
    "by position": dict(model_name="bcosify", arch="test_resnet", num_classes=4),
    "by position, in a head": dict(model_name="bcosv2_convnext_tiny", num_classes=4, depths=(1, 1, 1, 1)),
    "of features": dict(model_name="bcosify", arch="test_resnet", num_classes=4, classify_positions="never"),
    "of tokens": dict(model_name="bcosify", arch="test_vit", num_classes=4),
}


def create(name: str) -> nn.Module:
    return timm.create_model(**ARCHITECTURES[name]).eval()


def place_of(model: nn.Module) -> tuple[nn.Module, str]:
    path = next(path for path, module in model.named_modules() if module is model.get_classifier())
    parent, _, name = path.rpartition(".")
    return model.get_submodule(parent), name


def image(name: str) -> Tensor:
    return real_image(160 if name == "of tokens" else 64)


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "a dropout": lambda head: nn.Sequential(nn.Dropout(0.2), head),
    "two sequences": lambda head: nn.Sequential(nn.Sequential(nn.Identity(), head)),
    "torch.compile": lambda head: torch.compile(head, backend="eager"),  # type: ignore[return-value]
    "a copy": copy.deepcopy,
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_wrapped_classifier_answers_as_before(name: str, wrapper: str) -> None:
    model, x = create(name), image(name)
    expected = timm_bcos.explain(model, x, 1)
    owner, child = place_of(model)
    setattr(owner, child, WRAPPERS[wrapper](getattr(owner, child)).eval())
    torch.testing.assert_close(model(x), expected.logits)
    found = timm_bcos.explain(model, x, 1)
    torch.testing.assert_close(found.contributions, expected.contributions)
    if wrapper != "torch.compile":
        torch.testing.assert_close(pickle.loads(pickle.dumps(model))(x), expected.logits)
    if wrapper == "torch.compile":
        with pytest.raises(timm_bcos.UnsupportedModuleError, match="convert first"):
            timm_bcos.bcosify(model)
    else:
        timm_bcos.bcosify(model)  # what is new: nothing
    torch.testing.assert_close(model(x), expected.logits)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_plain_head_gets_pooled_features(name: str) -> None:
    model, x = create(name), image(name)
    owner, child = place_of(model)
    head = getattr(owner, child)
    assert head.out_features == 4
    setattr(owner, child, nn.Linear(head.in_features, 7))
    assert model(x).shape == (1, 7)
    setattr(owner, child, nn.Sequential(nn.Dropout(0.1), nn.Linear(head.in_features, 6)))
    assert model(x).shape == (1, 6)
    timm_bcos.bcosify(model)
    assert model(x).shape == (1, 6) and isinstance(getattr(owner, child)[1], timm_bcos.BcosLinear)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_classifier_that_peft_trains_beside_adapters(name: str) -> None:
    peft = pytest.importorskip("peft")
    model, x = create(name), image(name)
    expected = model(x).detach()
    _, child = place_of(model)
    path = next(path for path, module in model.named_modules() if module is model.get_classifier())
    model.unused = nn.Linear(2, 2)
    config = peft.LoraConfig(r=2, target_modules=["unused"], modules_to_save=[path])
    adapted = peft.get_peft_model(model, config).eval()
    torch.testing.assert_close(adapted(x), expected)
    adapted(x).sum().backward()
    trained = {n: p for n, p in adapted.named_parameters() if "modules_to_save" in n}
    assert trained and all(p.requires_grad and p.grad is not None for p in trained.values())
    assert child in next(iter(trained))


@pytest.mark.parametrize("task", [ClassificationTask, DeletionClassificationTask, GuidedClassificationTask])
@pytest.mark.parametrize("name", [*ARCHITECTURES, "plain"])
def test_adaptive_clipping_leaves_out_classifiers_alone(name: str, task: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainingTask, "get_clip_parameters", TrainingTask.get_clip_parameters)
    script_runner._clip_all_but_heads()
    model = timm.create_model("test_resnet") if name == "plain" else create(name)
    training = task(model, nn.CrossEntropyLoss())
    clipped = {id(p) for p in training.get_clip_parameters(exclude_head=True)}
    left_out = [n for n, p in model.named_parameters() if id(p) not in clipped]
    head = next(n for n, m in model.named_modules() if m is model.get_classifier())
    assert left_out == [f"{head}.weight", f"{head}.bias"][: 2 if name == "plain" else 1]
    assert len(list(training.get_clip_parameters())) == len(list(model.parameters()))


@pytest.mark.parametrize("arch", ["shvit_s1", "efficientvit_m0"])
def test_models_whose_head_timm_has_removed_convert_and_explain_features(arch: str) -> None:
    """Their `get_classifier` looks inside the head, and fails without one."""
    x = real_image(64)
    plain = timm.create_model(arch, num_classes=0).eval()
    model = timm.create_model("bcosify", arch=arch, num_classes=0).eval()
    assert model(x).shape == plain(x).shape
    explanation = timm_bcos.explain(model, x, 3)
    assert explanation.completeness_error.max() < 1e-4
    model = timm.create_model("bcosify", arch=arch, num_classes=4)
    model.reset_classifier(0)
    assert model.train()(x.expand(2, -1, -1, -1)).shape == (2, plain.num_features)
    model.reset_classifier(3)
    assert timm_bcos.explain(model.eval(), x, 2).logits.shape == (1, 3)
