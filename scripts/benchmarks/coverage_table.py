"""The page docs/coverage.md, a row per model file, and docs/coverage.csv, a row per architecture, from measured rows.

    python scripts/benchmarks/coverage_table.py coverage

The folder is the output of `scripts/benchmarks/model_coverage.py`: rows.jsonl, and made.json with the command and
versions.
"""

import argparse
import csv
import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from timm_bcos.files import atomic_path

DOCS = Path(__file__).parents[2] / "docs"
PHOTO = Path(__file__).parents[1] / "photos" / "chelsea.jpg"
TORCHVISION = "torchvision/"
GOALS = dict(error64=1e-10, error32=1e-4, preserving=1e-3)


@dataclass
class Row:
    """What is measured of one architecture.

    Attributes:
        file: timm's model file, or torchvision's.
        arch: The architecture.
        params: Its parameters, in millions.
        size: Image size.
        gamma: γ of every layer of the conversion.
        verdict: 'exact', or why not.
        error64: Completeness error in float64.
        error32: In float32.
        image_share: Share of logit − logit bias that the image explains.
        shift: Largest relative change of a logit in explanation mode, in float64.
        rounding: Where the shift exceeds its goal: the same for an image changed in its last digits.
        bcos_share: Share of the weights that are in B-cos layers; the rest are gates, tables and what stays linear.
        gradients: 'all' if a training step gives each parameter a finite gradient, else the first without.
        preserving: Largest relative error of the logits of the function-preserving conversion, in float32.
        preserving64: In float64, where the float32 figure misses its goal.
        breaks_at: Where exactness ends.
        seconds: How long it took.
    """

    file: str
    arch: str
    params: float = 0.0
    size: int = 0
    gamma: float = 1.0
    verdict: str = ""
    error64: float | None = None
    error32: float | None = None
    image_share: float | None = None
    shift: float | None = None
    rounding: float | None = None
    bcos_share: float | None = None
    gradients: str = ""
    preserving: float | None = None
    preserving64: float | None = None
    breaks_at: str = ""
    seconds: float = 0.0


def read(path: Path) -> list[Row]:
    """Rows of an earlier run; a last line cut short by an interruption is dropped."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(Row(**json.loads(line)))
        except json.JSONDecodeError:
            continue
    return rows


def summary(rows: Iterable[Row]) -> str:
    """How many of each library reach each goal, in a line."""
    found = _counts(rows)
    return "; ".join(f"{library}: " + ", ".join(f"{goal} {n}" for goal, n in goals.items()) for library, goals in found)


def summary_table(rows: Iterable[Row]) -> str:
    """The same as a table."""
    found = _counts(rows)
    goals = list(found[0][1])
    cells = [[goal, *(counted[goal] for _, counted in found)] for goal in goals]
    return markdown_table(["", *(library for library, _ in found)], cells)


def _counts(rows: Iterable[Row]) -> list[tuple[str, dict[str, str]]]:
    libraries: dict[str, list[Row]] = dict(timm=[], torchvision=[])
    for row in rows:
        libraries["torchvision" if row.file.startswith(TORCHVISION) else "timm"].append(row)
    return [(library, _count(part)) for library, part in libraries.items() if part]


def _count(rows: list[Row]) -> dict[str, str]:
    files = by_file(rows).values()
    complete = sum(all(row.verdict == "exact" for row in part) for part in files)
    kept = sum(row.preserving is not None and row.preserving <= GOALS["preserving"] for row in rows)
    return {
        "architectures exact": f"{sum(row.verdict == 'exact' for row in rows)} of {len(rows)}",
        "files with every architecture exact": f"{complete} of {len(files)}",
        f"function preserved to {GOALS['preserving']:g}": f"{kept} of {len(rows)}",
        "training reaches every parameter": f"{sum(row.gradients == 'all' for row in rows)} of {len(rows)}",
    }


def by_file(rows: Iterable[Row]) -> dict[str, list[Row]]:
    files: dict[str, list[Row]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: (row.file.startswith(TORCHVISION), row.file)):
        files[row.file].append(row)
    return files


HEADER = [
    "file", "architectures", "params", "exact", "error64", "error32", "shift", "bcos_share", "gradients", "preserving",
]  # fmt: skip


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """A table whose columns after the first are aligned to the right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in [header, rule, *rows])


