"""Blocks behind the first layer that are dynamic linear."""

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.checkpoint import checkpoint

from .common import EYE, LSTM, Blocks, C, D, changed, each, packed, seq, tokens

POWER = torch.tensor(2.3, dtype=D)
torch.manual_seed(0)
GRU = nn.GRU(6, 6, batch_first=True).double().eval()
RNN = nn.RNN(6, 6, batch_first=True).double().eval()
GRU_CELL, LSTM_CELL, RNN_CELL = nn.GRUCell(6, 6).double(), nn.LSTMCell(6, 6).double(), nn.RNNCell(6, 6).double()


def scan(z):
    """A recurrence from a zero state, as minGRU and Mamba have in plain torch."""
    tokens = z.flatten(2).permute(2, 0, 1)[:8]
    state = torch.zeros_like(tokens[0])
    for token, gate in zip(tokens, tokens.sigmoid(), strict=True):
        state = (1 - gate) * state + gate * token
    return state


def experts(z):
    t = z.flatten(2).transpose(1, 2).flatten(0, 1)
    p, chosen = t[:, :2].softmax(1).max(1)
    y = torch.zeros_like(t)
    for e in range(2):
        rows = (chosen == e).nonzero()[:, 0]
        y[rows] += p[rows, None] * t[rows] * (e + 1)
    return y.unflatten(0, (len(z), -1)).mean(1)


def filled_rows(z):
    o = torch.zeros_like(z)
    for i in range(len(z)):
        o[i].copy_(2 * z[i])
    return o


def two(z):
    return checkpoint(lambda t: F.gelu(t) * t.sigmoid(), z, use_reentrant=False)


def cond_rows(z):
    y = torch.zeros_like(z)
    m = z.mean((1, 2, 3)) > -10
    y[m] = z[m] * 2
    return y


def unfold_write(z):
    y = torch.zeros_like(z)
    y.view(-1)[:] = z.reshape(-1) * 3
    return y


def deform(z):
    off = torch.zeros(len(z), 18, 12, 12, dtype=D) + 0.3
    w = torch.eye(6, dtype=D)[:, :, None, None].expand(-1, -1, 3, 3) / 9
    return torchvision.ops.deform_conv2d(z, off, w, padding=1)


def deformb(z):
    off = z.mean(1, keepdim=True).expand(-1, 18, -1, -1)
    w = torch.eye(6, dtype=D)[:, :, None, None].expand(-1, -1, 3, 3) / 9
    return torchvision.ops.deform_conv2d(z, off, w, bias=torch.ones(6, dtype=D), padding=1)


def roi(z):
    r = torch.tensor([[i, 0, 0, 6, 6] for i in range(len(z))], dtype=D)
    return torchvision.ops.roi_align(z, r, 4)


ATTENTION = {
    "bias_kv": nn.MultiheadAttention(6, 2, add_bias_kv=True, batch_first=True).double().eval(),
    "zero_attn": nn.MultiheadAttention(6, 2, add_zero_attn=True, batch_first=True).double().eval(),
}


def reused_memory(z):
    b = z.sigmoid()
    y = z * b
    b[:] = 0.5
    return y + b


