"""Teach a converted EfficientNet-Lite0 by its plain original, without labels and without ImageNet photos.

    python scripts/lite0_weights.py lite0.safetensors
    python scripts/teach_imagenet.py lite0.safetensors taught --photos clothing/train.tar clothing/extra.tar \
        grocery/train.tar --test imagenet_photos.tar --class-map imagenet_class_map.txt --b 1.25

First each stage alone learns to answer as the original's stage does, from the original's features (hints: they are
local and need few photos); then the whole network learns stages and logits together. The photos of --test are only
looked at. A run that was interrupted resumes; `log.csv` has the accuracy after each epoch.
"""

import argparse
import csv
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.data.transforms_factory import create_transform
from torch import Tensor, nn
from tqdm import tqdm

from timm_bcos import BcosConfig, bcosify
from timm_bcos.data.datasets import image_batches, load_dataset
from timm_bcos.files import atomic_path
from timm_bcos.judging.settings import remember_settings

ARCH = "tf_efficientnet_lite0"
MIXED = 0.3  # share of batches whose photos are blended with others


class Photos:
    """Photos without labels, cut at random.

    Args:
        roots: Tars or folders.
        size: In pixels.
    """

    def __init__(self, roots: Sequence[str], size: int) -> None:
        self.datasets: list[Any] = [timm.data.create_dataset("", root=root) for root in roots]
        self.places = [(d, i) for d in range(len(self.datasets)) for i in range(len(self.datasets[d]))]
        cfg = dict(scale=(0.25, 1.0), mean=(0.0,) * 3, std=(1.0,) * 3, color_jitter=0.2)
        self.transform = create_transform((3, size, size), is_training=True, **cfg)

    def batches(self, batch_size: int, epoch: int, start: int) -> Iterator[Tensor]:
        """(N, 3, S, S) in [0, 1], the same in every run, from the batch `start` on."""
        order = random.Random(epoch).sample(self.places, len(self.places))
        for number in range(start, len(order) // batch_size):
            random.seed(1000 * epoch + number)  # timm's transforms draw from both generators
            torch.manual_seed(1000 * epoch + number)
            some = order[number * batch_size : (number + 1) * batch_size]
            x = torch.stack([self.transform(self.datasets[d][i][0].convert("RGB")) for d, i in some])
            yield x.lerp(x.flip(0), 0.5 * random.random()) if random.random() < MIXED else x


def stages(network: Any) -> list[nn.Module]:
    """The network up to its classifier, in pieces that follow each other."""
    stem = nn.Sequential(network.conv_stem, network.bn1)
    return [stem, *network.blocks, nn.Sequential(network.conv_head, network.bn2)]


def answers(network: Any, x: Tensor) -> tuple[list[Tensor], Tensor]:
    """The features of each stage, and the logits."""
    found = []
    for stage in stages(network):
        x = stage(x)
        found.append(x)
    return found, network.forward_head(x)


def answers_to(network: Any, features: Sequence[Tensor], image: Tensor) -> tuple[list[Tensor], Tensor]:
    """The same where each stage is given another network's features."""
    inputs = [image, *features]
    found = [stage(x) for stage, x in zip(stages(network), inputs, strict=False)]
    return found, network.forward_head(features[-1])


def difference(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """Mean over stages of the squared difference, in units of the variance of what is wanted."""
    parts = [(a - b).square().mean() / b.var() for a, b in zip(found, wanted, strict=True)]
    return torch.stack(parts).mean()


def divergence(logits: Tensor, wanted: Tensor) -> Tensor:
    """KL divergence of the softmax probabilities."""
    return F.kl_div(logits.log_softmax(1), wanted.log_softmax(1), reduction="batchmean", log_target=True)


@torch.no_grad()
def accuracy(network: nn.Module, root: str, class_map: str) -> float:
    """Top 1 on labelled photos, in percent."""
    dataset = load_dataset(root, 1000, class_map=class_map)
    right, training = 0, network.training
    network.eval()
    for _, x, labels in image_batches(network, dataset, range(len(dataset)), 32):
        right += int((network(x).argmax(1).cpu() == labels).sum())
    network.train(training)
    return 100 * right / len(dataset)


def teach(student: nn.Module, teacher: nn.Module, photos: Photos, args: argparse.Namespace) -> None:
    """All epochs that are left; the last checkpoint is where an interrupted run goes on."""
    mean, std = (torch.tensor(teacher.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    optimiser = torch.optim.AdamW(student.parameters(), args.rate, weight_decay=0.01)
    epochs, per_epoch = args.hints + args.epochs, len(photos.places) // args.batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, args.rate, epochs * per_epoch, pct_start=0.05)
    state, done = args.out / "state.pt", 0
    if state.exists():
        saved = torch.load(state, weights_only=True)
        done = saved["done"]
        for part, name in ((student, "student"), (optimiser, "optimiser"), (schedule, "schedule")):
            part.load_state_dict(saved[name])
    while done < epochs * per_epoch:
        epoch, start = divmod(done, per_epoch)
        bar = tqdm(photos.batches(args.batch_size, epoch, start), f"epoch {epoch}", per_epoch - start, disable=None)
        for x in bar:
            with torch.no_grad():
                features, logits = answers(teacher, (x - mean) / std)
            own = answers_to(student, features, x) if epoch < args.hints else answers(student, x)
            loss = difference(own[0], features) + args.weight * divergence(own[1], logits)
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(student.parameters(), 5.0)
            optimiser.step()
            schedule.step()
            done += 1
            bar.set_postfix(loss=f"{loss.item():.3f}")
            if done % args.every == 0 or done % per_epoch == 0:
                parts = dict(student=student, optimiser=optimiser, schedule=schedule)
                with atomic_path(state) as path:
                    torch.save({name: part.state_dict() for name, part in parts.items()} | dict(done=done), path)
        top1 = accuracy(student, args.test, args.class_map)
        print(f"epoch {epoch}: loss {loss.item():.4f}, top 1 {top1:.1f} %", flush=True)
        with (args.out / "log.csv").open("a", newline="") as file:
            csv.writer(file).writerow([epoch, args.b, f"{loss.item():.4f}", f"{top1:.2f}"])


def main() -> None:
    """Teach, and write the weights in half precision."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path, help="of the plain network, from lite0_weights.py")
    parser.add_argument("out", type=Path, help="folder for checkpoint, log and weights")
    parser.add_argument("--photos", nargs="+", required=True, help="tars or folders, whose labels are not looked at")
    parser.add_argument("--test", required=True, help="labelled photos of ImageNet's classes")
    parser.add_argument("--class-map", default="", help="of --test")
    parser.add_argument("--start", type=Path, help="weights of another run's student to start from")
    parser.add_argument("--b", type=float, default=1.25)
    parser.add_argument("--antialias", action="store_true")
    parser.add_argument("--size", type=int, default=192)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--hints", type=int, default=3, help="epochs of hints alone")
    parser.add_argument("--epochs", type=int, default=9, help="epochs of the whole network")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--weight", type=float, default=1.0, help="of the logits' divergence")
    parser.add_argument("--every", type=int, default=50, help="steps between checkpoints")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    remember_settings(args.out, {name: value for name, value in vars(args).items() if name not in ("out", "every")})
    overlay = dict(file=str(args.weights))
    teacher, plain = (timm.create_model(ARCH, pretrained=True, pretrained_cfg_overlay=overlay).eval() for _ in range(2))
    config = BcosConfig.finetune(b=args.b, antialias=args.antialias, probability="softmax")
    student = bcosify(plain, config).train()
    if args.start is not None:
        student.load_state_dict(torch.load(args.start, weights_only=True)["student"])
    teach(student, teacher, Photos(args.photos, args.size), args)
    with atomic_path(args.out / "student.safetensors") as path:
        save_file({name: value.half() for name, value in student.state_dict().items()}, path)


if __name__ == "__main__":
    main()
