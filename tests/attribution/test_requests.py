"""What `attribute` and the metrics take beside classes: outputs, layers, positions, regions and other arguments."""

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import timm_bcos
from tests.helpers import enliven, real_image
from timm_bcos import InputError, MethodError, ModelStateError, TargetError, attribute, explain
from timm_bcos.attribution.registry import METHODS
from timm_bcos.evaluation.metrics import METRICS, NEEDING_MASKS, evaluate

pytest.importorskip("captum")
SIZE = 32
TRANSFORMERS = [(method, kind) for method in ("attention_rollout", "chefer") for kind in ("plain", "converted")]
REFUSED = {("bcos", "plain"), ("lrp", "converted"), ("attnlrp", "converted"), *TRANSFORMERS}
FEW: dict[str, dict[str, Any]] = dict(
    rise=dict(masks=20),
    lime=dict(samples=20),
    smoothgrad=dict(samples=2),
    integrated_gradients=dict(n_steps=4),
    occlusion=dict(window=16),
)


class Dense(nn.Module):
    """Two maps of class scores by name, one of which another argument shifts by image and class."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.act = nn.ReLU()
        self.mixed = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.act2 = nn.ReLU()
        self.small, self.large = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)
        self.pretrained_cfg = dict(mean=(0.5,) * 3, std=(0.5,) * 3, input_size=(3, SIZE, SIZE))

    def forward(self, x: Tensor, factor: Tensor | None = None) -> dict[str, Tensor]:
        early = self.act(self.stem(x))
        maps = self.small(self.act2(self.mixed(early)))
        return {"small": maps if factor is None else maps * factor[:, :, None, None], "large": self.large(early)}


@pytest.fixture(scope="module")
def plain() -> nn.Module:
    torch.manual_seed(0)
    return Dense().double().eval()


@pytest.fixture(scope="module")
def converted() -> nn.Module:
    torch.manual_seed(0)
    return timm_bcos.bcosify(Dense().double(), timm_bcos.BcosConfig.finetune(b=1.5)).eval()


@pytest.fixture(scope="module")
def x() -> Tensor:
    return real_image(SIZE, 3, torch.float64)


def mean_in_box(maps: Tensor, box: tuple[int, int, int, int]) -> Tensor:
    """(K,) literal mean of maps (K, H', W') whose cells lie in a box of the image."""
    left, top, right, bottom = (edge * maps.shape[1] // SIZE for edge in box)
    cells = [maps[:, row, column] for row in range(top, bottom) for column in range(left, right)]
    return sum(cells) / len(cells)  # type: ignore[return-value]


def test_input_x_gradient_of_a_region_beside_its_twin(plain: nn.Module, x: Tensor) -> None:
    boxes, targets = [(0, 0, 16, 8), (8, 8, 32, 32), (0, 16, 8, 32)], [2, 0, 3]
    factor = 1 + torch.rand(3, 4, dtype=torch.float64)
    given: dict[str, Any] = dict(output="small", region=boxes, extra=dict(factor=factor))
    found = attribute(plain, x, targets, "input_x_gradient", **given)
    for i, (box, target) in enumerate(zip(boxes, targets, strict=True)):
        z = ((x[i : i + 1] - 0.5) / 0.5).requires_grad_()
        score = mean_in_box(plain(z, factor[i : i + 1])["small"][0], box)[target]
        (gradient,) = torch.autograd.grad(score, z)
        torch.testing.assert_close(found[i], (gradient * z).sum(1)[0].detach(), rtol=1e-10, atol=1e-14)
    together = attribute(plain, x, targets, "input_x_gradient", batch_size=1, **given)
    assert torch.equal(together, found)


def test_occlusion_at_positions_beside_its_twin(converted: nn.Module, x: Tensor) -> None:
    """Each square of zeros lowers the score by something, which is averaged over the squares that cover a pixel."""
    positions, target, window = [(0, 1), (5, 2), (7, 7)], 1, 8
    found = attribute(
        converted, x, target, "occlusion", output="small", position=positions, window=window, stride=window
    )
    for i, (row, column) in enumerate(positions):
        score = lambda image, row=row, column=column: converted(image)["small"][0, target, row, column]  # noqa: E731
        encoded = timm_bcos.encode_image(x[i : i + 1], 3)
        expected = torch.zeros(SIZE, SIZE, dtype=torch.float64)
        for top in range(0, SIZE, window):
            for left in range(0, SIZE, window):
                hidden = encoded.clone()
                hidden[:, :, top : top + window, left : left + window] = 0
                drop = score(encoded) - score(hidden)
                expected[top : top + window, left : left + window] = 6 * drop.detach()
        torch.testing.assert_close(found[i].double(), expected, rtol=1e-5, atol=1e-6)  # captum adds in float32


def test_the_models_own_explanation_is_that_of_explain(converted: nn.Module, x: Tensor) -> None:
    cases: list[dict[str, Any]] = [
        dict(output="large", position=(3, 4)),
        dict(output="small", position=[(0, 1), (2, 3), (7, 7)]),
        dict(output="small"),
        dict(region=(0, 0, 16, 16)),
        dict(output="large", region=torch.rand(3, SIZE, SIZE) > 0.5),
        dict(layer="mixed"),
        dict(layer=converted.mixed, position=(1, 2)),
        dict(layer="stem", region=(8, 8, 16, 16)),
        dict(region=(0, 0, 16, 16), extra=dict(factor=torch.rand(3, 4, dtype=torch.float64))),
    ]
    for given in cases:
        for target in (1, [0, 2, 3], None):
            expected = explain(converted, x, target, **given).contribution_map
            torch.testing.assert_close(attribute(converted, x, target, **given), expected, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("kind", ["plain", "converted"])
@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_takes_positions_regions_and_layers_or_says_why_not(
    method: str, kind: str, request: pytest.FixtureRequest, x: Tensor
) -> None:
    """A batch gives what its images give alone."""
    model, options = request.getfixturevalue(kind), FEW.get(method, {})
    boxes = [(0, 0, 16, 16), (8, 8, 32, 32), (0, 16, 8, 32)]
    own = dict(layer="mixed") if method == "gradcam" else {}
    cases: list[dict[str, Any]] = [
        dict(output="small", region=boxes) | own,
        dict(output="large", position=(2, 3)) | own,
    ]
    cases[1]["output"] = "small" if method == "gradcam" else "large"
    if method != "gradcam":  # its layer is that of the feature maps
        cases.append(dict(layer="mixed"))
    for given in cases:
        if (method, kind) in REFUSED:
            with pytest.raises(MethodError):
                attribute(model, x, 1, method, **given, **options)
            continue
        maps = attribute(model, x, 1, method, **given, **options)
        assert maps.shape == (3, SIZE, SIZE) and maps.isfinite().all() and maps.flatten(1).any(1).all()
        single = given | (dict(region=boxes[1]) if "region" in given else {})
        alone = attribute(model, x[1:2], 1, method, **single, **options)
        torch.testing.assert_close(alone[0], maps[1], rtol=1e-9, atol=1e-12)


def test_relevance_of_a_region_is_shared_among_its_positions(plain: nn.Module, x: Tensor) -> None:
    """The relevance of a mean is the mean of the relevances of its positions, but for the stabilizer of the rules."""
    pytest.importorskip("zennit")
    region = attribute(plain, x[:1], 2, "lrp", output="small", region=(0, 0, 8, 4))
    singles = [attribute(plain, x[:1], 2, "lrp", output="small", position=(0, column)) for column in (0, 1)]
    assert region.abs().max() > 1e-4
    torch.testing.assert_close(region, (singles[0] + singles[1]) / 2, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("method", ["gradient", "occlusion", "bcos", "rise"])
def test_a_model_with_two_vectors(method: str, x: Tensor) -> None:
    """Vectors need no position, and all images go through the model together."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = enliven(timm.create_model("bcosify", arch="test_resnet", num_classes=4).double(), x)

        def forward(self, x: Tensor, shift: float = 0.0) -> tuple[Tensor, Tensor]:
            logits = self.model(x)
            return logits, 2 * logits + shift

    two, options = Two().eval(), FEW.get(method, {})
    first = attribute(two, x, [1, 2, 3], method, **options)
    assert torch.equal(attribute(two, x, [1, 2, 3], method, output=0, **options), first)
    second = attribute(two, x, [1, 2, 3], method, output=1, extra=dict(shift=3.0), **options)
    if method == "rise":  # of probabilities
        assert not torch.allclose(second, 2 * first)
    else:
        torch.testing.assert_close(second, 2 * first, rtol=1e-9, atol=1e-12)
    with pytest.raises(TargetError, match="output=2: Two returns 0, 1"):
        attribute(two, x, 1, method, output=2, **options)
    with pytest.raises(TargetError, match="has no map of positions"):
        attribute(two, x, 1, method, region=(0, 0, 8, 8), **options)


