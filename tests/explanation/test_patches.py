"""NaFlex inputs: patches with coordinates, beside the images that they come from."""

import copy
import re
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from tests.helpers import real_image
from timm_bcos import BcosConfig, InputError, bcosify, check, contrast, explain, explain_targets, fold_patches

pytest.importorskip("timm.models.naflexvit")
SIZE = 16  # of a patch
ROWS, COLUMNS = 4, 3


def naflex(name: str = "naflexvit_base_patch16_gap", b: float = 1.5, **options: Any) -> tuple[nn.Module, nn.Module]:
    """A plain model and its conversion."""
    torch.manual_seed(0)
    make = lambda: timm.create_model(name, depth=2, embed_dim=32, num_heads=2, num_classes=5, **options)  # noqa: E731
    plain, other = make().double().eval(), make().double().eval()
    with torch.no_grad():
        for parameter in plain.parameters():
            if parameter.ndim <= 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    other.load_state_dict(plain.state_dict())
    return plain, bcosify(other, BcosConfig.finetune(b=b, bias=True)).eval()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return naflex()[1]


@pytest.fixture(scope="module")
def x() -> Tensor:
    return real_image(64, 2, torch.float64)[..., : SIZE * COLUMNS]


def patches_of(x: Tensor) -> dict[str, Tensor]:
    """Patch by patch, pixel by pixel."""
    rows, columns = x.shape[2] // SIZE, x.shape[3] // SIZE
    places = [(row, column) for row in range(rows) for column in range(columns)]
    patches = torch.zeros(len(x), len(places), SIZE * SIZE * 3, dtype=x.dtype)
    for n in range(len(x)):
        for i, (row, column) in enumerate(places):
            patch = x[n, :, row * SIZE : (row + 1) * SIZE, column * SIZE : (column + 1) * SIZE]
            patches[n, i] = patch.permute(1, 2, 0).flatten()
    coord = torch.tensor(places).repeat(len(x), 1, 1)
    return dict(patches=patches, patch_coord=coord, patch_valid=torch.ones(coord.shape[:2], dtype=torch.bool))


def test_the_conversion_computes_what_the_plain_model_computes(x: Tensor) -> None:
    """At B = 1, for images and for patches, which the plain model wants normalized."""
    plain, model = naflex(b=1)
    cfg = plain.pretrained_cfg
    mean, std = (torch.tensor(cfg[name], dtype=x.dtype)[:, None, None] for name in ("mean", "std"))
    expected = plain((x - mean) / std)
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(model(patches_of(x)), expected)
    inputs = patches_of(x)
    torch.testing.assert_close(model(inputs.pop("patches"), **inputs), expected)
    features: Any = model.forward_features(**patches_of(x))  # type: ignore[operator]
    torch.testing.assert_close(features["patches"], model.forward_features(x))  # type: ignore[operator]
    pooled = model.forward_head(**features, pre_logits=True)  # type: ignore[operator]
    torch.testing.assert_close(pooled, model.forward_head(model.forward_features(x), True))  # type: ignore[operator]


@pytest.mark.parametrize(
    "name", ["naflexvit_base_patch16_par_gap", "naflexvit_base_patch16_map", "naflexvit_so150m2_patch16_reg1_gap"]
)
def test_patches_are_explained_as_the_image(name: str, x: Tensor) -> None:
    model, inputs = naflex(name)[1], patches_of(x)
    found, whole = explain(model, inputs, [1, 3]), explain(model, x, [1, 3])
    assert found.weights.shape == (2, 6, ROWS * COLUMNS * SIZE, SIZE) and not found.violations
    assert found.completeness_error.max() <= 1e-10
    torch.testing.assert_close(found.logits, model(inputs))
    folded = fold_patches(found, inputs["patch_coord"], inputs["patch_valid"])
    assert torch.equal(folded.image, x)
    for field in ("weights", "bias", "contribution_map", "logits"):
        torch.testing.assert_close(getattr(folded, field), getattr(whole, field), rtol=1e-9, atol=1e-14)
    assert len(folded.plot().axes) == len(whole.plot().axes)


def test_each_pixel_contributes_to_its_patch(model: nn.Module, x: Tensor) -> None:
    """Patch i of the strip holds the contributions of the pixels at the patch's coordinates."""
    inputs = patches_of(x)
    contributions = explain(model, inputs, 2).contribution_map.unflatten(1, (-1, SIZE))  # (N, L, P, P)
    image = explain(model, x, 2).contribution_map
    for i, (row, column) in enumerate(inputs["patch_coord"][0].tolist()):
        part = image[:, row * SIZE : (row + 1) * SIZE, column * SIZE : (column + 1) * SIZE]
        torch.testing.assert_close(contributions[:, i], part, rtol=1e-9, atol=1e-14)


