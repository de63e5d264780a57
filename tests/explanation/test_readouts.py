"""Anything linear in the outputs: directions, sets of classes, positions and regions, beside slow twins."""

import re

import pytest
import timm
import torch
from torch import Tensor, nn

from tests.helpers import enliven, normalized, real_image
from timm_bcos import BcosConfig, Explanation, InputError, TargetError, bcosify, check, contrast, explain
from timm_bcos.explanation.regions import PositionGrid
from timm_bcos.explanation.titles import title

SIZE = 96


@pytest.fixture(scope="module")
def x() -> Tensor:
    return real_image(SIZE, 2, torch.float64)


def converted(name: str, x: Tensor, **kwargs: object) -> nn.Module:
    """With constants of its own for each output."""
    plain = timm.create_model(name, **kwargs).double()
    enliven(plain, normalized(x, plain.pretrained_cfg))
    return bcosify(plain, BcosConfig.finetune(b=1.5, bias=True)).eval()


@pytest.fixture(scope="module")
def model(x: Tensor) -> nn.Module:
    return converted("test_resnet", x)


class Dense(nn.Module):
    """A map of class scores and an auxiliary one, by name, as segmentation networks return them."""

    def __init__(self, features: nn.Module, classes: int = 5) -> None:
        super().__init__()
        self.features = features
        self.head = nn.Conv2d(features.feature_info.channels()[-1], classes, 1).double()
        self.aux = nn.Conv2d(features.feature_info.channels()[0], classes, 1).double()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = self.features(x)
        return {"out": self.head(maps[-1]), "aux": self.aux(maps[0])}


@pytest.fixture(scope="module")
def dense(x: Tensor) -> nn.Module:
    plain = Dense(timm.create_model("test_resnet", features_only=True).double())
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the statistics of one batch
    with torch.no_grad():
        plain.train()((x - 0.5) / 0.5)
    config = BcosConfig.finetune(b=1.5, bias=True, mean=(0.5,) * 3, std=(0.5,) * 3)
    return bcosify(plain.eval(), config).eval()


def test_a_direction_is_the_sum_of_rows(model: nn.Module, x: Tensor) -> None:
    """(N, K) and (K,), beside every row of W(x) on its own."""
    units = [3, 5, 7]
    direction = torch.zeros(2, 1000, dtype=torch.float64)
    direction[:, units] = torch.tensor([[0.5, -2.0, 1.0], [1.0, 1.0, 0.25]], dtype=torch.float64)
    found, rows = explain(model, x, direction), [explain(model, x, unit) for unit in units]
    for name in ("weights", "bias", "constant_bias", "logit"):
        parts = [getattr(row, name) for row in rows]
        shape = [2] + [1] * (parts[0].ndim - 1)
        expected = sum(direction[:, unit].reshape(shape) * part for unit, part in zip(units, parts, strict=True))
        torch.testing.assert_close(getattr(found, name), expected, rtol=1e-10, atol=1e-12)
    assert found.completeness_error.max() <= 1e-10 and (found.logit.abs() > 1e-3).all()
    assert found.target.tolist() == [7, 3]
    same = explain(model, x, direction[0])
    torch.testing.assert_close(same.weights[0], found.weights[0])
    assert [axes.get_title() for axes in found.plot().axes][1:3] == [
        "for class 7 + class 3, not class 5",
        "for class 5, not class 7 + class 3",
    ]


def test_directions_with_a_logit_bias() -> None:
    x = real_image(32, 2, torch.float64)
    model = enliven(timm.create_model("bcos_cnn9").double(), x)
    found = explain(model, x, torch.rand(2, 10, dtype=torch.float64))
    assert found.logit_bias != 0 and found.completeness_error.max() <= 1e-10
    torch.testing.assert_close(found.bias, found.logit_bias * found.direction.sum(1))  # type: ignore[union-attr]


