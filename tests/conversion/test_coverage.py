"""One architecture for each kind of difficulty in timm's files; `scripts/benchmarks/model_coverage.py` has all."""

import copy
import csv
from collections import Counter
from pathlib import Path

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from timm.utils.model import reparameterize_model
from torch import nn

import timm_bcos
from tests.helpers import assert_exact, enliven, load_script, real_image
from timm_bcos import BcosConfig, UnsupportedModuleError, bcosify
from timm_bcos.conversion.positions import PositionedQkv, Positions
from timm_bcos.nn.layers import BcosConv2d
from timm_bcos.nn.stems import ImageReader

coverage = load_script("model_coverage")

KINDS = {
    "coat_tiny": "parallel branches, 1-d convolutions",
    "crossvit_9_240": "two stems at two scales",
    "csatv2": "a cosine transform of the image before the first layer",
    "efficientvim_m1": "state space products, 1-d convolutions",
    "efficientvit_b0": "linear attention in float32",
    "fastvit_t8": "three stems in parallel",
    "gcvit_xxtiny": "global queries",
    "gmlp_s16_224": "products of two activations",
    "hgnetv2_b0": "learned affine blocks",
    "levit_128s": "1-d batch norm",
    "lowformer_b0": "transposed convolutions",
    "nextvit_small": "1-d pooling",
    "resnetv2_50d_frn": "a maximum with a learned threshold",
    "sequencer2d_s": "LSTMs",
    "starnet_s1": "products of two activations",
    "swin_tiny_patch4_window7_224": "shifted windows, NHWC",
    "swinv2_cr_tiny_ns_224": "cosine attention",
    "test_nfnet": "weight standardization",
    "tnt_s_legacy_patch16_224": "unfolded pixels",
    "tresnet_m": "a folded image",
    "vit_tiny_r_s16_p8_224": "a convolutional model in front",
    "volo_d1_224": "folding attention",
    "xcit_nano_12_p8_224": "attention between channels",
}


# arguments that make the largest of them shallower
SHALLOW: dict[str, dict[str, object]] = {
    "coat_tiny": dict(serial_depths=(1, 1, 1, 1), parallel_depth=1),
    "crossvit_9_240": dict(depth=[[1, 1, 0]] * 3),
    "csatv2": dict(depths=(1, 1, 2, 2)),
    "resnetv2_50d_frn": dict(layers=(2, 1, 1, 1)),
    "sequencer2d_s": dict(layers=(2, 1, 1, 1)),
    "swin_tiny_patch4_window7_224": dict(depths=(2, 2, 2, 2), embed_dim=24, num_heads=(1, 2, 4, 8)),
    "swinv2_cr_tiny_ns_224": dict(depths=(1, 1, 2, 1)),
    "tnt_s_legacy_patch16_224": dict(depth=2),
    "tresnet_m": dict(layers=(2, 1, 1, 1)),
    "vit_tiny_r_s16_p8_224": dict(depth=2),
    "xcit_nano_12_p8_224": dict(depth=2),
}