def test_transformers_methods_follow_attention_to_the_classifier(x: Tensor) -> None:
    model = enliven(timm.create_model("test_vit", img_size=SIZE, num_classes=4).double(), x)
    for method in ("chefer", "attention_rollout"):
        with pytest.raises(
            MethodError, match=f"{method} follows attention to the classifier: leave out layer, position"
        ):
            attribute(model, x, 1, method, layer="blocks.0")
    for method in ("attnlrp", "integrated_gradients"):
        maps = attribute(model, x, 1, method, layer="blocks.0", position=3, **FEW.get(method, {}))
        assert maps.shape == (3, SIZE, SIZE) and maps.any()
    second = attribute(model, x, 1, "gradient", layer="blocks.0", region=(16, 0, 32, 16))
    token = attribute(model, x, 1, "gradient", layer="blocks.0", position=2)  # behind the class token
    torch.testing.assert_close(second, token)


def test_patches_of_naflex_models() -> None:
    """Gradients and the model's own explanation of patches, folded, are those of the image."""
    torch.manual_seed(0)
    plain = timm.create_model("naflexvit_base_patch16_gap", depth=1, embed_dim=32, num_heads=2, num_classes=5)
    model = timm_bcos.bcosify(plain.double(), timm_bcos.BcosConfig.finetune(b=1.5, bias=True)).eval()
    x = real_image(SIZE, 1, torch.float64)
    patches = x.unflatten(3, (2, 16)).unflatten(2, (2, 16)).permute(0, 2, 4, 3, 5, 1).reshape(1, 4, -1)
    coord, valid = torch.tensor([[[0, 0], [0, 1], [1, 0], [1, 1]]]), torch.ones(1, 4, dtype=torch.bool)
    inputs: Any = dict(patches=patches, patch_coord=coord, patch_valid=valid)
    for method in ("bcos", "gradient", "input_x_gradient"):
        found, expected = attribute(model, inputs, 2, method), attribute(model, x, 2, method)
        torch.testing.assert_close(timm_bcos.fold_patches(found, coord), expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        (
            dict(),
            ModelStateError,
            r"returns \(3, 4, 8, 8\): attribution needs logits \(N, K\): say where with position=",
        ),
        (dict(output="middle"), TargetError, "output='middle': .* returns 'small', 'large'"),
        (dict(layer="nowhere"), TargetError, "no layer 'nowhere'"),
        (dict(layer=nn.ReLU()), TargetError, "not a module of this model"),
        (dict(position=(8, 0)), TargetError, "8 rows and 8 columns"),
        (dict(region=(3, 3, 3, 5)), TargetError, "region of image 0 is empty"),
        (dict(region=(0, 0, 8, 8), position=(0, 0)), TargetError, "a position or a region, not both"),
        (dict(output="small", targets=4), TargetError, "whole numbers from 0 to 3"),
        (dict(output="small", targets={1, 2}), TargetError, "give 3 classes"),
    ],
)
def test_requests_for_what_is_not_there(
    converted: nn.Module, x: Tensor, given: dict[str, Any], error: type[Exception], text: str
) -> None:
    given = dict(targets=1) | given
    for method in ("bcos", "gradient"):
        with pytest.raises(error, match=text):
            attribute(converted, x, method=method, **given)


