import copy
from collections.abc import Callable

import pytest
import timm
import timm.utils
import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame

from tests.helpers.literal import bcos_conv2d, bcos_linear, uncentered_batch_norm
from timm_bcos import BcosConv2d, BcosLinear, InputError, UncenteredBatchNorm2d, encode_image
from timm_bcos.nn import execution, functional
from timm_bcos.nn.heads import BcosConvClassifier
from timm_bcos.nn.primitives import max_out, patch_norm, scale_by_cosine
from timm_bcos.nn.stems import BcosStem

Double = torch.float64
UNITS = [
    dict(),
    dict(b=1.0),
    dict(b=1.25),
    dict(b=1.5, gamma=3.0),
    dict(b=1.75),
    dict(b=2.5, max_out=3),
    dict(max_out=2, gamma=0.5),
    dict(normalize_weight=False),
    dict(normalize_weight=False, b=1.75),
    dict(normalize_weight=False, b=1.0),
]
WINDOWS = [
    dict(padding=1),
    dict(stride=2, padding=1),
    dict(padding=2, dilation=2),
    dict(groups=2),
    dict(groups=4, padding=1, stride=2),
]


def twin(unit: dict) -> dict:
    settings = dict(b=2.0, max_out=1, gamma=1.0, normalize_weight=True) | unit
    settings["normalize"] = settings.pop("normalize_weight")
    return settings


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("unit", UNITS, ids=str)
def test_conv_is_the_formula(unit: dict, window: dict) -> None:
    layer = BcosConv2d(4, 4, 3, dtype=Double, **window, **unit)
    x = torch.randn(2, 4, 6, 7, dtype=Double)
    padded = F.pad(x, [window.get("padding", 0)] * 4)
    geometry = {key: window.get(key, 1) for key in ("stride", "dilation", "groups")}
    expected = bcos_conv2d(padded, layer.weight.detach(), **geometry, **twin(unit))
    torch.testing.assert_close(layer(x).detach(), expected)


@pytest.mark.parametrize("unit", UNITS, ids=str)
def test_linear_is_the_formula(unit: dict) -> None:
    layer = BcosLinear(5, 3, dtype=Double, **unit)
    x = torch.randn(4, 5, dtype=Double)
    torch.testing.assert_close(layer(x).detach(), bcos_linear(x, layer.weight.detach(), **twin(unit)))
    torch.testing.assert_close(layer(x[None, :, None])[0, :, 0], layer(x))


@pytest.mark.parametrize("unit", UNITS, ids=str)
def test_the_functions_are_the_formula(unit: dict) -> None:
    x, weight = torch.randn(2, 4, 6, 7, dtype=Double), torch.randn(12, 2, 3, 3, dtype=Double)
    geometry = dict(stride=2, dilation=1, groups=2)
    found = functional.bcos_conv2d(x, weight, [2, 2], [1, 1], [1, 1], 2, **unit)
    torch.testing.assert_close(found, bcos_conv2d(F.pad(x, [1] * 4), weight, **geometry, **twin(unit)))
    vectors, rows = torch.randn(4, 5, dtype=Double), torch.randn(6, 5, dtype=Double)
    torch.testing.assert_close(functional.bcos_linear(vectors, rows, **unit), bcos_linear(vectors, rows, **twin(unit)))


@pytest.mark.parametrize("unit", UNITS, ids=str)
def test_gradients(unit: dict) -> None:
    conv, linear = (
        BcosConv2d(4, 2, 3, padding=1, groups=2, dtype=Double, **unit),
        BcosLinear(4, 3, dtype=Double, **unit),
    )
    x = torch.randn(2, 4, 4, 4, dtype=Double, requires_grad=True)
    for layer, value in ((conv, x), (linear, torch.randn(3, 4, dtype=Double, requires_grad=True))):
        assert torch.autograd.gradcheck(
            lambda v, w, f=layer: torch.func.functional_call(f, {"weight": w}, v), (value, layer.weight)
        )
        assert torch.autograd.gradgradcheck(layer, (value,))


