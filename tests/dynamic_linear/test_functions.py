"""Functions on the linear path that few models call: `torch.vmap`, lists, sparse tensors, equations, special functions.

Each block gives logits that `explain` must take apart to the last digits of float64, without a warning.
"""

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import vmap

import timm_bcos

D = torch.float64
Block = Callable[[Tensor], Tensor]
C = torch.linspace(-1, 1, 6, dtype=D)[:, None, None]
EYE = torch.eye(6, dtype=D)
MIXES = torch.stack([EYE.flip(0), EYE + 0.3])
DIAGONAL = torch.arange(6).repeat(2, 1)


def square(z: Tensor) -> Tensor:
    """(N, 6, 6) of a map (N, 6, 8, 8)."""
    return z[:, :, 0, :6]


def definite(z: Tensor) -> Tensor:
    return EYE + square(z) @ square(z).mT


def as_diagonals(z: Tensor) -> Tensor:
    rows = [torch.sparse_coo_tensor(DIAGONAL, image.mean((1, 2)), (6, 6)).to_dense().sum(0) for image in z]
    return torch.stack(rows)


def in_place_lists(z: Tensor) -> Tensor:
    one, other = z * 1, z * 2
    torch._foreach_mul_([one, other], [z.sigmoid(), z.tanh()])
    torch._foreach_add_([one, other], 0.5)
    return one + other


def bags(z: Tensor) -> Tensor:
    """Each of three rows of a table counts as much as the image says."""
    rows = [
        F.embedding_bag(torch.tensor([[0, 2, 4]]), EYE, mode="sum", per_sample_weights=image.mean((1, 2))[None, :3])
        for image in z
    ]
    return torch.cat(rows)


EXACT: dict[str, Block] = {
    "vmap, a linear map": lambda z: vmap(lambda image: torch.einsum("oc,chw->ohw", MIXES[1], image))(z),
    "vmap, a gate": lambda z: vmap(lambda image: image * image.sigmoid())(z),
    "vmap, a constant": lambda z: vmap(lambda image: image + C)(z),
    "vmap, activations": lambda z: vmap(lambda image: F.gelu(image) + F.relu(image))(z),
    "vmap, a norm": lambda z: vmap(lambda image: F.layer_norm(image, image.shape, None, C.expand(image.shape)))(z),
    "vmap, attention": lambda z: vmap(vmap(lambda image: image.softmax(-1) @ image))(z),
    "vmap over an ensemble": lambda z: vmap(lambda mix: torch.einsum("oc,nchw->nohw", mix, z))(MIXES).mean(0),
    "vmap over constants": lambda z: vmap(lambda shift: z + shift)(torch.stack([C, 2 * C])).mean(0),
    "lists, products": lambda z: sum(torch._foreach_mul([z, z * 2], [z.sigmoid(), z.tanh()])),  # type: ignore[arg-type,return-value]
    "lists, a constant": lambda z: sum(torch._foreach_add([z, z], [C.expand_as(z), 0 * z.sigmoid()])),  # type: ignore[arg-type,return-value]
    "lists, in place": in_place_lists,
    "norms of lists as gates": lambda z: torch.stack([image * torch._foreach_norm([image])[0] for image in z]),
    "sparse values": as_diagonals,
    "sparse and dense again": lambda z: z.mean((2, 3)).to_sparse().to_dense(),
    "sparse.addmm": lambda z: torch.sparse.addmm(C.flatten(), z.mean((2, 3)), EYE.flip(0)),
    "segments": lambda z: torch.segment_reduce(z.mean((2, 3)).T, "sum", lengths=torch.tensor([1, 3, 2])).T.repeat(1, 2),
    "weighted bags of rows": bags,
    "solve_triangular": lambda z: torch.linalg.solve_triangular(EYE + square(z).triu(), square(z), upper=True),
    "cholesky_solve": lambda z: torch.cholesky_solve(square(z), torch.linalg.cholesky(definite(z))),
    "lstsq": lambda z: torch.linalg.lstsq(definite(z).detach(), square(z)).solution,
    "eigenvalues as gates": lambda z: z * torch.linalg.eigvalsh(definite(z))[..., None, None],
    "singular values as gates": lambda z: z * torch.linalg.svdvals(z.flatten(2))[..., None, None],
    "ndtr as a gate": lambda z: z * torch.special.ndtr(z),
    "frac as a gate": lambda z: z * z.frac(),
    "prod as a gate": lambda z: z * z.prod(1, keepdim=True),
    "cumprod as a gate": lambda z: z * z.cumprod(1),
    "logcumsumexp as a gate": lambda z: z * z.logcumsumexp(1),
    "a loss as a gate": lambda z: z * F.mse_loss(z, z.flip(1), reduction="none"),
    "xlogy": lambda z: torch.xlogy(z, z.abs() + 1),
    "grid_sampler": lambda z: torch.grid_sampler(
        z, F.affine_grid(torch.eye(2, 3, dtype=D).expand(len(z), 2, 3), list(z.shape), align_corners=False), 0, 0, False
    ),
}
INEXACT: dict[str, Block] = {
    "vmap, a gate is added": lambda z: vmap(lambda image: image + image.sigmoid())(z),
    "vmap, a detached value is added": lambda z: vmap(lambda image: image + image.detach())(z),
    "lists, a gate is added": lambda z: sum(torch._foreach_add([z, z], [C.expand_as(z), z.sigmoid()])),  # type: ignore[arg-type,return-value]
    "products are added": lambda z: z + z.prod(1, keepdim=True),
    "a normal distribution is added": lambda z: z + torch.special.ndtr(z),
}


class Model(nn.Module):
    def __init__(self, block: Block) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.Linear(6, 4, bias=False)
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.block(self.conv(x))
        z = z.flatten(2).mean(2) if z.ndim > 2 else z
        return self.head(z)  # type: ignore[no-any-return]


def converted(block: Block) -> nn.Module:
    torch.manual_seed(0)
    return timm_bcos.bcosify(Model(block), timm_bcos.BcosConfig(mean=(0.0,), std=(1.0,))).double().eval()


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, 8, 8, dtype=D, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", EXACT)
def test_exact(name: str, images: Tensor) -> None:
    model = converted(EXACT[name])
    with warnings.catch_warnings():
        warnings.simplefilter("error", timm_bcos.InexactWarning)
        explanation = timm_bcos.explain(model, images, 1)
    with torch.no_grad():
        logits = model(images)[:, 1]
    total = (explanation.weights * explanation.inputs).sum((1, 2, 3)) + explanation.bias
    assert (total - logits).abs().max() < 1e-10 * logits.abs().max()
    assert explanation.weights.abs().max() > 0
    report = timm_bcos.check(model, images)
    assert report.exact, report


@pytest.mark.parametrize("name", INEXACT)
def test_inexact(name: str, images: Tensor) -> None:
    model = converted(INEXACT[name])
    with pytest.warns(timm_bcos.InexactWarning, match="adds? a value that depends on the image"):
        timm_bcos.explain(model, images, 1)
    assert not timm_bcos.check(model, images).exact
