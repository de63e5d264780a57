"""Explanations of random numbers that add up, without a model."""

from typing import Any

import torch

from timm_bcos import Explanation


def random_explanation(
    images: int = 1, channels: int = 3, size: tuple[int, int] = (12, 16), classes: int = 4, **others: Any
) -> Explanation:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(images, channels, *size, generator=generator)
    inputs = torch.cat([pixels, 1 - pixels], 1)
    weights = torch.randn(inputs.shape, generator=generator)
    logits = torch.randn(images, classes, generator=generator)
    target = torch.arange(images) % classes
    bias = torch.randn(images, generator=generator)
    logits[torch.arange(images), target] = (weights * inputs).sum((1, 2, 3)) + bias
    return Explanation(logits, target, weights, inputs, bias, bias.clone(), **others)
