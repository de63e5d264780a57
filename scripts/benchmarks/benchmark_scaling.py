"""How cost grows: time and memory against the image's size, the batch, the depth and the number of classes."""

import csv
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from benchmark_cases import JOBS, Settings, peak_memory, prepare, seconds
from tqdm import tqdm

from timm_bcos.evaluation.results import drop_torn_line
from timm_bcos.explanation.visualization import save_figure

__all__ = ["SWEEPS", "measure_scaling", "plot_scaling", "slope"]

BASE = dict(network="resnet18", batch=4, size=224, classes=1000)
DEPTHS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
SWEEPS: dict[str, Sequence[object]] = {
    "size": (112, 160, 224, 320, 448),
    "batch": (1, 2, 4, 8, 16, 32),
    "network": DEPTHS,
    "classes": (10, 100, 1000, 10000),
}
LABELS = dict(size="side of the image (pixels)", batch="images", network="layers", classes="classes")
KINDS = ("plain", "bcos package", "ours")
TIMED = ("training step", "explanation")
FIELDS = ("sweep", "value", "job", "contestant", "milliseconds", "mib")

Row = dict[str, str]


def read_rows(path: Path) -> list[Row]:
    """What has been measured."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def points() -> Iterator[tuple[str, object]]:
    """Every variable with every value."""
    for sweep, values in SWEEPS.items():
        yield from ((sweep, value) for value in values)


def measure_scaling(path: Path, rounds: int) -> None:
    """Measure what the file does not have yet, and append it point by point."""
    drop_torn_line(path)
    done = {(row["sweep"], row["value"], row["job"], row["contestant"]) for row in read_rows(path)}
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if is_new:
            writer.writerow(FIELDS)
        for (sweep, value), job in tqdm([(p, j) for p in points() for j in TIMED], "points", disable=None):
            if not all((sweep, str(value), job, kind) in done for kind in KINDS):
                writer.writerows((sweep, value, job, *row) for row in measure(sweep, value, job, rounds))
                file.flush()


def measure(sweep: str, value: object, job: str, rounds: int) -> list[tuple[str, str, str]]:
    """Median time and peak memory of each contestant, in turns."""
    point = dict(BASE, **{sweep: value})
    name = str(point.pop("network"))
    settings = Settings(**point)  # type: ignore[arg-type]
    cases = {kind: prepare(name, kind, settings) for kind in KINDS}
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for i in range(rounds + 1):
        for kind, case in cases.items():
            elapsed = seconds(JOBS[job][0], case)
            if i:
                times[kind].append(elapsed)
    del cases
    return [
        (kind, f"{1e3 * statistics.median(times[kind]):.1f}", f"{peak_memory(name, kind, job, settings):.0f}")
        for kind in KINDS
    ]


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """The exponent p of y = c · xᵖ, fitted to the logarithms."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def plot_scaling(path: Path, figure_path: Path) -> None:
    """Log-log lines: a row per job and quantity, a column per variable, the exponents in the legend."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    rows = read_rows(path)
    panels = [(job, field) for job in TIMED for field in ("milliseconds", "mib")]
    figure = Figure(figsize=(4 * len(SWEEPS), 3.2 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), len(SWEEPS), squeeze=False)
    for line, (job, field) in zip(axes, panels, strict=True):
        for ax, sweep in zip(line, SWEEPS, strict=True):
            for kind in KINDS:
                found = [row for row in rows if (row["sweep"], row["job"], row["contestant"]) == (sweep, job, kind)]
                x = [float(row["value"].removeprefix("resnet")) for row in found]
                y = [max(float(row[field]), 0.1) for row in found]
                if len(x) > 1:
                    ax.loglog(x, y, marker="o", label=f"{kind}: exponent {slope(x, y):.2f}")
            ax.set(title=job, xlabel=LABELS[sweep], ylabel="ms" if field == "milliseconds" else "peak MiB")
            ax.set_xticks(x, [f"{value:g}" for value in x])
            ax.minorticks_off()
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            ax.set_ylim(top=1.8 * ax.get_ylim()[1])  # room for the legend
            ax.grid(alpha=0.3)
            ax.legend(fontsize="small", loc="upper left")
    save_figure(figure, figure_path)
