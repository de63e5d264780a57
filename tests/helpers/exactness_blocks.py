"""Small blocks for maps z (N, 6, 12, 12) of a convolution, and whether explanations of a model with them are exact.

`EXACT` and `INEXACT` stand behind the first layer, `READS_EXACT` and `READS_INEXACT` before it, where z is the image.
"""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
import torchvision.transforms.v2.functional as TF
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

D = torch.float64
C = torch.linspace(-1, 1, 6, dtype=D)[:, None, None]
EYE = torch.eye(6, dtype=D)
POWER = torch.tensor(2.3, dtype=D)
torch.manual_seed(0)
GRU = nn.GRU(6, 6, batch_first=True).double().eval()
RNN = nn.RNN(6, 6, batch_first=True).double().eval()
LSTM = nn.LSTM(6, 6, batch_first=True).double().eval()
GRU_CELL, LSTM_CELL, RNN_CELL = nn.GRUCell(6, 6).double(), nn.LSTMCell(6, 6).double(), nn.RNNCell(6, 6).double()
COLORS = torch.tensor([[0.299, 0.587, 0.114], [0.2, 0.3, 0.5], [1, 0, 0]], dtype=D)


def written_rows(z):
    b = torch.zeros_like(z)
    for i in range(len(z)):
        b[i].copy_(z[i].sigmoid())
    return z + b


def written_chunk(z):
    b = torch.zeros_like(z)
    b.chunk(2, 1)[0].copy_(z.sigmoid()[:, :3])
    return z + b


def changed(function):
    def run(z):
        y = z * 1
        function(y, z)
        return y

    return run


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


@torch.jit.script
def scripted_gate(x):
    return torch.sigmoid(x)


def out_argument(z):
    b = torch.empty_like(z)
    torch.sigmoid(z, out=b)
    return z + b


def seq(z):
    return z.flatten(2).transpose(1, 2)[:, :5]


def written(v):
    def f(z):
        y = torch.zeros_like(z)
        y[:, :3] = v(z)[:, :3]
        return y + z

    return f


def np_gate(z):
    g = 1 / (1 + np.exp(-z.detach().numpy()))
    return z + torch.from_numpy(g)


def thread_gate(z):
    out = []
    t = threading.Thread(target=lambda: out.append(z.detach().sigmoid()))
    t.start()
    t.join()
    return z + out[0]


def thread_write(z):
    b = torch.zeros_like(z)
    t = threading.Thread(target=lambda: b.copy_(z.detach().sigmoid()))
    t.start()
    t.join()
    return z + b


@torch.jit.script
def sw(b, x):
    b.copy_(torch.sigmoid(x))
    return b


def script_write(z):
    b = torch.zeros_like(z)
    sw(b, z.detach())
    return z + b


def branch(z):
    if z.mean() > 0:
        return z + 0.5
    return z - 0.5


def branchx(z):
    if z[0].flatten()[0] > 0.02:
        return z + C
    return z - C


def two(z):
    return checkpoint(lambda t: F.gelu(t) * t.sigmoid(), z, use_reentrant=False)


def inplace_view(z):
    y = z * 1
    y[:, 0].mul_(2)
    y[:, 1].sigmoid_()
    y.relu_()
    return y


def cond_rows(z):
    y = torch.zeros_like(z)
    m = z.mean((1, 2, 3)) > -10
    y[m] = z[m] * 2
    return y


def numpy_shared(z):
    b = torch.zeros_like(z)
    n = b.numpy()
    n[:] = z.detach().numpy()
    return z + b


def dl(z):
    return z + torch.from_dlpack(z.detach().sigmoid())


def datav(z):
    y = z * 1
    y.data.add_(z.sigmoid())
    return y


def newt(z):
    return z + z.new_tensor([z.mean().item()] * 1)


def newf(z):
    return z + z.new_full((6, 1, 1), float(z.mean()))


def view_gate(z):
    g = torch.empty(2 * z.numel(), dtype=z.dtype)
    v = g[: z.numel()].view(z.shape)
    v.copy_(z.sigmoid())
    return z + g[: z.numel()].view(z.shape)


def out_view(z):
    b = torch.empty((2,) + tuple(z.shape), dtype=z.dtype)
    torch.exp(z.detach(), out=b[0])
    return z + b[0]


