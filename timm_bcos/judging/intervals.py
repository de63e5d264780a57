"""Intervals of means, by bootstrap over what has been drawn independently."""

from collections.abc import Sequence

import numpy as np

__all__ = ["bootstrap_interval"]


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