@pytest.mark.parametrize("arch", KINDS)
def test_kind_converts_exactly_trains_and_preserves(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build = coverage.build
    monkeypatch.setattr(coverage, "build", lambda name, **kwargs: build(name, **SHALLOW.get(name, {}), **kwargs))
    row = coverage.measure("", arch, 300)
    assert (row.verdict, row.gradients) == ("exact", "all"), row
    assert row.preserving is not None and row.preserving <= 1e-3
    assert row.shift is not None and row.shift <= 1e-10


def test_a_row_tells_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """The measurement can fail: a model with a function that explanation mode gets wrong is 'not exact'."""
    create = coverage.create

    def spoiled(arch: str, size: int, **kwargs: object) -> nn.Module:
        model = create(arch, size, **kwargs)
        model.layer2.register_forward_hook(
            lambda module, args, output: torch.fake_quantize_per_tensor_affine(output, 1.0, 0, 0, 9)
        )
        return model

    monkeypatch.setattr(coverage, "create", spoiled)
    row = coverage.measure("", "resnet18", 100)
    assert (row.verdict, row.breaks_at) == ("not exact", "layer2")
    assert row.error64 is not None and row.error64 > 1e-3
    assert coverage.measure("", "no_such_arch", 100).verdict.startswith("failed")


def test_coverage_resumes_and_writes_tables(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    pairs = [("resnet", "test_resnet"), ("vision_transformer", "test_vit")]
    first = coverage.run(pairs[:1], path, jobs=1, seconds=100)
    path.write_text(path.read_text() + '{"file": "cut')
    again = coverage.run(pairs, path, jobs=2, seconds=100)
    assert again[0] == first[0] and [row.verdict for row in again] == ["exact", "exact"]
    assert "architectures exact 2 of 2," in coverage.summary(again)
    coverage.write_pages(again, coverage.origin(["--all"]), tmp_path)
    assert (tmp_path / "coverage.md").read_text().count("| `resnet` | 1 |") == 1
    assert "\nresnet,test_resnet," in (tmp_path / "coverage.csv").read_text()


def test_the_page_on_coverage_agrees_with_its_rows() -> None:
    """The table of docs/coverage.md is that of docs/coverage.csv, with every model file of both libraries."""
    table = load_script("coverage_table")
    with (table.DOCS / "coverage.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    page = (table.DOCS / "coverage.md").read_text()
    lines = [line.split(" | ") for line in page.splitlines() if line.startswith("| `")]
    assert {line[0].strip("| `"): int(line[1]) for line in lines} == Counter(row["file"] for row in rows)
    exact = Counter(row["file"] for row in rows if row["verdict"] == "exact")
    assert {line[0].strip("| `"): int(line[3]) for line in lines} == exact
    timms = {row["file"] for row in rows if not row["file"].startswith(table.TORCHVISION)}
    assert timms == {m for m in timm.list_modules() if not m.startswith("bcos")}


def test_lstm_in_explanation_mode_is_the_same_function() -> None:
    """Values, last states and, through completeness, weights; against torch's own LSTM."""
    for kwargs in (dict(), dict(bidirectional=True, num_layers=2), dict(bias=False), dict(proj_size=2)):
        lstm = nn.LSTM(4, 3, batch_first=True, **kwargs).double().requires_grad_(False)
        x = torch.rand(2, 5, 4, dtype=torch.float64).requires_grad_()
        expected, (h, c) = lstm(x)
        with timm_bcos.explanation_mode(lstm):
            found, (h_found, c_found) = lstm(x)
        for ours, theirs in ((found, expected), (h_found, h), (c_found, c)):
            torch.testing.assert_close(ours, theirs)
        if not lstm.bias:
            (gradient,) = torch.autograd.grad(found.sum(), x)
            torch.testing.assert_close((gradient * x).sum(), found.sum())


def test_image_reader_is_a_linear_map_of_the_encoding() -> None:
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    x = torch.rand(2, 3, 4, 4, dtype=torch.float64)
    reader = ImageReader(3, mean, std, dtype=torch.float64)
    expected = (x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    torch.testing.assert_close(reader(x), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(reader(timm_bcos.encode_image(x, 3)), reader(x))
    assert not ImageReader(3, (0.5, 0.5, 0.5), std).offset.any()


def test_models_behind_a_reader_keep_timms_ways() -> None:
    model = timm.create_model("bcosify", arch="tresnet_m", num_classes=5).eval()
    assert isinstance(model.image_reader, ImageReader)
    x = real_image(64)
    expected = model(x)
    torch.testing.assert_close(model(timm_bcos.encode_image(x, 3)), expected)
    torch.testing.assert_close(model.forward_head(model.forward_features(x)), expected)
    torch.testing.assert_close(copy.deepcopy(model)(x), expected)
    features = timm.create_model("bcosify", arch="tresnet_m", features_only=True).eval()
    assert [f.shape[1] for f in features(x)] == features.feature_info.channels()


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("bcosv2_vit_tiny_patch16_224", {}),
        ("bcosv2_vitc_tiny_patch1_14", {}),
        ("bcosify", dict(arch="vit_tiny_patch16_224")),
        ("bcosify", dict(arch="vit_tiny_r_s16_p8_224")),
    ],
)
def test_positions_in_the_attention_leave_the_logit_to_the_image(name: str, kwargs: dict[str, str]) -> None:
    x = real_image(64, dtype=torch.float64)
    shares, moved = [], x.roll(32, -1)
    for positions in ("keep", "attention"):
        model = timm.create_model(name, img_size=64, num_classes=5, positions=positions, **kwargs).double()
        enliven(model, x)
        explanation = assert_exact(model, x, 1e-10)
        shares.append((explanation.contributions.sum() / (explanation.logit - explanation.logit_bias)).item())
        assert not torch.allclose(model(x), model(moved)), "positions still matter"
    assert abs(shares[0] - 1) > 1e-3
    assert shares[1] == pytest.approx(1, abs=1e-10)
    kept = timm.create_model(name, img_size=64, num_classes=5, **kwargs).state_dict()
    assert kept.keys() == model.state_dict().keys(), "pretrained weights load"
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin(x), model(x))
    assert twin.positions is not model.positions
    assert all(block.attn.qkv.positions is twin.positions for block in twin.blocks)


def test_confined_positions_are_the_same_attention() -> None:
    """Literal twin: queries and keys of tokens plus positions, values of tokens alone."""
    plain = timm.models.VisionTransformer(img_size=4, patch_size=2, embed_dim=6, depth=1, num_heads=1).double()
    qkv = timm_bcos.BcosLinear(6, 18, bias=True, b=1, normalize_weight=False).double()
    nn.init.normal_(qkv.bias)
    positions = Positions(plain)
    layer = PositionedQkv.from_linear(qkv, positions)
    x = torch.rand(2, 4, 6, dtype=torch.float64)
    constants = plain.pos_embed.detach() + torch.cat([plain.cls_token.detach(), torch.zeros(1, 4, 6)], 1)
    stream = positions.contents(x)
    torch.testing.assert_close(stream, torch.cat([torch.zeros(2, 1, 6, dtype=torch.float64), x], 1))
    weight, bias = qkv.weight.detach(), qkv.bias.detach()
    found = layer(stream)
    for i in range(3):
        rows = weight[6 * i : 6 * i + 6]
        expected = stream @ rows.T + bias[6 * i : 6 * i + 6]
        if i < 2:
            expected = expected + constants @ rows.T + bias[6 * i : 6 * i + 6]
        torch.testing.assert_close(found[..., 6 * i : 6 * i + 6], expected)


def test_positions_need_a_vision_transformer() -> None:
    model = timm.create_model("resnet18")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UnsupportedModuleError, match="positions='attention' needs a vision transformer"):
        bcosify(model, BcosConfig(positions="attention"))
    assert type(model) is timm.models.ResNet
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# timm's wrappers around models.


@pytest.mark.parametrize("arch", ["repvgg_a0", "fastvit_t8", "levit_128s", "repvit_m0_9"])
def test_reparameterize_model_fuses_layers(arch: str) -> None:
    """What it would fold into them stays: norms and parallel branches."""
    x = real_image(224, dtype=torch.float64)
    model = enliven(timm.create_model("bcosify", arch=arch, num_classes=3).double(), x)
    fused = reparameterize_model(model)
    layers = [m for m in fused.modules() if isinstance(m, BcosConv2d)]
    assert layers and all(layer.is_fused for layer in layers)
    assert not any(getattr(m, "is_fused", False) for m in model.modules())
    torch.testing.assert_close(fused(x), model(x))
    torch.testing.assert_close(timm_bcos.explain(fused, x).weights, timm_bcos.explain(model, x).weights)
    folded = reparameterize_model(timm.create_model(arch, num_classes=3).eval())
    assert any(isinstance(m, BcosConv2d) for m in bcosify(folded).modules())


@pytest.mark.parametrize(
    "arch", ["efficientnet_b0", "swin_tiny_patch4_window7_224", "xcit_nano_12_p8_224", "hgnetv2_b0"]
)
def test_wrappers_keep_working(arch: str) -> None:
    size = timm.get_pretrained_cfg(arch).input_size[-1]
    x = real_image(size)
    model = timm.create_model("bcosify", arch=arch, num_classes=5).eval()
    expected = model(x)
    groups = param_groups_layer_decay(model, layer_decay=0.7)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    torch.testing.assert_close(nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))(x), expected)
    _, maps = model.forward_intermediates(x)
    assert len(maps) >= 3
    model.reset_classifier(7)
    assert model(x).shape == (1, 7)
    assert type(model.get_classifier()).__name__.startswith("Bcos")
    model.train().set_grad_checkpointing(True)
    model(x.expand(2, -1, -1, -1)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    features = timm.create_model("bcosify", arch=arch, features_only=True).eval()
    assert len(features(x)) == len(features.feature_info.channels())
