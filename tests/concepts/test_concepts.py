"""Concepts: logit = concepts + rest + other, and each concept = pixels; beside literal sums in float64."""

import re
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn
from typer.testing import CliRunner

from tests.helpers import PHOTOS, enliven, normalized, real_image
from timm_bcos import (
    BcosConfig,
    Explanation,
    InexactWarning,
    InputError,
    TargetError,
    bcosify,
    explain,
    explanation_mode,
)
from timm_bcos.cli.app import app
from timm_bcos.concepts.decomposition import explain_concepts
from timm_bcos.concepts.dictionary import Concepts
from timm_bcos.concepts.figures import class_shares
from timm_bcos.concepts.learning import learn_concepts
from timm_bcos.data.datasets import image_loader, load_dataset

SIZE = 64
LAYERS = {"test_resnet": "layer2", "test_vit": "blocks.1", "test_convnext": "stages.1"}

CLOTHES = "bcos_efficientnet_lite0.clothing"


@pytest.fixture(scope="module")
def x() -> Tensor:
    return real_image(SIZE, 2, torch.float64)


def converted(name: str, x: Tensor) -> nn.Module:
    kwargs = dict(img_size=SIZE) if "vit" in name else {}
    plain = timm.create_model(name, **kwargs).double()
    enliven(plain, normalized(x, plain.pretrained_cfg))
    return bcosify(plain, BcosConfig.finetune(b=1.5, bias=True)).eval()


def features(model: nn.Module, layer: str, x: Tensor) -> Tensor:
    found: list[Tensor] = []
    handle = model.get_submodule(layer).register_forward_hook(lambda module, args, output: found.append(output))
    model(x)
    handle.remove()
    return found[0].flatten(2) if found[0].ndim == 4 else found[0].mT


def some(layer: str, channels: int, gate: str) -> Concepts:
    decoder, encoder = torch.randn(2, 6, channels, dtype=torch.float64)
    if gate == "none":
        return Concepts.from_matrix(layer, decoder)
    return Concepts(layer, decoder, encoder if gate == "top" else decoder, gate, active=2)


@pytest.mark.parametrize("gate", ["none", "top", "nearest"])
@pytest.mark.parametrize("name", LAYERS)
def test_both_steps_are_exact(name: str, gate: str, x: Tensor) -> None:
    model, layer = converted(name, x), LAYERS[name]
    maps = features(model, layer, x)
    concepts = some(layer, maps.shape[1], gate)
    account = explain_concepts(model, x, concepts, target=3, top=6)
    assert account.completeness_error.max() <= 1e-10
    torch.testing.assert_close(account.explanation.weights, explain(model, x, 3).weights)
    assert account.shares.abs().max() > 1e-3 * account.explanation.logit.abs().max()
    assert (account.rest.abs() > 1e-6 * account.shares.abs().amax(1)).all()  # six directions span no layer
    for explanation, column in zip(account.pixels, account.strongest.T, strict=True):
        torch.testing.assert_close(explanation.logit, account.shares.gather(1, column[:, None])[:, 0])
        assert explanation.completeness_error.max() <= 1e-10
    assert account.pixels[0].plot().axes[1].get_title().startswith(f"concepts of {layer}, unit")


def test_shares_are_slopes_times_concepts(x: Tensor) -> None:
    """Position by position and concept by concept."""
    model, layer = converted("test_resnet", x), "layer3"
    concepts = some(layer, features(model, layer, x).shape[1], "top")
    account = explain_concepts(model, x, concepts, target=5, top=0)
    assert account.pixels == []
    found: list[Tensor] = []
    handle = model.get_submodule(layer).register_forward_hook(lambda module, args, output: found.append(output))
    with explanation_mode(model) as linear:
        logit = linear(x.clone().requires_grad_())[:, 5].sum()
    handle.remove()
    slopes = torch.autograd.grad(logit, found[0])[0].flatten(2)
    maps = found[0].detach().flatten(2)
    for image in range(2):
        expected = [0.0] * 6
        for position in range(maps.shape[2]):
            scores = (concepts.encoder @ maps[image, :, position]).tolist()
            for concept in sorted(range(6), key=scores.__getitem__)[-2:]:
                slope = float(concepts.decoder[concept] @ slopes[image, :, position])
                expected[concept] += max(scores[concept], 0.0) * slope
        torch.testing.assert_close(account.shares[image].tolist(), expected, rtol=1e-9, atol=1e-12)


