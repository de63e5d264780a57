"""Train what a TOML file lists with timm's train.py, each network with several seeds, one after the other.

    python scripts/train_runs.py scripts/runs/clothes.toml runs --train-script train.py weights=lite0.safetensors \
        data=clothes_by_people

A table of the file is a run: `options` for train.py, after the `options` at the top, which all runs have, and perhaps
`task`, options of `timm-bcos run`. In `options` {seed}, {out} (the folder of all runs) and the names given on the
command line are replaced. A run is trained for the seeds 0, 1, ... below its `seeds` or those of the top, into
`runs/NAME-SEED`; what is finished is not trained again, what was interrupted resumes.
"""

import argparse
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import tomllib
from timm_training import train
from tqdm import tqdm

from timm_bcos import InputError
from timm_bcos.cli.failures import exit_status
from timm_bcos.judging.settings import remember_settings


@dataclass(frozen=True)
class Training:
    """One of the trainings: its name with its seed, its options, and those of `timm-bcos run`."""

    name: str
    options: tuple[str, ...]
    task: tuple[str, ...] = ()


def trainings(plan: Mapping[str, Any], names: Mapping[str, str]) -> list[Training]:
    """All trainings that a file lists, those of one seed after each other.

    Args:
        plan: What the file says.
        names: What stands in braces, and what for.

    Raises:
        InputError: For a name in braces that was not given.
    """
    runs = {name: run for name, run in plan.items() if isinstance(run, dict)}
    found = []
    for seed in range(max(run.get("seeds", plan.get("seeds", 1)) for run in runs.values())):
        for name, run in runs.items():
            if seed < run.get("seeds", plan.get("seeds", 1)):
                text = f"{plan.get('options', '')} {run['options']} --seed {seed}"
                options, task = (tuple(shlex.split(t)) for t in (_filled(text, names, seed), run.get("task", "")))
                found.append(Training(f"{name}-{seed}", options, task))
    return found


def _filled(text: str, names: Mapping[str, str], seed: int) -> str:
    try:
        return text.format_map({**names, "seed": seed})
    except KeyError as error:
        raise InputError(f"the options need a value of {error}: give {error.args[0]}=VALUE") from error


def chosen(found: Sequence[Training], only: Sequence[str]) -> list[Training]:
    """Those whose names begin with one of `only`, or all."""
    some = [t for t in found if not only or any(t.name == name or t.name.startswith(f"{name}-") for name in only)]
    if not some:
        raise InputError(f"--only {' '.join(only)}: choose of {', '.join(t.name for t in found)}")
    return some


def run(args: argparse.Namespace) -> None:
    names = dict(text.split("=", 1) for text in args.names) | {"out": str(args.out)}
    found = chosen(trainings(tomllib.loads(args.plan.read_text()), names), args.only)
    for training in tqdm(found, "trainings", disable=None):
        settings = {name: shlex.join(o) for name in ("options", "task") if (o := getattr(training, name))}
        remember_settings(args.out / training.name, settings)
        train(args.out / training.name, args.train_script, training.options, training.task)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path, help="a TOML file")
    parser.add_argument("out", type=Path, help="folder of all trainings")
    parser.add_argument("names", nargs="*", metavar="NAME=VALUE", help="what stands in braces in the options")
    parser.add_argument("--train-script", type=Path, required=True, help="timm's train.py")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="of runs, or of one training (NAME-SEED)")
    raise SystemExit(exit_status(partial(run, parser.parse_intermixed_args())))


if __name__ == "__main__":
    main()
