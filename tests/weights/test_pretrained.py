"""Published weights: their formats, their download, and what is refused."""

import functools
import hashlib
import http.server
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

import timm_bcos
from tests.helpers import enliven, load_script, real_image
from tests.helpers.literal_models import LiteralNetwork
from tests.helpers.slow import slow_but_for
from timm_bcos.conversion.settings import SETTINGS
from timm_bcos.models.architectures import SECOND_PAPER
from timm_bcos.nn.layers import BcosConv2d
from timm_bcos.nn.stems import BcosStem
from timm_bcos.weights.catalog import PUBLISHED

compare_official = load_script("compare_official")

# One of each kind; `scripts/benchmarks/compare_official.py` compares all of them.
V2_KINDS = [
    "bcosv2_resnet18",
    "bcosv2_resnet50",
    "bcosv2_resnext50_32x4d",
    "bcosv2_densenet121",
    "bcosv2_densenet161",
    "bcosv2_vgg11_bn",
    "bcosv2_convnext_tiny",
    "bcosv2_convnext_tiny_bnu",
    "bcosv2_vit_tiny_patch16_224",
    "bcosv2_vit_small_patch16_224",
    "bcosv2_vitc_tiny_patch1_14",
    "bcosv2_vitc_small_patch1_14",
]

# of each family, and of each format, the smallest; VGG has a test of its own
V2_SMALL = {
    "bcosv2_resnet18",
    "bcosv2_densenet121",
    "bcosv2_convnext_tiny",
    "bcosv2_convnext_tiny_bnu",
    "bcosv2_vit_tiny_patch16_224",
    "bcosv2_vitc_tiny_patch1_14",
}


@pytest.mark.parametrize("name", slow_but_for(V2_SMALL, V2_KINDS))
def test_agrees_with_the_official_code_on_official_files(name: str) -> None:
    pytest.importorskip("bcos.models.pretrained")
    pytest.importorskip("einops")
    logits, contributions = compare_official.compare(name, real_image(64, dtype=torch.float64))
    assert contributions <= 1e-10
    assert logits <= 1e-8  # subtracting a logit bias of 7 from a faint signal costs digits


def test_a_narrow_vgg_agrees_with_the_official_code() -> None:
    """VGG with 40 instead of 4096 hidden units in its classifier; the whole one takes gigabytes."""
    pytest.importorskip("bcos.models.pretrained")
    from bcos.modules import BcosConv2d as OfficialConv2d

    def layer(inputs: int, outputs: int, **kwargs: object) -> nn.Module:
        narrow = {(512, 4096): (512, 40), (4096, 4096): (40, 4096)}
        return OfficialConv2d(*narrow.get((inputs, outputs), (inputs, outputs)), **kwargs)

    x = real_image(64, dtype=torch.float64)
    errors = compare_official.compare("bcosv2_vgg11_bn", x, dict(conv_layer=layer), mlp_ratio=40 / 4096)
    assert max(errors) <= 1e-10


def test_the_comparison_notices_a_wrong_weight() -> None:
    """A small change of one layer is a large error: the test above can fail."""
    x = timm_bcos.encode_image(real_image(64, dtype=torch.float64), 3).requires_grad_()
    theirs = compare_official.official_network("resnet18", x.detach())
    ours = timm.create_model("bcosv2_resnet18").double().eval()
    ours.load_state_dict(timm_bcos.weights.formats.convert_official_weights(theirs.state_dict(), ours))
    with torch.no_grad():
        ours.layer3[0].conv1.weight[0] *= -1
    assert min(compare_official._compare(ours, theirs, x)) > 1e-5


def test_every_entry_of_the_official_list_has_a_counterpart() -> None:
    entries = pytest.importorskip("bcos.models.pretrained").list_available()
    ours = {compare_official.official_name(name) for name in SECOND_PAPER}
    assert {entry.removesuffix("_long") for entry in entries if not entry.startswith("standard_")} == ours
    tags = [weights.tag for name in SECOND_PAPER for weights in PUBLISHED[name]]
    assert (len(tags), tags.count("mpi_long_in1k")) == (26, 3)


