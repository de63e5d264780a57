"""Train the paper's CIFAR-10 networks for the seven exponents, in pieces, into one folder.

    python scripts/train_cifar.py runs --data-dir data/cifar10                 # all of it
    python scripts/train_cifar.py runs --data-dir data/cifar10 --minutes 10    # ten minutes of it; again to go on
    python scripts/train_cifar.py runs --minutes 10                            # elsewhere, with a copy of `runs`

The data are packed into `runs/cifar10.safetensors` first (the files' bytes as they are, 56 MB). `bcos_cnn9` is trained
as in appendix C.1.1 of arXiv 2205.10268: Adam, learning rate 1e-3 to 1e-5 by a cosine, batches of 64, crops after
padding and flips, binary cross-entropy. An interrupted run resumes at the step where it was, and computes what it would
have computed. For each exponent `runs/b150` and so on hold `log.csv` and, when done, `model.safetensors`; when all are,
`runs/table.md` and `runs/figure.png` say accuracy and alignment (Fig. B3 of the supplement). The test split chooses
nothing: the last epoch counts.
"""

import argparse
import csv
import io
import math
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from ablation import FAMILIES, Result, Variant, alignment, figure, table
from PIL import Image
from safetensors.torch import load_file, save_file, save_model
from timm.data import create_dataset
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from timm_bcos import InputError
from timm_bcos.cli.failures import exit_status
from timm_bcos.explaining.figures import save_figure
from timm_bcos.files import atomic_path
from timm_bcos.judging.settings import remember_settings

VARIANTS = {variant.x: variant for variant in FAMILIES["b"]}  # by exponent
RATES = 1e-3, 1e-5
PADDING = 4
CLASSES = 10


def pack(data_dir: str, file: Path) -> None:
    """Write the image files of both splits one after the other, with where each ends and its label."""
    packed = {}
    for split in ("train", "test"):
        tar = Path(data_dir, f"{split}.tar")
        reader: Any = create_dataset("", root=str(tar if tar.exists() else data_dir), split=split).reader
        pairs = [reader[i] for i in tqdm(range(len(reader)), f"packing {split}", disable=None)]
        contents = [image.read() for image, _ in pairs]
        packed[f"{split}_bytes"] = torch.frombuffer(bytearray(b"".join(contents)), dtype=torch.uint8)
        packed[f"{split}_ends"] = torch.tensor([len(content) for content in contents]).cumsum(0)
        packed[f"{split}_labels"] = torch.tensor([label for _, label in pairs])
    with atomic_path(file) as path:
        save_file(packed, path)


