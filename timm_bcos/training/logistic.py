"""Multinomial logistic regression without intercept, with its regularization chosen by cross-validation."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["LogisticFit", "cross_validate", "fit_logistic", "stratified_folds"]

# Candidates for the weight decay of features that are scaled to a mean squared norm of 1, strongest first.
DECAYS = tuple(10 ** (-k / 2) for k in range(2, 13))
PATIENCE = 2  # number of further candidates that are tried after the best one so far
FOLDS = 5


@dataclass(frozen=True)
class LogisticFit:
    """A fitted classifier.

    Attributes:
        weight: (K, C) for the features as given; its rows sum to 0, so that the largest logit is never negative.
        decay: Chosen weight decay.
        folds: Number of folds that chose it.
        held_out: Logits (N, K) of each example from the classifier that was fitted without its fold.
    """

    weight: Tensor
    decay: float
    folds: int
    held_out: Tensor


def fit_logistic(x: Tensor, y: Tensor, decay: float, num_classes: int, start: Tensor | None = None) -> Tensor:
    """Minimize mean cross-entropy + decay / 2 · ‖W‖² over W, which is convex, with L-BFGS.

    Args:
        x: Features (N, C) in float64.
        y: Classes (N,).
        decay: Weight decay, positive.
        num_classes: Number of classes, K.
        start: W to start from; None for zeros.

    Returns:
        W (K, C).
    """
    weight = (x.new_zeros(num_classes, x.shape[1]) if start is None else start.clone()).requires_grad_()
    options = dict(max_iter=500, tolerance_grad=1e-7, tolerance_change=1e-12, line_search_fn="strong_wolfe")
    optimizer = torch.optim.LBFGS([weight], **options)  # type: ignore[arg-type]

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ weight.T, y) + decay / 2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)  # type: ignore[arg-type]
    return weight.detach()


def stratified_folds(y: Tensor, folds: int, seed: int = 0) -> Tensor:
    """Assign examples to folds at random, so that the sizes of each class differ by at most 1 between folds.

    Args:
        y: Classes (N,).
        folds: Number of folds.
        seed: Random seed.

    Returns:
        Fold of each example (N,).
    """
    shuffled = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    order = shuffled[torch.argsort(y[shuffled], stable=True)]  # class by class, at random within each
    assigned = torch.empty_like(y)
    assigned[order] = torch.arange(len(y)) % folds
    return assigned


def cross_validate(
    x: Tensor, y: Tensor, num_classes: int, *, decays: Sequence[float] = DECAYS, seed: int = 0
) -> LogisticFit:
    """Fit a classifier with the largest weight decay whose cross-entropy on held-out folds is within one standard error
    of the smallest.

    Args:
        x: Features (N, C).
        y: Classes (N,), at least two examples of each.
        num_classes: Number of classes, K.
        decays: Candidates, strongest first.
        seed: Random seed of the folds.
    """
    x = x.double()
    scale = x.square().sum(1).mean().sqrt().clamp_min(torch.finfo(x.dtype).tiny)
    basis, z = _reduced(x / scale)
    count = min(FOLDS, int(torch.bincount(y, minlength=num_classes).min()))
    folds = stratified_folds(y, count, seed)
    weights: list[Tensor | None] = [None] * count  # of each fold, from which the next candidate starts
    losses: list[Tensor] = []  # (N,) for each candidate
    held_out = []
    for decay in decays:
        logits = z.new_empty(len(y), num_classes)
        for fold in range(count):
            inside = folds == fold
            weight = fit_logistic(z[~inside], y[~inside], decay, num_classes, weights[fold])
            logits[inside], weights[fold] = z[inside] @ weight.T, weight
        losses.append(F.cross_entropy(logits, y, reduction="none"))
        held_out.append(logits)
        if len(losses) > _smallest(losses) + PATIENCE:
            break
    best = _strongest_of_the_best(losses)
    weight = fit_logistic(z, y, decays[best], num_classes)
    return LogisticFit(weight @ basis / scale, decays[best], count, held_out[best])


def _smallest(losses: Sequence[Tensor]) -> int:
    """The candidate of the smallest mean loss."""
    return int(torch.stack([loss.mean() for loss in losses]).argmin())


def _strongest_of_the_best(losses: Sequence[Tensor]) -> int:
    """The first candidate whose mean loss is within one standard error of the smallest.

    Without this rule, separable classes get the weakest decay, and probabilities of almost 1 for every photo.
    """
    smallest = losses[_smallest(losses)]
    limit = smallest.mean() + smallest.std() / len(smallest) ** 0.5
    return next(i for i, loss in enumerate(losses) if loss.mean() <= limit)


def _reduced(x: Tensor) -> tuple[Tensor, Tensor]:
    """An orthonormal basis (R, C) of few features and the coordinates (N, R) of x in it, which give the same fit."""
    if len(x) >= x.shape[1]:
        return torch.eye(x.shape[1], dtype=x.dtype), x
    q, r = torch.linalg.qr(x.T)
    return q.T, r.T