def test_all_channels_leave_no_rest(x: Tensor) -> None:
    model = converted("test_resnet", x)
    channels = features(model, "layer3", x).shape[1]
    account = explain_concepts(model, x, Concepts.of_channels("layer3", channels), top=1)
    assert account.rest.abs().max() <= 1e-12 * account.shares.abs().sum(1).max()
    assert account.completeness_error.max() <= 1e-10


def test_what_goes_around_the_layer_is_told(x: Tensor) -> None:
    """A layer inside a residual block: the shortcut passes it by."""
    model = converted("test_resnet", x)
    layer = "layer4.0.conv2"
    channels = features(model, layer, x).shape[1]
    account = explain_concepts(model, x, Concepts.of_channels(layer, channels), top=1)
    assert (account.other.abs() > 1e-3 * account.explanation.logit.abs()).all()
    assert account.completeness_error.max() <= 1e-10


def test_float32(x: Tensor) -> None:
    model = converted("test_resnet", x).float()
    concepts = some("layer2", features(model, "layer2", x.float()).shape[1], "none")
    account = explain_concepts(model, x.float(), concepts, top=3)
    assert account.completeness_error.max() <= 1e-4
    assert max(one.completeness_error.max() for one in account.pixels) <= 1e-4


def test_concepts_of_matrices_are_projections() -> None:
    """Within their span nothing is left, whatever their lengths and angles."""
    directions = torch.tensor([[2.0, 0, 0], [1.0, 1.0, 0]])
    concepts = Concepts.from_matrix("layer", directions)
    inside = torch.tensor([3.0, -2.0, 0.0])[None, :, None]
    torch.testing.assert_close(concepts.decode(concepts.encode(inside)), inside)
    outside = torch.tensor([0.0, 0.0, 1.0])[None, :, None]
    assert concepts.encode(outside).abs().max() < 1e-6