def unfold_write(z):
    y = torch.zeros_like(z)
    y.view(-1)[:] = z.reshape(-1) * 3
    return y


def as_list(z):
    return z + torch.tensor(z.detach().mean((0, 2, 3)).tolist(), dtype=z.dtype)[:, None, None]


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


Blocks = dict[str, Callable[[Tensor], Any]]
ATTENTION = {
    "bias_kv": nn.MultiheadAttention(6, 2, add_bias_kv=True, batch_first=True).double().eval(),
    "zero_attn": nn.MultiheadAttention(6, 2, add_zero_attn=True, batch_first=True).double().eval(),
}


def tokens(z):
    return z.flatten(2).transpose(1, 2)


def packed(layer, lengths):
    """Each image's tokens as sequences of several lengths."""

    def run(z):
        t = tokens(z)[:, :27].unflatten(1, (3, 9)).flatten(0, 1)
        several = torch.tensor(lengths).repeat(len(z))
        rows = nn.utils.rnn.pack_padded_sequence(t, several, batch_first=True, enforce_sorted=False)
        return nn.utils.rnn.pad_packed_sequence(layer(rows)[0], batch_first=True)[0].unflatten(0, (-1, 3)).mean((1, 2))

    return run


def each(function):
    return lambda z: torch.stack([function(t) for t in z])


def added_at(z):
    y = z * 1
    for i in range(len(z)):
        y[i, int(z[i].mean((1, 2)).argmax())] += 1.0
    return y


def narrowed(z):
    y = z * 1
    for i in range(len(z)):
        y[i].narrow(0, int(z[i].mean((1, 2)).argmax()), 1).add_(1.0)
    return y


def in_a_thread(function):
    found = []
    worker = threading.Thread(target=lambda: found.append(function()))
    worker.start()
    worker.join()
    return found[0]


def data_written_in_a_thread(z):
    b = torch.zeros_like(z)
    in_a_thread(lambda: b.data.copy_(z.detach().sigmoid()))
    return z + b


def reused_memory(z):
    b = z.sigmoid()
    y = z * b
    b[:] = 0.5
    return y + b


