"""AggAtt: mean maps of grids by rank, on cases worked by hand."""

import pytest
import torch
from torch import nn

from timm_bcos import InputError
from timm_bcos.evaluation.aggatt import bin_edges, mean_maps, plot_aggatt


def test_ranges_of_ranks() -> None:
    assert bin_edges(100) == [0, 2, 5, 50, 95, 98, 100]
    assert bin_edges(30) == [0, 1, 2, 15, 28, 29, 30]
    assert bin_edges(3) == [0, 1, 1, 2, 2, 2, 3]
    assert bin_edges(1) == [0, 1, 1, 1, 1, 1, 1]


def test_mean_maps_by_hand() -> None:
    """The best of three alone, then the middle one, then the worst; positive parts of sum 1."""
    maps = torch.tensor([[[1.0, 3.0], [-9.0, 0.0]], [[2.0, 0.0], [0.0, -1.0]], [[0.0, 0.0], [-5.0, 0.0]]])
    means = mean_maps(maps, torch.tensor([0.25, 1.0, 0.0]))
    assert [mean is None for mean in means] == [False, True, False, True, True, False]
    assert [mean.tolist() for mean in means if mean is not None] == [
        [[1, 0], [0, 0]], [[0.25, 0.75], [0, 0]], [[0, 0], [0, 0]]
    ]  # fmt: skip
    ten = torch.zeros(20, 1, 4)
    ten[:, 0, :] = torch.arange(20.0)[:, None] + torch.arange(4.0)
    middle = mean_maps(ten, torch.arange(20.0))[2]  # ranks 1 to 9 from the top
    expected = (ten[10:19] / ten[10:19].sum((1, 2), keepdim=True)).mean(0)
    torch.testing.assert_close(middle, expected)


def test_no_bins_without_grids() -> None:
    with pytest.raises(InputError, match="no grids"):
        plot_aggatt(nn.Identity(), [], [], ["bcos"])  # type: ignore[arg-type]
