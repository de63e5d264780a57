"""Lay out the clothes for timm's train.py with a validation split by people who have no photo in the training split.

    python scripts/split_by_contributor.py data/clothing clothing

The source's own validation shares most of its contributors with train, so that settings chosen on it are chosen for
known floors and cameras. Here the photos of train and validation are pooled and dealt out person by person; test stays.
"""

import argparse
import csv
import random
import tarfile
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

SPLITS = ("train", "validation", "test")
Row = dict[str, str]


def choose_people(rows: Sequence[Row], share: float, seed: int) -> set[str]:
    """Contributors for validation: drawn at random, as long as their photos are no more than a share of all.

    Args:
        rows: A photo each, with its contributor.
        share: Of the photos.
        seed: Of the draw.
    """
    counts: dict[str, int] = {}
    for row in rows:
        counts[row["contributor"]] = counts.get(row["contributor"], 0) + 1
    people = sorted(counts)
    random.Random(seed).shuffle(people)
    chosen, left = set(), round(share * len(rows))
    for person in people:
        if counts[person] <= left:
            chosen.add(person)
            left -= counts[person]
    return chosen


def lay_out(source: Path, target: Path, share: float, seed: int) -> dict[str, int]:
    """Unpack the photos into `target/split/class/file`; how many each split has."""
    with (source / "contributors.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    known = [row for row in rows if row["split"] != "test"]
    people = choose_people(known, share, seed)
    places = {
        (row["split"], row["file"]): "test" if row["split"] == "test" else
        "validation" if row["contributor"] in people else "train"
        for row in rows
    }  # fmt: skip
    counts = dict.fromkeys(SPLITS, 0)
    with TemporaryDirectory(dir=target.resolve().parent) as unfinished:
        for split in SPLITS:
            with tarfile.open(source / f"{split}.tar") as tar:
                for member in tar.getmembers():
                    place = places[split, member.name]
                    tar.extract(member, Path(unfinished) / "out" / place, filter="data")
                    counts[place] += 1
        (Path(unfinished) / "out").rename(target)
    return counts


def main() -> None:
    """Lay out the photos and print how many there are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder of train.tar, validation.tar, test.tar and contributors.csv")
    parser.add_argument("target", type=Path, help="folder to make")
    parser.add_argument("--share", type=float, default=0.12, help="of the photos, for validation")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.target.exists():
        raise SystemExit(f"{args.target} is there already: name a new folder")
    print(", ".join(f"{split} {count}" for split, count in lay_out(**vars(args)).items()))


if __name__ == "__main__":
    main()
