"""Networks of a user's own, and hostile ones: converted to the same function, or refused and left as they were."""

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from conftest import assert_exact, enliven, normalised, real_image
from timm.layers import SelectAdaptivePool2d
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import timm_bcos
from timm_bcos import RULES, BcosConfig, InputError, ModelStateError, UnsupportedModuleError, bcosify, keep
from timm_bcos.conversion.converted import BcosModel
from timm_bcos.nn.heads import BcosConvClassifier
from timm_bcos.nn.stems import BcosStem, ImageReader, image_channels

COLOURS: dict[str, Any] = dict(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.2))
PRESERVE = BcosConfig.finetune(b=1, bias=True, **COLOURS)


class Two(nn.Module):
    """Two convolutions read the image."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 4, 3, padding=1)
        self.right = nn.Conv2d(3, 4, 5, padding=2)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.cat([self.left(x), self.right(x)], 1).relu().mean((2, 3)))


class Late(nn.Module):
    """The convolution that is registered first does not read the image."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(3, 3, 3)
        self.stem = nn.Conv2d(3, 3, 3)
        self.fc = nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.inner(self.stem(x).relu()).relu().mean((2, 3)))


class Skip(nn.Module):
    """The only convolution reads features; a linear layer, registered before it, reads the image."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(3, 3)
        self.conv = nn.Conv2d(3, 6, 3)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mix(x.permute(0, 2, 3, 1)).relu().permute(0, 3, 1, 2)
        return self.fc(self.conv(x).relu().mean((2, 3)))


class Timmlike(nn.Module):
    """Behind a reader, with methods that call each other, several times."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
        self.fc = nn.Linear(4, 5)
        self.num_calls = 0

    def forward_features(self, image: Tensor) -> Tensor:
        return self.a(image) + self.b(image).relu()

    def forward(self, image: Tensor) -> Tensor:
        return self.fc((self.forward_features(image) + self.forward_features(image.flip(-1))).mean((2, 3)))


def small(channels: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(8, 5))


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


# What reads the image.


@pytest.mark.parametrize("kind", [Two, Late, Skip, Timmlike])
def test_whatever_reads_the_image_the_function_is_preserved(kind: type[nn.Module]) -> None:
    model, x = kind().double().eval(), real_image(16, 2, torch.float64)
    expected = model(normalised(x, COLOURS)).detach()
    converted = bcosify(model, PRESERVE)
    assert converted is model and isinstance(model.image_reader, ImageReader)
    torch.testing.assert_close(converted(x), expected)
    torch.testing.assert_close(converted(timm_bcos.encode_image(x, 3)), expected)
    assert_exact(converted, x, 1e-10)


