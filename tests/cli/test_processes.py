"""Commands in two processes, as torchrun starts them: files, reports and exit statuses are those of one process."""

import io
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest
import timm
import torch
from threadpoolctl import threadpool_limits

from tests.helpers import PHOTOS, ROOT, command
from timm_bcos.data.photos import open_photo, photo_transform

MODEL = "bcos_cifar_resnet20"
# Runs the command lines of a JSON list, one after the other, and writes their exit statuses to a file.
WORKER = """
import json, sys
import torch
from timm_bcos.cli.app import start
from timm_bcos.cli.exceptions import exit_status
torch.set_num_threads(1)
lines = json.loads(sys.argv[1])
print(json.dumps([exit_status(lambda: start(line)) for line in lines]), file=open(sys.argv[2], "w"))
"""
DATA = ["--data-dir", "photos", "--class-map", "classes.txt"]
USED = [*DATA, "--model", MODEL]
SAMPLE, SHOWN = ["--threshold", "0", "--reuse"], ["--show", "3"]
COMMANDS = {
    "game": ["evaluate", "pointing-game", *USED, *SAMPLE, "--cells", "2", "--grids", "3", "--smooth", "1",
             "--method", "chefer", "--method", "bcos", "--method", "ixg"],
    "metrics": ["evaluate", "metrics", *USED, "--images", "3", "--metric", "randomization", "--metric", "deletion",
                "--method", "bcos", "--method", "chefer", "--method", "gradcam"],
    "aggatt.png": ["evaluate", "aggatt", *USED, "--reuse", "--grids", "3", "--cells", "1", "--method", "bcos"],
    "compare": ["evaluate", "compare", f"a={MODEL}.cifar10", f"b={MODEL}.cifar10", *DATA],
    "methods.png": ["gallery", "methods", *USED, *SHOWN, "--method", "gradcam", "--method", "chefer", "--method",
                    "bcos"],
    "classes.png": ["gallery", "classes", *USED, *SHOWN, "--images", "1"],
    "neurons": ["neurons", *USED, "--layer", "layer3", "--units", "2", "--images", "2", "--strongest", "9"],
    "concepts": ["concepts", "own/a.png", "own/b.png", *USED, "--layer", "layer3", "--method", "kmeans", "--count", "2",
                 "--images", "2"],
    "explain": ["explain", "own", "again/a.png", "broken.png", "--model", MODEL, "--top", "1"],
    "html": ["explain", "own", "again/a.png", "--model", MODEL, "--html"],
}  # fmt: skip
REFUSED = [
    ["evaluate", "metrics", *USED, "--metric", "nonsense"],
    ["check", "--model", MODEL],
    ["gallery", "classes", *USED, "--images", "40", "--out", "two/none.png"],
]


def lines(out: str) -> list[list[str]]:
    return [[*line, "--out", f"{out}/{name}"] for name, line in COMMANDS.items()]


def start_worker(rank: int, port: int, arguments: list[list[str]], folder: Path) -> subprocess.Popen[str]:
    variables = dict(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, json.dumps(arguments), f"statuses{rank}.json"],
        env={**os.environ, **variables, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_in_two(arguments: list[list[str]], folder: Path) -> list[tuple[str, str, list[int]]]:
    """Stdout, stderr and exit statuses of each process."""
    port = free_port()
    workers = [start_worker(rank, port, arguments, folder) for rank in range(2)]
    said = [worker.communicate() for worker in workers]
    statuses = [json.loads((folder / f"statuses{rank}.json").read_text()) for rank in range(2)]
    return [(*streams, codes) for streams, codes in zip(said, statuses, strict=True)]


@dataclass
class Runs:
    """What one process and two processes have written.

    Attributes:
        folder: Folder with the results in `one` and `two`.
        statuses: Exit statuses of the commands in one process.
        workers: Stdout, stderr and exit statuses of each of the two.
    """

    folder: Path
    said: str
    complained: str
    statuses: list[int]
    workers: list[tuple[str, str, list[int]]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    folder = tmp_path_factory.mktemp("processes")
    write_photos(folder)
    threads, here = torch.get_num_threads(), Path.cwd()
    torch.set_num_threads(1)
    os.chdir(folder)
    try:
        with threadpool_limits(1), redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
            statuses = [command(*line) for line in lines("one")]
        shutil.copytree("one/game", "two/game")
        cut_off(folder / "two" / "game")
        workers = run_in_two([*lines("two"), *REFUSED], folder)
        yield Runs(folder, out.getvalue(), err.getvalue(), statuses, workers)
    finally:
        os.chdir(here)
        torch.set_num_threads(threads)


def cut_off(game: Path) -> None:
    """What an interrupted run leaves: some predictions, some grids, and a torn line."""
    for name, kept in (("confidences.csv", 11), ("values.csv", 5)):
        rows = (game / name).read_bytes().splitlines(keepends=True)
        (game / name).write_bytes(b"".join(rows[:kept]) + rows[kept][:5])
    for path in game.iterdir():
        if path.name not in ("confidences.csv", "values.csv", "settings.json"):
            path.unlink()


def write_photos(folder: Path) -> None:
    model = timm.create_model(MODEL, pretrained=True).eval()
    names = [f"class{k}" for k in range(10)]
    (folder / "classes.txt").write_text("\n".join(names))
    for path in sorted(PHOTOS.glob("*.jpg")):
        photo = open_photo(path).resize((160, 160))
        for k in range(16):
            left, top = 40 * (k % 4), 40 * (k // 4)
            crop = photo.crop((left, top, left + 40, top + 40))
            with torch.no_grad():
                label = int(model(photo_transform(model)[1](crop)[None]).argmax())
            target = folder / "photos" / names[label] / f"{path.stem}_{k}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            crop.save(target)
    for name in ("own/a.png", "own/b.png", "again/a.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        crop.rotate(len(name) * 90).save(folder / name)
    (folder / "broken.png").write_bytes(b"no image")


def files(folder: Path) -> dict[str, bytes]:
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: contents for name, contents in found.items() if not name.endswith("settings.json")}  # name folders


def test_files_are_those_of_one_process(runs: Runs) -> None:
    """Bitwise, with a pointing game that one process began and two resumed."""
    one, two = files(runs.folder / "one"), files(runs.folder / "two")
    assert list(one) and sorted(one) == sorted(two)
    assert [name for name in one if one[name] != two[name]] == []
    assert {name.partition("/")[0] for name in one} == set(COMMANDS)


def test_process_0_prints_what_one_process_prints(runs: Runs) -> None:
    (first, _, statuses), (second, _, others) = runs.workers
    assert first == runs.said.replace("one/", "two/") and second == ""
    assert statuses == others == [*runs.statuses, 2, 2, 2]
    assert runs.statuses == [int(name == "explain") for name in COMMANDS]  # one photo is broken


def test_errors_are_printed_once_and_name_the_process(runs: Runs) -> None:
    said = [line for _, errors, _ in runs.workers for line in errors.splitlines()]
    errors = [line for line in said if line.startswith("timm-bcos: ")]
    assert sum("no metric 'nonsense'" in line for line in errors) == 1
    assert sum("(check) runs in one process: start it without torchrun" in line for line in errors) == 1
    assert sum("fewer than the 40 requested" in line for line in errors) == 1
    assert len(errors) == 3 and all(line.startswith("timm-bcos: process ") for line in errors)
    assert sum("photos failed: broken.png" in line for line in said) == 1
    assert "".join(errors for _, errors, _ in runs.workers).count("left out: chefer") == 1
