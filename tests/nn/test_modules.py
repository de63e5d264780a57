"""Helpers for modules: where the channels of what a module returns are."""

import threading
from functools import partial
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import timm_bcos
from tests.helpers import enliven, real_image
from timm_bcos.nn.module_utils import channel_axis, first_output, frozen_copy, hooked

CONVNEXT = dict(depths=(1, 1, 1, 1), dims=(8, 12, 16, 20))
SWIN = dict(depths=(1, 1), embed_dim=24, num_heads=(2, 2), img_size=56)
# network, its options, image size, and for each layer its number of channels and the axis where they are
CASES: dict[str, tuple[dict[str, Any], int, dict[str, tuple[int, int]]]] = {
    "convnext_tiny": (CONVNEXT, 64, {
        "stem": (8, 1), "stem.0": (8, 1), "stem.1": (8, 1), "stages.0": (8, 1), "stages.0.blocks.0": (8, 1),
        "stages.0.blocks.0.conv_dw": (8, 1), "stages.0.blocks.0.norm": (8, 3), "stages.0.blocks.0.mlp": (8, 3),
        "stages.0.blocks.0.mlp.fc1": (32, 3), "stages.0.blocks.0.mlp.act": (32, 3),
        "stages.0.blocks.0.mlp.fc2": (8, 3), "stages.0.blocks.0.drop_path": (8, 1), "head.fc": (1000, 1),
    }),
    "swin_tiny_patch4_window7_224": (SWIN, 56, {
        "patch_embed": (24, 3), "patch_embed.proj": (24, 1), "patch_embed.norm": (24, 3), "layers.0": (24, 3),
        "layers.0.blocks.0.attn": (24, 2), "layers.0.blocks.0.mlp.fc1": (96, 2), "layers.1.downsample": (48, 3),
    }),
    "test_vit": ({}, 160, {
        "patch_embed": (64, 3), "patch_embed.proj": (64, 1), "blocks.0": (64, 2), "blocks.0.mlp": (64, 2),
        "blocks.0.mlp.fc1": (192, 2), "blocks.0.mlp.act": (192, 2), "blocks.0.attn.qkv": (192, 2),
    }),
    "vit_tiny_patch16_224": (dict(depth=1, img_size=64), 64, {"patch_embed": (192, 2), "norm": (192, 2)}),
    "resnet18": ({}, 64, {
        "layer4": (512, 1), "layer4.0": (512, 1), "layer4.0.conv1": (512, 1), "layer4.0.act2": (512, 1),
        "maxpool": (64, 1), "layer1.0.bn1": (64, 1), "fc": (1000, 1), "global_pool": (512, 1),
    }),
    "densenet121": (dict(growth_rate=8, block_config=(2, 2)), 64, {
        "features.denseblock1": (32, 1), "features.denseblock1.denselayer1": (8, 1), "features.transition1": (16, 1),
    }),
}  # fmt: skip


def outputs(model: nn.Module, x: Tensor, names: list[str]) -> dict[str, Tensor]:
    found: dict[int, Tensor] = {}
    modules = {name: model.get_submodule(name) for name in names}
    with torch.no_grad(), hooked(modules.values(), lambda m, _, output: found.update({id(m): first_output(output)})):
        model(x)
    return {name: found[id(module)] for name, module in modules.items()}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("is_converted", [False, True])
def test_channels_are_where_the_module_has_them(name: str, is_converted: bool) -> None:
    options, size, expected = CASES[name]
    model = timm.create_model(name, **options).eval()
    model = timm_bcos.bcosify(model).eval() if is_converted else model
    for layer, output in outputs(model, torch.rand(2, 3, size, size), list(expected)).items():
        channels, axis = expected[layer]
        assert output.shape[axis] == channels
        assert channel_axis(model.get_submodule(layer), output, model) == axis, layer


