"""Constants that the image chooses, or that it writes where torch does not count: they are no constants."""

import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad

import timm_bcos

D = torch.float64
Block = Callable[[Tensor, nn.Module], Tensor]


class Model(nn.Module):
    """A block between two layers, with a table of six rows."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 6, 3, bias=False), nn.Linear(6, 4, bias=False)
        self.block, self.table = block, nn.Parameter(torch.linspace(-1, 1, 6)[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.conv(x), self).mean((2, 3)))  # type: ignore[no-any-return]


def converted(block: Block) -> nn.Module:
    torch.manual_seed(0)
    config = timm_bcos.BcosConfig.finetune(b=1, bias=True, mean=(0.5,), std=(0.5,))
    rules: Any = timm_bcos.RULES | {Model: timm_bcos.keep}
    return timm_bcos.bcosify(Model(block), config, rules=rules).double().eval()


def best(z: Tensor) -> Tensor:
    """Index of the strongest channel."""
    return z.mean((2, 3))[0].argmax()


def statistic(z: Tensor) -> Tensor:
    return z.detach().mean((0, 2, 3))[:, None, None]


def through_numpy(z: Tensor, model: Any) -> Tensor:
    torch.from_numpy(model.table.detach().numpy()).copy_(statistic(z))
    return z + model.table


def through_dlpack(z: Tensor, model: Any) -> Tensor:
    torch.from_dlpack(model.table.detach()).copy_(statistic(z))
    return z + model.table


def in_a_thread(z: Tensor, model: Any) -> Tensor:
    thread = threading.Thread(target=model.table.data.copy_, args=(statistic(z),))
    thread.start()
    thread.join()
    return z + model.table


def by_gradient(z: Tensor) -> int:
    slopes: Tensor = grad(lambda a: (a * a * a).sum())(z.detach())
    return int(slopes.mean((0, 2, 3)).argmax())


CHOSEN: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "a row": lambda z, m: z + m.table[best(z)],
    "select": lambda z, m: z + m.table.select(0, best(z)),
    "a slice": lambda z, m: z + m.table[best(z) : best(z) + 1],
    "narrow": lambda z, m: z + m.table.narrow(0, best(z), 1),
    "a row of each image": lambda z, m: torch.stack([t + m.table[t.mean((1, 2)).argmax()] for t in z]),
    "where": lambda z, m: torch.where(z > 0, z, m.table[best(z)]),
    "a bound": lambda z, m: z.clamp(min=m.table[best(z)]),
    "a bias": lambda z, m: F.linear(z.mT, torch.eye(z.shape[2], dtype=D), m.table[best(z)].expand(z.shape[2], 1)[:, 0]),
    "a number of a derivative": lambda z, m: z + m.table[by_gradient(z)],
    "a size": lambda z, m: z + torch.ones(3, dtype=D).expand(best(z) + 1, 3).sum(),  # type: ignore[arg-type]
    "a branch": lambda z, m: z + m.table if float(z.detach().abs().mean()) > 0.15 else z,
    "written through numpy": through_numpy,
    "written through dlpack": through_dlpack,
}
KEPT: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "the whole table": lambda z, m: z + m.table,
    "a part of it": lambda z, m: z + m.table[:3].repeat(2, 1, 1),
    "one row": lambda z, m: z + m.table[2],
}


@pytest.fixture
def images() -> Tensor:
    return torch.rand(1, 3, 12, 12, dtype=D, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", CHOSEN)
def test_constants_that_depend_on_the_image(name: str, images: Tensor) -> None:
    with pytest.warns(timm_bcos.InexactWarning, match="not exact"):
        timm_bcos.explain(converted(CHOSEN[name]), images)
    report = timm_bcos.check(converted(CHOSEN[name]), images)
    assert not report.exact
    assert report.violations


def test_what_a_thread_writes_is_found_by_check(images: Tensor) -> None:
    assert not timm_bcos.check(converted(in_a_thread), images).exact


@pytest.mark.parametrize("name", KEPT)
def test_constants_that_do_not(name: str, images: Tensor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", timm_bcos.InexactWarning)
        timm_bcos.explain(converted(KEPT[name]), images)
    assert timm_bcos.check(converted(KEPT[name]), images).exact


@pytest.mark.parametrize("pair", [(0, 3), (1, 2), (2, 3)])
def test_pairs_of_images_that_see_each_other(pair: tuple[int, int]) -> None:
    """Wherever in the batch they stand."""

    def mixed(z: Tensor, model: Any) -> Tensor:
        rows = list(z)
        for image in pair:
            rows[image] = rows[image] * z[list(pair)].amax(0).detach()
        return torch.stack(rows)

    x = torch.rand(4, 3, 12, 12, dtype=D, generator=torch.Generator().manual_seed(0))
    model = converted(lambda z, m: mixed(z, m) if len(z) == 4 else z)
    with pytest.warns(timm_bcos.InexactWarning, match="other images of the batch"):
        timm_bcos.explain(model, x, 1)


def test_errors_of_torch_in_the_backward_pass_name_the_model(images: Tensor) -> None:
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, z: Tensor) -> Tensor:
            return z.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
            raise TypeError("object of type 'bool' has no len()")

    with pytest.raises(timm_bcos.ModelStateError, match=r"cannot be explained: object of type 'bool' has no len"):
        timm_bcos.explain(converted(lambda z, m: Fails.apply(z)), images, 1)  # type: ignore[no-untyped-call]
