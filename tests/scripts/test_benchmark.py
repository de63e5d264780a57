"""The benchmark's arithmetic, its files and its command line; no test depends on how long anything takes."""

import csv
import json
import sys
from pathlib import Path

import pytest

from tests.helpers import load_script

benchmark = load_script("benchmark")
table = load_script("benchmark_table")
cases, scaling = (sys.modules[f"benchmark_{part}"] for part in ("cases", "scaling"))


def test_ratios_are_of_the_same_round() -> None:
    """A moment in which everything takes ten times as long changes no ratio."""
    times = {"plain": [1.0, 10.0, 1.0, 2.0, 1.0], "ours": [2.0, 20.0, 2.0, 4.0, 2.0]}
    assert benchmark.ratios(times, "ours") == (2.0, 2.0, 2.0)
    assert benchmark.ratios({"plain": [2.0], "ours": [3.0]}, "ours") == (1.5, 1.5, 1.5)
    ratio, low, high = benchmark.ratios({"plain": [1.0, 1.0, 1.0], "ours": [1.0, 2.0, 4.0]}, "ours")
    assert (ratio, low, high) == (2.0, 1.5, 3.0)


def test_rows_measured_again_replace_the_old_ones() -> None:
    old = [["net", "8", "224", "eager", "inference", kind, "10"] for kind in ("plain", "ours, gone")]
    other = ["net", "8", "224", "compiled", "inference", "plain", "7"]
    new = ["net", "8", "224", "eager", "inference", "plain", "9"]
    assert table.merged([*old, other], [new]) == [other, new]


def test_the_exponent_of_growth() -> None:
    x = [1.0, 2.0, 4.0, 8.0]
    assert scaling.slope(x, [3 * v**1.5 for v in x]) == pytest.approx(1.5)


def test_every_contestant_does_every_job_that_is_its(tmp_path: Path) -> None:
    path = tmp_path / "times.json"
    arguments = ["resnet18", "--rounds", "1", "--batch", "1", "--size", "64", "--json", str(path)]
    benchmark.main(benchmark.parse(arguments))
    found = json.loads(path.read_text())
    assert found["rounds"] == 1 and found["threads"] >= 1
    kinds = {(row["job"], row["contestant"]) for row in found["results"]}
    assert {job for job, _ in kinds} == {"training step", "inference", "explanation"}
    assert {kind for _, kind in kinds} >= {"plain", "bcos package", "ours", "ours, fused", "ours, paper"}
    assert all(len(row["seconds"]) == 1 and row["seconds"][0] > 0 for row in found["results"])


def test_fused_and_single_contestants() -> None:
    """On a network that is small; the fused one does what the other does."""
    settings = cases.Settings(batch=1, size=64, classes=20)
    for kind in ("plain", "ours", "ours, fused", cases.SINGLY):
        case = cases.prepare("resnet10t", kind, settings)
        for job, (run, who) in cases.JOBS.items():
            if kind in who:
                run(case)
            else:
                assert kind in ("ours, fused", cases.SINGLY), job


def test_growth_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, object, str]] = []

    def measure(sweep: str, value: object, job: str, rounds: int) -> list[tuple[str, str, str]]:
        asked.append((sweep, value, job))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return [(kind, "10.0", "5") for kind in scaling.KINDS]

    monkeypatch.setattr(scaling, "measure", measure)
    monkeypatch.setattr(scaling, "SWEEPS", {"batch": (1, 2), "classes": (10, 100)})
    path = tmp_path / "scaling.csv"
    with pytest.raises(KeyboardInterrupt):
        scaling.measure_scaling(path, 1)
    path.write_text(path.read_text() + "batch,2,explan")  # an interruption in the middle of a line
    scaling.measure_scaling(path, 1)
    assert len(asked) == 9 and len(set(asked)) == 8
    rows = scaling.read_rows(path)
    assert len({(r["sweep"], r["value"], r["job"], r["contestant"]) for r in rows}) == len(rows) == 24
    scaling.plot_scaling(path, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 10_000


def test_a_point_of_growth(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(scaling, "BASE", dict(network="resnet18", batch=1, size=32, classes=10))
    monkeypatch.setattr(scaling, "peak_memory", lambda *args: 12.0)
    rows = scaling.measure("classes", 5, "explanation", 1)
    assert [row[0] for row in rows] == list(scaling.KINDS) and all(float(row[1]) > 0 for row in rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnet51"], "timm has no model 'resnet51'"),
        (["--rounds", "0"], "--rounds, --batch and --size must be at least 1"),
        (["--jobs", "flying"], "invalid choice: 'flying'"),
        (["--device", "abacus"], "invalid choice: 'abacus'"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        benchmark.parse(arguments)
    assert message in capsys.readouterr().err


def test_rows_are_a_table(tmp_path: Path) -> None:
    path = tmp_path / "scaling.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([scaling.FIELDS, ("batch", 1, "explanation", "ours", 5.5, 7)])
    assert scaling.read_rows(path)[0]["milliseconds"] == "5.5"
    assert scaling.read_rows(tmp_path / "missing.csv") == []
