"""What a model sees in the photos of each contributor, and what misleads it: their floor, or the clothes?

    python scripts/experiments/contributor_shift.py data/clothing/test.tar contributors.csv shift \
        before=runs/clothes/gate-0/model_best.pth.tar after=bcos_efficientnet_lite0.clothing

Contributions of pixels sum up to the logits, so that one may count those of a photo's margin, which is floor, wall or
bed in most photos: how much of what speaks for the right class lies there, and how much of what speaks for a wrong
class against the right one. Beside it stands what the model says of the floor alone (the corners, mirrored to a whole
image), and of the same photos framed otherwise. Writes photos.csv, a row per photo and model, contributors.csv, and
turned.png: photos that the first model misreads and the last does not.
"""

import argparse
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import timm
import torch
from inputs import data_parser, find_models, load_data
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from timm_bcos import contrast, explain
from timm_bcos.cli.exceptions import exit_status
from timm_bcos.data.datasets import LabeledImages
from timm_bcos.evaluation.comparison import contributors
from timm_bcos.evaluation.paired import bootstrap_interval
from timm_bcos.explanation.visualization import Bars, Row, draw_rows, overlay, save_figure
from timm_bcos.files import write_csv
from timm_bcos.models.class_names import class_names

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARGIN, CORNER, SMALL = 1 / 8, 1 / 4, 0.8  # of a photo's side: margin, corners taken for floor, the photo made smaller
SMOOTH = 9  # window in pixels, of the maps that are drawn
Frame = Callable[[Image.Image], Tensor]


@dataclass(frozen=True)
class Sight:
    """What a model sees in a photo.

    Attributes:
        network: Name of the model.
        photo: The file.
        contributor: Who has sent it.
        label: The class.
        cropped: What the model says of the photo as it crops photos itself.
        whole: What it says of it with all of its margin.
        small: What it says of it at 0.8 of its size, with the outermost pixels around it.
        floor: What it says of the corners alone.
        margin: Share of the margin in what speaks for the label (0 to 1; photo with all of its margin).
        against: What speaks for the class that it says against the label: the difference of the logits.
        against_margin: The margin's part of it, a sum of signed contributions.
    """

    network: str
    photo: str
    contributor: str
    label: int
    cropped: int
    whole: int
    small: int
    floor: int
    margin: float
    against: float
    against_margin: float


def frames(model: nn.Module) -> dict[str, Frame]:
    """From a photo to the image (C, H, W) in [0, 1], in each framing."""
    config = timm.data.resolve_model_data_config(model) | dict(mean=(0.0,) * 3, std=(1.0,) * 3, is_training=False)
    cropped: Frame = timm.data.create_transform(**config)
    whole: Frame = timm.data.create_transform(**config | dict(crop_pct=1.0))
    return {
        "cropped": cropped,
        "whole": whole,
        "small": lambda photo: smaller(whole(photo)),
        "floor": lambda photo: floor(whole(photo)),
    }


def smaller(image: Tensor) -> Tensor:
    """An image (C, H, W) at 0.8 of its size, its outermost pixels repeated around it."""
    side = image.shape[-1]
    inner = round(SMALL * side)
    before = (side - inner) // 2
    after = side - inner - before
    shrunk = F.interpolate(image[None], size=(inner, inner), mode="bilinear", antialias=True)
    return F.pad(shrunk, (before, after, before, after), mode="replicate")[0]


def floor(image: Tensor) -> Tensor:
    """The four corners of an image (C, S, S), mirrored until they fill as large a one."""
    size = round(CORNER * image.shape[-1])
    corners = [image[:, rows, columns] for rows in _ends(size) for columns in _ends(size)]
    middle = torch.cat([torch.cat(corners[:2], 2), torch.cat(corners[2:], 2)], 1)
    wide = torch.cat([middle, middle.flip(2)], 2)
    return torch.cat([wide, wide.flip(1)], 1)


def _ends(size: int) -> tuple[slice, slice]:
    return slice(None, size), slice(-size, None)


def in_margin(maps: Tensor) -> Tensor:
    """The sum (N,) of maps (N, H, W) within an eighth of the side from an edge."""
    edge = round(MARGIN * maps.shape[-1])
    return maps.sum((1, 2)) - maps[:, edge:-edge, edge:-edge].sum((1, 2))


def looks(
    name: str, model: nn.Module, dataset: LabeledImages, files: Sequence[str], people: Sequence[str]
) -> Iterator[Sight]:
    """A model's sight of each photo."""
    views = frames(model)
    for i in tqdm(range(len(dataset)), name, disable=None):
        photo, label = dataset[i]
        images = {frame: view(photo.convert("RGB")) for frame, view in views.items()}
        with torch.no_grad():
            said = dict(zip(images, model(torch.stack(list(images.values()))).argmax(1).tolist(), strict=True))
        whole = images["whole"][None]
        speaks = explain(model, whole, int(label)).contribution_map.clamp(min=0)
        share = float(in_margin(speaks) / speaks.sum())
        against = torch.zeros_like(speaks)
        if said["whole"] != label:
            against = contrast(model, whole, said["whole"], int(label)).contribution_map
        parts = float(against.sum()), float(in_margin(against))
        yield Sight(
            name, files[i], people[i], int(label), **said, margin=share, against=parts[0], against_margin=parts[1]
        )


