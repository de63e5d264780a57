"""Publishing through the real Hub client, against a hub on loopback; the client reads HF_ENDPOINT when it starts."""

from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import timm_bcos
from tests.helpers import PHOTOS, hub_server, load_script, normalized, real_image
from tests.helpers.hub_server import Hub
from timm_bcos import BcosConfig, Card, InputError, ModelStateError, bcosify
from timm_bcos.models.bcos_models import _cfgs

Run = Callable[..., str]


@pytest.fixture
def python(python: Run) -> Run:
    """With the packages imported."""
    return lambda code, **environment: python(f"import timm, timm_bcos, torch\n{code}", **environment)


ARCHITECTURES = {
    "registered": "timm.create_model('bcos_cnn9', b=1.5, num_classes=4)",
    "by-arch": "timm.create_model('bcosify', arch='test_resnet', num_classes=4, logit_bias=-1.0)",
    "converted": "timm_bcos.bcosify(timm.create_model('test_vit', num_classes=4), "
    "timm_bcos.BcosConfig(b=1.5, positions='attention'))",
}


def test_published_networks_come_back(hub: Hub, python: Run, tmp_path: Path) -> None:
    x = real_image(160, 2)
    torch.save(x, tmp_path / "x.pt")
    publish = "".join(
        f"""
torch.manual_seed(0)
model = {code}.eval()
evaluation = timm_bcos.Evaluation(12.5, 'nothing', 'no command')
card = timm_bcos.Card('A test.', evaluation, photos=[{str(PHOTOS / "coffee.jpg")!r}])
print(timm_bcos.publish(model, 'org/{name}', card, label_names=['a', 'b', 'c', 'd']))
x = torch.load('x.pt')
e = timm_bcos.explain(model, x)
torch.save((model(x).detach(), e.weights, e.bias), '{name}.pt')
"""
        for name, code in ARCHITECTURES.items()
    )  # fmt: skip
    output = python(publish)
    assert output.count(f"{hub.url}/org/") == 3, output
    load = """
for name in %r:
    model = timm.create_model(f'hf-hub:org/{name}', pretrained=True).eval()
    x = torch.load('x.pt')
    e = timm_bcos.explain(model, x)
    expected = torch.load(f'{name}.pt')
    assert all(torch.equal(a, b) for a, b in zip((model(x), e.weights, e.bias), expected)), name
    print(name, 'is back', model.pretrained_cfg['label_names'], timm.data.resolve_model_data_config(model)['mean'])
"""
    output = python(load % list(ARCHITECTURES))
    assert output.count("is back ['a', 'b', 'c', 'd'] [0.0, 0.0, 0.0]") == 3, output
    files = hub.repositories["org/registered"].files
    assert sorted(files) == ["README.md", "bcos_timm.py", "config.json", "explanation.png", "model.safetensors"]
    readme = files["README.md"].decode()
    for part in ("12.50 % top-1 on nothing", "no command", 'create_model("hf-hub:org/registered"', "bohle2022bcos"):
        assert part in readme
    assert any(request.startswith("PUT /storage/") and request.endswith("/2") for request in hub.requests)  # parts


def test_refusals_leave_nothing_behind(hub: Hub, python: Run) -> None:
    publish = "timm_bcos.publish(timm.create_model('bcosify', arch='test_resnet', num_classes=4), 'org/new')"
    attempt = f"""
try:
    {publish}
except timm_bcos.PublishError as error:
    print('refused:', error)
"""
    output = python(attempt, HF_TOKEN="hf_wrong")
    assert "refused: cannot publish to org/new: " in output, output
    assert "401" in output, output
    assert "hf auth login" in output
    assert not hub.repositories
    hub.fail_commits = True
    assert "refused: cannot publish to org/new" in python(attempt)
    assert not hub.repositories["org/new"].files
    assert "refused: cannot publish to org/new" in python(attempt, HF_ENDPOINT="http://127.0.0.1:9")


