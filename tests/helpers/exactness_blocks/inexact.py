"""Blocks behind the first layer that are not dynamic linear."""

import threading

import numpy as np
import torch
import torch.nn.functional as F

from .common import EYE, LSTM, Blocks, C, D, changed, each, seq


def written_rows(z):
    b = torch.zeros_like(z)
    for i in range(len(z)):
        b[i].copy_(z[i].sigmoid())
    return z + b


def written_chunk(z):
    b = torch.zeros_like(z)
    b.chunk(2, 1)[0].copy_(z.sigmoid()[:, :3])
    return z + b


@torch.jit.script
def scripted_gate(x):
    return torch.sigmoid(x)


def out_argument(z):
    b = torch.empty_like(z)
    torch.sigmoid(z, out=b)
    return z + b


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


def branchx(z):
    if z[0].flatten()[0] > 0.02:
        return z + C
    return z - C


def inplace_view(z):
    y = z * 1
    y[:, 0].mul_(2)
    y[:, 1].sigmoid_()
    y.relu_()
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


def as_list(z):
    return z + torch.tensor(z.detach().mean((0, 2, 3)).tolist(), dtype=z.dtype)[:, None, None]


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


ones = lambda: torch.ones(6, 1, 1, dtype=D)  # noqa: E731
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
