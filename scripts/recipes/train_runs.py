"""Train what a TOML file lists with timm's train.py, each model with several seeds, one after the other.

    python scripts/recipes/train_runs.py scripts/recipes/clothes.toml runs --train-script train.py \
        weights=lite0.safetensors \
        data=clothes_by_people

A table of the file is a run: `options` for train.py, after the `options` at the top, which all runs have, or with
`like` after those of another run; and perhaps `task`, options of `timm-bcos run`. In `options` {seed}, {out} (the
folder of all runs) and the names given on the command line are replaced. A run is trained for the seeds 0, 1, ... below
its `seeds` or those of the top, into `runs/NAME-SEED`; what is finished is not trained again, what was interrupted
resumes.
"""

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from timm_training import train
from tqdm import tqdm

from timm_bcos import InputError
from timm_bcos.cli.exceptions import exit_status
from timm_bcos.evaluation.results import remember_settings

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pip install tomli


@dataclass(frozen=True)
class Training:
    """One of the trainings: its name with its seed, its options, and those of `timm-bcos run`."""

    name: str
    options: tuple[str, ...]
    task: tuple[str, ...] = ()


def trainings(plan: Mapping[str, Any], names: Mapping[str, str], only: Sequence[str] = ()) -> list[Training]:
    """What a file lists, trainings of one seed after each other.

    Args:
        plan: What the file says.
        names: What stands in braces, and what for.
        only: Names of runs, or of single trainings (NAME-SEED); empty for all.

    Raises:
        InputError: If there are none, or for a name in braces that was not given.
    """
    runs = {name: run for name, run in plan.items() if isinstance(run, dict)}
    seeds = {name: run.get("seeds", plan.get("seeds", 1)) for name, run in runs.items()}
    found = [(name, seed) for seed in range(max(seeds.values())) for name in runs if seed < seeds[name]]
    some = [(name, seed) for name, seed in found if not only or {name, f"{name}-{seed}"} & set(only)]
    if not some:
        raise InputError(f"--only {' '.join(only)}: choose of {', '.join(f'{n}-{seed}' for n, seed in found)}")
    return [_training(name, seed, plan, names) for name, seed in some]


def _options_of(name: str, plan: Mapping[str, Any]) -> str:
    if name not in plan:
        raise InputError(f"like = {name!r}: name a run of the file")
    run = plan[name]
    before = _options_of(run["like"], plan) if "like" in run else plan.get("options", "")
    return f"{before} {run.get('options', '')}"


def _training(name: str, seed: int, plan: Mapping[str, Any], names: Mapping[str, str]) -> Training:
    text = f"{_options_of(name, plan)} --seed {seed}"
    try:
        options = text.format_map({**names, "seed": seed})
    except KeyError as error:
        raise InputError(f"the options need a value of {error}: give {error.args[0]}=VALUE") from error
    task = plan[name].get("task", "")
    return Training(f"{name}-{seed}", tuple(shlex.split(options)), tuple(shlex.split(task)))


def run(args: argparse.Namespace) -> None:
    names = dict(text.split("=", 1) for text in args.names) | {"out": str(args.out)}
    found = trainings(tomllib.loads(args.plan.read_text()), names, args.only)
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