def test_published_addresses_and_hashes_are_the_official_ones() -> None:
    urls = pytest.importorskip("bcos.models.pretrained").URLS
    theirs = {url for group in urls.values() for key, url in group.items() if "standard_" not in url}
    assert {weights.url for name in SECOND_PAPER for weights in PUBLISHED[name]} == theirs


# The first paper's format. The networks' literal twins are written from their description alone.


def v1_weights(model: nn.Module) -> dict[str, Tensor]:
    """A state dict as the first release names it: `Sequential(network, pool, final)`, weights inside `linear`."""
    weights = {}
    for name, value in model.state_dict().items():
        name = re.sub(r"pre_logits\.fc(\d)", lambda match: f"classifier.{int(match[1]) - 1}", name)
        if hasattr(model, "pre_logits"):
            name = name.replace("head.fc", "classifier.2")
        weights[f"0.{name.removesuffix('.weight')}.linear.weight"] = value.clone()
    if "0.classifier.2.linear.weight" in weights:
        return _without_gaps(weights)
    if "0.features.7.linear.weight" in weights and "0.fc.linear.weight" in weights:
        return {f"{i}.linear.weight": value for i, value in enumerate(weights.values())}
    return weights


def _without_gaps(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The release's VGG counts convolutions and pools, timm's also activations."""
    places = {"0": 0, "3": 2, "6": 4, "8": 5, "11": 7, "13": 8, "16": 10, "18": 11}
    return {
        re.sub(r"0\.features\.(\d+)", lambda match: f"0.features.{places[match[1]]}", name): value
        for name, value in weights.items()
    }


V1 = {
    "bcos_resnet34": (64, dict(scale=100), "resnet34", 10.0),
    "bcos_densenet121": (64, dict(scale=100), "densenet121", 1e-3),
    "bcos_vgg11": (32, dict(scale=1000), "vgg11", 0.1),
    "bcos_inception_v3": (96, dict(scale=200), "inception_v3", 1.0),
    "bcos_cnn9": (32, dict(scale=0, gamma=10**1.25), "nine_layers", 1e2),
    "bcos_cnn9_b150": (32, dict(scale=0, gamma=10**0.5, b=1.5), "nine_layers", 1e-2),
    "bcos_cnn9_b225": (32, dict(scale=0, gamma=10**1.625, b=2.25), "nine_layers", 1e2),
}


# VGG's classifier, with fewer hidden units
NARROW: dict[str, dict[str, float]] = {"bcos_vgg11": dict(mlp_ratio=0.01)}
WHOLE = pytest.param("bcos_vgg11", {}, marks=pytest.mark.slow, id="bcos_vgg11-whole")


@pytest.mark.parametrize(("name", "kwargs"), [*((name, NARROW.get(name, {})) for name in V1), WHOLE])
def test_first_paper_agrees_with_its_literal_twin_on_official_files(
    name: str, kwargs: dict[str, float], tmp_path: Path
) -> None:
    """Logits without their bias, and contributions, of a file in the first release's format."""
    size, settings, method, temperature = V1[name]
    weights = v1_weights(timm.create_model(name, **kwargs))
    if name == "bcos_inception_v3":  # the release's file has the auxiliary head, timm's default network has not
        weights["0.AuxLogits.fc.linear.weight"] = torch.rand(2000, 768, 1, 1)
    torch.save(weights, tmp_path / "state_dict.pkl")
    overlay = dict(file=str(tmp_path / "state_dict.pkl"))
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).eval().double()
    x = real_image(size, dtype=torch.float64)
    explanation = model.explain(x)
    del model  # VGG's float64 weights are 2 GB: one network at a time
    literal = LiteralNetwork(weights, **settings)
    del weights
    encoded = timm_bcos.encode_image(x, 3).requires_grad_()
    signal = getattr(literal, method)(encoded) / temperature
    (gradient,) = torch.autograd.grad(signal[0, explanation.target], encoded)
    assert signal.abs().max() > 0
    logits = compare_official.relative_error(explanation.logits - explanation.logit_bias, signal.detach())
    contributions = compare_official.relative_error(explanation.contributions, (gradient * encoded).detach())
    print(f"| `{name}` | {logits:.1e} | {contributions:.1e} |")
    assert max(logits, contributions) <= 1e-5


