import pytest
import timm
import torch
from torch import Tensor, nn

import timm_bcos
from tests.helpers import enliven, normalized, real_image
from timm_bcos import BcosConfig, InputError, ModelStateError, TargetError, bcosify, check, explain, explain_targets
from timm_bcos.explanation import linear_parts


@pytest.fixture
def x() -> Tensor:
    return real_image(32, 3)


@pytest.fixture
def model(x: Tensor) -> nn.Module:
    return enliven(timm.create_model("bcos_cnn9"), x)


@pytest.fixture
def transformer() -> nn.Module:
    """A converted transformer with biases, position embedding and class token: constants of every kind."""
    plain = timm.create_model("test_vit").double()
    enliven(plain, normalized(real_image(160, 2, torch.float64), plain.pretrained_cfg))
    return bcosify(plain, BcosConfig.finetune(b=1.5, bias=True)).eval()


def test_weights_are_the_row_of_the_linear_map(model: nn.Module, x: Tensor) -> None:
    explanation = explain(model, x, 3)
    logits = model(x).detach()
    torch.testing.assert_close(explanation.logits, logits)
    torch.testing.assert_close(
        (explanation.weights * explanation.inputs).sum((1, 2, 3)) + explanation.bias, logits[:, 3]
    )
    torch.testing.assert_close(explanation.contribution_map.sum((1, 2)), explanation.contributions.sum((1, 2, 3)))
    torch.testing.assert_close(explanation.image, x)
    assert explanation.bias.tolist() == pytest.approx([explanation.logit_bias] * 3)
    assert explanation.logit_bias == pytest.approx(-2.1972, abs=1e-4)


def test_bias_is_what_the_constants_contribute(transformer: nn.Module) -> None:
    x = real_image(160, 2, torch.float64)
    explanation = transformer.explain(x)
    assert explanation.completeness_error.max() <= 1e-10
    assert (explanation.bias.abs() > 1e-3).all()
    single = [transformer.explain(x[i : i + 1]).bias for i in range(2)]
    torch.testing.assert_close(explanation.bias, torch.cat(single))


