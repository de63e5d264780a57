"""A conversion is planned, then applied: what is refused stays as it was."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import timm_bcos
from tests.helpers import assert_exact, enliven, normalized, real_image
from tests.helpers.own_models import COLORS, PRESERVE, Two, small
from timm_bcos import RULES, BcosConfig, InputError, ModelStateError, UnsupportedModuleError, bcosify, keep
from timm_bcos.conversion.converted import BcosModel
from timm_bcos.conversion.inspection import inspect_model, reference_activations
from timm_bcos.conversion.plan import plan_conversion
from timm_bcos.nn.stems import BcosStem


def state(model: nn.Module) -> dict[str, Any]:
    """All that a conversion could change, by identity and by value."""
    modules = {n: (id(m), type(m), sorted(vars(m)), m.training) for n, m in model.named_modules(remove_duplicate=False)}
    tensors = {n: (id(t), t.detach().clone()) for n, t in [*model.named_parameters(), *model.named_buffers()]}
    return dict(modules=modules, tensors=tensors, cfg=copy.copy(getattr(model, "pretrained_cfg", None)))


def assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    after = state(model)
    assert after["modules"] == before["modules"] and after["cfg"] == before["cfg"]
    for name, (identity, value) in before["tensors"].items():
        assert after["tensors"][name][0] == identity and torch.equal(after["tensors"][name][1], value)


def test_an_inspection_finds_the_roles() -> None:
    model = timm.create_model("test_vit")
    before = state(model)
    found = inspect_model(model, BcosConfig())
    roles = {path: role.role for path, role in found.roles.items() if role.role != "hidden"}
    linear = {f"blocks.{i}.attn.qkv": "linear" for i in range(len(model.blocks))}
    assert roles == {"patch_embed.proj": "stem", "head": "classifier"} | linear
    assert (found.channels, found.mean, found.std) == (3, (0.5,) * 3, (0.5,) * 3)
    stem = found.roles["patch_embed.proj"]
    assert (stem.mean, stem.std) == (found.mean, found.std)
    assert not found.reads_encoded_images
    assert_unchanged(model, before)


def test_a_plan_is_a_table_and_changes_nothing() -> None:
    model = small()
    before = state(model)
    plan = plan_conversion(inspect_model(model, PRESERVE), RULES)
    assert [line.split() for line in str(plan).splitlines()] == [
        ["0", "Conv2d", "->", "BcosStem"],
        ["3", "Flatten", "->", "BcosFlatten"],
        ["4", "Linear", "->", "BcosLinearClassifier"],
    ]
    assert_unchanged(model, before)
    again = plan_conversion(inspect_model(bcosify(model, PRESERVE), PRESERVE), RULES)
    assert str(again) == "" and not again.replacements


def test_reference_activations_of_a_model_behind_a_reader() -> None:
    class Branches(Two):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.left(x), self.right(x)], 1)

    norm = timm.layers.BatchNormAct2d(8)
    model = nn.Sequential(Branches(), norm, nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(8, 5)).eval()
    nn.init.uniform_(norm.bias, 0.5, 1.0)
    expected = reference_activations(model)["1"]
    converted: Any = bcosify(model, BcosConfig(bias="reference", **COLORS))
    assert list(converted._modules)[:2] == ["image_reader", "network"]
    assert torch.equal(converted.network[1].act.shift, expected) and expected.abs().min() > 0


class Raising(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def raising_rule(*_: Any) -> nn.Module:
    raise RuntimeError("a rule that fails half-way")


def test_whatever_is_raised_the_model_is_unchanged() -> None:
    model = timm.create_model("test_resnet")
    model.layer3[0].act1 = Raising()
    model.layer4[0].register_forward_hook(lambda *_: None)
    own, cases = Two(), []
    cases.append((model, BcosConfig(), RULES | {Raising: raising_rule}, RuntimeError, "half-way"))
    cases.append((model, BcosConfig(), None, UnsupportedModuleError, "no rule for .*Raising"))
    cases.append((model, BcosConfig(positions="attention"), RULES | {Raising: keep}, UnsupportedModuleError, "vision"))
    cases.append((own, BcosConfig(), None, UnsupportedModuleError, r"BcosConfig\(mean="))
    cases.append(
        (own, BcosConfig(mean=(0.1, 0.2), std=(1.0,)), None, InputError, r"mean=\(0.1, 0.2\).* have 3 channels")
    )
    for network, config, rules, error, text in cases:
        before = state(network)
        with pytest.raises(error, match=text):
            bcosify(network, config, rules=rules)
        assert_unchanged(network, before)


def test_all_problems_are_told_at_once() -> None:
    model = Two()
    model.left = parametrizations.weight_norm(model.left)
    model.act = Raising()
    before = state(model)
    with pytest.raises(UnsupportedModuleError) as caught:
        bcosify(model, BcosConfig(positions="attention"))
    assert len(caught.value.problems) == 4
    for text in ("BcosConfig(mean=", "left: has a parametrized weight", "act: no rule", "vision transformer"):
        assert text in str(caught.value)
    assert_unchanged(model, before)


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = small()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def test_a_replaced_root_is_adopted() -> None:
    """By a rule for its type, whether the replacement reads images itself or not."""
    x, cfg = real_image(16, 2, torch.float64), BcosConfig.finetune(b=1, bias=True, **COLORS)

    def rule(module: Any, *_: Any) -> nn.Module:
        return nn.Sequential(module.body, nn.Identity()).eval()  # its parts are the rule's business

    plain = Inner().double().eval()
    expected = plain(normalized(x, COLORS)).detach()
    model = bcosify(plain, cfg, rules=RULES | {Inner: rule})
    assert isinstance(model, BcosModel) and model.bcos_config == cfg and model is not plain
    torch.testing.assert_close(model(x), expected)
    assert_exact(model, x, 1e-10)
    linear = bcosify(nn.Linear(8, 5), BcosConfig(**COLORS))
    assert isinstance(linear, BcosModel) and isinstance(linear, timm_bcos.BcosLinear)
    assert linear(real_image(8)).shape == (1, 3, 8, 5)
    for twin in (copy.deepcopy(linear), pickle.loads(pickle.dumps(linear))):
        torch.testing.assert_close(twin(real_image(8)), linear(real_image(8)))


def test_children_of_a_replaced_root_are_converted() -> None:
    class Root(nn.Sequential): ...

    def rule(module: nn.Module, *_: Any) -> nn.Module:
        return timm_bcos.nn.module_utils.clone(module)

    plain = Root(*small())
    model = bcosify(plain, PRESERVE, rules=RULES | {Root: rule})
    assert isinstance(model[0], BcosStem) and type(plain[0]) is nn.Conv2d
    assert isinstance(model, BcosModel) and not isinstance(plain, BcosModel)


# Hooks, and weights that are computed.


def test_hooks_move_to_the_replacement() -> None:
    model, x = timm.create_model("test_resnet").eval(), real_image(32)
    calls: list[str] = []
    convs = [model.conv1, model.layer1[0].conv1]
    handles = [conv.register_forward_hook(lambda *_: calls.append("forward")) for conv in convs]
    model.conv1.register_forward_pre_hook(lambda *_, **__: calls.append("pre"), with_kwargs=True)
    model.fc.register_full_backward_hook(lambda *_: calls.append("backward"))
    bcosify(model)
    model(x).sum().backward()
    assert sorted(calls) == ["backward", "forward", "forward", "pre"]
    calls.clear()
    for handle in handles:
        handle.remove()
    model(x)
    assert calls == ["pre"]


def test_hooks_that_would_vanish_are_refused() -> None:
    model = timm.create_model("resnetv2_50").eval()
    norm = model.norm
    norm.act.register_forward_hook(lambda *_: None)
    before = state(model)
    with pytest.raises(UnsupportedModuleError, match=r"norm\.act: has hooks and goes away"):
        bcosify(model, BcosConfig(norm="remove", activation="remove"))
    assert_unchanged(model, before)
    model = timm.create_model("test_resnet")
    model.layer1[0].conv1.register_state_dict_post_hook(lambda *_: None)
    with pytest.raises(UnsupportedModuleError, match="conv1: has state dict hooks"):
        bcosify(model)


COMPUTED: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "parametrized": (parametrizations.weight_norm, "remove_parametrizations"),
    "spectral": (parametrizations.spectral_norm, "remove_parametrizations"),
    "weight_norm": (nn.utils.weight_norm, "remove_weight_norm"),
    "spectral_norm": (nn.utils.spectral_norm, "remove_spectral_norm"),
    "pruned": (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), "prune.remove"),
}


@pytest.mark.parametrize("how", COMPUTED)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_computed_weights_are_refused(how: str) -> None:
    compute, mend = COMPUTED[how]
    model = timm.create_model("test_resnet")
    compute(model.layer1[0].conv2)
    before = state(model)
    with pytest.raises(UnsupportedModuleError, match=rf"layer1\.0\.conv2: has a .*{mend}"):
        bcosify(model)
    assert_unchanged(model, before)


# Networks that are wrapped, or converted already.


def test_wrappers_are_refused_by_name() -> None:
    model = timm.create_model("test_resnet")
    wrapped: dict[str, nn.Module] = {
        "DataParallel(bcosify(model.module))": nn.DataParallel(model),
        "torch.compile(bcosify(model))": torch.compile(model),
        "torch.jit.script(bcosify(model))": torch.jit.script(timm.create_model("test_resnet")),
        "trace the result": torch.fx.symbolic_trace(model),
    }
    for text, wrapper in wrapped.items():
        with pytest.raises(UnsupportedModuleError) as caught:
            bcosify(wrapper, PRESERVE)
        assert text in str(caught.value)
    with pytest.raises(UnsupportedModuleError, match="wraps a model"):
        bcosify(nn.DataParallel(bcosify(model)))


def test_distributed_models_are_refused(tmp_path: Any) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(timm.create_model("test_resnet"))
        with pytest.raises(UnsupportedModuleError, match=r"DistributedDataParallel\(bcosify\(model.module\)\)"):
            bcosify(wrapped)
    finally:
        torch.distributed.destroy_process_group()


def test_a_model_in_a_sequential() -> None:
    x = real_image(32, 2, torch.float64)
    plain = enliven(timm.create_model("test_resnet", num_classes=5).double(), normalized(x, COLORS))
    expected = plain(normalized(x, COLORS)).detach()
    for inner in (copy.deepcopy(plain), bcosify(copy.deepcopy(plain), PRESERVE)):
        with pytest.raises(UnsupportedModuleError, match=r"converted with|how its images are normalized"):
            bcosify(nn.Sequential(inner), BcosConfig())
        model = bcosify(nn.Sequential(inner).eval(), PRESERVE)
        assert model.bcos_config.probability == "softmax"
        torch.testing.assert_close(model(x), expected)
        assert_exact(model, x, 1e-10)
    beside = nn.ModuleDict(dict(a=bcosify(copy.deepcopy(plain), PRESERVE), b=plain))
    with pytest.raises(UnsupportedModuleError, match=r"b\.conv1\.0: may read images beside"):
        bcosify(beside)


def test_another_config_for_a_converted_model_is_refused() -> None:
    model = bcosify(timm.create_model("test_resnet"), BcosConfig.finetune(b=1, bias=True))
    before = state(model)
    with pytest.raises(UnsupportedModuleError, match=r"\(root\): has been converted with b=1.*probability='softmax'"):
        bcosify(model, BcosConfig())
    assert_unchanged(model, before)
    assert bcosify(model) is model and model.bcos_config.probability == "softmax"
    with pytest.raises(UnsupportedModuleError, match="has been converted with"):
        bcosify(timm.create_model("bcos_resnet18"), BcosConfig())


# Configs.


@pytest.mark.parametrize(
    "given",
    [
        dict(b=float("nan")), dict(b=float("inf")), dict(b="2"), dict(b=True), dict(b=0.5), dict(b=None),
        dict(gamma=float("nan")), dict(gamma=0), dict(gamma_scale=-1.0), dict(temperature=0), dict(temperature=None),
        dict(max_out=1.5), dict(max_out=0), dict(logit_bias=float("inf")), dict(bias="no"), dict(bias=1),
        dict(std=(0.1, 0.0, 0.1)), dict(std=(-1.0,)), dict(mean=()), dict(mean=0.5), dict(mean=("a",)),
        dict(mean=(float("nan"),) * 3), dict(linear="qkv"), dict(norm=[]), dict(max_out=2),
    ],
    ids=str,
)  # fmt: skip
def test_configs_are_checked(given: dict[str, Any]) -> None:
    (name,) = given
    with pytest.raises(InputError, match=rf"BcosConfig\({name}=") as caught:
        BcosConfig(**given)
    assert isinstance(caught.value, ValueError)


def test_lists_of_json_are_taken() -> None:
    config = BcosConfig(mean=[0.5, 0.5, 0.5], std=[1, 1, 1], linear=["*qkv"])  # type: ignore[arg-type]
    assert config == BcosConfig(mean=(0.5,) * 3, std=(1,) * 3, linear=("*qkv",))
    assert hash(config)


def test_statistics_have_one_number_per_channel() -> None:
    for mean, std in (((0.1, 0.2), (1.0,)), ((0.1,), (1.0, 2.0)), ((0.1, 0.2), (1.0, 2.0))):
        with pytest.raises(InputError, match="images of ResNet have 3 channels; give one number for each, or one"):
            bcosify(timm.create_model("test_resnet"), BcosConfig(mean=mean, std=std))
    with pytest.raises(InputError, match="have 1 channel;"):
        bcosify(timm.create_model("test_resnet", in_chans=1), BcosConfig(mean=(0.1, 0.2, 0.3), std=(1.0,)))
    bcosify(timm.create_model("test_resnet", in_chans=4))  # a cfg's are averaged
    with pytest.raises(ModelStateError, match="positions='attention'"):
        torch.jit.script(bcosify(timm.create_model("test_vit"), BcosConfig(positions="attention")))


def test_the_class_of_a_converted_model_has_a_name_of_its_own() -> None:
    model = timm.create_model("test_resnet")
    plain = type(model)
    bcosify(model)
    assert type(model).__name__ == f"Bcos{plain.__name__}" and type(model).__module__.startswith("timm_bcos.")
    assert isinstance(model, plain) and copy.deepcopy(model).__class__ is type(model)
