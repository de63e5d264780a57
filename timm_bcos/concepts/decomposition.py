"""Decomposition of a logit into concepts, and of each concept into pixels. Both steps are exact.

For each image x, the logit of a B-cos model is linear in the features A of a layer, and these are linear in x:
logit = ⟨G(x), A(x)⟩ + other, and A(x) = W(x) · x + constants. With A = Σ_k d_k · u_k + rest, concept k contributes
⟨G, d_k · u_k⟩ = ⟨R_k, A⟩, where R_k = gate_k · (dᵀ_k G) · e_k, and its row of pixels is R_k · W(x). FaCT (NeurIPS 2025)
does this for a sparse autoencoder in B-cos models; this module does it for any concepts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..dynamic_linear.mode import ordinary_autograd
from ..dynamic_linear.violations import Violation
from ..errors import InputError, TargetError
from ..explanation.api import warn_if_inexact, with_single_image_fallback
from ..explanation.inputs import check_images, check_model
from ..explanation.linear_parts import linear_parts
from ..explanation.linearized import LinearizedModel
from ..explanation.outputs import Selection
from ..explanation.request import Request, Targets, check_target
from ..explanation.result import Explanation
from .dictionary import Concepts

__all__ = ["ConceptDecomposition", "explain_concepts"]


@dataclass(frozen=True, eq=False)
class ConceptDecomposition:
    """Decomposition of a logit of each image: logit = Σ shares + rest + other.

    Attributes:
        explanation: Explanation of the logit by pixels.
        concepts: Dictionary of the concepts.
        shares: Contribution of each concept to the logit (N, K).
        rest: Contribution of the features that no concept covers (N,).
        other: Contribution of paths around the layer, and constants after it (N,).
        strengths: Coefficient of each concept at the layer's P positions (N, K, P).
        strongest: Concepts with the largest absolute shares (N, T), largest first.
        pixels: T explanations by pixels, of the share of each image's strongest concept, of the second, and so on.
    """

    explanation: Explanation
    concepts: Concepts
    shares: Tensor
    rest: Tensor
    other: Tensor
    strengths: Tensor
    strongest: Tensor
    pixels: list[Explanation]

    @property
    def completeness_error(self) -> Tensor:
        """|Σ shares + rest + other - logit| / |logit - logit bias| (N,): rounding error only."""
        total = self.shares.double().sum(1) + self.rest.double() + self.other.double()
        logit = self.explanation.logit.double()
        error = (total - logit).abs()
        return torch.where(error == 0, error, error / (logit - self.explanation.logit_bias).abs())

    @classmethod
    def stack(cls, decompositions: Sequence["ConceptDecomposition"]) -> "ConceptDecomposition":
        """Join decompositions of the same concepts into one for all images."""
        joined = {
            name: torch.cat([getattr(decomposition, name) for decomposition in decompositions])
            for name in ("shares", "rest", "other", "strengths", "strongest")
        }
        columns = zip(*(decomposition.pixels for decomposition in decompositions), strict=True)
        pixels = [Explanation.stack(column) for column in columns]
        whole = Explanation.stack([decomposition.explanation for decomposition in decompositions])
        return cls(whole, decompositions[0].concepts, **joined, pixels=pixels)


def explain_concepts(
    model: nn.Module, x: Tensor, concepts: Concepts, target: Targets = None, *, top: int = 3
) -> ConceptDecomposition:
    """Explain a logit of each image by a layer's concepts, and the strongest concepts by pixels.

    Args:
        model: A B-cos model in eval mode.
        x: Images, as in `explain`.
        concepts: Concepts of one of the model's layers.
        target: Class, as in `explain`.
        top: Number T of concepts to explain by pixels; 0 for none.

    Raises:
        InputError: If the concepts have another number of channels than the layer, or `top` is negative; and as in
            `explain`.
        TargetError: If no logit depends on the layer; and as in `explain`.
        ModelStateError: As in `explain`.

    Warns:
        InexactWarning: As in `explain`.
    """
    with torch.inference_mode(False):
        check_images(x, check_model(model))
        request = Request.checked(x, check_target(target, len(x)))
    if isinstance(top, bool) or not isinstance(top, int) or top < 0:
        raise InputError(f"top={top!r}: give the number of concepts to explain by pixels, at least 0")

    def decompose(images: slice) -> ConceptDecomposition:
        run = LinearizedModel(model, x[images], Request(layer=concepts.layer))
        return _decomposed(run, concepts, request.of_images(images), min(top, len(concepts)))

    def with_violations(decomposition: ConceptDecomposition, violations: tuple[Violation, ...]) -> ConceptDecomposition:
        whole = decomposition.explanation
        whole = replace(whole, violations=tuple(dict.fromkeys((*whole.violations, *violations))))
        return replace(decomposition, explanation=whole)

    with ordinary_autograd(x.device):
        decomposition = with_single_image_fallback(
            decompose, range(len(x)), lambda found: [found.explanation], ConceptDecomposition.stack, with_violations
        )
    warn_if_inexact([decomposition.explanation, *decomposition.pixels], 2)
    return decomposition


def _decomposed(run: LinearizedModel, concepts: Concepts, request: Request, top: int) -> ConceptDecomposition:
    features = run.outputs.maps  # (N, C, P)
    if features.shape[1] != concepts.decoder.shape[1]:
        raise InputError(
            f"the concepts have {concepts.decoder.shape[1]} channels, layer {concepts.layer!r} has {features.shape[1]}"
        )
    concepts = concepts.to(features)
    selection = run.final.select(request)
    slopes = _slopes(selection, run)
    gates = concepts.gates(features.detach())
    strengths = gates * concepts.scores(features.detach())
    weights = torch.einsum("kc,ncp->nkp", concepts.decoder, slopes)  # dᵀ_k G
    shares = (weights * strengths).sum(2)
    rest = (slopes * (features.detach() - concepts.decode(strengths))).sum((1, 2))
    strongest = shares.abs().topk(top, dim=1).indices
    shown = _values(features, concepts, weights * gates, strongest)
    through = (slopes * features).sum()
    whole, by_features, *parts = linear_parts(
        torch.stack([selection.values.sum(), through, *shown]), run.leaf, run.tracker
    )
    around = ((whole.weights - by_features.weights) * run.inputs).sum((1, 2, 3))
    other = around + (whole.constant_bias + whole.gate_bias) - (by_features.constant_bias + by_features.gate_bias)
    name, rows = f"concepts of {concepts.layer}", torch.arange(len(shares), device=shares.device)
    pixels = [
        run.build_explanation(Selection(shares[rows, column], shares, column), part, name)
        for column, part in zip(strongest.T, parts, strict=True)
    ]
    return ConceptDecomposition(
        run.build_explanation(selection, whole, None), concepts, shares, rest, other, strengths, strongest, pixels
    )


def _slopes(selection: Selection, run: LinearizedModel) -> Tensor:
    """G (N, C, P): the gradient of the logit with respect to the features."""
    (slopes,) = torch.autograd.grad(selection.values.sum(), run.explained_output, retain_graph=True, allow_unused=True)
    if slopes is None:
        raise TargetError(f"no output depends on layer {run.layer!r}: pick another")
    return run.by_position(slopes).detach()


def _values(features: Tensor, concepts: Concepts, weights: Tensor, strongest: Tensor) -> list[Tensor]:
    """⟨R_k, A⟩ of each image's strongest concept, of the second, and so on, summed over the images, with a graph."""
    rows = torch.arange(len(features), device=features.device)
    scores = (torch.einsum("nc,ncp->np", concepts.encoder[column], features) for column in strongest.T)
    return [(weights[rows, column] * found).sum() for column, found in zip(strongest.T, scores, strict=True)]
