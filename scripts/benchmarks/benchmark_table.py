"""Merge the results of `scripts/benchmarks/benchmark.py --json` into docs/results/speed.csv.

New measurements replace old rows of the same benchmark; all other rows stay.

python scripts/benchmarks/benchmark_table.py times.json compiled.json
python scripts/maintenance/results_tables.py --write
"""

import argparse
import csv
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmark import ratios

from timm_bcos.files import write_csv

DOCS = Path(__file__).parents[2] / "docs"
FIELDS = (
    "network", "batch", "side", "mode", "what", "implementation", "milliseconds", "relative_time", "q25", "q75",
    "added_mib", "relative_memory",
)  # fmt: skip
KEY = 5  # fields that say what was measured: all contestants of it, in one run


def rows(found: dict[str, Any]) -> Iterator[tuple[object, ...]]:
    """A row per model, job, mode and contestant."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for result in found["results"]:
        groups.setdefault((result["network"], mode(result["settings"]), result["job"]), []).append(result)
    for (network, how, job), results in groups.items():
        times = {result["contestant"]: result["seconds"] for result in results}
        plain = next(result for result in results if result["contestant"] == "plain")
        for result in results:
            kind, settings = result["contestant"], result["settings"]
            ratio, low, high = (f"{value:.2f}" for value in ratios(times, kind))
            memory = (
                ("", "") if result["mib"] is None else (f"{result['mib']:.0f}", f"{result['mib'] / plain['mib']:.2f}")
            )
            milliseconds = f"{1e3 * statistics.median(times[kind]):.0f}"
            yield network, settings["batch"], settings["size"], how, job, kind, milliseconds, ratio, low, high, *memory


def mode(settings: dict[str, Any]) -> str:
    """What is not the default: compiled, a precision, a layout, a device."""
    words = ["compiled" if settings["compiled"] else "eager"]
    words += [settings["dtype"]] if settings["dtype"] != "float32" else []
    words += ["channels_last"] if settings["channels_last"] else []
    return ", ".join(words + ([settings["device"]] if settings["device"] != "cpu" else []))


def merged(old: list[list[str]], new: list[list[str]]) -> list[list[str]]:
    """The rows with those replaced that were measured again: all contestants of a model, size, mode and job."""
    measured = {tuple(row[:KEY]) for row in new}
    return [row for row in old if tuple(row[:KEY]) not in measured] + new


def main() -> None:
    """Read all files, and write one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="written by scripts/benchmarks/benchmark.py --json")
    files = parser.parse_args().files
    new = [[str(value) for value in row] for path in files for row in rows(json.loads(path.read_text()))]
    table = DOCS / "results" / "speed.csv"
    with table.open(newline="") as file:
        _, *old = csv.reader(file)
    write_csv(table, FIELDS, merged(old, new))


if __name__ == "__main__":
    main()