def test_max_out_picks_the_largest_neighbor() -> None:
    x = torch.randn(2, 6, 3, 3, dtype=Double, requires_grad=True)
    for value in (x, x.contiguous(memory_format=torch.channels_last)):
        out = max_out(value, 3, 1)
        for o in range(2):
            torch.testing.assert_close(out[:, o], value[:, 3 * o : 3 * o + 3].amax(1))
        assert out.is_contiguous(memory_format=torch.channels_last) == value.is_contiguous(
            memory_format=torch.channels_last
        )
    assert torch.autograd.gradcheck(lambda v: max_out(v, 3, 1), (x,))
    assert torch.autograd.gradgradcheck(lambda v: max_out(v, 3, -1), (x,))
    torch.testing.assert_close(max_out(x, 3, -1), x.amax(-1, keepdim=True))


def test_padding_as_timm_uses_it() -> None:
    x = torch.randn(1, 4, 7, 8, dtype=Double)
    settings = dict(stride=1, dilation=1, groups=1, b=2.0, max_out=1, gamma=1.0, normalize=True)
    same = BcosConv2d(4, 2, 3, padding="same", dtype=Double)
    torch.testing.assert_close(same(x).detach(), bcos_conv2d(F.pad(x, [1] * 4), same.weight.detach(), **settings))
    circular = BcosConv2d(4, 2, 3, padding=1, padding_mode="circular", dtype=Double)
    expected = bcos_conv2d(F.pad(x, [1] * 4, "circular"), circular.weight.detach(), **settings)
    torch.testing.assert_close(circular(x).detach(), expected)
    tf = BcosConv2d(4, 2, 3, stride=2, pad_same=True, dtype=Double)
    expected = bcos_conv2d(F.pad(x, [0, 1, 1, 1]), tf.weight.detach(), **settings | dict(stride=2))
    torch.testing.assert_close(tf(x).detach(), expected)
    assert tf(x).shape == Conv2dSame(4, 2, 3, stride=2, dtype=Double)(x).shape


@pytest.mark.parametrize("unit", [dict(), dict(b=1.5), dict(max_out=2), dict(b=1)], ids=str)
def test_agrees_with_the_official_package(unit: dict) -> None:
    official = pytest.importorskip("bcos.modules")
    theirs = official.BcosConv2d(8, 6, 3, padding=1, stride=2, **unit).double()
    ours = BcosConv2d(8, 6, 3, padding=1, stride=2, dtype=Double, **unit)
    ours.weight = theirs.linear.weight
    x = torch.randn(2, 8, 9, 9, dtype=Double)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-14)
    theirs, ours = official.BcosLinear(8, 6, **unit).double(), BcosLinear(8, 6, dtype=Double, **unit)
    ours.weight = theirs.linear.weight
    torch.testing.assert_close(ours(x[:, :, 0, 0]), theirs(x[:, :, 0, 0]), rtol=1e-12, atol=1e-14)


def test_uncentered_norm() -> None:
    norm = UncenteredBatchNorm2d(3, momentum=0.5, dtype=Double)
    norm.weight.data.uniform_()
    x = 2 + torch.randn(4, 3, 5, 5, dtype=Double)
    variance = x.var((0, 2, 3), correction=0)
    expected = uncentered_batch_norm(x, norm.weight.detach(), variance, norm.eps)
    torch.testing.assert_close(norm(x).detach(), expected)
    torch.testing.assert_close(norm.running_var, 0.5 + 0.5 * variance)
    expected = uncentered_batch_norm(x, norm.weight.detach(), norm.running_var, norm.eps)
    torch.testing.assert_close(norm.eval()(x).detach(), expected)
    assert torch.autograd.gradcheck(
        UncenteredBatchNorm2d(2, dtype=Double), torch.randn(2, 2, 3, 3, dtype=Double, requires_grad=True)
    )


