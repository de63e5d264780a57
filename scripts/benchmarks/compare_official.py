"""Compare our networks with the official implementation (PyPI `bcos`) on the same weights: logits and contributions.

The official networks get random weights, one pass in training mode with momentum 1 (otherwise the signal vanishes in
an untrained network and the comparison proves nothing), and are saved as a file in the release's format. Ours load that
file by name. Errors are relative to the largest value, in float64, of the logits without the logit bias.
"""

import argparse
import gc
import tempfile
import warnings
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from tqdm import tqdm

import timm_bcos
from timm_bcos.models.architectures import SECOND_PAPER

SIZES = {"tiny": "ti", "small": "s", "base": "b", "large": "l"}


def official_name(name: str) -> str:
    """The entry of the package's list that one of our names stands for."""
    name = name.removeprefix("bcosv2_")
    if name.startswith(("vit_", "vitc_")):
        kind, size, rest = name.split("_", 2)
        return f"{'simple_vit' if kind == 'vit' else kind}_{SIZES[size]}_{rest}"
    return {"vgg11_bn": "vgg11_bnu"}.get(name, name)


def official_network(entry: str, x: Tensor, **kwargs: Any) -> nn.Module:
    """The package's model with random weights and running statistics of x, in evaluation mode and float64."""
    import bcos.models.pretrained

    model = getattr(bcos.models.pretrained, entry)(**kwargs).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim <= 1 or parameter.numel() == max(parameter.shape):  # norms and layer scales
                parameter.copy_(1 + 0.2 * torch.randn_like(parameter))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(x)
    return model.float().double().eval()  # files hold float32


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def compare(name: str, x: Tensor, official: dict[str, Any] | None = None, **kwargs: Any) -> tuple[float, float]:
    """Largest relative errors of one of our v2 models: of logits − logit bias, and of the contributions.

    Args:
        name: One of our names.
        x: (N, 3, H, W) in float64, H and W multiples of 32.
        official: Keyword arguments of the official network.
        **kwargs: Keyword arguments of our network.
    """
    encoded = timm_bcos.encode_image(x, 3).requires_grad_()
    theirs = official_network(official_name(name), encoded.detach(), **(official or {}))
    size = dict(img_size=tuple(x.shape[-2:])) if "vit" in name else {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.pth"
        torch.save({key: value.float() for key, value in theirs.state_dict().items()}, path)
        ours = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(file=str(path)), **size, **kwargs)
    return _compare(ours.eval().double(), theirs, encoded)


def _compare(ours: nn.Module, theirs: nn.Module, encoded: Tensor) -> tuple[float, float]:
    explanation = timm_bcos.explain(ours, encoded.detach())
    for module in theirs.modules():
        if hasattr(module, "set_explanation_mode"):
            module.set_explanation_mode(True)
    logits = theirs(encoded)
    (gradient,) = torch.autograd.grad(logits.gather(1, explanation.target[:, None]).sum(), encoded)
    bias = -torch.log(torch.tensor(999.0, dtype=torch.float64))
    signal = logits.detach() - bias
    assert signal.abs().max() > 1e-6, "no signal to compare"
    contributions = (gradient * encoded).detach()
    return relative_error(explanation.logits - bias, signal), relative_error(explanation.contributions, contributions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=sorted(SECOND_PAPER), help="our names; all v2 networks if none")
    parser.add_argument("--size", type=int, default=224, help="image size")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    x = torch.rand(1, 3, 8, 8, dtype=torch.float64)
    x = nn.functional.interpolate(x, args.size, mode="bicubic").clamp(0, 1)
    print("| network | logits | contributions |\n| --- | ---: | ---: |")
    for name in tqdm(args.names):
        logits, contributions = compare(name, x)
        tqdm.write(f"| `{name}` | {logits:.1e} | {contributions:.1e} |")
        gc.collect()


if __name__ == "__main__":
    main()
