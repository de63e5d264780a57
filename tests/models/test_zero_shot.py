"""Similarity to embeddings of images and texts, with towers of CLIP, SigLIP and DINOv3 made small."""

import re
import sys
from importlib.util import find_spec

import pytest
import timm
import torch
from torch import Tensor, nn

from tests.helpers import real_image
from timm_bcos import BcosConfig, InputError, ZeroShotClassifier, bcosify, check, contrast, embed_texts, explain
from timm_bcos.models.class_names import class_names

TOWERS = {
    "CLIP": ("vit_base_patch16_clip_224", dict(num_classes=64)),
    "SigLIP": ("vit_base_patch16_siglip_224", {}),
    "SigLIP 2": ("vit_base_patch16_siglip_gap_224", {}),
    "DINOv3": ("vit_small_patch16_dinov3", {}),
}
SMALL = dict(depth=2, embed_dim=64, num_heads=2, img_size=64)


@pytest.fixture(scope="module")
def x() -> Tensor:
    return real_image(64, 2, torch.float64)


def tower(name: str, positions: str = "keep") -> nn.Module:
    arch, kwargs = TOWERS[name]
    plain = timm.create_model(arch, **SMALL, **kwargs).double()
    for parameter in plain.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return bcosify(plain, BcosConfig.finetune(b=1.5, bias=True, positions=positions)).eval()


@pytest.mark.parametrize("positions", ["keep", "attention"])
@pytest.mark.parametrize("name", TOWERS)
def test_similarity_to_another_image(name: str, positions: str, x: Tensor) -> None:
    """The cosine of two embeddings, and its explanation beside the embedding's own rows of W(x)."""
    image = tower(name, positions)
    other = image(real_image(64, 1, torch.float64).flip(-1))
    model = ZeroShotClassifier(image, other, scale=1).eval()
    embedding = image(x)
    cosine = torch.cosine_similarity(embedding, other)
    torch.testing.assert_close(model(x)[:, 0], cosine)
    found = explain(model, x, 0)
    assert found.completeness_error.max() <= 1e-10 and not found.violations
    direction = other[0] / other.norm() / embedding.norm(dim=1, keepdim=True)
    literal = explain(image, x, direction.detach())
    torch.testing.assert_close(found.weights, literal.weights, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(found.bias, literal.bias, rtol=1e-8, atol=1e-12)
    assert check(model, x).exact


@pytest.mark.parametrize("name", TOWERS)
def test_towers_are_exact(name: str, x: Tensor) -> None:
    assert check(tower(name), x).exact


def test_rotary_positions_change_nothing(x: Tensor) -> None:
    """They act in queries and keys; class and register tokens are all that DINOv3 adds, and are 0 here."""
    models = []
    for positions in ("keep", "attention"):
        torch.manual_seed(0)
        plain = timm.create_model("vit_small_patch16_dinov3", **SMALL, global_pool="avg").double()
        plain.cls_token.data.zero_()
        plain.reg_token.data.zero_()
        models.append(bcosify(plain, BcosConfig.finetune(b=1.5, positions=positions)).eval())
    keep, attention = (explain(model, x, 3) for model in models)
    assert keep.logit.abs().min() > 1e-6 and attention.completeness_error.max() <= 1e-10
    torch.testing.assert_close(attention.weights, keep.weights)


def test_classes_have_names_and_probabilities(x: Tensor) -> None:
    image = tower("SigLIP")
    names = ["cat", "dog", "cup"]
    model = ZeroShotClassifier(
        image, torch.randn(3, 64, dtype=torch.float64), scale=10, bias=-5.0, class_names=names, probability="sigmoid"
    ).eval()
    found = explain(model, x)
    torch.testing.assert_close(found.probability, model(x).sigmoid())
    assert found.completeness_error.max() <= 1e-10
    assert class_names(model) == names
    pair = contrast(model, x, 0, {1, 2})
    assert pair.completeness_error.max() <= 1e-10
    softmax = ZeroShotClassifier(image, torch.randn(3, 64, dtype=torch.float64)).eval()
    torch.testing.assert_close(explain(softmax, x).probability.sum(1), torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize(
    ("embeddings", "names", "text"),
    [
        (torch.randn(64), None, "embeddings (64,): give a floating-point tensor (K, D)"),
        ([[1.0]], None, "embeddings list: give a floating-point tensor (K, D)"),
        (torch.ones(2, 64).long(), None, "embeddings (2, 64): give a floating-point tensor"),
        (torch.zeros(2, 64), None, "an embedding is 0 or not finite"),
        (torch.full((2, 64), float("nan")), None, "an embedding is 0 or not finite"),
        (torch.randn(2, 64), ["cat"], "1 class names for 2 embeddings: give one for each"),
    ],
)
def test_wrong_embeddings(embeddings: Tensor, names: list[str] | None, text: str) -> None:
    with pytest.raises(InputError, match=re.escape(text)):
        ZeroShotClassifier(nn.Identity(), embeddings, class_names=names)


def test_embeddings_of_another_model(x: Tensor) -> None:
    model = ZeroShotClassifier(tower("SigLIP"), torch.randn(2, 32, dtype=torch.float64)).eval()
    with pytest.raises(
        InputError, match=re.escape("the tower gives embeddings of shape (64,), the classes have (32,)")
    ):
        explain(model, x)


def test_texts() -> None:
    """With random weights: the arithmetic of templates, and OpenCLIP's own embedding of a sentence."""
    open_clip = pytest.importorskip("open_clip")
    model = open_clip.create_model("RN50", pretrained=None)
    templates = ("a photo of a {}.", "a drawing of a {}.")
    found = embed_texts(["cat", "dog"], model, templates=templates)
    assert found.shape == (2, 1024)
    tokens = open_clip.get_tokenizer("RN50")([template.format("dog") for template in templates])
    with torch.no_grad():
        sentences = model.encode_text(tokens, normalize=True)
    torch.testing.assert_close(found[1], nn.functional.normalize(sentences.mean(0), dim=0))


def test_texts_that_cannot_be_embedded(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="texts='cat': give a list of class names"):
        embed_texts("cat")
    if find_spec("open_clip"):
        with pytest.raises(InputError, match=r"OpenCLIP has no model 'ViT-B-17': open_clip.list_models\(\) lists them"):
            embed_texts(["cat"], "ViT-B-17")
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(InputError, match=re.escape("texts need OpenCLIP: pip install 'timm_bcos[text]'")):
        embed_texts(["cat"])
