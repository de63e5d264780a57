"""Paired comparison of the model's own explanation with post-hoc methods on the same grids."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

__all__ = [
    "OWN",
    "Gain",
    "bootstrap_interval",
    "gains_table",
    "paired_gains",
    "view_name",
]


def bootstrap_interval(
    values: np.ndarray, clusters: Sequence[str] | None = None, *, draws: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """95 % bootstrap interval of a mean, from percentiles of the resampled means.

    Args:
        values: Values (N,).
        clusters: Names of the N values' clusters, which are resampled as a whole because their values are not
            independent. None for independent values.
        draws: Number of resamples.
        seed: Random seed of the resampling.

    Returns:
        Lower and upper end.
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


OWN = "bcos"  # the model's own explanation


@dataclass(frozen=True)
class Gain:
    """Localization of the model's own explanation minus that of another method, on the same grids.

    Attributes:
        method: Name of the other method.
        cells: Number of cells per side of a grid.
        window: Smoothing window in pixels.
        scale: Side of the cells of pixels over which maps are summed.
        grids: Number of grids.
        mean: Mean over the grids of the mean difference of their cells.
        low: Lower end of the 95 % interval (bootstrap over grids).
        high: Upper end of the 95 % interval.
    """

    method: str
    cells: int
    window: int
    scale: int
    grids: int
    mean: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """'ahead' or 'behind' where the interval has no 0, else 'open'."""
        return "ahead" if self.low > 0 else "behind" if self.high < 0 else "open"


def view_name(window: int, scale: int) -> str:
    """How maps are smoothed or summed before they are scored, for instance 'raw' or 'smoothed 15×15'."""
    parts = [f"smoothed {window}×{window}"] * (window > 1) + [f"cells of {scale}×{scale}"] * (scale > 1)
    return ", ".join(parts) or "raw"


def paired_gains(
    values: Mapping[tuple[int, int, int, str, int], Sequence[float]], methods: Iterable[str]
) -> list[Gain]:
    """Compute the gain for each grid size, window, scale and method that has grids in common with the own explanation.

    Args:
        values: Shares of the cells, by cells per side, window, scale, method and number of the grid.
        methods: Methods to compare with.
    """
    means: dict[tuple[int, int, int], dict[str, dict[int, float]]] = {}
    for (cells, window, scale, method, grid), shares in sorted(values.items()):
        means.setdefault((cells, window, scale), {}).setdefault(method, {})[grid] = float(np.mean(shares))
    found = []
    for panel, played in means.items():
        own = played.get(OWN, {})
        for method in methods:
            both = sorted(own.keys() & played.get(method, {}).keys())
            if method != OWN and both:
                differences = np.array([own[grid] - played[method][grid] for grid in both])
                low, high = bootstrap_interval(differences)
                found.append(Gain(method, *panel, len(both), float(differences.mean()), low, high))
    return found


def gains_table(gains: Sequence[Gain]) -> str:
    """Markdown table of the gains."""
    lines = [
        f"| {OWN} minus | cells | maps | grids | mean (95 %) | {OWN} is |",
        "| --- | ---: | --- | ---: | ---: | --- |",
    ]
    for gain in gains:
        interval = f"{gain.mean:+.3f} ({gain.low:+.3f} to {gain.high:+.3f})"
        size, maps = f"{gain.cells}×{gain.cells}", view_name(gain.window, gain.scale)
        lines.append(f"| {gain.method} | {size} | {maps} | {gain.grids} | {interval} | {gain.verdict} |")
    return "\n".join(lines) + "\n"
