"""Train a family of models with timm's train.py, one after the other, and tabulate them.

    python scripts/recipes/ablation.py b --train-script train.py --data-dir data/cifar10 --val-split test -- \
        -b 64 --epochs 100 --opt adam --lr 1e-3 --min-lr 1e-5 --warmup-epochs 0 --bce-loss --smoothing 1e-6
    python scripts/recipes/ablation.py growth --train-script train.py --data-dir imagenet -- --epochs 100 --opt \
        adam --lr 2.5e-4

`b` is the CIFAR model for seven exponents: accuracy, and how well the rows of W(x) align with the image (Fig. B3 of
the supplement of arXiv 2205.10268). `growth` is DenseNet-121 with growth rates 20 to 32, with and without MaxOut:
accuracy against parameters (Tab. B1). What follows `--` goes to train.py. A finished model is not trained again, an
interrupted one resumes; the last epoch counts. Writes --out/table.md and --out/figure.png.
"""

import argparse
import csv
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from timm_training import train
from tqdm import tqdm

import timm_bcos
from timm_bcos import InputError
from timm_bcos.cli.exceptions import exit_status
from timm_bcos.data.datasets import image_loader
from timm_bcos.evaluation.results import remember_settings
from timm_bcos.explanation.visualization import save_figure
from timm_bcos.files import atomic_path
from timm_bcos.models.loading import load_model


@dataclass(frozen=True)
class Variant:
    """A model of the family: its name, timm's name, its keywords, and its place on the horizontal axis."""

    name: str
    model: str
    kwargs: tuple[tuple[str, Any], ...] = ()
    x: float | None = None  # None: its parameters
    line: str = ""


SETTINGS = ("data_dir", "family", "val_split", "images", "options")  # what the results depend on

FAMILIES = {
    "b": [Variant(f"B = {b / 100:g}", f"bcos_cnn9_b{b}", x=b / 100) for b in (100, 125, 150, 175, 200, 225, 250)],
    "growth": [
        Variant(f"g = {g}, MaxOut {m}", "bcos_densenet121", (("growth_rate", g), ("max_out", m)), line=f"MaxOut {m}")
        for m in (2, 1) for g in (20, 22, 24, 26, 28, 30, 32)
    ],
}  # fmt: skip


@dataclass
class Result:
    """What is measured of one."""

    variant: Variant
    parameters: float
    top1: float
    alignment: float


def options(variant: Variant, args: argparse.Namespace) -> list[str]:
    """What train.py is given."""
    given = ["--data-dir", args.data_dir, "--val-split", args.val_split, "--model", variant.model, "--device",
             args.device]  # fmt: skip
    if variant.kwargs:
        given += ["--model-kwargs", *(f"{key}={value}" for key, value in variant.kwargs)]
    return [*given, *args.options]


def last_top1(folder: Path) -> float:
    """Of summary.csv; not the best one, which would be chosen by the images that it is measured on."""
    with (folder / "summary.csv").open(newline="") as file:
        return float(list(csv.DictReader(file))[-1]["eval_top1"])


def alignments(explanation: timm_bcos.Explanation, images: torch.Tensor) -> torch.Tensor:
    """Cosines (N,) of explained rows of W(x) and the encoded images (N, C, H, W)."""
    weights, inputs = (t.flatten(1) for t in (explanation.weights, timm_bcos.encode_image(images, images.shape[1])))
    return torch.nn.functional.cosine_similarity(weights, inputs)


def alignment(model: Any, images: torch.Tensor) -> float:
    """Mean cosine of the explanation of the predicted class and the encoded image."""
    return alignments(timm_bcos.explain(model, images), images).mean().item()


def some_images(model: Any, args: argparse.Namespace) -> torch.Tensor:
    dataset = timm.data.create_dataset("", root=args.data_dir, split=args.val_split)
    load = image_loader(model, dataset)
    indices = torch.linspace(0, len(dataset) - 1, min(args.images, len(dataset))).round().int().tolist()
    return torch.stack([load(i)[0] for i in indices])


def measure(variant: Variant, folder: Path, args: argparse.Namespace) -> Result:
    model = load_model(checkpoint=folder / "last.pth.tar").eval()
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    return Result(variant, parameters, last_top1(folder), alignment(model, some_images(model, args)))


def table(results: list[Result]) -> str:
    lines = ["| model | parameters (M) | top-1 (%) | alignment |", "| --- | ---: | ---: | ---: |"]
    lines += [f"| {r.variant.name} | {r.parameters:.1f} | {r.top1:.2f} | {r.alignment:.3f} |" for r in results]
    return "\n".join(lines) + "\n"


def figure(results: list[Result]) -> Any:
    from matplotlib.figure import Figure

    picture = Figure(figsize=(9, 3.5), layout="constrained")
    for ax, name, label in zip(picture.subplots(1, 2), ("top1", "alignment"), ("top-1 (%)", "alignment"), strict=True):
        for line in dict.fromkeys(r.variant.line for r in results):
            chosen = [r for r in results if r.variant.line == line]
            places = [r.parameters if r.variant.x is None else r.variant.x for r in chosen]
            ax.plot(places, [getattr(r, name) for r in chosen], "o-", label=line)
        ax.set(xlabel="B" if results[0].variant.x is not None else "parameters (M)", ylabel=label)
        if results[0].variant.line:
            ax.legend()
    return picture


def run(args: argparse.Namespace) -> None:
    family = {v.name.replace(" ", ""): v for v in FAMILIES[args.family]}
    unknown = set(args.only) - set(family)
    if unknown:
        raise InputError(f"--only {' '.join(sorted(unknown))}: choose of {' '.join(family)}")
    remember_settings(args.out, {name: getattr(args, name) for name in SETTINGS})
    results = []
    for variant in tqdm([v for name, v in family.items() if name in args.only or not args.only], "models"):
        folder = args.out / variant.name.replace(" ", "").replace(",", "_")
        results.append(measure(variant, train(folder, args.train_script, options(variant, args)), args))
        with atomic_path(args.out / "table.md") as path:  # partial results are kept
            path.write_text(table(results))
    save_figure(figure(results), args.out / "figure.png")
    print(table(results))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=list(FAMILIES))
    parser.add_argument("--train-script", type=Path, required=True, help="timm's train.py")
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--val-split", default="validation")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="for instance B=2 or g=20,MaxOut2")
    parser.add_argument("--images", type=int, default=200, help="for the alignment")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("ablation"))
    given = sys.argv[1:]
    end = given.index("--") if "--" in given else len(given)
    parser.set_defaults(options=given[end + 1 :])
    args = parser.parse_args(given[:end])
    raise SystemExit(exit_status(partial(run, args)))


if __name__ == "__main__":
    main()
