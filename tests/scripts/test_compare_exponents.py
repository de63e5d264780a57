"""Accuracy and alignment against B."""

import csv
import shutil
from pathlib import Path

import pytest

from tests.helpers import PHOTOS, load_script, script_status
from timm_bcos.weights.catalog import CLOTHES

pytest.importorskip("scipy")
script = load_script("compare_exponents")


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four photos one is labeled wrongly; Wilson's interval of 3 of 4 is known."""
    for name, photo in (("hat", "hat"), ("pants", "pants"), ("shoes", "shoes"), ("skirt", "jacket")):
        (tmp_path / "test" / name).mkdir(parents=True)
        shutil.copy(PHOTOS / "clothes" / f"{photo}.jpg", tmp_path / "test" / name)
    (tmp_path / "classes.txt").write_text("\n".join(CLOTHES))
    given = (tmp_path, tmp_path / "out", "bcos_efficientnet_lite0.clothing", "--class-map", tmp_path / "classes.txt")
    assert script_status(monkeypatch, script, *given) == 0
    with (tmp_path / "out" / "exponents.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["b"], row["right"], row["images"], row["top1"]) == ("2.0", "3", "4", "75.0")
    assert (float(row["top1_low"]), float(row["top1_high"])) == pytest.approx((30.06, 95.44), abs=0.01)
    assert 0 < float(row["alignment_low"]) < float(row["alignment"]) < float(row["alignment_high"]) < 1
    assert (tmp_path / "out" / "exponents.png").stat().st_size > 1000


def test_the_figure_is_ordered_by_b() -> None:
    points = [script.Point("n", b, 1, 2, 50.0, 40.0, 60.0, b / 10, 0.0, 1.0) for b in (2.0, 1.0, 1.5)]
    accuracy, alignment = script.figure(points).axes
    assert accuracy.lines[0].get_xdata().tolist() == [1.0, 1.5, 2.0]
    assert alignment.lines[0].get_ydata().tolist() == pytest.approx([0.1, 0.15, 0.2])
