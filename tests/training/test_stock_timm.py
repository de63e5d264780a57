"""timm as it is, with and without our import: its train.py, and its loading from the Hub and from a folder."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

import timm_bcos
from tests.helpers import SCRIPTS, hub_server, real_image
from timm_bcos.models.loading import load_model

# timm's package does not bring its scripts: TIMM_SCRIPTS is the root of a copy of its repository
TRAIN_SCRIPT = Path(os.environ.get("TIMM_SCRIPTS", "")) / "train.py"
needs_train_script = pytest.mark.skipif(
    not TRAIN_SCRIPT.is_file(), reason="TIMM_SCRIPTS names no folder with timm's train.py"
)
COMMON = "--num-classes 2 --device cpu -j 0 --no-prefetcher -b 4 --epochs 1 --warmup-epochs 0 --opt adamw --lr 1e-3"
ARCHITECTURES = {
    "registered": ["--model", "bcos_cnn9"],
    "by-arch": ["--model", "bcosify", "--model-kwargs", "arch=test_resnet", "b=1.5", "--input-size", "3", "32", "32"],
}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two classes: squares of one photo and of another."""
    for label, name in enumerate(("coffee", "rocket")):
        photo = Image.open(SCRIPTS / "photos" / f"{name}.jpg").convert("RGB")
        for split, count in (("train", 8), ("validation", 4)):
            folder = tmp_path / "data" / split / str(label)
            folder.mkdir(parents=True)
            for k in range(count):
                photo.crop((20 * k, 30 * k, 20 * k + 64, 30 * k + 64)).resize((32, 32)).save(folder / f"{k}.png")
    return tmp_path / "data"


def train(data: Path, *arguments: str) -> str:
    result = subprocess.run(
        [sys.executable, "-W", "ignore", str(TRAIN_SCRIPT), "--data-dir", str(data), *COMMON.split(), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPTS.parent)},
        cwd=data.parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return result.stdout + result.stderr


@needs_train_script
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_train_py_imports_the_package_by_its_own_option(name: str, data: Path) -> None:
    output = train(data, "--device-modules", "timm_bcos", *ARCHITECTURES[name], "--output", "out", "--experiment", name)
    checkpoint = data.parent / "out" / name / "last.pth.tar"
    assert checkpoint.is_file(), output
    model = load_model(checkpoint=checkpoint).eval()
    assert model.bcos_config.b == (1.5 if name == "by-arch" else 2)
    assert timm_bcos.explain(model, real_image(32)).completeness_error.max() < 1e-4


@needs_train_script
def test_train_py_without_the_option_does_not_know_the_networks(data: Path) -> None:
    assert "Unknown model (bcos_cnn9)" in train(data, *ARCHITECTURES["registered"])


UNKNOWN = """
for address in torch.load("expected.pt")[1]:
    try:
        timm.create_model(address, pretrained=True)
    except RuntimeError as error:
        print(error)
"""
KNOWN = """
x, addresses, expected = torch.load("expected.pt")
for address, name in addresses.items():
    print(torch.equal(timm.create_model(address, pretrained=True).eval()(x), expected[name]))
"""


def test_timm_loads_from_the_hub_and_a_folder_once_the_package_is_imported(
    hub: hub_server.Hub, python: Callable[[str], str], tmp_path: Path
) -> None:
    """Without the import it says which model it does not know, and no more."""
    x, addresses, expected = real_image(64), {}, {}
    for name, kwargs in (("bcos_cnn9", {}), ("bcosify", dict(arch="test_resnet"))):
        model = timm.create_model(name, num_classes=4, **kwargs).eval()
        timm_bcos.save_repository(model, tmp_path / name, f"org/{name}")
        files = {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()}
        hub.repositories[f"org/{name}"] = hub_server.Repository(files)
        addresses |= {f"hf-hub:org/{name}": name, f"local-dir:{tmp_path / name}": name}
        expected[name] = model(x).detach()
    torch.save((x, addresses, expected), tmp_path / "expected.pt")
    assert python(f"import timm, torch\n{UNKNOWN}").splitlines() == [
        f"Unknown model ({name})" for name in addresses.values()
    ]
    assert python(f"import timm, timm_bcos, torch\n{KNOWN}").splitlines() == ["True"] * len(addresses)
