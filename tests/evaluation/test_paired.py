"""Paired gains of the pointing game and bootstrap intervals, on cases worked by hand."""

import numpy as np
import pytest

from timm_bcos.evaluation.paired import bootstrap_interval, gains_table, paired_gains


def test_intervals_know_of_clusters() -> None:
    """Two people, all of whose photos are alike: the interval is all that two draws of two can give."""
    values = np.array([1.0] * 30 + [0.0] * 10)
    senders = ["a"] * 30 + ["b"] * 10
    assert bootstrap_interval(values, senders) == (0.0, 1.0)  # both draws are b in a quarter of the cases
    low, high = bootstrap_interval(values, [str(i) for i in range(40)])
    expected = 1.96 * (0.75 * 0.25 / 40) ** 0.5
    assert low == pytest.approx(0.75 - expected, abs=0.03) and high == pytest.approx(0.75 + expected, abs=0.03)
    assert bootstrap_interval(np.full(9, 0.5), ["a", "b", "c"] * 3) == (0.5, 0.5)


def test_intervals_of_independent_values() -> None:
    values = np.random.default_rng(0).normal(1, 2, 400)
    low, high = bootstrap_interval(values)
    error = values.std() / 400**0.5
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.02)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.02)


def test_gains_compare_what_both_have_played() -> None:
    """Grid 2 is the own explanation's alone, grid 3 the other's."""
    values = {
        (2, 1, 1, "bcos", 0): [0.5, 0.7],
        (2, 1, 1, "bcos", 1): [0.8, 0.8],
        (2, 1, 1, "bcos", 2): [0.0, 0.0],
        (2, 1, 1, "gradcam", 0): [0.2, 0.4],
        (2, 1, 1, "gradcam", 1): [0.9, 0.5],
        (2, 1, 1, "gradcam", 3): [1.0, 1.0],
        (2, 15, 1, "gradcam", 0): [1.0, 1.0],
    }
    (gain,) = paired_gains(values, ["bcos", "gradcam", "input_x_gradient"])
    assert (gain.method, gain.cells, gain.window, gain.scale, gain.grids) == ("gradcam", 2, 1, 1, 2)
    assert (gain.low, gain.mean, gain.high) == pytest.approx((0.1, 0.2, 0.3))  # the grids' gains: 0.3 and 0.1
    assert gain.verdict == "ahead"
    assert "| gradcam | 2×2 | raw | 2 | +0.200 (+0.100 to +0.300) | ahead |" in gains_table([gain])


@pytest.mark.parametrize(("shares", "verdict"), [((0.0, 0.1), "ahead"), ((0.9, 1.0), "behind"), ((0.0, 1.0), "open")])
def test_verdicts(shares: tuple[float, float], verdict: str) -> None:
    own = {(3, 15, 1, "bcos", grid): [0.5] for grid in range(20)}
    other = {(3, 15, 1, "gradcam", grid): [shares[grid % 2]] for grid in range(20)}
    (gain,) = paired_gains(own | other, ["gradcam"])
    assert gain.verdict == verdict
