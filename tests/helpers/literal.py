"""The formulas of the papers, word by word, slowly and in float64: what the fast code must agree with."""

import math

import torch
from torch import Tensor

Double = torch.float64


def cosine_power(cosine: float, b: float) -> float:
    if b == 1:
        return 1.0
    return abs(cosine) if b == 2 else (abs(cosine) + 1e-6) ** (b - 1)


def bcos_unit(x: Tensor, rows: Tensor, norm: float, b: float, gamma: float, normalize: bool) -> float:
    """γ · |cos|^(B-1) · ŵᵀx, of the row (of MaxOut's) that answers most."""
    responses = [float(row.flatten() @ x.flatten()) / float(row.norm()) for row in rows]
    best = max(range(len(rows)), key=lambda m: responses[m])
    amplitude = 1.0 if normalize else float(rows[best].norm())
    return gamma * cosine_power(responses[best] / norm, b) * responses[best] * amplitude


def bcos_linear(x: Tensor, weight: Tensor, *, b: float, max_out: int, gamma: float, normalize: bool) -> Tensor:
    out = torch.zeros(len(x), len(weight) // max_out, dtype=Double)
    for n in range(len(x)):
        norm = math.sqrt(float((x[n] ** 2).sum())) + 1e-12
        for o in range(out.shape[1]):
            rows = weight[o * max_out : (o + 1) * max_out]
            out[n, o] = bcos_unit(x[n], rows, norm, b, gamma, normalize)
    return out


def bcos_conv2d(
    x: Tensor, weight: Tensor, *, stride: int, dilation: int, groups: int, b: float, max_out: int, gamma: float,
    normalize: bool,
) -> Tensor:  # fmt: skip
    """`x` is already padded."""
    outputs = len(weight) // max_out
    kernel = weight.shape[-1]
    reach = dilation * (kernel - 1) + 1
    size = [(s - reach) // stride + 1 for s in x.shape[-2:]]
    out = torch.zeros(len(x), outputs, *size, dtype=Double)
    width = x.shape[1] // groups
    for n in range(len(x)):
        for o in range(outputs):
            group = o // (outputs // groups)
            channels = x[n, group * width : (group + 1) * width]
            for i in range(size[0]):
                for j in range(size[1]):
                    patch = channels[
                        :, i * stride : i * stride + reach : dilation, j * stride : j * stride + reach : dilation
                    ]
                    norm = math.sqrt(float((patch**2).sum()) + 1e-6)
                    rows = weight[o * max_out : (o + 1) * max_out]
                    out[n, o, i, j] = bcos_unit(patch, rows, norm, b, gamma, normalize)
    return out


def uncentered_batch_norm(x: Tensor, weight: Tensor, variance: Tensor, eps: float) -> Tensor:
    out = torch.empty_like(x)
    for c in range(x.shape[1]):
        out[:, c] = weight[c] * x[:, c] / math.sqrt(float(variance[c]) + eps)
    return out


def rgba_pixel(weights: Tensor, contribution: float) -> list[float]:
    """Color and unsmoothed, unscaled opacity of one pixel with six weights."""
    scaled = [max(float(w) / float(weights.abs().max()), 0.0) for w in weights]
    pairs = [(scaled[c], scaled[c + 3]) for c in range(3)]
    color = [p / (p + q) if p + q > 0 else 0.0 for p, q in pairs]
    return [*color, 0.0 if contribution < 0 else float(weights.norm())]