def test_a_set_is_the_mean_of_its_classes(model: nn.Module, x: Tensor) -> None:
    found, each = explain(model, x, {1, 4}), [explain(model, x, unit) for unit in (1, 4)]
    torch.testing.assert_close(found.weights, (each[0].weights + each[1].weights) / 2, rtol=1e-10, atol=1e-14)
    assert found.completeness_error.max() <= 1e-10


def test_sets_against_sets(model: nn.Module, x: Tensor) -> None:
    """All dogs against all cats, and one class against several."""
    dogs, cats = set(range(151, 269)), set(range(281, 286))
    found = contrast(model, x, dogs, cats)
    logits = model(x)
    torch.testing.assert_close(found.logit, logits[:, 151:269].mean(1) - logits[:, 281:286].mean(1))
    assert found.completeness_error.max() <= 1e-10 and found.versus is None
    torch.testing.assert_close(found.weights, -contrast(model, x, cats, dogs).weights)
    torch.testing.assert_close(found.opposite().contribution_map, -found.contribution_map)
    one = contrast(model, x, 3, cats)
    torch.testing.assert_close(one.logit, logits[:, 3] - logits[:, 281:286].mean(1))


def test_chunks_take_their_own_directions_and_regions(model: nn.Module, x: Tensor) -> None:
    direction = torch.randn(2, 1000, dtype=torch.float64)
    torch.testing.assert_close(explain(model, x, direction, chunk=1).weights, explain(model, x, direction).weights)
    boxes = [(0, 0, 40, 50), (30, 20, 96, 96)]
    both = explain(model, x, 3, layer="layer3", region=boxes)
    torch.testing.assert_close(explain(model, x, 3, layer="layer3", region=boxes, chunk=1).weights, both.weights)
    as_tensor = explain(model, x, 3, layer="layer3", region=torch.tensor(boxes))  # as detectors return them
    torch.testing.assert_close(as_tensor.weights, both.weights)


def test_units_of_a_layer_against_each_other(model: nn.Module, x: Tensor) -> None:
    """By default where the difference is largest."""
    found = contrast(model, x, 3, 5, layer="layer2")
    maps: list[Tensor] = []
    handle = model.layer2.register_forward_hook(lambda module, args, output: maps.append(output))
    model(x)
    handle.remove()
    difference = maps[0][:, 3] - maps[0][:, 5]
    torch.testing.assert_close(found.logit, difference.flatten(1).amax(1))
    assert found.position is not None and found.completeness_error.max() <= 1e-10
    row, column = found.position[0].tolist()
    assert title(found, 0) == f"layer2, unit 3, not unit 5 at ({row}, {column})"
    direction = torch.randn(maps[0].shape[1], dtype=torch.float64)
    placed = explain(model, x, direction, layer="layer2", position=(1, 2))
    torch.testing.assert_close(placed.logit, maps[0][:, :, 1, 2] @ direction)
    assert placed.completeness_error.max() <= 1e-10


def test_a_region_is_the_mean_of_its_positions(model: nn.Module, x: Tensor) -> None:
    """A mask of the layer's own size, one of the image's, and a box."""
    mask = torch.zeros(12, 12)
    mask[2:4, 5] = 1
    mask[2, 5] = 3
    found = explain(model, x, 3, layer="layer2", region=mask)
    singles = [explain(model, x, 3, layer="layer2", position=(row, 5)) for row in (2, 3)]
    expected = 0.75 * singles[0].weights + 0.25 * singles[1].weights
    torch.testing.assert_close(found.weights, expected, rtol=1e-10, atol=1e-14)
    assert found.position is None and found.region is not None and found.region.shape == (2, 12, 12)
    assert found.completeness_error.max() <= 1e-10
    of_pixels = torch.zeros(2, SIZE, SIZE, dtype=torch.bool)
    of_pixels[:, 16:32, 40:48] = True
    box = explain(model, x, 3, layer="layer2", region=(40, 16, 48, 32))
    torch.testing.assert_close(explain(model, x, 3, layer="layer2", region=of_pixels).weights, box.weights)
    expected = (singles[0].weights + singles[1].weights) / 2
    torch.testing.assert_close(box.weights, expected, rtol=1e-10, atol=1e-14)
    assert title(box, 0) == "layer2, unit 3 in the region"