class Views(nn.Module):
    """Looks at other images than those it is given: mirrored ones, one at a time, in another order."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        plain = timm.create_model("test_resnet", num_classes=5)
        plain.pretrained_cfg["mean"] = (0.485, 0.456, 0.406)  # what leaves an offset that counts
        self.network, self.kind, self.num_classes = bcosify(plain, BcosConfig.finetune(b=2)), kind, 5

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "two":
            return self.network(torch.cat([x, x.flip(-1)])).unflatten(0, (2, -1)).mean(0)
        if self.kind == "singly":
            return torch.cat([self.network(image[None]) for image in x])
        if self.kind == "reversed":
            return self.network(x.flip(0)).flip(0)
        return self.network(x)


@pytest.mark.parametrize("kind", ["two", "singly", "reversed", "as it is"])
def test_the_offset_of_the_stem_counts_whatever_the_stem_looks_at(kind: str, x: Tensor) -> None:
    explanation = explain(enliven(Views(kind), x), x, 1)
    assert explanation.completeness_error.max() <= 1e-4
    assert (explanation.bias.abs() > 1e-3 * explanation.logit.abs()).all()


def test_a_batch_is_its_images(model: nn.Module, x: Tensor) -> None:
    batch = explain(model, x)
    assert batch.target.tolist() == model(x).argmax(1).tolist()
    for i in range(3):
        single = explain(model, x[i : i + 1])
        torch.testing.assert_close(batch[i].weights, single.weights, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(batch[-3 + i].logits, single.logits)
    assert len(batch) == 3
    with pytest.raises(IndexError, match="image 3 of 3"):
        batch[3]


def test_targets(model: nn.Module, x: Tensor) -> None:
    one = explain(model, x, 4)
    each = explain(model, x, [4, 5, 6])
    assert each.target.tolist() == [4, 5, 6]
    torch.testing.assert_close(each[0].weights, one[0].weights)
    torch.testing.assert_close(explain(model, x, torch.tensor([4, 5, 6])).weights, each.weights)


def test_several_targets_take_one_forward_pass(model: nn.Module, x: Tensor) -> None:
    calls: list[int] = []
    handle = model.register_forward_hook(lambda *args: calls.append(1))
    several = explain_targets(model, x, [[1, 2], [3, 4], [5, 6]])
    assert len(calls) == 4  # all in explanation mode; outside the first, every second and the remaining images
    handle.remove()
    assert [e.target.tolist() for e in several] == [[1, 3, 5], [2, 4, 6]]
    torch.testing.assert_close(several[1].weights, explain(model, x, [2, 4, 6]).weights)
    top = explain_targets(model, x, top=2)
    torch.testing.assert_close(top[0].target, model(x).argmax(1))
    stacked = timm_bcos.Explanation.stack(top)
    assert len(stacked) == 6
    torch.testing.assert_close(stacked[3].weights, top[1][0].weights)


def test_encoded_images_give_the_same(model: nn.Module, x: Tensor) -> None:
    torch.testing.assert_close(explain(model, timm_bcos.encode_image(x, 3)).weights, explain(model, x).weights)


def test_inner_neurons(model: nn.Module, x: Tensor) -> None:
    captured: list[Tensor] = []
    handle = model.features[4].register_forward_hook(lambda m, a, out: captured.append(out.detach()))
    model(x)
    handle.remove()
    activations = captured[0]
    unit = explain(model, x, 7, layer="features.4")
    assert unit.position is not None
    for i in range(3):
        row, column = unit.position[i].tolist()
        assert activations[i, 7, row, column] == activations[i, 7].max()
        assert unit.logit[i] == pytest.approx(activations[i, 7].max().item(), rel=1e-5)
    assert unit.completeness_error.max() < 1e-4
    strongest = explain(model, x, layer="features.4")
    assert strongest.logit.tolist() == pytest.approx(activations.amax((1, 2, 3)).tolist(), rel=1e-5)
    placed = explain(model, x, 7, layer="features.4", position=(2, 3))
    torch.testing.assert_close(placed.logit, activations[:, 7, 2, 3], rtol=1e-5, atol=1e-5)
    # a neuron sees its receptive field only
    assert placed.weights[:, :, 16:, 16:].abs().max() == 0


def test_inner_neurons_of_transformers(transformer: nn.Module) -> None:
    x = real_image(160, 2, torch.float64)
    neuron = explain(transformer, x, 5, layer="blocks.1", position=3)
    assert neuron.position is not None
    assert neuron.position.tolist() == [[0, 3], [0, 3]]
    assert neuron.completeness_error.max() <= 1e-10


def test_nothing_of_the_callers_changes(model: nn.Module, x: Tensor) -> None:
    x.requires_grad_()
    model.fc.weight.requires_grad_(False)
    model.features[0].weight.grad = torch.ones_like(model.features[0].weight)
    before = x.detach().clone()
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    random_state = torch.get_rng_state()
    with torch.no_grad():
        for _ in range(2):
            explanation = explain(model, x)
            assert not torch.is_grad_enabled()
    assert x.grad is None
    torch.testing.assert_close(x.detach(), before, rtol=0, atol=0)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert model.features[0].weight.grad.eq(1).all()
    assert model.features[1].weight.grad is None
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not explanation.weights.requires_grad
    assert not explanation.logits.requires_grad
    assert not model._forward_hooks


def test_state_is_restored_when_the_model_fails(model: nn.Module, x: Tensor) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("inside the model")

    handle = model.features[3].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="inside the model"):
        explain(model, x)
    handle.remove()
    assert all(p.requires_grad for p in model.parameters())
    assert explain(model, x).completeness_error.max() < 1e-4


BAD_IMAGES = {
    "looks mean/std-normalized": lambda x: (x - 0.5) / 0.25,
    r"got \[0, 255\]; divide by 255": lambda x: torch.linspace(0, 255, x.numel()).reshape(x.shape),
    "divide by 255 first": lambda x: (255 * x).to(torch.uint8),
    "NaN or infinite": lambda x: x / 0,
    r"got shape \(3, 4, 32, 32\)": lambda x: torch.rand(3, 4, 32, 32),
    r"batch dimension: x\[None\]": lambda x: x[0],
    r"\(0, 3, 32, 32\) are empty": lambda x: x[:0],
    r"\(3, 3, 0, 32\) are empty": lambda x: x[:, :, :0],
    "got str: apply the model's transform": lambda x: "photo.jpg",
}


@pytest.mark.parametrize("text", BAD_IMAGES)
def test_bad_images(model: nn.Module, x: Tensor, text: str) -> None:
    with pytest.raises(InputError, match=text):
        explain(model, BAD_IMAGES[text](x))
    assert all(p.requires_grad for p in model.parameters())


def test_inference_mode_is_left_for_the_pass(model: nn.Module, x: Tensor) -> None:
    expected = explain(model, x)
    with torch.inference_mode():
        made_inside = x + 0
        inside = explain(model, made_inside)
        assert torch.is_inference_mode_enabled()
    assert torch.equal(inside.weights, expected.weights)
    assert torch.equal(explain(model, made_inside).bias, expected.bias)


BAD_TARGETS = {
    "the model has 10 classes, counted from 0": dict(target=10),
    "target=-1: the model has 10 classes": dict(target=-1),
    "one int for each of the 3 images": dict(target=[1, 2]),
    "give an int": dict(target=1.5),
    "no layer 'feature.4'; close names: features.4": dict(layer="feature.4"),
    "the model has 128 units in layer 'features.4'": dict(layer="features.4", target=128),
    "16 rows and 16 columns": dict(layer="features.4", target=1, position=(16, 0)),
}


@pytest.mark.parametrize("text", BAD_TARGETS)
def test_bad_targets(model: nn.Module, x: Tensor, text: str) -> None:
    with pytest.raises(TargetError, match=text):
        explain(model, x, **BAD_TARGETS[text])


def test_bad_lists_of_targets(model: nn.Module, x: Tensor) -> None:
    with pytest.raises(TargetError, match="top=11: the model has 10 classes"):
        explain_targets(model, x, top=11)
    with pytest.raises(TargetError, match="give 3 rows"):
        explain_targets(model, x, [[1, 2]])


def test_gates_are_no_neurons() -> None:
    model = bcosify(timm.create_model("efficientnet_b0"), BcosConfig()).eval()
    with pytest.raises(TargetError, match="only scales the image's path"):
        explain(model, real_image(64), layer="blocks.1.0.se.gate")


def test_wrong_models(x: Tensor) -> None:
    with pytest.raises(ModelStateError, match=r"ResNet is no B-cos model.*bcosify\(model\)"):
        explain(timm.create_model("resnet18").eval(), x)
    model = timm.create_model("bcos_cnn9")
    with pytest.raises(ModelStateError, match=r"the model is in training mode: call model.eval\(\)"):
        explain(model, x)
    model.eval().head_drop.train()
    with pytest.raises(ModelStateError, match="head_drop is in training mode"):
        explain(model, x)
    features = timm.create_model("bcos_cnn9", features_only=True).eval()
    with pytest.raises(TargetError, match="output=9: the model returns 0, 1, 2"):
        explain(features, x, output=9)


class Rounded(nn.Module):
    """Not dynamic linear: most values become constants that explanation mode does not know of."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.fake_quantize_per_tensor_affine(x, 0.01, 0, 0, 1)


