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
from typing import Any

import pytest
import timm
import torch
from threadpoolctl import threadpool_limits

from tests.helpers import PHOTOS, ROOT, command
from timm_bcos import InputError
from timm_bcos.data.photos import open_photo, photo_transform
from timm_bcos.distributed import Processes, started_processes

MODEL = "bcos_cifar_resnet20"
# Runs functions, then the command lines of a JSON list, and writes what they return to a file. Process 1 dies at last.
WORKER = """
import json, os, signal, sys
import torch
from timm_bcos.cli.app import start
from timm_bcos.cli.exceptions import exit_status
from timm_bcos.distributed import current_processes, distributed_map, on_main, process_group
from timm_bcos.errors import UnsupportedModuleError

class Odd(Exception):  # cannot be unpickled
    def __init__(self, a, b):
        super().__init__(f"{a} and {b}")

def squares(numbers):
    for number in numbers:
        if number == 5:
            raise error
        print("at", number, file=sys.stderr)
        yield number ** 2, current_processes().rank

def attempt(function):
    found = []
    try:
        for item in function():
            found.append(item)
    except Exception as error:
        found.append(f"{type(error).__name__}: {error}")
    return found

def kill(numbers):
    for number in numbers:
        if number == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        yield number

def die():
    with process_group():
        list(distributed_map(kill, range(8)))

torch.set_num_threads(1)
found = {}
with process_group() as processes:
    error = ValueError("five")
    found["whole"] = attempt(lambda: distributed_map(squares, range(5)))
    found["fewer"] = attempt(lambda: distributed_map(squares, range(1)))
    found["none"] = attempt(lambda: distributed_map(squares, []))
    found["failed"] = attempt(lambda: distributed_map(squares, range(9)))
    error = Odd("one", "two")
    found["odd"] = attempt(lambda: distributed_map(squares, range(9)))
    error = UnsupportedModuleError(["a.b: no rule"])
    found["own"] = attempt(lambda: distributed_map(squares, range(9)))
    found["main"] = attempt(lambda: [on_main(lambda: processes.rank)])
    found["main fails"] = attempt(lambda: [on_main(lambda: 1 / 0)])
    found["left early"] = [next(distributed_map(squares, range(9))), on_main(lambda: "left")]
    found["again"] = attempt(lambda: distributed_map(squares, range(3)))
found["alone"] = attempt(lambda: distributed_map(squares, range(3)))
found["statuses"] = [exit_status(lambda: start(line)) for line in json.loads(sys.argv[1])]
with open(sys.argv[2], "w") as file:
    json.dump(found, file)
found["lost"] = exit_status(die)
with open(sys.argv[2], "w") as file:
    json.dump(found, file)
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
    "probe": ["probe", "kinds", "--model", MODEL, "--batch-size", "4"],
    "html": ["explain", "own", "again/a.png", "--model", MODEL, "--html"],
}  # fmt: skip
REFUSED = [
    ["evaluate", "metrics", *USED, "--metric", "nonsense"],
    ["check", "--model", MODEL],
    ["gallery", "classes", *USED, "--images", "40", "--out", "two/none.png"],
]


def lines(out: str) -> list[list[str]]:
    own = {"probe": ["--cache", f"features_{out}"]}
    return [[*line, *own.get(name, []), "--out", f"{out}/{name}"] for name, line in COMMANDS.items()]


def start_worker(rank: int, port: int, arguments: list[list[str]], folder: Path) -> subprocess.Popen[str]:
    variables = dict(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, json.dumps(arguments), f"found{rank}.json"],
        env={**os.environ, **variables, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_in_two(arguments: list[list[str]], folder: Path) -> list[tuple[str, str, dict[str, Any]]]:
    """Stdout, stderr and results of each process."""
    port = free_port()
    workers = [start_worker(rank, port, arguments, folder) for rank in range(2)]
    said = [worker.communicate() for worker in workers]
    found = [json.loads((folder / f"found{rank}.json").read_text()) for rank in range(2)]
    return [(*streams, own) for streams, own in zip(said, found, strict=True)]


@dataclass
class Runs:
    """What one process and two processes have written.

    Attributes:
        folder: Folder with the results in `one` and `two`.
        said: Stdout of the commands in one process.
        complained: Their stderr.
        statuses: Exit statuses of the commands in one process.
        workers: Stdout, stderr and results of each of the two.
    """

    folder: Path
    said: str
    complained: str
    statuses: list[int]
    workers: list[tuple[str, str, dict[str, Any]]]


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
    for name in ("class2", "class3"):
        (folder / "kinds" / name).mkdir(parents=True)
        for path in sorted((folder / "photos" / name).iterdir())[:5]:
            shutil.copy(path, folder / "kinds" / name)
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
    (first, _, found), (second, _, others) = runs.workers
    assert first == runs.said.replace("one/", "two/") and second == ""
    assert found["statuses"] == others["statuses"] == [*runs.statuses, 2, 2, 2]
    assert runs.statuses == [int(name == "explain") for name in COMMANDS]  # one photo is broken


def test_errors_are_printed_once_and_name_the_process(runs: Runs) -> None:
    said = [line for _, errors, _ in runs.workers for line in errors.splitlines()]
    errors = [line for line in said if line.startswith("timm-bcos: ")]
    assert sum("no metric 'nonsense'" in line for line in errors) == 1
    assert sum("(check) runs in one process: start it without torchrun" in line for line in errors) == 1
    assert sum("fewer than the 40 requested" in line for line in errors) == 1
    assert len(errors) == 4 and all(line.startswith("timm-bcos: process ") for line in errors)
    assert sum("photos failed: broken.png" in line for line in said) == 1
    assert "".join(errors for _, errors, _ in runs.workers).count("left out: chefer") == 1


SQUARES = [[k**2, k % 2] for k in range(5)]  # and the process that computed each


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("whole", SQUARES),
        ("fewer", SQUARES[:1]),
        ("none", []),
        ("failed", [*SQUARES, "ValueError: five"]),
        ("odd", [*SQUARES, "Odd: one and two"]),
        (
            "own",
            [*SQUARES, "UnsupportedModuleError: cannot convert 1 module(s); the model is unchanged:\n  - a.b: no rule"],
        ),
        ("main", [0]),
        ("main fails", ["ZeroDivisionError: division by zero"]),
        ("left early", [[0, 0], "left"]),
        ("again", SQUARES[:3]),
    ],
)
def test_every_process_gets_all_results(name: str, expected: list[object], runs: Runs) -> None:
    """In order, and an error after the results of the items before it. Where it is raised, it keeps its type."""
    found = [worker[name] for _, _, worker in runs.workers]
    if name in ("odd", "own"):  # of another type elsewhere
        assert {"odd": "RuntimeError: Odd: one and two"}.get(name, "BcosError" + expected[-1][22:]) == found[0].pop()
        assert found[1].pop() == expected[-1]
        expected = expected[:-1]
    assert found == [expected, expected]


def test_without_the_group_each_process_is_alone(runs: Runs) -> None:
    assert [worker["alone"] for _, _, worker in runs.workers] == [[[0, 0], [1, 0], [4, 0]]] * 2


def test_messages_of_all_processes_come_from_process_0_in_order(runs: Runs) -> None:
    (_, first, _), (_, second, _) = runs.workers
    lines = [line for line in first.splitlines() if line.startswith("at ")]
    assert lines[:6] == ["at 0", "at 1", "at 2", "at 3", "at 4", "at 0"]
    assert sum(line.startswith("at ") for line in second.splitlines()) == 3  # when it was alone


def test_a_process_that_is_killed(runs: Runs) -> None:
    (_, said, found), (_, _, other) = runs.workers
    assert "lost" not in other and found["lost"] == 2
    assert "process 0 of 2: the connection to another process was lost" in said.splitlines()[-1]
    assert "results written so far are kept" in said.splitlines()[-1]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (dict(RANK="0", WORLD_SIZE="two"), "WORLD_SIZE='two'"),
        (dict(RANK="2", WORLD_SIZE="2"), "RANK='2'"),
        (dict(RANK="-1", WORLD_SIZE="2"), "RANK='-1'"),
        (dict(RANK="1", WORLD_SIZE="2"), "MASTER_ADDR is not set: start with torchrun"),
        (dict(RANK="1", WORLD_SIZE="2", MASTER_ADDR="localhost"), "MASTER_PORT is not set"),
    ],
)
def test_incomplete_environments(variables: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        started_processes(variables)


@pytest.mark.parametrize("variables", [{}, dict(WORLD_SIZE="2"), dict(RANK="0", WORLD_SIZE="1")])
def test_single_processes(variables: dict[str, str]) -> None:
    assert started_processes(variables) == Processes(0, 1)
