"""What the scripts that look at a network and a data set ask for on the command line."""

import argparse
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm

from ..errors import BcosError, InputError
from ..files import atomic_path, first_line, sha256
from ..models.loading import load_model, load_plain_model
from ..weights.embedded import DEFAULT_NETWORK
from .devices import find_device

__all__ = ["add_arguments", "load_network_and_data", "parse_and_run", "remember_settings"]

SETTINGS = ("model", "checkpoint", "plain", "dataset", "data_dir", "split", "class_map")
CONTENTS = ("checkpoint", "data_dir", "class_map")  # what may change under the same name

# what folders of splits are called; timm takes each for the others of its line, and none for all images
SPLITS = (("train", "training"), ("validation", "val", "valid", "eval", "evaluation"), ("test", "testing"))
DEFAULT_SPLIT = "validation"


def add_arguments(parser: argparse.ArgumentParser, *, plain: bool = True, classes: bool = False) -> None:
    """Add the options of `load_network_and_data`.

    Args:
        parser: Of the script.
        plain: Offer plain timm models.
        classes: Offer class names.
    """
    parser.add_argument(
        "--model", help=f"timm's name; not needed for a checkpoint of train.py; {DEFAULT_NETWORK} by default"
    )
    parser.add_argument("--checkpoint", type=Path)
    if plain:
        parser.add_argument("--plain", action="store_true", help="a plain timm model as it is, not converted")
    parser.add_argument("--dataset", default="", help="kind of data set, as in timm's scripts")
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--split", default=DEFAULT_SPLIT)
    parser.add_argument("--class-map", default="")
    if classes:
        parser.add_argument("--classes", type=Path, help="class names: a file, or a directory of directories")
    parser.add_argument("--device", default="cpu")


def load_network_and_data(args: argparse.Namespace) -> tuple[Any, Any]:
    """The network, in eval mode on its device, and the data set, as timm makes it.

    Raises:
        BcosError: For a network, checkpoint or weights that cannot be had.
        InputError: For a data set that cannot be had, or whose classes are not the network's.
    """
    load = load_plain_model if getattr(args, "plain", False) else load_model
    device = find_device(args.device)
    model = load(args.model, args.checkpoint).eval().to(device)
    return model, _load_data(args, model.num_classes)


def _load_data(args: argparse.Namespace, num_classes: int) -> Any:
    place = f"{args.data_dir}, split {args.split!r}"
    if args.dataset.partition("/")[0] in ("", "folder", "torch") and os.path.isdir(args.data_dir):
        _refuse_missing_split(Path(args.data_dir), args.split)
    try:
        dataset = timm.data.create_dataset(args.dataset, root=args.data_dir, split=args.split, class_map=args.class_map)
    except (AssertionError, ImportError, OSError, RuntimeError, ValueError) as error:  # as timm's readers differ
        raise InputError(f"no data set at {place}: {str(error) or 'there is nothing'}") from error
    readers = (dataset, getattr(dataset, "reader", None))  # torchvision's data sets have none
    names = ("class_to_idx", "class_name_to_idx")  # folders', tars'
    found = [getattr(reader, name) for reader in readers for name in names if getattr(reader, name, None)]
    count = len(set(found[0].values())) if found else num_classes
    if count != num_classes:
        raise InputError(
            f"{place} has images of {count} classes, the model {num_classes}: labels come from a folder per class, or "
            f"from folders and --class-map, which lists the names of all classes"
        )
    return dataset


def _refuse_missing_split(root: Path, split: str) -> None:
    """Where there is no folder for a split, timm takes all images; that is meant where no folder is called so."""
    name = split.partition("[")[0]
    accepted = next((synonyms for synonyms in SPLITS[:2] if name in synonyms), (name,))
    found = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
    has_splits = any(folder in synonyms for synonyms in SPLITS for folder in found)
    if name and found and not set(accepted) & set(found) and (has_splits or name != DEFAULT_SPLIT):
        raise InputError(f"{root} has no folder for split {split!r}, but {', '.join(found[:9])}: see --split")


def remember_settings(args: argparse.Namespace, folder: Path, *names: str) -> None:
    """Note in `folder/settings.json` what its results depend on, so that no run resumes results of other settings.

    That is the contents of files too: of the checkpoint, and which files of which sizes the data set has.

    Args:
        args: Of a script with `add_arguments`.
        folder: Made if need be.
        names: The script's own arguments that matter.

    Raises:
        InputError: If the folder holds results of other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings = {name: _as_text(getattr(args, name)) for name in (*SETTINGS, *names) if hasattr(args, name)}
    paths = {name: Path(given) for name in CONTENTS if (given := getattr(args, name, None))}
    settings |= {f"contents of {name}": fingerprint(path, folder) for name, path in paths.items() if path.exists()}
    path = folder / "settings.json"
    if not path.exists() or list(folder.iterdir()) == [path]:  # no results yet
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(settings, indent=1) + "\n")
    stored = _read_settings(path)
    changed = [name for name in settings if stored.get(name) != settings[name]]
    if changed:
        raise InputError(
            f"{folder} holds results for {changed[0]}={stored.get(changed[0], 'unknown')}, not {settings[changed[0]]}: "
            f"choose another folder with --out"
        )


def fingerprint(path: Path, without: Path | None = None) -> str:
    """What tells a file from another one, or a folder: the names and sizes of all files in it.

    Args:
        path: A file or folder.
        without: A folder that does not count.
    """
    if path.is_file():
        return sha256(path)
    digest = hashlib.sha256()
    results = without and without.resolve()
    for file in sorted(p for p in path.rglob("*") if p.is_file() and results not in p.resolve().parents):
        digest.update(os.fsencode(f"{file.relative_to(path)}\0{file.stat().st_size}\0"))
    return digest.hexdigest()


def _read_settings(path: Path) -> dict[str, str]:
    try:
        stored = json.loads(path.read_text())
        if isinstance(stored, dict):
            return stored
        reason = "no mapping"
    except (OSError, ValueError) as error:
        reason = first_line(error)
    raise InputError(f"{path} is damaged ({reason}): choose another folder with --out, or remove this one")


def _as_text(value: Any) -> str:
    """Paths as they are found from anywhere."""
    is_path = isinstance(value, Path) or (isinstance(value, str) and value and Path(value).exists())
    return str(Path(value).resolve() if is_path else value)


def parse_and_run(
    parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], None], given: Sequence[str] | None = None
) -> None:
    """Run a script; errors that we raise on purpose are one line, without a traceback.

    Args:
        parser: Of the script.
        run: It.
        given: Its command line; by default all of it.
    """
    args = parser.parse_args(given)
    try:
        run(args)
    except BcosError as error:
        raise SystemExit(str(error)) from error