def test_regions_of_tokens(x: Tensor) -> None:
    """The class token is nowhere in the image; patches form a grid."""
    model = converted("test_vit", x, img_size=SIZE)
    patches = SIZE // 16
    found = explain(model, x, 2, layer="blocks.1", region=(16, 32, 32, 48))
    single = explain(model, x, 2, layer="blocks.1", position=1 + 2 * patches + 1)
    torch.testing.assert_close(found.weights, single.weights)
    assert found.region is not None and found.region.shape == (2, patches, patches)
    assert found.completeness_error.max() <= 1e-10


@pytest.mark.parametrize(
    ("count", "prefix", "size", "shape"),
    [(197, 1, (224, 224), (14, 14)), (6, 0, (64, 96), (2, 3)), (12, 0, (64, 64), (1, 1)), (197, 0, (224, 224), (1, 1))],
)
def test_tokens_that_form_a_grid(count: int, prefix: int, size: tuple[int, int], shape: tuple[int, int]) -> None:
    """Only where rows and columns are in the image's proportion: a detector's boxes may have any number."""
    assert PositionGrid.of_tokens(count, prefix, size).shape == shape


def test_outputs_by_name_with_regions(dense: nn.Module, x: Tensor) -> None:
    outputs = dense(x)
    box = (64, 0, 96, 32)  # a ninth
    for name, maps in outputs.items():
        found = explain(dense, x, 1, output=name, region=box)
        size = maps.shape[2]
        inside = maps[:, 1, : size // 3, size - size // 3 :].mean((1, 2))
        torch.testing.assert_close(found.logit, inside)
        assert found.completeness_error.max() <= 1e-10 and (found.logit.abs() > 1e-4).all()
    first = explain(dense, x, 1, region=box)
    torch.testing.assert_close(first.weights, explain(dense, x, 1, output="out", region=box).weights)
    placed = explain(dense, x, 1, position=(0, 1))
    torch.testing.assert_close(placed.logit, outputs["out"][:, 1, 0, 1])
    assert title(placed, 0) == "for class 1 at (0, 1)"
    pair = contrast(dense, x, 1, 2, output="out", region=box)
    torch.testing.assert_close(pair.weights, first.weights - explain(dense, x, 2, region=box).weights)
    assert "for class 1, not class 2 in the region" in [axes.get_title() for axes in pair.plot().axes]


def test_feature_maps_by_number(x: Tensor) -> None:
    model = bcosify(timm.create_model("test_resnet", features_only=True).double(), BcosConfig.finetune()).eval()
    maps = model(x)
    found = explain(model, x, 4, output=2, position=(3, 1))
    torch.testing.assert_close(found.logit, maps[2][:, 4, 3, 1])
    assert found.completeness_error.max() <= 1e-10


class Captioned(nn.Module):
    """Scores that a second input adds to and scales, by name."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, prior: Tensor, *, scale: float = 1.0) -> Tensor:
        return scale * self.network(x) * prior.sigmoid().mean(1, keepdim=True) + prior


@pytest.mark.parametrize("chunk", [None, 1])
def test_other_inputs_by_name(model: nn.Module, x: Tensor, chunk: int | None) -> None:
    """Held constant: what they add is no part of the image's contributions, and each image has its own."""
    captioned = Captioned(model).eval()
    prior = torch.randn(2, 1000, dtype=torch.float64)
    extra = dict(prior=prior, scale=2.0)
    found, own = explain(captioned, x, 3, extra=extra, chunk=chunk), explain(model, x, 3)
    torch.testing.assert_close(found.logits, captioned(x, **extra))
    factor = 2 * prior.sigmoid().mean(1)
    torch.testing.assert_close(found.weights, factor[:, None, None, None] * own.weights)
    torch.testing.assert_close(found.bias, factor * own.bias + prior[:, 3])
    assert found.completeness_error.max() <= 1e-10 and not found.violations
    pair = contrast(captioned, x, 3, 5, extra=extra, chunk=chunk)
    torch.testing.assert_close(pair.weights, found.weights - explain(captioned, x, 5, extra=extra).weights)
    verdict = check(captioned, x, extra=dict(prior=prior.float(), scale=2.0))
    assert verdict.exact and verdict.image_share < 1


def test_check_of_other_inputs_finds_the_break(model: nn.Module, x: Tensor) -> None:
    class Leaking(Captioned):
        def forward(self, x: Tensor, prior: Tensor, *, scale: float = 1.0) -> Tensor:
            return self.network(x) + scale * self.network(x).sigmoid() * prior

    verdict = check(Leaking(model).eval(), x, extra=dict(prior=torch.ones(2, 1)))
    assert not verdict.exact and verdict.breaks_at == "(root)"


NAN = torch.full((1000,), float("nan"))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (dict(target=torch.rand(7)), "a direction of 7 numbers: the model has 1000 classes"),
        (dict(target=torch.rand(3, 1000)), "target of shape (3, 1000): a direction is (K,), or (2, K)"),
        (dict(target=torch.zeros(1000)), "a direction of zeros"),
        (dict(target=NAN), "target holds numbers that are not finite"),
        (dict(target=set()), "a set of classes holds at least one int"),
        (dict(target={"dog"}), "a set of classes holds at least one int, and only ints"),
        (dict(target={3, 1000}), "target=1000: the model has 1000 classes, counted from 0"),
        (dict(output="out"), "output='out': the model returns a single tensor"),
        (dict(region=(0, 0, 5, 5)), "the output has no map of positions"),
        (dict(layer="layer2", region=(5, 5, 5, 9)), "the region of image 0 is empty"),
        (dict(layer="layer2", region=(200, 200, 210, 210)), "the region of image 0 is empty"),
        (dict(layer="layer2", region=torch.zeros(SIZE, SIZE)), "the region of image 0 is empty"),
        (
            dict(layer="layer2", region=torch.ones(7, 7)),
            "a region of 7 × 7: the image has 96 × 96 pixels",
        ),
        (dict(layer="layer2", region=-torch.ones(12, 12)), "numbers that are negative or not finite"),
        (
            dict(layer="layer2", region=torch.ones(3, 12, 12)),
            "a region of shape (3, 12, 12): give a mask (H, W)",
        ),
        (dict(layer="layer2", region="left"), "region='left': give a mask (H, W), or a box"),
        (dict(layer="layer2", region=(1, 2, 3)), "region=(1, 2, 3): give a mask (H, W), or a box"),
        (dict(layer="layer2", region=(0, 0, 9, 9), position=(0, 0)), "give a position or a region, not both"),
    ],
)
def test_what_cannot_be_asked(model: nn.Module, x: Tensor, arguments: dict[str, object], text: str) -> None:
    with pytest.raises(TargetError, match=re.escape(text)):
        explain(model, x, **arguments)  # type: ignore[arg-type]


def test_wrong_outputs(dense: nn.Module, x: Tensor) -> None:
    with pytest.raises(TargetError, match=re.escape("output='logits': the model returns 'out', 'aux'")):
        explain(dense, x, output="logits")


def test_sides_of_a_contrast(model: nn.Module, x: Tensor) -> None:
    with pytest.raises(TargetError, match=re.escape("a and b are both the classes {1, 2}: give two different sets")):
        contrast(model, x, {1, 2}, {2, 1})
    with pytest.raises(InputError, match="the explanation of a single output has no opposite"):
        explain(model, x).opposite()
    with pytest.raises(InputError, match="cannot stack explanations of different outputs"):
        Explanation.stack([explain(model, x), explain(model, x, {1, 2})])
