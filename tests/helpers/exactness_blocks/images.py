"""Changes of the image before the first layer, dynamic linear or not."""

import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF

from .common import Blocks, D

COLORS = torch.tensor([[0.299, 0.587, 0.114], [0.2, 0.3, 0.5], [1, 0, 0]], dtype=D)
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
