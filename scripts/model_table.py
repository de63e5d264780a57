"""Write the README's table of models from the registry: name, tag, parameters, published top-1, evaluation size."""

import argparse
from pathlib import Path

import timm

from timm_bcos.models.networks import NETWORKS
from timm_bcos.weights.catalogue import PUBLISHED
from timm_bcos.weights.embedded import EMBEDDED

README = Path(__file__).parent.parent / "README.md"
START, END = "<!-- models: python scripts/model_table.py --write -->\n", "<!-- end of models -->"
HEADER = "| name | weights | parameters (M) | top-1 (%) | input |\n| --- | --- | ---: | ---: | --- |\n"


def rows(name: str) -> list[str]:
    """One row per published weight file, or one for a network without."""
    model = timm.create_model(name, device="meta")
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    height = model.pretrained_cfg["input_size"][-1]
    if name not in PUBLISHED:
        own = [f"`.{tag}`" for known, _, tag in (tagged.partition(".") for tagged in EMBEDDED) if known == name]
        return [f"| `{name}` | {tag} | {parameters:.1f} | | {height} |" for tag in own or [""]]
    return [
        f"| `{name}` | `.{weights.tag}` | {parameters:.1f} | {weights.top1 or ''} | {weights.resize} → {height} |"
        for weights in PUBLISHED[name]
    ]


def table() -> str:
    return HEADER + "\n".join(row for name in NETWORKS for row in rows(name)) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="replace the table in the README")
    if not parser.parse_args().write:
        print(table())
        return
    before, rest = README.read_text().split(START)
    README.write_text(before + START + table() + END + rest.split(END)[1])


if __name__ == "__main__":
    main()