class Pair(nn.Module):
    """Two images, and a convolution for each."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor, y: Tensor, scale: float = 1.0) -> Tensor:
        return self.fc(scale * torch.cat([self.left(x), self.right(y)], 1).relu().mean((2, 3)))


def test_networks_of_two_images_say_what_reads_them() -> None:
    model, x = Pair().double().eval(), real_image(16, 2, torch.float64)
    with pytest.raises(UnsupportedModuleError, match=r"several inputs \(x, y\).*first_conv="):
        bcosify(model, PRESERVE)
    y = x.flip(0)
    expected = model(normalised(x, COLOURS), normalised(y, COLOURS)).detach()
    model.pretrained_cfg = dict(first_conv=("left", "right"), **COLOURS)
    converted = bcosify(model, BcosConfig.finetune(b=1, bias=True))
    torch.testing.assert_close(converted(x, y), expected)
    assert isinstance(converted.left, BcosStem) and isinstance(converted.right, BcosStem)


def test_methods_behind_a_reader_read_once_each() -> None:
    model, x = Timmlike().eval(), real_image(16, 2)
    expected = model.forward_features(normalised(x, COLOURS)).detach()
    converted = bcosify(model, PRESERVE)
    torch.testing.assert_close(converted.forward_features(x), expected)
    torch.testing.assert_close(converted(image=x), converted(x))
    assert vars(x) == {}, "nothing is put on the caller's tensor"
    for twin in (copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))):
        torch.testing.assert_close(twin(x), converted(x))
    converted.num_calls = 3
    assert converted.num_calls == 3
    with pytest.raises(InputError, match="one tensor of images first, got a list"):
        converted([x])


def test_a_method_behind_a_reader_can_be_checkpointed() -> None:
    """Recomputed by itself, in the backward pass, it reads as before."""

    class Checkpointed(Timmlike):
        def forward(self, image: Tensor) -> Tensor:
            features = torch.utils.checkpoint.checkpoint(self.forward_features, image, use_reentrant=False)
            return self.fc(features.mean((2, 3)))

    x, gradients = real_image(16, 2), []
    plain = Checkpointed()
    for model in (bcosify(copy.deepcopy(plain), PRESERVE), plain):
        model(x if isinstance(model, BcosModel) else normalised(x, COLOURS)).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for converted, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(converted, expected.reshape(converted.shape), rtol=1e-4, atol=1e-5)


def test_eight_threads_behind_one_reader() -> None:
    model = bcosify(Timmlike(), PRESERVE).eval()
    images = [torch.rand(2, 3, 8 + i, 8) for i in range(8)]
    expected = [model(x).detach() for x in images]
    found: list[list[Tensor]] = [[] for _ in images]

    def work(i: int) -> None:
        found[i] += [model(images[i]).detach() for _ in range(20)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(len(results) == 20 for results in found)
    assert all(torch.equal(result, expected[i]) for i, results in enumerate(found) for result in results)


@pytest.mark.parametrize("kind", [Two, Timmlike])
def test_formats_keep_the_reader(kind: type[nn.Module]) -> None:
    from torchvision.models.feature_extraction import create_feature_extractor

    plain, x = kind().eval(), real_image(16, 2)
    unread = plain(x).detach()
    model = bcosify(plain, PRESERVE)
    expected = model(x).detach()
    assert (expected - unread).abs().max() > 1e-3, "the reader matters"
    torch.testing.assert_close(torch.jit.script(model)(x), expected)
    torch.testing.assert_close(torch.jit.trace(model, x)(x), expected)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), expected)
    torch.testing.assert_close(create_feature_extractor(model, ["fc"])(x)["fc"], expected)
    torch.testing.assert_close(torch.export.export(model, (x,), strict=False).module()(x), expected)
    torch._dynamo.reset()
    one_graph = torch.__version__ >= "2.7"  # before, dynamo reads no attribute of a shared __dict__
    torch.testing.assert_close(torch.compile(model, fullgraph=one_graph, backend="aot_eager")(x), expected)
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("create", [small, lambda channels: timm.create_model("test_resnet", in_chans=channels)])
def test_images_of_other_channels(create: Callable[[int], nn.Module], channels: int) -> None:
    cfg = dict(mean=(0.5, 0.4, 0.3, 0.2)[:channels], std=(0.2, 0.2, 0.3, 0.2)[:channels])
    x = torch.rand(2, channels, 64, 64, dtype=torch.float64)
    model = enliven(create(channels).double().eval(), normalised(x, cfg))
    expected = model(normalised(x, cfg)).detach()
    converted = bcosify(model, BcosConfig.finetune(b=1, bias=True, **cfg))
    torch.testing.assert_close(converted(x), expected)
    assert image_channels(converted) == converted.in_chans == channels
    assert assert_exact(converted, x, 1e-10).weights.shape[1] == 2 * channels


def test_a_users_network_tells_its_channels_and_classes() -> None:
    for create in (small, Two, lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 5))):
        x = real_image(8, 2)
        model = bcosify(create(), PRESERVE).eval()
        assert (model.in_chans, model.num_classes) == (3, 5)
        assert timm_bcos.attribute(model, x, 1).shape == (2, 8, 8)
        program = timm_bcos.export_explainer(model, x)
        torch.testing.assert_close(program.module()(x, torch.tensor([1, 1]))[0], model(x))
    assert image_channels(nn.Linear(2, 3)) is None
    assert image_channels(timm.create_model("test_resnet", in_chans=4)) == 4


# Planned, then applied.


class Raising(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def raising_rule(*_: Any) -> nn.Module:
    raise RuntimeError("a rule that fails half-way")


def test_whatever_is_raised_the_network_is_unchanged() -> None:
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
    for text in ("BcosConfig(mean=", "left: has a parametrised weight", "act: no rule", "vision transformer"):
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
    x, cfg = real_image(16, 2, torch.float64), BcosConfig.finetune(b=1, bias=True, **COLOURS)

    def rule(module: Any, *_: Any) -> nn.Module:
        return nn.Sequential(module.body, nn.Identity()).eval()  # its parts are the rule's business

    plain = Inner().double().eval()
    expected = plain(normalised(x, COLOURS)).detach()
    model = bcosify(plain, cfg, rules=RULES | {Inner: rule})
    assert isinstance(model, BcosModel) and model.bcos_config == cfg and model is not plain
    torch.testing.assert_close(model(x), expected)
    assert_exact(model, x, 1e-10)
    linear = bcosify(nn.Linear(8, 5), BcosConfig(**COLOURS))
    assert isinstance(linear, BcosModel) and isinstance(linear, timm_bcos.BcosLinear)
    assert linear(real_image(8)).shape == (1, 3, 8, 5)
    for twin in (copy.deepcopy(linear), pickle.loads(pickle.dumps(linear))):
        torch.testing.assert_close(twin(real_image(8)), linear(real_image(8)))


def test_children_of_a_replaced_root_are_converted() -> None:
    class Root(nn.Sequential): ...

    def rule(module: nn.Module, *_: Any) -> nn.Module:
        return timm_bcos.nn.modules.clone(module)

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
    "parametrised": (parametrizations.weight_norm, "remove_parametrizations"),
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
    with pytest.raises(UnsupportedModuleError, match="wraps a network"):
        bcosify(nn.DataParallel(bcosify(model)))


def test_distributed_networks_are_refused(tmp_path: Any) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(timm.create_model("test_resnet"))
        with pytest.raises(UnsupportedModuleError, match=r"DistributedDataParallel\(bcosify\(model.module\)\)"):
            bcosify(wrapped)
    finally:
        torch.distributed.destroy_process_group()


def test_a_network_in_a_sequential() -> None:
    x = real_image(32, 2, torch.float64)
    plain = enliven(timm.create_model("test_resnet", num_classes=5).double(), normalised(x, COLOURS))
    expected = plain(normalised(x, COLOURS)).detach()
    for inner in (copy.deepcopy(plain), bcosify(copy.deepcopy(plain), PRESERVE)):
        with pytest.raises(UnsupportedModuleError, match=r"converted with|how its images are normalised"):
            bcosify(nn.Sequential(inner), BcosConfig())
        model = bcosify(nn.Sequential(inner).eval(), PRESERVE)
        assert model.bcos_config.probability == "softmax"
        torch.testing.assert_close(model(x), expected)
        assert_exact(model, x, 1e-10)
    beside = nn.ModuleDict(dict(a=bcosify(copy.deepcopy(plain), PRESERVE), b=plain))
    with pytest.raises(UnsupportedModuleError, match=r"b\.conv1\.0: may read images beside"):
        bcosify(beside)


def test_another_config_for_a_converted_network_is_refused() -> None:
    model = bcosify(timm.create_model("test_resnet"), BcosConfig.finetune(b=1, bias=True))
    before = state(model)
    with pytest.raises(UnsupportedModuleError, match=r"\(root\): has been converted with b=1.*probability='softmax'"):
        bcosify(model, BcosConfig())
    assert_unchanged(model, before)
    assert bcosify(model) is model and model.bcos_config.probability == "softmax"
    with pytest.raises(UnsupportedModuleError, match="has been converted with"):
        bcosify(timm.create_model("bcos_resnet18"), BcosConfig())


# Layers that a user assigns after the conversion.


class Headed(nn.Module):
    """As timm's classifier heads: the pooling and the classifier are inside a part."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        pool = SelectAdaptivePool2d(pool_type="avg", flatten=True)
        self.head = nn.ModuleDict(dict(pool=pool, fc=nn.Linear(8, 5)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head["fc"](self.head["pool"](self.conv(x)))


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_efficientnet", "test_vit", "own"])
def test_a_head_can_be_assigned(name: str) -> None:
    x = real_image(160 if name == "test_vit" else 64, 2)
    model = bcosify(Headed() if name == "own" else timm.create_model(name), BcosConfig.v2()).eval()
    owner = model.head if hasattr(getattr(model, "head", None), "fc") else model
    head = (
        next(n for n in ("fc", "classifier", "head") if isinstance(getattr(owner, n, None), BcosConvClassifier))
        if name != "test_vit"
        else "head"
    )
    old = getattr(owner, head)
    features = old.in_channels if isinstance(old, BcosConvClassifier) else old.in_features
    setattr(owner, head, nn.Linear(features, 4).eval())
    assert model(x).shape == (2, 4)
    assert model.explain(x).logits.shape == (2, 4)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin(x), model(x))
    bcosify(model)
    assert type(getattr(owner, head)).__name__.startswith("Bcos")
    assert model(x).shape == (2, 4)
    setattr(owner, head, nn.Identity())
    assert model(x).shape == (2, features)
    setattr(owner, head, old)
    assert model(x).shape == (2, old.weight.shape[0])


def test_a_pooling_to_several_positions_stays_one() -> None:
    pool = SelectAdaptivePool2d(2, pool_type="avg", flatten=True)
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), pool, nn.Linear(8 * 4, 5))
    x = real_image(16, 2, torch.float64)
    expected = plain.double().eval()(normalised(x, COLOURS)).detach()
    model = bcosify(plain, PRESERVE)
    torch.testing.assert_close(model(x), expected)
    assert_exact(model, x, 1e-10)


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
