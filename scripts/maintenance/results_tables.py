"""Render the stored results (docs/results/*.csv) as tables in docs/ and scripts/experiments/REPORT.md.

python scripts/maintenance/results_tables.py --write
"""

import argparse
import csv
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from markdown_blocks import DOCS, markdown_table, replace_block

RESULTS, SPEED, CASE = (DOCS / f"{page}.md" for page in ("results", "speed", "case-study"))
REPORT = DOCS.parent / "scripts" / "experiments" / "REPORT.md"
Row = dict[str, str]


@dataclass(frozen=True)
class Table:
    """One table: which rows of a file, and how they are laid out.

    Attributes:
        file: In docs/results, without its suffix.
        only: Values that the rows must have.
        rows: The columns of the file that make a row of the table, by their titles there.
        columns: How a column of the table is called, as a format of the file's columns; empty for flat tables.
        cell: What stands in a cell, likewise; for flat tables the remaining columns, by their titles.
        best: The column of the file whose largest value in each column of the table is set in bold, among the rows
            with the largest `among`.
        among: See `best`.
        page: Where the table stands.
    """

    file: str
    rows: dict[str, str]
    columns: str = ""
    cell: str = ""
    only: Row = field(default_factory=dict)
    best: str = ""
    among: str = ""
    page: Path = REPORT


SMOOTH = {"1": "raw", "3": "smoothed 3×3", "15": "smoothed 15×15"}
GAME = dict(
    file="pointing_game",
    rows=dict(method="{method}", grids="{grids}"),
    columns="{network}, {smoothing}",
    cell="{median} ({q25} to {q75})",
    best="median",
    among="grids",
)
GAINS = dict(
    file="localization_gains",
    rows=dict(method="{method}", grids="{grids} of {cells}×{cells}"),
    columns="{smoothing}",
    cell="{mean} ({low} to {high})",
)
RUNS = {
    "run": "`{run}`",
    "B": "{b}",
    "maps": "{smoothing}",
    "`bcos`": "{bcos}",
    "`gradcam`": "{gradcam}",
    "`bcos` − `gradcam`": "{gain} ({interval})",
}
EMBEDDED = {
    "model": "`{model}`",
    "B": "{b}",
    "test images": "{images}",
    "top-1 (%)": "{top1}",
    "plain counterpart (%)": "{plain}",
}
METRIC = dict(file="metrics", rows=dict(method="{method}"), columns="{metric}", cell="{mean} ± {std}")
PLAIN = "tf_efficientnet_lite0, plain"
ABLATION = {
    "model": "{network}",
    "parameters (M)": "{parameters}",
    "top-1 (%)": "{top1}",
    "alignment": "{alignment}",
}

EXPONENTS = {
    "model": "B = {b}",
    "parameters (M)": "{parameters}",
    "top-1 (%)": "{top1} ({top1_low} to {top1_high})",
    "alignment": "{alignment} ({alignment_low} to {alignment_high})",
}
TEACHING = {
    "B": "{b}",
    "what": "{what}",
    "steps of 128 crops": "{steps}",
    "right": "{right} of 500",
    "top-1 (%)": "{top1} ({low} to {high})",
}

PAIRED = {
    "model": "{model}",
    "seeds": "{seeds}",
    "top-1 (%)": "{top1}",
    "by seed": "{by_seed}",
    "− first row": "{gain}",
    "interval over clusters": "{interval}",
    "over images": "{images_interval}",
    "McNemar's p": "{mcnemar}",
}
PHOTO_EXPONENTS = {
    "photos": "{data}",
    "model": "{network}",
    "B": "{b}",
    "top-1 (%)": "{top1} ({top1_low} to {top1_high})",
    "alignment": "{alignment} ({alignment_low} to {alignment_high})",
}
CONTRIBUTORS = {
    "contributor": "{contributor}",
    "photos": "{photos}",
    "cropped (%)": "{cropped}",
    "whole (%)": "{whole}",
    "smaller (%)": "{small}",
    "floor alone (%)": "{floor}",
    "margin's share": "{margin} ({margin_low} to {margin_high})",
    "errors": "{wrong}",
    "margin's part in errors": "{against_margin}",
}