@functools.cache
def official_resnet() -> tuple[dict[str, Tensor], nn.Module]:
    """A file in the v2 format, and the network that it is of."""
    model = enliven(timm.create_model("bcosv2_resnet18"), real_image(64, 2)).eval()
    weights = {}
    for name, value in model.state_dict().items():
        is_layer = isinstance(model.get_submodule(name.rpartition(".")[0]), BcosConv2d)
        weights[name.replace(".weight", ".linear.weight") if is_layer else name] = value.clone()
        if name.endswith("running_var"):
            weights[name.replace("running_var", "running_mean")] = torch.randn_like(value)
    return weights, model


@pytest.fixture
def official_file(tmp_path: Path) -> Path:
    torch.save(official_resnet()[0], tmp_path / "resnet_18.pth")
    return tmp_path / "resnet_18.pth"


def load(file: Path, **kwargs: object) -> nn.Module:
    overlay = dict(file=str(file))
    return timm.create_model("bcosv2_resnet18", pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).eval()


def test_official_file_loads(official_file: Path) -> None:
    model = load(official_file)
    for name, value in official_resnet()[1].state_dict().items():
        if not name.endswith("num_batches_tracked"):
            torch.testing.assert_close(model.state_dict()[name], value)


def test_our_own_file_loads(tmp_path: Path) -> None:
    model = official_resnet()[1]
    torch.save(model.state_dict(), tmp_path / "ours.pth")
    loaded = load(tmp_path / "ours.pth")
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())


def test_other_classes_get_a_new_head(official_file: Path) -> None:
    model = load(official_file, num_classes=10)
    assert model(real_image(64)).shape == (1, 10)
    assert torch.equal(model.layer4[0].conv1.weight, official_resnet()[1].layer4[0].conv1.weight)
    headless = load(official_file, num_classes=0)
    torch.testing.assert_close(
        headless(real_image(64)), official_resnet()[1].forward_head(headless.forward_features(real_image(64)), True)
    )


@pytest.mark.parametrize("channels", [1, 4])
def test_other_image_channels_get_an_adapted_stem(official_file: Path, channels: int) -> None:
    """As timm adapts, the image's half and its complement's each: one channel is the sum, more repeat."""
    stem = load(official_file, in_chans=channels).conv1
    theirs = official_resnet()[1].conv1.weight
    assert isinstance(stem, BcosStem) and stem.weight.shape[1] == 2 * channels
    for half, (ours, original) in enumerate(zip(stem.weight.chunk(2, 1), theirs.chunk(2, 1), strict=True)):
        expected = original.sum(1) if channels == 1 else original[:, 0] * 3 / 4
        torch.testing.assert_close(ours[:, 0], expected, msg=f"half {half}")