def summary(sights: Sequence[Sight]) -> Iterator[dict[str, object]]:
    """A row for each model and contributor, and for all: accuracies in percent, shares with 95 % intervals."""
    for network in dict.fromkeys(sight.network for sight in sights):
        own = [sight for sight in sights if sight.network == network]
        people = [person for person, _ in Counter(sight.contributor for sight in own).most_common()]
        for person in [*people, "all"]:
            theirs = [sight for sight in own if person in (sight.contributor, "all")]
            yield {"network": network, "contributor": person} | _counts(theirs)


def _counts(sights: Sequence[Sight]) -> dict[str, object]:
    right = {
        frame: f"{100 * np.mean([getattr(s, frame) == s.label for s in sights]):.1f}"
        for frame in ("cropped", "whole", "small", "floor")
    }
    low, high = bootstrap_interval(np.array([s.margin for s in sights]))
    wrong = [s for s in sights if s.whole != s.label]
    blamed = sum(s.against_margin for s in wrong) / sum(s.against for s in wrong) if wrong else None
    return {
        "photos": len(sights),
        **right,
        "margin": f"{np.mean([s.margin for s in sights]):.2f}",
        "margin_low": f"{low:.2f}",
        "margin_high": f"{high:.2f}",
        "wrong": len(wrong),
        "against_margin": "" if blamed is None else f"{blamed:.2f}",
    }


def turned(sights: Sequence[Sight], count: int) -> list[Sight]:
    """Photos that the first model misreads and the last does not: a contributor's clearest error each, then the next.

    Args:
        sights: Of all models.
        count: At most.
    """
    first, last = sights[0].network, sights[-1].network
    right = {sight.photo for sight in sights if sight.network == last and sight.whole == sight.label}
    found = [s for s in sights if s.network == first and s.whole != s.label and s.photo in right]
    ranked = sorted(found, key=lambda sight: -sight.against)
    turn = {s.photo: sum(o.contributor == s.contributor for o in ranked[:i]) for i, s in enumerate(ranked)}
    return sorted(ranked, key=lambda sight: turn[sight.photo])[:count]


def draw(models: Mapping[str, nn.Module], photos: Mapping[str, Image.Image], chosen: Sequence[Sight]) -> "Figure":
    """Photos, and by each model what speaks for the class that the first one says (red) against the label (blue).

    Args:
        models: By name; the last one names the classes.
        photos: By file.
        chosen: A row each.
    """
    return draw_rows([_row_of(models, photos[sight.photo], sight) for sight in chosen])


def _row_of(models: Mapping[str, nn.Module], photo: Image.Image, sight: Sight) -> Row:
    names = class_names(list(models.values())[-1])
    said, meant = names[sight.whole], names[sight.label]
    pictures, bars = [], {}
    for name, model in models.items():
        image = frames(model)["whole"](photo.convert("RGB"))[None]
        pictures = pictures or [(f"{meant}, contributor {sight.contributor}", image[0].movedim(0, -1))]
        difference = contrast(model, image, sight.whole, sight.label)
        smooth = F.avg_pool2d(difference.contribution_map[:, None], SMOOTH, 1, SMOOTH // 2, count_include_pad=False)
        pictures.append((f"{name}: {said} − {meant}, {float(difference.logit):+.1f}", overlay(image, smooth[:, 0])[0]))
        probabilities = difference.probability[0].tolist()
        bars |= {f"{name}: {names[c]}": probabilities[c] for c in (sight.whole, sight.label)}
    return Row(pictures, Bars("probabilities", list(bars), list(bars.values()), limit=1))


def run(args: argparse.Namespace) -> None:
    models = find_models(args.networks)
    dataset: Any = load_data(args)
    files = [dataset.filename(i) for i in range(len(dataset))]
    people = contributors(args.contributors, files)
    found = [sight for name, model in models.items() for sight in looks(name, model, dataset, files, people)]
    args.out.mkdir(parents=True, exist_ok=True)
    write_csv(args.out / "photos.csv", [field.name for field in fields(Sight)], map(astuple, found))
    rows = list(summary(found))
    write_csv(args.out / "contributors.csv", list(rows[0]), [list(row.values()) for row in rows])
    chosen = turned(found, args.show)
    if chosen:
        photos = {sight.photo: dataset[files.index(sight.photo)][0] for sight in chosen}
        save_figure(draw(models, photos, chosen), args.out / "turned.png")
    print((args.out / "contributors.csv").read_text())


def main() -> None:
    parser = data_parser(__doc__)
    parser.add_argument("contributors", type=Path, help="CSV file with the columns file and contributor")
    parser.add_argument("out", type=Path, help="folder for the tables")
    parser.add_argument("networks", nargs="+", help="NAME=CHECKPOINT of train.py, or NAME=MODEL with published weights")
    parser.add_argument("--show", type=int, default=4, help="photos in the picture, at most")
    raise SystemExit(exit_status(partial(run, parser.parse_args())))


if __name__ == "__main__":
    main()
