"""Write the table of docs/model-zoo.md from the registry: name, tag, parameters, published top-1, evaluation size."""

import argparse

import timm
from markdown_blocks import DOCS, markdown_table, replace_block

from timm_bcos.models.networks import NETWORKS
from timm_bcos.weights.catalogue import PUBLISHED
from timm_bcos.weights.embedded import EMBEDDED

PAGE = DOCS / "model-zoo.md"
NAME = "models"
HEADER = ["name", "weights", "parameters (M)", "top-1 (%)", "input"]


def rows(name: str) -> list[list[str]]:
    """One row per published weight file, or one for a network without."""
    model = timm.create_model(name, device="meta")
    parameters = f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}"
    height = model.pretrained_cfg["input_size"][-1]
    if name not in PUBLISHED:
        own = [f"`.{tag}`" for known, _, tag in (tagged.partition(".") for tagged in EMBEDDED) if known == name]
        return [[f"`{name}`", tag, parameters, "", str(height)] for tag in own or [""]]
    return [
        [f"`{name}`", f"`.{file.tag}`", parameters, str(file.top1 or ""), f"{file.resize} → {height}"]
        for file in PUBLISHED[name]
    ]


def table() -> str:
    return markdown_table(HEADER, [row for name in NETWORKS for row in rows(name)], numeric_from=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"replace the table in {PAGE.name}")
    if parser.parse_args().write:
        replace_block(PAGE, NAME, table())
    else:
        print(table())


if __name__ == "__main__":
    main()
