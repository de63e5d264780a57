"""The memory that attribution methods take: what autograd keeps, and the peak of a process of its own."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import timm
import torch
from torch import Tensor, nn

from tests.helpers import enliven, real_image
from timm_bcos.attribution.registry import METHODS, WITH_GRAPH, AttributionModel, images_at_once
from timm_bcos.evaluation.pointing_game import Grid, grid_shares

pytest.importorskip("captum")
CLASSES = [0, 3, 1, 2]


@contextmanager
def kept_for_backward() -> Iterator[list[int]]:
    """Bytes of the storages that autograd keeps, each once."""
    storages: dict[int, tuple[Tensor, int]] = {}
    total: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = (tensor, storage.nbytes())  # held, so that no address is used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield total
    total.append(sum(size for _, size in storages.values()))


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    b = 1.25  # as the networks that come with the package
    return enliven(timm.create_model("bcosify", arch="test_efficientnet", num_classes=4, b=b), real_image(96, 2))


@pytest.mark.parametrize(("side", "images"), [(32, 441), (224, 9), (448, 2), (672, 1), (2000, 1)])
def test_large_images_are_fewer_in_a_pass(side: int, images: int) -> None:
    assert images_at_once(torch.empty(1, 3, side, side, device="meta")) == images
    assert images == 1 or images * side**2 <= WITH_GRAPH


def test_the_pixels_of_a_pass_are_bounded(network: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("timm_bcos.attribution.registry.WITH_GRAPH", 2 * 96 * 96)
    seen: list[int] = []
    handle = network.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    picture, grid = real_image(96), Grid(2, (0, 1, 2, 3), tuple(CLASSES))
    few = {method: grid_shares(network, picture, grid, method) for method in ("gradient", "gradcam", "bcos")}
    handle.remove()
    assert max(seen) == 2
    for method, shares in few.items():
        torch.testing.assert_close(shares, grid_shares(network, picture, grid, method, batch_size=4))


def test_gradcam_keeps_nothing_of_what_comes_before_its_layer(network: nn.Module) -> None:
    subject, x = AttributionModel(network), real_image(96)
    with kept_for_backward() as whole:
        logits = subject(subject.leaf(x))
    with kept_for_backward() as of_layer:
        METHODS["gradcam"].function(subject, x, torch.tensor([1]))
    assert logits.requires_grad and of_layer[0] < 0.1 * whole[0]


PLAY = """
import resource, sys
import torch
from timm_bcos.attribution.registry import attribute
from timm_bcos.evaluation.pointing_game import Grid, grid_shares
from timm_bcos.models.loading import load_model

side = 336
model = load_model().eval()
image, grid = torch.rand(1, 3, side, side), Grid(3, tuple(range(9)), tuple(range(9)))
for method in sys.argv[1:]:
    attribute(model, image[..., :64, :64], 0, method)  # what is imported and allocated once
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for method in sys.argv[1:]:
    grid_shares(model, image, grid, method)
    print(method, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="units of ru_maxrss")
def test_peak_memory_of_a_grid() -> None:
    """A grid of half the sides, a quarter of the pixels, of a pass of four: what a whole one takes, within 2 GiB."""
    methods = ["bcos", "gradcam", "deeplift"]
    done = subprocess.run([sys.executable, "-c", PLAY, *methods], capture_output=True, text=True, check=True)
    peaks = dict(line.split() for line in done.stdout.splitlines())
    assert list(peaks) == methods and all(int(peak) < 2048 for peak in peaks.values()), peaks
