"""Training tasks for timm (`timm.task`) with losses on explanations."""

from typing import Any

import torch
import torch.nn.functional as F
from timm.task import ClassificationTask, LogitDistillationTask
from torch import Tensor, nn

from ..data.regions import without_cell
from ..errors import InputError, TargetError
from ..explanation.inputs import check_model
from ..explanation.linearized import LinearizedModel
from ..explanation.regions import Region, check_region
from ..explanation.request import Request
from .losses import cosine_loss, dynamic_weights, energy_loss

__all__ = ["DeletionClassificationTask", "ExplanationDistillationTask", "GuidedClassificationTask"]

CELLS = 4  # per side of the grid of deleted cells


class _ExplainedTask:
    """A task that trains W(x), without compilation. Evaluation can be compiled."""

    trainable_module: nn.Module

    def compile(self, backend: str = "inductor", mode: str | None = None, **options: Any) -> nn.Module:
        """Compile the model for evaluation only; the losses on W(x) cannot be compiled."""
        self.eval_model = torch.compile(self.trainable_module, backend=backend, mode=mode, **options)
        return self.trainable_module


class ExplanationDistillationTask(_ExplainedTask, LogitDistillationTask):  # type: ignore[misc]
    """Distillation in which the student also learns the teacher's explanations (e2KD, arXiv 2402.03119, eq. 2).

    loss = task_loss_weight · criterion + distill_loss_weight · KL + explanation_weight · (1 − cosine of the rows of
    W(x) of the class that the teacher predicts).

    Args:
        student_model: B-cos model to train.
        teacher_model: B-cos model, or its name in timm.
        explanation_weight: λ of the paper.
        options: Arguments of `timm.task.LogitDistillationTask`.

    Raises:
        ModelStateError: If the teacher is not a B-cos model.
    """

    def __init__(
        self, student_model: nn.Module, teacher_model: Any, *args: Any, explanation_weight: float = 1.0, **options: Any
    ) -> None:
        super().__init__(student_model, teacher_model, *args, **options)
        _check_weight("explanation_weight", explanation_weight)
        self.explanation_weight = explanation_weight
        check_model(self.teacher.model)
        self.teacher.requires_grad_(False)

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Losses of a batch.

        Args:
            input: Images (N, C, H, W).
            target: Targets of the criterion.

        Returns:
            'loss', 'output' (N, K), 'task_loss', 'kd_loss' and 'explanation_loss'.
        """
        seen = self.teacher.normalize_input(input, *self._student_statistics())
        answer = LinearizedModel(self.teacher.model, seen).explain(Request())
        found = dynamic_weights(self.trainable_module, input, answer.target)
        logits = found.logits / self.temperature, answer.logits / self.temperature
        student, teacher = (x.log_softmax(-1) for x in logits)
        losses = dict(
            task_loss=self.criterion(found.logits, target),
            kd_loss=F.kl_div(student, teacher, reduction="batchmean", log_target=True) * self.temperature**2,
            explanation_loss=cosine_loss(found.weights, answer.weights),
        )
        weights = self.task_loss_weight, self.distill_loss_weight, self.explanation_weight
        total = sum(w * loss for w, loss in zip(weights, losses.values(), strict=True))
        return dict(loss=total, output=found.logits, **losses)

    def _student_statistics(self) -> tuple[Tensor, Tensor]:
        return self.get_buffer("student_mean"), self.get_buffer("student_std")


class GuidedClassificationTask(_ExplainedTask, ClassificationTask):  # type: ignore[misc]
    """Classification in which explanations of the labels are guided to the objects (arXiv 2303.11932).

    loss = criterion + guidance_weight · (1 − share of the positive contributions inside the region).

    Args:
        model: B-cos model to train.
        guidance_weight: λ of the paper.
        options: Arguments of `timm.task.ClassificationTask`.
    """

    def __init__(self, model: nn.Module, *args: Any, guidance_weight: float = 1.0, **options: Any) -> None:
        super().__init__(model, *args, **options)
        _check_weight("guidance_weight", guidance_weight)
        self.guidance_weight = guidance_weight

    def forward(self, input: Tensor, target: Tensor, region: Region = None) -> dict[str, Tensor]:
        """Losses of a batch.

        Args:
            input: Images (N, C, H, W).
            target: Labels (N,), or soft labels (N, K), of which the largest is guided.
            region: Locations of the objects: masks (N, H, W), or N boxes (left, top, right, bottom) in pixels. None for
                a batch without annotations, which is not guided.

        Returns:
            'loss', 'output' (N, K), 'task_loss' and, with a region, 'guidance_loss'.

        Raises:
            TargetError: If a region is empty or does not have the size of the images.
        """
        if region is None:
            return super().forward(input, target)
        masks = check_region(region, len(input), (input.shape[2], input.shape[3]))
        assert masks is not None
        if masks.shape[1:] != input.shape[2:]:
            raise TargetError(f"masks {tuple(masks.shape[1:])} for images {tuple(input.shape[2:])}: give the same size")
        labels = target if target.ndim == 1 else target.argmax(1)
        found = dynamic_weights(self.trainable_module, input, labels)
        task_loss = self.criterion(found.logits, target)
        guidance_loss = energy_loss(found.contribution_map, masks.to(found.weights).clamp_max(1))
        return dict(
            loss=task_loss + self.guidance_weight * guidance_loss, output=found.logits, task_loss=task_loss,
            guidance_loss=guidance_loss,
        )  # fmt: skip


class DeletionClassificationTask(ClassificationTask):
    """Classification of images, half of which have one of 4 × 4 cells replaced by their mean color.

    It prepares a model for the single deletion score, which deletes cells in the same way (IDSDS, arXiv 2407.11910).
    Arguments are those of `timm.task.ClassificationTask`.
    """

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Losses of a batch; see `timm.task.ClassificationTask`."""
        cells = torch.randint(CELLS**2, (len(input),), device=input.device)
        is_whole = torch.rand(len(input), device=input.device) < 0.5
        return super().forward(without_cell(input, cells.masked_fill(is_whole, -1), CELLS), target)


def _check_weight(name: str, value: float) -> None:
    if not value >= 0:
        raise InputError(f"{name}={value!r}: give a number of at least 0")
