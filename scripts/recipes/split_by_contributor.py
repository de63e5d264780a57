"""Lay out the clothes for timm's train.py with a validation split by people who have no photo in the training split.

    python scripts/recipes/split_by_contributor.py data/clothing clothing

The source's own validation shares most of its contributors with train, so that settings chosen on it are chosen for
known floors and cameras. Here the photos of train and validation are pooled and dealt out person by person; test stays.
Of the photos of extra.tar, where there is one, those of nobody in validation or test go into `unlabeled`.
"""

import argparse
import csv
import random
import tarfile
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from timm_bcos import InputError
from timm_bcos.cli.exceptions import exit_status

Row = dict[str, str]
# files with a row for each photo, and what those rows do not say
LISTS: dict[str, Row] = {"contributors.csv": {}, "extra.csv": {"split": "extra"}}


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


def read_rows(source: Path) -> list[Row]:
    """A row for each photo: 'file', 'split' (the tar that it is in) and 'contributor'."""
    rows: list[Row] = []
    for name, missing in LISTS.items():
        if (source / name).exists():
            with (source / name).open(newline="") as file:
                rows += [row | missing for row in csv.DictReader(file)]
    return rows


def choose_places(rows: Sequence[Row], share: float, seed: int) -> dict[tuple[str, str], str]:
    """Where each photo goes, by its tar and file; empty for nowhere."""
    people = choose_people([row for row in rows if row["split"] not in ("test", "extra")], share, seed)
    tested = {row["contributor"] for row in rows if row["split"] == "test"}
    places = {}
    for row in rows:
        split, person = row["split"], row["contributor"]
        if split == "test":
            place = "test"
        elif split == "extra":
            place = "" if person in people | tested else "unlabeled"
        else:
            place = "validation" if person in people else "train"
        places[split, row["file"]] = place
    return places


def lay_out(source: Path, target: Path, share: float, seed: int) -> dict[str, int]:
    """Unpack the photos into `target/split/class/file`; how many each split has.

    Raises:
        InputError: For a photo of which no list says who sent it.
    """
    places = choose_places(read_rows(source), share, seed)
    with TemporaryDirectory(dir=target.resolve().parent) as unfinished:
        for split in dict.fromkeys(split for split, _ in places):
            with tarfile.open(source / f"{split}.tar") as tar:
                for member in tar.getmembers():
                    place = places.get((split, member.name))
                    if place is None:
                        raise InputError(
                            f"no list in {source} says who sent {member.name} of {split}.tar: add it there"
                        )
                    if place:
                        tar.extract(member, Path(unfinished) / "out" / place, filter="data")
        (Path(unfinished) / "out").rename(target)
    return dict(Counter(filter(None, places.values())))


def run(args: argparse.Namespace) -> None:
    if args.target.exists():
        raise InputError(f"{args.target} is there already: name a new folder")
    if not (args.source / "contributors.csv").exists():
        raise InputError(f"no contributors.csv in {args.source}: name the folder that has it beside the tars")
    print(", ".join(f"{split} {count}" for split, count in lay_out(**vars(args)).items()))


def main() -> None:
    """Lay out the photos and print how many there are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder of train.tar, validation.tar, test.tar and contributors.csv")
    parser.add_argument("target", type=Path, help="folder to make")
    parser.add_argument("--share", type=float, default=0.12, help="of the photos, for validation")
    parser.add_argument("--seed", type=int, default=0)
    raise SystemExit(exit_status(partial(run, parser.parse_args())))


if __name__ == "__main__":
    main()
