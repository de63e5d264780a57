"""Regions of images (cells, boxes, masks), and the metrics that use them, on cases worked by hand."""

from pathlib import Path
from typing import Any, ClassVar

import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn

from tests.helpers import LOADING, command, four_photos, real_image
from timm_bcos import InputError, MethodError, bcosify
from timm_bcos.data.datasets import load_dataset
from timm_bcos.data.regions import cell_masks, cut_cells, join_cells, region_loader, without_cell
from timm_bcos.evaluation.metrics import energy_shares, evaluate
from timm_bcos.evaluation.pointing_game import Grid


def test_cells_by_hand() -> None:
    x = torch.arange(24.0).reshape(1, 1, 4, 6)
    cells = cut_cells(x, 2)
    assert cells[1, 0].tolist() == [[3, 4, 5], [9, 10, 11]] and cells[2, 0, 0].tolist() == [12, 13, 14]
    torch.testing.assert_close(join_cells(cells, 2), x)
    several = torch.rand(3, 2, 6, 9)
    torch.testing.assert_close(join_cells(cut_cells(several, 3), 3), several)
    torch.testing.assert_close(cut_cells(several, 3)[9:18], cut_cells(several[1:2], 3))
    with pytest.raises(InputError, match="divide"):
        cut_cells(several, 2)
    assert cell_masks(4, 6, 2)[1].tolist() == [[0, 0, 0, 1, 1, 1]] * 2 + [[0] * 6] * 2
    hidden = without_cell(x.expand(2, -1, -1, -1), torch.tensor([1, -1]), 2)
    assert (hidden[0, 0, :2, 3:] == x.mean()).all() and (hidden[0, 0, 2:] == x[0, 0, 2:]).all()
    assert (hidden[1] == x[0]).all()


def test_energy_by_hand() -> None:
    maps = torch.tensor([[[3.0, 1.0], [-5.0, 0.0]], [[-1.0, 0.0], [0.0, 0.0]]])
    masks = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]] * 2)
    shares = energy_shares(maps, masks)
    assert shares[0].item() == 0.75 and shares[1].isnan()


class Cells(nn.Module):
    """A linear network whose cells weigh 0, 1, ..., 15: without one the logit falls by weight times contrast."""

    num_classes = 2
    pretrained_cfg: ClassVar[dict[str, Any]] = dict(mean=(0.0,) * 3, std=(1.0,) * 3)

    def __init__(self) -> None:
        super().__init__()
        order = torch.tensor([3, 7, 1, 15, 0, 9, 12, 5, 14, 2, 8, 10, 6, 11, 4, 13.0])
        self.weight = nn.Parameter((order[:, None, None] * cell_masks(8, 8, 4)).sum(0))

    def forward(self, x: Tensor) -> Tensor:
        logit = (x.mean(1) * self.weight).sum((1, 2))
        return torch.stack([logit, -logit], 1)


@pytest.mark.parametrize("target", [0, 1])
def test_single_deletion_by_hand(target: int) -> None:
    """Spearman's correlation is 1 - 6 Σ d² / n (n² - 1) of the differences of ranks."""
    model, x = Cells().eval(), 0.2 + 0.6 * torch.rand(2, 3, 8, 8)
    found = evaluate(model, x, target, "single_deletion", "input_x_gradient")
    sign = 1 - 2 * target
    sums = torch.stack([(x.mean(1) * model.weight * m).sum((1, 2)) for m in cell_masks(8, 8, 4)], 1) * sign
    average = x.mean((1, 2, 3))[:, None]
    falls = sums - torch.stack([(model.weight * m).sum() for m in cell_masks(8, 8, 4)]) * average * sign
    ranks = [values.argsort(1).argsort(1) for values in (sums, falls.detach())]
    expected = 1 - 6 * (ranks[0] - ranks[1]).square().sum(1) / (16 * (16**2 - 1))
    torch.testing.assert_close(found, expected.double())


def test_a_task_deletes_cells() -> None:
    from timm_bcos import DeletionClassificationTask

    seen: list[Tensor] = []
    model = nn.Flatten()
    model.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    x = torch.rand(400, 1, 8, 8)
    DeletionClassificationTask(model, lambda output, target: output.sum())(x, torch.zeros(400))
    changed = (seen[0] != x).reshape(400, 4, 2, 4, 2).permute(0, 1, 3, 2, 4).flatten(3).all(3).flatten(1)  # (400, 16)
    assert (changed.sum(1) <= 1).all() and 140 < changed.any(1).sum() < 260
    assert (changed.sum(0) > 3).all()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for label in range(2):
        for number in range(2):
            path = tmp_path / "photos" / str(label) / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image = (four_photos(32)[2 * label + number] * 255).byte().permute(1, 2, 0).numpy()
            Image.fromarray(image).resize((80, 40)).save(path)
    return tmp_path / "photos"


