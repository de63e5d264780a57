"""Models that are made without memory, and filled later: nothing may be left to chance."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models._manipulate import reinit_non_persistent_buffers
from torch import Tensor, nn

from tests.helpers import real_image
from timm_bcos import BcosConfig, bcosify

ARCHITECTURES: dict[str, dict] = {
    "a stem": dict(model_name="bcosify", arch="test_resnet", antialias=True),
    "a stem that encodes": dict(model_name="bcosv2_resnet18", num_classes=5),
    "gates": dict(model_name="bcosify", arch="test_efficientnet", bias="reference"),
    "a reader": dict(model_name="bcosify", arch="test_mambaout"),
    "zeros for biases": dict(model_name="bcosify", arch="convnextv2_atto", num_classes=5),
    "positions": dict(model_name="bcosify", arch="test_vit", positions="attention"),
    "fixed positions": dict(model_name="bcosify", arch="test_vit_relpos"),
    "a sequence": {},
}


def create(name: str) -> nn.Module:
    if name == "a sequence":
        layers = [nn.Unfold(4, stride=4), nn.Flatten(), nn.Linear(48 * 1600, 4)]
        return bcosify(nn.Sequential(*layers), BcosConfig(mean=(0.4,), std=(0.3,))).eval()
    return timm.create_model(**ARCHITECTURES[name]).eval()


def forget(model: nn.Module) -> None:
    """What `to_empty` leaves may be anything: this is the worst of it."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(float("nan") if tensor.is_floating_point() else 255)


def same(model: nn.Module, original: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(model(x), original(x), rtol=0, atol=0)


@pytest.fixture(params=ARCHITECTURES)
def case(request: pytest.FixtureRequest) -> tuple[str, nn.Module, Tensor]:
    original = create(request.param)
    config = getattr(original, "pretrained_cfg", {})
    return request.param, original, real_image(config.get("input_size", (3, 160, 160))[-1])


def test_a_model_of_the_meta_device_is_filled_by_a_state_dict(case: tuple[str, nn.Module, Tensor]) -> None:
    name, original, x = case
    with torch.device("meta"):
        model = create(name)
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    model.to_empty(device="cpu")
    forget(model)
    model.load_state_dict(original.state_dict())
    if name == "fixed positions":  # of timm's own, which plain models lose too
        reinit_non_persistent_buffers(model)
    same(model, original, x)
    forget(model)
    model.load_state_dict(original.state_dict())
    reinit_non_persistent_buffers(model)  # timm's way
    same(model, original, x)


def test_a_model_of_the_meta_device_takes_a_state_dict_over(case: tuple[str, nn.Module, Tensor]) -> None:
    name, original, x = case
    if name == "fixed positions":
        pytest.skip("timm's own tables stay on the meta device, of plain networks too")
    with torch.device("meta"):
        model = create(name)
    model.load_state_dict(original.state_dict(), assign=True)
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    same(model, original, x)


def test_every_buffer_is_made_again_in_any_dtype(case: tuple[str, nn.Module, Tensor]) -> None:
    _, original, _ = case
    model = original.double()
    before = {name: value.clone() for name, value in model.named_buffers()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    forget(model)
    model.load_state_dict(state)
    reinit_non_persistent_buffers(model)
    for name, value in model.named_buffers():
        torch.testing.assert_close(value, before[name], rtol=1e-6, atol=0)


@pytest.mark.parametrize("way", ["dispatch", "assign", "buffers too"])
def test_models_that_accelerate_makes_without_weights(
    way: str, case: tuple[str, nn.Module, Tensor], tmp_path: Path
) -> None:
    accelerate = pytest.importorskip("accelerate")
    name, original, x = case
    save_file(original.state_dict(), tmp_path / "model.safetensors", {"format": "pt"})
    with accelerate.init_empty_weights(include_buffers=way == "buffers too"):
        model = create(name)
    if way == "assign":
        model.load_state_dict(original.state_dict(), assign=True)
    elif way == "dispatch":
        path = str(tmp_path / "model.safetensors")
        model = accelerate.load_checkpoint_and_dispatch(model, path, device_map={"": "cpu"}, strict=True)
    else:
        model.to_empty(device="cpu")
        forget(model)
        model.load_state_dict(original.state_dict())
        reinit_non_persistent_buffers(model)
    same(model, original, x)
