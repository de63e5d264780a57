"""Decomposition of a logit: a sum of concepts, each of which is a sum of pixels. Both steps are exact.

With A the features of a layer, a B-cos model is linear in A and A in x, for each image: logit = ⟨G(x), A(x)⟩ + other,
A(x) = W(x) · x + constants. Written in concepts, A = Σ_k d_k · u_k + rest, so that concept k adds
⟨G, d_k · u_k⟩ = ⟨R_k, A⟩ with R_k = gate_k · (dᵀ_k G) · e_k, whose row of pixels is R_k · W(x). FaCT (NeurIPS 2025)
does so for a sparse autoencoder in B-cos networks; here it is for any concepts.
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
    """What a logit of each image is made of: logit = Σ shares + rest + other.

    Attributes:
        explanation: Of the logit, by pixels.
        concepts: The dictionary.
        shares: (N, K) what each concept adds to the logit.
        rest: (N,) what the features add that no concept holds.
        other: (N,) what reaches the logit around the layer, and the constants behind it.
        strengths: (N, K, P) how strongly each concept is there at the layer's P positions.
        strongest: (N, T) concepts whose pixels are explained, by the size of their share, largest first.
        pixels: T explanations: of the share of each image's strongest concept, of the second, and so on.
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
        """(N,) |Σ shares + rest + other - logit| / |logit - logit bias|: rounding only."""
        total = self.shares.double().sum(1) + self.rest.double() + self.other.double()
        logit = self.explanation.logit.double()
        error = (total - logit).abs()
        return torch.where(error == 0, error, error / (logit - self.explanation.logit_bias).abs())

    @classmethod
    def stack(cls, decompositions: Sequence["ConceptDecomposition"]) -> "ConceptDecomposition":
        """One decomposition of the images of several, of the same concepts."""
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
    """Explain one logit per image by a layer's concepts, and the strongest of these by pixels.

    Args:
        model: A B-cos network in evaluation mode.
        x: Images, as in `explain`.
        concepts: Of one of its layers.
        target: The class, as in `explain`.
        top: T, how many concepts to explain by pixels; 0 for none.

    Raises:
        InputError: For concepts of another number of channels, a negative `top`, and as in `explain`.
        TargetError: As in `explain`; also for a layer that no logit depends on.
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
            f"concepts of {concepts.decoder.shape[1]} channels: layer {concepts.layer!r} has {features.shape[1]}"
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
        run.explanation(Selection(shares[rows, column], shares, column), part, name)
        for column, part in zip(strongest.T, parts, strict=True)
    ]
    return ConceptDecomposition(
        run.explanation(selection, whole, None), concepts, shares, rest, other, strengths, strongest, pixels
    )


def _slopes(selection: Selection, run: LinearizedModel) -> Tensor:
    """(N, C, P) G: the gradient of the logit by the features."""
    (slopes,) = torch.autograd.grad(selection.values.sum(), run.tensor, retain_graph=True, allow_unused=True)
    if slopes is None:
        raise TargetError(f"no output depends on layer {run.layer!r}: pick another")
    return run.by_position(slopes).detach()


def _values(features: Tensor, concepts: Concepts, weights: Tensor, strongest: Tensor) -> list[Tensor]:
    """⟨R_k, A⟩ of each image's strongest concept, of the second, and so on: sums over the images, on the graph."""
    rows = torch.arange(len(features), device=features.device)
    scores = (torch.einsum("nc,ncp->np", concepts.encoder[column], features) for column in strongest.T)
    return [(weights[rows, column] * found).sum() for column, found in zip(strongest.T, scores, strict=True)]