def unpack(file: Path, split: str) -> tuple[Tensor, Tensor]:
    """Images (N, 3, 32, 32) of bytes, and labels (N,)."""
    packed = load_file(file)
    contents = packed[f"{split}_bytes"].numpy().tobytes()
    ends = packed[f"{split}_ends"].tolist()
    files = [contents[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    images = [pil_to_tensor(Image.open(io.BytesIO(content)).convert("RGB")) for content in files]
    return torch.stack(images), packed[f"{split}_labels"]


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Crops of the padded images at random places, half of them flipped."""
    count, _, height, width = images.shape
    padded = F.pad(images, [PADDING] * 4)
    top, left = torch.randint(2 * PADDING + 1, (2, count, 1), generator=generator).to(images.device)
    rows, columns = (torch.arange(size, device=images.device) for size in (height, width))
    is_flipped = (torch.rand(count, 1, generator=generator) < 0.5).to(images.device)
    columns = torch.where(is_flipped, columns.flip(0), columns) + left
    number = torch.arange(count, device=images.device)[:, None, None]
    return padded[number, :, (rows + top)[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def learning_rate(progress: float) -> float:
    """By a cosine, at a share of all steps."""
    first, last = RATES
    return last + (first - last) * 0.5 * (1 + math.cos(math.pi * progress))


class Run:
    """The training of one network, to the step where it was left.

    Args:
        variant: Which.
        args: The command line.
        data: Images and labels of both splits, on the device.
    """

    def __init__(self, variant: Variant, args: argparse.Namespace, data: dict[str, tuple[Tensor, Tensor]]) -> None:
        self.variant, self.args, self.data = variant, args, data
        folder: Path = args.out / variant.model.rpartition("_")[2]
        self.weights, self.state, self.log = (folder / name for name in ("model.safetensors", "state.pt", "log.csv"))
        torch.manual_seed(args.seed)
        model: Any = timm.create_model(variant.model)
        self.model = model.to(args.device, memory_format=torch.channels_last)
        self.optimiser = torch.optim.Adam(self.model.parameters(), RATES[0])
        self.per_epoch = len(data["train"][1]) // args.batch_size
        self.done, self.losses = 0, 0.0  # steps, and the sum of losses of this epoch
        self.answer = torch.compile(self.model) if args.compile else self.model
        if self.state.exists():
            saved = torch.load(self.state, map_location=args.device, weights_only=True)
            self.model.load_state_dict(saved["model"])
            self.optimiser.load_state_dict(saved["optimiser"])
            self.done, self.losses = saved["done"], saved["losses"]

    def train(self, deadline: float) -> bool:
        """Until the end, or until `deadline` (seconds of `time.monotonic`); whether the end was reached."""
        total = self.args.epochs * self.per_epoch
        with tqdm(total=total, initial=self.done, desc=self.variant.name, disable=None) as bar:
            while self.done < total:
                self.losses += self.step(*self.batch(), learning_rate(self.done / total))
                self.done += 1
                bar.update()
                if self.done % self.per_epoch == 0:
                    self.end_epoch()
                elif time.monotonic() > deadline:
                    self.save()
                if time.monotonic() > deadline and self.done < total:
                    return False
        if not self.weights.exists():
            with atomic_path(self.weights) as path:
                save_model(self.model, str(path))
        return True

    def batch(self) -> tuple[Tensor, Tensor]:
        """Images and labels of the next step, the same in every run."""
        images, labels = self.data["train"]
        epoch, number = divmod(self.done, self.per_epoch)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(epoch))
        chosen = order[number * self.args.batch_size :][: self.args.batch_size].to(labels.device)
        return augmented(images[chosen], torch.Generator().manual_seed(self.done)).float() / 255, labels[chosen]

    def step(self, images: Tensor, labels: Tensor, rate: float) -> float:
        """One step of Adam; its loss."""
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        with self.precision():
            logits = self.answer(images.contiguous(memory_format=torch.channels_last))
        loss = F.binary_cross_entropy_with_logits(logits.float(), F.one_hot(labels, CLASSES).float())
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        return loss.item()

    def precision(self) -> Any:
        return torch.autocast(torch.device(self.args.device).type, torch.bfloat16) if self.args.amp else nullcontext()

    @torch.no_grad()
    def accuracy(self) -> float:
        """Top 1 on the test split, in percent."""
        self.model.eval()
        right = 0
        for images, labels in zip(*(t.split(500) for t in self.data["test"]), strict=True):
            right += int((self.model(images.float() / 255).argmax(1) == labels).sum())
        self.model.train()
        return 100 * right / len(self.data["test"][1])

    def end_epoch(self) -> None:
        """Log loss and accuracy, and save."""
        epoch = self.done // self.per_epoch
        lines = self.log.read_text().splitlines()[:epoch] if self.log.exists() else ["epoch,loss,top1"]
        lines.append(f"{epoch},{self.losses / self.per_epoch:.5f},{self.accuracy():.2f}")
        with atomic_path(self.log) as path:
            path.write_text("\n".join(lines) + "\n")
        self.losses = 0.0
        self.save()

    def save(self) -> None:
        parts = dict(model=self.model.state_dict(), optimiser=self.optimiser.state_dict())
        with atomic_path(self.state) as path:
            torch.save(parts | dict(done=self.done, losses=self.losses), path)

    def result(self) -> Result:
        """Accuracy of the last epoch, and alignment of the first test images."""
        with self.log.open(newline="") as file:
            top1 = float(list(csv.DictReader(file))[-1]["top1"])
        images = self.data["test"][0][: self.args.images].float() / 255
        parameters = sum(p.numel() for p in self.model.parameters()) / 1e6
        return Result(self.variant, parameters, top1, alignment(self.model.eval(), images))


def run(args: argparse.Namespace) -> None:
    """One piece: as much as fits into the time given."""
    deadline = time.monotonic() + 60 * args.minutes if args.minutes else float("inf")
    file = args.out / "cifar10.safetensors"
    if not file.exists() and not args.data_dir:
        raise InputError(f"{file} does not exist: give --data-dir, the folder with the splits train and test")
    remember_settings(args.out, {name: getattr(args, name) for name in ("epochs", "batch_size", "seed", "amp")})
    if not file.exists():
        pack(args.data_dir, file)
    data = {split: unpack(file, split) for split in ("train", "test")}
    data = {split: (images.to(args.device), labels.to(args.device)) for split, (images, labels) in data.items()}
    results = []
    for variant in (VARIANTS[b] for b in args.b):
        training = Run(variant, args, data)
        if not training.train(deadline):
            print(f"{variant.name} is not done: run the same command again to go on")
            return
        results.append(training.result())
    report(results, args.out)


def report(results: list[Result], out: Path) -> None:
    """Table and figure of all networks."""
    with atomic_path(out / "table.md") as path:
        path.write_text(table(results))
    save_figure(figure(results), out / "figure.png")
    print(table(results))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for data, checkpoints, logs and weights")
    parser.add_argument("--data-dir", default="", help="CIFAR-10: folders or tars train and test")
    parser.add_argument("--b", type=float, nargs="+", default=list(VARIANTS), choices=list(VARIANTS), metavar="B")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--minutes", type=float, help="stop, resumably, after this time")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--amp", action="store_true", help="bfloat16 where it is safe")
    parser.add_argument("--compile", action="store_true", help="by torch.compile")
    parser.add_argument("--images", type=int, default=500, help="for the alignment")
    parser.add_argument("--seed", type=int, default=0)
    raise SystemExit(exit_status(partial(run, parser.parse_args())))


if __name__ == "__main__":
    main()
