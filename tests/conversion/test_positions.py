"""`positions="attention"`: no forward pass leaves anything behind that another one could find."""

import copy
import pickle
import threading
from typing import Any

import pytest
import timm
import torch
from timm.layers import set_reentrant_ckpt
from torch import Tensor, nn

import timm_bcos
from tests.helpers import assert_exact, enliven, real_image, timm_vits_trace
from timm_bcos import BcosConfig, ModelStateError, UnsupportedModuleError, bcosify
from timm_bcos.conversion.positions import PositionedQkv

SHAPES = [(32, 64), (64, 32), (32, 32), (64, 64), (48, 64), (64, 48), (16, 128), (128, 16)]


def vit(img_size: int | tuple[int, int] = 64, arch: str = "vit_tiny_patch16_224", **kwargs: Any) -> nn.Module:
    plain = timm.create_model(arch, img_size=img_size, num_classes=5, depth=3, **kwargs)
    nn.init.normal_(plain.pos_embed)
    nn.init.normal_(plain.cls_token)
    return bcosify(plain, BcosConfig.v2(positions="attention")).eval()


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    return [p.grad for p in model.parameters()]


def test_any_grid_is_the_model_for_that_grid() -> None:
    """Of images with as many tokens too, of which only the shape differs."""
    dynamic = vit(dynamic_img_size=True)
    found = []
    for height, width in SHAPES[:2]:
        fixed = vit((height, width))
        weights = dynamic.state_dict()
        grid = (height // 16, width // 16)
        weights["pos_embed"] = timm.layers.resample_abs_pos_embed(weights["pos_embed"], grid, (4, 4))
        fixed.load_state_dict(weights)
        x = torch.rand(2, 3, height, width)
        torch.testing.assert_close(dynamic(x), fixed(x))
        _, maps = dynamic.forward_intermediates(x)
        assert maps[-1].shape[-2:] == grid
        found.append(dynamic(x))
    assert not torch.allclose(*found)
    assert all(type(block) is not nn.Module and isinstance(block.attn.qkv, PositionedQkv) for block in dynamic.blocks)


@pytest.mark.parametrize("train", [False, True], ids=["infer", "train with checkpoints"])
def test_threads_with_other_image_sizes(train: bool) -> None:
    model = vit(dynamic_img_size=True)
    model.set_grad_checkpointing(train)
    model.train(train)
    images = [torch.rand(2, 3, *shape) for shape in SHAPES]

    def run(x: Tensor) -> Tensor:
        output = model(x)
        if not train:
            return output.detach()
        names = ("pos_embed", "cls_token", "blocks.0.attn.qkv.weight")
        found = torch.autograd.grad(output.square().sum(), [model.get_parameter(name) for name in names])
        return torch.cat([g.flatten() for g in found])

    expected = [run(x) for x in images]
    found: dict[int, list[Tensor]] = {i: [] for i in range(len(images))}

    def work(i: int) -> None:
        for _ in range(4):
            found[i].append(run(images[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, results in found.items():
        assert len(results) == 4
        assert all(torch.equal(result, expected[i]) for result in results)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_checkpoints_change_nothing(dynamic: bool, reentrant: bool) -> None:
    model, x = vit(dynamic_img_size=dynamic).train(), real_image(64, 2)
    model.requires_grad_()
    expected = gradients(model, x)
    names = [name for name, _ in model.named_parameters()]
    assert expected[names.index("pos_embed")].abs().max() > 0
    model.set_grad_checkpointing(True)
    set_reentrant_ckpt(reentrant)
    try:
        image = x.requires_grad_(reentrant)  # reentrant checkpoints want an input that does
        found = gradients(model, image)
    finally:
        set_reentrant_ckpt(False)
    for name, a, b in zip(names, found, expected, strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_checkpoints_recompute_on_another_thread() -> None:
    model, x = vit(dynamic_img_size=True).train(), torch.rand(2, 3, 32, 64)
    expected = gradients(model, x)
    model.set_grad_checkpointing(True)
    model.zero_grad()
    loss = model(x).square().sum()
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_dropout_of_positions_leaks_no_noise() -> None:
    """It drops what the image has put into the tokens; a black patch under a class token of zeros stays zero."""
    model, x = vit(pos_drop_rate=0.5).train(), real_image(64, 2)
    patches = model.patch_embed(x)
    whole = model.positions.contents(patches)
    found = model._pos_embed(patches)
    kept = found != 0
    torch.testing.assert_close(found[kept], 2 * whole[kept])
    assert 0.3 < kept.float().mean() < 0.6
    assert (found[:, 0] == 0).all(), "the class token has no content to drop"
    torch.testing.assert_close(model.eval()._pos_embed(patches), whole)


def test_two_models_inside_each_other() -> None:
    """A block of one calls the other, with another grid, in the middle."""
    outer, inner = vit(dynamic_img_size=True), vit(dynamic_img_size=True)
    x, other = torch.rand(1, 3, 32, 64), torch.rand(1, 3, 64, 32)
    expected = [outer(x), inner(other), outer(other)]
    found: list[Tensor] = []

    def look_elsewhere(*_: Any) -> None:
        if not found:
            found.append(inner(other))  # from here on the hook does nothing
            found.append(outer(other))

    outer.blocks[1].register_forward_hook(look_elsewhere)
    found_last = outer(x)
    for a, b in zip([found_last, *found], expected, strict=True):
        torch.testing.assert_close(a, b)


def test_copies_have_positions_of_their_own() -> None:
    model, x = vit(), real_image(64)
    expected = model(x).detach()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), timm_bcos.nn.module_utils.frozen_copy(model)):
        torch.testing.assert_close(twin(x), expected)
        assert twin.positions.embedding._parameters is twin._parameters
        assert all(block.attn.qkv.positions is twin.positions for block in twin.blocks)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.pos_embed.mul_(-1)
    assert not torch.allclose(twin(x), expected)
    twin.pos_embed = nn.Parameter(model.pos_embed.detach().clone())
    torch.testing.assert_close(twin(x), expected)
    torch.testing.assert_close(model(x), expected)
    assert not [name for name in model.state_dict() if "positions" in name]


def test_the_input_size_can_change() -> None:
    model = vit().double()
    model.set_input_size((96, 64))
    x = real_image(96, dtype=torch.float64)[..., :64]
    explanation = assert_exact(enliven(model, x), x, 1e-10)
    share = explanation.contributions.sum() / (explanation.logit - explanation.logit_bias)
    assert share.item() == pytest.approx(1, abs=1e-10)


def test_formats() -> None:
    model, x = vit(), real_image(64, 2)
    expected = model(x).detach()
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected)
    if timm_vits_trace():
        torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), expected)
    with pytest.raises(ModelStateError, match="TorchScript does not support positions='attention'"):
        torch.jit.script(model)


def test_an_attention_layer_by_itself() -> None:
    tokens = torch.rand(1, 17, 192)
    assert vit().blocks[0].attn(tokens).shape == (1, 17, 192)
    with pytest.raises(ModelStateError, match="it needs the model's grid"):
        vit(dynamic_img_size=True).blocks[0].attn(tokens)


@pytest.mark.parametrize("arch", ["eva02_tiny_patch14_224", "hiera_tiny_224", "resnet18"])
def test_other_models_are_refused(arch: str) -> None:
    with pytest.raises(UnsupportedModuleError, match="needs a vision transformer of timm's"):
        bcosify(timm.create_model(arch), BcosConfig(positions="attention"))
