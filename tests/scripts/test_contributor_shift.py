"""What a network sees in the photos of each contributor, on cases worked by hand and on the photos that come along."""

import csv
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.helpers import PHOTOS, load_script, script_status
from timm_bcos.models.loading import load_model
from timm_bcos.weights.catalog import CLOTHES

pytest.importorskip("scipy")
script = load_script("contributor_shift")


def test_the_floor_has_nothing_of_the_middle() -> None:
    """Corners are mirrored outwards, so that their edges meet."""
    image = torch.zeros(3, 8, 8)
    image[:, 2:6] = 9
    image[:, :, 2:6] = 9
    image[0, :2, :2], image[0, :2, -2:], image[0, -2:, :2], image[0, -2:, -2:] = 1, 2, 3, 4
    floor = script.floor(image)
    assert floor.shape == image.shape and floor.max() == 4
    assert floor[0, ::2, ::2].tolist() == [[1, 2, 2, 1], [3, 4, 4, 3], [3, 4, 4, 3], [1, 2, 2, 1]]


def test_a_smaller_photo_keeps_its_edges() -> None:
    image = torch.arange(10.0).expand(1, 10, 10)
    small = script.smaller(image)
    assert small.shape == image.shape
    assert torch.equal(small[:, :, 0], small[:, :, 1]) and torch.equal(small[:, :, -1], small[:, :, -2])
    assert (small[0, 0, 1:9].diff() > 0.9).all()


def test_the_margin() -> None:
    maps = torch.randn(2, 16, 16, dtype=torch.float64)
    expected = [
        sum(float(m[i, j]) for i in range(16) for j in range(16) if not (2 <= i < 14 and 2 <= j < 14)) for m in maps
    ]
    assert script.in_margin(maps).tolist() == pytest.approx(expected)


def test_the_summary_by_hand() -> None:
    def sight(person: str, **changes: object) -> object:
        said = dict(cropped=1, whole=1, small=0, floor=0, margin=0.2, against=0.0, against_margin=0.0)
        return script.Sight("net", "photo", person, 1, **said | changes)

    rows = list(
        script.summary([sight("a"), sight("a", whole=0, margin=0.4, against=3.0, against_margin=0.6), sight("b")])
    )
    assert [(row["contributor"], row["photos"]) for row in rows] == [("a", 2), ("b", 1), ("all", 3)]
    assert (rows[0]["cropped"], rows[0]["whole"], rows[0]["small"], rows[0]["floor"]) == ("100.0", "50.0", "0.0", "0.0")
    assert (rows[0]["margin"], rows[0]["margin_low"], rows[0]["margin_high"]) == ("0.30", "0.20", "0.40")
    assert (rows[0]["wrong"], rows[0]["against_margin"], rows[1]["against_margin"]) == (1, "0.20", "")


def test_shows_a_clear_error_of_each_contributor_first() -> None:
    def sight(network: str, photo: str, person: str, whole: int, against: float = 0.0) -> object:
        return script.Sight(network, photo, person, 1, whole, whole, whole, 0, 0.2, against, 0.0)

    before = [
        sight("before", *x) for x in [("a", "1", 0, 1.0), ("b", "1", 0, 3.0), ("c", "1", 0, 2.0), ("d", "2", 2, 0.5)]
    ]
    before += [sight("before", "e", "3", 0, 9.0), sight("before", "f", "3", 1)]
    after = [sight("after", photo, "1", 1) for photo in "abcdf"] + [sight("after", "e", "3", 0, 1.0)]
    assert [s.photo for s in script.turned([*before, *after], 3)] == ["b", "d", "c"]  # e is still wrong


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pants labeled as a hat are wrong, and what speaks against the hat sums up to the difference of the logits."""
    for name in ("hat", "shoes"):
        (tmp_path / "test" / name).mkdir(parents=True)
    (tmp_path / "classes.txt").write_text("\n".join(CLOTHES))
    shutil.copy(PHOTOS / "clothes" / "shoes.jpg", tmp_path / "test" / "shoes" / "s.jpg")
    shutil.copy(PHOTOS / "clothes" / "pants.jpg", tmp_path / "test" / "hat" / "h.jpg")
    (tmp_path / "people.csv").write_text("file,contributor\nshoes/s.jpg,1\nhat/h.jpg,2\n")
    out = tmp_path / "out"
    own = "own=bcos_efficientnet_lite0.clothing"
    given = (tmp_path, tmp_path / "people.csv", out, own, "--class-map", tmp_path / "classes.txt")
    assert script_status(monkeypatch, script, *given) == 0
    with (out / "photos.csv").open(newline="") as file:
        hat, shoes = csv.DictReader(file)
    assert (shoes["whole"], shoes["against"], hat["whole"]) == ("6", "0.0", "4")
    assert 0 < float(shoes["margin"]) < 1 and float(hat["against"]) > 0
    with (out / "contributors.csv").open(newline="") as file:
        assert [row["contributor"] for row in csv.DictReader(file)] == ["2", "1", "all"]
    for wrong in ("own=no_such_network", "bcos_efficientnet_lite0.clothing"):
        assert script_status(monkeypatch, script, *given[:3], wrong) == 2


def test_the_picture() -> None:
    model = load_model("bcos_efficientnet_lite0.clothing").eval()
    photo = Image.open(PHOTOS / "clothes" / "shoes.jpg")
    chosen = [script.Sight("before", "s.jpg", "9", 6, 1, 1, 1, 1, 0.2, 3.0, 0.5)]
    figure = script.draw(dict(before=model, after=model), {"s.jpg": photo}, chosen)
    titles = [ax.get_title() for ax in figure.axes]
    assert titles[0] == "shoes, contributor 9" and titles[1] == titles[2].replace("after", "before")
    said, meant, *_ = (bar.get_width() for bar in figure.axes[-1].patches)
    assert titles[1].startswith("before: hat − shoes, -") and said < meant
