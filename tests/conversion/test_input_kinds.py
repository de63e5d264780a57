"""Models that read no images, and gates of models that take images of one size only."""

import copy

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

import timm_bcos
from tests.helpers import real_image
from timm_bcos import BcosConfig, InputError, UnsupportedModuleError
from timm_bcos.conversion.inspection import reference_activations
from timm_bcos.nn.layers import ShiftedActivation

PIXELS = BcosConfig(mean=(0.0,), std=(1.0,))


def sequences() -> nn.Module:
    return nn.Sequential(nn.Conv1d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, 2))


def volumes() -> nn.Module:
    return nn.Sequential(nn.Conv3d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2))


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = sequences()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (sequences, "0: a Conv1d takes 3 dimensions and gets images, which have 4"),
        (volumes, "0: a Conv3d takes 5 dimensions"),
        (Wrapped, r"inner\.0: a Conv1d takes 3"),
        (lambda: nn.Sequential(nn.ConvTranspose1d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2)), "0: a ConvTranspose1d"),
    ],
)
def test_models_of_sequences_and_volumes_are_refused_unchanged(make: type[nn.Module], problem: str) -> None:
    network = make()
    before = copy.deepcopy(network)
    with pytest.raises(UnsupportedModuleError, match=problem):
        timm_bcos.bcosify(network, PIXELS)
    assert str(network) == str(before)
    for name, value in before.state_dict().items():
        assert torch.equal(network.state_dict()[name], value)


class AlongRows(nn.Module):
    """A sequence made of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 8, 5, stride=5)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x.flatten(2)).mean(2))  # type: ignore[no-any-return]


class AsVolume(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(1, 8, (3, 4, 4), stride=4)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x[:, None]).mean((2, 3, 4)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", [AlongRows, AsVolume])
def test_models_that_make_sequences_or_volumes_of_images_convert(kind: type[nn.Module]) -> None:
    network = timm_bcos.bcosify(kind(), PIXELS).eval()
    x = real_image(32, 2)
    timm_bcos.calibrate(network, x)
    assert timm_bcos.check(network, x).exact


class OfOneSize(nn.Module):
    """Its gates are in front of a layer of all positions."""

    def __init__(self, says_size: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = BatchNormAct2d(6)
        self.fc = nn.Linear(6 * 32 * 32, 4)
        if says_size:
            self.pretrained_cfg = dict(input_size=(3, 32, 32), mean=(0.4,) * 3, std=(0.2,) * 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(self.conv(x)).flatten(1))  # type: ignore[no-any-return]


def test_gates_of_a_model_of_a_fixed_size() -> None:
    network = OfOneSize(True).eval()
    with torch.no_grad():
        network.norm.running_mean.normal_(std=0.3)
        network.conv.bias.normal_()  # type: ignore[union-attr]
        expected = torch.nn.functional.batch_norm(
            network.conv(torch.zeros(1, 3, 32, 32)), network.norm.running_mean, network.norm.running_var,
            network.norm.weight, network.norm.bias, eps=network.norm.eps,
        )[0, :, 16, 16]  # fmt: skip
    torch.testing.assert_close(reference_activations(network)["norm"], expected)
    converted = timm_bcos.bcosify(network, BcosConfig.finetune(bias="reference"))
    (gate,) = [module for module in converted.modules() if isinstance(module, ShiftedActivation)]
    torch.testing.assert_close(gate.shift.detach(), expected)


def test_gates_of_a_model_of_a_size_that_nobody_knows() -> None:
    network = OfOneSize(False).eval()
    with pytest.raises(InputError, match=r"OfOneSize does not run on one of 224 × 224 pixels.*dict\(input_size="):
        timm_bcos.bcosify(network, BcosConfig.finetune(bias="reference", mean=(0.5,), std=(0.5,)))
    assert type(network.norm) is BatchNormAct2d


def test_gates_of_a_timm_model_with_attention_of_a_fixed_size() -> None:
    model = timm.create_model("botnet26t_256", img_size=64, pretrained_cfg_overlay=dict(input_size=(3, 64, 64)))
    found = reference_activations(model.eval())
    gated = [m for m in model.modules() if type(m) is BatchNormAct2d and not isinstance(m.act, nn.Identity)]
    assert len(found) == len(gated) > 9 and all(value.isfinite().all() for value in found.values())