TABLES: dict[str, Table] = {
    "embedded models": Table("embedded", EMBEDDED, page=RESULTS),
    **{
        f"pointing game, {data}, {cells}×{cells}": Table(**GAME, only=dict(data=data, cells=cells), page=page)  # type: ignore[arg-type]
        for data, cells, page in (
            ("CIFAR-10", "2", REPORT),
            ("CIFAR-10", "3", REPORT),
            ("clothes", "2", REPORT),
            ("clothes", "3", RESULTS),
            ("ImageNet", "2", REPORT),
            ("ImageNet", "3", REPORT),
        )
    },
    "localization of runs": Table("localization_runs", RUNS),
    **{
        f"gains, {network}": Table(**GAINS, only=dict(network=network))  # type: ignore[arg-type]
        for network in ("bcos_cifar_resnet20", "bcos_efficientnet_lite0.clothing")
    },
    **{
        f"metrics, {data}, {network}": Table(**METRIC, only=dict(data=data, network=network), page=page)  # type: ignore[arg-type]
        for data, network, page in (
            ("CIFAR-10", "bcos_cifar_resnet20", RESULTS),
            ("clothes", "bcos_efficientnet_lite0.clothing", REPORT),
            ("clothes", PLAIN, REPORT),
        )
    },
    "ablation, b": Table("exponents", EXPONENTS),
    "ablation, growth": Table("ablations", ABLATION, only=dict(family="growth")),
    "teaching": Table("teaching", TEACHING),
    "new people": Table("new_people", PAIRED),
    "new people, more epochs": Table("new_people_long", PAIRED),
    "levers": Table("levers", PAIRED),
    "levers, rows of W(x)": Table("levers_cosine", PAIRED),
    "fewer photos": Table("learning_curves", {"photos": "{share} %"} | PAIRED),
    "new people, contributors": Table(
        "new_people_contributors", dict(contributor="{cluster}", images="{images}"), "{model}", "{top1}"
    ),
    "groceries": Table("groceries", PAIRED),
    "exponents on photos": Table("exponents_photos", PHOTO_EXPONENTS),
    **{
        f"contributors, {network}": Table("contributors", CONTRIBUTORS, only=dict(network=network), page=CASE)
        for network in ("before", "after")
    },
    "conversion": Table("conversion", {"model": "{network}", "top-1 (%)": "{top1}", "right": "{right} of {images}"}),
    "trained": Table(
        "trained",
        {
            "data": "{data}",
            "model": "{network}",
            "how": "{how}",
            "epochs": "{epochs}",
            "validation (%)": "{validation}",
            "test (%)": "{test}",
            "minutes": "{minutes}",
            "log": "{links}",
        },
    ),
    **{
        f"speed, {what}": Table(
            "speed",
            {"model": "{network}", "": "{mode}"},
            "{implementation}",
            "{relative_time} ({q25} to {q75})",
            only=dict(what=what),
            page=SPEED,
        )
        for what in ("training step", "inference", "explanation", "16 classes")
    },
    "memory": Table(
        "speed",
        {"model": "{network}"},
        "{implementation}",
        "{added_mib} ({relative_memory}×)",
        only=dict(what="training step", mode="eager"),
        page=SPEED,
    ),
    "method speed": Table(
        "method_speed",
        dict(method="{method}"),
        "batch of {batch}",
        "{images_per_second} ({relative_time}×)",
        page=SPEED,
    ),
}


def read(table: Table) -> list[Row]:
    with (DOCS / "results" / f"{table.file}.csv").open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if table.only.items() <= row.items()]
    return [
        row | dict(
            smoothing=SMOOTH.get(row.get("smooth", ""), ""), links=links(row),
            interval=interval(row), images_interval=interval(row, "images_"),
        ) for row in rows
    ]  # fmt: skip


def interval(row: Row, prefix: str = "") -> str:
    """Of its ends, if the row has them."""
    low, high = (row.get(f"{prefix}{end}") for end in ("low", "high"))
    return f"{low} to {high}" if low and high else ""


def links(row: Row) -> str:
    """To the logs of a training."""
    names = row.get("logs", "").split()
    return ", ".join(f"[{i}](../../docs/results/training/{name}.csv)" for i, name in enumerate(names, 1))


def render(table: Table) -> str:
    """The table in Markdown."""
    rows = read(table)
    if not table.columns:
        cells = [[text.format(**row) for text in table.rows.values()] for row in rows]
        return markdown_table(list(table.rows), cells, numeric_from=len(table.rows))
    columns = list(dict.fromkeys(table.columns.format(**row) for row in rows))
    found: dict[tuple[str, ...], dict[str, str]] = {}
    best = {column: largest(table, of_column(table, rows, column)) for column in columns}
    for row in rows:
        key, column = tuple(text.format(**row) for text in table.rows.values()), table.columns.format(**row)
        cell = table.cell.format(**row)
        found.setdefault(key, {})[column] = f"**{cell}**" if row is best[column] else cell
    lines = [[*key, *(cells.get(column, "") for column in columns)] for key, cells in found.items()]
    return markdown_table([*table.rows, *columns], lines, numeric_from=len(table.rows))


def of_column(table: Table, rows: Iterable[Row], column: str) -> list[Row]:
    return [row for row in rows if table.columns.format(**row) == column]


def largest(table: Table, rows: list[Row]) -> Row | None:
    """The row of the best value."""
    if not table.best:
        return None
    most = max(int(row[table.among]) for row in rows)
    return max((row for row in rows if int(row[table.among]) == most), key=lambda row: float(row[table.best]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="replace the tables in the pages")
    is_written = parser.parse_args().write
    for name, table in TABLES.items():
        if is_written:
            replace_block(table.page, name, render(table))
        else:
            print(f"{name}\n\n{render(table)}")


if __name__ == "__main__":
    main()
