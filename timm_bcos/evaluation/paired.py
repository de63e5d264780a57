"""How far the network's own explanation is ahead of each post-hoc method, by the grids that both have played."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

__all__ = [
    "OWN",
    "Gain",
    "bootstrap_interval",
    "gains_table",
    "paired_gains",
]


def bootstrap_interval(
    values: np.ndarray, clusters: Sequence[str] | None = None, *, draws: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """A 95 % interval of the mean (percentiles of the resampled means).

    Args:
        values: (N,).
        clusters: N names: values of one cluster resemble each other, so that whole clusters are resampled. None for N
            independent values.
        draws: Resamples.
        seed: Of the draws.
    """
    names = np.arange(len(values)) if clusters is None else clusters
    groups, places = np.unique(names, return_inverse=True)
    sums, counts = np.bincount(places, values), np.bincount(places)
    generator, means = np.random.default_rng(seed), np.empty(draws)
    for draw in range(draws):
        chosen = generator.integers(len(groups), size=len(groups))
        means[draw] = sums[chosen].sum() / counts[chosen].sum()
    low, high = np.quantile(means, (0.025, 0.975)).tolist()
    return low, high


OWN = "bcos"  # the method that is compared with the others


@dataclass(frozen=True)
class Gain:
    """The own explanation's share of the cells minus another method's, on the same grids.

    Attributes:
        method: The other one.
        cells: Per side of a grid.
        window: Of the smoothing in pixels.
        grids: Number of them.
        mean: Over the grids, each of which counts by the mean of its cells.
        low: Lower end of the 95 % interval (bootstrap over grids).
        high: Its upper end.
    """

    method: str
    cells: int
    window: int
    grids: int
    mean: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """'ahead' or 'behind' where the interval has no 0, else 'open'."""
        return "ahead" if self.low > 0 else "behind" if self.high < 0 else "open"


def paired_gains(values: Mapping[tuple[int, int, str, int], Sequence[float]], methods: Iterable[str]) -> list[Gain]:
    """A gain for each grid size, window and method; none where the own explanation has not played.

    Args:
        values: Shares of the cells by cells per side, window, method and number of the grid.
        methods: That may be compared with.
    """
    means: dict[tuple[int, int], dict[str, dict[int, float]]] = {}
    for (cells, window, method, grid), shares in sorted(values.items()):
        means.setdefault((cells, window), {}).setdefault(method, {})[grid] = float(np.mean(shares))
    found = []
    for (cells, window), played in means.items():
        own = played.get(OWN, {})
        for method in methods:
            both = sorted(own.keys() & played.get(method, {}).keys())
            if method != OWN and both:
                differences = np.array([own[grid] - played[method][grid] for grid in both])
                low, high = bootstrap_interval(differences)
                found.append(Gain(method, cells, window, len(both), float(differences.mean()), low, high))
    return found


def gains_table(gains: Sequence[Gain]) -> str:
    """A Markdown table."""
    lines = [
        f"| {OWN} minus | cells | smoothing | grids | mean (95 %) | {OWN} is |",
        "| --- |" + " ---: |" * 4 + " --- |",
    ]
    for gain in gains:
        interval = f"{gain.mean:+.3f} ({gain.low:+.3f} to {gain.high:+.3f})"
        size, window = f"{gain.cells}×{gain.cells}", f"{gain.window}×{gain.window}"
        lines.append(f"| {gain.method} | {size} | {window} | {gain.grids} | {interval} | {gain.verdict} |")
    return "\n".join(lines) + "\n"