ones = lambda: torch.ones(6, 1, 1, dtype=D)  # noqa: E731

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
INEXACT: Blocks = {
    "y[i, argmax] += 1": added_at,
    "narrow(argmax).add_(1)": narrowed,
    "scatter_add(argmax, ones)": lambda z: z.scatter_add(
        1, z.argmax(1, keepdim=True), torch.ones(len(z), 1, 12, 12, dtype=D)
    ),
    "scatter_reduce(argmax, ones, sum)": lambda z: z.scatter_reduce(
        1, z.argmax(1, keepdim=True), torch.ones(len(z), 1, 12, 12, dtype=D), "sum"
    ),
    "index_put(argmax, 1, accumulate=True)": lambda z: (
        z.flatten(1)
        .index_put((torch.arange(len(z)), z.flatten(1).argmax(1)), torch.ones(1, dtype=D), accumulate=True)
        .view_as(z)
    ),
    "index_add(argmax, ones)": each(
        lambda t: t.index_add(0, t.mean((1, 2)).argmax()[None], torch.ones(1, 12, 12, dtype=D))
    ),
    "data of zeros, written in a thread": data_written_in_a_thread,
    "a slice as long as a gate says": each(
        lambda t: t + torch.linspace(0, 1, 6, dtype=D)[: (t.detach() > 0).sum().remainder(5) + 1].sum()
    ),
    "ones times aten.item": each(lambda t: t + ones() * torch.ops.aten.item(t.detach().mean())),
    "ones times a thread's number": each(lambda t: t + ones() * in_a_thread(lambda: float(t.detach().mean()))),
    "ones times a printed number": each(lambda t: t + ones() * float(f"{t.detach().mean():.6f}")),
    "as many as one_hot has": each(
        lambda t: t + ones() * F.one_hot((t.detach() > 0).sum().remainder(50)).shape[0] / 50
    ),
    "as many as arange has": each(lambda t: t + ones() * torch.arange((t.detach() > 0).sum()).shape[0] / 500),
    "as many as are not zero": each(lambda t: t + ones() * t.detach().relu().to_sparse()._nnz() / 500),
    "index_put acc": lambda z: z.index_put((torch.tensor([0]),), z[0], accumulate=True),
    "b[i].copy_(gate)": written_rows,
    "b.chunk()[0].copy_(gate)": written_chunk,
    "addcmul(z, gate, C)": lambda z: torch.addcmul(z, z.sigmoid(), C),
    "addmm(z, gate, W)": lambda z: torch.addmm(z.mean((2, 3)), z.mean((2, 3)).sigmoid(), EYE),
    "z.clamp(min=gate)": lambda z: z.clamp(min=z.mean((1, 2, 3), keepdim=True).abs()),
    "z + int(z.mean() * 1000)": lambda z: z + int(z.mean() * 1000),
    "z + len(z[z > 0]) / numel": lambda z: z + len(z[z > 0]) / z.numel(),
    "full_like(z, mean)": lambda z: z + torch.full_like(z, z.detach().abs().mean()),
    "detach().requires_grad_().sigmoid()": lambda z: z + z.detach().requires_grad_().sigmoid(),
    "scripted gate of z.detach()": lambda z: z + scripted_gate(z.detach()),
    "sigmoid(z, out=b)": out_argument,
    "z + z.flip(0), two images": lambda z: z + z.flip(0),
    "torch.max(z, gate)": lambda z: torch.max(z, z.sigmoid()),
    "y.lerp_(gate, 0.5)": changed(lambda y, z: y.lerp_(z.sigmoid(), 0.5)),
    "cat([z, z > 0])": lambda z: torch.cat([z[:, :3], z[:, :3] > 0], 1),
    "y[:, 0] = argmax": changed(lambda y, z: y.__setitem__((slice(None), 0), z.argmax(1))),
    "inplace view": inplace_view,
    "np": np_gate,
    "thread": thread_gate,
    "thread write": thread_write,
    "script write": script_write,
    "branch": branchx,
    "numpy shared": numpy_shared,
    "dlpack": dl,
    "data": datav,
    "new_tensor": newt,
    "new_full": newf,
    "view gate": view_gate,
    "out view": out_view,
    "list": as_list,
    "mean(0)": lambda z: z + z.mean(0, keepdim=True),
    "batchnorm training": lambda z: F.batch_norm(z, None, None, training=True),
    "roll0": lambda z: z * z.roll(1, 0).sigmoid(),
    "softmax0": lambda z: z * z.softmax(0),
    "cumsum 0": lambda z: z.cumsum(0),
    "lstm state": lambda z: LSTM(seq(z), (z.mean((2, 3)).sigmoid()[None], z.mean((2, 3)).sigmoid()[None]))[0].transpose(
        1, 2
    )[..., None],
    "baddbmm gate": lambda z: torch.baddbmm(
        z.flatten(2) @ z.flatten(2).transpose(1, 2).softmax(1),
        z.flatten(2).sigmoid(),
        z.flatten(2).transpose(1, 2).sigmoid(),
    ).mean(2),
    "addcdiv gate": lambda z: torch.addcdiv(z, z.sigmoid(), torch.ones_like(z)),
    "scatter gate": lambda z: z.scatter(1, torch.zeros(len(z), 1, 12, 12, dtype=torch.long), z[:, :1].sigmoid()),
    "int add": lambda z: z + z.argmax(1, keepdim=True),
    "bool add": lambda z: z + (z > 0),
    "floor": lambda z: z + (z * 10).floor(),
    "long": lambda z: z + (z * 100).long(),
    "where gate": lambda z: torch.where(z > 0, z.sigmoid(), z),
    "max gate method": lambda z: z.maximum(z.sigmoid()),
    "minimum gate": lambda z: torch.min(z.sigmoid(), z),
    "masked_scatter": lambda z: z.masked_scatter(
        torch.ones_like(z, dtype=torch.bool) & (torch.arange(12) > 5), z.sigmoid()
    ),
    "fill gate": changed(lambda y, z: y[:, 0].fill_(z.mean().sigmoid())),
    "setitem number": changed(lambda y, z: y.__setitem__((slice(None), 0), z.mean().item())),
    "full item": lambda z: z + torch.full((1,), z.mean().item(), dtype=D),
    "arange n": lambda z: z + torch.arange(12) * int(z.abs().sum()),
    "bool(…)": lambda z: z + float(bool(z.mean() > -0.02)),
    "shape": lambda z: z + z[z > 0].shape[0] * 1e-3,
    "nonzero": lambda z: z + z.nonzero().shape[0] * 1e-3,
    "numel": lambda z: z + torch.masked_select(z, z > 0).numel() * 1e-3,
    "unique": lambda z: z + torch.unique((z * 3).round()).numel(),
    "complex gate": lambda z: torch.complex(z, z.sigmoid()).imag + z,
    "cat gate detach": lambda z: torch.cat([z[:, :3], z[:, :3].detach()], 1),
    "hypot gate": lambda z: torch.hypot(z, z.sigmoid()),
    "renorm": lambda z: z + torch.renorm(z, 2, 1, 0.1),
    "iadd gate buffer": lambda z: (lambda b: [b.__iadd__(z.sigmoid()), z + b][1])(torch.zeros_like(z)),
    "copy chunk": lambda z: (lambda b: [b.unbind(0)[0].copy_(z[0].sigmoid()), z + b][1])(torch.zeros_like(z)),
    "foreach gate": lambda z: z + torch._foreach_exp([z])[0],
    "aten gate": lambda z: z + torch.ops.aten.sigmoid(z.detach()),
    "set_": lambda z: (lambda b: [b.set_(z.detach().sigmoid()), z + b][1])(torch.zeros(1, dtype=D)),
    "T view": lambda z: z + z.sigmoid().permute(1, 0, 2, 3).clone().permute(1, 0, 2, 3),
    "expand gate": lambda z: z + z.mean().sigmoid().expand_as(z),
    "type_as gate": lambda z: z + z.sigmoid().float().type_as(z),
    "sort idx": lambda z: z + z.sort(1).indices,
    "topk idx": lambda z: z + z.max(1, keepdim=True).indices,
    "quantize": lambda z: z + torch.round(z),
    "index by C gate": lambda z: z + C[z.argmax(1)[:, 0, 0]].mean(),
    "prod": lambda z: z.prod(1, keepdim=True) + z,
}
READS_EXACT: Blocks = {
    "relu, abs": lambda x: x.relu().abs(),
    "standardized": lambda x: (x - x.mean((2, 3), keepdim=True)) / (x.std((2, 3), keepdim=True) + 1e-6),
    "centered and divided by a statistic": lambda x: (
        (x - x.mean((1, 2, 3), keepdim=True)) / x.std((1, 2, 3), keepdim=True)
    ),
    "between its extremes": lambda x: (
        (x - x.amin((1, 2, 3), keepdim=True)) / (x.amax((1, 2, 3), keepdim=True) - x.amin((1, 2, 3), keepdim=True))
    ),
    "BGR, x[:, [2, 1, 0]]": lambda x: x[:, [2, 1, 0]],
    "gray, three equal channels": lambda x: x.mean(1, keepdim=True).expand(-1, 3, -1, -1),
    "a patch of the image set to 0": lambda x: x * (torch.arange(12) > 4),
    "crop": lambda x: x[..., 1:11, 2:12],
    "pad": lambda x: F.pad(x, (1, 1, 1, 1)),
    "pad white": lambda x: F.pad(x, (1, 1, 1, 1), value=1.0),
    "reflect": lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    "norm": lambda x: (x - 0.4) / 0.2,
    "normalize tv": lambda x: TF.normalize(x, [0.4, 0.5, 0.6], [0.2, 0.2, 0.3]),
    "resize tv": lambda x: TF.resize(x, [8, 8], antialias=True),
    "centercrop": lambda x: TF.center_crop(x, [8, 8]),
    "gray tv": lambda x: TF.rgb_to_grayscale(x, 3),
    "invert": lambda x: 1 - x,
    "scale255": lambda x: x * 255,
    "matrix": lambda x: torch.einsum("nchw,dc->ndhw", x, COLORS),
    "conv pre": lambda x: F.conv2d(x, COLORS[:, :, None, None]),
    "blur": lambda x: F.avg_pool2d(x, 3, 1, 1),
    "mask buf": lambda x: x * (torch.arange(12) > 4).double(),
    "masked_fill": lambda x: x.masked_fill(torch.arange(12) > 8, 0.0),
    "setitem": lambda x: (lambda y: [y.__setitem__((slice(None), slice(None), slice(0, 3)), 0.0), y][1])(x.clone()),
    "inplace setitem": lambda x: (lambda y: [y.__setitem__((slice(None), slice(None), slice(0, 3)), 0.5), y][1])(x),
    "flip": lambda x: x.flip(-1),
    "roll": lambda x: x.roll(2, -1),
    "chlast": lambda x: x.contiguous(memory_format=torch.channels_last),
    "encoded": lambda x: torch.cat([x, 1 - x], 1),
    "one channel": lambda x: x[:, :1].expand(-1, 3, -1, -1),
    "bgr flip": lambda x: x.flip(1),
    "chunk cat": lambda x: torch.cat(x.chunk(3, 1)[::-1], 1),
    "stack unbind": lambda x: torch.stack(x.unbind(1)[::-1], 1),
    "index_select": lambda x: x.index_select(1, torch.tensor([2, 1, 0])),
    "max pool": lambda x: F.max_pool2d(x, 2),
    "rot": lambda x: x.rot90(1, (2, 3)),
    "float": lambda x: x.float().double(),
    "mean2x": lambda x: 0.5 * x + 0.5 * x.flip(-1),
    "identity": lambda x: x,
    "sub mean const": lambda x: x - torch.tensor([0.1, 0.2, 0.3], dtype=D)[:, None, None],
    "inplace sub": lambda x: x.sub_(0.5),
    "inplace div": lambda x: x.div_(2),
    "grid": lambda x: F.grid_sample(
        x,
        F.affine_grid(torch.eye(2, 3, dtype=D)[None].expand(len(x), -1, -1), list(x.shape), align_corners=False),
        align_corners=False,
    ),
    "interp near": lambda x: F.interpolate(x, scale_factor=2),
    "hflip tv": lambda x: TF.horizontal_flip(x),
    "pil-like 2x": lambda x: x.repeat_interleave(2, -1),
    "where mask": lambda x: torch.where(torch.arange(12) > 5, x, torch.zeros(1, dtype=D)),
    "lerp": lambda x: x.lerp(torch.full((1,), 0.5, dtype=D), 0.3),
    "addcmul": lambda x: torch.addcmul(x, x, torch.ones(1, dtype=D)),
    "batchnorm": lambda x: F.batch_norm(x, torch.ones(3, dtype=D) * 0.3, torch.ones(3, dtype=D)),
}
READS_INEXACT: Blocks = {
    "gate": lambda x: x * x.mean((1, 2, 3), keepdim=True).sigmoid(),
    "gate add": lambda x: x + x.mean((1, 2, 3), keepdim=True).sigmoid(),
    "square": lambda x: x * x,
    "pow": lambda x: x**2.2,
    "number": lambda x: x * float(x.mean()),
    "batch mean": lambda x: x - x.mean(0, keepdim=True),
}


