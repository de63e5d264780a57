"""Publish a trained network, or all officially released weights, on the Hugging Face Hub.

    python scripts/publish.py output/train/RUN/model_best.pth.tar ORG/NAME --classes data/clothing/train \
        --photo photo.jpg --accuracy 88.1 --dataset "clothing, test split" --command "..."
    python scripts/publish.py --official ORG              # every published checkpoint; resumes
    python scripts/publish.py --official ORG bcosv2_resnet50.mpi_in1k

`--official` downloads each release file, verifies its hash, converts it, publishes it as ORG/NAME.TAG and notes the
address in `timm_bcos/hub.json`, from where on `pretrained=True` prefers it. `--folder` writes the files of the
repository without publishing them.
"""

import argparse
import json
from pathlib import Path

import timm
import torch
from tqdm import tqdm

import timm_bcos
from timm_bcos import BcosError, Card, Evaluation
from timm_bcos.models.classes import read_class_names
from timm_bcos.models.loading import load_model
from timm_bcos.weights.catalogue import HUB_FILE, PUBLISHED, Published, hub_addresses

TRAINED_ONLY = ("classes", "description", "accuracy", "dataset", "command", "licence", "note", "dtype", "folder")


def publish_trained(args: argparse.Namespace) -> None:
    source, repo_id = args.names
    model = load_model(None, Path(source)).eval() if Path(source).exists() else load_model(source).eval()
    labels = read_class_names(args.classes, model.num_classes) if args.classes else None
    evaluation = Evaluation(args.accuracy, args.dataset, args.command) if args.accuracy is not None else None
    card = Card(args.description, evaluation, args.licence, args.note, args.photo)
    dtype = getattr(torch, args.dtype) if args.dtype else None
    if args.folder:
        timm_bcos.save_repository(model, args.folder, repo_id, card, label_names=labels, dtype=dtype)
        print(f"wrote {args.folder}")
        return
    print(timm_bcos.publish(model, repo_id, card, label_names=labels, dtype=dtype, private=args.private))


def publish_official(args: argparse.Namespace) -> int:
    """Publish what the manifest does not have yet; the number of failures."""
    organisation, *only = args.names
    failures = 0
    for name, weights in tqdm(list(official(only)), "weights", disable=None):
        tagged = f"{name}.{weights.tag}"
        if tagged in hub_addresses():
            continue
        try:
            model = timm.create_model(tagged, pretrained=True).eval()
            address = f"{organisation}/{tagged}"
            timm_bcos.publish(model, address, official_card(weights, args.photo), private=args.private)
        except BcosError as error:
            failures += 1
            tqdm.write(f"{tagged}: {error}")
            continue
        note_address(tagged, address)
    return failures


def official(only: list[str]) -> list[tuple[str, Published]]:
    every = [(name, weights) for name, published in PUBLISHED.items() for weights in published if weights.url]
    known = {f"{name}.{weights.tag}" for name, weights in every}
    unknown = [name for name in only if name not in known]
    if unknown:
        raise SystemExit(f"no official weights called {unknown[0]}; there are {', '.join(sorted(known))}")
    return [(name, weights) for name, weights in every if not only or f"{name}.{weights.tag}" in only]


def official_card(weights: Published, photos: list[str]) -> Card:
    origin = weights.url if isinstance(weights.url, str) else weights.url[0]
    evaluation = None
    if weights.top1 is not None:
        evaluation = Evaluation(weights.top1, "ImageNet-1k, validation split, as its authors published")
    return Card(f"Converted from the authors' release, {origin}.", evaluation, "other", weights.notes, photos)


def note_address(tagged: str, address: str) -> None:
    with timm_bcos.files.atomic_path(HUB_FILE) as path:
        path.write_text(json.dumps({**hub_addresses(), tagged: address}, indent=1, sort_keys=True) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", help="CHECKPOINT_OR_MODEL ORG/NAME, or with --official: ORG [NAME.TAG ...]")
    parser.add_argument("--official", action="store_true", help="the weights that the papers' authors released")
    parser.add_argument("--classes", type=Path, help="class names: a file, or a directory of a directory per class")
    parser.add_argument("--photo", action="append", default=[], help="shown explained on the card; repeat for several")
    parser.add_argument("--description", default="")
    parser.add_argument("--accuracy", type=float, help="top-1, in per cent")
    parser.add_argument("--dataset", default="", help="what the accuracy was measured on")
    parser.add_argument("--command", default="", help="what measured it")
    parser.add_argument("--licence", default="apache-2.0")
    parser.add_argument("--note", action="append", default=[], help="further terms; repeat for several")
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), help="of the stored weights")
    parser.add_argument("--private", action="store_true")
    parser.add_argument("--folder", help="write the repository's files here instead")
    args = parser.parse_args()
    if args.official:
        unused = [name for name in TRAINED_ONLY if getattr(args, name) != parser.get_default(name)]
        if unused:
            parser.error(f"--{unused[0]} does not go with --official")
        raise SystemExit(publish_official(args))
    if len(args.names) != 2:
        parser.error("give a checkpoint or model, and ORG/NAME")
    try:
        publish_trained(args)
    except BcosError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