def file_table(rows: Iterable[Row]) -> str:
    """One row per model file: counts, ranges, and the worst figure of its architectures."""
    return markdown_table(HEADER, [_file_row(file, part) for file, part in by_file(rows).items()])


def _file_row(file: str, rows: list[Row]) -> list[str]:
    sizes = [f"{size:.3g}" for size in sorted(row.params for row in rows)]
    shares = [row.bcos_share for row in rows if row.bcos_share is not None]
    exact = sum(row.verdict == "exact" for row in rows)
    trained = sum(row.gradients == "all" for row in rows)
    return [
        f"`{file}`", str(len(rows)), "–".join(dict.fromkeys([sizes[0], sizes[-1]])), str(exact),
        *(_largest(rows, name) for name in ("error64", "error32", "shift")),
        f"{min(shares):.2g}" if shares else "", str(trained), _largest(rows, "preserving"),
    ]  # fmt: skip


def _largest(rows: list[Row], name: str) -> str:
    values = [getattr(row, name) for row in rows if getattr(row, name) is not None]
    return f"{max(values):.1e}" if values else ""


PAGE = """\
# Coverage

This page shows which timm and torchvision models convert to B-cos models with exact explanations. Each architecture
was converted by [`bcosify`](converting.md), and its explanation of a photo was measured by
`{command}` with {versions}. Models are untrained; the photo is `scripts/photos/{photo}`.

{summary}
The table has a row for each model file of timm and torchvision. [coverage.csv](coverage.csv) has a row for each
architecture.

| column | meaning |
| --- | --- |
| architectures | number of measured architectures: all with up to 60 million parameters, at least the smallest |
| params | their parameters in millions |
| exact | number of exact architectures: both errors reach their goals, and `timm_bcos.check` finds no violation |
| error64, error32 | largest difference of Σ contributions + bias and the logit, relative to logit − logit bias, \
in float64 and float32; goals {error64:g} and {error32:g} |
| shift | largest relative change of a logit in explanation mode, in float64; goal {error64:g} |
| bcos_share | smallest share of weights in B-cos layers; the others belong to gates, tables and layers that stay \
linear |
| gradients | number of architectures in which one training step gives every parameter a finite gradient |
| preserving | largest relative error of the logits after conversion with B = 1 and biases, in float32; goal \
{preserving:g} |

{missed}

{table}"""

ROUNDING = """\
Some exact architectures miss a goal because untrained models of many layers amplify rounding errors. The CSV file
shows this: column `rounding` has the change of the logits when the image changes in its last digits, for the
{shifted} architectures whose shift exceeds its goal (a shift of up to ten times this value is rounding). Column
`preserving64` has the last column in float64, for the {count} architectures that miss its goal in float32 ({names})."""


def page(rows: list[Row], made: dict[str, str]) -> str:
    """The text of docs/coverage.md.

    Args:
        rows: Measured architectures.
        made: 'command' and 'versions'.
    """
    unlike = [f"`{row.arch}`" for row in rows if row.preserving64 is not None]
    shifted = sum(row.rounding is not None for row in rows)
    missed = ROUNDING.format(shifted=shifted, count=len(unlike), names=", ".join(unlike) or "none")
    table = file_table(rows)
    return PAGE.format(**made, photo=PHOTO.name, summary=summary_table(rows), missed=missed, table=table, **GOALS)


def write_pages(rows: list[Row], made: dict[str, str], folder: Path) -> None:
    """Write coverage.md and coverage.csv into a folder."""
    with atomic_path(folder / "coverage.md") as path:
        path.write_text(page(rows, made), encoding="utf-8")
    with atomic_path(folder / "coverage.csv") as path, path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        for _, part in by_file(rows).items():
            writer.writerows({key: _rounded(value) for key, value in asdict(row).items()} for row in part)


def _rounded(value: object) -> object:
    return f"{value:.3g}" if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what scripts/benchmarks/model_coverage.py measured")
    parser.add_argument("--out", type=Path, default=DOCS, help="where the page and the CSV file go")
    args = parser.parse_args()
    write_pages(read(args.folder / "rows.jsonl"), json.loads((args.folder / "made.json").read_text()), args.out)


if __name__ == "__main__":
    main()
