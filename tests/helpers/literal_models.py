"""The first paper's networks, word by word, in float64: what `bcos_*` with a published file must agree with."""

import torch
from torch import Tensor, nn


class LiteralNetwork:
    """The first paper's networks, word by word: B-cos with MaxOut 2, sums and average pools, on a v1 state dict.

    Args:
        weights: By official name, in float64.
        scale: s in γ = s / √d.
        b: Exponent B.
        gamma: Overrides s.
    """

    def __init__(self, weights: dict[str, Tensor], scale: float, b: float = 2, gamma: float | None = None) -> None:
        self.weights = {name: value.double() for name, value in weights.items()}
        self.scale, self.b, self.gamma = scale, b, gamma

    def conv(self, x: Tensor, name: str, stride: int = 1, padding: int | tuple[int, int] = 0) -> Tensor:
        weight = self.weights[f"{name}.linear.weight"]
        rows, channels, height, width = weight.shape
        patches = nn.functional.unfold(x, (height, width), padding=padding, stride=stride)
        unit = weight.flatten(1) / weight.flatten(1).square().sum(1, keepdim=True).sqrt()
        response = torch.einsum("od,ndp->nop", unit, patches).unflatten(1, (rows // 2, 2)).amax(2)
        norm = (patches.square().sum(1, keepdim=True) + 1e-6).sqrt()
        cosine = (response.abs() / norm).detach()
        if self.b != 2:
            cosine = (cosine + 1e-6) ** (self.b - 1)
        gamma = self.gamma or self.scale / (channels * height * width) ** 0.5
        pad = padding if isinstance(padding, tuple) else (padding, padding)
        size = [(s + 2 * p - k) // stride + 1 for s, p, k in zip(x.shape[2:], pad, (height, width), strict=True)]
        return (gamma * cosine * response).unflatten(2, size)

    def resnet34(self, x: Tensor) -> Tensor:
        x = nn.functional.avg_pool2d(self.conv(x, "0.conv1", 2, 3), 3, 2, 1)
        for stage, blocks in enumerate((3, 4, 6, 3), start=1):
            for block in range(blocks):
                name, stride = f"0.layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
                shortcut = self.conv(x, f"{name}.downsample.0", 2) if stride == 2 else x
                x = self.conv(self.conv(x, f"{name}.conv1", stride, 1), f"{name}.conv2", 1, 1) + shortcut
        return self.conv(x, "0.fc").mean((2, 3))

    def densenet121(self, x: Tensor) -> Tensor:
        x = nn.functional.avg_pool2d(self.conv(x, "0.features.conv0", 2, 3), 3, 2, 1)
        for block, layers in enumerate((6, 12, 24, 16), start=1):
            for layer in range(1, layers + 1):
                name = f"0.features.denseblock{block}.denselayer{layer}"
                x = torch.cat([x, self.conv(self.conv(x, f"{name}.conv1"), f"{name}.conv2", 1, 1)], 1)
            if block < 4:
                x = nn.functional.avg_pool2d(self.conv(x, f"0.features.transition{block}.conv"), 2)
        return self.conv(x, "0.classifier").mean((2, 3))

    def vgg11(self, x: Tensor) -> Tensor:
        for place, pool in ((0, 1), (2, 1), (4, 0), (5, 1), (7, 0), (8, 1), (10, 0), (11, 1)):
            x = self.conv(x, f"0.features.{place}", 1, 1)
            x = nn.functional.avg_pool2d(x, 2) if pool else x
        x = self.conv(self.conv(x, "0.classifier.0", 1, 3), "0.classifier.1")
        return self.conv(x, "0.classifier.2").mean((2, 3))

    def nine_layers(self, x: Tensor) -> Tensor:
        for i, stride in enumerate((1, 1, 2, 1, 1, 2, 1, 1)):
            x = self.conv(x, str(i), stride, 1)
        return self.conv(x, "8").mean((2, 3))

    def inception_v3(self, x: Tensor) -> Tensor:
        pool = nn.functional.avg_pool2d

        def conv(x: Tensor, name: str, stride: int = 1, padding: int | tuple[int, int] = 0) -> Tensor:
            return self.conv(x, f"0.{name}.conv", stride, padding)

        x = conv(conv(conv(x, "Conv2d_1a_3x3", 2), "Conv2d_2a_3x3"), "Conv2d_2b_3x3", 1, 1)
        x = conv(conv(pool(x, 3, 2), "Conv2d_3b_1x1"), "Conv2d_4a_3x3")
        x = pool(x, 3, 2)
        for m in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
            five = conv(conv(x, f"{m}.branch5x5_1"), f"{m}.branch5x5_2", 1, 2)
            three = conv(conv(x, f"{m}.branch3x3dbl_1"), f"{m}.branch3x3dbl_2", 1, 1)
            three = conv(three, f"{m}.branch3x3dbl_3", 1, 1)
            x = torch.cat([conv(x, f"{m}.branch1x1"), five, three, conv(pool(x, 3, 1, 1), f"{m}.branch_pool")], 1)
        three = conv(conv(x, "Mixed_6a.branch3x3dbl_1"), "Mixed_6a.branch3x3dbl_2", 1, 1)
        three = conv(three, "Mixed_6a.branch3x3dbl_3", 2)
        x = torch.cat([conv(x, "Mixed_6a.branch3x3", 2), three, pool(x, 3, 2)], 1)
        for m in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
            seven = conv(conv(x, f"{m}.branch7x7_1"), f"{m}.branch7x7_2", 1, (0, 3))
            seven, double = conv(seven, f"{m}.branch7x7_3", 1, (3, 0)), conv(x, f"{m}.branch7x7dbl_1")
            for i in (2, 3, 4, 5):
                double = conv(double, f"{m}.branch7x7dbl_{i}", 1, (3, 0) if i % 2 == 0 else (0, 3))
            x = torch.cat([conv(x, f"{m}.branch1x1"), seven, double, conv(pool(x, 3, 1, 1), f"{m}.branch_pool")], 1)
        m = "Mixed_7a"
        seven = conv(conv(x, f"{m}.branch7x7x3_1"), f"{m}.branch7x7x3_2", 1, (0, 3))
        seven = conv(conv(seven, f"{m}.branch7x7x3_3", 1, (3, 0)), f"{m}.branch7x7x3_4", 2)
        x = torch.cat([conv(conv(x, f"{m}.branch3x3_1"), f"{m}.branch3x3_2", 2), seven, pool(x, 3, 2)], 1)
        for m in ("Mixed_7b", "Mixed_7c"):
            three = conv(x, f"{m}.branch3x3_1")
            double = conv(conv(x, f"{m}.branch3x3dbl_1"), f"{m}.branch3x3dbl_2", 1, 1)
            pairs = [
                conv(branch, f"{m}.{name}{end}", 1, padding)
                for branch, name in ((three, "branch3x3_2"), (double, "branch3x3dbl_3"))
                for end, padding in (("a", (0, 1)), ("b", (1, 0)))
            ]
            x = torch.cat([conv(x, f"{m}.branch1x1"), *pairs, conv(pool(x, 3, 1, 1), f"{m}.branch_pool")], 1)
        return self.conv(x, "0.fc").mean((2, 3))