def test_batch_norm_without_momentum_averages_all_batches() -> None:
    norm = UncenteredBatchNorm2d(3, momentum=None, dtype=Double)
    batches = torch.randn(3, 4, 3, 5, 5, dtype=Double)
    for x in batches:
        norm(x)
    expected = torch.stack([x.var((0, 2, 3), correction=0) for x in batches]).mean(0)
    torch.testing.assert_close(norm.running_var, expected)


def test_batch_norm_begins_anew() -> None:
    norm = UncenteredBatchNorm2d(3)
    norm.weight.data.uniform_()
    norm(torch.randn(4, 3, 5, 5))
    norm.reset_parameters()
    for name, value in UncenteredBatchNorm2d(3).state_dict().items():
        torch.testing.assert_close(norm.state_dict()[name], value)


def test_uncentered_norm_agrees_with_the_official_package() -> None:
    norms = pytest.importorskip("bcos.modules.norms.uncentered_norms.batchnorm_uncentered")
    theirs, ours = norms.BatchNormUncentered2d(3).double(), UncenteredBatchNorm2d(3, dtype=Double)
    x = 2 + torch.randn(4, 3, 5, 5, dtype=Double)
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.running_var, theirs.running_var)


@pytest.mark.parametrize("unit", [dict(), dict(max_out=2), dict(b=1.5, normalize_weight=False), dict(b=1)], ids=str)
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_a_single_image_without_a_batch(unit: dict, window: dict) -> None:
    """As torch's convolutions take it, of any size."""
    layer, x = (
        BcosConv2d(4, 4, 3, dtype=Double, **window, **unit),
        torch.randn(4, 6, 7, dtype=Double, requires_grad=True),
    )
    torch.testing.assert_close(layer(x), layer(x[None])[0])
    torch.testing.assert_close(
        *[torch.autograd.grad(f().square().sum(), x) for f in (lambda: layer(x), lambda: layer(x[None]))]
    )
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(execution, "LARGE", 1)
        torch.testing.assert_close(layer(x), layer(x[None])[0])
        torch.testing.assert_close(layer.eval().fuse()(x), layer(x))


def test_zero_patches_and_zero_rows() -> None:
    layer = BcosConv2d(3, 4, 3, padding=1)
    layer.weight.data[1] = 0
    x = torch.zeros(1, 3, 5, 5, requires_grad=True)
    layer(x).sum().backward()
    assert layer(x).abs().max() == 0
    assert x.grad is not None and x.grad.isfinite().all()
    assert layer.weight.grad is not None and layer.weight.grad.isfinite().all()
    vector = torch.zeros(2, 3, requires_grad=True)
    BcosLinear(3, 2)(vector).sum().backward()
    assert vector.grad is not None and vector.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_does_not_overflow(dtype: torch.dtype) -> None:
    """Sums of squares of these inputs exceed float16's 65504; the B-cos response does not."""
    x = 40 * torch.randn(1, 256, 8, 8)
    assert (x**2).sum(1).max() > 65504
    layer = BcosConv2d(256, 16, 3, padding=1)
    expected = layer(x)
    with torch.autocast("cpu", dtype):
        torch.testing.assert_close(layer(x).float(), expected, rtol=0.05, atol=0.05 * expected.abs().max().item())
    half = layer.to(dtype)(x.to(dtype))
    assert half.dtype == dtype
    torch.testing.assert_close(half.float(), expected, rtol=0.05, atol=0.05 * expected.abs().max().item())


def test_channels_last() -> None:
    layer = BcosConv2d(8, 8, 3, padding=1, max_out=2)
    x = torch.randn(2, 8, 6, 6)
    out = layer.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(out, layer(x))


