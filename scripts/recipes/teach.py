"""Teach the B-cos model that a plain EfficientNet is converted into by its original, without labels.

    python scripts/recipes/lite0_weights.py lite0.safetensors
    python scripts/recipes/teach.py lite0.safetensors taught --arch tf_efficientnet_lite0 --b 1.25 \
        --probability softmax \
        --photos clothing/train.tar clothing/extra.tar grocery/train.tar --scenes wallpapers --icons cifar10/train.tar \
        --test imagenet_photos.tar --class-map imagenet_class_map.txt
    python scripts/recipes/teach.py plain/model_best.pth.tar taught --photos clothes/train --test clothes \
        --split validation

A model without biases is another function, however near its weights are. So the student's activations are gated by
what its original's biases make of a gray image (`BcosConfig(bias="reference")`): at B = 1 its features then are the
original's, less those of a gray image, but at the borders. From there it learns to answer as the original does:
features behind each block, and logits. What the norms divide by is fixed at the start, since the photos at hand may not
be those that the original learned from. The photos of --test are only looked at. A run that was interrupted resumes;
`log.csv` has the accuracy as it goes, and `student.pth.tar` in the end is a checkpoint like those of timm's train.py.
"""

import argparse
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from tqdm import tqdm
from unlabeled import SOURCES, Batches, load_images

from timm_bcos import BcosConfig, bcosify
from timm_bcos.cli.exceptions import exit_status
from timm_bcos.data.datasets import load_dataset
from timm_bcos.evaluation.pointing_game import confidences
from timm_bcos.evaluation.results import remember_settings
from timm_bcos.files import atomic_path
from timm_bcos.models.loading import DATA_ARGUMENTS, load_plain_model
from timm_bcos.nn.norms import UncenteredBatchNormAct2d

NOT_REMEMBERED = ("out", "every", "compile", "device", "workers")
GRAY = 448, 448  # so large that its middle does not see the borders
CALIBRATION = range(1_000_000, 1_000_004)  # numbers of batches, beyond those of training


def blocks(network: Any) -> list[nn.Module]:
    """The model up to its pooling, in pieces that follow each other."""
    inner = [block for stage in network.blocks for block in stage]
    return [nn.Sequential(network.conv_stem, network.bn1), *inner, nn.Sequential(network.conv_head, network.bn2)]


def answers(network: Any, x: Tensor) -> tuple[list[Tensor], Tensor]:
    """The features behind each block, and the logits."""
    found = []
    for block in blocks(network):
        x = block(x)
        found.append(x)
    return found, network.forward_head(x)


def feature_difference(found: Sequence[Tensor], wanted: Sequence[Tensor], zero: Sequence[Tensor]) -> Tensor:
    """Mean over blocks of the squared difference, in units of the channels' mean variance of what is wanted.

    Args:
        found: (N, C, H, W) of each block.
        wanted: Likewise.
        zero: (C, 1, 1), what of `wanted` stands for 0.
    """
    parts = [
        (a - (b - z)).square().mean() / b.var((0, 2, 3)).mean() for a, b, z in zip(found, wanted, zero, strict=True)
    ]
    return torch.stack(parts).mean()


def divergence(logits: Tensor, wanted: Tensor, probability: str) -> Tensor:
    """KL divergence of the probabilities, of all classes together or the sum over classes."""
    if probability == "softmax":
        return F.kl_div(logits.log_softmax(1), wanted.log_softmax(1), reduction="batchmean", log_target=True)
    cross, own = (F.binary_cross_entropy_with_logits(x, wanted.sigmoid(), reduction="sum") for x in (logits, wanted))
    return (cross - own) / len(logits)


@contextmanager
def hooked(network: nn.Module, names: Iterable[str], look: Callable[[str, Any, Tensor], None]) -> Iterator[None]:
    """Let a function see names, modules and what these are given."""
    hooks = [
        network.get_submodule(name).register_forward_pre_hook(lambda module, x, name=name: look(name, module, x[0]))
        for name in names
    ]
    yield
    for hook in hooks:
        hook.remove()


def variance(x: Tensor) -> Tensor:
    """(C,) the variance of each channel."""
    return x.var((0, 2, 3), unbiased=False)


def accuracy(network: Any, args: argparse.Namespace) -> float:
    """Top 1 on labeled photos, in percent."""
    dataset = load_dataset(args.test, network.num_classes, split=args.split, class_map=args.class_map)
    found = list(confidences(network.eval(), dataset, batch_size=32, progress=False))
    return 100 * sum(one.label == one.predicted for one in found) / len(found)