def test_gates_by_hand() -> None:
    eye = torch.eye(3)
    maps = torch.tensor([[3.0, -1.0], [2.0, -5.0], [-4.0, -2.0]])[None]
    top = Concepts("layer", eye, eye, "top", active=2)
    torch.testing.assert_close(top.encode(maps), torch.tensor([[3.0, 0], [2.0, 0], [0, 0]])[None])
    nearest = Concepts("layer", eye, eye, "nearest")
    torch.testing.assert_close(nearest.encode(maps), torch.tensor([[3.0, -1.0], [0, 0], [0, 0]])[None])


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of photos."""
    import shutil

    root = tmp_path_factory.mktemp("photos")
    for path in sorted((PHOTOS / "clothes").glob("*.jpg")):
        folder = root / ("upper" if path.stem in ("hat", "jacket") else "lower")
        folder.mkdir(exist_ok=True)
        shutil.copy(path, folder)
    return root


@pytest.mark.parametrize("method", ["nmf", "kmeans", "sae", "channels"])
def test_learned_concepts_explain_the_features(method: str, photos: Path) -> None:
    """Better than as many random directions do, and exactly in any case; saved and read again."""
    model = timm.create_model("bcos_efficientnet_lite0.clothing", pretrained=True).eval()
    dataset = load_dataset(str(photos), 2)
    concepts = learn_concepts(model, dataset, "blocks.4", 8, method, vectors=300, progress=False)
    x = real_image(160)
    maps = features(model, "blocks.4", x)
    own = concepts.decode(concepts.encode(maps))
    chance = Concepts.from_matrix("blocks.4", torch.randn(len(concepts), maps.shape[1]))
    if method != "channels":
        assert len(concepts) == 8
        assert (maps - own).norm() < (maps - chance.decode(chance.encode(maps))).norm()
    account = explain_concepts(model, x, concepts, top=2)
    assert account.completeness_error.max() <= 1e-4
    assert max(one.completeness_error.max() for one in account.pixels) <= 1e-4
    path = photos / f"{method}.safetensors"
    concepts.save(path)
    again = Concepts.load(path)
    torch.testing.assert_close(again.decoder, concepts.decoder)
    assert (again.layer, again.gate, again.method) == ("blocks.4", concepts.gate, method)


def test_stacks_with_other_concepts(x: Tensor) -> None:
    model = converted("test_resnet", x)
    concepts = some("layer2", features(model, "layer2", x).shape[1], "none")
    account = explain_concepts(model, x, concepts, top=2)
    assert len(Explanation.stack(account.pixels)) == 4


def test_wrong_concepts(x: Tensor, tmp_path: Path) -> None:
    model = converted("test_resnet", x)
    with pytest.raises(InputError, match=re.escape("the concepts have 5 channels, layer 'layer2' has")):
        explain_concepts(model, x, Concepts.from_matrix("layer2", torch.randn(2, 5)))
    with pytest.raises(TargetError, match="no layer 'layer9'"):
        explain_concepts(model, x, Concepts.from_matrix("layer9", torch.randn(2, 5)))
    with pytest.raises(InputError, match="top=-1: give the number of concepts"):
        explain_concepts(model, x, Concepts.of_channels("layer2", 48), top=-1)
    for directions, text in (
        (torch.randn(3), "directions of shape (3,): give a floating-point matrix (K, C)"),
        (torch.zeros(2, 3), "a direction is 0: leave it out"),
    ):
        with pytest.raises(InputError, match=re.escape(text)):
            Concepts.from_matrix("layer", directions)
    eye = torch.eye(3)
    for kwargs, text in (
        (dict(encoder=eye[:2]), "decoder (3, 3), encoder (2, 3): give two matrices of the same shape (K, C)"),
        (dict(encoder=eye / 0), "decoder or encoder has numbers that are not finite"),
        (dict(gate="open"), "gate='open': choose one of none, top, nearest"),
        (dict(gate="top", active=4), "active=4: give a number from 1 to the number of concepts, 3"),
    ):
        with pytest.raises(InputError, match=re.escape(text)):
            Concepts(**(dict(layer="layer", decoder=eye, encoder=eye) | kwargs))
    (tmp_path / "text.safetensors").write_text("no concepts")
    with pytest.raises(InputError, match=r"text.safetensors is not a file of concepts"):
        Concepts.load(tmp_path / "text.safetensors")


def test_without_scikit_learn(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = timm.create_model("bcos_efficientnet_lite0.clothing", pretrained=True).eval()
    dataset = load_dataset(str(photos), 2)
    monkeypatch.setitem(sys.modules, "sklearn.decomposition", None)
    with pytest.raises(InputError, match=re.escape("pip install 'timm_bcos[concepts]'")):
        learn_concepts(model, dataset, "blocks.4", 2, vectors=50, progress=False)
    with pytest.raises(InputError, match="method='magic': choose one of nmf, kmeans, sae, channels"):
        learn_concepts(model, dataset, "blocks.4", 2, "magic", progress=False)
    with pytest.raises(InputError, match="60 concepts from 8 feature vectors"):
        learn_concepts(model, dataset, "blocks.4", 60, vectors=8, progress=False)


def test_shares_of_classes(photos: Path) -> None:
    """The mean over a class's images of each image's account, towards its own class."""
    model = timm.create_model("bcos_efficientnet_lite0.clothing", pretrained=True).eval()
    dataset = load_dataset(str(photos), 2)
    concepts = Concepts.from_matrix("blocks.4", torch.randn(3, 112))
    found = class_shares(model, dataset, concepts, 10, batch_size=3, progress=False)
    assert found.shape == (10, 5) and found[2:].isnan().all()
    for label in (0, 1):
        logits = []
        for i in range(len(dataset)):
            image, own = image_loader(model, dataset)(i)
            if own == label:
                logits.append(model(image[None])[0, label].item())
        assert len(logits) == 2
        assert float(found[label].sum()) == pytest.approx(sum(logits) / 2, rel=1e-4)


def test_from_the_command_line(photos: Path, tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("\n".join(["lower", "upper", *map(str, range(8))]))
    class_map = tmp_path / "map.txt"
    class_map.write_text(names.read_text())
    arguments = [
        "concepts", PHOTOS / "coffee.jpg", "--model", CLOTHES, "--layer", "blocks.4", "--data-dir", photos,
        "--class-map", class_map, "--classes", names, "--count", 3, "--images", 2, "--top", 2,
        "--out", tmp_path / "out",
    ]  # fmt: skip
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    assert len(re.findall(r"concept \d [+-][\d.]+", result.output)) == 2
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"coffee.png", "concepts.safetensors", "shares.csv", "wall.png"}
    header, *rows = (tmp_path / "out" / "shares.csv").read_text().splitlines()
    assert header.startswith("concept,lower,upper") and len(rows) == 5
    assert len(Concepts.load(tmp_path / "out" / "concepts.safetensors")) == 3


def test_no_picture_of_the_users_is_overwritten(photos: Path, tmp_path: Path) -> None:
    """A photo in the directory of the output that has the name of what is written."""
    out = tmp_path / "out"
    out.mkdir()
    mine = out / "wall.png"
    Image.open(PHOTOS / "coffee.jpg").save(mine)
    before = mine.read_bytes()
    class_map = tmp_path / "map.txt"
    class_map.write_text("\n".join(["lower", "upper", *map(str, range(8))]))
    arguments = [
        "concepts", mine, "--model", CLOTHES, "--layer", "blocks.4", "--data-dir", photos,
        "--class-map", class_map, "--method", "kmeans", "--count", 2, "--images", 1, "--top", 1, "--out", out,
    ]  # fmt: skip
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    assert mine.read_bytes() == before
    assert {path.name for path in out.glob("*.png")} == {"wall.png", "wall_2.png", "wall_3.png"}


class PositionsFirst(nn.Module):
    """A constant is added to sequences (L, N, C), where nothing tells positions from images; `leak` adds a gate."""

    def __init__(self, leak: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 32, stride=32)
        self.mixed, self.fc = nn.Linear(6, 6), nn.Linear(6, 4)
        self.leak = leak

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.mixed(self.conv(x).flatten(2).permute(2, 0, 1)).mean(0)
        return self.fc(tokens) + (tokens.sigmoid().sum(1, keepdim=True) if self.leak else 0.0)


def sequences(leak: bool) -> nn.Module:
    config = BcosConfig(mean=(0.5,), std=(0.5,), bias=True, b=1.5)
    return bcosify(PositionsFirst(leak).double(), config).eval()


def test_images_are_taken_one_by_one_where_the_layout_does_not_tell_them() -> None:
    model, x = sequences(False), torch.rand(4, 3, 64, 64, dtype=torch.float64)
    account = explain_concepts(model, x, some("conv", 6, "top"), 2, top=2)
    assert account.completeness_error.max() <= 1e-10 and len(account.pixels) == 2
    singles = [explain_concepts(model, x[i : i + 1], account.concepts, 2, top=2) for i in range(4)]
    for name in ("shares", "rest", "other", "strengths", "strongest"):
        torch.testing.assert_close(getattr(account, name), torch.cat([getattr(one, name) for one in singles]))
    for column, pixels in enumerate(account.pixels):
        assert len(pixels) == 4 and pixels.completeness_error.max() <= 1e-10
        torch.testing.assert_close(pixels.weights[3], singles[3].pixels[column].weights[0])
    torch.testing.assert_close(account.explanation.bias, explain(model, x, 2).bias)


def test_an_account_that_is_not_exact_warns() -> None:
    x = torch.rand(1, 3, 64, 64, dtype=torch.float64)
    with pytest.warns(InexactWarning, match="adds a value that depends on the image") as caught:
        explain_concepts(sequences(True), x, some("conv", 6, "top"), 2)
    assert caught[0].filename == __file__