@pytest.fixture
def small() -> nn.Module:
    plain = timm.create_model(
        "test_resnet", num_classes=2, pretrained_cfg_overlay=dict(input_size=(3, 32, 32), crop_pct=1.0)
    )
    return bcosify(plain).eval()


def test_boxes_and_masks_are_cut_like_photos(photos: Path, small: nn.Module, tmp_path: Path) -> None:
    """80 × 40 becomes 64 × 32, of which the middle half is kept: pixels 20 to 60, at 0.8 of the size."""
    boxes = tmp_path / "boxes.csv"
    boxes.write_text("image,left,top,right,bottom\n0/0.png,30,10,40,20\n0/0.png,50,0,80,40\n0/1.png,0,0,10,40\n")
    dataset = load_dataset(str(photos), 2)
    load = region_loader(small, dataset, boxes)
    mask = load(0)
    assert mask.shape == (32, 32) and set(mask.unique().tolist()) == {0.0, 1.0}
    assert mask[8:16, 8:16].all() and mask[:, 24:].all()
    assert mask.sum() == 8 * 8 + 32 * 8
    folder = tmp_path / "masks" / "0"
    folder.mkdir(parents=True)
    drawn = Image.new("L", (80, 40))
    drawn.paste(255, (30, 10, 40, 20))
    drawn.paste(255, (50, 0, 80, 40))
    drawn.save(folder / "0.png")
    assert (region_loader(small, dataset, tmp_path / "masks")(0) == mask).all()
    with pytest.raises(InputError, match="empty once"):
        load(1)
    with pytest.raises(InputError, match=r"no box of 1/0\.png"):
        load(2)
    with pytest.raises(InputError, match=r"no mask of 0/1\.png"):
        region_loader(small, dataset, tmp_path / "masks")(1)
    Image.new("L", (8, 4)).save(folder / "1.png")
    with pytest.raises(InputError, match="8 × 4 pixels, its photo 80 × 40"):
        region_loader(small, dataset, tmp_path / "masks")(1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no boxes"),
        ("image,left\n0/0.png,3\n", "columns image, left"),
        ("image,left,top,right,bottom\n0/0.png,9,0,3,nan\n", "line 2: right must be greater"),
        ("image,left,top,right,bottom\n0/0.png,0,0,inf,9\n", "line 2: right must be greater"),
    ],
)
def test_bad_boxes(text: str, message: str, photos: Path, small: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "boxes.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        region_loader(small, load_dataset(str(photos), 2), tmp_path / "boxes.csv")


def test_bad_masks(network: nn.Module) -> None:
    x = real_image(64, 1)
    with pytest.raises(MethodError, match="--regions"):
        evaluate(network, x, 0, "energy")
    with pytest.raises(InputError, match="images' size"):
        evaluate(network, x, 0, "energy", masks=torch.ones(1, 32, 32))
    with pytest.raises(InputError, match="inside"):
        evaluate(network, x, 0, "energy", masks=torch.zeros(1, 64, 64))
    assert evaluate(network, x, 0, "energy", masks=torch.ones(1, 64, 64)).item() == pytest.approx(1)


def test_commands(
    photos: Path, small: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(LOADING, lambda *args, **kwargs: small)
    monkeypatch.setattr(
        "timm_bcos.evaluation.pointing_game.sample_grids", lambda *args, **kwargs: [Grid(1, (0,), (1,))] * 3
    )
    data = ["--data-dir", photos, "--method", "bcos"]
    assert command("evaluate", "aggatt", *data, "--n", 1, "--disconnect", "full", "--out", tmp_path / "bins.png") == 0
    assert Image.open(tmp_path / "bins.png").size[0] > 400
    boxes = tmp_path / "boxes.csv"
    names = [f"{label}/{number}.png" for label in range(2) for number in range(2)]
    boxes.write_text("image,left,top,right,bottom\n" + "".join(f"{name},20,0,40,40\n" for name in names))
    measured = ["--metric", "energy", "--metric", "single_deletion", "--out", tmp_path / "metrics"]
    assert command("evaluate", "metrics", *data, *measured, "--regions", boxes) == 0
    assert "| method | energy | single_deletion |" in capsys.readouterr().out
    assert command("evaluate", "metrics", *data, "--metric", "energy", "--out", tmp_path / "other") == 2
    assert "energy needs the regions of the objects: give --regions" in capsys.readouterr().err
    game = ["--n", 1, "--disconnect", "part", "--out", tmp_path / "game"]
    assert command("evaluate", "pointing-game", *data, *game) == 0
    assert "**1.00**" in (tmp_path / "game" / "summary.md").read_text()
    assert command("evaluate", "pointing-game", *data, *game[:2], *game[4:]) == 2
    assert "disconnect=part" in capsys.readouterr().err