@pytest.mark.parametrize("layer", ["stages.0.blocks.0.mlp", "stages.0.blocks.0.mlp.fc2", "stages.0.blocks.0"])
def test_maps_with_as_many_rows_as_channels(layer: str) -> None:
    """Shapes say nothing here; types do."""
    model = timm.create_model("convnext_tiny", **(CONVNEXT | dict(dims=(16, 12, 16, 20)))).eval()
    (output,) = outputs(model, torch.rand(1, 3, 64, 64), [layer]).values()
    assert output.shape == (1, 16, 16, 16)
    assert channel_axis(model.get_submodule(layer), output, model) == (3 if "mlp" in layer else 1)


def test_frozen_copies_of_networks_that_keep_tensors() -> None:
    """Weight norm's product, and what hooks have stored, have graphs that a deep copy cannot follow."""
    model = nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 4)), nn.BatchNorm1d(4)).eval()
    model[1].seen = [model[0](torch.rand(2, 3))]
    model[1].again = dict(one=model[1].seen[0])
    copied, x = frozen_copy(model), torch.rand(2, 3, requires_grad=True)
    assert torch.equal(copied(x), model(x))
    assert not any(p.requires_grad for p in copied.parameters()) and all(p.requires_grad for p in model.parameters())
    tensors = zip(model.state_dict().values(), copied.state_dict().values(), strict=True)
    assert all(a.data_ptr() == b.data_ptr() for a, b in tensors)
    assert copied[1].seen[0].data_ptr() == model[1].seen[0].data_ptr()
    assert copied[1].again["one"] is copied[1].seen[0] and copied[1].seen is not model[1].seen


def test_without_a_network_or_a_known_type() -> None:
    assert channel_axis(nn.GELU(), torch.rand(2, 3, 4, 5)) == 1
    assert channel_axis(nn.GELU(), torch.rand(2, 4, 5)) == 2
    assert channel_axis(nn.Conv1d(3, 4, 1), torch.rand(2, 4, 5)) == 1
    assert channel_axis(nn.LayerNorm((3, 4, 5)), torch.rand(2, 3, 4, 5)) == 1
    assert channel_axis(nn.LayerNorm(5), torch.rand(2, 3, 4, 5)) == 3
    assert channel_axis(nn.Identity(), torch.rand(2, 3)) == 1


class Extractor:
    """What stores activations, and cannot be copied."""

    def __init__(self) -> None:
        self.lock, self.shapes = threading.Lock(), []

    def __call__(self, module: nn.Module, args: object, output: Tensor) -> None:
        self.store("call", module, args, output)

    def store(self, name: str, module: nn.Module, args: object, output: Tensor) -> None:
        with self.lock:
            self.shapes.append((name, tuple(output.shape)))


@pytest.mark.parametrize("kind", ["object", "partial"])
def test_hooks_are_not_copied_with_what_they_hold(kind: str) -> None:
    model, x = (
        enliven(timm.create_model("bcosify", arch="test_resnet", num_classes=4), real_image(64, 2)),
        real_image(64),
    )
    extractor = Extractor()
    hook = extractor if kind == "object" else partial(extractor.store, "partial")
    handle = model.layer1.register_forward_hook(hook)  # type: ignore[union-attr]
    name = "call" if kind == "object" else "partial"
    for use in (timm_bcos.check, timm_bcos.attribute, lambda model, x: timm_bcos.fuse(model)(x)):
        extractor.shapes.clear()
        use(model, x)
        assert extractor.shapes and {found for found, _ in extractor.shapes} == {name}
    handle.remove()


class Remembering(nn.Module):
    """A network whose own hook fills what it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.seen = nn.Conv2d(3, 4, 1), []
        self.conv.register_forward_hook(self._see)

    def _see(self, module: nn.Module, args: object, output: Tensor) -> None:
        self.seen.append(output)

    def forward(self, x: Tensor) -> Tensor:
        self.conv(x)
        return self.seen.pop()  # type: ignore[no-any-return]


def test_hooks_of_the_network_itself_are_those_of_the_copy() -> None:
    model = Remembering()
    new, x = frozen_copy(model), torch.rand(1, 3, 2, 2)
    torch.testing.assert_close(new(x), model.conv(x))
    assert len(model.seen) == 1 and not new.seen