def test_gradcam_takes_its_layer_as_a_module(x: Tensor) -> None:
    model = enliven(timm.create_model("test_resnet", num_classes=4), x.float())
    named = attribute(model, x.float(), 1, "gradcam", layer="layer2")
    assert torch.equal(attribute(model, x.float(), 1, "gradcam", layer=model.layer2), named)
    with pytest.raises(TargetError, match="not a module of this model"):
        attribute(model, x.float(), 1, "gradcam", layer=nn.ReLU())
    values = evaluate(model, x.float(), 1, "randomization", "gradcam", layer=model.layer2)
    assert torch.equal(values, evaluate(model, x.float(), 1, "randomization", "gradcam", layer="layer2"))


@pytest.mark.filterwarnings("ignore:the explanation is not exact")
@pytest.mark.parametrize("metric", [name for name in METRICS if name != "max_sensitivity"])
def test_metrics_are_those_of_the_score_that_is_asked_for(metric: str, converted: nn.Module, x: Tensor) -> None:
    """Those of a model that returns this score itself."""
    boxes, factor = [(0, 0, 16, 16), (8, 8, 32, 32), (0, 16, 8, 32)], 1 + torch.rand(3, 4, dtype=torch.float64)
    given: dict[str, Any] = dict(output="small", region=boxes, extra=dict(factor=factor))
    masks = torch.zeros(3, SIZE, SIZE)
    masks[:, 4:20, 8:30] = 1
    more = dict(masks=masks) if metric in NEEDING_MASKS else {}
    found = evaluate(converted, x, [1, 2, 3], metric, "bcos", **given, **more)

    class Scores(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = converted

        def forward(self, x: Tensor) -> Tensor:
            maps = self.model(x, factor)["small"]
            return torch.stack([mean_in_box(m, box) for m, box in zip(maps, boxes, strict=True)])

    expected = evaluate(Scores().eval(), x, [1, 2, 3], metric, "bcos", **more)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9, equal_nan=True)
    assert found.isfinite().any()


def test_metrics_of_positions_keep_them(converted: nn.Module, x: Tensor) -> None:
    found = evaluate(converted, x, 1, "max_sensitivity", "gradient", layer="mixed")
    place = explain(converted, x, 1, layer="mixed").position
    assert torch.equal(found, evaluate(converted, x, 1, "max_sensitivity", "gradient", layer="mixed", position=place))
    with pytest.raises(InputError, match="images must be in"):
        evaluate(converted, 255 * x, 1, "deletion", layer="mixed")