# Two spellings of one function, whose explanations are the same numbers.
SPELLINGS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "clamp_min(min=)": (lambda z: z.clamp_min(min=0.05), lambda z: z.clamp(min=0.05)),
    "torch.clamp_min(z, min=)": (lambda z: torch.clamp_min(z, min=0.05), lambda z: z.clamp(min=0.05)),
    "clamp_min_(min=)": (lambda z: (z * 1).clamp_min_(min=0.05), lambda z: z.clamp(min=0.05)),
    "clamp_max(max=)": (lambda z: z.clamp_max(max=-0.05), lambda z: z.clamp(max=-0.05)),
    "hardtanh(max_val=, min_val=)": (lambda z: F.hardtanh(z, max_val=0.1, min_val=0.05), lambda z: z.clamp(0.05, 0.1)),
    "aten.clamp": (lambda z: torch.ops.aten.clamp(z, 0.05, 0.1), lambda z: z.clamp(0.05, 0.1)),
    "aten.clamp.Tensor": (lambda z: torch.ops.aten.clamp.Tensor(z, C * 0.1), lambda z: z.clamp(C * 0.1)),
    "aten.softplus": (lambda z: torch.ops.aten.softplus(z), F.softplus),
    "aten.threshold": (lambda z: torch.ops.aten.threshold(z, 0.1, 0.5), lambda z: F.threshold(z, 0.1, 0.5)),
    "packed sequences of one length": (
        packed(LSTM, [9, 9, 9]),
        lambda z: LSTM(tokens(z)[:, :27].unflatten(1, (3, 9)).flatten(0, 1))[0].unflatten(0, (-1, 3)).mean((1, 2)),
    ),
}
