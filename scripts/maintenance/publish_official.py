"""Publish the weights that the papers' authors released on the Hugging Face Hub; for maintainers.

    python scripts/maintenance/publish_official.py ORG                             # every published checkpoint; resumes
    python scripts/maintenance/publish_official.py ORG bcosv2_resnet50.mpi_in1k

It downloads each release file, verifies its hash, converts it, publishes it as ORG/NAME.TAG and notes the address in
`timm_bcos/weights/hub.json`, from where on `pretrained=True` prefers it.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import timm
import typer
from tqdm import tqdm

import timm_bcos
from timm_bcos import BcosError, Card, Evaluation, InputError
from timm_bcos.cli.exceptions import exit_status
from timm_bcos.files import atomic_path
from timm_bcos.weights.catalog import HUB_FILE, PUBLISHED, Published, hub_addresses

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def publish_official(
    organization: Annotated[str, typer.Argument(metavar="ORG")],
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME.TAG]...", help="Only these.")] = None,
    photo: Annotated[list[Path] | None, typer.Option(help="Shown explained on the cards; repeat for several.")] = None,
    private: Annotated[bool, typer.Option("--private")] = False,
) -> None:
    """Publish what the papers' authors released and hub.json does not list yet; ends with the number of failures.

    Example: python scripts/maintenance/publish_official.py ORG bcosv2_resnet50.mpi_in1k
    """
    failures = 0
    for tagged, weights in tqdm(official(names or ()).items(), "weights", disable=None):
        if tagged in hub_addresses():
            continue
        address = f"{organization}/{tagged}"
        try:
            model = timm.create_model(tagged, pretrained=True).eval()
            timm_bcos.publish(model, address, official_card(weights, photo or ()), private=private)
        except BcosError as error:
            failures += 1
            tqdm.write(f"{tagged}: {error}")
            continue
        note_address(tagged, address)
    raise typer.Exit(failures)


def official(only: Sequence[str]) -> dict[str, Published]:
    """The released weights by name and tag."""
    known = {f"{name}.{weights.tag}": weights for name, published in PUBLISHED.items() for weights in published}
    unknown = [name for name in only if name not in known]
    if unknown:
        raise InputError(f"no official weights called {unknown[0]}; there are {', '.join(sorted(known))}")
    return {name: known[name] for name in only or known}


def official_card(weights: Published, photos: Sequence[Path]) -> Card:
    origin = weights.url if isinstance(weights.url, str) else weights.url[0]
    evaluation = None
    if weights.top1 is not None:
        evaluation = Evaluation(weights.top1, "ImageNet-1k, validation split, as its authors published")
    dataset = "cifar10" if weights.tag.endswith("cifar10") else "imagenet-1k"
    description = f"Converted from the authors' release, {origin}."
    return Card(description, evaluation, "other", weights.notes, photos, datasets=[dataset])


def note_address(tagged: str, address: str) -> None:
    with atomic_path(HUB_FILE) as path:
        path.write_text(json.dumps({**hub_addresses(), tagged: address}, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    raise SystemExit(exit_status(app))
