"""Write the table of docs/model-zoo.md from the registry: name, tag, parameters, published top-1, evaluation size."""

import argparse

from markdown_blocks import DOCS, markdown_table, replace_block

from timm_bcos.models.loading import Listed, list_bcos_models

PAGE = DOCS / "model-zoo.md"
NAME = "models"
HEADER = ["name", "weights", "parameters (M)", "top-1 (%)", "input"]


def row(network: Listed) -> list[str]:
    tag = f"`.{network.tag}`" if network.tag else ""
    size = f"{network.resize} → {network.size}" if network.resize else str(network.size)
    return [f"`{network.name}`", tag, f"{network.parameters:.1f}", str(network.top1 or ""), size]


def table() -> str:
    return markdown_table(HEADER, [row(network) for network in list_bcos_models()], numeric_from=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"replace the table in {PAGE.name}")
    if parser.parse_args().write:
        replace_block(PAGE, NAME, table())
    else:
        print(table())


if __name__ == "__main__":
    main()