def test_features_only(official_file: Path) -> None:
    features = load(official_file, features_only=True)
    expected = official_resnet()[1].forward_intermediates(real_image(64), intermediates_only=True)
    for ours, theirs in zip(features(real_image(64)), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_hub_and_in_memory_weights_take_the_same_way(tmp_path: Path, official_file: Path) -> None:
    overlay = dict(state_dict=official_resnet()[0])
    model = timm.create_model("bcosv2_resnet18", pretrained=True, pretrained_cfg_overlay=overlay)
    assert torch.equal(model.fc.weight, official_resnet()[1].fc.weight)
    folder = tmp_path / "saved"
    timm.models.save_for_hf(official_resnet()[1], str(folder))
    local = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert torch.equal(local.fc.weight, official_resnet()[1].fc.weight)


@functools.lru_cache(maxsize=1)
def official_weights(name: str) -> dict[str, Tensor]:
    """In the format of the release that has this network."""
    if name not in SECOND_PAPER:
        return v1_weights(timm.create_model(name))
    pytest.importorskip("einops")
    x = timm_bcos.encode_image(real_image(64, 2, torch.float64), 3)
    return compare_official.official_network(compare_official.official_name(name), x).float().state_dict()


ADAPTED = [dict(num_classes=10), dict(num_classes=0), dict(in_chans=1), dict(in_chans=5)]


@pytest.mark.parametrize(
    "name",
    [
        "bcosv2_densenet121",
        "bcosv2_convnext_tiny_bnu",
        "bcosv2_vit_tiny_patch16_224",
        "bcosv2_vitc_tiny_patch1_14",
        "bcos_resnet34",
        "bcos_cnn9",
    ],
)
def test_official_files_of_every_family_adapt(name: str) -> None:
    """Another head, or other image channels: all else is what an unadapted network has."""
    overlay = dict(state_dict=official_weights(name))
    size = dict(img_size=64) if "vit" in name else {}
    plain = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **size)
    weights = plain.state_dict()
    for options in ADAPTED:
        model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **size, **options).eval()
        adapted = plain.pretrained_cfg["classifier" if "num_classes" in options else "first_conv"]
        for key, value in model.state_dict().items():
            assert key.startswith((adapted, SETTINGS)) or torch.equal(value, weights[key]), key
        outputs = model(torch.rand(1, options.get("in_chans", 3), 64, 64))
        assert outputs.shape == (1, options.get("num_classes", plain.num_classes) or model.num_features)


@pytest.mark.parametrize("name", ["bcosv2_vit_tiny_patch16_224", "bcosv2_convnext_tiny_bnu", "bcos_resnet34"])
def test_features_of_official_files(name: str) -> None:
    arguments = dict(pretrained=True, pretrained_cfg_overlay=dict(state_dict=official_weights(name)))
    arguments |= dict(img_size=64) if "vit" in name else {}
    features = timm.create_model(name, features_only=True, **arguments).eval()
    x = real_image(64)
    whole = timm.create_model(name, **arguments).eval()
    expected = whole.forward_intermediates(x, indices=features.feature_info.out_indices, intermediates_only=True)
    for ours, theirs in zip(features(x), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


# What is refused.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("layer1.0.conv1.linear.weight"), "has no 'layer1.0.conv1.weight'"),
        (lambda w: w.update({"conv1.linear.weight": torch.rand(64, 6, 3, 3)}), r"\(64, 6, 3, 3\).*\(64, 6, 7, 7\)"),
        (lambda w: w.update({"layer9.weight": torch.rand(3)}), "'layer9.weight'.*does not know"),
        (lambda w: w.update({"fc.linear.weight": torch.rand(7, 512, 1, 1)}), r"\(7, 512, 1, 1\)"),
    ],
)
def test_foreign_files_are_refused(tmp_path: Path, change: object, message: str) -> None:
    weights = dict(official_resnet()[0])
    change(weights)
    torch.save(weights, tmp_path / "w.pth")
    with pytest.raises(timm_bcos.CheckpointError, match=message):
        load(tmp_path / "w.pth")


def test_pickled_code_is_never_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> object:
            return (Path.touch, (tmp_path / "sprung",))

    torch.save({"conv1.weight": torch.rand(1), "trap": Trap()}, tmp_path / "w.pth")
    with pytest.raises(timm_bcos.CheckpointError, match="plain tensors"):
        load(tmp_path / "w.pth")
    assert not (tmp_path / "sprung").exists()


