"""Losses on explanations, of which `dynamic_weights` gives the trainable ones.

Sources: e2KD, "Good Teachers Explain: Explanation-Enhanced Knowledge Distillation" (ECCV 2024,
https://arxiv.org/abs/2402.03119), section 3.1; "Studying How to Efficiently and Effectively Guide Models with
Explanations" (ICCV 2023, https://arxiv.org/abs/2303.11932), section 3.2.
"""

import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError

__all__ = ["cosine_loss", "energy_loss"]


def cosine_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """1 − cosine of the student's and the teacher's explanation, the mean over images (e2KD, section 3.1).

    Args:
        student: (N, ...) for instance rows of W(x), (N, 2C, H, W).
        teacher: The same shape; a constant.

    Returns:
        A scalar in [0, 2]; 0 where the explanations are the same up to a positive scale.

    Raises:
        InputError: For explanations of different shapes.
    """
    if student.shape != teacher.shape:
        raise InputError(f"explanations of shapes {tuple(student.shape)} and {tuple(teacher.shape)}: compare the same")
    cosines = F.cosine_similarity(student.flatten(1), teacher.detach().flatten(1).to(student), dim=1)
    return 1 - cosines.mean()


def energy_loss(maps: Tensor, masks: Tensor) -> Tensor:
    """1 − the share of positive contributions that lies inside, the mean over images (ICCV 2023, section 3.2).

    Args:
        maps: (N, H, W) what each pixel contributes.
        masks: (N, H, W) 1 inside the object or its box, 0 outside.

    Returns:
        A scalar in [0, 1]. Images without positive contributions count as 1 and have no gradient.

    Raises:
        InputError: For masks of another shape, outside [0, 1], or empty for an image.
    """
    if maps.ndim != 3 or maps.shape != masks.shape:
        raise InputError(f"maps {tuple(maps.shape)} and masks {tuple(masks.shape)}: give both as (N, H, W)")
    if bool((masks < 0).any()) or bool((masks > 1).any()) or not bool(masks.flatten(1).any(1).all()):
        raise InputError("masks must lie in [0, 1], and each must hold a pixel that is inside")
    positive = maps.clamp_min(0)
    total = positive.sum((1, 2))
    inside = (positive * masks.to(positive)).sum((1, 2))
    return 1 - (inside / total.where(total > 0, 1)).mean()