def test_check_names_the_module_that_breaks(model: nn.Module, x: Tensor) -> None:
    verdict = check(model, x)
    assert verdict.exact
    assert verdict.breaks_at is None
    assert verdict.image_share == pytest.approx(1, abs=1e-4)
    assert check(model).exact
    model.features[5] = nn.Sequential(model.features[5], Rounded()).eval()
    model.fc.temperature *= 1e-6
    verdict = check(model, x)
    assert not verdict.exact
    assert verdict.breaks_at == "features.5.1"
    assert verdict.completeness_error > 0.1


def test_probabilities() -> None:
    x = real_image(32)
    sigmoid = timm.create_model("bcos_cnn9").eval().explain(x)
    torch.testing.assert_close(sigmoid.probability, sigmoid.logits.sigmoid())
    preserved = bcosify(timm.create_model("resnet18"), BcosConfig.finetune(b=1, bias=True)).eval().explain(x)
    assert preserved.probability.sum().item() == pytest.approx(1)


class PositionsFirst(nn.Module):
    """Sequences (L, N, C), in which nothing but the results tells positions from images; and a number for all."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 16, stride=16)
        self.norm = nn.LayerNorm(6)
        self.mixed = nn.Linear(6, 6)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.conv(x).flatten(2).permute(2, 0, 1)  # (L, N, C)
        return self.fc(self.mixed(self.norm(tokens)).mean(0))


@pytest.mark.parametrize("images", [2, 3, 4])
def test_constants_are_told_apart_in_any_layout(images: int) -> None:
    """Of 4 positions and 2 or 4 images the layout alone says nothing; of 3 images it is clear."""
    torch.manual_seed(0)
    config = BcosConfig(mean=(0.5,), std=(0.5,), bias=True, b=1.5)
    model = bcosify(PositionsFirst().double(), config).eval()
    x = real_image(32, images, torch.float64) if images < 4 else torch.rand(4, 3, 32, 32, dtype=torch.float64)
    found = explain(model, x)
    assert found.completeness_error.max() <= 1e-10
    singles = [explain(model, x[i : i + 1]) for i in range(images)]
    torch.testing.assert_close(found.bias, torch.cat([single.bias for single in singles]))
    torch.testing.assert_close(found.weights, torch.cat([single.weights for single in singles]))
    assert (found.bias[0] - found.bias[1]).abs() > 1e-6


class OneByOne(torch.autograd.Function):
    """The identity, whose gradient can be taken for one output at a time alone."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad * float(grad.sum().isfinite())


