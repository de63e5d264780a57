"""Train the paper's CIFAR-10 models for the seven exponents, in pieces, into one folder.

    python scripts/recipes/train_cifar.py runs --data-dir data/cifar10                 # all of it
    python scripts/recipes/train_cifar.py runs --data-dir data/cifar10 --minutes 10  # ten minutes of it; again to go on
    python scripts/recipes/train_cifar.py runs --minutes 10  # elsewhere, with a copy of `runs`

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
from timm_bcos.cli.exceptions import exit_status
from timm_bcos.evaluation.results import remember_settings
from timm_bcos.explanation.visualization import save_figure
from timm_bcos.files import atomic_path

VARIANTS = {variant.x: variant for variant in FAMILIES["b"]}  # by exponent
RATES = 1e-3, 1e-5
PADDING = 4
WARM_UP = 3  # steps before one is recorded
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


def augmented(images: Tensor, top: Tensor, left: Tensor, is_flipped: Tensor) -> Tensor:
    """Crops of the padded images, some of them flipped.

    Args:
        images: (N, C, H, W).
        top: (N,) where the crop begins, from 0 to twice the padding.
        left: Likewise.
        is_flipped: (N,) Whether it is flipped.
    """
    count, _, height, width = images.shape
    padded = F.pad(images, [PADDING] * 4)
    rows, columns = (torch.arange(size, device=images.device) for size in (height, width))
    columns = torch.where(is_flipped[:, None], columns.flip(0), columns) + left[:, None]
    rows = rows + top[:, None]
    number = torch.arange(count, device=images.device)[:, None, None]
    return padded[number, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def draws(epoch: int, count: int) -> list[Tensor]:
    """For one epoch: the order of the images, and each one's crop (top, left, flipped); the same in every run."""
    generator = torch.Generator().manual_seed(epoch)
    top, left = torch.randint(2 * PADDING + 1, (2, count), generator=generator)
    return [torch.randperm(count, generator=generator), top, left, torch.rand(count, generator=generator) < 0.5]


def learning_rate(progress: float) -> float:
    """By a cosine, at a share of all steps."""
    first, last = RATES
    return last + (first - last) * 0.5 * (1 + math.cos(math.pi * progress))