def test_images_of_several_sizes_in_one_batch(model: nn.Module, x: Tensor) -> None:
    """The second image has two rows and two columns less; its padding contributes nothing."""
    small = x[1:, :, : 2 * SIZE, : 2 * SIZE]
    inputs, own = patches_of(x), patches_of(small)
    for name, value in own.items():
        inputs[name][1] = 0
        inputs[name][1, :4] = value[0]
    found, alone = explain(model, inputs, 4), explain(model, small, 4)
    assert found.completeness_error.max() <= 1e-10
    torch.testing.assert_close(found.weights[1, :, 4 * SIZE :], torch.zeros_like(found.weights[1, :, 4 * SIZE :]))
    folded = fold_patches(found.weights, inputs["patch_coord"], inputs["patch_valid"])
    torch.testing.assert_close(folded[1, :, : 2 * SIZE, : 2 * SIZE], alone.weights[0], rtol=1e-9, atol=1e-14)
    assert not folded[1, :, 2 * SIZE :].any() and not folded[1, :, :, 2 * SIZE :].any()
    singly = explain(model, inputs, 4, chunk=1)
    torch.testing.assert_close(singly.weights, found.weights, rtol=1e-9, atol=1e-14)


def test_everything_else_takes_patches_too(model: Any, x: Tensor) -> None:
    inputs = patches_of(x)
    given: dict[str, Any] = dict(rtol=1e-9, atol=1e-14)
    fold = lambda values: fold_patches(values, inputs["patch_coord"])  # noqa: E731
    torch.testing.assert_close(fold(contrast(model, inputs, 1, 2).weights), contrast(model, x, 1, 2).weights, **given)
    for one, target in zip(explain_targets(model, inputs, [0, 4]), (0, 4), strict=True):
        torch.testing.assert_close(fold(one.weights), explain(model, x, target).weights, **given)
    more = inputs | dict(seq_len=12, target=torch.zeros(2))  # which a loader may add, and the model ignores
    torch.testing.assert_close(explain(model, more, 1).weights, explain(model, inputs, 1).weights)
    patches = inputs["patches"]
    rest = {name: value for name, value in inputs.items() if name != "patches"}
    torch.testing.assert_close(explain(model, patches, 1, extra=rest).weights, explain(model, inputs, 1).weights)
    unit = explain(model, inputs, 3, layer=model.blocks[0], position=4)
    torch.testing.assert_close(fold(unit.weights), explain(model, x, 3, layer="blocks.0", position=4).weights, **given)
    box = (0, 2 * SIZE, SIZE, 3 * SIZE)  # the third patch of the strip
    third = explain(model, inputs, 3, layer="blocks.0", region=box)
    expected = explain(model, inputs, 3, layer="blocks.0", position=model.num_prefix_tokens + 2)
    torch.testing.assert_close(third.weights, expected.weights, **given)


def test_patches_that_are_not_flat(model: nn.Module, x: Tensor) -> None:
    inputs = patches_of(x)
    square = inputs | dict(patches=inputs["patches"].unflatten(2, (SIZE, SIZE, 3)))
    torch.testing.assert_close(explain(model, square, 1).weights, explain(model, inputs, 1).weights)


def test_check_takes_patches(model: Any, x: Tensor) -> None:
    report = check(model, patches_of(x))
    assert report.exact and report.completeness_error <= 1e-10, report
    broken = copy.deepcopy(model)
    broken.blocks[1].norm1 = Shifted().eval()
    found = check(broken, patches_of(x))
    assert not found.exact and found.breaks_at == "blocks.1.norm1"
    assert found.breaks_at == check(broken, x).breaks_at
    assert all(not violation.module.startswith("model") for violation in found.violations)


class Shifted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.cos(x)  # which no rule knows


def wrong(x: Tensor, **changes: Any) -> dict[str, Any]:
    return {name: value for name, value in (patches_of(x) | changes).items() if value is not None}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (dict(patches=None), "an input with 'patch_coord', 'patch_valid': 'patches' is missing"),
        (dict(patch_valid=None), "'patch_valid' is missing; NaFlex models take dict(patches=..., patch_coord=..."),
        (
            dict(patches=torch.rand(2, 12, 700)),
            "patches of shape (2, 12, 700): BcosNaFlexVit takes (N, L, 768), which is 16",
        ),
        (dict(patches=[1]), "expected a tensor of patches, got list"),
        (
            dict(patch_coord=torch.zeros(2, 11, 2)),
            "patch_coord: expected shape (2, 12, 2) for 12 patches per image, got",
        ),
        (dict(patch_valid=True), "patch_valid: expected shape (2, 12) for 12 patches per image, got bool"),
        (dict(patches=torch.full((2, 12, 768), 200.0)), "pixels must lie in [0, 1]"),
    ],
)
def test_inputs_that_do_not_fit(model: nn.Module, x: Tensor, changes: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=re.escape(text)):
        explain(model, wrong(x, **changes))


def test_models_of_images_take_no_patches(x: Tensor) -> None:
    model = bcosify(timm.create_model("test_vit", num_classes=3).double()).eval()
    with pytest.raises(InputError, match=r"BcosVisionTransformer takes images \(N, 3, H, W\), no patches"):
        explain(model, patches_of(x))
    with pytest.raises(InputError, match=r"patch_coord .* do not fit values of shape"):
        fold_patches(torch.rand(2, 64, 16), torch.zeros(2, 3, 2), torch.ones(2, 4))
    with pytest.raises(InputError, match="negative"):
        fold_patches(torch.rand(1, 64, 16), torch.full((1, 4, 2), -1))
