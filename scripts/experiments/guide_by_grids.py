"""Guidance by boxes, measured: the clothes model learns, on grids of training photos, to explain a class by its cell.

    python scripts/experiments/guide_by_grids.py data/clothing guided

Each step takes photos of their own, which are classified, and grids of 2 × 2 photos, in which a class's positive
contributions are to lie in its cell (`energy_loss`). Norms keep their statistics. Then both models are compared on
test photos: accuracy, and the pointing game on the same grids. A run that was interrupted resumes.
"""

import argparse
import random
from pathlib import Path

import timm
import torch
from compare_localization import compare
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data.transforms_factory import create_transform
from torch import Tensor, nn
from tqdm import tqdm

from timm_bcos import dynamic_weights, energy_loss, explain
from timm_bcos.data.datasets import LabeledImages, load_dataset
from timm_bcos.evaluation.pointing_game import Grid, compose
from timm_bcos.explanation.visualization import on_white
from timm_bcos.files import atomic_path

SIZE, PHOTOS, GRIDS = 160, 16, 4  # of photos in pixels; photos and grids of a step
EVERY = 50  # steps between checkpoints


class Batches:
    """What step k trains on, the same in every run.

    Args:
        dataset: Labeled photos.
    """

    def __init__(self, dataset: LabeledImages) -> None:
        self.dataset = dataset
        cfg = dict(scale=(0.35, 1), mean=(0.0,) * 3, std=(1.0,) * 3)
        self.transform = create_transform((3, SIZE, SIZE), is_training=True, **cfg)
        labels = [int(dataset[i][1]) for i in tqdm(range(len(dataset)), "labels", disable=None)]
        self.by_class = {c: [i for i, label in enumerate(labels) if label == c] for c in sorted(set(labels))}

    def photos(self, rng: random.Random) -> tuple[Tensor, Tensor]:
        """(N, 3, S, S) and their (N,) classes."""
        classes = [rng.choice(list(self.by_class)) for _ in range(PHOTOS)]
        return torch.stack([self._photo(c, rng) for c in classes]), torch.tensor(classes)

    def grids(self, rng: random.Random) -> tuple[Tensor, Tensor, Tensor]:
        """(N, 3, 2S, 2S), a class (N,) of each, and masks (N, 2S, 2S) of its cell."""
        images, masks, targets = torch.zeros(GRIDS, 3, 2 * SIZE, 2 * SIZE), torch.zeros(GRIDS, 2 * SIZE, 2 * SIZE), []
        for image, mask in zip(images, masks, strict=True):
            classes, wanted = rng.sample(list(self.by_class), 4), rng.randrange(4)
            for cell, label in enumerate(classes):
                rows, columns = (slice(k * SIZE, (k + 1) * SIZE) for k in divmod(cell, 2))
                image[:, rows, columns] = self._photo(label, rng)
                mask[rows, columns] = float(cell == wanted)
            targets.append(classes[wanted])
        return images, torch.tensor(targets), masks

    def _photo(self, label: int, rng: random.Random) -> Tensor:
        found: Tensor = self.transform(self.dataset[rng.choice(self.by_class[label])][0].convert("RGB"))
        return found


def train(model: nn.Module, batches: Batches, folder: Path, steps: int, rate: float, weight: float) -> None:
    """Fine-tune in evaluation mode, from the last checkpoint on."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, 1e-6)
    state, done = folder / "state.pt", 0
    if state.exists():
        saved = torch.load(state, weights_only=True)
        done = saved["done"]
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
    bar = tqdm(range(done, steps), "guiding", disable=None, initial=done, total=steps)
    for step in bar:
        torch.manual_seed(step)  # timm's transforms draw from both generators
        random.seed(step)
        rng = random.Random(step)
        images, labels = batches.photos(rng)
        smooth = nn.functional.one_hot(labels, 10) * 0.9 + 0.01
        task = nn.functional.binary_cross_entropy_with_logits(model(images), smooth)
        grids, targets, masks = batches.grids(rng)
        guidance = energy_loss(dynamic_weights(model, grids, targets).contribution_map, masks)
        optimizer.zero_grad()
        (task + weight * guidance).backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 10 == 0:
            tqdm.write(f"step {step + 1}: classification {task.item():.4f}, outside the cell {guidance.item():.4f}")
        if (step + 1) % EVERY == 0 or step + 1 == steps:
            states = dict(model=model.state_dict(), optimizer=optimizer.state_dict(), schedule=schedule.state_dict())
            with atomic_path(state) as path:
                torch.save(states | dict(done=step + 1), path)


def draw(models: dict[str, nn.Module], dataset: LabeledImages, grid: Grid, path: Path) -> None:
    """A grid, and each model's explanation of the class of its first cell."""
    image = compose(next(iter(models.values())), dataset, grid)
    pictures = [on_white(explain(model, image, grid.classes[0]).to_rgba())[0] for model in models.values()]
    row = torch.cat([image[0].movedim(0, -1), *pictures], 1)
    with atomic_path(path) as temporary:
        Image.fromarray((255 * row.clamp(0, 1)).round().byte().numpy()).save(temporary)


def main() -> None:
    """Train, write the weights, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with train.tar and test.tar, or the splits' folders")
    parser.add_argument("out", type=Path, help="folder for checkpoints, weights and picture")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rate", type=float, default=2e-4, help="learning rate")
    parser.add_argument("--weight", type=float, default=0.5, help="of the loss on explanations")
    parser.add_argument("--grids", type=int, default=40, help="of the comparison")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    def photos(split: str) -> LabeledImages:
        tar = args.data / f"{split}.tar"
        return load_dataset(str(tar if tar.exists() else args.data), 10, split=split)

    before, after = (timm.create_model("bcos_efficientnet_lite0.clothing", pretrained=True).eval() for _ in range(2))
    weights = args.out / "guided.safetensors"
    if not weights.exists():
        train(after, Batches(photos("train")), args.out, args.steps, args.rate, args.weight)
        with atomic_path(weights) as path:
            save_file(after.state_dict(), path)
    after.load_state_dict(load_file(weights))
    models, dataset = dict(before=before, after=after), photos("test")
    draw(models, dataset, compare(models, dataset, args.grids)[0], args.out / "guidance.webp")


if __name__ == "__main__":
    main()