EXACT: Blocks = {
    "clamp(max=tensor, min=tensor)": lambda z: z.clamp(max=torch.tensor(0.1, dtype=D), min=torch.tensor(-0.1, dtype=D)),
    "matmul(other=, input=)": lambda z: torch.matmul(other=EYE.flip(0) + C[:, 0].T, input=z.mean((2, 3))),
    "addmm(mat2=, mat1=)": lambda z: torch.addmm(C.flatten(), mat2=EYE.flip(0), mat1=z.mean((2, 3))),
    "as_tensor": lambda z: torch.as_tensor(z),
    "rows of the path by an embedding": each(
        lambda t: F.embedding(torch.tensor([1, 0, 2, 5, 4, 3]), t.flatten(1)).mean(1)
    ),
    "attention with bias_k and bias_v": lambda z: ATTENTION["bias_kv"](*[tokens(z)] * 3)[0].mean(1),
    "attention with a token of zeros": lambda z: ATTENTION["zero_attn"](*[tokens(z)] * 3)[0].mean(1),
    "attention without a batch": each(lambda t: ATTENTION["zero_attn"](*[t.flatten(1).T] * 3)[0].mean(0)),
    "packed LSTM": packed(LSTM, [4, 9, 6]),
    "packed GRU": packed(GRU, [9, 9, 2]),
    "packed RNN": packed(RNN, [1, 2, 3]),
    "a derivative as a gate": lambda z: z * torch.func.grad(lambda t: t.square().sum())(z.detach()),
    "gate's memory used again": reused_memory,
    "polar": lambda z: torch.polar(torch.fft.fft2(z).abs(), torch.fft.fft2(z).angle()).real,
    "aten.sub": lambda z: torch.ops.aten.sub(z, C),
    "aten.masked_fill": lambda z: torch.ops.aten.masked_fill(z, z < 0, 0.5),
    "aten.copy_": lambda z: torch.ops.aten.copy_(torch.zeros_like(z), z),
    "aten.convolution": lambda z: torch.ops.aten.convolution(
        z, EYE[:, :, None, None], C.flatten(), [1, 1], [0, 0], [1, 1], False, [0, 0], 1
    ),
    "%, // as gates": lambda z: z * (z % 0.1 + z // 0.1),
    "logaddexp as a gate": lambda z: z * torch.logaddexp(z, z.flip(1)),
    "solve": lambda z: torch.linalg.solve(
        EYE + (z[:, :, 0, :6] @ z[:, :, 0, :6].transpose(1, 2)).detach(), z.flatten(2)[..., :6]
    ).mean(2),
    "y.pow_(2)": changed(lambda y, z: y.pow_(2)),
    "torch.max(z, constant)": lambda z: torch.max(z, torch.full((1,), 0.1, dtype=D)),
    "z + C.type_as(z)": lambda z: z + C.type_as(z),
    "z + C.expand_as(z)": lambda z: z + C.expand_as(z),
    "recurrence from a zero state": scan,
    "experts, y[rows] += ...": experts,
    "o[i].copy_(2 * z[i])": filled_rows,
    "nan_to_num": torch.nan_to_num,
    "scatter_reduce sum": lambda z: z.scatter_reduce(1, z.argmax(1, keepdim=True), z[:, :1], "sum"),
    "layer_norm in .float()": lambda z: F.layer_norm(z.float(), (12,), torch.ones(12)).type_as(z),
    "a fully masked row of attention": lambda z: F.scaled_dot_product_attention(
        *[z.flatten(2).transpose(1, 2)] * 3,
        attn_mask=torch.ones(144, 144, dtype=torch.bool).index_fill(0, torch.tensor(5), False),
    ).mean(1),
    "gru": lambda z: GRU(seq(z))[0].transpose(1, 2)[..., None],
    "rnn": lambda z: RNN(seq(z))[0].transpose(1, 2)[..., None],
    "lstm": lambda z: LSTM(seq(z))[0].transpose(1, 2)[..., None],
    "grucell": lambda z: GRU_CELL(z.mean((2, 3))),
    "lstmcell": lambda z: LSTM_CELL(z.mean((2, 3)))[0],
    "rnncell": lambda z: RNN_CELL(z.mean((2, 3))),
    "pow param": lambda z: z.abs() ** POWER,
    "gem": lambda z: z.clamp(min=1e-6).pow(POWER).mean((2, 3)).pow(1 / POWER),
    "rpow float": lambda z: z * 2.0**z,
    "binary min": lambda z: torch.min(z, z.flip(1)),
    "min method": lambda z: z.minimum(C * 0.1),
    "relu_ stmt": changed(lambda y, z: y.relu_()),
    "silu stmt": changed(lambda y, z: F.silu(y, inplace=True)),
    "clamp_ stmt": changed(lambda y, z: y.clamp_(-0.1, 0.1)),
    "sigmoid_ gate": lambda z: z * (z * 1).sigmoid_(),
    "tanh_": changed(lambda y, z: y.tanh_()),
    "mul_": changed(lambda y, z: y.mul_(z)),
    "square_": changed(lambda y, z: y.square_()),
    "checkpoint": two,
    "bilinear bias": lambda z: F.bilinear(
        z.mean((2, 3)), z.amax((2, 3)), torch.ones(5, 6, 6, dtype=D) / 9, torch.ones(5, dtype=D)
    )[:, [0, 1, 2, 3, 4, 0]],
    "diff prepend": lambda z: torch.diff(z, dim=1, prepend=torch.ones(len(z), 1, 12, 12, dtype=D)),
    "index_add alpha": lambda z: z.index_add(1, torch.tensor([0, 1]), z[:, :2], alpha=2.0),
    "select_scatter": lambda z: z.select_scatter(z[:, 1] * 2, 1, 0),
    "slice_scatter": lambda z: z.slice_scatter(torch.ones(len(z), 2, 12, 12, dtype=D), 1, 0, 2),
    "complex const": lambda z: (
        (torch.fft.fft2(z) + (1 + 2j)).abs().mean() * 0
        + torch.fft.ifft2(torch.fft.fft2(z) + (1 + 2j) * torch.fft.fft2(C.expand(6, 12, 12))).real
    ),
    "complex": lambda z: torch.complex(z, torch.ones_like(z)).real,
    "complex abs": lambda z: (torch.complex(z, z * 2) * (1 + 1j)).imag,
    "hypot": lambda z: torch.hypot(z, z.flip(1)),
    "hypot const": lambda z: torch.hypot(z, torch.ones_like(z)),
    "sparse": lambda z: torch.sparse.mm(torch.eye(6, dtype=D).to_sparse(), z.mean((2, 3)).T).T,
    "beta0": lambda z: torch.addmm(torch.full((6,), float("nan"), dtype=D), z.mean((2, 3)), EYE, beta=0),
    "maxunpool": lambda z: F.max_unpool2d(*F.max_pool2d(z, 2, return_indices=True), 2),
    "unpool3d": lambda z: F.max_unpool3d(*F.max_pool3d(z[:, None], 2, return_indices=True), 2)[:, 0],
    "scatter mean": lambda z: z.scatter_reduce(1, z.argmax(1, keepdim=True), z[:, :1], "mean"),
    "scatter amax": lambda z: z.scatter_reduce(1, z.argmax(1, keepdim=True), z[:, :1] * 2, "amax"),
    "cond rows": cond_rows,
    "unfold write": unfold_write,
    "where C": lambda z: torch.where(z > 0, z, C),
    "masked_fill": lambda z: z.masked_fill(z < 0, 0.5),
    "where num": lambda z: torch.where(z > 0, z, 0.5),
    "no_grad gate": lambda z: z * torch.no_grad()(lambda t: t.sigmoid())(z),
    "broadcast": lambda z: torch.broadcast_tensors(z, C)[0] + torch.broadcast_tensors(z, C)[1],
    "C.to": lambda z: z + C.float().to(z),
    "view_as": lambda z: z + torch.ones(len(z) * 864, dtype=D).view_as(z),
    "gate zeros": lambda z: z + z.sigmoid() * torch.zeros_like(z),
    "split write": lambda z: (lambda y: [y.chunk(2, 1)[0].mul_(2), y][1])(z * 1),
    "unbind write": lambda z: (lambda y: [[t.add_(1) for t in y.unbind(0)], y][1])(z * 1),
    "const split write": lambda z: (lambda y: [y.chunk(2, 1)[0].copy_(z[:, :3]), y][1])(torch.zeros_like(z)),
    "const filled": lambda z: (lambda y: [y[:, 0].copy_(z[:, 0]), y][1])(torch.ones_like(z)),
    "const filled setitem": lambda z: (lambda y: [y.__setitem__((slice(None), 0), z[:, 0]), y][1])(torch.ones_like(z)),
    "add into const view": lambda z: (lambda y: [y[:, 0].add_(z[:, 0]), y][1])(torch.ones_like(z)),
    "deform": deform,
    "deform off": deformb,
    "roi": roi,
    "item hook": lambda z: [z.mean().item(), z][1],
    "printed": lambda z: [f"{z.mean():.3f}", z + 0.5][1],
    "len unused": lambda z: [len(z[z > 0]), z + 0.1][1],
    "rrelu": lambda z: F.rrelu(z),
    "instance": lambda z: F.instance_norm(z).relu(),
    "instance affine": lambda z: 1 * F.instance_norm(z, weight=torch.ones(6, dtype=D) * 2, bias=torch.ones(6, dtype=D)),
    "glu": lambda z: F.glu(z.repeat(1, 2, 1, 1), 1),
    "prelu": lambda z: F.prelu(z, torch.tensor([0.2], dtype=D)),
    "sdpa gqa": lambda z: F.scaled_dot_product_attention(*[z.flatten(2).transpose(1, 2)] * 3, is_causal=True).transpose(
        1, 2
    )[..., None],
    "lerp gate": lambda z: torch.lerp(z, z.flip(1), z.sigmoid()),
    "lerp_ C": changed(lambda y, z: y.lerp_(C.expand_as(y), 0.5)),
    "addcdiv": lambda z: torch.addcdiv(z, z, 1 + z.square()),
    "addcmul C": lambda z: torch.addcmul(C, z, z.sigmoid()),
    "baddbmm": lambda z: torch.baddbmm(
        torch.ones(1, 6, 6, dtype=D), z.flatten(2), z.flatten(2).transpose(1, 2).softmax(1)
    ).mean(2),
    "cat int": lambda z: torch.cat([z[:, :5], torch.ones(len(z), 1, 12, 12, dtype=torch.long)], 1),
    "cat bool": lambda z: torch.cat([z[:, :5], torch.ones(len(z), 1, 12, 12, dtype=torch.bool)], 1),
    "add bool": lambda z: z + (torch.arange(12) > 5),
    "iadd": lambda z: (lambda y: y.__iadd__(0.5))(z * 1),
    "pad": lambda z: F.pad(z, (1, 1), value=0.3),
    "nn pad reflect": lambda z: F.pad(z, (1, 1, 1, 1), mode="reflect"),
    "renorm scale": lambda z: z / z.norm(dim=1, keepdim=True).clamp(min=1e-6),
    "softmax aggregate": lambda z: (z.flatten(2).softmax(-1) * z.flatten(2)).sum(-1),
    "logsumexp gate": lambda z: z * z.logsumexp(1, keepdim=True),
    "cumsum": lambda z: z.cumsum(1),
    "std gate": lambda z: z * z.std((1, 2, 3), keepdim=True),
    "moe bias": lambda z: (
        lambda t, y: [
            [
                y.__setitem__(r, F.linear(t[r], EYE * (e + 1), C.flatten()))
                for e in range(2)
                for r in [(t[:, 0] > 0) == bool(e)]
            ],
            y.unflatten(0, (len(z), -1)).mean(1),
        ][1]
    )(z.flatten(2).transpose(1, 2).flatten(0, 1), torch.zeros(len(z) * 144, 6, dtype=D)),
    "out path": lambda z: (lambda b: [torch.mul(z, 2, out=b), b][1])(torch.empty_like(z)),
    "out add": lambda z: torch.add(z, C, out=torch.empty_like(z)),
    "detach scale": lambda z: z * z.detach().requires_grad_().sigmoid(),
    "func in no_grad": lambda z: z * (z.detach() > 0),
    "copysign": lambda z: z * torch.sign(z),
    "relu6": F.relu6,
    "hardtanh_": changed(lambda y, z: F.hardtanh_(y)),
    "threshold": lambda z: F.threshold(z, 0.1, 0.5),
    "elu_": changed(lambda y, z: F.elu_(y)),
    "leaky_": changed(lambda y, z: F.leaky_relu_(y)),
    "x.where": lambda z: z.where(z > 0, torch.zeros(1, dtype=D)),
    "gather": lambda z: z.gather(1, z.argsort(1)),
    "einsum gate": lambda z: torch.einsum("nchw,nc->nchw", z, z.mean((2, 3)).sigmoid()),
    "interp": lambda z: F.interpolate(z, scale_factor=2),
    "float roundtrip": lambda z: z.float().double(),
    "half mul": lambda z: (z.float() * 2).to(z.dtype),
    "sum const first": lambda z: sum([z, z, 1.0]),
    "stack C": lambda z: torch.stack([z, C.expand_as(z)]).sum(0),
    "seq first": lambda z: (
        (z.flatten(2).permute(2, 0, 1) + 1e-7 * torch.arange(144, dtype=D)[:, None, None])
        .permute(1, 2, 0)
        .unflatten(2, (12, 12))
    ),
    "maximum C": lambda z: torch.maximum(z, C * 0.05),
    "fmax num": lambda z: torch.fmax(z, torch.tensor(0.05, dtype=D)),
    "clamp C": lambda z: z.clamp(min=torch.full((1,), -0.05, dtype=D)),
    "aten": lambda z: torch.ops.aten.relu(z),
    "expand mul": lambda z: z * torch.ones(1, dtype=D).expand_as(z),
}
