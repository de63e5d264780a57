"""What the units of a layer look for: their strongest images in a data set, explained, and the classes of these.

    python scripts/neurons.py --checkpoint model_best.pth.tar --layer blocks.4 --data-dir data/clothing --split train

Writes into --out: wall.png (crops of the most active units' strongest images, and their explanations), units.csv
(activation and entropy of every unit), classes.png (the classes of the most one-sided units).
"""

import argparse
import csv
from pathlib import Path

from timm_bcos.cli.arguments import add_arguments, load_network_and_data, parse_and_run
from timm_bcos.explaining.figures import save_figure
from timm_bcos.files import atomic_path
from timm_bcos.judging.neurons import Strongest, find_strongest, label_entropy, plot_label_counts, plot_wall
from timm_bcos.models.classes import class_names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, plain=False, classes=True)
    parser.add_argument("--layer", required=True, help="path of a layer whose output is a map, or tokens")
    parser.add_argument("--units", type=int, default=6, help="on the pictures")
    parser.add_argument("--images", type=int, default=6, help="per unit, on the wall")
    parser.add_argument("--strongest", type=int, default=500, help="images per unit, for the entropy")
    parser.add_argument("--out", type=Path, default=Path("neurons"))
    parse_and_run(parser, run)


def run(args: argparse.Namespace) -> None:
    model, dataset = load_network_and_data(args)
    names = class_names(model, args.classes)
    strongest = find_strongest(model, dataset, args.layer, args.strongest)
    entropy = label_entropy(strongest.labels, len(names))
    write_units(strongest, entropy.tolist(), names, args.out / "units.csv")
    save_figure(
        plot_wall(model, dataset, strongest, strongest.most_active(args.units), args.images), args.out / "wall.png"
    )
    one_sided = strongest.most_one_sided(args.units, len(names))
    if one_sided:
        save_figure(plot_label_counts(strongest, one_sided, names), args.out / "classes.png")
    for unit in one_sided:
        top = names[int(strongest.labels[unit].mode().values)]
        print(f"unit {unit}: entropy {entropy[unit]:.3f} of the uniform distribution's, most often {top}")
    print(f"wrote {args.out}")


def write_units(strongest: Strongest, entropy: list[float], names: list[str], path: Path) -> None:
    with atomic_path(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["unit", "strongest", "images", "entropy", "most_frequent", "share"])
        for unit, (values, labels) in enumerate(zip(strongest.values, strongest.labels, strict=True)):
            top = int(labels.mode().values)
            share = (labels == top).double().mean().item()
            row = [unit, f"{values[0]:.6g}", len(labels), f"{entropy[unit]:.4f}", names[top], f"{share:.3f}"]
            writer.writerow(row)


if __name__ == "__main__":
    main()