class Run:
    """The training of one model, to the step where it was left.

    On a GPU the first steps are computed as usual and a step's kernels then recorded as one CUDA graph: launched one by
    one, kernels for so small a model take longer to start than to run.

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
        self.device = torch.device(args.device)
        model: Any = timm.create_model(variant.model)
        self.model = model.to(self.device, memory_format=torch.channels_last)
        self.rate = torch.tensor(RATES[0], device=self.device)
        on_gpu = self.device.type == "cuda"
        self.optimizer = torch.optim.Adam(self.model.parameters(), self.rate, capturable=on_gpu, fused=on_gpu)
        count = len(data["train"][1])
        self.per_epoch = count // args.batch_size
        self.total = args.epochs * self.per_epoch
        self.done = 0
        self.losses = torch.zeros((), device=self.device)  # their sum since the last record
        self.number = torch.zeros((), dtype=torch.long, device=self.device)  # of the batch in its epoch
        self.draws = [t.to(self.device) for t in draws(0, count)]
        self.answer = torch.compile(self.model) if args.compile else self.model
        self.stream = torch.cuda.Stream() if on_gpu else None
        self.graph: torch.cuda.CUDAGraph | None = None
        if self.state.exists():
            self.resume()

    def resume(self) -> None:
        saved = torch.load(self.state, map_location=self.device, weights_only=True)
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.done, self.losses = saved["done"], saved["losses"]
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate
        self.draw(self.done // self.per_epoch)

    def draw(self, epoch: int) -> None:
        """Get ready for an epoch."""
        for kept, new in zip(self.draws, draws(epoch, len(self.data["train"][1])), strict=True):
            kept.copy_(new)

    def advance(self) -> None:
        """One step; on a GPU it may still be running when this returns."""
        with torch.cuda.stream(self.stream):
            self.rate.fill_(learning_rate(self.done / self.total))
            self.number.fill_(self.done % self.per_epoch)
            if self.graph:
                self.graph.replay()
            else:
                self.step()
                if self.stream and self.done >= WARM_UP:
                    self.graph = self.recorded()
            self.done += 1
            epoch, number = divmod(self.done, self.per_epoch)
            if number == 0 and self.done < self.total:
                self.draw(epoch)
            if number == 0 and (epoch % self.args.every == 0 or self.done == self.total):
                self.record(epoch)

    def recorded(self) -> torch.cuda.CUDAGraph:
        """A step that can be launched as a whole."""
        graph = torch.cuda.CUDAGraph()
        self.optimizer.zero_grad()  # gradients then live in the graph's own memory
        with torch.cuda.graph(graph, stream=self.stream):
            self.step()
        return graph

    def step(self) -> None:
        """One step of Adam."""
        images, labels = self.batch()
        with self.precision():
            logits = self.answer(images)
        loss = F.binary_cross_entropy_with_logits(logits.float(), F.one_hot(labels, CLASSES).float())
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.losses += loss.detach()

    def batch(self) -> tuple[Tensor, Tensor]:
        """Images and labels of the next step, the same in every run."""
        images, labels = self.data["train"]
        size = self.args.batch_size
        place = self.number * size + torch.arange(size, device=self.device)
        order, *crops = (t[place] for t in self.draws)
        pixels = augmented(images[order], *crops).float() / 255
        return pixels.contiguous(memory_format=torch.channels_last), labels[order]

    def precision(self) -> Any:
        return torch.autocast(self.device.type, torch.bfloat16) if self.args.amp else nullcontext()

    @torch.no_grad()
    def accuracy(self) -> float:
        """Top 1 on the test split, in percent."""
        self.model.eval()
        right = 0
        for images, labels in zip(*(t.split(500) for t in self.data["test"]), strict=True):
            right += int((self.model(images.float() / 255).argmax(1) == labels).sum())
        self.model.train()
        return 100 * right / len(self.data["test"][1])

    def record(self, epoch: int) -> None:
        """Log loss and accuracy, and save; the weights, too, in the end."""
        lines = self.log.read_text().splitlines() if self.log.exists() else ["epoch,loss,top1"]
        before = int(lines[-1].split(",")[0]) if len(lines) > 1 else 0
        loss = self.losses.item() / ((epoch - before) * self.per_epoch)
        lines.append(f"{epoch},{loss:.5f},{self.accuracy():.2f}")
        with atomic_path(self.log) as path:
            path.write_text("\n".join(lines) + "\n")
        self.losses.zero_()
        self.save()
        if self.done == self.total:
            with atomic_path(self.weights) as path:
                save_model(self.model, str(path))

    def save(self) -> None:
        parts = dict(model=self.model.state_dict(), optimizer=self.optimizer.state_dict())
        with atomic_path(self.state) as path:
            torch.save(parts | dict(done=self.done, losses=self.losses), path)

    def result(self) -> Result:
        """Accuracy of the last epoch, and alignment of the first test images."""
        with self.log.open(newline="") as file:
            top1 = float(list(csv.DictReader(file))[-1]["top1"])
        images = self.data["test"][0][: self.args.images].float() / 255
        parameters = sum(p.numel() for p in self.model.parameters()) / 1e6
        return Result(self.variant, parameters, top1, alignment(self.model.eval(), images))


def train(runs: list[Run], deadline: float) -> bool:
    """Trainings step by step beside each other, until their end or `deadline` (seconds of `time.monotonic`).

    Returns:
        Whether the end was reached.
    """
    total, done = (sum(numbers) for numbers in zip(*((run.total, run.done) for run in runs), strict=True))
    with tqdm(total=total, initial=done, desc=", ".join(run.variant.name for run in runs), disable=None) as bar:
        while left := [run for run in runs if run.done < run.total]:
            for run in left:
                run.advance()
            bar.update(len(left))
            if time.monotonic() > deadline:
                break
    left = [run for run in runs if run.done < run.total]
    for run in left:
        run.save()
    return not left


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
    for group in [args.b] if args.together else [[b] for b in args.b]:
        runs = [Run(VARIANTS[b], args, data) for b in group]
        if not train(runs, deadline):
            print(f"{', '.join(run.variant.name for run in runs)}: not done, run the same command again to go on")
            return
        results += [run.result() for run in runs]
    report(results, args.out)


def report(results: list[Result], out: Path) -> None:
    """Table and figure of all models."""
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
    parser.add_argument("--together", action="store_true", help="train all models at once, which fills a GPU")
    parser.add_argument("--every", type=int, default=1, help="epochs between looks at the test split")
    parser.add_argument("--amp", action="store_true", help="bfloat16 where it is safe")
    parser.add_argument("--compile", action="store_true", help="by torch.compile")
    parser.add_argument("--images", type=int, default=500, help="for the alignment")
    parser.add_argument("--seed", type=int, default=0)
    raise SystemExit(exit_status(partial(run, parser.parse_args())))


if __name__ == "__main__":
    main()