def test_networks_without_weights_say_so() -> None:
    with pytest.raises(timm_bcos.CheckpointError, match="no weights are published for bcos_resnet18"):
        timm.create_model("bcos_resnet18", pretrained=True)


# Downloads, from a server of our own.


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """Address and folder of a server on loopback."""
    folder = tmp_path / "server"
    folder.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    handler.log_message = lambda *args: None  # type: ignore[attr-defined]
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}", folder
        httpd.shutdown()


@pytest.fixture
def named_file(server: tuple[str, Path], official_file: Path) -> Path:
    """The official file, on the server, with its hash in its name."""
    content = official_file.read_bytes()
    path = server[1] / f"resnet_18-{hashlib.sha256(content).hexdigest()[:10]}.pth"
    path.write_bytes(content)
    return path


def fetch(server: tuple[str, Path], name: str | tuple[str, str], cache: Path) -> nn.Module:
    url = f"{server[0]}/{name}" if isinstance(name, str) else (f"{server[0]}/{name[0]}", name[1])
    return timm.create_model(
        "bcosv2_resnet18", pretrained=True, pretrained_cfg_overlay=dict(url=url), cache_dir=str(cache)
    )


def test_download_shows_progress_and_is_cached(
    server: tuple[str, Path], named_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = fetch(server, named_file.name, tmp_path / "cache")
    assert torch.equal(model.fc.weight, official_resnet()[1].fc.weight)
    assert "100%" in capfd.readouterr().err
    named_file.unlink()
    fetch(server, named_file.name, tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [named_file.name]


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b[:1000] + bytes([b[1000] ^ 1]) + b[1001:]])
@pytest.mark.parametrize("where", ["on the way", "in the cache"])
def test_damaged_files_are_refused_and_removed(
    server: tuple[str, Path], named_file: Path, tmp_path: Path, damage: object, where: str
) -> None:
    cache = tmp_path / "cache"
    if where == "in the cache":
        fetch(server, named_file.name, cache)
    broken = cache / named_file.name if where == "in the cache" else named_file
    broken.write_bytes(damage(broken.read_bytes()))
    with pytest.raises(timm_bcos.CheckpointError, match=r"SHA-256 that starts with .*removed"):
        fetch(server, named_file.name, cache)
    assert not list(cache.iterdir())


def test_files_without_a_published_hash_are_told_and_must_be_readable(
    server: tuple[str, Path], official_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (server[1] / "download").write_bytes(official_file.read_bytes())
    fetch(server, ("download", "resnet.pth"), tmp_path / "cache")
    assert hashlib.sha256(official_file.read_bytes()).hexdigest() in caplog.text
    for length in (5000, 3, 0):
        (server[1] / "download").write_bytes(official_file.read_bytes()[:length])
        with pytest.raises(timm_bcos.CheckpointError, match="no safetensors file nor PyTorch file"):
            fetch(server, ("download", "other.pth"), tmp_path / "cache")
        assert not (tmp_path / "cache" / "other.pth").exists()


def test_no_network(tmp_path: Path, server: tuple[str, Path]) -> None:
    for address in ("http://127.0.0.1:9/resnet_18-0123456789.pth", f"{server[0]}/absent-0123456789.pth"):
        with pytest.raises(timm_bcos.CheckpointError, match=r"cannot download .*dict\(file=PATH\)"):
            timm.create_model(
                "bcosv2_resnet18", pretrained=True, pretrained_cfg_overlay=dict(url=address), cache_dir=str(tmp_path)
            )
    assert not list(tmp_path.glob("*.pth*"))


def test_every_published_file_has_a_place_of_its_own_in_the_cache() -> None:
    urls = {weights.url for published in PUBLISHED.values() for weights in published}
    names = [url.rpartition("/")[2] if isinstance(url, str) else url[1] for url in urls]
    assert len(set(names)) == len(names) == 38
    hashed = [name for name in names if timm_bcos.weights.pretrained.HASH_IN_NAME.search(name)]
    assert len(hashed) == 26
