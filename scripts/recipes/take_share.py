"""Take a share of a split's photos, of each class alike, for learning curves: the smaller share is part of the larger.

python scripts/recipes/take_share.py clothes_by_people/train 0.25 0.5  # makes clothes_by_people/train_25 and train_50
"""

import argparse
import random
import shutil
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from timm_bcos import InputError
from timm_bcos.cli.exceptions import exit_status


def choose_photos(folder: Path, share: float, seed: int) -> list[Path]:
    """A share of the photos of each class, at least one.

    Args:
        folder: Has a folder for each class.
        share: In (0, 1].
        seed: Of the draw.
    """
    chosen = []
    for place in sorted(path for path in folder.iterdir() if path.is_dir()):
        photos = sorted(path for path in place.iterdir() if path.is_file())
        random.Random(f"{seed} {place.name}").shuffle(photos)
        chosen += photos[: max(1, round(share * len(photos)))]
    return chosen


def take(folder: Path, share: float, seed: int) -> tuple[Path, int]:
    """Copy a share of the photos into a folder beside theirs; which, and how many it has.

    Raises:
        InputError: If there are none, the share is no share, or its folder is there already.
    """
    if not 0 < share <= 1:
        raise InputError(f"share {share:g}: give one above 0 and at most 1")
    if not folder.is_dir():
        raise InputError(f"no folder {folder}: name a split, which has a folder for each class")
    target = folder.resolve().with_name(f"{folder.resolve().name}_{round(100 * share)}")
    if target.exists():
        raise InputError(f"{target} is there already: remove it to take the share again")
    photos = choose_photos(folder, share, seed)
    if not photos:
        raise InputError(f"no photos in {folder}: name a split, which has a folder for each class")
    with TemporaryDirectory(dir=target.parent) as unfinished:
        for photo in photos:
            place = Path(unfinished) / "out" / photo.parent.name
            place.mkdir(parents=True, exist_ok=True)
            shutil.copy2(photo, place)
        (Path(unfinished) / "out").rename(target)
    return target, len(photos)


def run(args: argparse.Namespace) -> None:
    for share in args.shares:
        print("{}: {} photos".format(*take(args.folder, share, args.seed)))


def main() -> None:
    """Take the shares that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a split, with a folder for each class")
    parser.add_argument("shares", type=float, nargs="+", metavar="SHARE", help="of the photos of each class, in (0, 1]")
    parser.add_argument("--seed", type=int, default=0)
    raise SystemExit(exit_status(partial(run, parser.parse_args())))


if __name__ == "__main__":
    main()
