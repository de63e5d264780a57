"""Models of a user's own, converted to the same function."""

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.layers import SelectAdaptivePool2d
from torch import Tensor, nn

import timm_bcos
from tests.helpers import assert_exact, enliven, normalized, real_image
from tests.helpers.own_models import COLORS, PRESERVE, Two, small
from timm_bcos import BcosConfig, InputError, UnsupportedModuleError, bcosify
from timm_bcos.conversion.converted import BcosModel
from timm_bcos.nn.heads import BcosConvClassifier
from timm_bcos.nn.stems import BcosStem, ImageReader, image_channels


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


# What reads the image.


@pytest.mark.parametrize("kind", [Two, Late, Skip, Timmlike])
def test_whatever_reads_the_image_the_function_is_preserved(kind: type[nn.Module]) -> None:
    model, x = kind().double().eval(), real_image(16, 2, torch.float64)
    expected = model(normalized(x, COLORS)).detach()
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


def test_models_of_two_images_say_what_reads_them() -> None:
    model, x = Pair().double().eval(), real_image(16, 2, torch.float64)
    with pytest.raises(UnsupportedModuleError, match=r"several inputs \(x, y\).*first_conv="):
        bcosify(model, PRESERVE)
    y = x.flip(0)
    expected = model(normalized(x, COLORS), normalized(y, COLORS)).detach()
    model.pretrained_cfg = dict(first_conv=("left", "right"), **COLORS)
    converted = bcosify(model, BcosConfig.finetune(b=1, bias=True))
    torch.testing.assert_close(converted(x, y), expected)
    assert isinstance(converted.left, BcosStem) and isinstance(converted.right, BcosStem)


def test_methods_behind_a_reader_read_once_each() -> None:
    model, x = Timmlike().eval(), real_image(16, 2)
    expected = model.forward_features(normalized(x, COLORS)).detach()
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
        model(x if isinstance(model, BcosModel) else normalized(x, COLORS)).square().sum().backward()
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
    model = enliven(create(channels).double().eval(), normalized(x, cfg))
    expected = model(normalized(x, cfg)).detach()
    converted = bcosify(model, BcosConfig.finetune(b=1, bias=True, **cfg))
    torch.testing.assert_close(converted(x), expected)
    assert image_channels(converted) == converted.in_chans == channels
    assert assert_exact(converted, x, 1e-10).weights.shape[1] == 2 * channels


def test_a_users_model_tells_its_channels_and_classes() -> None:
    for create in (small, Two, lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 5))):
        x = real_image(8, 2)
        model = bcosify(create(), PRESERVE).eval()
        assert (model.in_chans, model.num_classes) == (3, 5)
        assert timm_bcos.attribute(model, x, 1).shape == (2, 8, 8)
        program = timm_bcos.export_explainer(model, x)
        torch.testing.assert_close(program.module()(x, torch.tensor([1, 1]))[0], model(x))
    assert image_channels(nn.Linear(2, 3)) is None
    assert image_channels(timm.create_model("test_resnet", in_chans=4)) == 4


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
    expected = plain.double().eval()(normalized(x, COLORS)).detach()
    model = bcosify(plain, PRESERVE)
    torch.testing.assert_close(model(x), expected)
    assert_exact(model, x, 1e-10)


class TwoReaders(nn.Module):
    """Two layers read the image, so that an `ImageReader` does; the forward pass keeps something on the model."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.Linear(4, 3)
        self.height = 0

    def forward_features(self, x: Tensor) -> Tensor:
        self.height = x.shape[2]
        return self.first(x) + self.second(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.forward_features(x).mean((2, 3)))


def test_a_reader_comes_once_before_nested_forward_methods() -> None:
    statistics: dict[str, Any] = dict(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    model = bcosify(TwoReaders().double(), BcosConfig(b=1, bias=True, **statistics)).eval()
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    read = (x - torch.tensor(statistics["mean"])[:, None, None]) / torch.tensor(statistics["std"])[:, None, None]
    features = model.first(read) + model.second(read)
    torch.testing.assert_close(model.forward_features(x), features, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model(x), model.head(features.mean((2, 3))), rtol=1e-6, atol=1e-6)
    assert model.height == 8, "what a forward pass assigns stays"
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