def test_stem_takes_images_and_encodings() -> None:
    stem = BcosStem(3, 4, 3, padding=1)
    x = torch.rand(2, 3, 6, 6)
    torch.testing.assert_close(stem(x), stem(encode_image(x, 3)))
    torch.testing.assert_close(encode_image(x, 3)[:, 3:], 1 - x)
    assert BcosStem(1, 4, 3)(torch.rand(1, 1, 5, 5)).shape == BcosStem(5, 4, 3)(torch.rand(1, 5, 5, 5)).shape
    with pytest.raises(InputError, match=r"expected images \(N, 3, H, W\).*got shape \(2, 4, 6, 6\)"):
        stem(torch.rand(2, 4, 6, 6))
    with pytest.raises(InputError, match="batch dimension"):
        stem(x[0])


def test_normalizing_stem_equals_the_original_at_the_borders_too() -> None:
    conv = torch.nn.Conv2d(3, 4, 3, padding=2, bias=False, dtype=Double)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    stem = BcosStem(3, 4, 3, padding=2, b=1, normalize_weight=False, mean=mean, std=std, dtype=Double)
    stem.weight.data = torch.cat([conv.weight, -conv.weight], 1) / 2
    x = torch.rand(1, 3, 6, 6, dtype=Double)
    m, s = (torch.tensor(v, dtype=Double)[:, None, None] for v in (mean, std))
    torch.testing.assert_close(stem(x), conv((x - m) / s))


def test_classifier_votes_per_position() -> None:
    head = BcosConvClassifier(6, 3, temperature=0.1, logit_bias=-2.0, dtype=Double)
    x = torch.randn(2, 6, 4, 5, dtype=Double)
    votes = torch.stack([head.respond(x[:, :, i : i + 1, j : j + 1])[:, :, 0, 0] for i in range(4) for j in range(5)])
    torch.testing.assert_close(head(x), votes.mean(0) / 0.1 - 2.0)


@pytest.mark.parametrize(
    ("kwargs", "text"), [(dict(b=0.5), "b >= 1"), (dict(max_out=2, normalize_weight=False), "normalize_weight=True")]
)
def test_bad_settings(kwargs: dict, text: str) -> None:
    with pytest.raises(InputError, match=text):
        BcosConv2d(3, 3, 3, **kwargs)
    with pytest.raises(InputError, match=text):
        BcosLinear(3, 3, **kwargs)


# What is overwritten, or computed in another way, where no gradient is needed.


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("last", [False, True])
def test_inference_gives_what_training_gives(dtype: torch.dtype, last: bool) -> None:
    x = torch.randn(3, 8, 9, 9)
    for layer in [BcosConv2d(8, 6, 3, padding=1), BcosConv2d(8, 6, 3, groups=2), BcosConv2d(8, 3, 1, max_out=2)]:
        layer, image = layer.to(dtype), x.to(dtype)
        if last:
            layer, image = (t.to(memory_format=torch.channels_last) for t in (layer, image))
        before, with_gradient = image.clone(), layer(image).detach()
        with torch.no_grad():
            torch.testing.assert_close(layer(image), with_gradient)
        assert torch.equal(image, before)
    linear, tokens = BcosLinear(8, 5).to(dtype), x.to(dtype).movedim(1, -1)
    with_gradient = linear(tokens).detach()
    with torch.no_grad():
        torch.testing.assert_close(linear(tokens), with_gradient)


def test_only_a_response_of_its_own_is_written_over() -> None:
    linear, norm = torch.randn(2, 3), torch.rand(2, 1) + 1
    before = linear.clone()
    with torch.no_grad():
        y = scale_by_cosine(linear, norm, 2, 1.0)
        assert torch.equal(linear, before)
        assert scale_by_cosine(linear, norm, 2, 1.0, inplace=True) is linear
    torch.testing.assert_close(linear, y)
    leaf = before.clone().requires_grad_()
    scale_by_cosine(leaf * 1, norm, 2, 1.0, inplace=True).sum().backward()
    torch.testing.assert_close(leaf.grad, 2 * before.abs() / norm)


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(7, 1, 3), (3, 2, 1), (2, 2, 0)])
def test_window_sums_of_many_channels(kernel: int, stride: int, padding: int) -> None:
    """Which float32 convolves and float64 pools; under autocast nothing is rounded to 16 bits."""
    x = torch.rand(2, 6, 20, 20)
    window = [kernel] * 2, [stride] * 2, [padding] * 2, [1, 1]
    expected = patch_norm(x.double(), *window, groups=6)
    found = patch_norm(x, *window, groups=6)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        found = patch_norm(x, *window, groups=6)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)