class Stubborn(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(OneByOne.apply(x))


@pytest.mark.parametrize("at_once", [1, 3, 64])
def test_several_classes_in_one_backward_pass(
    transformer: nn.Module, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_parts, "AT_ONCE", at_once)
    x, table = real_image(160, 2, torch.float64), torch.tensor([[0, 5, 7, 1], [2, 5, 0, 3]])
    for column, several in zip(table.T, explain_targets(transformer, x, table), strict=True):
        single = explain(transformer, x, column)
        for name in ("weights", "bias", "constant_bias", "logits", "target"):
            torch.testing.assert_close(getattr(several, name), getattr(single, name))


def test_gradients_that_are_taken_one_by_one(model: nn.Module, x: Tensor) -> None:
    with pytest.warns(timm_bcos.InexactWarning):
        found = explain_targets(Stubborn(model).eval(), x, [[1, 2]] * 3)
    for explanation, unit in zip(found, (1, 2), strict=True):
        torch.testing.assert_close(explanation.weights, explain(model, x, unit).weights)


@pytest.mark.parametrize("chunk", [1, 2, 3, 10])
def test_large_batches_in_chunks(model: nn.Module, x: Tensor, chunk: int) -> None:
    for layer in (None, "features.4"):
        whole, parts = explain(model, x, [1, 2, 3], layer=layer), explain(model, x, [1, 2, 3], layer=layer, chunk=chunk)
        for name in ("weights", "bias", "logits", "target", "inputs"):
            torch.testing.assert_close(getattr(parts, name), getattr(whole, name))
        assert parts.violations == whole.violations and len(parts) == 3
    for part, whole in zip(explain_targets(model, x, chunk=chunk), explain_targets(model, x), strict=True):
        torch.testing.assert_close(part.weights, whole.weights)


@pytest.mark.parametrize("chunk", [0, -1, True, 2.5])
def test_chunks_without_images(model: nn.Module, x: Tensor, chunk: object) -> None:
    with pytest.raises(InputError, match=f"chunk={chunk!r}: give the number of images per pass, at least 1"):
        explain(model, x, 1, chunk=chunk)
