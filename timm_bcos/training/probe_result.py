"""What a probe has learned: accuracy with its interval, and confusions."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["ProbeResult", "wilson_interval"]

NORMAL_QUANTILE = 1.959964  # of 97.5 %


def wilson_interval(right: int, count: int) -> tuple[float, float]:
    """95 % Wilson interval of a proportion, which also holds for few examples and near 0 and 1.

    Args:
        right: Number of successes.
        count: Number of trials, at least 1.

    Returns:
        Lower and upper end, in [0, 1].
    """
    z, share = NORMAL_QUANTILE, right / count
    center = share + z**2 / (2 * count)
    radius = z * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    scale = 1 + z**2 / count
    return max(0.0, (center - radius) / scale), min(1.0, (center + radius) / scale)


@dataclass(frozen=True, eq=False)
class ProbeResult:
    """Predictions of a probe for photos that it was not fitted on.

    Attributes:
        class_names: Names of the K classes.
        labels: Classes (M,) of the photos.
        logits: Logits (M, K).
        indices: Index of each photo in its data set.
        held_out: 'validation' if a validation set was given, else 'cross-validation': each photo was then classified by
            a classifier that was fitted without it.
        training_counts: Number of training photos of each class (K,).
        decay: Weight decay that cross-validation chose, for features with a mean squared norm of 1.
        warnings: Remarks about the data: photos that occur twice or cannot be read.
    """

    class_names: tuple[str, ...]
    labels: Tensor
    logits: Tensor
    indices: tuple[int, ...]
    held_out: str
    training_counts: tuple[int, ...]
    decay: float
    warnings: tuple[str, ...] = ()

    @property
    def predicted(self) -> Tensor:
        """Predicted classes (M,)."""
        return self.logits.argmax(1)

    @property
    def probability(self) -> Tensor:
        """Probabilities (M, K)."""
        return self.logits.softmax(1)

    @property
    def accuracy(self) -> float:
        """Share of photos that are classified correctly, in [0, 1]."""
        return float((self.predicted == self.labels).double().mean())

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of the accuracy."""
        return wilson_interval(int((self.predicted == self.labels).sum()), len(self.labels))

    @property
    def confusion(self) -> Tensor:
        """Numbers of photos (K, K), by class (row) and predicted class (column)."""
        count = len(self.class_names)
        return torch.bincount(self.labels * count + self.predicted, minlength=count**2).reshape(count, count)

    @property
    def worst_confusion(self) -> tuple[int, int, int] | None:
        """Class, predicted class and number of photos of the most frequent mistake; None without mistakes."""
        mistakes = self.confusion.clone().fill_diagonal_(0)
        label, predicted = divmod(int(mistakes.argmax()), len(self.class_names))
        count = int(mistakes[label, predicted])
        return (label, predicted, count) if count else None

    def most_confident(self, label: int, count: int) -> list[int]:
        """Rows of the correctly classified photos of a class with the highest probability, best first."""
        right = ((self.labels == label) & (self.predicted == label)).nonzero()[:, 0]
        order = self.probability[right, label].argsort(descending=True)
        return right[order[:count]].tolist()

    def summary(self) -> dict[str, object]:
        """Everything in numbers, for JSON."""
        low, high = self.interval
        return dict(
            accuracy=self.accuracy, interval=[low, high], photos=len(self.labels), held_out=self.held_out,
            classes=list(self.class_names), training_photos=list(self.training_counts),
            confusion=self.confusion.tolist(), decay=self.decay, warnings=list(self.warnings),
        )  # fmt: skip

    def __str__(self) -> str:
        low, high = (100 * end for end in self.interval)
        photos = f"{len(self.labels)} photos, {self.held_out}"
        lines = [f"accuracy {100 * self.accuracy:.1f} % (95 % interval {low:.1f} to {high:.1f}; {photos})"]
        for index, name in enumerate(self.class_names):
            row = self.confusion[index]
            if int(row.sum()):
                lines.append(f"  {name}: {int(row[index])} of {int(row.sum())} correct")
        if self.worst_confusion is not None:
            label, predicted, count = self.worst_confusion
            own, other = self.class_names[label], self.class_names[predicted]
            lines.append(f"most frequent mistake: {count} of {int(self.confusion[label].sum())} photos of {own!r} "
                         f"classified as {other!r}")  # fmt: skip
        return "\n".join(lines)