# Weights that change, by whatever way.


def changes(layer: BcosConv2d) -> dict[str, Callable[[], object]]:
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    fused = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)
    for parameter in layer.parameters():
        parameter.grad = torch.ones_like(parameter)
    other = {name: torch.randn_like(value) for name, value in layer.state_dict().items()}
    return {
        "in place": lambda: torch.no_grad()(layer.weight.mul_)(-1.5),
        "an optimizer": optimizer.step,
        "a fused optimizer": fused.step,
        "a state dict": lambda: layer.load_state_dict(other),
        "a new parameter": lambda: setattr(layer, "weight", torch.nn.Parameter(torch.randn_like(layer.weight))),
        "a moving average": lambda: torch.no_grad()(layer.state_dict()["weight"].lerp_)(other["weight"], 0.5),
        "data": lambda: layer.weight.data.neg_(),
        "NumPy": lambda: layer.weight.detach().numpy().__imul__(-1),
        "another view": lambda: layer.weight.data.view(-1)[3:9].neg_(),
    }


@pytest.mark.parametrize("change", list(changes(BcosConv2d(1, 1, 1))))
def test_inference_sees_every_change_of_its_weights(change: str) -> None:
    layer, x = BcosConv2d(3, 4, 3, dtype=Double).eval(), torch.randn(2, 3, 5, 5, dtype=Double)
    with torch.no_grad():
        before = layer(x)
        changes(layer)[change]()
        after = layer(x)
    assert not torch.allclose(after, before)
    settings = dict(stride=1, dilation=1, groups=1, b=2.0, max_out=1, gamma=1.0, normalize=True)
    torch.testing.assert_close(after, bcos_conv2d(x, layer.weight.detach(), **settings))
    torch.testing.assert_close(copy.deepcopy(layer)(x), layer(x))


def test_inference_mode_then_gradients() -> None:
    layer, x = BcosConv2d(3, 4, 3).eval(), torch.randn(1, 3, 5, 5)
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), layer(x))
    layer(x).sum().backward()
    assert layer.weight.grad is not None


@pytest.mark.parametrize(
    "stem", [dict(), dict(mean=(0.4,) * 3, std=(0.2,) * 3), dict(max_out=2), dict(b=1), dict(b=1.5)]
)
def test_stems_take_images_and_their_encodings(stem: dict) -> None:
    layer = BcosStem(3, 4, 3, stride=2, padding=1, dtype=Double, **stem)
    x = torch.rand(2, 3, 7, 6, dtype=Double)
    found = layer(x), *torch.autograd.grad(layer(x).square().sum(), layer.weight)
    whole = encode_image(x, 3)
    expected = layer(whole), *torch.autograd.grad(layer(whole).square().sum(), layer.weight)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(layer(x[:1]), found[0][:1])
    assert torch.equal(layer.eval()(x), layer(whole))
    layer.train()
    image = x.clone().requires_grad_()
    (by_image,) = torch.autograd.grad(layer(image).square().sum(), image)
    encoded = whole.clone().requires_grad_()
    (by_encoding,) = torch.autograd.grad(layer(encoded).square().sum(), encoded)
    torch.testing.assert_close(by_image, by_encoding[:, :3] - by_encoding[:, 3:])


def test_the_shift_of_an_activation_is_trained_and_thawed() -> None:
    model = timm.create_model("bcos_efficientnet_lite0", num_classes=3)
    timm.utils.freeze(model, [], include_bn_running_stats=False)
    timm.utils.unfreeze(model, [], include_bn_running_stats=False)
    model(torch.rand(2, 3, 64, 64)).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert all(p.grad.any() for name, p in model.named_parameters() if name.endswith("act.shift"))
