"""Zero-shot classification: the similarity of an image to texts, or to other images, explained like any logit.

An image tower (CLIP, https://arxiv.org/abs/2103.00020; SigLIP, https://arxiv.org/abs/2303.15343; DINOv3) computes an
embedding e(x) = W(x) · x + constants. Its cosine with the embedding t of a class is t̂ · e(x) / ‖e(x)‖. Apart from the
normalization factor 1 / ‖e(x)‖ it is linear in e(x), so that t̂ · W(x) / ‖e(x)‖ explains it exactly.
"""

from collections.abc import Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError

__all__ = ["ZeroShotClassifier", "embed_texts"]


class ZeroShotClassifier(nn.Module):
    """An image tower with one logit for each of K embeddings: scale · cos(tower(x), embedding) + bias.

    Args:
        tower: B-cos model whose outputs are embeddings, (N, C, H, W) to (N, D).
        embeddings: Embeddings of the classes, (K, D), of texts (`embed_texts`) or of other images (`tower(images)`).
            Only their directions count.
        scale: Factor of the cosines. CLIP learns about 100, SigLIP about 118.
        bias: Constant added to each logit. SigLIP learns about -13.
        class_names: Names of the K classes.
        probability: 'softmax' for towers trained like CLIP, 'sigmoid' for SigLIP.

    Raises:
        InputError: If embeddings are not of shape (K, D), are 0 or not finite, or if the number of names is not K.

    Examples:
        >>> tower = bcosify(timm.create_model("vit_base_patch16_siglip_224", pretrained=True)).eval()
        >>> model = ZeroShotClassifier(tower, tower(other_images)).eval()
        >>> timm_bcos.explain(model, x, target=0)  # why x is similar to the first of the other images
    """

    embeddings: Tensor

    def __init__(
        self,
        tower: nn.Module,
        embeddings: Tensor,
        *,
        scale: float = 100.0,
        bias: float = 0.0,
        class_names: Sequence[str] | None = None,
        probability: str = "softmax",
    ) -> None:
        super().__init__()
        _check_embeddings(embeddings)
        if class_names is not None and len(class_names) != len(embeddings):
            raise InputError(f"{len(class_names)} class names for {len(embeddings)} embeddings: give one for each")
        self.tower = tower
        self.register_buffer("embeddings", F.normalize(embeddings.detach().clone(), dim=-1))
        self.scale = scale
        self.bias = bias
        self.num_classes = len(embeddings)
        self.pretrained_cfg: dict[str, Any] = dict(getattr(tower, "pretrained_cfg", None) or {})
        self.pretrained_cfg |= dict(num_classes=self.num_classes, label_names=list(class_names or ()) or None)
        config: Any = getattr(tower, "bcos_config", None)
        if config is not None:
            self.bcos_config = replace(config, probability=probability)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) in [0, 1] to (N, K) logits."""
        found = self.tower(x)
        if not torch.jit.is_scripting() and found.shape[1:] != self.embeddings.shape[1:]:
            raise InputError(
                f"the tower gives embeddings of shape {tuple(found.shape[1:])}, the classes have "
                f"{tuple(self.embeddings.shape[1:])}: take both from the same model"
            )
        return F.normalize(found, dim=-1) @ (self.scale * self.embeddings.T).to(found.dtype) + self.bias


def _check_embeddings(embeddings: object) -> None:
    if not isinstance(embeddings, Tensor) or embeddings.ndim != 2 or not embeddings.is_floating_point():
        shape = tuple(embeddings.shape) if isinstance(embeddings, Tensor) else type(embeddings).__name__
        raise InputError(f"embeddings {shape}: give a floating-point tensor (K, D), a row for each class")
    if not bool(embeddings.isfinite().all()) or bool((embeddings == 0).all(1).any()):
        raise InputError("an embedding is 0 or not finite: it has no direction")


@torch.no_grad()
def embed_texts(
    texts: Sequence[str],
    model: str | nn.Module = "ViT-B-16",
    pretrained: str | None = "openai",
    *,
    templates: Sequence[str] = ("a photo of a {}.",),
) -> Tensor:
    """Compute embeddings of class names with a text tower of OpenCLIP (extra `text`).

    Args:
        texts: Names of the K classes.
        model: OpenCLIP's name of the model that the image tower belongs to, or the model itself, for which the
            tokenizer of OpenAI's models is used.
        pretrained: OpenCLIP's name of the weights; None for random ones.
        templates: Sentences with a placeholder {} for the name. Their embeddings are averaged (section 3.1.4 of CLIP's
            paper).

    Returns:
        Embeddings of length 1, (K, D).

    Raises:
        InputError: If OpenCLIP is not installed or does not know the model.

    Examples:
        >>> classes = embed_texts(["cat", "dog"], "ViT-B-16", "openai")
        >>> model = ZeroShotClassifier(tower, classes, class_names=["cat", "dog"])
    """
    if not texts or isinstance(texts, str):
        raise InputError(f"texts={texts!r}: give a list of class names")
    open_clip = _open_clip()
    name = model if isinstance(model, str) else "ViT-B-16"  # all of OpenAI's models have this tokenizer
    if isinstance(model, str) and model not in open_clip.list_models():
        raise InputError(f"OpenCLIP has no model {model!r}: open_clip.list_models() lists them")
    tower: Any = open_clip.create_model(model, pretrained=pretrained) if isinstance(model, str) else model
    tokenizer = open_clip.get_tokenizer(name)
    sentences = [template.format(text) for text in texts for template in templates]
    found: Tensor = F.normalize(tower.eval().encode_text(tokenizer(sentences)), dim=-1)
    return F.normalize(found.unflatten(0, (len(texts), len(templates))).mean(1), dim=-1)


def _open_clip() -> ModuleType:
    try:
        import open_clip
    except ImportError as error:
        raise InputError("texts need OpenCLIP: pip install 'timm_bcos[text]'") from error
    return open_clip