class Lesson:
    """The teaching of one student, to the step where it was left."""

    def __init__(self, args: argparse.Namespace, batches: Batches) -> None:
        self.args, self.batches, self.device = args, batches, torch.device(args.device)
        original, self.teacher = (load_plain_model(args.arch, args.teacher).eval() for _ in range(2))
        stats = resolve_model_data_config(self.teacher)
        self.mean, self.std = (torch.tensor(stats[k], device=self.device)[:, None, None] for k in ("mean", "std"))
        self.kwargs = self.conversion()
        self.config = BcosConfig.finetune(**self.kwargs)
        self.student: Any = bcosify(original, self.config)
        self.norms = {n: m for n, m in self.student.named_modules() if isinstance(m, UncenteredBatchNormAct2d)}
        for network in (self.student, self.teacher):
            network.to(self.device, memory_format=torch.channels_last)
        self.gray = self.answer_to_gray()
        self.optimizer = self.make_optimizer()
        self.loss = torch.compile(self.whole_loss) if args.compile else self.whole_loss
        self.done, self.state = 0, args.out / "state.pt"
        if self.state.exists():
            self.resume(self.state)
        elif args.start:
            self.go_on(args.start)
        else:
            self.begin()
        self.train()

    def train(self) -> None:
        """Training mode, but for what the norms divide by."""
        self.student.train()
        for norm in self.norms.values():
            norm.eval()

    def conversion(self) -> dict[str, Any]:
        """The fields of `BcosConfig`."""
        is_softmax = self.args.probability == "softmax"  # which does not know what is added to all logits
        logit_bias = 0.0 if is_softmax else round(self.teacher.get_classifier().bias.mean().item(), 3)
        given = dict(bias="reference", b=self.args.b, antialias=self.args.antialias, probability=self.args.probability)
        return given | dict(stem="encoded", logit_bias=logit_bias)

    def make_optimizer(self) -> torch.optim.Optimizer:
        parameters = list(self.student.parameters())
        matrices, gains = ([p for p in parameters if (p.ndim > 1) is wanted] for wanted in (True, False))
        groups = [dict(params=matrices, weight_decay=0.01), dict(params=gains, weight_decay=0.0)]
        return torch.optim.AdamW(groups, self.args.rate, betas=(0.9, 0.99))

    def resume(self, path: Path) -> None:
        saved = torch.load(path, map_location=self.device, weights_only=True)
        self.student.load_state_dict(saved["student"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.done = saved["done"]

    @torch.no_grad()
    def begin(self) -> None:
        """Start as the original: its stem for encoded images, and its norms."""
        weight = self.teacher.conv_stem.weight / self.std
        self.student.conv_stem.weight.copy_(torch.cat([weight * (1 - self.mean), -weight * self.mean], 1))
        self.follow(self.teacher, lambda x: (x - self.mean) / self.std)

    @torch.no_grad()
    def answer_to_gray(self) -> list[Tensor]:
        """(C, 1, 1) the original's features behind each block, in the middle of a gray image."""
        features, _ = answers(self.teacher, torch.zeros(1, len(self.mean), *GRAY, device=self.device))
        return [f[0, :, f.shape[2] // 2, f.shape[3] // 2, None, None] for f in features]

    @torch.no_grad()
    def follow(self, other: nn.Module, prepare: Callable[[Tensor], Tensor]) -> None:
        """Let norms divide by as much as those of another model.

        On other photos than those that the other learned from its features deviate by more or less; so would the
        student's. Hence not by its own deviation, but by the other's times the ratio of both on the same photos.

        Args:
            other: A model with norms of the same names.
            prepare: What makes its images of pixels in [0, 1].
        """
        theirs: dict[str, Tensor] = {}

        def measure(name: str, _: Any, x: Tensor) -> None:
            theirs[name] = variance(x)

        def adapt(name: str, norm: Any, x: Tensor) -> None:
            ratio = torch.where(theirs[name] > 1e-8, variance(x) / theirs[name].clamp(min=1e-8), 1.0)
            norm.running_var.copy_(other.get_submodule(name).running_var * ratio)

        x = torch.cat([self.batches[number] for number in CALIBRATION]).to(self.device)
        with hooked(other, self.norms, measure):
            other(prepare(x))
        with hooked(self.student.eval(), self.norms, adapt):
            self.student(x)

    def go_on(self, path: Path) -> None:
        """Start as another lesson's student, at another B."""
        saved = torch.load(path, map_location=self.device, weights_only=True)
        before = bcosify(load_plain_model(self.args.arch, self.args.teacher), self.config.change(b=saved["b"]))
        before = before.eval().to(self.device)
        weights = {name: value for name, value in saved["student"].items() if name != "bcos_settings"}
        for network in (before, self.student):  # of which the student has another B
            network.load_state_dict(weights)
        self.follow(before, lambda x: x)

    def whole_loss(self, x: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.amp):
            with torch.no_grad():
                features, logits = answers(self.teacher, (x - self.mean) / self.std)
            found, guessed = answers(self.student, x)
        difference = feature_difference([f.float() for f in found], [f.float() for f in features], self.gray)
        distance = divergence(guessed.float(), logits.float(), self.args.probability)
        return self.args.hints * difference + self.args.weight * distance

    def teach(self) -> None:
        """All steps that are left."""
        steps = self.args.steps
        batches = self.batches.prepared(self.done, steps, self.args.workers, self.device.type == "cuda")
        for x in tqdm(batches, "steps", steps, initial=self.done, disable=None):
            cosine = 0.5 * (1 + math.cos(math.pi * self.done / steps))
            for group in self.optimizer.param_groups:
                group["lr"] = self.args.rate * min(1.0, (self.done + 1) / 30) * (0.02 + 0.98 * cosine)
            loss = self.loss(x.to(self.device, non_blocking=True))
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.student.parameters(), 5.0)
            self.optimizer.step()
            self.done += 1
            if self.done % self.args.every == 0 or self.done == steps:
                self.record(loss.item())
        self.finish()

    def finish(self) -> None:
        """Write a checkpoint as timm's train.py does."""
        kwargs = dict(arch=self.teacher.pretrained_cfg["architecture"]) | self.kwargs
        config = resolve_model_data_config(self.teacher)
        images = {name: config[name] for name in DATA_ARGUMENTS}
        trained = argparse.Namespace(
            model="bcosify", num_classes=self.student.num_classes, model_kwargs=kwargs, **images
        )
        with atomic_path(self.args.out / "student.pth.tar") as path:
            torch.save(dict(state_dict=self.student.state_dict(), args=trained), path)

    def record(self, loss: float) -> None:
        """A checkpoint, and a line in the log."""
        parts = dict(student=self.student.state_dict(), optimizer=self.optimizer.state_dict(), done=self.done)
        with atomic_path(self.state) as path:
            torch.save(parts | dict(b=self.args.b), path)
        top1 = accuracy(self.student, self.args)
        self.train()
        line = f"{self.done},{self.args.b:g},{loss:.4f},{top1:.1f}"
        print(line, flush=True)
        log = self.args.out / "log.csv"
        lines = log.read_text().splitlines() if log.exists() else ["step,b,loss,top1"]
        with atomic_path(log) as path:
            path.write_text("\n".join([*lines, line]) + "\n")


def run(args: argparse.Namespace) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    remember_settings(args.out, {n: value for n, value in vars(args).items() if n not in NOT_REMEMBERED})
    images = {kind: load_images(getattr(args, kind), source.side) for kind, source in SOURCES.items()}
    Lesson(args, Batches(images, args.size, args.batch_size, args.seed)).teach()


def main() -> None:
    """Teach as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path, help="the plain model: a checkpoint of train.py, or weights of --arch")
    parser.add_argument("out", type=Path, help="folder for checkpoint, log and student")
    parser.add_argument("--arch", help="timm's name, for weights that do not say it")
    parser.add_argument("--photos", nargs="+", required=True, help="tars or folders, whose labels are not looked at")
    parser.add_argument("--scenes", nargs="*", default=[], help="likewise, large photos that are cut into small ones")
    parser.add_argument("--icons", nargs="*", default=[], help="likewise, tiny photos")
    parser.add_argument("--test", required=True, help="labeled photos, as --data-dir takes them")
    parser.add_argument("--split", default="", help="of --test")
    parser.add_argument("--class-map", default="", help="of --test")
    parser.add_argument("--start", type=Path, help="state.pt of another run, whose student this one starts as")
    parser.add_argument("--b", type=float, default=1.25)
    parser.add_argument("--probability", choices=("sigmoid", "softmax"), default="sigmoid", help="as it was trained")
    parser.add_argument("--antialias", action="store_true")
    parser.add_argument("--size", type=int, default=160, help="of the crops, in pixels")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--hints", type=float, default=1.0, help="weight of the features' difference")
    parser.add_argument("--weight", type=float, default=1.0, help="of the logits' divergence")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=125, help="steps between checkpoints")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=1, help="processes that make the batches")
    parser.add_argument("--amp", action="store_true", help="bfloat16 where it is safe")
    parser.add_argument("--compile", action="store_true", help="by torch.compile, which takes half the time")
    raise SystemExit(exit_status(partial(run, parser.parse_args())))


if __name__ == "__main__":
    main()