def test_repositories_that_cannot_be_loaded(hub: Hub, python: Run, tmp_path: Path) -> None:
    folder = tmp_path / "repository"
    model = timm.create_model("bcosify", arch="test_resnet", num_classes=4).eval()
    timm_bcos.save_repository(model, folder, "org/whole")
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    weights = whole["model.safetensors"]
    hub.repositories = {
        "org/empty": hub_server.Repository({"config.json": whole["config.json"]}),
        "org/cut": hub_server.Repository({**whole, "model.safetensors": weights[: len(weights) // 2]}),
        "org/whole": hub_server.Repository(whole),
    }
    output = python("""
for name in ('empty', 'cut'):
    try:
        timm.create_model(f'hf-hub:org/{name}', pretrained=True)
    except timm_bcos.CheckpointError as error:
        print('refused:', error)
timm.create_model('hf-hub:org/whole', pretrained=True)
print('loaded')
""")
    for name in ("empty", "cut"):
        assert f"refused: cannot load weights from hf-hub:org/{name}" in output, output
    assert output.rstrip().endswith("loaded")


def test_official_weights_move_to_the_hub(hub: Hub, python: Run, tmp_path: Path) -> None:
    """Download, verification, conversion, upload and the note in the manifest; a second run has nothing to do."""
    publish = """
import sys, dataclasses, hashlib, pathlib
from tests.helpers import load_script
from tests.weights.test_pretrained import official_resnet
from timm_bcos.cli.exceptions import exit_status
from timm.models import _registry
torch.manual_seed(0)
weights, model = official_resnet()
model.get_classifier().temperature = 1.0
torch.save(weights, 'weights.pth')
digits = hashlib.sha256(pathlib.Path('weights.pth').read_bytes()).hexdigest()[:10]
name = f'resnet_18-{digits}.pth'
pathlib.Path('weights.pth').rename(name)
tagged = 'bcosv2_resnet18.mpi_in1k'
cfg = _registry._model_pretrained_cfgs[tagged]
_registry._model_pretrained_cfgs[tagged] = dataclasses.replace(cfg, url=pathlib.Path(name).resolve().as_uri())
script = load_script('publish_official')
manifest = pathlib.Path('hub.json')
manifest.write_text('{}')
script.HUB_FILE = timm_bcos.weights.catalog.HUB_FILE = manifest
for _ in range(2):
    print('end', exit_status(lambda: script.app(['org', tagged])))
print(manifest.read_text())
x = torch.rand(1, 3, 64, 64)
expected = model.eval()(x)
copy = timm.create_model('bcosv2_resnet18', pretrained=True, pretrained_cfg_overlay=dict(hf_hub_id=f'org/{tagged}'))
print('same', torch.equal(copy.eval()(x), expected))
lost = dict(hf_hub_id='org/lost')
fallback = timm.create_model(tagged, pretrained=True, pretrained_cfg_overlay=lost)
print('fallback', torch.equal(fallback.eval()(x), expected))
"""
    output = python(publish)
    assert output.count("end 0") == 2, output
    assert '"bcosv2_resnet18.mpi_in1k": "org/bcosv2_resnet18.mpi_in1k"' in output
    assert "same True" in output
    assert "fallback True" in output
    assert sum("/commit/main" in request for request in hub.requests) == 1
    assert (
        "68.70 % top-1 on ImageNet-1k" in hub.repositories["org/bcosv2_resnet18.mpi_in1k"].files["README.md"].decode()
    )


def test_the_manifest_comes_before_the_release(monkeypatch: pytest.MonkeyPatch) -> None:
    tagged = "bcosv2_resnet50.mpi_in1k"
    monkeypatch.setattr("timm_bcos.models.bcos_models.hub_addresses", lambda: {tagged: f"org/{tagged}"})
    cfgs = _cfgs()
    assert cfgs[tagged]["hf_hub_id"] == f"org/{tagged}"
    assert "hf_hub_id" not in cfgs["bcosv2_resnet34.mpi_in1k"]


def test_folders_keep_weights_in_half_precision(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("bcosify", arch="test_resnet", num_classes=4).eval()
    timm_bcos.save_repository(model, tmp_path / "full", "org/name")
    timm_bcos.save_repository(model, tmp_path / "half", "org/name", dtype=torch.float16)
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("full", "half")]
    assert sizes[1] < 0.6 * sizes[0]
    half = timm.create_model(f"local-dir:{tmp_path / 'half'}", pretrained=True).eval()
    x = real_image(160)
    torch.testing.assert_close(half(x), model(x), rtol=0.02, atol=1e-3)
    assert model(x).dtype == torch.float32


def test_what_timm_cannot_create_again(tmp_path: Path) -> None:
    own = bcosify(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(1), nn.Linear(8, 2)),
                  BcosConfig(mean=(0.5,) * 3, std=(0.5,) * 3))  # fmt: skip
    with pytest.raises(ModelStateError, match="timm cannot create"):
        timm_bcos.save_repository(own, tmp_path / "own", "org/own")
    with pytest.raises(ModelStateError, match="not a B-cos model"):
        timm_bcos.save_repository(timm.create_model("test_resnet"), tmp_path / "plain", "org/plain")
    config = BcosConfig(b=1.5, mean=(0.1, 0.1, 0.1), std=(0.3, 0.3, 0.3))
    renormalized = bcosify(timm.create_model("test_resnet"), config).eval()
    timm_bcos.save_repository(renormalized, tmp_path / "config", "org/config")  # the config says it
    elsewhere = timm.create_model("test_resnet")
    elsewhere.pretrained_cfg = {**elsewhere.pretrained_cfg, "mean": (0.1, 0.1, 0.1)}
    with pytest.raises(ModelStateError, match="differs after loading"):
        timm_bcos.save_repository(bcosify(elsewhere).eval(), tmp_path / "config", "org/elsewhere")
    kept = timm.create_model(f"local-dir:{tmp_path / 'config'}", pretrained=True)
    assert torch.equal(kept.fc.weight, renormalized.fc.weight)
    files = {"README.md", "bcos_timm.py", "config.json", "model.safetensors"}
    assert {file.name for file in (tmp_path / "config").iterdir()} == files
    with pytest.raises(InputError, match="2 label names for a model of 1000"):
        timm_bcos.save_repository(renormalized, tmp_path / "labels", "org/labels", label_names=["a", "b"])
    assert not (tmp_path / "labels").exists()


def test_missing_photos_of_the_card_are_named(tmp_path: Path) -> None:
    model = timm.create_model("bcosify", arch="test_resnet", num_classes=4).eval()
    with pytest.raises(InputError, match=r"photo none\.jpg for the model card: no such file"):
        timm_bcos.save_repository(model, tmp_path / "x", "org/name", Card(photos=["none.jpg"]))
    assert list((tmp_path / "x").iterdir()) == []


def test_only_official_weights_are_official() -> None:
    with pytest.raises(InputError, match=r"no official weights called nothing; there are bcos_cnn9\.mpi_cifar10, "):
        load_script("publish_official").official(["nothing"])


def test_a_plain_network_of_the_hub_is_converted(hub: Hub, python: Run, tmp_path: Path) -> None:
    """`arch="hf-hub:..."`, and the same name where the command line takes one, compute what the plain network does."""
    plain, x = timm.create_model("test_resnet", num_classes=4).eval(), real_image(64)
    timm.models.save_for_hf(plain, tmp_path / "plain", safe_serialization=True)
    files = {file.name: file.read_bytes() for file in (tmp_path / "plain").iterdir()}
    hub.repositories["org/plain"] = hub_server.Repository(files=files)
    torch.save((x, plain(normalized(x, plain.pretrained_cfg)).detach()), tmp_path / "expected.pt")
    code = """
from timm_bcos.models.loading import load_model
x, expected = torch.load("expected.pt")
model = timm.create_model("bcosify", arch="hf-hub:org/plain", pretrained=True, b=1, bias=True).eval()
for network in (model, load_model("hf-hub:org/plain").eval()):
    torch.testing.assert_close(network(x), expected)
print("same function")
try:
    timm.create_model("bcosify", arch="hf-hub:org/absent")
except timm_bcos.CheckpointError as error:
    print(error)
"""
    output = python(code)
    assert "same function" in output, output
    assert "cannot read the config of hf-hub:org/absent" in output
